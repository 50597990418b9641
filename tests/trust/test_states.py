"""A state that fits in everything but one value is refused before anything is put in, or does no harm."""
import random
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.base.hashing import hash_state
from learner.base.nested import snapshot
from learner.loop.learner import Learner
from learner.loop.state import ResumeError
from learner.steer.accumulate import Accumulate
from learner.steer.stopping import EarlyStopping
from learner.steer.update import EMA
from learner.watch.metrics import Metrics, MulticlassAccuracy
from learner.watch.recorder import Recorder

WRONG = (None, [], {}, "x\x1b[2J", -1, 10**400, float("nan"), True, [[]], torch.zeros(3), torch.zeros(0), {"a": {}})
NOT = (ValueError, TypeError, OSError)


class Own(DataLoader):
    "A loader that keeps a state of its own."
    def state_dict(self): return {"seen": 3, "places": [1, 2]}

    def load_state_dict(self, state):
        self.seen = int(state["seen"])
        self.places = [int(place) for place in state["places"]]


def made(loader=DataLoader):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 2), torch.arange(16) % 2)
    loaders = {"train": loader(data, 4, shuffle=True, generator=torch.Generator()), "validation": DataLoader(data, 8)}
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    callbacks = [EMA(0.9), Recorder("loss"), EarlyStopping("validation_loss"), Accumulate(2), Metrics(accuracy=MulticlassAccuracy())]
    return Learner(model, torch.optim.AdamW(model.parameters(), 0.01), nn.functional.cross_entropy, loaders, callbacks, device="cpu")


def states(loader):
    "The state in the middle of an epoch and at the end."
    learn, found = made(loader), {}
    learn.on("after_batch", lambda learn: learn.place.epoch == 1 and learn.place.batch == 2 and found.setdefault("middle", snapshot(learn.state_dict())))
    learn.train(3, 0.01)
    return {**found, "end": snapshot(learn.state_dict())}


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) and len(value) < 10 else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(state, path, value):
    if not path: return value
    key, *rest = path
    if isinstance(state, dict): return {**state, key: changed(state[key], rest, value)}
    items = [changed(item, rest, value) if index == key else item for index, item in enumerate(state)]
    return tuple(items) if isinstance(state, tuple) else items


def kept(learn):
    state = learn.state_dict()
    state["loop"] = {key: value for key, value in state["loop"].items() if key != "rng"}
    return hash_state(state)


@pytest.mark.parametrize("loader", [DataLoader, Own])
def test_a_state_with_one_wrong_value_is_refused_whole(loader, request):
    found = states(loader)
    assert {*found} == {"middle", "end"}
    cases = [(when, path, value) for when, state in found.items() for path in places(state) for value in WRONG]
    if not request.config.getoption("--long"): cases = random.Random(0).sample(cases, 250)
    wrong = []
    learn = made(loader)
    learn.train(1, 0.01)
    start, before = deepcopy(learn.state_dict()), kept(learn)
    for when, path, value in cases:
        where = f"{when}: {'.'.join(map(str, path))} = {value!r:.30}"
        try: learn.load_state_dict(changed(found[when], path, value))
        except NOT as error:
            if not type(error).__module__.startswith("learner."): wrong.append(f"{where}: {type(error).__name__}: {error!s:.100}")
            if "\x1b" in str(error): wrong.append(f"{where}: raw {error!s:.100}")
            if kept(learn) != before: wrong.append(f"{where}: refused, and changed")
        except Exception as error: wrong.append(f"{where}: {type(error).__name__}: {error!s:.100}")
        else: learn.load_state_dict(start)
        if kept(learn) != before:
            learn = made(loader)
            learn.train(1, 0.01)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:60])


@pytest.mark.parametrize("loader", [DataLoader, Own])
def test_a_training_with_one_wrong_value_is_refused_whole(loader, request):
    found = states(loader)
    cases = [(when, path, value) for when, state in found.items() for path in places(state) for value in WRONG if path[0] in ("loop", "callbacks")]
    if not request.config.getoption("--long"): cases = random.Random(1).sample(cases, 100)
    wrong = []
    for when, path, value in cases:
        where = f"{when}: {'.'.join(map(str, path))} = {value!r:.30}"
        learn = made(loader)
        before = kept(learn)
        try: learn.train(3, resume=changed(found[when], path, value))
        except ResumeError as error:
            late = "the rest of the state is in place already" in str(error)  # a loader with a state of its own has the last word
            if kept(learn) != before and not late: wrong.append(f"{where}: refused, and changed ({error!s:.100})")
        except Exception as error:  # a callback may find out later what it was given, when it sees the model
            if path[0] != "callbacks": wrong.append(f"{where}: {type(error).__name__}: {error!s:.100}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:60])
