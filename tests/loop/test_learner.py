"""The Learner against a bare loop, its memory, and every message for a mistake."""
import copy
import gc
import math
import random
import signal
import traceback
import warnings
import weakref
from functools import partial
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.base.batch import BatchError
from learner.base.history import History, HistoryError, Mean
from learner.base.made import made
from learner.loop.learner import Learner
from learner.loop.loop import LossError
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
    Stage,
    provides,
)
from learner.steer.freeze import FreezeUntil


def tensors(n=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def net(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def batches(n=70, size=16, seed=0):  # the last one is ragged
    x, y = tensors(n, seed)
    return [(x[i:i + size], y[i:i + size]) for i in range(0, n, size)]


def loaders(): return {"train": batches(), "validation": batches(40, seed=1), "test": batches(20, seed=2)}


def learner(model=None, loaders_=None, callbacks=None, optimiser=None, loss_func=F.cross_entropy, **kwargs):
    model = net() if model is None else model
    return Learner(model, optimiser or torch.optim.SGD(model.parameters(), lr=0.1), loss_func,
                   loaders() if loaders_ is None else loaders_, callbacks, device="cpu", **kwargs)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The oracle

def bare_loop(model, optimiser, train, validation, epochs):
    for _ in range(epochs):
        model.train()
        for x, y in train:
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            optimiser.zero_grad()
        model.eval()
        with torch.no_grad():
            for x, y in validation: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", [lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
                                  lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1)], ids=["SGD", "AdamW"])
def test_weights_are_bit_identical_to_the_bare_loop(make, dropout):
    oracle, model = net(dropout), net(dropout)
    torch.manual_seed(7)
    bare_loop(oracle, make(oracle.parameters()), batches(), batches(40, seed=1), 3)
    torch.manual_seed(7)
    learn = learner(model, optimiser=make(model.parameters()))
    learn.train(3)
    assert same(oracle, model)


def test_a_shuffling_dataloader_too():
    def loader(): return DataLoader(TensorDataset(*tensors()), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    oracle, model = net(), net()
    bare_loop(oracle, torch.optim.SGD(oracle.parameters(), lr=0.1), loader(), [], 3)
    learner(model, {"train": loader()}).train(3)
    assert same(oracle, model)


def test_two_calls_of_train_are_one_longer_run():
    one, two = learner(optimiser=torch.optim.AdamW), learner(optimiser=torch.optim.AdamW)
    one.train(3, learning_rate=0.01)
    two.train(1, learning_rate=0.01)
    two.train(2)
    assert same(one.model, two.model)
    assert two.history["epoch"] == [0, 1, 2]


def test_means_are_exact_over_a_ragged_last_batch():
    learn = learner(optimiser=lambda ps, lr: torch.optim.SGD(ps, lr=0.0))
    learn.train(1, learning_rate=0.0)
    x, y = tensors(40, 1)
    learn.model.eval()
    with torch.no_grad(): whole = F.cross_entropy(learn.model(x), y).item()
    assert learn.history[-1]["validation_loss"] == pytest.approx(whole, rel=1e-6)


def test_mean_of_numbers_and_tensors_together():
    mean = Mean(keep=True)
    for value, weight in ((torch.tensor(1.0), 2), (4.0, 2), (torch.tensor(3.0), 1), (True, 1)): mean.add(value, weight)
    assert mean.compute() == (2 + 8 + 3 + 1) / 6 and mean.values() == [1, 4, 3, 1]
    on_device = Mean()
    on_device.add(torch.ones((), device="meta"), 1)
    on_device.add(2.0, 1)  # a number goes nowhere near the device
    assert on_device.numbers == 2.0


@pytest.mark.parametrize("place", ["number", "cpu", "accelerator"])
def test_mean_of_changing_weights_and_many_values_goes_on_from_its_state(place, elsewhere):
    place = {"number": float, "cpu": torch.tensor, "accelerator": elsewhere}[place]
    values, weights = [0.1 * i for i in range(1000)], [1 + i % 3 * (i > 500) for i in range(1000)]
    mean, another = Mean(keep=True), Mean()
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        mean.add(place(value), weight)
        if i == 700:
            another.load_state_dict(mean.state_dict())
    for value, weight in zip(values[701:], weights[701:], strict=True): another.add(place(value), weight)
    assert mean.compute() == another.compute()  # to the last bit
    assert mean.compute() == pytest.approx(sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights), rel=1e-6)
    assert mean.values() == another.values() == pytest.approx(values)
    assert math.isnan(Mean().compute()) and Mean().values() == []


def test_a_batch_waits_for_no_device(elsewhere, waits):
    learn = learner(loss_func=lambda predictions, labels: elsewhere(F.cross_entropy(predictions, labels)))
    learn.history.keep_steps = True
    learn.on("after_loss", lambda learn, loss: learn.log(twice=2 * loss))
    found = {}
    for stage in ("batch", "validation_batch"): learn.on(f"after_{stage}", lambda learn: found.setdefault(learn.phase, set()).add(len(waits)))
    learn.train(1, 0.1)
    assert found["train"] == {0} and len(found["validation"]) == 1 and len(waits) >= 8  # two means and their values, after each pass
    assert learn.history[0]["train_twice"] == pytest.approx(2 * learn.history[0]["train_loss"])


def test_history_columns_and_rows():
    learn = learner()
    learn.on("after_epoch", lambda learn, epoch: learn.log(late=epoch, tensor=torch.tensor(2.0)))
    learn.train(3, validation_epochs=2)
    assert learn.history.columns == ["epoch", "train_loss", "validation_loss", "test_loss", "late", "tensor"]
    assert [row.get("validation_loss") is not None for row in learn.history] == [False, True, True]
    assert [row.get("test_loss") is not None for row in learn.history] == [False, False, True]
    assert learn.history["late"] == [0, 1, 2] and learn.history[-1]["tensor"] == 2.0
    assert learn.results is learn.history[-1] and len(learn.history) == 3


def test_history_writes_and_reads_back(tmp_path):
    import csv
    learn = learner()
    learn.train(2)
    learn.history.to_csv(tmp_path / "history.csv")
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [float(row["train_loss"]) for row in rows] == learn.history["train_loss"]


def test_evaluation_changes_nothing_and_returns_numbers():
    learn = learner()
    before = copy.deepcopy(learn.model.state_dict())
    assert set(learn.validate()) == {"validation_loss"} and set(learn.test()) == {"test_loss"}
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    assert len(learn.history) == 0 and all(m.training for m in learn.model.modules())


def test_steps_are_kept_on_request():
    learn = learner()
    learn.history.keep_steps = True
    learn.train(2)
    assert {name: len(values) for name, values in learn.history.steps.items()} == {
        "train_loss": 10, "validation_loss": 6, "test_loss": 2}


# Batches

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, a, b=0): return self.layer(a + b)


class Reconstruct(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x): return self.layer(x)


x, y = tensors(8)
FORMS = {
    "pair": (Two(), (x, y), F.cross_entropy, x, y),
    "list": (Two(), [x, y], F.cross_entropy, x, y),
    "two inputs": (Two(), (x, x, y), F.cross_entropy, (x, x), y),
    "nested inputs": (Two(), ((x, x), y), F.cross_entropy, (x, x), y),
    "mapping": (Two(), {"a": x, "labels": y}, F.cross_entropy, {"a": x}, y),
    "mapping with label": (Two(), {"a": x, "b": x, "label": y}, F.cross_entropy, {"a": x, "b": x}, y),
    "single tensor": (Reconstruct(), x, F.mse_loss, x, x),
    "tuple of one": (Reconstruct(), (x,), F.mse_loss, x, x),
}


def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple): return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_batches(form):
    model, batch, loss_func, data, labels = FORMS[form]
    seen = []
    learn = learner(copy.deepcopy(model), {"train": [batch]}, loss_func=loss_func, optimiser=torch.optim.SGD)
    learn.on("after_loss", lambda learn, batch_size: seen.append((learn.data, learn.labels, batch_size)))
    learn.train()
    assert equal(seen[0][0], data) and equal(seen[0][1], labels) and seen[0][2] == 8


def test_a_model_with_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, a, labels): return SimpleNamespace(loss=F.cross_entropy(self.layer(a), labels))
    learn = learner(Own(), {"train": [{"a": x, "labels": y}]}, loss_func=None, optimiser=torch.optim.SGD)
    learn.train(2, learning_rate=0.1)
    assert learn.history[1]["train_loss"] < learn.history[0]["train_loss"]


def test_any_iterable_of_batches_and_a_loader_that_counts_epochs():
    class Stream:
        epochs = []
        def set_epoch(self, epoch): self.epochs.append(epoch)
        def __iter__(self): yield from batches()
    learn = learner(loaders_={"train": Stream()})
    learn.train(2)
    learn.train(1)
    assert Stream.epochs == [0, 1, 2]


# Optimiser and modes

def test_learning_rate_goes_to_the_factory_and_later_to_the_groups():
    def factory(parameters, lr):
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:2], "lr": lr / 10}, {"params": parameters[2:]}], lr=lr)
    learn = learner(optimiser=factory)
    learn.train(1, learning_rate=0.5)
    assert [g["lr"] for g in learn.optimiser.param_groups] == [0.05, 0.5]
    learn.train(1, learning_rate=0.2)
    assert [g["lr"] for g in learn.optimiser.param_groups] == pytest.approx([0.02, 0.2])
    assert learn.optimiser.param_groups[1]["lr"] == 0.2
    learn.train(1)
    assert learn.optimiser.param_groups[1]["lr"] == 0.2


def test_modes_are_as_before():
    model = net()
    model[1].eval()
    seen = []
    learn = learner(model)
    learn.on("after_predict", lambda phase, model: seen.append((phase, model.training, torch.is_grad_enabled())))
    learn.train()
    assert {*seen} == {("train", True, True), ("validation", False, False), ("test", False, False)}
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


# Cancelling

def cancelling(hook, exception, when=lambda learn: True):
    class Canceller(Callback): ...

    def raise_it(learn):
        if when(learn): raise exception
    return lambda learn: learn.on(hook, raise_it)


def test_a_cancelled_batch_leaves_no_gradients_and_no_loss():
    learn = learner()
    seen = []
    cancelling("after_backward", CancelBatchException, lambda learn: learn.batch_num == 1)(learn)
    learn.on("before_predict", lambda phase, model: phase == "train" and
             seen.append(all(p.grad is None for p in model.parameters())))
    kept = []
    learn.on("after_batch", lambda loss, batch_size: kept.append((loss.item(), batch_size)))
    learn.train()
    assert len(kept) == 4 and all(seen)
    assert learn.history[0]["train_loss"] == pytest.approx(sum(v * n for v, n in kept) / sum(n for _, n in kept))


def test_a_cancelled_step_keeps_the_gradients():
    oracle, model = net(), net()
    optimiser = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for i, (a, b) in enumerate(batches()):
        F.cross_entropy(oracle(a), b).backward()
        if i % 2:
            optimiser.step()
            optimiser.zero_grad()
    learn = learner(model, {"train": batches()})
    cancelling("before_step", CancelStepException, lambda learn: learn.batch_num % 2 == 0)(learn)
    learn.train()
    assert same(oracle, model)


def test_an_override_may_cancel_its_own_step():
    class Careful(Learner):
        def step(self):
            if self.batch_num: raise CancelStepException
            super().step()
    model = net()
    learn = Careful(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches()})
    steps = []
    learn.on("after_step", lambda batch_num: steps.append(batch_num))
    learn.train()
    assert steps == [0]


def test_cancelling_the_pass_still_validates_and_writes_a_row():
    learn = learner()
    cancelling("after_batch", CancelEpochException)(learn)
    learn.train(2)
    assert len(learn.history) == 2 and learn.history["validation_loss"][1] is not None


def test_cancelling_training_still_tests():
    learn = learner()
    cancelling("after_epoch", CancelTrainException)(learn)
    learn.train(5)
    assert len(learn.history) == 1 and "test_loss" in learn.history[0]


def test_cancelling_train_inside_an_epoch_keeps_what_was_found():
    learn = learner(loaders_={"train": batches(), "test": batches()})
    learn.history.keep_steps = True
    cancelling("after_batch", CancelTrainException)(learn)
    learn.train(5)
    assert len(learn.history) == 1 and {"epoch", "train_loss", "test_loss"} == set(learn.history[0])
    assert len(learn.history.steps["train_loss"]) == 1 and len(learn.history.steps["test_loss"]) == len(batches())


def test_cancelling_train_before_anything_was_found_leaves_no_row():
    learn = learner()
    cancelling("before_epoch", CancelTrainException)(learn)
    learn.train(5)
    assert len(learn.history) == 0 and "test_loss" in learn.results


def test_an_error_in_validation_leaves_no_row_and_no_steps():
    learn = learner()
    learn.history.keep_steps = True
    learn.on("after_validation_batch", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError): learn.train()
    assert len(learn.history) == 0 and learn.history.steps == {} and "train_loss" in learn.results


def test_a_cancelled_batch_counts_for_nothing():
    learn = learner(loaders_={"train": batches()})

    @learn.on("after_predict")
    def look(learn, batch_num):
        learn.log(number=batch_num)
        if batch_num == 1: raise CancelBatchException

    @learn.on("before_batch")
    def early(learn, batch_num):
        learn.log(early=batch_num)
        if batch_num == 2: raise CancelBatchException

    learn.on("after_batch", lambda learn, batch_num: learn.log(late=batch_num))
    learn.train()
    sizes = {i: len(y) for i, (_, y) in enumerate(batches()) if i not in (1, 2)}
    mean = sum(i * n for i, n in sizes.items()) / sum(sizes.values())
    assert [learn.history[0][f"train_{name}"] for name in ("number", "early", "late")] == pytest.approx([mean] * 3)


# Parts may be replaced between calls

def test_another_model_is_seen_and_an_optimiser_of_the_old_one_refused():
    learn = learner()
    learn.train()
    learn.model = net()
    with pytest.raises(ValueError, match="holds no parameter of the model"): learn.train()
    learn.optimiser = torch.optim.SGD
    before = copy.deepcopy(learn.model.state_dict())
    learn.train(learning_rate=0.1)
    assert any(not torch.equal(before[name], value) for name, value in learn.model.state_dict().items())
    learn.dataloaders = {"valid": batches()}
    with pytest.raises(ValueError, match="did you mean validation"): learn.validate()


def test_a_model_put_in_place_for_a_pass_is_evaluated_as_such():
    learn, other, modes = learner(), net(), []
    other.train()
    learn.on("before_validation", lambda learn: setattr(learn, "model", other))
    learn.on("after_validation_batch", lambda model: modes.append((model is other, model.training)))
    learn.validate()
    assert set(modes) == {(True, False)}


@pytest.mark.parametrize("hook", ["before_train", "before_epoch", "before_training"])
def test_loaders_that_a_hook_puts_in_are_used_in_the_pass_that_begins(hook):
    learn, seen = learner(loaders_={"train": batches()}), []
    learn.on(hook, lambda learn: setattr(learn, "dataloaders", {"train": batches()[:2]}))
    learn.on("after_batch", lambda batch_num: seen.append(batch_num))
    learn.train()
    assert seen == [0, 1]


def test_a_trial_leaves_no_trace():
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)

    class Watch(Callback):
        watches = True
        def after_batch(self): self.seen = True

    class Scale(Callback):
        count = 0
        def after_loss(self, learn): self.count, learn.loss = self.count + 1, learn.loss * 2
    model, watch, scale = net(), Watch(), Scale()
    learn = Learner(model, torch.optim.AdamW(model.parameters()), F.cross_entropy, {"train": loader}, [watch, scale])
    learn.train(1)
    counted, watch.seen = scale.count, False
    before = copy.deepcopy((model.state_dict(), learn.optimiser.state_dict(), learn.history.rows, generator.get_state(),
                            torch.get_rng_state()))
    with pytest.raises(ZeroDivisionError), learn.trial() as trial:
        assert trial.dataloaders is learn.dataloaders and len(trial.history) == 0
        trial.train(2)
        assert len(trial.history) == 2 and [type(c) for c in trial.callbacks] == [Scale]
        assert trial.optimiser.param_groups[0]["params"][0] is next(trial.model.parameters())
        raise ZeroDivisionError
    after = (model.state_dict(), learn.optimiser.state_dict(), learn.history.rows, generator.get_state(), torch.get_rng_state())
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert str(before[1]) == str(after[1]) and before[2] == after[2] and (scale.count, watch.seen) == (counted, False)
    assert torch.equal(before[3], after[3]) and torch.equal(before[4], after[4])
    learn.on("before_epoch", lambda learn: learn.trial().__enter__())
    with pytest.raises(RuntimeError, match="trial\\(\\) was called inside train\\(\\)"): learn.train()


# Overrides

def test_an_overridden_batch_is_logged():
    class Own(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward", "step")
            return {"double": 2 * self.loss, "number": self.batch_size}

        def validation_batch(self):
            self.act("prepare", "predict")
            return {"loss": self.predictions.mean() * 0 + 3}
    model = net()
    learn = Own(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, loaders())
    learn.train()
    row = learn.history[0]
    assert row["train_double"] == pytest.approx(2 * row["train_loss"])
    assert row["train_number"] == pytest.approx((4 * 16 * 16 + 6 * 6) / 70)
    assert row["validation_loss"] == 3 and row["test_loss"] == 3


def test_what_before_train_logs_is_in_the_first_row():
    learn = learner()
    learn.on("before_train", lambda learn: learn.log(seed=3))
    learn.on("after_train", lambda learn: learn.log(end=1))
    learn.train(2)
    assert learn.history["seed"] == [3, None] and learn.history["end"] == [None, 1]


def test_what_before_epoch_logs_is_in_its_own_row():
    learn = learner()
    learn.on("before_epoch", lambda learn, epoch: learn.log(begun=epoch))
    learn.train(3)
    assert learn.history["begun"] == [0, 1, 2]


@pytest.mark.parametrize("call", ["train", "validate"])
def test_a_loss_that_a_callback_makes_must_be_a_scalar(call):
    class Vector(Callback):
        def loss(self, learn, predictions, labels): learn.loss = F.cross_entropy(predictions, labels, reduction="none")
    with pytest.raises(LossError, match=r"the loss has shape \(16,\); it must be a scalar"):
        getattr(learner(callbacks=Vector()), call)()


def test_a_logged_tensor_may_change_afterwards():
    learn, count = learner(loaders_={"train": batches(64)}), torch.zeros(())
    learn.on("after_batch", lambda learn: learn.log(count=count.add_(1)))
    learn.train()
    assert learn.history[0]["train_count"] == (1 + 2 + 3 + 4) / 4


@pytest.mark.parametrize("returned, message", [
    (torch.zeros(()), "the batch routine returned a Tensor; it may return a mapping of values to log, or nothing"),
    ({"note": "text"}, "log: note is 'text'; within a batch log numbers or scalar tensors")])
def test_what_an_override_may_not_return(returned, message):
    class Own(Learner):
        def train_batch(self): return returned
    model = net()
    with pytest.raises((TypeError, ValueError)) as caught:
        Own(model, torch.optim.SGD(model.parameters()), F.cross_entropy, {"train": batches()}).train()
    assert str(caught.value) == message


def test_a_routine_of_ones_own_with_its_own_stage():
    class Gan(Learner):
        stages = (*Learner.stages, Stage("generator", "batch", leaves="generator_loss"))
        def train_batch(self):
            data, _ = self.batch
            with self.stage("generator"):
                self.generator_loss = self.model(data).square().mean()
                self.generator_loss.backward()
                self.step()
            return {"generator_loss": self.generator_loss}
    seen = []
    model = net()
    learn = Gan(model, torch.optim.SGD(model.parameters(), lr=0.1), None, {"train": batches()})
    learn.on("after_generator", lambda generator_loss: seen.append(generator_loss.item()))
    learn.train()
    assert len(seen) == 5 and learn.history.columns == ["epoch", "train_generator_loss"]
    assert learn.history[0]["train_generator_loss"] == pytest.approx(sum(v * n for v, n in zip(seen, [16] * 4 + [6], strict=True)) / 70)
    assert not hasattr(learn, "generator_loss")


# Memory

def live_tensors(): return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


class Peak:
    "The largest number of bytes alive in tensors of a size, seen at each forward of a module, plain loop and learner alike."
    def __init__(self, model):
        self.most, self.seen = 0, weakref.WeakSet()
        model.register_forward_hook(self.note)

    def note(self, module, args, output):
        self.seen.add(output)
        self.most = max(self.most, sum(t.nbytes for t in self.seen))


def test_peak_memory_is_no_higher_than_the_plain_loops():
    def run(train):
        model = nn.Sequential(nn.Linear(5, 1000), nn.ReLU(), nn.Linear(1000, 3))
        peaks = [Peak(module) for module in model]
        train(model)
        return [peak.most for peak in peaks]

    def plain(model):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for a, b in batches():
            loss = F.cross_entropy(model(a), b)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    gc.disable()
    try: assert run(lambda model: learner(model, {"train": batches()}).train()) <= run(plain)
    finally: gc.enable()


@pytest.mark.parametrize("end", ["train", "error", "interrupt"])
def test_a_learner_is_freed_at_once(end):
    gc.collect()
    gc.disable()
    try:
        model, data = net(), loaders()
        learn = learner(model, data)
        losses = []
        learn.on("after_loss", lambda loss: losses.append(weakref.ref(loss)))
        if end != "train":
            @learn.on("after_backward")
            def fail(): raise KeyboardInterrupt if end == "interrupt" else ValueError
            with pytest.raises((ValueError, KeyboardInterrupt)): learn.train()
        else: learn.train(2)
        assert not any(loss() is not None for loss in losses)
        refs = [weakref.ref(learn), weakref.ref(model), weakref.ref(data["train"][0][0])]
        if end != "train": del fail
        del learn, model, data
        assert [ref() for ref in refs] == [None] * 3
    finally: gc.enable()


def test_no_growth_over_many_batches_and_failed_trainings():
    learn = learner(loaders_={"train": batches() * 20})
    learn.train()
    gc.collect()
    before = live_tensors()
    learn.train(10)
    fail = learn.on("after_loss", lambda batch_num: 1 / (batch_num - 50))
    for _ in range(20):
        with pytest.raises(ZeroDivisionError): learn.train()
    learn.remove(fail)
    learn.train()
    gc.collect()
    assert live_tensors() <= before


def test_no_synchronisation_in_a_batch(elsewhere):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        reads = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.reads += "_local_scalar_dense" in str(function) and not args[0].is_cpu
            return function(*args, **(kwargs or {}))
    counts = []
    learn = learner(loaders_={"train": batches() * 100}, loss_func=lambda *given: elsewhere(F.cross_entropy(*given)))
    for hook in ("before_training", "after_training"): learn.on(hook, lambda: counts.append(Count.reads), priority=-1)
    with Count(): learn.train()
    assert counts[1] - counts[0] == 1  # the mean of the pass, read when it has ended


# Errors

def test_an_error_leaves_the_learner_whole():
    model = net().eval()
    learn = learner(model)
    fail = learn.on("after_backward", lambda epoch, batch_num: 1 / (1 - epoch * batch_num))
    with pytest.raises(ZeroDivisionError) as caught: learn.train(3, callbacks=Callback())
    assert caught.value.__notes__ == ["in <lambda> on after_backward (epoch 1, batch 1)"]
    assert len(learn.history) == 1 and len(learn.callbacks) == 1 and not model.training
    assert all(p.grad is None for p in model.parameters())
    learn.remove(fail)
    learn.train(2)
    assert learn.history["epoch"] == [0, 1, 2]


# A signal may also hit a weakref callback of torch's, out of which Python lets no exception: it only reports it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_the_learner_whole():
    class Guest(Callback):
        @provides("epoch")
        def visit(self): yield 1
        def around_predict(self): yield
        def cleanup_batch(self): pass

    def interrupt(*_): raise KeyboardInterrupt
    model = net().eval()
    learn = learner(model=model, loaders_=loaders())
    learn.train(callbacks=Guest())
    start = perf_counter()
    learn.train(callbacks=Guest())
    length, fixtures = perf_counter() - start, {"batch", "data", "labels", "batch_size", "predictions", "loss", "visit"}
    moments, interrupted = random.Random(0), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(60):
            rows = len(learn.history)
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, length))
                learn.train(callbacks=Guest())
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: interrupted += 1
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
            assert learn.callbacks == () and not learn.is_running and not any(hasattr(learn, name) for name in fixtures)
            assert torch.is_grad_enabled() and not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            assert len(learn.history) in (rows, rows + 1)
    finally: signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
    learn.train()


def test_an_error_in_the_model_says_where():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            if len(x) < 16: raise IndexError("too few")
            return self.layer(x)
    with pytest.raises(IndexError) as caught: learner(Breaks()).train()
    assert caught.value.__notes__ == ["data: float32 of shape (6, 5)", "in train (epoch 0, batch 4)"]


def test_in_a_trial_who_steers_keeps_what_a_watcher_provides():
    seen = []

    class Notebook(Callback):
        watches = True

        @provides("train")
        def pages(self): return ["a page"]

        @provides("train")
        def cover(self): raise AssertionError("nobody asks for it")

        def after_epoch(self, pages): raise AssertionError("left out")

    class Writes(Callback):
        def after_epoch(self, pages, learn): seen.append(list(pages))

        @provides("epoch")
        def pen(self, pages): return f"a pen for {len(pages)}"

    class Draws(Callback):
        def after_epoch(self, pen): seen.append(pen)

    class Optional(Callback):
        def after_epoch(self, learn, cover=None): seen.append(cover)
    learn = learner(callbacks=[Notebook(), Writes(), Draws(), Optional()])
    with learn.trial() as copy:
        assert [type(callback).__name__ for callback in copy.callbacks] == ["Notebook", "Writes", "Draws", "Optional"]
        copy.train()
        assert seen == [["a page"], "a pen for 1", None]
    assert len(learn.callbacks) == 4


@pytest.mark.parametrize("call", ["train", "release", "trial"])
def test_a_call_within_a_run_is_refused_and_leaves_the_signals_alone(call):
    learn, refused = learner(loaders_={"train": batches(), "validation": batches(), "test": batches()}), []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    @learn.on("after_batch")
    def nested(learn):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert before != handlers
        with pytest.raises(RuntimeError, match=f"{call}.. was called inside train.."):
            if call == "trial":
                with learn.trial(): pass
            else: getattr(learn, call)()
        refused.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before)
    learn.train()
    assert refused and all(refused) and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_reaches_a_learner_that_is_trained_within_a_hook():
    inner, outer = learner(), learner()
    inner.on("after_batch", lambda epoch, batch_num: (epoch, batch_num) == (0, 1) and signal.raise_signal(signal.SIGINT))
    outer.on("before_epoch", lambda: inner.train(3))
    with pytest.raises(KeyboardInterrupt): outer.train(2)
    assert len(inner.history) == len(outer.history) == 0 and inner.place.batch == 2


def test_what_the_learner_logs_itself_cannot_be_logged():
    learn = learner()
    wrong = learn.on("after_loss", lambda learn: learn.log(loss=100.0))
    with pytest.raises(ValueError, match='log: "loss" is the mean of learn.loss; take another name'): learn.train()
    learn.remove(wrong)
    learn.on("after_epoch", lambda learn: learn.log(epoch=7))
    with pytest.raises(ValueError, match='log: "epoch" is the number of the row; take another name'): learn.train()


def test_what_is_logged_in_an_empty_batch_belongs_to_the_pass():
    x, y = batches()[0]
    learn = learner(loaders_={"train": [(x, y), (x[:0], y[:0])]}, loss_func=lambda predictions, labels: predictions.sum())
    learn.on("after_batch", lambda learn: learn.log(size=float(learn.batch_size)))
    learn.train()
    assert learn.history[0]["train_size"] == len(x) and "size" not in learn.history[0]


@pytest.mark.parametrize("tensors", [False, True])
def test_groups_keep_their_proportions_also_after_a_schedule_that_has_ended_at_0(tensors):
    model = net()
    rates = [torch.tensor(rate) if tensors else rate for rate in (0.001, 0.01)]
    first, *others = model.parameters()
    halves = [[first], others]
    optimiser = torch.optim.AdamW([{"params": half, "lr": rate} for half, rate in zip(halves, rates, strict=True)])
    learn = learner(model, optimiser=optimiser)
    for group in optimiser.param_groups:
        group["initial_lr"] = float(group["lr"])
        group["lr"] = group["lr"] * 0
    learn.train(1, 0.05)
    assert [float(group["lr"]) for group in optimiser.param_groups] == pytest.approx([0.005, 0.05])
    assert all(isinstance(group["lr"], torch.Tensor) == tensors for group in optimiser.param_groups)


def test_a_notebook_shows_the_loop_and_the_hook_and_not_what_is_between():
    learn = learner()
    learn.on("after_loss", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught: learn.train()
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__) if not frame.f_locals.get("__tracebackhide__")]
    assert [frame.f_code.co_name for frame in frames][1:] == ["train", "_train", "_pass", "train_batch", "<lambda>"]


@pytest.mark.parametrize(("action", "leaves"), [("predict", "predictions"), ("loss", "loss")])
def test_an_action_of_a_callback_that_leaves_nothing_is_named(action, leaves):
    class Idle(Callback): pass
    setattr(Idle, action, lambda self: None)
    with pytest.raises(AttributeError) as caught: learner().train(callbacks=Idle())
    assert any(note.endswith(f"takes the place of {'compute_loss' if action == 'loss' else action} and left none; assign learn.{leaves} there")
               for note in caught.value.__notes__)


def test_nan_is_a_row_and_one_warning():
    learn = learner(optimiser=torch.optim.SGD, loss_func=lambda p, t: F.cross_entropy(p, t) * math.nan,
                    loaders_={"train": batches()})
    with pytest.warns(UserWarning, match=r"train_loss is nan \(epoch 0, batch 4\); try a lower learning rate") as caught:
        learn.train(3)
    assert len(caught) == 1 and all(math.isnan(v) for v in learn.history["train_loss"])


class NotAnOptimiser: ...


CONSTRUCTION = {
    "model class": (dict(model=nn.Linear), TypeError, "model is <class 'torch.nn.modules.linear.Linear'>; pass an instance: Linear(...)"),
    "no model": (dict(model=3), TypeError, "model is 3, not a torch.nn.Module"),
    "optimiser": (dict(optimiser=3), TypeError, "optimiser is 3; pass a torch Optimizer or a factory such as torch.optim.AdamW"),
    "other parameters": (dict(optimiser=torch.optim.SGD(net().parameters())), ValueError,
                         "optimiser: SGD holds no parameter of the model; make it from model.parameters()"),
    "no lr": (dict(optimiser=lambda parameters: 0), TypeError,
              "optimiser: the factory <lambda>(parameters) takes no lr; it is called as factory(parameters, lr=learning_rate)"),
    "loss class": (dict(loss_func=nn.MSELoss), TypeError, "loss_func: MSELoss is a class; pass an instance: MSELoss()"),
    "loss": (dict(loss_func="mse"), TypeError, "loss_func is 'mse'; pass a function of predictions and labels, or None"),
    "one loader": (dict(dataloaders=[1]), TypeError, "dataloaders is a list; pass a mapping such as {\"train\": loader}"),
    "loader name": (dict(dataloaders={"valid": []}), ValueError,
                    "dataloaders: 'valid' is not one of ['train', 'validation', 'test']; did you mean validation?"),
    "no iterable": (dict(dataloaders={"train": 3}), TypeError, "dataloaders[\"train\"] is 3; pass an iterable of batches"),
    "callback class": (dict(callbacks=Callback), TypeError, "callbacks: Callback is a class; pass an instance: Callback()"),
    "device": (dict(device="abacus"), ValueError, "device is 'abacus', which cannot be used: *"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    given, kind, message = CONSTRUCTION[case]
    model = net()
    parts = dict(model=model, optimiser=torch.optim.SGD, loss_func=F.cross_entropy, dataloaders=loaders(), device="cpu")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as caught: Learner(**{**parts, **given})
    assert str(caught.value) == message or (message.endswith("*") and str(caught.value).startswith(message[:-1]))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def frozen():
    model = net()
    for p in model.parameters(): p.requires_grad_(False)
    return model


TRAINING = {
    "no train loader": (dict(loaders_={"test": batches()}), {}, ValueError, "dataloaders has no \"train\" loader, it has ['test']; add one"),
    "empty loader": (dict(loaders_={"train": []}), {}, ValueError, "dataloaders[\"train\"] is empty; give it at least one batch"),
    "empty validation": (dict(loaders_={"train": batches(), "validation": []}), {}, ValueError,
                         "dataloaders[\"validation\"] is empty; give it at least one batch"),
    "read once": (dict(loaders_={"train": iter([])}), {}, ValueError,
                  "dataloaders[\"train\"] yielded no batch; an iterator can be read only once, so give a list or a DataLoader"),
    "a number": (dict(loaders_={"train": [3]}), {}, BatchError,
                 "the loader yielded 3; a batch is a tensor, a tuple or list with the labels last, a mapping, a dataclass, or an object with a method to(device)"),
    "None": (dict(loaders_={"train": [None]}), {}, BatchError,
             "the loader yielded None; a batch is a tensor, a tuple or list with the labels last, a mapping, a dataclass, or an object with a method to(device)"),
    "empty tuple": (dict(loaders_={"train": [()]}), {}, BatchError,
                    "the loader yielded an empty tuple; give it at least one tensor"),
    "no labels": (dict(loaders_={"train": [{"input": x, "target": y}]}), {}, BatchError,
                  "the batch has no labels for loss_func; its keys are ['input', 'target']; name them with Learner(..., labels=\"...\"), or pass labels=None"),
    "vector loss": (dict(loss_func=lambda p, t: F.cross_entropy(p, t, reduction="none")), {}, LossError,
                    "loss_func returned a tensor of shape (16,); the loss must be a scalar: take its .mean()"),
    "float loss": (dict(loss_func=lambda p, t: 1.0), {}, LossError, "loss_func returned a float; the loss must be a scalar tensor"),
    "no loss": (dict(loss_func=lambda p, t: None), {}, LossError, "loss_func returned a NoneType; the loss must be a scalar tensor"),
    "no own loss": (dict(loss_func=None), {}, LossError, "loss_func is None and the model's output has no loss; pass a loss_func of the output and the labels, or return the loss as .loss, as [\"loss\"] or as the first scalar of a tuple"),
    "no gradient": (dict(model=frozen()), {}, LossError, "the loss needs no gradient: it depends on no parameter that is trained; "
                    "is the model frozen, the loss detached, or inference mode on?"),
    "epochs 0": ({}, dict(epochs=0), ValueError, "epochs is 0; it must be a whole number of at least 1"),
    "epochs -1": ({}, dict(epochs=-1), ValueError, "epochs is -1; it must be a whole number of at least 1"),
    "epochs 2.5": ({}, dict(epochs=2.5), ValueError, "epochs is 2.5; it must be a whole number of at least 1"),
    "epochs True": ({}, dict(epochs=True), ValueError, "epochs is True; it must be a whole number of at least 1"),
    "validation_epochs": ({}, dict(validation_epochs=0), ValueError, "validation_epochs is 0; it must be a whole number of at least 1"),
    "learning_rate": ({}, dict(learning_rate=-0.1), ValueError, "learning_rate is -0.1; it must be a finite number of at least 0"),
    "learning_rate nan": ({}, dict(learning_rate=math.nan), ValueError, "learning_rate is nan; it must be a finite number of at least 0"),
    "learning_rate text": ({}, dict(learning_rate="1e-3"), ValueError, "learning_rate is '1e-3'; it must be a finite number of at least 0"),
    "factory": (dict(optimiser=lambda ps, lr=0: NotAnOptimiser), {}, TypeError,
                "optimiser: the factory returned <class 'test_learner.NotAnOptimiser'>; it must return a torch Optimizer"),
    "factory of other parameters": (dict(optimiser=lambda ps, lr=0.1: torch.optim.SGD(net().parameters(), lr=lr)), {}, ValueError,
                                    "optimiser: SGD holds no parameter of the model; make it from model.parameters()"),
    "logging a vector": (dict(callbacks=None), "log", ValueError, "log: wide has shape (3,); log a scalar"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training(case):
    construction, call, kind, message = TRAINING[case]
    learn = learner(**construction)
    if call == "log":
        call = {}
        learn.on("after_loss", lambda learn: learn.log(wide=torch.zeros(3)))
    before = copy.deepcopy(learn.model.state_dict())
    optimiser, callbacks = learn.optimiser, learn.callbacks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as caught: learn.train(**call, callbacks=Callback())
    assert str(caught.value) == message
    assert learn.callbacks == callbacks and len(learn.history) == 0 and not learn.is_running
    assert learn.optimiser is optimiser or case not in ("factory", "factory of other parameters")
    if "log" not in case and case not in ("no gradient", "read once") and "batch" not in str(caught.value):
        assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items() if "running" not in k and "num_" not in k)


def test_evaluation_without_a_loader():
    learn = learner(loaders_={"train": batches()})
    for call in ("validate", "test"):
        with pytest.raises(ValueError, match="dataloaders has no .* loader, it has \\['train'\\]; add one"): getattr(learn, call)()


def test_calls_inside_a_call_are_refused():
    for call, hook in (("train", "after_batch"), ("validate", "after_validation_batch"), ("test", "before_validation")):
        learn = learner()
        learn.on(hook, lambda learn, call=call: getattr(learn, call)())
        with pytest.raises(RuntimeError, match=f"{call}\\(\\) was called inside train\\(\\); call it afterwards"): learn.train()


@pytest.mark.parametrize("hook", ["before_epoch", "before_batch", "after_loss", "after_batch", "after_epoch"])
def test_a_validation_from_a_hook_changes_nothing(hook):
    plain, looked, seen = learner(), learner(), []
    looked.on(hook, lambda learn: learn.phase in ("", "train", "validation") and not learn.evaluating and seen.append(learn.validate()))
    for learn in (plain, looked): learn.train(2)
    assert plain.history.rows == looked.history.rows and len(seen) >= 2
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), looked.model.parameters(), strict=True))
    assert seen[0].keys() == {"validation_loss"} and (hook != "after_epoch" or seen[-1]["validation_loss"] == plain.history[-1]["validation_loss"])


def test_history_names():
    history = History()
    history.rows = [{"epoch": 0, "train_loss": 1.0, "validation_accuracy": 0.5}]
    with pytest.raises(HistoryError, match="history has no column train_los; did you mean train_loss"): history["train_los"]
    with pytest.raises(HistoryError, match="plot: the history has no accurracy; did you mean accuracy"): history.plot("accurracy")
    assert "History: no epoch yet" in repr(History())


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_on_an_accelerator(kind):
    if not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type != kind:
        pytest.skip(f"needs an accelerator of kind {kind}; run the tests on a machine that has one")
    model = net()
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, loaders())
    assert learn.device.type == kind
    learn.train(2)
    oracle = net()
    bare_loop(oracle, torch.optim.SGD(oracle.parameters(), lr=0.1), batches(), batches(40, seed=1), 2)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True): torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4)


class Lion(torch.optim.Optimizer):
    "As third parties write one: what it knows of `defaults` is its learning rate."
    def __init__(self, params, lr=1e-3): super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad(): loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None: continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.sub_(mean.mul(0.9).add(p.grad, alpha=0.1).sign(), alpha=group["lr"])
                mean.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


class WithClosure(Learner):
    "For LBFGS, which computes the loss again within its step."
    def step(self):
        def closure():
            self.optimiser.zero_grad()
            loss = self.loss_func(self.model(self.data), self.labels)
            loss.backward()
            return loss
        self.optimiser.step(closure)
        self.optimiser.zero_grad()


OPTIMISERS = [Lion, *(kind for kind in vars(torch.optim).values() if isinstance(kind, type)
                      and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer)]


@pytest.mark.parametrize("kind", OPTIMISERS, ids=lambda kind: kind.__name__)
def test_a_checkpoint_of_any_optimiser_is_loaded_and_trained_on(tmp_path, kind):
    def one():
        torch.manual_seed(0)
        sparse = kind is torch.optim.SparseAdam
        model = nn.Embedding(4, 3, sparse=True) if sparse else nn.Linear(5, 3, bias=False)  # Muon takes matrices
        inputs = torch.arange(12) % 4 if sparse else torch.randn(12, 5)
        data = [(inputs, torch.arange(12) % 3)] * 3
        learner_of = WithClosure if kind is torch.optim.LBFGS else Learner
        return learner_of(model, kind, F.cross_entropy, {"train": data}, device="cpu")
    whole, first = one(), one()
    whole.train(3, learning_rate=0.01)
    first.train(2, learning_rate=0.01)
    first.save(tmp_path / "c")
    second = one()
    for _ in range(2): second.load(tmp_path / "c")  # the second time into an optimiser that has loaded one
    assert same(first.model, second.model)
    second.train(3, resume=True)
    assert same(whole.model, second.model)
    assert whole.fingerprint()["optimiser"] == second.fingerprint()["optimiser"]


def test_a_checkpoint_from_before_any_training_is_loaded_and_trained(tmp_path):
    def one(): return Learner(net(), torch.optim.SGD, F.cross_entropy, loaders(), device="cpu")
    first, whole = one(), one()
    first.save(tmp_path / "c")
    first.load(tmp_path / "c")
    second = one()
    nn.init.zeros_(second.model[0].weight)
    second.load(tmp_path / "c")
    second.train(learning_rate=0.1, resume=True)
    whole.train(1, learning_rate=0.1)
    assert same(whole.model, second.model) and len(second.history) == 1
    third = one()
    third.train(2, learning_rate=0.1, resume=tmp_path / "c")
    assert len(third.history) == 2


def test_a_learner_without_an_optimiser_loads_a_checkpoint_and_hands_it_on_whole(tmp_path):
    def one(optimiser=torch.optim.Adam):
        return Learner(net(), optimiser, F.cross_entropy, loaders(), device="cpu")
    whole, trained, measures = one(), one(), one(None)
    whole.train(2, learning_rate=0.01)
    trained.train(1, learning_rate=0.01)
    trained.save(tmp_path / "c")
    measures.load(tmp_path / "c")
    assert same(trained.model, measures.model) and measures.optimiser is None
    assert measures.validate() == trained.validate()
    measures.save(tmp_path / "again")
    last = one()
    last.train(2, resume=tmp_path / "again")
    assert same(whole.model, last.model)
    with pytest.raises(TypeError, match="optimiser is None"): measures.train(2, resume=True)
    measures.optimiser = torch.optim.Adam
    measures.train(2, resume=True)
    assert same(whole.model, measures.model)


def warned_in(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def test_parameters_that_no_optimiser_has_are_named_once():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    learn = learner(model, optimiser=torch.optim.SGD)
    assert warned_in(lambda: learn.train(1, learning_rate=0.1)) == []
    model[1] = nn.Linear(4, 3)
    before = model[1].weight.clone()
    assert warned_in(lambda: learn.train(2)) == [
        "2 parameters of the model, such as 1.weight, are in no group of the optimiser, so training does not change them; "
        "make the optimiser again, call optimiser.add_param_group, or freeze them with requires_grad_(False)"]
    assert torch.equal(before, model[1].weight)  # as the warning says
    learn.optimiser.add_param_group({"params": [model[1].weight]})
    [message] = warned_in(lambda: learn.train(1))
    assert message.startswith("1.bias of the model is in no group of the optimiser, so training does not change it; ")
    assert not torch.equal(before, model[1].weight)
    model[1].bias.requires_grad_(False)
    assert warned_in(lambda: learn.train(1)) == []


def test_layers_that_are_unfrozen_after_the_optimiser_was_made_are_named():
    def only_trainable(parameters, lr): return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=lr)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    learn = learner(model, optimiser=only_trainable)
    assert warned_in(lambda: learn.train(1, learning_rate=0.1)) == []
    model[0].requires_grad_(True)
    [message] = warned_in(lambda: learn.train(1))
    assert message.startswith("2 parameters of the model, such as 0.weight, are in no group")


def test_parameters_that_wait_or_are_shared_are_not_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
            self.down.weight = self.up.weight

        def forward(self, x): return self.head(self.down(self.up(x)))
    learn = learner(Tied(), optimiser=torch.optim.SGD, callbacks=FreezeUntil(1, "up"))
    assert warned_in(lambda: learn.train(2, learning_rate=0.1)) == []


class Halves(Callback):
    "Steers: the loss is halved."
    def after_loss(self, learn): learn.loss = learn.loss / 2


class Looks(Callback):
    watches = True


def resumable(tmp_path, loss_func=F.cross_entropy, callbacks=(), way="resume"):
    "What is said when a training with a loss and callbacks of its own goes on in a learner."
    learn = Learner(net(), torch.optim.SGD, loss_func, loaders(), callbacks, device="cpu")
    if way == "resume": return learn, lambda: learn.train(2, resume=tmp_path / "c")
    learn.load(tmp_path / "c")
    return learn, lambda: learn.train(2, resume=True)


def squared(predictions, labels): return F.mse_loss(predictions, F.one_hot(labels, 3).float())


@pytest.mark.parametrize("way", ["resume", "load"])
def test_what_steered_a_training_that_goes_on_is_missed(tmp_path, way):
    first = Learner(net(), torch.optim.SGD, F.cross_entropy, loaders(), [Halves(), Looks(), Halves()], device="cpu")
    first.on("after_batch", lambda: None)
    first.train(1, learning_rate=0.1)
    first.save(tmp_path / "c")
    learn, go_on = resumable(tmp_path, callbacks=[Halves(), Halves()], way=way)
    assert warned_in(go_on) == [] and len(learn.history) == 2
    learn, go_on = resumable(tmp_path, callbacks=Halves(), way=way)
    assert warned_in(go_on) == ["the resumed training had callbacks that this learner lacks: Halves; add them to get the same result"]
    learn, go_on = resumable(tmp_path, loss_func=squared, way=way)
    assert warned_in(go_on) == [
        "the resumed training had callbacks that this learner lacks: Halves, Halves; add them to get the same result",
        "the resumed training had the loss cross_entropy and continues with squared; give the learner the original loss to get the same result"]


@pytest.mark.parametrize(("then", "now", "said"), [
    (lambda: made(nn.CrossEntropyLoss, label_smoothing=0.1), lambda: made(nn.CrossEntropyLoss, label_smoothing=0.2), "continues with CrossEntropyLoss with other arguments"),
    (lambda: made(nn.CrossEntropyLoss, torch.ones(3)), lambda: made(nn.CrossEntropyLoss, torch.ones(3)), None),
    (lambda: made(nn.CrossEntropyLoss, torch.ones(3)), lambda: made(nn.CrossEntropyLoss, 2 * torch.ones(3)), "continues with CrossEntropyLoss with other arguments"),
    (lambda: nn.CrossEntropyLoss(), lambda: made(nn.CrossEntropyLoss), None), (lambda: F.cross_entropy, lambda: nn.CrossEntropyLoss(), "continues with CrossEntropyLoss"),
    (lambda: partial(F.cross_entropy, label_smoothing=0.1), lambda: F.cross_entropy, "had the loss partial of cross_entropy and continues with cross_entropy"),
    (lambda: lambda p, y: F.cross_entropy(p, y), lambda: lambda p, y: F.cross_entropy(p, y), None)])
def test_another_loss_of_a_training_that_goes_on_is_named(tmp_path, then, now, said):
    first = Learner(net(), torch.optim.SGD, then(), loaders(), device="cpu")
    first.train(1, learning_rate=0.1)
    first.save(tmp_path / "c")
    _, go_on = resumable(tmp_path, now())
    warned = warned_in(go_on)
    assert ([said in message for message in warned] == [True]) if said else warned == []


@pytest.mark.parametrize("forged", [7, {}, {"callbacks": 3}, {"callbacks": [3, {}, {"type": ["\x1b"]}], "loss_func": 3}])
def test_a_forged_record_of_parts_breaks_no_resumption(tmp_path, forged):
    first = Learner(net(), torch.optim.SGD, F.cross_entropy, loaders(), device="cpu")
    first.train(1, learning_rate=0.1)
    state = {**first.state_dict(), "made": forged}
    learn = Learner(net(), torch.optim.SGD, F.cross_entropy, loaders(), device="cpu")
    assert not any("\x1b" in message for message in warned_in(lambda: learn.train(2, resume=state)))
    assert len(learn.history) == 2


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    learn = learner()
    for call in (lambda: learn.load(tmp_path), lambda: learn.train(1, resume=tmp_path)):
        with pytest.raises(FileNotFoundError, match="^the folder .* holds no checkpoint; name a file"): call()
    assert len(learn.history) == 0


def test_a_loss_of_numpy_is_not_a_tensor():
    learn = learner(loss_func=lambda predictions, labels: predictions.detach().numpy().mean())
    with pytest.raises(LossError, match="^loss_func returned a float32; the loss must be a scalar tensor"): learn.train(1)
    with pytest.raises(LossError, match="must be a scalar tensor"): learn.validate()
