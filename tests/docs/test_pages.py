"""The pages to start with run, and so do the programs that stand beside those of other libraries."""
import ast
import inspect
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LONG = ("trainer", "several_processes", "background", "faster")  # they start many processes, or compile
OTHERS = sorted(path.stem for path in (DOCS / "coming_from").glob("*.md") if path.stem != "index")


def starts(): return sorted((DOCS / "start").glob("[!.]*.ipynb"))


def run_in_one_kernel(paths):
    "Run the cells of several pages in one kernel, which forgets the names of one before the next."
    pytest.importorskip("mnist1d", reason="the page on time series needs mnist1d: pip install -e .[docs]")
    pytest.importorskip("sklearn", reason="the pages need scikit-learn: pip install -e .[docs]")
    command = "import sys; sys.path.insert(0, 'docs'); from execute import execute, joined; execute(joined(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-5000:]


def test_the_pages_to_start_with_run():
    paths = [path for path in starts() if path.stem not in LONG]
    assert len(paths) >= 9
    run_in_one_kernel(paths)


@pytest.mark.long
def test_the_pages_that_take_long_run(): run_in_one_kernel([path for path in starts() if path.stem in LONG])


def test_a_page_that_fails_is_found(tmp_path):
    page = tmp_path / "bad.ipynb"
    page.write_text('{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": null, '
                    '"source": "1 / 0"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding="utf-8")
    with pytest.raises(AssertionError, match="ZeroDivisionError"): run_in_one_kernel([page])


def text_of(name): return (DOCS / f"coming_from/{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OTHERS)
def test_our_side_of_a_program_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the programs need scikit-learn: pip install -e .[docs]")
    monkeypatch.chdir(tmp_path)
    common = re.search(r"Both programs begin with this:\n\n```python\n(.*?)```", text_of(name), re.DOTALL)[1]
    ours = re.search(r"\*\*learner\*\*\n\n```python\n(.*?)```", text_of(name), re.DOTALL)[1]
    names = {}
    with redirect_stdout(StringIO()): exec(common + ours, names)
    assert names["learn"].history[-1]["validation_accuracy"] > 0.8


@pytest.mark.parametrize("name", OTHERS)
def test_the_names_of_our_side_exist(name):
    import learner
    from learner import Learner
    from learner.base.history import History
    from learner.loop.stages import TREE
    missing, rows = [], 0
    for row in re.findall(r"^\| (?!---)(.+) \| (.+) \|$", text_of(name), re.MULTILINE):
        rows += 1
        for code in re.findall(r"`([^`]+)`", row[1]):
            for path in re.findall(r"\b(learner(?:\.\w+)+)", code):
                module, _, last = path.rpartition(".")
                try: import_module(path)
                except ModuleNotFoundError: hasattr(import_module(module), last) or missing.append(path)
            missing += [f"learn.{last}" for last in re.findall(r"\blearn\.(\w+)", code)
                        if not (hasattr(Learner, last) or last in Learner.__annotations__ or last in known_attributes())]
            missing += [f"history.{last}" for last in re.findall(r"\bhistory\.(\w+)", code) if not hasattr(History, last)]
            missing += [hook for hook in re.findall(r"\b(?:before|after|around|cancelled|cleanup)_\w+", code) if not TREE.parse(hook)]
            missing += [word for word in re.findall(r"^([A-Z]\w+)\(", code) if word not in learner.all.__all__]
    assert missing == []
    assert rows > 10


def calls_in(code):
    "The calls in a piece of code, by the name that is called; nothing for what is not Python, such as a command."
    try: tree = ast.parse(code)
    except SyntaxError: return []
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def resolved(name):
    "What a table calls: a name of `learner`, a method of the learner, or a path."
    import learner
    from learner.steer import augment, precision
    first, _, rest = name.partition(".")
    roots = {"learn": learner.Learner, "augment": augment, "precision": precision, "history": None, "learner": None}
    if first == "learner":
        module, _, last = name.rpartition(".")
        return getattr(import_module(module), last)
    if first in roots: return getattr(roots[first], rest, None)
    return getattr(learner, name, None) if name in learner.all.__all__ else None


@pytest.mark.parametrize("name", OTHERS)
def test_the_calls_of_our_side_take_these_arguments(name):
    checked = 0
    for row in re.findall(r"^\| (?!---)(.+) \| (.+) \|$", text_of(name), re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", row[1]):
            for called, call in calls_in(code):
                function = resolved(called)
                if function is None: continue
                signature = inspect.signature(function)
                known, many = signature.parameters, any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
                wrong = [word.arg for word in call.keywords if word.arg not in known and not many]
                assert not wrong, (code, wrong)
                places = [p for p in known.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
                assert len(call.args) <= len(places) or any(p.kind is p.VAR_POSITIONAL for p in known.values()), code
                checked += 1
    assert checked > 5


def blocks_of(page):
    "All the Python of a page, in order: its cells, and what is fenced in its text."
    fence = re.compile(r"```python\n(.*?)```", re.DOTALL)
    if page.suffix == ".md": return fence.findall(page.read_text(encoding="utf-8"))
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return [code for cell in cells for source in ["".join(cell["source"])]
            for code in ([source] if cell["cell_type"] == "code" else fence.findall(source))]


@pytest.mark.parametrize("page", [*starts(), DOCS / "start/serve.md"], ids=lambda page: page.stem)
def test_whoever_copies_every_block_of_a_page_misses_no_name(page, tmp_path):
    import learner
    manager = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()  # for commands of a notebook
    code = "\n".join(["get_ipython = None", *map(manager.transform_cell, blocks_of(page))])
    code = code.replace("from learner import *", f"from learner import {', '.join(learner.all.__all__)}")
    if page.stem == "serve": code = f"learn = None  # from Ten minutes, as the page says\n{code}"
    file = tmp_path / f"{page.stem}.py"
    file.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821,E9", "--output-format=concise", file],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def known_attributes():
    "What a learner has as attributes of its own."
    from learner import Learner
    return {name for base in Learner.__mro__ for name in getattr(base, "__annotations__", {})} | {*Learner.fixtures}


def test_a_run_folder_has_the_files_that_its_page_names(tmp_path):
    import torch
    import torch.nn.functional as F
    from torch import nn

    from learner import Learner, Run, digits
    text = (DOCS / "reference/run_folder.md").read_text(encoding="utf-8")
    files, keys = (set(re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^(`.+)\n:", part, re.MULTILINE))))
                   for part in text.split("(meta-json)="))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    run = Run(tmp_path / "run", fingerprints=10, tensorboard=True)
    with redirect_stdout(StringIO()):
        Learner(model, torch.optim.AdamW, F.cross_entropy, digits(), [run]).train(1, learning_rate=0.01)
    there = {path.name + "/" * path.is_dir() for path in run.folder.iterdir()}
    assert there <= files, "the page does not name them"
    assert files - there <= {"script.py", "checkpoints/.lock", ".gitignore", "stdout.txt", "stderr.txt", "code.diff"}, "these are not written"
    meta = json.loads((run.folder / "meta.json").read_text(encoding="utf-8"))
    assert meta.keys() <= keys, "the page does not explain them"
    assert keys - meta.keys() <= {"error", "git", "parent"}
