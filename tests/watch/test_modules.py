"""summary against numbers by hand and PyTorch's own counter; nothing of the learner changes."""
import random
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from learner.loop.data import DataLoaders
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.watch.modules import shapes, summary, watched


def learner(model, batches, loss_func=F.cross_entropy, cls=Learner, **options):
    loaders = batches if isinstance(batches, dict | DataLoaders) else {"train": batches}
    return cls(model, torch.optim.SGD, loss_func, loaders, device="cpu", **options)


def rows(table):
    return {row.name: row for row in table.rows}


X, Y = torch.randn(6, 3, 8, 8), torch.arange(6) % 4


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(180, 4))


# Numbers

def test_a_conv_net_counted_by_hand():
    table = summary(learner(conv_net(), [(X, Y)]))
    found = rows(table)
    assert [row.name for row in table.rows] == ["", "0", "1", "2", "3", "4", "5"]
    assert [row.depth for row in table.rows] == [0] + [1] * 6
    assert found["0"].parameters == 5 * 3 * 9 + 5 and found["0"].output == "6x5x6x6"
    assert found["0"].flops == 2 * 6 * 5 * 36 * 27  # examples, channels, places, products
    assert (found["1"].parameters, found["1"].flops) == (10, 0)
    assert (found["5"].parameters, found["5"].flops) == (180 * 4 + 4, 2 * 6 * 180 * 4)
    assert table.parameters == 140 + 10 + 724 == found[""].parameters
    assert table.flops == found["0"].flops + found["5"].flops == found[""].flops


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.layer(self.attention(x, x, x)[0]).mean(1)


MODELS = {
    "convolutions": (conv_net, X),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), X),
    "groups": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), X),
    "one dimension": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5, stride=2), nn.AdaptiveMaxPool1d(1), nn.Flatten()), X),
    "attention": (Attend, torch.randn(6, 5, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_of_the_counter_of_pytorch(name):
    make, x = MODELS[name]
    model = make()
    found = rows(summary(learner(model, [(x, Y)])))
    # with gradients, the shortcuts of evaluation are out of the way; plain attention is asked for
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        deepcopy(model)(x)
    assert found[""].flops == counter.get_total_flops() > 0
    by_module = counter.get_flop_counts()
    for path, row in found.items():
        key = type(model).__name__ + (f".{path}" if path else "")
        assert row.flops == sum(by_module.get(key, {}).values()), path


def test_attention_counted_by_hand():
    found = rows(summary(learner(Attend(), [(torch.randn(6, 5, 16), Y)])))
    tokens = 6 * 5
    attention = 2 * tokens * 16 * 64 + 2 * 2 * 6 * 5 * 5 * 16  # projections in and out; scores and values
    assert found["attention"].flops == found["layer.self_attn"].flops == attention
    assert found["layer"].flops == attention + 2 * tokens * 16 * 32 * 2


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_counted_by_hand(kind, gates):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = kind(3, 7, batch_first=True)

        def forward(self, x):
            return self.recurrent(x)[0].mean(1)

    row = rows(summary(learner(Net(), [(torch.randn(6, 5, 3), Y)])))["recurrent"]
    assert row.flops == 2 * 6 * 5 * gates * 7 * (3 + 7)
    assert row.output.startswith("6x5x7, 1x6x7")


def test_the_settings_of_pytorch_are_put_back():
    from torch.backends import cudnn, mha, mkldnn
    before = cudnn.enabled, mkldnn.enabled, mha.get_fastpath_enabled()
    learn = learner(conv_net(), [(torch.randn(6, 4, 8, 8), Y)])  # channels that do not fit
    with pytest.raises(RuntimeError, match="channels"): summary(learn)
    assert (cudnn.enabled, mkldnn.enabled, mha.get_fastpath_enabled()) == before


# Trees that are none

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.a = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.a, nn.Sequential(self.a, nn.ReLU())])
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Sequential(nn.Linear(4, 100))
        self.nothing = None

    def forward(self, words):
        x = self.embed(words)
        for block in self.blocks: x = block(x)
        return self.head(self.a(x)).mT


def test_shared_modules_tied_parameters_and_modules_that_never_run():
    words = torch.arange(6).view(2, 3)
    table = summary(learner(Shared(), [(words, words)]))
    found = rows(table)
    assert table.parameters == 36 + 20 + 500
    assert found[""].parameters == table.parameters
    assert found["a"].calls == 3 and found["a"].flops == 3 * 2 * 6 * 16
    for name in ("blocks.0", "blocks.1.0"):
        assert found[name].same_as == "a" and found[name].output == "as a" and found[name].parameters == 0
    assert found["spare"].output == found["spare.0"].output == "never ran"
    assert found["spare"].flops == 0 and found["blocks"].output == ""
    assert found["head"].parameters == found["embed"].parameters == 36
    assert "calls" in table.table()[0] and "nothing" not in found
    assert table.flops == 3 * 2 * 6 * 16 + 2 * 6 * 4 * 9


def test_a_model_that_calls_its_parts_itself():
    class Two(Learner):
        def predict(self):
            self.predictions = self.model["b"](self.model["a"](self.data))

    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 4)})
    table = summary(learner(model, [(torch.randn(6, 3), Y)], cls=Two))
    assert table.flops == 2 * 6 * (15 + 20) == rows(table)[""].flops


def test_a_module_that_calls_itself_is_not_counted_twice():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            return self.linear(x if depth == 0 else self(x, depth - 1))

    found = rows(summary(learner(Again(), [(torch.randn(6, 4), Y)])))
    assert found[""].calls == found["linear"].calls == 3
    assert found[""].flops == found["linear"].flops == 3 * 2 * 6 * 16


@pytest.mark.parametrize("frozen, word", [((), "yes"), (("5",), "partly"), (("0", "1", "5"), "no")])
def test_trained_or_not(frozen, word):
    model = conv_net()
    for name in frozen: model.get_submodule(name).requires_grad_(False)
    learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, {"train": [(X, Y)]}, device="cpu")
    table = summary(learn)
    cells = {line[0]: line[3] for line in table.table()}
    assert cells["Sequential"] == cells["total"] == word and cells["2 ReLU"] == ""
    assert cells["5 Linear"] == ("no" if "5" in frozen else "yes")
    assert table.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


# Batches

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, words, mask=None):
        x = self.embed(words)
        return (x if mask is None else x * mask[..., None]).mean(1)


WORDS, MASK = torch.arange(6).view(2, 3), torch.ones(2, 3)
BATCHES = {
    "pair": ((WORDS, Y[:2]), F.cross_entropy, "2x3, 2"),
    "triple": ((WORDS, MASK, Y[:2]), F.cross_entropy, "2x3, 2x3, 2"),
    "mapping": ({"words": WORDS, "mask": MASK, "label": Y[:2]}, F.cross_entropy, "2x3, 2x3, 2"),
    "tensor": (WORDS, lambda predictions, labels: predictions.sum(), "2x3"),
    "nested": (([WORDS, MASK], Y[:2]), F.cross_entropy, "2x3, 2x3, 2"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_every_form(name):
    batch, loss_func, shape = BATCHES[name]
    table = summary(learner(Words(), [batch], loss_func))
    assert table.batch == shape and rows(table)["embed"].output == "2x3x4"


def test_a_model_with_its_own_loss():
    class Output(dict):
        loss = property(lambda self: self["loss"])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x, labels):
            logits = self.linear(x)
            return Output(loss=F.cross_entropy(logits, labels), logits=logits)

    batch = {"x": torch.randn(6, 3), "labels": Y}
    assert rows(summary(learner(Model(), [batch], None)))[""].output == "scalar, 6x4"


def test_overridden_methods_and_replaced_actions_are_respected():
    class Own(Learner):
        def prepare(self):
            super().prepare()
            self.data = self.data[:, :, ::2, ::2]

    class Half(Callback):
        def predict(self, learn):
            learn.predictions = learn.model(learn.data[:3])

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    found = rows(summary(learner(model, [(X, Y)], cls=Own, callbacks=Half())))
    assert found["1"].output == "3x4"


def test_an_overridden_routine_that_makes_no_predictions():
    class Own(Learner):
        def train_batch(self): raise AssertionError("not to be trained")

        def validation_batch(self):
            data, labels = self.batch
            return {"loss": F.cross_entropy(self.model(data), labels)}

    assert rows(summary(learner(conv_net(), [(X, Y)], cls=Own)))[""].output == "6x4"


@pytest.mark.parametrize("phase", ["validation", "test"])
def test_another_loader_will_do(phase):
    assert summary(learner(conv_net(), {phase: [(X[:2], Y[:2])]})).batch == "2x3x8x8, 2"


def test_lazy_modules():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    table = summary(learner(model, [(X, Y)]))
    assert table.parameters == 192 * 4 + 4 and "lazy" in table.lines()[-1].lower() and ": 1." in table.lines()[-1]
    assert torch.nn.parameter.is_lazy(model[1].weight)


# It changes nothing

class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.net[1].eval()
        self.register_buffer("count", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.count += 1
        self.seen.append(1)
        return self.net(x + torch.rand(()) * random.random() * np.random.rand())


class Log(Callback):
    def __init__(self): self.events = []
    def before_validation(self): self.events.append("validation")


class Watcher(Callback):
    watches = True
    def __init__(self): self.events = []
    def before_validation(self): self.events.append("validation")


def loaders():
    data = TensorDataset(X, Y)
    return {"train": DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3)),
            "validation": DataLoader(data, 2, shuffle=True)}


def test_nothing_changes():
    model, callbacks, given = Counts(), [Log(), Watcher()], loaders()
    learn = learner(model, given, callbacks=callbacks)
    learn.train(1, 0.1)
    model(X).sum().backward()
    events = [list(callback.events) for callback in callbacks]
    state, grads = deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes, seen, attributes = [m.training for m in model.modules()], list(model.seen), set(vars(learn))
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), given["train"].generator.get_state()
    history, results, dataloaders = list(learn.history.rows), dict(learn.results), learn.dataloaders
    optimiser = deepcopy(learn.optimiser.state_dict())

    summary(learn)

    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(old, p.grad) for old, p in zip(grads, model.parameters(), strict=True))
    assert modes == [m.training for m in model.modules()] and model.seen == seen
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], given["train"].generator.get_state()
    assert torch.equal(rng[0], now[0]) and rng[1] == now[1] and (rng[2] == now[2]).all() and torch.equal(rng[3], now[3])
    assert learn.history.rows == history and learn.results == results and learn.dataloaders is dataloaders
    assert learn.optimiser.state_dict()["param_groups"] == optimiser["param_groups"]
    assert set(vars(learn)) == attributes and learn.callbacks == tuple(callbacks)
    assert [callback.events for callback in callbacks] == events
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_epochs_of_the_loaders_are_put_back():
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits())
    learn.dataloaders["train"].set_epoch(5)
    summary(learn)
    assert learn.dataloaders["train"].epoch == 5 and learn.dataloaders["validation"].epoch == 0


def test_training_goes_on_as_if_nothing_had_been():
    def weights(look):
        torch.manual_seed(0)
        learn = learner(conv_net(), loaders())
        for _ in range(2):
            learn.train(1, 0.1)
            if look: summary(learn)
        return list(learn.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def test_hooks_go_when_the_model_fails():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 3))
    with pytest.raises(RuntimeError), watched(model): model(torch.zeros(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# What it looks like

def test_the_text_is_aligned():
    text = repr(summary(learner(conv_net(), [(X, Y)])))
    head, rule, *lines = text.split("\n")
    lines = lines[:lines.index("")]
    assert max(map(len, lines)) <= len(rule) and len(head) <= len(rule)
    end = head.index("parameters") + len("parameters")
    assert [line[:end].split()[-1] for line in lines if "yes" in line] == ["874", "140", "10", "724", "874"]
    assert {line.index("yes") for line in lines if "yes" in line} == {head.index("trained")}
    assert "  0 Conv2d" in text and text.endswith("For a batch of 6x3x8x8, 6; 874 of 874 parameters are trained.")


def test_html_is_escaped_and_well_formed():
    class Reads(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text = [], []
        def handle_starttag(self, tag, attrs): self.open.append(tag)
        def handle_endtag(self, tag): assert self.open.pop() == tag
        def handle_data(self, data): self.text.append(data)

    odd = type("<b>Odd</b> & co", (nn.Linear,), {})
    html = summary(learner(nn.Sequential(nn.Flatten(), odd(192, 4)), [(X, Y)]))._repr_html_()
    reader = Reads()
    reader.feed(html)
    assert not reader.open and "1 <b>Odd</b> & co" in reader.text and "<b>" not in html


def test_depth():
    learn = learner(Shared(), [(WORDS, WORDS)])
    assert {row.depth for row in summary(learn, depth=1).rows} == {0, 1}
    assert summary(learn, depth=0).parameters == summary(learn).parameters
    assert [row.name for row in summary(learn, depth=0).rows] == [""]


def test_shapes():
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 3, 4), [3, 2], batch_first=True)
    assert shapes(packed) == "5x4"
    assert shapes([torch.zeros(1)] * 5) == "1, 1, 1 and 2 more"
    assert shapes(("words", None, 3)) == ""


# Bad input

def good():
    return learner(conv_net(), [(X, Y)])


BAD = [
    (lambda: summary(conv_net()), TypeError, "summary takes a Learner, which has the data; this is a Sequential"),
    (lambda: summary(good(), depth=-1), ValueError, "depth is -1; it must be a whole number of at least 0"),
    (lambda: summary(good(), depth="all"), ValueError, "depth is 'all'; it must be a whole number of at least 0"),
    (lambda: summary(learner(conv_net(), {})), ValueError, "summary: dataloaders is empty; give the learner a loader to take a batch from"),
    (lambda: summary(learner(conv_net(), {"test": iter([(X, Y)])})), ValueError, "summary: dataloaders[\"test\"] is an iterator, and a batch taken from it would be lost; give a list or a DataLoader"),
    (lambda: summary(learner(conv_net(), [])), ValueError, "summary: dataloaders[\"train\"] yielded no batch; give it at least one"),
]


@pytest.mark.parametrize("call, kind, message", BAD, ids=[message[:50] for *_, message in BAD])
def test_messages(call, kind, message):
    with pytest.raises(kind) as caught: call()
    assert str(caught.value) == message


def test_while_training():
    learn = good()
    learn.on("after_batch", lambda learn: summary(learn))
    with pytest.raises(RuntimeError, match="inside train"): learn.train(1, 0.1)
