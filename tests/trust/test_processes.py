"""Two processes, one folder of checkpoints: the second is refused in one line before its first batch, whoever begins anew and whoever goes on."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys, time
from pathlib import Path
import torch
from learner.keep.checkpoint import Checkpoint
from learner.loop.learner import Learner

home, way, waits = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "waits"
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
data = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))] * 3
learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.functional.cross_entropy, {"train": data}, Checkpoint(home / "run"), "cpu")
def hold(learn):
    print("a batch", flush=True)
    while waits and not (home / "go on").exists(): time.sleep(0.01)
learn.on("before_batch", hold)
epochs = 2 if way == "new" else 4
try: learn.train(epochs, resume=None if way == "new" else home / "run")
except Exception as error: print(f"{type(error).__name__}: {error}")
else: print("trained", len(learn.history))
"""


def started(home, way, how="goes"):
    return subprocess.Popen([sys.executable, "-c", CODE, str(home), way, how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


def listed(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.parametrize(("first", "second"), [
    pytest.param("new", "new", marks=pytest.mark.long), pytest.param("new", "resume", marks=pytest.mark.long),
    pytest.param("resume", "new", marks=pytest.mark.long), ("resume", "resume")])
def test_the_second_process_is_refused_before_its_first_batch(tmp_path, first, second):
    if "resume" in (first, second):
        text, _ = started(tmp_path, "new").communicate(timeout=100)
        assert text.endswith("trained 2\n"), text
    if (first, second) == ("new", "resume"): return refuses_what_is_there(tmp_path)
    one = started(tmp_path, first, "waits")
    assert one.stdout.readline() == "a batch\n"
    before = listed(tmp_path / "run")
    text, _ = started(tmp_path, second).communicate(timeout=100)
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("CheckpointError: ") and "a batch" not in text, text
    if second == "resume" or not before: assert "is in use by another training; wait until it ends, or use another folder" in text
    assert listed(tmp_path / "run") == before
    (tmp_path / "go on").touch()
    text, _ = one.communicate(timeout=100)
    assert text.endswith(f"trained {4 if first == 'resume' else 2}\n"), text
    if second != "resume": return
    text, _ = started(tmp_path, "resume").communicate(timeout=100)  # now it is free
    assert text.endswith("trained 4\n"), text


def refuses_what_is_there(home):
    "A new training does not begin in a folder that has checkpoints, so nobody can go on there beside it."
    text, _ = started(home, "new").communicate(timeout=100)
    assert text.startswith("CheckpointError: ") and len(text.splitlines()) == 1 and "a batch" not in text
    text, _ = started(home, "resume").communicate(timeout=100)
    assert text.endswith("trained 4\n"), text


def test_of_two_that_start_at_the_same_time_one_trains(tmp_path):
    both = [started(tmp_path, "new", "waits") for _ in range(2)]
    deadline = time.monotonic() + 100
    while not any(each.poll() is not None for each in both) and time.monotonic() < deadline: time.sleep(0.05)
    (tmp_path / "go on").touch()
    texts = sorted(each.communicate(timeout=100)[0] for each in both)
    assert texts[0].startswith("CheckpointError: ") and "is in use by another training" in texts[0], texts
    assert texts[1].endswith("trained 2\n") and "Error" not in texts[1], texts
