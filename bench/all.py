"""Measure every figure of docs/results.md again, and write its tables.

    python bench/all.py --data data --list       the commands, and about how long each takes
    python bench/all.py --data data              run what has not been run; stop it, and it goes on
    python bench/all.py --data data --only digits faces

--data is a folder with the real files: train.csv, test.csv, glove.6B.100d.txt, TibetanMNIST.npz,
anime-faces.zip, train.txt and test.txt; lbpcascade_animeface.xml for the faces drawn, unseen.csv
(as train.csv) for the news. What a command prints is kept in runs/all/<step>.txt, and a step with
that file is not run again: delete it to measure anew. A table stands in the document between the
marks <!-- name --> and <!-- /name -->; one whose step is missing is left as it is.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.md"
LAMBDAS = ("0", "1", "50", "100")


class Step(NamedTuple):
    """One command; {data} and {out} in it are the two folders."""

    name: str
    minutes: int  # on two cores, about
    command: str
    needs: str = ""  # a file in --data, without which the step is left out


STEPS = [
    Step(
        "news",
        15,
        "bench/transformer.py accuracy --data {data} --vectors {data}/glove.6B.100d.txt"
        " --unseen {data}/unseen.csv",
        "unseen.csv",
    ),
    Step(
        "news-speed",
        5,
        "bench/transformer.py speed --data {data} --vectors {data}/glove.6B.100d.txt --rounds 7",
        "glove.6B.100d.txt",
    ),
    Step(
        "digits",
        25,
        "vae_mnist.py --data {data}/TibetanMNIST.npz --out {out}/digits --lambda 0 1 50 100",
        "TibetanMNIST.npz",
    ),
    Step(
        "digits-long",
        20,
        "vae_mnist.py --data {data}/TibetanMNIST.npz --out {out}/digits-long --epochs 120",
        "TibetanMNIST.npz",
    ),
    Step(
        "faces",
        60,
        "vae_anime.py --data {data}/anime-faces.zip --out {out}/faces --lambda 0 1 50 100",
        "anime-faces.zip",
    ),
    Step(
        "faces-long",
        45,
        "vae_anime.py --data {data}/anime-faces.zip --out {out}/faces-long --epochs 36",
        "anime-faces.zip",
    ),
    *(
        Step(
            f"{run}-drawn",
            3,
            f"bench/vae.py samples digits --data {{data}}/TibetanMNIST.npz --out {{out}}/{run}"
            " --count 2000",
            "TibetanMNIST.npz",
        )
        for run in ("digits", "digits-long")
    ),
    *(
        Step(
            f"{run}-drawn",
            3,
            f"bench/vae.py samples faces --data {{data}}/anime-faces.zip --out {{out}}/{run}"
            " --cascade {data}/lbpcascade_animeface.xml",
            "lbpcascade_animeface.xml",
        )
        for run in ("faces", "faces-long")
    ),
    Step(
        "digits-peers",
        20,
        "bench/vae.py peers digits --data {data}/TibetanMNIST.npz --seconds 300",
        "TibetanMNIST.npz",
    ),
    Step(
        "faces-peers",
        30,
        "bench/vae.py peers faces --data {data}/anime-faces.zip --seconds 720",
        "anime-faces.zip",
    ),
    Step("tenses", 60, "bench/cvae.py scores --data {data} --out {out}/cvae", "train.txt"),
    Step("tenses-speed", 5, "bench/cvae.py speed --data {data}", "train.txt"),
]


def read_metrics(out: Path, run: str, weight: str = "1") -> dict:
    return json.loads((out / run / f"lambda-{weight}" / "metrics.json").read_text())


def printed(out: Path, name: str) -> str:
    """The table in what the step printed."""
    lines = (out / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def images_table(out: Path) -> str:
    """-ELBO of digits and faces, of the default and of the longer runs."""
    lines = ["| command | test -ELBO | training images | rest | seconds |", "| --- " * 5 + "|"]
    runs = {run: read_metrics(out, run) for run in ("digits", "digits-long", "faces", "faces-long")}
    for run, m in runs.items():
        digits = "digits" in run
        command = f"python vae_{'mnist' if digits else 'anime'}.py"
        command += f" --epochs {m['epochs']}" if "long" in run else ""
        bits, dims = m["bits_per_dim"], 784 if digits else 3 * 64 * 64
        train = bits + (m["neg_elbo"]["train"] - m["neg_elbo"]["test"]) / dims / 0.693147
        if digits:
            figure = f"**{m['neg_elbo']['test']:.2f} nats** ({bits:.3f} bits/dim)"
            train, bound = f"{m['neg_elbo']['train']:.2f}", f"{m['iwae']:.2f} nats"
            bound += f" ({m['iwae_images']} images, on which -ELBO is {m['iwae_neg_elbo']:.2f}), "
        else:
            one = m["bits_per_dim_one_sigma"]
            figure, train, bound = (
                f"**{bits:.3f} bits/dim** ({one:.3f} with one σ)",
                f"{train:.3f}",
                "",
            )
        bound = f"IWAE-{m['iwae_samples']} {bound}" if bound else ""
        rest = (
            f"{bound}{m['psnr_db']:.2f} dB, {m['active_units']} of {m['latent_dim']} units active"
        )
        rest += f", {m['parameters']:,} weights"
        lines.append(f"| `{command}` | {figure} | {train} | {rest} | {m['seconds']:.0f} |")
    return "\n".join(lines)


def lambda_table(out: Path) -> str:
    """What λ does to reconstruction, KL and active units of both."""
    names = ["λ"]
    for run in ("digits", "faces"):
        names += [
            f"{run}: reconstruction",
            "KL",
            f"active of {read_metrics(out, run)['latent_dim']}",
        ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for weight in LAMBDAS:
        cells = [weight]
        for run in ("digits", "faces"):
            m = read_metrics(out, run, weight)
            cells += [f"{m['reconstruction']['test']:,.2f}", f"{m['kl']['test']:,.1f}"]
            cells.append(str(m["active_units"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn_table(out: Path, kind: str) -> str:
    """What the judge printed of the default run and of the longer one."""
    lines = printed(out, f"{kind}-drawn").splitlines()
    longer = [
        row for row in printed(out, f"{kind}-long-drawn").splitlines()[2:] if "real" not in row
    ]
    return "\n".join([*lines, *(f"| longer run: {row.removeprefix('| ')}" for row in longer)])


TABLES: dict[str, Callable[[Path], str]] = {
    "images": images_table,
    "lambda": lambda_table,
    "faces-drawn": lambda out: drawn_table(out, "faces"),
    "digits-drawn": lambda out: drawn_table(out, "digits"),
}
TABLES |= {
    name: lambda out, name=name: printed(out, name)
    for name in ("news", "news-speed", "digits-peers", "faces-peers", "tenses", "tenses-speed")
}


def run_step(step: Step, args: argparse.Namespace) -> None:
    """Run the command, and keep what it printed if it ended well."""
    words = shlex.split(step.command.format(data=args.data.resolve(), out=args.out.resolve()))
    print("$ python", *words, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {step.name} ended with {done.returncode}. Run this again")
    (args.out / f"{step.name}.txt").write_text(done.stdout, encoding="utf-8")
    print(f"{done.stdout}took {time.monotonic() - began:.0f} s\n", flush=True)


def write_tables(document: Path, out: Path) -> list[str]:
    """Put each table between its marks; return the names of those that have nothing measured."""
    text, missing = document.read_text(encoding="utf-8"), []
    for name, table in TABLES.items():
        try:
            block = f"<!-- {name} -->\n{table(out)}\n<!-- /{name} -->"
        except FileNotFoundError:
            missing.append(name)
            continue
        place = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.S)
        count, text = len(place.findall(text)), place.sub(block.replace("\\", r"\\"), text)
        if count != 1:
            raise SystemExit(f"error: {document}: {count} places for the table {name}. Mark one")
    document.write_text(text, encoding="utf-8")
    return missing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=ROOT / "data", help="folder with the real files [data/]")
    add("--out", type=Path, default=ROOT / "runs" / "all", help="of runs and output [runs/all/]")
    add("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    add("--list", action="store_true", help="print what is to be done, and do nothing")
    add("--tables", action="store_true", help="write the tables from what is there, run nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    steps = [step for step in steps if not (args.out / f"{step.name}.txt").exists()]
    for step in [step for step in steps if not (args.data / step.needs).exists()]:
        print(f"left out  {step.name}: no {step.needs} in {args.data}")
        steps.remove(step)
    print(f"to do     {len(steps)} steps, about {sum(step.minutes for step in steps)} minutes")
    if args.list:
        for step in steps:
            print(f"{step.minutes:4} min  {step.name:14} python {step.command}")
        return
    if not args.tables:
        minutes = "{l_bar}{bar}| {n:.0f}/{total:.0f} min [{elapsed}<{remaining}]"
        with tqdm(total=sum(s.minutes for s in steps), bar_format=minutes, disable=None) as bar:
            for step in steps:
                run_step(step, args)
                bar.update(step.minutes)
    for name in write_tables(RESULTS, args.out):
        print(f"as it was {name}: not measured in {args.out}")
    print(f"wrote     the tables of {RESULTS}")


if __name__ == "__main__":
    main()
