"""Checkpoint files: what comes back, what is refused, what damage and crashes do. LEARNER_LONG=1 kills more often."""
import collections
import contextlib
import enum
import errno
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from learner.base import nested as nested_values
from learner.base import store
from learner.base.checkpoints import checkpoint_name, checkpoint_place, list_checkpoints
from learner.base.files import FileError
from learner.base.hashing import sparse_parts, tensor_bytes
from learner.base.nested import snapshot
from learner.base.provenance import kept_rng, rng_state, set_rng_state
from learner.base.store import (
    DamagedError,
    check_state,
    load_state,
    newest_checkpoint,
    read_checkpoint,
    save_state,
)

LONG = os.environ.get("LEARNER_LONG") == "1"


def same(a, b):
    "Equal and of the same types, bit by bit."
    if isinstance(a, torch.Tensor) and a.layout != torch.strided:
        if (a.layout, a.dtype, a.shape) != (b.layout, b.dtype, b.shape): return False
        return all(map(same, sparse_parts(a), sparse_parts(b))) and (a.layout != torch.sparse_coo or a.is_coalesced() == b.is_coalesced())
    if isinstance(a, torch.Tensor):
        return (type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape
                and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b)))
    if isinstance(a, np.ndarray): return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float): return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    return a == b


def made(step, size=300):
    return {"model": {"w": torch.full((size,), float(step))}, "optimiser": {"state": {0: {"m": torch.full((size,), float(step))}}}, "step": step}


def whole(state):
    "The step of a state from `made`, all of whose parts must be of that step."
    assert state["model"]["w"].unique().tolist() == [state["step"]] == state["optimiser"]["state"][0]["m"].unique().tolist()
    return state["step"]


# ---------------------------------------------------------------------------------------------------- what comes back

VALUES = {
    "plain": [None, True, False, 0, -1, 2**53, -(2**53) + 1, 2**64, -(2**200), 2**8192 - 1, 1 - 2**8192, "", "é\0\n$", "\ud800", "x" * 10_000],
    "floats": [0.0, -0.0, 0.1, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan, math.pi, 5.0],
    "nested": ((), [], {}, ((1,), [2, (3, [])]), {"a": {"b": ({},)}}),
    "keys": {0: "int", "0": "text", -5: 1, 2**70: 2, "": 3, "$tuple": [1], "a.b": {"c": 4}, "a": {"b.c": 5}, "__metadata__": 6},
    "tags": {"$int": "0x1", "inner": [{"$tensor": ["model", "w"]}, {"$dict": []}, {"$": 1}]},
    "../a\0/b": {"C:\\": torch.ones(1), "": torch.ones(2)},
    "bytes": [b"", b"\x00\xff", bytes(range(256)) * 50],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_exactly(tmp_path, name):
    save_state(tmp_path / "c", {name: VALUES[name], "$top": 1})
    assert same(load_state(tmp_path / "c"), {name: VALUES[name], "$top": 1})
    assert same(snapshot({name: VALUES[name]}), {name: VALUES[name]})


@pytest.mark.parametrize("code", nested_values.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (3, 4), (2, 1, 6)], ids=str)
def test_tensors_of_every_type_come_back_and_the_library_agrees(tmp_path, code, shape):
    dtype = nested_values.DTYPES[code]
    if code == "F4" and not shape: pytest.skip("two of these numbers make a byte, so there is none alone")
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    save_state(tmp_path / "c", {"model": {"odd": torch.ones(3, dtype=torch.bool), "x": tensor}})
    assert same(tensor, load_state(tmp_path / "c")["model"]["x"])
    assert same(tensor, load_file(tmp_path / "c")["model.x"])
    save_file({"x": tensor, "odd": torch.ones(3, dtype=torch.bool)}, tmp_path / "y", {"learner": "1", "state": '{"y": {"$tensor": "x"}}'})
    raw = (tmp_path / "y").read_bytes()  # and theirs is read here
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    forge(tmp_path / "y", **{**head.pop("__metadata__"), "header": head}, data=raw[8 + int.from_bytes(raw[:8], "little"):])
    assert same(tensor, load_state(tmp_path / "y")["y"])


COMPLEX = [torch.complex128, torch.complex32]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_complex_numbers_that_the_format_does_not_know_come_back(tmp_path, dtype, shape):
    tensor = torch.view_as_complex(torch.randn(*shape, 2, dtype=torch.float64 if dtype == torch.complex128 else torch.float16))
    tied = nn.Parameter(tensor)
    state = {"m": {"t": tensor, "turned": tensor.T if len(shape) == 2 else tensor, "conj": tensor.conj(), "p": tied, "q": tied}}
    save_state(tmp_path / "c", state)
    for loaded in (load_state(tmp_path / "c"), snapshot(state)):
        assert same(loaded["m"]["t"], tensor) and loaded["m"]["conj"].dtype == dtype and not loaded["m"]["p"].requires_grad
        assert same(loaded["m"]["conj"], tensor.conj().resolve_conj()) and same(loaded["m"]["turned"], state["m"]["turned"].contiguous())
        assert loaded["m"]["p"] is loaded["m"]["q"] or not tensor.numel()
    assert load_file(tmp_path / "c")["m.t"].shape == (*shape, 2)
    if dtype == torch.complex128:
        save_state(tmp_path / "a", {"a": np.array([1 + 2j, 3.5]), "scalar": [np.array(1j)]})
        assert same(load_state(tmp_path / "a"), {"a": np.array([1 + 2j, 3.5]), "scalar": [np.array(1j)]})


def sparse(kind, dtype=torch.float32):
    "A tensor of a layout, with an empty row and a zero that is stored."
    dense = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [2, 3, 0, 0], [0, 0, 0, 4]]).to(dtype)
    if kind == "uncoalesced": return torch.sparse_coo_tensor([[0, 0, 3], [1, 1, 0]], torch.tensor([1, 2, 0]).to(dtype), (4, 5))
    if kind == "hybrid": return torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3).to(dtype), (4, 3))
    if kind == "empty": return torch.sparse_coo_tensor(size=(3, 0)).to(dtype)
    if kind == "coo": return dense.to_sparse()
    if kind in ("bsr", "bsc"): return getattr(dense, f"to_sparse_{kind}")((2, 2))
    return getattr(dense, f"to_sparse_{kind}")()


@pytest.mark.filterwarnings("ignore:Sparse ")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", ["coo", "uncoalesced", "hybrid", "empty", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_come_back(tmp_path, kind, dtype):
    tensor = sparse(kind, dtype)
    state = {"model": {"adjacency": tensor, "again": tensor, "p": nn.Parameter(tensor, requires_grad=False)}}
    save_state(tmp_path / "c", state)
    for loaded in (load_state(tmp_path / "c"), snapshot(state)):
        assert same(tensor, loaded["model"]["adjacency"])
        if kind != "empty": assert loaded["model"]["again"] is loaded["model"]["adjacency"]  # ties hold
    if kind != "empty": assert len(load_file(tmp_path / "c")) == len(sparse_parts(tensor))  # and take no room
    if tensor.numel():
        sparse_parts(loaded["model"]["adjacency"])[-1].fill_(7)
        assert same(tensor, load_state(tmp_path / "c")["model"]["adjacency"])  # a snapshot has memory of its own


def test_all_the_types_that_the_library_knows_are_known():
    from safetensors.torch import _SIZE
    assert {dtype for dtype in _SIZE if dtype} == set(nested_values.CODES)


def test_views_and_lazy_tensors_come_back_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    complex_ = torch.randn(3, 2, dtype=torch.complex64)
    state = {"t": {"slice": base[1:3, ::2], "turned": base.t(), "row": base[2], "all": base, "wide": torch.ones(1).expand(1000),
                   "parameter": nn.Parameter(base[0]), "grad": (base * nn.Parameter(torch.ones(1))), "conj": complex_.conj(),
                   "neg": complex_.conj().imag, "last": base[3:, 5:].reshape(()), "images": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                   "odd": torch.empty_strided((1,), (7,)).fill_(3.0), "none": torch.empty(0), "nothing": torch.empty(0)}}
    save_state(tmp_path / "c", state)
    loaded = load_state(tmp_path / "c")["t"]
    for name, tensor in state["t"].items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad and type(loaded[name]) is torch.Tensor
    assert len({id(tensor) for tensor in load_state(tmp_path / "c")["t"].values()}) == len(state["t"])
    loaded["all"].zero_()
    assert torch.equal(loaded["row"], base[2])  # a part of another tensor is a tensor of its own


def test_a_tensor_that_appears_twice_is_stored_once_and_comes_back_as_one(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight
    model = Tied()
    save_state(tmp_path / "c", {"model": model.state_dict(), "ema": {"w": model.head.weight}, "again": [model.embed.weight.T]})
    assert (tmp_path / "c").stat().st_size < 2 * 50 * 8 * 4 + 800
    assert sorted(load_file(tmp_path / "c")) == ["again.0", "model.embed.weight"]
    loaded = load_state(tmp_path / "c")
    assert loaded["model"]["embed.weight"] is loaded["model"]["head.weight"] is loaded["ema"]["w"]
    assert loaded["again"][0] is not loaded["ema"]["w"] and torch.equal(loaded["again"][0], model.embed.weight.T)
    other = Tied()
    other.load_state_dict(loaded["model"])
    assert torch.equal(other.head.weight, model.head.weight)
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / "c").items() if name.startswith("model.")}
    third = Tied()
    third.load_state_dict(weights, strict=False)  # as safetensors' own load_model does
    assert torch.equal(third.head.weight, model.head.weight)


def test_names_that_would_be_the_same_in_a_file_are_told_apart(tmp_path):
    t = [torch.tensor(float(i)) for i in range(6)]
    state = {"m": {"a": {"b": t[0]}, "a.b": t[1], "a.b'": t[2]}, "__metadata__": t[3], "\ud800": t[4], "format": t[5]}
    save_state(tmp_path / "c", state)
    assert same(load_state(tmp_path / "c"), state)
    assert len(load_file(tmp_path / "c")) == 6


def test_subclasses_come_back_as_the_plain_type(tmp_path):
    class Level(enum.IntEnum): HIGH = 3
    class Name(str, enum.Enum): X = "x"  # noqa: UP042  (the case in question)
    Pair = collections.namedtuple("Pair", "a b")
    given = {"level": Level.HIGH, "name": Name.X, "pair": Pair(1, 2), "counter": collections.Counter("aab"), "ordered": collections.OrderedDict(b=1, a=2),
             "default": collections.defaultdict(list, x=[1]), "size": torch.zeros(2, 3).shape, "np": [np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.uint64(2**64 - 1)],
             "bytearray": bytearray(b"ab")}
    save_state(tmp_path / "c", given)
    loaded = load_state(tmp_path / "c")
    assert loaded == given
    assert [type(loaded[key]) for key in given] == [int, str, tuple, dict, dict, dict, tuple, list, bytes]
    assert [type(x) for x in loaded["np"]] == [float, float, int, bool, int]


def test_arrays_come_back(tmp_path):
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    arrays = [np.arange(6, dtype=d).reshape(2, 3) for d in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8")]
    arrays += [np.array([True, False]), np.array(3.5), np.zeros((0, 3)), frozen, np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(6)[::-2]]
    save_state(tmp_path / "c", {"a": arrays})
    assert same(load_state(tmp_path / "c")["a"], [np.array(a) for a in arrays])
    load_state(tmp_path / "c")["a"][0][:] = 0  # can be written to


def test_random_states_come_back_exactly(tmp_path):
    generator = np.random.default_rng(3)
    with kept_rng():
        random.gauss(0, 1); np.random.randn(); torch.randn(1)
        state = {"rng": rng_state(), "python": random.getstate(), "numpy": np.random.get_state(), "generator": generator.bit_generator.state}
        save_state(tmp_path / "c", state)
        loaded = load_state(tmp_path / "c")
        def draws(): return random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist(), random.random(), np.random.rand()
        expected, of_generator = draws(), generator.random(5).tolist()
        set_rng_state(loaded["rng"])
        assert draws() == expected
        assert loaded["rng"].keys() == state["rng"].keys() and loaded["python"] == state["python"]
        random.setstate(loaded["python"]); np.random.set_state(loaded["numpy"])
        generator.bit_generator.state = loaded["generator"]
        assert generator.random(5).tolist() == of_generator


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adafactor])
def test_optimisers_and_schedules_go_on_where_they_were(tmp_path, factory):
    def build():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimiser = factory(model.parameters())
        return model, optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, [2, 4])
    def step(model, optimiser, schedule, n):
        for i in range(n):
            model(torch.linspace(i, 1, 15).reshape(5, 3)).square().mean().backward()
            optimiser.step(); optimiser.zero_grad(); schedule.step()
    one, two = build(), build()
    step(*one, 3)
    save_state(tmp_path / "c", dict(zip(("model", "optimiser", "schedule"), (part.state_dict() for part in one), strict=True)))
    for part, state in zip(two, load_state(tmp_path / "c").values(), strict=True): part.load_state_dict(state)
    step(*one, 3)
    step(*two, 3)
    assert all(map(torch.equal, one[0].state_dict().values(), two[0].state_dict().values()))


def test_a_file_of_an_empty_state_and_many_tensors(tmp_path):
    save_state(tmp_path / "c", {})
    assert load_state(tmp_path / "c") == {} and load_file(tmp_path / "c") == {}
    many = {"m": {str(i): torch.tensor(i) for i in range(3000)} | {"large": torch.arange(3_000_001, dtype=torch.int32)}}  # over two blocks
    save_state(tmp_path / "c", many)
    assert same(load_state(tmp_path / "c"), many)
    assert same(many["m"]["large"], load_file(tmp_path / "c")["m.large"])


def test_the_same_state_makes_the_same_bytes_and_the_hash_is_over_all_of_them(tmp_path):
    for name in "ab": save_state(tmp_path / name, made(1))
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file: metadata = file.metadata()
    assert metadata.keys() == {"sha256", "format", "learner", "state"} and (metadata["format"], metadata["learner"]) == ("pt", "1")
    assert json.loads(metadata["state"])["step"] == 1
    assert raw.count(metadata["sha256"].encode()) == 1
    assert metadata["sha256"] == hashlib.sha256(raw.replace(metadata["sha256"].encode(), b"0" * 64)).hexdigest()


def test_a_state_that_quotes_the_place_of_the_hash_is_saved(tmp_path):
    state = {'"sha256":"': '{"__metadata__":{"sha256":"' + "0" * 64, "t": {"sha256": torch.ones(2)}}
    save_state(tmp_path / "c", state)
    assert same(load_state(tmp_path / "c"), state)


def test_load_puts_tensors_on_the_device(tmp_path):
    t = torch.ones(2)
    save_state(tmp_path / "c", {"a": [t, t], "b": b"x", "n": np.ones(2)})
    loaded = load_state(tmp_path / "c", "meta")
    assert loaded["a"][0].device.type == "meta" and loaded["a"][0] is loaded["a"][1]
    assert loaded["b"] == b"x" and loaded["n"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------- what is refused

class Foo: pass


class Special(torch.Tensor): pass


cycle: list = []
cycle.append(cycle)
t = torch.ones(2)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both are prototypes, or will go
    ragged = torch.nested.nested_tensor([t, t[:1]])
    quantized = torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)
REFUSED = [
    ({"callbacks": {"EMA": {"x": Foo()}}}, "state['callbacks']['EMA']['x'] is a Foo; a checkpoint holds None, bool"),
    ({"a": [1, (2, {3: Foo})]}, "state['a'][1][1][3] is a type; a checkpoint"),
    ({"a": {1, 2}}, "state['a'] is a set; a checkpoint"),
    ({"a": 1j}, "state['a'] is a complex; a checkpoint"),
    ({"a": np.longdouble(1)}, "state['a'] is a longdouble; a checkpoint"),
    ({"a": np.datetime64("2020")}, "state['a'] is a datetime64; a checkpoint"),
    ({"a": np.array(["x"])}, "state['a'] is an array of <U1; convert it"),
    ({"a": np.array([Foo()])}, "state['a'] is an array of object; convert it"),
    ({"a": np.arange(3, dtype=">i4")}, "state['a'] is an array of >i4; convert it"),
    ({"a": np.ma.zeros(2)}, "state['a'] is a MaskedArray; a checkpoint"),
    ({"a": np.zeros(2, dtype=[("x", "f4")])}, "state['a'] is an array of [('x', '<f4')]; convert it"),
    ({"a": torch.ones(2, device="meta")}, "state['a'] is a tensor that is quantized, nested or without values"),
    ({"a": [2**8192]}, "state['a'][0] is a whole number of 8,193 bits; at most 8,192 are kept"),
    ({"a": -(1 << 20_000)}, "state['a'] is a whole number of 20,001 bits; at most 8,192 are kept"),
    ({"a": t.as_subclass(Special)}, "state['a'] is a Special, a special tensor; save plain ones"),
    ({"a": nn.UninitializedParameter()}, "state['a'] is a UninitializedParameter, a special tensor; save plain ones"),
    ({"a": {(1, 2): 3}}, "state['a'] has the key (1, 2), a tuple; keys must be str or int"),
    ({"a": {True: 3}}, "state['a'] has the key True, a bool; keys must be str or int"),
    ({"a": {None: 3}}, "state['a'] has the key None, a NoneType; keys must be str or int"),
    ({"a": {1.0: 3}}, "state['a'] has the key 1.0, a float; keys must be str or int"),
    ({"a": cycle}, "state['a'][0][0]"),
    ({"a": quantized}, "state['a'] is a tensor that is quantized, nested or without values"),
    ({"a": ragged}, "state['a'] is a tensor that is quantized, nested or without values"),
    ({1: t}, "a state is a mapping with text as keys"),
    ([t], "a state is a mapping with text as keys"),
    (t, "a state is a mapping with text as keys"),
]


@pytest.mark.parametrize("state, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_kept_is_named_before_a_byte_is_written(tmp_path, state, message):
    save_state(tmp_path / "c", made(1))
    before = (tmp_path / "c").stat()
    for function in (lambda: save_state(tmp_path / "c", state), lambda: save_state(tmp_path / "new", state), lambda: snapshot(state)):
        with pytest.raises((TypeError, ValueError)) as caught: function()
        assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert os.listdir(tmp_path) == ["c"] and (tmp_path / "c").stat().st_mtime_ns == before.st_mtime_ns
    assert whole(load_state(tmp_path / "c")) == 1


@pytest.mark.parametrize(("value", "message"), [(list(range(2_100_000)), "has more than 2,000,000 values"), (["x" * 1000] * 110_000, "has 110,")])
def test_what_could_not_be_read_back_is_not_written(tmp_path, value, message):
    save_state(tmp_path / "c", made(1))
    with pytest.raises(ValueError, match=f"the state does not fit into a file, whose header then {message}.*; keep long lists of numbers as tensors"):
        save_state(tmp_path / "c", {"a": value})
    assert whole(load_state(tmp_path / "c")) == 1 and os.listdir(tmp_path) == ["c"]


def test_folders_and_files_that_are_no_checkpoint_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "model.safetensors").write_text("not ours")
    (tmp_path / "file").write_text("x")
    for name, message in {"photos": "is a folder, which is not replaced", "file": "is a file but not a checkpoint, so it is not replaced; save to another path"}.items():
        with pytest.raises(FileError, match=message): save_state(tmp_path / name, made(1))
    with pytest.raises(OSError): save_state(tmp_path / "file" / "c", made(1))
    assert (tmp_path / "photos" / "model.safetensors").read_text() == "not ours" and (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").touch()
    for name in ("empty", "photos/model.safetensors"):  # this name is that of a checkpoint
        save_state(tmp_path / name, made(1))
        assert whole(load_state(tmp_path / name)) == 1
    save_state(tmp_path / "deep" / "er" / "c", made(2))
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty", "file", "photos"]


def test_a_link_in_place_of_a_checkpoint_is_refused_and_folders_above_it_may_be_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    save_state(tmp_path / "folder" / "c", made(1))
    (tmp_path / "link").symlink_to("real/c")
    (tmp_path / "dangling").symlink_to("real/d")
    for name in ("link", "dangling"):
        with pytest.raises(FileError, match=f"{name} is a link, which is not replaced; choose another name"): save_state(tmp_path / name, made(2))
        for read in (load_state, check_state):
            with pytest.raises(DamagedError, match=f"{name} is a link, which is not followed"): read(tmp_path / name)
    assert whole(load_state(tmp_path / "real" / "c")) == 1 and os.listdir(tmp_path / "real") == ["c"]
    with pytest.raises(DamagedError, match="is a link"): load_state(tmp_path / "folder" / "c", inside=tmp_path)


# ---------------------------------------------------------------------------------------------------- crashes

OPS = ["open", "write", "fsync", "close", "mkdir", "replace", "unlink", "lseek"]


class Points:
    "Does something at the k-th operation on the disk, before it or (for a write) in its middle; records them all."

    def __init__(self, at=None, act=None):
        self.at, self.act, self.seen = at, act, []

    def wrap(self, name, function):
        def operation(*arguments, **options):
            self.seen.append(name)
            if len(self.seen) == self.at:
                if name == "write": function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.act()
            return function(*arguments, **options)
        return operation

    @contextlib.contextmanager
    def watching(self):
        with pytest.MonkeyPatch.context() as patch:
            for name in OPS: patch.setattr(os, name, self.wrap(name, getattr(os, name)))
            yield


def fail(error):
    def act(): raise error
    return act


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # where closing a folder fails, the file in it is dropped, and closes itself
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_error_at_any_operation_leaves_the_old_or_the_new(tmp_path, error):
    place, steps, at = tmp_path / "c", [], 0
    while True:
        at += 1
        save_state(place, made(1))
        points = Points(at, fail(error))
        with points.watching():
            try: save_state(place, made(2))
            except (OSError, KeyboardInterrupt): failed = True
            else: failed = False
        check_state(place)
        steps.append(whole(load_state(place)))
        if not failed and len(points.seen) < at: break
        assert failed or steps[-1] == 2
        assert os.listdir(tmp_path) == ["c"]
        save_state(place, made(3))
        assert os.listdir(tmp_path) == ["c"] and whole(load_state(place)) == 3
    assert at > 15 and steps == sorted(steps) and set(steps) == {1, 2}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # where closing a folder fails, the file in it is dropped, and closes itself
def test_errors_before_the_replacement_leave_nothing_behind_and_say_that_the_old_one_is_kept(tmp_path):
    save_state(tmp_path / "c", made(1))
    points = Points()
    with points.watching(): save_state(tmp_path / "c", made(1))
    for at in range(1, points.seen.index("replace") + 2):
        with Points(at, fail(OSError(errno.ENOSPC, "No space left on device"))).watching(), pytest.raises(OSError) as caught:
            save_state(tmp_path / "c", made(2))
        assert str(caught.value) == f"[Errno 28] No space left on device; what was saved before is kept: '{tmp_path}/c'"
        assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == ["c"]


def child(work):
    "A process that does the work, and ends: its number."
    pid = os.fork()
    if pid: return pid
    try: work()
    except BaseException as error: print(repr(error), file=sys.stderr, flush=True)
    finally: os._exit(1)


SERVER = """
import json, os, random, signal, sys, time
import torch
sys.path[:0] = [{tests!r}, *(f"{tests}/{{name}}" for name in ("base", "loop", "keep"))]
from test_store import OPS, Points, child, made, store, whole
os.chdir({folder!r})

def killed_at(at):
    def work():
        points = Points(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with points.watching(): store.save_state("c", made(2))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])

def at_every_point():
    steps, left, at = [], 0, 0
    while True:
        at += 1
        store.save_state("c", made(1))
        code = killed_at(at)
        if code != -9: break
        left += len(os.listdir()) > 1
        steps.append(whole(store.load_state("c")))
        if at % 2: store.save_state("c", made(1)); assert os.listdir() == ["c"]  # else the leftovers meet the next save to be killed
    assert code == 0
    return dict(steps=steps, left=left)

def at_random(count):
    made_ = [made(step, 300_000) for step in range(40)]
    done, left = [], 0
    for _ in range(count):
        r, w = os.pipe()
        first = done[-1] + 1 if done else 1
        def work():
            for step in range(first, first + 30):
                store.save_state("c", made_[step % 40])
                os.write(w, b"x")
            os._exit(0)
        pid = child(work)
        os.read(r, 1)
        time.sleep(random.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(w)
        finished = first + len(os.read(r, 100))
        os.close(r)
        step = whole(store.load_state("c"))
        assert step in (finished % 40, (finished + 1) % 40), (step, finished)
        left += len(os.listdir()) > 1
        done.append(finished + 1 if step != finished % 40 else finished)
    store.save_state("c", made(1))
    return dict(left=left, now=os.listdir(), count=len(done))

print(json.dumps({call}))
"""


def serve(tmp_path, call):
    "Runs in a process that forks those to be killed, so that torch is loaded once."
    script = SERVER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_kill_at_every_operation_leaves_the_old_or_the_new(tmp_path):
    found = serve(tmp_path, "at_every_point()")
    steps = found["steps"]
    assert len(steps) > 15 and steps == sorted(steps) and set(steps) == {1, 2}
    assert found["left"] > 3  # temporary files, which the next save has removed


@needs_fork
def test_kill_at_random_leaves_the_last_complete_or_the_new(tmp_path):
    count = 600 if LONG else 30
    found = serve(tmp_path, f"at_random({count})")
    assert found["count"] == count and found["now"] == ["c"]
    assert found["left"] > count / 5  # the kills did hit saves


def test_everything_is_on_the_disk_before_what_depends_on_it(tmp_path, monkeypatch):
    "For a loss of power: the new name comes after the content and the reading of it, and the folder is synced after it."
    if not os.path.exists("/proc/self/fd"): pytest.skip("needs /proc")
    place, log = tmp_path / "new folder" / "c", []
    def record(name, function):
        def operation(*arguments, **options):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else os.fspath(arguments[0])
            log.append((name, path))
            return function(*arguments, **options)
        return operation
    for name in ("write", "fsync", "replace", "mkdir", "unlink"): monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    monkeypatch.setattr(store, "_hash_again", record("read", store._hash_again))
    for step in (1, 2):
        log.clear()
        save_state(place, made(step))
        new = next(path for name, path in log if name == "write")
        assert os.path.dirname(new) == str(place.parent) and new.endswith(".tmp")
        kinds = [(name, "file" if path == new else "folder" if path == str(place.parent) else path) for name, path in log]
        first = [("mkdir", "folder"), ("fsync", str(tmp_path))] if step == 1 else []  # its folder is new, too
        assert kinds == [*first, ("write", "file"), ("write", "file"), ("fsync", "file"), ("read", "file"), ("fsync", "file"),
                         ("replace", os.path.basename(new)), ("fsync", "folder")]


def test_a_save_removes_what_killed_saves_to_its_path_left_and_nothing_else(tmp_path):
    save_state(tmp_path / "c", made(1))
    others = [".c.tmp", ".d.0123456789abcdef.tmp", "c.0123456789abcdef.tmp", ".c.0123456789abcdef.new"]
    for name in (".c.0123456789abcdef.tmp", *others): (tmp_path / name).write_text("half")
    save_state(tmp_path / "c", made(2))
    assert sorted(os.listdir(tmp_path)) == sorted(["c", *others]) and list_checkpoints(tmp_path) == []


def test_a_damaged_checkpoint_can_be_replaced(tmp_path):
    for damage in (lambda f: f.unlink(), lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:1000])):
        save_state(tmp_path / "c", made(1))
        damage(tmp_path / "c")
        with pytest.raises((DamagedError, FileNotFoundError)): load_state(tmp_path / "c")
        save_state(tmp_path / "c", made(2))
        assert whole(load_state(tmp_path / "c")) == 2


def test_what_is_written_wrongly_never_replaces(tmp_path, monkeypatch):
    save_state(tmp_path / "c", made(1))
    write = os.write
    def flips(file, data):
        data = bytearray(data)
        if len(data) > 500: data[400] ^= 1  # a disk or a memory that is not sound
        return write(file, data)
    monkeypatch.setattr(os, "write", flips)
    with pytest.raises(OSError, match="what was read back is not what was written: the disk fails, .*what was saved before is kept"):
        save_state(tmp_path / "c", made(2))
    monkeypatch.undo()
    assert whole(load_state(tmp_path / "c")) == 1 and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("path", ["", ".", Path(""), "..", "c/.."], ids=repr)
def test_a_path_that_names_no_file_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match="does not name a file") as error: save_state(path, made(1))
    assert "\n" not in str(error.value) and set(os.listdir(tmp_path)) <= {"c"}


def test_a_write_may_take_less_than_it_was_given(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:777]))
    save_state(tmp_path / "c", made(5, 100_000))
    assert whole(load_state(tmp_path / "c")) == 5


# ---------------------------------------------------------------------------------------------------- others at the same time

def test_two_saves_to_one_path_do_not_mix(tmp_path, monkeypatch):
    started, go = threading.Event(), threading.Event()
    fsync = os.fsync
    def waits(file):
        if threading.current_thread() is not threading.main_thread(): started.set(); go.wait(10)
        fsync(file)
    monkeypatch.setattr(os, "fsync", waits)
    thread = threading.Thread(target=save_state, args=(tmp_path / "c", snapshot(made(1))))
    thread.start()
    assert started.wait(10)
    save_state(tmp_path / "c", made(2))  # does not take the file of the other for that of a killed save
    assert whole(load_state(tmp_path / "c")) == 2
    go.set()
    thread.join()
    assert whole(load_state(tmp_path / "c")) == 1 and os.listdir(tmp_path) == ["c"]  # the one that ends last


def test_a_reader_sees_whole_checkpoints_while_they_are_replaced(tmp_path):
    save_state(tmp_path / "c", made(0))
    stop, failures = threading.Event(), []
    def saves():
        step = 0
        try:
            while not stop.is_set(): step += 1; save_state(tmp_path / "c", made(step))
        except BaseException as error: failures.append(error)
    thread = threading.Thread(target=saves)
    thread.start()
    seen, end = [0], time.monotonic() + (10 if LONG else 1.5)
    try:
        while time.monotonic() < end: seen.append(whole(load_state(tmp_path / "c")))
    finally:
        stop.set()
        thread.join()
    assert not failures and seen == sorted(seen) and len(set(seen)) > 5


def test_a_save_may_outlast_the_script(tmp_path):
    code = ("import threading, torch; from learner.base.nested import snapshot; from learner.base.store import save_state; big = {'model': torch.ones(8_000_000)};"
            f"threading.Thread(target=save_state, args=({str(tmp_path / 'c')!r}, snapshot(big))).start()")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr == ""
    assert load_state(tmp_path / "c")["model"].sum() == 8_000_000


def test_no_thread_or_file_is_left_open(tmp_path, monkeypatch):
    def count(): return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    save_state(tmp_path / "c", made(1, 2_000_000))
    before = count()
    for _ in range(3): save_state(tmp_path / "c", made(1, 2_000_000)); load_state(tmp_path / "c"); check_state(tmp_path / "c")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError): load_state(tmp_path / "c")
    for at in range(2, 40, 3):
        points = Points(at, fail(OSError(5, "x")))
        with points.watching(), contextlib.suppress(OSError): save_state(tmp_path / "d", made(1, 2_000_000))
        if len(points.seen) >= at and points.seen[at - 1] == "close": before = count()  # this one could not be closed
    assert count() == before


def test_a_snapshot_is_what_load_would_give_and_stays(tmp_path):
    tied = torch.ones(3)
    state = {"a": {0: tied, "p": nn.Parameter(tied.clone())}, "b": [tied, np.ones(2), b"x"], "row": tied.reshape(3, 1)[::2]}
    copy = snapshot(state)
    save_state(tmp_path / "c", state)
    assert same(load_state(tmp_path / "c"), copy)
    tied.zero_()
    state["b"][1][:] = 0
    state["a"][1] = "new"
    assert copy["a"][0].tolist() == [1, 1, 1] and copy["b"][1].tolist() == [1, 1] and list(copy["a"]) == [0, "p"]
    assert copy["a"][0] is copy["b"][0] and copy["row"].tolist() == [[1], [1]]
    save_state(tmp_path / "d", copy)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


# ---------------------------------------------------------------------------------------------------- damage

def damaged(file, readers=(check_state, load_state)):
    "Whether both readers see it, and name the file."
    for read in readers:
        with pytest.raises(DamagedError) as caught: read(file)
        assert str(caught.value).startswith(f"{file} ") and "\n" not in str(caught.value) and len(str(caught.value)) < 500
        copy = pickle.loads(pickle.dumps(caught.value))  # it may come from another process
        assert (str(copy), copy.path, copy.what) == (str(caught.value), caught.value.path, caught.value.what)
    return str(caught.value)


def test_every_truncation_is_found_and_named(tmp_path):
    file = tmp_path / "c"
    save_state(file, made(1, 20_000))
    good = file.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, 100, 1000, len(good) - 1, *range(0, len(good), 1024)}):
        os.truncate(file, length)
        damaged(file)
        file.write_bytes(good)
    for end in (b"\0", good): file.write_bytes(good + end); damaged(file)
    file.write_bytes(good)
    assert whole(load_state(file)) == 1


def test_every_flipped_bit_is_found_and_named(tmp_path):
    file = tmp_path / "c"
    save_state(file, made(1))
    draw, good = random.Random(5), file.read_bytes()
    bits = range(len(good) * 8)
    head = 8 * int.from_bytes(good[:8], "little")
    for bit in bits if LONG else sorted({*range(0, head, 11), *draw.sample(bits, 1000)}):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        damaged(file)
    file.write_bytes(good)
    assert whole(load_state(file)) == 1


def test_tensors_of_two_checkpoints_do_not_fit(tmp_path):
    for step in (1, 2): save_state(tmp_path / str(step), made(step))
    one, two = ((tmp_path / str(step)).read_bytes() for step in (1, 2))
    (tmp_path / "3").write_bytes(one[:-1000] + two[-1000:])
    assert "is damaged: its SHA-256 is not the one that was written" in damaged(tmp_path / "3")


def test_a_full_disk_keeps_the_old_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.name == "posix" and hasattr(os, "geteuid") and os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode == 0
    if not mounted: pytest.skip("needs the right to mount a small disk")
    try:
        save_state(disk / "c", made(1, 30_000))
        for size in (150_000, 130_000, 110_000):
            with pytest.raises(OSError, match="No space left on device; what was saved before is kept") as caught: save_state(disk / "c", made(2, size))
            assert caught.value.errno == errno.ENOSPC and os.listdir(disk) == ["c"] and whole(load_state(disk / "c")) == 1
        save_state(disk / "c", made(2, 30_000))
        assert whole(load_state(disk / "c")) == 2
    finally: subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_sizes_keeps_the_old_one(tmp_path):
    save_state(tmp_path / "c", made(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large; what was saved before is kept"): save_state(tmp_path / "c", made(2, 50_000))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert whole(load_state(tmp_path / "c")) == 1 and os.listdir(tmp_path) == ["c"]


def test_a_folder_that_cannot_be_written_keeps_the_old_one(tmp_path):
    place = tmp_path / "fixed" / "c"
    save_state(place, made(1))
    if os.geteuid(): os.chmod(tmp_path / "fixed", 0o555)
    elif subprocess.run(["chattr", "+i", tmp_path / "fixed"], capture_output=True).returncode: pytest.skip("root may write everywhere here")
    try:
        with pytest.raises(PermissionError, match="what was saved before is kept"): save_state(place, made(2))
        assert whole(load_state(place)) == 1
        check_state(place)
    finally:
        if os.geteuid(): os.chmod(tmp_path / "fixed", 0o755)
        else: subprocess.run(["chattr", "-i", tmp_path / "fixed"], check=True)
    assert os.listdir(tmp_path / "fixed") == ["c"]


# ---------------------------------------------------------------------------------------------------- files made to deceive

def forge(file, state="{}", header=None, data=b"", raw=None, text=None, begin=None, **metadata):
    "A file with a hash that fits, whatever it holds."
    if raw is None:
        if text is None:
            facts = {"sha256": "0" * 64, "format": "pt", "learner": "1", "state": state, **metadata, **({} if begin is None else begin)}
            text = json.dumps({"__metadata__": facts, **(header or {})}, separators=(",", ":"))
            text = text.replace('"sha256":"' + facts["sha256"], '"sha256":"' + "0" * 64, 1)
        text = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
        raw = len(text).to_bytes(8, "little") + text + data
    where = store._SUM
    if raw[8:where.start] == store._BEGIN and raw[where] == b"0" * 64:
        raw = raw[:where.start] + hashlib.sha256(raw).hexdigest().encode() + raw[where.stop:]
    file.write_bytes(raw)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)): return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def after(rest):
    "The text of a header that begins as it should."
    return '{"__metadata__":{"sha256":"' + "0" * 64 + '"' + rest


class Evil:
    def __reduce__(self): return os.system, ("touch /evil",)


GOOD = {"header": {"w": tensor()}, "data": bytes(8)}
FORGED = {
    # the file
    "a pickle": (dict(raw=pickle.dumps(Evil(), 0) * 3), "is not a checkpoint"),
    "a pickle of 100 bytes": (dict(raw=pickle.dumps(Evil()) + bytes(100)), "is not a checkpoint"),
    "nothing": (dict(raw=b""), "is not a checkpoint"),
    "zeros": (dict(raw=bytes(10_000)), "is not a checkpoint"),
    "header of an exabyte": (dict(raw=(2**60).to_bytes(8, "little") + bytes(200)), "is not a checkpoint"),
    "header beyond the file": (dict(raw=(300).to_bytes(8, "little") + after("").encode() + bytes(100)), "is not a checkpoint"),
    "other order": (dict(text='{"__metadata__":{"format":"pt","sha256":"' + "0" * 64 + '","learner":"1","state":"{}"}}'), "is not a checkpoint"),
    "a file of safetensors": (dict(text='{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[30],"data_offsets":[0,120]}}', data=bytes(120)), "is not a checkpoint"),
    "header is cut": (dict(text=after("")), "its header is not JSON"),
    "header with a pickle": (dict(text=after(',"x":"').encode() + pickle.dumps(Evil())), "its header is not text"),
    "header is deep": (dict(text=after(',"x":' + "[" * 1_000_000)), "its header is nested more than"),
    "header with a name twice": (dict(text=after(',"learner":"1","state":"{}"},"w":1,"w":2}')), "its header has a key twice"),
    "hash twice": (dict(text=after(',"sha256":"1","learner":"1","state":"{}"}}')), "its header has a key twice"),
    "metadata twice": (dict(text=after(',"learner":"1","state":"{}"},"__metadata__":{"learner":"1","state":"{}"}}')), "its header has a key twice"),
    "no state": (dict(text=after(',"format":"pt","learner":"1"}}')), "has no state in its metadata"),
    "no version": (dict(text=after(',"format":"pt","state":"{}"}}')), "has no state in its metadata"),
    "state is a number": (dict(text=after(',"format":"pt","learner":"1","state":1}}')), "has no state in its metadata"),
    "from the future": (dict(learner="2"), "has version 2 of the format, and this library reads 1"),
    "far future": (dict(text=after(',"learner":"99","shards":[]}}')), "has version 99 of the format"),
    "version by number": (dict(learner=1), "has no state in its metadata"),
    # the state
    "state is a list": (dict(state="[]"), "has a state that is not a mapping"),
    "empty": (dict(state=" "), "is not JSON"),
    "key twice": (dict(state='{"a": 1, "a": 2}'), "has a key twice"),
    "int key twice": (dict(state='{"a": {"$dict": [[1, 1], [1, 2]]}}'), "means nothing"),
    "nan": (dict(state='{"a": NaN}'), "has NaN, which is not JSON"),
    "minus infinity": (dict(state='{"a": -Infinity}'), "has -Infinity"),
    "deep list": (dict(state='{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is nested more than 400 levels deep"),
    "deep open list": (dict(state="[" * 1_000_000), "is nested more than 400 levels deep"),
    "deep object": (dict(state='{"a":' * 1_000_000), "is nested more than 400 levels deep"),
    "quite deep": (dict(state='{"a": ' + "[" * 150 + "]" * 150 + "}"), "is nested more than 100 levels deep"),
    "deep tags": (dict(state='{"a": ' + '{"$tuple": [' * 120 + "]}" * 120 + "}"), "is nested more than 100 levels deep"),
    "huge int": (dict(state='{"a": ' + "9" * 1_000_000 + "}"), "has a number of 1000000 digits"),
    "flood": (dict(state='{"a": [' + "[]," * 5_000_000 + "1]}"), "has more than 2,000,000 values"),
    "large int tag": (dict(state=json.dumps({"a": {"$int": "0x1" + "0" * 2048}})), "means nothing"),
    "int tag of nonsense": (dict(state='{"a": {"$int": "0x1_0"}}'), "means nothing"),
    "int tag of a number": (dict(state='{"a": {"$int": 5}}'), "means nothing"),
    "float tag of code": (dict(state='{"a": {"$float": "1e5"}}'), "means nothing"),
    "unknown tag": (dict(state='{"a": {"$class": "os.system"}}'), 'means nothing: {"$class"'),
    "reduce tag": (dict(state='{"a": {"$reduce": ["os", "system", ["touch /evil"]]}}'), "means nothing"),
    "tag with company": (dict(state='{"a": {"$tuple": [], "x": 1}}'), "means nothing"),
    "tag in second place": (dict(state='{"a": {"x": 1, "$tuple": []}}'), "means nothing"),
    "tuple of text": (dict(state='{"a": {"$tuple": "abc"}}'), "means nothing"),
    "dict of odd pairs": (dict(state='{"a": {"$dict": [[1]]}}'), "means nothing"),
    "dict with a list for a key": (dict(state='{"a": {"$dict": [[[1], 2]]}}'), "has the key [1]"),
    "dict with a dict for a key": (dict(state='{"a": {"$dict": [[{"b": 1}, 2]]}}'), "has the key {'b': 1}"),
    "dict with true for a key": (dict(state='{"a": {"$dict": [[true, 2]]}}'), "has the key True"),
    "tensor of no name": (dict(state='{"a": {"$tensor": "v"}}', **GOOD), "means nothing"),
    "tensor by number": (dict(state='{"a": {"$tensor": 0}}', **GOOD), "means nothing"),
    "tensor by list": (dict(state='{"a": {"$tensor": ["w"]}}', **GOOD), "means nothing"),
    "tensor by nothing": (dict(state='{"a": {"$tensor": {}}}', **GOOD), "means nothing"),
    "tensor by two": (dict(state='{"a": {"$tensor": {"complex": "w", "sparse_coo": []}}}', **GOOD), "means nothing"),
    "tensor by a path": (dict(state='{"a": {"$tensor": "/etc/passwd"}}', **GOOD), "means nothing"),
    "bytes of floats": (dict(state='{"a": {"$bytes": "w"}}', **GOOD), "for bytes, but it is torch.float32"),
    "array of bfloat16": (dict(state='{"a": {"$array": "w"}}', header={"w": tensor("BF16", (4,))}, data=bytes(8)), "for array, but it is torch.bfloat16"),
    "complex of floats": (dict(state='{"a": {"$tensor": {"complex": "w"}}}', **GOOD), "means nothing"),
    "complex of three": (dict(state='{"a": {"$tensor": {"complex": "w"}}}', header={"w": tensor("F64", (3,), (0, 24))}, data=bytes(24)), "means nothing"),
    "complex of one number": (dict(state='{"a": {"$tensor": {"complex": "w"}}}', header={"w": tensor("F64", ())}, data=bytes(8)), "means nothing"),
    "complex of complex": (dict(state='{"a": {"$tensor": {"complex": {"complex": "w"}}}}', header={"w": tensor("F64", (2, 2), (0, 32))}, data=bytes(32)), "means nothing"),
    "sparse of no shape": (dict(state='{"a": {"$tensor": {"sparse_coo": ["w", "w", true]}}}', **GOOD), "means nothing"),
    "sparse of too many": (dict(state='{"a": {"$tensor": {"sparse_csr": ["w", "w", "w", "w", [2]]}}}', **GOOD), "means nothing"),
    "sparse of a huge shape": (dict(state='{"a": {"$tensor": {"sparse_coo": ["w", "w", [1099511627776, 1099511627776], true]}}}', **GOOD), "means nothing"),
    "sparse of a negative shape": (dict(state='{"a": {"$tensor": {"sparse_coo": ["w", "w", [-1], true]}}}', **GOOD), "means nothing"),
    "sparse of an odd mark": (dict(state='{"a": {"$tensor": {"sparse_coo": ["w", "w", [2], 1]}}}', **GOOD), "means nothing"),
    "unknown layout": (dict(state='{"a": {"$tensor": {"mkldnn": ["w", "w", [2]]}}}', **GOOD), "means nothing"),
    "sparse within sparse": (dict(state='{"a": {"$tensor": {"sparse_coo": [{"sparse_coo": ["w", "w", [2], true]}, "w", [2], true]}}}', **GOOD), "means nothing"),
    "bytes that are sparse": (dict(state='{"a": {"$bytes": {"sparse_coo": ["i", "w", [2], false]}}}', header={"i": tensor("I64", (1, 2), (0, 16)), "w": tensor(offsets=(16, 24))}, data=bytes(24)), "for bytes, but it is"),
    # the tensors
    "tensor is a number": (dict(header={"w": 3}), "does not describe 'w' as a tensor: 3"),
    "no shape": (dict(header={"w": {"dtype": "F32", "data_offsets": [0, 8]}}, data=bytes(8)), "does not describe 'w'"),
    "unknown type": (dict(header={"w": tensor("O8")}, data=bytes(8)), "does not describe 'w'"),
    "type is a list": (dict(header={"w": tensor(["F32"])}, data=bytes(8)), "does not describe 'w'"),
    "type is a class": (dict(header={"w": tensor("__import__('os')")}, data=bytes(8)), "does not describe 'w'"),
    "wrong type": (dict(header={"w": tensor("F64")}, data=bytes(8)), "gives 'w' 8 bytes for F64 [2]"),
    "wrong shape": (dict(header={"w": tensor(shape=(3,))}, data=bytes(8)), "gives 'w' 8 bytes for F32 [3]"),
    "huge shape": (dict(header={"w": tensor(shape=(2**62, 2**62))}, data=bytes(8)), "gives 'w' 8 bytes for F32"),
    "huge and honest": (dict(header={"w": tensor(shape=(2**50,), offsets=(0, 2**52))}, data=bytes(8)), f"describes {2**52} bytes of 8"),
    "empty but huge": (dict(header={"w": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}), "gives 'w' 0 bytes for F32"),
    "overflowing shape": (dict(header={"w": tensor(shape=(2**32, 2**32), offsets=(0, 0))}), "gives 'w' 0 bytes for F32"),
    "negative shape": (dict(header={"w": tensor(shape=(-2, -1))}, data=bytes(8)), "an impossible shape or place"),
    "shape beyond 64 bits": (dict(header={"w": tensor(shape=(2**63, 0), offsets=(0, 0))}), "an impossible shape or place"),
    "shape of floats": (dict(header={"w": tensor(shape=(2.0,))}, data=bytes(8)), "an impossible shape or place"),
    "shape of truths": (dict(header={"w": tensor(shape=(True, 2))}, data=bytes(8)), "an impossible shape or place"),
    "many dimensions": (dict(header={"w": tensor(shape=(1,) * 100_000 + (2,))}, data=bytes(8)), "an impossible shape or place"),
    "half a byte": (dict(header={"w": tensor("F4", (5,), (0, 3))}, data=bytes(3)), "gives 'w' half a byte"),
    "beyond the end": (dict(header={"w": tensor(offsets=(8, 16))}, data=bytes(8)), "has a gap or an overlap before 'w'"),
    "backwards": (dict(header={"w": tensor(offsets=(8, 0))}, data=bytes(8)), "gives 'w' -8 bytes"),
    "overlap": (dict(header={"w": tensor(), "v": tensor(offsets=(4, 12))}, data=bytes(12)), "has a gap or an overlap"),
    "the same twice": (dict(header={"w": tensor(), "v": tensor()}, data=bytes(8)), "has a gap or an overlap"),
    "gap": (dict(header={"w": tensor(), "v": tensor(offsets=(12, 20))}, data=bytes(20)), "has a gap or an overlap before 'v'"),
    "more than described": (dict(header={"w": tensor()}, data=bytes(9)), "describes 8 bytes of 9"),
    "less than described": (dict(header={"w": tensor()}, data=bytes(7)), "describes 8 bytes of 7"),
    "three offsets": (dict(header={"w": tensor(offsets=(0, 4, 8))}, data=bytes(8)), "does not describe 'w'"),
    "offset of a googol": (dict(header={"w": tensor(offsets=(0, 10**100))}, data=bytes(8)), "has a number of 101 digits"),
}
SPARSE = {  # seen when the values are there
    "indices of floats": ('{"sparse_coo": ["w", "w", [2], true]}', "whose parts do not fit"),
    "indices beyond the shape": ('{"sparse_coo": ["far", "v", [3], true]}', "whose parts do not fit"),
    "negative indices": ('{"sparse_coo": ["low", "v", [3], true]}', "whose parts do not fit"),
    "twice and coalesced": ('{"sparse_coo": ["twice", "v", [3], true]}', "whose parts do not fit"),
    "other numbers of them": ('{"sparse_coo": ["twice", "w", [3], false]}', "whose parts do not fit"),
    "a terabyte of rows": ('{"sparse_csr": ["far", "twice", "v", [1099511627776, 3]]}', "whose parts do not fit"),
    "columns beyond the shape": ('{"sparse_csr": ["rows", "columns", "v", [1, 3]]}', "whose parts do not fit"),
}


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="an old torch knows fewer types")
@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused_with_what_is_wrong(tmp_path, name):
    arguments, message = FORGED[name]
    forge(tmp_path / "c", **arguments)
    assert message in damaged(tmp_path / "c")
    assert not os.path.exists("/evil")


@pytest.mark.parametrize("name", SPARSE)
def test_forged_sparse_tensors_are_refused(tmp_path, name):
    reference, message = SPARSE[name]
    parts = {"far": [[0, 9]], "low": [[0, -1]], "twice": [[1, 1]], "rows": [0, 2], "columns": [1, 7]}
    tensors = {**{key: torch.tensor(value) for key, value in parts.items()}, "v": torch.ones(2), "w": torch.ones(3)}
    save_state(tmp_path / "c", tensors)
    raw = (tmp_path / "c").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    del header["__metadata__"]
    forge(tmp_path / "c", state=f'{{"a": {{"$tensor": {reference}}}}}', header=header, data=raw[8 + size:])
    assert message in damaged(tmp_path / "c", (load_state,))


def test_a_forger_without_malice_is_read(tmp_path):
    forge(tmp_path / "c", state='{"a": {"$tensor": "w"}, "b": [1.5, {"$dict": [[1, {"$tuple": []}]]}]}', **GOOD)
    assert same(load_state(tmp_path / "c"), {"a": torch.zeros(2), "b": [1.5, {1: ()}]})


@pytest.mark.parametrize("reference", ['{"$bytes": "w"}', '{"$array": "w"}', '{"$tensor": "w"}', '{"$tensor": {"complex": "z"}}'])
def test_a_tensor_that_is_named_many_times_is_made_once(tmp_path, reference):
    header = {"w": tensor("U8", (10_000_000,), (0, 10_000_000)), "z": tensor("F64", (50_000, 2), (10_000_000, 10_800_000))}
    forge(tmp_path / "c", state='{"a": [' + ",".join([reference] * 200) + "]}", header=header, data=bytes(10_800_000))
    assert len({id(value) for value in load_state(tmp_path / "c")["a"]}) == 1


def test_links_pipes_devices_sockets_and_folders_are_not_opened(tmp_path):
    save_state(tmp_path / "secret", made(1))
    place = tmp_path / "c"
    def bound(path):
        with socket.socket(socket.AF_UNIX) as made_:
            os.chdir(path.parent)
            made_.bind(path.name)
    here = os.getcwd()
    for make in (lambda f: f.symlink_to(tmp_path / "secret"), lambda f: f.symlink_to(f), os.mkfifo, os.mkdir, bound, lambda f: f.symlink_to("/dev/zero")):
        make(place)
        os.chdir(here)
        assert re.search("is a link, which is not followed|is a folder|is not a regular file", damaged(place))
        with pytest.raises(FileError, match="which is not replaced"): save_state(place, made(2))
        place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()


def test_what_is_no_checkpoint_at_all(tmp_path):
    save_state(tmp_path / "last", made(1))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*/lost; did you mean last"): load_state(tmp_path / "lost")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"): load_state(tmp_path / "none" / "none")
    torch.save({"a": Evil()}, tmp_path / "model.pt")
    for read in (load_state, check_state):
        with pytest.raises(DamagedError, match="model.pt is not a checkpoint"): read(tmp_path / "model.pt")
        with pytest.raises(DamagedError, match="is a folder"): read(tmp_path)
    with pytest.raises(RuntimeError): load_state(tmp_path, "gpu!")


# ---------------------------------------------------------------------------------------------------- folders of checkpoints

@pytest.mark.parametrize(("rows", "batch"), [(0, 0), (0, 1), (3, 0), (12, 34567), (99_999, 0), (10_000, 1_000_000)])
def test_names_say_how_far_a_checkpoint_is(rows, batch):
    assert checkpoint_place(checkpoint_name(rows, batch)) == (rows, batch)


@pytest.mark.parametrize("name", ["epoch-1.safetensors", "epoch-0001", "epoch-0001.safetensors.tmp", ".epoch-0001.safetensors", "epoch-0001-batch-1.safetensors",
                                  "epoch-\u0660\u0660\u0660\u0661.safetensors", "epoch-0001.safetensors\n", "epoch-" + "9" * 5000 + ".safetensors", "index.json", ""])
def test_other_names_are_no_checkpoints(name):
    assert checkpoint_place(name) is None


def test_checkpoints_are_listed_in_the_order_of_training(tmp_path):
    places = [(0, 0), (0, 7), (2, 0), (2, 99_999), (2, 100_000), (10_000, 0)]
    for place in reversed(places): (tmp_path / checkpoint_name(*place)).touch()
    (tmp_path / "notes.txt").touch()
    assert [checkpoint_place(path.name) for path in list_checkpoints(tmp_path)] == places
    assert list_checkpoints(tmp_path / "none") == list_checkpoints(tmp_path / "notes.txt") == []


@pytest.fixture
def folder(tmp_path):
    for rows in range(4): save_state(tmp_path / "run" / "checkpoints" / checkpoint_name(rows), {"rows": rows})
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("trap", ["link", "pipe", "folder", "half", "unreadable"])
def test_what_cannot_be_read_is_named_and_the_one_before_it_is_used(folder, trap, monkeypatch):
    newest = folder / checkpoint_name(3)
    if trap == "half": newest.write_bytes(newest.read_bytes()[:150])
    elif trap == "unreadable":
        opened = os.open
        def refuses(path, *arguments, **options):
            if path == newest.name: raise PermissionError(errno.EACCES, "Permission denied", path)
            return opened(path, *arguments, **options)
        monkeypatch.setattr(os, "open", refuses)  # root may read everything
    else:
        newest.unlink()
        if trap == "link": newest.symlink_to(checkpoint_name(2))
        if trap == "pipe": os.mkfifo(newest)
        if trap == "folder": newest.mkdir()
    for path in (folder, folder.parent):
        with pytest.warns(UserWarning, match="epoch-0003.safetensors.*; the checkpoint before it is used") as told: assert read_checkpoint(path) == {"rows": 2}
        assert len(told) == 1
    with pytest.warns(UserWarning): assert newest_checkpoint(folder, check_state) == (folder / checkpoint_name(2), None)
    with pytest.raises((DamagedError, PermissionError)): read_checkpoint(newest)


def test_a_folder_of_checkpoints_that_is_a_link_of_the_run_is_not_followed(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(folder)
    with pytest.raises(FileError, match="is a link, which is not followed"): read_checkpoint(tmp_path / "other")
    (tmp_path / "mine").symlink_to(folder)  # but what the user names is
    assert read_checkpoint(tmp_path / "mine") == {"rows": 3}


def test_a_folder_without_a_whole_one(folder):
    for path in list_checkpoints(folder): path.write_bytes(b"")
    with pytest.warns(UserWarning) as told, pytest.raises(DamagedError, match="holds no intact checkpoint"): read_checkpoint(folder)
    assert len(told) == 4
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*rum; did you mean run"): read_checkpoint(folder.parents[1] / "rum")
    (folder.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="^the folder .*empty holds no checkpoint; name a file"): read_checkpoint(folder.parent / "empty")


# ---------------------------------------------------------------------------------------------------- what reading and saving cost

def test_reading_imports_and_executes_nothing(tmp_path):
    for i, (arguments, _) in enumerate(FORGED.values()): forge(tmp_path / str(i), **arguments)
    save_state(tmp_path / "good", {"a": torch.ones(2), "b": np.ones(2), "c": b"x", "d": {1: (2.5,)}})
    code = f"""
import sys, torch, numpy
from learner.base import store
from learner.base.checkpoints import checkpoint_name, checkpoint_place, list_checkpoints
store.load_state({str(tmp_path / "good")!r})
try: store.load_state({str(tmp_path / "0")!r})
except store.DamagedError: pass
seen = set()
sys.addaudithook(lambda event, arguments: seen.add(event))
for i in range({len(FORGED)}):
    try: store.load_state({str(tmp_path)!r} + f"/{{i}}")
    except store.DamagedError: pass
    else: raise SystemExit("read")
store.load_state({str(tmp_path / "good")!r})
print(sorted(seen))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    seen = set(eval(done.stdout))
    assert "open" in seen and not {"import", "exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class", "marshal.loads"} & seen, seen


def test_a_file_does_not_make_the_reader_take_more_memory_than_it_has_bytes(tmp_path):
    "In a process that may take 600 MB more than it has: all the forged files, and none ends it."
    for i, (arguments, _) in enumerate(FORGED.values()): forge(tmp_path / str(i), **arguments)
    code = f"""
import resource, torch
from learner.base import store
from learner.base.checkpoints import checkpoint_name, checkpoint_place, list_checkpoints
have = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (have + 600 * 2**20, resource.RLIM_INFINITY))
for i in range({len(FORGED)}):
    try: store.load_state({str(tmp_path)!r} + f"/{{i}}")
    except store.DamagedError: pass
"""
    if not os.path.exists("/proc/self/status"): pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_saving_takes_no_second_copy_of_the_tensors(tmp_path):
    code = f"""
import resource, torch
from learner.base import store
from learner.base.checkpoints import checkpoint_name, checkpoint_place, list_checkpoints
state = {{"model": {{"a": torch.ones(15_000_000), "b": torch.ones(15_000_000)}}}}
store.save_state({str(tmp_path / "w")!r}, {{"model": torch.ones(3_000_000)}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.save_state({str(tmp_path / "c")!r}, state)
store.check_state({str(tmp_path / "c")!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    if sys.platform != "linux": pytest.skip("the unit of ru_maxrss differs")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50  # MB, of 120
