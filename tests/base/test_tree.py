"""Nested values of every make."""
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from learner.base.tree import is_record, map_tensors, to_device

Pair = namedtuple("Pair", "x y")
META = torch.device("meta")


class Encoding(UserDict):
    "Like the batches of Hugging Face: a mapping that is no dict and has a `.to`."
    def to(self, device): raise AssertionError("a mapping is moved tensor by tensor")


@dataclass
class Scene:
    points: torch.Tensor
    name: str = "house"
    inner: dict = field(default_factory=dict)
    checked: int = field(default=0, init=False)

    def __post_init__(self): self.checked += 1


@dataclass(frozen=True, slots=True)
class Frozen:
    points: torch.Tensor


def x(n=4): return torch.ones(n, 2)


@pytest.mark.parametrize("tree", [x(), (x(), x()), [x(), [x(), "text"]], {"a": x(), "b": (x(), 3)}, Pair(x(), None), OrderedDict(a=x()), Encoding({"a": x()}),
                                  Scene(x(), inner={"a": x()}), Frozen(x()), {"a": [Frozen(x())]}], ids=lambda tree: type(tree).__name__)
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
    assert map_tensors(lambda t: t + 1, Scene) is Scene and not is_record(Scene)


def test_a_dataclass_is_copied_and_not_made_again():
    scene = Scene(x(), "hut", {"a": x()})
    moved = to_device(scene, META)
    assert (moved.name, moved.checked) == ("hut", 1) and moved.inner["a"].device == META
    assert scene.points.device.type == scene.inner["a"].device.type == "cpu"


def test_a_packed_sequence_is_trusted_with_its_own_to():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert to_device((packed,), torch.device("cpu"))[0].data.tolist() == packed.data.tolist()


class Base:
    def __init__(self, device="cpu"): self.device, self.options = device, None
    def moved(self, device, **options):
        new = type(self)(device)
        new.options = options
        return new


class Plain(Base):
    def to(self, device): return self.moved(device)


class NonBlocking(Base):
    def to(self, device, non_blocking=False): return self.moved(device, non_blocking=non_blocking)


class AnyOption(Base):
    def to(self, device, **options): return self.moved(device, **options)


class InPlace(Base):
    def to(self, device): self.device = device


class Delegates:
    "Without a `to` of its class."
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)


@pytest.mark.parametrize("kind, options", [(Plain, {}), (NonBlocking, {"non_blocking": True}), (AnyOption, {"non_blocking": True}), (InPlace, None)])
def test_an_object_is_moved_with_what_its_method_takes(kind, options):
    moved = to_device({"a": kind()}, META)["a"]
    assert type(moved) is kind and moved.device == META and moved.options == options


def test_a_method_that_is_found_elsewhere(): assert to_device(Delegates(Plain()), META).device == META


def test_an_error_of_the_method_itself_is_not_swallowed():
    class Broken:
        def to(self, device, non_blocking=False): raise TypeError("its own")
    with pytest.raises(TypeError, match="its own"): to_device(Broken(), META)


class Named(dict): note = "none"
class Listed(list): note = "none"
class Tupled(tuple): note = "none"


@pytest.mark.parametrize("kind, given", [(Named, {"x": torch.ones(2)}), (Listed, [torch.ones(2)]), (Tupled, (torch.ones(2),)), (UserDict, {"x": torch.ones(2)})])
def test_what_a_container_knows_besides_goes_along(kind, given):
    batch = kind(given)
    batch.note = "from the collate function"
    moved = to_device(batch, META)
    (tensor,) = moved.values() if hasattr(moved, "values") else moved
    assert type(moved) is kind and moved.note == batch.note and tensor.device == META
    assert next(iter(batch.values() if hasattr(batch, "values") else batch)).device.type == "cpu"


def test_a_default_stays_and_what_cannot_be_written_to_is_made_again():
    batch = defaultdict(list, x=torch.ones(2))
    moved = to_device(batch, META)
    assert moved["labels"] == [] and moved["x"].device == META and "labels" not in batch
    moved = to_device(MappingProxyType({"x": torch.ones(2)}), META)
    assert type(moved) is MappingProxyType and moved["x"].device == META
