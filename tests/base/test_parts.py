"""What can be trained, and what decides the order of a loader."""
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from learner.base.parts import (
    cannot_restore,
    check_loaders,
    check_parts,
    generators_of,
    kept_order,
    loaders_of,
    places_in,
    samplers_of,
    with_epochs,
)
from learner.loop.data import DatasetLoader, TensorLoader

NUMBERS = torch.arange(12.0)


def tensors(seed=0): return TensorLoader((NUMBERS,), 4, shuffle=True, seed=seed)


class Both:
    "Batches of two loaders at once, which it holds in a private list."
    def __init__(self, *loaders): self._loaders = list(loaders)
    def __iter__(self): return zip(*self._loaders, strict=False)


class Stream(IterableDataset):
    epoch = 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self): return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Augmented(Dataset):
    def __init__(self, generator): self.generator = generator
    def __len__(self): return 12
    def __getitem__(self, i): return NUMBERS[i]


class Stateful:
    def __init__(self): self.left = iter(range(3))
    def __iter__(self): return self.left
    def state_dict(self): return {}
    def load_state_dict(self, state): pass


def test_generators_are_found_wherever_they_are():
    own, other = torch.Generator(), torch.Generator()
    data = TensorDataset(NUMBERS)
    sampler = BatchSampler(RandomSampler(data, generator=own), 4, drop_last=False)
    for loader in (DataLoader(data, 4, shuffle=True, generator=own), DataLoader(data, 4, sampler=RandomSampler(data, generator=own)),
                   DataLoader(data, batch_sampler=sampler), Both(DataLoader(data, 4, shuffle=True, generator=own)), {"a": [DataLoader(data, batch_sampler=sampler)]}):
        assert generators_of(loader) == [own]
    assert generators_of(Both(DataLoader(data, 4, generator=own), DataLoader(Augmented(other), 4))) == [own, other]


def test_epochs_are_told_to_samplers_data_sets_and_what_lies_in_wrappers():
    stream, loader = Stream(), tensors()
    assert with_epochs(DataLoader(stream, 4)) == [stream]
    assert with_epochs(loader) == [loader, loader.sampler]
    sampler = DistributedSampler(TensorDataset(NUMBERS), 2, 0)
    assert with_epochs(Both(DataLoader(TensorDataset(NUMBERS), sampler=sampler), DataLoader(stream))) == [sampler, stream]
    assert with_epochs(DataLoader(Subset(Augmented(None), [1]), 1)) == with_epochs([(NUMBERS, NUMBERS)]) == []


@pytest.mark.parametrize("make", [tensors, lambda: Both(tensors(), tensors(1)), lambda: DataLoader(Stream(), 4), lambda: DatasetLoader(TensorDataset(NUMBERS), 4, shuffle=True),
                                  lambda: DataLoader(TensorDataset(NUMBERS), 4, shuffle=True, generator=torch.Generator().manual_seed(3))])
def test_an_order_that_is_kept_comes_again(make):
    def read(): return [torch.cat([torch.as_tensor(leaf).flatten().float() for leaf in torch.utils._pytree.tree_leaves(batch)]).tolist() for batch in loader]
    loader = make()
    for part in with_epochs(loader): part.set_epoch(3)
    with kept_order([loader]): first = read()
    assert read() == first


def test_a_search_ends():
    class Node: pass
    node = Node()
    node.itself, node.many = node, [Node() for _ in range(1000)]
    for inner in node.many: inner.others = node.many
    assert len([*samplers_of(node)]) < 100
    chain = first = Node()
    for _ in range(1000):
        chain.next = Node()
        chain = chain.next
    assert len([*samplers_of(first)]) == 200
    assert [where for where, _ in places_in(Both({"a": tensors()}))][:4] == ["", "._loaders", "._loaders[0]", "._loaders[0]['a']"]


@pytest.mark.parametrize("make", [
    tensors, lambda: [(NUMBERS, NUMBERS)], lambda: Both(tensors(), tensors(1)), lambda: DataLoader(Stream()), Stateful, lambda: DataLoader(Augmented(torch.Generator()), 4),
    lambda: DataLoader(Augmented(open(__file__)), 4), lambda: DataLoader(TensorDataset(NUMBERS), 4, num_workers=1, persistent_workers=True)])  # noqa: SIM115
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_orders_that_can_be_restored(make): assert cannot_restore(make()) == ""


FIX = ", so resumed training would get different batches from it; give it state_dict() and load_state_dict(), or use a list, a DataLoader or a TensorLoader"


@pytest.mark.parametrize("make, reason", [
    (lambda: iter([1]), "list_iterator is an iterator, which cannot be rewound"), (lambda: (i for i in range(3)), "generator is an iterator, which cannot be rewound"),
    (lambda: Both(itertools.cycle([1])), "Both holds an iterator, which cannot be rewound (Both._loaders[0])"),
    (lambda: DataLoader(Augmented(np.random.default_rng(0)), 4), "DataLoader holds a random generator of NumPy (DataLoader.dataset.generator)"),
    (lambda: Both(DataLoader(Augmented(np.random.RandomState(0)), 4)), "Both holds a random generator of NumPy (Both._loaders[0].dataset.generator)"),
    (lambda: DataLoader(Subset(Augmented(random.Random(0)), [1]), 4), "DataLoader holds a generator of Python's random (DataLoader.dataset.dataset.generator)")])
def test_orders_that_cannot(make, reason): assert cannot_restore(make()) == reason + FIX


def test_loaders_with_names():
    loader = [(NUMBERS, NUMBERS)]
    assert loaders_of(loader) == {"": loader} and loaders_of({"a": loader}) == {"a": loader}
    named = {"train": loader, "validation": {"clean": loader, "2": loader}}
    check_parts(nn.Linear(1, 1), torch.optim.SGD, F.mse_loss, named)
    check_loaders(named, named)


@pytest.mark.parametrize("loaders, kind, message", [
    ({"validation": {"a b": []}}, ValueError, "dataloaders[\"validation\"] has a loader named 'a b'; use letters, digits and _, since the name becomes part of a column"),
    ({"validation": {3: []}}, ValueError, "dataloaders[\"validation\"] has a loader named 3; use *"), ({"test": {"": []}}, ValueError, "dataloaders[\"test\"] has a loader named ''; use *"),
    ({"test": {}}, ValueError, "dataloaders[\"test\"] is an empty mapping; name a loader in it"), ({"test": {"a": 3}}, TypeError, "dataloaders[\"test\"][\"a\"] is 3; pass an iterable of batches"),
    ({"test": {"a": {"b": []}}}, TypeError, "dataloaders[\"test\"][\"a\"] is {'b': []}; pass an iterable of batches"),
    ({"train": {"a": []}}, ValueError, "dataloaders[\"train\"] is a mapping; training reads one loader, and learner.loop.together.Together makes one of several"),
    ({"train": "abc"}, TypeError, "dataloaders[\"train\"] is 'abc'; pass an iterable of batches"),
    ({"train": (NUMBERS, NUMBERS)}, TypeError, "dataloaders[\"train\"] is a tuple of 2 arrays, which is data and not an iterable of batches; pass TensorLoader((x, y), batch_size=...), or [(x, y)] to have one batch"),
    ({"train": (NUMBERS.numpy(), NUMBERS)}, TypeError, "dataloaders[\"train\"] is a tuple of 2 arrays, which *"), ({"test": {"a": NUMBERS}}, TypeError, "dataloaders[\"test\"][\"a\"] is a Tensor, which is data *"),
    ({"validation": NUMBERS.numpy()}, TypeError, "dataloaders[\"validation\"] is an ndarray, which is data *"),
    ({"valid": []}, ValueError, "dataloaders: 'valid' is not one of ['train', 'validation', 'test']; did you mean validation?")])
def test_loaders_that_cannot_be(loaders, kind, message):
    with pytest.raises(kind) as caught: check_parts(nn.Linear(1, 1), torch.optim.SGD, F.mse_loss, loaders)
    assert str(caught.value) == message or (message.endswith("*") and str(caught.value).startswith(message[:-1]))


@pytest.mark.parametrize("loader", [[(NUMBERS, NUMBERS)], ((NUMBERS, NUMBERS),), [NUMBERS, NUMBERS], [*NUMBERS.split(4)], tensors(), (), [NUMBERS.numpy()]], ids=lambda loader: type(loader).__name__)
def test_loaders_that_can_be(loader): check_parts(nn.Linear(1, 1), torch.optim.SGD, F.mse_loss, {"train": loader})


def test_a_named_loader_that_is_empty():
    with pytest.raises(ValueError, match=r'^dataloaders\["validation"\]\["b"\] is empty; give it at least one batch$'): check_loaders({"validation": {"a": [1], "b": []}}, ["validation"])
