"Ctrl-C in a terminal reaches a loader's workers too: training goes on after it, and the notice comes once."
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import product
from textwrap import dedent
from threading import Thread

import pytest

pty = pytest.importorskip("pty", reason="needs terminals and process groups, which Windows has not")

SCRIPT = '''
import os, signal, sys, threading, time
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from learner import Learner
from learner.base.hashing import hash_state

class Slow(Dataset):
    def __len__(self): return 32
    def __getitem__(self, i):
        time.sleep(0.02)
        return torch.full((3,), i / 32), torch.ones(1)

def press(times):
    for _ in range(times):
        os.killpg(os.getpgrp(), signal.SIGINT)
        time.sleep(0.2)

def learner(how, persistent):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    loader = DataLoader(Slow(), batch_size=4, num_workers=2, persistent_workers=persistent, multiprocessing_context=how)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss, {"train": loader}, device="cpu")

def main(how, persistent, moment, times):
    torch.set_num_threads(1)
    learn, seen = learner(how, persistent), []
    def hook():
        seen.append(1)
        if len(seen) != 10: return
        if moment == "hook": press(times)
        else: threading.Timer(0.03, press, [times]).start()  # while the loader is waited for
    learn.on("after_batch", hook)
    try: learn.train(3)
    except KeyboardInterrupt as error: print("stopped", type(error).__name__, flush=True)
    if moment != "hook": time.sleep(0.3 * times)
    learn.train(3, resume=True)
    print("rows", len(learn.history), hash_state(learn.model.state_dict()), flush=True)
    learn.train(1)
    print("again", len(learn.history), flush=True)

if __name__ == "__main__":
    how, persistent, moment, times = sys.argv[1:]
    main(how, persistent == "persistent", moment, int(times))
'''

EXACT = '''
from interrupted import learner
from learner.base.hashing import hash_state
if __name__ == "__main__":
    learn = learner(None, False)
    learn.train(3)
    print(hash_state(learn.model.state_dict()))
'''

def read_all(descriptor, into):
    "What comes from a terminal until its last process has gone."
    with suppress(OSError):
        while said := os.read(descriptor, 4096): into.append(said)
    os.close(descriptor)

def run(folder, script, *words):
    "Run a script at a terminal of its own: its exit status, the lines of its output, and what the terminal showed."
    (folder / "interrupted.py").write_text(dedent(SCRIPT))
    (folder / "exact.py").write_text(dedent(EXACT))
    ours, terminal = pty.openpty()
    handlers = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  may be ignored here
    child = subprocess.Popen([sys.executable, script, *words], cwd=folder, start_new_session=True, text=True,
                             stdout=subprocess.PIPE, stderr=terminal, preexec_fn=handlers)
    os.close(terminal)
    shown: list[bytes] = []
    reader = Thread(target=read_all, args=(ours, shown), daemon=True)
    reader.start()
    try: out, _ = child.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail(f"no answer in 100 s: {child.communicate()[0][-300:]} {b''.join(shown)[-2000:]!r}")
    reader.join(10)
    return child.returncode, out.splitlines(), b"".join(shown).decode()

@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    code, out, err = run(tmp_path_factory.mktemp("exact"), "exact.py")
    assert code == 0, err
    return out[-1]

SHORT = {("fork", "persistent", "hook"), ("fork", "renewed", "loading"), ("spawn", "persistent", "hook")}
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in SHORT else pytest.mark.long)
    for case in product(("fork", "spawn", "forkserver"), ("persistent", "renewed"), ("hook", "loading"))
]

@pytest.mark.parametrize(("how", "persistent", "moment"), CASES)
def test_training_goes_on_after_an_interrupt_that_its_workers_got_too(how, persistent, moment, tmp_path, exact):
    code, out, err = run(tmp_path, "interrupted.py", how, persistent, moment, "1")
    assert code == 0, err[-3000:]
    assert out[0] == "stopped KeyboardInterrupt", err[-3000:]
    assert out[1] == f"rows 3 {exact}", err[-3000:]
    assert out[2] == "again 4"
    assert err.count("stopping after this batch") == 1, err
