"""Runs: folders that explain themselves, also of processes that are stopped and killed; folders from elsewhere are data."""
import contextlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
)

import learner.runs.runs as runs
from learner.base.data_hash import loader_hash
from learner.base.hashing import hash_file
from learner.check.bench import example_learner
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CallbackError, CancelTrainException, FunctionCallback
from learner.runs.loggers import BestSoFar
from learner.runs.output import Tee, kept_output
from learner.runs.run import write_plots, write_predictions
from learner.runs.rundir import RunError, RunExistsError, RunLock, is_locked
from learner.runs.runfiles import read_json, read_run, write_json
from learner.runs.runs import Run, checkpoint_of, evaluate_run, load_run, rerun, resume_run, train_run
from learner.watch.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"epochs": 2, "model.width": 2, "lr_schedule": "constant", "batch_size": 128}


@pytest.fixture(autouse=True)
def calm(tmp_path, monkeypatch):
    """No repository around, in which somebody may be at work."""
    monkeypatch.chdir(tmp_path)


def no_test(learn):
    learn.dataloaders = DataLoaders(train=learn.dataloaders.train, validation=learn.dataloaders.validation)
    return learn


def quick(folder, **options): return Run(folder, **{"plots": False, "log_every": 1, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that tests only read, or copy."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with contextlib.chdir(folder.parent): train_run("digits", folder, SMALL, log_every=5, fingerprints=5)
    return folder


@pytest.fixture
def copied(trained, tmp_path): return Path(shutil.copytree(trained, tmp_path / "copied"))


# The folder

def test_all_files_are_there_and_agree(trained):
    run = read_run(trained)
    names = {str(path.relative_to(trained)) for path in trained.rglob("*")}
    assert names >= {"config.json", "meta.json", "script.py", "stdout.txt", "stderr.txt", "history.csv", "steps.csv", "score.json",
                     "checkpoints/epoch-0002.safetensors", "plots/loss.png", "plots/accuracy.png", "plots/predictions.png", "fingerprints.jsonl"} - {"script.py"}
    assert run.status == "finished" and len(run.rows) == 2 and run.config["config"] == "digits" and run.settings["model"]["width"] == 2
    assert run.settings["optimiser"]["name"] == "AdamW"  # a default
    assert [row["step"] for row in run.steps()] == list(range(0, 22, 5))
    assert run.score["validation_accuracy"]["mode"] == "max" and run.score["validation_loss"]["last"] == run.rows[-1]["validation_loss"]
    assert (trained / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    meta = run.meta
    assert meta["seed"] == 0 and meta["epochs"] == meta["epochs_done"] == 2 and meta["error"] is None and meta["parent"] is None
    assert meta["versions"]["torch"] == torch.__version__ and meta["facts"]["cpu_count"] == os.cpu_count() and meta["host"]
    assert [start["status"] for start in meta["starts"]] == ["finished"] and 0 < meta["seconds"] < 60
    assert meta["started"] <= meta["ended"] and meta["started"].endswith("+00:00")
    assert all(len(meta[name]) == 64 for name in ("initial_model",)) and not is_locked(trained)


def test_json_is_valid_also_with_nan(tmp_path):
    def refuse(name): pytest.fail(f"{name} is no JSON")
    learn = no_test(example_learner())
    learn.on("after_epoch", lambda history: history[-1].update(odd=math.nan, train_error=math.inf))
    learn.train(1, callbacks=quick(tmp_path / "a", settings={"clip": math.inf}))
    for name in ("config.json", "meta.json", "score.json"): json.loads((tmp_path / "a" / name).read_text(), parse_constant=refuse)
    run = read_run(tmp_path / "a")
    assert run.score["train_error"]["last"] == math.inf and math.isnan(run.score["odd"]["last"]) and run.settings["clip"] == "inf"


def test_the_commit_and_what_differs_from_it(tmp_path):
    def git(*arguments): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True, cwd=tmp_path)
    git("init", "-q")
    (tmp_path / "model.py").write_text("width = 1\n")
    git("add", ".")
    git("commit", "-qm", "one")
    no_test(example_learner()).train(1, callbacks=quick("runs/clean"))
    (tmp_path / "model.py").write_text("width = 2\n")
    no_test(example_learner()).train(1, callbacks=quick("runs/dirty"))
    clean, dirty = read_run("runs/clean"), read_run("runs/dirty")
    assert clean.meta["git"]["commit"] == dirty.meta["git"]["commit"] and len(dirty.meta["git"]["commit"]) == 40
    assert (clean.meta["git"]["dirty"], dirty.meta["git"]["dirty"]) == (False, True)
    assert clean.text("code.diff") == "" and "+width = 2" in dirty.text("code.diff")
    assert "config.json" not in dirty.text("code.diff")  # the runs are not taken for code


def test_the_test_set_is_not_touched_in_training(tmp_path):
    train_run("digits", tmp_path / "a", SMALL | {"epochs": 1}, plots=False)
    assert read_run(tmp_path / "a").meta["data"]["test"] is None

    class Untouchable:
        def __iter__(self): raise AssertionError("the test set was read")
        def __getattr__(self, name): raise AttributeError(name)
    learn = example_learner()
    loaders = dict(learn.dataloaders)
    learn.dataloaders = {"train": loaders["train"], "validation": loaders["validation"], "test": Untouchable()}
    with pytest.raises(AssertionError, match="was"): learn.train(1, callbacks=quick(tmp_path / "b"))  # the loop's own test
    assert read_run(tmp_path / "b").rows and read_run(tmp_path / "b").meta["data"]["test"] is None


def test_a_test_after_training_is_in_the_row_and_written_down(tmp_path):
    learn = example_learner()
    learn.train(1, callbacks=quick(tmp_path / "a"))
    run = read_run(tmp_path / "a")
    assert run.rows == learn.history.rows and "test_loss" in run.rows[0] and run.score["test_loss"]["last"] == run.rows[0]["test_loss"]
    assert [entry["split"] for entry in run.meta["evaluations"]] == ["test"]
    assert run.meta["data"]["test"] == loader_hash(learn.dataloaders["test"]) and run.status == "finished"


def test_data_is_hashed_apart_whatever_the_loader():
    data, labels = torch.randn(10, 3), torch.arange(10)
    tensors = TensorDataset(data, labels)
    assert loader_hash(DataLoader(tensors, batch_size=2)) == loader_hash(DataLoader(tensors, batch_size=5, shuffle=True))
    assert loader_hash([(data, labels)]) == loader_hash([(data.clone(), labels)]) != loader_hash([(data + 1, labels)])
    state = torch.get_rng_state()
    for stream in (iter([1]), (i for i in range(3))): assert loader_hash(stream) is None and next(stream) is not None
    assert torch.equal(state, torch.get_rng_state())


def test_two_hundred_short_epochs_are_all_written(tmp_path):
    model = nn.Linear(2, 2)
    batches = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))]
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches}, device="cpu")
    learn.train(200, callbacks=quick(tmp_path / "a", checkpoint=False))
    assert len(read_run(tmp_path / "a").rows) == 200


def test_scores():
    rows = [{"epoch": 4, "loss": math.nan, "accuracy": 0.5, "word": "x", "flag": True}, {"epoch": 5, "loss": 2.0, "accuracy": 0.5}, {"epoch": 6, "accuracy": None}]
    assert BestSoFar(rows).score == {"loss": {"best": 2.0, "epoch": 5, "last": 2.0, "mode": "min"}, "accuracy": {"best": 0.5, "epoch": 4, "last": 0.5, "mode": "max"}}
    assert BestSoFar([]).score == {}


def test_a_picture_that_fails_is_a_warning(tmp_path):
    learn = no_test(example_learner())
    learn.train(1)
    (tmp_path / "plots").write_text("in the way")
    with pytest.warns(UserWarning, match="are not complete: NotADirectoryError"): write_plots(tmp_path / "plots", learn.history)


def test_predictions_are_drawn_of_images_only(tmp_path):
    learn = example_learner()  # of rows of numbers
    write_predictions(tmp_path / "plots", learn)
    learn.dataloaders = {"train": learn.dataloaders["train"]}
    write_predictions(tmp_path / "plots", learn)
    assert not (tmp_path / "plots").exists()
    learn = load_run(train_run("digits", tmp_path / "run", SMALL, plots=False) and tmp_path / "run")
    learn.on("after_predict", lambda: [][0])
    with pytest.warns(UserWarning, match="the pictures in .* are not complete: IndexError"): write_predictions(tmp_path / "plots", learn)


# Names

def test_a_run_that_exists_is_refused_before_anything_is_done(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    for attempt in (lambda: Run(trained), lambda: train_run("digits", trained)):
        with pytest.raises(RunExistsError, match=r"resume.*first-2 is free.*overwrite"): attempt()
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_overwriting_moves_the_old_one_aside(copied):
    old = (copied / "history.csv").read_text()
    train_run("digits", copied, SMALL | {"epochs": 1}, overwrite=True, plots=False)
    assert len(read_run(copied).rows) == 1 and (copied.with_name("copied-old") / "history.csv").read_text() == old
    with pytest.raises(ValueError, match="exclude each other"): Run(copied, overwrite=True, resume=True)


def test_a_wrong_setting_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="width"): train_run("digits", tmp_path / "a", {"model.widht": 3})
    with pytest.raises(ValueError, match="digits"): train_run("digit", tmp_path / "a")
    with pytest.raises(ValueError, match="every is"): train_run("digits", tmp_path / "a", log_every=0)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    learn = no_test(example_learner())
    with pytest.raises(RunExistsError): learn.train(1, callbacks=Run(tmp_path / "file" / "a"))
    assert not len(learn.history)


# The callback

def test_it_leaves_the_learner_and_the_process_as_they_were(tmp_path):
    learn, streams = no_test(example_learner()), (sys.stdout, sys.stderr)
    run = quick(tmp_path / "a", fingerprints=1)
    learn.add(run)
    callbacks = learn.callbacks
    for _ in range(2): learn.train(1)
    assert set(callbacks) == {run, *run.parts} and learn.callbacks == callbacks and (sys.stdout, sys.stderr) == streams and not is_locked(tmp_path / "a")
    files = read_run(tmp_path / "a")
    assert len(files.rows) == 2 and [start["status"] for start in files.meta["starts"]] == ["finished"] * 2
    assert [row["step"] for row in files.steps()] == [0, 1, 2, 3, 4, 5]


def test_a_trial_leaves_no_trace(tmp_path):
    learn = no_test(example_learner())
    learn.add(quick(tmp_path / "a"))
    with learn.trial() as copy: copy.train(1)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("raised, status, error", [
    (RuntimeError("no memory\nat all"), "failed", "RuntimeError: no memory"), (KeyboardInterrupt(), "stopped", None),
    (SystemExit(143), "stopped", None), (CancelTrainException(), "finished", None),
])
def test_every_way_out_is_written_down(tmp_path, raised, status, error):
    learn, streams = no_test(example_learner()), (sys.stdout, sys.stderr)

    def stop(epoch, batch_num):
        if (epoch, batch_num) == (1, 1): raise raised
    learn.on("after_batch", stop)
    run = quick(tmp_path / "a")
    if status == "finished": learn.train(3, callbacks=run)
    else:
        with pytest.raises(type(raised)): learn.train(3, callbacks=run)
    files = read_run(tmp_path / "a")
    assert (files.status, files.meta["error"], files.meta["starts"][0]["status"]) == (status, error, status)
    assert files.meta["ended"] and files.rows[0] == learn.history[0] and (sys.stdout, sys.stderr) == streams


def test_an_error_in_a_cleanup_hook_is_written_down_too(tmp_path):
    learn = no_test(example_learner())
    learn.on("cleanup_train", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError): learn.train(1, callbacks=quick(tmp_path / "a"))
    assert read_run(tmp_path / "a").meta["error"] == "ZeroDivisionError: division by zero"


def test_going_on_in_the_same_process_after_a_stop_is_exact(tmp_path):
    def made():
        torch.manual_seed(0)
        return no_test(example_learner())
    whole, broken = made(), made()
    torch.manual_seed(1)
    whole.train(3, callbacks=quick(tmp_path / "whole"))

    def stop(epoch, batch_num):
        if (epoch, batch_num) == (1, 1): signal.raise_signal(signal.SIGINT)
    broken.on("after_batch", stop)
    run = quick(tmp_path / "broken")
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt): broken.train(3, callbacks=run)
    broken.remove(stop)
    broken.train(callbacks=run, resume=True)
    one, other = read_run(tmp_path / "whole"), read_run(tmp_path / "broken")
    assert one.rows == other.rows and [*one.steps()] == [*other.steps()] and one.status == other.status == "finished"
    assert one.meta["epochs"] == other.meta["epochs"] == 3


def test_a_learner_that_has_not_gone_on_cannot_take_over_a_run(copied):
    before = (copied / "history.csv").read_text()
    with pytest.raises(RunError, match=r"train\(resume="): no_test(example_learner()).train(1, callbacks=quick(copied, resume=True))
    assert (copied / "history.csv").read_text() == before and read_run(copied).status == "finished"


@contextlib.contextmanager
def unchanged(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_checkpoints_a_run_is_not_begun_anew_over_its_rows(copied, tmp_path):
    no_test(example_learner()).train(2, callbacks=quick(tmp_path / "a", checkpoint=False))
    with unchanged(tmp_path / "a"), pytest.raises(RunError, match="has 2 epochs of a training that this learner has not done"):
        no_test(example_learner()).train(1, callbacks=quick(tmp_path / "a", resume=True, checkpoint=False))
    write_json(copied / "meta.json", read_json(copied / "meta.json") | {"status": "stopped"})
    shutil.move(copied / "checkpoints", tmp_path / "large")
    with unchanged(copied), pytest.raises(RunError, match="has 2 epochs and no checkpoint to resume from"): resume_run(copied)
    (copied / "checkpoints").symlink_to(tmp_path / "large")
    with unchanged(copied), pytest.raises(RunError, match="checkpoints is a link, which is not followed"): resume_run(copied)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_second_learner_with_the_same_callback_is_refused(tmp_path, checkpoint):
    run = quick(tmp_path / "a", checkpoint=checkpoint)
    first, second = (no_test(example_learner()) for _ in range(2))
    first.train(2, callbacks=run)
    with unchanged(tmp_path / "a"), pytest.raises(RunError, match="use another folder"): second.train(1, callbacks=run)
    first.train(1, callbacks=run)  # its own goes on
    assert len(read_run(tmp_path / "a").rows) == 3 and not len(second.history)


def test_a_learner_of_another_training_is_refused_before_anything_is_cut(tmp_path):
    first, second = (no_test(example_learner()) for _ in range(2))
    first.train(2, callbacks=quick(tmp_path / "a"))
    second.train(1)
    with unchanged(tmp_path / "a"), pytest.raises(ValueError, match="another training"): second.train(1, callbacks=quick(tmp_path / "a", resume=True))


def test_two_cannot_train_in_one_folder(copied):
    with RunLock(copied), pytest.raises(RunError, match="is being trained by another process"): resume_run(copied, epochs=3)
    with RunLock(copied), pytest.raises(RunError, match="in use"): load_run(copied, "last").train(3, callbacks=quick(copied, resume=True))


def test_a_hook_may_ask_for_the_run_and_one_without_it_is_told(tmp_path):
    class Asks(Callback):
        def after_epoch(self, run): (run.folder / "mine.txt").write_text("x")
    no_test(example_learner()).train(1, callbacks=[Asks(), quick(tmp_path / "a")])
    assert (tmp_path / "a" / "mine.txt").exists()
    with pytest.raises(CallbackError, match="asks for run"): no_test(example_learner()).train(1, callbacks=Asks())


def test_bad_options_are_refused_at_once(tmp_path):
    for options, message in (({"checkpoint": {"kep": 1}}, "kep"), ({"checkpoint": {"keep": 0}}, "keep"), ({"fingerprints": 0}, "every")):
        with pytest.raises((TypeError, ValueError), match=message): Run(tmp_path / "a", **options)


# Output

def written(tmp_path, *texts):
    (tmp_path / "out.txt").unlink(missing_ok=True)
    tee = Tee(None, tmp_path / "out.txt")
    for text in texts: tee.write(text)
    tee.close_file()
    return (tmp_path / "out.txt").read_text()


@pytest.mark.parametrize("texts, kept", [
    (["a\n", "b"], "a\nb\n"), (["10%\r", "20%\r", "100%\n"], "100%\n"), (["long text\r", "ab\n"], "abng text\n"), (["bar 50%\r", " " * 7, "\rrow\n"], "row\n"),
    (["\x1b[32mgreen\x1b[0m\n"], "green\n"), (["a\r\nb\r\n"], "a\nb\n"), (["abc\b\bX\n"], "aXc\n"), (["ü€😀\n"], "ü€😀\n"), (["", "\n\n"], "\n\n"), ([], ""),
    (["half \ud800\n"], "half ?\n"),
])
def test_the_file_has_what_a_terminal_would_show_in_the_end(tmp_path, texts, kept): assert written(tmp_path, *texts) == kept


def test_progress_bars_of_others_leave_one_line(tmp_path):
    tqdm = pytest.importorskip("tqdm")
    with kept_output(tmp_path):
        for _ in tqdm.tqdm(range(200), mininterval=0, ncols=60): pass
    assert (tmp_path / "stderr.txt").read_text().count("\n") == 1 and "200/200" in (tmp_path / "stderr.txt").read_text()


def test_bars_of_fastprogress_leave_one_line(tmp_path, capsys):
    from fastprogress.fastprogress import ConsoleProgressBar
    with kept_output(tmp_path):
        bar = ConsoleProgressBar(range(50))
        for _ in bar: time.sleep(0.001)
        print("\nafter")
    lines = (tmp_path / "stdout.txt").read_text().splitlines()
    assert len(lines) == 2 and "100.00%" in lines[0] and lines[1] == "after"


def test_threads_and_forks_and_logging(tmp_path, capsys):
    with kept_output(tmp_path):
        handler = logging.StreamHandler()
        threads = [threading.Thread(target=lambda i=i: [sys.stdout.write(f"{i}-{j}\n") for j in range(50)]) for i in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        logging.getLogger("runs").addHandler(handler)
        logging.getLogger("runs").warning("logged")
        print("warned", file=sys.stderr)
        child = os.fork()
        if not child:
            print("from the child", flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    logging.getLogger("runs").removeHandler(handler)
    lines = (tmp_path / "stdout.txt").read_text().split()
    assert sorted(lines) == sorted(f"{i}-{j}" for i in range(4) for j in range(50))
    assert (tmp_path / "stderr.txt").read_text() == "logged\nwarned\n"
    late = handler.stream
    late.write("after the end\n")  # somebody may keep it: it still hands on
    assert "after the end" in capsys.readouterr().err and "after" not in (tmp_path / "stderr.txt").read_text()


def test_an_output_that_is_closed_stays_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with kept_output(tmp_path):
        assert sys.stdout is None and isinstance(sys.stderr, Tee)
        print("to nobody")
    assert not isinstance(sys.stderr, Tee)


def test_one_that_others_have_wrapped_is_left_to_them(tmp_path):
    before = sys.stdout
    try:
        with kept_output(tmp_path):
            inner = sys.stdout
            sys.stdout = type("Outer", (), {"write": lambda self, text: inner.write(text), "flush": lambda self: None})()
            outer = sys.stdout
            print("through both")
        assert sys.stdout is outer and (tmp_path / "stdout.txt").read_text() == "through both\n"
    finally: sys.stdout = before


def test_what_is_printed_in_training_and_its_test_is_kept(tmp_path, capsys):
    learn = example_learner()
    learn.on("after_epoch", lambda epoch: print("epoch", epoch, "done"))
    learn.train(2, callbacks=[quick(tmp_path / "a"), Progress()])
    kept = (tmp_path / "a" / "stdout.txt").read_text()
    assert "epoch 1 done" in kept and "validation_loss" in kept and "test_loss" in kept and capsys.readouterr().out == kept


# Processes

def python(code, **options):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


TRAINING = """
import os, signal, torch
from learner.runs.runs import train_run
from learner.loop.stages import FunctionCallback
def stop(epoch, batch_num):
    print("batch", epoch, batch_num, flush=True)
    if (epoch, batch_num) == (1, 5): os.kill(os.getpid(), signal.{signal})
train_run("digits", {folder!r}, {settings!r}, log_every=5, fingerprints=5, checkpoint={{"steps": 4, "keep": 2}}, callbacks=FunctionCallback("after_batch", stop))
"""


@pytest.mark.parametrize("name, code", [("SIGKILL", -9), ("SIGTERM", 143)])
def test_a_process_that_is_stopped_is_shown_so_and_goes_on_to_the_same_end(tmp_path, trained, name, code):
    folder = tmp_path / "a"
    with python(TRAINING.format(signal=name, folder=str(folder), settings=SMALL)) as process: _, err = process.communicate()
    assert process.returncode == code, err
    run = read_run(folder)
    assert run.status == "stopped" and read_json(folder / "meta.json")["status"] == ("running" if name == "SIGKILL" else "stopped")
    assert len(run.rows) == 1 and run.last_epoch == 1 and "batch 1 5" in run.text("stdout.txt")
    if name != "SIGKILL": assert run.checkpoints[-1] == "epoch-0001-batch-00006.safetensors"  # where it was stopped
    resume_run(folder)
    run, whole = read_run(folder), read_run(trained)
    assert run.rows == whole.rows and [*run.steps()] == [*whole.steps()] and run.status == "finished"
    assert run.text("fingerprints.jsonl") == whole.text("fingerprints.jsonl")
    assert [start["status"] for start in run.meta["starts"]] == ["stopped", "finished"] and run.meta["starts"][1]["from"].startswith("epoch-0001")
    assert run.meta["data"] == whole.meta["data"] and run.meta["initial_model"] == whole.meta["initial_model"]


def test_a_script_keeps_itself_and_its_command(tmp_path):
    (tmp_path / "mine.py").write_text("""
import torch
from learner.check.bench import example_learner
from learner.runs.runs import Run
learn = example_learner()
learn.train(1, callbacks=Run("run", plots=False))
""")
    done = subprocess.run([sys.executable, "mine.py", "--fast"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "run")
    assert run.meta["command"] == ["python", "mine.py", "--fast"] and run.text("script.py") == (tmp_path / "mine.py").read_text()
    assert run.meta["cwd"] == str(tmp_path) and run.meta["git"] is None and run.config["config"] is None


def test_a_notebook_keeps_its_cells(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = ["from learner.check.bench import example_learner\nfrom learner.runs.runs import Run", "learn = example_learner()\nrun = Run('run', plots=False)",
             "learn.train(1, callbacks=run)", "print('between')", "learn.train(1, callbacks=run)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client
        import asyncio
        client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(tmp_path)}})
        before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
        try: asyncio.run(client.async_execute())
        finally: os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    run = read_run(tmp_path / "run")
    assert run.text("script.py") == "\n\n".join(f"# %%\n{cell}" for cell in cells) + "\n"
    assert run.meta["command"] is None and len(run.rows) == 2 and not (tmp_path / "run" / "script-2.py").exists()


# Loading, evaluating, running again

def test_a_loaded_learner_is_that_of_the_checkpoint(copied):
    run = read_run(copied)
    for checkpoint in ("best", "last", "epoch-0002", "epoch-0002.safetensors", copied / "checkpoints" / "epoch-0002.safetensors"):
        learn = load_run(copied, checkpoint)
        assert learn.history.rows == run.rows[:len(learn.history)] and learn.loaded_from.parent == copied / "checkpoints"
    assert learn.validate()["validation_loss"] == run.rows[-1]["validation_loss"]
    assert load_run(copied, "epoch-0001").validate()["validation_loss"] == run.rows[0]["validation_loss"]


def test_tuning_has_a_parent(copied, tmp_path):
    learn = load_run(copied, "epoch-0001")
    learn.train(1, callbacks=quick(tmp_path / "tuned"))
    tuned = read_run(tmp_path / "tuned")
    assert tuned.meta["parent"] == hash_file(copied / "checkpoints" / "epoch-0001.safetensors") != hash_file(copied / "checkpoints" / "epoch-0002.safetensors")
    assert tuned.config["config"] == "digits" and tuned.meta["initial_model"] != read_run(copied).meta["initial_model"]


def test_evaluations_are_written_down_also_while_it_trains(copied):
    first = evaluate_run(copied, "validation", "last")
    assert first == {name: value for name, value in read_run(copied).rows[-1].items() if name.startswith("validation_")}
    seen = []
    resume_run(copied, epochs=3, callbacks=FunctionCallback("before_validation", lambda: seen.append(evaluate_run(copied, "test", "epoch-0002"))))
    run = read_run(copied)
    assert [(entry["split"], entry["checkpoint"]) for entry in run.meta["evaluations"]] == [("validation", "epoch-0002.safetensors"), ("test", "epoch-0002.safetensors")]
    assert run.meta["evaluations"][1]["results"] == seen[0] and len(run.meta["data"]["test"]) == 64 and run.status == "finished" and len(run.rows) == 3


def test_an_evaluation_changes_nothing_else_of_what_a_run_writes_meanwhile(copied, monkeypatch):
    write_json(copied / "meta.json", read_json(copied / "meta.json") | {"status": "running"})

    def now():  # the run ends
        write_json(copied / "meta.json", read_json(copied / "meta.json") | {"status": "finished", "epochs_done": 7})
        return "now"
    monkeypatch.setattr(runs, "now", now)
    evaluate_run(copied)
    meta = read_json(copied / "meta.json")
    assert (meta["status"], meta["epochs_done"], meta["evaluations"][0]["at"]) == ("finished", 7, "now")
    seen = []
    monkeypatch.setattr(runs, "write_json", lambda path, value: seen.append(is_locked(copied)) or write_json(path, value))
    evaluate_run(copied)
    assert seen == [True] and not is_locked(copied) and len(read_json(copied / "meta.json")["evaluations"]) == 2
    with RunLock(copied): evaluate_run(copied)  # while it trains
    assert len(read_json(copied / "meta.json")["evaluations"]) == 3


def test_a_lost_index_is_said_and_comes_back(copied):
    index = (copied / "checkpoints" / "index.json").read_text()
    (copied / "checkpoints" / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="the best checkpoint is not known, since .*index.json is lost; name one, or resume the run; there are epoch-0001, epoch-0002"): evaluate_run(copied)
    assert evaluate_run(copied, checkpoint="last")
    resume_run(copied, epochs=3)
    assert json.loads((copied / "checkpoints" / "index.json").read_text())["training"] == json.loads(index)["training"]
    assert evaluate_run(copied)


def test_other_data_is_noticed(copied):
    meta = read_json(copied / "meta.json")
    meta["data"]["validation"] = "0" * 64
    write_json(copied / "meta.json", meta)
    with pytest.warns(UserWarning, match="the validation data has changed since the run began"): evaluate_run(copied)
    assert read_run(copied).meta["data"]["validation"] == "0" * 64  # of the training, it stays


def test_going_on_with_other_data_is_noticed(copied):
    meta = read_json(copied / "meta.json")
    meta["data"]["train"] = "0" * 64
    write_json(copied / "meta.json", meta)
    with pytest.warns(UserWarning, match="the train data has changed since the run began"): resume_run(copied, epochs=3)
    assert read_run(copied).meta["data"]["train"] == "0" * 64 and len(read_run(copied).rows) == 3
    write_json(copied / "meta.json", read_json(copied / "meta.json") | {"epochs_done": "six"})
    with pytest.raises(RunError, match="meta.json is damaged: epochs_done is 'six'"): resume_run(copied, epochs=4)


def test_a_rerun_is_identical_and_says_what_differs(copied, tmp_path):
    again = rerun(copied, tmp_path / "again")
    assert again.identical and repr(again) == "the history is identical" and again.learn.history.rows == read_run(copied).rows
    assert read_run(tmp_path / "again").text("fingerprints.jsonl") == ""
    meta = read_json(copied / "meta.json")
    meta["git"], meta["versions"]["torch"], meta["data"]["train"] = {"commit": "abc", "dirty": False}, "1.0", "0" * 64
    meta["facts"]["threads"] = 7  # sums are taken in another order with other threads
    write_json(copied / "meta.json", meta)
    text = (copied / "history.csv").read_text().splitlines()
    (copied / "history.csv").write_text("\n".join([*text[:2], "1" + text[2][1:].replace(",0.", ",0.9", 1)]) + "\n")
    again = rerun(copied, tmp_path / "third")
    assert not again.identical and repr(again).startswith("the history differs from epoch 1 on; the code differs: commit abc, now ")
    assert f"torch was 1.0 and is {torch.__version__}" in again.differences and "threads was 7 and is 1" in again.differences and "the train data differs" in again.differences


def test_finished_runs_are_only_loaded_and_more_epochs_are_the_same_as_from_the_start(copied, tmp_path):
    before = (copied / "meta.json").read_text()
    assert len(resume_run(copied).history) == len(resume_run(copied, epochs=1).history) == 2 and (copied / "meta.json").read_text() == before
    resume_run(copied, epochs=3)
    train_run("digits", tmp_path / "three", SMALL | {"epochs": 3}, plots=False, log_every=5)
    one, other = read_run(copied), read_run(tmp_path / "three")
    assert one.rows == other.rows and [*one.steps()] == [*other.steps()] and one.meta["epochs"] == 3


def test_damaged_checkpoints(copied):
    meta = read_json(copied / "meta.json")
    write_json(copied / "meta.json", meta | {"status": "stopped"})
    (copied / "checkpoints" / "epoch-0002.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"epoch-0002"): load_run(copied, "epoch-0002")
    with pytest.warns(UserWarning, match="epoch-0002"): resume_run(copied)
    assert read_run(copied).meta["starts"][-1]["from"] == "epoch-0001.safetensors" and len(read_run(copied).rows) == 2
    write_json(copied / "meta.json", meta | {"status": "stopped"})
    for path in (copied / "checkpoints").glob("epoch-*"): path.write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(RunError, match="none of its checkpoints is intact"): resume_run(copied)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(copied, trained):
    shutil.rmtree(copied / "checkpoints")
    for name in ("history.csv", "score.json"): (copied / name).unlink()  # of the first epoch, some steps may be there
    write_json(copied / "meta.json", read_json(copied / "meta.json") | {"status": "running"})
    assert read_run(copied).status == "stopped"
    resume_run(copied)
    run, whole = read_run(copied), read_run(trained)
    assert run.rows == whole.rows and [*run.steps()] == [*whole.steps()] and run.meta["starts"][-1]["from"] is None


BAD_CALLS = [
    (lambda run: load_run(run, "epoch-0009"), FileNotFoundError, "did you mean epoch-0002.*there are epoch-0001, epoch-0002"),
    (lambda run: load_run(run, "lst"), FileNotFoundError, "did you mean last"), (lambda run: load_run(run, "../x"), RunError, "not a path"),
    (lambda run: load_run(run, "/etc"), RunError, "not a path"), (lambda run: load_run(run, run / "plots" / "epoch-0001"), RunError, "not a path"),
    (lambda run: load_run(run.with_name("copyed")), FileNotFoundError, "did you mean copied"), (lambda run: load_run(run / "meta.json"), RunError, "is a file"),
    (lambda run: evaluate_run(run, "tets"), RunError, "did you mean test"), (lambda run: evaluate_run(run, "train"), RunError, "must be one of"),
    (lambda run: resume_run(run, epochs=0), ValueError, "epochs is 0"), (lambda run: resume_run(run, epochs="3"), ValueError, "epochs is '3'"),
    (lambda run: rerun(run, run), RunExistsError, "exists already"), (lambda run: Run(""), RunError, "the path of the run is empty"),
]


@pytest.mark.parametrize("call, kind, message", BAD_CALLS, ids=[row[2] for row in BAD_CALLS])
def test_bad_calls_change_nothing(copied, call, kind, message):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message) as caught: call(copied)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}


def test_a_learner_by_hand_cannot_be_built_again(tmp_path):
    no_test(example_learner()).train(1, callbacks=quick(tmp_path / "a"))
    for call in (load_run, resume_run, evaluate_run, lambda run: rerun(run, tmp_path / "b")):
        with pytest.raises(RunError, match="built by hand"): call(tmp_path / "a")


def test_an_evaluation_says_which_checkpoint_it_read(copied):
    best = evaluate_run(copied)
    last = evaluate_run(copied, "test", "last")
    assert best.checkpoint == checkpoint_of(copied, "best") and (last.split, last.checkpoint) == ("test", checkpoint_of(copied, "last"))
    assert str(last).startswith(f"{last.checkpoint.name} on test: test_loss {last['test_loss']:.6g}") and dict(last) == last


# Costs

def test_of_what_training_reads_a_run_reads_no_more_than_a_sample(tmp_path):
    data, model = Pictures(20_000), nn.Linear(4, 1)
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.0), F.mse_loss, {"train": DataLoader(data, batch_size=2000, shuffle=True)}, device="cpu")
    learn.train(1, callbacks=quick(tmp_path / "a", checkpoint=False))
    assert len(data.read) == 21_000 and read_run(tmp_path / "a").meta["data"]["train"].endswith(" (1,000 of 20,000)")


def test_what_the_sampler_leaves_out_is_not_read(tmp_path):
    data, model = Pictures(32, bad=13), nn.Linear(4, 1)
    loader = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler([i for i in range(32) if i != 13]))
    Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, {"train": loader}, device="cpu").train(1, callbacks=quick(tmp_path / "a"))
    assert len(read_run(tmp_path / "a").meta["data"]["train"]) == 64 and len(data.read) == 62


def test_data_that_cannot_be_read_ends_no_training(tmp_path):
    class Skips(DataLoader):
        def __iter__(self): return iter([(torch.zeros(8, 4), torch.zeros(8, 1))])
    model = nn.Linear(4, 1)
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, {"train": Skips(Pictures(32, bad=13), batch_size=8)}, device="cpu")
    with pytest.warns(UserWarning, match="the data has no hash: FileNotFoundError: picture 13"): learn.train(1, callbacks=quick(tmp_path / "a"))
    assert read_run(tmp_path / "a").status == "finished" and read_run(tmp_path / "a").meta["data"]["train"] is None


class Pictures(Dataset):
    def __init__(self, count, bad=None, value=0): self.count, self.bad, self.value, self.read = count, bad, value, []

    def __len__(self): return self.count

    def __getitem__(self, i):
        if i == self.bad: raise FileNotFoundError(f"picture {i}")
        self.read.append(i)
        return torch.full((4,), float(i + self.value)), torch.zeros(1)


def test_what_a_run_writes_in_an_epoch_does_not_grow(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/io"): pytest.skip("the system does not count what a process writes")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the time of the disk does not matter here
    batches, model, marks = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))], nn.Linear(2, 2), []
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches}, device="cpu")
    learn.on("after_epoch", lambda: marks.append(int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])), priority=9000)
    learn.train(301, callbacks=Run(tmp_path / "a", plots=False, checkpoint=False))
    early, late = (marks[100] - marks[50]) / 50, (marks[300] - marks[250]) / 50
    assert 100 < late < 1.2 * early + 100 and len(read_run(tmp_path / "a").rows) == 301


def test_numbers_of_numpy_are_ranked(tmp_path):
    learn = no_test(example_learner())
    learn.on("after_epoch", lambda epoch: learn.log(validation_accuracy=np.float32(epoch / 4)))
    learn.train(3, callbacks=quick(tmp_path / "a"))
    assert read_run(tmp_path / "a").score["validation_accuracy"] == {"best": 0.5, "epoch": 2, "last": 0.5, "mode": "max"}
    assert [row["validation_accuracy"] for row in read_run(tmp_path / "a").rows] == [0, 0.25, 0.5]


def test_the_options_of_a_run_are_there_as_soon_as_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("learner.runs.run.script_text", lambda: 1 / 0)  # stopped between its first files
    with pytest.raises(ZeroDivisionError): train_run("digits", tmp_path / "a", SMALL, log_every=7, plots=False, checkpoint={"keep": 1})
    assert not (tmp_path / "a" / "meta.json").exists()
    monkeypatch.undo()
    resume_run(tmp_path / "a")
    assert [row["step"] for row in read_run(tmp_path / "a").steps()] == list(range(0, 22, 7)) and read_run(tmp_path / "a").checkpoints == ["epoch-0002.safetensors"]


# A folder from elsewhere is data, not code

OUTSIDE = ["stdout.txt", "stderr.txt", ".lock", "steps.csv", "history.csv", "score.json", "meta.json", "code.diff", "script.py", "plots", "tensorboard", "checkpoints", ".gitignore", "fingerprints.jsonl"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_is_written_through_a_link(copied, tmp_path, name):
    """Resuming may refuse or go on; what a link leads to stays as it is."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("step,loss\n")
    if (copied / name).is_dir(): shutil.move(copied / name, mine / name)
    elif (copied / name).exists(): (copied / name).unlink()
    (copied / name).symlink_to(mine if (mine / name).is_dir() or name in ("plots", "tensorboard") else mine / "thesis.txt")
    with unchanged(mine), contextlib.suppress(ValueError, OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume_run(copied, epochs=3)
    assert (mine / "thesis.txt").read_text() == "step,loss\n"


@pytest.mark.parametrize("name", ["stdout.txt", ".lock", "steps.csv", "history.csv", "score.json", "meta.json", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_no_pipe_or_device_keeps_us_waiting(copied, name, kind):
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name) if kind == "pipe" else (copied / name).symlink_to("/dev/zero")
    begun = time.monotonic()
    for call in (lambda: resume_run(copied, epochs=3), lambda: evaluate_run(copied)):
        try: call()
        except (ValueError, OSError) as error: assert "\n" not in str(error)
    assert time.monotonic() - begun < 12


@pytest.mark.parametrize("change", [{"starts": "many"}, {"starts": [3, {"status": []}]}, {"seconds": "long"}, {"data": 3}, {"evaluations": {"a": 1}}, {"git": []}, {"epochs": {}}, {"versions": [1]}])
def test_facts_of_another_form_break_nothing(copied, change):
    write_json(copied / "meta.json", {**read_json(copied / "meta.json"), **change, "status": "stopped"})
    resume_run(copied, epochs=3)
    assert read_run(copied).status == "finished" and len(read_run(copied).rows) == 3 and evaluate_run(copied)

@pytest.mark.parametrize("change, message", [
    ({"config": "evil:make"}, "allow"), ({"config": "os:system"}, "allow"), ({"config": "evil"}, "evil"), ({"config": "../evil.yaml"}, "evil"),
    ({"config": 3}, "config"), ({"settings": {"model": {"name": "evil.Model"}}}, "allow"), ({"settings": {"optimiser": {"name": "evil.Model"}}}, "allow"),
    ({"settings": {"callbacks": {"evil.Model": {}}}}, "evil"), ({"config": "mine", "module": "evil"}, "mine"),
])
def test_nothing_that_a_folder_names_is_imported(copied, tmp_path, monkeypatch, change, message):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Model: pass\ndef make(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = read_json(copied / "config.json")
    settings = {**config["settings"], **change.get("settings", {})}
    write_json(copied / "config.json", {**config, **change, "settings": settings})
    for call in (load_run, evaluate_run, lambda run: resume_run(run, epochs=3), lambda run: rerun(run, tmp_path / "b")):
        with pytest.raises(ValueError, match=message): call(copied)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "b").exists() and "evil" not in sys.modules


def test_a_module_that_is_allowed_by_name_is_imported(tmp_path, monkeypatch):
    (tmp_path / "trusted_model.py").write_text("""
from torch import nn
class Flat(nn.Sequential):
    def __init__(self, width: int = 4): super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
""")
    monkeypatch.syspath_prepend(tmp_path)
    train_run("digits", tmp_path / "a", SMALL | {"model": "trusted_model.Flat", "model.width": 3}, plots=False)
    del sys.modules["trusted_model"]
    with pytest.raises(ValueError, match="--allow=trusted_model"): load_run(tmp_path / "a")
    assert "trusted_model" not in sys.modules
    learn = load_run(tmp_path / "a", allow=["trusted_model"])
    assert type(learn.model).__name__ == "Flat" and learn.model[1].out_features == 3


def test_links_in_a_folder_lead_nowhere(copied, tmp_path):
    outside = Path(shutil.copytree(copied / "checkpoints", tmp_path / "outside"))
    (copied / "checkpoints" / "epoch-0002.safetensors").unlink()
    (copied / "checkpoints" / "epoch-0002.safetensors").symlink_to(outside / "epoch-0002.safetensors")
    with pytest.raises(FileNotFoundError): checkpoint_of(copied, "epoch-0002")
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").symlink_to(outside)
    for checkpoint in ("best", "last", "epoch-0001"):
        with pytest.raises(RunError, match="link"): checkpoint_of(copied, checkpoint)


def test_build_is_handed_on():
    from learner.runs.config import build
    assert runs.build is build and build("digits", **{"model.width": 3}).model[0][0].out_channels == 3
