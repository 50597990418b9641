import copy
import gzip
import importlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from learner.base.parts import length_of
from learner.loop import data, datasets
from learner.loop.data import (
    DataLoaders,
    DatasetLoader,
    EpochSampler,
    NoLoader,
    TensorLoader,
)
from learner.loop.datasets import digits, fashion_mnist, read_idx, split
from learner.loop.learner import Learner

N = 23  # neither a multiple of the batch size nor of anything else
X = torch.arange(N * 3.0).reshape(N, 3)
Y = torch.arange(N)


class Rows(Dataset):
    """Examples one by one."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i]


class Batched(Rows):
    """Examples a batch at a time; it notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, i):
        raise AssertionError("asked for a single example")

    def __getitems__(self, rows):
        self.asked.append(list(rows))
        return [(X[i], Y[i]) for i in rows]


class Augmented(Rows):
    def __getitem__(self, i):
        return torch.rand(()), i


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[0], Y[0])])


def whole_batch(examples):
    return {"rows": torch.stack([x for x, _ in examples])}


def from_tensors(**options):
    return DataLoaders.from_tensors(train=(X, Y), batch_size=5, **options).train


def from_datasets(dataset=None, **options):
    return DataLoaders.from_datasets(train=dataset or Rows(), batch_size=5, **options).train


def batches(loader):
    return [tuple(part.tolist() for part in batch) for batch in loader]


# The order of an epoch


MAKERS = {
    "tensors": from_tensors,
    "TensorDataset": lambda **options: from_datasets(TensorDataset(X, Y), **options),
    "dataset": from_datasets,
    "workers": lambda **options: from_datasets(num_workers=2, **options),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def test_every_kind_of_loader_yields_the_rows_of_its_order(make):
    loader = make(seed=3)
    for epoch in range(3):
        rows = loader.order(epoch)
        assert sorted(rows.tolist()) == list(range(N))
        expected = [(X[part].tolist(), Y[part].tolist()) for part in rows.split(5)]
        assert loader.epoch == epoch
        assert batches(loader) == expected
    assert [len(labels) for _, labels in loader] == [5, 5, 5, 5, 3]
    assert len(loader) == 5


def test_the_order_is_the_same_for_every_kind_of_loader():
    orders = [[m(seed=4).order(e).tolist() for e in range(3)] for m in MAKERS.values()]
    assert all(order == orders[0] for order in orders)


def test_set_epoch_makes_any_epoch_again(make):
    loader = make()
    passes = [batches(loader) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert batches(loader) == passes[epoch]
        assert loader.epoch == epoch + 1


def test_a_pass_cut_short_leaves_the_next_as_it_is(make):
    loader, undisturbed = make(), make()
    for _ in zip(range(2), loader, strict=False): pass
    first = iter(loader)
    next(first)
    batches(undisturbed), batches(undisturbed)
    assert loader.epoch == 2
    assert batches(loader) == batches(undisturbed)


def test_two_passes_at_once_are_two_epochs():
    loader = from_tensors()
    one, two = zip(*zip(loader, loader, strict=True), strict=True)
    assert torch.equal(torch.cat([y for _, y in one]), loader.order(0))
    assert torch.equal(torch.cat([y for _, y in two]), loader.order(1))


def test_the_epoch_counts_from_the_start_of_a_pass():
    loader = from_tensors()
    started = iter(loader)
    assert loader.epoch == 1
    loader.set_epoch(7)
    assert torch.equal(torch.cat([y for _, y in started]), loader.order(0))
    assert loader.epoch == 7


def test_global_random_numbers_are_neither_read_nor_advanced(make):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loader = make(seed=9)
    loader.order(4)
    one = batches(loader)
    split([0, 0, 0, 1, 1], 0.4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert batches(make(seed=9)) == one


def test_no_two_pairs_of_seed_and_epoch_have_one_order():
    seeds = [0, 1, 2, 3, 10, 11, 2**32, 2**32 + 1, 2**64 - 1, 99]
    orders = {tuple(EpochSampler(40, seed=seed).order(epoch).tolist()) for seed in seeds for epoch in range(120)}
    assert len(orders) == len(seeds) * 120


def test_orders_differ_where_half_of_the_hash_agrees():
    for half in (0, 1):
        seen = {}
        for epoch in range(1_000_000):
            word = data.hashed_seeds(0, epoch)[half]
            if word in seen: break
            seen[word] = epoch
        assert data.hashed_seeds(0, epoch)[half] == data.hashed_seeds(0, seen[word])[half]
        sampler = EpochSampler(40)
        assert not torch.equal(sampler.order(epoch), sampler.order(seen[word]))


def test_orders_are_uniform():
    # 6,000 epochs of 3 examples: each of the 6 orders is expected 1,000 times, standard deviation 29
    sampler = EpochSampler(3, seed=5)
    found = [tuple(sampler.order(epoch).tolist()) for epoch in range(6000)]
    assert len(set(found)) == 6
    assert all(abs(found.count(order) - 1000) < 5 * 29 for order in set(found))


def test_another_process_makes_the_same_order_and_loads_nothing_more():
    code = (
        "import sys, learner.loop.data as d; print(d.EpochSampler(50, seed=6).order(8).tolist());"
        "print([m for m in ('sklearn', 'matplotlib', 'torcheval', 'fastprogress') if m in sys.modules])"
    )
    root = Path(data.__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(EpochSampler(50, seed=6).order(8).tolist()), "[]"]


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        order = EpochSampler(9).order(1)
        loader = TensorLoader(X, 4, shuffle=True)
        rows = torch.cat(list(loader))
        parts = split(torch.tensor([0, 0, 1, 1], device="cpu"), 0.5)
    assert torch.equal(order, EpochSampler(9).order(1))
    assert torch.equal(rows, X[loader.order(0)])
    assert all(part.device.type == "cpu" and len(part) == 2 for part in parts)


def test_without_shuffle_the_order_is_that_of_the_data(make):
    loader = make(shuffle=False)
    for _ in range(2):
        assert [y for _, labels in batches(loader) for y in labels] == list(range(N))
    assert loader.order(7).tolist() == list(range(N))


def test_drop_last(make):
    loader = make(drop_last=True)
    assert len(loader) == 4
    assert torch.equal(torch.cat([labels for _, labels in loader]), loader.order(0)[:20])


def test_batch_size_that_fits_exactly_or_exceeds_the_data():
    assert [len(rows) for rows in TensorLoader(X[:20], 5)] == [5, 5, 5, 5]
    assert [len(rows) for rows in TensorLoader(X[:20], 5, drop_last=True)] == [5, 5, 5, 5]
    assert [len(rows) for rows in TensorLoader(X, 100)] == [N]
    assert [len(rows) for rows in TensorLoader(X, np.int64(20))] == [20, 3]


# Tensors


def test_a_batch_has_the_form_of_the_data():
    rows = TensorLoader(X, shuffle=True).order(0)
    (one,) = TensorLoader(X, shuffle=True)
    assert torch.equal(one, X[rows])
    (pair,) = TensorLoader((X, Y), shuffle=True)
    assert type(pair) is tuple and torch.equal(pair[0], X[rows]) and torch.equal(pair[1], Y[rows])
    (named,) = TensorLoader({"inputs": X, "labels": Y}, shuffle=True)
    assert list(named) == ["inputs", "labels"] and torch.equal(named["labels"], Y[rows])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.complex64])
def test_dtypes_and_strides_are_kept(dtype):
    values = torch.arange(24).reshape(2, 12).t().to(dtype)  # not contiguous
    got = torch.cat(list(TensorLoader(values, 5)))
    assert got.dtype == dtype and torch.equal(got, values)


def test_one_index_select_per_tensor_and_batch():
    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls += function is torch.Tensor.index_select and args[0] is X
            return function(*args, **(kwargs or {}))

    with Counting() as counting:
        list(TensorLoader((X, Y), 5, shuffle=True))
    assert counting.calls == 5


def test_changing_a_batch_leaves_the_data_alone():
    x = X.clone()
    for loader in (TensorLoader(x, 5), TensorLoader(x, 5, shuffle=True), TensorLoader(x, 100)):
        for batch in loader: batch.zero_()
    assert torch.equal(x, X)


def test_indices_and_transform():
    picked = torch.tensor([20, 3, 5, 3], dtype=torch.int32)
    loader = TensorLoader((X, Y), 3, indices=picked, transform=lambda batch: (batch[0] * 2, batch[1]))
    assert loader.order(0).tolist() == [20, 3, 5, 3]
    doubled, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(doubled), 2 * X[[20, 3, 5, 3]])
    assert torch.cat(labels).tolist() == [20, 3, 5, 3]
    shuffled = TensorLoader(Y, 3, shuffle=True, indices=picked)
    assert torch.equal(torch.cat(list(shuffled)), Y[shuffled.order(0)])
    assert sorted(shuffled.order(0).tolist()) == [3, 3, 5, 20]


# Data sets


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_from_the_middle_that_nobody_reads_leaves_the_next_one_whole(num_workers):
    loader = from_datasets(num_workers=num_workers, shuffle=True)
    abandoned = loader.batches_from(3)
    assert torch.equal(torch.cat([y for _, y in loader]), Y[loader.order(0)])
    loader.set_epoch(0)
    assert torch.equal(torch.cat([y for _, y in abandoned]), Y[loader.order(0)][15:])  # it is read after all
    assert torch.equal(torch.cat([y for _, y in loader]), Y[loader.order(1)])


class NoLength(Stream):
    def __len__(self): raise NotImplementedError


def test_a_stream_that_tells_no_length_can_be_trained_on():
    loaders = DataLoaders(train=DataLoader(NoLength(), 1))
    assert repr(loaders) == "DataLoaders\n  train  an unknown number of batches of 1"
    assert length_of(loaders.train) is None
    learn = Learner(nn.Linear(3, 1), torch.optim.SGD, lambda p, y: p.mean(), loaders, device="cpu")
    learn.train(2, learning_rate=0.1)
    assert len(learn.history) == 2


def test_getitems_is_asked_once_for_each_batch():
    dataset = Batched()
    loader = from_datasets(dataset)
    got = batches(loader)
    assert dataset.asked == [rows.tolist() for rows in loader.order(0).split(5)]
    assert got == batches(from_datasets())


def test_workers_do_not_change_what_comes():
    alone, two = from_datasets(seed=8), from_datasets(seed=8, num_workers=2)
    for _ in range(2): assert batches(alone) == batches(two)
    kept = from_datasets(seed=8, num_workers=2, persistent_workers=True)
    next(iter(kept))  # cut short
    kept.set_epoch(0)
    alone.set_epoch(0)
    for _ in range(2): assert batches(alone) == batches(kept)


def test_random_numbers_of_workers_come_from_seed_and_epoch():
    loader = from_datasets(Augmented(), num_workers=2)
    first, second = batches(loader), batches(loader)
    loader.set_epoch(0)
    torch.manual_seed(12345)
    assert batches(loader) == first != second


def test_tensor_datasets_and_parts_of_them_go_the_fast_way():
    whole = TensorDataset(X, Y)
    part, rest = random_split(whole, [10, N - 10], torch.Generator().manual_seed(0))
    inner = Subset(part, [9, 0, 4])
    dls = DataLoaders.from_datasets(train=part, validation=rest, test=inner, batch_size=4, num_workers=2)
    for name, dataset in (("train", part), ("validation", rest), ("test", inner)):
        loader = dls[name]
        assert type(loader) is TensorLoader
        assert loader.data[0] is X  # not copied
        got = sorted(y for _, labels in batches(loader) for y in labels)
        assert got == sorted(int(dataset[i][1]) for i in range(len(dataset)))
    assert [y for _, labels in batches(dls.test) for y in labels] == [int(inner[i][1]) for i in range(3)]


def test_the_usual_way_where_there_is_more_to_do():
    class Negative(TensorDataset):
        def __getitem__(self, i):
            return tuple(-value for value in super().__getitem__(i))

    assert type(from_datasets(Negative(X, Y))) is DatasetLoader
    assert type(from_datasets(Subset(Negative(X, Y), [0, 1]))) is DatasetLoader
    loader = from_datasets(TensorDataset(X, Y), collate_fn=whole_batch, shuffle=False)
    assert torch.equal(torch.cat([batch["rows"] for batch in loader]), X)


def test_a_dataset_loader_is_a_dataloader():
    loader = from_datasets()
    assert isinstance(loader, DataLoader)
    assert loader.batch_size == 5 and len(loader.dataset) == N
    accelerated = torch.accelerator.is_available()  # a build for CUDA names it where there is none, too
    assert loader.pin_memory == (accelerated and torch.accelerator.current_accelerator().type != "mps")
    assert from_datasets(pin_memory=False).pin_memory is False


# DataLoaders


def test_mapping_and_attributes():
    batch = [(X, Y)]
    dls = DataLoaders(test=batch, train=from_tensors())
    assert list(dls) == ["train", "test"] and len(dls) == 2
    assert dls["test"] is dls.test is batch
    assert dict(dls) == dict(**dls) == {"train": dls.train, "test": batch}
    assert "validation" not in dls and dls.get("validation") is None and not hasattr(dls, "validation")
    assert {"train", "validation", "test"} <= set(dir(dls))
    with pytest.raises(NoLoader): dls["validation"]
    with pytest.raises(NoLoader): _ = dls.validation
    assert list(copy.copy(dls)) == list(copy.deepcopy(dls)) == list(pickle.loads(pickle.dumps(dls))) == list(dls)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_loaders_cannot_be_set(name):
    dls = DataLoaders(train=[X])
    with pytest.raises(AttributeError, match=f"property '{name}' of 'DataLoaders' object has no setter"):
        setattr(dls, name, [Y])
    assert list(dls) == ["train"] and dls.train[0] is X
    with pytest.raises(TypeError):
        dls["train"] = [Y]


def test_any_iterable_of_batches_is_a_loader():
    for loader in ([X], (batch for batch in [X]), DataLoader(Rows()), DataLoader(Stream()), [(X, Y)], ((X, Y),)):
        assert DataLoaders(train=loader).train is loader


def test_only_training_is_shuffled_and_drops():
    dls = DataLoaders.from_tensors((X, Y), (X, Y), (X, Y), batch_size=5, drop_last=True, evaluation_batch_size=20)
    assert [len(dls[name]) for name in dls] == [4, 2, 2]
    for name in ("validation", "test"):
        for _ in range(2): assert [y for _, labels in batches(dls[name]) for y in labels] == list(range(N))
    dls = DataLoaders.from_datasets(Rows(), Rows(), Rows(), batch_size=5, drop_last=True, evaluation_batch_size=20)
    assert [len(dls[name]) for name in dls] == [4, 2, 2]
    assert [y for _, labels in batches(dls.test) for y in labels] == list(range(N))
    assert [loader.batch_size for loader in DataLoaders.from_tensors(X, X, batch_size=7).values()] == [7, 7]


def test_loaders_with_names():
    clean, noisy = from_tensors(), [(X, Y)]
    dls = DataLoaders(train=clean, validation={"clean": clean, "noisy": noisy}, test={"all": noisy})
    assert dls.validation == dls["validation"] == {"clean": clean, "noisy": noisy} and list(dls) == ["train", "validation", "test"]
    assert repr(dls).splitlines()[2:] == ["  validation.clean  23 examples in 5 batches of 5, shuffled with seed 0", "  validation.noisy  1 batch", "  test.all          1 batch"]
    with pytest.raises(ValueError, match="has a loader named 'a b'"): DataLoaders(validation={"a b": noisy})
    with pytest.raises(TypeError, match="is 3; pass an iterable"): DataLoaders(validation={"a": 3})


def test_repr():
    stream = DataLoader(Stream(), batch_size=4)
    assert repr(DataLoaders(train=[X], validation=stream, test=(x for x in X))) == (
        "DataLoaders\n"
        "  train       1 batch\n"
        "  validation  an unknown number of batches of 4\n"
        "  test        an unknown number of batches"
    )
    big = torch.zeros(2000, 1)
    dls = DataLoaders.from_tensors(train=big, test=big[:1], batch_size=1, seed=5)
    assert repr(dls) == (
        "DataLoaders\n"
        "  train  2,000 examples in 2,000 batches of 1, shuffled with seed 5\n"
        "  test   1 example in 1 batch of 1"
    )
    assert repr(from_datasets()) == "DatasetLoader(23 examples in 5 batches of 5, shuffled with seed 0)"
    assert repr(DataLoaders(train=DataLoader(Rows(), 10))) == "DataLoaders\n  train  23 examples in 3 batches of 10"


def test_classes():
    assert DataLoaders(train=[X]).classes is None
    assert DataLoaders.from_tensors(X, classes=["a", "b"]).classes == ("a", "b")
    named = Rows()
    named.classes = ["c", "d"]
    assert DataLoaders.from_datasets(named).classes == ("c", "d")
    assert DataLoaders.from_datasets(named, classes="xy").classes == ("x", "y")


# Splits


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ([63, 30, 7], 0.2, [13, 6, 1]),  # shares 12.6, 6.0, 1.4: one more to the largest remainder
        ([63, 30, 7], 20, [13, 6, 1]),
        ([50, 30, 20], 0.15, [8, 4, 3]),  # 7.5, 4.5, 3.0: of equal remainders the first
        ([97, 3], 0.1, [9, 1]),  # 9.7, 0.3: at least one of each, not 10 and 0
        ([90, 2, 2, 2, 2, 2], 0.06, [1, 1, 1, 1, 1, 1]),
        ([2, 98], 0.9, [1, 89]),  # 1.8, 88.2: at least one stays for training
        ([5, 5], 0.25, [2, 1]),  # 2.5 is rounded up to 3 in all
        ([10], 0.5, [5]),
        ([2, 2], 2, [1, 1]),
    ],
)
def test_split_counts_by_hand(counts, size, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    training, validation = split(labels, size)
    assert labels[validation].bincount(minlength=len(counts)).tolist() == expected
    assert torch.cat([training, validation]).sort().values.tolist() == list(range(len(labels)))
    assert training.tolist() == sorted(training.tolist()) and validation.tolist() == sorted(validation.tolist())


def test_split_is_within_one_of_the_exact_share():
    generator = np.random.default_rng(0)
    for _ in range(200):
        counts = generator.integers(20, 200, size=generator.integers(2, 15))
        labels = np.repeat(np.arange(len(counts)), counts)
        fraction = generator.uniform(0.1, 0.9)
        _, validation = split(labels, fraction)
        assert len(validation) == int(fraction * len(labels) + 0.5)
        assert (abs(np.bincount(labels[validation.numpy()]) - counts * len(validation) / len(labels)) < 1).all()


def test_split_depends_on_the_seed_alone():
    labels = torch.arange(200) % 4
    first = split(labels, 0.3, seed=1)
    torch.manual_seed(99)
    again, other = split(labels, 0.3, seed=1), split(labels, 0.3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_split_draws_each_example_of_a_class_as_often():
    # 2 of 8 in 2,000 seeds: each example is expected 500 times, standard deviation 19
    drawn = torch.cat([split([7] * 8, 2, seed)[1] for seed in range(2000)]).bincount(minlength=8)
    assert ((drawn - 500).abs() < 5 * 19).all()


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, lambda values: torch.tensor(values).int()])
def test_split_takes_any_sequence_of_whole_numbers(kind):
    labels = [-1, 5, 5, -1, 5, 900, 900]
    assert all(torch.equal(a, b) for a, b in zip(split(kind(labels), 3), split(labels, 3), strict=True))
    assert {labels[i] for i in split(kind(labels), 3)[1]} == {-1, 5, 900}


# Data that is there


def test_digits_are_those_of_scikit_learn():
    pixels, targets = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    dls = digits()
    (images, labels), (test_images, test_labels) = dls.train.data, dls.test.data
    assert images.dtype == torch.float32 and images.shape == (1438, 1, 8, 8) and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    got = torch.cat([images, test_images]).flatten(1) * 16
    got = torch.cat([got, torch.cat([labels, test_labels])[:, None]], dim=1)
    assert sorted(got.tolist()) == sorted(np.column_stack([pixels, targets]).tolist())
    assert dls.classes == tuple("0123456789")
    assert [len(loader.sampler) for loader in dls.values()] == [1294, 144, 359]
    for name in dls:
        found = torch.cat([labels for _, labels in dls[name]]).bincount(minlength=10)
        share = torch.from_numpy(np.bincount(targets)) * (found.sum() / len(targets))
        assert ((found - share).abs() < 2).all()


def test_digits_parts_are_disjoint_and_the_test_is_fixed():
    one, two = digits(seed=0), digits(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.test.data, two.test.data, strict=True))
    held_out, rest = set(one.validation.order(0).tolist()), set(one.train.order(0).tolist())
    assert not held_out & rest and len(held_out | rest) == 1438
    assert held_out != set(two.validation.order(0).tolist())
    assert one.validation.data[0] is one.train.data[0]  # not copied
    whole = digits(validation=None)
    assert list(whole) == ["train", "test"] and len(whole.train.sampler) == 1438
    assert len(digits(validation=100).validation.sampler) == 100


def test_digits_need_no_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(digits().train.sampler) == 1294


def test_digits_are_the_same_bits_and_the_same_split_as_ever():
    pixels, targets = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(targets, dtype=torch.int64)
    rest, test = split(labels, 0.2)
    dls = digits()
    for own, rows in ((dls.train.data, rest), (dls.test.data, test)):
        assert torch.equal(own[0], images[rows]) and torch.equal(own[1], labels[rows])
    # what the version that read scikit-learn's file gave
    assert test[:5].tolist() == [1, 6, 7, 9, 15] and dls.train.order(0)[:5].tolist() == [1233, 1000, 631, 311, 137] and dls.validation.order(0)[:5].tolist() == [2, 7, 10, 22, 63]


def idx(array):
    """The content of an IDX file, by numpy."""
    head = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + head + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_against_numpy(tmp_path, shape, packed):
    expected = np.random.default_rng(0).integers(0, 256, shape)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(expected)) if packed else idx(expected))
    got = read_idx(path)
    assert got.dtype == torch.uint8 and tuple(got.shape) == shape
    assert (got.numpy() == expected).all()
    assert got.fill_(1).sum() == got.numel()  # it may be written to


GOOD = idx(np.arange(12).reshape(3, 4))
PACKED = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (50, 50))), mtime=0)  # the ids of the tests hold it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged (unpack requires a buffer of 4 bytes"),
        (b"\0\0", "is damaged (unpack requires a buffer of 4 bytes"),
        (b"<html>", "is not an IDX file of unsigned bytes, it begins with 3c 68 74 6d; get it again"),
        (GOOD[:-1], "is damaged, it has 11 bytes for shape (3, 4)"),
        (GOOD + b"\0", "is damaged, it has more than 12 bytes for shape (3, 4)"),
        (GOOD[:9], "is damaged (unpack requires a buffer of 8 bytes"),
        (b"\0\0\x08\0", "is damaged, it has 0 bytes for shape ()"),
        (idx(np.zeros((0, 4))), "is damaged, it has 0 bytes for shape (0, 4)"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0\0\0\0",
         "is not an IDX file of unsigned bytes, it begins with 00 00 0d 01"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "has 79,228,162,458,924,105,385,300,197,375 values, or so it says, and no more than 268,435,456 are read; pass a larger most, if you trust it"),
        (PACKED[:-20], "is damaged (it ends too early)"),
        (PACKED[:100] + bytes([PACKED[100] ^ 255]) + PACKED[101:], "is damaged ("),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "is damaged (Error -3 while decompressing data: incorrect data check"),
        (PACKED + b"rubbish", "is damaged (it goes on behind its end"),
        (PACKED[:5], "is damaged ("),
        (b"\0\0\x08\xff" + b"\xff" * 2000, "has 255 dimensions; at most 8 are read"),
    ],
)
def test_damaged_idx_files(tmp_path, content, message):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error: read_idx(path)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)


def test_a_file_that_unpacks_to_much_more_than_it_says_is_not_unpacked(tmp_path):
    import resource
    bomb = tmp_path / "bomb"
    with gzip.open(bomb, "wb") as file:
        file.write(GOOD)
        for _ in range(400): file.write(bytes(1_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is damaged, it has more than 12 bytes"): read_idx(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_packed_file_that_goes_on_for_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(PACKED)
    with path.open("ab") as file: file.truncate(1 << 40)  # of zeros, which some readers skip one by one
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, and at most 268,769,427 are read"): read_idx(path)


def test_a_file_that_says_how_much_it_is(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(gzip.compress(idx(np.zeros((1000, 1000)))))
    with pytest.raises(ValueError, match=r"has 1,000,000 values, or so it says, and no more than 999,999 are read; pass a larger most"): read_idx(path, 999_999)
    assert read_idx(path, 10**6).shape == (1000, 1000)


LABELS = {"train": np.arange(60) % 10, "t10k": np.arange(20) % 10}
IMAGES = {name: np.random.default_rng(1).integers(0, 256, (len(y), 28, 28)) for name, y in LABELS.items()}


def write_fashion(folder, pack=lambda content: content, ending="", **replaced):
    folder.mkdir(parents=True, exist_ok=True)
    for name in LABELS:
        labels, images = replaced.get(f"{name}_labels", LABELS[name]), replaced.get(f"{name}_images", IMAGES[name])
        (folder / f"{name}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(labels)))
        (folder / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(idx(images)))
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without Fashion-MNIST."""
    monkeypatch.delenv("LEARNER_DATA", raising=False)
    monkeypatch.setattr(datasets, "_FASHION_DEBIAN", tmp_path / "debian")
    return tmp_path


def test_small_fashion_mnist_by_hand(nowhere):
    dls = fashion_mnist(write_fashion(nowhere), batch_size=16, validation=10, seed=2)
    assert [len(loader.sampler) for loader in dls.values()] == [50, 10, 20]
    for name, source in (("train", "train"), ("validation", "train"), ("test", "t10k")):
        images, labels = (torch.cat(parts) for parts in zip(*dls[name], strict=True))
        rows = dls[name].order(0).numpy()
        assert images.shape[1:] == (1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (images[:, 0].numpy() == IMAGES[source][rows].astype(np.float32) / 255).all()
        assert (labels.numpy() == LABELS[source][rows]).all()
    assert torch.cat([labels for _, labels in dls.validation]).bincount().tolist() == [1] * 10
    assert dls.train.data[0] is dls.validation.data[0] and dls.train.data[0].dtype == torch.uint8
    assert len(dls.classes) == 10 and dls.classes[9] == "Ankle boot"


def test_where_fashion_mnist_is_found(nowhere, monkeypatch):
    with pytest.raises(FileNotFoundError) as error: fashion_mnist("")
    fix = "run `apt install dataset-fashion-mnist`, or set LEARNER_DATA to the folder that has them"
    assert str(error.value) == f"the four files of Fashion-MNIST are not in {nowhere / 'debian'}; {fix}"

    monkeypatch.setenv("LEARNER_DATA", str(nowhere / "data"))
    with pytest.raises(FileNotFoundError, match=r"are not in .*data or .*debian; run"): fashion_mnist()
    write_fashion(nowhere / "debian", gzip.compress, ".gz", t10k_labels=np.full(20, 1))
    assert fashion_mnist(validation=None).test.data[1].unique().tolist() == [1]
    write_fashion(nowhere / "data" / "fashion-mnist", t10k_labels=np.full(20, 2))
    assert fashion_mnist(validation=None).test.data[1].unique().tolist() == [2]
    write_fashion(nowhere / "data", t10k_labels=np.full(20, 3))
    assert fashion_mnist(validation=None).test.data[1].unique().tolist() == [3]
    write_fashion(nowhere / "root" / "fashion-mnist", t10k_labels=np.full(20, 4))
    assert fashion_mnist(nowhere / "root", validation=None).test.data[1].unique().tolist() == [4]
    with pytest.raises(FileNotFoundError, match=r"are not in .*other; run"): fashion_mnist(nowhere / "other")
    (nowhere / "data" / "t10k-labels-idx1-ubyte").unlink()  # three files are not enough
    assert fashion_mnist(validation=None).test.data[1].unique().tolist() == [2]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels": np.arange(59) % 10},
         "train-images-idx3-ubyte has shape (60, 28, 28), train-labels-idx1-ubyte (59,) and labels up to 9; "
         "that is not Fashion-MNIST, so get both again"),
        ({"train_images": np.zeros((60, 28, 27))}, "train-images-idx3-ubyte has shape (60, 28, 27), train-labels"),
        ({"t10k_images": np.zeros((0, 28, 28))}, "t10k-images-idx3-ubyte is damaged, it has 0 bytes"),
        ({"t10k_labels": np.arange(20)}, "t10k-labels-idx1-ubyte (20,) and labels up to 19; that is not Fashion-MNIST"),
    ],
)
def test_files_that_do_not_belong_together(nowhere, replaced, message):
    write_fashion(nowhere, **replaced)
    with pytest.raises(ValueError) as error: fashion_mnist(nowhere)
    assert message in str(error.value)


def test_real_fashion_mnist():
    try:
        dls = fashion_mnist()
    except FileNotFoundError as error:
        pytest.skip(f"checks the real images: {error}")
    assert [len(loader.sampler) for loader in dls.values()] == [54_000, 6_000, 10_000]
    assert dls.train.data[1].bincount().tolist() == [6_000] * 10
    assert dls.test.data[1].bincount().tolist() == [1_000] * 10
    assert torch.cat([labels for _, labels in dls.validation]).bincount().tolist() == [600] * 10
    images, labels = next(iter(dls.train))
    assert images.shape == (256, 1, 28, 28) and labels.shape == (256,)
    assert dls.train.data[1][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    # the mean and the deviation that are given for the training images everywhere
    floats = dls.train.data[0].double() / 255
    assert round(floats.mean().item(), 4) == 0.2860 and round(floats.std().item(), 4) == 0.3530


# What bad input gets


WHOLE = "it must be a whole number of at least"
SHARE = "it must be a share between 0 and 1, or a number, that takes"
LABELLED = "it must be whole numbers in one dimension, one for each example"
FEW = "drop_last leaves no batch: batch_size is 64 and there are 23 examples; choose a smaller batch_size"

BAD = [
    # DataLoaders
    (lambda: DataLoaders(), ValueError, "DataLoaders has no loader; give at least one of train, validation, test"),
    (lambda: DataLoaders([X], valid=[X]), TypeError,
     "DataLoaders: 'valid' is not one of train, validation, test; did you mean validation?"),
    (lambda: DataLoaders(training=[X]), TypeError,
     "DataLoaders: 'training' is not one of train, validation, test; did you mean train?"),
    (lambda: DataLoaders(zzz=[X]), TypeError, "DataLoaders: 'zzz' is not one of train, validation, test"),
    (lambda: DataLoaders([X], [X])["valid"], KeyError,
     "'valid' is not one of the loaders train, validation; did you mean validation?"),
    (lambda: DataLoaders([X]).test, AttributeError, "'test' is not one of the loaders train"),
    (lambda: DataLoaders([X])[0], KeyError, "0 is not one of the loaders train"),
    (lambda: DataLoaders(3), TypeError, "train is of type int; it must be an iterable of batches"),
    (lambda: DataLoaders("train"), TypeError, "train is of type str; it must be an iterable of batches"),
    (lambda: DataLoaders({"train": [X]}), TypeError, "train is of type dict; it must be an iterable of batches"),
    (lambda: DataLoaders(X), TypeError,
     "train is made of tensors, not of batches; use DataLoaders.from_tensors(train=...)"),
    (lambda: DataLoaders([X], (X, Y)), TypeError,
     "validation is made of tensors, not of batches; use DataLoaders.from_tensors(validation=...)"),
    (lambda: DataLoaders(Rows()), TypeError,
     "train is made of examples, not of batches; use DataLoaders.from_datasets(train=...)"),
    # from_tensors
    (lambda: DataLoaders.from_tensors(), ValueError,
     "DataLoaders has no loader; give at least one of train, validation, test"),
    (lambda: DataLoaders.from_tensors((X, Y[:9])), ValueError,
     "train has tensors of more than one length (train[0]: 23, train[1]: 9); all must have the same"),
    (lambda: DataLoaders.from_tensors(X, {"a": X, "b": Y[:1]}), ValueError,
     "validation has tensors of more than one length (validation['a']: 23, validation['b']: 1); "
     "all must have the same"),
    (lambda: DataLoaders.from_tensors(X[:0]), ValueError,
     "train has shape (0, 3); its first dimension must count the examples, at least one"),
    (lambda: DataLoaders.from_tensors(()), ValueError, "train is an empty tuple; give it at least one tensor"),
    (lambda: DataLoaders.from_tensors((X, torch.tensor(1))), ValueError,
     "train[1] has shape (); its first dimension must count the examples, at least one"),
    (lambda: DataLoaders.from_tensors((X, Y.numpy())), TypeError,
     "train[1] is of type ndarray; it must be a tensor, as torch.as_tensor makes"),
    (lambda: DataLoaders.from_tensors(X, 0.1), TypeError,
     "validation is of type float; it must be a tensor, as torch.as_tensor makes"),
    (lambda: DataLoaders.from_tensors((X, torch.zeros(N, device="meta"))), ValueError,
     "train has tensors of more than one device (train[0]: cpu, train[1]: meta); all must have the same"),
    *[
        (lambda make=make, data=data, value=value: make(data, batch_size=value), ValueError,
         f"batch_size is {value!r}; {WHOLE} 1")
        for make, data in ((DataLoaders.from_tensors, (X, Y)), (DataLoaders.from_datasets, Rows()))
        for value in (0, -3, 2.5, True, "8", None)
    ],
    (lambda: from_tensors(evaluation_batch_size=0), ValueError, f"evaluation_batch_size is 0; {WHOLE} 1"),
    *[
        (lambda seed=seed: from_tensors(seed=seed), ValueError, f"seed is {seed!r}; {WHOLE} 0")
        for seed in (None, 1.0, -1)
    ],
    (lambda: DataLoaders.from_tensors(X, drop_last=True), ValueError, FEW),
    # loaders
    (lambda: from_tensors().set_epoch(-1), ValueError, f"epoch is -1; {WHOLE} 0"),
    (lambda: from_datasets().set_epoch(0.5), ValueError, f"epoch is 0.5; {WHOLE} 0"),
    (lambda: from_tensors().order(torch.tensor(0.5)), ValueError, f"epoch is tensor(0.5000); {WHOLE} 0"),
    (lambda: EpochSampler(0), ValueError, f"num_examples is 0; {WHOLE} 1"),
    (lambda: TensorLoader([1, 2]), TypeError, "data[0] is of type int; it must be a tensor, as torch.as_tensor makes"),
    (lambda: TensorLoader(X, indices=Y[:0]), ValueError, f"the number of indices is 0; {WHOLE} 1"),
    # what torch and Python say themselves
    (lambda: from_tensors(batch_size=1), TypeError, "multiple values for keyword argument 'batch_size'"),
    (lambda: TensorLoader(X, indices=Y + 1), IndexError, "index 23 is out of bounds for dimension 0 with size 23"),
    (lambda: TensorLoader(X, indices=Y / 2), IndexError, "tensors used as indices must be long, int, byte or bool"),
    (lambda: TensorLoader(X, indices=Y[:9] > 2), IndexError, "shape of the mask [9] at index 0 does not match"),
    (lambda: from_datasets(valid=Rows()), TypeError, "unexpected keyword argument 'valid'"),
    (lambda: from_datasets(num_worker=2), TypeError, "unexpected keyword argument 'num_worker'"),
    (lambda: from_datasets(TensorDataset(X), num_worker=2), TypeError, "unexpected keyword argument 'num_worker'"),
    # from_datasets
    *[
        (lambda name=name, value=value: from_datasets(**{name: value}), TypeError,
         f"{name}: the order is that of an EpochSampler, which (seed, epoch) alone decides; "
         "for another one put torch's DataLoader into DataLoaders(train=...)")
        for name, value in (("sampler", WeightedRandomSampler([1.0] * N, N)), ("generator", torch.Generator()),
                            ("batch_sampler", [[1]]))
    ],
    (lambda: from_datasets(num_workers=-1), ValueError, f"num_workers is -1; {WHOLE} 0"),
    (lambda: from_datasets(num_workers=1.5), ValueError, f"num_workers is 1.5; {WHOLE} 0"),
    (lambda: DataLoaders.from_datasets(Stream()), TypeError,
     "train is an IterableDataset, which has its own order; put torch's DataLoader around it"),
    (lambda: DataLoaders.from_datasets(Rows(), DataLoader(Rows())), TypeError,
     "validation is of type DataLoader; it must have __getitem__ and __len__"),
    (lambda: DataLoaders.from_datasets({"train": Rows()}), TypeError,
     "train is of type dict; it must have __getitem__ and __len__"),
    (lambda: DataLoaders.from_datasets(7), TypeError,
     "train is of type int; it must have __getitem__ and __len__"),
    (lambda: DataLoaders.from_datasets([]), ValueError, "train is empty; give it at least one example"),
    (lambda: DataLoaders.from_datasets(Rows(), drop_last=True), ValueError, FEW),
    # split
    *[
        (lambda share=share: split(Y % 2, share), ValueError,
         f"validation is {share!r}; {SHARE} 2 to 21 of 23 examples: both parts need one of each class")
        for share in (0.0, 1.0, 1.5, -0.1, float("nan"), float("inf"), 0.97, 1, 22, True, "half", None)
    ],
    (lambda: split([4, 4, 9]), ValueError, "class 9 has 1 example; both parts need one, so add more or drop it"),
    (lambda: split([]), TypeError, f"labels is torch.float32 of shape (0,); {LABELLED}"),
    (lambda: split(Y[:0]), TypeError, f"labels is torch.int64 of shape (0,); {LABELLED}"),
    (lambda: split(X), TypeError, f"labels is torch.float32 of shape (23, 3); {LABELLED}"),
    (lambda: split([0.3, 1.7]), TypeError, f"labels is torch.float32 of shape (2,); {LABELLED}"),
    (lambda: split(["cat", "dog"]), TypeError, f"labels is list; {LABELLED}"),
    (lambda: split(Y % 2, seed=0.5), ValueError, f"seed is 0.5; {WHOLE} 0"),
    # the data that is there
    (lambda: digits(validation=2.0), ValueError,
     f"validation is 2.0; {SHARE} 10 to 1428 of 1438 examples: both parts need one of each class"),
    (lambda: digits(validation=5), ValueError,
     f"validation is 5; {SHARE} 10 to 1428 of 1438 examples: both parts need one of each class"),
    (lambda: digits(batch_size=0), ValueError, f"batch_size is 0; {WHOLE} 1"),
    (lambda: digits(seed="a"), ValueError, f"seed is 'a'; {WHOLE} 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error: call()
    theirs = "keyword argument" in message or kind is IndexError
    assert message in str(error.value) if theirs else message == str(error.value)


def test_a_bad_epoch_changes_nothing(make):
    loader = make()
    loader.set_epoch(3)
    for bad in (-1, 0.5, True, None, "4"):
        with pytest.raises(ValueError): loader.set_epoch(bad)
    assert loader.epoch == 3
