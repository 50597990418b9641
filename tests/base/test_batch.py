"""Batches of every make: what goes to the model, what to the loss, and how many examples there are."""
import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from learner.base.batch import BatchError, call_model, loss_of, size_of, total, unpack, warn_again
from learner.base.tree import map_tensors, to_device

Pair = namedtuple("Pair", "x y")
Named = namedtuple("Named", "label a b")
CPU = torch.device("cpu")
A, B = object(), object()


@pytest.fixture(autouse=True)
def _warnings_anew(): warn_again()


class Encoding(UserDict): "Like the batches of Hugging Face: a mapping that is not a dict."


class Graphs:
    "A batch of the user's own."
    def __init__(self, **values): vars(self).update(values)
    def to(self, device): return type(self)(**{name: to_device(value, device) for name, value in vars(self).items()})


class Rows(Graphs):
    def __len__(self): return len(self.x)


@dataclass
class Scene:
    scale: torch.Tensor | None
    x: torch.Tensor
    labels: torch.Tensor


@dataclass
class Moving(Scene):
    def to(self, device): return Moving(self.scale, self.x.to(device), self.labels.to(device))


def x(n=4): return torch.ones(n, 2)


def split(batch, **options): return unpack(batch, **options)[1:3]


# What goes where

@pytest.mark.parametrize("batch, data, labels", [
    (x(), "same", "same"), ((x(),), 0, 0), ([x(), 1], 0, 1), ((x(), 2, 3), (0, 1), 2), (Pair(x(), 5), 0, 1), (Named(1, x(), 2), (1, 2), 0)])
def test_split_tuples(batch, data, labels):
    own, its = split(batch)
    def pick(where): return batch if where == "same" else tuple(batch[i] for i in where) if isinstance(where, tuple) else batch[where]
    assert (own is pick(data) or own == pick(data)) and its is pick(labels)


def test_split_mappings():
    batch = {"a": 1, "label": 2, "labels": 3}
    assert split(batch) == ({"a": 1, "label": 2}, 3)
    assert split(batch, whole=True) == (batch, 3)
    assert split({"a": 1}, whole=True) == ({"a": 1}, None)
    encoding = Encoding(batch)
    assert split(encoding, whole=True)[0] is encoding


def test_split_dataclasses():
    scene = Scene(None, x(), torch.zeros(4))
    (data, labels), whole = split(scene), split(scene, whole=True)
    assert [*data] == ["scale", "x"] and data["x"] is scene.x and labels is scene.labels
    assert [*whole[0]] == ["scale", "x", "labels"] and whole[1] is scene.labels
    moving = Moving(None, x(), torch.zeros(4))
    assert split(moving)[0] is moving and split(moving)[1] is moving.labels  # as an object, which the model takes whole


def test_split_objects():
    graphs = Graphs(x=x(), y=torch.zeros(4), num_graphs=4)
    assert split(graphs) == (graphs, graphs)
    assert split(graphs, labels="y")[0] is graphs and split(graphs, labels="y")[1] is graphs.y
    assert split(graphs, labels="y", inputs="x")[0] is graphs.x
    assert [*split(graphs, labels="y", inputs=["x"])[0]] == ["x"]
    labelled = Graphs(x=x(), labels=torch.zeros(4))
    assert split(labelled)[1] is labelled.labels


@pytest.mark.parametrize("batch, options, data, labels", [
    ((1, 2, 3), dict(labels=0), (2, 3), 1), ((1, 2, 3), dict(labels=-2), (1, 3), 2), ((A, B), dict(labels=None), (A, B), None), ((A,), dict(labels=None), A, None),
    ((1, 2, 3), dict(inputs=0), 1, 3), ((1, 2, 3), dict(inputs=[1, 0]), (2, 1), 3), (([1, 2], 3), dict(inputs=0), ([1, 2],), 3), (({"a": 1}, 3), {}, {"a": 1}, 3),
    (({"a": 1}, 3), dict(inputs=0), ({"a": 1},), 3), ({"a": 1, "y": 2}, dict(labels="y"), {"a": 1}, 2), ({"a": 1, "y": 2}, dict(labels=None), {"a": 1, "y": 2}, None),
    ({"a": 1, "b": 2, "y": 3}, dict(labels="y", inputs="a"), 1, 3), ({"a": 1, "b": 2, "labels": 3}, dict(inputs=["a"]), {"a": 1}, 3),
    ({"a": 1, "labels": 3}, dict(inputs=["a"], whole=True), {"a": 1}, 3), (Pair(1, 2), dict(labels="x"), 2, 1), (Pair(1, 2), dict(inputs="y"), 2, 2),
    ([{"a": 1}, {"a": 2}, {"a": 3}], dict(labels=None), ([{"a": 1}, {"a": 2}, {"a": 3}],), None), (([{"a": 1}], 3), {}, ([{"a": 1}],), 3), ((["u", "v"], 3), {}, (["u", "v"],), 3)])
def test_labels_and_inputs_by_name_and_place(batch, options, data, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert split(batch, **options) == (data, labels)


@pytest.mark.parametrize("batch, options, message", [
    (3, {}, "the loader yielded 3; a batch is a tensor, a tuple or list with the labels last, a mapping, a dataclass, or an object with a method to(device)"),
    (None, {}, "the loader yielded None; a batch is *"), ("abc", {}, "the loader yielded 'abc'; a batch is *"), (object, {}, "the loader yielded <class 'object'>; a batch is *"),
    ((), {}, "the loader yielded an empty tuple; give it at least one tensor"), ({}, {}, "the loader yielded an empty dict; *"),
    ({"input": 1}, {}, "the batch has no labels for loss_func; its keys are ['input']; name them with Learner(..., labels=\"...\"), or pass labels=None"),
    ({"x": 1, "target": 2}, dict(labels="targets"), "labels='targets': the batch is a dict, which has ['x', 'target']; did you mean target?"),
    ((1, 2), dict(labels=2), "labels=2: the batch is a tuple, which has [0, 1]"), (Pair(1, 2), dict(inputs=["z"]), "inputs='z': the batch is a Pair, which has ['x', 'y']"),
    (torch.ones(3), dict(inputs="x"), "inputs='x': the batch is a Tensor, which has no named parts"), ({"x": 1}, dict(labels=0), "labels=0: the batch is a dict, which has ['x']"),
    (Graphs(y=torch.ones(3)), dict(labels="z"), "labels='z': the batch is a Graphs, which has ['y']"),
    ([{"a": 1}] * 3, {}, "the loader yielded a list of 3 examples of type dict; collate them, or pass labels=None to give the model the whole list"),
    (["a", "b", "c"], {}, "the loader yielded a list of 3 examples of type str; *")])
def test_what_is_no_batch(batch, options, message):
    with pytest.raises(BatchError) as caught: unpack(batch, CPU, **options)
    assert str(caught.value) == message or (message.endswith("*") and str(caught.value).startswith(message[:-1]))


def test_calling():
    def model(*args, **kwargs): return args, kwargs
    assert call_model(model, (1, 2)) == ((1, 2), {})
    assert call_model(model, {"a": 1}) == ((), {"a": 1})
    assert call_model(model, "text") == (("text",), {})
    graphs = Graphs()
    assert call_model(model, graphs) == ((graphs,), {})


LOSS = torch.tensor(2.0)


@pytest.mark.parametrize("output, found", [
    ({"loss": LOSS, "logits": x()}, True), (OrderedDict(loss=LOSS), True), ((LOSS, x()), True), ((x(), LOSS), True), ([x(), LOSS, torch.tensor(3.0)], True), (Graphs(loss=LOSS), True),
    (namedtuple("Output", "logits loss")(x(), LOSS), True), ({"logits": x()}, False), ((x(), x()), False), (x(), False), (None, False), (Graphs(loss=None), False)])
def test_the_loss_that_a_model_computes(output, found): assert loss_of(output) is (LOSS if found else None)


# How many

def images(n, size=5): return [torch.ones(3, size + i, size) for i in range(n)]


PACKED = pack_sequence([torch.ones(3)] * 8)
SIZES = {
    "pair": ((x(8), torch.ones(8)), {}), "list": ([x(8), torch.ones(8)], {}), "own label": (x(8), {}), "mapping": ({"text": "abc", "a": x(8), "labels": x(8)}, {}),
    "nested": (({"m": x(8)}, 1), {}), "label without rows": ((x(8), torch.tensor(1.0)), {}), "scalar first": ((torch.tensor(1.0), x(8), x(8)), {}),
    "scalar first in a mapping": ({"t": torch.tensor(1.0), "x": x(8), "labels": x(8)}, {}), "images": ((images(8), torch.ones(8)), {}),
    "images and labels in lists": ((images(8), [*torch.ones(8)]), {}), "in tuples": ((tuple(images(8)), tuple(torch.ones(8))), {}),
    "examples in lists, labels with a dimension": (([*torch.ones(8, 3, 4)], [*torch.ones(8, 1)]), {}), "two inputs": (([x(8), x(8)], torch.ones(8)), {}),
    "two tasks": ((x(8), [torch.ones(8), torch.ones(8, 3)]), {}), "tasks in a mapping": ((x(8), {"a": torch.ones(8), "b": torch.ones(8)}), {}),
    "mappings as labels": ((images(8), [{"boxes": torch.ones(i, 4)} for i in range(8)]), {}), "mappings as inputs": (([{"boxes": torch.ones(9, 4)}] * 8, torch.ones(8)), {}),
    "texts": ((["a"] * 8, torch.ones(8)), {}), "tokens": (([[1, 2, 3]] * 8, torch.ones(8)), {}), "numbers as labels": ((x(8), [1] * 8), {}),
    "arrays": ((np.ones((8, 2)), np.ones(8)), {}), "packed": ((PACKED, torch.ones(8)), {}), "packed alone": (PACKED, {}), "dataclass": (Scene(torch.tensor(0.5), x(8), x(8)), {}),
    "graphs": (Graphs(x=x(20), y=torch.ones(8), num_graphs=8), {}), "batch_size": (Graphs(x=x(20), batch_size=8), {}), "rows": (Rows(x=x(8)), {}),
    "torch.Size": (Graphs(x=x(20), batch_size=torch.Size([8, 2])), {}), "graphs and labels": ((Graphs(x=x(20), num_graphs=8), torch.ones(8)), {}),
    "tensors of an object": (Graphs(x=x(8), y=torch.ones(8)), {}), "list of graphs": (([Graphs(x=x(3)) for _ in range(8)], torch.ones(8)), {}),
    "labels of an object": (Graphs(x=x(8), y=torch.ones(8)), dict(labels="y")), "no labels": ({"a": x(8), "b": x(8)}, dict(labels=None)),
    "inputs alone count": ({"a": x(8), "map": torch.ones(3), "labels": torch.ones(8)}, dict(inputs=["a"])), "labels first": ((torch.ones(8), x(8)), dict(labels=0)),
    "two inputs and no labels": (((x(8), x(8)), None), {}), "two inputs in a list and no labels": (([x(8), x(8)], None), {}),
    "no labels, a list": ([{"a": x(3)}] * 8, dict(labels=None)),
    "targets in one row, and their lengths": ((x(8), (torch.ones(24), torch.ones(8), torch.ones(8))), {}), "boxes in a list": ((images(8), [torch.ones(i + 1, 4) for i in range(8)]), {}),
    "targets and lengths by place": ((x(8), torch.ones(30), torch.ones(8), torch.ones(8)), dict(labels=[1, 2, 3])), "points in a list": (([torch.ones(i + 3, 2) for i in range(8)], torch.ones(8)), {}),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_nothing_contradicts(name):
    batch, options = SIZES[name]
    assert unpack(batch, CPU, **options)[3] == 8  # a warning would be an error


@pytest.mark.parametrize("batch, size", [((x(1), torch.ones(1)), 1), ((torch.tensor(1.0), torch.tensor(2.0)), 1), ((["a"], 3), 1), ((x(0), torch.ones(0)), 0), ({"labels": 3, "a": "b"}, 1)])
def test_sizes_at_the_edge(batch, size): assert unpack(batch, CPU)[3] == size


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.ones(n, 2) for n in (3, 4, 5)], layout=layout)
    assert [unpack(batch, CPU)[3] for batch in ((nested, torch.ones(3)), [nested, nested], nested)] == [3, 3, 3]


DISAGREE = "the parts of the batch disagree on the number of examples (%s); it is counted as %s; if that is wrong, give the batch a batch_size, or set learn.batch_size in an after_prepare hook"


@pytest.mark.parametrize("batch, options, size, parts", [
    ((torch.ones(2, 7), x(8), torch.ones(8)), {}, 8, "labels: 8, batch[0]: 2"), ({"pos": torch.arange(4.0), "x": x(8), "labels": x(8)}, {}, 8, "labels: 8, batch['pos']: 4"),
    ((torch.ones(5, 8, 2), torch.ones(8)), {}, 8, "labels: 8, batch[0]: 5"), ((x(4), [1, 2]), {}, 2, "labels: 2, batch[0]: 4"),
    ({"pos": torch.arange(4.0), "x": x(8), "m": x(8)}, dict(labels=None), 8, "batch['pos']: 4"), ((x(3), x(8)), dict(labels=None), 3, "batch[1]: 8"),
    (([x(8), x(8)], None), dict(inputs=0), 8, "batch[0]: 8 or 2"), (([torch.ones(4)] * 8, [torch.ones(4)] * 8), {}, 4, "labels: 4 or 8, batch[0]: 4 or 8"), (Graphs(x=x(20), edges=torch.ones(2, 9)), {}, 20, "batch.edges: 2")])
def test_a_size_that_is_in_doubt_is_told_once(batch, options, size, parts):
    with pytest.warns(UserWarning) as caught: assert unpack(batch, CPU, **options)[3] == size
    assert [str(warning.message) for warning in caught] == [DISAGREE % (parts, size)]
    assert unpack(batch, CPU, **options)[3] == size  # a second warning would be an error
    warn_again()
    with pytest.warns(UserWarning, match="disagree"): unpack(batch, CPU, **options)


def test_ragged_batches_warn_once():
    with pytest.warns(UserWarning) as caught:
        for n in (8, 8, 5, 4, 2): assert unpack((torch.ones(4, 2), x(n), torch.ones(n)), CPU)[3] == n
    assert len(caught) == 1


def test_an_object_that_does_not_count_its_examples_says_so():
    class Opaque:
        __slots__ = ()
        def to(self, device): return self
    with pytest.warns(UserWarning, match="an Opaque does not say how many examples it has; it is counted as 1; if that is wrong, give the batch a batch_size"):
        assert unpack(Opaque(), CPU)[3] == 1


@pytest.mark.parametrize("value, size", [(x(7), 7), (torch.tensor(1.0), 1), ((x(5), x(5)), 5), ({"a": x(3), "b": "text"}, 3), (["a", "b"], 2), ([], 1), (None, 1), (PACKED, 8)])
def test_the_size_of_what_is_not_a_batch(value, size): assert size_of(value) == size


# All at once

@pytest.mark.parametrize("batch", [(x(), torch.zeros(4)), [x(), x()], (x(), x(), x()), {"a": x(), "labels": x()}, x(), ((x(), x()), torch.zeros(4)),
                                   (torch.tensor(1.0), torch.tensor(2.0)), (x(), [1, 2, 3, 4]), Pair(x(), x()), Scene(None, x(), x())])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unpacking_moves_and_keeps_the_form(batch, device):
    moved, data, labels, size = unpack(batch, torch.device(device))
    assert type(moved) is type(batch) and size == unpack(batch)[3]
    found, wanted = [], []
    map_tensors(lambda t: found.append((t.shape, t.device)), (moved, data, labels))
    map_tensors(lambda t: wanted.append((t.shape, torch.device(device))), (batch, *split(batch)))
    assert found == wanted


def test_the_usual_pair_is_not_touched():
    batch = (x(), torch.zeros(4))
    opened = unpack(batch, CPU)
    assert opened[0] is batch and opened[1] is batch[0] and opened[2] is batch[1]


@pytest.mark.parametrize("sizes", [(8, 8, 2), (1, 5)])
def test_a_sum_over_the_batch_becomes_a_mean_over_the_examples(sizes):
    values = torch.arange(float(sum(sizes)), dtype=torch.float64)
    parts = values.split(list(sizes))
    means = [total(part.sum()).mean(len(part)) for part in parts]
    weighted = sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)
    assert torch.isclose(weighted, values.mean(), rtol=1e-12) and total(6.0).mean(3) == 2.0 and total(0.0).mean(0) == 0.0
