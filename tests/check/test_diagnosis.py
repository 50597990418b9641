"""The doctor names the planted fault and no other, finds nothing in healthy nets, and leaves no trace."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.check import diagnosis
from learner.check.diagnosis import QUESTIONS, Diagnosis, causes_of, doctor
from learner.check.findings import Finding, Findings, fault, skipped
from learner.check.trials import short_trainings
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback

# Data: small tasks that each kind of net can learn

def images(n=640, seed=0):
    "Ten classes of 8x8 pictures from 0 to 1: a pattern for each class, noise on it."
    generator = torch.Generator().manual_seed(seed)
    patterns = (torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(99)) > 0.5).float()
    labels = torch.randint(10, (n,), generator=generator)
    noisy = patterns[labels] * 0.6 + 0.4 * torch.rand(n, 1, 8, 8, generator=generator)
    return noisy, labels


def tokens(n=640, seed=0):
    "Sequences of 12 tokens; the class is which of four tokens is the most frequent."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    x = torch.randint(20, (n, 12), generator=generator)
    swap = torch.rand(n, 12, generator=generator) < 0.4
    return torch.where(swap, labels[:, None], x), labels


def table(n=640, seed=0):
    "Eight normal columns, and a number that depends on them."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return x, (x[:, :2].sum(1) + (x[:, 2] * x[:, 3]) + 0.1 * torch.randn(n, generator=generator))[:, None]


def rows(n=640, seed=0):
    "Sequences of eight rows of an image, so as to attend."
    x, labels = images(n, seed)
    return x[:, 0] - 0.5, labels


def two_inputs(n=640, seed=0):
    x, labels = images(n, seed)
    return x[:, 0, :4].flatten(1), x[:, 0, 4:].flatten(1), labels


# Nets, healthy as they are

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


class Transformer(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(32, 10)

    def forward(self, x): return self.head(self.layer(self.embed(x) + self.place).mean(1))


class Gru(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed, self.gru = nn.Embedding(20, 16), nn.GRU(16, 32, batch_first=batch_first)
        self.head = nn.Linear(32, 4)

    def forward(self, x): return self.head(self.gru(self.embed(x))[0].mean(1))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.top, self.bottom, self.head = nn.Linear(32, 30), nn.Linear(32, 30), nn.Linear(60, 10)

    def forward(self, top, bottom): return self.head(torch.cat([self.top(top).relu(), self.bottom(bottom).relu()], 1))


def mlp(*more, inputs=64, width=50, outputs=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs), *more)


KINDS = {  # data, net, loss, optimiser
    "mlp": (images, mlp, F.cross_entropy, lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
    "conv": (images, Conv, F.cross_entropy, lambda ps: torch.optim.Adam(ps, lr=1e-3)),
    "transformer": (rows, Transformer, nn.CrossEntropyLoss(), lambda ps: torch.optim.AdamW(ps, lr=3e-3)),
    "gru": (tokens, Gru, F.cross_entropy, lambda ps: torch.optim.Adam(ps, lr=5e-3)),
    "regression": (table, lambda: mlp(inputs=8, outputs=1), F.mse_loss, lambda ps: torch.optim.Adam(ps, lr=3e-3)),
    "two inputs": (two_inputs, Both, F.cross_entropy, lambda ps: torch.optim.SGD(ps, lr=0.1)),
}


def loader(data, shuffle=False): return DataLoader(TensorDataset(*data), 32, shuffle=shuffle, generator=torch.Generator().manual_seed(5))


def build(kind, seed=0, model=None, optimiser=None, loss=None, train=None, validation=None, callbacks=None, shuffle=True):
    data, net, its_loss, its_optimiser = KINDS[kind]
    torch.manual_seed(seed)
    model = (model or net)()
    if model_change := getattr(model, "change", None): model_change()
    train = train or (lambda data: data)
    if validation == LEAKED:
        def validation(held): return tuple(torch.cat([b[80:], a[:80]]) for a, b in zip(train(data(seed=seed)), held, strict=True))
    validation = validation or (lambda data: data)
    loaders = {"train": loader(train(data(seed=seed)), shuffle), "validation": loader(validation(data(320, seed + 1000)))}
    return Learner(model, (optimiser or its_optimiser)(model.parameters()), loss or its_loss, loaders, callbacks, device="cpu")


# Healthy ones

@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_in_a_healthy_net(kind):
    diagnosis = doctor(build(kind), report=False)
    assert diagnosis and diagnosis.names == [], diagnosis
    assert not [answer for answer in diagnosis.answers if "could not be asked" in answer.message]
    assert "all is well" in repr(diagnosis)


# Broken ones: each a change to one of the above, and the one name that is to come out

def shuffled(data):
    *x, y = data
    return *x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]


def altered(function): return lambda data: (*map(function, data[:-1]), data[-1])


def labels(function): return lambda data: (*data[:-1], function(data[-1]))


def holed(data):
    x = data[0].clone()
    x[37] = torch.nan
    return x, *data[1:]


def noise(data): return *(torch.rand_like(x) for x in data[:-1]), data[-1]


LEAKED = "a quarter of the validation data is training data"


def with_(net, change):
    def make():
        model = net()
        change(model)
        return model
    return make


def fill(path, value): return lambda model: nn.init.constant_(model.get_parameter(path), value)


def freeze(path): return lambda model: model.get_submodule(path).requires_grad_(False)


class Mixing(nn.Module):
    "A reshape that turns 32 digits of eight rows into eight rows of 32 digits, and takes them back wrongly."
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Linear(8, 8), mlp()

    def forward(self, x):
        rows = self.embed(x)  # batch, row, column
        return self.body(rows.transpose(0, 1).reshape(x.shape))


class WrongMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        x = x.flatten(1)
        return self.body(x - x.mean(0, keepdim=True))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 50), nn.Linear(50, 10)

    def forward(self, x): return self.second(self.first(x.flatten(1)).relu().detach())


class OneUnused(Both):
    def forward(self, top, bottom): return super().forward(top, top)


class EvalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x): return self.body(F.dropout(x, 0.5))


def sigmoids(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), *(layer for _ in range(8) for layer in (nn.Sigmoid(), nn.Linear(30, 30))), nn.Sigmoid(), nn.Linear(30, 10))


def linear_only(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.Linear(50, 10))


def sgd(rate): return lambda ps: torch.optim.SGD(ps, lr=rate)


def adam(rate): return lambda ps: torch.optim.Adam(ps, lr=rate)


def only_the_head(ps): return torch.optim.Adam(list(ps)[-2:], lr=1e-2)


BROKEN = [
    ("labels and inputs", "mlp", dict(train=shuffled)),
    ("labels and inputs", "conv", dict(train=shuffled)),
    ("labels and inputs", "gru", dict(train=shuffled)),
    ("labels and inputs", "regression", dict(train=shuffled)),
    ("labels and inputs", "mlp", dict(train=noise, validation=noise)),
    ("held-out data", "mlp", dict(validation=labels(lambda y: (y * 7 + 3) % 10))),
    ("held-out data", "regression", dict(validation=shuffled)),
    ("learning rate", "mlp", dict(optimiser=sgd(100.0))),
    ("learning rate", "conv", dict(optimiser=adam(30.0))),
    ("learning rate", "transformer", dict(optimiser=adam(1.0))),
    ("learning rate", "regression", dict(optimiser=sgd(3.0))),
    ("learning rate", "mlp", dict(optimiser=sgd(1e-6))),
    ("learning rate", "gru", dict(optimiser=adam(1e-8))),
    ("learning rate", "conv", dict(optimiser=sgd(1e-7))),
    ("learning rate", "regression", dict(optimiser=adam(1e-7))),
    ("dead units", "mlp", dict(model=with_(mlp, fill("1.bias", -20.0)))),
    ("dead units", "conv", dict(model=with_(Conv, fill("norm2.bias", -20.0)))),
    ("dead units", "regression", dict(model=with_(lambda: mlp(inputs=8, outputs=1), fill("3.bias", -20.0)))),
    ("frozen", "mlp", dict(model=with_(mlp, freeze("1")))),
    ("frozen", "conv", dict(model=with_(Conv, freeze("conv2")))),
    ("frozen", "gru", dict(model=with_(Gru, freeze("gru")))),
    ("frozen", "transformer", dict(model=with_(Transformer, freeze("layer.self_attn")))),
    ("frozen", "mlp", dict(optimiser=only_the_head)),
    ("frozen", "mlp", dict(model=with_(mlp, freeze("")))),
    ("last activation", "mlp", dict(model=lambda: mlp(nn.Softmax(1)))),
    ("last activation", "conv", dict(model=lambda: nn.Sequential(Conv(), nn.Sigmoid()))),
    ("last activation", "mlp", dict(loss=F.nll_loss)),
    ("label range", "mlp", dict(train=labels(lambda y: y + 1), validation=labels(lambda y: y + 1))),
    ("label range", "gru", dict(train=labels(lambda y: y - 1), validation=labels(lambda y: y - 1))),
    ("label range", "conv", dict(model=with_(Conv, lambda m: setattr(m, "head", nn.Linear(256, 8))))),
    ("outputs", "mlp", dict(model=lambda: mlp(outputs=14))),
    ("outputs", "mlp", dict(model=lambda: mlp(outputs=1), train=labels(lambda y: y % 2), validation=labels(lambda y: y % 2))),
    ("input scale", "mlp", dict(train=altered(lambda x: x * 255), validation=altered(lambda x: x * 255))),
    ("input scale", "regression", dict(train=altered(lambda x: x * 300 + 2000), validation=altered(lambda x: x * 300 + 2000))),
    ("overlap", "mlp", dict(validation=LEAKED)),
    ("constant input", "mlp", dict(train=altered(torch.zeros_like), validation=altered(torch.zeros_like))),
    ("constant input", "gru", dict(train=altered(torch.zeros_like), validation=altered(torch.zeros_like))),
    ("constant input", "two inputs", dict(train=lambda d: (d[0], torch.ones_like(d[1]), d[2]), validation=lambda d: (d[0], torch.ones_like(d[1]), d[2]))),
    ("vanishing gradient", "mlp", dict(model=sigmoids)),
    ("batch leak", "transformer", dict(model=Mixing)),
    ("batch leak", "transformer", dict(model=lambda: Transformer(batch_first=False))),
    ("batch leak", "gru", dict(model=lambda: Gru(batch_first=False))),
    ("batch leak", "mlp", dict(model=WrongMean)),
    ("no gradient", "mlp", dict(model=Detached)),
    ("dropout", "mlp", dict(model=lambda: nn.Sequential(nn.Dropout(1.0), *mlp()))),
    ("dropout in evaluation", "mlp", dict(model=EvalDropout)),
    ("finite data", "mlp", dict(train=holed)),
    ("finite weights", "conv", dict(model=with_(Conv, fill("conv1.bias", torch.nan)))),
    ("preprocessing", "mlp", dict(train=altered(lambda x: (x - 0.5) / 0.2))),
    ("preprocessing", "conv", dict(validation=altered(lambda x: x * 255))),
    ("label values", "mlp", dict(train=labels(torch.zeros_like))),
    ("label order", "mlp", dict(train=lambda d: tuple(t[d[1].argsort()] for t in d), shuffle=False)),
    ("loss shapes", "regression", dict(train=labels(lambda y: y[:, 0]), validation=labels(lambda y: y[:, 0]))),
    ("no non-linearity", "mlp", dict(model=linear_only)),
    ("unused input", "two inputs", dict(model=OneUnused)),
    ("does not run", "mlp", dict(model=lambda: mlp(inputs=60))),
    ("zero gradient", "mlp", dict(model=with_(mlp, lambda m: m.insert(5, type("Zero", (nn.Module,), {"forward": lambda self, x: x * 0})())))),
]

SLOW = {("labels and inputs", "conv"), ("labels and inputs", "gru"), ("learning rate", "gru"), ("learning rate", "transformer")}
CASES = [case for case in BROKEN if case[:2] not in SLOW]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}, {CASES[i][1]}")
def test_the_planted_fault_is_named_and_no_other(number):
    name, kind, options = CASES[number]
    diagnosis = doctor(build(kind, number % 3, **options), report=False)
    assert diagnosis.names == [name], diagnosis
    assert not diagnosis and not [answer for answer in diagnosis.answers if "could not be asked" in answer.message]
    message = diagnosis.causes[0].message
    assert "\n" not in message and len(message) < 400 and (";" in message or name == "does not run")


def test_kinds_of_faults_are_many():
    assert len({name for name, _, _ in CASES}) >= 12
    assert {name for name, _, _ in BROKEN} <= {question.name for question in QUESTIONS}


def test_a_rate_is_said_to_be_too_high_or_too_low():
    for rate, word, right in ((100.0, "high", lambda r: r < 100), (1e-6, "low", lambda r: r > 1e-6)):
        finding = doctor(build("mlp", optimiser=sgd(rate)), report=False).causes["learning rate"]
        assert finding.values["too"] == word and f"is too {word}" in finding.message
        own, other = finding.values["tries"]
        assert own.rate == rate and right(other.rate) and other.end < 0.9 * other.start
    learn = build("mlp")  # a good rate of its own, and a bad one that one means to train with
    assert doctor(learn, learning_rate=1e-7, report=False).names == ["learning rate"]
    assert doctor(learn, report=False)


def test_messages_say_where():
    def message(kind, **options): return doctor(build(kind, **options), report=False).causes[0].message
    assert "norm2" in message("conv", model=with_(Conv, freeze("norm2")))
    assert "first.weight" not in message("mlp", model=Detached) and "`first` (Linear): weight, bias" in message("mlp", model=Detached)
    assert "`2` (ReLU)" in message("mlp", model=with_(mlp, fill("1.bias", -20.0)))
    assert "subtract 1" in message("mlp", train=labels(lambda y: y + 1), validation=labels(lambda y: y + 1))
    assert "data[0]" in message("two inputs", train=lambda d: (d[0] * 0, *d[1:]), validation=lambda d: (d[0] * 0, *d[1:]))
    assert "`layer.self_attn` (MultiheadAttention)" in message("transformer", model=lambda: Transformer(batch_first=False)) or "layer" in message("transformer", model=lambda: Transformer(batch_first=False))


# The order of causes

def test_a_cause_silences_what_goes_with_it():
    goes = {"input scale": {"input scale", "first loss"}, "dead units": {"dead units", "zero gradient"},
            "last activation": {"last activation"}, "frozen": set()}  # with the removal of each; nothing: it cannot be removed

    def names(*given):
        def left(causes): return set(given) - {name for cause in causes for name in goes.get(cause.name, ())}
        causes, explained = causes_of([fault(name, "x") for name in given], left)
        assert sorted(finding.name for finding in causes + explained) == sorted(given)
        return [finding.name for finding in causes]
    assert names("first loss", "input scale") == ["input scale"]
    assert names("first loss", "input scale", "learning rate") == ["input scale", "learning rate"]  # measured before any step
    assert names("zero gradient", "dead units", "overlap") == ["overlap", "dead units"]
    assert names("zero gradient", "dead units", "last activation") == ["last activation", "dead units"]
    assert names("frozen", "does not run") == ["frozen", "does not run"]
    assert names() == []


@pytest.mark.parametrize("names, explained, options", [
    (["last activation", "dead units"], {"zero gradient"}, dict(model=with_(lambda: mlp(nn.Softmax(1)), fill("1.bias", -20.0)))),
    (["frozen", "last activation"], set(), dict(model=with_(lambda: mlp(nn.Softmax(1)), freeze("1")))),
    (["label range"], {"outputs", "does not run"}, dict(train=labels(lambda y: y + 1), validation=labels(lambda y: y + 1))),
    (["input scale", "dead units"], {"zero gradient"}, dict(
        model=with_(mlp, fill("3.bias", -1e6)), train=altered(lambda x: x * 255), validation=altered(lambda x: x * 255))),
    (["input scale"], {"first loss"}, dict(train=altered(lambda x: x * 255), validation=altered(lambda x: x * 255))),
    (["vanishing gradient"], {"no non-linearity"}, dict(model=sigmoids)),
    (["frozen"], {"does not run"}, dict(model=with_(mlp, freeze("")))),
    (["outputs"], {"does not run"}, dict(
        model=lambda: mlp(outputs=1), train=labels(lambda y: y % 2), validation=labels(lambda y: y % 2))),
    (["dropout"], {"zero gradient"}, dict(model=lambda: mlp(nn.Dropout(1.0), nn.Linear(10, 10)))),
    (["dead units", "unused input"], {"zero gradient"}, dict(model=with_(OneUnused, fill("top.bias", -20.0)))),
])
def test_a_finding_is_explained_only_by_what_removes_it(names, explained, options):
    diagnosis = doctor(build("two inputs" if "unused input" in names else "mlp", **options), report=False)
    assert diagnosis.names == names, diagnosis
    assert set(diagnosis.explained.names) == explained


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(40, 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, x): return self.head(self.embed(x).mean(1))


@pytest.mark.parametrize("rate", [2.0, 1e-6])
def test_sparse_gradients_are_not_a_fault(rate):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (160, 3), generator=generator)
    wanted = torch.randn(40, 3, generator=generator)[ids].sum(1).argmax(1)
    batches = list(zip(ids.split(16), wanted.split(16), strict=True))

    def diagnosed(sparse):
        model = Bag(sparse)
        loaders = {"train": batches[:7], "validation": batches[7:]}
        return doctor(Learner(model, torch.optim.SGD(model.parameters(), lr=rate), F.cross_entropy, loaders, device="cpu"), report=False)
    assert diagnosed(True).names == diagnosed(False).names
    assert not any("Error" in answer.message for answer in diagnosed(True).answers)


def test_every_question_has_a_name_of_its_own_and_is_asked():
    names = [question.name for question in QUESTIONS]
    assert len(set(names)) == len(names)
    asked = {answer.name for kind in ("mlp", "two inputs") for answer in doctor(build(kind), report=False).answers}
    only_if_wrong = {"finite loss", "labels and inputs", "one batch", "constant predictions"}
    assert asked == set(names) - only_if_wrong


def test_the_report(capsys):
    diagnosis = doctor(build("mlp", model=with_(mlp, fill("1.bias", -20.0))))
    out = capsys.readouterr().out
    assert out.startswith("The doctor finds 1 cause, gravest first:\n1. dead units: 100% of the units") and out == f"{diagnosis!r}\n"
    assert out.endswith("   What follows from this: zero gradient.\n")
    doctor(build("mlp"), report=False)
    assert capsys.readouterr().out == ""
    assert isinstance(diagnosis, Diagnosis) and isinstance(diagnosis.causes, Findings) and isinstance(diagnosis.causes[0], Finding)
    two = doctor(build("mlp", model=with_(mlp, freeze("1")), validation=LEAKED), report=False)
    assert two.names == ["frozen", "overlap"]


# What it is given

@pytest.mark.parametrize("options, message", [
    (dict(learning_rate=-1), "learning_rate is -1; it must be a finite number of at least 0"),
    (dict(learning_rate="fast"), "learning_rate is 'fast'; it must be a finite number of at least 0"),
    (dict(steps=5), "steps is 5; it must be a whole number of at least 10"),
    (dict(steps=2.5), "steps is 2.5; it must be a whole number of at least 10"),
])
def test_bad_input(options, message):
    with pytest.raises(ValueError) as error: doctor(build("mlp"), **options)
    assert str(error.value) == message


def test_it_needs_training_data():
    learn = build("mlp")
    learn.dataloaders = {"validation": learn.dataloaders["validation"]}
    with pytest.raises(ValueError, match='dataloaders has no "train" loader, it has'): doctor(learn)


class Divide(Callback):
    "Normalises in a callback, so that the doctor must look at what the model gets."
    def after_prepare(self, learn): learn.data = learn.data / 255


def test_callbacks_are_part_of_the_learner():
    def raw(data): return altered(lambda x: x * 255)(data)
    assert doctor(build("mlp", train=raw, validation=raw), report=False).names == ["input scale"]
    assert doctor(build("mlp", train=raw, validation=raw, callbacks=[Divide()]), report=False)


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, pixels, labels):
        logits = self.body(pixels)
        return {"logits": logits, "loss_": F.cross_entropy(logits, labels)}


class OfLoss(dict):
    loss = property(lambda self: self["loss_"])


class Own(WithLoss):
    def forward(self, pixels, labels): return OfLoss(super().forward(pixels, labels))


def test_a_model_with_its_own_loss():
    x, y = images()
    batches = [{"pixels": a, "labels": b} for a, b in zip(x.split(32), y.split(32), strict=True)]
    for rate, names in ((1e-3, []), (1e-9, ["learning rate"])):
        torch.manual_seed(0)
        model = Own()
        learn = Learner(model, torch.optim.Adam(model.parameters(), lr=rate), None, {"train": batches}, device="cpu")
        assert doctor(learn, report=False).names == names


def test_an_autoencoder_and_a_handful_of_batches():
    x, y = images()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))
    learn = Learner(model, torch.optim.Adam(model.parameters(), lr=3e-3), F.mse_loss, {"train": list(x.split(32))}, device="cpu")
    assert doctor(learn, report=False)
    model = mlp()
    learn = Learner(model, torch.optim.Adam(model.parameters(), lr=3e-3), F.cross_entropy, {"train": [(x[:300], y[:300]), (x[300:], y[300:])]}, device="cpu")
    assert doctor(learn, report=False)


class Zeroed(nn.Module):
    "Residual blocks that begin at zero: no gradient in the first step, and all is well."
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.gate, self.head = nn.Linear(64, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 10)
        for p in (*self.gate.parameters(), *self.head.parameters()): nn.init.zeros_(p)

    def forward(self, x):
        x = self.stem(x.flatten(1)).relu()
        return self.head(x + self.gate(self.block(x).relu()))


@pytest.mark.parametrize("make, rate", [
    (Zeroed, 1e-3), (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 1e-2), (lambda: mlp(width=8), 1e-2),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)), 1e-3),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.Sigmoid(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10)), 1e-2),
], ids=["zero init", "one layer", "narrow", "dropout", "sigmoid"])
def test_nothing_is_found_in_unusual_but_healthy_nets(make, rate):
    diagnosis = doctor(build("mlp", model=make, optimiser=adam(rate)), report=False)
    assert diagnosis, diagnosis


def test_it_says_the_same_again():
    learn = build("mlp", train=shuffled)
    one, two = doctor(learn, steps=40, report=False), doctor(learn, steps=40, report=False)
    assert [(f.name, f.message) for f in one.answers] == [(f.name, f.message) for f in two.answers]
    assert short_trainings(build("regression"))


if __name__ == "__main__":  # sweep
    import sys
    import time
    import warnings
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    seeds = [int(s) for s in sys.argv[1].split(",")]
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    for seed in seeds:
        for name, kind, options in [("", k, {}) for k in KINDS] + BROKEN:
            if only and only not in (name or "healthy"): continue
            start = time.perf_counter()
            d = doctor(build(kind, seed, **options), report=False)
            ok = d.names == ([name] if name else [])
            odd = [a for a in d.answers if "could not be asked" in a.message]
            took = time.perf_counter() - start
            print("ok  " if ok and not odd else "FAIL", seed, kind, name or "healthy", f"{took:.1f}s", "" if ok and took<4 else repr(d)[:900], odd or "", flush=True)


class Offset(nn.Module):
    def forward(self, x): return x - 100


def test_softmax_last_does_not_hide_units_that_an_offset_has_killed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), Offset(), nn.ReLU(), nn.Linear(20, 10), nn.Softmax(1))
    found = doctor(Learner(model, torch.optim.AdamW, F.cross_entropy, digits()), 0.01, report=False)
    assert found.names == ["last activation", "dead units"]


def test_what_is_not_asked_again_is_not_explained(monkeypatch):
    rounds = iter([[fault("last activation", "x"), fault("zero gradient", "y")], [skipped("zero gradient", "z")]])
    monkeypatch.setattr(diagnosis, "_answers", lambda *_: next(rounds))
    learn = Learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.optim.AdamW, F.cross_entropy, digits())
    found = doctor(learn, 0.01, report=False)
    assert found.names == ["last activation", "zero gradient"] and found.explained.names == []
