"""Curves against plain loops; what is cut short, what is kept, what is read, bad input, plots."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
from learner.watch.recorder import BLOCK, Recorder, RecorderError

torch.manual_seed(0)
X, Y = torch.randn(203, 6), torch.randint(3, (203,))
BATCHES = list(zip(X.split(20), Y.split(20), strict=True))  # 11, the last of 3 examples
ALL = ("loss", "learning_rate", "momentum", "gradient_norm")


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def learner(callbacks=None, optimiser=sgd, batches=BATCHES, **kwargs):
    return Learner(net(), optimiser, F.cross_entropy, {"train": batches, "validation": BATCHES[:2]}, callbacks,
                   device="cpu", **kwargs)


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def lengths(recorder):
    return {len(recorder), len(recorder.steps), *(len(recorder[name]) for name in recorder.names)}


class Schedule(Callback):
    def __init__(self, hook="after_step"):
        setattr(self, hook, self.schedule_step)

    def before_train(self, optimiser):
        self.schedule = torch.optim.lr_scheduler.CyclicLR(optimiser, 0.01, 0.2, step_size_up=7, base_momentum=0.5)

    def schedule_step(self):
        self.schedule.step()


class Raise(Callback):
    def __init__(self, hook, error, batch=4):
        self.error, self.batch = error, batch
        setattr(self, hook, self.raise_it)

    def raise_it(self, learn, batch_num):
        if learn.phase == "train" and batch_num == self.batch: raise self.error


def plain_loop(epochs, schedule=True):
    "What the recorder should have, by `item()` in every step."
    model, rows = net(), []
    optimiser = sgd(model.parameters())
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimiser, 0.01, 0.2, step_size_up=7, base_momentum=0.5) if schedule else None
    for _ in range(epochs):
        model.train()
        for x, y in BATCHES:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
            group = optimiser.param_groups[0]
            rows.append((loss.item(), group["lr"], group["momentum"], norm.item()))
            optimiser.step()
            optimiser.zero_grad()
            if cyclic: cyclic.step()
    return dict(zip(ALL, map(list, zip(*rows, strict=True)), strict=True))


# Values

@pytest.mark.parametrize("hook, first", [("after_step", True), ("after_step", False), ("after_batch", True)])
def test_the_curves_are_those_of_a_plain_loop(hook, first):
    recorder = Recorder(*ALL)
    pair = [Schedule(hook), recorder] if first else [recorder, Schedule(hook)]
    learner(pair).train(25)  # 275 steps: two full blocks and a part
    expected = plain_loop(25)
    for name in ("loss", "learning_rate", "momentum"): assert recorder[name] == expected[name]
    assert recorder["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-6)
    assert len(set(recorder["learning_rate"])) > 5 and len(set(recorder["momentum"])) > 5
    assert recorder.steps == list(range(275)) and lengths(recorder) == {275}


def test_momentum_of_adam_is_its_first_beta_and_that_of_sgd_may_be_none():
    adam, plain = Recorder("momentum"), Recorder("momentum")
    learner(adam, lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.8, 0.99))).train(1, 0.1)
    learner(plain, torch.optim.SGD).train(1, 0.1)
    assert adam["momentum"] == [0.8] * 11 and plain["momentum"] == [0.0] * 11


def test_a_learning_rate_that_is_a_tensor_is_copied():
    recorder = Recorder("learning_rate")

    def halve(optimiser): optimiser.param_groups[0]["lr"].mul_(0.5)

    learn = learner(recorder, lambda p, lr: torch.optim.Adam(p, lr=torch.tensor(lr)))
    learn.on("after_step", halve)
    learn.train(1, 0.25)
    assert recorder["learning_rate"] == [0.25 * 0.5**i for i in range(11)]


def test_functions_are_called_after_the_step_and_their_tensors_are_copied():
    seen = []
    recorder = Recorder("loss", bias=lambda learn: learn.model[3].bias[0], count=lambda learn: learn.batch_num, number=lambda learn: 2**40)
    learn = learner(recorder)
    learn.on("after_step", lambda model: seen.append(model[3].bias[0].item()))
    learn.train(2)
    assert recorder["bias"] == seen and len(set(seen)) == 22
    assert recorder["count"] == [*range(11)] * 2
    assert recorder["number"] == [2.0**40] * 22


def test_a_loss_that_is_written_over_is_recorded_by_a_function():
    class Reuses(Learner):
        place = torch.zeros(())

        def compute_loss(self):
            super().compute_loss()
            self.place = self.place.detach().copy_(self.loss)
            self.loss = self.place

    recorder, copied = Recorder(value=lambda learn: learn.loss.item()), Recorder(batch_loss=lambda learn: learn.loss)
    Reuses(net(), sgd, F.cross_entropy, {"train": BATCHES}, [recorder, copied], device="cpu").train(1)
    assert copied["batch_loss"] == recorder["value"] and len(set(recorder["value"])) == 11


def test_numbers_and_tensors_may_take_turns():
    exact = [1 / 3, torch.tensor(1 / 3, dtype=torch.float64), True, torch.tensor(7), math.inf, torch.tensor(math.nan)] * 60
    recorder = Recorder(mixed=lambda learn: exact[len(recorder)])
    learner(recorder, batches=BATCHES[:6]).train(60)
    want = [float(value) for value in exact]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(recorder["mixed"], want, strict=True))


def test_gradient_norm_leaves_out_what_has_no_gradient_and_comes_before_clipping():
    recorder, norms = Recorder("gradient_norm"), []
    learn = learner(recorder)
    learn.model[0].requires_grad_(False)
    learn.on("before_step", lambda model: norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()))
    learn.train(1)
    assert recorder["gradient_norm"] == norms and min(norms) > 0.01


def test_gradient_norm_of_accumulated_batches_is_that_of_the_large_one():
    def norms(batches, *more):
        recorder, model = Recorder("gradient_norm"), nn.Sequential(nn.Linear(6, 3))
        torch.manual_seed(2)
        model[0].reset_parameters()
        Learner(model, torch.optim.SGD, F.cross_entropy, {"train": batches}, [recorder, *more], device="cpu").train(2, 0.1)
        return recorder["gradient_norm"]
    large = norms(list(zip(X[:200].split(80), Y[:200].split(80), strict=True)))
    assert norms(BATCHES[:10], Accumulate(4)) == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("every, epochs", [(2, 1), (3, 2), (5, 15), (1000, 2)])
def test_every(every, epochs):
    recorder, whole = Recorder(*ALL, every=every), Recorder(*ALL)
    learner([recorder, whole]).train(epochs)
    assert recorder.steps == list(range(0, 11 * epochs, every))
    for name in ALL: assert recorder[name] == whole[name][::every]


def test_several_calls_of_train_join_on_and_other_passes_leave_no_point():
    recorder = Recorder("loss", "gradient_norm")
    learn = learner(recorder)
    learn.train(1)
    assert len(recorder) == 11
    learn.validate()
    learn.train(2)
    expected = plain_loop(3, schedule=False)
    assert recorder["loss"] == expected["loss"] and recorder.steps == list(range(33))


# It only watches

@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_weights_gradients_and_generators_are_the_same_without_it(make):
    results = []
    for callbacks in (None, Recorder(*ALL, norm=lambda learn: learn.model[0].weight.norm())):
        torch.manual_seed(3)
        learn, gradients = learner(callbacks, make), []
        learn.on("before_step", lambda model, gradients=gradients: gradients.extend(p.grad.clone() for p in model.parameters()))
        learn.train(2, 0.05)
        results.append([weights(learn), *gradients, torch.get_rng_state()])
    assert len(results[0]) == len(results[1]) == 2 + 4 * 22
    assert all(map(torch.equal, *results))


def test_a_trial_leaves_no_point():
    recorder = Recorder()
    learn = learner(recorder)
    learn.train(1)
    with learn.trial() as trial: trial.train(1)
    assert len(recorder) == 11 and recorder.watches


class Reads(TorchDispatchMode):
    "Counts what reads a value from the device."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_in_a_batch(monkeypatch):
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(len(tensor)) or tolist(tensor))
    counts = []
    recorder = Recorder(*ALL, norm=lambda learn: learn.model[0].weight.norm())
    for callbacks in (None, recorder):
        with Reads() as reads: learner(callbacks, batches=BATCHES * 25).train(1)
        counts.append(reads.count)
    assert counts[0] == counts[1]
    assert lists == [BLOCK] * 3 * 2 + [275 - 2 * BLOCK] * 3  # loss, gradient norm and norm; three times


# What is kept

def test_no_graph_no_batch_and_no_learner_are_kept():
    class Marker:
        "Lives as long as the node of the graph that it is put into."

    kept, recorder = [], Recorder(*ALL, own=lambda learn: learn.loss * 2)
    learn = learner(recorder)

    @learn.on("after_batch")
    def note(loss, predictions):
        marker = loss.grad_fn.metadata["marker"] = Marker()
        kept.extend([weakref.ref(loss), weakref.ref(marker), weakref.ref(predictions)])

    @learn.on("before_batch")
    def gone(batch_num): assert all(reference() is None for reference in kept)
    learn.train(1)
    assert len(kept) == 33
    model, own = weakref.ref(learn.model), weakref.ref(learn)
    gc.collect()
    gc.disable()
    try:
        del learn, note, gone
        assert model() is None and own() is None
    finally: gc.enable()
    assert len(recorder["own"]) == 11


def test_nothing_of_the_model_is_kept_after_an_error():
    recorder = Recorder("gradient_norm")
    learn = learner([recorder, Raise("after_backward", RuntimeError("stop"))])
    with pytest.raises(RuntimeError, match="stop"): learn.train(1)
    model = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert model() is None and recorder.steps == [0, 1, 2, 3]


# What is cut short

STOPS = [CancelBatchException, CancelEpochException, CancelTrainException, RuntimeError("stop"), KeyboardInterrupt()]


@pytest.mark.parametrize("per", ["step", "batch"])
@pytest.mark.parametrize("hook", ["before_batch", "after_loss", "after_backward", "before_step", "after_step", "after_batch"])
@pytest.mark.parametrize("error", STOPS, ids=repr)
def test_curves_stay_of_one_length(hook, error, per):
    recorder = Recorder(*ALL, own=lambda learn: learn.batch_num, per=per)
    learn = learner([Raise(hook, error), recorder])
    try: learn.train(2)
    except BaseException as raised: assert raised is error
    point_there = hook == "after_batch" or (hook == "after_step" and per == "step")  # it is early, and the other late
    after = {CancelBatchException: [5, 6, 7, 8, 9, 10], CancelEpochException: []}.get(error)
    one = [0, 1, 2, 3, *[4] * point_there, *(after or [])]
    expected = one if after is None else one * 2
    assert recorder["own"] == expected
    assert lengths(recorder) == {len(expected)} and recorder.steps == list(range(len(expected)))
    learn.remove(learn.callbacks[-1])
    learn.train(1)
    assert lengths(recorder) == {len(expected) + 11} and recorder["own"][-11:] == list(range(11))


@pytest.mark.parametrize("position", [0, 1])
def test_a_function_that_fails_leaves_no_half_point(position):
    calls = []

    def fails(learn):
        calls.append(0)
        if len(calls) == 6: raise ArithmeticError("six")
        return learn.loss

    recorder = Recorder(**dict([("good", lambda learn: learn.loss), ("bad", fails)][:: 1 if position else -1]))
    with pytest.raises(ArithmeticError, match="six") as caught: learner(recorder).train(1)
    assert any("Recorder: bad" in note for note in caught.value.__notes__)
    assert lengths(recorder) == {5}


def test_skipped_steps():
    class Accumulate(Callback):
        def before_step(self, batch_num):
            if batch_num % 4 != 3: raise CancelStepException

    steps, batches = Recorder(*ALL, number=lambda learn: learn.batch_num), Recorder(*ALL, number=lambda learn: learn.batch_num, per="batch")
    learner([Accumulate(), steps, batches]).train(2)
    assert steps["number"] == [3, 7] * 2 and batches["number"] == [*range(11)] * 2
    for name in ALL: assert steps[name] == [batches[name][i] for i in (3, 7, 14, 18)]


def test_a_routine_of_its_own():
    class Own(Learner):
        def train_batch(self):
            self.prepare()
            self.loss = F.cross_entropy(self.model(self.data), self.labels)
            self.loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()

    class Twice(Learner):
        def train_batch(self): self.act("prepare", *["predict", "loss", "backward", "step"] * 2)

    loaders = {"train": BATCHES}
    by_batch = Recorder("loss", "learning_rate", per="batch")
    Own(net(), sgd, F.cross_entropy, loaders, by_batch, device="cpu").train(1)
    assert len(by_batch) == 11
    with pytest.raises(CallbackError, match=r"Recorder\.after_step is never called: the routine of Own changes the weights itself"):
        Own(net(), sgd, F.cross_entropy, loaders, Recorder(), device="cpu").train(1)
    twice = Recorder("loss", "gradient_norm")
    Twice(net(), sgd, F.cross_entropy, loaders, twice, device="cpu").train(1)
    assert len(twice) == 22
    with pytest.raises(CallbackError, match=r"GradientNorm\.after_backward is never called"):
        Own(net(), sgd, F.cross_entropy, loaders, Recorder("gradient_norm", per="batch"), device="cpu").train(1)

    class NoLoss(Own):
        def train_batch(self): self.prepare()
    with pytest.raises(RecorderError, match="no gradient norm, as no backward stage ran in this batch"):
        NoLoss(net(), sgd, F.cross_entropy, loaders, Recorder("gradient_norm", per="batch"), device="cpu").train(1)
    with pytest.raises(RecorderError, match=r"finds no learn\.loss in this batch"):
        NoLoss(net(), sgd, F.cross_entropy, loaders, Recorder(per="batch"), device="cpu").train(1)


def test_added_and_removed_in_mid_pass():
    recorder = Recorder(*ALL)
    learn = learner()

    @learn.on("after_batch")
    def change(learn, batch_num):
        if batch_num == 2: learn.add(recorder)
        if batch_num == 7: learn.remove(recorder)
    learn.train(1)
    assert len(recorder) == 5 and min(recorder["gradient_norm"]) > 0


def test_looking_during_training():
    seen, recorder = [], Recorder(*ALL)
    learn = learner(recorder)
    for hook in ("before_batch", "after_loss", "after_step", "after_batch"): learn.on(hook, lambda: seen.append(len(recorder["loss"])) if len(seen) < 400 else None)
    learn.train(20)
    expected = plain_loop(20, schedule=False)
    assert recorder["loss"] == expected["loss"] and seen[:400:40] == sorted(seen[:400:40])
    assert recorder["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-6)


# Keeping it

def test_a_run_that_goes_on_has_the_same_curves():
    def fresh(): return learner(Recorder(*ALL, every=3, own=lambda learn: learn.loss))
    whole = fresh()
    whole.train(4)
    first, second = fresh(), fresh()
    first.train(2)
    state = pickle.loads(pickle.dumps(first.callbacks[0].state_dict()))
    second.callbacks[0].load_state_dict(state)
    second.model.load_state_dict(first.model.state_dict())
    second.optimiser = sgd(second.model.parameters())
    second.optimiser.load_state_dict(first.optimiser.state_dict())
    second.train(2)
    a, b = whole.callbacks[0], second.callbacks[0]
    assert a.steps == b.steps == list(range(0, 44, 3))
    for name in a.names: assert a[name] == b[name]
    assert len(first.callbacks[0]) == 8 and len(state["values"][0]) == 8  # on their own


def test_a_state_of_other_quantities_changes_nothing():
    recorder, other = Recorder("loss"), Recorder("loss", "momentum")
    learner([recorder, other]).train(1)
    before = recorder["loss"]
    with pytest.raises(RecorderError, match=r"the state holds loss, momentum, but this is Recorder\(loss\)"):
        recorder.load_state_dict(other.state_dict())
    assert recorder["loss"] == before and recorder.num_steps == 11


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_their_own_way(copied):
    recorder = Recorder(*ALL)
    learn = learner(recorder)
    learn.train(1)
    other = copied(recorder)
    learn.train(1)
    learner(other).train(2)
    assert len(recorder) == 22 and len(other) == 33 and other["loss"][:11] == recorder["loss"][:11]
    assert all(norm > 0 for norm in other["gradient_norm"])


def test_csv(tmp_path):
    recorder = Recorder(every=2)
    learner(recorder).train(1)
    recorder.to_csv(tmp_path / "curves.csv")
    head, *rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert head == "step,loss,learning_rate"
    values = [[float(cell) for cell in row.split(",")] for row in rows]
    assert [list(column) for column in zip(*values, strict=True)] == [recorder.steps, recorder["loss"], recorder["learning_rate"]]


# Bad input

def trained():
    recorder = Recorder()
    learner(recorder).train(1)
    return recorder


BAD = [
    (lambda: Recorder("los"), RecorderError, "Recorder: 'los' is not one of ['loss', 'learning_rate', 'momentum', 'gradient_norm']; did you mean loss?; a quantity of your own needs its function: Recorder(name=function)"),
    (lambda: Recorder("lr"), RecorderError, "'lr' is not one of"),
    (lambda: Recorder("loss", "loss"), RecorderError, "Recorder: loss is named twice; leave one out"),
    (lambda: Recorder(len), TypeError, "Recorder: <built-in function len> is not a name; give a function by name: Recorder(name=function)"),
    (lambda: Recorder(loss=True), RecorderError, "Recorder: loss is built in; write Recorder(\"loss\"), or give yours another name"),
    (lambda: Recorder(step=len), RecorderError, "Recorder: step is what the x axis is called; use another name"),
    (lambda: Recorder(norm=3), TypeError, "Recorder: norm is 3; it must be a function of the learner"),
    (lambda: Recorder(norm=lambda: 3), TypeError, "Recorder: norm has the parameters (); it is called as function(learn)"),
    (lambda: Recorder(norm=lambda a, b: 3), TypeError, "Recorder: norm has the parameters (a, b); it is called as function(learn)"),
    (lambda: Recorder(every=0), ValueError, "every is 0; it must be a whole number of at least 1"),
    (lambda: Recorder(every=True), ValueError, "every is True; it must be a whole number of at least 1"),
    (lambda: Recorder(per="epoch"), RecorderError, "per is 'epoch'; it must be \"step\" or \"batch\""),
    (lambda: learner(Recorder(a=lambda learn: None)).train(1), RecorderError, "Recorder: a is None; it must be a number or a scalar tensor"),
    (lambda: learner(Recorder(a=lambda learn: "x")).train(1), RecorderError, "Recorder: a is 'x'; it must be a number or a scalar tensor"),
    (lambda: learner(Recorder(a=lambda learn: 1j)).train(1), RecorderError, "1j; it must be a number or a scalar tensor"),
    (lambda: learner(Recorder(a=lambda learn: torch.tensor(1j))).train(1), RecorderError, "1.j); it must be a number or a scalar tensor"),
    (lambda: learner(Recorder(a=lambda learn: torch.ones(1, 2))).train(1), RecorderError, "Recorder: a is a tensor of shape (1, 2); it must be a number or a scalar tensor"),
    (lambda: learner(Recorder("momentum"), torch.optim.Adagrad).train(1, 0.1), RecorderError, "Recorder: Adagrad has no momentum; leave it out"),
    (lambda: trained()["los"], RecorderError, "Recorder(loss, learning_rate) has not recorded 'los'; did you mean loss?"),
    (lambda: trained()["momentum"], RecorderError, "Recorder(loss, learning_rate) has not recorded 'momentum'"),
    (lambda: trained().plot("lossss"), RecorderError, "has not recorded 'lossss'; did you mean loss?"),
    (lambda: trained().plot(x="learn_rate"), RecorderError, "plot: x is 'learn_rate', which is neither \"step\" nor recorded; did you mean learning_rate?"),
    (lambda: trained().plot(smooth=1.0), ValueError, "smooth must be at least 0 and below 1, got 1.0"),
    (lambda: Recorder().plot(), RecorderError, "plot: Recorder(loss, learning_rate) has recorded no step yet; train with it first"),
]


@pytest.mark.parametrize("act, kind, message", BAD, ids=range(len(BAD)))
def test_bad_input(act, kind, message):
    with pytest.raises(kind) as caught: act()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_momentum_is_told_before_the_first_step():
    learn = learner(Recorder("momentum"), torch.optim.Adagrad)
    before = weights(learn)
    with pytest.raises(RecorderError): learn.train(1, 0.1)
    assert torch.equal(weights(learn), before)


# Plots

@pytest.fixture
def axes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    yield plt.figure().subplots()
    plt.close("all")


def test_plot_draws_values_faintly_and_their_mean_over_them(axes):
    from learner.base.show import smoothed
    recorder = trained()
    ax = recorder.plot("loss", smooth=0.5, ax=axes)
    assert ax is axes and (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")
    raw, mean = ax.lines
    assert raw.get_alpha() < 0.5 and raw.get_color() == mean.get_color()
    assert raw.get_xdata().tolist() == recorder.steps and raw.get_ydata().tolist() == recorder["loss"]
    assert mean.get_ydata().tolist() == smoothed(recorder["loss"], 0.5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss"]


def test_plot_makes_axes_takes_several_names_and_leaves_settings_as_they_are(axes):
    recorder = trained()
    ax = recorder.plot("loss", "learning_rate")
    assert ax is not axes and ax.get_ylabel() == "value" and len(ax.lines) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss", "learning_rate"]
    assert ax.lines[2].get_ydata().tolist() == recorder["learning_rate"] and ax.lines[2].get_alpha() is None
    assert ax.lines[0].get_color() != ax.lines[2].get_color()
    assert len(recorder.plot(smooth=0).lines) == 1
    assert recorder.plot().get_ylabel() == "loss"


def test_plot_over_another_quantity(axes):
    recorder = Recorder()
    learner([recorder, Schedule()]).train(1)
    ax = recorder.plot("loss", x="learning_rate", ax=axes)
    assert ax.get_xlabel() == "learning_rate" and ax.lines[0].get_xdata().tolist() == recorder["learning_rate"]


def test_plot_of_many_points_averages_over_many(axes):
    recorder = Recorder("loss")
    noise = (torch.randn(50_000, generator=torch.Generator().manual_seed(0)) + 3).double()
    recorder.load_state_dict({"names": ["loss"], "num_steps": 50_000, "values": torch.stack([torch.arange(50_000.0), noise])})
    ax = recorder.plot(ax=axes)
    ax.figure.canvas.draw()
    assert torch.tensor(ax.lines[1].get_ydata())[5000:].std() < 0.05  # of 1.0


def test_a_single_value_and_values_that_are_none_can_be_plotted(axes):
    recorder = Recorder("loss", other=lambda learn: math.nan)
    learner(recorder, batches=BATCHES[:1]).train(1)
    recorder.plot("loss", "other", ax=axes).figure.canvas.draw()
    assert len(recorder) == 1
