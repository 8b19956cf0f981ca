"""A page to play with finished runs: news, digits, faces and English tenses.

pip install -r demo/requirements.txt
python demo/app.py          reads runs/ where you stand, opens http://127.0.0.1:7860
python demo/app.py --quick  first makes the runs that are missing, on the bundled sample
"""

import argparse
import contextlib
import html
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]
import cvae
import gradio as gr
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

import transformer
import vae_anime
import vae_mnist

SAMPLE, listen = ROOT / "data" / "sample", partial(gr.on, trigger_mode="always_last")
QUICK = {  # run: script, file of the sample, flags; a few minutes in all
    "transformer": ("transformer.py", "", "--epochs 8"),
    "vae_mnist": ("vae_mnist.py", "TibetanMNIST.npz", "--lambda 1 100 --epochs 60 --iwae 4"),
    "vae_anime": ("vae_anime.py", "anime-faces.zip", "--lambda 1 100 --epochs 20 --iwae 4"),
    "cvae": ("lab4/cvae.py", "", "--epochs 60 --hidden-dim 128"),
}
EXAMPLES = [
    ["Stocks slip as oil nears record high", "Investors worry that dear crude slows the economy."],
    ["Underdogs win the cup final in extra time", "A late goal ended a run of forty years."],
    ["Probe sends first pictures of a ringed moon", "Scientists say the craft works as planned."],
]
TOPICS = {"1": "1 World", "2": "2 Sports", "3": "3 Business", "4": "4 Sci/Tech"}  # AG News'
SLIDERS, MAX_BYTES = 5, 10 * 2**20  # directions of the code to move along; of an upload
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
Picture = partial(gr.Image, interactive=False, buttons=["download", "fullscreen"])
Upload = partial(gr.Image, type="filepath", height=260, sources=["upload"])
sentence = partial(gr.Error, print_exception=False)
Number = partial(gr.Number, 0, label="Seed", precision=0, minimum=0, maximum=2**31)


@contextlib.contextmanager
def told_on_the_page() -> Iterator[None]:
    """What a script would end with in a terminal becomes a sentence on the page."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit:
        raise sentence(said.getvalue().removeprefix("error:").strip()) from None


def shade(title: str, words: list[str], values: torch.Tensor, color: str) -> str:
    """The title, and below it the words as HTML, each the darker the higher its value."""
    shares = (values / values.max().clamp_min(1e-9)).clamp_min(0).tolist()
    style = '<span style="background: rgba({}, {:.2f}); padding: 2px 3px">{}</span>'
    pairs = zip(words, shares, strict=True)
    spans = [style.format(color, share, html.escape(word)) for word, share in pairs]
    return f'<b>{title}</b><div style="line-height: 2.1">{" ".join(spans)}</div>'


def news_tab(folder: Path) -> None:
    with told_on_the_page():
        models, state = transformer.load_finished(folder)
    vocabulary = transformer.Vocabulary(**state["vocabulary"])

    def probabilities(texts: list[torch.Tensor]) -> torch.Tensor:
        each = [transformer.predict_probabilities(model, texts) for model in models]
        return torch.stack(each).mean(0)

    @torch.no_grad()
    def read(title: str, description: str, head: str) -> tuple[dict, str, str]:
        """Each class's probability, and the text shaded by attention and by deletion."""
        text = ("\t" if vocabulary.columns > 1 else " ").join([title, description])
        tokens = transformer.split_text(text, vocabulary.columns)
        if not tokens:
            raise sentence("Type a title or a description first.")
        encoded = vocabulary.encode(tokens)
        words, rows = [word for word, *_ in tokens][: len(encoded)], torch.arange(len(encoded))
        [shares] = probabilities([encoded])
        maps = [model(encoded[None])[1][0] for model in models]
        received = torch.stack(maps).mean((0, 2))  # (heads, T): by a word, from all words
        attention = received.mean(0) if head == "mean" else received[int(head) - 1]
        without = [encoded[rows != row] for row in rows] if len(words) > 1 else [encoded]
        loss = shares.max() - probabilities(without)[:, shares.argmax()]
        names = [TOPICS.get(name, name) for name in state["classes"]]
        looked = shade("Attention received in the last layer", words, attention, "255, 140, 0")
        lost = shade("What the answer loses without the word", words, loss, "30, 120, 220")
        return dict(zip(names, shares.tolist(), strict=True)), looked, lost

    def classify_csv(path: str) -> str:
        """submission.csv of an uploaded file that has the training file's columns but the label."""
        with told_on_the_page():
            table, _ = transformer.read_table(Path(path))
            key = {name.lower(): name for name in table}.get("id")
            columns = [name for name in table if name != key]
            if len(columns) != (wanted := vocabulary.columns):
                transformer.fail(f"Give {wanted} text columns and Id; found {', '.join(table)}.")
            ids, texts = transformer.read_texts(table, Path(Path(path).name), key, columns)
        best = transformer.classify(models, state, texts).argmax(1)
        answer = {key or "Id": ids, "Category": [state["classes"][i] for i in best]}
        out = f"{tempfile.mkdtemp()}/submission.csv"
        pd.DataFrame(answer).to_csv(out, index=False)
        return out

    gr.Markdown(
        f"{len(models)} Transformers, each trained without a part of the texts, say what a text is "
        "about. A word may be looked at (orange) and yet change nothing (blue)."
    )
    shown = read(*EXAMPLES[0], "mean")
    with gr.Row():
        with gr.Column():
            title = gr.Textbox(EXAMPLES[0][0], label="Title")
            description = gr.Textbox(EXAMPLES[0][1], label="Description", lines=3)
            heads = [str(head + 1) for head in range(state["settings"]["heads"])]
            head = gr.Radio(["mean", *heads], value="mean", label="Head of attention")
            button = gr.Button("Classify", variant="primary")
            gr.Examples(EXAMPLES, [title, description])
        with gr.Column():
            bars = gr.Label(shown[0], label="Probability of each class")
            outputs = [bars, gr.HTML(shown[1]), gr.HTML(shown[2])]
    events = [button.click, title.submit, title.change, head.input]
    listen(events, read, [title, description, head], outputs)
    with gr.Row():
        upload = gr.File(label="A csv to classify: Id and the text columns", type="filepath")
        upload.upload(classify_csv, upload, gr.File(label="submission.csv", interactive=False))


class Drawer:
    """The finished runs of one of the twins, a model for each λ."""

    def __init__(self, script, out: Path):
        self.script, self.out, self.load = script, out, cache(self.load)
        names = [path.parent.name.removeprefix("lambda-") for path in out.glob("*/metrics.json")]
        self.weights = sorted((n for n in names if not n.endswith(".previous")), key=float)
        self.examples = [f"{tempfile.mkdtemp()}/{number}.png" for number in range(12)]
        config = json.loads((out / f"lambda-{self.weights[0]}" / "config.json").read_text())
        data = Path(config["arguments"]["data"] or "none")  # that the run was trained on
        images = script.load_images(script.find_data(data if data.exists() else None))[0]
        for image, path in zip(images, self.examples, strict=False):
            self.picture(torch.from_numpy(image[None].copy()), 1).save(path)

    def load(self, weight: str) -> tuple:
        """The model of λ, its command line, and its most telling directions (SLIDERS, k)."""
        with told_on_the_page():
            model, _ = self.script.load_finished(self.out / f"lambda-{weight}", torch.device("cpu"))
        self.script.seed_all(0)
        z = model.prior().sample((1000,))
        _, lengths, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
        args = self.script.parse_args([])  # seed and temperature
        return model, args, (directions * lengths[:, None] / len(z) ** 0.5)[:SLIDERS]

    def picture(self, images: torch.Tensor, columns: int) -> Image.Image:
        """uint8 images (N, C, H, W) as one picture of some 800 pixels."""
        tiled = Image.fromarray(self.script.tile(images, columns)[1:-1, 1:-1])
        return tiled.resize([side * (800 // tiled.width) for side in tiled.size], 0)

    def encode(self, weight: str, path: str | None) -> tuple:
        """q(z|x) of the picture in the file, and x (1, C, H, W)."""
        channels, *size = self.script.SHAPE
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                small = image.convert("RGB" if channels == 3 else "L").resize(size[::-1])
        except (OSError, ValueError, AttributeError, Image.DecompressionBombError):
            raise sentence("Choose a picture that can be read.", visible=bool(path)) from None
        pixels = np.array(small).reshape(1, *size, channels).transpose(0, 3, 1, 2)
        x = self.script.to_pixels(torch.from_numpy(pixels))
        with torch.no_grad():
            return self.load(weight)[0].encode(x, float(weight)), x

    def draw(self, weight: str, seed: float, temperature: float) -> Image.Image:
        words = ["--seed", str(int(seed)), "--temperature", str(temperature)]
        draws = self.script.draw_samples(self.load(weight)[0], 36, self.script.parse_args(words))
        return self.picture(draws, 6)

    @torch.no_grad()
    def reconstruct(self, weight: str, path: str | None) -> tuple:
        """The picture beside its reconstruction, its q(z|x), and the sliders back at 0."""
        (q, x), (model, _, directions) = self.encode(weight, path), self.load(weight)
        pixels, _, _ = self.script.infer(model, x, q)
        pair = torch.cat([self.script.to_bytes(image) for image in (x, pixels.mean)])
        figure = Figure((6, 2.4), dpi=120, layout="constrained")
        described = {"mean": q.mean[0], "variance": q.variance[0]}
        for panel, (name, values) in zip(figure.subplots(1, 2), described.items(), strict=True):
            panel.bar(range(len(values)), values.numpy(), width=1.0)
            panel.axhline(float(name == "variance"), color="tab:red", linewidth=1)
            panel.set(title=f"{name} of q(z|x), N(0, I) red", xlabel="dimension of z")
        zeros = [0.0] * len(directions)
        return self.picture(pair, 2), figure, self.around(weight, path, *zeros), *zeros

    def around(self, weight: str, path: str | None, *moves: float) -> Image.Image:
        """The picture's code moved along each direction, in standard deviations of the prior."""
        (q, _), (model, args, directions) = self.encode(weight, path), self.load(weight)
        moved = q.mean + torch.tensor(moves).float() @ directions
        return self.picture(self.script.paint(model, moved, args), 1)

    def between(self, weight: str, first: str | None, last: str | None, share: float):
        """A code on the straight line from one picture's to the other's."""
        (a, _), (b, _) = self.encode(weight, first), self.encode(weight, last)
        model, args, _ = self.load(weight)
        return self.picture(self.script.paint(model, a.mean.lerp(b.mean, share), args), 1)


def picker(drawer: Drawer, number: int, label: str) -> gr.Image:
    """A place for a picture, to upload or to take from the examples below it."""
    with gr.Column():
        place = Upload(drawer.examples[number], label=label)
        place.preprocess = lambda file: file and file.path  # Gradio's own raises what it likes
        gr.Examples(drawer.examples, place, label="or one of these", examples_per_page=12)
    return place


def vae_tab(script, out: Path, what: str) -> None:
    drawer = Drawer(script, out)
    start = "1" if "1" in drawer.weights else drawer.weights[0]
    gr.Markdown(
        f"A variational autoencoder that learned {what}. λ is the weight of the KL in training: "
        "where it is large the code says little of the image or nothing (posterior collapse): the "
        "sliders do little (`--lambda 0 1 50 100` makes the runs to compare). Sliders and walk "
        "move the code alone: a face's detail is drawn anew, so they begin near its reconstruction."
    )
    weight = gr.Radio(drawer.weights, value=start, label="λ")
    with gr.Tab("Draw"), gr.Row():
        with gr.Column():
            seed, warm = Number(), script.TEMPERATURE
            temperature = gr.Slider(0, 1.2, warm, step=0.05, label="Temperature (1: as learned)")
            button = gr.Button("Draw 36", variant="primary")
        drawn = Picture(drawer.draw(start, 0, warm), label="Drawn from noise", height=540)
    events = [button.click, seed.submit, temperature.release, weight.input]
    listen(events, drawer.draw, [weight, seed, temperature], drawn)
    with gr.Tab("Around a picture"), gr.Row():
        first = drawer.reconstruct(start, drawer.examples[0])
        with gr.Column():
            chosen = picker(drawer, 0, "Picture")
            again = Picture(first[0], label="Picture and reconstruction", height=260)
        with gr.Column():
            moved = Picture(first[2], label="Its code, moved by the sliders", height=260)
            labels = [f"Direction {number + 1}, in σ" for number in range(len(first) - 3)]
            sliders = [gr.Slider(-3, 3, 0, step=0.1, label=label) for label in labels]
            posterior = gr.Plot(first[1], show_label=False)
    shown = [again, posterior, moved, *sliders]
    listen([chosen.change, weight.input], drawer.reconstruct, [weight, chosen], shown)
    listen([slider.input for slider in sliders], drawer.around, [weight, chosen, *sliders], moved)
    with gr.Tab("From one picture to another"):
        share = gr.Slider(0, 1, 0.5, step=0.02, label="Way from the first to the second")
        with gr.Row():
            ends = picker(drawer, 0, "From"), picker(drawer, 1, "To")
            middle = drawer.between(start, *drawer.examples[:2], 0.5)
            middle = Picture(middle, label="Between", height=260)
    events = [*(end.change for end in ends), share.input, weight.input]
    listen(events, drawer.between, [weight, *ends, share], middle)


def tenses_tab(folder: Path) -> None:
    with told_on_the_page():
        model = cvae.load_finished(folder)

    def walk(first: str, last: str, steps: int = 9) -> pd.DataFrame:
        ends = [word.strip().lower() for word in (first, last)]
        if not all(re.fullmatch(cvae.WORD, word) for word in ends):
            raise sentence(f"Type a verb of up to {cvae.MAX_LETTERS} letters a to z.")
        return pd.DataFrame(cvae.between(model, *ends, steps), columns=cvae.TENSES)

    def draw(seed: float) -> pd.DataFrame:
        return pd.DataFrame(cvae.generate(model, 8, int(seed)), columns=cvae.TENSES)

    gr.Markdown(
        "A conditional variational autoencoder reads a verb into a code and spells the code in "
        "each tense. It knows the verbs that it trained on and guesses others."
    )
    verb = gr.Textbox("carry", label="A verb in the present, then Enter")
    forms = gr.Dataframe(walk("carry", "carry", 1), label="Its forms", interactive=False)
    verb.submit(lambda word: walk(word, word, 1), verb, forms)
    with gr.Row():
        ends = gr.Textbox("carry", label="From"), gr.Textbox("send", label="To")
        button = gr.Button("Walk from code to code")
    steps = gr.Dataframe(walk("carry", "send"), label="Verbs on the way", interactive=False)
    button.click(walk, [*ends], steps)
    seed = Number()
    drawn = gr.Dataframe(draw(0), label="Verbs from noise, draws of N(0, I)", interactive=False)
    seed.change(draw, seed, drawn)


def make_quick(runs: Path) -> None:
    """Train what is missing on the bundled sample; each run shows its own progress."""
    for number, (name, (script, file, flags)) in enumerate(QUICK.items(), 1):
        if any((runs / name).rglob("metrics.json")):
            continue
        print(f"quick     {number} of {len(QUICK)}: {script} on the bundled sample", flush=True)
        command = [sys.executable, str(ROOT / script), "--data", str(SAMPLE / file)]
        command += ["--out", str((runs / name).resolve()), "--resume", *flags.split()]
        with tempfile.TemporaryDirectory() as elsewhere:  # submission.csv falls where one stands
            subprocess.run(command, cwd=elsewhere, check=True)


def build_page(runs: Path) -> gr.Blocks:
    """Four tabs; in place of one whose run is missing, the command that makes it."""
    tabs = {
        "News": ("transformer", news_tab),
        "Digits": ("vae_mnist", partial(vae_tab, vae_mnist, what="handwritten digits")),
        "Faces": ("vae_anime", partial(vae_tab, vae_anime, what="anime faces, at two scales")),
        "Tenses": ("cvae", tenses_tab),
    }
    done = [title for title, (name, _) in tabs.items() if any((runs / name).rglob("metrics.json"))]
    with gr.Blocks(title="Transformer and VAE") as page:
        gr.Markdown("# Transformer and VAE in plain PyTorch: play with the finished runs")
        with gr.Tabs(selected=done[0] if done else None):
            for title, (name, fill) in tabs.items():
                make = f"`python {QUICK[name][0]}`, or all with `python demo/app.py --quick`"
                missing = f"No finished run in `{runs / name}`. Make it with {make}."
                with gr.Tab(title, id=title):
                    fill(runs / name) if title in done else gr.Markdown(missing)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs [%(default)s]")
    add("--quick", action="store_true", help="make missing runs on the bundled sample first")
    add("--port", type=int, default=7860, help="of the page, on this machine [%(default)s]")
    add("--share", action="store_true", help="a public link, through Gradio's servers [off]")
    args = parser.parse_args(argv)
    if args.quick:
        make_quick(args.runs)
    torch.set_num_threads(1)  # several people at once share the cores
    page = build_page(args.runs).queue(default_concurrency_limit=2)
    where = {"server_name": "127.0.0.1", "server_port": args.port, "share": args.share}
    with transformer.one_line(f"--port {args.port}", "Name another with --port"):
        page.launch(theme=THEME, inbrowser=True, max_file_size=MAX_BYTES, **where)


if __name__ == "__main__":
    main()
