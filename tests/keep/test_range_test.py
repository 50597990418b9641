"""The range test: against a plain loop, without a trace, and what it says of curves that say nothing."""
import base64
import copy
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.keep.range_test import SUGGESTIONS, RangeTest, Rounds, local_lines, longest_descent, lr_find
from learner.loop.data import TensorLoader
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException, CancelStepException


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


def momentum(parameters, lr): return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def learner(optimiser=torch.optim.AdamW, callbacks=None, loaders=None):
    return Learner(net(), optimiser, F.cross_entropy, loaders or digits(), callbacks, device="cpu")


def small(batches=4, optimiser=torch.optim.AdamW, callbacks=None):
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(8 * batches, 64, generator=generator), torch.randint(10, (8 * batches,), generator=generator)
    return learner(optimiser, callbacks, {"train": TensorLoader(data, 8, shuffle=True)})


# Against a plain loop

@pytest.mark.parametrize("optimiser", [torch.optim.SGD, momentum, torch.optim.AdamW])
def test_the_curve_is_that_of_a_plain_loop(optimiser):
    learn = learner(optimiser)
    state, found = torch.get_rng_state(), lr_find(learn)
    model, loader = net(), digits()["train"]
    opt, losses, epoch = optimiser(model.parameters(), lr=1e-7), [], 0
    torch.set_rng_state(state)
    while len(losses) < len(found.losses):
        loader.set_epoch(epoch)
        for x, y in loader:
            if len(losses) == len(found.losses): break
            for group in opt.param_groups: group["lr"] = 1e-7 * (10 / 1e-7) ** (len(losses) / 99)
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            loss.backward()
            opt.step()
            opt.zero_grad()
        epoch += 1
    assert found.losses == losses
    assert found.rates == [1e-7 * (10 / 1e-7) ** (i / 99) for i in range(len(losses))]
    assert 0 < found.minimum < 10 and 1e-4 < found.valley < 5 and found.valley < found.steepest < 10


def test_the_end_is_where_the_running_mean_is_four_times_its_best():
    found = lr_find(learner())
    assert "the loss grew to 4 times its best" in found.ended
    mean = weight = 0.0
    means = []
    for loss in found.losses:
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        means.append(mean / weight)
    assert means[-1] > 4 * min(means[4:]) and all(means[i] <= 4 * min(means[4:i + 1]) for i in range(4, len(means) - 1))


# No trace

class Steers(Callback):
    """Has state, changes the loss, draws random numbers from all three generators."""
    def __init__(self): self.count = 0
    def after_loss(self, learn):
        self.count += 1
        learn.loss = learn.loss * (1 + 0.01 * (random.random() + np.random.rand() + torch.rand(()).item()))


class Stops(Callback):
    def __init__(self, hook, batch, error): self.at, self.error, self.hook = batch, error, hook
    def _stop(self, batch_num):
        if batch_num == self.at: raise self.error
    def before_batch(self, batch_num):
        if self.hook == "before_batch": self._stop(batch_num)
    def after_backward(self, batch_num):
        if self.hook == "after_backward": self._stop(batch_num)
    def after_step(self, batch_num):
        if self.hook == "after_step": self._stop(batch_num)


def tensors(tree):
    if isinstance(tree, torch.Tensor): return [tree.detach().clone()]
    if isinstance(tree, dict): tree = list(tree.values())
    return [leaf for part in tree for leaf in tensors(part)] if isinstance(tree, (list, tuple)) else []


def everything(learn):
    """All that a test could leave behind: tensors, and what is compared with ==."""
    opt, loader = learn.optimiser, learn.dataloaders["train"]
    made = hasattr(opt, "param_groups")
    gradients = [torch.zeros(0) if p.grad is None else p.grad for p in learn.model.parameters()]
    numbers = np.random.get_state(legacy=False)
    return [*tensors(learn.model.state_dict()), *(tensors(opt.state_dict()) if made else []), *map(torch.clone, gradients),
            torch.get_rng_state(), torch.tensor(numbers["state"]["key"].astype(np.int64))], [
        [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] if made else opt,
        random.getstate(), numbers["state"]["pos"], loader.epoch, list(learn.callbacks),
        [{k: v for k, v in vars(c).items() if k != "error"} for c in learn.callbacks], copy.deepcopy(learn.history.rows),
        copy.deepcopy(learn.results), [m.training for m in learn.model.modules()], learn.epoch, learn.batch_num, learn.phase,
        [p.requires_grad for p in learn.model.parameters()], torch.is_grad_enabled(), learn.is_running, learn.dataloaders,
        [sorted(m._forward_hooks) for m in learn.model.modules()], sorted(vars(learn).keys() - {"_open", "_actions"})]


def same(one, other):
    return len(one[0]) == len(other[0]) and all(map(torch.equal, one[0], other[0])) and one[1] == other[1]


def trained(callback=None, optimiser=momentum):
    learn = small(4, optimiser, [Steers(), *([callback] if callback else [])])
    learn.train(1, learning_rate=0.01) if callback is None else None
    learn.model[5].bias.grad = torch.ones(10)
    learn.model[2].eval()
    random.random(), np.random.rand(), torch.rand(3)
    return learn


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, momentum, torch.optim.AdamW])
def test_it_leaves_no_trace(optimiser):
    learn = trained(optimiser=optimiser)
    before = everything(learn)
    one = lr_find(learn, steps=30)
    assert same(before, everything(learn))
    assert one == lr_find(learn, steps=30)
    learn.train(1)
    assert not same(before, everything(learn))  # the comparison can fail


def test_it_leaves_no_trace_before_the_first_training():
    learn = small()
    before = everything(learn)
    lr_find(learn)
    assert same(before, everything(learn)) and learn.optimiser is torch.optim.AdamW


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=["interrupt", "error"])
@pytest.mark.parametrize("hook", ["before_batch", "after_backward", "after_step"])
def test_interrupted_in_any_batch_it_leaves_no_trace(hook, error):
    stops = Stops(hook, -1, error)
    learn = trained()
    learn.add(stops)
    one = lr_find(learn, steps=12)
    for batch in range(12):
        stops.at = batch
        before = everything(learn)
        with pytest.raises(type(error)): lr_find(learn, steps=12)
        assert same(before, everything(learn)), batch
    stops.at = -1
    assert one == lr_find(learn, steps=12)


def test_a_training_goes_on_as_if_there_had_been_no_test():
    def run(look):
        learn = small(5)
        learn.train(2, learning_rate=0.01)
        if look: lr_find(learn)
        learn.train(2)
        return tensors(learn.model.state_dict()), learn.history.rows
    (one, rows), (other, other_rows) = run(True), run(False)
    assert all(map(torch.equal, one, other)) and rows == other_rows


def test_the_order_of_a_torch_loader_is_left_alone():
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(40, 64), torch.randint(10, (40,)))
    learn = learner(loaders={"train": torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)})
    state = generator.get_state()
    one = lr_find(learn, steps=12)
    assert torch.equal(state, generator.get_state()) and one == lr_find(learn, steps=12)


# Combinations

@pytest.mark.filterwarnings("ignore:.*in no group of the optimiser")
def test_parameter_groups_keep_their_proportions():
    seen = []

    class See(Callback):
        priority = 2_000_000
        def before_step(self, optimiser): seen.append([group["lr"] for group in optimiser.param_groups])
    learn = small(callbacks=See())
    learn.optimiser = torch.optim.AdamW([{"params": learn.model[1].parameters(), "lr": 1e-4},
                                         {"params": learn.model[5].parameters(), "lr": 1e-3}])
    found = lr_find(learn, steps=20)
    assert [head for _, head in seen[:len(found.rates)]] == found.rates
    assert all(abs(body / head - 0.1) < 1e-12 for body, head in seen)
    assert [group["lr"] for group in learn.optimiser.param_groups] == [1e-4, 1e-3]


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.01)], ids=["zero", "tensor"])
def test_a_rate_of_zero_or_in_a_tensor(rate):
    learn = small()
    learn.optimiser = torch.optim.Adam(learn.model.parameters(), lr=rate)
    found = lr_find(learn)
    assert found.losses[-1] != found.losses[0] and max(found.rates) > 0.01
    assert learn.optimiser.param_groups[0]["lr"] is rate and float(rate) in (0.0, float(torch.tensor(0.01)))


@pytest.mark.parametrize("hook", ["before_batch", "after_step", "before_step"])
def test_a_callback_that_sets_the_rate_is_overruled(hook):
    def setting(optimiser):
        for group in optimiser.param_groups: group["lr"] = 0.123
    plain, learn = lr_find(small()), small()
    learn.on(hook, setting, priority=30)
    assert lr_find(learn) == plain


def test_a_schedule_stays_behind():
    class Schedule(Callback):
        schedules, left = True, 3
        def after_step(self):
            self.left -= 1
            if self.left < 0: raise ValueError("the schedule is over")
    learn = small(callbacks=Schedule())
    assert lr_find(learn) == lr_find(small())
    assert learn.callbacks[0].left == 3


def test_clipping_takes_part():
    class Clip(Callback):
        priority = -20
        def before_step(self, model): nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert lr_find(small(callbacks=Clip()), end=1.0).losses != lr_find(small(), end=1.0).losses


def test_accumulated_gradients_make_one_point_a_step():
    class Every(Callback):
        priority = -40
        def before_step(self, batch_num):
            if (batch_num + 1) % 3: raise CancelStepException
    plain = lr_find(small(callbacks=Every()), steps=30, end=1e-6)  # as good as no training
    each = lr_find(small(), steps=30, end=1e-6)
    assert plain.rates == each.rates[2::3] and len(plain.losses) == 10

    class Still(Callback):
        def before_step(self): raise CancelStepException
    assert lr_find(small(callbacks=Still()), steps=30).losses == []


def test_the_point_of_a_group_is_the_mean_of_its_losses():
    seen = []

    class Every(Callback):
        def before_step(self, batch_num):
            if batch_num % 2 == 0: raise CancelStepException
        def after_loss(self, loss): seen.append(loss.item())
    found = lr_find(small(callbacks=Every()), steps=10)
    assert found.losses == [(a + b) / 2 for a, b in zip(seen[::2], seen[1::2], strict=True)]


def test_a_cancelled_batch_makes_no_point():
    class Skip(Callback):
        def before_batch(self, batch_num):
            if batch_num in (3, 9): raise CancelBatchException
    found, all_of_them = lr_find(small(callbacks=Skip()), steps=10), lr_find(small(), steps=10)
    assert found.rates == [rate for i, rate in enumerate(all_of_them.rates) if i not in (3, 9)]


def test_validation_and_test_do_not_run():
    learn = small()
    learn.dataloaders = {**learn.dataloaders, "validation": [None], "test": [None]}
    fired = []
    for hook in ("before_validation", "before_test", "after_epoch"): learn.on(hook, lambda hook=hook: fired.append(hook))
    lr_find(learn)
    assert not fired


@pytest.mark.parametrize("shift", [-1.0, -2.3, -100.0])
def test_a_loss_that_becomes_negative(shift):
    class Shift(Callback):
        def after_loss(self, learn): learn.loss = learn.loss + shift
    found, plain = lr_find(learner(callbacks=Shift())), lr_find(learner())
    for name in ("steepest", "minimum", "valley"):
        assert abs(math.log10(getattr(found, name) / getattr(plain, name))) < 0.3


# Curves

def test_a_loader_of_one_batch_and_one_shorter_than_the_steps():
    one = lr_find(small(1, momentum), steps=60)
    assert len(set(one.rates)) == len(one.rates) > 30 and one.valley is not None
    batches = [object(), object(), object()]
    assert list(Rounds(batches, 7)) == [*batches, *batches, batches[0]]
    assert len(Rounds(batches, 7)) == 7 and list(Rounds([], 3)) == []


def test_each_round_has_its_own_order():
    loader = TensorLoader(torch.arange(20), 20, shuffle=True)
    first, second = list(Rounds(loader, 2, epoch=4))
    assert torch.equal(first, loader.order(4)) and torch.equal(second, loader.order(5))


NOTHING = {  # how it is called, and what is said
    "rates that are all too low": (dict(end=1e-5), "raise end or take more steps"),
    "rates that are all too high": (dict(start=5.0, end=1000.0), "start"),
    "too few points": (dict(steps=5), "there are 5 points, and 8 are needed; take more steps"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_it_says_why_there_is_no_suggestion(case):
    options, said = NOTHING[case]
    found = lr_find(learner(momentum), **options)
    assert [getattr(found, name) for name in SUGGESTIONS] == [None] * 3
    assert set(found.reasons) == set(SUGGESTIONS) and said in found.reasons["valley"]
    assert "no suggestion" in repr(found)
    html = found._repr_html_()  # a notebook shows both
    assert said in html and base64.b64decode(html.partition("base64,")[2].partition("\"")[0]).startswith(b"\x89PNG")
    found.plot().figure.clf()


@pytest.mark.parametrize("at", [0, 1, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_stops_at_the_first_loss_that_is_not_finite(at, bad):
    class Break(Callback):
        def after_loss(self, learn, batch_num):
            if batch_num >= at: learn.loss = learn.loss * bad
    found = lr_find(small(callbacks=Break()), end=1e-3)
    assert len(found.losses) == at and all(map(math.isfinite, found.losses)) and found.ended.startswith(f"the loss was {bad:g}")
    assert found.valley is None and ("no step was taken yet" in found.reasons["valley"]) == (at == 0)
    found.plot().figure.clf()


def test_divergence_in_the_first_steps():
    class Grow(Callback):
        def after_loss(self, learn, batch_num): learn.loss = learn.loss * 10.0**batch_num
    found = lr_find(small(callbacks=Grow()))
    assert len(found.losses) < 10 and found.valley is None and "start" in found.reasons["valley"]


def test_a_constant_loss():
    class Constant(Callback):
        def after_loss(self, learn): learn.loss = learn.loss * 0 + 1
    found = lr_find(small(callbacks=Constant()))
    assert found.reasons["valley"] == "the loss is the same at all rates; does the model get any gradient?"


def curve(fall=1.0, noise=0.0, level=2.0, low=1e-3, high=1e-1, seed=0):
    rates = [1e-7 * 10 ** (i / 16) for i in range(113)]
    share = [min(max(math.log(rate / low) / math.log(high / low), 0), 1) for rate in rates]
    rise = [5 * fall * max(math.log10(rate / high), 0) for rate in rates]
    generator = random.Random(seed)
    return RangeTest(rates, [level - fall * a + b + generator.gauss(0, noise) for a, b in zip(share, rise, strict=True)])


@pytest.mark.parametrize("level", [2.0, 0.0, -50.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_straight_descent(noise, level):
    for seed in range(5):
        found = curve(noise=noise, level=level, seed=seed)
        assert 1e-3 < found.steepest < 1e-1
        assert 10**-2.6 < found.valley < 10**-1.4
        assert 10**-2.6 < found.minimum < 10**-1.7


def test_noise_alone_suggests_nothing():
    for seed in range(60):
        generator = random.Random(seed)
        rates = [1e-7 * 10 ** (i / 12.375) for i in range(100)]
        for losses in ([2.3 + 0.3 * generator.gauss(0, 1) for _ in rates], [math.exp(generator.gauss(0, 1)) for _ in rates]):
            assert RangeTest(rates, losses).valley is None, seed


def test_the_suggestions_do_not_depend_on_the_number_of_steps_or_the_scale_of_the_loss():
    base = curve()
    for factor in (1e-6, 1e6):
        found = RangeTest(base.rates, [factor * loss for loss in base.losses])
        assert [getattr(found, n) for n in SUGGESTIONS] == [getattr(base, n) for n in SUGGESTIONS]


def test_lines_are_those_of_least_squares():
    generator = random.Random(0)
    x = sorted(generator.random() for _ in range(30))
    y = [generator.gauss(0, 1) for _ in x]
    heights, slopes, _ = local_lines(x, y, 0.1)
    for i in range(30):
        root = np.exp(-((np.array(x) - x[i]) / 0.1) ** 2 / 4)
        design = np.stack([np.ones(30), np.array(x) - x[i]], 1)
        (height, slope), *_ = np.linalg.lstsq(design * root[:, None], np.array(y) * root, rcond=None)
        assert abs(height - heights[i]) < 1e-9 and abs(slope - slopes[i]) < 1e-7


def test_the_longest_descent_is_that_of_all_chains():
    for seed in range(50):
        generator = random.Random(seed)
        values = [generator.randint(0, 20) for _ in range(9)]
        chains = [[i for i in range(9) if mask >> i & 1] for mask in range(1, 512)]
        best = max(len(c) for c in chains if all(values[a] - values[b] >= 2 for a, b in pairwise(c)))
        chain = longest_descent(values, 2)
        assert len(chain) == best and all(values[a] - values[b] >= 2 for a, b in pairwise(chain))


def test_the_plot_marks_what_was_found():
    import matplotlib.pyplot as plt
    found = curve(noise=0.05)
    _, ax = plt.subplots()
    assert found.plot(ax) is ax
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert all(any(name in word and f"{getattr(found, name):.2g}" in word for word in words) for name in SUGGESTIONS)
    assert ax.get_xscale() == "log" and ax.get_xlabel() and ax.get_ylabel()
    plt.close("all")


# Bad input

BAD = {
    "start": (dict(start=1.0, end=0.1), ValueError, "start is 1 and end is 0.1; the rate rises: 0 < start < end"),
    "zero": (dict(start=0), ValueError, "start is 0 and end is 10; the rate rises: 0 < start < end"),
    "text": (dict(start="low"), ValueError, "start is 'low'; it must be a finite number of at least 0"),
    "infinite": (dict(end=math.inf), ValueError, "end is inf; it must be a finite number of at least 0"),
    "steps": (dict(steps=1), ValueError, "steps is 1; it must be a whole number of at least 2"),
    "half a step": (dict(steps=10.5), ValueError, "steps is 10.5; it must be a whole number of at least 2"),
    "divergence": (dict(divergence=1), ValueError, "divergence is 1; it must be more than 1, such as 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_changes_nothing(case):
    options, kind, said = BAD[case]
    learn = small()
    before = everything(learn)
    with pytest.raises(kind) as raised: lr_find(learn, **options)
    assert str(raised.value) == said and same(before, everything(learn))


def test_what_cannot_be_tested_is_told():
    learn = small()
    with pytest.raises(TypeError, match="lr_find takes a Learner, not a Sequential; make one"): lr_find(learn.model)
    batches = list(learn.dataloaders["train"])
    learn.dataloaders = {"train": iter(batches)}
    with pytest.raises(TypeError, match=r'dataloaders\["train"\] is an iterator, which a test would use up'): lr_find(learn)
    learn.dataloaders = {"validation": batches}
    with pytest.raises(ValueError, match='no "train" loader, it has \\[\'validation\'\\]; add one'): lr_find(learn)
    learn = small()
    learn.on("before_epoch", lambda learn: lr_find(learn))
    with pytest.raises(RuntimeError, match="lr_find was called inside a run; call it afterwards"): learn.train(1)


def test_a_routine_without_a_loss_is_told():
    class Own(Learner):
        def train_batch(self): self.act("prepare")
    learn = small()
    learn = Own(learn.model, learn.optimiser, F.cross_entropy, learn.dataloaders, device="cpu")
    with pytest.raises(ValueError, match="lr_find: the batch routine sets no learn.loss; assign the loss to look at"): lr_find(learn)
