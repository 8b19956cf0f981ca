"""Make report.pdf and hw2_<student id>.zip, what the homework asks to hand in, from finished runs.

    python report/build.py --student-id 0123456          from what stands in runs/
    python report/build.py --student-id 0123456 --run    run what is missing first (1-2 hours)
    python report/build.py --student-id 0123456 --quick  all on the bundled sample, in ten minutes

report.typ reads its numbers and pictures from the runs by itself; a section whose run is missing
names its command.
"""

import argparse
import hashlib
import io
import json
import os
import re
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
FILES = {"vae_mnist.py": "TibetanMNIST.npz", "vae_anime.py": "anime-faces.zip"}  # in --data
TOKENIZERS = ("basic_english", "spacy", "nltk", "whitespace")
SCHEDULES = ("monotonic", "cyclical")
LAMBDAS = ["0", "1", "50", "100"]
ABLATION = {  # name in the table: flags
    "as it is": [],
    "2 layers": ["--nlayers", "2"],
    "1 head": ["--nhead", "1"],
    "no dropout": ["--dropout", "0", "--word-dropout", "0"],
    "no word vectors": ["--vectors", "none"],
    "no R-Drop": ["--r-drop", "0"],
    "Adam": ["--optimizer", "adam"],
    "SGD, learning rate 0.1": ["--optimizer", "sgd", "--lr", "0.1"],
    "ReLU": ["--activation", "relu"],
}


class Step(NamedTuple):
    """One command, and the file that exists when it is done."""

    key: str  # as report.typ asks for it
    done: Path
    command: list[str]
    needs: tuple[Path, ...] = ()  # what measure.py reads; nothing for a run of a script

    def missing(self) -> bool:
        """Not done, or done before what it reads was made anew."""
        if not self.done.exists():
            return True
        made = self.done.stat().st_mtime
        return any(path.exists() and path.stat().st_mtime > made for path in self.needs)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def ablation_key(name: str) -> str:
    return "ablation/" + name.replace(" ", "-").replace(",", "").lower()


class Plan:
    """The commands that the report draws on, in order, with `data` and results in `runs`."""

    def __init__(self, runs: Path, data: Path | None):
        self.runs = runs
        self.data = data
        self.steps: list[Step] = []

    def train(self, key: str, script: str, flags: list[str], done: str = "metrics.json") -> None:
        """A run of `script` in the folder <runs>/<key>."""
        file = FILES.get(script, "")
        given = ["--data", str(self.data / file)] if self.data else []
        out = ["--out", str(self.runs / key)]
        command = [sys.executable, str(ROOT / script), *flags, *given, *out]
        self.steps.append(Step(key, self.runs / key / done, command))

    def measure(self, key: str, what: str, folder: str, done: str, needs: list[str]) -> None:
        """measure.py on runs that stand before it in the plan."""
        folder = self.runs / folder
        command = [sys.executable, str(HERE / "measure.py"), what, str(folder)]
        self.steps.append(Step(key, folder / done, command, tuple(folder / path for path in needs)))


def plan_transformer(plan: Plan, quick: bool) -> None:
    few = ["--epochs", "4"] if quick else []
    plan.train("transformer", "transformer.py", few)
    plan.measure(
        "transformer/measured", "transformer", "transformer", "measured.json", ["metrics.json"]
    )

    for name in TOKENIZERS:
        plan.train(f"comparison/{name}", "transformer.py", ["--tokenizer", name, *few])
    needs = [f"{name}/metrics.json" for name in TOKENIZERS]
    plan.measure("comparison", "tokenizers", "comparison", "tokenizers.csv", needs)

    for name, flags in ABLATION.items():
        epochs = ["--epochs", "2" if quick else "8"]
        plan.train(ablation_key(name), "transformer.py", [*flags, *epochs])


def plan_vae(plan: Plan, name: str, quick_epochs: str, sweep_epochs: str, quick: bool) -> None:
    epochs = ["--epochs", quick_epochs if quick else sweep_epochs]
    plan.train(name, f"{name}.py", epochs if quick else [], "lambda-1/metrics.json")
    plan.train(f"{name}_sweep", f"{name}.py", ["--lambda", *LAMBDAS, *epochs], "sweep.csv")

    for run, weights in ((name, ["1"]), (f"{name}_sweep", LAMBDAS)):
        needs = [f"lambda-{weight}/metrics.json" for weight in weights]
        done = f"lambda-{weights[-1]}/measured.json"
        plan.measure(f"{run}/measured", name, run, done, needs)


def plan_cvae(plan: Plan, quick: bool) -> None:
    verbs = ["--epochs", "60", "--hidden-dim", "128"] if quick else []
    plan.train("cvae", "lab4/cvae.py", verbs)

    holdout = ["--holdout", "20" if quick else "100"]
    plan.train("cvae_holdout", "lab4/cvae.py", [*holdout, *verbs])

    for name in SCHEDULES:
        flags = ["--kl-schedule", name, *(verbs or ["--epochs", "60"])]
        plan.train(f"cvae_schedules/{name}", "lab4/cvae.py", flags)
    needs = [f"{name}/metrics.json" for name in SCHEDULES]
    plan.measure("cvae_schedules", "schedules", "cvae_schedules", "schedules.png", needs)


def make_plan(runs: Path, data: Path | None, quick: bool) -> list[Step]:
    """Every command that the report draws on, in order."""
    plan = Plan(runs, data)
    plan_transformer(plan, quick)
    plan_vae(plan, "vae_mnist", "4", "8", quick)
    plan_vae(plan, "vae_anime", "2", "2", quick)
    plan_cvae(plan, quick)
    return plan.steps


def run_missing(steps: list[Step], runs: Path) -> None:
    """Run what is not done, each run in a folder of its own, where its submission.csv falls."""
    missing = [step for step in steps if step.missing()]
    # Ctrl-C reaches the run as well, which ends by itself
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    for step in tqdm(missing, "runs", disable=None):
        print(f"\nrun       {shlex.join(step.command)}", flush=True)

        where = runs / "cwd" / step.key
        if step.needs:  # it reads --data from where the user stands, as the runs themselves did
            code = subprocess.run(step.command, check=False).returncode
        else:
            where.mkdir(parents=True, exist_ok=True)
            command = [*step.command, "--resume"]
            code = subprocess.run(command, cwd=where, check=False).returncode

        if code in (130, 143):
            print("stopped   the same command goes on from there")
            raise SystemExit(code)
        if code:
            fail(
                "that command failed; its lines above say why. "
                "Mend it, then run this again: finished runs are kept"
            )

        if step.key == "transformer":
            print(f"kept      {where / 'submission.csv'}, to upload")
    signal.signal(signal.SIGINT, handler)


def read_runs(steps: list[Step]) -> dict:
    """What report.typ has to know: which runs are there, how to make the others, the ablation."""

    def shown(step: Step) -> str:
        inside = f"{ROOT}/"
        words = [word.removeprefix(inside) for word in step.command[1:]]
        return shlex.join(["python", *words])

    ablation = []
    for name, flags in ABLATION.items():
        [step] = [step for step in steps if step.key == ablation_key(name)]
        if step.done.exists():
            metrics = json.loads(step.done.read_text(encoding="utf-8"))
            ablation.append({"name": name, "flags": " ".join(flags), **metrics})
    if ablation and ablation[0]["name"] != "as it is":
        ablation = []  # nothing to compare with

    missing = {step.key: shown(step) for step in steps if step.missing()}
    found = {"missing": missing, "ablation": ablation, "partial": partial_runs(steps)}
    return found | {"unseen": unseen_accuracies()}


def partial_runs(steps: list[Step]) -> dict[str, str]:
    """The runs that are not on all the homework's data, and why: the bundled sample, or --limit."""
    files = (ROOT / "data" / "sample").glob("*")
    sample = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    found = {}
    for step in steps:
        configs = sorted(step.done.parent.rglob("config.json"))
        if step.needs or not step.done.exists() or not configs:
            continue

        settings = json.loads(configs[0].read_text(encoding="utf-8"))["settings"]
        trained_on = {value for name, value in settings.items() if name.endswith("sha256")}
        reasons = []
        if sample & trained_on:
            reasons.append("on the bundled sample")
        if settings["limit"]:
            reasons.append(f"--limit {settings['limit']}")
        if reasons:
            found[step.key] = ", ".join(reasons)
    return found


def unseen_accuracies() -> dict[str, str]:
    """Word vectors -> accuracy on texts that no setting was compared on, from docs/results.md."""
    results = (HERE.parent / "docs" / "results.md").read_text(encoding="utf-8")
    [table] = re.findall("<!-- news -->(.*)<!-- /news -->", results, re.DOTALL)
    row = r"^\| `python transformer.py --vectors ([\w.]+?)(?:\.txt)?` \|.*\| (.+) \|$"
    return dict(re.findall(row, table, re.M))


def typeset(runs: Path, about: dict, student_id: str) -> bytes:
    """The PDF. Typst reads files below `root` only, so report.typ goes beside the runs."""
    with tempfile.TemporaryDirectory(dir=runs, prefix=".report") as folder:
        source = Path(folder) / "report.typ"
        shutil.copy(HERE / "report.typ", source)
        inputs = {"about": json.dumps(about | {"student_id": student_id})}
        try:
            return typst.compile(source, root=runs, format="pdf", sys_inputs=inputs)
        except typst.TypstError as error:
            fail(
                f"report/report.typ: {error.message}"
                + "".join(f" ({hint})" for hint in error.hints)
            )


def try_alone(script: Path) -> None:
    """Start `script` from a folder of its own: it must say in one line what data it misses."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(script, folder)
        for flags, code in ((["--help"], 0), ([], 2)):
            command = [sys.executable, script.name, *flags]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("--student-id", required=True, metavar="ID", help="letters and digits; names the zip")
    add("--run", action="store_true", help="run what is missing first")
    add("--quick", action="store_true", help="everything on the bundled sample, in runs/quick")
    add("--data", type=Path, metavar="DIR", help="the real files; else data/ or the bundled sample")
    add("--runs", type=Path, metavar="DIR", default=Path("runs"), help="of the runs [%(default)s]")
    add("--out", type=Path, metavar="DIR", default=Path("."), help="of report.pdf and zip [here]")
    add("--force", action="store_true", help="replace an existing zip")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> Path:
    """End over what cannot be done; return where the zip goes."""
    name = args.student_id
    if not (name.isascii() and name.isalnum() and len(name) <= 32):
        fail(f"--student-id {name[:40]!r}: give letters and digits only, 32 at most, as in 0123456")
    if args.quick and args.data:
        fail("--quick runs on the bundled sample. Leave out --quick or --data")

    archive = args.out / f"hw2_{name}.zip"
    if archive.exists() and not args.force:
        fail(f"{archive}: exists already. Replace it with --force, or name another --out")
    if not args.out.is_dir():
        fail(f"--out {args.out}: no such folder. Make it first")
    return archive


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    archive = check_args(args)
    runs = (args.runs / "quick" if args.quick else args.runs).resolve()
    data = ROOT / "data" / "sample" if args.quick else args.data.resolve() if args.data else None
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--runs {args.runs}: {error.strerror}. Name another folder")

    steps = make_plan(runs, data, args.quick)
    if args.run or args.quick:
        run_missing(steps, runs)

    about = read_runs(steps)
    for key, command in about["missing"].items():
        print(f"missing   {key}: {command}")
    for key, reason in ({} if args.quick else about["partial"]).items():
        print(
            f"warning   {key}: {reason}; the report says so. For a new run move {runs / key} away"
        )

    pdf = typeset(runs, about, args.student_id)
    write_whole(args.out / "report.pdf", pdf)
    for name in SCRIPTS:
        try_alone(ROOT / name)
    write_zip(archive, args.student_id, pdf)
    if args.quick:
        print("warning   these are figures of the bundled sample, not of the homework's data")
    print(f"wrote     {args.out / 'report.pdf'} and {archive}: the PDF and the scripts, each tried")

    if about["missing"]:
        words = sys.argv[1:] if argv is None else argv
        words = [word for word in words if word not in ("--run", "--force")]
        command = shlex.join(["python", "report/build.py", *words, "--run", "--force"])
        print(f"next      {command}, for the missing sections")


if __name__ == "__main__":
    main()
