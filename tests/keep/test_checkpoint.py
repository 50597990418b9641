"""Checkpoints of a training: kills, full disks, damage, signals to processes; which stay, whose they are."""
import contextlib
import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from test_resume import BATCHES, EPOCHS, Fail, Press, StopAfter, differences, make, reference, seen, train, whole

from learner.base import files, store
from learner.base.files import FileError, FileLock
from learner.base.hashing import hash_state
from learner.base.provenance import kept_rng
from learner.base.store import DamagedError, list_checkpoints, load_state
from learner.keep import checkpoint
from learner.keep.checkpoint import Checkpoint, CheckpointError
from learner.loop.stages import Callback, CancelTrainException
from learner.steer.stopping import EarlyStopping, MonitorError

LONG = os.environ.get("LEARNER_LONG") == "1"


END = ".safetensors"


def names(folder):
    "What is in a folder, but for its index and its lock: checkpoints without their extension."
    return sorted(name.removesuffix(END) for name in os.listdir(folder) if name not in ("index.json", ".lock"))


def trained(folder, case="plain", epochs=EPOCHS, **options):
    "A learner that has trained with a Checkpoint."
    learn = make(case, Checkpoint(folder, **options))
    train(learn, epochs)
    return learn


def saved_by(learn): return next(callback for callback in learn.callbacks if isinstance(callback, Checkpoint))


# ---------------------------------------------------------------------------------------------------- saving changes nothing

@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 3, "every": None}, {"minutes": 0}, {"background": True, "steps": 2}], ids=str)
@pytest.mark.parametrize("case", ["own", "gan"])
def test_training_with_checkpoints_is_training_without(tmp_path, case, options):
    if case == "gan": options = {**options, "best": None}
    assert differences(trained(tmp_path / "run", case, **options), reference(case)) == []


@pytest.mark.parametrize("background", [False, True])
def test_every_checkpoint_of_a_run_is_gone_on_from_exactly(tmp_path, background):
    trained(tmp_path / "run", "own", steps=1, keep=None, background=background)
    found = names(tmp_path / "run")
    assert len(found) == EPOCHS * (BATCHES + 1)  # also before the validation
    for name in found if LONG else found[::4]:
        fresh = make("own", seed=9)
        train(fresh, resume=tmp_path / "run" / f"{name}{END}")
        assert differences(fresh, reference("own")) == []


# ---------------------------------------------------------------------------------------------------- kills

SERVER = """
import json, os, random, signal, sys, time
import torch
sys.path[:0] = [{tests!r}, *(f"{tests}/{{name}}" for name in ("base", "loop", "keep"))]
from test_checkpoint import *
from test_store import Points, child
os.chdir({folder!r})

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def go_on(folder, *callbacks, steps=1, background=False):
    learn = make("own", Checkpoint(folder, steps=steps, background=background), *callbacks, seed=9)
    there = Checkpoint.latest(folder)
    if there is None: learn = make("own", Checkpoint(folder, steps=steps, background=background), *callbacks)
    train(learn, resume=folder if there else None)
    return learn

def to_the_end(folder):
    def work():
        learn = go_on(folder)
        bad = differences(learn, wanted)
        if bad: print(folder, bad, file=sys.stderr)
        os._exit(bool(bad))
    return wait(child(work))

wanted = reference("own")
NAMES = [f"epoch-{{epoch:04}}" + (f"-batch-{{batch:05}}" if batch else "") for epoch in range(EPOCHS) for batch in range(BATCHES + 1)][1:] + [f"epoch-{{EPOCHS:04}}"]

class Tell(Callback):
    "Says which checkpoint is complete."
    priority = 4000
    def __init__(self, pipe, background): self.pipe, self.background = pipe, background
    def tell(self, learn):
        if not self.background: os.write(self.pipe, b"%3d" % NAMES.index(f"epoch-{{len(learn.history):04}}" + (f"-batch-{{learn.place.batch:05}}" if learn.place.batch else "")))
    def after_batch(self, learn): self.tell(learn)
    def after_epoch(self, learn): self.tell(learn)

def at_random(kills, background):
    killed, lives, folders = 0, 0, 0
    while killed < kills:
        folder = f"run{{folders}}"
        folders += 1
        while True:
            r, w = os.pipe()
            def work():
                os.close(r)
                learn = go_on(folder, Tell(w, background), background=background)
                os._exit(bool(differences(learn, wanted)))
            pid = child(work)
            os.close(w)
            time.sleep(random.random() * 0.7)
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            told = os.read(r, 10000)
            os.close(r)
            lives += 1
            assert code in (0, -9), code
            if code == 0: break
            killed += 1
            there = Checkpoint.latest(folder)
            if told and not background:
                last = int(told[-3:])
                assert NAMES.index(there.stem) in (last, last + 1), (there, NAMES[last])
            if killed >= kills: break
        assert to_the_end(folder) == 0, folder
        left = [name for name in os.listdir(folder) if name.endswith(".tmp")]
        assert not left, left
    return dict(killed=killed, lives=lives, folders=folders)

class SaveAt(Callback):
    "Saves after one batch over an older checkpoint, and is killed at an operation on the disk."
    priority = 4000
    def __init__(self, at): self.at = at
    def after_batch(self, learn, epoch, batch_num):
        if (epoch, batch_num) == (0, 3): learn.save("c")
        if (epoch, batch_num) != (1, 2): return
        points = Points(self.at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with points.watching(): learn.save("c")
        os._exit(0)

def over_an_old_one(every):
    old = new = 0
    for at in range(1, 1000, every):
        code = wait(child(lambda: train(make("own", SaveAt(at)))))
        if code == 0: break
        assert code == -9, code
        place = load_state("c")["loop"]["place"]
        old, new = old + (place == [0, "train", 4]), new + (place == [1, "train", 3])
        assert old + new == (at - 1) // every + 1, place
        def work():
            learn = make("own", seed=9)
            train(learn, resume="c")
            os._exit(bool(differences(learn, wanted)))
        assert wait(child(work)) == 0, at
        os.system("rm c .c.* 2> /dev/null")
    return dict(points=at - 1, old=old, new=new)

class KillSave(Callback):
    "Is killed at an operation on the disk of one save of Checkpoint, and of what it removes then."
    priority = 2999
    def __init__(self, at, epoch, batch): self.at, self.when = at, (epoch, batch)
    def after_batch(self, learn, epoch, batch_num):
        if (epoch, batch_num) == self.when:
            self.points = Points(self.at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            self.watching = self.points.watching()
            self.watching.__enter__()
    def before_batch(self, learn, epoch, batch_num):
        if hasattr(self, "points"): os._exit(0)

def of_a_checkpoint(every):
    "The fourth of those that are kept: an old one goes."
    points = 0
    for at in range(1, 1000, every):
        folder = f"killed{{at}}"
        def work(): train(make("own", Checkpoint(folder, steps=1), KillSave(at, 0, 5)))
        code = wait(child(work))
        if code == 0: break
        assert code == -9, code
        there = Checkpoint.latest(folder)
        assert there.stem in ("epoch-0000-batch-00005", "epoch-0000-batch-00006"), there
        assert len(list_checkpoints(folder)) >= 3
        assert to_the_end(folder) == 0, at
        left = [name for name in os.listdir(folder) if name.endswith(".tmp")]
        assert not left, left
        points += 1
    return dict(points=points, last=at)

print(json.dumps({call}))
"""


def serve(tmp_path, call):
    "Runs in a process that forks those to be killed, so that torch is loaded once."
    script = SERVER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_killed_at_random_moments_training_goes_on_exactly(tmp_path, background):
    kills = 200 if LONG else 14 if not background else 6
    found = serve(tmp_path, f"at_random({kills}, {background})")
    assert found["killed"] == kills


@needs_fork
def test_killed_at_every_point_of_a_save_over_an_old_one(tmp_path):
    found = serve(tmp_path, f"over_an_old_one({1 if LONG else 3})")
    assert found["points"] > 15 and found["old"] > 2 and found["new"] > 0


@needs_fork
def test_killed_at_every_point_of_a_checkpoint_that_pushes_out_an_old_one(tmp_path):
    found = serve(tmp_path, f"of_a_checkpoint({1 if LONG else 4})")
    assert found["last"] > 25 and found["points"] > (25 if LONG else 6)


# ---------------------------------------------------------------------------------------------------- signals to processes

SCRIPT = """
import os, sys, time
sys.modules["tabulate"] = None  # torch._dynamo imports it at exit, and Python then forgets that an interrupt ended it
sys.path[:0] = [{tests!r}, *(f"{tests}/{{name}}" for name in ("base", "loop", "keep"))]
from test_checkpoint import *
learn = make("own", Checkpoint({folder!r}))
@learn.on("after_loss")
def here(epoch, batch_num):
    if (epoch, batch_num) != (1, 3) or learn.phase != "train": return
    print(os.getpid(), flush=True)
    for _ in range(600):
        if learn.cursor.signals.noted: return
        time.sleep(0.05)
train(learn)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_a_process_saves_at_the_next_batch(tmp_path, number, status):
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "run"))
    shell = subprocess.Popen(["sh", "-c", '"$0" -c "$1"; echo status $?', sys.executable, script],  # tells the status as people see it
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(int(shell.stdout.readline()), number)
    out, err = shell.communicate(timeout=120)
    assert out == f"status {status}\n", (out, err[-2000:])
    assert ("KeyboardInterrupt: stopped after epoch 1, batch 3; train(resume=True) goes on from there" in err) == (number == signal.SIGINT)
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0001-batch-00004"
    fresh = make("own", Checkpoint(tmp_path / "run"), seed=9)
    train(fresh, resume=tmp_path / "run")
    assert differences(fresh, reference("own")) == []


# ---------------------------------------------------------------------------------------------------- interrupts and errors here

@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("hook", "name"), [("before_loss", "epoch-0001-batch-00003"), ("after_epoch", "epoch-0002-batch-00001")])
def test_a_stop_saves_at_the_boundary(tmp_path, hook, name, number, background):
    learn = make("own", Checkpoint(tmp_path / "run", background=background), Press(hook, number=number))
    with pytest.raises((KeyboardInterrupt, SystemExit)): train(learn)
    assert Checkpoint.latest(tmp_path / "run").stem == name
    fresh = make("own", Checkpoint(tmp_path / "run"), seed=9)
    train(fresh, resume=tmp_path / "run")
    assert differences(fresh, reference("own")) == []


def test_a_second_press_does_not_save(tmp_path):
    learn = make("plain", Checkpoint(tmp_path / "run"), Press("before_loss", times=2))
    with pytest.raises(KeyboardInterrupt, match="stopped at once"): train(learn)
    assert names(tmp_path / "run") == ["epoch-0001"]


def test_an_error_leaves_the_last_checkpoint(tmp_path):
    learn = make("own", Checkpoint(tmp_path / "run", steps=3), Fail("after_backward", 14))
    with pytest.raises(RuntimeError): train(learn)
    assert whole(learn) and Checkpoint.latest(tmp_path / "run").stem == "epoch-0001-batch-00003"
    fresh = make("own", Checkpoint(tmp_path / "run", steps=3), seed=9)
    train(fresh, resume=tmp_path / "run")
    assert differences(fresh, reference("own")) == []


def test_where_early_stopping_has_ended_training_there_is_nothing_more_to_do(tmp_path):
    def learner(seed=0): return make("plain", EarlyStopping(patience=1, min_delta=100.0), Checkpoint(tmp_path / "run"), seed=seed)
    learn = learner()
    train(learn, 9)
    assert len(learn.history) == 2
    fresh = learner(9)
    train(fresh, 9, resume=tmp_path / "run")
    assert len(fresh.history) == 2 and seen(fresh)[0].shape[0] == 4 and len(seen(fresh)) == 4  # the test alone
    assert hash_state({"m": fresh.model.state_dict()}) == hash_state({"m": learn.model.state_dict()})


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("keep", "left"), [(1, []), (3, ["epoch-0002"])])
def test_the_best_file_keeps_its_epoch_where_early_stopping_puts_other_weights_back(tmp_path, keep, left, background):
    def learner(seed=0):
        stopping = EarlyStopping(patience=2, min_delta=100.0, restore_best=True)
        return make("plain", stopping, Checkpoint(tmp_path / "run", keep=keep, background=background), seed=seed)
    learn = learner()
    train(learn, 9)
    losses = learn.history["validation_loss"]
    assert len(losses) == 3 and min(losses) == losses[2]  # the best, though not by as much as stopping asks for
    assert names(tmp_path / "run") == [*left, "epoch-0003", "epoch-0003-end"]
    best = learner()
    best.load(Checkpoint.best(tmp_path / "run"))
    assert Checkpoint.best(tmp_path / "run").stem == "epoch-0003" and best.validate()["validation_loss"] == losses[2]
    assert learn.validate()["validation_loss"] == losses[0]
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0003-end"
    fresh = learner(9)
    train(fresh, 9, resume=tmp_path / "run")  # there is nothing more to do
    assert hash_state({"m": fresh.model.state_dict()}) == hash_state({"m": learn.model.state_dict()}) and len(fresh.history) == 3


def test_a_training_that_a_callback_has_ended_goes_on_when_more_epochs_are_asked_for(tmp_path):
    def ends(learn, epoch):
        if epoch == 1: raise CancelTrainException
    learn = make("plain", Checkpoint(tmp_path / "run", steps=1, keep=None))
    learn.on("after_epoch", ends)
    train(learn, 2)
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0002-end"
    fresh = make("plain", Checkpoint(tmp_path / "run", steps=1, keep=None), seed=9)
    train(fresh, EPOCHS, resume=tmp_path / "run")
    assert Checkpoint.latest(tmp_path / "run").stem == f"epoch-{EPOCHS:04}" and len(fresh.history) == EPOCHS


def improving(folder, monitor):
    "A training in which one score gets worse and the other better, judged by one of them."
    better, worse = Value(*map(float, range(9)), name="good"), Value(*map(float, range(9)), name="bad")
    mode = {"good": "max", "bad": "min"}[monitor]
    stopping = EarlyStopping(monitor, patience=1, mode=mode, restore_best=True)
    return make("plain", better, worse, stopping, Checkpoint(folder, best=monitor, mode=mode))


def test_a_callback_that_judges_by_another_column_starts_over_with_a_warning(tmp_path):
    learn = improving(tmp_path / "run", "bad")
    train(learn, 1)
    assert json.loads((tmp_path / "run" / "index.json").read_text())["value"] == 0.0
    fresh = improving(tmp_path / "run", "good")
    with pytest.warns(UserWarning) as told: train(fresh, 5, resume=tmp_path / "run")
    messages = sorted(str(warning.message) for warning in told)
    by = "the resumed training monitored bad (mode=\"min\"), and this callback monitors good (mode=\"max\"); it starts over, without the best value so far"
    assert messages == [f"Checkpoint('{tmp_path / 'run'}'): {by}", f"EarlyStopping: {by}"]
    assert len(fresh.history) == 5  # each epoch is better than the one before
    index = json.loads((tmp_path / "run" / "index.json").read_text())
    assert (index["checkpoint"], index["monitor"], index["value"], index["mode"]) == ("epoch-0005.safetensors", "good", 4.0, "max")


def test_a_callback_that_judges_by_the_same_column_goes_on_with_its_count(tmp_path):
    learn = improving(tmp_path / "run", "bad")
    train(learn, 1)
    fresh = improving(tmp_path / "run", "bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(fresh, 5, resume=tmp_path / "run")
    assert len(fresh.history) == 2 and Checkpoint.best(tmp_path / "run").stem == "epoch-0001"


# ---------------------------------------------------------------------------------------------------- disks

@contextlib.contextmanager
def small_files(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_in_training_keeps_the_old_ones_and_the_learner(tmp_path, background):
    learn = make("own", Checkpoint(tmp_path / "run", steps=4, background=background))
    stop = learn.on("after_batch", lambda epoch, batch_num: limit.enter_context(small_files(1000)) if (epoch, batch_num) == (1, 1) else None)
    with contextlib.ExitStack() as limit, pytest.raises(OSError) as caught: train(learn)
    assert caught.value.errno == errno.EFBIG and "what was saved before is kept" in str(caught.value)
    last = ("epoch-0001", "epoch-0000-batch-00008") if background else ("epoch-0001",)  # the thread may have met the limit one earlier
    assert whole(learn) and Checkpoint.latest(tmp_path / "run").stem in last
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")]
    learn.remove(stop)
    learn.train(resume=True)
    assert differences(learn, reference("own")) == []
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0003"


def test_a_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        learn = make("own", Checkpoint(disk / "run", steps=1, keep=None))
        with pytest.raises(OSError, match="No space left on device"): train(learn)
        assert whole(learn)
        there = Checkpoint.latest(disk / "run")
        fresh = make("own", seed=9)
        train(fresh, resume=there)
        assert differences(fresh, reference("own")) == []
    finally: subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file")
    def refused(kind, folder):
        learn = make("plain", Checkpoint(folder))
        with pytest.raises(kind, match="no checkpoint can be written there: '.*run'"): train(learn)
        assert whole(learn) and not seen(learn)  # before the first batch
    refused(NotADirectoryError, tmp_path / "run")
    refused(NotADirectoryError, tmp_path / "run" / "run")
    assert (tmp_path / "run").read_text() == "a file"
    refused(OSError, Path("/proc/run"))  # also for root
    if not os.geteuid(): return
    (tmp_path / "fixed").mkdir(mode=0o555)
    refused(PermissionError, tmp_path / "fixed" / "run")


def test_an_error_in_the_thread_comes_out_at_the_next_checkpoint_or_at_the_end(tmp_path, monkeypatch):
    for when in (2, EPOCHS):
        calls = []

        def fail(path, state, calls=calls, when=when):
            calls.append(path)
            if len(calls) == when: raise OSError(errno.EIO, "Input/output error")
            store.save_state(path, state)
        monkeypatch.setattr(checkpoint, "save_state", fail)
        learn = make("plain", Checkpoint(tmp_path / f"run{when}", background=True))
        with pytest.raises(OSError, match="Input/output error"): train(learn)
        assert whole(learn) and len(learn.history) == EPOCHS and len(calls) == when


# ---------------------------------------------------------------------------------------------------- damage

@pytest.fixture
def three(tmp_path):
    "Three checkpoints, and the newest to be damaged."
    trained(tmp_path / "run", steps=5, every=None, best=None)
    assert names(tmp_path / "run") == ["epoch-0001-batch-00002", "epoch-0001-batch-00007", "epoch-0002-batch-00004"]
    return tmp_path / "run"


def falls_back(folder):
    message = r"epoch-0002-batch-00004.safetensors is .*; the checkpoint before it is used$"
    with pytest.warns(UserWarning, match=message) as told: found = Checkpoint.latest(folder)
    return found.stem == "epoch-0001-batch-00007" and len(told) == 1


def test_truncation_at_every_kilobyte_is_found(three):
    file = three / "epoch-0002-batch-00004.safetensors"
    content = file.read_bytes()
    for end in [*range(0, len(content), 1024), len(content) - 1]:
        file.write_bytes(content[:end])
        assert falls_back(three)
    file.write_bytes(content)
    assert Checkpoint.latest(three) == file


def test_single_flipped_bits_are_found(three):
    draw = random.Random(0)
    file = three / "epoch-0002-batch-00004.safetensors"
    content = file.read_bytes()
    for bit in [draw.randrange(len(content) * 8) for _ in range(10_000 if LONG else 200)]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        assert falls_back(three)


@pytest.mark.parametrize("trap", ["empty", "half", "a link to the one before", "a link that leads nowhere", "a folder", "a pipe"])
def test_training_goes_on_from_the_one_before_with_a_warning(three, trap):
    file = three / "epoch-0002-batch-00004.safetensors"
    content = file.read_bytes()
    file.unlink()
    match trap:
        case "empty": file.touch()
        case "half": file.write_bytes(content[: len(content) // 2])
        case "a link to the one before": file.symlink_to("epoch-0001-batch-00007.safetensors")
        case "a link that leads nowhere": file.symlink_to("nowhere")
        case "a folder": file.mkdir()
        case "a pipe": os.mkfifo(file)
    fresh = make("plain", seed=9)
    with pytest.warns(UserWarning, match=r"epoch-0002-batch-00004.safetensors is .*; the checkpoint before it is used") as told: train(fresh, resume=three)
    assert len(told) == 1 and differences(fresh, reference("plain")) == []
    with pytest.raises(DamagedError, match="epoch-0002-batch-00004.safetensors is"): train(make("plain"), resume=file)


def test_a_link_in_place_of_a_checkpoint_is_not_written_through(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / "epoch-0001.safetensors").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError), pytest.warns(UserWarning, match="epoch-0001.safetensors is a link"): train(make("plain", Checkpoint(tmp_path / "run")))
    for name in ("index.json", ".lock"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "precious")
        with pytest.raises(FileError, match=f"{name} is a link"): train(make("plain", Checkpoint(folder)))
        assert (folder / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_with_nothing_whole_is_an_error(three):
    for path in list_checkpoints(three): path.write_text("{}")
    learn = make("plain")
    with pytest.warns(UserWarning) as told, pytest.raises(DamagedError, match="run holds no intact checkpoint"): train(learn, resume=three)
    assert len(told) == 3 and len(learn.history) == 0 and whole(learn)
    with pytest.warns(UserWarning): assert Checkpoint.latest(three) is None
    assert Checkpoint.latest(three.parent / "nothing") is None and Checkpoint.best(three.parent / "nothing") is None
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*rum"): train(learn, resume=three.parent / "rum")


def test_a_lost_index_loses_the_best_and_nothing_else(tmp_path):
    learn = trained(tmp_path / "run")
    index = json.loads((tmp_path / "run" / "index.json").read_text())
    assert Checkpoint.best(tmp_path / "run").name == index["checkpoint"]
    for text in ("", "[]", "{", "null"):
        (tmp_path / "run" / "index.json").write_text(text)
        assert Checkpoint.best(tmp_path / "run") is None and Checkpoint.latest(tmp_path / "run").stem == "epoch-0003"
        with pytest.raises(CheckpointError, match="checkpoints of an unknown training, since index.json is lost, up to"): train(make("plain", Checkpoint(tmp_path / "run")))
    (tmp_path / "run" / "index.json").unlink()
    fresh = make("plain", Checkpoint(tmp_path / "run"), seed=9)
    fresh.on("before_epoch", lambda: seen.append(json.loads((tmp_path / "run" / "index.json").read_text())))
    seen = []
    train(fresh, 4, resume=tmp_path / "run")  # the checkpoint that it goes on from tells whose they are, and the best
    assert seen == [index] and Checkpoint.best(tmp_path / "run") is not None and whole(learn)


def test_a_lost_index_does_not_let_another_training_in(tmp_path):
    trained(tmp_path / "run")
    trained(tmp_path / "other")
    (tmp_path / "run" / "index.json").unlink()
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(CheckpointError, match="is lost"): train(make("plain", Checkpoint(tmp_path / "run")), 4, resume=tmp_path / "other")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


# ---------------------------------------------------------------------------------------------------- which stay, and whose they are

class Value(Callback):
    "Logs values, one an epoch."
    priority = -500

    def __init__(self, *values, name="score"): self.values, self.name = values, name

    def after_training(self, learn): learn.log(**{self.name: self.values[len(learn.history)]})


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 5]), (2, [2, 4, 5]), (3, [2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_newest_stay_and_the_best(tmp_path, keep, left):
    learn = make("plain", Value(3.0, 1.0, 2.0, 5.0, 4.0), Checkpoint(tmp_path / "run", keep=keep, best="score", mode="min"))
    train(learn, 5)
    assert names(tmp_path / "run") == [f"epoch-{number:04}" for number in left]
    assert Checkpoint.best(tmp_path / "run").stem == "epoch-0002" and Checkpoint.latest(tmp_path / "run").stem == "epoch-0005"
    assert json.loads((tmp_path / "run" / "index.json").read_text()) == {
        "training": saved_by(learn).training, "checkpoint": "epoch-0002.safetensors", "monitor": "score", "value": 1.0, "mode": "min"}


@pytest.mark.parametrize(("mode", "values", "best"), [
    ("min", (3.0, 1.0, 2.0), 2), ("max", (3.0, 1.0, 2.0), 1), ("min", (math.nan, 2.0, math.nan), 2), ("max", (1.0, 1.0, 1.0), 1), ("min", (math.inf, 5.0, 5.0), 2)])
def test_the_best_by_mode(tmp_path, mode, values, best):
    train(make("plain", Value(*values), Checkpoint(tmp_path / "run", best="score", mode=mode)))
    assert Checkpoint.best(tmp_path / "run").stem == f"epoch-{best:04}"


def test_the_mode_is_told_by_the_name(tmp_path):
    train(make("own", Checkpoint(tmp_path / "a", best="validation_accuracy"), Checkpoint(tmp_path / "l")))
    a, b = (json.loads((tmp_path / name / "index.json").read_text()) for name in "al")
    assert (a["mode"], b["mode"]) == ("max", "min")


def test_the_best_one_that_is_damaged_is_an_error(tmp_path):
    trained(tmp_path / "run")
    best = Checkpoint.best(tmp_path / "run")
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(DamagedError): Checkpoint.best(tmp_path / "run")


def test_another_trainings_folder_is_refused_before_anything_happens(tmp_path):
    learn = trained(tmp_path / "run")
    before = sorted(map(str, tmp_path.rglob("*")))
    other = make("plain", Checkpoint(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"run holds checkpoints of another training, up to epoch-0003; continue it with train\(resume='.*run'\), or use another folder"):
        train(other)
    assert sorted(map(str, tmp_path.rglob("*"))) == before and len(other.history) == 0 and whole(other)
    learn.train(1)  # the one whose they are may
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0004"


@pytest.mark.parametrize("stop", [None, 5])
def test_a_second_learner_with_the_same_callback_is_refused_before_anything_happens(tmp_path, stop):
    saver = Checkpoint(tmp_path / "run", steps=4)
    first = make("plain", saver)
    if stop: first.add(StopAfter(stop))
    with contextlib.suppress(KeyboardInterrupt): train(first)
    assert bool(len(first.history)) == (stop is None)
    before = sorted(map(str, tmp_path.rglob("*")))
    second = make("plain", saver)
    with pytest.raises(CheckpointError, match=r"that this learner has not continued, up to epoch-000.*train\(resume='.*run'\), or use another folder"): train(second)
    assert sorted(map(str, tmp_path.rglob("*"))) == before and len(second.history) == 0 and whole(second)
    train(second, resume=tmp_path / "run")  # that is no mixing
    assert differences(second, reference("plain")) == []


def test_a_process_that_goes_to_another_folder_saves_in_the_same(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    learn = make("plain", Checkpoint("run"))
    learn.on("after_epoch", lambda epoch: os.chdir("elsewhere") if epoch == 0 else None)
    train(learn)
    assert names(tmp_path / "run") == ["epoch-0001", "epoch-0002", "epoch-0003"] and os.listdir(tmp_path / "elsewhere") == []
    assert repr(saved_by(learn)) == "Checkpoint('run')"


def test_a_future_that_did_not_happen_goes(tmp_path):
    trained(tmp_path / "run", epochs=5, keep=None, best=None, steps=3)
    before = names(tmp_path / "run")
    fresh = make("plain", Checkpoint(tmp_path / "run", keep=None, best=None, steps=3, every=None), seed=9)
    stop = StopAfter(2 * BATCHES + 4)
    fresh.add(stop)
    with pytest.raises(KeyboardInterrupt): train(fresh, 5, resume=tmp_path / "run" / "epoch-0002.safetensors")
    left = names(tmp_path / "run")
    assert "epoch-0002" in left and left[-1].startswith("epoch-0002-batch-0000") and len(left) < len(before)


def test_an_older_checkpoint_is_gone_on_from_exactly(tmp_path):
    trained(tmp_path / "run", "own", keep=None)
    fresh = make("own", Checkpoint(tmp_path / "run", keep=None), seed=9)
    train(fresh, resume=tmp_path / "run" / "epoch-0001.safetensors")
    assert differences(fresh, reference("own")) == [] and names(tmp_path / "run") == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_a_folder_has_one_training_at_a_time_in_every_order_of_starting(tmp_path):
    folder = tmp_path / "run"
    refusals = []
    def begin_another(learn):
        with kept_rng(): others = make("plain", Checkpoint(folder)), make("plain", saved_by(learn))
        for other in others:
            before = sorted(map(str, tmp_path.rglob("*")))
            with kept_rng(), pytest.raises(CheckpointError) as caught: train(other)
            refusals.append(str(caught.value))
            assert sorted(map(str, tmp_path.rglob("*"))) == before and len(other.history) == 0
    first = make("plain", Checkpoint(folder))
    first.on("before_epoch", begin_another)  # the first time there is nothing yet but the lock
    train(first)
    assert len(refusals) == 2 * EPOCHS and "run is in use by another training; wait until it ends, or use another folder" in refusals[0]
    assert differences(first, reference("plain")) == [] and names(folder) == ["epoch-0001", "epoch-0002", "epoch-0003"]
    with FileLock(folder / ".lock"): pass  # it is free again


@pytest.mark.parametrize("hook", ["before_train", "after_loss", "cleanup_train"])
def test_the_folder_is_free_after_whatever_ended_training(tmp_path, hook):
    learn = make("plain", Checkpoint(tmp_path / "run"), Fail(hook, 1))
    with pytest.raises(RuntimeError): train(learn)
    with FileLock(tmp_path / "run" / ".lock"): pass


def test_a_writer_in_the_background_does_not_outlive_training(tmp_path, monkeypatch):
    "Not even if Ctrl-C comes while training waits for it."
    import threading
    slow, joins, join = store.save_state, [], threading.Thread.join
    monkeypatch.setattr(checkpoint, "save_state", lambda path, state: (time.sleep(0.3), slow(path, state)))
    def interrupted(self, timeout=None):
        joins.append(self.name)
        if self.name == "checkpoint" and joins.count("checkpoint") == 1: raise KeyboardInterrupt
        join(self, timeout)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    learn = make("plain", Checkpoint(tmp_path / "run", background=True))
    with pytest.raises(KeyboardInterrupt): train(learn, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert Checkpoint.latest(tmp_path / "run").stem == "epoch-0001"


FILES = {module.__file__ for module in (files, store)}


def lines_of(call, press):
    "Press Ctrl-C at the line with that number of those that a call runs in the rooms of files; how many it ran."
    ran = 0

    def trace(frame, event, argument):
        nonlocal ran
        if frame.f_code.co_filename not in FILES: return None
        ran += event == "line"
        if event == "line" and ran == press: signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try: call()
    finally: sys.settrace(None)
    return ran


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_second_press_in_a_save_lets_it_come_to_its_end_and_leaves_no_descriptor(tmp_path):
    def saved(where):
        "How many lines the save runs after which training stops; in that of this number Ctrl-C is pressed again."
        folder = tmp_path / f"save {len(names(tmp_path))}"
        learn, ran, saver = make("plain"), [0], Checkpoint(folder, steps=1, best=None)
        learn.add(saver, Press("before_loss", n=2))
        write, before = saver._write, len(os.listdir("/proc/self/fd"))
        saver._write = lambda *arguments: ran.append(lines_of(lambda: write(*arguments), where if learn.cursor.signals.noted else 0))
        with pytest.raises(KeyboardInterrupt) as caught: train(learn)
        pressed = 0 < where <= ran[-1]
        assert str(caught.value).startswith("stopped at once, when the file was written" if pressed else "stopped after")
        assert len(os.listdir("/proc/self/fd")) == before and whole(learn)
        assert names(folder) == ["epoch-0000-batch-00001", "epoch-0000-batch-00002"]
        assert learn.place == (0, "train", 2)
        return ran[-1]
    assert saved(0) > 200
    where = 1
    while where <= saved(where): where += 1 if LONG else 30  # up to the last line, whose number differs a little from save to save
    assert where > 200


def test_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "monotonic", lambda: now[0])
    learn = make("plain", Checkpoint(tmp_path / "run", every=None, minutes=10, best=None))
    learn.on("before_batch", lambda: now.__setitem__(0, now[0] + 130.0))  # five batches take 650 s
    train(learn, 1)
    assert names(tmp_path / "run") == ["epoch-0000-batch-00005"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"every": "step"}, 'Checkpoint: every is \'step\'; it must be "epoch" or None; pass steps=100 or minutes=10 to save more often'),
    ({"every": None}, "Checkpoint saves nothing with every=None; pass steps or minutes"),
    ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
    ({"minutes": -1}, "minutes is -1; it must be a finite number of at least 0"),
    ({"keep": 0}, "keep is 0; it must be a whole number of at least 1"),
    ({"best": "score"}, "Checkpoint: whether score is good when low or when high cannot be told from its name; pass mode"),
    ({"mode": "low"}, "Checkpoint: mode is 'low'; it must be \"min\" if low is good, \"max\" if high is"),
])
def test_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError) as caught: Checkpoint(tmp_path / "run", **arguments)
    assert str(caught.value).startswith(message)


def test_a_best_that_is_never_measured_is_told(tmp_path):
    with pytest.raises(MonitorError): train(make("plain", Checkpoint(tmp_path / "run", best="validation_auroc", mode="max")))


def test_without_validation_data_there_is_no_best(tmp_path):
    learn = make("plain", Checkpoint(tmp_path / "run"))
    learn.dataloaders = {"train": learn.dataloaders["train"]}
    train(learn)
    assert Checkpoint.best(tmp_path / "run") is None and Checkpoint.latest(tmp_path / "run").stem == "epoch-0003"


def test_background_saves_are_of_their_moment(tmp_path, monkeypatch):
    slow = store.save_state
    monkeypatch.setattr(checkpoint, "save_state", lambda path, state: (time.sleep(0.02), slow(path, state)))
    trained(tmp_path / "run", "own", steps=1, keep=None, background=True)
    monkeypatch.undo()
    trained(tmp_path / "other", "own", steps=1, keep=None)
    assert names(tmp_path / "run") == names(tmp_path / "other")
    for name in names(tmp_path / "run"):
        one, other = (load_state(tmp_path / folder / f"{name}{END}") for folder in ("run", "other"))
        for state in (one, other): state["callbacks"]["Checkpoint"]["training"] = ""
        assert hash_state(one) == hash_state(other)


def test_what_a_killed_save_has_left_goes_when_training_goes_on_and_a_save_under_way_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    train(make("plain", Checkpoint(folder)))
    for name in ("epoch-0001-batch-00002.safetensors", "index.json"): (folder / f".{name}.0123456789abcdef.tmp").write_text("half")  # the first is never saved to again
    others = {".mine.tmp", ".mine", "notes.txt"}
    for name in others: (folder / name).touch()
    with store.replacing(folder / "epoch-0009.safetensors"):
        under_way = {name for name in os.listdir(folder) if name.startswith(".epoch-0009")}
        train(make("plain", Checkpoint(folder), seed=9), EPOCHS + 1, resume=folder)
        assert under_way <= set(os.listdir(folder))
        left = {name for name in os.listdir(folder) if name.endswith(".tmp")}
        assert left == {".mine.tmp", *under_way}
    assert others <= set(os.listdir(folder))
