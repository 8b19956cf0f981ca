"""How long should a thread that waits for the others spin before it sleeps?

    python bench/waiting.py    training steps of digits and faces, alone and beside a second run

PyTorch's threads meet after every operation. One that spins is there at once, but takes the core
from other programs. One that sleeps is late, and later still where it has to wait for a core.
"""

import os
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SPIN_COUNTS = {  # GOMP_SPINCOUNT
    "spin for milliseconds, PyTorch's default": "300000",  # that of libgomp
    "sleep at once": "0",
    "**spin 2,000 times, as the scripts set it**": "2000",
}


class Case(NamedTuple):
    """So many training steps of a script, in so many programs at once."""

    script: str
    steps: int
    programs: int


CASES = [
    Case("vae_mnist", 200, 1),
    Case("vae_mnist", 200, 2),
    Case("vae_anime", 10, 1),
    Case("vae_anime", 10, 2),
]


def time_steps(name: str, count: int) -> None:
    """Print the mean milliseconds of a training step on random images.

    The first tenth of the steps is not counted.
    """
    # PyTorch reads GOMP_SPINCOUNT when it is imported, so only here, in a program of its own.
    sys.path.insert(0, str(ROOT))
    import torch

    if name == "vae_mnist":
        import vae_mnist as script
    else:
        import vae_anime as script

    config = script.Config()
    channels = 1 if name == "vae_mnist" else 3
    size = (config.batch_size, channels, script.SIZE, script.SIZE)
    x = script.to_pixels(torch.randint(256, size, dtype=torch.uint8))
    model = script.VAE(config.latent_dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    milliseconds = []
    for _ in range(count):
        started = time.perf_counter()
        loss = sum(term.mean() for term in model(x, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        milliseconds.append(1000 * (time.perf_counter() - started))
    print(statistics.mean(milliseconds[count // 10 :]))


def measure(case: Case, spin_count: str) -> float:
    """Return milliseconds per step, the mean of the programs that run at once."""
    command = [sys.executable, __file__, "--steps", str(case.steps), "--script", case.script]
    environment = os.environ | {"GOMP_SPINCOUNT": spin_count}
    programs = []
    for _ in range(case.programs):
        program = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        programs.append(program)

    means = []
    for program in programs:
        output, _ = program.communicate()
        means.append(float(output))
    return statistics.mean(means)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    # How `measure` starts this file again:
    parser.add_argument("--script", choices=("vae_mnist", "vae_anime"), help=SUPPRESS)
    parser.add_argument("--steps", type=int, help=SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        time_steps(args.script, args.steps)
        return

    results = {}
    for _ in range(args.rounds):
        for way, spin_count in SPIN_COUNTS.items():
            for case in CASES:
                results.setdefault((way, case), []).append(measure(case, spin_count))

    print("| waiting threads | digits, alone | two at once | faces, alone | two at once |")
    print("| --- | --- | --- | --- | --- |")
    for way in SPIN_COUNTS:
        cells = [f"{statistics.median(results[way, case]):.0f}" for case in CASES]
        print(f"| {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
