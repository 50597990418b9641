"""Accumulation, clipping, averages and frozen layers against one large batch, plain loops and torch's own."""
import copy
import io
import math
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from learner.base.words import check_whole
from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CallbackError,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
)
from learner.steer.accumulate import Accumulate
from learner.steer.freeze import FreezeUntil, pick
from learner.steer.update import EMA, ClipGradients
from learner.watch.recorder import Recorder


def net(seed=0, double=True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.double() if double else model


def examples(n=26):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def batches(size, n=26):
    x, y = examples(n)
    return list(zip(x.split(size), y.split(size), strict=True))


def learner(data, *callbacks, model=None, optimiser=None, loss=F.cross_entropy, **loaders):
    model = model or net()
    optimiser = optimiser or torch.optim.Adam(model.parameters(), lr=0.01)
    return Learner(model, optimiser, loss, {"train": data, **loaders}, callbacks, device="cpu")


def gap(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def same(one, other): return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Steps(Callback):
    watches = True

    def __init__(self): self.seen, self.losses = [], []

    def after_step(self, learn): self.seen.append(learn.batch_num)

    def after_batch(self, learn): self.losses.append(learn.loss.item())


class Raises(Callback):
    def __init__(self, hook, error, at=0, times=1):
        self.error, self.at, self.times = error, at, times
        setattr(self, hook, self.fire)

    def fire(self, learn):
        if self.times and learn.phase == "train" and learn.batch_num == self.at:
            self.times -= 1
            raise self.error


# Accumulate

class Stream(IterableDataset):
    "Batches without a length."
    def __init__(self, data): self.data = data

    def __iter__(self): return iter(self.data)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize(("size", "n"), [(2, 4), (4, 2), (3, 3), (5, 4), (2, 1), (26, 3), (1, 7), (4, 100)])
def test_it_is_one_large_batch(size, n, unknown):
    small = batches(size)
    data = DataLoader(Stream(small), batch_size=None) if unknown else small
    steps = Steps()
    one, other = learner(batches(size * n)), learner(data, Accumulate(n), steps)
    for learn in (one, other): learn.train(3)
    assert gap(one, other) < 1e-12
    assert len(steps.seen) == 3 * Accumulate(n).updates_per_epoch(len(small)) == 3 * len(batches(size * n))
    assert one.history["train_loss"] == pytest.approx(other.history["train_loss"], abs=1e-12)


def test_equal_groups_of_a_power_of_two_are_bit_identical_to_the_loop_by_hand():
    data = batches(4, 32)
    learn = learner(data, Accumulate(4))
    learn.train(2)
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        for i, (x, y) in enumerate(data):
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimiser.step()
                optimiser.zero_grad()
    assert same(model, learn.model)


def masked_loss(predictions, labels): return F.cross_entropy(predictions, labels, ignore_index=0)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_losses_weighted_by_tokens(as_tensor):
    def count(learn): return (learn.labels != 0).sum() if as_tensor else int((learn.labels != 0).sum())
    one, other = learner(batches(12), loss=masked_loss), learner(batches(4), Accumulate(3, weight=count), loss=masked_loss)
    wrong = learner(batches(4), Accumulate(3), loss=masked_loss)
    for learn in (one, other, wrong): learn.train(3)
    assert gap(one, other) < 1e-12 < gap(one, wrong)


@pytest.mark.parametrize("first", [0.0, torch.tensor(0)])
def test_a_batch_of_no_weight_counts_for_nothing(first):
    weights = [first, 2.0, 1.0]
    accumulate = Accumulate(3, weight=lambda learn: weights[learn.batch_num])
    data = batches(4, 12)
    one = learner(data, accumulate)
    one.train()
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = [F.cross_entropy(model(x), y) for x, y in data]
    ((2 * losses[1] + losses[2]) / 3).backward()
    optimiser.step()
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), one.model.parameters(), strict=True)) < 1e-12


def test_a_group_without_any_weight_makes_no_nan():
    learn = learner(batches(4, 8), Accumulate(2, weight=lambda learn: 0))
    learn.train()
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_the_loss_that_others_see_is_the_true_one():
    plain, steps = Steps(), Steps()
    still = {"optimiser": torch.optim.SGD}
    for cb in ([plain], [Accumulate(2), steps]):
        model = net()
        learner(batches(5), *cb, model=model, optimiser=still["optimiser"](model.parameters(), lr=0.0)).train()
    assert plain.losses == steps.losses


@pytest.mark.parametrize("at", [0, 1, 2, 5])  # the last one of a group too, and of the pass
@pytest.mark.parametrize("hook", ["before_prepare", "before_loss", "after_loss", "before_backward"])
def test_a_batch_cancelled_before_its_backward_pass_is_as_if_it_were_not_there(hook, at):
    data = batches(4, 24)
    one = learner(data, Accumulate(3), Raises(hook, CancelBatchException(), at=at))
    other = learner([*data[:at], *data[at + 1:]], Accumulate(3))
    for learn in (one, other): learn.train()
    assert gap(one, other) < 1e-12


@pytest.mark.parametrize("hook, at", [("after_backward", 1), ("before_step", 2)])  # within a group no step
def test_a_batch_cancelled_after_its_backward_pass_takes_the_gradients_that_it_was_added_to_along_and_says_so(hook, at):
    data = batches(4, 24)
    one, other = learner(data, Accumulate(3), Raises(hook, CancelBatchException(), at=at)), learner(data[at + 1:], Accumulate(3))
    with pytest.warns(UserWarning, match="cancelled after its backward pass, so the gradients of the batches before it"): one.train()
    other.train()
    assert gap(one, other) < 1e-12


def test_where_every_batch_takes_its_step_a_batch_can_be_cancelled_anywhere():
    data = batches(4, 24)
    one = learner(data, Raises("after_backward", CancelBatchException(), at=1), Raises("before_step", CancelBatchException(), at=2))
    other = learner([data[0], *data[3:]])
    for learn in (one, other): learn.train()
    assert gap(one, other) == 0


def test_gradients_that_add_up_by_hand_survive_a_cancelled_batch():
    class EverySecond(Callback):
        def before_step(self, batch_num):
            if batch_num % 2 == 0: raise CancelStepException
    data = batches(4, 24)
    one = learner(data, EverySecond(), Raises("after_loss", CancelBatchException(), at=1))
    one.train()
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for number, (x, y) in enumerate(data):
        if number != 1: F.cross_entropy(model(x), y).backward()
        if number in (3, 5):
            optimiser.step()
            optimiser.zero_grad()
    assert same(one.model, model)


def test_a_state_after_a_cancelled_batch_has_the_group():
    accumulate, states = Accumulate(3), []
    class Between:
        def __len__(self): return 6
        def __iter__(self):
            for batch in batches(4, 24):
                states.append(accumulate.state_dict())
                yield batch
    learner(Between(), accumulate, Raises("after_loss", CancelBatchException(), at=1)).train()
    assert [state.get("batches", 0) for state in states] == [0, 1, 1, 2, 0, 1]


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_dropped_within_a_batch_are_missed(n):
    class Sharp(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward")
            self.optimiser.zero_grad()
            self.act("predict", "loss", "backward", "step")
    model, steps = net(), Steps()
    parts = model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches(4, 24)}
    learn = Sharp(*parts, [Accumulate(n), steps], device="cpu")
    with pytest.raises(CallbackError, match="gradients of the batches before this one are gone"): learn.train()
    assert not steps.seen


@pytest.mark.parametrize("kind", ["module", "partial"])
def test_losses_that_are_sums_are_added_up(kind):
    function = partial(F.cross_entropy, reduction="sum")
    loss = nn.CrossEntropyLoss(reduction="sum") if kind == "module" else function
    one = learner(batches(4, 23), Accumulate(3), loss=loss)
    other = learner(batches(12, 23), loss=loss)
    for learn in (one, other): learn.train()
    assert gap(one, other) < 1e-12


def test_a_batch_cancelled_before_its_routine_is_as_if_it_were_not_there():
    data = batches(4, 24)
    one = learner(data, Accumulate(3), Raises("before_batch", CancelBatchException(), at=1))
    other = learner([data[0], *data[2:]], Accumulate(3))
    for learn in (one, other): learn.train()
    assert gap(one, other) == 0


def test_a_failed_batch_leaves_nothing_for_the_next_train():
    data = batches(4, 24)
    one = learner(data, accumulate := Accumulate(3), Raises("after_backward", ZeroDivisionError(), at=1))
    with pytest.raises(ZeroDivisionError): one.train()
    assert accumulate.batches == 0 and all(p.grad is None for p in one.model.parameters())
    one.train()
    other = learner(data, Accumulate(3))
    other.train()
    assert gap(one, other) == 0


def test_a_step_that_another_leaves_out_counts_with_the_next():
    data = batches(2, 16)
    one = learner(data, Accumulate(2), Raises("before_step", CancelStepException(), at=1))
    x, y = examples(16)
    other = learner([(x[:8], y[:8]), (x[8:12], y[8:12]), (x[12:], y[12:])])
    for learn in (one, other): learn.train()
    assert gap(one, other) < 1e-12


def test_a_step_left_out_with_its_gradients_dropped_starts_anew():
    class Drop(Callback):
        def before_step(self, learn):
            if learn.batch_num == 1:
                learn.optimiser.zero_grad()
                raise CancelStepException
    data = batches(2, 16)
    one, other = learner(data, Accumulate(2), Drop()), learner(data[2:], Accumulate(2))
    for learn in (one, other): learn.train()
    assert gap(one, other) == 0


@pytest.mark.parametrize("error", [CancelEpochException, CancelTrainException])
def test_a_pass_that_is_cancelled_drops_the_open_group(error):
    data = batches(4, 24)
    steps = Steps()
    learn = learner(data, Accumulate(3), Raises("after_batch", error(), at=4), steps)
    learn.train(1)
    assert steps.seen == [2] and all(p.grad is None for p in learn.model.parameters())


class Capture(Callback):
    "Keeps all state as it is after a batch, and ends the training there."
    priority = 100

    def __init__(self, at, accumulate): self.at, self.accumulate, self.state = at, accumulate, None

    def after_batch(self, learn):
        if learn.batch_num == self.at:
            parts = (learn.model, learn.optimiser, self.accumulate)
            self.state = through_file([part.state_dict() for part in parts])
            raise CancelTrainException


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("weight", [None, lambda learn: (learn.labels != 0).sum()])
def test_a_resume_from_the_middle_of_a_group_is_exact(at, weight):
    data = batches(4, 23)
    whole = learner(data, Accumulate(3, weight), loss=masked_loss)
    whole.train()
    accumulate = Accumulate(3, weight)
    capture = Capture(at, accumulate)
    learner(data, accumulate, capture, loss=masked_loss).train()
    fresh = Accumulate(3, weight)
    again = learner(data[at + 1:] or data[:0], fresh, model=net(5), loss=masked_loss)
    for part, state in zip((again.model, again.optimiser, fresh), capture.state, strict=True): part.load_state_dict(state)
    if at < 5: again.train()
    assert gap(whole, again) == 0


def test_state_of_another_model_is_refused():
    accumulate = Accumulate(3)
    capture = Capture(0, accumulate)
    learner(batches(4), accumulate, capture).train()
    fresh = Accumulate(3)
    fresh.load_state_dict(capture.state[2])
    model = nn.Linear(6, 3).double()
    with pytest.raises(ValueError, match="do not fit the parameters of the optimiser"):
        learner(batches(4), fresh, model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.1)).train()


class Loader:
    "Says that it has a number of batches, or nothing, and gives those that it has."
    def __init__(self, told, data): self.told, self.data, self.given = told, data, 0

    def __len__(self):
        if self.told is None: raise TypeError
        return self.told

    def __iter__(self):
        for batch in self.data:
            self.given += 1
            yield batch


@pytest.mark.parametrize(("told", "given", "n"), [(10, 12, 4), (5, 7, 3), (4, 9, 2), (6, 7, 6), (9, 7, 3), (None, 7, 3), (None, 6, 3), (1, 5, 1)])
def test_every_example_is_in_a_step_whatever_the_loader_says_of_its_length(told, given, n):
    x, y = examples(given * 2)
    data, steps = list(zip(x.split(2), y.split(2), strict=True)), Steps()
    model = net()
    learn = learner(Loader(told, data), Accumulate(n), steps, model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.1))
    learn.train()
    ends = [batch + 1 for batch in steps.seen]
    assert ends[-1] == given
    groups = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    hand = net()
    other = learner([tuple(map(torch.cat, zip(*group, strict=True))) for group in groups], model=hand, optimiser=torch.optim.SGD(hand.parameters(), lr=0.1))
    other.train()
    assert gap(learn, other) < 1e-12


def test_the_step_of_an_open_group_can_be_recorded_and_resumed():
    recorder, clip = Recorder("loss", "learning_rate"), ClipGradients(0.1, log=True)
    learn = learner(Loader(None, batches(4)), Accumulate(3), recorder, clip)
    learn.train(2)
    assert len(recorder["loss"]) == 6 and "gradient_norm" not in learn.history.columns
    assert recorder["loss"][2] == pytest.approx(learn.history.steps["train_loss"][6] if learn.history.steps else recorder["loss"][2])


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_read_ahead_and_the_loaders_stay(n):
    stream, ahead, seen = Loader(None, batches(4)), [], []
    learn = learner(stream, Accumulate(n), validation=batches(13))
    loaders = learn.dataloaders
    learn.on("after_batch", lambda batch_num: ahead.append(stream.given - batch_num - 1))
    learn.on("before_training", lambda learn: seen.append(learn.dataloaders is loaders))
    learn.train()
    assert ahead == [0] * 7 and seen == [True]


@pytest.mark.parametrize("at", range(6))
def test_a_resume_in_a_group_with_sparse_gradients_is_exact(at):
    def make(accumulate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 3, sparse=True)).double()
        return learner([(part, part % 3) for part in torch.arange(14).remainder(10).split(2)], accumulate, model=model,
                       optimiser=torch.optim.SGD(model.parameters(), lr=1.0))
    whole = make(Accumulate(3))
    whole.train()
    capture = Capture(at, accumulate := Accumulate(3))
    stopped = make(accumulate)
    stopped.add(capture)
    stopped.train()
    again = make(fresh := Accumulate(3))
    again.dataloaders = {"train": again.dataloaders["train"][at + 1:]}
    for part, state in zip((again.model, again.optimiser, fresh), capture.state, strict=True): part.load_state_dict(state)
    again.train()
    assert gap(whole, again) == 0


class Sharp(Callback):
    "Sharpness-aware minimisation whose second backward pass is a part of the step."
    def step(self, learn):
        weights = list(learn.model.parameters())
        moves = [0.1 * weight.grad for weight in weights]
        with torch.no_grad(): torch._foreach_add_(weights, moves)
        learn.optimiser.zero_grad()
        learn.act("predict", "loss", "backward")
        with torch.no_grad(): torch._foreach_sub_(weights, moves)
        learn.step()


def test_a_second_backward_pass_within_the_step_works_alone_and_is_refused_beside_what_it_would_escape():
    learner(batches(4), Sharp(), Accumulate(1)).train()
    for callback, name in ((Accumulate(2), "Accumulate"), (ClipGradients(1.0), "ClipGradients")):
        learn = learner(batches(4), Sharp(), callback)
        steps = []
        learn.on("after_step", lambda steps=steps: steps.append(1))
        with pytest.raises(CallbackError, match=f"{name}: a second backward pass within the step"): learn.train()
        assert not steps


def test_two_steps_in_a_batch_are_two_groups():
    class Twice(Learner):
        def train_batch(self):
            self.act("prepare")
            for _ in range(2): self.act("predict", "loss", "backward", "step")
    model = net()
    learn = Twice(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches(13)}, [Accumulate(2), ClipGradients(1e9)], device="cpu")
    steps = []
    learn.on("after_step", lambda batch_num: steps.append(batch_num))
    learn.train()
    assert steps


def test_sparse_gradients():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 3, sparse=True)).double()
    x = torch.arange(8) % 5
    results = []
    for size, callbacks in ((8, ()), (2, (Accumulate(4),))):
        m = model()
        data = [(part, part % 3) for part in x.split(size)]
        learner(data, *callbacks, model=m, optimiser=torch.optim.SGD(m.parameters(), lr=1.0)).train()
        results.append(m[0].weight.detach())
    assert (results[0] - results[1]).abs().max() < 1e-12


# ClipGradients

def by_hand(clip, lr=0.5):
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    norms = []
    for x, y in batches(4):
        (10 * F.cross_entropy(model(x), y)).backward()
        norms.append(clip(model.parameters()))
        optimiser.step()
        optimiser.zero_grad()
    return model, norms


@pytest.mark.parametrize(("callback", "clip"), [
    (lambda: ClipGradients(), lambda p: nn.utils.clip_grad_norm_(p, 1.0)),
    (lambda: ClipGradients(0.3, norm_type=1), lambda p: nn.utils.clip_grad_norm_(p, 0.3, 1)),
    (lambda: ClipGradients(0.3, norm_type=math.inf), lambda p: nn.utils.clip_grad_norm_(p, 0.3, math.inf)),
    (lambda: ClipGradients(value=0.05), lambda p: nn.utils.clip_grad_value_(p, 0.05)),
])
def test_it_clips_as_torch_does(callback, clip):
    model = net()
    learn = learner(batches(4), callback(), model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.5),
                    loss=lambda p, y: 10 * F.cross_entropy(p, y))
    learn.train()
    assert same(by_hand(clip)[0], learn.model)
    assert not same(by_hand(lambda p: None)[0], learn.model)


def test_it_logs_the_norm_before_clipping():
    model = net()
    learn = learner(batches(4), ClipGradients(1.0, log=True), model=model, loss=lambda p, y: 10 * F.cross_entropy(p, y),
                    optimiser=torch.optim.SGD(model.parameters(), lr=0.5))
    learn.history.keep_steps = True
    learn.train()
    norms = [norm.item() for norm in by_hand(lambda p: nn.utils.clip_grad_norm_(p, 1.0))[1]]
    assert learn.history.steps["train_gradient_norm"] == pytest.approx(norms, abs=1e-12) and max(norms) > 1


@pytest.mark.filterwarnings("ignore:.*in no group of the optimiser")
def test_gradients_that_the_optimiser_does_not_step_are_left_out_of_the_norm():
    "They are never dropped, and so would grow and grow."
    model = net()
    learn = learner(batches(4), ClipGradients(1e9, log=True), model=model, optimiser=torch.optim.SGD(model[2].parameters(), lr=0.1))
    norms = []
    learn.on("before_step", lambda learn: norms.append(nn.utils.get_total_norm([p.grad for p in learn.model[2].parameters()])))
    learn.history.keep_steps = True
    learn.train()
    assert learn.history.steps["train_gradient_norm"] == pytest.approx([norm.item() for norm in norms])


# EMA

def averaged_by_torch(model, decay, data, epochs, warm_up=False):
    def average(averages, weights, updates):
        t = int(updates)
        torch._foreach_lerp_(averages, weights, 1 - (min(decay, (1 + t) / (10 + t)) if warm_up else decay))
    shadow = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for x, y in data:
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            optimiser.zero_grad()
            shadow.update_parameters(model)
    return shadow.module


@pytest.mark.parametrize("warm_up", [True, False])
def test_it_is_torchs_averaged_model(warm_up):
    raw = net()
    shadow = averaged_by_torch(raw, 0.9, batches(4), 3, warm_up)
    learn = learner(batches(4), ema := EMA(0.9, warm_up), validation=batches(13))
    learn.train(3)
    assert same(ema.model(), shadow) and same(learn.model, raw) and ema.updates == 21
    assert not ema.model().training and learn.model.training
    with torch.no_grad():
        x, y = examples()
        assert learn.history["validation_loss"][-1] == pytest.approx(F.cross_entropy(shadow(x), y).item(), abs=1e-12)


def test_without_validate_validation_sees_the_weights():
    learn = learner(batches(4), EMA(0.9, validate=False), validation=batches(13))
    learn.train(2)
    with torch.no_grad():
        x, y = examples()
        assert learn.history["validation_loss"][-1] == pytest.approx(F.cross_entropy(learn.model(x), y).item(), abs=1e-12)


def test_statistics_are_averaged_and_other_buffers_are_the_models_own():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))
        def forward(self, x): return self.linear(self.norm(x))
    model = Buffers()
    data = [(x.float(), y) for x, y in batches(13)]
    learn = learner(data, ema := EMA(0.5, warm_up=False), model=model)
    means = []
    learn.on("after_step", lambda learn: means.append(learn.model.norm.running_mean.clone()))
    learn.train()
    copied = ema.model()
    torch.testing.assert_close(copied.norm.running_mean, (means[0] + means[1]) / 2)
    assert torch.equal(copied.mask, model.mask) and copied.norm.num_batches_tracked == 2
    assert set(ema.state_dict()["averages"]) == {"norm.weight", "norm.bias", "linear.weight", "linear.bias",
                                                 "norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, CancelEpochException, CancelBatchException])
@pytest.mark.parametrize("hook", ["before_validation", "before_validation_batch", "after_loss", "after_validation", "before_test"])
@pytest.mark.parametrize("priority", [0, 50])
def test_the_weights_come_back(hook, error, priority):
    if error is CancelBatchException and hook not in ("before_validation_batch", "after_loss"): return
    learn = learner(batches(4), EMA(0.9), validation=batches(13), test=batches(13))
    def fault(learn):
        if learn.phase != "train": raise error
    learn.on(hook, fault, priority=priority)
    seen, pointers = [], [p.data_ptr() for p in learn.model.parameters()]
    learn.on("after_training", lambda learn: seen.append(copy.deepcopy(learn.model)))
    with suppress(KeyboardInterrupt, ZeroDivisionError): learn.train()
    assert same(seen[-1], learn.model) and pointers == [p.data_ptr() for p in learn.model.parameters()]


def test_in_validation_the_model_has_the_averages():
    learn, seen = learner(batches(4), ema := EMA(0.9), validation=batches(13)), []
    learn.on("before_validation_batch", lambda learn: seen.append(same(learn.model, ema.model())))
    learn.train()
    assert seen == [True, True] and not same(learn.model, ema.model())
    ema.copy_to(learn.model)
    assert same(learn.model, ema.model())


def test_averages_of_half_precision_are_kept_in_float32():
    model = net(double=False).bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches(13)]
    learn = learner(data, ema := EMA(0.999, warm_up=False), model=model, validation=data,
                    optimiser=torch.optim.SGD(model.parameters(), lr=0.1))
    learn.train(3)
    assert {average.dtype for average in ema.state_dict()["averages"].values()} == {torch.float32}
    assert ema.model()[0].weight.dtype is torch.bfloat16


def test_it_goes_on_from_its_state_and_starts_anew_with_another_model():
    whole, ema = learner(batches(4)), EMA(0.9)
    whole.train(2, callbacks=ema)
    whole.train(2, callbacks=ema)
    parts, first = learner(batches(4)), EMA(0.9)
    parts.train(2, callbacks=first)
    second = EMA(0.9)
    second.load_state_dict(through_file(first.state_dict()))
    parts.train(2, callbacks=second)
    assert same(ema.model(), second.model()) and second.updates == 28
    learner(batches(4), ema, model=net(7)).train()
    fresh = EMA(0.9)
    learner(batches(4), fresh, model=net(7)).train()
    assert same(fresh.model(), ema.model())


def test_a_lazy_model():
    model = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3)).double()
    learn = learner(batches(4), ema := EMA(0.9), model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.1))
    learn.train()
    assert ema.updates == 7 and ema.model()[0].weight.shape == (8, 6)


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.words, self.head = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, numbers): return self.head(self.words(numbers).mean(1))


@pytest.mark.parametrize("options", [{"norm": 0.05}, {"norm": 0.05, "norm_type": math.inf}, {"value": 0.01}, {"norm": 0.05, "log": True}])
def test_sparse_gradients_are_clipped_like_dense_ones(options):
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randint(10, (8, 3), generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(5)]
    def trained(sparse):
        torch.manual_seed(0)
        model = Words(sparse).double()
        learn = Learner(model, torch.optim.SGD(model.parameters(), lr=1.0), F.cross_entropy, {"train": loader}, ClipGradients(**options), device="cpu")
        learn.train(2)
        return [*model.parameters()], learn.history.rows
    (dense, rows), (sparse, sparse_rows) = trained(False), trained(True)
    for a, b in zip(dense, sparse, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert "log" not in options or sparse_rows[1]["train_gradient_norm"] == pytest.approx(rows[1]["train_gradient_norm"], abs=1e-12)


class Spectral(nn.Module):
    "A filter in Fourier space, whose weights are complex."
    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.ones(4, dtype=torch.complex128)), nn.Linear(6, 3).double()

    def forward(self, x): return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))


def spectral(*callbacks):
    torch.manual_seed(0)
    model = Spectral()
    return learner(batches(4), *callbacks, model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.5), loss=lambda p, y: 10 * F.cross_entropy(p, y))


def test_complex_gradients_are_clipped_by_their_parts_or_by_the_norm():
    for callback, largest in ((ClipGradients(value=0.1), lambda g: torch.view_as_real(g).abs().max() if g.is_complex() else g.abs().max()),
                              (ClipGradients(0.1), lambda g: g.abs().pow(2).sum().sqrt()), (ClipGradients(0.1, norm_type=math.inf), lambda g: g.abs().max())):
        learn, seen = spectral(callback), []
        learn.on("before_step", lambda model, seen=seen, largest=largest: seen.append(max(largest(p.grad).item() for p in model.parameters())), priority=9)
        learn.train()
        assert 0.05 < max(seen) <= 0.1 + 1e-9


def test_complex_weights_are_averaged_and_accumulated():
    learn, trace = spectral(ema := EMA(0.9, warm_up=False)), []
    learn.on("after_step", lambda model: trace.append(model.filter.detach().clone()), priority=99)
    learn.train(2)
    average = trace[0]
    for weights in trace[1:]: average = 0.9 * average + 0.1 * weights
    torch.testing.assert_close(ema.model().filter.detach(), average)
    def by_weight(learn): return torch.tensor(float(len(learn.labels)))
    one, other = spectral(Accumulate(2)), spectral(Accumulate(2, weight=by_weight))
    for each in (one, other): each.train()
    assert gap(one, other) < 1e-12 and not torch.equal(one.model.filter, Spectral().filter)


# FreezeUntil

class Tied(nn.Module):
    "The head shares its weight with the embedding."
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x): return self.head(self.body(self.embed(x)))


@pytest.mark.parametrize("part", ["head", "embed", "head.weight", "*d.weight", nn.Embedding])
def test_a_tied_weight_is_frozen_under_any_of_its_names(part):
    torch.manual_seed(0)
    model = Tied()
    learn = learner([(torch.arange(10), torch.arange(10))] * 2, FreezeUntil(1, part), model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.1))
    assert trained_parts(learn) == {"body.weight", "body.bias"}
    assert trained_parts(learn) == {"embed.weight", "body.weight", "body.bias", "head.weight"} and model.head.weight is model.embed.weight


def trained_parts(learn, *args, **kwargs):
    before = copy.deepcopy(learn.model.state_dict())
    learn.train(*args, **kwargs)
    return {name for name, value in learn.model.state_dict().items() if not torch.equal(value, before[name])}


def test_epochs_are_counted_over_all_calls():
    learn = learner(batches(4), freeze := FreezeUntil(2, "0"))
    head, everything = {"2.weight", "2.bias"}, {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert trained_parts(learn) == head and trained_parts(learn) == head and trained_parts(learn) == everything
    assert freeze.epochs == 3
    guest = FreezeUntil(1, "0")
    assert trained_parts(learn, callbacks=guest) == head and trained_parts(learn, callbacks=guest) == everything
    resumed = FreezeUntil(2, "0")
    resumed.load_state_dict(freeze.state_dict())
    learn.remove(freeze)
    assert trained_parts(learn, callbacks=resumed) == everything


@pytest.mark.parametrize("backwards", [False, True])
def test_what_two_freeze_is_trained_when_the_last_lets_it_go(backwards):
    steps = [FreezeUntil(1, "0"), FreezeUntil(3, "0.bias")]
    learn = learner(batches(4), *(reversed(steps) if backwards else steps))
    learn.model[2].bias.requires_grad_(False)  # the user's own
    assert [trained_parts(learn) for _ in range(4)] == [
        {"2.weight"}, {"0.weight", "2.weight"}, {"0.weight", "2.weight"}, {"0.weight", "0.bias", "2.weight"}]
    assert [p.requires_grad for p in learn.model.parameters()] == [True, True, True, False]


def test_two_freeze_within_one_call():
    seen, learn = [], learner(batches(4), FreezeUntil(1, "0"), FreezeUntil(3, "0.bias"))
    learn.on("before_training", lambda model: seen.append([p.requires_grad for p in model.parameters()]))
    learn.train(4)
    assert seen == [[False, False, True, True], [True, False, True, True], [True, False, True, True], [True] * 4]


def test_it_thaws_at_the_beginning_of_its_epoch():
    learn, seen = learner(batches(4), FreezeUntil(2, "0")), []
    learn.on("before_batch", lambda learn: seen.append((learn.epoch, learn.model[0].weight.requires_grad)))
    learn.train(4)
    assert set(seen) == {(0, False), (1, False), (2, True), (3, True)}


class SavesAt(Callback):
    "Saves within an epoch and at its end, when the others have seen it."
    priority, watches = 5000, True

    def __init__(self, folder, epoch): self.folder, self.epoch = folder, epoch

    def after_batch(self, learn, epoch, batch_num):
        if (epoch, batch_num) == (self.epoch, 1): learn.save(self.folder / "within")

    def after_epoch(self, learn, epoch):
        if epoch == self.epoch: learn.save(self.folder / "end")


@pytest.mark.parametrize("where", ["within", "end"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_training_that_is_resumed_is_frozen_as_long_as_the_callback_says(tmp_path, epoch, where):
    def with_flags(*callbacks):
        learn, flags = learner(batches(4), *callbacks), []
        learn.on("before_training", lambda model: flags.append([p.requires_grad for p in model.parameters()]), priority=5000)
        return learn, flags
    whole, _ = with_flags(FreezeUntil(2, "0"), SavesAt(tmp_path, epoch))
    whole.train(4)
    fresh, flags = with_flags(FreezeUntil(2, "0"))
    fresh.train(4, resume=tmp_path / where)
    assert same(fresh.model, whole.model)
    assert flags[-1] == [True] * 4 and [p.requires_grad for p in fresh.model.parameters()] == [True] * 4
    without, flags = with_flags()
    with pytest.warns(UserWarning, match="lacks: FreezeUntil"):
        without.train(4, resume=tmp_path / where)  # nobody keeps it frozen any longer
    assert all(each == [True] * 4 for each in flags) and len(without.history) == 4


def test_what_a_hook_freezes_after_its_epoch_stays_frozen_in_a_training_that_is_resumed(tmp_path):
    def freezing(*callbacks):
        learn = learner(batches(4), FreezeUntil(1, "0"), *callbacks)

        def freeze(learn, epoch):
            if epoch == 2: learn.model[0].weight.requires_grad_(False)
        learn.on("before_training", freeze)
        return learn
    whole, fresh = freezing(SavesAt(tmp_path, 3)), freezing()
    whole.train(5)
    fresh.train(5, resume=tmp_path / "within")
    assert same(fresh.model, whole.model) and not fresh.model[0].weight.requires_grad


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, CancelEpochException, CancelTrainException])
def test_everything_can_be_trained_again_afterwards(error):
    learn = learner(batches(4), freeze := FreezeUntil(2, "0"), Raises("before_batch", error(), at=2))
    learn.model[2].bias.requires_grad_(False)
    with suppress(KeyboardInterrupt, ZeroDivisionError): learn.train()
    assert [p.requires_grad for p in learn.model.parameters()] == [True, True, True, False]
    assert freeze.epochs == (1 if error is CancelEpochException else 0)


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_statistics(affine):
    def run(freeze_statistics):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=affine), nn.Tanh())
        model = nn.Sequential(body, nn.Linear(8, 3)).double()
        learn = learner(batches(13), FreezeUntil(1, "0", freeze_statistics), model=model)
        changed = [trained_parts(learn) for _ in range(2)]
        assert all(module.training for module in model.modules())
        return ["0.1.running_mean" in names for names in changed]
    assert run(True) == [False, True] and run(False) == [True, True]


def test_filters():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "body2": nn.Linear(2, 2)})
    assert list(pick(model, "body")) == ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    assert list(pick(model, "body*")) == [name for name, _ in model.named_parameters()]
    assert list(pick(model, ["body2", nn.BatchNorm1d])) == ["body.1.weight", "body.1.bias", "body2.weight", "body2.bias"]
    assert list(pick(model, lambda name, parameter: parameter.ndim == 2)) == ["body.0.weight", "body2.weight"]
    assert list(pick(model, "body2.bias")) == ["body2.bias"]
    assert list(pick(model, nn.Sequential)) == list(pick(model, "body"))


# Messages

def run(*callbacks, **kwargs): return learner(batches(4), *callbacks, **kwargs).train()


class NoBackward(Learner):
    def train_batch(self):
        self.act("prepare", "predict", "loss")
        self.loss.backward()
        self.act("step")


def run_in(cls):
    model = net()
    cls(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches(4)}, Accumulate(2)).train()


def penalty(learn): learn.loss = learn.loss + 1


def fine_tune_head():
    model = net()
    run(FreezeUntil(1, "0"), model=model, optimiser=torch.optim.SGD(model[2].parameters(), lr=0.1))


def with_penalty():
    learn = learner(batches(4), Accumulate(2))
    learn.on("before_backward", penalty)
    learn.train()


def loaded(callback, state):
    callback.load_state_dict(state)
    return callback


@pytest.mark.parametrize(("do", "error", "message"), [
    (lambda: Accumulate(0), ValueError, "n is 0; it must be a whole number of at least 1"),
    (lambda: Accumulate(2.5), ValueError, "n is 2.5; it must be a whole number of at least 1"),
    (lambda: Accumulate(2, weight="tokens"), TypeError, "weight is 'tokens'; pass a function of the learner, or None for the size of the batch"),
    (lambda: run(Accumulate(2, weight=lambda learn: -1)), ValueError, "Accumulate: weight returned -1; return a number of at least 0, or a scalar tensor"),
    (lambda: run(Accumulate(2, weight=lambda learn: None)), ValueError, "Accumulate: weight returned None; return a number of at least 0, or a scalar tensor"),
    (lambda: run(Accumulate(2, weight=lambda learn: math.nan)), ValueError, "Accumulate: weight returned nan; return a number of at least 0, or a scalar tensor"),
    (lambda: run(Accumulate(2, weight=lambda learn: learn.labels)), ValueError, "Accumulate: weight returned a tensor of shape (4,); return its .sum()"),
    (lambda: run_in(NoBackward), CallbackError, "Accumulate: train_batch took a step without a backward stage; call self.act(\"backward\") in place of loss.backward()"),
    (with_penalty, CallbackError, "Accumulate: learn.loss was replaced in before_backward, after it had been weighted; replace it in after_loss"),
    (lambda: loaded(Accumulate(2), {"batches": 1}), ValueError, "load_state_dict: the state has no total; it has ['batches']"),
    (lambda: ClipGradients(0), ValueError, "norm is 0; it must be above 0"),
    (lambda: ClipGradients(-1.0), ValueError, "norm is -1.0; it must be a finite number of at least 0"),
    (lambda: ClipGradients(value=0.0), ValueError, "value is 0.0; it must be above 0"),
    (lambda: ClipGradients(1.0, value=1.0), ValueError, "ClipGradients: norm is 1.0 and value is 1.0; give one of them"),
    (lambda: ClipGradients(value=1.0, log=True), ValueError, "ClipGradients: log=True logs the norm, which clipping by value does not compute; clip by norm, or leave log out"),
    (lambda: ClipGradients(norm_type="2"), ValueError, "norm_type is '2'; it must be a finite number of at least 0"),
    (lambda: EMA(1), ValueError, "decay is 1; it must be below 1, such as 0.999"),
    (lambda: EMA(-0.1), ValueError, "decay is -0.1; it must be a finite number of at least 0"),
    (lambda: EMA().copy_to(net()), RuntimeError, "EMA has no averages yet; train first, or load a state"),
    (lambda: EMA().model(), RuntimeError, "EMA has no model yet; train first, or use copy_to(model)"),
    (lambda: loaded(EMA(), {"updates": 1}), ValueError, "load_state_dict: the state has no averages; it has ['updates']"),
    (lambda: run(loaded(EMA(), {"updates": 1, "averages": {"1.weight": torch.ones(1)}})), ValueError, "EMA: the model has no 1.weight; did you mean 2.weight?"),
    (lambda: run(loaded(EMA(), {"updates": 1, "averages": {"0.weight": torch.ones(1)}})), ValueError, "EMA: 0.weight of the model has shape (8, 6), and its average (1,)"),
    (lambda: FreezeUntil(0, "0"), ValueError, "epoch is 0; it must be a whole number of at least 1"),
    (lambda: FreezeUntil(1, 3), TypeError, "filter is 3; pass a name, a pattern, a type of module, or a function of name and parameter"),
    (lambda: FreezeUntil(1, net()[0]), TypeError, "filter is a Linear; name it instead"),
    (lambda: run(FreezeUntil(1, "7")), ValueError, "filter: '7' picks no parameter; the model has 0, 2"),
    (lambda: run(FreezeUntil(1, "0.wieght")), ValueError, "filter: '0.wieght' picks no parameter; the model has 0, 2; did you mean 0.weight?"),
    (lambda: run(FreezeUntil(1, nn.Conv2d)), ValueError, "filter: Conv2d picks no parameter; the model has 0, 2"),
    (lambda: run(FreezeUntil(3, "*")), ValueError, "FreezeUntil: the filter picks everything that is trained; leave something for the first 3 epochs"),
    (fine_tune_head, ValueError, "FreezeUntil: 0.weight is not in the optimiser and would never be trained; make the optimiser from all parameters of the model"),
    (lambda: loaded(FreezeUntil(1, "0"), {}), ValueError, "load_state_dict: the state has no epochs; it has []"),
])
@pytest.mark.filterwarnings("ignore:.*in no group of the optimiser")
def test_messages(do, error, message):
    with pytest.raises(error) as caught: do()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_error_before_training_changes_nothing():
    learn = learner(batches(4))
    before = copy.deepcopy(learn.model)
    for callback in (FreezeUntil(3, "*"), FreezeUntil(1, "7"), loaded(EMA(), {"updates": 1, "averages": {"x": torch.ones(1)}})):
        with pytest.raises(ValueError): learn.train(callbacks=callback)
    assert same(before, learn.model) and all(p.requires_grad for p in learn.model.parameters()) and not learn.history.rows
    assert check_whole("rows", len(learn.history), 0) == 0
