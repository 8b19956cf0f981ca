"""The scores of lab4/cvae.py over seeds, and its speed beside a loop that takes a word at a time.

    python bench/cvae.py scores --data data     five seeds of the default run and of --holdout 100
    python bench/cvae.py speed  --data data     words a second, both sides in turn

Each prints a table of docs/results.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

SCRIPT = Path(__file__).resolve().parent.parent / "lab4" / "cvae.py"
sys.path.insert(0, str(SCRIPT.parent))
import cvae


def epoch_of_ours(verbs, args) -> int:
    """One epoch of the script's own training loop; returns the words that were spelled."""
    cvae.seed_all(0)
    state = {"history": [], "seconds": 0.0}
    cvae.train(cvae.CVAE(args.latent_dim, args.hidden_dim), verbs, args, state)
    return 2 * len(verbs.train)


def words_one_by_one(verbs, args) -> int:
    """The same network and loss as the course's template trains them: a word a step, by SGD."""
    cvae.seed_all(0)
    model = cvae.CVAE(args.latent_dim, args.hidden_dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    count = 0
    for forms in verbs.train[: args.words // 4]:
        for tense, form in enumerate(forms):
            word, number = cvae.encode_words([form]), torch.tensor([tense])
            mu, logvar = model.encode(word, number)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            state, letter = model.first_state(z), torch.tensor([[cvae.START]])
            loss = args.kl_max * cvae.kl_divergence(mu, logvar).sum()
            for right in word[0]:
                logits, state = model.decode(state, number, letter)
                loss = loss + F.cross_entropy(logits[:, 0], right[None])
                letter = right.view(1, 1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), cvae.MAX_NORM)
            optimizer.step()
            count += 1
    return count


def speed(options: argparse.Namespace) -> None:
    """Words spelled a second in training, both sides in turn, the ratio of the medians."""
    args = cvae.parse_args(["--epochs", "1", "--teacher-forcing", "1", "--data", str(options.data)])
    args.words = options.words
    cvae.write_file = lambda path, save: None  # training is timed, not the disk
    verbs = cvae.read_verbs(options.data, 0, None, 0)
    sides, rates = {"a word at a time": words_one_by_one, "lab4/cvae.py": epoch_of_ours}, {}
    for _ in range(options.rounds):
        for name, side in sides.items():
            begin = time.monotonic()
            words = side(verbs, args)
            rates.setdefault(name, []).append(words / (time.monotonic() - begin))
    plain = statistics.median(rates["a word at a time"])
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds in turn")
    print("| training | words a second (median; range) | ratio |\n| --- | --- | --- |")
    for name, measured in rates.items():
        middle, low, high = statistics.median(measured), min(measured), max(measured)
        print(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {middle / plain:.1f} |")


def scores(options: argparse.Namespace) -> None:
    """Mean and standard deviation over seeds, of the default run and of --holdout."""
    keys = {"BLEU-4, ten test pairs": "bleu4"}
    keys |= {"Gaussian score, 10,000 draws": "gaussian_score_10000"}
    keys |= {"different lines in 100 draws": "distinct_valid_per_100"}
    keys |= {"held-out verbs: exact": "heldout_exact", "BLEU-4": "heldout_bleu4"}
    print(f"| command, {options.seeds} seeds | {' | '.join(keys)} |\n|{' --- |' * (len(keys) + 1)}")
    for flags in ([], ["--holdout", str(options.holdout)]):
        found: dict[str, list[float]] = {name: [] for name in keys}
        for seed in range(options.seeds):
            out = options.out / f"{''.join(flags).strip('-') or 'default'}-{seed}"
            if not (out / "metrics.json").exists():
                command = [sys.executable, str(SCRIPT), "--data", str(options.data), *flags]
                command += ["--seed", str(seed), "--out", str(out), "--resume"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            metrics = json.loads((out / "metrics.json").read_text())
            for name, key in keys.items():
                found[name].append(metrics[key])
        cells = [
            "" if None in v else f"{statistics.mean(v):.4g} ± {statistics.stdev(v):.2g}"
            for v in found.values()
        ]
        command = " ".join(["python lab4/cvae.py", *flags])
        print(f"| `{command}` | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("scores", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/bench_cvae"), help="for scores"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--holdout", type=int, default=100)
    parser.add_argument("--words", type=int, default=400, help="a round of the one-by-one loop")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    {"scores": scores, "speed": speed}[options.what](options)


if __name__ == "__main__":
    main()
