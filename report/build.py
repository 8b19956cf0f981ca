"""Make report.pdf and hw2_<student id>.zip, what the homework asks to hand in, from finished runs.

    python report/build.py --student-id 0123456            from what stands in runs/
    python report/build.py --student-id 0123456 --run      run what is missing first (about an hour on two cores)
    python report/build.py --student-id 0123456 --quick    all of it on the bundled sample, in under ten minutes

report.typ reads its numbers and pictures from the runs by itself; a section whose run is missing names its command.
"""

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import typst
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = ("transformer.py", "vae_mnist.py", "vae_anime.py")
LAMBDAS = ["--lambda", "0", "1", "50", "100"]
ABLATION = {  # name in the table: flags
    "as it is": [],
    "2 layers": ["--layers", "2"],
    "1 head": ["--heads", "1"],
    "no dropout": ["--dropout", "0", "--word-dropout", "0"],
    "no word vectors": ["--vectors", "none"],
    "no R-Drop": ["--r-drop", "0"],
    "Adam": ["--optimizer", "adam"],
    "SGD, learning rate 0.1": ["--optimizer", "sgd", "--lr", "0.1"],
    "ReLU": ["--activation", "relu"],
}


class Step(NamedTuple):
    """One command, and the file that says it is done."""

    key: str  # as report.typ asks for it
    done: Path
    command: list[str]


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def ablation_key(name: str) -> str:
    return "ablation/" + name.replace(" ", "-").replace(",", "").lower()


def plan(runs: Path, data: Path | None, quick: bool) -> list[Step]:
    """Every command that the report draws on, in order."""

    def script(name: str, out: str, flags: list[str], file: str = "") -> list[str]:
        given = ["--data", str(data / file if file else data)] if data else []
        return [sys.executable, str(ROOT / name), *given, "--out", str(runs / out), *flags]

    def step(key: str, name: str, flags: list[str], file: str = "", done: str = "metrics.json") -> Step:
        return Step(key, runs / key / done, script(name, key, flags, file))

    few = ["--epochs", "4"] if quick else []
    verbs = ["--epochs", "60", "--hidden-dim", "128"] if quick else []
    steps = [step("transformer", "transformer.py", few)]
    measure = [sys.executable, str(HERE / "measure.py"), str(runs / "transformer")]
    steps.append(Step("measured", runs / "transformer" / "measured.json", measure))
    steps.append(step("comparison", "transformer.py", [*few, "--compare-tokenizers"], done="tokenizers/tokenizers.csv"))
    for name, flags in ABLATION.items():
        steps.append(step(ablation_key(name), "transformer.py", ["--epochs", "2" if quick else "8", *flags]))
    for key, file, quick_epochs, sweep_epochs in (
        ("vae_mnist", "TibetanMNIST.npz", "4", "8"), ("vae_anime", "anime-faces.zip", "2", "2"),
    ):  # fmt: skip
        small = ["--iwae", "16", "--iwae-images", "20"] if quick else []
        one = ["--epochs", quick_epochs, *small] if quick else []
        steps.append(step(key, f"{key}.py", one, file, "lambda-1/metrics.json"))
        epochs = ["--epochs", quick_epochs if quick else sweep_epochs, *small]
        steps.append(step(f"{key}_sweep", f"{key}.py", [*LAMBDAS, *epochs], file, "sweep.csv"))
    steps.append(step("cvae", "lab4/cvae.py", verbs))
    steps.append(step("cvae_holdout", "lab4/cvae.py", ["--holdout", "20" if quick else "100", *verbs]))
    fewer = verbs or ["--epochs", "60"]
    steps.append(
        step("cvae_schedules", "lab4/cvae.py", ["--compare-schedules", *fewer], done="schedules/schedules.png")
    )
    return steps


def run_missing(steps: list[Step], runs: Path) -> None:
    """Run each step whose result is not there. Each has its own folder to stand in, where submission.csv falls."""
    missing = [step for step in steps if not step.done.exists()]
    handler = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the run as well, which saves and ends
    for step in tqdm(missing, "runs", disable=None):
        where = runs / "cwd" / step.key
        where.mkdir(parents=True, exist_ok=True)
        print(f"\nrun       {shlex.join(step.command)}", flush=True)
        if step.key == "measured":  # as the transformer's run did, it reads --data from where the user stands
            code = subprocess.run(step.command, check=False).returncode
        else:
            code = subprocess.run([*step.command, "--resume"], cwd=where, check=False).returncode
        if code in (130, 143):
            print("stopped   the same command goes on from there")
            raise SystemExit(code)
        if code:
            fail("that command failed; its lines above say why. Mend it, then run this again: finished runs are kept")
        if step.key == "transformer":
            print(f"kept      {where / 'submission.csv'}, to upload")
    signal.signal(signal.SIGINT, handler)


def read_runs(steps: list[Step]) -> dict:
    """What report.typ needs to know about the runs beside their files: which are there, how the others are made."""

    def shown(step: Step) -> str:
        words = [str(Path(word).relative_to(ROOT)) if word.startswith(f"{ROOT}/") else word for word in step.command]
        return shlex.join(["python", *words[1:]])

    ablation = []
    for name, flags in ABLATION.items():
        [step] = [step for step in steps if step.key == ablation_key(name)]
        if step.done.exists():
            ablation.append({"name": name, "flags": " ".join(flags), **json.loads(step.done.read_text())})
    if ablation and ablation[0]["name"] != "as it is":
        ablation = []  # nothing to compare with
    missing = {step.key: shown(step) for step in steps if not step.done.exists()}
    return {"missing": missing, "ablation": ablation, "partial": partial_runs(steps)}


def partial_runs(steps: list[Step]) -> dict[str, str]:
    """The runs that do not stand for the homework's data, and why: the bundled sample, or --limit."""
    sample = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / "data" / "sample").glob("*")}
    found = {}
    for step in steps:
        if step.key == "measured":  # on the transformer's run
            continue
        path = next(iter(sorted(step.done.parent.rglob("config.json"))), None) if step.done.exists() else None
        if path:
            config = json.loads(path.read_text(encoding="utf-8"))
            reasons = ["on the bundled sample"] if sample & set(config["sha256"].values()) else []
            reasons += [f"--limit {config['arguments']['limit']}"] if config["arguments"]["limit"] else []
            if reasons:
                found[step.key] = ", ".join(reasons)
    return found


def typeset(runs: Path, about: dict, student_id: str) -> bytes:
    """The PDF. Typst reads files below `root` only, so report.typ goes beside the runs for as long as it takes."""
    with tempfile.TemporaryDirectory(dir=runs, prefix=".report") as folder:
        source = Path(folder) / "report.typ"
        shutil.copy(HERE / "report.typ", source)
        inputs = {"about": json.dumps(about | {"student_id": student_id})}
        try:
            return typst.compile(source, root=runs, format="pdf", sys_inputs=inputs)
        except typst.TypstError as error:
            fail(f"report/report.typ: {error.message}" + "".join(f" ({hint})" for hint in error.hints))


def try_alone(script: Path) -> None:
    """Start `script` from an empty folder that holds nothing else: it must say in one line what data it misses."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(script, folder)
        for flags, code in ((["--help"], 0), ([], 2)):
            done = subprocess.run([sys.executable, script.name, *flags], cwd=folder, capture_output=True, text=True,
                                  check=False)  # fmt: skip
            if done.returncode != code or "Traceback" in done.stderr:
                fail(f"{script}: does not start from an empty folder: {done.stderr.strip()[-300:]}")


def write_zip(path: Path, student_id: str, pdf: bytes) -> None:
    """The four files that the homework names, and nothing else."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in SCRIPTS:
            archive.writestr(f"{student_id}_{name}", (ROOT / name).read_bytes())
        archive.writestr(f"{student_id}_report.pdf", pdf)
    write_whole(path, content.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("--student-id", required=True, metavar="ID", help="letters and digits; names the zip and what is in it")
    add("--run", action="store_true", help="run what is missing first")
    add("--quick", action="store_true", help="run everything on the bundled sample, in runs/quick")
    add("--data", type=Path, metavar="DIR", help="folder with the real files; otherwise data/, or the bundled sample")
    add("--runs", type=Path, metavar="DIR", default=Path("runs"), help="folder of the runs (default: runs)")
    add("--out", type=Path, metavar="DIR", default=Path("."), help="where report.pdf and the zip go (default: here)")
    add("--force", action="store_true", help="replace an existing zip")
    args = parser.parse_args(argv)
    if not (args.student_id.isascii() and args.student_id.isalnum() and len(args.student_id) <= 32):
        fail(f"--student-id {args.student_id[:40]!r}: give letters and digits only, 32 at most, as in 0123456")
    if args.quick and args.data:
        fail("--quick runs on the bundled sample. Leave out --quick or --data")
    archive = args.out / f"hw2_{args.student_id}.zip"
    if archive.exists() and not args.force:
        fail(f"{archive}: exists already. Replace it with --force, or name another folder with --out")
    if not args.out.is_dir():
        fail(f"--out {args.out}: no such folder. Make it first")
    runs = (args.runs / "quick" if args.quick else args.runs).resolve()
    data = ROOT / "data" / "sample" if args.quick else args.data.resolve() if args.data else None
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--runs {args.runs}: {error.strerror}. Name another folder")
    steps = plan(runs, data, args.quick)
    if args.run or args.quick:
        run_missing(steps, runs)
    about = read_runs(steps)
    for key, command in about["missing"].items():
        print(f"missing   {key}: {command}")
    for key, reason in ({} if args.quick else about["partial"]).items():
        print(f"warning   {key}: {reason}; the report says so. To run it anew, remove {runs / key} first")
    pdf = typeset(runs, about, args.student_id)
    write_whole(args.out / "report.pdf", pdf)
    for name in SCRIPTS:
        try_alone(ROOT / name)
    write_zip(archive, args.student_id, pdf)
    print(f"wrote     {args.out / 'report.pdf'} and {archive}: the PDF and three scripts, each tried alone")
    if about["missing"]:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--run", "--force")]
        command = shlex.join(["python", "report/build.py", *words, "--run", "--force"])
        print(f"next      {command}, for the missing sections")


if __name__ == "__main__":
    main()
