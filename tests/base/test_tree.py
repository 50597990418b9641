"""Batches of every make."""
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from learner.base.tree import BatchError, batch_size, call_model, map_tensors, open_batch, split_batch, to_device

Pair = namedtuple("Pair", "x y")
META = torch.device("meta")


class Encoding(UserDict):
    "Like the batches of Hugging Face: a mapping that is no dict and has a `.to`."
    def to(self, device): raise AssertionError("a mapping is moved tensor by tensor")


def x(n=4): return torch.ones(n, 2)


@pytest.mark.parametrize("tree", [x(), (x(), x()), [x(), [x(), "text"]], {"a": x(), "b": (x(), 3)}, Pair(x(), None),
                                  OrderedDict(a=x()), Encoding({"a": x()})], ids=lambda tree: type(tree).__name__)
def test_the_structure_stays_and_every_tensor_moves(tree):
    moved = to_device(tree, META)
    assert type(moved) is type(tree)
    found = []
    map_tensors(found.append, moved)
    wanted = []
    map_tensors(wanted.append, tree)
    assert len(found) == len(wanted) > 0 and all(t.device == META for t in found)


def test_what_is_no_tensor_stays_itself():
    thing = object()
    assert map_tensors(lambda t: t + 1, (thing, "text", 3, None))[0] is thing


def test_a_packed_sequence_is_trusted_with_its_own_to():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert to_device((packed,), torch.device("cpu"))[0].data.tolist() == packed.data.tolist()


@pytest.mark.parametrize("batch, data, labels", [
    (x(), "same", "same"), ((x(),), 0, 0), ([x(), 1], 0, 1), ((x(), 2, 3), (0, 1), 2), (Pair(x(), 5), 0, 1)])
def test_split_tuples(batch, data, labels):
    own, its = split_batch(batch)
    def pick(where): return batch if where == "same" else tuple(batch[i] for i in where) if isinstance(where, tuple) else batch[where]
    assert (own is pick(data) or own == pick(data)) and its is pick(labels)


def test_split_mappings():
    batch = {"a": 1, "label": 2, "labels": 3}
    assert split_batch(batch) == ({"a": 1, "label": 2}, 3)
    assert split_batch(batch, whole=True) == (batch, 3)
    assert split_batch({"a": 1}, whole=True) == ({"a": 1}, None)


@pytest.mark.parametrize("batch, size", [
    (x(7), 7), ((x(5), x(5)), 5), ({"text": "abc", "a": x(3)}, 3), (({"m": x(6)}, 1), 6), (torch.tensor(2.0), 1),
    (["a", "b"], 1), ((torch.tensor(1.0), x(9)), 1), ([], 1)])
def test_sizes(batch, size): assert batch_size(batch) == size


@pytest.mark.parametrize("batch", [(x(), torch.zeros(4)), [x(), x()], (x(), x(), x()), {"a": x(), "labels": x()}, x(),
                                   ((x(), x()), torch.zeros(4)), (torch.tensor(1.0), torch.tensor(2.0)), (x(), [1, 2])])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_opening_a_batch_is_moving_splitting_and_counting(batch, device):
    opened = open_batch(batch, torch.device(device))
    moved = to_device(batch, torch.device(device))
    assert type(opened[0]) is type(batch)
    assert opened[3] == batch_size(batch)
    found, wanted = [], []
    map_tensors(lambda t: found.append((t.shape, t.device)), opened[1:3])
    map_tensors(lambda t: wanted.append((t.shape, t.device)), split_batch(moved))
    assert found == wanted


def test_calling():
    def model(*args, **kwargs): return args, kwargs
    assert call_model(model, (1, 2)) == ((1, 2), {})
    assert call_model(model, {"a": 1}) == ((), {"a": 1})
    assert call_model(model, "text") == (("text",), {})


@pytest.mark.parametrize("batch, message", [
    (3, "the loader yielded 3; a batch is a tensor, a tuple or list with the labels last, or a mapping"),
    (None, "the loader yielded None; a batch is *"), ("abc", "the loader yielded 'abc'; a batch is *"),
    ((), "the loader yielded an empty tuple; a batch is *"), ({}, "the loader yielded an empty dict; a batch is *"),
    ({"input": 1}, "the batch has no labels for loss_func; its keys are ['input']")])
def test_what_is_no_batch(batch, message):
    with pytest.raises(BatchError) as caught: open_batch(batch, torch.device("cpu"))
    assert str(caught.value) == message or (message.endswith("*") and str(caught.value).startswith(message[:-1]))
