"""Fingerprints of values, datasets and loaders."""
import enum
import hashlib
import math
import os
import random
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from learner.base import data_hash as hashing
from learner.base.data_hash import data_hash, loader_hash
from learner.base.provenance import rng_state
from learner.loop.data import DatasetLoader, TensorLoader


@pytest.fixture(autouse=True)
def same_generators_after():
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def normals():
    """Numbers from every generator; an odd number of normal ones, so that each keeps one for later."""
    return random.gauss(0, 1), float(np.random.randn()), float(torch.randn(1)), random.random(), torch.randn(17).tolist()


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_by_hand():
    assert data_hash(None) == sha(b"None\n")
    assert data_hash(True) == sha(b"bool True\n")
    assert data_hash(-7) == sha(b"int -7\n")
    assert data_hash(10**40) == sha(b"int 1" + b"0" * 40 + b"\n")
    assert data_hash(0.1) == sha(b"float\n", struct.pack("<d", 0.1))
    assert data_hash(1 - 2j) == sha(b"complex\n", struct.pack("<dd", 1, -2))
    assert data_hash("é") == sha(b"str 2\n\xc3\xa9")
    assert data_hash(b"\0\n") == data_hash(bytearray(b"\0\n")) == sha(b"bytes 2\n\0\n")
    assert data_hash([]) == sha(b"list 0\n")
    assert data_hash(("a", [1])) == sha(b"tuple 2\nstr 1\nalist 1\nint 1\n")
    assert data_hash({"a": 1}) == sha(b"dict 1\n", hashlib.sha256(b"str 1\na").digest(), b"int 1\n")
    assert data_hash(torch.tensor(2.5)) == sha(b"array float32 \n", struct.pack("<f", 2.5))
    assert data_hash(torch.tensor([True, False])) == sha(b"array bool 2\n\1\0")
    assert data_hash(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)) == sha(b"array bfloat16 2\n\x80\x3f\x00\xc0")
    assert data_hash(np.array([[1, 2, 3]], dtype=np.int16)) == sha(b"array int16 1,3\n", struct.pack("<3h", 1, 2, 3))
    items = [(torch.tensor([5], dtype=torch.uint8), 0), (torch.tensor([6], dtype=torch.uint8), 1)]
    by_hand = b"dataset 2\ntuple 2\narray uint8 1\n\5int 0\ntuple 2\narray uint8 1\n\6int 1\n"
    assert data_hash(Items(items)) == sha(by_hand)


def test_different_values_have_different_hashes():
    x = torch.arange(6)
    values = [None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, 0j, "", "0", "None", b"", b"0"]
    values += [[], (), {}, [[]], [()], [[], []]]
    values += ["ab", ["ab"], ["a", "b"], ["ab", ""], ["", "ab"], [["a"], "b"], [["a", "b"]], ["a", ["b"]], ("a", "b")]
    values += [{"a": "b"}, {"b": "a"}, {"a": ["b"]}, {"a": {"b": 1}}, {"a": {}, "b": 1}, {0: 1}, {"0": 1}, {(0,): 1}]
    values += [x, x.view(2, 3), x.view(3, 2), x.view(1, 6), x.int(), x.float(), x.double(), x.half(), x.bfloat16()]
    values += [x.flip(0), x[:5], x[0], x[:1], x[:0], x[:0].view(0, 3), x[:0].view(3, 0), [x], (x,), [x, x], x.tolist()]
    values += [x.to(torch.complex64), torch.view_as_real(x.to(torch.complex64)), x.to(torch.uint8), x.to(torch.int8)]
    values += [Items([]), Items([1]), Items([x]), np.array(["a"]), np.array(["a"], "U2"), np.array([b"a"])]
    values += [np.array([1], "datetime64[s]"), np.array([1], "datetime64[D]"), np.array([1], "m8[s]"), np.int64(1)]
    values += ["array int64 1\n" + "\1" + "\0" * 7, "list 1\nint 1\n", "\ud800"]
    assert len({data_hash(value) for value in values}) == len(values)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("block", [1, 7, 16, 100, 2**24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_blocks_do_not_count(monkeypatch, dtype, block):
    x = (torch.arange(2 * 3 * 4 * 5) % 7).float().view(2, 3, 4, 5).to(dtype)
    expected = data_hash(x)
    monkeypatch.setattr("learner.base.hashing.BLOCK", block)
    wide = torch.zeros(2, 3, 4, 10, dtype=dtype)
    wide[..., ::2] = x
    same = [x, x.clone(), torch.nn.Parameter(x, requires_grad=False), wide[..., ::2], x.detach()]
    same += [x.permute(order).contiguous().permute(back) for order, back in [((3, 1, 0, 2), (2, 1, 3, 0))]]
    same += [x.contiguous(memory_format=torch.channels_last), x.as_subclass(torch.Tensor)]
    if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        array = x.numpy()
        frozen = array.copy()
        frozen.flags.writeable = False
        swapped = array.astype(array.dtype.newbyteorder(">"))
        same += [array, np.asfortranarray(array), np.ascontiguousarray(array[::-1])[::-1], swapped, frozen]
    assert {data_hash(value) for value in same} == {expected}


def test_views_that_are_lazy():
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert data_hash(z.conj()) == data_hash(torch.tensor([1 - 2j, 3 + 4j]))
    assert data_hash(z.conj().imag) == data_hash(torch.tensor([-2.0, 4.0]))
    assert data_hash(torch.zeros(()).expand(3, 4)) == data_hash(torch.zeros(3, 4))
    assert data_hash(torch.ones(2, requires_grad=True) * 2) == data_hash(torch.full((2,), 2.0))


def test_numbers_and_scalars():
    class Colour(enum.IntEnum):
        RED = 3

    Point = namedtuple("Point", "x y")
    assert data_hash(Colour.RED) == data_hash(3)
    assert data_hash(Point(1, 2)) == data_hash((1, 2))
    assert data_hash(np.float64(1)) == data_hash(np.array(1.0)) == data_hash(torch.tensor(1.0).double())
    assert data_hash(np.float64(1)) != data_hash(1.0)
    assert data_hash(np.bool_(True)) == data_hash(torch.tensor(True)) != data_hash(True)
    assert data_hash(Image.new("RGB", (3, 2), "red")) == data_hash(np.array([[[255, 0, 0]] * 3] * 2, dtype=np.uint8))


def test_the_order_of_a_mapping_does_not_count():
    keys = ["b", "a", 3, 1.5, None, (1, "x"), b"y", True]
    expected = data_hash({key: i for i, key in enumerate(keys)})
    for seed in range(5):
        pairs = list(enumerate(keys))
        random.Random(seed).shuffle(pairs)
        assert data_hash({key: i for i, key in pairs}) == expected
        assert data_hash(OrderedDict((key, i) for i, key in pairs)) == expected
    model = torch.nn.Linear(3, 2)
    assert data_hash(model.state_dict()) == data_hash({"bias": model.bias, "weight": model.weight})


def test_a_hash_is_the_same_in_every_process():
    code = """
import torch
from learner.base.data_hash import data_hash
print(data_hash({"x": torch.arange(5), "y": ["a", 1.5, None], "z": {"k": (True, b"0")}, 7: "seven"}))
"""
    for seed in ("1", "2"):
        assert run(code, PYTHONHASHSEED=seed) == "0c6dfbc58b003b0a283e6a4a7db1e9dcdaa881dba799deab2e64950bfaec7ada"


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Fetched(Items):
    """Gives many items at once, and counts how often."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self.items[i] for i in indices]


class Batched(Items):
    """Gives a batch at once, not items."""

    def __getitems__(self, indices):
        return torch.stack([self.items[i][0] for i in indices]), [self.items[i][1] for i in indices]


class Plain:
    """A map-style dataset by its methods alone."""

    def __init__(self, items):
        self.items = items

    __len__, __getitem__ = Items.__len__, Items.__getitem__


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1024, 1025, 3000])
def test_datasets(count):
    x, y = torch.rand(count, 2, 3), torch.arange(count)
    items = [(x[i], int(y[i])) for i in range(count)]
    fetched = Fetched(items)
    datasets = [Items(items), Plain(items), fetched, Batched(items), Subset(Items(items), range(count))]
    hashes = {data_hash(dataset) for dataset in datasets}
    assert len(hashes) == 1
    assert fetched.calls == math.ceil(count / 1024)
    assert data_hash(items) not in hashes
    if count:
        changed = list(items)
        changed[-1] = (items[-1][0], 99999)
        assert data_hash(Items(changed)) not in hashes
        changed[-1] = (items[-1][0] + 1, items[-1][1])
        assert data_hash(Fetched(changed)) not in hashes
    assert data_hash(TensorDataset(x, y)) == data_hash((x, y))


def test_a_tensor_dataset_of_ones_own_is_read_by_its_items():
    class Doubled(TensorDataset):
        def __getitem__(self, i):
            return self.tensors[0][i] * 2

    x = torch.arange(3.0)
    assert data_hash(Doubled(x)) == data_hash(Items([x[i] * 2 for i in range(3)]))


class Augmented(Items):
    def __getitem__(self, i):
        return self.items[i], *normals()


def test_reading_a_random_dataset_is_repeatable_and_leaves_no_trace():
    dataset = Augmented([1, 2, 3])
    first = data_hash(dataset)
    normals()
    before = rng_state()
    assert data_hash(dataset) == first
    assert equal(rng_state(), before)
    assert data_hash(Augmented([1, 2, 4])) != first


class Broken(Items):
    def __getitem__(self, i):
        torch.rand(1)
        if i == 2:
            raise OSError("no such image")
        return i


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_an_error_of_the_dataset_passes_through():
    before = rng_state()
    with pytest.raises(OSError, match="no such image"):
        data_hash(Broken([0] * 5))
    assert equal(rng_state(), before)


GIVE = "give tensors, arrays, numbers, text, or lists, tuples, mappings and map-style datasets of them"
BAD_DATA = [
    (object(), f"data of type object cannot be hashed: {GIVE}"),
    ({1, 2}, f"data of type set cannot be hashed: {GIVE}"),
    ((i for i in range(3)), f"data of type generator cannot be hashed: {GIVE}"),
    (Endless(), f"data of type Endless cannot be hashed: {GIVE}"),
    (print, f"data of type builtin_function_or_method cannot be hashed: {GIVE}"),
    (torch.nn.Linear, f"data of type type cannot be hashed: {GIVE}"),
    ([1, {"a": (0, {2})}], f"data[1]['a'][1] of type set cannot be hashed: {GIVE}"),
    ({frozenset(): 1}, f"data[frozenset()] of type frozenset cannot be hashed: {GIVE}"),
    (Items([(1, 2), (1, {2})]), f"data[1][1] of type set cannot be hashed: {GIVE}"),
    (DataLoader(Items([1])), "data of type DataLoader cannot be hashed: give its .dataset"),
    ([torch.empty(2, device="meta")], "data[0] of type Tensor cannot be hashed: give a dense tensor with values"),
    (np.array([1, "a"], dtype=object), "data of type ndarray cannot be hashed: its dtype is object; convert it"),
    (np.zeros(2, "V3"), "data of type ndarray cannot be hashed: its dtype is |V3; convert it"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA)
def test_what_cannot_be_hashed(data, message):
    before = rng_state()
    with pytest.raises(TypeError) as caught:
        data_hash(data)
    assert str(caught.value) == message
    assert equal(rng_state(), before)


def test_sparse_tensors():
    assert data_hash(torch.eye(2).to_sparse()) == data_hash(torch.eye(2).to_sparse()) != data_hash((2 * torch.eye(2)).to_sparse())
    assert data_hash(torch.eye(2).to_sparse()) != data_hash(torch.eye(2))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_long_doubles_have_bytes_without_meaning():
    with pytest.raises(TypeError, match="convert it"):
        data_hash(np.zeros(2, np.longdouble))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss differs")
def test_large_tensors_are_not_copied():
    code = """
import resource, torch
from learner.base.data_hash import data_hash
x = torch.ones(9000, 9000)  # 324 MB
data_hash(x[0]), x.numpy()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for view in (x, x.t(), x[:, ::2], x.t().numpy(), x.view(1, 1, -1), x[:1].expand(9000, -1)):
    data_hash(view)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(run(code)) < 80


# Loaders

NUMBERS = torch.arange(3000.0)


class Pictures(Dataset):
    "Items that are counted when they are read; one may be broken."
    def __init__(self, count=3000, broken=None): self.count, self.broken, self.seen = count, broken, []
    def __len__(self): return self.count
    def __getitem__(self, i):
        self.seen.append(i)
        if i == self.broken: raise FileNotFoundError(f"picture {i}")
        return NUMBERS[i], torch.rand(1)


def test_the_order_and_the_size_of_batches_do_not_count():
    data = TensorDataset(NUMBERS)
    wanted = data_hash((NUMBERS,))
    loaders = [DataLoader(data, 4), DataLoader(data, 7, shuffle=True), DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 3, drop_last=True)),
               DataLoader(data, sampler=DistributedSampler(data, 2, 0)), DatasetLoader(data, 5, shuffle=True), TensorLoader((NUMBERS,), 3, shuffle=True)]
    assert {loader_hash(loader) for loader in loaders} == {wanted}
    small = Items([NUMBERS[i] for i in range(50)])
    assert loader_hash(DataLoader(small, 4, shuffle=True)) == loader_hash(DatasetLoader(small, 7)) == data_hash(small)


def test_only_what_the_sampler_asks_for_is_read():
    good = [i for i in range(100) if i != 13]
    pictures = Pictures(100, broken=13)
    random.shuffle(good)
    first = loader_hash(DataLoader(pictures, 8, sampler=SubsetRandomSampler(good)))
    assert sorted(pictures.seen) == sorted(good) and len(first) == 64
    assert first == loader_hash(DataLoader(pictures, 4, sampler=SubsetRandomSampler(sorted(good))))
    assert loader_hash(DataLoader(Subset(Pictures(100, broken=13), sorted(good)))) is not None
    for sampler in (RandomSampler(pictures, num_samples=10), RandomSampler(pictures, replacement=True), WeightedRandomSampler([1.0] * 100, 10), good):
        pictures.seen.clear()
        assert loader_hash(DataLoader(pictures, 8, sampler=sampler)) is None and not pictures.seen


def test_a_sample_of_many_examples_says_so():
    pictures = Pictures()
    sample = loader_hash(DataLoader(pictures))
    assert len(pictures.seen) == 1000 and pictures.seen[:3] == [0, 3, 6] and sample.endswith(" (1,000 of 3,000)")
    assert sample == loader_hash(DataLoader(Pictures(), 100, shuffle=True))
    listed = loader_hash([*NUMBERS])
    assert listed.endswith(" (1,000 of 3,000)") and listed == loader_hash(tuple(NUMBERS.unbind()))[:0] + loader_hash([*NUMBERS])


def test_a_sample_of_many_bytes_says_so(monkeypatch):
    monkeypatch.setattr(hashing, "_BYTES", 400)
    whole, part = loader_hash(TensorLoader((NUMBERS, NUMBERS), 4)), loader_hash(TensorLoader((NUMBERS, NUMBERS), 4, indices=torch.arange(20, 2020)))
    assert whole.endswith(" (50 of 3,000)") and part.endswith(" (50 of 2,000)")
    assert whole.split()[0] == data_hash((NUMBERS[::60], NUMBERS[::60])) and part.split()[0] == data_hash((NUMBERS[20:2020:40], NUMBERS[20:2020:40]))
    assert whole == loader_hash(DataLoader(TensorDataset(NUMBERS, NUMBERS), 4))


def test_a_part_of_tensors():
    rows = torch.tensor([5, 3, 8])
    assert loader_hash(TensorLoader((NUMBERS,), 2, indices=rows)) == data_hash((NUMBERS[rows],))


class Own:
    "A loader of the user's own."
    def __init__(self): self.data = "somewhere"
    def __iter__(self): return iter([1])


class Counted(Items):
    def __init__(self): super().__init__([1, 2]), setattr(self, "generator", np.random.default_rng(0))
    def __getitem__(self, i): return self.generator.random()


@pytest.mark.filterwarnings("ignore:the data has no hash")
@pytest.mark.parametrize("make", [lambda: iter([1]), lambda: (i for i in range(3)), Own, lambda: DataLoader(Endless()), lambda: DataLoader(Pictures(20, broken=3)), lambda: 3,
                                  lambda: [object()], lambda: DataLoader(Counted()), lambda: [torch.empty(2, device="meta")]])
def test_what_has_no_hash_raises_nothing(make):
    before = rng_state()
    assert loader_hash(make()) is None
    assert equal(rng_state(), before)


def test_an_error_becomes_a_warning():
    with pytest.warns(UserWarning, match=r"the data has no hash: .*; Run\(hash_data=False\) turns this off"):
        assert loader_hash(DataLoader(Pictures(20, broken=3))) is None


def test_a_stream_is_not_touched():
    stream = iter([1, 2])
    assert loader_hash(stream) is None and next(stream) == 1


def test_the_next_pass_is_what_it_would_have_been():
    def orders(look):
        torch.manual_seed(0)
        loaders = [DataLoader(TensorDataset(NUMBERS[:20]), 4, shuffle=True, generator=torch.Generator().manual_seed(1)), TensorLoader((NUMBERS[:20],), 4, shuffle=True),
                   DataLoader(Pictures(20), 4, shuffle=True)]
        if look:
            for loader in loaders: assert loader_hash(loader)
        return [[batch[0].tolist() for batch in loader] for loader in loaders] + [torch.rand(1).tolist()]
    assert orders(True) == orders(False)
