"""A page to explore finished runs: news, digits, faces and English tenses.

    pip install -r demo/requirements.txt
    python demo/app.py          reads runs/ where you stand, opens http://127.0.0.1:7860
    python demo/app.py --quick  first trains what is missing, on the bundled sample

Several visitors can use the page at once. So all that is random comes from a generator that is
seeded for one answer, and a visitor's mistake is a `gr.Error`, which that visitor alone sees.
"""

import html
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # must be set before Gradio is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "lab4")]

import cvae
import gradio as gr
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.distributions import Distribution

import transformer
import vae_anime
import vae_mnist
from vae_mnist import UserError, random_generator

SAMPLE_DATA = ROOT / "data" / "sample"
MAX_UPLOAD_BYTES = 10 * 2**20
USER_ERRORS = (transformer.UserError, vae_mnist.UserError, vae_anime.UserError, cvae.UserError)


class QuickRun(NamedTuple):
    """A run of a few minutes on the bundled sample."""

    script: str
    data: str  # in data/sample; empty for the folder itself
    flags: str


QUICK = {
    "transformer": QuickRun("transformer.py", "", "--epochs 8"),
    "vae_mnist": QuickRun("vae_mnist.py", "TibetanMNIST.npz", "--lambda 1 100 --epochs 60"),
    "vae_anime": QuickRun("vae_anime.py", "anime-faces.zip", "--lambda 1 100 --epochs 20"),
    "cvae": QuickRun("lab4/cvae.py", "", "--epochs 60 --hidden-dim 128"),
}

# News
EXAMPLES = [
    ["Stocks slip as oil nears record high", "Investors worry that dear crude slows the economy."],
    ["Underdogs win the cup final in extra time", "A late goal ended a run of forty years."],
    ["Probe sends first pictures of a ringed moon", "Scientists say the craft works as planned."],
]
AG_NEWS_CLASSES = {"1": "1 World", "2": "2 Sports", "3": "3 Business", "4": "4 Sci/Tech"}
ORANGE = "255, 140, 0"
BLUE = "30, 120, 220"

# Digits and faces
EXAMPLE_IMAGES = 12
SAMPLES = 36
WALK_STOPS = 8  # examples that a walk leads along
WALK_STEPS = 10  # images from one to the next
SLIDERS = 5
PRIOR_SAMPLES = 1000  # to find the directions in which the prior varies most
PICTURE_WIDTH = 800  # pixels on the page, about

# Gradio's components with the arguments that they share on this page
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
listen = partial(gr.on, trigger_mode="always_last")  # of quick changes, answer the last one
page_error = partial(gr.Error, print_exception=False)
Seed = partial(gr.Number, 0, label="Seed", precision=0, minimum=0, maximum=2**31)


# News ---------------------------------------------------------------------------------------------
class Answer(NamedTuple):
    """What the page shows of a classified text."""

    probabilities: dict[str, float]  # by class
    attention: str  # HTML
    deletion: str  # HTML


class News:
    """The finished run of transformer.py, and what the page shows of a text."""

    def __init__(self, folder: Path):
        self.models, self.checkpoint = transformer.load_finished(folder)
        self.vocabulary = transformer.Vocabulary(**self.checkpoint["vocabulary"])
        self.tokenize = transformer.make_tokenizer(self.checkpoint["settings"]["tokenizer"])
        self.heads = self.checkpoint["settings"]["nhead"]
        self.classes = self.checkpoint["classes"]
        self.ece = self.checkpoint["metrics"]["ece"]

    def probabilities(self, texts: list[Tensor]) -> Tensor:
        """The class probabilities (N, C) of encoded texts, averaged over the models."""
        outputs = [transformer.predict_probabilities(model, texts) for model in self.models]
        return torch.stack(outputs).mean(0)

    def classify_text(self, title: str, description: str, head: str) -> Answer:
        """Classify a text, and shade its words by attention and by what their deletion changes."""
        columns = [title, description]
        if self.vocabulary.columns == 1:
            columns = [f"{title} {description}"]

        tokens = transformer.split_text(columns, self.tokenize)
        if not tokens:
            raise page_error("Type a title or a description first.")
        text = self.vocabulary.encode(tokens)  # (T, 4)
        tokens = tokens[: len(text)]
        words = [token.word for token in tokens]

        [probabilities] = self.probabilities([text])
        names = [AG_NEWS_CLASSES.get(name, name) for name in self.classes]
        attention = self.attention_received(text, head)
        drop = self.drop_by_deletion(tokens, probabilities)
        return Answer(
            dict(zip(names, probabilities.tolist(), strict=True)),
            shade("Attention received in the last layer", words, attention, ORANGE),
            shade("Drop in the answer's probability without the word", words, drop, BLUE),
        )

    @torch.no_grad()
    def attention_received(self, text: Tensor, head: str) -> Tensor:
        """The attention that each token receives, averaged over tokens and models, (T,)."""
        received = []
        for model in self.models:
            _, attn_weights = model(text[None])  # (1, nhead, T, T)
            received.append(attn_weights[0].mean(1))

        by_head = torch.stack(received).mean(0)  # (nhead, T)
        return by_head.mean(0) if head == "mean" else by_head[int(head) - 1]

    def drop_by_deletion(self, tokens: list[transformer.Token], probabilities: Tensor) -> Tensor:
        """How much less probable the predicted class is without each token, (T,)."""
        if len(tokens) == 1:
            return torch.zeros(1)  # nothing would be left to classify

        shortened = []
        for i in range(len(tokens)):
            shortened.append(self.vocabulary.encode(tokens[:i] + tokens[i + 1 :]))
        predicted = probabilities.argmax()
        return probabilities[predicted] - self.probabilities(shortened)[:, predicted]

    def classify_csv(self, path: str) -> str:
        """Write submission.csv for a file with the training file's columns except the label."""
        try:
            columns, rows = self.read_csv(Path(path))
        except transformer.UserError as error:
            raise page_error(str(error)) from None

        predicted = transformer.classify(self.models, self.checkpoint, rows.texts).argmax(1)
        labels = [self.classes[i] for i in predicted]
        submission = pd.DataFrame({columns.id or "Id": rows.ids, columns.label: labels})
        out = Path(tempfile.mkdtemp()) / "submission.csv"
        submission.to_csv(out, index=False)
        return str(out)

    def read_csv(self, path: Path) -> tuple[transformer.Columns, transformer.Rows]:
        """Read the ids and texts of a visitor's file. Raises UserError if it has other columns."""
        table = transformer.read_table(path)
        by_lower_case = {name.lower(): name for name in table}
        id_column = by_lower_case.get("id")
        text_columns = [name for name in table if name != id_column]

        wanted = self.vocabulary.columns
        if len(text_columns) != wanted:
            found = ", ".join(table)
            raise transformer.UserError(f"Give {wanted} text columns and Id; found {found}.")
        columns = transformer.Columns("Category", id_column, text_columns)
        return columns, transformer.read_rows(table, Path(path.name), columns)


def shade(title: str, words: list[str], values: Tensor, colour: str) -> str:
    """Return the title and the words as HTML, each word the darker the higher its value."""
    opacities = (values / values.max().clamp_min(1e-9)).clamp_min(0).tolist()
    spans = []
    for word, opacity in zip(words, opacities, strict=True):
        style = f"background: rgba({colour}, {opacity:.2f}); padding: 2px 3px"
        spans.append(f'<span style="{style}">{html.escape(word)}</span>')

    return f'<b>{title}</b><div style="line-height: 2.1">{" ".join(spans)}</div>'


def news_tab(news: News) -> None:
    """Lay out the tab of news."""
    gr.Markdown(
        f"{len(news.models)} Transformers, each trained without a part of the texts, classify a "
        "text. A word may receive attention (orange) and yet change nothing (blue). On texts that "
        f"the models were not trained on, the probability of the answer is {news.ece:.1%} from the "
        "share of right answers (expected calibration error)."
    )
    answer = news.classify_text(*EXAMPLES[0], "mean")
    with gr.Row():
        with gr.Column():
            title = gr.Textbox(EXAMPLES[0][0], label="Title")
            description = gr.Textbox(EXAMPLES[0][1], label="Description", lines=3)
            heads = ["mean", *map(str, range(1, news.heads + 1))]
            head = gr.Radio(heads, value="mean", label="Attention head")
            button = gr.Button("Classify", variant="primary")
            gr.Examples(EXAMPLES, [title, description])

        with gr.Column():
            probabilities = gr.Label(answer.probabilities, label="Probability of each class")
            attention = gr.HTML(answer.attention)
            deletion = gr.HTML(answer.deletion)

    events = [button.click, title.submit, title.change, head.input]
    shown = [probabilities, attention, deletion]
    listen(events, news.classify_text, [title, description, head], shown)

    with gr.Row():
        upload = gr.File(label="A csv to classify: Id and the text columns", type="filepath")
        submission = gr.File(label="submission.csv", interactive=False)
        upload.upload(news.classify_csv, upload, submission)


# Digits and faces ---------------------------------------------------------------------------------
def principal_directions(model: torch.nn.Module) -> Tensor:
    """The directions in which the prior p(z) varies most, each one σ long, (SLIDERS, k)."""
    z = model.prior.sample(PRIOR_SAMPLES, 1.0, random_generator(0))
    _, singular_values, directions = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    sigma = singular_values / PRIOR_SAMPLES**0.5
    return (directions * sigma[:, None])[:SLIDERS]


class ImageRuns:
    """The finished runs of a VAE script, one model per λ, and the pictures that the page shows.

    λ is a string as in the folders' names. The subclasses say how the two scripts differ.
    """

    script: ModuleType
    subject: str
    note = ""  # on the page

    def __init__(self, out: Path):
        self.out = out
        self.models = {}
        self.directions = {}
        self.fits = {}  # how each run made pictures square
        not_shown = []
        for folder in sorted(finished_runs(out)):
            try:
                model, settings = self.script.load_finished(folder, torch.device("cpu"))
            except self.script.UserError as error:
                not_shown.append(f"{error}.")
                continue
            kl_weight = f"{settings['kl_weight']:g}"
            if folder != self.folder(kl_weight):
                not_shown.append(f"{folder}: not shown; lambda-{kl_weight} is the run's own name.")
                continue
            self.models[kl_weight] = model
            self.directions[kl_weight] = principal_directions(model)
            self.fits[kl_weight] = settings["fit"]

        if not self.models:
            raise UserError(" ".join(not_shown))
        self.note = " ".join([self.note, *not_shown])
        self.kl_weights = sorted(self.models, key=float)
        self.start = "1" if "1" in self.models else self.kl_weights[0]  # shown first
        self.temperature = self.script.Config().temperature
        self.examples = self.save_examples()

    def save_examples(self) -> list[str]:
        """Save some images of the run's data, or of the script's if that has moved away."""
        try:
            config = json.loads((self.folder(self.start) / "config.json").read_text())
            data = config["settings"]["data"]
        except (OSError, ValueError, LookupError, TypeError):  # missing, or not as we wrote it
            data = None
        given = Path(data) if data and Path(data).exists() else None
        path = self.script.find_data(given)
        images, _ = self.script.load_images(path, self.fits[self.start])
        images = images[:: max(1, len(images) // EXAMPLE_IMAGES)]  # of all folders

        folder = Path(tempfile.mkdtemp())
        paths = []
        for i, image in enumerate(images[:EXAMPLE_IMAGES]):
            path = folder / f"{i}.png"
            self.picture(image[None], columns=1).save(path)
            paths.append(str(path))
        return paths

    def folder(self, kl_weight: str) -> Path:
        return self.out / f"lambda-{kl_weight}"

    def picture(self, images: Tensor, columns: int) -> Image.Image:
        """Put uint8 images (N, C, H, W) into one picture, enlarged without smoothing."""
        tiled = Image.fromarray(self.script.tile(images, columns)[1:-1, 1:-1])
        factor = PICTURE_WIDTH // tiled.width
        size = (factor * tiled.width, factor * tiled.height)
        return tiled.resize(size, Image.Resampling.NEAREST)

    def read_image(self, kl_weight: str, path: str | None) -> Tensor:
        """Read a visitor's picture as the run's script does: pixels x, (1, C, H, W).

        Raises gr.Error if it cannot.
        """
        if not path:  # removed; the visitor is about to choose another one
            raise page_error("Choose a picture.", visible=False)

        size = self.script.SIZE
        try:
            picture = self.script.decode_picture(Path(path).read_bytes())
        except self.script.READ_ERRORS as error:
            reason = self.script.reason(error)
            raise page_error(f"Choose a picture that can be read; this one is: {reason}.") from None

        small = np.array(self.script.fit_picture(picture, self.fits[kl_weight]))
        pixels = torch.from_numpy(small).view(1, size, size, -1).permute(0, 3, 1, 2)
        return self.script.to_pixels(pixels)

    def sample(self, kl_weight: str, seed: float, temperature: float) -> Image.Image:
        """Sample images from the model of this λ."""
        model = self.models[kl_weight]
        images = self.script.sample_images(model, SAMPLES, int(seed), temperature)
        return self.picture(images, columns=6)

    def interpolate(
        self, kl_weight: str, first: str | None, last: str | None, share: float
    ) -> Image.Image:
        """A point on the way from the latents of one picture to those of another."""
        t = torch.tensor([float(share)])
        return self.picture(self.between(kl_weight, first, last, t), columns=1)

    def walk(self, kl_weight: str) -> Image.Image:
        """A walk along the examples: a row for the way from each one to the next."""
        stops = self.examples[:WALK_STOPS]
        t = torch.linspace(0, 1, WALK_STEPS)
        rows = []
        for first, last in zip(stops, stops[1:] + stops[:1], strict=True):
            rows.append(self.between(kl_weight, first, last, t))
        return self.picture(torch.cat(rows), columns=WALK_STEPS)

    @torch.no_grad()
    def reconstruct(self, kl_weight: str, path: str | None) -> Image.Image:
        """The visitor's picture beside its reconstruction."""
        x, _ = find_posterior(self, kl_weight, path)
        pair = torch.cat([x, self.mean_image(kl_weight, path)])
        return self.picture(self.script.to_uint8(pair), columns=2)

    def plot_posterior(self, kl_weight: str, path: str | None) -> Figure:
        """Draw mean and variance of q(z|x) by dimension, with those of N(0, I) in red."""
        _, q = find_posterior(self, kl_weight, path)
        dimensions = range(q.mean.shape[1])
        figure = Figure((6, 2.4), dpi=120, layout="constrained")
        means, variances = figure.subplots(1, 2)

        means.bar(dimensions, q.mean[0].numpy(), width=1.0)
        means.axhline(0, color="tab:red", linewidth=1)
        means.set(title="mean of q(z|x), N(0, I) red", xlabel="dimension of z")

        variances.plot(q.variance[0].numpy(), ".")
        variances.axhline(1, color="tab:red", linewidth=1)
        variances.set(yscale="log", ylim=(1e-5, 10))
        variances.set(title="variance of q(z|x), N(0, I) red", xlabel="dimension of z")
        return figure


class DigitRuns(ImageRuns):
    script = vae_mnist
    subject = "handwritten digits"

    def posterior(self, kl_weight: str, x: Tensor) -> Distribution:
        """q(z|x), refined as for the final results of the script."""
        model = self.models[kl_weight]
        q = model.encode(x)
        return vae_mnist.refine_posterior(model, x, q, float(kl_weight), random_generator(0))

    def mean_image(self, kl_weight: str, path: str | None) -> Tensor:
        """The mean of p(x|z) for a z sampled from q."""
        _, q = find_posterior(self, kl_weight, path)
        z = vae_mnist.reparameterize(q, random_generator(0))
        return self.models[kl_weight].decode(z).mean

    def move(self, kl_weight: str, path: str | None, *steps: float) -> Image.Image:
        """Decode the picture's latent, moved along each principal direction by a step in σ."""
        _, q = find_posterior(self, kl_weight, path)
        z = q.mean + torch.tensor(steps, dtype=torch.float32) @ self.directions[kl_weight]
        return self.picture(vae_mnist.decode_images(self.models[kl_weight], z), columns=1)

    def between(self, kl_weight: str, first: str | None, last: str | None, t: Tensor) -> Tensor:
        """Decode points on the line between the latents of two pictures, for t (T,) in [0, 1]."""
        _, q_first = find_posterior(self, kl_weight, first)
        _, q_last = find_posterior(self, kl_weight, last)
        mu = torch.cat([q_first.mean, q_last.mean])
        return vae_mnist.interpolate(self.models[kl_weight], mu, t)


class FaceRuns(ImageRuns):
    script = vae_anime
    subject = "anime faces, with hierarchical latents"
    note = (
        "The sliders change z, and with it colours, light and pose; a face keeps its detail. "
        "A walk changes both, and starts and ends at the reconstructions."
    )

    def posterior(self, kl_weight: str, x: Tensor) -> Distribution:
        return self.models[kl_weight].encode(x)

    def mean_image(self, kl_weight: str, path: str | None) -> Tensor:
        """The mean of p(x|z, d) for the means of all latents."""
        x, q = find_posterior(self, kl_weight, path)
        return self.models[kl_weight].infer(x, q, random_generator(0), temperature=0.0).mean

    @torch.no_grad()
    def move(self, kl_weight: str, path: str | None, *steps: float) -> Image.Image:
        """Move z along each principal direction by a step in σ. The noise of the detail stays."""
        x, _ = find_posterior(self, kl_weight, path)
        model = self.models[kl_weight]
        z, noise = vae_anime.read_latents(model, x)
        z = z + torch.tensor(steps, dtype=torch.float32) @ self.directions[kl_weight]
        image = vae_anime.to_uint8(model.decode(z, noise))
        return self.picture(image, columns=1)

    def between(self, kl_weight: str, first: str | None, last: str | None, t: Tensor) -> Tensor:
        """Decode points on the walk between the latents of two pictures, for t (T,) in [0, 1]."""
        x_first, _ = find_posterior(self, kl_weight, first)
        x_last, _ = find_posterior(self, kl_weight, last)
        pair = vae_anime.to_uint8(torch.cat([x_first, x_last]))
        return vae_anime.interpolate(self.models[kl_weight], pair, t)


@lru_cache(maxsize=256)  # each move of a slider asks for the same one
@torch.no_grad()
def find_posterior(
    runs: ImageRuns, kl_weight: str, path: str | None
) -> tuple[Tensor, Distribution]:
    """Return a picture's pixels x, (1, C, H, W), and q(z|x)."""
    x = runs.read_image(kl_weight, path)
    return x, runs.posterior(kl_weight, x)


def images_tab(runs: ImageRuns) -> None:
    """Lay out the tab of digits or faces."""
    gr.Markdown(
        f"A variational autoencoder trained on {runs.subject}. λ is the weight of the KL in "
        "training. Where it is large, the latent z carries little information about the image, or "
        "none (posterior collapse), and the sliders change little: `--lambda 0 1 50 100` trains "
        f"models to compare. {runs.note}"
    )
    kl_weight = gr.Radio(runs.kl_weights, value=runs.start, label="λ")

    with gr.Tab("Samples"), gr.Row():
        samples_tab(runs, kl_weight)
    with gr.Tab("Reconstruction"), gr.Row():
        reconstruction_tab(runs, kl_weight)
    with gr.Tab("Walk"):
        walk_tab(runs, kl_weight)


def add_picture(value: Image.Image | None, label: str, height: int) -> gr.Image:
    """Add a picture with its label above it; Gradio's own label would cover a corner."""
    with gr.Column():
        gr.Markdown(label)
        return gr.Image(
            value,
            label=label,
            show_label=False,
            height=height,
            interactive=False,
            buttons=["download", "fullscreen"],
        )


def unless_removed(answer: Callable) -> Callable:
    """Leave the page as it is while a picture is removed and the next one not yet chosen."""

    @wraps(answer)
    def answer_or_skip(*inputs: object) -> object:
        return gr.skip() if None in inputs else answer(*inputs)

    return answer_or_skip


def samples_tab(runs: ImageRuns, kl_weight: gr.Radio) -> None:
    with gr.Column():
        seed = Seed()
        label = "Temperature (1: as learned)"
        temperature = gr.Slider(0, 1, runs.temperature, step=0.01, label=label)
        button = gr.Button(f"Sample {SAMPLES}", variant="primary")

    first = runs.sample(runs.start, 0, runs.temperature)
    samples = add_picture(first, label="Samples from the prior", height=540)

    events = [button.click, seed.submit, temperature.release, kl_weight.input]
    listen(events, runs.sample, [kl_weight, seed, temperature], samples)


def reconstruction_tab(runs: ImageRuns, kl_weight: gr.Radio) -> None:
    """Lay out a picture, its reconstruction and q(z|x), and the sliders that move its latent."""
    count = len(runs.directions[runs.start])
    unmoved = [0.0] * count
    example = runs.examples[0]

    with gr.Column():
        chosen = image_picker(runs, example, label="Picture")
        first = runs.reconstruct(runs.start, example)
        pair = add_picture(first, label="Picture and reconstruction", height=260)

    with gr.Column():
        first = runs.move(runs.start, example, *unmoved)
        moved = add_picture(first, label="Its latent, moved by the sliders", height=260)
        sliders = []
        for i in range(count):
            sliders.append(gr.Slider(-3, 3, 0, step=0.1, label=f"Direction {i + 1} (σ)"))
        posterior = gr.Plot(runs.plot_posterior(runs.start, example), show_label=False)

    def show(kl_weight: str, path: str | None) -> dict:
        """Fill the tab for a picture, with the sliders at 0."""
        shown = {
            pair: runs.reconstruct(kl_weight, path),
            moved: runs.move(kl_weight, path, *unmoved),
            posterior: runs.plot_posterior(kl_weight, path),
        }
        return shown | dict.fromkeys(sliders, 0.0)

    events = [chosen.change, kl_weight.input]
    outputs = [pair, moved, posterior, *sliders]
    listen(events, unless_removed(show), [kl_weight, chosen], outputs)

    events = [slider.input for slider in sliders]
    listen(events, unless_removed(runs.move), [kl_weight, chosen, *sliders], moved)


def walk_tab(runs: ImageRuns, kl_weight: gr.Radio) -> None:
    share = gr.Slider(0, 1, 0.5, step=0.02, label="Way from the first to the second")
    middle = runs.interpolate(runs.start, *runs.examples[:2], 0.5)
    between = add_picture(middle, label="Between", height=260)
    with gr.Row():
        first = image_picker(runs, runs.examples[0], label="From")
        last = image_picker(runs, runs.examples[1], label="To")

    events = [first.change, last.change, share.input, kl_weight.input]
    inputs = [kl_weight, first, last, share]
    listen(events, unless_removed(runs.interpolate), inputs, between)

    button = gr.Button(f"Walk along {WALK_STOPS} pictures")
    walk = add_picture(None, label="From each picture to the next, a row each", height=640)
    button.click(runs.walk, kl_weight, walk)


def image_picker(runs: ImageRuns, path: str, label: str) -> gr.Image:
    """A picture that a visitor uploads, or takes from the examples below it."""
    with gr.Column():
        gr.Markdown(label)
        image = gr.Image(
            path, label=label, show_label=False, type="filepath", height=260, sources=["upload"]
        )
        # Gradio's own preprocessing opens the file, and raises what it likes.
        image.preprocess = path_of_upload
        gr.Examples(runs.examples, image, label="or one of these", examples_per_page=EXAMPLE_IMAGES)
    return image


def path_of_upload(file: gr.FileData | None) -> str | None:
    return file.path if file else None


# Tenses -------------------------------------------------------------------------------------------
class Tenses:
    """The finished run of cvae.py, and the tables that the page shows."""

    def __init__(self, folder: Path):
        self.model = cvae.load_finished(folder)

    def conjugate(self, verb: str) -> pd.DataFrame:
        return self.interpolate(verb, verb, steps=1)

    def interpolate(self, first: str, last: str, steps: int = 9) -> pd.DataFrame:
        """The verbs on the line between the latents of two verbs in the present, in all tenses."""
        verbs = [word.strip().lower() for word in (first, last)]
        if not all(re.fullmatch(cvae.WORD, verb) for verb in verbs):
            raise page_error(f"Type a verb of up to {cvae.MAX_LETTERS} letters a to z.")
        return pd.DataFrame(cvae.interpolate(self.model, *verbs, steps), columns=cvae.TENSES)

    def sample(self, seed: float) -> pd.DataFrame:
        """Verbs decoded from samples of the prior."""
        return pd.DataFrame(cvae.generate(self.model, 8, int(seed)), columns=cvae.TENSES)


def tenses_tab(tenses: Tenses) -> None:
    """Lay out the tab of verbs."""
    gr.Markdown(
        "A conditional variational autoencoder encodes a verb as a latent, and decodes the latent "
        "in each tense. It knows the verbs that it was trained on and guesses others."
    )
    verb = gr.Textbox("carry", label="A verb in the present, then Enter")
    forms = gr.Dataframe(tenses.conjugate("carry"), label="Its forms", interactive=False)
    verb.submit(tenses.conjugate, verb, forms)

    with gr.Row():
        first = gr.Textbox("carry", label="From")
        last = gr.Textbox("send", label="To")
        button = gr.Button("Interpolate")
    verbs = tenses.interpolate("carry", "send")
    between = gr.Dataframe(verbs, label="Verbs between the two latents", interactive=False)
    button.click(tenses.interpolate, [first, last], between)

    seed = Seed()
    label = "Verbs sampled from the prior N(0, I)"
    samples = gr.Dataframe(tenses.sample(0), label=label, interactive=False)
    seed.change(tenses.sample, seed, samples)


# The page -----------------------------------------------------------------------------------------
def finished_runs(folder: Path) -> list[Path]:
    """The folders of finished runs in `folder`, without those that a newer run has replaced."""
    folders = [path.parent for path in folder.rglob("metrics.json")]
    return [folder for folder in folders if not folder.name.endswith(".previous")]


def train_missing(runs: Path) -> None:
    """Train what is missing on the bundled sample. Each run shows its own progress."""
    for number, (name, run) in enumerate(QUICK.items(), start=1):
        if finished_runs(runs / name):
            continue

        print(f"quick     {number} of {len(QUICK)}: {run.script} on the bundled sample", flush=True)
        command = [sys.executable, str(ROOT / run.script)]
        command += ["--data", str(SAMPLE_DATA / run.data)]
        command += ["--out", str((runs / name).resolve()), "--resume", *run.flags.split()]
        with tempfile.TemporaryDirectory() as folder:  # transformer.py leaves submission.csv there
            done = subprocess.run(command, cwd=folder)
        if done.returncode:
            raise UserError(
                f"{run.script} ended with {done.returncode}. Run this again to continue"
            )


class Tab(NamedTuple):
    """A tab of the page: which run it shows, what reads the run, and what lays out the tab."""

    run: str
    read: Callable[[Path], object]
    lay_out: Callable[[object], None]


TABS = {
    "News": Tab("transformer", News, news_tab),
    "Digits": Tab("vae_mnist", DigitRuns, images_tab),
    "Faces": Tab("vae_anime", FaceRuns, images_tab),
    "Tenses": Tab("cvae", Tenses, tenses_tab),
}


def build_page(runs: Path) -> gr.Blocks:
    """Return the page.

    Where a run is missing, its tab shows the command that makes it, and where a run cannot be
    read, why.
    """
    finished = {}
    unread = {}
    for title, tab in TABS.items():
        if finished_runs(runs / tab.run):
            try:
                finished[title] = tab.read(runs / tab.run)
            except USER_ERRORS as error:
                unread[title] = f"This run cannot be shown. {error}."
        else:
            unread[title] = (
                f"No finished run in `{runs / tab.run}`. Train one with "
                f"`python {QUICK[tab.run].script}`, or all with `python demo/app.py --quick`."
            )

    with gr.Blocks(title="Transformer and VAE") as page:
        gr.Markdown("# Transformer and VAE in plain PyTorch: explore the finished runs")
        with gr.Tabs(selected=next(iter(finished), None)):
            for title, tab in TABS.items():
                with gr.Tab(title, id=title):
                    if title in finished:
                        tab.lay_out(finished[title])
                    else:
                        gr.Markdown(unread[title])
    return page


def port(text: str) -> int:
    """A flag's type: a port's number."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ArgumentTypeError(f"{text}: give a number from 1 to {2**16 - 1}")
    return int(text)


def parse_args(argv: list[str] | None) -> Namespace:
    parser = vae_mnist.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs [%(default)s]")
    add("--quick", action="store_true", help="first train what is missing, on the bundled sample")
    add("--port", type=port, default=7860, help="of the page, on this machine [%(default)s]")
    add("--share", action="store_true", help="a public link, through Gradio's servers [off]")
    return parser.parse_args(argv)


def serve(args: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    torch.set_num_threads(1)  # several visitors at once share the cores
    page = build_page(args.runs).queue(default_concurrency_limit=2)

    try:
        page.launch(
            theme=THEME,
            inbrowser=True,
            max_file_size=MAX_UPLOAD_BYTES,
            server_name="127.0.0.1",
            server_port=args.port,
            share=args.share,
        )
    except OSError as error:
        raise UserError(f"--port {args.port}: {error}. Name another with --port") from error


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse_args(argv)
        if args.quick:
            train_missing(args.runs)
        serve(args)
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
