"""JupyterLab in a browser, as a user meets it: train with a live plot, interrupt, resume, Tab and Shift-Tab."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("jupyterlab", "playwright") if find_spec(name) is None] + ["chromium"] * (CHROMIUM is None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--no-first-run", "--disable-quic"]
SETUP = """import time, torch, torch.nn.functional as F
from torch import nn
from learner import *
class Slow(Callback):
    def after_batch(self): time.sleep(0.03)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
learn = Learner(model, torch.optim.AdamW, F.cross_entropy, digits(), [Progress(plot=True)])"""
CELLS = (SETUP, "learn.train(40, 0.01, callbacks=Slow(), test=False)", "learn.train(resume=True, test=False)", "Learner(", "learn.", "learn.train('many')",
         "Metrics(accuracy=MulticlassAccuracy)", "watch_run('runs/none')", "from learner import EarlyStop", "learn.history.plot();")
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # all cells are there, also those out of sight
            "apputils-extension/notification": {"fetchNews": "false"}, "completer-extension/manager": {"providerTimeout": 60_000}}
SECONDS = 120  # that a busy machine may take for one thing


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("lab")
    cells = [{"cell_type": "code", "id": f"cell-{i}", "execution_count": None, "metadata": {}, "outputs": [], "source": source} for i, source in enumerate(CELLS)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    (place / "notebook.ipynb").write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    for name, values in SETTINGS.items():
        path = place / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(place / folder) for name, folder in own.items()}}
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.token=", "--ServerApp.password="]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], cwd=place, env=environment, stdout=log, stderr=log)
        try: yield f"http://127.0.0.1:{port}/lab/tree/notebook.ipynb"
        finally:
            process.terminate()
            process.wait(SECONDS)


class Notebook:
    "What a user does with a notebook."

    def __init__(self, page): self.page = page

    def cell(self, number): return self.page.locator(".jp-CodeCell").nth(number)

    def prompt(self, number): return self.cell(number).locator(".jp-InputPrompt").inner_text().strip()

    def text(self, number): return self.cell(number).locator(".jp-Cell-outputArea").inner_text()

    def write(self, number):
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+End")

    def start(self, number):
        "Run a cell; a kernel that is not connected yet takes no notice, so that one presses again."
        def began():
            self.write(number)
            self.page.keyboard.press("Control+Enter")
            time.sleep(1)
            return self.prompt(number) != "[ ]:"
        until(began)

    def run(self, number):
        self.start(number)
        until(lambda: "*" not in self.prompt(number))
        return self.text(number)


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def notebook(server):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(SECONDS * 1000)

        def answers():
            try: page.goto(server)
            except Exception: return False
            return True
        until(answers)
        page.wait_for_selector(".jp-CodeCell")
        yield Notebook(page)
        browser.close()


def test_train_interrupt_and_resume_with_a_live_plot(notebook):
    assert notebook.run(0) == ""  # no warning of anybody
    notebook.start(1)
    picture = notebook.cell(1).locator(".jp-Cell-outputArea img")
    picture.wait_for()
    until(lambda: "epoch 2/39" in notebook.text(1) or "\n1\t" in notebook.text(1))
    assert "*" in notebook.prompt(1)  # it trains, and the plot is there
    assert picture.evaluate("image => image.naturalWidth") > 400
    notebook.page.keyboard.press("Escape")
    notebook.page.keyboard.press("i")
    notebook.page.keyboard.press("i")
    until(lambda: "*" not in notebook.prompt(1))
    text = notebook.text(1)
    assert "interrupted: epoch" in text and "train(resume=True) goes on from there" in text and "Traceback" not in text
    rows = [line.split("\t")[0] for line in text.splitlines() if line[:1].isdigit() and "\t" in line]
    assert rows == [str(i) for i in range(len(rows))] and rows
    resumed = [line.split("\t")[0] for line in notebook.run(2).splitlines() if line[:1].isdigit() and "\t" in line]
    assert resumed == [str(i) for i in range(40)]  # with those of before


def test_shift_tab_says_what_each_argument_means(notebook):
    notebook.write(3)
    notebook.page.keyboard.press("Shift+Tab")
    notebook.page.wait_for_selector(".jp-Tooltip")
    text = notebook.page.locator(".jp-Tooltip").inner_text()
    assert "Args:" in text and "optimiser: A torch Optimizer" in text and "Example:" in text
    notebook.page.keyboard.press("Escape")


def test_tab_offers_what_a_user_needs(notebook):
    notebook.write(4)
    notebook.page.keyboard.press("Tab")
    notebook.page.wait_for_selector(".jp-Completer-item")
    names = set(notebook.page.locator(".jp-Completer").inner_text().split())
    assert {"train", "history", "lr_find", "explain"} <= names
    assert not {"cursor", "tree", "drop_fixtures", "fit", "xb"} & names
    notebook.page.keyboard.press("Escape")


@pytest.mark.parametrize("number, message", [(5, "ValueError: epochs is 'many'"), (6, "pass an instance: MulticlassAccuracy(...)"), (7, "FileNotFoundError"),
                                             (8, "learner has no EarlyStop; did you mean EarlyStopping?")])
def test_a_usage_error_shows_none_of_our_frames(notebook, number, message):
    text = notebook.run(number)
    assert message in text and "learner/" not in text


def test_a_picture_shows_the_page_behind_it(notebook):
    notebook.run(9)
    picture = notebook.cell(9).locator(".jp-Cell-outputArea img")
    picture.wait_for()
    assert picture.evaluate("image => getComputedStyle(image).backgroundColor") == "rgba(0, 0, 0, 0)"
