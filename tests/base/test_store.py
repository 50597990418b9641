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
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from learner.base import store
from learner.base.provenance import kept_rng, rng_state, set_rng_state
from learner.base.store import DamagedError, check_state, hash_state, list_states, load_state, save_state, snapshot

LONG = os.environ.get("LEARNER_LONG") == "1"
FILES = ["model.safetensors", "optimiser.safetensors", "state.json", "state.json.sha256"]


def same(a, b):
    "Equal and of the same types, bit by bit."
    if isinstance(a, torch.Tensor):
        return (type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape
                and bytes(store._bytes(a.detach().contiguous())) == bytes(store._bytes(b)))
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
    "plain": [None, True, False, 0, -1, 2**53, -(2**53) + 1, 2**64, -(2**200), 1 << 20_000, "", "é\0\n$", "\ud800", "x" * 10_000],
    "floats": [0.0, -0.0, 0.1, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan, math.pi, 5.0],
    "nested": ((), [], {}, ((1,), [2, (3, [])]), {"a": {"b": ({},)}}),
    "keys": {0: "int", "0": "text", -5: 1, 2**70: 2, "": 3, "$tuple": [1], "a.b": {"c": 4}, "a": {"b.c": 5}, "__metadata__": 6},
    "tags": {"$int": "0x1", "inner": [{"$tensor": ["model", "w"]}, {"$dict": []}, {"$": 1}]},
    "bytes": [b"", b"\x00\xff", bytes(range(256)) * 50],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_exactly(tmp_path, name):
    save_state(tmp_path / "c", {name: VALUES[name], "$top": 1})
    assert same(load_state(tmp_path / "c"), {name: VALUES[name], "$top": 1})
    assert same(snapshot({name: VALUES[name]}), {name: VALUES[name]})


@pytest.mark.parametrize("code", store._DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (3, 4), (2, 1, 6)], ids=str)
def test_tensors_of_every_type_come_back_and_the_library_agrees(tmp_path, code, shape):
    dtype = store._DTYPES[code]
    if code == "F4" and not shape: pytest.skip("two of these numbers make a byte, so there is none alone")
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    save_state(tmp_path / "c", {"model": {"odd": torch.ones(3, dtype=torch.bool), "x": tensor}})
    assert same(tensor, load_state(tmp_path / "c")["model"]["x"])
    assert same(tensor, load_file(tmp_path / "c" / "model.safetensors")["x"])
    save_file({"x": tensor, "odd": torch.ones(3, dtype=torch.bool)}, tmp_path / "y.safetensors")  # and theirs is read here
    data = (tmp_path / "y.safetensors").read_bytes()
    assert same(tensor, store._read_part(tmp_path, "y", len(data), hashlib.sha256(data).hexdigest(), True)["x"])


def test_all_the_types_that_the_library_knows_are_known():
    from safetensors.torch import _SIZE
    assert {dtype for dtype in _SIZE if dtype} == set(store._CODES)


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
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 50 * 8 * 4 + 400
    assert not (tmp_path / "c" / "ema.safetensors").exists() or (tmp_path / "c" / "ema.safetensors").stat().st_size < 400
    loaded = load_state(tmp_path / "c")
    assert loaded["model"]["embed.weight"] is loaded["model"]["head.weight"] is loaded["ema"]["w"]
    assert loaded["again"][0] is not loaded["ema"]["w"] and torch.equal(loaded["again"][0], model.embed.weight.T)
    other = Tied()
    other.load_state_dict(loaded["model"])
    assert torch.equal(other.head.weight, model.head.weight)
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"head.weight": "embed.weight", "format": "pt"} and list(file.keys()) == ["embed.weight"]
    third = Tied()
    load_model(third, tmp_path / "c" / "model.safetensors")  # the library's own way with ties
    assert torch.equal(third.head.weight, model.head.weight)


def test_names_that_would_be_the_same_in_a_file_are_told_apart(tmp_path):
    t = [torch.tensor(float(i)) for i in range(6)]
    state = {"m": {"a": {"b": t[0]}, "a.b": t[1], "a.b'": t[2], "__metadata__": t[3], "\ud800": t[4], "format": t[5]}}
    save_state(tmp_path / "c", state)
    assert same(load_state(tmp_path / "c"), state)
    assert len(load_file(tmp_path / "c" / "m.safetensors")) == 6


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
    assert load_state(tmp_path / "c") == {} and sorted(os.listdir(tmp_path / "c")) == FILES[2:]
    many = {"m": {str(i): torch.tensor(i) for i in range(3000)} | {"large": torch.arange(3_000_001, dtype=torch.int32)}}  # over two blocks
    save_state(tmp_path / "c", many)
    assert same(load_state(tmp_path / "c"), many)
    assert same(many["m"]["large"], load_file(tmp_path / "c" / "m.safetensors")["large"])


def test_the_same_state_makes_the_same_bytes_and_standard_tools_check_them(tmp_path):
    for name in "ab": save_state(tmp_path / name, made(1))
    assert sorted(os.listdir(tmp_path / "a")) == FILES
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in FILES)
    document = json.loads((tmp_path / "a" / "state.json").read_text())
    assert (document["format"], document["version"]) == ("learner checkpoint", 1)
    for part, facts in document["parts"].items():
        data = (tmp_path / "a" / f"{part}.safetensors").read_bytes()
        assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = (tmp_path / "a" / "state.json").read_bytes()
    assert (tmp_path / "a" / "state.json.sha256").read_text() == f"{hashlib.sha256(text).hexdigest()}  state.json\n"


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
    ({"a": np.zeros(2, dtype="c16")}, "state['a'] is an array of complex128; convert it"),
    ({"a": np.ma.zeros(2)}, "state['a'] is a MaskedArray; a checkpoint"),
    ({"a": np.zeros(2, dtype=[("x", "f4")])}, "state['a'] is an array of [('x', '<f4')]; convert it"),
    ({"a": torch.zeros(2, dtype=torch.complex128)}, "state['a'] is a tensor of torch.complex128, unknown to safetensors"),
    ({"a": torch.eye(2).to_sparse()}, "state['a'] is a tensor that is sparse, quantized"),
    ({"a": torch.ones(2, device="meta")}, "state['a'] is a tensor that is sparse, quantized, nested or without values"),
    ({"a": t.as_subclass(Special)}, "state['a'] is a Special, a tensor of a special class"),
    ({"a": nn.UninitializedParameter()}, "state['a'] is a UninitializedParameter, a tensor of a special class"),
    ({"a": {(1, 2): 3}}, "state['a'] has the key (1, 2), a tuple; keys are str or int"),
    ({"a": {True: 3}}, "state['a'] has the key True, a bool; keys are str or int"),
    ({"a": {None: 3}}, "state['a'] has the key None, a NoneType; keys are str or int"),
    ({"a": {1.0: 3}}, "state['a'] has the key 1.0, a float; keys are str or int"),
    ({"a": cycle}, "state['a'][0][0]"),
    ({"../a": t}, "state['../a'] holds tensors, so its key becomes the name of a file"),
    ({"": t}, "state[''] holds tensors"),
    ({"a\0": t}, "state['a\\x00'] holds tensors"),
    ({"a.b": [t]}, "state['a.b'] holds tensors"),
    ({"a" * 300: t}, "state['aaa"),
    ({"Model": t, "model": t * 1}, "differ from the others by more than case"),
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


def test_folders_and_files_that_are_no_checkpoint_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "model.safetensors").write_text("not ours")
    (tmp_path / "file").write_text("x")
    for name, message in {"photos": "is a folder but no checkpoint: it holds model.safetensors", "file": "is a file, a checkpoint is a folder", ".": "is a folder but no checkpoint"}.items():
        with pytest.raises(FileExistsError, match=message): save_state(tmp_path / name, made(1))
    with pytest.raises(OSError): save_state(tmp_path / "file" / "c", made(1))
    assert (tmp_path / "photos" / "model.safetensors").read_text() == "not ours" and (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    save_state(tmp_path / "empty", made(1))
    save_state(tmp_path / "deep" / "er" / "c", made(2))
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty", "file", "photos"]


def test_files_of_others_move_along_and_a_link_stays_a_link(tmp_path, monkeypatch):
    save_state(tmp_path / "real", made(1))
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "notes.txt").write_text("mine")
    (tmp_path / "real" / "plots").mkdir()
    (tmp_path / "real" / "plots" / "loss.png").write_text("picture")
    (tmp_path / "real" / "ema.safetensors").write_text("a part that is no more")
    for step in (2, 3):
        save_state(tmp_path / "link", made(step))
        assert sorted(os.listdir(tmp_path / "real")) == sorted([*FILES, "notes.txt", "plots"])
        monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    assert (tmp_path / "link").is_symlink() and whole(load_state(tmp_path / "real")) == 3
    assert (tmp_path / "real" / "plots" / "loss.png").read_text() == "picture"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


# ---------------------------------------------------------------------------------------------------- crashes

OPS = ["open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"]


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
    def watching(self, exchange):
        with pytest.MonkeyPatch.context() as patch:
            for name in OPS: patch.setattr(os, name, self.wrap(name, getattr(os, name)))
            patch.setattr(store, "_exchange", self.wrap("exchange", store._exchange if exchange else lambda one, other: False))
            yield


def fail(error):
    def act(): raise error
    return act


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_error_at_any_operation_leaves_the_old_or_the_new(tmp_path, error, exchange):
    place, steps, at = tmp_path / "c", [], 0
    while True:
        at += 1
        save_state(place, made(1))
        points = Points(at, fail(error))
        with points.watching(exchange):
            try: save_state(place, made(2))
            except (OSError, KeyboardInterrupt): failed = True
            else: failed = False
        check_state(place)
        steps.append(whole(load_state(place)))
        if not failed and len(points.seen) < at: break
        if failed: assert place.exists()  # while the process lives, the path has a checkpoint again
        assert failed or steps[-1] == 2
        save_state(place, made(3))
        assert os.listdir(tmp_path) == ["c"] and whole(load_state(place)) == 3
    assert at > 35 and steps == sorted(steps) and set(steps) == {1, 2}


def test_errors_before_the_exchange_leave_nothing_behind_and_say_that_the_old_one_is_kept(tmp_path):
    save_state(tmp_path / "c", made(1))
    with Points(8, fail(OSError(errno.ENOSPC, "No space left on device"))).watching(True), pytest.raises(OSError) as caught:
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

def killed_at(at, exchange):
    def work():
        points = Points(at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with points.watching(exchange): store.save_state("c", made(2))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])

def at_every_point(exchange):
    steps, gone, at = [], 0, 0
    while True:
        at += 1
        store.save_state("c", made(1))
        code = killed_at(at, exchange)
        if code != -9: break
        gone += not os.path.exists("c")
        steps.append(whole(store.load_state("c")))
        assert [str(p) for p in store.list_states(".")] == ["c"]
        if at % 2: store.save_state("c", made(1)); assert os.listdir() == ["c"]  # else the leftovers meet the next save to be killed
    assert code == 0
    return dict(steps=steps, gone=gone)

def at_random(count, exchange):
    if not exchange: store._exchange = lambda one, other: False
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
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_kill_at_every_operation_leaves_the_old_or_the_new(tmp_path, exchange):
    found = serve(tmp_path, f"at_every_point({exchange})")
    steps = found["steps"]
    assert len(steps) > 35 and steps == sorted(steps) and set(steps) == {1, 2}
    if exchange and sys.platform == "linux": assert found["gone"] == 0  # the path is never without a checkpoint
    if not exchange: assert found["gone"] == 1  # the one point for which `.c.old` is there


@needs_fork
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_kill_at_random_leaves_the_last_complete_or_the_new(tmp_path, exchange):
    count = 600 if LONG else 30
    found = serve(tmp_path, f"at_random({count}, {exchange})")
    assert found["count"] == count and found["now"] == ["c"]
    assert found["left"] > count / 5  # the kills did hit saves


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_everything_is_on_the_disk_before_what_depends_on_it(tmp_path, monkeypatch, exchange):
    "For a loss of power: a rename comes after the content of what it renames, a removal after the rename of what replaces it."
    place, log, opened = tmp_path / "new folder" / "c", [], {}
    folder = str(place.parent)
    def record(name, function):
        def operation(*arguments, **options):
            result = function(*arguments, **options)
            if name == "open": opened[result] = os.path.realpath(arguments[0])
            log.append((name, opened[arguments[0]] if isinstance(arguments[0], int) else os.path.realpath(arguments[0])))
            return result
        return operation
    if not exchange: monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    monkeypatch.setattr(store, "_exchange", record("rename", store._exchange))
    for name in ("open", "write", "fsync", "rename", "unlink"): monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    save_state(place, made(1))  # a new one
    assert log.index(("fsync", str(tmp_path))) < log.index(("open", str(place.parent / ".c.lock")))  # its folder is new, too
    assert log[-4:-1] == [("rename", folder + "/.c.new"), ("open", folder), ("fsync", folder)]  # then the lock goes
    os.mkdir(place.parent / ".c.new")
    (place.parent / ".c.new" / "state.json").touch()
    log.clear()
    save_state(place, made(1))  # one that clears away what a crash left
    assert log.index(("fsync", folder)) < log.index(("unlink", folder + "/.c.new/state.json"))
    log.clear()
    save_state(place, made(2))  # one that replaces another
    monkeypatch.undo()
    names = [name for name, _ in log]
    renamed, removed = names.index("rename"), names.index("unlink")
    new = folder + "/.c.new"
    for file in FILES:
        path = os.path.join(new, file)
        last = max(i for i, entry in enumerate(log) if entry == ("write", path))
        synced = log.index(("fsync", path))
        assert last < synced < log.index(("fsync", new)) < renamed
        assert ("open", path) in log[log.index(("fsync", new)) : renamed]  # read back
    assert renamed < log.index(("fsync", folder), renamed) < removed
    assert names.index("rename", renamed + 1) < removed


def test_a_checkpoint_left_aside_is_found_and_put_back(tmp_path):
    save_state(tmp_path / "c", made(1))
    os.rename(tmp_path / "c", tmp_path / ".c.old")
    (tmp_path / ".c.new").mkdir()
    (tmp_path / ".c.new" / "model.safetensors").write_text("half")
    (tmp_path / ".c.lock").touch()
    assert list_states(tmp_path) == [tmp_path / "c"]
    check_state(tmp_path / "c")
    assert whole(load_state(tmp_path / "c")) == 1
    with Points(12, fail(OSError(errno.EIO, "x"))).watching(True), pytest.raises(OSError): save_state(tmp_path / "c", made(2))
    assert os.listdir(tmp_path) == ["c"] and whole(load_state(tmp_path / "c")) == 1
    save_state(tmp_path / "d", made(4))
    assert list_states(tmp_path) == [tmp_path / "c", tmp_path / "d"]
    os.rename(tmp_path / "c", tmp_path / ".c.new")  # a half made one is never taken for a checkpoint
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*/c$"): load_state(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="did you mean d"): load_state(tmp_path / "dd")


def test_a_damaged_checkpoint_can_be_replaced(tmp_path):
    for damage in (lambda f: f.unlink(), lambda f: f.write_bytes(b"")):
        for name in FILES:
            save_state(tmp_path / "c", made(1))
            damage(tmp_path / "c" / name)
            with pytest.raises(DamagedError): load_state(tmp_path / "c")
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
    with pytest.raises(OSError, match=r"what was read back is not what was written \(model.safetensors is damaged.*what was saved before is kept"):
        save_state(tmp_path / "c", made(2))
    monkeypatch.undo()
    assert whole(load_state(tmp_path / "c")) == 1 and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("path", ["", ".", Path("")], ids=repr)
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat()
    with pytest.raises(ValueError, match="the current folder, and a save would replace it; give the checkpoint a folder") as error:
        save_state(path, made(1))
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == [] and tmp_path.stat().st_ino == before.st_ino


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
    with pytest.raises(RuntimeError, match="another save to c is under way"): save_state(tmp_path / "c", made(2))
    save_state(tmp_path / "d", made(3))  # its neighbours are free
    go.set()
    thread.join()
    assert whole(load_state(tmp_path / "c")) == 1
    save_state(tmp_path / "c", made(2))
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


def test_a_lock_that_goes_in_between_is_one_of_another_save(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, exists = fcntl.flock, Path.exists
    def owner_removes_it(file, how): flock(file, how); os.unlink(tmp_path / ".c.lock")
    monkeypatch.setattr(fcntl, "flock", owner_removes_it)
    monkeypatch.setattr(Path, "exists", lambda path, **options: path.name == ".c.lock" or exists(path, **options))
    with pytest.raises(RuntimeError, match="another save to c is under way"): save_state(tmp_path / "c", made(1))
    monkeypatch.undo()
    save_state(tmp_path / "c", made(2))
    assert whole(load_state(tmp_path / "c")) == 2 and os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_a_reader_sees_whole_checkpoints_while_they_are_replaced(tmp_path, monkeypatch, exchange):
    if not exchange: monkeypatch.setattr(store, "_exchange", lambda one, other: False)
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
    code = ("import threading, torch; from learner.base.store import save_state, snapshot; big = {'model': torch.ones(8_000_000)};"
            f"threading.Thread(target=save_state, args=({str(tmp_path / 'c')!r}, snapshot(big))).start()")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr == ""
    assert load_state(tmp_path / "c")["model"].sum() == 8_000_000


def test_no_thread_or_file_is_left_open(tmp_path, monkeypatch):
    def count(): return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    save_state(tmp_path / "c", made(1, 2_000_000))
    before = count()
    for _ in range(3): save_state(tmp_path / "c", made(1, 2_000_000)); load_state(tmp_path / "c"); check_state(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_bytes((tmp_path / "c" / "model.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError): load_state(tmp_path / "c")
    for at in range(2, 40, 5):
        points = Points(at, fail(OSError(5, "x")))
        with points.watching(True), contextlib.suppress(OSError): save_state(tmp_path / "d", made(1, 2_000_000))
        if points.seen[at - 1] == "close": before = count()  # this one could not be closed
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
    assert all((tmp_path / "c" / f).read_bytes() == (tmp_path / "d" / f).read_bytes() for f in os.listdir(tmp_path / "c"))


# ---------------------------------------------------------------------------------------------------- damage

def damaged(folder, name=None):
    "Whether both readers see it, and name the file."
    for read in (check_state, load_state):
        with pytest.raises(DamagedError) as caught: read(folder)
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
        assert caught.value.part in ([name] if name else FILES)
        copy = pickle.loads(pickle.dumps(caught.value))  # it may come from another process
        assert (str(copy), copy.part) == (str(caught.value), caught.value.part)
    return str(caught.value)


def test_every_truncation_is_found_and_named(tmp_path):
    save_state(tmp_path / "c", made(1, 20_000))
    for name in FILES:
        file = tmp_path / "c" / name
        good = file.read_bytes()
        for length in sorted({0, 1, 7, 8, 9, 100, len(good) - 1, *range(0, len(good), 1024)}):
            if length < len(good): os.truncate(file, length); damaged(tmp_path / "c", None if name.startswith("state") else name); file.write_bytes(good)
        file.write_bytes(good + b"\0")
        damaged(tmp_path / "c", None if name.startswith("state") else name)
        file.write_bytes(good)
    assert whole(load_state(tmp_path / "c")) == 1


def test_every_flipped_bit_is_found_and_named(tmp_path):
    save_state(tmp_path / "c", made(1))
    draw = random.Random(5)
    for name in FILES:
        file = tmp_path / "c" / name
        good = file.read_bytes()
        bits = range(len(good) * 8)
        for bit in bits if LONG else sorted({*range(0, 640, 7), *draw.sample(bits, min(400, len(bits)))} & {*bits}):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bad)
            damaged(tmp_path / "c", None if name.startswith("state") else name)
        file.write_bytes(good)
    assert whole(load_state(tmp_path / "c")) == 1


def test_parts_of_two_checkpoints_do_not_fit(tmp_path):
    save_state(tmp_path / "a", made(1))
    save_state(tmp_path / "b", made(2))
    os.replace(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    assert "is damaged: its SHA-256 is not the one that was written" in damaged(tmp_path / "b", "model.safetensors")
    assert "model.safetensors is missing" in damaged(tmp_path / "a", "model.safetensors")


def test_a_full_disk_keeps_the_old_one(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.name == "posix" and hasattr(os, "geteuid") and os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode == 0
    if not mounted: pytest.skip("needs the right to mount a small disk")
    try:
        save_state(disk / "c", made(1, 30_000))
        for size in (150_000, 120_000, 100_000):
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
        with pytest.raises(PermissionError, match="nothing can be saved there, and nothing was changed"): save_state(place, made(2))
        assert whole(load_state(place)) == 1
        check_state(place)
    finally:
        if os.geteuid(): os.chmod(tmp_path / "fixed", 0o755)
        else: subprocess.run(["chattr", "-i", tmp_path / "fixed"], check=True)
    assert os.listdir(tmp_path / "fixed") == ["c"]


# ---------------------------------------------------------------------------------------------------- files made to deceive

def forge(folder, state="{}", header=None, part="x", data=b"", raw=None, **facts):
    "A checkpoint with hashes that fit, whatever it holds."
    folder.mkdir(exist_ok=True)
    if raw is None:
        text = header if isinstance(header, (bytes, type(None))) else json.dumps(header).encode()
        raw = len(text or b"").to_bytes(8, "little") + (text or b"") + data
    if header is not None or data or raw[8:]: (folder / "x.safetensors").write_bytes(raw)
    parts = {part: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}} if header is not None or raw[8:] else {}
    whole_text = facts.pop("text", None) or json.dumps({"format": "learner checkpoint", "version": 1, "parts": parts, "state": None, **facts}).replace('"state": null', f'"state": {state}')
    text = whole_text if isinstance(whole_text, bytes) else whole_text.encode()
    (folder / "state.json").write_bytes(text)
    (folder / "state.json.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  state.json\n")


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)): return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


class Evil:
    def __reduce__(self): return os.system, ("touch /evil",)


GOOD = {"header": {"w": tensor()}, "data": bytes(8)}
JSON, PART = "state.json", "x.safetensors"
FORGED = {
    # the JSON
    "pickle": (dict(text=pickle.dumps(Evil())), JSON, "is not text"),
    "text pickle": (dict(text=pickle.dumps(Evil(), 0)), JSON, "is not JSON"),
    "not an object": (dict(text="[1]"), JSON, "is not of a checkpoint"),
    "empty": (dict(text=" "), JSON, "is not JSON"),
    "other format": (dict(format="other"), JSON, "is not of a checkpoint"),
    "from the future": (dict(version=2), JSON, "has version 2 of the format; this library reads 1: update the library"),
    "far future": (dict(text='{"format": "learner checkpoint", "version": 99, "shards": []}'), JSON, "has version 99 of the format"),
    "version zero": (dict(version=0), JSON, "has version 0"),
    "version text": (dict(version="1"), JSON, "is not of a checkpoint"),
    "no parts": (dict(text='{"format": "learner checkpoint", "version": 1, "state": {}}'), JSON, "is not of a checkpoint"),
    "state is a list": (dict(state="[]"), JSON, "is not of a checkpoint"),
    "key twice": (dict(state='{"a": 1, "a": 2}'), JSON, "has a key twice"),
    "section twice": (dict(text='{"format": "learner checkpoint", "version": 1, "parts": {}, "parts": {}, "state": {}}'), JSON, "has a key twice"),
    "int key twice": (dict(state='{"a": {"$dict": [[1, 1], [1, 2]]}}'), JSON, "means nothing"),
    "nan": (dict(state='{"a": NaN}'), JSON, "has NaN, which is not JSON"),
    "minus infinity": (dict(state='{"a": -Infinity}'), JSON, "has -Infinity"),
    "deep list": (dict(state='{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), JSON, "nests more than 100 levels deep"),
    "deep open list": (dict(text="[" * 5_000_000), JSON, "nests more than 100 levels deep"),
    "deep object": (dict(text='{"a":' * 1_000_000), JSON, "nests more than 100 levels deep"),
    "quite deep": (dict(state='{"a": ' + "[" * 150 + "]" * 150 + "}"), JSON, "nests more than 100 levels deep"),
    "deep tags": (dict(state='{"a": ' + '{"$tuple": [' * 120 + "]}" * 120 + "}"), JSON, "nests more than 100 levels deep"),
    "huge int": (dict(state='{"a": ' + "9" * 1_000_000 + "}"), JSON, "has a number of 1000000 digits"),
    "int tag of nonsense": (dict(state='{"a": {"$int": "0x1_0"}}'), JSON, "means nothing"),
    "int tag of a number": (dict(state='{"a": {"$int": 5}}'), JSON, "means nothing"),
    "float tag of code": (dict(state='{"a": {"$float": "1e5"}}'), JSON, "means nothing"),
    "unknown tag": (dict(state='{"a": {"$class": "os.system"}}'), JSON, 'means nothing: {"$class"'),
    "reduce tag": (dict(state='{"a": {"$reduce": ["os", "system", ["touch /evil"]]}}'), JSON, "means nothing"),
    "tag with company": (dict(state='{"a": {"$tuple": [], "x": 1}}'), JSON, "means nothing"),
    "tag in second place": (dict(state='{"a": {"x": 1, "$tuple": []}}'), JSON, "means nothing"),
    "tuple of text": (dict(state='{"a": {"$tuple": "abc"}}'), JSON, "means nothing"),
    "dict of odd pairs": (dict(state='{"a": {"$dict": [[1]]}}'), JSON, "means nothing"),
    "dict with a list for a key": (dict(state='{"a": {"$dict": [[[1], 2]]}}'), JSON, "has the key [1]"),
    "dict with a dict for a key": (dict(state='{"a": {"$dict": [[{"b": 1}, 2]]}}'), JSON, "has the key {'b': 1}"),
    "dict with true for a key": (dict(state='{"a": {"$dict": [[true, 2]]}}'), JSON, "has the key True"),
    "tensor of no file": (dict(state='{"a": {"$tensor": ["no", "w"]}}'), JSON, "means nothing"),
    "tensor of no name": (dict(state='{"a": {"$tensor": ["x", "v"]}}', **GOOD), JSON, "means nothing"),
    "tensor by number": (dict(state='{"a": {"$tensor": [0, 0]}}', **GOOD), JSON, "means nothing"),
    "tensor by list": (dict(state='{"a": {"$tensor": [["x"], {"y": 1}]}}', **GOOD), JSON, "means nothing"),
    "bytes of floats": (dict(state='{"a": {"$bytes": ["x", "w"]}}', **GOOD), JSON, "for bytes, but it is torch.float32"),
    "array of bfloat16": (dict(state='{"a": {"$array": ["x", "w"]}}', header={"w": tensor("BF16", (4,))}, data=bytes(8)), JSON, "for array, but it is torch.bfloat16"),
    "invalid unicode": (dict(text=b'{"format": "\xff"}'), JSON, "is not text"),
    # names of files
    "parent": (dict(part="../x", **GOOD), JSON, "names a part that cannot be"),
    "absolute": (dict(part="/etc/passwd", **GOOD), JSON, "names a part that cannot be"),
    "NUL": (dict(part="x\0y", **GOOD), JSON, "names a part that cannot be"),
    "backslash": (dict(part="..\\x", **GOOD), JSON, "names a part that cannot be"),
    "newline": (dict(part="x\n", **GOOD), JSON, "names a part that cannot be"),
    "empty name": (dict(part="", **GOOD), JSON, "names a part that cannot be"),
    "hidden": (dict(part=".x", **GOOD), JSON, "names a part that cannot be"),
    "wide digits": (dict(part="x\u0661", **GOOD), JSON, "names a part that cannot be"),
    "long name": (dict(part="x" * 5000, **GOOD), JSON, "names a part that cannot be"),
    "other part": (dict(part="y", **GOOD), "y.safetensors", "is missing"),
    "facts are a list": (dict(parts={"x": [8, "0"]}), JSON, "names a part that cannot be"),
    "size is text": (dict(parts={"x": {"size": "8", "sha256": "0" * 64}}, **GOOD), JSON, "names a part that cannot be"),
    "no hash": (dict(parts={"x": {"size": 8}}), JSON, "names a part that cannot be"),
    "size of a petabyte": (dict(parts={"x": {"size": 10**15, "sha256": "0" * 64}}, **GOOD), PART, f"bytes; {10**15} were written"),
    "negative size": (dict(parts={"x": {"size": -1, "sha256": "0" * 64}}, **GOOD), PART, "-1 were written"),
    # safetensors
    "a pickle for tensors": (dict(raw=pickle.dumps(Evil(), 0) * 3), PART, "has no header of"),
    "header of an exabyte": (dict(raw=(2**60).to_bytes(8, "little") + b"{}"), PART, f"has no header of {2**60} bytes"),
    "header beyond the file": (dict(raw=(3).to_bytes(8, "little") + b"{}"), PART, "has no header of 3 bytes"),
    "header of nothing": (dict(raw=bytes(16)), PART, "bad header: it is not JSON"),
    "header is a list": (dict(header=[1]), PART, "bad header: it is not an object"),
    "header is deep": (dict(header=b"[" * 1_000_000), PART, "bad header: it nests more than"),
    "header with a name twice": (dict(header=b'{"w": 1, "w": 2}'), PART, "bad header: it has a key twice"),
    "header is a pickle": (dict(header=pickle.dumps(Evil())), PART, "bad header: it is not text"),
    "tensor is a number": (dict(header={"w": 3}), PART, "does not describe 'w' as a tensor: 3"),
    "no shape": (dict(header={"w": {"dtype": "F32", "data_offsets": [0, 8]}}, data=bytes(8)), PART, "does not describe 'w'"),
    "unknown type": (dict(header={"w": tensor("O8")}, data=bytes(8)), PART, "does not describe 'w'"),
    "type is a list": (dict(header={"w": tensor(["F32"])}, data=bytes(8)), PART, "does not describe 'w'"),
    "type is a class": (dict(header={"w": tensor("__import__('os')")}, data=bytes(8)), PART, "does not describe 'w'"),
    "wrong type": (dict(header={"w": tensor("F64")}, data=bytes(8)), PART, "gives 'w' 8 bytes for F64 [2]"),
    "wrong shape": (dict(header={"w": tensor(shape=(3,))}, data=bytes(8)), PART, "gives 'w' 8 bytes for F32 [3]"),
    "huge shape": (dict(header={"w": tensor(shape=(2**62, 2**62))}, data=bytes(8)), PART, "gives 'w' 8 bytes for F32"),
    "huge and honest": (dict(header={"w": tensor(shape=(2**50,), offsets=(0, 2**52))}, data=bytes(8)), PART, f"describes {2**52} bytes of 8"),
    "empty but huge": (dict(header={"w": tensor(shape=(0, 2**62, 2**62), offsets=(0, 0))}), PART, "gives 'w' 0 bytes for F32"),
    "overflowing shape": (dict(header={"w": tensor(shape=(2**32, 2**32), offsets=(0, 0))}), PART, "gives 'w' 0 bytes for F32"),
    "negative shape": (dict(header={"w": tensor(shape=(-2, -1))}, data=bytes(8)), PART, "an impossible shape or place"),
    "shape beyond 64 bits": (dict(header={"w": tensor(shape=(2**63, 0), offsets=(0, 0))}), PART, "an impossible shape or place"),
    "shape of floats": (dict(header={"w": tensor(shape=(2.0,))}, data=bytes(8)), PART, "an impossible shape or place"),
    "shape of truths": (dict(header={"w": tensor(shape=(True, 2))}, data=bytes(8)), PART, "an impossible shape or place"),
    "many dimensions": (dict(header={"w": tensor(shape=(1,) * 100_000 + (2,))}, data=bytes(8)), PART, "an impossible shape or place"),
    "half a byte": (dict(header={"w": tensor("F4", (5,), (0, 3))}, data=bytes(3)), PART, "gives 'w' half a byte"),
    "beyond the end": (dict(header={"w": tensor(offsets=(8, 16))}, data=bytes(8)), PART, "has a gap or an overlap before 'w'"),
    "backwards": (dict(header={"w": tensor(offsets=(8, 0))}, data=bytes(8)), PART, "gives 'w' -8 bytes"),
    "overlap": (dict(header={"w": tensor(), "v": tensor(offsets=(4, 12))}, data=bytes(12)), PART, "has a gap or an overlap"),
    "the same twice": (dict(header={"w": tensor(), "v": tensor()}, data=bytes(8)), PART, "has a gap or an overlap"),
    "gap": (dict(header={"w": tensor(), "v": tensor(offsets=(12, 20))}, data=bytes(20)), PART, "has a gap or an overlap before 'v'"),
    "more than described": (dict(header={"w": tensor()}, data=bytes(9)), PART, "describes 8 bytes of 9"),
    "less than described": (dict(header={"w": tensor()}, data=bytes(7)), PART, "describes 8 bytes of 7"),
    "three offsets": (dict(header={"w": tensor(offsets=(0, 4, 8))}, data=bytes(8)), PART, "does not describe 'w'"),
    "offset of a googol": (dict(header={"w": tensor(offsets=(0, 10**100))}, data=bytes(8)), PART, "has a number of 101 digits"),
}


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="an old torch knows fewer types")
@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused_with_what_is_wrong(tmp_path, name):
    arguments, part, message = FORGED[name]
    forge(tmp_path / "c", **arguments)
    assert message in damaged(tmp_path / "c", part)
    assert not os.path.exists("/evil")


def test_a_forger_without_malice_is_read(tmp_path):
    forge(tmp_path / "c", state='{"a": {"$tensor": ["x", "w"]}, "b": [1.5, {"$dict": [[1, {"$tuple": []}]]}]}', **GOOD)
    assert same(load_state(tmp_path / "c"), {"a": torch.zeros(2), "b": [1.5, {1: ()}]})


def test_links_pipes_devices_and_folders_are_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    for name in FILES:
        for make in (lambda f: f.symlink_to(tmp_path / "secret"), lambda f: f.symlink_to(f), os.mkfifo, os.mkdir, lambda f: f.symlink_to("/dev/zero")):
            save_state(tmp_path / "c", made(1))
            file = tmp_path / "c" / name
            file.unlink()
            make(file)
            assert "is a link" in (text := damaged(tmp_path / "c", name)) or "is not a file" in text
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()


def test_what_is_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"): load_state(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"): load_state(tmp_path / "none" / "none")
    torch.save({"a": Evil()}, tmp_path / "model.pt")
    for read in (load_state, check_state):
        with pytest.raises(DamagedError, match="model.pt is a file; a checkpoint is a folder"): read(tmp_path / "model.pt")
        with pytest.raises(DamagedError, match="state.json.sha256 is missing"): read(tmp_path)
    assert list_states(tmp_path) == []
    with pytest.raises(RuntimeError): load_state(tmp_path, "gpu!")


def test_reading_imports_and_executes_nothing(tmp_path):
    for i, (arguments, _, _) in enumerate(FORGED.values()): forge(tmp_path / str(i), **arguments)
    save_state(tmp_path / "good", {"a": torch.ones(2), "b": np.ones(2), "c": b"x", "d": {1: (2.5,)}})
    code = f"""
import sys, torch, numpy
from learner.base import store
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
    for i, (arguments, _, _) in enumerate(FORGED.values()): forge(tmp_path / str(i), **arguments)
    code = f"""
import resource, torch
from learner.base import store
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


# ---------------------------------------------------------------------------------------------------- fingerprints

one, two = torch.arange(6.0).reshape(2, 3), torch.ones(3, dtype=torch.int16)
EQUAL = {
    "order of tensors": ({"a": {"x": one, "y": two}}, {"a": {"y": two, "x": one}}),
    "order of whole numbers": ({"a": {1: 5, 2: 6, "b": 7}}, {"a": {"b": 7, 2: 6, 1: 5}}),
    "order in lists": ({"a": [({3: one, -3: [two]},)]}, {"a": [({-3: [two], 3: one},)]}),
    "ties": ({"a": {"x": one, "y": one}}, {"a": {"x": one, "y": one.clone()}}),
    "ties of parts": ({"a": one, "b": one}, {"a": one.clone(), "b": one}),
    "strides": ({"a": one.t().contiguous().t()}, {"a": one}),
    "parameters": ({"a": nn.Parameter(one)}, {"a": one}),
    "names that collide": ({"a": {"x.y": one, "x": {"y": two}}}, {"a": {"x": {"y": two}, "x.y": one}}),
}
OTHER = {
    "values": ({"a": one}, {"a": -one}), "dtypes": ({"a": two}, {"a": two.to(torch.uint16)}),
    "shapes": ({"a": one}, {"a": one.reshape(3, 2)}), "no numbers": ({"a": one[:0]}, {"a": one[:, :0]}),
    "places": ({"a": {"x": one, "y": two}}, {"a": {"x": two, "y": one}}), "kinds of keys": ({"a": {1: 2}}, {"a": {"1": 2}}),
    "kinds of values": ({"a": 1}, {"a": 1.0}), "lists and tuples": ({"a": [1]}, {"a": (1,)}), "names": ({"a": one}, {"b": one}),
    "order in a list": ({"a": [one, two]}, {"a": [two, one]}), "bytes and tensors": ({"a": b"ab"}, {"a": torch.tensor([97, 98], dtype=torch.uint8)}),
    "what looks like a tensor": ({"a": two}, {"a": {"$tensor": ["I16 [3]", hashlib.sha256(two.numpy().tobytes()).hexdigest()]}}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_states_have_one_hash(name):
    assert hash_state(EQUAL[name][0]) == hash_state(EQUAL[name][1])


@pytest.mark.parametrize("name", OTHER)
def test_other_states_have_another_hash(name):
    assert hash_state(OTHER[name][0]) != hash_state(OTHER[name][1])


def test_a_hash_is_that_of_what_comes_back(tmp_path):
    state = {"model": {"w": torch.randn(3, dtype=torch.complex64).conj(), "b": np.arange(3.0)}, "o": {0: (1, math.inf)}, "r": b"x"}
    save_state(tmp_path / "c", state)
    assert hash_state(load_state(tmp_path / "c")) == hash_state(state)


@pytest.mark.parametrize("state, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_hash_is_refused_as_a_save_is(state, message):
    with pytest.raises((TypeError, ValueError)) as error: hash_state(state)
    assert message in str(error.value)
