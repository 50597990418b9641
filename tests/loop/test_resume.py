"""Stopping anywhere and going on: exact after every batch, interrupt and error; what a state must hold; memory."""
import contextlib
import functools
import gc
import math
import os
import pickle
import random
import signal
import sys
import threading
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset

from learner.base.hashing import hash_state
from learner.base.history import pack_rows, unpack_rows
from learner.base.nested import snapshot
from learner.base.provenance import rng_state, seed_everything
from learner.base.store import DamagedError, load_state, save_state
from learner.loop.data import DataLoaders, DatasetLoader, TensorLoader
from learner.loop.learner import Learner
from learner.loop.resume import Rewind
from learner.loop.stages import Callback, hooks_of
from learner.loop.state import ResumeError, order_state
from learner.steer.accumulate import Accumulate
from learner.steer.augment import CutMix, Mixup
from learner.steer.curves import cosine
from learner.steer.freeze import FreezeUntil
from learner.steer.multi import Optimisers
from learner.steer.precision import Compile, MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule, Schedule
from learner.steer.stopping import EarlyStopping
from learner.steer.update import EMA, ClipGradients
from learner.watch.metrics import Metrics, MulticlassAccuracy, MulticlassAUROC
from learner.watch.recorder import Recorder

EPOCHS, BATCHES = 3, 8  # of a training; in an epoch, the last of two examples


# ---------------------------------------------------------------------------------------------------- what is trained

class Augmented(Dataset):
    "Rows that differ, with noise from all three sources of random numbers."

    def __init__(self, n, broken=None):
        self.x, self.y, self.broken = torch.arange(n * 16.0).reshape(n, 1, 4, 4) / (8 * n) - 1, torch.arange(n) % 3, broken

    def __len__(self): return len(self.x)

    def __getitem__(self, index):
        if self.broken and index == 7 and os.path.exists(self.broken): raise RuntimeError("a file cannot be read")
        return self.x[index] + torch.randn(1, 4, 4) * 0.1 + random.random() * 0.1 + float(np.random.rand()) * 0.1, self.y[index]


class Stream(IterableDataset):
    "The same as a stream, in an order that is drawn when it begins."

    def __init__(self, dataset): self.dataset = dataset

    def __iter__(self): return (self.dataset[i] for i in torch.randperm(len(self.dataset)).tolist())


class StatefulStream(Stream):
    "A stream that can tell its place and go on from it."
    order, at = None, 0

    def __iter__(self):
        if self.order is None: self.order, self.at = torch.randperm(len(self.dataset)).tolist(), 0
        while self.at < len(self.order):
            self.at += 1
            yield self.dataset[self.order[self.at - 1]]
        self.order = None

    def state_dict(self): return {"order": self.order, "at": self.at}

    def load_state_dict(self, state): self.order, self.at = state["order"], state["at"]


def foreign(dataset=None, kind=DataLoader, evaluation=None, **options):
    "Loaders of other libraries."
    dataset = dataset or Augmented(30)
    train = kind(dataset, 4, shuffle=None if isinstance(dataset, IterableDataset) else True, **options)
    return {"train": train, "validation": DataLoader(Augmented(13), 4, **(evaluation or {})), "test": DataLoader(Augmented(13), 4)}


def own(workers=0, broken=None):
    train = DatasetLoader(Augmented(30, broken), 4, shuffle=True, num_workers=workers)
    return DataLoaders(train, DatasetLoader(Augmented(13), 4), DatasetLoader(Augmented(13), 4))


def from_tensors():
    x, y = Augmented(30), Augmented(13)
    return DataLoaders.from_tensors((x.x, x.y), (y.x, y.y), (y.x, y.y), batch_size=4)


def plain_list():
    x, y = Augmented(30), Augmented(13)
    return {name: [(d.x[i:i + 4], d.y[i:i + 4]) for i in range(0, len(d), 4)]
            for name, d in (("train", x), ("validation", y), ("test", y))}


def generator(): return torch.Generator().manual_seed(3)


def stateful(dataset=None, **options):
    return foreign(dataset, pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader, **options)


LOADERS = {
    "own": own,
    "tensors": from_tensors,
    "own with workers": partial(own, 2),
    "torch": foreign,
    "torch with a generator": lambda: foreign(generator=generator(), evaluation={"shuffle": True, "generator": generator()}),
    "torch with workers": lambda: foreign(num_workers=2),
    "stream": lambda: foreign(Stream(Augmented(30))),
    "stream in groups": lambda: foreign(Stream(Augmented(30))),
    "list": plain_list,
    "torchdata": stateful,
    "torchdata with a generator": lambda: stateful(generator=generator()),
    "torchdata stream in groups": lambda: stateful(StatefulStream(Augmented(30))),
}


class Seen(Callback):
    "Keeps the examples of every pass, augmented as they are."
    priority = -1000
    watches = True

    def __init__(self): self.batches = []

    def after_prepare(self, learn): self.batches.append(learn.data.clone())


def agreement(predictions, labels): return (predictions.argmax(1) == labels).float().mean()


def callbacks(updates=None):
    import torchmetrics
    metrics = Metrics(accuracy=MulticlassAccuracy(), auroc=MulticlassAUROC(num_classes=3), agreement=agreement,
                      theirs=torchmetrics.Accuracy("multiclass", num_classes=3))
    return [BatchSchedule(partial(OneCycleLR, max_lr=0.05), steps_per_epoch=updates), Accumulate(2), EMA(0.9), metrics,
            ClipGradients(1.0, log=True), EarlyStopping(patience=50), Recorder("loss", "learning_rate", "gradient_norm"),
            FreezeUntil(1, "1")]


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class GAN(Learner):
    "Two networks that are trained against each other."

    def train_batch(self):
        self.act("prepare")
        data = self.data.flatten(1)
        drawn, judge = self.model.generator(torch.randn(len(data), 4)), self.model.discriminator
        judged = F.softplus(-judge(data)).mean() + F.softplus(judge(drawn.detach())).mean()
        judged.backward()
        self.optimiser.discriminator.step()
        self.optimiser.discriminator.zero_grad()
        fooled = F.softplus(-judge(drawn)).mean()
        fooled.backward(inputs=[*self.model.generator.parameters()])
        self.act("step")
        return {"judged": judged, "fooled": fooled}

    def validation_batch(self):
        self.act("prepare")
        return {"judged": self.model.discriminator(self.data.flatten(1)).mean()}


def gan():
    model = nn.Module()
    model.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 16))
    model.discriminator = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
    both = Optimisers(generator=Adam(model.generator.parameters(), 1e-3), discriminator=AdamW(model.discriminator.parameters(), 2e-3))
    schedules = [BatchSchedule(partial(OneCycleLR, max_lr=0.03), optimiser="generator"),
                 BatchSchedule(partial(StepLR, step_size=5), optimiser="discriminator"), EMA(0.9)]
    return GAN(model, both, None, own(), schedules, device="cpu")


def make(case="own", *extra, seed=0):
    "A learner of that kind, ready to train for EPOCHS; `extra` callbacks join."
    seed_everything(seed)
    if case == "gan": learn = gan()
    elif case == "plain":  # nothing here depends on the number of epochs, and a test draws no random numbers
        learn = Learner(network(), AdamW, F.cross_entropy, from_tensors(), [EpochSchedule(partial(StepLR, step_size=2)), EMA(0.9)], "cpu")
    elif case == "bfloat16":
        learn = Learner(network(), AdamW, F.cross_entropy, own(), [*callbacks(), MixedPrecision("bfloat16")], "cpu")
    elif case == "mixup":
        more = [Mixup(), Schedule(cosine(0.1, 0.0), "weight_decay")]
        learn = Learner(network(), AdamW, F.cross_entropy, own(), [*callbacks(), *more], "cpu")
    elif case == "best weights":
        learn = Learner(network(), AdamW, F.cross_entropy, own(), EarlyStopping(patience=50, mode="max", restore_best=True), "cpu")
    elif case == "cutmix":
        learn = Learner(network(), partial(torch.optim.SGD, momentum=0.9), F.cross_entropy, own(), [*callbacks(), CutMix()], "cpu")
    else:
        joining = callbacks(BATCHES if case == "stream" else BATCHES // 2 if case.endswith("stream in groups") else None)
        if case == "stream": joining = [callback for callback in joining if not isinstance(callback, Accumulate)]
        learn = Learner(network(), AdamW, F.cross_entropy, LOADERS[case](), joining, "cpu")
    learn.history.keep_steps = case != "mixup"
    learn.add(Seen(), *extra)
    return learn


def seen(learn): return next(callback.batches for callback in learn.callbacks if isinstance(callback, Seen))


def train(learn, epochs=EPOCHS, **options):
    if options.get("resume") is True: return learn.train(**options)
    learn.train(epochs, None if isinstance(learn, GAN) else 0.01, **options)


def outcome(learn):
    "All in which two runs must agree, by name."
    parts = {"weights": dict(learn.model.named_parameters()), "buffers": dict(learn.model.named_buffers()), "rng": rng_state(),
             "optimiser": learn.optimiser.state_dict(), "rows": learn.history.rows, "steps": learn.history.steps,
             "results": learn.results, "place": list(learn.place),
             "orders": {name: loader.epoch if hasattr(loader, "epoch") else order_state(loader) for name, loader in learn.dataloaders.items()}}
    for callback in learn.callbacks:
        name = type(callback).__name__
        if hasattr(callback, "state_dict") and name != "Checkpoint":  # which says whose folder it is
            while name in parts: name += "'"
            parts[name] = callback.state_dict()
    return {name: hash_state({"it": part}) for name, part in parts.items()}


def differences(learn, reference, examples=None):
    "The parts in which a run that went on is not the one that was never stopped."
    wanted, all_seen = reference
    found = outcome(learn)
    parts = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    late = seen(learn) if examples is None else examples
    same = len(late) <= len(all_seen) and all(map(torch.equal, late, all_seen[len(all_seen) - len(late):]))
    return parts if same else [*parts, "examples"]


@functools.cache
def reference(case="own", epochs=EPOCHS):
    "The run that is never stopped."
    learn = make(case)
    train(learn, epochs)
    assert all(math.isfinite(row["train_" + ("judged" if case == "gan" else "loss")]) for row in learn.history)
    return outcome(learn), seen(learn)


class StopAfter(Callback):
    "Stops after the k-th batch of all, when the others have seen it; saves first if there is a path."
    priority = 5000
    watches = True

    def __init__(self, k, path=None): self.k, self.path = k, path

    def after_batch(self, learn, epoch, batch_num):
        if epoch * BATCHES + batch_num != self.k: return
        if self.path: learn.save(self.path)
        raise KeyboardInterrupt


def stopped(case, k, path=None):
    "A learner that was stopped after the k-th batch."
    stop = StopAfter(k, path)
    learn = make(case, stop)
    with pytest.raises(KeyboardInterrupt): train(learn)
    learn.remove(stop)
    return learn


# ---------------------------------------------------------------------------------------------------- going on

FEW = [0, 7, 12, 15, 22, 23]
SHORT = {"own": range(EPOCHS * BATCHES), "tensors": [0, 7, 12, 23], "own with workers": [7, 12], "torch": FEW,
         "torch with a generator": FEW, "torch with workers": [12], "stream": [3, 7, 12], "stream in groups": FEW, "list": [7, 12],
         "torchdata": [0, 7, 12], "torchdata with a generator": [7, 20], "torchdata stream in groups": FEW, "gan": [0, 7, 12, 22], "bfloat16": [6, 15], "mixup": [7, 12, 20], "cutmix": [12, 15]}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # in torchdata
@pytest.mark.parametrize(("case", "k"), [pytest.param(case, k, marks=[] if k in short else pytest.mark.long, id=f"{case}-{k}")
                                         for case, short in SHORT.items() for k in range(EPOCHS * BATCHES)])
def test_after_any_batch_training_goes_on_as_if_it_had_not_been_stopped(tmp_path, case, k):
    learn = stopped(case, k, tmp_path / "c")
    fresh = make(case, seed=9)
    train(fresh, resume=tmp_path / "c")
    assert differences(fresh, reference(case)) == []
    assert len(seen(fresh)) < len(reference(case)[1])
    seed_everything(8)
    train(learn, resume=True)
    assert differences(learn, reference(case)) == []
    assert len(seen(learn)) == len(reference(case)[1])


def test_the_run_that_is_never_stopped_is_the_same_each_time_and_not_the_same_for_another_seed():
    again = make()
    train(again)
    assert differences(again, reference()) == []
    other = make(seed=1)
    train(other)
    assert set(differences(other, reference())) >= {"weights", "buffers", "optimiser", "rng", "rows", "steps", "results", "EMA", "examples"}


@pytest.mark.parametrize("k", [12, 20])
def test_best_weights_are_put_back_at_the_end_and_not_at_a_stop(tmp_path, k):
    learn = stopped("best weights", k, tmp_path / "c")
    fresh = make("best weights", seed=9)
    train(fresh, resume=tmp_path / "c")
    assert differences(fresh, reference("best weights")) == []
    learn.train(resume=True)
    assert differences(learn, reference("best weights")) == []


@pytest.mark.parametrize("in_process", [False, True], ids=["files", "process"])
@pytest.mark.parametrize("ks", [(9, 12), (8, 10, 14), (3, 4, 5)], ids=str)
def test_two_and_three_stops_in_one_epoch(tmp_path, ks, in_process):
    learn, resume = make(), None
    for k in ks:
        stop = StopAfter(k, tmp_path / f"c{k}")
        learn.add(stop)
        with pytest.raises(KeyboardInterrupt): train(learn, resume=resume)
        learn.remove(stop)
        seed_everything(k)
        resume = True if in_process else tmp_path / f"c{k}"
        if not in_process: learn = make(seed=k)
    train(learn, resume=resume)
    assert differences(learn, reference()) == []


def test_stops_in_files_and_in_the_process_take_turns(tmp_path):
    learn = stopped("own", 5, tmp_path / "c")
    learn.save(tmp_path / "after")  # a learner that was stopped is saved as it was when it stopped
    after, before = load_state(tmp_path / "after"), load_state(tmp_path / "c")
    added = [state["made"].pop("callbacks") for state in (after, before)]
    assert hash_state(after) == hash_state(before) and added[1] == [*added[0], added[1][-1]]  # the one that stopped it
    stop = StopAfter(11, tmp_path / "d")
    learn.add(stop)
    with pytest.raises(KeyboardInterrupt): learn.train(resume=True)
    fresh = make(seed=9)
    fresh.load(tmp_path / "d")
    stop = StopAfter(17)
    fresh.add(stop)
    with pytest.raises(KeyboardInterrupt): fresh.train(resume=True)
    fresh.remove(stop)
    fresh.train(resume=True)
    assert differences(fresh, reference()) == []


class Fail(Callback):
    "Raises an error at the n-th call of a hook."
    watches = True

    def __init__(self, hook, n=1, error=None, priority=5000):
        self.hook, self.left, self.error, self.priority = hook, n, error or RuntimeError("no luck"), priority
        setattr(self, hook, self.fail)

    def fail(self):
        self.left -= 1
        if self.left == 0: raise type(self.error)(*self.error.args)  # a new one, since an error holds on to where it was raised


# Between two batches of training, or in a pass that is begun anew: n is the call of the hook that fails.
BETWEEN = {"before_train": 1, "before_epoch": 2, "before_training": 2, "after_batch": 16, "cleanup_batch": 13,
           "after_training": 2, "cleanup_training": 2, "before_validation": 2, "before_validation_batch": 6, "after_validation_batch": 6,
           "after_validation": 2, "cleanup_validation": 2, "after_epoch": 2, "cleanup_epoch": 2,
           "before_test": 1, "before_test_batch": 2, "after_test_batch": 3, "after_test": 1}


@pytest.mark.parametrize("hook", BETWEEN)
def test_saved_after_an_error_between_batches_or_in_a_pass_that_is_begun_anew(tmp_path, hook):
    fail = Fail(hook, BETWEEN[hook])
    learn = make("own", fail)
    with pytest.raises(RuntimeError): train(learn)
    learn.save(tmp_path / "c")
    fresh = make(seed=9)
    train(fresh, resume=tmp_path / "c")
    assert differences(fresh, reference()) == []


@pytest.mark.parametrize("hook", BETWEEN)
def test_after_an_error_between_batches_or_in_a_pass_that_is_begun_anew(hook):
    error = KeyboardInterrupt() if len(hook) % 2 else RuntimeError("no luck")
    fail = Fail(hook, BETWEEN[hook], error)
    learn = make("own", fail)
    with pytest.raises(type(error)): train(learn)
    learn.remove(fail)
    seed_everything(8)
    if hook == "before_train":  # it had not begun
        with pytest.raises(ResumeError, match="there is nothing to resume"): learn.train(resume=True)
        return
    learn.train(resume=True)
    assert differences(learn, reference(), seen(learn)[-4:]) == []


@pytest.mark.parametrize("after", [True, False], ids=["after training", "before training"])
def test_more_epochs_from_a_state_that_was_saved_outside_of_training(tmp_path, after):
    learn = make("tensors")
    learn.optimiser = AdamW(learn.model.parameters(), 0.01)
    if after: learn.train(1)
    learn.save(tmp_path / "c")
    fresh = make("tensors", seed=9)
    train(fresh, resume=tmp_path / "c")
    assert fresh.history["epoch"] == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])  # torch takes 10 s to end workers after an error
def test_an_error_in_the_loader(tmp_path, workers):
    learn = make("own with workers" if workers else "own")
    learn.dataloaders = own(workers, tmp_path / "broken")
    stop = learn.on("before_epoch", lambda epoch: (tmp_path / "broken").touch() if epoch == 1 else None)
    with pytest.raises(RuntimeError, match="a file cannot be read"): train(learn)
    (tmp_path / "broken").unlink()
    learn.remove(stop)
    learn.train(resume=True)
    assert differences(learn, reference("own with workers" if workers else "own")) == []


@pytest.mark.parametrize("k", [0, 7, 20])
def test_more_epochs_than_were_asked_for(tmp_path, k):
    learn = stopped("plain", k, tmp_path / "c")
    fresh = make("plain", seed=9)
    train(fresh, 5, resume=tmp_path / "c")
    assert differences(fresh, reference("plain", 5)) == []
    learn.train(5, resume=True)
    assert differences(learn, reference("plain", 5)) == []


def test_more_epochs_when_all_are_done(tmp_path):
    learn = make("plain")
    learn.on("after_epoch", lambda learn, epoch: learn.save(tmp_path / "c") if epoch == 2 else None, priority=5000)
    train(learn)
    fresh = make("plain", seed=9)
    train(fresh, 5, resume=tmp_path / "c")
    assert differences(fresh, reference("plain", 5)) == []
    with pytest.raises(ValueError, match="epochs is 2, and the training to resume has begun 3; they count from its beginning: ask for more"):
        train(make("plain"), 2, resume=tmp_path / "c")


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_saved_by_a_hook_at_the_end_of_an_epoch(tmp_path, epoch):
    learn = make()
    learn.on("after_epoch", lambda learn: learn.save(tmp_path / f"c{learn.epoch}"), priority=5000)
    train(learn)
    assert differences(learn, reference()) == []  # saving changes nothing
    fresh = make(seed=9)
    train(fresh, resume=tmp_path / f"c{epoch}")
    assert differences(fresh, reference()) == []


def test_a_training_that_has_ended_has_nothing_to_resume(tmp_path):
    learn = make("plain")
    train(learn)
    with pytest.raises(ResumeError, match="there is nothing to resume: no training was stopped here and none was loaded"): learn.train(resume=True)
    learn.save(tmp_path / "c")
    fresh = make("plain", seed=9)
    fresh.load(tmp_path / "c")
    assert outcome(fresh)["weights"] == outcome(learn)["weights"] and len(fresh.history) == 3
    fresh.train(1, 0.01)  # anew, with what was loaded
    assert fresh.history["epoch"] == [0, 1, 2, 3]


def test_callbacks_may_be_changed_before_training_goes_on():
    learn = stopped("plain", 10)
    learn.remove(*[callback for callback in learn.callbacks if isinstance(callback, EMA)])
    learn.add(Recorder(), ClipGradients(0.1))
    with pytest.warns(UserWarning, match="callbacks that this learner lacks: EMA"): learn.train(resume=True)
    assert learn.history["epoch"] == [0, 1, 2] and math.isfinite(learn.history[-1]["train_loss"])
    assert len(learn.callbacks) == 4


class Refills(Callback):
    "Sets weights when a call begins, as an initialiser does."
    def before_train(self, learn):
        with torch.no_grad(): learn.model.weight.fill_(0.5)


class StopsAt(Callback):
    watches = True

    def __init__(self, batches): self.left = batches

    def after_batch(self, learn):
        self.left -= learn.phase == "train"
        if not self.left: raise KeyboardInterrupt


def linear(*callbacks, loader=None):
    torch.manual_seed(3)
    model, x, y = nn.Linear(4, 2), torch.randn(48, 4), torch.randint(2, (48,))
    return Learner(model, functools.partial(torch.optim.SGD, momentum=0.9), F.cross_entropy,
                   {"train": TensorLoader((x, y), 8, shuffle=True) if loader is None else loader}, [*callbacks], device="cpu")


@pytest.mark.parametrize("way", ["in the process", "from a state", "from a file", "loaded"])
def test_weights_that_a_hook_sets_when_a_call_begins_do_not_replace_those_of_a_training_that_goes_on(way, tmp_path):
    whole = linear(Refills())
    whole.train(3, 0.1)
    learn = linear(Refills())
    with pytest.raises(KeyboardInterrupt): learn.train(3, 0.1, callbacks=StopsAt(8))
    if way == "in the process": learn.train(resume=True)
    if way == "from a state": learn.train(3, resume=learn.state_dict())
    if way == "from a file":
        learn.save(tmp_path / "c")
        learn.train(3, resume=tmp_path / "c")
    if way == "loaded":
        learn.save(tmp_path / "c")
        learn = linear(Refills())
        learn.load(tmp_path / "c")
        learn.train(resume=True)
    assert torch.equal(learn.model.weight, whole.model.weight)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_set_by_hand_before_training_goes_on_stays(loaded, tmp_path):
    "A rate, another hyperparameter and a weight; a rate that only the call had set comes back."
    learn = linear()
    with pytest.raises(KeyboardInterrupt): learn.train(3, 0.1, callbacks=StopsAt(8))
    if loaded:
        learn.save(tmp_path / "c")
        learn = linear()
        learn.load(tmp_path / "c")
    group, seen = learn.optimiser.param_groups[0], []
    assert group["lr"] == 0.1
    group["lr"] = 0.001
    with torch.no_grad(): learn.model.bias.fill_(7)
    assert learn.state_dict()["optimiser"]["param_groups"][0]["lr"] == 0.001
    learn.on("before_batch", lambda learn: seen.append((group["lr"], group["momentum"], learn.model.bias.max().item())))
    learn.train(resume=True)
    assert seen[0] == (0.001, 0.9, 7) and len(seen) == 10 and {rate for rate, *_ in seen} == {0.001}


def test_a_rate_that_clean_up_sets_back_is_that_of_the_stop_again_when_training_goes_on():
    class Halves(Callback):
        def around_train(self, learn):
            group = learn.optimiser.param_groups[0]
            before, group["lr"] = group["lr"], group["lr"] / 2
            try: yield
            finally: group["lr"] = before

    learn, seen = linear(Halves()), []
    with pytest.raises(KeyboardInterrupt): learn.train(3, 0.1, callbacks=StopsAt(8))
    assert learn.optimiser.param_groups[0]["lr"] == 0.1
    learn.on("before_batch", lambda learn: seen.append(learn.optimiser.param_groups[0]["lr"]))
    learn.train(resume=True)
    assert seen == [0.05] * 10


class CountsPasses:
    "Shuffles by a count of its own passes."
    def __init__(self): self.passes = 0

    def __len__(self): return 6

    def __iter__(self):
        self.passes += 1
        generator = torch.Generator().manual_seed(self.passes)
        x, y = torch.arange(48).float().reshape(12, 4), torch.arange(12) % 2
        for rows in torch.randperm(12, generator=generator).split(2): yield x[rows], y[rows]


@pytest.mark.parametrize("here", [False, True])
def test_a_loader_that_counts_its_passes_is_named(here, tmp_path):
    learn = linear(loader=CountsPasses())
    with pytest.raises(KeyboardInterrupt): learn.train(3, 0.01, callbacks=StopsAt(8))
    told = 'dataloaders\\["train"\\] changes its attribute passes in training, which no state holds, so .* another order; give it set_epoch'
    if here:
        with pytest.warns(UserWarning, match=told): learn.train(resume=True)
        return
    with pytest.warns(UserWarning, match=told): learn.save(tmp_path / "c")
    learn = linear(loader=CountsPasses())
    with pytest.warns(UserWarning, match=told): learn.train(3, resume=tmp_path / "c")


def test_a_stream_that_counts_its_passes_is_named_and_one_that_does_not_is_not(tmp_path):
    class Counts(CountsPasses, IterableDataset): pass

    class Draws(IterableDataset):
        rows = 2
        def __iter__(self): return iter([(torch.randn(4), 0) for _ in range(48)])

    for stream, told in ((Counts(), "dataset changes its attribute passes in training"), (Draws(), "")):
        learn = linear(loader=DataLoader(stream, None if told else 8))
        with pytest.raises(KeyboardInterrupt): learn.train(3, 0.01, callbacks=StopsAt(8))
        with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext(): learn.save(tmp_path / "c")


def test_a_loader_that_cannot_be_restored_is_named_where_a_finished_training_is_made_longer():
    class Draws:
        "Shuffles with a generator of NumPy."
        def __init__(self): self.rng = np.random.default_rng(0)
        def __len__(self): return 4
        def __iter__(self): return iter([(torch.full((2, 4), float(i)), torch.zeros(2, dtype=torch.long)) for i in self.rng.permutation(4)])

    learn = linear(loader=Draws())
    learn.train(1, 0.01)
    with pytest.warns(UserWarning, match="Draws holds a random generator of NumPy .*; give it state_dict"):
        linear(loader=Draws()).train(2, resume=learn.state_dict())


def test_loaders_that_do_not_count_or_have_a_way_of_their_own_are_not_named(tmp_path):
    class TakesEpochs(CountsPasses):
        def set_epoch(self, epoch): self.passes = epoch
        @property
        def epoch(self): return self.passes

    class Sized(CountsPasses):
        size = 3
        def __init__(self): self.batch_size = 2
        passes = property(lambda self: 1, lambda self, value: None)

    for loader in (TakesEpochs(), Sized()):
        learn = linear(loader=loader)
        with pytest.raises(KeyboardInterrupt): learn.train(3, 0.01, callbacks=StopsAt(8))
        learn.save(tmp_path / "c")
        learn.train(resume=True)


def test_a_state_is_not_to_be_had_in_half_a_batch_or_a_validation(tmp_path):
    for hook in ("before_batch", "after_loss", "after_step", "before_validation_batch", "after_validation_batch", "before_test", "after_prepare"):
        learn = make("plain")
        learn.on(hook, lambda learn: learn.save(tmp_path / "c"))
        with pytest.raises(RuntimeError, match="the state was asked for within a (batch|validation or test pass), which is half done; ask for it in after_batch"): train(learn)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------------------------------------------- what a state must hold

@functools.cache
def state_at(case, place):
    "The state of a training that was stopped there, as a file has it."
    if place == "batch":
        learn = stopped(case, 12)  # the first batch of a group of two is done
    else:
        fail = Fail({"validation": "before_validation_batch", "test": "before_test_batch"}[place], 6 if place == "validation" else 2)
        learn = make(case, fail)
        with pytest.raises(RuntimeError): train(learn)
    return snapshot(learn.state_dict())


def resumed(case, state):
    learn = make(case, seed=9)
    learn.load_state_dict(state)
    seed_everything(5)
    learn.train(resume=True)
    return learn


@pytest.mark.parametrize("place", ["batch", "validation", "test"])
@pytest.mark.parametrize("case", ["own", "torch", "torch with a generator"])
def test_the_state_as_it_is_goes_on_exactly(case, place):
    assert differences(resumed(case, snapshot(state_at(case, place))), reference(case)) == []


def other_rng(*names):
    "Random numbers of another seed for these sources."
    def change(state):
        before = rng_state()
        seed_everything(77)
        for name, value in rng_state().items():
            if name.partition(".")[0] in names: state[name] = value
        seed_everything(0)
        from learner.base.provenance import set_rng_state
        set_rng_state(before)
    return change


def zero(tensors):
    for tensor in tensors: tensor.zero_()


def moments(state, name): return [entry[name] for entry in state["optimiser"]["state"].values()]


def loop(change): return lambda state: change(state["loop"])


def rows(change):
    def changed(state):
        table = unpack_rows(state["loop"]["rows"])
        change(table)
        state["loop"]["rows"] = pack_rows(table)
    return changed


def forget(name): return lambda state: state["callbacks"].pop(name)


def set_place(*place): return loop(lambda loop: loop.update(place=list(place)))


def halve(state): state["callbacks"]["EMA"]["averages"]["1.weight"].mul_(0.5)


# What is changed, by name: case, place and how; the run that goes on must not come out the same.
CONTROLS = {
    "a weight": ("own", "batch", lambda s: s["model"]["1.weight"].view(-1)[0].add_(1e-6)),
    "the weights": ("own", "batch", lambda s: zero([s["model"]["5.weight"]])),
    "a buffer": ("own", "batch", lambda s: s["model"]["2.running_mean"][0].add_(1e-6)),
    "the count of a buffer": ("own", "batch", lambda s: s["model"]["2.num_batches_tracked"].add_(1)),
    "the first moments": ("own", "batch", lambda s: zero(moments(s, "exp_avg"))),
    "the second moments": ("own", "batch", lambda s: [m.mul_(1.01) for m in moments(s, "exp_avg_sq")]),
    "the optimiser's steps": ("own", "batch", lambda s: [m.add_(1) for m in moments(s, "step")]),
    "the optimiser's state": ("own", "batch", lambda s: s["optimiser"]["state"].clear()),
    "the learning rate": ("own", "batch", lambda s: (forget("BatchSchedule")(s), s["optimiser"]["param_groups"][0].update(lr=0.2))),
    "the weight decay": ("own", "batch", lambda s: s["optimiser"]["param_groups"][0].update(weight_decay=0.2)),
    "the schedule": ("own", "batch", forget("BatchSchedule")),
    "the open group": ("own", "batch", forget("Accumulate")),
    "gradients of the open group": ("own", "batch", lambda s: zero(g for g in s["callbacks"]["Accumulate"]["gradients"] if g is not None)),
    "the averages": ("own", "batch", forget("EMA")),
    "one average": ("own", "batch", halve),
    "the metrics": ("own", "batch", forget("Metrics")),
    "early stopping": ("own", "batch", forget("EarlyStopping")),
    "the recorder": ("own", "batch", forget("Recorder")),
    "what is frozen": ("own", "batch", forget("FreezeUntil")),
    "random numbers of torch": ("own", "batch", loop(lambda loop: other_rng("torch")(loop["rng"]))),
    "random numbers of Python": ("own", "batch", loop(lambda loop: other_rng("python")(loop["rng"]))),
    "random numbers of NumPy": ("own", "batch", loop(lambda loop: other_rng("numpy")(loop["rng"]))),
    "random numbers of torch left out": ("own", "batch", loop(lambda loop: loop["rng"].pop("torch"))),
    "the last row": ("own", "batch", rows(lambda rows: rows.pop())),
    "a value in a row": ("own", "batch", rows(lambda rows: rows[0].update(train_loss=0.0))),
    "the steps": ("own", "batch", loop(lambda loop: loop["steps"].clear())),
    "keeping steps": ("own", "batch", loop(lambda loop: loop.update(keep_steps=False))),
    "the means": ("own", "batch", loop(lambda loop: loop["means"].clear())),
    "the sum of a mean": ("own", "batch", loop(lambda loop: loop["means"]["loss"].update(numbers=loop["means"]["loss"]["numbers"] + 1e-3))),
    "one value in a mean": ("own", "batch", loop(lambda loop: loop["means"]["loss"]["kept"][0].add_(1e-3))),
    "a batch back": ("own", "batch", set_place(1, "train", 4)),
    "a batch on": ("own", "batch", set_place(1, "train", 6)),
    "an epoch back": ("own", "batch", set_place(0, "train", 5)),
    "the pass": ("own", "batch", set_place(1, "validation", 8)),
    "the number of epochs": ("own", "batch", loop(lambda loop: loop.update(num_epochs=2))),
    "the epochs of validation": ("own", "validation", loop(lambda loop: loop.update(validation_epochs=3))),
    "results": ("own", "validation", loop(lambda loop: loop["results"].pop("train_loss"))),
    "the row's steps": ("own", "validation", loop(lambda loop: loop["row_steps"].clear())),
    "random numbers before the validation": ("own", "validation", loop(lambda loop: other_rng("torch", "python", "numpy")(loop["rng"]))),
    "the first row": ("own", "test", loop(lambda loop: loop.update(first_row=99))),
    "random numbers before the test": ("own", "test", loop(lambda loop: other_rng("numpy")(loop["rng"]))),
    "random numbers when the pass began": ("torch", "batch", loop(lambda loop: other_rng("torch")(loop["began"]["rng"]))),
    "a generator when the pass began": (
        "torch with a generator", "batch", loop(lambda loop: loop["began"]["order"].update(generators=[generator().get_state()]))),
    "a generator after the pass": (
        "torch with a generator", "validation", loop(lambda loop: loop["orders"]["train"].update(generators=[generator().get_state()]))),
    "the validation's generator": (
        "torch with a generator", "validation", loop(lambda loop: loop["orders"]["validation"].update(generators=[torch.Generator().manual_seed(99).get_state()]))),
    "the validation's generator, later": (
        "torch with a generator", "batch", loop(lambda loop: loop["orders"]["validation"].update(generators=[generator().get_state()]))),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_without_any_part_of_the_state_the_test_of_exactness_fails(name):
    case, place, change = CONTROLS[name]
    state = snapshot(state_at(case, place))
    change(state)
    assert hash_state(state) != hash_state(state_at(case, place))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of a schedule that has no step left
        assert differences(resumed(case, state), reference(case)) != []


# ---------------------------------------------------------------------------------------------------- interrupts

STAGES = [name for name, stage in Learner.tree.stages.items() if not stage.rare]
HOOKS = [f"{kind}_{name}" for name in STAGES for kind in ("before", "after", "cleanup")]


def nth(hook):
    "Which call of a hook is in the middle of the second epoch, or as far on as there is one."
    stage = hook.partition("_")[2]
    if stage in ("train", "test"): return 1
    if stage in ("epoch", "training", "validation"): return 2
    if stage in ("validation_batch", "test_batch"): return 3
    return {"batch": 11, "backward": 11, "step": 6}.get(stage, 15)  # the others are of validation, too: 8 + 4 + 3


class Press(Callback):
    "Presses Ctrl-C at a call of a hook."
    watches = True

    def __init__(self, hook, times=1, number=signal.SIGINT, n=None):
        self.left, self.times, self.number = n or nth(hook), times, number
        setattr(self, hook, self.press)

    def press(self):
        self.left -= 1
        for _ in range(self.times * (self.left == 0)): signal.raise_signal(self.number)


class Balance(Callback):
    "Counts what was opened and what was cleaned up."
    priority = -2000  # opens before the others, so that what is opened here was opened
    watches = True

    def __init__(self):
        self.opened, self.cleaned = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
        for name in STAGES:
            setattr(self, f"before_{name}", partial(self.count, self.opened, name))
            setattr(self, f"cleanup_{name}", partial(self.count, self.cleaned, name))

    @staticmethod
    def count(counts, name): counts[name] += 1


def whole(learn):
    "Nothing of a run is left."
    assert not learn.is_running and learn._timing.path == [] and not learn._frame.entered
    assert not any(hasattr(learn, name) for name in ("batch", "data", "labels", "batch_size", "predictions", "loss"))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in learn.model.parameters())
    assert all(module.training for module in learn.model.modules())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return True


@pytest.mark.parametrize("hook", HOOKS)
def test_the_first_press_stops_between_two_batches_and_training_goes_on_exactly(hook):
    press, balance = Press(hook), Balance()
    learn = make("own", press, balance)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped (after (epoch \d, (validation )?batch \d|test batch \d); train\(resume=True\) goes on from there|when all was done)$") as caught:
        train(learn)
    assert caught.value._render_traceback_() == [str(caught.value)]  # what a notebook shows
    assert whole(learn) and balance.opened == balance.cleaned
    if str(caught.value).endswith("done"): assert differences(learn, reference()) == []; return
    learn.remove(press, balance)
    seed_everything(8)
    learn.train(resume=True)
    assert differences(learn, reference(), seen(learn)[-4:]) == []


def test_a_lazy_model_goes_on_in_another_process(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))
        data = torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
        loaders = DataLoaders.from_tensors(data, batch_size=8)
        learn = Learner(model, torch.optim.AdamW, F.cross_entropy, loaders, device="cpu")
        model(data[0][:2])
        learn.optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
        return learn

    def lazy():
        torch.manual_seed(7)
        model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))
        return Learner(model, torch.optim.AdamW(model.parameters(), lr=0.01), F.cross_entropy, make().dataloaders, device="cpu")
    whole, half, fresh = make(), make(), lazy()
    whole.train(3)
    half.train(2)
    half.save(tmp_path / "c")
    fresh.train(3, resume=tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), fresh.model.parameters(), strict=True))


def test_another_learning_rate_for_a_training_that_is_resumed_is_left_aside_with_a_warning(tmp_path):
    learn = stopped("plain", 10)
    learn.save(tmp_path / "c")
    fresh = make("plain", seed=9)
    with pytest.warns(UserWarning, match=r"learning_rate=0.5 is ignored: the resumed training began with 0.01 and keeps"):
        fresh.train(3, 0.5, resume=tmp_path / "c")
    assert differences(fresh, reference("plain")) == []


def test_a_state_from_before_the_first_training_is_one_to_go_on_from(tmp_path):
    def make():
        torch.manual_seed(0)
        return Learner(nn.Linear(4, 3), torch.optim.SGD, F.cross_entropy, {"train": [(torch.ones(2, 4), torch.tensor([0, 1]))]}, device="cpu")
    make().save(tmp_path / "c")
    plain = make()
    plain.train(2, 0.1)
    for load in (False, True):
        learn = make()
        if load: learn.load(tmp_path / "c")
        learn.train(2, 0.1, resume=True if load else tmp_path / "c")
        assert torch.equal(learn.model.weight, plain.model.weight) and len(learn.history) == 2


def test_a_model_that_does_not_take_its_state_leaves_optimiser_and_callbacks_as_they_were():
    class Stubborn(nn.Linear):
        def get_extra_state(self): return torch.ones(1)

        def set_extra_state(self, state): raise KeyError("no")

    def make(rate):
        model = Stubborn(4, 3)
        return Learner(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), F.cross_entropy,
                       {"train": [(torch.ones(2, 4), torch.tensor([0, 1]))]}, EMA(0.5), device="cpu")
    one, other = make(0.5), make(0.01)
    one.train(1)
    other.train(3)
    before = hash_state({"optimiser": one.optimiser.state_dict(), "EMA": one.callbacks[0].state_dict()})
    with pytest.raises(ResumeError, match="the model rejects its state: 'no'"): one.load_state_dict(other.state_dict())
    assert hash_state({"optimiser": one.optimiser.state_dict(), "EMA": one.callbacks[0].state_dict()}) == before


@pytest.mark.parametrize(("hook", "told"), [("after_backward", "runs again"), ("after_step", "counts as done"), ("after_batch", "")])
def test_what_is_saved_after_half_a_batch_says_so(tmp_path, hook, told):
    learn = make("plain", Fail(hook, 11))
    with pytest.raises(RuntimeError): train(learn)
    learn.save(tmp_path / "c")
    fresh = make("plain", seed=9)
    with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext(): train(fresh, resume=tmp_path / "c")
    again = make("plain", seed=9)
    again.load(tmp_path / "c")
    with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext(): again.train(resume=True)
    assert len(fresh.history) == len(again.history) == EPOCHS


@pytest.mark.parametrize("resume", ["", 5, b"x"])
def test_what_is_no_place_to_go_on_from(resume):
    with pytest.raises(ResumeError, match="resume is .*; it must be True, a state, or the path of a checkpoint or of a folder of checkpoints"):
        make("plain").train(1, resume=resume)


@pytest.mark.parametrize("screen", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminal_says_that_the_press_was_heard(monkeypatch, screen, times):
    said = []
    monkeypatch.setattr("os.isatty", lambda number: screen)
    monkeypatch.setattr("os.write", lambda number, text: said.append((number, text)))
    learn = make("own", Press("before_loss", times=times))
    with pytest.raises(KeyboardInterrupt): train(learn)
    assert said == [(2, b"\nstopping after this batch; Ctrl-C again stops at once\n")] * screen


@pytest.mark.parametrize("hook", HOOKS)
def test_the_second_press_stops_at_once_and_cleans_up_once(hook):
    press, balance = Press(hook, times=2), Balance()
    learn = make("own", press, balance)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"): train(learn)
    assert whole(learn) and balance.opened == balance.cleaned
    assert sum(balance.opened.values()) > 0
    learn.remove(press, balance)
    rows = len(learn.history)
    stage = hook.partition("_")[2]
    half = hook == "before_batch" or stage in ("prepare", "predict", "loss", "backward", "step")
    told = "counts as done" if hook in ("after_step", "cleanup_step") else "runs again"
    if learn.cursor.saved is not None:
        with pytest.warns(UserWarning, match=told) if half else contextlib.nullcontext(): learn.train(resume=True)
    assert whole(learn) and (rows == len(learn.history) or learn.history["epoch"] == [0, 1, 2])
    rows = len(learn.history)
    learn.train(1)
    assert len(learn.history) == rows + 1 and whole(learn)


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_at_any_hook_is_named_and_leaves_the_learner_whole(hook):
    class Faulty(Fail): pass
    balance, guest = Balance(), Faulty(hook, nth(hook), priority=0)
    learn = make("plain", balance)
    with pytest.raises(RuntimeError, match="no luck") as caught: train(learn, callbacks=guest)
    assert any(note.startswith(f"in Faulty.{hook}") for note in caught.value.__notes__)
    assert whole(learn) and balance.opened == balance.cleaned and guest not in learn.callbacks
    rows = len(learn.history)
    learn.train(1)
    assert len(learn.history) == rows + 1 and whole(learn)


class At(Callback):
    "Does something once, in the middle of a batch."
    watches = True

    def __init__(self, epoch, batch_num, function): self.when, self.function = (epoch, batch_num), function

    def after_backward(self, epoch, batch_num):
        if (epoch, batch_num) != self.when: return
        self.when = None
        self.function()


def goes_on_exactly(learn, case="own"):
    "Resume in this process; nothing is warned of, and the end is that of the run that was never stopped."
    before = len(seen(learn))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # in torchdata
        learn.train(resume=True)
    assert not differences(learn, reference(case), seen(learn)[before:])


IN_BATCH = [hook for hook in HOOKS if hook.partition("_")[2] in ("batch", "prepare", "predict", "loss", "backward", "step")]


@pytest.mark.parametrize(("case", "every"), [("own", 1), ("mixup", 3)])
@pytest.mark.parametrize("hook", IN_BATCH)
def test_a_batch_that_failed_in_any_hook_is_done_anew_from_a_copy_in_memory(hook, case, every):
    learn = make(case)
    learn.add(Rewind(every))
    for n, resume in ((nth(hook), None), (3, True)):  # it fails, is resumed and fails again
        with pytest.raises(RuntimeError, match="no luck"): train(learn, callbacks=Fail(hook, n), resume=resume)
        assert learn.place.phase == "train" and learn.place.batch % every == 0
    goes_on_exactly(learn, case)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # in torchdata
@pytest.mark.parametrize("case", ["torch", "torch with a generator", "tensors", "stream", "list", "torchdata", "gan"])
def test_every_loader_goes_back_to_a_copy_in_memory(case):
    learn = make(case)
    learn.add(Rewind(3))
    with pytest.raises(RuntimeError, match="no luck"): train(learn, callbacks=Fail("after_prepare", 17))
    goes_on_exactly(learn, case)


def test_a_copy_in_memory_undoes_what_a_loader_drew_for_a_batch_that_never_came(tmp_path):
    flag = tmp_path / "broken"
    learn = make("own")
    learn.add(Rewind(4))
    learn.dataloaders = own(broken=flag)
    with pytest.raises(RuntimeError, match="a file cannot be read"): train(learn, callbacks=At(1, 1, flag.touch))
    flag.unlink()
    goes_on_exactly(learn)


def test_a_copy_in_memory_undoes_half_a_step():
    def half_a_step():
        with torch.no_grad(): next(learn.model.parameters()).add_(1.0)
        learn.optimiser.state.popitem()
        raise RuntimeError("no luck")
    learn = make("own")
    learn.add(Rewind(4))
    with pytest.raises(RuntimeError): train(learn, callbacks=At(1, 5, half_a_step))
    goes_on_exactly(learn)


def test_a_copy_in_memory_serves_a_second_press_and_what_is_saved_after_it(tmp_path):
    learn = make("own")
    learn.add(Rewind(4))
    with pytest.raises(KeyboardInterrupt, match="stopped at once"): train(learn, callbacks=Press("after_loss", times=2))
    learn.save(tmp_path / "c")
    fresh = make("own", seed=9)
    fresh.train(resume=tmp_path / "c")
    assert not differences(fresh, reference())
    goes_on_exactly(learn)


def test_a_single_press_loses_no_batch_to_a_copy_in_memory():
    learn = make("own")
    learn.add(Rewind(BATCHES))
    with pytest.raises(KeyboardInterrupt): train(learn, callbacks=Press("after_loss", n=15))
    assert learn.place == (1, "train", 3)  # after 8 + 4 losses of the first epoch
    goes_on_exactly(learn)


def test_an_old_copy_in_memory_is_of_no_other_training(tmp_path):
    learn = make("own")
    with pytest.raises(RuntimeError): train(learn, callbacks=[Fail("after_loss", 3), Rewind(1)])
    with pytest.raises(RuntimeError): train(learn, callbacks=Fail("after_batch", 2))  # a new one, without copies
    assert learn.place == (0, "train", 2)
    with pytest.raises(ValueError, match="every is 0; it must be a whole number of at least 1"): Rewind(0)


def hooks_of_all():
    learn = make("mixup", MixedPrecision("bfloat16"), EpochSchedule(partial(StepLR, step_size=2)))
    return sorted({(type(callback).__name__, hook) for callback in learn.callbacks for hook, _ in hooks_of(callback, learn.tree)})


@pytest.mark.parametrize(("name", "hook"), hooks_of_all(), ids=str)
def test_an_exception_in_any_hook_of_any_callback_is_named_and_leaves_the_learner_whole(name, hook):
    learn = make("mixup", MixedPrecision("bfloat16"), EpochSchedule(partial(StepLR, step_size=2)))
    callback = next(callback for callback in learn.callbacks if type(callback).__name__ == name)
    function, left, before = getattr(callback, hook), [2], learn.callbacks

    def count():
        left[0] -= 1
        if left[0] == (1 if hook.endswith(("_train", "_test")) else 0): raise RuntimeError("no luck")

    @functools.wraps(function)
    def fail(*args, **kwargs):
        function(*args, **kwargs)
        count()

    @functools.wraps(function)
    def fail_around(*args, **kwargs):
        count()
        yield from function(*args, **kwargs)
    setattr(callback, hook, fail_around if hook.startswith("around") else fail)
    try: train(learn)
    except RuntimeError as error:
        assert str(error) == "no luck"
        assert any(note.startswith(f"in {name}.{hook}") for note in error.__notes__), error.__notes__
    else: assert hook.startswith("cancelled")  # nothing is cancelled here
    assert whole(learn) and learn.callbacks == before
    setattr(callback, hook, function)
    rows = len(learn.history)
    learn.train(1)
    assert len(learn.history) == rows + 1 and whole(learn)


def test_sigterm_stops_between_two_batches_with_its_status():
    press = Press("before_loss", number=signal.SIGTERM)
    learn = make("own", press)
    with pytest.raises(SystemExit) as caught: train(learn)
    assert caught.value.code == 143 and whole(learn)
    learn.remove(press)
    learn.train(resume=True)
    assert differences(learn, reference()) == []


@pytest.mark.parametrize("call", ["validate", "test"])
def test_a_press_in_another_call(call):
    learn = make("plain")
    press = Press(f"before_{'validation' if call == 'validate' else 'test'}_batch", n=2)
    learn.add(press)
    with pytest.raises(KeyboardInterrupt, match=rf"^stopped after {'validation' if call == 'validate' else 'test'} batch 1$"): getattr(learn, call)()
    learn.remove(press)
    assert whole(learn)
    with pytest.raises(ResumeError, match="there is nothing to resume"): learn.train(resume=True)
    getattr(learn, call)()


def test_handlers_of_the_user_stay():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        learn = make("own", Press("before_loss", times=2))
        learn.on("before_batch", lambda: pressed.append(signal.getsignal(signal.SIGINT)) if not pressed else None)
        train(learn)
        assert pressed[0] is signal.getsignal(signal.SIGINT) and pressed[1:] == [signal.SIGINT] * 2
        assert differences(learn, reference()) == []
    finally: signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_there_are_no_handlers():
    learn, handlers, errors = make(), [], []
    learn.on("before_batch", lambda: handlers.append(signal.getsignal(signal.SIGINT)))

    def work():
        try: train(learn)
        except BaseException as error: errors.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and set(handlers) == {signal.default_int_handler}
    assert differences(learn, reference()) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_press_in_a_coroutine_is_seen_at_the_next_batch(times):
    "As in Jupyter, where cells run in a loop of asyncio."
    import asyncio
    learn = make("own", press := Press("before_loss", times=times))

    async def cell(): train(learn)
    with pytest.raises(KeyboardInterrupt, match="stopped at once" if times == 2 else "stopped after epoch 1, batch 2"): asyncio.run(cell())
    assert whole(learn)
    if times == 2: return
    learn.remove(press)

    async def next_cell(): learn.train(resume=True)
    asyncio.run(next_cell())
    assert differences(learn, reference()) == []


def test_a_stop_that_nobody_asked_for_again_is_forgotten():
    press = Press("before_loss")
    learn = make("plain", press)
    with pytest.raises(KeyboardInterrupt): train(learn)
    learn.remove(press)
    train(learn)  # a new one; what was stopped is forgotten when it ends
    with pytest.raises(ResumeError, match="there is nothing to resume"): learn.train(resume=True)


# ---------------------------------------------------------------------------------------------------- states that do not fit

def model(change): return lambda state: change(state["model"])


def optimiser(change): return lambda state: change(state["optimiser"])


def put(**values): return loop(lambda loop: loop.update(values))


def swap(part, **values): return lambda state: state[part].update(values)


class Trap:
    "Would leave a mark if it were made from a pickle."
    def __reduce__(self): return (exec, ("import sys; sys.trapped = True",))


SAYS_NOT = "the state does not say where training stands; use one from save() or state_dict()"
NO_MEANS = "the means, steps or random numbers in the state are damaged: "
FORGED = {
    # parts
    "nothing": (lambda s: s.clear(), "the state has no model; use one from save() or state_dict()"),
    "no model": (lambda s: s.pop("model"), "the state has no model; use one from save()"),
    "no optimiser": (lambda s: s.pop("optimiser"), "the state has no optimiser; use one from save()"),
    "no callbacks": (lambda s: s.pop("callbacks"), "the state has no callbacks; use one from save()"),
    "a rate that is none": (lambda s: s["loop"].update(learning_rate="0.1"), "the learning rate in the state is not a number"),
    "half of what": (lambda s: s["loop"].update(half=3), "the state does not say in words how training was stopped"),
    "no loop": (lambda s: s.pop("loop"), "the state has no loop; use one from save()"),
    # the model
    "a model that is none": (lambda s: s.update(model=[1]), "the model's state is a list, not a mapping of tensors"),
    "a model of None": (lambda s: s.update(model=None), "the model's state is a NoneType, not a mapping of tensors"),
    "a weight less": (model(lambda m: m.pop("1.weight")), "the state has no 1.weight, which the model has; it belongs to another model"),
    "a weight more": (model(lambda m: m.update({"1.wieght": torch.ones(1)})), "the state has 1.wieght, which the model does not have; did you mean 1.weight?; it belongs to another model"),
    "a path as a name": (model(lambda m: m.update({"../../etc/passwd": torch.ones(1)})), "the state has ../../etc/passwd, which the model does not have; it belongs to another model"),
    "an attribute as a name": (model(lambda m: m.update({"__class__": torch.ones(1)})), "the state has __class__, which the model does not have"),
    "another shape": (model(lambda m: m.update({"1.weight": torch.ones(8, 17)})), "1.weight is float32 (8, 17) in the state, and float32 (8, 16) in the model; it belongs to another model"),
    "no shape": (model(lambda m: m.update({"2.running_mean": torch.tensor(1.0)})), "2.running_mean is float32 () in the state, and float32 (8,) in the model"),
    "another dtype": (model(lambda m: m.update({"1.weight": torch.ones(8, 16, dtype=torch.float64)})), "1.weight is float64 (8, 16) in the state, and float32 (8, 16) in the model"),
    "a number as a weight": (model(lambda m: m.update({"1.weight": 3})), "1.weight is an int in the state, not a tensor; it belongs to another model"),
    "text as a weight": (model(lambda m: m.update({"5.bias": "import os"})), "5.bias is a str in the state, not a tensor; it belongs to another model"),
    # the optimiser
    "another optimiser": (put(optimiser="SGD"), "the state is of SGD, and the optimiser is AdamW; use SGD"),
    "an optimiser that is none": (lambda s: s.update(optimiser=[]), "the state of the optimiser has no param_groups or no state"),
    "an optimiser of text": (lambda s: s.update(optimiser="AdamW"), "the state of the optimiser has no param_groups or no state"),
    "no groups": (optimiser(lambda o: o.pop("param_groups")), "the state of the optimiser has no param_groups or no state"),
    "groups that are none": (optimiser(lambda o: o.update(param_groups=[1])), "the state of the optimiser has a group without params"),
    "a group more": (optimiser(lambda o: o["param_groups"].append(dict(o["param_groups"][0]))), "the state is of an optimiser with [6, 6] parameters in its groups, and this one has [6]"),
    "a parameter less": (optimiser(lambda o: o["param_groups"][0]["params"].pop()), "the state is of an optimiser with [5] parameters in its groups, and this one has [6]"),
    "a learning rate of text": (optimiser(lambda o: o["param_groups"][0].update(lr="high")), "lr in the state of the optimiser is 'high', and in the optimiser"),
    "a moment of another shape": (optimiser(lambda o: o["state"][0].update(exp_avg=torch.ones(3))), "exp_avg of parameter 0 is float32 (3,) in the state of the optimiser, and the parameter is float32 (8, 16)"),
    "a moment of nobody": (optimiser(lambda o: o["state"].update({99: {}})), "the state of the optimiser names a parameter 99, and there are 6"),
    "a moment of text": (optimiser(lambda o: o["state"].update({"os.system": {}})), "the state of the optimiser names a parameter 'os.system', and there are 6"),
    "moments that are none": (optimiser(lambda o: o["state"].update({0: 1})), "the entry for parameter 0 in the state of the optimiser is an int, not a mapping"),
    # callbacks
    "callbacks that are none": (lambda s: s.update(callbacks=[]), "the state's callbacks are not a mapping of names to states"),
    "an average less": (lambda s: s["callbacks"]["EMA"].pop("averages"), "the state of EMA does not fit: load_state_dict: the state has no averages; it has ['updates']"),
    "an average that is none": (swap("callbacks", EMA=3), "the state of EMA does not fit: "),
    "a schedule of another kind": (lambda s: s["callbacks"]["BatchSchedule"].update(kind="StepLR"), "the state of BatchSchedule does not fit: BatchSchedule(OneCycleLR): the state is of StepLR, and the factory makes OneCycleLR; load it"),
    "a schedule with a hole": (lambda s: s["callbacks"]["BatchSchedule"].pop("done"), "the state of BatchSchedule does not fit: BatchSchedule(OneCycleLR): the state has no done; load what state_dict() gave"),
    "another recorder": (lambda s: s["callbacks"]["Recorder"].update(names=["os"]), "the state of Recorder does not fit: the state holds os, but this is Recorder(loss, learning_rate, gradient_norm); record the same quantities"),
    "another stopping": (swap("callbacks", EarlyStopping={}), "the state of EarlyStopping does not fit: "),
    "another count": (swap("callbacks", FreezeUntil={"epochs": -1}), "the state of FreezeUntil does not fit: epochs is -1; it must be a whole number of at least 0"),
    "a group with a hole": (lambda s: s["callbacks"]["Accumulate"].pop("gradients"), "the state of Accumulate does not fit: load_state_dict: the state has no gradients"),
    # where training stands
    "a loop that is none": (lambda s: s.update(loop=7), SAYS_NOT),
    "an empty loop": (lambda s: s.update(loop={}), SAYS_NOT),
    "a place less": (put(place=[1, "train"]), SAYS_NOT),
    "a place of text": (put(place=["1", "train", 4]), SAYS_NOT),
    "a pass that is none": (put(place=[1, "__init__", 4]), "the state has an impossible place [1, '__init__', 4]"),
    "an epoch before the first": (put(place=[-1, "train", 4]), "the state has an impossible place [-1, 'train', 4]"),
    "a batch before the first": (put(place=[1, "train", -4]), "the state has an impossible place [1, 'train', -4]"),
    "rows that are none": (put(rows=[1, 2]), SAYS_NOT),
    "rows without values": (lambda s: s["loop"]["rows"]["columns"].clear(), "the state is damaged: the rows of the history do not fit together"),
    "a row too many": (lambda s: s["loop"]["rows"]["columns"]["epoch"].resize_(0), "the state is damaged: the rows of the history do not fit together"),
    "values without a row": (lambda s: s["loop"]["rows"]["columns"].update(more=[1, 2]), "the state is damaged: column more of the history has more values than rows"),
    "rows of text": (put(rows="rows"), SAYS_NOT),
    "results that are none": (put(results=[]), SAYS_NOT),
    "epochs of text": (put(num_epochs="3"), SAYS_NOT),
    "steps that are none": (put(steps=3), SAYS_NOT),
    "a mean with a hole": (loop(lambda loop: loop["means"]["loss"].pop("total")), NO_MEANS + "KeyError('total')"),
    "a mean that is none": (put(means={"loss": 3}), NO_MEANS + "TypeError("),
    "a sum of text": (loop(lambda loop: loop["means"]["loss"].update(numbers="xyz")), NO_MEANS + "ValueError("),
    "pending values of text": (loop(lambda loop: loop["means"]["loss"].update(pending="xyz")), NO_MEANS + "AttributeError("),
    "random numbers that are none": (put(rng=[]), SAYS_NOT),
    "random numbers of another length": (loop(lambda loop: loop["rng"].update(torch=torch.zeros(7, dtype=torch.uint8))), NO_MEANS + "ValueError('state is not from rng_state (RuntimeError: "),
    "random numbers of a stranger": (loop(lambda loop: loop["rng"].update({"os.system": 1})), NO_MEANS),
    "random numbers of NumPy that are none": (loop(lambda loop: loop["rng"].update({"numpy.bit_generator": "Trap"})), NO_MEANS),
    "orders that are none": (put(orders=[]), SAYS_NOT),
    "an order that is none": (put(orders={"train": 3}), "the order of the train loader does not fit: TypeError("),
    "no beginning": (put(began=None), NO_MEANS + "TypeError("),
    "a beginning with a hole": (loop(lambda loop: loop["began"].pop("order")), NO_MEANS + "KeyError('order')"),
}
def everything(learn):
    return {**outcome(learn), "keep": learn.history.keep_steps, "modes": [m.training for m in learn.model.modules()], "saved": learn.cursor.saved is not None,
            "groups": hash_state({"it": [{k: v for k, v in g.items() if k != "params"} for g in learn.optimiser.param_groups]})}


@pytest.mark.parametrize("way", ["state", "file", "resume"])
@pytest.mark.parametrize("name", FORGED)
def test_a_state_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path, name, way):
    change, message = FORGED[name]
    state = snapshot(state_at("own", "batch"))
    change(state)
    learn = stopped_early()
    before = everything(learn)
    with pytest.raises(ResumeError) as caught:
        if way == "state": learn.load_state_dict(state)
        else: save_state(tmp_path / "c", state)
        if way == "file": learn.load(tmp_path / "c")
        if way == "resume": train(learn, resume=tmp_path / "c")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    now = everything(learn)
    assert [name for name in now if now[name] != before[name]] == []
    assert whole(learn)


def test_a_refused_state_does_not_take_the_place_of_the_one_to_go_on_from(tmp_path):
    state = snapshot(state_at("own", "batch"))
    FORGED["another shape"][0](state)
    save_state(tmp_path / "c", state)
    learn = stopped("own", 14)
    place = learn.place
    with pytest.raises(ResumeError): train(learn, resume=tmp_path / "c")
    assert learn.place == place
    learn.train(resume=True)
    assert differences(learn, reference()) == []


def stopped_early():
    "A learner with something to lose, cheap to make: it has trained two batches."
    return stopped("own", 1)


@pytest.mark.parametrize("way", ["load", "resume"])
def test_files_that_are_none_are_refused_and_change_nothing(tmp_path, way):
    learn = stopped("plain", 1)
    learn.save(tmp_path / "good")
    before = everything(learn)

    def refused(error, message, path):
        with pytest.raises(error, match=message) as caught:
            if way == "load": learn.load(path)
            else: train(learn, resume=path)
        assert "\n" not in str(caught.value)
        assert everything(learn) == before and whole(learn) and not hasattr(sys, "trapped")

    refused(FileNotFoundError, "there is no checkpoint .*goood; did you mean good", tmp_path / "goood")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap()))
    refused(DamagedError, "pickle is not a checkpoint", tmp_path / "pickle")
    torch.save({"model": learn.model.state_dict()}, tmp_path / "model.pt")
    refused(DamagedError, "model.pt is not a checkpoint", tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, "empty holds no checkpoint", tmp_path / "empty")
    good = (tmp_path / "good").read_bytes()
    for bad in (b"", good[:-1], good[:100] + pickle.dumps(Trap()) + good[100:], good.replace(b"train", b"tRain", 1)):
        (tmp_path / "c").write_bytes(bad)
        refused(DamagedError, "c is damaged|c is not a checkpoint", tmp_path / "c")
    (tmp_path / "c").unlink()
    (tmp_path / "c").symlink_to("good")
    refused(DamagedError, "c is a link, which is not followed", tmp_path / "c")
    save_state(tmp_path / "alien", {"epoch": 3, "weights": torch.ones(3)})
    refused(ResumeError, r"the state has no model; use one from save\(\) or", tmp_path / "alien")


def test_another_learner_is_told_what_does_not_fit(tmp_path):
    stopped("own", 12, tmp_path / "c")
    other = make()
    other.model[1] = nn.Linear(16, 9)
    with pytest.raises(ResumeError, match=r"^1\.weight is float32 \(8, 16\) in the state, and float32 \(9, 16\) in the model"): train(other, resume=tmp_path / "c")
    other = make()
    other.optimiser = torch.optim.Adam
    with pytest.raises(ResumeError, match="the state is of AdamW, and the optimiser is Adam; use AdamW"): train(other, resume=tmp_path / "c")
    assert other.optimiser is torch.optim.Adam
    other = make()
    other.dataloaders = {**other.dataloaders, "train": plain_list()["train"][:3]}
    with pytest.raises(ResumeError, match="the training loader now has 3 batches; it had 8 when training stopped after 5 of them; give it the same data"):
        train(other, resume=tmp_path / "c")


# ---------------------------------------------------------------------------------------------------- precision, compiled models

@pytest.mark.gpu
def test_the_scale_of_float16_goes_on(tmp_path):
    def learner(seed=0):
        seed_everything(seed)
        learn = Learner(network(), AdamW, F.cross_entropy, from_tensors(),
                        MixedPrecision("float16", torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=3)), "cuda")
        return learn
    whole_run = learner()
    whole_run.train(EPOCHS, 0.01)
    for k in (0, 3, 7, 12, 20):
        learn = learner()
        learn.add(stop := StopAfter(k, tmp_path / f"c{k}"))
        with pytest.raises(KeyboardInterrupt): learn.train(EPOCHS, 0.01)
        learn.remove(stop)
        fresh = learner(9)
        fresh.train(EPOCHS, 0.01, resume=tmp_path / f"c{k}")
        learn.train(resume=True)
        for each in (learn, fresh): assert outcome(each) == outcome(whole_run)
    assert load_state(tmp_path / "c12")["callbacks"]["MixedPrecision"]["scale"] != 2.0**24


@pytest.mark.filterwarnings("ignore:.*callbacks that this learner lacks")
def test_compiled_and_plain_learners_load_each_others_states(tmp_path):
    def learner(*more, seed=0):
        seed_everything(seed)
        return Learner(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), AdamW, F.cross_entropy, from_tensors(), more, "cpu")

    def compiled(seed=0): return learner(Compile(backend="eager"), seed=seed)
    uninterrupted = learner()
    uninterrupted.train(EPOCHS, 0.01)
    for k, (first, second) in enumerate([(learner, compiled), (compiled, learner), (compiled, compiled)]):
        learn = first()
        learn.add(StopAfter(12, tmp_path / f"c{k}"))
        with pytest.raises(KeyboardInterrupt): learn.train(EPOCHS, 0.01)
        fresh = second(seed=9)
        fresh.train(EPOCHS, 0.01, resume=tmp_path / f"c{k}")
        assert outcome(fresh) == outcome(uninterrupted)
        assert list(load_state(tmp_path / f"c{k}")["model"]) == list(uninterrupted.model.state_dict())


# ---------------------------------------------------------------------------------------------------- memory

def live_tensors(): return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("end", ["train", "error", "interrupt", "press", "resumed"])
def test_learner_model_and_loss_are_freed_without_the_collector(no_gc, end):
    learn, losses = make("tensors"), []
    model = learn.model
    learn.on("after_loss", lambda loss: losses.append(weakref.ref(loss)))
    if end in ("error", "interrupt"): learn.add(Fail("after_backward", 11, RuntimeError("no luck") if end == "error" else KeyboardInterrupt()))
    if end in ("press", "resumed"): learn.add(Press("after_backward"))
    if end == "train": train(learn)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)): train(learn)
        if end == "resumed": learn.train(resume=True)
    assert len(losses) > 10 and not any(loss() is not None for loss in losses)
    refs = [weakref.ref(learn), weakref.ref(model), weakref.ref(model[1].weight)]
    del learn, model
    assert [ref() for ref in refs] == [None] * 3


@pytest.mark.parametrize("where", ["last_exc", "last_value"])
@pytest.mark.parametrize("tidy", ["release", "train"])
def test_what_the_traceback_of_a_failed_cell_holds_is_released(monkeypatch, where, tidy):
    learn, held = make("plain"), []

    def fail(predictions, loss):
        big = predictions * 2
        held.extend(weakref.ref(tensor) for tensor in (predictions, loss, big))
        raise RuntimeError("out of memory")
    learn.on("after_loss", fail)
    for name in ("last_exc", "last_value"): monkeypatch.setattr(sys, name, None, raising=False)

    def cell():
        try: train(learn)
        except RuntimeError as error:
            try: raise ValueError("told in another way") from error
            except ValueError as second: setattr(sys, where, second)
    cell()
    gc.collect()
    assert all(ref() is not None for ref in held)  # as in a notebook
    if tidy == "release": learn.release()
    else:
        learn.remove(fail)
        learn.train(1, 0.01)
    assert [ref() for ref in held] == [None] * 3
    if tidy == "release": assert all(parameter.grad is None for parameter in learn.model.parameters())


def test_release_within_a_run_is_refused():
    learn = make("plain")
    learn.on("after_batch", lambda learn: learn.release())
    with pytest.raises(RuntimeError, match=r"release\(\) was called inside train\(\); call it afterwards"): train(learn)


def test_no_growth_over_a_thousand_batches_and_twenty_failures(tmp_path):
    learn = make("tensors")
    learn.remove(*[callback for callback in learn.callbacks if isinstance(callback, (Seen, Recorder))])  # which keep what they have seen
    learn.history.keep_steps = False
    learn.train(2, 0.01)
    learn.save(tmp_path / "c")
    gc.collect()
    before = live_tensors()
    learn.train(1000 // BATCHES, 0.01)
    fail = Fail("after_loss", -1)
    learn.add(fail)
    for number in range(20):
        fail.left = 3 + number
        with pytest.raises(RuntimeError): learn.train(4, 0.01)
        assert learn.cursor.saved is not None
    learn.remove(fail)
    learn.train(1, 0.01)
    gc.collect()
    assert live_tensors() <= before + 5  # the state of callbacks may have begun


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_history_results_and_state_hold_no_graph(on_accelerator, elsewhere):
    learn, found = make("own"), []
    if on_accelerator: learn.loss_func = lambda predictions, labels: elsewhere(F.cross_entropy(predictions, labels))

    def leaves(tree):
        if isinstance(tree, torch.Tensor): yield tree
        elif isinstance(tree, dict): yield from (leaf for item in tree.values() for leaf in leaves(item))
        elif isinstance(tree, (list, tuple)): yield from (leaf for item in tree for leaf in leaves(item))

    def look(learn):
        tree = [learn.state_dict(), learn.results, learn.history.rows, learn.history.steps, vars(learn)["_steps"],
                [mean.pending + [mean.total] + (mean.kept or []) for mean in learn.columns.means.values()]]
        found.extend((tensor.grad_fn, tensor.requires_grad) for tensor in leaves(tree))
    learn.on("after_loss", lambda learn, loss: learn.log(again=loss, twice=loss * 2))
    learn.on("after_batch", look, priority=4000)
    learn.on("after_epoch", look, priority=4000)
    learn.on("after_backward", lambda batch_num, epoch: 1 / 0 if (epoch, batch_num) == (1, 4) else None)
    with pytest.raises(ZeroDivisionError): train(learn)
    look(learn)
    assert len(found) > 500 and set(found) == {(None, False)}
