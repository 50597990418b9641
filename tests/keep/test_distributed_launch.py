"""Training in processes that a notebook or a script starts."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.provenance import seed_everything
from learner.keep.distributed import Distributed
from learner.keep.launch import launch
from learner.keep.ranks import RankError
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.watch.progress import Progress

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers are talked to by a socket of the file system")


class Seen(Callback):
    "Without a state_dict: its plain values come home."

    def __init__(self): self.losses = []

    def after_epoch(self, learn): self.losses.append(learn.results["train_loss"])


class Slow(Callback):
    writes = True

    def after_batch(self, epoch, batch_num):
        time.sleep(0.05)
        if (epoch, batch_num) == (0, 3): print("here", flush=True)


class DataError(ValueError):
    "The user's own."


class OddError(ValueError):
    def __init__(self, place, what): super().__init__(f"{place}: {what}")  # pickle cannot make it again


class Bad(Callback):
    def __init__(self, error): self.error = error

    def after_loss(self, learn, batch_num):
        if learn.ranks and learn.ranks.rank == 1 and batch_num == 2:
            if self.error is None: os.kill(os.getpid(), signal.SIGKILL)
            raise self.error()


def make(*callbacks):
    seed_everything(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
    return Learner(model, torch.optim.AdamW, F.cross_entropy, digits(batch_size=128), callbacks, device="cpu")


def test_what_was_trained_in_two_processes_comes_home_also_after_ctrl_c(capsys):
    plain, seen = make(Distributed(shards=2)), Seen()
    plain.train(2, learning_rate=0.01)
    wanted, rows = plain.fingerprint(), plain.history.rows
    learn = make(Progress(), seen, Slow())
    model = learn.model

    def press():
        while "here" not in (shown.append(capsys.readouterr().out) or "".join(shown)): time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    shown = []
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 0, batch"):
        launch(learn, processes=2, shards=2).train(2, learning_rate=0.01)
    assert 3 < learn.place.batch < 12 and learn.model is model
    launch(learn, processes=2, shards=2).train(resume=True)
    assert learn.model is model and learn.history.rows == rows
    found = learn.fingerprint()
    assert all(found[name] == wanted[name] for name in ("model", "optimiser", "rng"))
    assert learn.dataloaders.train.epoch == plain.dataloaders.train.epoch == 2
    assert seen.losses == [row["train_loss"] for row in rows]
    assert f"{rows[1]['train_loss']:.4f}" in capsys.readouterr().out  # what the first process shows
    with pytest.raises(ValueError, match="nothing to resume"): learn.train(resume=True)


@pytest.mark.parametrize(("error", "kind", "words"), [
    (lambda: DataError("bad data"), DataError, "^bad data\n"),
    (lambda: OddError("here", "bad data"), RankError, r"rank 1: OddError: here: bad data \(in Bad.after_loss \(epoch 0, batch 2\)"),
    (None, RankError, "rank 1: it has ended without a word")])
def test_an_error_of_a_worker_is_raised_here_once_as_it_is(error, kind, words):
    learn = make(Bad(error))
    began = time.monotonic()
    with pytest.raises(kind, match=words) as raised: launch(learn, processes=2).train(1, learning_rate=0.01)
    assert type(raised.value) is kind and time.monotonic() - began < 90
    notes = "\n".join(raised.value.__notes__)
    if error: assert "rank 1 has failed" in notes and "in Bad.after_loss (epoch 0, batch 2)" in notes and "Traceback" in notes
    assert not learn.history.rows and learn.ranks is None


def test_weights_in_parts_come_home_whole():
    plain, learn = make(), make()
    plain.model[3].p = learn.model[3].p = 0.0
    plain.train(1, learning_rate=0.01)
    launch(learn, processes=2, shard=True).train(1, learning_rate=0.01)
    for one, other in zip(plain.model.parameters(), learn.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert learn.validate()["validation_loss"] == pytest.approx(learn.history[0]["validation_loss"], rel=1e-5)


def test_mistakes_are_answered_before_anything_starts():
    learn = make()
    with pytest.raises(ValueError, match="power of two"): launch(learn, processes=2, shards=3)
    with pytest.raises(TypeError, match="is not a Learner"): launch(nn.Linear(1, 1))
    learn.dataloaders = {"train": (batch for batch in ())}
    with pytest.raises(TypeError, match="generator object .* cannot be sent"): launch(learn).train(1)


@pytest.mark.long
def test_the_command_line_trains_in_two_processes(tmp_path):
    def train(name, *words):
        done = subprocess.run([sys.executable, "-m", "learner", "train", "digits", str(tmp_path / name), "--epochs=1", *words],
                              capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, json.loads((tmp_path / name / "meta.json").read_text()), (tmp_path / name / "history.csv").read_text()

    shown, meta, rows = train("two", "--processes=2")
    assert shown.count("validation_loss") == 2 and meta["status"] == "finished" and "--processes=2" in meta["command"]
    assert len(rows.splitlines()) == len(train("one")[2].splitlines()) == 2


@pytest.mark.long
def test_a_run_of_two_processes_is_stopped_resumed_and_run_again_by_two(tmp_path):
    def command(*words): return [sys.executable, "-m", "learner", *words]
    def learner(*words): return subprocess.run(command(*words), capture_output=True, text=True, timeout=200)

    run, again = str(tmp_path / "run"), str(tmp_path / "again")
    process = subprocess.Popen(command("train", "digits", run, "--epochs=500", "--processes=2", "--quiet"), start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "history.csv").exists() and time.monotonic() < until: time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to all of them
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"stopped; to continue: learner resume {run}" in shown
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert (meta["status"], meta["facts"]["processes"]) == ("stopped", 2)
    epochs = meta["epochs_done"] + 1
    assert learner("resume", run, f"--epochs={epochs}").returncode == 0
    done = learner("rerun", run, again)
    assert done.returncode == 0 and "the history is identical" in done.stdout, done
    new = json.loads((tmp_path / "again" / "meta.json").read_text())
    assert new["facts"]["processes"] == 2 and new["command"][:2] == ["learner", "rerun"]
    assert learner("resume", run, f"--epochs={epochs + 1}", "--processes=1").returncode == 0


@pytest.mark.parametrize(("had", "words", "answer"), [
    (2, ("--detach",), "was trained by 2 processes, and --detach trains in one process; add --processes=1"),
    (2, ("--detach", "--processes=2"), "--detach trains in one process; leave out --processes"),
    (10**9, (), "say how many: --processes=2"), ("many", (), "say how many: --processes=2"),
    (2, ("--processes=0",), "it must be a whole number of at least 1")])
def test_a_number_of_processes_that_cannot_be_is_answered_in_one_line(tmp_path, monkeypatch, capsys, had, words, answer):
    from learner.runs import cli
    from learner.runs.runs import train_run
    monkeypatch.chdir(tmp_path)
    train_run("digits", "run", {"epochs": 1}, plots=False)
    path = tmp_path / "run" / "meta.json"
    meta = json.loads(path.read_text())
    meta["facts"]["processes"] = had
    path.write_text(json.dumps(meta))
    capsys.readouterr()
    assert cli.main(["resume", "run", "--epochs=2", *words]) == 2
    shown = capsys.readouterr().err
    assert answer in shown and shown.count("\n") == 1
