"""The demo in a real browser: each tab answers, bad uploads get a sentence, no host is asked."""

import json
import os
import shlex
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("gradio", reason="pip install -r demo/requirements.txt")
Client = pytest.importorskip("gradio_client").Client
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")

sys.path[:0] = [str(ROOT / "demo")]
import app

SMALL = {
    "transformer": "--epochs 1 --vectors none",
    "vae_mnist": "--limit 40 --epochs 2 --iwae 1 --latent-dim 6",
    "vae_anime": "--limit 40 --epochs 1 --iwae 1 --latent-dim 6",
    "cvae": "--epochs 2 --hidden-dim 16",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page, open in a browser, and what its console and network said."""
    runs, said, asked = tmp_path_factory.mktemp("runs"), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            app, "QUICK", {name: (*app.QUICK[name][:2], SMALL[name]) for name in app.QUICK}
        )
        app.make_quick(runs)
    demo = app.build_page(runs).queue()
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        page.get_by_role("tab", name="News").wait_for()
        yield page
        browser.close()
    demo.close()
    aborted = ("AbortError", "Unexpected error Connection errored out")  # what a reload stops
    assert not [line for line in said if not line.startswith(aborted)]
    own = ("http://127.0.0.1", "http://localhost", "data:", "blob:")
    assert not [address for address in asked if not address.startswith(own)]


def shown(page, label):
    """The address of the picture under `label`, once there is one."""
    picture = page.locator(f'.block:has-text("{label}") img >> visible=true').last
    picture.wait_for()
    return picture.get_attribute("src")


def changes(page, label, before):
    for _ in range(100):
        if shown(page, label) != before:
            return True
        page.wait_for_timeout(100)
    return False


def test_a_text_is_classified_and_shaded(page):
    page.get_by_role("tab", name="News").click()
    page.get_by_label("Title").fill("Parliament votes on the treaty")
    page.get_by_label("Description").fill("Zanzibar's envoys walked out.")
    page.get_by_role("button", name="Classify").click()
    page.locator("span", has_text="zanzibar").first.wait_for()
    assert page.locator("span", has_text="zanzibar").count() == 2  # by attention and by deletion


def test_a_csv_comes_back_as_a_submission(page, tmp_path):
    page.get_by_role("tab", name="News").click()
    upload = page.locator('input[type="file"] >> nth=0')
    upload.set_input_files(ROOT / "data/sample/test.csv")
    link = page.locator('a[href*="submission.csv"]').first
    link.wait_for()
    rows = page.request.get(link.get_attribute("href")).text().splitlines()
    tests = (ROOT / "data/sample/test.csv").read_text("utf-8-sig").splitlines()
    assert rows[0] == "Id,Category" and len(rows) == len(tests)
    page.reload()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("Id,Title\n1,only a title\n")
    page.locator('input[type="file"] >> nth=0').set_input_files(wrong)
    page.get_by_text("Give 2 text columns").wait_for()


@pytest.mark.parametrize("name", ["Digits", "Faces"])
def test_pictures_move(page, name, tmp_path):
    page.reload()
    page.get_by_role("tab", name=name).click()
    before = shown(page, "Drawn from noise")
    page.locator('label:has-text("Seed") input >> visible=true').fill("5")
    page.locator('button:has-text("Draw 36") >> visible=true').click()
    assert changes(page, "Drawn from noise", before)
    page.locator('role=tab[name="Around a picture"] >> visible=true').click()
    before = shown(page, "Its code, moved")
    page.locator('input[type="range"] >> visible=true').first.fill("3")
    assert changes(page, "Its code, moved", before)
    page.locator('role=tab[name="From one picture to another"] >> visible=true').click()
    before = shown(page, "Between")
    page.locator('input[type="range"] >> visible=true').first.fill("1")
    assert changes(page, "Between", before)
    page.locator('role=tab[name="Around a picture"] >> visible=true').click()
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


def test_pictures_to_choose_are_the_runs_own(tmp_path):
    data, folder = tmp_path / "own.npz", tmp_path / "lambda-1"
    folder.mkdir()
    np.savez(data, image=np.full((20, 28, 28), 255, np.uint8))
    (folder / "metrics.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"arguments": {"data": str(data)}}))
    examples = app.Drawer(app.vae_mnist, tmp_path).examples
    assert all((np.asarray(app.Image.open(path)) == 255).all() for path in examples)


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(SystemExit) as end:
        app.main(["--runs", str(tmp_path), "--port", str(server.getsockname()[1])])
    assert end.value.code == 2 and "Name another with --port" in capsys.readouterr().err


def test_a_missing_run_shows_its_command(tmp_path):
    config = app.build_page(tmp_path).get_config_file()
    texts = [str(part["props"].get("value", "")) for part in config["components"]]
    for script, _, _ in app.QUICK.values():
        assert any(f"python {script}" in text for text in texts)


def test_help_and_measures():
    source = (ROOT / "demo" / "app.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 350
    assert "nn.Module" not in source and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert shlex.split(app.__doc__)[0] == "A"


def test_ten_people_at_once(page):
    """Each gets the answer to a text of their own."""
    client = Client(page.url, verbose=False)
    titles = [f"Oil prices fall for the {number}th day" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        ask = partial(client.predict, description="", head="mean", api_name="/read")
        answers = list(pool.map(lambda title: ask(title=title), titles))
    for number, (probabilities, looked, _) in enumerate(answers):
        assert len(probabilities["confidences"]) == 4 and f">{number}th<" in looked
