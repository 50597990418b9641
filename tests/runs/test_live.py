"""A run is watched, started in the background and stopped by other processes, and takes no notice of those that only look."""
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.runs import live
from learner.runs.background import stop_run
from learner.runs.live import Moment, ProgressFile, ProgressReport, Watcher, outcome, watch_run
from learner.runs.rundir import RunError, RunLock, is_locked
from learner.runs.runfiles import RunFiles, write_json
from learner.runs.runs import Run
from learner.watch.views import View, time_of_row

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import time
from learner.loop.stages import Callback

class Slow(Callback):
    def after_batch(self): time.sleep(0.02)
"""
WORDS = ("--model.width=2", "--device=cpu", "--callbacks.slow.name=slow.Slow", "--allow=slow")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    yield tmp_path
    for meta in tmp_path.glob("runs/*/meta.json"):  # nothing is left behind by a test that fails
        if is_locked(meta.parent): stop_run(meta.parent)


def command(*words): return [sys.executable, "-m", "learner", *words]


def options(place): return {"cwd": place, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}


def learner(*words, place):
    "The command as a user starts it: exit status and output."
    done = subprocess.run(command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **options(place))
    return done.returncode, done.stdout


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.05)


def small(*callbacks, count=8):
    torch.manual_seed(0)
    loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(count)]
    return Learner(nn.Linear(4, 2), torch.optim.SGD, F.cross_entropy, {"train": loader, "validation": loader[:3]}, callbacks)


def test_a_run_survives_its_terminal_and_its_watchers_and_stops_at_the_next_batch(place):
    terminal, end = pty.openpty()
    words = command("train", "digits", "runs/x", "--epochs=500", *WORDS, "--detach")
    starter = subprocess.Popen(words, stdin=end, stdout=end, stderr=end, start_new_session=True, **options(place))
    os.close(end)
    assert starter.wait(120) == 0
    said = os.read(terminal, 10_000).decode()
    assert "learner watch runs/x" in said and "learner stop runs/x" in said
    os.close(terminal)  # a hang-up for all that belong to it
    run = place / "runs/x"
    with subprocess.Popen(command("watch", "runs/x"), stdout=subprocess.PIPE, text=True, **options(place)) as watcher:
        assert "train_loss" in watcher.stdout.readline()
        watcher.kill()
    seen = len(RunFiles(run).rows)
    until(lambda: len(RunFiles(run).rows) > seen + 1)  # it trains on
    status, out = learner("stop", "runs/x", place=place)
    assert status == 0 and "stopped after" in out and "learner resume runs/x" in out
    assert not is_locked(run) and RunFiles(run).status == "stopped"
    moment, last = Moment.of(run / "progress.json"), RunFiles(run).checkpoints[-1]
    if moment.phase == "train" and 0 < moment.batches < moment.total:
        assert last == f"epoch-{moment.epoch:04}-batch-{moment.batches:05}.safetensors"  # the bar says where it stopped
    assert "Traceback" not in RunFiles(run).text("stderr.txt") and "train_loss" in RunFiles(run).text("stdout.txt")
    done = len(RunFiles(run).rows) + 1
    status, out = learner("resume", "runs/x", f"--epochs={done}", "--allow=slow", "--detach", place=place)
    assert status == 0, out
    until(lambda: RunFiles(run).status == "finished")
    assert [row["epoch"] for row in RunFiles(run).rows] == [*range(done)]


def test_a_mistake_is_answered_in_the_terminal_that_detached(place):
    status, out = learner("train", "digits", "runs/x", "--epochs=many", "--detach", place=place)
    assert status == 2 and "epochs" in out and not (place / "runs").exists()
    status, out = learner("train", "digits", "runs/x", "--epochs=1", "--callbacks.a.name=slow.Missing", "--allow=slow", "--detach", place=place)
    assert status == 2 and "Missing" in out and not (place / "runs").exists()


def test_the_watcher_shows_rows_and_bars_of_a_training_in_another_thread_of_time(tmp_path, monkeypatch):
    told = []

    class Told(View):
        live = True
        def earlier(self, rows): super().earlier(rows); told.append(("earlier", len(rows)))
        def begin(self, phase, total): told.append(("begin", phase, total))
        def update(self, batches, loss=None): told.append(("update", batches))
        def row(self, row): self.done += 1; told.append(("row", row["epoch"]))
        def end(self, results, interrupted, why=""): told.append(("end", interrupted))

    monkeypatch.setattr(live, "view_elsewhere", lambda rows, epochs, plot: Told(len(rows), epochs))
    monkeypatch.setattr(ProgressReport, "pause", 0.0)  # every batch is told
    watcher = Watcher(tmp_path / "run")

    class Look(Callback):
        priority = 3000  # after the run has written
        def after_batch(self, epoch, batch_num):
            if epoch >= 1 and batch_num in (3, 5): assert watcher.look()

    small(Run(tmp_path / "run", checkpoint=False), Look()).train(3, 0.1)
    assert not watcher.look()
    watcher.end(False, "")
    assert told == [("earlier", 1), ("begin", "train", 8), ("update", 4), ("update", 6), ("row", 1), ("begin", "train", 8), ("update", 4),
                    ("update", 6), ("row", 2), ("end", False)]


def test_the_file_is_written_once_a_second_at_most_and_costs_no_weights(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(live, "write_json", lambda *args, **kwargs: written.append(args))
    start = time.monotonic()
    one = small(Run(tmp_path / "run", checkpoint=False, plots=False), count=300)
    one.train(3, 0.1)
    assert 1 <= len(written) <= time.monotonic() - start + 1
    other = small(count=300)
    other.train(3, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_progress_file_that_cannot_be_written_stops_no_training(tmp_path):
    class Spoil(Callback):
        def before_training(self, epoch):
            if not epoch: (tmp_path / "run/progress.json").mkdir()
    learn = small(Spoil(), Run(tmp_path / "run", checkpoint=False, plots=False))
    learn.train(2, 0.1)
    assert len(learn.history) == 2


def test_a_trial_and_a_pass_alone_write_no_progress(tmp_path):
    learn = small(Run(tmp_path / "run", checkpoint=False, plots=False))
    learn.train(1, 0.1)
    (tmp_path / "run/progress.json").unlink()
    learn.validate()
    with learn.trial() as copy: copy.train(1, 0.1)
    assert not (tmp_path / "run/progress.json").exists()


@pytest.mark.parametrize("text, words", [
    ('{"epoch": "many"}', "epoch is 'many'"), ('{"epoch": -1}', "epoch is -1"), ("[1]", "holds a list"), ("{", "is damaged"),
    ('{"epoch": 0, "epochs": 1, "batches": true, "total": 1}', "batches is True")])
def test_a_damaged_progress_file_is_named(tmp_path, text, words):
    path = tmp_path / "progress.json"
    path.write_text(text)
    with pytest.raises(RunError, match="progress.json") as raised: Moment.of(path)
    assert words in str(raised.value)


def test_a_loss_that_is_not_a_number_is_shown_as_it_is(tmp_path):
    view = ProgressFile(tmp_path / "progress.json", 0, 1)
    view.begin("train", 3)
    view.values = {"norm": float("inf")}
    view.update(1, float("nan"))
    found = Moment.of(tmp_path / "progress.json")
    assert str(found.loss) == "nan" and found.values == {"norm": float("inf")}


def test_no_control_characters_of_a_folder_reach_the_watcher(tmp_path):
    (tmp_path / "progress.json").write_text(json.dumps(
        {"epoch": 0, "epochs": 1, "batches": 0, "total": None, "phase": "\x1b[2J", "values": {"\x1b[2J": 1.0}}))
    found = Moment.of(tmp_path / "progress.json")
    assert "\x1b" not in found.phase + "".join(found.values)


def test_a_run_that_has_ended_is_shown_as_it_is(tmp_path, capsys):
    small(Run(tmp_path / "run", checkpoint=False, plots=False)).train(2, 0.1)
    capsys.readouterr()
    watch_run(tmp_path / "run")
    out = capsys.readouterr().out
    assert out.count("\n") == 4 and out.endswith("run: finished, 2 epochs\n")
    assert outcome(tmp_path / "run").endswith("finished, 2 epochs")


def test_only_the_process_that_trains_is_stopped(tmp_path, monkeypatch):
    run = tmp_path / "run"
    small(Run(run, checkpoint=False, plots=False)).train(1, 0.1)
    with pytest.raises(RunError, match="is not in training: it is finished"): stop_run(run)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with RunLock(run):  # held by this process, and the folder names another one
            write_json(run / "meta.json", {**RunFiles(run).meta, "pid": other.pid})
            with pytest.raises(RunError, match="nothing was stopped"): stop_run(run)
            assert other.poll() is None
            write_json(run / "meta.json", {**RunFiles(run).meta, "pid": "1; rm"})
            with pytest.raises(RunError, match="cannot be verified"): stop_run(run)
            received = []
            monkeypatch.setattr(signal, "pidfd_send_signal", lambda held, number: received.append(number))
            write_json(run / "meta.json", {**RunFiles(run).meta, "pid": os.getpid()})
            assert stop_run(run, patience=0.1) is False and received == [signal.SIGTERM]
    finally: other.kill(); other.wait()


@pytest.mark.parametrize(("every", "missing"), [(0.0, 0), (0.5, 1)])
def test_a_row_that_may_be_seen_late_has_no_time(tmp_path, capsys, every, missing):
    "The time between two looks is not that of an epoch."
    watcher = Watcher(tmp_path / "run", every=every)

    class Look(Callback):
        priority = 1_000_000

        def before_batch(self): watcher.look()
    small(Run(tmp_path / "run", plots=False), Look()).train(4, 0.1, test=False)
    watcher.look()
    watcher.end(False, "")
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head[-1] == "seconds" and len(rows) == 4
    assert [len(row) for row in rows] == [len(head) - missing] * 4
    assert time_of_row(60.0, watcher.view.late) == "60.0"
