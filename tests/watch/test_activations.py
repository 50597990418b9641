"""Statistics of activations and gradients against a plain loop in torch; hooks, bounds, pictures and costs."""
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from copy import deepcopy

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
)
from learner.watch.activations import ActivationStats, GradientStats
from learner.watch.measured import (
    histogram,
    join_calls,
    leaves,
    measure,
    pick_modules,
    real_tensors,
    sorting_histogram,
)

torch.manual_seed(0)
X, Y = torch.randn(60, 1, 8, 8), torch.randint(0, 4, (60,))
BATCHES = [(X[i:i + 16], Y[i:i + 16]) for i in range(0, 60, 16)]  # the last one is ragged


def net(inplace=False):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Dropout(0.2), nn.Flatten(),
                         nn.Linear(36, 8), nn.ReLU(inplace), nn.Linear(8, 4))


def learner(callbacks=None, model=None, loaders=None, loss_func=F.cross_entropy):
    return Learner(net() if model is None else model, torch.optim.SGD, loss_func, loaders or {"train": BATCHES, "validation": BATCHES[:2]},
                   callbacks, device="cpu")


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(autouse=True)
def tidy():
    yield
    plt.close("all")


# Numbers

def plain_loop(epochs=2, lr=0.1):
    "Outputs and gradients of every layer, from a loop without learner."
    model, steps = net(), []
    torch.manual_seed(7)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        for x, y in BATCHES:
            outputs = []
            for layer in model:
                x = layer(x)
                x.retain_grad()
                outputs.append(x)
            F.cross_entropy(x, y).backward()
            optimiser.step()
            optimiser.zero_grad()
            steps.append([(out.detach().clone(), out.grad.clone()) for out in outputs])
        model.eval()
    return steps


@pytest.mark.parametrize("kind, which", [(ActivationStats, 0), (GradientStats, 1)])
@pytest.mark.parametrize("every", [1, 3])
def test_numbers_are_those_of_a_plain_loop(kind, which, every):
    stats = kind(every=every)
    learn = learner(stats)
    torch.manual_seed(7)
    learn.train(2, 0.1)
    steps = plain_loop()
    assert stats.names == ["0", "1", "2", "5", "6", "7"]
    for name in stats.names:
        series = stats.of(name)
        assert series.steps.tolist() == list(range(0, 8, every))
        for row, step in enumerate(series.steps.tolist()):
            values = steps[step][int(name)][which]
            assert series.mean[row] == pytest.approx(values.double().mean().item(), rel=1e-4, abs=1e-8)
            assert series.std[row] == pytest.approx(values.double().std(correction=0).item(), rel=1e-4)
            assert series.near_zero[row] == pytest.approx((values.abs() <= stats.near_zero).double().mean().item())
            counted = values.abs().log10() if which else values
            expected = counted.clamp(*stats.limits).histc(stats.bins, *stats.limits)
            assert (series.histogram[row] - expected).abs().sum() <= 2  # rounding at the edges of bins
            assert series.histogram[row].sum() == values.numel()


def test_gradients_are_the_same_where_layers_work_in_place():
    both = []
    for inplace in (False, True):
        stats = GradientStats()
        torch.manual_seed(7)
        learner(stats, net(inplace)).train(1, 0.1)
        both.append(stats)
    for name in both[0].names:
        assert torch.equal(both[0].of(name).mean, both[1].of(name).mean)


def test_blocks_are_put_together(monkeypatch):
    whole, parts = ActivationStats(), ActivationStats()
    parts.block = 3
    for stats in (whole, parts):
        torch.manual_seed(7)
        learner(stats).train(2, 0.1)
    assert all(torch.equal(a, b) for name in whole.names for a, b in zip(whole.of(name), parts.of(name), strict=True))


def test_steps_number_on_through_calls():
    stats = ActivationStats(every=3)
    learn = learner(stats)
    for _ in range(2): learn.train(1, 0.1)
    assert stats.of("0").steps.tolist() == [0, 3, 6]


VALUES = torch.tensor([-9.0, -2.0, -1.5, -0.05, 0.0, 0.04, 0.3, 1.0, 1.99, 2.0, 7.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype):
    values = VALUES.to(dtype)
    found = measure(values, 4, (-2.0, 2.0), 0.1)
    assert found.mean.item() == pytest.approx(values.double().mean().item(), rel=1e-5)
    assert found.std.item() == pytest.approx(values.double().std(correction=0).item(), rel=1e-5)
    assert found.far == 8 and sum(found.histogram.tolist()) == 11
    assert found.histogram.tolist() == [3, 1, 3, 4]


def test_histograms_agree_with_each_other():
    values = torch.cat([torch.randn(5000) * 3, torch.tensor([torch.nan, torch.inf, -torch.inf])])
    by_histc = values.clamp(-5, 5).histc(50, -5, 5)
    for counts in (histogram(values, 50, (-5, 5)), sorting_histogram(values.clamp(-5, 5), 50, (-5, 5))):
        assert (counts - by_histc).abs().sum() <= 2 and counts.sum() == 5002


def test_values_that_are_no_numbers_do_no_harm():
    stats = ActivationStats()
    model = net()
    model[7].weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="nan"): learner(stats, model, {"train": BATCHES}).train(1, 0.1)
    series = stats.of("7")
    assert series.mean.isnan().all() and series.histogram.sum() == 0 and (series.near_zero == 0).all()
    for draw in (stats.plot_stats, stats.color_dim, stats.dead_chart): draw()


# Outputs of all kinds

Pair = namedtuple("Pair", "first second")
OUTPUTS = {
    "tuple": lambda x: (x * 1, x + 1), "list": lambda x: [x * 1, [x + 1]], "mapping": lambda x: {"a": x * 1, "b": x + 1},
    "ordered": lambda x: OrderedDict(a=x * 1, b=x + 1), "named": lambda x: Pair(x * 1, x + 1),
    "with whole numbers": lambda x: (x * 1, x.long(), x + 1, None, "word", x > 0),
}


@pytest.mark.parametrize("form", OUTPUTS)
@pytest.mark.parametrize("kind", [ActivationStats, GradientStats])
def test_outputs_of_every_form_are_taken_together(form, kind):
    class Part(nn.Module):
        def forward(self, x): return OUTPUTS[form](x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.part = nn.Linear(64, 4), Part()
            self.linear.bias.data.fill_(0.5)

        def forward(self, x):
            found = real_tensors(self.part(self.linear(x.flatten(1))))
            return found[0] * 2 + found[1]

    stats, model = kind(Part), Model()
    x, y = BATCHES[0]
    learner(stats, model=deepcopy(model), loaders={"train": [(x, y)]}).train(1, 0.0)
    out = model.linear(x.flatten(1)).detach()
    if kind is ActivationStats: values = torch.cat([out, out + 1])
    else:
        probabilities = ((out * 3 + 1).softmax(1) - F.one_hot(y, 4)) / len(y)
        values = torch.cat([probabilities * 2, probabilities])
    series = stats.of("part")
    assert series.steps.tolist() == [0] and series.histogram.sum() == values.numel()
    assert series.mean[0] == pytest.approx(values.double().mean().item(), rel=1e-4, abs=1e-8)
    assert series.std[0] == pytest.approx(values.double().std(correction=0).item(), rel=1e-5)


def test_a_module_that_runs_several_times():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(64, 4), nn.Linear(4, 4)
            self.alias = self.again

        def forward(self, x):
            x = self.first(x.flatten(1))
            return self.alias(self.again(x)[:5])

    stats, model = ActivationStats(), Model()
    with pytest.warns(UserWarning, match="disagree on the number of examples"):
        learner(stats, deepcopy(model), {"train": [(X, Y[:5])]}).train(1, 0.0)
    with torch.no_grad():
        once = model.again(model.first(X.flatten(1)))
        values = torch.cat([once, model.again(once[:5])]).double()
    assert stats.names == ["first", "again"]
    assert stats.of("again").std[0] == pytest.approx(values.std(correction=0).item(), rel=1e-5)
    assert stats.of("again").histogram.sum() == values.numel()


def test_packed_sequences_and_outputs_with_nothing_to_measure():
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 4), [3, 2], batch_first=True)
    assert [leaf.shape for leaf in real_tensors(packed)] == [(5, 4)]
    for nothing in (None, 3, torch.arange(3), torch.zeros(0), torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse(), "x"):
        assert real_tensors(nothing) == []


def test_half_precision_in_training():
    class Autocast(Callback):
        def around_predict(self):
            with torch.autocast("cpu", torch.bfloat16): yield

    stats, gradients = ActivationStats(nn.Linear), GradientStats(nn.Linear)
    learner([Autocast(), stats, gradients]).train(1, 0.1)
    assert stats.of("7").std.isfinite().all() and gradients.of("7").std.gt(0).all()


def test_layers_without_gradient_are_passed_over():
    model = net()
    for parameter in model[:2].parameters(): parameter.requires_grad_(False)
    stats = GradientStats()
    learn = Learner(model, torch.optim.SGD(model[5:].parameters(), 0.1), F.cross_entropy, {"train": BATCHES}, stats, device="cpu")
    learn.train(1)
    assert stats.names == ["5", "6", "7"]
    with pytest.raises(ValueError, match=r"0 Conv2d never ran in a step that was measured, or gave nothing to measure"): stats.of("0")


def test_gradients_of_gradients_keep_no_graph():
    def penalty(predictions, labels):
        loss = F.cross_entropy(predictions, labels)
        gradient, = torch.autograd.grad(loss, predictions, create_graph=True)
        return loss + gradient.square().sum()

    stats = GradientStats(nn.Linear)
    learner(stats, loss_func=penalty, loaders={"train": BATCHES}).train(1, 0.1)
    assert all(not part.requires_grad for part in stats.of("7"))


# Which modules

def test_leaves():
    model = nn.ModuleDict({
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "attention": nn.MultiheadAttention(4, 2),
        "empty": nn.Sequential(), "flat": nn.Flatten(), "drop": nn.Dropout2d(), "deep": nn.Sequential(nn.Sequential(nn.GELU())),
        "pool": nn.MaxPool2d(2), "lstm": nn.LSTM(2, 2),
    })
    assert [name for name, _ in leaves(model)] == ["normed", "attention", "deep.0.0", "pool", "lstm"]


def test_picking():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    assert list(pick_modules(model)) == ["0", "1"]
    assert list(pick_modules(model, (nn.ReLU, nn.Linear))) == list(pick_modules(model, [nn.Linear, nn.ReLU])) == ["0", "1"]
    assert list(pick_modules(model, nn.Module)) == ["(model)", "0", "1"]
    assert list(pick_modules(nn.Linear(2, 2))) == ["(model)"]
    assert list(pick_modules(model, lambda name, module: name == "1")) == ["1"]


def test_a_model_that_is_one_module():
    stats = ActivationStats()
    learner(stats, nn.Linear(4, 2), {"train": [(torch.ones(2, 4), torch.ones(2).long())]}).train(1, 0.1)
    assert stats.names == ["(model)"]
    stats.plot_stats()


# Hooks

class At(Callback):
    "Raise something at some point, in the second batch."
    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.act)

    def act(self, learn):
        if learn.phase == "train" and learn.batch_num == 1: raise self.error


ENDS = [CancelBatchException, CancelEpochException, CancelTrainException, ValueError("failed"), KeyboardInterrupt]


@pytest.mark.parametrize("kind", [ActivationStats, GradientStats])
@pytest.mark.parametrize("hook", ["before_batch", "after_predict", "after_loss", "after_backward", "after_step", "after_batch"])
@pytest.mark.parametrize("error", ENDS, ids=str)
@pytest.mark.parametrize("one_call", [False, True])
def test_no_hook_is_left(kind, hook, error, one_call):
    stats, bad = kind(), At(hook, error)
    learn = learner(None if one_call else [stats, bad])
    left = []
    learn.on("before_validation", lambda model: left.append(hooks(model)))
    ours = not isinstance(error, type) or error is KeyboardInterrupt
    try: learn.train(2, 0.1, callbacks=[stats, bad] if one_call else None)
    except (ValueError, KeyboardInterrupt): assert ours
    assert hooks(learn.model) == 0 and not any(left)
    assert not stats._hooks and not stats._picked and not stats._calls
    assert stats.of("0").steps[0] == 0  # what was measured stays
    if one_call: assert stats not in learn.callbacks
    learn.remove(*learn.callbacks)
    learn.train(1, 0.1)  # goes on


class Failing(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3: raise RuntimeError("in the model")
        return x


def test_no_hook_is_left_when_the_model_fails():
    stats = ActivationStats()
    learn = learner(stats, nn.Sequential(net(), Failing()))
    with pytest.raises(RuntimeError, match="in the model"): learn.train(1, 0.1)
    assert hooks(learn.model) == 0
    assert stats.of("0.0").steps.tolist() == [0, 1, 2] and stats.of("1").steps.tolist() == [0, 1]


def test_hooks_are_on_only_in_the_batches_that_are_measured():
    seen = []
    stats = ActivationStats(every=2)
    learn = learner(stats)
    learn.on("after_loss", lambda model, phase: seen.append((phase, hooks(model) > 0)))
    learn.train(1, 0.1)
    assert seen == [("train", True), ("train", False)] * 2 + [("validation", False)] * 2
    learn.validate()
    assert stats.of("0").steps.tolist() == [0, 2]


def test_removed_in_mid_training():
    stats = ActivationStats()
    learn = learner(stats)
    learn.on("after_loss", lambda learn: learn.remove(stats) if learn.batch_num == 1 and stats in learn.callbacks else None)
    learn.train(2, 0.1)
    assert hooks(learn.model) == 0 and stats.of("0").steps.tolist() == [0, 1]


def test_a_copy_of_the_model_made_in_a_batch_is_not_measured():
    copies = []
    stats, gradients = ActivationStats(), GradientStats()
    learn = learner([stats, gradients])
    learn.on("after_step", lambda model: copies.append(deepcopy(model)))
    learn.train(1, 0.1)
    before = [len(s.of("0").steps) for s in (stats, gradients)]
    copies[0](X).sum().backward()
    assert [len(s.of("0").steps) for s in (stats, gradients)] == before and not stats._calls and not gradients._calls


def test_a_graph_that_somebody_keeps_is_not_measured_later():
    kept = []

    class Keeps(nn.Module):
        def forward(self, x):
            kept.append((x, x.tanh()))
            return kept[-1][1]

    stats = GradientStats(Keeps)
    learn = learner(stats, nn.Sequential(net(), Keeps()), {"train": BATCHES})
    learn.add(type("Retain", (Callback,), {"backward": lambda self, loss: loss.backward(retain_graph=True)})())
    learn.on("before_step", lambda: torch.autograd.grad(kept[0][1].sum(), kept[0][0], retain_graph=True))
    learn.train(1, 0.1)
    # in its own batch the first graph counts twice, later not at all
    assert stats.of("1").histogram.sum(1).tolist() == [128, 64, 64, 48]


# It only looks

@pytest.mark.parametrize("every", [1, 3])
def test_weights_are_identical_with_and_without(every):
    def run(*callbacks):
        torch.manual_seed(3)
        learn = learner(list(callbacks), net(inplace=True))
        learn.train(2, 0.1)
        return [*learn.model.state_dict().values(), torch.get_rng_state(), torch.tensor(learn.history["train_loss"])]

    bare = run()
    for watched in (run(ActivationStats(every=every)), run(GradientStats(every=every)),
                    run(ActivationStats(every=every), GradientStats(every=every))):
        assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


def test_nothing_is_held_after_a_run():
    stats, gradients = ActivationStats(), GradientStats()
    learn = learner([stats, gradients])
    learn.train(1, 0.1)
    dead = weakref.ref(learn), weakref.ref(learn.model)
    gc.disable()
    try:
        learn = None
        assert [ref() for ref in dead] == [None, None]  # by counting references alone: there is no circle
    finally: gc.enable()
    assert all(not part.requires_grad for name in stats.names for part in stats.of(name))
    copy = pickle.loads(pickle.dumps(stats))
    assert torch.equal(copy.of("0").mean, stats.of("0").mean)


class Reads(TorchDispatchMode):
    "Counts values read from the device."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_no_batch_waits_for_the_device():
    def reads(*callbacks):
        learn, mode = learner(list(callbacks), loaders={"train": BATCHES * 3}), Reads()
        learn.on("before_batch", lambda: mode.__enter__(), priority=-100)
        learn.on("after_batch", lambda: mode.__exit__(None, None, None), priority=100)
        learn.train(1, 0.1)
        return mode.count
    assert reads() == reads(ActivationStats(), GradientStats())


def test_memory_is_bounded():
    stats = ActivationStats(nn.ReLU)
    stats.block = 4
    waiting = []
    learn = learner(stats, loaders={"train": BATCHES * 5})
    learn.on("after_batch", lambda: waiting.append(max(map(len, stats._calls.values()), default=0)))
    learn.train(1, 0.1)
    assert max(waiting) < 4


# Going on

def test_state_goes_on_where_it_was():
    whole, first, second = ActivationStats(every=3), ActivationStats(every=3), ActivationStats(every=3)
    for parts in ([whole, whole], [first, second]):
        torch.manual_seed(7)
        learn = learner()
        learn.train(1, 0.1, callbacks=parts[0])
        if parts[1] is second: second.load_state_dict(deepcopy(first.state_dict()))
        learn.train(1, 0.1, callbacks=parts[1])
    assert whole.names == second.names and second.of("5").steps.tolist() == [0, 3, 6]
    assert all(torch.equal(a, b) for name in whole.names for a, b in zip(whole.of(name), second.of(name), strict=True))


def test_a_state_of_nothing():
    stats = ActivationStats()
    stats.load_state_dict(ActivationStats().state_dict())
    assert stats.names == []


# Pictures

@pytest.fixture(scope="module")
def measured():
    stats = ActivationStats()
    learner(stats).train(3, 0.1)
    return stats


def test_lines(measured):
    ax = measured.plot("mean")
    assert [line.get_label() for line in ax.lines] == ["0 Conv2d", "1 BatchNorm2d", "2 ReLU", "5 Linear", "6 ReLU", "7 Linear"]
    assert ax.lines[2].get_ydata() == pytest.approx(measured.of("2").mean.tolist())
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "mean of output"
    assert measured.plot(ax=plt.figure().subplots()).get_yscale() == "log"


def test_plot_stats(measured):
    axes = measured.plot_stats()
    assert [ax.get_ylabel() for ax in axes] == [f"{q} of output" for q in ("mean", "standard deviation", "share near zero")]
    given = plt.figure().subplots(3, 1)
    assert list(measured.plot_stats(ax=given)) == list(given)
    assert [ax.get_legend() is None for ax in given] == [True, True, False]


def test_color_dim(measured):
    ax = plt.figure().subplots()
    assert measured.color_dim("2", ax=ax) is ax
    image = ax.images[0].get_array()
    counts = measured.of("2").histogram
    assert image.shape == (51, 12)
    assert image[:, 4].tolist() == pytest.approx((counts[4] / counts[4].sum()).clamp(min=1e-4).tolist())
    assert list(ax.images[0].get_extent()) == [-0.5, 11.5, -5, 5] and (ax.get_xlabel(), ax.get_ylabel()) == ("step", "output")
    axes = measured.color_dim()
    assert len(axes) == 6 and [ax.get_title() for ax in axes][1] == "1 BatchNorm2d"
    assert [bool(ax.get_xlabel()) for ax in axes] == [False] * 3 + [True] * 3
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False] * 2


def test_steps_without_a_value_stay_white():
    calls = [(step, 10, measure(torch.ones(10), 5, (-2, 2), 0.1)) for step in (4, 6, 10)]
    stats = ActivationStats(bins=5, limits=(-2, 2))
    stats.load_state_dict({"batches": 11, "labels": {"a": "a ReLU"}, "series": {"a": join_calls(calls)._asdict()}})
    image = stats.color_dim("a").images[0].get_array()
    assert image.shape == (5, 4) and image.mask.all(0).tolist() == [False, False, True, False]


def test_dead_chart(measured):
    ax = plt.figure().subplots()
    assert measured.dead_chart("6", ax=ax) is ax and ax.get_ylim() == (0, 1)
    top = ax.collections[0].get_paths()[0].vertices
    assert {round(float(y), 5) for y in measured.of("6").near_zero} <= {round(float(y), 5) for _, y in top}
    assert len(measured.dead_chart()) == 6
    given = plt.figure().subplots(2, 3)
    assert list(measured.dead_chart(ax=given)) == list(given.flat)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9])
def test_grids_of_every_size(count, recwarn):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), *(nn.Tanh() for _ in range(count)))
    stats = GradientStats(nn.Tanh)
    learner(stats, model).train(1, 0.1)
    axes = stats.color_dim()
    axes[0].figure.canvas.draw()
    assert len(axes) == count
    columns = min(3, count)
    for i, ax in enumerate(axes):
        shown = any(label.get_text() for label in ax.get_xticklabels() if label.get_visible())
        assert shown == (i + columns >= count), i


def test_one_step_can_be_drawn():
    stats = ActivationStats()
    learner(stats, loaders={"train": BATCHES[:1]}).train(1, 0.1)
    for draw in (stats.plot_stats, stats.color_dim, stats.dead_chart): draw()[0].figure.canvas.draw()


# Bad input

def trained():
    stats = ActivationStats()
    learner(stats).train(1, 0.1)
    return stats


MODULES = "modules picks none of the model's modules: (model) Sequential, 0 Conv2d, 1 BatchNorm2d, 2 ReLU, 3 Dropout, 4 Flatten, 5 Linear, 6 ReLU, 7 Linear"
BAD = [
    (lambda: ActivationStats("ReLU"), TypeError, "modules is 'ReLU'; pass types such as nn.ReLU, or a function of name and module"),
    (lambda: ActivationStats(nn.ReLU()), TypeError, "modules is a ReLU; pass types such as nn.ReLU, or a function of name and module"),
    (lambda: ActivationStats([nn.ReLU()]), TypeError, "modules: ReLU() is not a type of module; pass types such as nn.ReLU, or a function of name and module"),
    (lambda: ActivationStats(int), TypeError, "modules: int is not a type of module; pass types such as nn.ReLU, or a function of name and module"),
    (lambda: ActivationStats([]), TypeError, "modules is []; pass types such as nn.ReLU, or a function of name and module"),
    (lambda: ActivationStats(lambda module: True), TypeError, "modules: the function's parameters are (module); it is called as function(name, module)"),
    (lambda: ActivationStats(every=0), ValueError, "every is 0; it must be a whole number of at least 1"),
    (lambda: ActivationStats(bins=1), ValueError, "bins is 1; it must be a whole number of at least 2"),
    (lambda: ActivationStats(limits=(1, 1)), ValueError, "limits is (1, 1); it must be two finite numbers, the lower one first"),
    (lambda: ActivationStats(limits=5), ValueError, "limits is 5; it must be two finite numbers, the lower one first"),
    (lambda: GradientStats(limits=(0, float("inf"))), ValueError, "limits is (0, inf); it must be two finite numbers, the lower one first"),
    (lambda: GradientStats(near_zero=-1), ValueError, "near_zero is -1; it must be a finite number of at least 0"),
    (lambda: learner(ActivationStats(nn.GELU)).train(1, 0.1), ValueError, MODULES),
    (lambda: learner(ActivationStats(lambda name, module: False)).train(1, 0.1), ValueError, MODULES),
    (lambda: pick_modules(nn.Sequential(*(nn.ReLU() for _ in range(20))), nn.GELU), ValueError, "modules picks none of the model's modules: (model) Sequential, " + ", ".join(f"{i} ReLU" for i in range(11)) + " and 9 more"),
    (lambda: ActivationStats().of("0"), ValueError, "ActivationStats has measured nothing yet; train with it first"),
    (lambda: GradientStats().plot_stats(), ValueError, "GradientStats has measured nothing yet; train with it first"),
    (lambda: GradientStats().color_dim(), ValueError, "GradientStats has measured nothing yet; train with it first"),
    (lambda: trained().of("55"), ValueError, "no module called '55' was measured; did you mean 5?; measured were ['0', '1', '2', '5', '6', '7']"),
    (lambda: trained().dead_chart(0), ValueError, "no module called 0 was measured; did you mean 0?; measured were ['0', '1', '2', '5', '6', '7']"),
    (lambda: trained().plot("means"), ValueError, "quantity: 'means' is not one of ['mean', 'std', 'near_zero']; did you mean mean?"),
    (lambda: trained().plot_stats(ax=plt.figure().subplots()), ValueError, "ax holds 1 axes, but there are 3 plots; pass as many axes, or draw a single plot"),
    (lambda: trained().plot_stats(ax=[1, 2, 3]), TypeError, "ax must be one matplotlib Axes, got int64: for an array of them pass one item"),
    (lambda: ActivationStats(bins=7).load_state_dict(trained().state_dict()), ValueError, "the state has histograms of 51 bins, but bins is 7; make the callback with as many"),
]


@pytest.mark.parametrize("call, kind, message", BAD, ids=[message[:60] for *_, message in BAD])
def test_messages(call, kind, message):
    with pytest.raises(kind) as caught: call()
    assert str(caught.value) == message


def test_repr():
    assert repr(ActivationStats()) == "ActivationStats()" and repr(trained()) == "ActivationStats(6 modules, 4 steps)"
