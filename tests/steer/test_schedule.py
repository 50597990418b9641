"""Schedules against torch's own stepped by hand in a plain loop; resume, repeats, lengths; early stopping; bad input."""
import contextlib
import copy
import gc
import json
import math
import pickle
import warnings
import weakref
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as lrs

from learner.check.conformance import check_callback
from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
)
from learner.steer.curves import ScheduleError, combine, constant, cosine, exponential, linear, warm_up
from learner.steer.schedule import BatchSchedule, EpochSchedule, PiecewiseSchedule, Schedule
from learner.steer.stopping import EarlyStopping, MonitorError
from learner.steer.update import EMA
from learner.watch.progress import Progress

torch.manual_seed(0)
X, Y = torch.randn(70, 4), torch.randint(3, (70,))
BATCHES = list(zip(X.split(10), Y.split(10), strict=True))  # 7
PER_EPOCH, EPOCHS = len(BATCHES), 3
TOTAL = PER_EPOCH * EPOCHS


def net():
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def sgd(model):
    return torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.02}], lr=0.1, momentum=0.9)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99))


def values(optimiser):
    return [(float(g["lr"]), g.get("momentum"), g.get("betas"), g["weight_decay"]) for g in optimiser.param_groups]


class Watch(Callback):
    "The hyperparameters of each update, as the step used them."
    watches = True
    priority = 10**6

    def __init__(self): self.seen = []
    def before_step(self, optimiser): self.seen.append(values(optimiser))


def learner(callbacks=(), make=sgd, batches=BATCHES, validation=True, **kwargs):
    model = net()
    loaders = {"train": batches, **({"validation": BATCHES[:2]} if validation else {})}
    return Learner(model, make(model), F.cross_entropy, loaders, callbacks, device="cpu", **kwargs)


def by_hand(factory, make=sgd, epochs=EPOCHS, per="update"):
    "The plain loop: torch's scheduler, torch's order."
    model, seen = net(), []
    optimiser = make(model)
    scheduler = factory(optimiser)
    for _ in range(epochs):
        for x, y in BATCHES:
            seen.append(values(optimiser))
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            optimiser.zero_grad()
            if per == "update": scheduler.step()
        if per == "epoch": scheduler.step()
    return seen, model


def same_weights(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def sequential(optimiser, milestone=3):
    return lrs.SequentialLR(optimiser, [lrs.ConstantLR(optimiser, 0.1, total_iters=2), lrs.ExponentialLR(optimiser, 0.9)], [milestone])


def chained(optimiser):
    return lrs.ChainedScheduler([lrs.ConstantLR(optimiser, 0.1, total_iters=4), lrs.ExponentialLR(optimiser, 0.9)])


OPEN = {  # schedulers without a length of their own: they go on from train to train
    "StepLR": partial(lrs.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": partial(lrs.MultiStepLR, milestones=[1, 2, 5], gamma=0.5),
    "ConstantLR": lrs.ConstantLR,
    "ExponentialLR": partial(lrs.ExponentialLR, gamma=0.9),
    "CosineAnnealingLR given": partial(lrs.CosineAnnealingLR, T_max=5),
    "CosineAnnealingWarmRestarts": partial(lrs.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "CyclicLR": partial(lrs.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=4),
    "CyclicLR exp_range": partial(lrs.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=4, mode="exp_range", gamma=0.9),
    "LambdaLR": partial(lrs.LambdaLR, lr_lambda=lambda step: 0.95**step),
    "MultiplicativeLR": partial(lrs.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "LinearLR": lrs.LinearLR,
    "PolynomialLR": partial(lrs.PolynomialLR, total_iters=12, power=2),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}
FILLED = {  # with the number of steps, for the oracle to be given
    "OneCycleLR": (partial(lrs.OneCycleLR, max_lr=0.3), "total_steps"),
    "OneCycleLR three phases": (partial(lrs.OneCycleLR, max_lr=[0.3, 0.1], three_phase=True, anneal_strategy="linear"), "total_steps"),
    "OneCycleLR without momentum": (partial(lrs.OneCycleLR, max_lr=0.3, cycle_momentum=False), "total_steps"),
    "CosineAnnealingLR": (lrs.CosineAnnealingLR, "T_max"),
}


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("per", ["update", "epoch"])
def test_open_schedulers_equal_those_stepped_by_hand_also_over_three_trains(name, per):
    seen, model = by_hand(OPEN[name], epochs=6, per=per)
    for calls in ([6], [1, 2, 3]):
        schedule = (BatchSchedule if per == "update" else EpochSchedule)(OPEN[name])
        learn = learner([schedule, watch := Watch()])
        for epochs in calls: learn.train(epochs)
        assert watch.seen == seen
        assert same_weights(learn.model, model)
        assert schedule.scheduler is None


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("per", ["update", "epoch"])
def test_lengths_are_filled_in_and_each_train_is_a_new_cycle(name, make, per):
    factory, length = FILLED[name]
    if make is adam and name == "OneCycleLR three phases": factory = partial(lrs.OneCycleLR, max_lr=0.3, three_phase=True)
    steps = TOTAL if per == "update" else EPOCHS
    seen, model = by_hand(partial(factory, **{length: steps}), make, per=per)
    schedule = (BatchSchedule if per == "update" else EpochSchedule)(factory)
    learn = learner([schedule, watch := Watch()], make)
    before = values(learn.optimiser)
    learn.train(EPOCHS)
    assert watch.seen == seen
    assert same_weights(learn.model, model)
    assert values(learn.optimiser) == before
    assert not any("initial_lr" in group or "max_lr" in group for group in learn.optimiser.param_groups)
    assert "step" not in vars(learn.optimiser)
    watch.seen.clear()
    learn.train(EPOCHS)
    assert watch.seen == seen
    assert values(learn.optimiser) == before


def test_given_epochs_or_steps_are_taken_as_given():
    for given in (dict(epochs=EPOCHS), dict(steps_per_epoch=PER_EPOCH), dict(total_steps=TOTAL), dict(epochs=EPOCHS, steps_per_epoch=PER_EPOCH)):
        learn = learner([BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3, **given)), watch := Watch()])
        learn.train(EPOCHS)
        assert watch.seen == by_hand(partial(lrs.OneCycleLR, max_lr=0.3, total_steps=TOTAL))[0]


def test_plateau_equals_the_one_stepped_by_hand():
    factory = partial(lrs.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.05)
    learn = learner([EpochSchedule(factory), watch := Watch()])
    learn.train(8)
    optimiser = sgd(net())
    scheduler, expected = factory(optimiser), []
    for row in learn.history:
        expected += PER_EPOCH * [values(optimiser)]
        scheduler.step(row["validation_loss"])
    assert watch.seen == expected
    assert len({seen[0][0] for seen in expected}) > 2  # it has reduced


def test_plateau_takes_no_step_in_epochs_without_validation():
    schedule = EpochSchedule(lrs.ReduceLROnPlateau)
    counts = []
    learn = learner(schedule)
    learn.on("after_epoch", lambda: counts.append(schedule.done), priority=40)
    learn.train(7, validation_epochs=3)
    assert counts == [0, 0, 1, 1, 1, 2, 3]


class Accumulate(Callback):
    "Every n-th batch takes a step, and the last of a pass."
    priority = -40

    def __init__(self, n): self.n = n
    def updates_per_epoch(self, num_batches): return math.ceil(num_batches / self.n)
    def before_step(self, batch_num):
        if (batch_num + 1) % self.n and batch_num + 1 < PER_EPOCH: raise CancelStepException


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_accumulation_is_respected(n):
    schedule = BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3))
    rates = []
    learn = learner([schedule, Accumulate(n)])
    learn.on("after_step", lambda optimiser: rates.append(values(optimiser)))
    learn.train(EPOCHS)
    total = EPOCHS * math.ceil(PER_EPOCH / n)
    optimiser = sgd(net())
    scheduler, expected = lrs.OneCycleLR(optimiser, 0.3, total_steps=total), []
    for _ in range(total):
        expected.append(values(optimiser))
        optimiser.step()
        scheduler.step()
    assert rates == expected


class Raise(Callback):
    def __init__(self, hook, error, batches):
        self.error, self.batches = error, batches
        setattr(self, hook, self.go)

    def go(self, batch_num):
        if batch_num in self.batches: raise self.error


@pytest.mark.parametrize(("hook", "error"), [("before_step", CancelStepException), ("after_backward", CancelBatchException), ("before_batch", CancelBatchException)])
@pytest.mark.parametrize("batches", [[0], [2, 3], [6], range(7)])
def test_a_step_left_out_is_no_step_of_the_schedule_and_torch_does_not_warn(hook, error, batches):
    one, other = BatchSchedule(lrs.CosineAnnealingLR), EpochSchedule(partial(lrs.ExponentialLR, gamma=0.9))
    counts = []
    learn = learner([one, Raise(hook, error, batches)])
    learn.on("cleanup_epoch", lambda: counts.append(one.done))
    learn.train(2)
    taken = PER_EPOCH - len(batches)
    assert counts == [taken, 2 * taken]
    learner([other, Raise(hook, error, batches)]).train(2)
    assert other.state_dict()["done"] == 2


def test_an_epoch_that_is_cancelled_is_no_step_and_a_cancelled_pass_is_one():
    for hook, steps in (("before_epoch", 2), ("after_batch", 3)):
        schedule = EpochSchedule(partial(lrs.ExponentialLR, gamma=0.9))
        learn = learner(schedule)

        def cancel(epoch):
            if epoch == 1: raise CancelEpochException
        learn.on(hook, cancel)
        learn.train(3)
        assert schedule.state_dict()["done"] == steps


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no"), CancelTrainException])
def test_what_belongs_to_a_train_is_put_back_however_it_ends(error):
    learn = learner(make=adam, callbacks=[BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3)), Schedule(linear(0, 1), "weight_decay"), Raise("after_batch", error, [4])])
    groups = [{k: v for k, v in group.items() if k != "params"} for group in learn.optimiser.param_groups]
    attributes = set(vars(learn.optimiser))
    with contextlib.suppress(KeyboardInterrupt, RuntimeError): learn.train(2)
    assert [{k: v for k, v in group.items() if k != "params"} for group in learn.optimiser.param_groups] == groups
    assert set(vars(learn.optimiser)) == attributes


def test_two_of_torchs_schedules_on_one_optimiser_are_unwound_in_order():
    learn = learner([BatchSchedule(lrs.CosineAnnealingLR), EpochSchedule(lrs.CosineAnnealingLR)])
    before = values(learn.optimiser)
    for _ in range(2):
        learn.train(2)
        assert values(learn.optimiser) == before
        assert "step" not in vars(learn.optimiser)


def test_a_rate_that_was_changed_in_between_begins_anew():
    schedule = EpochSchedule(partial(lrs.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch))
    learn = learner([schedule, watch := Watch()], adam)
    learn.train(2)
    assert values(learn.optimiser)[0][0] == 0.025
    learn.train(2, learning_rate=0.8)
    assert [seen[0][0] for seen in watch.seen[::PER_EPOCH]] == [0.1, 0.05, 0.8, 0.4]


# Going on

ALL = {**{name: partial(BatchSchedule, factory) for name, factory in OPEN.items()},
       **{name: partial(BatchSchedule, factory) for name, (factory, _) in FILLED.items()},
       "OneCycleLR given": partial(BatchSchedule, partial(lrs.OneCycleLR, max_lr=0.3, total_steps=TOTAL)),
       "progress": partial(Schedule, warm_up(cosine(0.3, 0.01))), "update": partial(Schedule, lambda step: 0.1 / (1 + step), of="update"),
       "momentum": partial(Schedule, cosine(0.95, 0.8), "momentum")}


class Tail:
    "The batches of the first epoch from one on; whole epochs afterwards."
    def __init__(self, start): self.start = start
    def __len__(self): return PER_EPOCH
    def __iter__(self):
        start, self.start = self.start, 0
        return iter(BATCHES[start:])


@pytest.mark.parametrize("name", ALL)
def test_training_goes_on_exactly_after_any_batch(name):
    whole, saved = ALL[name](), []
    learn = learner([whole, watch := Watch()])

    def save():
        state = whole.state_dict()
        saved.append((copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.optimiser.state_dict()), json.loads(json.dumps(state))))
    learn.on("after_batch", save)
    learn.train(EPOCHS)
    assert len(saved) == TOTAL
    for done, (weights, optimiser, state) in enumerate(saved[:-1], 1):
        fresh = ALL[name]()
        resumed = learner([fresh, rest := Watch()], batches=Tail(done % PER_EPOCH))
        resumed.model.load_state_dict(weights)
        resumed.optimiser.load_state_dict(optimiser)
        fresh.load_state_dict(state)
        resumed.train(EPOCHS - done // PER_EPOCH)
        assert rest.seen == watch.seen[done:]
        assert same_weights(resumed.model, learn.model)
        assert values(resumed.optimiser) == values(learn.optimiser)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR", "SequentialLR", "progress"])
def test_a_state_can_be_loaded_when_training_has_begun(name):
    whole, states = ALL[name](), []
    learn = learner([whole, watch := Watch()])
    learn.on("after_batch", lambda: states.append(whole.state_dict()))
    learn.train(EPOCHS)
    fresh = ALL[name]()
    resumed = learner([fresh, rest := Watch()], batches=Tail(5))

    def load(epoch):
        if epoch == 0: fresh.load_state_dict(states[4])
    resumed.on("before_epoch", load)
    resumed.train(EPOCHS)
    assert rest.seen == watch.seen[5:]


def test_a_resumed_state_wins_over_the_learning_rate_of_the_call():
    whole, states = BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3)), []
    learn = learner([whole, watch := Watch()], adam)
    learn.on("after_batch", lambda: states.append(whole.state_dict()))
    learn.train(EPOCHS, learning_rate=0.1)
    fresh = BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3))
    fresh.load_state_dict(states[6])
    resumed = learner([fresh, rest := Watch()], adam)
    resumed.train(2, learning_rate=0.1)
    assert rest.seen == watch.seen[7:]


# Lengths

def test_a_schedule_shorter_than_the_run_is_refused_before_anything_starts():
    learn = learner(BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3, total_steps=TOTAL)))
    learn.train(EPOCHS)
    before, weights = values(learn.optimiser), copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ScheduleError, match="has 0 of its 21 steps left and this train takes 7; leave its length out"): learn.train(1)
    assert values(learn.optimiser) == before
    assert all(torch.equal(weights[name], value) for name, value in learn.model.state_dict().items())
    assert len(learn.history) == EPOCHS


def test_a_schedule_longer_than_the_run_is_said_and_goes_on():
    learn = learner([BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3, total_steps=TOTAL)), watch := Watch()])
    with pytest.warns(UserWarning, match="has 21 of its 21 steps left and this train takes 7; the next train continues it"): learn.train(1)
    learn.train(2)
    assert watch.seen == by_hand(partial(lrs.OneCycleLR, max_lr=0.3, total_steps=TOTAL))[0]


def test_more_updates_than_planned_keep_the_last_value_and_say_so_once():
    class Twice(Learner):
        def train_batch(self):
            self.act("prepare")
            for _ in range(2): self.act("predict", "loss", "backward", "step")
    for steps_per_epoch, warned in ((None, True), (2 * PER_EPOCH, False)):
        model = net()
        schedule = BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3), steps_per_epoch=steps_per_epoch)
        learn = Twice(model, sgd(model), F.cross_entropy, {"train": BATCHES}, [schedule, watch := Watch()], device="cpu")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            learn.train(2)
        assert [("pass steps_per_epoch" in str(w.message)) for w in found] == [True] * warned
        assert len(watch.seen) == 4 * PER_EPOCH
        if warned: assert len({str(seen) for seen in watch.seen[2 * PER_EPOCH:]}) == 1


def test_a_loader_without_length_needs_steps_per_epoch_and_only_where_a_length_is_asked_for():
    class Stream:
        def __iter__(self): return iter(BATCHES)
    with pytest.raises(ScheduleError, match="does not tell its length"):
        learner(BatchSchedule(lrs.CosineAnnealingLR), batches=Stream()).train(1)
    learner(BatchSchedule(lrs.CosineAnnealingLR, steps_per_epoch=PER_EPOCH), batches=Stream()).train(1)
    learner(BatchSchedule(partial(lrs.StepLR, step_size=2)), batches=Stream()).train(1)
    learner(EpochSchedule(lrs.CosineAnnealingLR), batches=Stream()).train(1)


# Functions

def test_a_cosine_of_the_progress_is_torchs_annealing():
    seen = by_hand(partial(lrs.CosineAnnealingLR, T_max=TOTAL, eta_min=0.0))[0]
    learn = learner([Schedule(cosine(0.1, 0)), watch := Watch()])
    learn.train(EPOCHS)
    for one, other in zip(watch.seen, seen, strict=True):
        assert [g[0] for g in one] == pytest.approx([g[0] for g in other], abs=1e-12)


@pytest.mark.parametrize(("name", "index"), [("lr", 0), ("betas[0]", 2), ("weight_decay", 3)])
def test_a_function_sets_any_hyperparameter_of_the_progress(name, index):
    learn = learner([Schedule(linear(0.5, 0.1), name), watch := Watch()], adam)
    before = values(learn.optimiser)
    learn.train(2)
    found = [seen[0][index][0] if name == "betas[0]" else seen[0][index] for seen in watch.seen]
    assert found == [0.5 + (0.1 - 0.5) * (i / 14) for i in range(14)]
    assert values(learn.optimiser) == before


def test_of_updates_and_of_epochs_go_on_from_train_to_train():
    learn = learner([Schedule(lambda n: 0.1 / (1 + n), of="update"), Schedule(lambda n: 0.9 - 0.1 * n, "momentum", of="epoch"), watch := Watch()])
    for epochs in (1, 2): learn.train(epochs)
    assert [seen[0][0] for seen in watch.seen] == [0.1 / (1 + n) for n in range(TOTAL)]
    assert [seen[0][1] for seen in watch.seen] == [0.9 - 0.1 * (n // PER_EPOCH) for n in range(TOTAL)]


def test_groups_keep_their_proportion_or_have_functions_of_their_own():
    learn = learner([Schedule(constant(0.5)), watch := Watch()])
    learn.train(1)
    assert [group[0] for group in watch.seen[0]] == pytest.approx([0.5, 0.1], abs=1e-15)
    learn = learner([Schedule([constant(0.5), constant(0.3)]), watch := Watch()])
    learn.train(1)
    assert [group[0] for group in watch.seen[0]] == [0.5, 0.3]


def test_a_group_without_weight_decay_stays_without():
    model = net()
    optimiser = torch.optim.SGD([{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias]}], lr=0.1)
    learn = Learner(model, optimiser, F.cross_entropy, {"train": BATCHES}, [Schedule(constant(0.2), "weight_decay"), watch := Watch()], device="cpu")
    learn.train(1)
    assert [group[3] for group in watch.seen[3]] == [0.2, 0.0]


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    for schedule in (Schedule(linear(0.5, 0)), BatchSchedule(lrs.CosineAnnealingLR), BatchSchedule(partial(lrs.StepLR, step_size=2))):
        model = net()
        rate = torch.tensor(0.1)
        optimiser = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
        learn = Learner(model, optimiser, F.cross_entropy, {"train": BATCHES}, schedule, device="cpu")
        learn.train(1)
        assert optimiser.param_groups[0]["lr"] is rate
        assert bool(rate == 0.1) == bool(schedule.asks)


@pytest.mark.parametrize("calls", [[5], [2, 3], [1] * 5])
def test_pieces(calls):
    learn = learner([PiecewiseSchedule([[1, 0.5], [3, 0.1], [100, 0.01]]), watch := Watch()], adam)
    for epochs in calls: learn.train(epochs)
    assert [seen[0][0] for seen in watch.seen[::PER_EPOCH]] == [0.5, 0.1, 0.1, 0.01, 0.01]
    learn = learner([PiecewiseSchedule([[1, 0.5], [2, 0.1]]), watch := Watch()], adam)
    learn.train(5)
    assert [seen[0][0] for seen in watch.seen[::PER_EPOCH]] == [0.5, 0.1, 0.1, 0.1, 0.1]


def test_curves_by_hand():
    assert [linear(1, 3)(at) for at in (0, 0.25, 1)] == [1, 1.5, 3]
    assert [cosine(1, 0)(at) for at in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert exponential(1, 1e-4)(0.5) == pytest.approx(1e-2)
    both = combine([0.25, 0.75], [linear(0, 1), linear(2, 0)])
    assert [both(at) for at in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.5, 2, 1, 0])
    assert warm_up(constant(2), 0.5, 1)(0.25) == 1.5
    three = combine([0.1, 0.2, 0.7], [constant(1), constant(2), constant(3)])
    assert [three(at) for at in (0, 0.1, 0.29, 0.31, 1)] == [1, 2, 2, 3, 3]


class Several(dict):
    "Optimisers under names."
    param_groups = property(lambda self: [group for optimiser in self.values() for group in optimiser.param_groups])

    def step(self):
        for optimiser in self.values(): optimiser.step()

    def zero_grad(self):
        for optimiser in self.values(): optimiser.zero_grad()

    def __getattr__(self, name):
        if name in self: return self[name]
        raise AttributeError(name)


def several(model):
    return Several(weights=torch.optim.SGD([model.weight], lr=0.1, momentum=0.9), biases=torch.optim.SGD([model.bias], lr=0.1, momentum=0.9))


def test_one_of_several_optimisers_by_name():
    for schedule in (BatchSchedule(lrs.CosineAnnealingLR, optimiser="biases"), Schedule(cosine(0.1, 0), optimiser="biases"), EpochSchedule(lrs.CosineAnnealingLR, optimiser="biases")):
        learn = learner([schedule, watch := Watch()], several)
        learn.train(2)
        assert {seen[0][0] for seen in watch.seen} == {0.1}
        assert watch.seen[0][1][0] == 0.1 > watch.seen[-1][1][0]
    learn = learner([Schedule(constant(0.5)), watch := Watch()], several)
    learn.train(1)
    assert [group[0] for group in watch.seen[0]] == [0.5, 0.5]


# What a scheduler's step wants

class Custom:
    "A scheduler of somebody's own, whose step sets the rate from what it is given."
    def __init__(self, optimiser): self.group, self.given = optimiser.param_groups[0], []
    def state_dict(self): return {"given": [float(value) for value in self.given]}
    def load_state_dict(self, state): self.given = state["given"]
    def take(self, value):
        self.given.append(value)
        self.group["lr"] = 0.1 / (1 + value)


class ByEpoch(Custom):
    def step(self, epoch, metric=None): self.take(epoch)


class ByUpdate(Custom):
    def step(self, num_updates): self.take(num_updates)


class ByMetric(Custom):
    def step(self, metrics): self.take(metrics)


class Timm(Custom):
    "As those of timm: epochs and updates have a method each, and one of the two does nothing."
    t_in_epochs = True
    def step(self, epoch, metric=None):
        if self.t_in_epochs: self.take(epoch)
    def step_update(self, num_updates, metric=None):
        if not self.t_in_epochs: self.take(num_updates)


class TimmByUpdate(Timm): t_in_epochs = False


class Unclear(Custom):
    def step(self, t): self.take(t)


class Many(Custom):
    def step(self, epoch, temperature): self.take(epoch)


@pytest.mark.parametrize(("make", "count"), [
    (lambda: EpochSchedule(ByEpoch), "epochs"), (lambda: EpochSchedule(Timm), "epochs"), (lambda: EpochSchedule(Unclear, wants="epoch"), "epochs"),
    (lambda: BatchSchedule(ByUpdate), "updates"), (lambda: BatchSchedule(TimmByUpdate), "updates"), (lambda: BatchSchedule(Unclear, wants="update"), "updates"),
])
def test_a_step_that_wants_to_know_where_training_is_gets_the_epochs_or_updates_that_are_done(make, count):
    learn = learner([schedule := make(), watch := Watch()], validation=False)
    learn.train(2)
    learn.train(1)
    each = 1 if count == "updates" else PER_EPOCH
    assert [seen[0][0] for seen in watch.seen] == [0.1 / (1 + batch // each) for batch in range(TOTAL)]
    assert schedule.state_dict()["scheduler"]["given"] == [1 + i for i in range(TOTAL // each)]


def test_a_step_that_wants_a_value_gets_the_monitored_one():
    for schedule in (EpochSchedule(ByMetric), EpochSchedule(ByMetric, "train_loss"), EpochSchedule(Unclear, wants="metric")):
        learn = learner(schedule)
        learn.train(3)
        assert schedule.state_dict()["scheduler"]["given"] == pytest.approx([row[schedule.monitor] for row in learn.history])


class Plateau(Custom):
    "As the one of timm for plateaus: the metric comes beside the epoch, and is needed."
    def step(self, epoch, metric=None): self.take(epoch + 10 * metric)


@pytest.mark.parametrize("monitor", ["validation_loss", "train_loss"])
def test_a_metric_beside_the_epoch_is_given_where_it_is_measured(monitor):
    learn = learner(schedule := EpochSchedule(Plateau, monitor))
    learn.train(3)
    right = [1 + epoch + 10 * row[monitor] for epoch, row in enumerate(learn.history)]
    assert schedule.state_dict()["scheduler"]["given"] == pytest.approx(right)
    with pytest.raises(MonitorError, match="which is not one of"): learner(EpochSchedule(Plateau, "train_los")).train(2)


@pytest.mark.parametrize(("make", "text"), [
    (lambda: EpochSchedule(Unclear), "EpochSchedule(Unclear): Unclear.step asks for t, which does not tell what it wants; pass wants=\"epoch\", wants=\"update\" or wants=\"metric\""),
    (lambda: BatchSchedule(Unclear), "asks for t, which does not tell what it wants"), (lambda: EpochSchedule(Many), "asks for epoch and temperature"),
    (lambda: EpochSchedule(ByUpdate), "EpochSchedule(ByUpdate): ByUpdate is stepped once an update; use BatchSchedule"),
    (lambda: BatchSchedule(ByEpoch), "ByEpoch is stepped once an epoch; use EpochSchedule"), (lambda: BatchSchedule(ByMetric), "use EpochSchedule"),
    (lambda: EpochSchedule(TimmByUpdate), "use BatchSchedule"), (lambda: BatchSchedule(Timm), "use EpochSchedule"),
    (lambda: EpochSchedule(ByEpoch, wants="loss"), "wants is 'loss'; it must be \"epoch\", \"update\" or \"metric\""),
])
def test_what_a_step_wants_is_not_guessed(make, text):
    learn = learner()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ScheduleError) as caught: learn.train(2, callbacks=make())
    assert text in str(caught.value) and all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def started(model):
    return torch.optim.SGD([{"params": model.parameters(), "lr": 0.05, "initial_lr": 0.1}])


@pytest.mark.parametrize(("kind", "factory", "per"), [
    (EpochSchedule, partial(lrs.StepLR, step_size=2, last_epoch=3), "epoch"), (EpochSchedule, partial(lrs.LambdaLR, lr_lambda=lambda e: 0.5 ** e, last_epoch=3), "epoch"),
    (BatchSchedule, partial(lrs.CosineAnnealingLR, T_max=20, last_epoch=3), "update"), (BatchSchedule, lambda optimiser: lrs.ExponentialLR(optimiser, 0.9, last_epoch=5), "update"),
])
def test_last_epoch_goes_on_from_elsewhere(kind, factory, per):
    learn = learner([kind(factory), watch := Watch()], started)
    learn.train(2)
    assert watch.seen == by_hand(factory, started, 2, per)[0]
    learn.train(1)
    assert watch.seen == by_hand(factory, started, 3, per)[0]


def test_last_epoch_without_an_initial_rate_is_refused_and_changes_nothing():
    learn = learner(EpochSchedule(partial(lrs.StepLR, step_size=2, last_epoch=3)))
    before = values(learn.optimiser)
    with pytest.raises(ScheduleError, match="last_epoch continues an earlier schedule, but the parameter groups have no initial_lr; add it to each"): learn.train(2)
    assert values(learn.optimiser) == before


@pytest.mark.parametrize("name", ["StepLR", "LambdaLR", "SequentialLR", "progress", "EpochSchedule"])
@pytest.mark.filterwarnings("ignore:.*in no group of the optimiser")
def test_a_group_that_is_added_in_training_is_refused_and_one_between_trainings_is_scheduled(name):
    def make(): return EpochSchedule(OPEN["ExponentialLR"]) if name == "EpochSchedule" else ALL[name]()
    def only_weight(model): return torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    learn = learner([make(), watch := Watch()], only_weight)
    def add(epoch):
        if epoch == 1: learn.optimiser.add_param_group({"params": [learn.model.bias], "lr": 0.1})
    learn.on("before_training", add)
    with pytest.raises(ScheduleError, match="a parameter group was added in training, and the schedule does not know it"): learn.train(3)
    learn.remove(add)
    watch.seen.clear()
    learn.train(2)
    assert len(watch.seen[0]) == 2 and watch.seen[-1][0] != watch.seen[0][0] and watch.seen[-1][1][0] != watch.seen[0][1][0]


@pytest.mark.parametrize("name", [*FILLED, *OPEN])
def test_numbers_of_numpy_are_numbers(name):
    factory = FILLED[name][0] if name in FILLED else OPEN[name]
    def make(number): return lambda model: torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": number(0.02)}], lr=number(0.1), momentum=number(0.9))
    found = []
    for number in (float, numpy.float64):
        learn = learner([schedule := BatchSchedule(factory), watch := Watch()], make(number))
        learn.on("after_batch", lambda schedule=schedule: json.dumps(schedule.state_dict()))
        learn.train(2)
        learn.train(2)
        found.append((watch.seen, values(learn.optimiser), [sorted(group) for group in learn.optimiser.param_groups]))
    assert found[0] == found[1]


# Early stopping

@pytest.mark.parametrize("order", [1, -1])
def test_restore_best_puts_back_the_averages_with_the_weights(order):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x @ torch.randn(4, 1) + 0.3 * torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
    ema, stopping = EMA(0.9, warm_up=False), EarlyStopping(patience=8, restore_best=True)
    loaders = {"train": [(x[:16], y[:16]), (x[16:32], y[16:32])], "validation": [(x[32:], y[32:])], "test": [(x[32:], y[32:])]}
    learn = Learner(model, torch.optim.Adam(model.parameters(), lr=0.02), F.mse_loss, loaders, [stopping, ema][::order], device="cpu")
    learn.train(200)
    best = min(learn.history["validation_loss"])
    assert len(learn.history) < 200 and learn.history[-1]["test_loss"] == pytest.approx(best) and learn.validate()["validation_loss"] == pytest.approx(best)
    assert F.mse_loss(ema.model()(x[32:]), y[32:]).item() == pytest.approx(best)


def test_restore_best_puts_back_the_parameters_of_the_loss():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, predictions, labels): return F.cross_entropy(predictions * self.scale, labels)
    model, loss, kept = net(), Scaled(), []
    learn = Learner(model, torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1), loss, {"train": BATCHES, "validation": BATCHES[:1]},
                    [Log("score", [3, 2, 1, 5, 6, 7]), EarlyStopping("score", mode="min", restore_best=True)], device="cpu")
    learn.on("after_epoch", lambda: kept.append(loss.scale.item()))
    learn.train(6)
    assert loss.scale.item() == kept[2] != kept[-1]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_restore_best_and_resume_with_a_sparse_buffer(layout):
    class Mixed(nn.Module):
        "A graph's adjacency beside weights; it counts its batches in it."
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mixing", torch.eye(4).to_sparse(layout=layout))
        def forward(self, x):
            if self.training: self.mixing = self.mixing * 1.01
            return self.linear((self.mixing @ x.T).T)
    def learner():
        torch.manual_seed(0)
        model = Mixed()
        return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": BATCHES, "validation": BATCHES[:1]},
                       [Log("score", [3, 2, 1, 5, 6, 7]), EarlyStopping("score", mode="min", restore_best=True)], device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch: "Sparse CSR tensor support is in beta state"
        learn, kept = learner(), []
        learn.on("after_epoch", lambda: kept.append(learn.model.mixing.to_dense()))
        learn.train(6)
        assert torch.equal(learn.model.mixing.to_dense(), kept[2]) and not torch.equal(kept[2], kept[-1])
        again, faults = learner(), [ZeroDivisionError()]
        def fail():
            if len(again.history) == 3 and faults: raise faults.pop()
        again.on("after_validation_batch", fail)
        with pytest.raises(ZeroDivisionError): again.train(6)
        again.train(6, resume=True)
        assert torch.equal(again.model.mixing.to_dense(), kept[2])


class Log(Callback):
    "Logs values as if they had been measured: None leaves one out."
    def __init__(self, name, values, hook="after_validation"):
        self.name, self.values = name, values
        setattr(self, hook, self.go)

    def go(self, learn, epoch):
        if self.values[epoch] is not None: learn.log(**{self.name: self.values[epoch]})


NAN = math.nan
STOPS = {  # values, arguments, epochs that are run, best epoch
    "never": ([5, 4, 3, 2, 1], {}, 5, 4),
    "patience": ([5, 4, 4, 4, 4, 1], {}, 5, 1),
    "patience of one": ([5, 4, 4, 1], {"patience": 1}, 3, 1),
    "it comes back": ([5, 6, 6, 4, 6, 6, 6, 1], {}, 7, 3),
    "min_delta": ([5, 4.6, 4.2, 3.9, 1], {"min_delta": 0.5, "patience": 2}, 5, 4),
    "min_delta is not enough": ([5, 4.9, 4.8, 4.7, 1], {"min_delta": 0.5}, 4, 0),
    "nan is worse": ([5, NAN, NAN, NAN, 1], {}, 4, 0),
    "nan from the start": ([NAN, NAN, NAN, 1], {}, 3, None),
    "nan, then better": ([NAN, NAN, 3, 2], {}, 4, 3),
    "max": ([1, 2, 2, 2, 2, 9], {"mode": "max"}, 5, 1),
    "not measured does not count": ([5, None, None, None, 6, None, 6, 6, 1], {}, 8, 0),
}


@pytest.mark.parametrize("hook", ["after_validation", "after_epoch"])
@pytest.mark.parametrize("name", STOPS)
def test_early_stopping_by_hand(name, hook):
    values, arguments, epochs, best = STOPS[name]
    stopping = EarlyStopping("score", **{"mode": "min", **arguments})
    learn = learner([Log("score", values, hook), stopping])
    learn.train(len(values))
    assert len(learn.history) == epochs
    assert stopping.best_epoch == best
    assert bool(stopping.reason) == (stopping.waited >= stopping.patience)
    if stopping.reason: assert f"in {stopping.patience} epoch" in stopping.reason and stopping.reason in repr(stopping)


def test_epochs_without_validation_do_not_count():
    stopping = EarlyStopping(patience=2, min_delta=100)
    learn = learner(stopping)
    learn.train(30, validation_epochs=3)
    assert len(learn.history) == 9  # the first is the best, and two more
    assert stopping.best_epoch == 2


def test_restore_best_puts_back_the_weights_of_the_best_epoch_before_the_test():
    for how in (None, CancelTrainException, KeyboardInterrupt):
        stopping, kept, tested = EarlyStopping("score", mode="min", restore_best=True), [], []
        learn = learner([Log("score", [3, 2, 1, 5, 6, 7, 0]), stopping])
        learn.dataloaders["test"] = BATCHES[:1]
        learn.on("after_epoch", lambda model, kept=kept: kept.append(copy.deepcopy(model.state_dict())))
        learn.on("before_test", lambda model, tested=tested: tested.append(copy.deepcopy(model.state_dict())))

        def end(epoch, how=how):
            if how and epoch == 4: raise how
        learn.on("before_epoch", end)
        with contextlib.suppress(KeyboardInterrupt): learn.train(7)
        there = kept[-1] if how is KeyboardInterrupt else kept[2]  # one that was stopped may go on from its last weights
        assert all(torch.equal(there[name], value) for name, value in learn.model.state_dict().items())
        assert not torch.equal(kept[2]["weight"], kept[-1]["weight"])
        if how is not KeyboardInterrupt: assert torch.equal(tested[0]["weight"], kept[2]["weight"])
        assert stopping.weights is None


def test_early_stopping_begins_anew_in_each_train_and_goes_on_from_a_state():
    values = [3, 2, 4, 4, 4, 1]
    whole, states = EarlyStopping("score", mode="min", restore_best=True), []
    learn = learner([Log("score", values), whole])

    def save(): states.append((copy.deepcopy(learn.model.state_dict()), copy.deepcopy(learn.optimiser.state_dict()), copy.deepcopy(whole.state_dict())))
    learn.on("after_epoch", save, priority=500)  # a checkpoint
    learn.train(6)
    assert (len(learn.history), whole.waited) == (5, 3)
    for done, (weights, optimiser, state) in enumerate(states[:-1], 1):
        fresh = EarlyStopping("score", mode="min", restore_best=True)
        resumed = learner([Log("score", values[done:]), fresh])
        resumed.model.load_state_dict(weights)
        resumed.optimiser.load_state_dict(optimiser)
        fresh.load_state_dict(state)
        resumed.history.rows = copy.deepcopy(learn.history.rows[:done])
        resumed.train(6 - done)
        assert len(resumed.history) == 5
        assert same_weights(resumed.model, learn.model)
        assert (fresh.best, fresh.waited, fresh.best_epoch) == (whole.best, whole.waited, whole.best_epoch)
    learn.train(6)
    assert len(learn.history) == 10


def test_the_last_epoch_is_whole_for_all_others(capsys):
    seen = []
    learn = learner([EarlyStopping(patience=1, min_delta=100), Progress()])
    learn.on("after_epoch", lambda epoch: seen.append(epoch), priority=1500)
    learn.train(5)
    assert seen == [0, 1]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip()[:1] in "01" and line.strip()]) == 2


# What holds for all

MAKE = {
    "BatchSchedule": lambda: BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.1)),
    "BatchSchedule open": lambda: BatchSchedule(partial(lrs.StepLR, step_size=2)),
    "EpochSchedule": lambda: EpochSchedule(lrs.ReduceLROnPlateau),
    "Schedule": lambda: Schedule(cosine(0.1, 0)),
    "PiecewiseSchedule": lambda: PiecewiseSchedule([[1, 0.1], [3, 0.01]]),
    "EarlyStopping": lambda: EarlyStopping(restore_best=True),
}


@pytest.mark.parametrize("name", ["BatchSchedule", "EarlyStopping"])  # in other ways than test_contracts.py
def test_the_contracts(name):
    report = check_callback(MAKE[name])
    assert report.ok, report


@pytest.mark.parametrize("name", MAKE)
def test_copies_pickles_trials_and_no_circle(name):
    learn = learner(MAKE[name]())
    learn.train(1)
    pickle.loads(pickle.dumps(learn.callbacks[0]))
    before = values(learn.optimiser)
    with learn.trial() as trial: trial.train(2)
    assert values(learn.optimiser) == before
    gone = weakref.ref(learn)
    gc.disable()
    try:
        del learn, trial
        assert gone() is None
    finally: gc.enable()


def test_curve_and_plot_show_what_training_does():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for schedule, name, index in ((BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.3)), "momentum", 1), (BatchSchedule(lrs.CosineAnnealingLR), "lr", 0),
                                  (Schedule(warm_up(cosine(0.5, 0.1))), "lr", 0), (BatchSchedule(sequential), "lr", 0)):
        learn = learner([schedule, watch := Watch()])
        before = values(learn.optimiser)
        curves = schedule.curve(TOTAL, name, learn.optimiser)
        assert values(learn.optimiser) == before
        assert "step" not in vars(learn.optimiser)
        learn.train(EPOCHS)
        assert curves == [[seen[group][index] for seen in watch.seen] for group in range(2)]
    _, ax = plt.subplots()
    assert Schedule(cosine(1, 0)).plot(ax=ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("update", "lr")
    assert len(BatchSchedule(lrs.CosineAnnealingLR).plot(optimiser=sgd(net())).lines) == 2
    assert PiecewiseSchedule([[3, 0.1], [100, 0.01]]).curve(5) == [[0.1, 0.1, 0.1, 0.01, 0.01]]
    plt.close("all")


BAD = [
    (lambda: BatchSchedule(None), TypeError, "BatchSchedule: factory is 'None', which is not a factory of schedulers; pass one such as StepLR"),
    (lambda: BatchSchedule(lrs.OneCycleLR), TypeError, "missing a required argument: 'max_lr'; give it by partial"),
    (lambda: BatchSchedule(lrs.StepLR(sgd(net()), 2)), TypeError, "it is made when training starts: partial(StepLR, ...)"),
    (lambda: BatchSchedule(lambda optimiser: None), TypeError, "which has no step()"),
    (lambda: BatchSchedule(lrs.CosineAnnealingLR, steps_per_epoch=0), ValueError, "steps_per_epoch is 0; it must be a whole number of at least 1"),
    (lambda: BatchSchedule(lrs.CosineAnnealingLR, optimiser=3), TypeError, "optimiser is 3; give the name"),
    (lambda: BatchSchedule(lrs.CosineAnnealingLR, optimiser="x"), ScheduleError, "SGD has no optimiser of that name; leave optimiser out"),
    (lambda: BatchSchedule(lrs.ReduceLROnPlateau), ScheduleError, "use EpochSchedule"),
    (lambda: BatchSchedule(partial(lrs.OneCycleLR, max_lr=0.1, total_steps=3)), ScheduleError, "has 3 of its 3 steps left and this train takes 14"),
    (lambda: EpochSchedule(lrs.ReduceLROnPlateau, monitor=None), MonitorError, "name a column of the history"),
    (lambda: EpochSchedule(lrs.ReduceLROnPlateau, monitor="validation_los"), MonitorError, "which is not one of ['train_loss', 'validation_loss']; did you mean validation_loss?"),
    (lambda: EpochSchedule(lrs.ReduceLROnPlateau, monitor="validation_accuracy"), ScheduleError, "is good when high, and ReduceLROnPlateau has mode='min'; pass mode='max'"),
    (lambda: Schedule(3), TypeError, "pass a function of one number"),
    (lambda: Schedule([]), TypeError, "pass a function of one number"),
    (lambda: Schedule(cosine), TypeError, "pass a function of one number"),
    (lambda: Schedule(cosine(1, 0), 3), TypeError, "name is 3"),
    (lambda: Schedule(cosine(1, 0), of="step"), ScheduleError, "it must be \"progress\", \"update\" or \"epoch\""),
    (lambda: Schedule(cosine(1, 0), "betas[0]"), ScheduleError, "SGD has no hyperparameter 'betas[0]', it has lr, momentum"),
    (lambda: Schedule(cosine(1, 0), "momentun"), ScheduleError, "did you mean momentum?"),
    (lambda: Schedule(3 * [cosine(1, 0)]), ScheduleError, "lr has 3 functions and the optimiser 2 parameter groups"),
    (lambda: Schedule(lambda progress: None), ScheduleError, "the value of lr at 0 is None; it must be a finite number"),
    (lambda: cosine(NAN, 0), ScheduleError, "start is nan"),
    (lambda: exponential(1, 0), ScheduleError, "end is 0; it must be above 0"),
    (lambda: combine([0.5, 0.6], [cosine(1, 0)] * 2), ScheduleError, "add up to 1.1; they must add up to 1"),
    (lambda: combine([1.0], []), ScheduleError, "1 shares and 0 curves"),
    (lambda: combine([0, 1.0], [cosine(1, 0)] * 2), ScheduleError, "a share is 0; it must be above 0"),
    (lambda: warm_up(cosine(1, 0), 1), ScheduleError, "share is 1; it must be above 0 and below 1"),
    (lambda: PiecewiseSchedule([]), ScheduleError, "pieces is []; write"),
    (lambda: PiecewiseSchedule([[3]]), ScheduleError, "[3] is not a pair"),
    (lambda: PiecewiseSchedule([[3, 0.1], [3, 0.2]]), ScheduleError, "do not rise"),
    (lambda: PiecewiseSchedule([[0, 0.1]]), ValueError, "an epoch is 0; it must be a whole number of at least 1"),
    (lambda: PiecewiseSchedule([[1, "x"]]), ScheduleError, "a value is 'x'"),
    (lambda: EarlyStopping("validation_acuracy"), ValueError, "pass mode=\"min\" or mode=\"max\"; did you mean accuracy?"),
    (lambda: EarlyStopping("fid"), ValueError, "cannot be told from its name; pass mode=\"min\" or mode=\"max\""),
    (lambda: EarlyStopping(mode="low"), ValueError, "mode is 'low'"),
    (lambda: EarlyStopping(patience=0), ValueError, "patience is 0"),
    (lambda: EarlyStopping(min_delta=-1), ValueError, "min_delta is -1"),
    (lambda: EarlyStopping(restore_best=1), TypeError, "restore_best is 1"),
    (lambda: EarlyStopping("test_loss"), MonitorError, "is known only after training"),
    (lambda: EarlyStopping("validation_accuracy"), MonitorError, "which is not one of ['train_loss', 'validation_loss']"),
    (lambda: [Log("score", "ab"), EarlyStopping("score", mode="min")], MonitorError, "score is 'a', which is not a number"),
]


@pytest.mark.parametrize(("make", "kind", "text"), BAD)
def test_bad_input_is_said_and_leaves_everything_unchanged(make, kind, text):
    learn = learner()
    before, attributes = [dict(group) for group in learn.optimiser.param_groups], set(vars(learn.optimiser))
    with pytest.raises(kind) as caught: learn.train(2, callbacks=make())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [dict(group) for group in learn.optimiser.param_groups] == before
    assert set(vars(learn.optimiser)) == attributes
    learn.train(1)


def test_bad_input_that_needs_another_learner():
    for callback in (EarlyStopping(), EpochSchedule(lrs.ReduceLROnPlateau)):
        with pytest.raises(MonitorError, match="there is no validation loader; add one"): learner(callback, validation=False).train(1)
    with pytest.raises(ScheduleError, match="is not a torch Optimizer, and this scheduler wants one; pass optimiser=, one of weights, biases"):
        learner(BatchSchedule(lrs.CosineAnnealingLR), several).train(1)
    with pytest.raises(ScheduleError, match="it has weights, biases; did you mean biases?"):
        learner(BatchSchedule(lrs.CosineAnnealingLR, optimiser="biasses"), several).train(1)
    one, other = BatchSchedule(partial(lrs.StepLR, step_size=2)), BatchSchedule(partial(lrs.ExponentialLR, gamma=0.9))
    learner(one).train(1)
    hidden = BatchSchedule(lambda optimiser: lrs.ExponentialLR(optimiser, 0.9))  # what it makes is seen when it is made
    for schedule, when in ((other, lambda: None), (hidden, lambda: learner(hidden).train(1))):
        with pytest.raises(ScheduleError, match="the state is of StepLR, and the factory makes ExponentialLR"):
            schedule.load_state_dict(one.state_dict())
            when()
    with pytest.raises(ScheduleError, match="the state has no under_way"): one.load_state_dict({"x": 1})
    with pytest.raises(ValueError, match="the state has no under_way"): EarlyStopping().load_state_dict({})
    with pytest.raises(MonitorError, match="name a column"): EarlyStopping(3)


# ---------------------------------------------------------------------------------------------------- after an end at 0

ENDS_AT_0 = {
    "epochs": lambda: EpochSchedule(partial(lrs.CosineAnnealingLR, T_max=2)), "updates": lambda: BatchSchedule(partial(lrs.CosineAnnealingLR, T_max=2 * PER_EPOCH)),
    "a factor": lambda: EpochSchedule(partial(lrs.LambdaLR, lr_lambda=[lambda epoch: 1 - epoch / 2] * 2)),
}


def rates(learn): return [float(group["lr"]) for group in learn.optimiser.param_groups]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", ENDS_AT_0)
def test_groups_keep_their_proportions_after_a_schedule_that_ends_at_0(tmp_path, name, saved):
    learn = learner()
    learn.train(2, callbacks=ENDS_AT_0[name]())
    assert rates(learn) == [0.0, 0.0]
    if saved:
        learn.save(tmp_path / "c")
        learn = learner()
        learn.load(tmp_path / "c")
    learn.train(1, learning_rate=0.5)
    assert rates(learn) == pytest.approx([0.5, 0.1])
    assert not any("initial_lr" in group or "lr_before_zero" in group for group in learn.optimiser.param_groups)


def test_a_second_schedule_from_0_keeps_the_proportions_of_the_first():
    learn = learner()
    for _ in range(2): learn.train(2, callbacks=EpochSchedule(partial(lrs.CosineAnnealingLR, T_max=2)))
    learn.train(1, learning_rate=0.5)
    assert rates(learn) == pytest.approx([0.5, 0.1])


def test_a_schedule_that_ends_elsewhere_notes_nothing():
    learn = learner()
    learn.train(2, callbacks=EpochSchedule(partial(lrs.StepLR, step_size=1)))
    assert not any("lr_before_zero" in group for group in learn.optimiser.param_groups)


def test_rates_that_are_all_0_without_a_schedule_are_refused_for_several_groups_and_one_takes_its_rate():
    learn = learner()
    for group in learn.optimiser.param_groups: group["lr"] = 0.0
    before = copy.deepcopy(learn.model.state_dict())
    message = "learning_rate: the rates of all 2 parameter groups are 0, so their proportions are unknown; set \"lr\" in each of learn.optimiser.param_groups first"
    with pytest.raises(ValueError) as caught: learn.train(1, learning_rate=0.5)
    assert str(caught.value) == message and rates(learn) == [0.0, 0.0] and len(learn.history) == 0
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    alone = learner(make=adam)
    alone.optimiser.param_groups[0]["lr"] = 0.0
    alone.train(1, learning_rate=0.5)
    assert rates(alone) == [0.5]
