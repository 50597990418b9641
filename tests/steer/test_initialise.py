"""LSUV and kaiming: numbers by torch directly, fans by hand, nothing changed but weights."""
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.steer.initialise import LSUV, InitError, kaiming
from learner.steer.pairs import fan_in, gain


def images(): return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with and without bias, batch norm, dropout, functions in forward, a residual."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 256, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.leaky_relu(self.body(x), 0.2)
        return self.head(self.drop(F.gelu(self.up(x))).flatten(1))


def deep(activation=nn.ReLU, depth=6):
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(20, 20), activation())]
    return nn.Sequential(*layers, nn.Linear(20, 5))


def vectors(): return torch.randn(64, 20, generator=torch.Generator().manual_seed(0))


def outputs(model, data, names):
    """What layers give out, by plain hooks, in training mode, with the random numbers as they are."""
    seen = {}
    hooks = [model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: seen.setdefault(n, []).append(o.detach().double().flatten()))
             for n in names]
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad(): model.train()(data)
    for hook in hooks: hook.remove()
    for m, mode in zip(model.modules(), modes, strict=True): m.training = mode
    for n, b in model.named_buffers(): b.copy_(buffers[n])
    torch.set_rng_state(state)
    return {name: torch.cat(parts) for name, parts in seen.items()}


# By hand

@pytest.mark.parametrize("layer, fan", [
    (nn.Linear(30, 7), 30), (nn.Conv1d(4, 6, 5), 20), (nn.Conv2d(16, 8, (3, 5)), 240), (nn.Conv2d(16, 8, 3, groups=4), 36),
    (nn.Conv3d(2, 3, 2), 16), (nn.ConvTranspose2d(16, 8, 4, stride=2), 64), (nn.ConvTranspose2d(16, 8, 3, groups=2), 72),
], ids=str)
def test_fans(layer, fan): assert fan_in(layer) == fan


def test_a_fan_is_what_keeps_the_variance():
    torch.manual_seed(0)
    for layer in (nn.ConvTranspose2d(32, 16, 4, stride=2, bias=False), nn.Conv2d(32, 16, 3, groups=2, bias=False)):
        nn.init.normal_(layer.weight, 0, fan_in(layer) ** -0.5)
        inner = layer(torch.randn(8, 32, 20, 20))[..., 4:-4, 4:-4]
        assert abs(inner.var().item() - 1) < 0.1


@pytest.mark.parametrize("function, expected", [
    (torch.relu, math.sqrt(2)), (lambda z: F.leaky_relu(z, 0.1), math.sqrt(2 / 1.01)), (lambda z: z, 1.0), (torch.abs, 1.0),
], ids=["relu", "leaky", "linear", "abs"])
def test_gains(function, expected): assert abs(gain(function) - expected) < 1e-9


def test_the_gain_of_a_curve_is_that_of_many_numbers():
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for function in (F.gelu, F.silu, torch.tanh, F.elu, F.mish): assert abs(gain(function) - function(z).square().mean() ** -0.5) < 3e-3


# LSUV

@pytest.mark.parametrize("make, data", [(Net, images), (deep, vectors), (lambda: deep(nn.Tanh), vectors), (lambda: deep(nn.GELU), vectors)],
                         ids=["conv", "relu", "tanh", "gelu"])
def test_the_outputs_have_mean_0_and_deviation_1(make, data):
    model, x = make(), data()
    names = [n for n, m in model.named_modules() if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d)]
    before = outputs(model, x, names)
    report = LSUV(model, x)
    after = outputs(model, x, names)
    assert [row.name for row in report.rows] == list(after)
    for row in report.rows:
        for seen, mean, std in ((before, row.mean_before, row.std_before), (after, row.mean_after, row.std_after)):
            assert abs(seen[row.name].mean() - mean) < 1e-5 and abs(seen[row.name].std(correction=0) - std) < 1e-5
        assert abs(row.std_after - 1) <= 0.0101
        if model.get_submodule(row.name).bias is not None: assert abs(row.mean_after) <= 0.0101


def test_the_pair_with_its_activation():
    for activation in (nn.ReLU, lambda: nn.LeakyReLU(0.1), lambda: nn.ReLU(inplace=True), nn.GELU):
        model = deep(activation)
        LSUV(model, vectors(), after_activation=True)
        with torch.no_grad():
            for i in range(2, 14, 2): assert abs(model[:i](vectors()).std(correction=0) - 1) < 0.011
            for i in range(1, 14, 2): assert abs(model[:i](vectors().clone()).mean()) < 0.011 or activation is not nn.ReLU
            assert abs(model(vectors()).std(correction=0) - 1) < 0.011


def test_a_layer_that_runs_several_times():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.out = nn.Linear(20, 20), nn.Linear(20, 3)
            self.alias = self.one

        def forward(self, x):
            for _ in range(2): x = torch.tanh(self.one(x))
            return self.out(self.alias(x))
    model = Loop()
    report = LSUV(model, vectors())
    seen = outputs(model, vectors(), ["one", "out"])
    assert [row.name for row in report.rows] == ["one", "out"] and seen["one"].numel() == 3 * 64 * 20
    for values in seen.values(): assert abs(values.mean()) < 0.011 and abs(values.std(correction=0) - 1) < 0.011


def test_what_is_left_alone():
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 20),
                          nn.utils.parametrizations.weight_norm(nn.Linear(20, 20)), nn.Linear(20, 4))
    model[2].requires_grad_(False)
    model[4].weight = model[5].weight
    kept = {n: p.clone() for n, p in model.named_parameters()}
    for initialise in (LSUV, lambda m, x: kaiming(m, batch=x)):
        notes = {row.name: row.note for row in initialise(model, vectors()).rows}
        assert notes == {"0": "", "2": "frozen", "4": "shares its weight with 5", "5": "shares its weight with 4",
                         "6": "its weight is computed", "7": ""}
        changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
        assert changed == {"0", "7"}


@pytest.mark.parametrize("initialise", [LSUV, kaiming])
def test_nothing_changes_but_weights_and_biases(initialise):
    class Scale(Callback):
        def after_prepare(self, learn): learn.data = learn.data * 5
    model = Net().eval()
    model.norm.train()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    y = torch.zeros(64, dtype=torch.long)
    learn = Learner(model, torch.optim.SGD, F.cross_entropy, {"train": [(images(), y)]}, Scale(), device="cpu")
    identity = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    buffers, modes = {n: b.clone() for n, b in model.named_buffers()}, [m.training for m in model.modules()]
    others = model.norm.weight.clone(), model.stem.weight.grad.clone()
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report = initialise(learn)
    if initialise is LSUV: assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == identity
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers()) and modes == [m.training for m in model.modules()]
    assert torch.equal(others[0], model.norm.weight) and torch.equal(others[1], model.stem.weight.grad)
    assert not any(m._forward_hooks for m in model.modules()) and len(learn.history) == 0 and learn.optimiser is torch.optim.SGD
    scaled = outputs(model, images() * 5, ["stem"])["stem"]  # the batch as the callback makes it
    assert abs(scaled.std(correction=0) - report.rows[0].std_after) < 1e-4


def test_twice_is_once():
    model = deep()
    LSUV(model, vectors(), tolerance=1e-4)
    kept = [p.clone() for p in model.parameters()]
    LSUV(model, vectors(), tolerance=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(kept, model.parameters(), strict=True))


# kaiming

def test_kaiming_is_torch_s_own_with_the_right_arguments():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.LeakyReLU(0.3), nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 5))
    torch.manual_seed(7)
    report = kaiming(model, batch=vectors(), a=1)
    torch.manual_seed(7)
    expected = [nn.init.kaiming_normal_(torch.empty(30, 20)), nn.init.kaiming_normal_(torch.empty(40, 30), a=0.3),
                nn.init.normal_(torch.empty(50, 40), 0, gain(torch.tanh) / 40**0.5), nn.init.kaiming_normal_(torch.empty(5, 50), a=1)]
    for i, weight in zip((0, 2, 4, 6), expected, strict=True):
        torch.testing.assert_close(model[i].weight.detach(), weight, rtol=1e-6, atol=0)
        assert not model[i].bias.any()
    assert [row.follows for row in report.rows] == ["relu", "leaky_relu", "tanh", ""]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x): return self.function(x)


@pytest.mark.parametrize("function", [
    lambda x: F.leaky_relu(x, 0.1) - 0.4, lambda x: F.relu(x) - 0.5, lambda x: F.gelu(x).sub(0.3), lambda x: -0.4 + F.leaky_relu(x, 0.1),
    lambda x: torch.add(F.silu(x), -0.2), lambda x: (F.leaky_relu(x, 0.2) - 0.5) + 0.2, lambda x: F.leaky_relu(x, 0.1).sub_(0.4),
])
def test_behind_a_shifted_activation_mean_and_deviation_are_reached(function):
    model = deep(lambda: Function(function))
    LSUV(model, vectors(), after_activation=True, iterations=30)  # smooth ones are slow
    with torch.no_grad():
        for i in range(2, 13, 2):
            out = model[:i](vectors().clone())
            assert abs(out.mean()) < 0.011 and abs(out.std(correction=0) - 1) < 0.011


def test_a_tensor_that_is_added_behind_an_activation_is_no_shift():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(20, 20)

        def forward(self, x): return F.relu(self.layer(x)) + x
    model = nn.Sequential(Residual())
    LSUV(model, vectors(), after_activation=True)
    with torch.no_grad(): out = model[0].layer(vectors())
    assert abs(out.mean()) < 0.011 and abs(F.relu(out).std(correction=0) - 1) < 0.011


@pytest.mark.parametrize("activation, name", [
    (nn.ReLU(inplace=True), "relu"), (nn.PReLU(20), "prelu"), (nn.ELU(), "elu"), (nn.SELU(), "selu"), (nn.Sigmoid(), "sigmoid"),
    (nn.SiLU(inplace=True), "silu"), (nn.Hardswish(), "hardswish"), (nn.ReLU6(), "hardtanh"), (nn.Mish(), "mish"), (nn.Softplus(), "softplus"),
    (nn.GELU("tanh"), "gelu"),
], ids=str)
def test_activations_are_seen_through_norm_and_dropout(activation, name):
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Dropout(0.1), activation, nn.Linear(20, 2))
    report = kaiming(model, batch=vectors())
    assert report.rows[0].follows == name
    assert abs(model[0].weight.std().item() * 20**0.5 / gain(activation.float() if name != "prelu" else lambda z: F.leaky_relu(z, 0.25)) - 1) < 0.15


def test_a_deep_net_keeps_its_scale():
    model = nn.Sequential(*(part for _ in range(20) for part in (nn.Linear(512, 512), nn.ReLU())))
    torch.manual_seed(0)
    report = kaiming(model, batch=torch.randn(64, 512))
    assert 0.3 < report.rows[-1].std_after < 3 and report.rows[-1].std_before < 0.1


# The table

def test_the_table_and_the_picture():
    import matplotlib.pyplot as plt
    report = LSUV(deep(), vectors(), skip="2")
    text = repr(report)
    assert text.splitlines()[0].split()[:2] == ["layer", "kind"] and "skipped" in text and "batch of 64" in text
    assert report._repr_html_().count("<tr>") == len(report.rows) + 1
    _, ax = plt.subplots()
    assert report.plot(ax) is ax and ax.get_xlabel() and ax.get_ylabel() and ax.get_yscale() == "log"
    assert list(ax.get_lines()[0].get_ydata()) == [row.std_before for row in report.rows]
    plt.close("all")


# What cannot be done

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(20, 2), nn.Linear(20, 2)

    def forward(self, x): return self.used(x)


def dead():
    model = deep()
    nn.init.zeros_(model[4].weight)
    return model


BAD = {  # model, options, and what is said
    "dead": (dead, dict(batch=vectors()), InitError, "layer 4 (Linear) outputs the same value everywhere, 0: its weights are zero or its inputs "
             "do not vary; give other data, or leave it out with skip"),
    "nan": (deep, dict(batch=vectors() * math.nan), InitError, "layer 0 (Linear) outputs nan on average; look for bad data"),
    "not called": (Unused, dict(batch=vectors()), InitError, 'layer spare (Linear) was not called; leave it out with skip=["spare"]'),
    "cap": (lambda: deep(nn.Tanh), dict(batch=vectors(), after_activation=True, iterations=3), InitError, "after 3 iterations behind tanh, which may"),
    "no layer": (nn.ReLU, dict(batch=vectors()), InitError, "ReLU has nothing to initialise: it has no linear or convolutional layer"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), dict(batch=vectors()), InitError, "has no weights yet; send a batch through the model"),
    "no batch": (deep, dict(), ValueError, "a model alone has no data; pass a batch, or the learner"),
    "skip": (deep, dict(batch=vectors(), skip=["22"]), ValueError, "skip: the model has no module '22'; did you mean 2?"),
    "iterations": (deep, dict(batch=vectors(), iterations=0), ValueError, "iterations is 0; it must be a whole number of at least 1"),
    "tolerance": (deep, dict(batch=vectors(), tolerance=-1), ValueError, "tolerance is -1; it must be a finite number of at least 0"),
    "no model": (lambda: "resnet", dict(), TypeError, "initialisation takes a Learner, or a model with a batch, not a str"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_told_and_changes_nothing(case):
    make, options, kind, said = BAD[case]
    model = make()
    kept = [p.clone() for p in model.parameters()] if isinstance(model, nn.Module) and case != "lazy" else []
    state = torch.get_rng_state()
    with pytest.raises(kind) as raised: LSUV(model, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert all(map(torch.equal, kept, model.parameters() if kept else [])) and torch.equal(state, torch.get_rng_state())


def test_a_layer_that_is_not_called_can_be_left_out():
    rows = {row.name: row for row in LSUV(Unused(), vectors(), skip=["spare"]).rows}
    assert rows["spare"].note == "skipped" and math.isnan(rows["spare"].std_after) and abs(rows["used"].std_after - 1) < 0.011


def test_not_inside_a_run_and_not_from_an_iterator():
    y = torch.zeros(64, dtype=torch.long)
    learn = Learner(deep(), torch.optim.SGD, F.cross_entropy, {"train": [(vectors(), y)]}, device="cpu")
    learn.on("before_epoch", lambda learn: LSUV(learn))
    with pytest.raises(RuntimeError, match="weights cannot be initialised inside a run"): learn.train(1, learning_rate=0.1)
    learn = Learner(deep(), torch.optim.SGD, F.cross_entropy, {"train": iter([(vectors(), y)])}, device="cpu")
    with pytest.raises(TypeError, match="is an iterator, which would lose a batch; pass a batch"): LSUV(learn)
