"""What only the report says about finished runs, measured on what they left.

    python report/measure.py transformer RUN     measured.json, attention_words.csv in RUN
    python report/measure.py tokenizers FOLDER   tokenizers.csv, .png from FOLDER/<tokenizer>
    python report/measure.py vae_mnist RUN       measured.json, aggregate-posterior.png for each λ
    python report/measure.py vae_anime RUN       the same for faces
    python report/measure.py schedules FOLDER    schedules.png from FOLDER/monotonic and /cyclical

Of a Transformer: padding, unknown words, and attention. That is not asked whether it looks
sensible, but whether it matters: the tokens that it rests on most are deleted from each held-out
text, or as many random ones instead, and the two drops in the probability of the predicted class
are compared. Deleted words are gone, not masked.
"""

import argparse
import json
import math
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "report")]
from variant import TOKENIZERS

import transformer as t
import vae_anime
import vae_mnist

SCHEDULES = ("monotonic", "cyclical")
DELETED = 0.1  # of a text's tokens
DRAWS = 5  # random deletions a text
SEEN = 2  # a token that is rarer is unknown


def read_json(path: Path) -> dict:
    with t.one_line(path, "Finish that run first"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_arguments(run: Path) -> argparse.Namespace:
    """The command line of the run in the folder `run`; its paths start where you stand."""
    saved = read_json(run / "config.json")["arguments"]
    return argparse.Namespace(**saved | {"data": Path(saved["data"]) if saved["data"] else None})


def check_data(run: Path, hashes: dict[str, str]) -> None:
    """End unless `run` was trained on the files of these sha256."""
    if read_json(run / "config.json")["sha256"] != hashes:
        t.fail(f"{run}: trained on other files. Run it again, or move it away")


def write_table(path: Path, table: pd.DataFrame, digits: str) -> None:
    t.write_file(path, partial(table.to_csv, index=False, float_format=digits, mode="wb"))


def train_texts(news: t.News) -> list[str]:
    """The texts of train.csv, which stand before those of test.csv."""
    return news.texts[: len(news.labels)]


# --------------------------------------------------------------------------------------------------
# transformer: padding and attention
# --------------------------------------------------------------------------------------------------


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """How much of the padded batches (B, T) is padding."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / padded


@torch.no_grad()
def delete_tokens(model: t.TransformerClassifier, text: torch.Tensor) -> list[float]:
    """Probability of the predicted class of `text`, its tokens (T, …).

    Of the whole text, then without its most attended tokens, then without random ones.
    """
    count = max(1, round(DELETED * len(text)))
    _, attn = model(text[None])
    received = attn[0].mean((0, 1))  # (T,), over heads and over the tokens that look
    rest = received.argsort()[: len(text) - count].sort().values
    texts = [text, text[rest]]
    texts += [text[torch.randperm(len(text))[count:].sort().values] for _ in range(DRAWS)]
    logits, _ = model(pad_sequence(texts, batch_first=True, padding_value=t.PAD))
    p = logits.softmax(-1)  # (2 + DRAWS, C)
    p = p[:, p[0].argmax()]
    return [p[0].item(), p[1].item(), p[2:].mean().item()]


def measure_deletion(held_out: list[tuple], tokens: list[torch.Tensor]) -> dict:
    """Delete tokens of each text that is long enough, in the model that had it held out."""
    long = [(model, tokens[row]) for model, row, _ in held_out if len(tokens[row]) >= 10]
    triples = [delete_tokens(model, text) for model, text in long]
    whole, attended, random = torch.tensor(triples).T
    difference = random - attended  # > 0: the attended tokens mattered more than random ones
    return {
        "deleted_share": DELETED,
        "deletion_texts": len(triples),
        "probability": whole.mean().item(),
        "drop_attended": (whole - attended).mean().item(),
        "drop_random": (whole - random).mean().item(),
        "difference": difference.mean().item(),
        "difference_se": difference.std().item() / math.sqrt(len(triples)),
    }


@torch.no_grad()
def attention_words(
    held_out: list[tuple], tokens: list[torch.Tensor], names: list[str]
) -> pd.DataFrame:
    """The words, seen five times, that draw most attention in texts of each predicted class.

    Attention is over an even share: 1 is what each token would receive if all received the same.
    """
    found = []
    for model, row, predicted in held_out:
        words = [names[word] for word in tokens[row][:, 0]]
        _, attn = model(tokens[row][None])
        received = attn[0].mean(0).sum(0).tolist()  # mean over heads, sum over who looks
        found += [(predicted, word, share) for word, share in zip(words, received, strict=True)]
    table = pd.DataFrame(found, columns=["predicted_class", "word", "attention_over_even_share"])
    groups = table[table["word"] != names[t.UNK]].groupby(["predicted_class", "word"])
    means = groups["attention_over_even_share"].agg(["count", "mean"]).query("count >= 5")
    means = means.reset_index().sort_values("mean", ascending=False, kind="stable")
    means = means.groupby("predicted_class").head(20).sort_values("predicted_class", kind="stable")
    return means.rename(columns={"mean": "attention_over_even_share"})


def measure_transformer(run: Path) -> None:
    """measured.json: vocabulary, padding, deletions; and attention_words.csv."""
    args = read_arguments(run)
    news = t.load_news(args)
    check_data(run, news.hashes)  # held-out rows are numbered as in the files trained on
    models, state = t.load_finished(run)
    vocabulary = t.Vocabulary(**state["vocabulary"])
    texts = [t.split_text(text, vocabulary.columns) for text in train_texts(news)]
    tokens = [vocabulary.encode(text) for text in texts]
    lengths, size = list(map(len, tokens)), args.batch_size
    generator = t.seed_all(args.seed)
    rows = torch.randperm(len(tokens), generator=generator).tolist()
    random = [rows[i : i + size] for i in range(0, len(rows), size)]
    alike = [batch.tolist() for batch in t.length_batches(tokens, size, generator)]
    measured = {
        "texts": len(tokens),
        "tokens": sum(lengths),
        "vocabulary": len(vocabulary.words),
        "unknown_share": sum(int((text[:, 0] == t.UNK).sum()) for text in tokens) / sum(lengths),
        "longest": max(lengths),
        "median_length": sorted(lengths)[len(lengths) // 2],
        "padding_share_random": padding_share(lengths, random),
        "padding_share_by_length": padding_share(lengths, alike),
    }
    held_out = [
        (model.eval(), row, state["classes"][guess])
        for model, member in zip(models, state["members"], strict=True)
        for row, guess in zip(
            member["rows"], state["probabilities"][member["rows"]].argmax(-1), strict=True
        )
    ]
    table = attention_words(held_out, tokens, list(vocabulary.words))
    write_table(run / "attention_words.csv", table, "%.3f")
    measured |= measure_deletion(held_out, tokens)
    t.write_json(run / "measured.json", measured)
    print(json.dumps(measured, indent=2))


# --------------------------------------------------------------------------------------------------
# tokenizers
# --------------------------------------------------------------------------------------------------


def describe_tokens(texts: list[list[str]]) -> dict:
    """How many tokens, of how many kinds, and the share in half the texts that the rest lacks.

    That is, the tokens that the other half has less often than SEEN: too seldom to learn.
    """
    known = Counter(token for text in texts[::2] for token in text)
    held_out = [token for text in texts[1::2] for token in text]
    return {
        "tokens_per_text": sum(map(len, texts)) / len(texts),
        "vocabulary": len({token for text in texts for token in text}),
        "unk_share": sum(known[token] < SEEN for token in held_out) / max(1, len(held_out)),
    }


def most_different(texts: list[str], tokens: dict[str, list[list[str]]]) -> int:
    """The short text that the tokenizers cut most differently."""

    def surprise(row: int) -> int:
        ways = {token for cut in tokens.values() for token in cut[row]}
        return len(ways) - len(set(tokens["basic_english"][row]))

    return max([row for row, text in enumerate(texts) if len(text) <= 200] or [0], key=surprise)


def plot_tokenizers(path: Path, table: pd.DataFrame, shown: dict[str, list[str]]) -> None:
    """One text as each tokenizer cuts it, and the cross-validated accuracy of each."""
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(2, 1))
    top.axis("off")
    for i, (name, words) in enumerate(shown.items()):
        label = f"{name}: {len(words)} tokens\n{textwrap.fill(' | '.join(words), 100)}"
        place = 1 - i / len(shown)
        top.text(0, place, label, va="top", fontsize=9, family="monospace", parse_math=False)
    accuracy, error = table["oof_accuracy"], table["oof_accuracy_se"]
    bottom.errorbar(accuracy, table["tokenizer"], xerr=error, fmt="o", capsize=4)
    bottom.set_xlabel("out-of-fold accuracy ± standard error")
    bottom.invert_yaxis()
    t.write_file(path, partial(figure.savefig, format="png"))


def measure_tokenizers(folder: Path) -> None:
    """tokenizers.csv and .png: what each tokenizer does to the texts, and how its run ended."""
    args = read_arguments(folder / "basic_english")
    news, tokens, rows = t.load_news(args), {}, []
    texts = train_texts(news)
    for name, tokenize in TOKENIZERS.items():
        check_data(folder / name, news.hashes)
        metrics = read_json(folder / name / "metrics.json")
        begin = time.monotonic()
        tokens[name] = [tokenize(text) for text in texts]
        row = {"tokenizer": name} | describe_tokens(tokens[name])
        row |= {"tokenize_seconds": time.monotonic() - begin}
        rows.append(
            row
            | {key: metrics[key] for key in ("vector_coverage", "oof_accuracy", "oof_accuracy_se")}
        )
    table = pd.DataFrame(rows)
    write_table(folder / "tokenizers.csv", table, "%.4f")
    shown = most_different(texts, tokens)
    plot_tokenizers(
        folder / "tokenizers.png", table, {name: cut[shown] for name, cut in tokens.items()}
    )
    print(table.to_string(index=False, float_format="%.4f"))


# --------------------------------------------------------------------------------------------------
# VAEs: mutual information and the aggregate posterior
# --------------------------------------------------------------------------------------------------


def mutual_information(mu: torch.Tensor, logvar: torch.Tensor) -> float:
    """I(x; z) = E log q(z|x) / q(z) in nats, over N posteriors (N, k) of which q(z) is the mixture.

    Hoffman and Johnson 2016, "ELBO surgery". N images can show ln N nats at most.
    """
    noise = torch.randn(mu.shape, generator=t.seed_all(len(mu))).double()
    z, precision = mu + (0.5 * logvar).exp() * noise, (-logvar).exp()
    square = (
        z.square() @ precision.T - 2 * z @ (mu * precision).T + (mu.square() * precision).sum(1)
    )  # (N, N)
    log_mixture = (-0.5 * (square + logvar.sum(1))).logsumexp(1) - math.log(
        len(mu)
    )  # ln q(z) + k/2 ln 2π
    log_q = -0.5 * (noise.square() + logvar).sum(1)
    return (log_q - log_mixture).mean().item()


def whitening(prior) -> tuple[torch.Tensor, torch.Tensor]:
    """m (k,) and A (k, k) such that u = A (z - m) has mean 0 and covariance I under p(z)."""
    parts = (part.cpu().double() for part in (prior.weights, prior.loc, prior.scale_tril))
    weights, means, roots = parts
    m = weights @ means
    offset = (means - m) * weights[:, None].sqrt()
    covariance = torch.einsum("j,jde,jfe->df", weights, roots, roots) + offset.T @ offset
    return m, torch.linalg.inv(torch.linalg.cholesky(covariance))


def aggregate_posterior(mu, logvar, m, A) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (k,) and eigenvalues (k,) of the covariance of the mixture of N posteriors (N, k).

    In u = A (z - m), where the prior has mean 0 and covariance I.
    """
    mean_u = (mu - m) @ A.T
    covariance = A @ logvar.exp().mean(0).diag() @ A.T + mean_u.T.cov(correction=0)
    return mean_u.mean(0), torch.linalg.eigvalsh(covariance)


def plot_aggregate(path: Path, mean: torch.Tensor, eigenvalues: torch.Tensor, count: int) -> None:
    """How near the aggregate posterior of `count` images is to the prior."""
    figure = Figure(figsize=(5, 3.4), dpi=150, layout="constrained")
    panel = figure.subplots()
    curves = {"eigenvalues of its covariance": eigenvalues, "|mean|": mean.abs()}
    for label, values in curves.items():
        panel.semilogy(values.sort(descending=True).values.clamp_min(1e-8).numpy(), label=label)
    reach = math.sqrt(len(mean) / count)  # Marchenko and Pastur: sampling alone spreads them so far
    low, high = max(1e-3, 1 - reach) ** 2, (1 + reach) ** 2
    label = f"eigenvalues of {count} prior draws"
    panel.axhspan(low, high, color="tab:red", alpha=0.15, linewidth=0, label=label)
    panel.set_xlabel("dimension of z, sorted")
    panel.set_ylabel("aggregate posterior")
    panel.legend(fontsize=7, loc="lower left")
    t.write_file(path, partial(figure.savefig, format="png"))


def measure_one_vae(script: ModuleType, run: Path) -> None:
    """measured.json and aggregate-posterior.png of one λ, on its test images."""
    args, device = read_arguments(run), script.pick_device("auto")
    model, _ = script.load_finished(run, device)
    images, sha256 = script.load_images(script.find_data(args.data))
    check_data(run, {"data": sha256})
    test = script.split_images(images, args.seed, args.limit)["test"]
    test = test[:2000]  # the mixture takes N² distances
    _, each = script.evaluate(model, test, args, final=True)
    mu, logvar = each["mu"].double(), each["variance"].double().log()
    m, A = whitening(model.prior)
    mean, eigenvalues = aggregate_posterior(mu, logvar, m, A)
    measured = {
        "mutual_information": mutual_information(mu, logvar),
        "mutual_information_limit": math.log(len(mu)),
        "aggregate_mean_largest": mean.abs().max().item(),
        "aggregate_covariance_eigenvalues": [eigenvalues.min().item(), eigenvalues.max().item()],
    }
    plot_aggregate(run / "aggregate-posterior.png", mean, eigenvalues, len(mu))
    t.write_json(run / "measured.json", measured)
    print(run, json.dumps(measured))


def plot_rate_distortion(path: Path, rows: list[dict]) -> None:
    """Rate against distortion, with a point for each λ."""
    figure = Figure(figsize=(4, 3.4), dpi=200, layout="constrained")
    panel, points = (
        figure.subplots(),
        [(m["kl"]["test"], m["reconstruction"]["test"]) for m in rows],
    )
    panel.plot(*zip(*points, strict=True), "o-")
    for i, (row, point) in enumerate(zip(rows, points, strict=True)):
        shift = (5, 4 - 14 * (i % 2))  # above and below in turn: collapsed models share a point
        panel.annotate(f"λ = {row['lambda']:g}", point, shift, textcoords="offset points")
    panel.set(xlabel="rate: KL (nats)", ylabel="distortion: -log p(x|codes) (nats)")
    panel.set_xscale("symlog", linthresh=1.0)
    panel.margins(0.15)  # room for the names
    t.write_file(path, partial(figure.savefig, format="png"))


@torch.no_grad()
def measure_vae(script: ModuleType, folder: Path) -> None:
    """Measure the run of each λ in `folder`."""
    runs = [path.parent for path in folder.glob("lambda-*/metrics.json")]
    runs = sorted(run for run in runs if run.suffix != ".previous")
    if not runs:
        t.fail(
            f"{folder}: no finished run there. Train {script.__name__}.py first, or name its --out"
        )
    for run in runs:
        measure_one_vae(script, run)
    rows = sorted((read_json(run / "metrics.json") for run in runs), key=lambda row: row["lambda"])
    plot_rate_distortion(folder / "rate-distortion.png", rows)


# --------------------------------------------------------------------------------------------------
# the conditional VAE's KL weights
# --------------------------------------------------------------------------------------------------


def measure_schedules(folder: Path) -> None:
    """schedules.png: monotonic beside cyclical annealing of the KL weight."""
    histories = {}
    for name in SCHEDULES:
        with t.one_line(folder / name / "history.csv", "Finish that run first"):
            histories[name] = pd.read_csv(folder / name / "history.csv")
    figure = Figure(figsize=(11.6, 8), dpi=150, layout="constrained")
    grid = figure.subplots(3, len(histories), sharex="col", sharey="row")
    rows = {"nats per word": ["reconstruction", "kl"]}
    rows |= {"weight": ["kl_weight"], "score": ["bleu4", "gaussian_score"]}
    for panels, (name, history) in zip(grid.T, histories.items(), strict=True):
        for panel, (unit, keys) in zip(panels, rows.items(), strict=True):
            pd.DataFrame(history).plot("epoch", keys, ax=panel, ylabel=unit)
        panels[0].set(title=f"{name} KL weight", yscale="symlog", ylim=(0, None))
        panels[2].set(ylim=(0, 1.02))
        panels[2].legend(loc="lower right")  # else it covers where they end
    t.write_file(folder / "schedules.png", partial(figure.savefig, format="png"))
    print(f"wrote     {folder / 'schedules.png'}")


MEASURES: dict[str, Callable[[Path], None]] = {
    "transformer": measure_transformer,
    "tokenizers": measure_tokenizers,
    "vae_mnist": partial(measure_vae, vae_mnist),
    "vae_anime": partial(measure_vae, vae_anime),
    "schedules": measure_schedules,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = t.fail
    parser.add_argument("what", choices=MEASURES, help="what to measure")
    parser.add_argument("folder", type=Path, help="of the run or of the runs, as in their --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = parse_args(argv)
    MEASURES[args.what](args.folder)


if __name__ == "__main__":
    main()
