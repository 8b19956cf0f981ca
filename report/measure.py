"""Measure what only the report says about finished runs.

    python report/measure.py transformer RUN     measured.json, attention_words.csv in RUN
    python report/measure.py tokenizers FOLDER   tokenizers.csv, .png from FOLDER/<tokenizer>
    python report/measure.py vae_mnist RUN       measured.json, aggregate-posterior.png for each λ
    python report/measure.py vae_anime RUN       the same for faces
    python report/measure.py schedules FOLDER    schedules.png from FOLDER/monotonic and /cyclical

For a Transformer: padding, unknown words, and whether attention matters. The tokens that receive
most attention are deleted from each held-out text, or as many random ones instead, and the two
drops in the probability of the predicted class are compared. Deleted words are gone, not masked.

For a VAE: the importance-weighted bound (IWAE), the mutual information of images and latents, and
how near the aggregate posterior is to the prior.
"""

import argparse
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

os.environ["MPLBACKEND"] = "agg"  # what a notebook's ! command passes on may not be installed

import pandas as pd
import torch
import torch.distributions as D
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformer as t
import vae_anime
import vae_mnist

SCHEDULES = ("monotonic", "cyclical")
DELETED = 0.1  # of a text's tokens
RANDOM_DELETIONS = 5  # per text
SEEN = 2  # a token that is rarer than this is unknown
IWAE_SAMPLES = 64
IWAE_IMAGES = 100
MI_IMAGES = 2000  # at most; the mixture of their posteriors takes N² distances

Config = TypeVar("Config")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise t.UserError(f"{path}: {t.reason(error)}. Finish that run first") from error


def read_config(kind: type[Config], run: Path) -> Config:
    """Return the settings of the run in the folder `run`; its paths start where you stand."""
    saved = read_json(run / "config.json")["settings"]
    for name in ("data", "out"):
        if saved[name] is not None:
            saved[name] = Path(saved[name])
    return kind(**saved)


def write_table(path: Path, table: pd.DataFrame, digits: str) -> None:
    save = partial(table.to_csv, index=False, float_format=digits, mode="wb")
    t.write_file(path, save)


# Transformer: padding and attention ---------------------------------------------------------------
class HeldOut(NamedTuple):
    """A training text and the model that was not trained on it."""

    model: t.TransformerClassifier
    text: Tensor  # (T, 3)
    predicted: str  # its class by that model


def load_texts(run: Path) -> tuple[t.Config, t.News]:
    """Return the settings of a run and the texts that it was trained on."""
    config = read_config(t.Config, run)
    folder = t.find_data(config.data)
    news = t.load_news(folder, config)
    for name, trained_on in (("train.csv", config.train_sha256), ("test.csv", config.test_sha256)):
        if t.sha256_of(folder / name) != trained_on:
            raise t.UserError(f"{run}: trained on other files. Run it again, or move it away")
    return config, news


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """How much of the padded batches (B, T) is padding."""
    tokens = 0
    padded = 0
    for batch in batches:
        in_batch = [lengths[row] for row in batch]
        tokens += sum(in_batch)
        padded += len(batch) * max(in_batch)
    return 1 - tokens / padded


def keep_tokens(text: Tensor, kept: Tensor) -> Tensor:
    """The tokens of a text (T, 4) in the places `kept`. Pairs with a deleted left word are gone."""
    shorter = text[kept]
    has_lost_left = kept.diff(prepend=torch.tensor([-1])) != 1
    shorter[has_lost_left, 3] = t.NO_KEY
    return shorter


@torch.no_grad()
def delete_tokens(model: t.TransformerClassifier, text: Tensor) -> list[float]:
    """Return the probability of the predicted class of `text`, its tokens (T, 4).

    First of the whole text, then without its most attended tokens, then without random ones.
    """
    count = max(1, round(DELETED * len(text)))
    _, attn_weights = model(text[None])
    received = attn_weights[0].mean((0, 1))  # (T,), over heads and over the tokens that look
    least_attended = received.argsort()[: len(text) - count].sort().values

    texts = [text, keep_tokens(text, least_attended)]
    for _ in range(RANDOM_DELETIONS):
        kept = torch.randperm(len(text))[count:].sort().values
        texts.append(keep_tokens(text, kept))

    logits, _ = model(pad_sequence(texts, batch_first=True, padding_value=t.PAD))
    probabilities = logits.softmax(-1)  # (2 + RANDOM_DELETIONS, C)
    of_predicted = probabilities[:, probabilities[0].argmax()]
    return [of_predicted[0].item(), of_predicted[1].item(), of_predicted[2:].mean().item()]


def measure_deletion(held_out: list[HeldOut]) -> dict:
    """Delete tokens of each text that is long enough, in the model that had it held out."""
    triples = []
    for one in held_out:
        if len(one.text) >= 10:
            triples.append(delete_tokens(one.model, one.text))
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
def attention_words(held_out: list[HeldOut], names: list[str]) -> pd.DataFrame:
    """The words, seen five times, that receive most attention in texts of each predicted class.

    Attention is over an even share: 1 is what each token would receive if all received the same.
    """
    found = []
    for one in held_out:
        _, attn_weights = one.model(one.text[None])
        received = attn_weights[0].mean(0).sum(0).tolist()  # mean over heads, sum over who looks
        for word, share in zip(one.text[:, 0], received, strict=True):
            found.append((one.predicted, names[word], share))

    table = pd.DataFrame(found, columns=["predicted_class", "word", "attention_over_even_share"])
    groups = table[table["word"] != names[t.UNK]].groupby(["predicted_class", "word"])
    means = groups["attention_over_even_share"].agg(["count", "mean"]).query("count >= 5")
    means = means.reset_index().sort_values("mean", ascending=False, kind="stable")
    means = means.groupby("predicted_class").head(20)
    means = means.sort_values("predicted_class", kind="stable")
    return means.rename(columns={"mean": "attention_over_even_share"})


def measure_transformer(run: Path) -> None:
    """Write measured.json, on vocabulary, padding and deletions, and attention_words.csv."""
    config, news = load_texts(run)
    models, checkpoint = t.load_finished(run)
    vocabulary = t.Vocabulary(**checkpoint["vocabulary"])
    tokenize = t.make_tokenizer(config.tokenizer)
    texts = [vocabulary.encode(t.split_text(text, tokenize)) for text in news.train.texts]
    lengths = [len(text) for text in texts]
    unknown = sum(int((text[:, 0] == t.UNK).sum()) for text in texts)

    generator = t.random_generator(config.seed)
    random = torch.randperm(len(texts), generator=generator).split(config.batch_size)
    by_length = t.length_batches(texts, config.batch_size, generator)

    held_out = []
    for model, fold in zip(models, checkpoint["folds"], strict=True):
        predicted = fold["probabilities"].argmax(1)
        for row, guess in zip(fold["held_out"], predicted, strict=True):
            held_out.append(HeldOut(model, texts[row], checkpoint["classes"][guess]))
    words = attention_words(held_out, list(vocabulary.words))
    write_table(run / "attention_words.csv", words, "%.3f")

    measured = {
        "texts": len(texts),
        "tokens": sum(lengths),
        "vocabulary": len(vocabulary.words),
        "unknown_share": unknown / sum(lengths),
        "longest": max(lengths),
        "median_length": statistics.median_high(lengths),
        "padding_share_random": padding_share(lengths, [batch.tolist() for batch in random]),
        "padding_share_by_length": padding_share(lengths, [batch.tolist() for batch in by_length]),
    }
    measured |= measure_deletion(held_out)
    t.write_json(run / "measured.json", measured)
    print(json.dumps(measured, indent=2))


# Tokenizers ---------------------------------------------------------------------------------------
def describe_tokens(texts: list[list[str]]) -> dict:
    """How many tokens, of how many kinds, and the share in half of the texts that is unknown.

    That is, the tokens that the other half has less often than SEEN: too seldom to learn.
    """
    known = Counter(token for text in texts[::2] for token in text)
    held_out = [token for text in texts[1::2] for token in text]
    unknown = sum(known[token] < SEEN for token in held_out)
    return {
        "tokens_per_text": statistics.mean(len(text) for text in texts),
        "vocabulary": len({token for text in texts for token in text}),
        "unk_share": unknown / max(1, len(held_out)),
    }


def most_different(texts: list[str], tokens: dict[str, list[list[str]]]) -> int:
    """Return the row of the short text that the tokenizers cut most differently."""
    most = -1
    chosen = 0
    for row, text in enumerate(texts):
        kinds = {token for cut in tokens.values() for token in cut[row]}
        different = len(kinds) - len(set(tokens["basic_english"][row]))
        if len(text) <= 200 and different > most:
            most = different
            chosen = row
    return chosen


def plot_tokenizers(path: Path, table: pd.DataFrame, shown: dict[str, list[str]]) -> None:
    """Draw one text as each tokenizer cuts it, and the out-of-fold accuracy of each."""
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(2, 1))
    top.axis("off")
    for i, (name, words) in enumerate(shown.items()):
        label = f"{name}: {len(words)} tokens\n{textwrap.fill(' | '.join(words), 100)}"
        y = 1 - i / len(shown)
        top.text(0, y, label, va="top", fontsize=9, family="monospace", parse_math=False)

    accuracy = table["oof_accuracy"]
    bottom.errorbar(accuracy, table["tokenizer"], xerr=table["oof_accuracy_se"], fmt="o", capsize=4)
    bottom.set_xlabel("out-of-fold accuracy ± standard error")
    bottom.invert_yaxis()
    t.write_file(path, figure.savefig)


def measure_tokenizers(folder: Path) -> None:
    """Write tokenizers.csv and .png: what each tokenizer does to the texts, and its accuracy."""
    tokens = {}
    rows = []
    for name in t.TOKENIZERS:
        metrics = read_json(folder / name / "metrics.json")
        _, news = load_texts(folder / name)
        texts = [" ".join(text) for text in news.train.texts]
        tokenize = t.make_tokenizer(name)
        started = time.monotonic()
        tokens[name] = [tokenize(text) for text in texts]
        seconds = time.monotonic() - started

        row = {"tokenizer": name, **describe_tokens(tokens[name]), "tokenize_seconds": seconds}
        for key in ("vector_coverage", "oof_accuracy", "oof_accuracy_se"):
            row[key] = metrics[key]
        rows.append(row)

    table = pd.DataFrame(rows)
    write_table(folder / "tokenizers.csv", table, "%.4f")
    chosen = most_different(texts, tokens)
    shown = {name: cut[chosen] for name, cut in tokens.items()}
    plot_tokenizers(folder / "tokenizers.png", table, shown)
    print(table.to_string(index=False, float_format="%.4f"))


# VAEs: importance-weighted bound, mutual information, aggregate posterior -------------------------
class Weights(NamedTuple):
    """One sample of all latents for each of B images, and how likely it is; (B,) nats each."""

    log_likelihood: Tensor  # log p(x|latents)
    log_prior: Tensor  # log p(latents)
    log_posterior: Tensor  # log q(latents|x)


def prior_distribution(prior: nn.Module) -> D.Distribution:
    """p(z) of either VAE as a distribution of torch."""
    if not hasattr(prior, "means"):
        zeros = torch.zeros(prior.latent_dim)
        return D.Independent(D.Normal(zeros, torch.ones_like(zeros)), 1)
    gaussians = D.MultivariateNormal(prior.means, scale_tril=prior.scale_tril)
    return D.MixtureSameFamily(D.Categorical(prior.weights), gaussians)


def sample_digits(model, x: Tensor, q: D.MultivariateNormal, generator) -> Weights:
    z = vae_mnist.reparameterize(q, generator)
    return Weights(
        log_likelihood=model.decode(z).log_prob(x),
        log_prior=prior_distribution(model.prior).log_prob(z),
        log_posterior=q.log_prob(z),
    )


def sample_faces(model, x: Tensor, q: D.Independent, generator) -> Weights:
    output = model.infer(x, q, generator)
    log_prior = prior_distribution(model.prior).log_prob(output.z)
    log_posterior = q.log_prob(output.z)
    for detail in output.details:
        log_prior = log_prior + detail.prior.log_prob(detail.sample)
        log_posterior = log_posterior + detail.posterior.log_prob(detail.sample)
    error = vae_anime.dequantize(x, generator) - output.mean
    log_likelihood = model.noise.log_prob(error)
    return Weights(log_likelihood, log_prior, log_posterior)


@torch.no_grad()
def iwae_bound(
    script: ModuleType,
    model: nn.Module,
    x: Tensor,
    q: D.Distribution,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    """log 1/K Σ p(x, latents) / q(latents|x), (B,), of K samples (Burda et al. 2016, eq. 8)."""
    sample = sample_digits if script is vae_mnist else sample_faces
    log_weights = []
    for _ in range(samples):
        drawn = sample(model, x, q, generator)
        log_weights.append(drawn.log_likelihood + drawn.log_prior - drawn.log_posterior)
    return torch.stack(log_weights).logsumexp(dim=0) - math.log(samples)


@torch.no_grad()
def find_posterior(script: ModuleType, model: nn.Module, x: Tensor, config) -> D.Distribution:
    """q(z|x) as the script scores it; that of digits is refined."""
    q = model.encode(x)
    if script is vae_mnist:
        generator = script.random_generator(config.seed)
        q = script.refine_posterior(model, x, q, config.kl_weight, generator)
    return q


def score(script: ModuleType, model: nn.Module, images: Tensor, config) -> dict[str, float]:
    """The script's own scores of these images; posteriors of digits are refined."""
    if script is vae_mnist:
        scores, _ = script.evaluate(model, images, config, refine=True)
    else:
        scores, _ = script.evaluate(model, images, config)
    return scores


def measure_iwae(script: ModuleType, model: nn.Module, images: Tensor, config) -> dict:
    """The importance-weighted bound on some test images, and the ELBO on the same ones."""
    generator = script.random_generator(config.seed, "iwae")
    some = torch.randperm(len(images), generator=generator)[:IWAE_IMAGES]
    x = script.to_pixels(images[some])
    q = find_posterior(script, model, x, config)
    bound = iwae_bound(script, model, x, q, IWAE_SAMPLES, generator).mean().item()
    return {
        "iwae": -bound,
        "iwae_samples": IWAE_SAMPLES,
        "iwae_images": len(some),
        "iwae_neg_elbo": score(script, model, images[some], config)["neg_elbo"],
    }


def mutual_information(mu: Tensor, scale_tril: Tensor) -> float:
    """I(x; z) = E log q(z|x) / q(z) in nats, over N posteriors N(μ, L Lᵀ) whose mixture is q(z).

    Hoffman and Johnson 2016, "ELBO surgery". N images can show ln N nats at most.
    """
    noise = torch.randn(mu.shape, generator=t.random_generator(len(mu))).double()
    z = mu + torch.einsum("nij,nj->ni", scale_tril, noise)
    posteriors = D.MultivariateNormal(mu, scale_tril=scale_tril)
    log_q = posteriors.log_prob(z)
    log_mixture = [posteriors.log_prob(one).logsumexp(dim=0) for one in z]
    return (log_q - torch.stack(log_mixture)).mean().item() + math.log(len(mu))


class Whitening(NamedTuple):
    """u = A (z - mean) has mean 0 and covariance I under p(z)."""

    mean: Tensor  # (k,)
    A: Tensor  # (k, k)


def whitening(prior: nn.Module) -> Whitening:
    """The map under which p(z) has mean 0 and covariance I."""
    if not hasattr(prior, "means"):
        k = prior.latent_dim
        return Whitening(torch.zeros(k).double(), torch.eye(k).double())
    weights = prior.weights.double()
    means = prior.means.double()
    roots = prior.scale_tril.double()

    mean = weights @ means
    offsets = (means - mean) * weights[:, None].sqrt()
    within = torch.einsum("j,jde,jfe->df", weights, roots, roots)
    covariance = within + offsets.T @ offsets
    return Whitening(mean, torch.linalg.inv(torch.linalg.cholesky(covariance)))


def aggregate_posterior(mu: Tensor, scale_tril: Tensor, white: Whitening) -> tuple[Tensor, Tensor]:
    """Mean (k,) and eigenvalues (k,) of the covariance of the mixture of N posteriors N(μ, L Lᵀ).

    In u = A (z - mean), where the prior has mean 0 and covariance I.
    """
    mean_u = (mu - white.mean) @ white.A.T
    within = white.A @ (scale_tril @ scale_tril.mT).mean(dim=0) @ white.A.T
    covariance = within + mean_u.T.cov(correction=0)
    return mean_u.mean(dim=0), torch.linalg.eigvalsh(covariance)


def plot_aggregate(path: Path, mean: Tensor, eigenvalues: Tensor, count: int) -> None:
    """Draw how near the aggregate posterior of `count` images is to the prior."""
    figure = Figure(figsize=(5, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    curves = {"eigenvalues of its covariance": eigenvalues, "|mean|": mean.abs()}
    for label, values in curves.items():
        axes.semilogy(values.sort(descending=True).values.clamp_min(1e-8).numpy(), label=label)

    # Sampling alone spreads eigenvalues this far (Marchenko and Pastur 1967).
    reach = math.sqrt(len(mean) / count)
    low = max(1e-3, 1 - reach) ** 2
    high = (1 + reach) ** 2
    label = f"eigenvalues of {count} prior samples"
    axes.axhspan(low, high, color="tab:red", alpha=0.15, linewidth=0, label=label)
    axes.set(xlabel="dimension of z, sorted", ylabel="aggregate posterior")
    axes.legend(fontsize=7, loc="lower left")
    t.write_file(path, figure.savefig)


def one_sigma_bits(script: ModuleType, model: nn.Module, images: Tensor, config) -> float:
    """Bits per dimension of faces with one σ for all frequencies, the root mean square of all."""
    shared = script.FrequencyNoise(model.noise.sigma.square().mean().sqrt())
    whole = model.noise
    model.noise = shared
    scores, _ = script.evaluate(model, images, config)
    model.noise = whole
    return scores["bits_per_dim"]


def measure_one_vae(script: ModuleType, run: Path) -> None:
    """Write measured.json and aggregate-posterior.png of one λ, on its test images."""
    config = read_config(script.Config, run)
    model, settings = script.load_finished(run, torch.device("cpu"))
    images, sha256 = script.load_images(script.find_data(config.data), config.fit)
    if sha256 != settings["data_sha256"]:
        raise t.UserError(f"{run}: trained on another file. Run it again, or move it away")
    test = script.split_images(images, config)["test"]
    test = test[:MI_IMAGES]

    means = []
    roots = []  # Cholesky factors of the covariances
    for batch in test.split(script.EVAL_BATCH):
        q = find_posterior(script, model, script.to_pixels(batch), config)
        means.append(q.mean)
        roots.append(q.scale_tril if script is vae_mnist else q.base_dist.stddev.diag_embed())
    mu = torch.cat(means).double()
    scale_tril = torch.cat(roots).double()
    mean, eigenvalues = aggregate_posterior(mu, scale_tril, whitening(model.prior))

    measured = {
        "mutual_information": mutual_information(mu, scale_tril),
        "mutual_information_limit": math.log(len(mu)),
        "aggregate_mean_largest": mean.abs().max().item(),
        "aggregate_covariance_eigenvalues": [eigenvalues.min().item(), eigenvalues.max().item()],
    }
    measured |= measure_iwae(script, model, test, config)
    if script is vae_anime:
        measured["bits_per_dim_one_sigma"] = one_sigma_bits(script, model, test, config)
    plot_aggregate(run / "aggregate-posterior.png", mean, eigenvalues, len(mu))
    t.write_json(run / "measured.json", measured)
    print(run, json.dumps(measured))


def plot_rate_distortion(path: Path, metrics: list[dict]) -> None:
    """Draw rate against distortion, with a point for each λ."""
    rates = [row["kl"]["test"] for row in metrics]
    distortions = [row["reconstruction"]["test"] for row in metrics]
    figure = Figure(figsize=(4, 3.4), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, distortions, "o-")

    for i, row in enumerate(metrics):
        shift = (5, 4 - 14 * (i % 2))  # above and below in turn: collapsed models share a point
        point = (rates[i], distortions[i])
        axes.annotate(f"λ = {row['lambda']:g}", point, shift, textcoords="offset points")

    axes.set(xlabel="rate: KL (nats)", ylabel="distortion: -log p(x|latents) (nats)")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.margins(0.15)  # room for the names
    t.write_file(path, figure.savefig)


@torch.no_grad()
def measure_vae(script: ModuleType, folder: Path) -> None:
    """Measure the run of each λ in `folder`."""
    runs = [path.parent for path in folder.glob("lambda-*/metrics.json")]
    runs = sorted(run for run in runs if run.suffix != ".previous")
    if not runs:
        advice = f"Train {script.__name__}.py first, or name its --out"
        raise t.UserError(f"{folder}: no finished run there. {advice}")
    for run in runs:
        measure_one_vae(script, run)

    metrics = [read_json(run / "metrics.json") for run in runs]
    metrics.sort(key=lambda row: row["lambda"])
    plot_rate_distortion(folder / "rate-distortion.png", metrics)


# The conditional VAE's KL schedules ---------------------------------------------------------------
def measure_schedules(folder: Path) -> None:
    """Draw schedules.png: monotonic beside cyclical annealing of the KL weight."""
    histories = {}
    for name in SCHEDULES:
        path = folder / name / "history.csv"
        try:
            histories[name] = pd.read_csv(path)
        except (OSError, ValueError) as error:
            raise t.UserError(f"{path}: {t.reason(error)}. Finish that run first") from error

    rows = {
        "nats per word": ["reconstruction", "kl"],
        "weight": ["kl_weight"],
        "score": ["bleu4", "gaussian_score"],
    }
    figure = Figure(figsize=(11.6, 8), dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), len(histories), sharex="col", sharey="row")
    for panels, (name, history) in zip(grid.T, histories.items(), strict=True):
        for axes, (unit, keys) in zip(panels, rows.items(), strict=True):
            history.plot("epoch", keys, ax=axes, ylabel=unit)
        panels[0].set(title=f"{name} KL weight", yscale="symlog", ylim=(0, None))
        panels[2].set(ylim=(0, 1.02))
        panels[2].legend(loc="lower right")  # else it covers where they end
    t.write_file(folder / "schedules.png", figure.savefig)
    print(f"wrote     {folder / 'schedules.png'}")


MEASURES: dict[str, Callable[[Path], None]] = {
    "transformer": measure_transformer,
    "tokenizers": measure_tokenizers,
    "vae_mnist": partial(measure_vae, vae_mnist),
    "vae_anime": partial(measure_vae, vae_anime),
    "schedules": measure_schedules,
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = t.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=MEASURES, help="what to measure")
    parser.add_argument("folder", type=Path, help="of the run or of the runs, as in their --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse_args(argv)
        MEASURES[args.what](args.folder)
    except t.UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
