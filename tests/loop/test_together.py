"""Several loaders at once: what comes, in which order, and a pass that goes on in its middle."""
import os
import signal
import warnings
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learner.base.batch import unpack
from learner.base.data_hash import loader_hash
from learner.base.parts import cannot_restore, kept_order
from learner.keep.checkpoint import Checkpoint
from learner.loop.data import DatasetLoader, TensorLoader
from learner.loop.learner import Learner
from learner.loop.together import Together

X = torch.arange(60.0).reshape(30, 2) / 30
Y = torch.arange(30) % 3


class Rows(Dataset):
    def __len__(self): return 30
    def __getitem__(self, i): return X[i], Y[i]


class Drawing(Rows):
    "Every item draws from the global random numbers."
    def __getitem__(self, i): return X[i] + torch.rand(2), Y[i]


MAKERS = {
    "ours": lambda: (TensorLoader((X[:7], Y[:7]), 2, shuffle=True), TensorLoader(X, 3, shuffle=True, seed=1)),
    "data sets": lambda: (DatasetLoader(TensorDataset(X[:7], Y[:7]), 2, shuffle=True), DatasetLoader(Rows(), 3, shuffle=True)),
    "torch": lambda: (DataLoader(TensorDataset(X[:7], Y[:7]), 2, shuffle=True), DataLoader(Rows(), 3, shuffle=True)),
    "torch with generators": lambda: (DataLoader(TensorDataset(X[:7], Y[:7]), 2, shuffle=True, generator=torch.Generator().manual_seed(3)), TensorLoader(X, 3, shuffle=True)),
    "drawing": lambda: (DataLoader(Drawing(), 10, shuffle=True), TensorLoader(X, 3, shuffle=True)),
    "lists": lambda: ([(X[:2], Y[:2]), (X[2:4], Y[2:4])], [X[i:i + 3] for i in range(0, 30, 3)]),
}


def make(kind, batches="longest"):
    labelled, unlabelled = MAKERS[kind]()
    return Together(batches, labelled=labelled, unlabelled=unlabelled)


def texts(batches): return [str(batch) for batch in batches]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_comes_and_how_much(kind):
    for batches, count in (("longest", 10), ("shortest", {"drawing": 3, "lists": 2}.get(kind, 4)), (25, 25)):
        both = make(kind, batches)
        assert len(both) == len(list(both)) == count
        batch = next(iter(both))
        assert list(batch) == ["labelled", "unlabelled"]
        assert batch.batch_size == len(batch["labelled"][1]) == unpack(batch, labels=None)[3]


def test_a_loader_that_starts_over_has_another_order_in_every_pass_of_every_epoch():
    both, seen = make("ours"), []
    for _ in range(3):
        rows = torch.cat([batch["labelled"][1] + 10 * batch["labelled"][0][:, 0] for batch in both])
        seen += [tuple(part.tolist()) for part in rows.split(7) if len(part) == 7]
    assert len(seen) == len(set(seen)) == 6 and len({tuple(sorted(part)) for part in seen}) == 1


@pytest.mark.parametrize("kind", ["ours", "data sets", "lists"])
def test_seed_and_epoch_decide_the_order(kind):
    one, other = make(kind), make(kind)
    torch.manual_seed(5)
    passes = [texts(one) for _ in range(3)]
    torch.manual_seed(6)
    other.set_epoch(2)
    assert texts(other) == passes[2] and other.epoch == 3
    if kind != "lists": assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("kind", ["ours", "data sets"])
def test_a_pass_from_its_middle(kind):
    both = make(kind)
    both.set_epoch(4)
    whole = texts(both)
    for first in range(10):
        both.set_epoch(4)
        assert texts(both.batches_from(first)) == whole[first:]


@pytest.mark.parametrize("kind", MAKERS)
def test_reading_twice_under_kept_order(kind):
    both = make(kind)
    list(both)
    torch.manual_seed(3)
    with kept_order([both]): first = texts(both)
    torch.manual_seed(3)
    if kind != "drawing": assert texts(both) == first


class Mixed(Learner):
    "Trains on one part and draws random numbers between batches."
    def prepare(self):
        super().prepare()
        self.data, self.labels = self.batch["labelled"]

    def compute_loss(self):
        super().compute_loss()
        more = self.batch["unlabelled"]
        x = more if isinstance(more, torch.Tensor) else more[0]
        self.loss = self.loss + 0.1 * self.model(x + torch.rand(2)).square().mean()


def train(kind, epochs, folder=None, stop=None, **options):
    torch.manual_seed(1)
    learn = Mixed(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2)), torch.optim.SGD, F.cross_entropy, {"train": make(kind)}, labels=None, device="cpu")
    if folder: learn.add(Checkpoint(folder))
    seen = []
    def note(learn):
        seen.append(str(learn.batch))
        if len(seen) == stop: os.kill(os.getpid(), signal.SIGINT)  # ends training after this batch
    learn.on("after_batch", note)
    with suppress(KeyboardInterrupt): learn.train(epochs, 0.1, **options)
    return learn, seen


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("stop", [1, 4, 7, 13, 20])
def test_a_training_that_is_stopped_goes_on_with_the_very_batch(kind, stop, tmp_path):
    whole, seen = train(kind, 3)
    torch.manual_seed(99)
    _, first = train(kind, 3, tmp_path / "checkpoints", stop)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, then = train(kind, 3, resume=tmp_path / "checkpoints")
    assert first + then == seen
    assert torch.equal(whole.model[0].weight, resumed.model[0].weight)


def test_it_can_be_restored_and_hashed():
    assert cannot_restore(make("ours")) == "" and "iterator" in cannot_restore(Together(5, a=[1], b=iter([1, 2])))
    assert loader_hash(make("ours")) == loader_hash(make("ours")) != loader_hash(make("data sets"))
    assert len(loader_hash(make("ours"))) == 64


A = TensorLoader(X, 3)


@pytest.mark.parametrize("call, message", [
    (lambda: Together(a=A), "Together: the loaders are ['a']; give at least two, each its own"), (lambda: Together(a=A, b=A), "Together: the loaders are ['a', 'b']; give at least two, each its own"),
    (lambda: Together(a=A, b=iter([1])), "Together: b is empty or does not know its length; say how many batches a pass has: Together(batches=100, ...)"),
    (lambda: Together("shortest", a=A, b=[]), "Together: b is empty or does not know its length; *"), (lambda: Together(0, a=A, b=[1]), "batches is 0; it must be a whole number of at least 1"),
    (lambda: Together("long", a=A, b=[1]), "batches is 'long'; it must be a whole number of at least 1, \"longest\" or \"shortest\""), (lambda: make("ours").set_epoch(-1), "epoch is -1; *"),
    (lambda: list(Together(5, a=A, b=iter([1, 2]))), "Together: b yielded no batch; an iterator can be read only once, so give a list or a DataLoader")])
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError) as caught: call()
    assert str(caught.value) == message or (message.endswith("*") and str(caught.value).startswith(message[:-1]))


def test_repr(): assert repr(Together(a=A, b=[1])) == "Together(10 batches of a: 30 examples in 10 batches of 3, b: 1 batch)"


def test_an_attribute_that_is_not_there():
    with pytest.raises(AttributeError, match="'Together' object has no attribute 'batch_from'"): _ = make("ours").batch_from
