"""The scores of lab4/cvae.py over seeds, and its speed beside a loop that takes a word at a time.

    python bench/cvae.py scores --data data     five seeds of the default run and of --holdout 100
    python bench/cvae.py speed  --data data     words per second, both sides in turn

Each prints a table of docs/results.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

SCRIPT = Path(__file__).resolve().parent.parent / "lab4" / "cvae.py"
sys.path.insert(0, str(SCRIPT.parent))
import cvae

COLUMNS = {
    "BLEU-4, ten test pairs": "bleu4",
    "Gaussian score, 10,000 draws": "gaussian_score_10000",
    "different right lines in 100 draws": "distinct_valid_per_100",
    "held-out verbs: exact": "heldout_exact",
    "BLEU-4": "heldout_bleu4",
}


def new_model(config: cvae.Config) -> cvae.CVAE:
    torch.manual_seed(0)
    return cvae.CVAE(config.latent_dim, config.hidden_dim)


def train_in_batches(verbs: cvae.Verbs, config: cvae.Config, words: int) -> int:
    """Train for one epoch with the script's own loop. Return how many words were spelled."""
    cvae.train(new_model(config), verbs, config, None, tqdm(disable=True))
    return 2 * len(verbs.train)


def train_word_by_word(verbs: cvae.Verbs, config: cvae.Config, words: int) -> int:
    """Train the same network on the same loss as the course's template does: a word per step and
    a letter at a time, by SGD. Return how many words were spelled."""
    model = new_model(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    count = 0

    for forms in verbs.train[: words // 4]:
        for i, form in enumerate(forms):
            word = cvae.encode_words([form])
            tense = torch.tensor([i])
            mu, logvar = model.encode(word, tense)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            loss = config.kl_max * cvae.kl_divergence(mu, logvar).sum()

            state = model.initial_state(z)
            previous = torch.tensor([[cvae.START]])
            for letter in word[0]:
                logits, state = model.decode(state, tense, previous)
                loss = loss + F.cross_entropy(logits[:, 0], letter[None])
                previous = letter.view(1, 1)

            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), cvae.MAX_GRAD_NORM)
            optimizer.step()
            count += 1
    return count


def measure_speed(options: Namespace) -> None:
    """Print the words spelled per second in training, and the ratio of the medians."""
    flags = ["--epochs", "1", "--teacher-forcing", "1", "--data", str(options.data)]
    config = cvae.parse_args(flags)
    verbs = cvae.read_verbs(options.data, config)

    sides = {"a word at a time": train_word_by_word, "lab4/cvae.py": train_in_batches}
    rates = {name: [] for name in sides}

    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=Path(folder))
        for _ in range(options.rounds):
            for name, side in sides.items():
                began = time.monotonic()
                words = side(verbs, config, options.words)
                rates[name].append(words / (time.monotonic() - began))

    slow = statistics.median(rates["a word at a time"])
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds in turn")
    print("| training | words a second (median; range) | ratio |\n| --- | --- | --- |")
    for name, measured in rates.items():
        median = statistics.median(measured)
        spread = f"{min(measured):.0f} to {max(measured):.0f}"
        print(f"| {name} | {median:.0f} ({spread}) | {median / slow:.1f} |")


def read_scores(options: Namespace, flags: list[str], seed: int) -> dict:
    """Train with one seed, unless that run was finished before. Return its metrics."""
    name = "".join(flags).strip("-") or "default"
    out = options.out / f"{name}-{seed}"
    if not (out / "metrics.json").exists():
        command = [sys.executable, str(SCRIPT), "--data", str(options.data), *flags]
        command += ["--seed", str(seed), "--out", str(out), "--resume"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "metrics.json").read_text())


def measure_scores(options: Namespace) -> None:
    """Print mean and standard deviation over seeds, of the default run and of --holdout."""
    print(f"| command, {options.seeds} seeds | {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * (len(COLUMNS) + 1)}")
    for flags in ([], ["--holdout", str(options.holdout)]):
        metrics = [read_scores(options, flags, seed) for seed in range(options.seeds)]

        cells = []
        for key in COLUMNS.values():
            values = [one[key] for one in metrics]
            if None in values:  # a score of held-out verbs, and there are none
                cells.append("")
            else:
                cells.append(f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}")
        command = " ".join(["python lab4/cvae.py", *flags])
        print(f"| `{command}` | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("scores", "speed"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the course's files")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench_cvae"), help="for scores [%(default)s]"
    )
    parser.add_argument("--seeds", type=int, default=5, help="for scores [%(default)s]")
    parser.add_argument("--holdout", type=int, default=100, help="for scores [%(default)s]")
    parser.add_argument(
        "--words", type=int, default=400, help="of a round of the slow loop [%(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=5, help="for speed [%(default)s]")
    options = parser.parse_args()

    if options.what == "scores":
        measure_scores(options)
    else:
        measure_speed(options)


if __name__ == "__main__":
    main()
