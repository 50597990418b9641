"""A state that fits in everything but one value is refused before anything is put in, or does no harm."""
import random
import tempfile
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from learner.base.hashing import hash_state
from learner.base.nested import snapshot
from learner.keep.checkpoint import Checkpoint
from learner.keep.distributed import Distributed
from learner.loop.data import DatasetLoader
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.runs.loggers import CSVLogger
from learner.steer.accumulate import Accumulate
from learner.steer.curves import FunctionScheduler, linear
from learner.steer.freeze import FreezeUntil
from learner.steer.multi import Optimisers
from learner.steer.precision import MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule
from learner.steer.stopping import EarlyStopping
from learner.steer.update import EMA
from learner.steer.whole_step import WholeStep
from learner.watch.activations import ActivationStats
from learner.watch.metrics import Metrics, MulticlassAccuracy
from learner.watch.recorder import Recorder

WRONG = (None, [], {}, "x\x1b[2J", -1, 10**400, float("nan"), True, [[]], torch.zeros(3), torch.zeros(0), {"a": {}})
NOT = (ValueError, TypeError, OSError, OverflowError)  # the last from the user's own callback


REMOVED = object()
FORGED = (*WRONG, REMOVED)


class Own(DataLoader):
    "A loader that keeps a state of its own."
    seen, places = 0, [1, 2]

    def state_dict(self): return {"seen": self.seen, "places": [*self.places]}

    def load_state_dict(self, state):
        self.seen = int(state["seen"])
        self.places = [int(place) for place in state["places"]]


class Late(Own):
    "One that looks at its state when it is read."

    def load_state_dict(self, state): self.seen, self.places = state["seen"], state["places"]

    def __iter__(self):
        if self.seen > 1000: raise ValueError("there is no such place")
        for number, batch in enumerate(super().__iter__()):
            if number < sum(self.places) * self.seen: continue
            yield batch


def shuffled(kind, data): return kind(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))


LOADERS = {"torch": partial(shuffled, DataLoader), "own state": partial(shuffled, Own), "late": partial(shuffled, Late),
           "torchdata": partial(shuffled, StatefulDataLoader), "package": lambda data: DatasetLoader(data, 4, shuffle=True)}


class User(Callback):
    "A callback of a user, which finds out late that its state is no good."
    value = 0.0

    def state_dict(self): return {"value": self.value}

    def load_state_dict(self, state): self.value = state["value"]

    def before_training(self): self.value = self.value / 2 + 1


def first(model):
    callbacks = [EMA(0.9), Recorder("loss"), EarlyStopping("validation_loss", patience=9, restore_best=True), Accumulate(2), Metrics(accuracy=MulticlassAccuracy()), User()]
    return torch.optim.AdamW(model.parameters(), 0.01), callbacks


def second(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    callbacks = [BatchSchedule(partial(OneCycleLR, max_lr=0.1)), EpochSchedule(partial(ReduceLROnPlateau, patience=1)), FreezeUntil(1, "0"),
                 MixedPrecision("float16", scaler), ActivationStats(nn.Linear), Recorder("loss", every=2)]
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), callbacks


def third(model):
    optimisers = Optimisers(body=torch.optim.SGD(model[0].parameters(), 0.1), head=torch.optim.Adam(model[1:].parameters(), 0.01))
    def falling(optimiser, total_steps): return FunctionScheduler(optimiser, linear(1, 0), total_steps=total_steps)
    return optimisers, [BatchSchedule(falling, "body"), EpochSchedule(partial(ReduceLROnPlateau, patience=0), optimiser="head")]


def fourth(model):
    folder = Path(tempfile.mkdtemp())
    model[1] = nn.LayerNorm(4)  # shards refuse batch norm
    callbacks = [Distributed(shards=2), Metrics(accuracy=MulticlassAccuracy()), Checkpoint(folder / "run"), CSVLogger(folder / "log.csv")]
    return torch.optim.AdamW(model.parameters(), 0.01), callbacks


def fifth(model):
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), [WholeStep("eager"), EMA(0.9), Recorder("loss")]


KINDS = {"first": first, "second": second, "third": third, "fourth": fourth, "fifth": fifth}


def made(loader="torch", kind="first"):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 2), torch.arange(16) % 2)
    loaders = {"train": LOADERS[loader](data), "validation": DataLoader(data, 8)}
    norm = nn.LayerNorm if loader == "torchdata" else nn.BatchNorm1d  # a forged place of torchdata's can leave a batch of one row
    model = nn.Sequential(nn.Linear(2, 4), norm(4), nn.Linear(4, 2))
    optimiser, callbacks = KINDS[kind](model)
    return Learner(model, optimiser, nn.functional.cross_entropy, loaders, callbacks, device="cpu")


def states(loader="torch", kind="first", **length):
    "The state in the middle of an epoch and at the end."
    learn, found = made(loader, kind), {}
    learn.on("after_batch", lambda learn: learn.place.epoch == 1 and learn.place.batch == 2 and found.setdefault("middle", snapshot(learn.state_dict())))
    learn.train(**(length or {"epochs": 3}))
    return {**found, "end": snapshot(learn.state_dict())}


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) and len(value) < 10 else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(state, path, value):
    if not path: return value
    key, *rest = path
    if not rest and value is REMOVED:
        if isinstance(state, dict): return {name: each for name, each in state.items() if name != key}
        return type(state)(each for index, each in enumerate(state) if index != key)
    if isinstance(state, dict): return {**state, key: changed(state[key], rest, value)}
    items = [changed(item, rest, value) if index == key else item for index, item in enumerate(state)]
    return tuple(items) if isinstance(state, tuple) else items


def kept(learn):
    "All that a state holds, the random numbers, and the state of the loader."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {name: part for name, part in learn.state_dict().items() if name != "made"}  # which names hooks that came later
    loader = learn.dataloaders["train"]
    if isinstance(loader, Own): state["own"] = {"seen": repr(loader.seen), "places": repr(loader.places)}
    return hash_state(state)


def cases_of(found, request, most, seed, *parts):
    cases = [(when, path, value) for when, state in found.items() for path in places(state) for value in FORGED if not parts or path[0] in parts]
    return cases if request.config.getoption("--long") else random.Random(seed).sample(cases, min(most, len(cases)))


def written(when, path, value): return f"{when}: {'.'.join(map(str, path))} = {'REMOVED' if value is REMOVED else repr(value):.40}"


def fault(error):
    "What is wrong with how a state is refused."
    if not isinstance(error, NOT): return f"{type(error).__name__}: {error!s:.100}"
    if "\x1b" in str(error): return f"raw {error!s:.100}"
    return "several lines" if "\n" in str(error) else ""


def wrong_in_training(found, loader, kind, length, when, path, value):
    "What is wrong with how a training goes on from a state with one forged value; empty if nothing is."
    where, learn = written(when, path, value), made(loader, kind)
    torch.manual_seed(5)
    before, batches = kept(learn), []
    learn.on("before_batch", lambda learn: batches.append(learn.batch_num))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss that is NaN
        try: learn.train(**length, resume=changed(found[when], path, value))
        except Exception as error:
            if batches: return f"{where}: failed in training: {type(error).__name__}: {error!s:.100}"
            if bad := fault(error): return f"{where}: {bad}"
            if kept(learn) != before: return f"{where}: refused, and changed ({error!s:.100})"
    return ""


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # in torchdata
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of torch, where a forged list is an index
@pytest.mark.parametrize(("loader", "kind"), [("torch", "first"), ("own state", "first"), ("torch", "second"), ("package", "third"), ("package", "fourth"), ("torch", "fifth")])
def test_a_state_with_one_wrong_value_is_refused_whole(loader, kind, request):
    found = states(loader, kind)
    assert {*found} == {"middle", "end"}
    wrong, learn, cases = [], made(loader, kind), cases_of(found, request, 150, 0)
    learn.train(1)
    start, before = deepcopy(learn.state_dict()), kept(learn)
    for when, path, value in cases:
        where = written(when, path, value)
        try: learn.load_state_dict(changed(found[when], path, value))
        except Exception as error:
            if not type(error).__module__.startswith("learner."): wrong.append(f"{where}: {type(error).__name__}: {error!s:.100}")
            elif bad := fault(error): wrong.append(f"{where}: {bad}")
            if kept(learn) != before: wrong.append(f"{where}: refused, and changed")
        else: learn.load_state_dict(start)
        learn.cursor.saved = None
        if kept(learn) != before:
            learn = made(loader, kind)
            learn.train(1)
            start, before = deepcopy(learn.state_dict()), kept(learn)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:60])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # in torchdata
@pytest.mark.parametrize(("loader", "kind", "length"), [
    ("torch", "first", {"epochs": 3}), ("own state", "first", {"epochs": 3}), ("late", "third", {"epochs": 3}), ("torchdata", "third", {"epochs": 3}),
    ("torch", "second", {"epochs": 3}), ("package", "third", {"steps": 12, "validation_steps": 4}), ("torchdata", "first", {"steps": 12, "validation_steps": 4})])
def test_a_training_with_one_wrong_value_is_refused_whole_before_its_first_batch_or_comes_to_its_end(loader, kind, length, request):
    found = states(loader, kind, **length)
    cases = cases_of(found, request, 60, 1, "loop", "callbacks", "optimiser")
    wrong = [bad for case in cases if (bad := wrong_in_training(found, loader, kind, length, *case))]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:60])


SCHEDULER = ("callbacks", "BatchSchedule", "scheduler")


@pytest.mark.parametrize(("kind", "path", "value"), [
    ("third", ("callbacks", "BatchSchedule"), None), ("third", ("callbacks", "BatchSchedule", "kind"), "x\x1b[2J"), ("third", (*SCHEDULER, "shares"), -1),
    ("third", (*SCHEDULER, "shares", 0), torch.zeros(3)), ("third", ("callbacks", "BatchSchedule", "before", 0, "lr"), None),
    ("third", ("callbacks", "EpochSchedule", "scheduler", "best"), torch.zeros(0)), ("second", ("optimiser", "param_groups", 0, "max_lr"), REMOVED),
    ("second", (*SCHEDULER, "use_beta1"), -1), ("second", (*SCHEDULER, "total_steps"), True), ("second", (*SCHEDULER, "_schedule_phases", 1), -1),
    ("second", (*SCHEDULER, "_schedule_phases", 1, "start_lr"), "x"), ("second", (*SCHEDULER, "_anneal_func_type"), "x"),
    ("first", ("optimiser", "param_groups", 0, "betas", 0), -1), ("first", ("optimiser", "param_groups", 0, "amsgrad"), True),
    ("first", ("optimiser", "param_groups", 0, "params", 1), True), ("first", ("callbacks", "Recorder", "num_steps"), 10**400), ("first", ("loop", "loader"), REMOVED)])
def test_what_the_long_form_has_found_is_refused(kind, path, value):
    found = states("torch", kind)
    assert wrong_in_training(found, "torch", kind, {"epochs": 3}, "middle", path, value) == ""


@pytest.mark.filterwarnings("ignore:BatchSchedule.*steps that it was made for are done")
@pytest.mark.parametrize("when", ["middle", "end"])
def test_a_state_that_is_handed_over_stays_as_it_is(when):
    for kind in KINDS:
        given = states("torch", kind)[when]
        before = hash_state(given)
        made("torch", kind).train(5, resume=given)
        assert hash_state(given) == before, kind
        learn = made("torch", kind)
        learn.load_state_dict(given)
        learn.train(5, resume=True)
        learn.train(1)
        assert hash_state(given) == before, kind


def test_a_momentum_that_has_come_to_zero_is_put_in_with_nesterov_too():
    learn = made()
    learn.optimiser = torch.optim.SGD(learn.model.parameters(), 0.1, momentum=0.9, nesterov=True)
    learn.optimiser.param_groups[0]["momentum"] = 0.0
    learn.load_state_dict(learn.state_dict())
    assert learn.optimiser.param_groups[0]["momentum"] == 0.0
