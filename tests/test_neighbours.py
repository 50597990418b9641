"Neighbours of what the other tests hold: batches, losses, metrics and optimisers of unusual make."
from collections import OrderedDict
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from learner import (
    EMA,
    BatchSchedule,
    Checkpoint,
    EarlyStopping,
    EpochSchedule,
    Learner,
    Metrics,
    NaNGuard,
    Recorder,
    predictions,
)
from learner.base.batch import BatchError

torch.manual_seed(0)
X = torch.randn(18, 4)
Y = X @ torch.randn(4, 1) + 0.3
PARTS = [*zip(X.split(8), Y.split(8), strict=True)]


def net():
    torch.manual_seed(1)
    return nn.Linear(4, 1)


def made(model, loss, train=PARTS, callbacks=(), optimiser=None, **loaders):
    optimiser = optimiser or torch.optim.SGD(model.parameters(), lr=0.1)
    return Learner(model, optimiser, loss, {"train": train, **loaders}, callbacks, device="cpu")


# Batches


class Output(OrderedDict):
    "As of Hugging Face: its constructor takes entries, and no mapping."
    def __init__(self, input=None, labels=None): super().__init__(input=input, labels=labels)


class Pair(tuple):
    "A tuple whose constructor takes its items."
    def __new__(cls, first, second): return super().__new__(cls, (first, second))


@pytest.mark.parametrize("kind", [Output, Pair])
def test_classes_with_constructors_of_their_own(kind):
    one, other = made(net(), F.mse_loss, [kind(*pair) for pair in PARTS]), made(net(), F.mse_loss)
    for learn in (one, other): learn.train(2)
    assert torch.equal(one.model.weight, other.model.weight)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x): return self.first(x), self.second(x)


@pytest.mark.parametrize("named", [False, True])
def test_several_labels(named):
    def loss(predictions, labels):
        one, two = labels.values() if named else labels
        return F.mse_loss(predictions[0], one) + F.l1_loss(predictions[1], two)
    data = [{"x": x, "one": y, "two": -y} if named else (x, y, -y) for x, y in PARTS]
    model, plain = Two(), Two()
    places = ["one", "two"] if named else [1, -1]
    Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, {"train": data}, device="cpu", labels=places).train()
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, y in PARTS:
        heads = plain(x)
        (F.mse_loss(heads[0], y) + F.l1_loss(heads[1], -y)).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_one_of_several_labels_that_is_not_there():
    learn = Learner(Two(), None, None, {"validation": [{"x": X, "one": Y}]}, device="cpu", labels=["one", "tow"])
    with pytest.raises(BatchError, match="labels='tow'.*which has"): learn.validate()


# Losses


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="sum"), partial(F.mse_loss, reduction="sum")])
def test_the_column_of_a_sum_is_the_sum_over_the_epoch_for_each_example(loss):
    model = net()
    learn = Learner(model, None, loss, {"validation": PARTS}, Metrics(same=loss), device="cpu")
    row, right = learn.validate(), F.mse_loss(model(X), Y, reduction="sum").item() / 18
    assert row["validation_loss"] == pytest.approx(right, rel=1e-6) and row["validation_same"] == row["validation_loss"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, predictions, labels): return F.mse_loss(predictions, labels * self.scale)


class Owner:
    def __init__(self): self.part = Scaled()

    def loss(self, predictions, labels): return self.part(predictions, labels)


def test_a_module_behind_a_bound_method_is_known():
    learn = made(net(), Owner().loss)
    with pytest.warns(UserWarning, match="loss_func.part is a Scaled with parameters that the optimiser"): learn.train()


class OwnLoss(nn.Module):
    def __init__(self, form, optional=True):
        super().__init__()
        self.form, self.layer, self.optional = form, net(), optional

    def forward(self, x, labels=None):
        found = self.layer(x)
        if labels is None and not self.optional: raise TypeError("forward() missing 1 required positional argument: 'labels'")
        loss = None if labels is None else F.mse_loss(found, labels)
        if self.form == "mapping": return {"loss": loss, "logits": found}
        if self.form == "heads": return {"found": found, **({} if loss is None else {"loss": loss})}
        return (found,) if loss is None else (loss, found)


@pytest.mark.parametrize("form", ["mapping", "tuple", "heads"])
def test_a_model_with_its_own_loss_predicts_without_labels(form):
    data = [{"x": x, "labels": y} for x, y in PARTS]
    model = OwnLoss(form)
    measured = () if form == "heads" else Metrics(error=F.mse_loss)
    learn = made(model, None, data, measured, validation=data)
    learn.train()
    right = model.layer(X).detach()
    if measured: assert learn.history[-1]["validation_error"] == pytest.approx(learn.history[-1]["validation_loss"])
    for found in (learn.predict({"x": X}).outputs, predictions(learn).predictions):
        torch.testing.assert_close(found["found"] if form == "heads" else found, right)
    with pytest.raises(ValueError, match="of x, labels, and the model takes x"): learn.predict({"x": X, "labels": Y})


def test_a_model_that_cannot_do_without_labels_says_so():
    learn = made(OwnLoss("tuple", optional=False), None, [{"x": x, "labels": y} for x, y in PARTS])
    with pytest.raises(TypeError, match="the batch has no labels.*a default of None"): learn.predict({"x": X})


class LossInTraining(nn.Module):
    "Computes its loss in training alone, as the detectors of torchvision do."
    def __init__(self):
        super().__init__()
        self.layer = net()

    def forward(self, x, labels=None):
        found = self.layer(x)
        return {"loss": F.mse_loss(found, labels), "logits": found} if self.training else {"logits": found}


@pytest.mark.filterwarnings("ignore:the model's output has no loss in evaluation")
def test_a_model_that_computes_its_loss_in_training_only_is_trained_and_measured(tmp_path):
    data = [{"x": x, "labels": y} for x, y in PARTS]
    model, plain = LossInTraining(), made(net(), F.mse_loss, validation=PARTS)
    callbacks = [Metrics(error=F.mse_loss), Recorder(), NaNGuard(), EMA(0.5), Checkpoint(tmp_path)]
    learn = made(model, None, data, callbacks, validation=data, test=data)
    learn.train(2)
    plain.train(2, callbacks=[EMA(0.5)])
    assert torch.equal(model.layer.weight, plain.model.weight)
    assert list(learn.history[-1]) == ["epoch", "train_loss", "train_error", "validation_error", "test_error"]
    assert learn.history[-1]["validation_error"] == pytest.approx(plain.history[-1]["validation_loss"])
    with pytest.raises(ValueError, match='monitor is "validation_loss", which is not one of'):
        learn.train(2, callbacks=EarlyStopping())


def test_a_loss_that_is_missing_in_evaluation_is_told_once_and_in_training_refused():
    data = [{"x": x, "labels": y} for x, y in PARTS]
    with pytest.warns(UserWarning, match="has no loss in evaluation") as said: made(LossInTraining(), None, data, validation=data).train(3)
    assert len(said) == 1
    model = LossInTraining().eval()
    model.train = lambda mode=True: model
    with pytest.raises(ValueError, match="the model's output has no loss"): made(model, None, data, validation=data).train(1)


# Optimisers


class WithModes(torch.optim.SGD):
    mode = ""

    def train(self): self.mode = "train"

    def eval(self): self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)


@pytest.mark.parametrize("hook", ["after_batch", "before_batch"])
def test_an_optimiser_with_modes_trains_on_after_a_validation_beside_training(hook):
    model, seen = net(), []
    learn = made(model, F.mse_loss, optimiser=WithModes(model.parameters(), lr=0.1), validation=PARTS)
    learn.on(hook, lambda learn: learn.validate())
    learn.on("after_validation_batch", lambda optimiser: seen.append(optimiser.mode))
    learn.train(2)
    assert learn.optimiser.mode == "eval" and seen == ["eval"] * 24  # 3 batches, in 6 passes beside and 2 by themselves


def test_sparse_gradients_have_a_norm_and_an_average():
    model = nn.Embedding(5, 1, sparse=True)
    batch = torch.tensor([1, 1, 2]), torch.ones(3, 1)
    before = model.weight.detach().clone().requires_grad_()
    F.mse_loss(F.embedding(batch[0], before), batch[1]).backward()
    recorder = Recorder("gradient_norm")
    made(model, F.mse_loss, [batch], [recorder, EMA(0.5)]).train()
    assert recorder.values()[1].item() == pytest.approx(before.grad.norm().item())


def test_the_average_of_a_compiled_model_fits_the_plain_one():
    ema, plain = EMA(0.5), net()
    made(torch.compile(net(), backend="eager"), F.mse_loss, callbacks=ema).train()
    ema.copy_to(plain)
    assert set(ema.state_dict()["averages"]) == {"weight", "bias"}


def test_weights_of_eight_bits_are_averaged():
    model = nn.Sequential(net())
    model.register_parameter("fixed", nn.Parameter(torch.ones(3).to(torch.float8_e5m2), requires_grad=False))
    learn = made(model, F.mse_loss, callbacks=EMA(0.5), validation=PARTS)
    learn.train(2)
    assert torch.equal(model.fixed.float(), torch.ones(3))


# Schedules of a training that goes on


def rates(learn, **length):
    found = []
    learn.on("before_step", lambda optimiser: found.append(optimiser.param_groups[0]["lr"]))
    learn.train(**length)
    return found


def scheduled(): return made(net(), F.mse_loss, callbacks=BatchSchedule(partial(OneCycleLR, max_lr=0.1, cycle_momentum=False)))


@pytest.mark.parametrize("first, then, count", [
    ({"epochs": 1}, {"epochs": 3}, 6),
    ({"steps": 4}, {"steps": 9}, 5),
    ({"steps": 4, "validation_steps": 3}, {"steps": 10, "validation_steps": 4}, 6),
])
def test_a_schedule_that_is_made_for_more_training_fits_what_is_left(first, then, count):
    done = scheduled()
    done.train(**first)
    found = rates(scheduled(), **then, resume=done.state_dict())
    assert found == pytest.approx(rates(scheduled(), steps=count), abs=1e-12)


# Refusals before the first step


def test_what_is_refused_with_the_way_out():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimiser is a dict; .*Optimisers\(generator"): made(model, F.mse_loss, optimiser={"a": sgd})
    loader = torch.utils.data.DataLoader([*zip(X, Y, strict=True)], 8)
    with pytest.raises(TypeError, match=r"validation.* a list of loaders; give each a name"): made(model, F.mse_loss, validation=[loader, loader])
    with pytest.raises(TypeError, match=r"a list of loaders; learner.loop.together.Together"): made(model, F.mse_loss, [loader, loader])
    with torch.device("meta"): empty = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="device meta.*to_empty"): Learner(empty, torch.optim.SGD, F.mse_loss, {"train": PARTS})
    torchmetrics = pytest.importorskip("torchmetrics")
    with pytest.raises(TypeError, match="takes values and their weight; give a function"): Metrics(mean=torchmetrics.MeanMetric())


@pytest.mark.parametrize("loaders, match", [
    ({"train": lambda: (part for part in PARTS)}, "is a generator, which can be read only once, and training reads it 2 times"),
    ({"train": lambda: map(tuple, PARTS)}, "is a map, which can be read only once"), ({"train": lambda: iter(DataLoader(PARTS))}, "can be read only once"),
    ({"train": lambda: PARTS, "validation": lambda: iter(PARTS)}, r'"validation"\] is a list_iterator.* 2 times'), ({"train": lambda: cycle(PARTS)}, "has no end; .*steps="),
])
def test_a_loader_that_is_done_after_one_pass_is_refused_before_the_first(loaders, match):
    learn = Learner(model := net(), torch.optim.SGD, F.mse_loss, {name: make() for name, make in loaders.items()}, device="cpu")
    with pytest.raises(ValueError, match=match): learn.train(2, 0.1)
    assert torch.equal(model.weight, net().weight) and len(learn.history) == 0


def test_a_loader_of_one_pass_is_enough_for_one():
    learn = Learner(net(), torch.optim.SGD, F.mse_loss, {"train": iter(PARTS), "validation": iter(PARTS)}, device="cpu")
    learn.train(1, 0.1)
    endless = Learner(net(), torch.optim.SGD, F.mse_loss, {"train": cycle(PARTS)}, device="cpu")
    endless.train(steps=3, learning_rate=0.1)
    assert torch.equal(learn.model.weight, endless.model.weight)


@pytest.mark.parametrize("loss, match", [(lambda p, y: F.mse_loss(p, y) * (1 + 0j), "the loss is complex; .*take its .real"), (lambda p, y: (p > y).sum(), "needs no gradient")])
def test_a_loss_without_a_gradient_says_why(loss, match):
    with pytest.raises(ValueError, match=match): made(net(), loss).train(1)
    learn = made(net(), F.mse_loss)
    learn.on("after_loss", lambda learn: setattr(learn, "loss", 1.0))
    with pytest.raises(ValueError, match="learn.loss was set to a float"): learn.train(1)


class OwnRate(torch.optim.Optimizer):
    "Finds its rate by itself where it is None, as Adafactor of Hugging Face does."
    def __init__(self, parameters, lr=None): super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]: p.add_(p.grad, alpha=-(0.1 if group["lr"] is None else group["lr"]))


def test_an_optimiser_that_finds_its_own_rate():
    right = made(net(), F.mse_loss)
    right.train(2)
    model = net()
    learn = made(model, F.mse_loss, optimiser=OwnRate(model.parameters()), callbacks=Recorder())
    with pytest.raises(ValueError, match="lr of OwnRate is None.* give it a number to schedule it"): learn.train(1, callbacks=BatchSchedule(partial(OneCycleLR, max_lr=0.1)))
    learn.train(2)
    assert torch.equal(right.model.weight, model.weight)
    learn.train(1, 0.05)
    assert learn.optimiser.param_groups[0]["lr"] == 0.05


def test_an_optimiser_whose_closure_is_missing_says_what_to_do():
    class Sharp(torch.optim.SGD):
        def step(self, closure=None): closure()
    model = net()
    with pytest.raises(TypeError, match=r"Sharp.step needs a closure, which the loop does not give; .*override step\(\)"): made(model, F.mse_loss, optimiser=Sharp(model.parameters())).train(1)


def test_a_metric_that_is_not_one_of_predictions_and_labels_is_refused_at_once():
    torchmetrics = pytest.importorskip("torchmetrics")
    for metric, takes in ((torchmetrics.retrieval.RetrievalMAP(), "preds, target, indexes"), (torchmetrics.SumMetric(), "value")):
        with pytest.raises(TypeError, match=rf"update takes \({takes}\), and it is called as update\(predictions, labels\)"): Metrics(it=metric)


@pytest.mark.parametrize("labels, match", [(lambda y: y.numpy(), "the labels are an array of NumPy; make a tensor"), (lambda y: y[:, 0].tolist(), "the labels are a list of numbers")])
def test_labels_that_are_not_tensors_say_so(labels, match):
    with pytest.raises(TypeError, match=match): made(net(), F.mse_loss, [(x, labels(y)) for x, y in PARTS]).train(1)
    def own(predictions, labels): return predictions.missing
    with pytest.raises(AttributeError, match="missing"): made(net(), own).train(1)


class Around:
    "An optimiser around another, as Lookahead is: it pulls the weights back every other step, and has a state of a form of its own."
    def __init__(self, base):
        self.base, self.param_groups, self.steps = base, base.param_groups, 0
        self.slow = [p.detach().clone() for p in base.param_groups[0]["params"]]

    def zero_grad(self, set_to_none=True): self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self):
        self.base.step()
        self.steps += 1
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            if self.steps % 2 == 0: p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self): return {"base": self.base.state_dict(), "slow": self.slow, "steps": self.steps}

    def load_state_dict(self, state):
        self.base.load_state_dict(state["base"])
        self.slow, self.steps = [each.clone() for each in state["slow"]], state["steps"]


def test_an_optimiser_around_another_is_resumed_from_its_own_form_of_state():
    def one():
        model = net()
        return made(model, F.mse_loss, optimiser=Around(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    whole, first, second = one(), one(), one()
    whole.train(3)
    first.train(1)
    state = first.state_dict()
    second.train(3, resume=state)
    assert torch.equal(whole.model.weight, second.model.weight)
    del state["optimiser"]["slow"]
    with pytest.raises(ValueError, match="the state of the optimiser is not one of Around, which has base, slow, steps"): one().train(3, resume=state)


@pytest.mark.parametrize("callback", [lambda: EarlyStopping(), lambda: EpochSchedule(ReduceLROnPlateau)])
def test_a_value_of_validations_that_are_left_out_cannot_be_monitored(callback):
    learn = made(model := net(), F.mse_loss, validation=PARTS)
    with pytest.raises(ValueError, match=r"train\(validate=False\) measures no such value"): learn.train(2, validate=False, callbacks=callback())
    assert torch.equal(model.weight, net().weight)


def test_a_checkpoint_does_without_a_best_where_validations_are_left_out(tmp_path):
    made(net(), F.mse_loss, validation=PARTS).train(2, validate=False, callbacks=Checkpoint(tmp_path))  # no warning
    assert Checkpoint.latest(tmp_path) and Checkpoint.best(tmp_path) is None
