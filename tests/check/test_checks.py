"""The checks against hand-made faults, what they leave behind, and the guard against NaN."""
import functools
import gc
import math
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.check.checks import gradient_flow, initial_loss, overfit_one_batch
from learner.check.diagnosis import doctor
from learner.check.findings import Finding, Findings, fault, in_one_line, passed, skipped
from learner.check.forward import forward_pass
from learner.check.leakage import batch_leakage
from learner.check.looking import loss_kind, tensors_in
from learner.check.nan_guard import NaNGuard, NonFiniteError
from learner.check.survey import data as survey
from learner.check.trials import short_trainings
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.steer.accumulate import Accumulate
from learner.steer.precision import MixedPrecision
from learner.steer.update import ClipGradients


def batch(n=16, features=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator), torch.randint(classes, (n,), generator=generator)


def learner(model, batches=None, loss_func=F.cross_entropy, **loaders):
    loaders = {"train": [batch(seed=i) for i in range(3)] if batches is None else batches, **loaders}
    trained = list(model.parameters())
    return Learner(model, torch.optim.SGD(trained, lr=0.1), loss_func, loaders, device="cpu")


# Findings

def test_findings_are_true_if_all_is_well():
    one, two, three = passed("a", "fine"), fault("b", "bad; repair it", count=3), skipped("c", "no")
    assert one and not two and three and three.skipped
    assert Findings([one, three]) and not Findings([one, two]) and Findings()
    assert Findings([one, two, three]).problems == (two,)
    assert Findings([one, two])["b"] is two and Findings([one, two])[0] is one
    assert repr(Findings([one, two, three])) == "✓ a: fine\n✗ b: bad; repair it\n? c: skipped: no"
    with pytest.raises(KeyError, match="no finding is called 'd'"): Findings([one])["d"]
    with pytest.raises(AttributeError): one.ok = False  # frozen
    assert one == Finding("a", True, "fine")
    assert Findings([one, two]).names == ["a", "b"]


def test_an_error_in_one_line():
    error = ValueError("bad\nand more")
    error.add_note("in Metrics.after_loss\n(more)")
    assert in_one_line(error) == "ValueError: bad, in Metrics.after_loss" and in_one_line(KeyError()) == "KeyError: no message"


def test_tensors_are_found_by_their_place():
    t = torch.zeros(2)
    tree = {"a": [t, (t,)], "b": SimpleNamespace(c=t, d=None)}
    assert list(tensors_in(tree, "data")) == ["data['a'][0]", "data['a'][1][0]", "data['b'].c"]
    assert tensors_in(3) == {}


# Leaks: a module, whether it leaks in training and in evaluation, and where

class Fn(nn.Module):
    "A model of one linear layer after a function, or before it."
    def __init__(self, function, after=False):
        super().__init__()
        self.layer, self.function, self.after = nn.Linear(6, 3), function, after

    def forward(self, *args, **kwargs):
        return self.function(self.layer(*args)) if self.after else self.layer(self.function(*args, **kwargs))


def fn(function, after=False): return lambda: Fn(function, after)


class Sequence(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(6, 3)

    def forward(self, x):
        x = x.unsqueeze(1).expand(-1, 4, -1) + torch.arange(4.0).view(1, 4, 1)
        out = self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


class Embedded(nn.Module):
    "Whole numbers in, by a function of them or of what they are embedded as."
    def __init__(self, on_tokens=lambda t: t, on_vectors=lambda v: v):
        super().__init__()
        self.embed, self.head, self.on_tokens, self.on_vectors = nn.Embedding(9, 6), nn.Linear(6, 3), on_tokens, on_vectors

    def forward(self, tokens): return self.head(self.on_vectors(self.embed(self.on_tokens(tokens))).mean(1))


def token_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(9, (16, 5), generator=generator), torch.randint(3, (16,), generator=generator)


def roll_half(x): return torch.cat([x[:8], x[:8]])


NEITHER, BOTH, EVALUATION = [], ["training", "evaluation"], ["evaluation"]
LEAKS = {
    "linear": (fn(lambda x: x), NEITHER, None),
    "view that keeps rows": (fn(lambda x: x.view(16, 2, 3).reshape(16, 6)), NEITHER, None),
    "view across rows": (fn(lambda x: x.view(6, 16).t()), BOTH, "layer"),
    "reshape of a transposed": (fn(lambda x: x.t().reshape(16, 6)), BOTH, "layer"),
    "cat of halves": (fn(roll_half), BOTH, "layer"),
    "cat of features": (fn(lambda x: torch.cat([x[:, 3:], x[:, :3]], 1)), NEITHER, None),
    "stack": (fn(lambda x: torch.stack([x, x.roll(1, 0)]).mean(0)), BOTH, "layer"),
    "mean over axis 0": (fn(lambda x: x - x.mean(0)), BOTH, "layer"),
    "mean over axis 1": (fn(lambda x: x - x.mean(1, keepdim=True)), NEITHER, None),
    "softmax over axis 0": (fn(lambda x: x.softmax(0), after=True), BOTH, ""),
    "softmax over axis 1": (fn(lambda x: x.softmax(1), after=True), NEITHER, None),
    "the first example only": (fn(lambda x: x - x[:1]), BOTH, "layer"),
    "cumulative sum": (fn(lambda x: x.cumsum(0)), BOTH, "layer"),
    "sort of the batch": (fn(lambda x: x.sort(0).values), BOTH, "layer"),
    "detached mean": (fn(lambda x: x - x.mean(0).detach()), BOTH, "layer"),
    "argmax over axis 0": (fn(lambda x: x + x.argmax(0).float()), BOTH, "layer"),
    "attention, batch first": (lambda: Sequence(nn.MultiheadAttention(6, 2, batch_first=True)), NEITHER, None),
    "attention, batch second": (lambda: Sequence(nn.MultiheadAttention(6, 2)), BOTH, "inner"),
    "encoder, batch second": (lambda: Sequence(nn.TransformerEncoderLayer(6, 2, 8, 0.1)), BOTH, None),
    "lstm, batch first": (lambda: Sequence(nn.LSTM(6, 6, batch_first=True)), NEITHER, None),
    "lstm, batch second": (lambda: Sequence(nn.LSTM(6, 6)), BOTH, "inner"),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), NEITHER, None),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), NEITHER, None),
    "batch norm and a mean": (lambda: nn.Sequential(nn.BatchNorm1d(6), Fn(lambda x: x - x.mean(0))), BOTH, "1.layer"),
    "batch norm without statistics": (lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)), EVALUATION, "0"),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), NEITHER, None),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks(name):
    make, modes, place = LEAKS[name]
    torch.manual_seed(0)
    finding = batch_leakage(learner(make(), [batch()]))["batch leak"]
    assert not finding.skipped, finding
    assert finding.ok == (not modes), finding
    if modes:
        assert finding.values["modes"] == modes and all(i != j for i, j in finding.values["pairs"])
        if place is not None: assert finding.values["module"] == place, finding


INTEGER_LEAKS = {
    "embedding": (lambda: Embedded(), False),
    "roll of tokens": (lambda: Embedded(lambda t: t.roll(1, 0)), True),
    "sorted tokens": (lambda: Embedded(lambda t: t.sort(0).values), True),
    "sorted along the sequence": (lambda: Embedded(lambda t: t.sort(1).values), False),
    "mean of vectors": (lambda: Embedded(on_vectors=lambda v: v - v.mean(0)), True),
    "reshape of vectors": (lambda: Embedded(on_vectors=lambda v: v.transpose(0, 1).reshape(v.shape)), True),
    "gru, batch second": (lambda: GruOf(), True),
}


class GruOf(Embedded):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 6)

    def forward(self, tokens): return self.head(self.gru(self.embed(tokens))[0].mean(1))


@pytest.mark.parametrize("name", INTEGER_LEAKS)
def test_leaks_through_whole_numbers(name):
    make, leaks = INTEGER_LEAKS[name]
    torch.manual_seed(0)
    assert batch_leakage(learner(make(), [token_batch()]))["batch leak"].ok == (not leaks)


def test_leaks_with_several_inputs_and_mappings():
    class Two(nn.Module):
        def __init__(self, mix):
            super().__init__()
            self.layer, self.mix = nn.Linear(12, 3), mix

        def forward(self, a, b): return self.layer(torch.cat([a, self.mix(b)], 1))

    x, y = batch()
    for mix, ok in ((lambda b: b, True), (lambda b: b - b.mean(0), False), (lambda b: b.flip(0), False)):
        assert batch_leakage(learner(Two(mix), [(x, x + 1, y)]))["batch leak"].ok == ok
        assert batch_leakage(learner(Two(mix), [{"a": x, "b": x + 1, "labels": y}]))["batch leak"].ok == ok

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x, labels):
            logits = self.layer(x - x.mean(0))
            return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))
    assert not batch_leakage(learner(Output(), [{"x": x, "labels": y}], None))


def test_which_examples_leak_and_in_which_direction():
    assert batch_leakage(learner(Fn(lambda x: x.roll(1, 0)), [batch()]))[0].values["pairs"] == [
        (0, 15), (1, 0), (8, 7), (14, 13), (15, 14)]
    message = batch_leakage(learner(Fn(lambda x: x.cumsum(0)), [batch()]))[0].message
    assert "only examples before it count" in message
    assert "before `layer` (Linear)" in message
    assert "batch_first=True" in batch_leakage(learner(LEAKS["lstm, batch second"][0](), [batch()]))[0].message


def test_batch_norm_is_named_as_allowed():
    finding = batch_leakage(learner(LEAKS["batch norm"][0](), [batch()]))[0]
    assert finding.ok and "as it is meant to: 1" in finding.message and finding.values["norms"] == ["1"]

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("m", torch.zeros(6))
            self.register_buffer("v", torch.ones(6))

        def forward(self, x): return self.layer(F.batch_norm(x, self.m, self.v, training=self.training))
    assert batch_leakage(learner(Functional(), [batch()]))


def test_leaks_that_cannot_be_looked_for():
    for model, data, why in (
        (Fn(lambda x: x), [batch(1)], "a single example"),
        (Fn(lambda x: x.sum(0, keepdim=True).expand(4, -1), after=True), [batch()], "one row for each"),
        (Fn(lambda x: x * torch.nan), [batch()], "not finite"),
    ):
        finding = batch_leakage(learner(model, data))[0]
        assert finding.skipped and finding.ok and why in finding.message


# One batch, first loss

def test_overfit_one_batch():
    torch.manual_seed(0)
    def net(*more): return nn.Sequential(nn.Linear(6, 30), nn.ReLU(), *more, nn.Linear(30, 3))
    finding = overfit_one_batch(learner(net(nn.Dropout(0.9))), steps=300, learning_rate=0.5)[0]
    assert finding.ok and len(finding.values["losses"]) == 300 and finding.values["losses"][-1] < 0.2
    assert not overfit_one_batch(learner(net()), steps=20, learning_rate=1e-6)
    wild = overfit_one_batch(learner(net(), loss_func=lambda p, y: F.cross_entropy(p, y) * torch.inf), steps=5)[0]
    assert not wild and "NaN" in wild.message
    for wrong in (0, 2.5, "a"):
        with pytest.raises(ValueError, match="steps is"): overfit_one_batch(learner(net()), steps=wrong)


KINDS = [
    (F.cross_entropy, (8, 5), "class", "cross entropy"), (nn.CrossEntropyLoss(label_smoothing=0.1), (8, 5), "class", "cross entropy"),
    (functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 2, 3, 4, 5])), (8, 5), "class", "cross entropy"),
    (lambda p, y: F.cross_entropy(p.flatten(0, 1), y.flatten()), (8, 4, 5), "tokens", "cross entropy"),
    (F.nll_loss, (8, 5), "class", "log likelihood"), (F.cross_entropy, (8, 5), "one hot", "cross entropy"),
    (F.binary_cross_entropy_with_logits, (8, 1), "same", "binary"), (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), (8, 4), "same", "binary"),
    (F.binary_cross_entropy, (8, 1), "same", "binary of probabilities"), (F.mse_loss, (8, 1), "same", "regression"),
    (F.l1_loss, (8, 3), "same", "regression"), (F.smooth_l1_loss, (8,), "same", "regression"), (lambda p, y: p.sum() + 7, (8, 5), "class", ""),
]


@pytest.mark.parametrize("loss, shape, labels, kind", KINDS)
def test_kinds_of_loss(loss, shape, labels, kind):
    labels = {"class": torch.arange(8) % 5, "tokens": torch.zeros(8, 4, dtype=torch.int64), "same": torch.rand(shape).round(),
              "one hot": F.one_hot(torch.arange(8) % 5, 5).float()}[labels]
    assert loss_kind(loss, torch.rand(shape), labels)[0] == kind
    assert loss_kind(None, torch.rand(shape), labels)[0] == ""


def test_first_loss():
    torch.manual_seed(0)
    net, sure = nn.Linear(6, 3), nn.Linear(6, 3)
    nn.init.normal_(sure.weight, std=20)
    finding = initial_loss(learner(net))[0]
    x, y = zip(*[batch(seed=i) for i in range(3)], strict=True)
    assert finding.ok and finding.values["expected"] == pytest.approx(math.log(3))
    assert finding.values["loss"] == pytest.approx(F.cross_entropy(net(torch.cat(x)), torch.cat(y)).item(), rel=1e-5)
    assert not initial_loss(learner(sure))
    binary = [(x, (y > 0).float()[:, None]) for x, y in (batch(), batch(seed=1))]
    assert initial_loss(learner(nn.Linear(6, 1), binary, F.binary_cross_entropy_with_logits))[0].values["expected"] == pytest.approx(math.log(2))
    assert initial_loss(learner(nn.Linear(6, 1), binary, F.mse_loss))[0].skipped
    assert not initial_loss(learner(nn.Linear(6, 1), [(batch()[0], torch.zeros(16, dtype=torch.int64))]))


# Gradients

class Parts(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(2, 2)
        self.run = forward

    def forward(self, x): return self.run(self, x)


def test_gradient_flow_tells_the_reasons_apart():
    torch.manual_seed(0)
    model = Parts(lambda m, x: m.c(m.b(m.a(x).tanh().detach()).tanh()))
    model.b.requires_grad_(False)
    learn = learner(model)
    learn.optimiser = torch.optim.SGD([*model.a.parameters(), *model.b.parameters(), *model.unused.parameters(), model.c.weight], lr=0.1)
    findings = gradient_flow(learn)
    parameters = {finding.name: finding.values.get("parameters") for finding in findings.problems}
    assert parameters == {"frozen": ["b.weight", "b.bias", "c.bias"], "unused parameters": ["unused.weight", "unused.bias"],
                          "no gradient": ["a.weight", "a.bias"]}
    assert "requires_grad" in findings["frozen"].message and "optimiser" in findings["frozen"].message


def test_zero_gradients_are_those_that_stay_zero():
    dead = Parts(lambda m, x: m.c(m.b(m.a(x)).relu()))
    nn.init.constant_(dead.b.bias, -100.0)
    zero = gradient_flow(learner(dead))["zero gradient"]
    assert zero.values["parameters"] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    begins = Parts(lambda m, x: m.c(m.b(m.a(x)).tanh()))  # a last layer of zeros gives no gradient in the first step only
    nn.init.zeros_(begins.c.weight)
    assert gradient_flow(learner(begins))["zero gradient"]


def test_vanishing_gradients():
    torch.manual_seed(0)
    def deep(act, n): return nn.Sequential(*(layer for _ in range(n) for layer in (nn.Linear(6, 6), act())), nn.Linear(6, 3))
    assert not gradient_flow(learner(deep(nn.Sigmoid, 12)))["vanishing gradient"]
    assert gradient_flow(learner(deep(nn.ReLU, 2)))["vanishing gradient"]
    assert gradient_flow(learner(nn.Linear(6, 3)))["vanishing gradient"].skipped


def test_attention_is_not_called_unused():
    findings = gradient_flow(learner(Sequence(nn.MultiheadAttention(6, 2, batch_first=True))))
    assert findings["unused parameters"] and findings["no gradient"] and findings["zero gradient"]


# Data

def data(n=96, seed=0): return [tuple(t[i:i + 16] for t in batch(n, seed=seed)) for i in range(0, n, 16)]


def changed(change, n=96): return [change(x.clone(), y.clone()) for x, y in data(n)]


def problem(name, train=None, validation=None, model=None, loss=F.cross_entropy, **kwargs):
    torch.manual_seed(0)
    learn = learner(model or nn.Linear(6, 3), train or data(), loss, validation=validation or data(64, 1), **kwargs)
    return survey(learn)[name]


def with_nan(x, y):
    x[2] = torch.inf
    return x, y


DATA = [  # name, arguments, part of the message
    ("finite data", dict(train=changed(with_nan)), "6 of 96 examples have NaN or infinity in data, first in train batch 0"),
    ("finite data", dict(validation=[(x, y * torch.nan) for x, y in data(64, 1)], model=nn.Linear(6, 1), loss=lambda p, y: F.mse_loss(p[:, 0], y.float())), "labels have NaN"),
    ("constant input", dict(train=changed(lambda x, y: (x * 0 + 3, y))), "the same in all 96"),
    ("constant input", dict(train=changed(lambda x, y: (x[:, :1].expand(-1, 6), y))), "one value throughout"),
    ("input scale", dict(train=changed(lambda x, y: (x * 50, y))), "what reaches the model (Linear)"),
    ("input scale", dict(train=changed(lambda x, y: (x / 1000, y))), "deviation 0.001"),
    ("preprocessing", dict(validation=[(x + 3, y) for x, y in data(64, 1)]), "in validation; treat both alike"),
    ("label range", dict(train=changed(lambda x, y: (x, y + 1))), "labels go from 1 to 3, and the model has outputs 0 to 2; subtract 1"),
    ("label range", dict(model=nn.Linear(6, 2)), "give the model 3 outputs"),
    ("label range", dict(train=changed(lambda x, y: (x, y - 1))), "map them"),
    ("label range", dict(train=changed(lambda x, y: (x, y.float()[:, None])), validation=[(x, y.float()[:, None]) for x, y in data()], model=nn.Linear(6, 1), loss=F.binary_cross_entropy_with_logits), "0 to 1"),
    ("label values", dict(train=changed(lambda x, y: (x, y * 0 + 2))), "all 96 labels are 2"),
    ("label values", dict(train=changed(lambda x, y: (x, y % 2))), "labels never occur in training: 2"),
    ("label order", dict(train=[tuple(t[i:i + 16] for t in (batch(96)[0], batch(96)[1].sort().values)) for i in range(0, 96, 16)]), "single class"),
    ("outputs", dict(model=nn.Linear(6, 4)), "1 of 4 outputs have no example: 3; give the model 3"),
    ("overlap", dict(validation=[*data(64, 1), data()[0]]), "16 of 80 validation examples (20%) are in train"),
]


@pytest.mark.parametrize("name, options, part", DATA)
def test_faults_of_data(name, options, part):
    assert problem(name).ok
    finding = problem(name, **options)
    assert not finding.ok and part in finding.message, finding


def test_what_is_no_fault_of_the_data():
    normed = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    assert problem("input scale", train=changed(lambda x, y: (x * 50, y)), model=normed)
    assert problem("label range", train=changed(lambda x, y: (x, torch.where(y == 0, -100, y))))  # torch's own number to leave out
    repeated = [(x.sign().clamp(min=0), y) for x, y in data()]  # 64 different inputs at most
    assert problem("overlap", train=repeated, validation=repeated)
    assert not problem("contradictions", train=[*data(), *((x, (y + 1) % 3) for x, y in data()[:2])])
    assert survey(learner(nn.Linear(6, 3)))  # a single loader


def test_data_is_seen_as_callbacks_leave_it():
    class Normalise(Callback):
        def after_prepare(self, learn): learn.data = learn.data / 50

    learn = learner(nn.Linear(6, 3), changed(lambda x, y: (x * 50, y)))
    assert not survey(learn)["input scale"]
    learn.add(Normalise())
    assert survey(learn)["input scale"]
    with pytest.raises(ValueError, match="examples is 0"): survey(learn, examples=0)


def test_a_part_of_the_data_is_enough():
    finding = survey(learner(nn.Linear(6, 3)), examples=20)
    assert finding["outputs"].skipped  # not all was seen


# No trace: every check and the doctor

CHECKS = [batch_leakage, overfit_one_batch, initial_loss, gradient_flow, survey, forward_pass,
          functools.partial(short_trainings, steps=15), functools.partial(doctor, steps=15, report=False)]


class Counts(Callback):
    "Steers and has state of its own."
    def __init__(self): self.steps = 0
    def after_step(self): self.steps += 1


class Looks(Callback):
    watches = True
    def __init__(self): self.seen = 0
    def after_loss(self): self.seen += 1


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: getattr(check, "__name__", getattr(getattr(check, "func", None), "__name__", "")))
@pytest.mark.parametrize("own_loaders", [False, True])
def test_a_check_leaves_no_trace(check, own_loaders):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    train, validation = batch(96), batch(48, seed=1)
    if own_loaders: loaders = DataLoaders.from_tensors(train, validation, batch_size=16)
    else:
        generator = torch.Generator().manual_seed(1)
        loaders = {"train": DataLoader(TensorDataset(*train), 16, shuffle=True, generator=generator),
                   "validation": DataLoader(TensorDataset(*validation), 16, shuffle=True)}  # draws from the global generator
    counts, looks = Counts(), Looks()
    learn = Learner(model, torch.optim.AdamW(model.parameters(), lr=0.01), F.cross_entropy, loaders, [counts, looks], device="cpu")
    learn.train(2)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[4].weight.grad = torch.full_like(model[4].weight, 0.5)
    random.seed(1), np.random.seed(1)

    def state():
        optimiser = learn.optimiser.state_dict()
        tensors = [value.clone() for value in model.state_dict().values()]
        tensors += [value.clone() for one in optimiser["state"].values() for value in one.values()]
        tensors += [torch.get_rng_state(), model[4].weight.grad.clone()]
        if not own_loaders: tensors.append(generator.get_state())
        return tensors, (
            random.getstate(), str(np.random.get_state()), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [p.grad is None for p in model.parameters()], str(optimiser["param_groups"]), learn.history.rows.copy(), learn.callbacks, counts.steps,
            looks.seen, learn.phase, learn.epoch, learn.batch_num, learn.is_running, sorted(vars(learn)), learn.results, learn.times.keys(), list(loaders),
            [loader.epoch for loader in loaders.values()] if own_loaders else None,
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        )

    (before, plain_before), parts = state(), (learn.model, learn.optimiser, learn.dataloaders, learn.history)
    check(learn)
    after, plain_after = state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert plain_before == plain_after
    assert all(a is b for a, b in zip(parts, (learn.model, learn.optimiser, learn.dataloaders, learn.history), strict=True))


@pytest.mark.parametrize("check", CHECKS[:5])
def test_a_check_gives_the_memory_back(check):
    learn = learner(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    gone = weakref.ref(learn)
    findings = check(learn)
    assert all(isinstance(finding, Finding) for finding in findings)
    del learn
    gc.collect()
    assert gone() is None


def test_a_check_says_the_same_again():
    learn = learner(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    for check in CHECKS[:5]: assert check(learn) == check(learn)


def test_iterators_are_not_used_up():
    loader = iter(data())
    with pytest.raises(TypeError, match=r'dataloaders\["train"\] is an iterator, which a check would use up'):
        survey(learner(nn.Linear(6, 3), loader))
    assert len(list(loader)) == 6


def test_a_factory_for_an_optimiser_will_do():
    learn = Learner(nn.Linear(6, 3), torch.optim.SGD, F.cross_entropy, {"train": data()}, device="cpu")
    for check in CHECKS[:5]: assert isinstance(check(learn), Findings)
    assert learn.optimiser is torch.optim.SGD


# NaNGuard

class At(nn.Module):
    "Puts a value in, in the call of that number, before or after it in the graph."
    def __init__(self, call, value=torch.nan, backward=False):
        super().__init__()
        self.call, self.value, self.backward, self.calls = call, value, backward, -1

    def forward(self, x):
        self.calls += 1
        if self.calls != self.call: return x
        if self.backward: x.register_hook(lambda grad: grad * self.value)
        return x if self.backward else x + self.value


def guarded(model, every, train=None, **kwargs):
    learn = learner(model, train or [batch(seed=i) for i in range(12)], **kwargs)
    with pytest.raises(NonFiniteError) as error: learn.train(2, callbacks=NaNGuard(every))
    assert learn.callbacks == () and not any(module._forward_hooks for module in model.modules())
    return str(error.value)


def net(extra): return nn.Sequential(nn.Linear(6, 8), extra, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:.*_loss is nan")  # the learner's own word at the end of a pass
@pytest.mark.parametrize("every", [1, 3, 5, 12, 100])
def test_the_guard_names_the_first(every):
    torch.manual_seed(0)
    assert guarded(net(At(4)), every).startswith("the output of `1` (At) is NaN in epoch 0, batch 4; the output of `0` (Linear) was still")
    assert guarded(net(At(17, torch.inf)), every).startswith("the output of `1` (At) is infinite in epoch 1, batch 5;")
    assert guarded(net(At(7, torch.nan, backward=True)), every).startswith("the gradient of 0.weight is NaN in epoch 0, batch 7;")
    bad = [batch(seed=i) for i in range(12)]
    bad[2][0][3, 1] = torch.inf
    assert guarded(net(nn.Identity()), every, bad).startswith("the input is infinite in epoch 0, batch 2; remove or repair")
    calls = []

    def loss(predictions, labels):
        calls.append(1)
        return F.cross_entropy(predictions, labels) * (torch.nan if len(calls) == 9 else 1)
    assert guarded(net(nn.Identity()), every, loss_func=loss).startswith("the loss is NaN in epoch 0, batch 8;")


@pytest.mark.filterwarnings("ignore:.*_loss is nan")
def test_the_guard_watches_validation_and_test():
    for call, phase in ((lambda learn, guard: learn.validate(guard), "validation"), (lambda learn, guard: learn.test(guard), "test")):
        learn = learner(net(At(2)), validation=data(), test=data())
        with pytest.raises(NonFiniteError, match=f"{phase} batch 2;"): call(learn, NaNGuard())


def test_the_guard_stops_before_the_step():
    model = net(At(4))
    learn, twin = learner(model, [batch(seed=i) for i in range(12)]), learner(net(nn.Identity()), [batch(seed=i) for i in range(4)])
    twin.model.load_state_dict(model.state_dict())
    twin.train(1)
    with pytest.raises(NonFiniteError): learn.train(1, callbacks=NaNGuard(every=1))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.model.state_dict().values(), strict=True))


def in_float16(guards, scale, n=1, model=None, batches=None):
    torch.manual_seed(0)
    learn = learner(model or net(nn.Identity()), batches or [batch(seed=i) for i in range(30)])
    mixed = MixedPrecision("float16", torch.amp.GradScaler("cpu", init_scale=scale))
    learn.train(1, callbacks=[*guards, ClipGradients(), mixed, *([Accumulate(n)] if n > 1 else [])])
    return mixed.skipped, list(learn.model.parameters())


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize("n", [1, 3])
def test_the_guard_leaves_infinite_gradients_to_a_scaler(every, n):
    skipped, guarded = in_float16([NaNGuard(every)], 2.0 ** 22, n)
    bare_skipped, bare = in_float16([], 2.0 ** 22, n)
    assert skipped == bare_skipped > 0  # there were some
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(guarded, bare, strict=True))


@pytest.mark.filterwarnings("ignore:.*_loss is nan")
@pytest.mark.parametrize("every", [1, 4, 100])
def test_the_guard_finds_the_rest_beside_a_scaler(every):
    with pytest.raises(NonFiniteError, match=r"the output of `1` \(At\) is NaN in epoch 0, batch 9;"):
        in_float16([NaNGuard(every)], 2.0 ** 22, model=net(At(9)))
    bad = [batch(seed=i) for i in range(30)]
    bad[12][0][0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="the input is infinite in epoch 0, batch 12;"):
        in_float16([NaNGuard(every)], 2.0 ** 22, batches=bad)
    with pytest.raises(NonFiniteError, match="the loss is infinite in epoch 0, batch 0;"):  # 70,000 is too much for 16 bits
        learn = learner(nn.Linear(6, 3), loss_func=lambda p, y: p.sum().half() * 0 + torch.tensor(70_000.0).half())
        learn.train(1, callbacks=[NaNGuard(every), MixedPrecision("float16")])


class OwnScaler(Learner):
    "A scaler of one's own, which steps by itself."
    def __init__(self, *args, enabled=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127, enabled=enabled)

    def backward(self): self.scaler.scale(self.loss * 64).backward()

    def step(self):
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()


def test_the_guard_knows_a_scaler_of_the_learner_and_one_that_is_off():
    def run(enabled, extra):
        torch.manual_seed(0)
        model = net(extra)
        learn = OwnScaler(model, torch.optim.SGD(model.parameters(), lr=1e-3), F.cross_entropy,
                          {"train": [batch(seed=i) for i in range(12)]}, device="cpu", enabled=enabled)
        learn.train(1, callbacks=NaNGuard(1))
        return learn.scaler.get_scale()
    assert 0 < run(True, nn.Identity()) < 2.0 ** 127
    with pytest.raises(NonFiniteError, match="the gradient of 0.weight is NaN in epoch 0, batch 4;"):
        run(False, At(4, backward=True))


@pytest.mark.parametrize("every", [1, 100])
def test_the_guard_changes_nothing(every):
    def trained(*callbacks):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        learn = learner(model, [batch(seed=i) for i in range(8)], validation=data())
        learn.train(2, callbacks=callbacks)
        return [*model.state_dict().values(), torch.get_rng_state()]
    assert NaNGuard.watches
    assert all(torch.equal(a, b) for a, b in zip(trained(NaNGuard(every)), trained(), strict=True))


def test_the_guard_reads_seldom():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads(*callbacks):
        learn = learner(nn.Linear(6, 3), [batch()] * 250)
        with Reads() as mode: learn.train(1, callbacks=callbacks)
        return mode.count
    assert reads(NaNGuard(100)) - reads() == 3


def test_the_guard_leaves_nothing_behind():
    guard, learn = NaNGuard(), learner(net(nn.Identity()))
    learn.add(guard)
    learn.train(1)
    assert guard.watch is None and not any(module._forward_hooks for module in learn.model.modules())
    gone = weakref.ref(learn)
    del learn
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="every is 0; it must be a whole number of at least 1"): NaNGuard(0)
    assert repr(NaNGuard(7)) == "NaNGuard(every=7)"
    embedded = Embedded()
    embedded.embed.sparse = True
    sparse = Learner(embedded, torch.optim.SGD(embedded.parameters(), lr=0.1), F.cross_entropy, {"train": [token_batch()]}, device="cpu")
    sparse.train(1, callbacks=NaNGuard(1))


def test_an_input_within_an_object_and_labels_of_a_model_with_its_own_loss_are_not_called_unused():
    class Graphs:
        def __init__(self, x, y): self.x, self.y = x, y
        def to(self, device): return Graphs(self.x.to(device), self.y.to(device))

    class OwnLoss(nn.Linear):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}

    class OfGraphs(nn.Linear):
        def forward(self, graphs): return super().forward(graphs.x)

    torch.manual_seed(0)
    batches = [batch(seed=i) for i in range(3)]
    keyed, graphs = [{"x": x, "labels": y} for x, y in batches], [Graphs(x, y) for x, y in batches]
    for learn in (learner(OwnLoss(6, 3), keyed, None, validation=keyed), learner(OfGraphs(6, 3), graphs, lambda p, b: F.cross_entropy(p, b.y), validation=graphs)):
        assert not [finding for finding in forward_pass(learn).problems if finding.name == "unused input"]
