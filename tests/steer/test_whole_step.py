"""A whole step in one graph against eager training: right, or refused by name before the first step."""
import copy
import gc
import os
import re
import signal
import subprocess
import sys
import tracemalloc
import warnings
from functools import partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from learner.base.nested import snapshot
from learner.keep.fingerprints import Fingerprints
from learner.loop.learner import Learner
from learner.loop.resume import Rewind
from learner.loop.stages import Callback, CallbackError, CancelBatchException, CancelStepException, CancelTrainException
from learner.steer.accumulate import Accumulate
from learner.steer.augment import Mixup
from learner.steer.freeze import FreezeUntil
from learner.steer.in_graph import InGraph, SortedHooks
from learner.steer.precision import Compile, MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule, Schedule
from learner.steer.step_graph import Compiled
from learner.steer.torch_update import Dial, place_counts
from learner.steer.update import EMA, ClipGradients
from learner.steer.whole_step import WholeStep, too_short
from learner.watch.metrics import Metrics
from learner.watch.recorder import Recorder

GRAPH = "aot_eager"  # takes the graph apart as inductor does, and runs it without making code
CAUGHT = "eager"  # runs the graph as it was caught: for what does not depend on the numbers


@pytest.fixture(autouse=True)
def fresh():
    "Compiled code of one test does not count for the next."
    yield
    torch._dynamo.reset()


def net(seed=0, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


def batches(sizes=(8, 8, 8), dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=generator))
            for n in sizes]


def adam(model): return torch.optim.AdamW(model.parameters(), lr=0.01)


def learner(*callbacks, data=None, model=None, optimiser=adam, loss=F.cross_entropy, kind=Learner, **loaders):
    model = model or net()
    return kind(model, optimiser(model), loss, {"train": data or batches(), **loaders}, callbacks, device="cpu")


def gap(one, other):
    pairs = [*zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)]
    assert all(a.dtype == b.dtype for a, b in pairs)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def both(make, callbacks=tuple, epochs=2, backend=GRAPH, **settings):
    "The same training twice, without a graph and with one."
    found = []
    for whole in ([], [WholeStep(backend)]):
        torch.manual_seed(3)
        learn = make(*callbacks(), *whole, **settings)
        torch.manual_seed(4)
        learn.train(epochs)
        found.append(learn)
    return found


def whole_of(learn): return next(c for c in learn.callbacks if isinstance(c, WholeStep))


def made(learn): return whole_of(learn).graphs.made


# Right.

OPTIMISERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1), "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True), "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5), "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0), "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01), "Rprop": partial(torch.optim.Rprop, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01), "ASGD": partial(torch.optim.ASGD, lr=0.01),
}
COARSE = {"NAdam": 1e-7, "ASGD": 1e-6}  # their state has scalars of 32 bits, which eager training reads as doubles
ORDINARY = ("momentum", "AdamW", "RAdam")


@pytest.mark.parametrize("name", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.long) for name in OPTIMISERS])
def test_an_optimiser_steps_as_in_eager_training(name):
    eager, whole = both(learner, optimiser=lambda model: OPTIMISERS[name](model.parameters()), epochs=7)
    assert made(whole) == 1
    assert gap(eager, whole) < COARSE.get(name, 1e-12)
    states = [learn.optimiser.state_dict()["state"] for learn in (eager, whole)]
    assert states[0].keys() == states[1].keys()
    for entries, others in zip(states[0].values(), states[1].values(), strict=True):
        assert entries.keys() == others.keys()
        for one, other in zip(entries.values(), others.values(), strict=True):
            if isinstance(one, torch.Tensor):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-9)
            else: assert one == other


def cycle(optimiser, total_steps): return OneCycleLR(optimiser, 0.02, total_steps)


PIECES = {"accumulate": lambda: Accumulate(2), "clip": lambda: ClipGradients(0.1, log=True), "average": lambda: EMA(0.9),
          "schedule": lambda: BatchSchedule(cycle), "bfloat16": MixedPrecision}
MIXTURES = {" ".join(names): names for count in range(1, 6) for names in combinations(PIECES, count)}
OTHERS = {
    "value": lambda: [ClipGradients(value=0.01)],
    "by tokens": lambda: [Accumulate(2, weight=lambda learn: (learn.labels != 0).sum())],
    "recorded": lambda: [Accumulate(2), ClipGradients(0.1), Recorder("loss", "learning_rate")],
    "plateau": lambda: [EpochSchedule(partial(CosineAnnealingLR, T_max=3)), ClipGradients(0.1), ClipGradients(value=0.01)],
}


def agree(callbacks, dtype=torch.float64, bound=1e-12, column=1e-9):
    "Weights and history with a graph are those without."
    eager, whole = both(lambda *c: learner(*c, model=net(dtype=dtype), data=batches((8, 8, 8, 8, 5), dtype),
                                           validation=batches((8,), dtype, seed=2)), callbacks, epochs=3)
    assert made(whole) >= 1 and gap(eager, whole) < bound
    for row, other in zip(eager.history, whole.history, strict=True):
        assert row.keys() == other.keys()
        assert all(abs(value - other[name]) < column for name, value in row.items())


@pytest.mark.parametrize("name", [name if len(MIXTURES[name]) == 5 else pytest.param(name, marks=pytest.mark.long) for name in MIXTURES])
def test_what_steers_beside_it_does_the_same(name):
    names = MIXTURES[name]
    if "bfloat16" not in names: agree(lambda: [PIECES[each]() for each in names])
    else: agree(lambda: [PIECES[each]() for each in names], torch.float32, 1e-5, 1e-4)  # the same kernels in the same precision


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_what_else_steers_beside_it_does_the_same(name): agree(OTHERS[name])


def test_dropout_draws_the_same_numbers():
    found = []
    for whole in ([], [WholeStep(GRAPH)]):
        learn = learner(*whole, model=net(dropout=0.4))
        torch.manual_seed(5)
        learn.train(3)
        found.append((learn, torch.get_rng_state()))
    assert gap(found[0][0], found[1][0]) < 1e-12
    assert torch.equal(found[0][1], found[1][1])


def test_the_values_of_a_batch_are_those_of_its_step():
    seen = {}
    for name, whole in (("eager", []), ("whole", [WholeStep(GRAPH)])):
        learn = learner(*whole, Metrics(error=F.cross_entropy))
        note = seen[name] = []
        watch(learn, note)
        learn.train(2)
        note += [row["train_error"] for row in learn.history]
    assert len(seen["eager"]) == 26
    assert torch.allclose(*(torch.tensor(values, dtype=torch.float64) for values in seen.values()), rtol=0, atol=1e-12)


def watch(learn, note):
    "Note what hooks of values see, in the order in which they are called."
    learn.on("after_predict", lambda predictions: note.append(predictions.detach().sum().item()))
    learn.on("after_loss", lambda loss, batch_num: note.extend((batch_num, loss.item())))
    learn.on("after_step", lambda learn: note.append(learn.model[0].weight.sum().item()))


def unique_graphs(): return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_ragged_last_batch_goes_without_a_graph_and_is_right_and_said_once(capsys):
    counted = []
    def make(*callbacks):
        learn = learner(*callbacks, data=batches((8, 8, 3)))
        learn.on("after_epoch", lambda: counted.append(unique_graphs()))
        return learn
    eager, whole = both(make, epochs=4)
    graphs = whole_of(whole).graphs
    assert gap(eager, whole) < 1e-12
    assert (len(graphs.compiled), len(graphs.plain), graphs.made, graphs.late, graphs.uncompiled) == (1, 1, 1, 0, 4)
    assert counted[4] == counted[0] + 1 and len(set(counted[4:])) == 1  # as the compiler counts
    whole.train(2)
    said = "WholeStep makes no graph for 3x6 float64 3 int64: it is the last batch of an epoch; such batches are computed without"
    assert capsys.readouterr().out.count(said) == 1 and graphs.uncompiled == 6 and graphs.late == 0


def test_other_shapes_and_dtypes_get_graphs_of_their_own():
    mixed = batches((8, 5)) + [(x, y.int()) for x, y in batches((7, 8))]
    def loss(predictions, labels): return F.cross_entropy(predictions, labels.long())
    eager, whole = both(learner, data=mixed, loss=loss, epochs=3)
    graphs = whole_of(whole).graphs
    assert gap(eager, whole) < 1e-12
    assert graphs.made == 3 and graphs.late == 0
    assert {*graphs.compiled.values()} == {"8x6 float64 8 int64", "5x6 float64 5 int64", "7x6 float64 7 int32"}
    assert [*graphs.plain.values()] == ["8x6 float64 8 int32: it is the last batch of an epoch"]


class Attributes(nn.Module):
    "Calls a function of its own, and has a plain number."
    def __init__(self):
        super().__init__()
        self.function, self.scale = torch.tanh, 1.0
    def forward(self, x): return self.scale * self.function(x)


def at_the_end_of_each_epoch(change):
    def make(*callbacks):
        learn = learner(*callbacks, model=nn.Sequential(*net(), Attributes()))
        learn.on("after_epoch", change)
        return learn
    return make


def test_what_a_model_is_made_of_may_change_and_the_graphs_are_counted(capsys):
    def change(learn):
        learn.model[-1].scale += 0.5
        learn.model[-1].function = [lambda x: x.sin(), lambda x: x * 2][learn.epoch % 2]
        learn.model[1] = nn.Tanh()
    eager, whole = both(at_the_end_of_each_epoch(change), epochs=4)
    assert gap(eager, whole) < 1e-12
    assert made(whole) == 4 and whole_of(whole).graphs.late == 3
    capsys.readouterr()
    whole.explain()
    assert "3 of them after the first epoch" in capsys.readouterr().out


def test_the_compiler_may_forget_everything():
    eager, whole = both(at_the_end_of_each_epoch(lambda: torch._dynamo.reset()), epochs=3)
    assert gap(eager, whole) < 1e-12 and made(whole) == 3


def test_a_version_of_torch_that_hands_on_no_guards_computes_the_same(monkeypatch):
    monkeypatch.setattr("learner.steer.step_graph.guarded", lambda function: [])
    def change(learn): learn.model[-1].scale = 2.0
    eager, whole = both(at_the_end_of_each_epoch(change), epochs=3)
    assert gap(eager, whole) < 1e-12 and made(whole) == 2


@pytest.fixture
def few(monkeypatch): monkeypatch.setattr("learner.steer.whole_step.MOST_GRAPHS", 2)


def test_many_shapes_end_without_more_graphs(few):
    eager, whole = both(learner, data=batches(range(2, 7)), epochs=2)
    graphs = whole_of(whole).graphs
    assert gap(eager, whole) < 1e-12
    assert (graphs.made, len(graphs.plain)) == (2, 3)
    assert [each.partition(": ")[2] for each in graphs.plain.values()] == ["there are 2 graphs already"] * 2 + ["it is the last batch of an epoch"]


def test_a_setting_that_changes_in_every_step_ends_without_a_graph_and_is_right(few):
    def make(*callbacks): return learner(*callbacks, data=batches((8,) * 6), optimiser=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9))
    eager, whole = both(make, lambda: [BatchSchedule(cycle)], epochs=2)
    assert gap(eager, whole) < 1e-12
    assert made(whole) == 2 and not whole_of(whole).graphs.compiled


def test_the_first_beta_of_adam_may_change_without_another_graph():
    eager, whole = both(learner, lambda: [BatchSchedule(cycle)], epochs=3)
    assert gap(eager, whole) < 1e-12
    assert made(whole) == 1


def test_what_thaws_gets_another_graph():
    eager, whole = both(learner, lambda: [FreezeUntil(1, "0")], epochs=3)
    assert gap(eager, whole) < 1e-12
    assert made(whole) == 2


def test_parameters_without_a_gradient_stay_as_they_are():
    def make(*callbacks):
        model = net()
        model.unused = nn.Linear(2, 2).double()
        model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*model[:4]), x)
        return learner(*callbacks, model=model)
    eager, whole = both(make)
    assert gap(eager, whole) < 1e-12
    assert len(whole.optimiser.state) == 4


def test_groups_with_rates_of_their_own():
    def groups(model): return torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[3].parameters()}], lr=0.005)
    eager, whole = both(learner, lambda: [Schedule([lambda t: 0.02 * (1 - t), lambda t: 0.01 * t])], optimiser=groups, epochs=3)
    assert gap(eager, whole) < 1e-12


# Models: right or refused, none wrong.

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(6, 3)
    def forward(self, x): return self.head(self.layer(x[:, None])[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(2, 5, batch_first=True), nn.Linear(5, 3)
    def forward(self, x): return self.head(self.cell(x.view(-1, 3, 2))[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head = nn.Linear(6, 3)
    def forward(self, x): return self.head(self.b(self.a(x).tanh()))


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))
        self.head = nn.Linear(6, 3)
    def forward(self, x):
        self.seen += x.mean(0)
        self.last = x.detach().mean()
        return self.head(x - self.seen / 10)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls, self.head = 0, nn.Linear(6, 3)
    def forward(self, x):
        self.calls += 1
        return self.head(x) * (1 + self.calls % 2)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
    def forward(self, x): return self.head(x) if x.sum() > 0 else self.head(-x)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(2, 5)
        self.head = nn.Linear(5, 3)
    def forward(self, one, other): return {"logits": self.head(self.a(one) + self.b(other))}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
    def forward(self, x): return self.head(x + 0.1 * torch.randn_like(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    def backward(ctx, gradient): return 3 * ctx.saved_tensors[0] * gradient  # its own, on purpose


class OwnGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
    def forward(self, x): return self.head(Square.apply(self.a(x)))


def image(*layers): return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers, nn.Flatten(), nn.LazyLinear(3))


def hooked():
    model = nn.Linear(6, 3)
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def tensor_hooked():
    model = nn.Linear(6, 3)
    model.weight.register_hook(lambda gradient: gradient * 2)
    return model


def first_layers(*layers): return nn.Sequential(*layers, nn.Linear(6, 3))


RIGHT, REFUSED = "right", "refused"
MODELS = {
    "mlp": (lambda: first_layers(nn.Linear(6, 6), nn.GELU()), RIGHT),
    "batch norm": (lambda: first_layers(nn.Linear(6, 6), nn.BatchNorm1d(6)), RIGHT),
    "layer norm": (lambda: first_layers(nn.Linear(6, 6), nn.LayerNorm(6)), RIGHT),
    "group norm": (lambda: first_layers(nn.Linear(6, 6), nn.GroupNorm(2, 6)), RIGHT),
    "rms norm": (lambda: first_layers(nn.Linear(6, 6), nn.RMSNorm(6)), RIGHT),
    "conv": (lambda: image(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((1, 2))), RIGHT),
    "instance norm": (lambda: image(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), RIGHT),
    "attention": (Attention, RIGHT),
    "lstm": (lambda: Recurrent(nn.LSTM), REFUSED),
    "gru": (lambda: Recurrent(nn.GRU), REFUSED),
    "rnn": (lambda: Recurrent(nn.RNN), REFUSED),
    "tied": (Tied, RIGHT),
    "parametrised": (lambda: first_layers(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), RIGHT),
    "spectral norm": (lambda: first_layers(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), RIGHT),
    "orthogonal": (lambda: first_layers(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))), RIGHT),
    "buffers": (WithBuffers, RIGHT),
    "frozen": (lambda: first_layers(nn.Linear(6, 6).requires_grad_(False), nn.Tanh()), RIGHT),
    "noise": (Noisy, RIGHT),
    "own gradient": (OwnGradient, RIGHT),
    "embedding": (lambda: first_layers(Buckets()), RIGHT),
    "sparse": (lambda: first_layers(Buckets(sparse=True)), REFUSED),
    "counting": (Counting, REFUSED),
    "branching": (Branching, REFUSED),
    "hook": (hooked, REFUSED),
    "gradient hook": (tensor_hooked, REFUSED),
}


class Buckets(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.Embedding(10, 6, sparse=sparse)
    def forward(self, x): return self.table((x[:, 0].abs() * 3).long().clamp(max=9)) + x


def trained(make, *callbacks, optimiser, epochs=2):
    torch.manual_seed(0)
    learn = learner(*callbacks, model=make().double(), optimiser=optimiser, data=batches((8, 8, 8, 5)))
    torch.manual_seed(1)
    learn.train(epochs)
    return learn


SHORT = ("batch norm", "tied", "counting")


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in MODELS])
def test_a_model_is_right_or_refused(name):
    make, expected = MODELS[name]
    def sgd(model): return torch.optim.SGD(model.parameters(), 0.05)
    eager = trained(make, optimiser=sgd)
    try: whole = trained(make, WholeStep(GRAPH), optimiser=sgd)
    except CallbackError as error:
        assert expected == REFUSED and "WholeStep cannot" in str(error), error
        return
    assert expected == RIGHT
    assert made(whole) >= 1
    assert gap(eager, whole) < 1e-10


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
    def forward(self, x, labels): return {"loss": F.cross_entropy(self.head(x), labels), "logits": self.head(x)}


def asking(predictions, labels, data, batch_size): return F.cross_entropy(predictions["logits"], labels) + data[1].mean() / batch_size


@pytest.mark.parametrize("kind, loss, form", [(Several, asking, lambda x, y: (x[:, :4], x[:, 4:], y)), (WithLoss, None, lambda x, y: {"x": x, "labels": y})])
def test_several_inputs_and_losses_that_ask_or_come_from_the_model(kind, loss, form):
    torch.manual_seed(0)
    model = kind().double()
    eager, whole = both(lambda *c: learner(*c, model=copy.deepcopy(model), loss=loss, data=[form(x, y) for x, y in batches()]))
    assert made(whole) == 1 and gap(eager, whole) < 1e-12


def test_a_loss_with_parameters_is_trained():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        def forward(self, predictions, labels): return F.cross_entropy(predictions * self.scale, labels)
    found = []
    for whole in ([], [WholeStep(GRAPH)]):
        learn = Learner(net(), torch.optim.Adam, Scaled(), {"train": batches()}, whole, device="cpu")
        learn.train(3, 0.01)
        found.append(learn)
    assert abs(found[0].loss_func.scale - found[1].loss_func.scale) < 1e-12
    assert found[1].loss_func.scale != 1 and gap(*found) < 1e-12


# Refused.

class OwnLoss(Learner):
    def compute_loss(self): self.loss = self.predictions.square().mean()


class Scaling(Callback):
    def after_loss(self, learn): learn.loss = learn.loss * 2


class Silent(Callback):
    def after_backward(self): pass


class Wrapping(Callback):
    def around_backward(self): yield


class Gentler(ClipGradients):
    def before_step(self, learn): pass


class Two(dict):
    "Stands for several optimisers."


REFUSALS = {
    "GradientNorm.before_step": lambda: learner(Recorder("gradient_norm")),
    "Scaling.after_loss": lambda: learner(Scaling()), "Silent.after_backward": lambda: learner(Silent()),
    "Wrapping.around_backward": lambda: learner(Wrapping()), "Gentler": lambda: learner(Gentler()),
    "OwnLoss.compute_loss": lambda: learner(kind=OwnLoss), "float16": lambda: learner(MixedPrecision("float16")),
    "Mixup.loss": lambda: learner(Mixup()), "LBFGS": lambda: learner(optimiser=lambda model: torch.optim.LBFGS(model.parameters())),
    "the compiler says": lambda: learner(optimiser=lambda model: torch.optim.Adafactor(model.parameters())),
    "compiled by itself": lambda: learner(Compile(backend="eager"), model=net()),
    "asks for epoch": lambda: learner(loss=lambda predictions, labels, epoch: F.cross_entropy(predictions, labels)),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_taken_in_is_refused_by_name_before_the_first_step(what):
    learn = REFUSALS[what]()
    learn.add(WholeStep(CAUGHT))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(CallbackError, match="WholeStep cannot (include|make a graph)") as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.train(1)
    assert what in str(raised.value) and "\n" not in str(raised.value)
    assert all(map(torch.equal, before.values(), learn.model.state_dict().values()))
    assert "train_batch" not in vars(learn)
    assert not any(state["step"].item() for state in learn.optimiser.state.values())
    assert not made(learn) and not whole_of(learn).graphs.compiled


def test_a_hook_on_the_optimiser_is_refused():
    learn = learner(WholeStep(CAUGHT))
    learn.optimiser.register_step_post_hook(lambda *_: None)
    with pytest.raises(CallbackError, match="the optimiser has a hook on its step"): learn.train(1)


def test_a_hook_that_cancels_too_late_is_an_error():
    def skip(loss): raise CancelBatchException
    learn = learner(WholeStep(CAUGHT))
    learn.on("after_loss", skip)
    with pytest.raises(CallbackError, match="skip on after_loss cancelled what the graph had already done"): learn.train(1)


def test_a_hook_that_changes_the_loss_too_late_is_an_error():
    learn = learner(WholeStep(CAUGHT))
    learn.on("after_loss", lambda loss: loss.mul_(2))
    with pytest.raises(CallbackError, match=r"changed learn\.loss after the step"): learn.train(1)


def test_gradients_that_were_left_are_an_error():
    learn = learner(WholeStep(CAUGHT))
    def leave(model): model[0].weight.grad = torch.ones_like(model[0].weight)
    learn.on("before_predict", leave)
    with pytest.raises(CallbackError, match="has left gradients behind"): learn.train(1)


def test_a_step_may_be_cancelled_after_it():
    def cancel(): raise CancelStepException
    learn, eager = learner(WholeStep(CAUGHT)), learner()
    for each in (learn, eager):
        each.on("after_step", cancel)
        each.train(1)
    assert gap(learn, eager) < 1e-12


@pytest.mark.parametrize("backend, error", [("inductr", ValueError), (3, TypeError)])
def test_bad_arguments(backend, error):
    with pytest.raises(error, match="WholeStep"): learner(WholeStep(backend)).train(1)


def test_a_callback_that_comes_in_mid_training_is_sorted_too():
    learn = learner(WholeStep(CAUGHT))
    learn.on("after_batch", lambda learn, batch_num: learn.add(Scaling()) if batch_num == 1 else None)
    with pytest.raises(CallbackError, match=r"Scaling\.after_loss"): learn.train(1)
    assert learn.batch_num == 2


# Stops, states, trials.

def stopped_at(place, *callbacks):
    states = []
    learn = learner(*callbacks, data=batches((8, 8, 8, 5)), model=net(dropout=0.3))
    learn.on("after_batch", lambda learn, batch_num: states.append(snapshot(learn.state_dict()))
             if (learn.epoch, batch_num) == place else None)
    torch.manual_seed(7)
    learn.train(3)
    return learn, states[0]


@pytest.mark.parametrize("place", [(1, 1), *(pytest.param((e, b), marks=pytest.mark.long) for e in range(3) for b in range(4))])
def test_a_training_is_resumed_bit_for_bit_and_without_the_graph_too(place):
    def extras(): return [Accumulate(2), EMA(0.9), BatchSchedule(cycle)]
    learn, state = stopped_at(place, *extras(), WholeStep(CAUGHT))
    again = learner(*extras(), WholeStep(CAUGHT), data=batches((8, 8, 8, 5)), model=net(9, dropout=0.3))
    again.train(resume=copy.deepcopy(state))
    assert again.fingerprint()["model"] == learn.fingerprint()["model"]
    assert again.fingerprint()["optimiser"] == learn.fingerprint()["optimiser"]
    without = learner(*extras(), data=batches((8, 8, 8, 5)), model=net(9, dropout=0.3))
    with pytest.warns(UserWarning, match="lacks: WholeStep"): without.train(resume=copy.deepcopy(state))
    assert gap(without, learn) < 1e-12
    eager, state = stopped_at(place, *extras())
    back = learner(*extras(), WholeStep(CAUGHT), data=batches((8, 8, 8, 5)), model=net(9, dropout=0.3))
    back.train(resume=copy.deepcopy(state))
    assert gap(back, eager) < 1e-12


def test_a_scalar_in_float64_is_refused_since_the_compiler_loses_what_is_written():
    model = net()
    model.register_buffer("seen", torch.zeros((), dtype=torch.float64))
    with pytest.raises(CallbackError, match=r"model\.seen has a scalar in float64"): learner(WholeStep(GRAPH), model=model).train(1)


def test_an_interrupt_stops_after_a_batch_and_training_goes_on_from_there():
    learn, straight = learner(WholeStep(CAUGHT)), learner(WholeStep(CAUGHT))
    learn.on("after_batch", press := lambda batch_num: signal.raise_signal(signal.SIGINT) if batch_num == 1 else None)
    with pytest.raises(KeyboardInterrupt): learn.train(2)
    assert "train_batch" not in vars(learn)
    learn.remove(press)
    learn.train(resume=True)
    straight.train(2)
    assert learn.fingerprint()["model"] == straight.fingerprint()["model"]


def test_an_error_is_gone_back_on_with_copies_in_memory():
    learn, straight = learner(WholeStep(CAUGHT), Rewind(1)), learner(WholeStep(CAUGHT))
    def fail(learn, batch_num):
        if (learn.epoch, batch_num) == (1, 1): raise OSError("once")
    learn.on("after_step", fail)
    with pytest.raises(OSError): learn.train(2)
    learn.remove(fail)
    learn.train(resume=True)
    straight.train(2)
    assert learn.fingerprint()["model"] == straight.fingerprint()["model"]


def test_fingerprints_of_two_trainings_agree():
    found = []
    for _ in range(2):
        learn = learner(WholeStep(CAUGHT), prints := Fingerprints())
        torch.manual_seed(1)
        learn.train(2)
        found.append(list(prints.records))
    assert found[0] and found[0] == found[1]


def test_a_trial_stands_aside_and_leaves_no_trace():
    learn, eager = learner(WholeStep(CAUGHT)), learner()
    before = learn.fingerprint()
    found, plain = (each.lr_find(1e-4, 1.0, steps=8) for each in (learn, eager))
    assert found.losses == plain.losses and len(found.losses) > 3
    assert learn.fingerprint() == before and made(learn) == 0


def test_a_graph_serves_the_next_training_too():
    learn = learner(WholeStep(CAUGHT))
    learn.train(1)
    learn.train(2, learning_rate=0.5)
    assert made(learn) == 1
    eager = learner()
    eager.train(1)
    eager.train(2, learning_rate=0.5)
    assert gap(learn, eager) < 1e-12


def test_a_validation_in_the_middle_and_a_test_are_eager_and_right():
    eager, whole = both(learner, lambda: [Metrics(error=F.cross_entropy)], validation=batches((8, 3), seed=4), test=batches((4,), seed=5))
    for row, other in zip(eager.history, whole.history, strict=True):
        assert all(abs(value - other[column]) < 1e-12 for column, value in row.items())


# What it says.

def test_explain_shows_where_everything_is(capsys):
    learn = learner(WholeStep(CAUGHT), ClipGradients(), EMA(), Metrics(error=F.cross_entropy), data=batches((8, 8, 3)))
    learn.on("before_predict", lambda learn: None)
    learn.train(2)
    capsys.readouterr()
    learn.explain()
    said = capsys.readouterr().out
    for line in ("outside  Metrics(error): no hook in these stages", "inside   ClipGradients.before_backward, before_step, after_step",
                 "after    EMA.after_step", "before   <lambda> on before_predict", "graph    8x6 float64 8 int64", "1 compiled in",
                 "eager    3x6 float64 3 int64: it is the last batch of an epoch", "batches computed without the compiler: 2"):
        assert f"  {line}" in said, line


def test_explain_shows_what_would_be_refused(capsys):
    learner(WholeStep(CAUGHT), Recorder("gradient_norm")).explain()
    assert "refused  GradientNorm.before_step: it asks for optimiser" in capsys.readouterr().out


def test_a_short_training_pays_for_no_graph(capsys):
    eager, whole = both(learner, backend="auto")
    assert made(whole) == 0 and gap(eager, whole) == 0
    assert "WholeStep stands aside: 6 batches would save about 480 µs" in capsys.readouterr().out
    assert too_short(100_000_000, 4) == ""


def test_a_contribution_of_ones_own():
    class Signs(Callback):
        def before_step(self, model):
            for parameter in model.parameters(): parameter.grad.sign_()
        def in_graph(self): return InGraph(gradients=lambda found: ([g.sign() for g in found], None))
    eager, whole = both(learner, lambda: [Signs()])
    assert [v.where for v in SortedHooks(whole).verdicts] == ["inside"]
    assert gap(eager, whole) < 1e-12


def test_it_leaves_a_cancelled_training_whole():
    def end(batch_num):
        if batch_num == 1: raise CancelTrainException
    learn = learner(WholeStep(CAUGHT))
    learn.on("after_batch", end)
    learn.train(3)
    assert "train_batch" not in vars(learn) and len(learn.history) == 1


# With the compiler's own code.

TWICE = """
import torch
from torch import nn
from learner.loop.learner import Learner
from learner.steer.whole_step import WholeStep
model, data = nn.Linear(6, 3), [(torch.ones(8, 6), torch.zeros(8).long())] * 3
learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), nn.functional.cross_entropy, {"train": data}, WholeStep("inductor"), device="cpu")
learn.train(1)
learn.explain()
"""


def test_a_second_process_takes_the_graph_from_the_disk(tmp_path):
    said = [subprocess.run([sys.executable, "-c", TWICE], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, check=True,
                           capture_output=True, text=True).stdout for _ in range(2)]
    assert "cache" not in said[0] and re.search(r"1 compiled in \S+ m?s\n", said[0])
    assert re.search(r"float32 8 int64 \.\.\. \S+ m?s from the cache\n", said[1])
    assert re.search(r"1 compiled in \S+ m?s, 1 of them from the cache on the disk\n", said[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long) for name in ("momentum", "AdamW", "RMSprop", "NAdam")])
def test_five_hundred_steps_end_where_eager_training_ends(name, dtype):
    def make(*callbacks, order=tuple(range(8))):
        data = [(x[[*order]], y[[*order]]) for x, y in batches((8,) * 50, dtype)]
        return learner(*callbacks, model=net(dtype=dtype), data=data, optimiser=lambda model: OPTIMISERS[name](model.parameters()))
    def extras(): return [ClipGradients(0.5), BatchSchedule(cosine)]
    eager, whole = both(make, extras, epochs=10, backend="inductor")
    assert made(whole) == 1 and whole_of(whole).graphs.late == 0
    if dtype is torch.float64: bound = 1e-6 if name == "NAdam" else 1e-10
    else:  # as far as sums in another order bring eager training
        others = [make(*extras(), order=order) for order in (range(7, -1, -1), (3, 1, 0, 2, 7, 5, 6, 4))]
        for other in others: other.train(10)
        bound = 5 * max(gap(eager, other) for other in others)
    assert gap(eager, whole) < bound < 1e-3


def cosine(optimiser, T_max): return CosineAnnealingLR(optimiser, T_max)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_right_or_refused_with_the_compilers_own_code(name):
    def sgd(model): return torch.optim.SGD(model.parameters(), 0.05)
    eager = trained(MODELS[name][0], optimiser=sgd)
    try: whole = trained(MODELS[name][0], WholeStep("inductor"), optimiser=sgd)
    except CallbackError as error:
        assert MODELS[name][1] == REFUSED, error
        return
    assert MODELS[name][1] == RIGHT
    assert gap(eager, whole) < 1e-10


@pytest.mark.long
def test_dropout_draws_the_same_numbers_with_the_compilers_own_code():
    found = []
    for whole in ([], [WholeStep("inductor")]):
        learn = learner(*whole, model=net(dropout=0.4))
        torch.manual_seed(5)
        learn.train(3)
        found.append((learn, torch.get_rng_state()))
    assert gap(found[0][0], found[1][0]) < 1e-12
    assert torch.equal(found[0][1], found[1][1])


# What a CUDA graph asks for, with a stand-in on the CPU.

class Recording:
    """Reuses the memory of what it gives, as a CUDA graph does.

    It checks what torch asks for: what stays in place does so, and nothing else is written to.
    """

    def __init__(self, graph, inputs):
        self.graph, self.given, self.places, self.replays = graph, [], {}, 0
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.static = ["_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) for node in nodes]

    def __call__(self, *inputs):
        before = [tensor._version for tensor in inputs]
        results = self.graph(*inputs)
        for i, (tensor, version) in enumerate(zip(inputs, before, strict=True)):
            if self.static[i]: assert self.places.setdefault(i, tensor.data_ptr()) == tensor.data_ptr()
            else: assert tensor._version == version
        with torch.no_grad():
            self.given = self.given or [torch.empty_like(result) for result in results]
            for place, result in zip(self.given, results, strict=True): place.copy_(result)
        self.replays += 1
        return tuple(self.given)


@pytest.fixture
def recordings(monkeypatch):
    "The recordings that the backend `recording` has made, on a device that passes for a GPU."
    made, plain = [], torch._dynamo.lookup_backend
    def backend(graph, inputs):
        made.append(Recording(graph, inputs))
        return made[-1]
    def records(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.records = True
    begin = Compiled.__init__
    monkeypatch.setattr(Compiled, "__init__", records)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend if name == CAUGHT else plain(name))
    return made


@pytest.mark.parametrize("callbacks", [list, lambda: [Accumulate(2), ClipGradients(0.1, log=True), EMA(0.9), BatchSchedule(cycle)]])
def test_what_a_recording_gives_is_copied_out_and_only_what_stays_is_written_to(recordings, callbacks):
    kept = {}
    def make(*parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        learn = learner(*parts, model=model)
        values = kept.setdefault(len(kept), [])
        learn.on("after_batch", lambda predictions, loss: values.append((predictions, loss)))
        return learn
    eager, whole = both(make, callbacks, epochs=3, backend=CAUGHT)
    assert gap(eager, whole) < 1e-12
    assert recordings and sum(each.replays for each in recordings) == 9
    for ours, theirs in zip(kept[0], kept[1], strict=True):  # all that were kept, not only the last
        assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(ours, theirs, strict=True))


def test_a_step_that_torch_does_not_record_is_said(monkeypatch, capsys):
    begin = Compiled.__init__
    monkeypatch.setattr(Compiled, "__init__", lambda self, function, backend, on_gpu: begin(self, function, backend, True))
    eager, whole = both(learner, backend="inductor")  # on the CPU there are no CUDA graphs
    assert gap(eager, whole) < 1e-12
    assert "torch has not recorded this step as a CUDA graph" in capsys.readouterr().out


def test_counts_move_beside_their_parameters_and_back():
    optimiser = torch.optim.Adam([nn.Parameter(torch.ones(2, device="meta")), nn.Parameter(torch.ones(2, device="meta"))])
    for parameter in optimiser.param_groups[0]["params"]: optimiser.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}
    assert place_counts(optimiser, True) and not place_counts(optimiser, True)
    assert {entries["step"].device.type for entries in optimiser.state.values()} == {"meta"}
    assert {entries["exp_avg"].device.type for entries in optimiser.state.values()} == {"cpu"}


def test_a_learning_rate_on_the_cpu_is_filled_in_since_a_copy_would_wait():
    class Filled(torch.Tensor):
        def copy_(self, *args): raise AssertionError("a copy between devices waits")
    dial = Dial(torch.device("cpu"))
    dial.tensor = dial.tensor.as_subclass(Filled)
    assert dial.set(torch.tensor(0.5)).item() == 0.5 and dial.value == 0.5


# On a GPU: written without one at hand.

def on_gpu(*callbacks):
    torch.manual_seed(0)
    model = net(dtype=torch.float32)
    data = [(x.cuda(), y.cuda()) for x, y in batches((8,) * 50, torch.float32)]
    return Learner(model, adam(model), F.cross_entropy, {"train": data}, callbacks, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("callbacks", [list, lambda: [Accumulate(2), ClipGradients(0.5), EMA(0.9), BatchSchedule(cosine)], lambda: [MixedPrecision()]])
def test_on_a_gpu_it_is_right_and_waits_for_nothing(callbacks, capsys):
    found = [on_gpu(*callbacks()), on_gpu(*callbacks(), WholeStep("inductor"))]
    for learn in found:  # the first epoch compiles and records
        learn.on("before_batch", lambda learn: torch.cuda.set_sync_debug_mode("error" if learn.epoch else "default"))
        learn.on("after_batch", lambda: torch.cuda.set_sync_debug_mode("default"))
        try: learn.train(5)
        finally: torch.cuda.set_sync_debug_mode("default")
    assert gap(*found) < 1e-2 and whole_of(found[1]).graphs.late == 0
    assert "has not recorded" not in capsys.readouterr().out
    assert all(entry["step"].device.type == "cpu" for entry in found[1].optimiser.state.values())


@pytest.mark.gpu
def test_on_a_gpu_a_training_goes_on_with_the_graph_and_without():
    learn, again, without = on_gpu(WholeStep("inductor")), on_gpu(WholeStep("inductor")), on_gpu()
    states = []
    learn.on("after_batch", lambda learn, batch_num: states.append(snapshot(learn.state_dict()))
             if (learn.epoch, batch_num) == (1, 20) else None)
    learn.train(2)
    for other in (again, without): other.train(resume=copy.deepcopy(states[0]))
    assert gap(learn, again) < 1e-5 and gap(learn, without) < 1e-3


def test_nothing_grows_from_step_to_step():
    marks = []
    def mark(learn):
        if learn.batch_num not in (50, 250): return
        gc.collect()
        marks.append(tracemalloc.get_traced_memory()[0])
    learn = learner(WholeStep(CAUGHT), data=batches((8,) * 251))
    learn.on("after_batch", mark)
    tracemalloc.start()
    try: learn.train(1)
    finally: tracemalloc.stop()
    assert (marks[1] - marks[0]) / 200 < 500, marks  # bytes a step
