"""Ranks as forks of this process, and the small learners that they train."""
import contextlib
import io
import os
import pickle
import signal
import time
from multiprocessing.connection import Pipe, wait

import pytest
import torch
import torch._dynamo
import torch.distributed.fsdp  # once here, and not in each fork
import torch.nn.functional as F
from torch import nn

from learner.base.hashing import hash_state
from learner.base.provenance import seed_everything
from learner.keep.ranks import OtherRankError, described
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.watch.metrics import Metrics

torch.set_num_threads(1)  # forks of a process with a pool of threads would wait for it
LONG = os.environ.get("LEARNER_LONG") == "1"
as_forks = [pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks"),
            pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:.*TypedStorage.*")]


def rank_of(function, rank, world, store, end):
    "What a rank does, in a fork: it sends what the function returns or raises, and ends."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LEARNER_STORE": f"file://{store}"}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out):
        try: kind, value = "value", function(rank)
        except OtherRankError as error: kind, value = "other", error.text
        except BaseException as error: kind, value = "error", described(error)
    end.send_bytes(pickle.dumps((kind, value, out.getvalue(), time.monotonic() - began)))
    os._exit(0)


def group(world, function, tmp_path, seconds=60):
    "Run a function in ranks; the kind and the value that each has sent: None for one that was killed."
    store, found, ends, processes = tmp_path / f"store {time.monotonic_ns()}", [None] * world, {}, []
    for rank in range(world):
        ours, theirs = Pipe(duplex=False)
        process = os.fork()
        if not process: rank_of(function, rank, world, store, theirs)
        theirs.close()
        processes.append(process)
        ends[ours] = rank
    until = time.monotonic() + seconds
    while ends and time.monotonic() < until:
        for end in wait(list(ends), 0.2):
            with contextlib.suppress(EOFError): found[ends[end]] = pickle.loads(end.recv_bytes())
            del ends[end]
    hung = list(ends.values())
    for process in processes:
        with contextlib.suppress(ProcessLookupError): os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert not hung, f"ranks {hung} hang"
    return found


def values(world, function, tmp_path, seconds=60):
    "What each rank has returned; an error of one is one of the test."
    found = group(world, function, tmp_path, seconds)
    assert all(each and each[0] == "value" for each in found), found
    return [each[1] for each in found]


def data(examples=46, batch_size=8, seed=1):
    torch.manual_seed(seed)
    images, labels = torch.randn(examples, 6), torch.randint(3, (examples,))
    return DataLoaders.from_tensors(train=(images, labels), validation=(images[:13], labels[:13]), batch_size=batch_size)


def make(*callbacks, seed=0, dropout=0.3, examples=46, batch_size=8, optimiser=torch.optim.AdamW, loaders=None):
    loaders = loaders or data(examples, batch_size)
    seed_everything(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return Learner(model, optimiser, F.cross_entropy, loaders, callbacks, device="cpu")


def metrics():
    import torchmetrics
    from torcheval.metrics import MulticlassAUROC, MulticlassF1Score
    return Metrics(f1=MulticlassF1Score(num_classes=3, average="macro"), auroc=MulticlassAUROC(num_classes=3),
                   accuracy=torchmetrics.Accuracy("multiclass", num_classes=3), own=lambda p, y: (p.argmax(1) == y).double().mean())


def outcome(learn):
    "All that has to be the same: a hash of weights and optimiser, and the history to the last bit."
    prints = learn.fingerprint()
    return prints["model"], prints["optimiser"], prints["rng"], hash_state({"rows": learn.history.rows, "steps": learn.history.steps})


class Counting(nn.Module):
    "Counts examples in a buffer."
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return x


class At(Callback):
    "Does something in one hook, epoch and batch."
    priority = 5
    watches = True

    def __init__(self, hook, do, rank=None, epoch=1, batch=2):
        self.place = {"epoch": epoch, "batch": batch}
        self.do, self.rank, self.done = do, rank, False
        setattr(self, hook, self.hook)

    def hook(self, learn):
        if self.done or (self.rank is not None and learn.ranks and learn.ranks.rank != self.rank): return
        if learn.phase == "train" and (len(learn.history), learn.batch_num) < (self.place["epoch"], self.place["batch"]): return
        self.done = True
        self.do()


def ctrl_c(): signal.raise_signal(signal.SIGINT)
