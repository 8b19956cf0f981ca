"""How long should a thread that waits for the others stay awake? A training step, in turn.

    python bench/waiting.py            steps of digits and faces, alone and beside a second such run

PyTorch's threads meet after every operation. One that stays awake is there at once, but takes the
core from other programs; one that sleeps is late, and later still where it has to wait for a core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "awake for milliseconds, as PyTorch comes": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own
    "asleep at once": {"GOMP_SPINCOUNT": "0"},
    "**awake for 2,000 looks, as the scripts set it**": {"GOMP_SPINCOUNT": "2000"},
}


def steps(name: str, count: int) -> None:
    """Print the mean milliseconds of a training step on made-up images, after a tenth of them."""
    sys.path.insert(0, str(ROOT))
    t = __import__(name)
    model = t.VAE(t.LATENT_DIM, True).train()
    optimizer = t.torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    x = t.to_pixels(t.torch.randint(256, (32, *t.SHAPE), dtype=t.torch.uint8))
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        reconstruction, kl = (term.mean() for term in model(x))
        optimizer.zero_grad()
        (reconstruction + kl).backward()
        optimizer.step()
        taken.append(1000 * (time.perf_counter() - began))
    print(statistics.mean(taken[len(taken) // 10 :]))


def measure(name: str, way: dict[str, str], count: int, runs: int) -> float:
    """Milliseconds a step, the mean of `runs` programs at once."""
    command = [sys.executable, __file__, "--steps", str(count), "--script", name]
    start = [
        subprocess.Popen(command, env=os.environ | way, stdout=subprocess.PIPE, text=True)
        for _ in range(runs)
    ]
    return statistics.mean(float(process.communicate()[0]) for process in start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--script", choices=("vae_mnist", "vae_anime"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # of a program started here
    args = parser.parse_args()
    if args.steps:
        return steps(args.script, args.steps)
    scripts = {"vae_mnist": 200, "vae_anime": 10}
    cases = [(name, count, runs) for name, count in scripts.items() for runs in (1, 2)]
    found = {(way, case): [] for way in WAYS for case in cases}
    for _ in range(args.rounds):
        for way, case in found:
            name, count, runs = case
            found[way, case].append(measure(name, WAYS[way], count, runs))
    print("| waiting threads | digits, alone | two at once | faces, alone | two at once |")
    print("| --- | --- | --- | --- | --- |")
    for way in WAYS:
        cells = [f"{statistics.median(found[way, case]):.0f}" for case in cases]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
