"""The page in a real browser: each tab answers, bad uploads get a message, no host is asked.

And the page's functions from many threads at once: one seed always gives the same picture.
"""

import json
import os
import random
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("gradio", reason="pip install -r demo/requirements.txt")
Client = pytest.importorskip("gradio_client").Client
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

sys.path[:0] = [str(ROOT / "demo")]
import app

import transformer

SMALL = {
    "transformer": "--epochs 1 --folds 2 --vectors none",
    "vae_mnist": "--limit 40 --epochs 2 --latent-dim 6",
    "vae_anime": "--limit 40 --epochs 1 --latent-dim 6",
    "cvae": "--epochs 2 --hidden-dim 16",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small finished run of each script."""
    folder = tmp_path_factory.mktemp("runs")
    small = {name: run._replace(flags=SMALL[name]) for name, run in app.QUICK.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "QUICK", small)
        app.train_missing(folder)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    """The page, open in a browser. It is to log no error, and to ask no other host."""
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium")
    errors = []
    addresses = []

    def note_console(line):
        if line.type == "error":
            errors.append(line.text)

    demo = app.build_page(runs).queue()
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")

    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.on("request", lambda request: addresses.append(request.url))
        page.on("console", note_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_role("tab", name="News").wait_for()

        yield page
        browser.close()
    demo.close()

    aborted = ("AbortError", "Unexpected error Connection errored out")  # what a reload stops
    assert [line for line in errors if not line.startswith(aborted)] == []
    own = ("http://127.0.0.1", "http://localhost", "data:", "blob:")
    assert [address for address in addresses if not address.startswith(own)] == []


def picture_under(page, label):
    """The address of the picture under `label`, once there is one."""
    column = page.locator(f'.column:has-text("{label}") >> visible=true').last
    picture = column.locator("img")
    picture.wait_for()
    return picture.get_attribute("src")


def wait_for_change(page, label, before):
    """Wait until there is another picture under `label`; fail after ten seconds."""
    for _ in range(100):
        if picture_under(page, label) != before:
            return
        page.wait_for_timeout(100)
    pytest.fail(f"the picture under {label!r} has not changed")


def test_a_text_is_classified_and_shaded(page):
    page.get_by_role("tab", name="News").click()
    page.get_by_label("Title").fill("Parliament votes on the treaty")
    page.get_by_label("Description").fill("Zanzibar's envoys walked out.")
    page.get_by_role("button", name="Classify").click()

    page.locator("span", has_text="zanzibar").first.wait_for()
    assert page.locator("span", has_text="zanzibar").count() == 2  # by attention and by deletion


def test_the_calibration_error_is_shown(page, runs):
    metrics = json.loads((runs / "transformer" / "metrics.json").read_text())
    page.get_by_role("tab", name="News").click()
    page.get_by_text(f"{metrics['ece']:.1%} from the share of right answers").wait_for()


def test_without_a_word_its_pairs_are_gone(runs):
    """The drop of each word is that of the text typed without it."""
    news = app.News(runs / "transformer")
    words = ["oil", "prices", "fell", "on", "monday"]
    tokens = transformer.split_text([" ".join(words), ""], news.tokenize)
    [whole] = news.probabilities([news.vocabulary.encode(tokens)])
    drop = news.drop_by_deletion(tokens, whole)
    for i in range(len(words)):
        typed = " ".join(words[:i] + words[i + 1 :])
        [without] = transformer.classify(news.models, news.checkpoint, [[typed, ""]])
        assert drop[i].item() == pytest.approx((whole - without)[whole.argmax()].item(), abs=1e-6)


def test_a_csv_comes_back_as_a_submission(page):
    page.reload()
    page.get_by_role("tab", name="News").click()
    upload = page.locator('input[type="file"] >> nth=0')
    upload.set_input_files(ROOT / "data/sample/test.csv")
    link = page.locator('a[href*="submission.csv"]').first
    link.wait_for()

    rows = page.request.get(link.get_attribute("href")).text().splitlines()
    tests = (ROOT / "data/sample/test.csv").read_text("utf-8-sig").splitlines()
    assert rows[0] == "Id,Category"
    assert len(rows) == len(tests)


def test_a_csv_without_its_columns_gets_a_message(page, tmp_path):
    page.reload()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("Id,Title\n1,only a title\n")
    page.locator('input[type="file"] >> nth=0').set_input_files(wrong)
    page.get_by_text("Give 2 text columns").wait_for()


@pytest.mark.parametrize("name", ["Digits", "Faces"])
def test_pictures_move(page, name):
    page.reload()
    page.get_by_role("tab", name=name).click()
    before = picture_under(page, "Samples from the prior")
    page.locator('label:has-text("Seed") input >> visible=true').fill("5")
    page.locator('button:has-text("Sample 36") >> visible=true').click()
    wait_for_change(page, "Samples from the prior", before)

    page.locator('role=tab[name="Reconstruction"] >> visible=true').click()
    before = picture_under(page, "Its latent, moved")
    page.locator('input[type="range"] >> visible=true').first.fill("3")
    wait_for_change(page, "Its latent, moved", before)

    page.locator('role=tab[name="Walk"] >> visible=true').click()
    before = picture_under(page, "Between")
    page.locator('input[type="range"] >> visible=true').first.fill("1")
    wait_for_change(page, "Between", before)

    page.locator('button:has-text("Walk along 8") >> visible=true').click()
    picture_under(page, "From each picture to the next")


def test_another_picture_sets_the_sliders_back(page):
    page.reload()
    page.get_by_role("tab", name="Digits").click()
    page.locator('role=tab[name="Reconstruction"] >> visible=true').click()
    slider = page.locator('input[type="range"] >> visible=true').first
    slider.fill("3")

    before = picture_under(page, "Picture and reconstruction")
    page.locator(".gallery-item >> visible=true").nth(3).click()
    wait_for_change(page, "Picture and reconstruction", before)
    assert slider.input_value() == "0"


@pytest.mark.parametrize("name", ["Digits", "Faces"])
def test_a_file_that_is_no_picture_gets_a_message(page, name, tmp_path):
    page.reload()
    page.get_by_role("tab", name=name).click()
    page.locator('role=tab[name="Reconstruction"] >> visible=true').click()
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no picture")

    page.locator('button[aria-label="Remove Image"] >> visible=true').first.click()
    page.wait_for_timeout(1500)  # an upload before the page has answered to that is lost
    page.locator('input[type="file"][accept="image/*"]').first.set_input_files(wrong)
    page.get_by_text("Choose a picture that can be read").first.wait_for()


def test_a_verb_is_conjugated_and_a_wrong_one_refused(page):
    page.get_by_role("tab", name="Tenses").click()
    verb = page.get_by_label("A verb in the present, then Enter")
    verb.fill("st0p")
    verb.press("Enter")
    page.get_by_text("Type a verb of up to").wait_for()

    verb.fill("study")
    verb.press("Enter")
    page.get_by_text("progressive").first.wait_for()


def test_ten_visitors_at_once_get_their_own_answers(page):
    client = Client(page.url, verbose=False)
    titles = [f"Oil prices fall for the {number}th day" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        ask = partial(client.predict, description="", head="mean", api_name="/classify_text")
        answers = list(pool.map(lambda title: ask(title=title), titles))

    for number, (probabilities, attention, _) in enumerate(answers):
        assert len(probabilities["confidences"]) == 4
        assert f">{number}th<" in attention


def random_answers(runs):
    """What visitors ask of the page and is random: functions without arguments."""
    digits = app.DigitRuns(runs / "vae_mnist")
    faces = app.FaceRuns(runs / "vae_anime")
    tenses = app.Tenses(runs / "cvae")
    calls = []
    for i in range(4):
        calls.append(partial(digits.sample, "1", seed=i, temperature=0.8))
        calls.append(partial(faces.sample, "1", seed=i, temperature=0.9))
        calls.append(partial(tenses.sample, seed=i))
        calls.append(partial(digits.reconstruct, "1", digits.examples[i]))
        calls.append(partial(faces.reconstruct, "1", faces.examples[i]))
        calls.append(partial(faces.move, "1", faces.examples[i], 1, 0, 0, 0, 0))
    return calls


def test_many_threads_at_once_get_the_same_as_one(runs):
    expected = [np.asarray(call()) for call in random_answers(runs)]
    calls = random_answers(runs) * 4  # of new objects, so that no posterior is remembered
    order = list(range(len(calls)))
    random.Random(0).shuffle(order)

    stdout = sys.stdout
    stderr = sys.stderr
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: np.asarray(calls[i]()), order))

    for i, answer in zip(order, answers, strict=True):
        np.testing.assert_array_equal(answer, expected[i % len(expected)])
    assert sys.stdout is stdout
    assert sys.stderr is stderr


def test_a_mistake_in_a_handler_leaves_stdout_alone(runs, tmp_path):
    news = app.News(runs / "transformer")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("Id,Title\n1,only a title\n")
    stdout = sys.stdout
    with ThreadPoolExecutor(8) as pool:
        uploads = [pool.submit(news.classify_csv, str(wrong)) for _ in range(40)]

    for upload in uploads:
        assert "Give 2 text columns" in upload.exception().message
    assert sys.stdout is stdout


def test_sliders_and_walk_start_at_the_reconstruction_of_a_face(runs):
    """To the bit: they keep its detail latents' noise."""
    faces = app.FaceRuns(runs / "vae_anime")
    first, last = faces.examples[:2]
    mean = app.vae_anime.to_uint8(faces.mean_image("1", first))
    reconstruction = np.asarray(faces.picture(mean, columns=1))
    unmoved = np.asarray(faces.move("1", first, 0, 0, 0, 0, 0))
    start = np.asarray(faces.interpolate("1", first, last, 0.0))
    np.testing.assert_array_equal(unmoved, reconstruction)
    np.testing.assert_array_equal(start, reconstruction)


def test_a_direction_is_one_standard_deviation_of_the_prior():
    model = app.vae_mnist.VAE(3)
    scale = torch.diag_embed(torch.tensor([[1.0, 5.0, 2.0]]))
    model.prior = app.vae_mnist.MixturePrior(torch.ones(1), torch.zeros(1, 3), scale)
    directions = app.principal_directions(model)
    expected = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(directions.abs(), expected, atol=0.25, rtol=0)


def test_examples_are_the_images_of_the_run(runs, tmp_path):
    data = tmp_path / "own.npz"
    np.savez(data, image=np.full((20, 28, 28), 255, np.uint8))
    folder = tmp_path / "lambda-1"
    shutil.copytree(runs / "vae_mnist" / "lambda-1", folder)
    (folder / "config.json").write_text(json.dumps({"settings": {"data": str(data)}}))

    for path in app.DigitRuns(tmp_path).examples:
        assert (np.asarray(app.Image.open(path)) == 255).all()


def test_a_replaced_run_is_not_shown(tmp_path):
    """A run that started over and was stopped leaves the one before as lambda-1.previous."""
    folder = tmp_path / "vae_mnist" / "lambda-1.previous"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    assert app.finished_runs(tmp_path / "vae_mnist") == []


def the_line(flags, capsys):
    """The one line on stderr with which the page ends."""
    with pytest.raises(SystemExit) as end:
        app.main(flags)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = the_line(["--runs", str(tmp_path), "--port", str(port)], capsys)
    assert "Name another with --port" in line


def test_a_port_that_cannot_be_is_one_line(tmp_path, capsys):
    line = the_line(["--runs", str(tmp_path), "--port", "99999"], capsys)
    assert "give a number from 1 to 65535" in line


def texts_of(folder) -> str:
    """What the page's parts say in text."""
    parts = app.build_page(folder).get_config_file()["components"]
    return " ".join(str(part["props"].get("value", "")) for part in parts)


@pytest.mark.parametrize("run", ["transformer", "vae_mnist/lambda-50", "cvae"])
def test_a_damaged_run_costs_its_tab(run, tmp_path):
    folder = tmp_path / run
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    texts = texts_of(tmp_path)
    assert f"This run cannot be shown. {folder / 'checkpoint.pt'}: damaged" in texts
    assert texts.count("No finished run in") == 3


@pytest.fixture
def own_runs(runs, tmp_path):
    """A copy of the finished run of digits, to change."""
    shutil.copytree(runs / "vae_mnist" / "lambda-1", tmp_path / "vae_mnist" / "lambda-1")
    return tmp_path


def test_a_run_beside_others_that_are_not_as_they_should_be(own_runs):
    out = own_runs / "vae_mnist"
    for name in ("lambda-1 copy", "lambda-x", "lambda-5", "lambda-1.previous", "old/lambda-1"):
        shutil.copytree(out / "lambda-1", out / name)
    older = torch.load(out / "lambda-5" / "checkpoint.pt", weights_only=True)
    torch.save(older | {"version": "vae_mnist 1"}, out / "lambda-5" / "checkpoint.pt")

    assert app.DigitRuns(out).kl_weights == ["1"]
    texts = texts_of(own_runs)
    assert f"{out / 'lambda-1 copy'}: not shown; lambda-1 is the run's own name" in texts
    assert f"{out / 'lambda-5' / 'checkpoint.pt'}: not a checkpoint of vae_mnist" in texts


@pytest.mark.parametrize("config", [None, "", "[]", '{"settings": {}}'])
def test_a_run_without_its_config_shows_the_scripts_own_images(own_runs, config):
    path = own_runs / "vae_mnist" / "lambda-1" / "config.json"
    path.unlink()
    if config is not None:
        path.write_text(config)
    assert len(app.DigitRuns(own_runs / "vae_mnist").examples) == app.EXAMPLE_IMAGES


def picture_of_a_phone(folder) -> Path:
    """A picture that is stored on its side, half transparent, in a file without an ending."""
    values = np.random.default_rng(0).integers(0, 256, (90, 120, 4), dtype=np.uint8)
    exif = app.Image.Exif()
    exif[0x0112] = 6
    path = folder / "picture"
    app.Image.fromarray(values).save(path, format="PNG", exif=exif)
    return path


@pytest.mark.parametrize("fit", ["squeeze", "crop"])
@pytest.mark.parametrize("name", ["vae_mnist", "vae_anime"])
def test_a_visitors_picture_is_read_as_the_script_reads_it(runs, tmp_path, name, fit):
    folder = tmp_path / name / "lambda-1"
    shutil.copytree(runs / name / "lambda-1", folder)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["settings"]["fit"] = fit
    torch.save(checkpoint, folder / "checkpoint.pt")

    tab = {"vae_mnist": app.DigitRuns, "vae_anime": app.FaceRuns}[name](tmp_path / name)
    (tmp_path / "pictures").mkdir()
    path = picture_of_a_phone(tmp_path / "pictures")
    images, _ = tab.script.load_images(tmp_path / "pictures", fit)
    assert torch.equal(tab.read_image("1", str(path)), tab.script.to_pixels(images))


def test_a_quick_run_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    run = app.QUICK["transformer"]._replace(flags="--folds none")
    monkeypatch.setattr(app, "QUICK", {"transformer": run})
    line = the_line(["--runs", str(tmp_path), "--quick"], capsys)
    assert "transformer.py ended with 2" in line


def test_a_missing_run_shows_its_command(tmp_path):
    config = app.build_page(tmp_path).get_config_file()
    texts = [str(part["props"].get("value", "")) for part in config["components"]]
    for run in app.QUICK.values():
        assert any(f"python {run.script}" in text for text in texts)


def test_the_page_has_no_model_of_its_own():
    source = (ROOT / "demo" / "app.py").read_text(encoding="utf-8")
    assert "(nn.Module)" not in source


def test_gradio_sends_no_statistics():
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
