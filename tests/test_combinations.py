"""What steers training, all together, against one plain loop that does the same by hand."""
import importlib
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import combinations, permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import CancelStepException
from learner.steer.accumulate import Accumulate
from learner.steer.freeze import FreezeUntil
from learner.steer.update import EMA, ClipGradients


def optional(module):
    "A module that a part of these tests needs, and may do without."
    try: return importlib.import_module(f"learner.{module}")
    except ModuleNotFoundError: return None


PRECISION, SCHEDULE = optional("steer.precision"), optional("steer.schedule")
N, NORM, DECAY, EPOCHS, MAX_LR = 4, 0.5, 0.9, 2, 0.02

MAKE = {
    "Accumulate": lambda: Accumulate(N),
    "ClipGradients": lambda: ClipGradients(NORM),
    "EMA": lambda: EMA(DECAY),
    "MixedPrecision": lambda: PRECISION.MixedPrecision("bfloat16"),
    "Compile": lambda: PRECISION.Compile(backend="eager"),
    "BatchSchedule": lambda: SCHEDULE.BatchSchedule(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=MAX_LR)),
}
NEEDS = {"MixedPrecision": PRECISION, "Compile": PRECISION, "BatchSchedule": SCHEDULE}
THERE = [name for name in MAKE if NEEDS.get(name, True)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def data():
    "Ten batches of 8 and one of 4: groups of 4, 4 and 3, the last of them ragged."
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(84, 6, generator=generator), torch.randint(3, (84,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def by_hand(names, dtype=torch.bfloat16, scaler=None):
    "The loop that somebody would write: weights, averages, learning rates."
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model, batches = net(), data()
    n = N if "Accumulate" in names else 1
    steps = -(-len(batches) // n)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = None
    if "BatchSchedule" in names:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, MAX_LR, total_steps=EPOCHS * steps)
    averages, updates, rates = None, 0, []

    def tensors(): return [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]

    for _ in range(EPOCHS):
        for start in range(0, len(batches), n):
            group = batches[start:start + n]
            for x, y in group:
                with torch.autocast("cpu", dtype) if "MixedPrecision" in names else nullcontext():
                    loss = F.cross_entropy(model(x), y)
                scaler.scale(loss * (len(x) / len(group[0][0]))).backward()
            total = sum(len(x) for x, _ in group) / len(group[0][0])
            for parameter in model.parameters(): parameter.grad /= total
            scaler.unscale_(optimiser)
            if "ClipGradients" in names: nn.utils.clip_grad_norm_(model.parameters(), NORM)
            rates.append(optimiser.param_groups[0]["lr"])
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            if averages is None: averages = [tensor.clone() for tensor in tensors()]
            else: torch._foreach_lerp_(averages, tensors(), 1 - min(DECAY, (1 + updates) / (10 + updates)))
            updates += 1
            if schedule: schedule.step()
    return model.state_dict(), averages, rates


def learned(callbacks):
    "The same with callbacks, in the order in which they are given."
    model, rates = net(), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    learn = Learner(model, optimiser, F.cross_entropy, {"train": data(), "validation": data()[:2]}, device="cpu")
    for callback in callbacks: learn.add(callback)
    learn.on("before_step", lambda learn: rates.append(learn.optimiser.param_groups[0]["lr"]))
    learn.train(EPOCHS)
    return learn, rates


def check(names, expected):
    weights, averages, rates = expected
    callbacks = [MAKE[name]() for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn, own_rates = learned(callbacks)
    assert learn.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in learn.model.state_dict().items()), names
    assert own_rates == rates, names
    for callback in callbacks:
        if isinstance(callback, EMA):
            model = callback.model()
            own = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
            assert all(map(torch.equal, own, averages)), names


@pytest.mark.skipif(len(THERE) < len(MAKE), reason="learner.steer.precision or learner.steer.schedule is not there")
def test_all_of_them_are_there():
    assert list(MAKE) == THERE


PLAIN = [name for name in THERE if name != "Compile"]  # compiling takes time, so it is not in all tests


@pytest.mark.parametrize("count", range(1, len(PLAIN) + 1))
def test_any_of_them_together(count):
    for names in combinations(PLAIN, count): check(names, by_hand(names))


@pytest.mark.parametrize("first", PLAIN)
def test_every_order_of_addition(first):
    expected = by_hand(PLAIN)
    for order in permutations(PLAIN):
        if order[0] == first: check(order, expected)


@pytest.mark.skipif(PRECISION is None, reason="learner.steer.precision is not there")
def test_compiled_in_any_place():
    expected = by_hand(THERE)
    for place in range(len(THERE)): check((*PLAIN[:place], "Compile", *PLAIN[place:]), expected)
    check(("Compile",), by_hand(()))


def test_a_step_left_out_counts_for_none_of_them():
    callbacks = {name: MAKE[name]() for name in PLAIN if name != "BatchSchedule"}
    model, steps = net(), []
    learn = Learner(model, torch.optim.AdamW(model.parameters(), lr=0.01), F.cross_entropy, {"train": data()},
                    list(callbacks.values()), device="cpu")

    def leave_out(learn):
        if learn.batch_num < 4:
            learn.optimiser.zero_grad()
            raise CancelStepException
    learn.on("before_step", leave_out)
    learn.on("after_step", lambda learn: steps.append(learn.batch_num))
    learn.train()
    assert steps == [7, 10] and callbacks["EMA"].updates == 2


def test_a_frozen_part_among_all_others():
    names = [name for name in THERE if name not in ("Compile", "BatchSchedule")]
    learn, _ = learned([*(MAKE[name]() for name in names), FreezeUntil(EPOCHS, "0")])
    before = net()
    assert torch.equal(learn.model[0].weight, before[0].weight) and not torch.equal(learn.model[3].weight, before[3].weight)
    assert all(parameter.requires_grad for parameter in learn.model.parameters())


@pytest.mark.skipif(PRECISION is None, reason="learner.steer.precision is not there")
def test_float16_with_its_scaler():
    "Gradients are weighted, scaled, divided, unscaled, clipped, in this order; the scale grows and shrinks on the way."
    def scaler(): return torch.amp.GradScaler("cpu", init_scale=2.0 ** 20, growth_interval=2)
    names = ("ClipGradients", "MixedPrecision", "Accumulate")
    own = scaler()
    weights, _, _ = by_hand(names, torch.float16, own)
    mixed = PRECISION.MixedPrecision("float16", scaler())
    learn, _ = learned([ClipGradients(NORM), mixed, Accumulate(N)])
    assert all(torch.equal(value, weights[name]) for name, value in learn.model.state_dict().items())
    assert mixed.state_dict() == own.state_dict() and mixed.skipped
