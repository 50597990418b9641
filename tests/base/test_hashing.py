"Equal values have one hash and others another, whatever they are made of; what cannot be hashed is named."
import enum
import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from torch import nn

from learner.base.data_hash import data_hash
from learner.base.files import FileError
from learner.base.hashing import Hasher, hash_file, hash_state, sparse_parts, tensor_bytes
from learner.base.store import load_state, save_state

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


class Level(enum.IntEnum): HIGH = 3


def test_numbers_of_numpy_and_subclasses_are_hashed_as_they_come_back(tmp_path):
    state = {"lr": np.float64(0.1), "half": np.float32(0.1), "n": np.int64(-3), "b": np.bool_(True), "level": Level.HIGH, "raw": bytearray(b"x"),
             "size": torch.zeros(2, 3).shape, "c": torch.ones(2, dtype=torch.complex128), "s": torch.eye(3).to_sparse()}
    save_state(tmp_path / "c", state)
    assert hash_state(load_state(tmp_path / "c")) == hash_state(state)
    assert hash_state({"lr": np.float64(0.1)}) == hash_state({"lr": 0.1}) != hash_state({"lr": np.array(0.1)})


def test_the_form_of_the_bytes_is_fixed():
    def sha(*parts): return hashlib.sha256(b"".join(parts)).hexdigest()
    assert hash_state([1, "é", None]) == sha(b"list 3\nint 1\nstr 2\n", "é".encode(), b"None\n")
    assert hash_state(torch.tensor([[1, 2]], dtype=torch.int16)) == sha(b"array int16 1,2\n", struct.pack("<2h", 1, 2))
    assert hash_state((0.5, b"a")) == sha(b"tuple 2\nfloat\n", struct.pack("<d", 0.5), b"bytes 1\na")
    key = hashlib.sha256(b"str 1\nk").digest()
    assert hash_state({"k": True}) == sha(b"dict 1\n", key, b"bool True\n")


VALUES = [None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, math.inf, math.nan, 1j, "", "1", "\ud800", b"", b"1", [], [[]], [1], [1, 1], (), (1,), {}, {1: 1},
          {"1": 1}, {1: "1"}, [None], ["ab"], ["a", "b"], torch.zeros(0), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1).half(), torch.zeros(1).bfloat16(),
          torch.zeros(1, dtype=torch.complex128), torch.zeros(2, 2).to_sparse(), torch.zeros(2, 3).to_sparse(), torch.eye(2).to_sparse(),
          np.array("a"), np.array(["a", "b"]), np.array(1, "m8[s]"), np.array(1, "M8[s]"), np.array(1, "M8[D]")]


def test_different_values_have_different_hashes():
    assert len({hash_state(value) for value in VALUES}) == len(VALUES)
    assert len({hash_state({"a": [value]}) for value in VALUES}) == len(VALUES)


def test_the_hash_of_data_is_the_same_for_what_both_take():
    for value in VALUES: assert data_hash(value) == hash_state(value)


@pytest.mark.filterwarnings("ignore:Sparse ")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_are_hashed_by_their_parts(layout):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    def made(values): return getattr(values, f"to_sparse_{layout}" if layout != "coo" else "to_sparse")(*[(1, 1)] * (layout[0] == "b"))
    assert hash_state(made(dense)) == hash_state(made(dense.clone())) != hash_state(made(dense * 2))
    assert hash_state(made(dense)) != hash_state(dense) and hash_state(made(dense)) != hash_state(made(dense.T.contiguous()))
    assert all(part.layout == torch.strided for part in sparse_parts(made(dense)))


def test_large_tensors_are_hashed_in_blocks_that_do_not_count():
    large = torch.arange(3_000_000.0)
    def sha(shape): return hashlib.sha256(f"array float32 {shape}\n".encode() + large.numpy().tobytes()).hexdigest()
    assert hash_state(large) == sha("3000000")
    assert hash_state(large.reshape(2, 1_500_000)) == sha("2,1500000")  # a row is larger than a block
    assert hash_state(large.reshape(1500, 2000).T.contiguous().T) == sha("1500,2000")


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3).T, torch.tensor(3.0), torch.empty(0, 2), torch.ones(1).expand(5), torch.randn(3, dtype=torch.complex64).conj(),
                                    torch.randn(3, dtype=torch.complex64).conj().imag, nn.Parameter(torch.ones(2)), torch.empty_strided((1,), (7,)).fill_(3.0)])
def test_bytes_are_in_row_order(tensor):
    assert bytes(tensor_bytes(tensor)) == tensor.detach().resolve_conj().resolve_neg().numpy().tobytes()


cycle: list = []
cycle.append(cycle)
REFUSED = [
    ({"a": [1, (2, {3: nn.ReLU()})]}, TypeError, "state['a'][1][1][3] of type ReLU cannot be hashed"),
    ({"a": {1, 2}}, TypeError, "state['a'] of type set cannot be hashed"),
    (nn.Linear, TypeError, "state of type type cannot be hashed"),
    ({"a": torch.ones(2, device="meta")}, TypeError, "state['a'] of type Tensor cannot be hashed: give a dense tensor with values"),
    ({"a": nn.UninitializedParameter()}, TypeError, "state['a'] of type UninitializedParameter cannot be hashed: give a dense tensor with values"),
    ({"a": np.array([object()])}, TypeError, "state['a'] of type ndarray cannot be hashed: its dtype is object"),
    ({"a": np.longdouble(1)}, TypeError, "its dtype is"),
    ({"a": cycle}, ValueError, "the state contains itself"),
]


@pytest.mark.parametrize(("value", "kind", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_hashed_is_named(value, kind, message):
    with pytest.raises(kind) as caught: hash_state(value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_hasher_can_know_of_more():
    class WithSets(Hasher):
        def other(self, value, where):
            if not isinstance(value, frozenset): return super().other(value, where)
            self.write("set")
            self.add(dict.fromkeys(value), where)
    def of(value):
        hasher = WithSets("it")
        hasher.add(value)
        return hasher.sha.hexdigest()
    assert of({frozenset({1, 2}): [frozenset("ab")]}) == of({frozenset({2, 1}): [frozenset("ba")]}) != of([])  # keys, too
    with pytest.raises(TypeError, match=r"it\[0\] of type object"): of([object()])


def test_a_file_has_the_hash_that_sha256sum_gives(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(FileError, match="is a link"): hash_file(tmp_path / "link")
