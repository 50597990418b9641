"""Settings: reading, typing, layers, parts by name, records from elsewhere, and that they build what they say."""
import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from learner.loop.learner import Learner
from learner.runs import registry as module
from learner.runs.config import (
    Callbacks,
    ConfigError,
    Model,
    Optimiser,
    Text,
    build,
    from_record,
    nested,
    register_config,
    register_model,
    resolve,
    settings_of,
)
from learner.runs.signature import Form, make_setting, read_signature
from learner.runs.text import read_yaml, write_yaml

ROOT = Path(__file__).resolve().parents[2]


def message(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught: function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typed(where, value, hint): return Form([make_setting(where, hint)]).typed(where, where, value)


@pytest.fixture(autouse=True)
def same_registry():
    before = {kind: dict(entries) for kind, entries in module._registered.items()}
    path = list(sys.path)
    yield
    for kind, entries in before.items():
        module._registered[kind].clear()
        module._registered[kind].update(entries)
    sys.path[:] = path


# Reading YAML

@pytest.mark.parametrize("text, value", [
    ("no", "no"), ("yes", "yes"), ("on", "on"), ("n", "n"), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
    ("1e-3", 1e-3), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-.inf", -math.inf), ("+12", 12), ("-3", -3), ("010", 10), ("0o10", 8), ("0x1F", 31),
    ("1_000", "1_000"), ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("2026-01-31", "2026-01-31"), ("0b11", "0b11"), ("'1'", "1"), ("=", "="), ("1e", "1e"),
    ("[1, 1.0, a]", [1, 1.0, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("é: ü", {"é": "ü"}), ('{"a": [1, 2.5e3, null]}', {"a": [1, 2500.0, None]}),
    ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}), ("a: &x {b: 1, d: 2}\nc: {<<: *x, b: 3}", {"a": {"b": 1, "d": 2}, "c": {"b": 3, "d": 2}}),
    ("{}", {}), ("a:", {"a": None}),
])
def test_yaml_is_read_by_the_rules_of_version_1_2(text, value):
    read = read_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("value", [
    "no", "yes", "on", "1e-3", "1E5", "010", "0o10", "1:30", "2026-01-31", "null", "~", "", "true", "0x1f", ".5", "1.", "1_000", "a: b", "- a", "#", "@", "%", "é", "a\nb", "'", '"',
    "<<", "=", " a ", "\t", "!x", "&x", "*x", 1e-5, 1e300, -0.0, math.inf, 1, True, None, [], {}, [[1, 2.5], ["no"]], {"no": "no", "1": 1, "a b": {"c": []}}, 3.0, 10**30,
])
@pytest.mark.parametrize("flow", [True, False])
def test_what_is_written_reads_as_the_same(value, flow):
    read = read_yaml(write_yaml({"key": value}, flow))
    assert read == {"key": value} and type(read["key"]) is type(value)
    if flow: assert "\n" not in write_yaml(value, flow=True)


def test_nan_survives():
    assert math.isnan(read_yaml(write_yaml(math.nan)))


@pytest.mark.parametrize("text, words", [
    ("a: 1\na: 2", "line 2: a occurs twice"), ("a: {b: 1, b: 2}", "b occurs twice"), ('{"a": 1, "a": 2}', "a occurs twice"),
    ("a: [1", "line 1"), ("a: !!python/object/apply:os.system [id]", "is not a plain value"), ("!!python/name:os.system", "not a plain value"),
    ("a: !!python/object/new:os.system [id]", "not a plain"), ("a: !!binary aGk=", "is not a plain value"), ("a: !!set {b}", "is not a plain value"),
    ("a: !!omap [b: 1]", "not a plain"), ("a: !!timestamp 2026-01-31", "is not a plain value"), ("a: !own 1", "is not a plain value"),
    ("1: 2", "the key 1 is not text"), ("? [a]\n: 1", "a key must be text"), ("true: 1", "the key true is not text"), ("a: *x", "undefined alias"), ("a: &a [*a]", "contains itself"),
    ("a: &a {b: *a}", "contains itself"), ("[" * 100_000, "nested too deep"), ("a: 1\n--- \nb: 2", "document"), ("a: \x07", "special characters"), ("9" * 5000, "digits"),
    ("%YAML 9.9\n---\na: 1", "version"), ("a: b: c", "mapping values are not allowed"), ("\ta: 1", "cannot start any token"),
])
def test_yaml_that_is_refused(text, words):
    assert words in message(read_yaml, text)


def test_a_bomb_of_references_is_refused_before_it_grows():
    lines = ["a: &a [1,1,1,1,1,1,1,1,1,1]"] + [f"{b}: &{b} [{','.join(['*' + a] * 10)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)]
    assert message(read_yaml, "\n".join(lines)) == "more than 100,000 values"


# Typing

class Colour(Enum): red = 1; blue = 2


@pytest.mark.parametrize("text, hint, value", [
    ("32", int, 32), ("-1", int, -1), ("1e-3", float, 1e-3), ("3", float, 3.0), ("nan", float, math.nan), ("inf", float, math.inf), ("-inf", float | None, -math.inf),
    ("3", str, "3"), ("no", str, "no"), ("null", str, "null"), ("null", str | None, None), ("", str, ""), ("a: b", str, "a: b"), ("[1]", str, "[1]"), ("2026-01-31", str, "2026-01-31"),
    ("true", bool, True), ("False", bool, False), ("null", int | None, None), ("7", int | None, 7), ("3", int | float, 3), ("3.5", int | float, 3.5), ("3", int | str, 3), ("x", int | str, "x"),
    ("[[3, 0.1],[100, 0.01]]", list[tuple[int, float]], [(3, 0.1), (100, 0.01)]), ("[0.9, 0.999]", tuple[float, float], (0.9, 0.999)), ("[1, 2, 3]", tuple[int, ...], (1, 2, 3)),
    ("b", Literal["a", "b"], "b"), ("2", Literal[1, 2], 2), ("red", Colour, Colour.red), ("/a/b", Path, Path("/a/b")), ("{a: 1}", dict[str, int], {"a": 1}), ("[a, 'no']", list[str], ["a", "no"]),
    ("1e-3", Any, 1e-3), ("x: y: z", Any, "x: y: z"), ("no", Any, "no"), ("3", Any, 3),
])
def test_text_of_the_command_line_becomes_what_the_annotation_says(text, hint, value):
    got = typed("it", Text(text), hint)
    assert type(got) is type(value) and (got == value or (got != got and value != value))


@pytest.mark.parametrize("value, hint, same", [
    (3, int, 3), (3, float, 3.0), ("3", str, "3"), ("3", int | str, "3"), ("1e-3", Any, "1e-3"), (None, int | None, None), (True, bool, True), ([[3, 1]], list[tuple[int, float]], [(3, 1.0)]),
    ("nan", float, math.nan), ({"a": 1}, dict[str, int], {"a": 1}), ("blue", Colour, Colour.blue), ((1, 2), list[int], [1, 2]),
])
def test_values_of_files_and_of_python_are_typed_too(value, hint, same):
    got = typed("it", value, hint)
    assert type(got) is type(same) and (got == same or got != got)


@pytest.mark.parametrize("value, hint, words", [
    (Text("32.0"), int, "it is 32.0; it must be a whole number"), (3.0, int, "a whole number"), (True, int, "it is true; it must be a whole number"), (True, float, "a number"),
    (None, int, "it is null; it must be a whole number"), (None, str, "text"), (Text("no"), bool, "it is \"no\"; it must be true or false"), (Text("yes"), bool | None, "true or false or null"),
    (1, bool, "true or false"), (Text("1"), bool, "true or false"), (1, str, "it is 1; it must be text"), (Text("many"), int, "it is \"many\""), (Text("null"), int, "it is null"),
    (Text("[[3, 0.1, 5]]"), list[tuple[int, float]], "a list of [a whole number, a number]"), (Text("[[3.5, 0.1]]"), list[tuple[int, float]], "a list of"), (Text("3"), list[int], "a list of a whole number"),
    (Text("(0.9, 0.999)"), tuple[float, float], "[a number, a number]"), (Text("cosin"), Literal["constant", "cosine"], "one of constant, cosine; did you mean cosine?"),
    (Text("green"), Colour, "one of red, blue"), (Text("{a: x}"), dict[str, int], "names with a whole number"), ("x" * 1000, int, " ..."), (Text("[1, 2"), list[int], "a list of"),
    (Text("import os"), int, "whole number"), (object(), int, "whole number"),
])
def test_values_that_are_refused(value, hint, words):
    told = message(typed, "it", value, hint)
    assert words in told and len(told) < 200


@pytest.mark.parametrize("text, hint, value", [
    ("#7", str | None, "#7"), ("7", str | None, "7"), ("[1]", str | None, "[1]"), ("'7'", str | None, "'7'"), ("#7", Any, "#7"), ("x #7", Any, "x #7"), ("[007]", list[str], ["007"]),
    ("[1e-3, no, 'null']", list[str], ["1e-3", "no", "null"]), ("[a, null]", list[str | None], ["a", None]), ("{a: [007]}", dict[str, list[str]], {"a": ["007"]}), ("[007, x]", list[Any], [7, "x"]),
    ("{a: 007}", dict[str, Any], {"a": 7}), ("[1, no]", list, [1, "no"]), ("[[a, 1], [b, 2]]", list[tuple[str, int]], [("a", 1), ("b", 2)]), ("3.5", int | str, "3.5"), ("[a, b]", str | list[str], ["a", "b"]),
])
def test_words_are_taken_as_typed_where_text_is_asked_for(text, hint, value):
    got = typed("it", Text(text), hint)
    assert got == value and repr(got) == repr(value)


def test_a_file_is_not_read_twice():
    for value, hint in (("null", str | None), ("#7", str | None), ("1e-3", str | float), (["007", "null"], list[str])): assert typed("it", value, hint) == value
    for value, hint in ((["null"], list[int]), ("true", int), ([True], list[int])): assert "it must be" in message(typed, "it", value, hint)


# Signatures

class Below:
    def __init__(self, width: int = 3, *, dropout: float = 0.5):
        """Something.

        Args:
            width: how many channels. More of them learn more. (default: 3)
            dropout: share that is left out (default: 0.5)
        """


class Above(Below):
    "A class that hands its keywords on."
    def __init__(
        self,
        depth: int = 1,  # layers  # noqa: RUF100
        plain=(1, ")"),  # with a parenthesis
        **more,
    ):
        super().__init__(**more)


def test_a_signature_is_read_through_its_keywords_with_its_docstring_and_comments():
    form = read_signature(Above)
    assert {name: (setting.hint, setting.default, setting.help) for name, setting in form.settings.items()} == {
        "depth": (int, 1, "layers"), "plain": (Any, (1, ")"), "with a parenthesis"), "width": (int, 3, "how many channels"), "dropout": (float, 0.5, "share that is left out")}
    assert not form.takes_any
    def open_(width: int = 3, **rest: int): return rest
    assert read_signature(open_).takes_any and list(read_signature(open_).settings) == ["width"]
    assert read_signature(print).takes_any or read_signature(print).settings == {} or "sep" in read_signature(print).settings


def test_what_a_docstring_says_stands_in_what_is_shown():
    @register_config(name="explained")
    def explained(
        rate: float = 0.1,
        width: int = 3,  # of all layers
    ):
        """A config.

        Args:
            rate: of learning, per step.
        """
    shown = resolve("explained").to_yaml()
    assert re.search(r"rate: 0.1 +# of learning, per step$", shown, re.M) and re.search(r"width: 3 +# of all layers$", shown, re.M)


def test_names_that_a_class_hands_on_are_settings():
    @register_model
    class Wide(nn.Linear):
        def __init__(self, extra: int = 1, **kwargs): super().__init__(4, 4, **kwargs)
    assert resolve("digits", {"model": "Wide", "model.bias": Text("false")}).values["model"]["bias"] is False
    assert "model.bais: Wide has no setting bais; did you mean model.bias?" in message(resolve, "digits", {"model": {"name": "Wide", "bais": False}})


# Layers

def test_a_plus_adds_to_a_list(tmp_path):
    assert list(resolve("digits", {"callbacks": ["EMA"]}, {"callbacks+": [Text("NaNGuard")]}, {"callbacks+": "Mixup"}).values["callbacks"]) == ["EMA", "NaNGuard", "Mixup"]
    assert resolve("digits", {"lr_schedule": [[3, 0.1]]}, {"lr_schedule+": [Text("[9, 0.01]"), Text("[12, 1e-3]")]}).values["lr_schedule"] == [[3, 0.1], [9, 0.01], [12, 0.001]]
    assert resolve("digits", {"lr_schedule+": [[9, 0.01]]}).values["lr_schedule"] == [[9, 0.01]]  # there was none yet
    def tagged(names: list[str] = ["a"], tag: str = "b"): ...  # noqa: B006
    assert resolve(tagged, {"names+": [Text("007")]}, {"names+": Text("x")}).values["names"] == ["a", "007", "x"]
    assert resolve(tagged, {"names+": Text("x")}, {"names": Text("[y]")}).values["names"] == ["y"]
    (tmp_path / "own.yaml").write_text("config: digits\ncallbacks+: [EMA]\n")
    assert list(resolve(tmp_path / "own.yaml").values["callbacks"]) == ["EMA"]
    assert "tag is text, and nothing can be added to that" in message(resolve, tagged, {"tag+": Text("c")})
    assert "nmaes: " in (told := message(resolve, tagged, {"nmaes+": Text("c")})) and "did you mean names?" in told


def test_names_with_dots_and_nested_names_are_the_same():
    assert nested({"a.b": 1, "a": {"c": 2}}) == {"a": {"b": 1, "c": 2}} == nested({"a": {"c": 2, "b": 1}})
    assert nested({"model": "LeNet", "model.width": 1}) == {"model": {"name": "LeNet", "width": 1}} == nested({"model.width": 1, "model": "LeNet"})
    for name in ("", ".a", "a..b", "a."): assert "is not the name of a setting" in message(nested, {name: 1})
    assert "is not the name" in message(nested, {1: 2})


def test_later_layers_win_name_by_name(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("config: digits\nmodel: {width: 64, dropout: 0.5}\nepochs: 3\nlearning_rate: 1e-2\n")
    settings = resolve(file, {"model.width": Text("8"), "seed": 3})
    assert settings.values["model"] == {"name": "ConvNet", "width": 8, "classes": 10, "dropout": 0.5}
    assert settings.training == {"epochs": 3, "learning_rate": 0.01, "validation_epochs": 1} and settings.seed == 3
    assert resolve(file, {"model": "ConvNet"}).values["model"]["width"] == 64  # no other one
    assert resolve(file, {"model": "LeNet"}).values["model"] == {"name": "LeNet", "classes": 10}  # another one, without the other's settings
    assert resolve(file, {"model": {"name": "LeNet", "classes": 3}}).values["model"] == {"name": "LeNet", "classes": 3}
    assert "model.width: LeNet has no setting width" in message(resolve, file, {"model": "LeNet", "model.width": 3})


def test_a_file_of_json_and_one_of_yaml_say_the_same(tmp_path):
    given = {"config": "digits", "model": {"width": 7}, "callbacks": {"EMA": {"decay": 0.9}}}
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "a.yaml").write_text(write_yaml(given))
    one, two = (resolve(tmp_path / name) for name in ("a.json", "a.yaml"))
    assert one.values == two.values and one.values["callbacks"] == {"EMA": {"decay": 0.9, "warm_up": True, "validate": True}}


def test_callbacks_come_go_and_have_settings():
    plain = resolve("digits", {"callbacks": {"EMA": {}}, "callbacks.EarlyStopping.patience": 2}).values["callbacks"]
    assert plain["EMA"]["decay"] == 0.999 and plain["EarlyStopping"]["patience"] == 2
    assert resolve("digits", {"callbacks": {"EMA": {}}}, {"callbacks.EMA": None}).values["callbacks"] == {}
    assert resolve("digits", {"callbacks.EMA": Text("null")}).values["callbacks"] == {}
    assert list(resolve("digits", {"callbacks": Text("[EMA, NaNGuard]")}).values["callbacks"]) == ["EMA", "NaNGuard"]
    assert resolve("digits", {"callbacks": "EMA"}).values == resolve("digits", {"callbacks.EMA": True}).values
    two = resolve("digits", {"callbacks": {"slow": {"name": "EMA", "decay": 0.99}, "EMA": {}}})
    assert two.values["callbacks"]["slow"]["name"] == "EMA"
    learn = build("digits", **{"model.width": 2, "callbacks": {"EMA": {"decay": 0.5}}})
    assert [callback.decay for callback in learn.callbacks if type(callback).__name__ == "EMA"] == [0.5]
    for wrong, words in ((3, "callbacks is 3; it must be names of callbacks"), ({"EMA": 3}, "callbacks.EMA is 3; it must be its settings"), ({"EAM": {}}, "no callback is called EAM; did you mean EMA?")):
        assert words in message(resolve, "digits", {"callbacks": wrong})


def test_a_callback_by_its_place(tmp_path):
    given = {"callbacks": {"learner.steer.update.EMA": {"decay": 0.9}, "mine": {"name": "learner.steer.update.ClipGradients", "norm": 1.0}}}
    settings = resolve("digits", given)
    assert settings.values["callbacks"]["learner.steer.update.EMA"]["decay"] == 0.9 and settings.values["callbacks"]["mine"]["norm"] == 1.0
    (tmp_path / "own.yaml").write_text("config: digits\ncallbacks:\n  learner.steer.update.EMA: {decay: 0.9}\n  mine: {name: learner.steer.update.ClipGradients, norm: 1}\n")
    assert resolve(str(tmp_path / "own.yaml")).values == settings.values
    assert from_record(json.loads(json.dumps(settings.record())), allow=["learner.steer.update"]).values == settings.values
    assert "--allow=learner.steer.update" in message(from_record, settings.record())
    (tmp_path / "shown.yaml").write_text(str(settings))
    assert resolve(str(tmp_path / "shown.yaml")).values == settings.values
    assert resolve(str(tmp_path / "own.yaml"), {"callbacks.mine": Text("null")}).values["callbacks"].keys() == {"learner.steer.update.EMA"}
    assert "give it a name of your own: --callbacks.NAME.name=package.module.Class" in message(resolve, "digits", {"callbacks.learner.update.EMA.decay": Text("0.9")})


@dataclass
class Data:
    size: int = 8  # pixels
    kinds: list[str] = field(default_factory=lambda: ["a"])


class Odd: pass


def test_all_kinds_of_parameters(monkeypatch):
    seen = {}

    @register_model
    class Inner(nn.Linear):
        def __init__(self, size: int = 3): super().__init__(size, size)

    @register_model
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module = "Inner", scale: float = 1):
            super().__init__()
            self.inner, self.scale = inner, scale

    @register_config(model="Outer")
    def everything(model: Model, optimiser: Optimiser = torch.optim.SGD, data: Data = Data(), weights: dict[str, float] = {"a": 1.0},  # noqa: B006, B008
                   colour: Colour = Colour.red, odd: Odd = Odd(), loss=nn.functional.mse_loss, plain=3, where: Path = Path("x"), callbacks: Callbacks = ()):  # noqa: B008
        seen.update(locals())
        return {"model": model, "optimiser": optimiser, "loss_func": loss, "dataloaders": {"train": [(torch.zeros(2, 3), torch.zeros(2, 3))]}}

    settings = resolve(everything, {"model.inner.size": 3, "data.size": Text("4"), "weights.b": 2, "colour": "blue", "plain": Text("1e-3")})
    assert settings.values == {
        "model": {"name": "Outer", "inner": {"name": "Inner", "size": 3}, "scale": 1}, "data": {"size": 4, "kinds": ["a"]}, "weights": {"a": 1.0, "b": 2.0},
        "colour": "blue", "plain": 0.001, "where": "x", "callbacks": {}, "epochs": 1, "learning_rate": None, "validation_epochs": 1, "seed": 0,
    }
    learn = settings.build()
    assert isinstance(learn, Learner) and seen["data"] == Data(4, ["a"]) and seen["colour"] is Colour.blue and seen["where"] == Path("x")
    assert isinstance(seen["odd"], Odd) and seen["optimiser"] is torch.optim.SGD and isinstance(seen["model"].inner, Inner)
    assert settings_of(learn) is settings
    assert settings.config == f"{__name__}:{everything.__qualname__}"
    assert from_record(json.loads(json.dumps(settings.record()))).values == settings.values
    assert "odd cannot be set, since it is not a plain value" in message(resolve, everything, {"odd": 3})
    assert "data.sice: Data has no setting sice; did you mean data.size?" in message(resolve, everything, {"data.sice": 3})
    assert "model.inner.sice" in message(resolve, everything, {"model.inner.sice": 3})
    settings.build()
    assert seen["data"].kinds == ["a"]
    seen["data"].kinds.append("changed")
    settings.build()
    assert seen["data"].kinds == ["a"]  # each learner gets its own


def test_settings_that_are_printed_give_themselves_again(tmp_path):
    file = tmp_path / "a.yaml"
    given = {"model": {"name": "ConvNet", "width": 5}, "callbacks": {"EMA": {"decay": 0.9}, "slow": {"name": "EMA"}}, "lr_schedule": [[3, 0.1], [9, 1e-7]], "device": "cpu", "learning_rate": 1e-10}
    settings = resolve("digits", given)
    for comments in (True, False):
        file.write_text(settings.to_yaml(comments))
        assert resolve(file).values == settings.values
    assert "# examples" in settings.to_yaml() and "#" not in settings.to_yaml(False)


# Names and owners

def test_registering():
    def cell():
        @register_model
        def Own(): return nn.Linear(1, 1)
    cell()
    first = module._registered["model"]["Own"]
    cell()  # is run again
    assert module._registered["model"]["Own"] is not first
    with pytest.raises(ConfigError, match="the name LeNet belongs to learner.runs.configs already"): register_model(name="LeNet")(nn.Linear)
    with pytest.raises(ConfigError, match="is not a name"): register_model(name="a b")(nn.Linear)
    with pytest.raises(TypeError, match="put it above"): register_model(3)

    @register_config(epohcs=3)
    def wrong(): ...
    assert "wrong has no parameter epohcs; did you mean epochs?" in message(resolve, "wrong")

    @register_config
    def bad(): return 3
    assert "bad returned int; a config returns a Learner" in message(build, "bad")

    @register_config
    def broken(width: int = 3): raise ValueError("too wide")
    assert message(build, "broken") == "broken cannot be built: too wide"

    @register_config
    def needs(width: int, model: Model): ...
    assert message(build, "needs") == "width has no default; give it: width=..."
    assert message(build, "needs", width=1) == "model has no default; give the name of a model: model=..."


@pytest.mark.parametrize("settings, words", [
    ({"modle": "LeNet"}, "modle: digits has no setting modle; did you mean model?"),
    ({"width": 8}, "width: digits has no setting width; did you mean model.width?"),
    ({"zzz": 8}, "zzz: digits has no setting zzz; it has model, optimiser, "),
    ({"model.widht": 8}, "model.widht: ConvNet has no setting widht; did you mean model.width?"),
    ({"model": "LeNett"}, "model: no model is called LeNett; did you mean LeNet?"),
    ({"model": "zzz"}, "model: no model is called zzz; there are ConvNet, LeNet, or give package.module.Class"),
    ({"model": 3}, "model is 3; it must be a name, or names with values"), ({"model": {"name": 3}}, "model.name is 3; it must be text"),
    ({"model": None}, "model is null; it must be a name"), ({"model": [1]}, "model is [1]; it must be a name"),
    ({"model": "no_such_package.Net"}, "model: there is no module no_such_package"), ({"model": "torch.nn.Linaer"}, "model: torch.nn has no Linaer; did you mean Linear?"),
    ({"model": "torch.Tensor"}, "model: torch.Tensor is not a model; it must be derived from Module"), ({"model": "../x.y"}, "it must be a name, or package.module.Class"),
    ({"optimiser": "Adma"}, "optimiser: no optimiser is called Adma; did you mean Ada"), ({"optimiser.lr": 1}, "optimiser.lr: set learning_rate instead"),
    ({"optimiser.weight_decay": "x"}, "optimiser.weight_decay is \"x\"; it must be a number"),
    ({"epochs": 0}, "epochs is 0; it must be a whole number of at least 1"), ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"), ({"epochs.x": 2}, "epochs is {x: 2}"),
    ({"seed": -1}, "seed is -1"), ({"seed": 2**32}, "below 2**32"), ({"learning_rate": -1}, "learning_rate is -1.0"), ({"learning_rate": "inf"}, "learning_rate is inf"),
    ({"learning_rate": None}, "learning_rate is null; it must be a number"), ({"batch_size": "many"}, "batch_size is \"many\""), ({"lr_schedule": "cosin"}, "did you mean cosine?"),
    ({"lr_schedule": [[3, 0.1], [2, 0.1]]}, "digits cannot be built: PiecewiseSchedule: the epochs [3, 2] do not rise"),
    ({"batch_size": 0}, "digits cannot be built: batch_size is 0"), ({"model.width": 0}, "model: ConvNet cannot be built: width is 0"),
    ({"validation": 2.0}, "digits cannot be built: validation is 2.0"), ({"splits": ["test"]}, "digits has no setting splits"),
])
def test_mistakes_are_told_in_one_line(settings, words):
    assert words in message(build, "digits", **settings)


@pytest.mark.parametrize("text, words", [
    ("", "it is empty"), ("[1]", "it holds [1]"), ("3", "it holds 3"), ("model: LeNet", "it does not say whose settings"), ("config: digts", "no config is called \"digts\"; did you mean digits?"),
    ("config: 3", "does not say whose"), ("config: digits\nmodle: 3", "modle: digits has no setting modle; did you mean model?"), ("config: digits\nepochs: [1]", "epochs is [1]"),
    ("config: digits\nconfig: digits", "line 2: config occurs twice"), ("config: digits\n a: [", "line"), ("config: no_such:thing", "there is no module no_such"), (b"\xff\xfe\x00", "not text in UTF-8"),
])
def test_a_wrong_file_is_named(tmp_path, text, words):
    file = tmp_path / "own.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = message(resolve, file)
    assert str(file) in told and words in told


def test_a_missing_file_is_told_with_its_neighbour(tmp_path):
    (tmp_path / "spirals.yaml").write_text("config: digits")
    assert "there is no such file; did you mean spirals.yaml?" in message(resolve, tmp_path / "spiral.yaml")
    assert "there is no such file" in message(resolve, str(tmp_path / "none" / "x.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "it has neither config.json nor meta.json" in message(resolve, tmp_path / "folder.yaml")  # a folder is read as a run


# Records from elsewhere

@pytest.fixture
def own_package(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").write_text("import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n")
    (tmp_path / "own_package/nets.py").write_text(
        "import os, subprocess\nfrom torch import nn\nfrom learner.runs.config import *\nimport torch\n"
        "class Net(nn.Sequential):\n    def __init__(self, width: int = 5): super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))\n"
        "@register_config(model='ConvNet')\ndef hidden(model: Model): return {'model': model, 'optimiser': torch.optim.SGD, 'loss_func': None, 'dataloaders': {'train': [1]}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_package/imported"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]: del sys.modules[name]


def test_a_caller_may_name_code_and_a_record_may_not(own_package):
    settings = resolve("digits", {"model": "own_package.nets.Net", "model.width": 6})
    assert settings.build().model[1].out_features == 6
    record = settings.record()
    for name in [name for name in sys.modules if name.startswith("own_package")]: del sys.modules[name]
    own_package.unlink()
    told = message(from_record, record)
    assert told == ("model: own_package.nets.Net is code that is not registered here; if you trust it, allow its module: "
                    "--allow=own_package.nets, or allow=[\"own_package.nets\"]")
    assert not own_package.exists()  # nothing was imported
    for allow in (["own_package.nets"], "own_package.nets"): assert from_record(record, allow=allow).values == settings.values
    assert "allow" in message(from_record, record, allow=["own_pack"])
    assert "there is no module no_such_module" in message(from_record, record, allow=["no_such_module"])
    assert "is not the name of a module" in message(from_record, record, allow=["../x"])


@pytest.mark.parametrize("path", ["own_package.nets.subprocess.Popen", "own_package.nets.os", "own_package.nets.nn", "own_package.nets.Learner", "own_package.nets.register_model", "own_package.nets.__builtins__"])
def test_an_allowed_module_gives_only_what_is_defined_in_it(own_package, path):
    told = message(from_record, {"config": "digits", "settings": {"model": path}}, allow=["own_package.nets"])
    assert "is not a class or function defined in that module" in told or "is code that is not registered here" in told or "has no" in told or "must be a name" in told


def test_a_config_of_ones_own_in_a_record(own_package):
    settings = resolve("own_package.nets:hidden")
    assert settings.config == "own_package.nets:hidden"
    for name in [name for name in sys.modules if name.startswith("own_package")]: del sys.modules[name]
    del module._registered["config"]["hidden"]
    own_package.unlink()
    told = message(from_record, settings.record())
    assert told.startswith("config own_package.nets:hidden is code that is not registered here; if you trust it, allow its module") and not own_package.exists()
    assert from_record(settings.record(), allow=["own_package.nets"]).values == settings.values
    assert from_record(settings.record()).values == settings.values  # registered by now


@pytest.mark.parametrize("record, words", [
    ({}, "built by hand"), ({"config": None}, "built by hand"), ({"config": 3}, "built by hand"), ({"config": "digits", "settings": [1]}, "must be names with values"),
    ({"config": "os:system"}, "is code that is not registered"), ({"config": "digits", "settings": {"model": {"name": "os.system"}}}, "is code that is not registered"),
    ({"config": "digits", "settings": {"optimiser": "subprocess.Popen"}}, "is code that is not"), ({"config": "digits", "settings": {"callbacks": {"x": {"name": "os.system"}}}}, "is code that is not"),
    ({"config": "/etc/passwd"}, "no config is called"), ({"config": "../x.yaml"}, "no config is called"), ({"config": "digits", "settings": {"gone": 1}}, "no setting gone"),
    ({"config": "digits", "settings": {"model": {"name": "__import__"}}}, "no model is called"), ({"config": "a:b:c"}, "it must be a name, or package.module.Class"),
])
def test_records_that_are_refused(record, words):
    assert words in message(from_record, record)


@pytest.mark.parametrize("record", [
    {"config": "payload:build"}, {"format": 1, "config": "payload:build"}, {"format": "learner.run", "version": 1, "config": "payload:build"},
    {"format": "learner.run", "version": 1, "config": "digits", "settings": {"model": "payload.Net"}}, {"format": "learner.run", "version": 1, "config": "digits", "settings": {"model.name": "payload.Net"}},
    {"format": "learner.run", "version": 1, "config": "digits", "settings": {"optimiser": {"name": "payload.Net"}}}, {"format": "learner.run", "version": 1, "config": "digits", "settings": {"callbacks": {"payload.Net": {}}}},
    {"format": "learner.run", "version": 1, "config": "digits", "settings": {"callbacks+": ["payload.Net"]}}, {"format": "learner.run", "version": 1, "config": "settings.yaml"},
])
def test_a_folder_is_read_as_a_run_and_runs_nothing(tmp_path, monkeypatch, record):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "payload.py").write_text("import pathlib; pathlib.Path(__file__).with_name('has_run').touch()\ndef build(): pass\nclass Net: pass\n")
    (folder / "settings.yaml").write_text("config: payload:build")
    for path in (folder, str(folder)): message(resolve, path, {"epochs": 1})
    monkeypatch.chdir(folder)
    message(resolve, ".")
    assert not (folder / "has_run").exists() and str(folder) not in sys.path and "payload" not in sys.modules


SPEC = {"class_path": "payload.Net", "init_args": {"width": 1}}


@pytest.mark.parametrize("value", [SPEC, [SPEC], [SPEC, 0.9], {"x": SPEC}, [[SPEC]], {"x": [SPEC]}, "payload.Net", ["payload.Net", 0.9], {"class_path": "payload.Net"}])
def test_no_value_of_a_setting_names_code(tmp_path, monkeypatch, value):
    (tmp_path / "payload.py").write_text("import pathlib; pathlib.Path(__file__).with_name('has_run').touch()\nclass Net:\n    def __init__(self, width: int = 1): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    hints = (tuple[float | torch.Tensor, float], tuple[float | torch.Tensor, ...], list[torch.Tensor | str], dict[str, Any], dict[str, list[Any]], list[dict[str, Any]], list, dict, Any, float | dict[str, int | torch.Tensor],
             type | str, Callable | float, list[Callable | float], list[type | int], nn.Module | float, Mapping[str, Any], Sequence[nn.Module | float], tuple[Any, float], Odd | int, set[Odd | int], tuple[Path | Odd, float])
    def asked(it): ...
    for hint in hints:
        asked.__annotations__["it"] = hint
        for given in (value, Text(json.dumps(value))):
            with contextlib.suppress(ConfigError): resolve(asked, {"it": given})
    for name in ("betas", "eps", "weight_decay"):
        with contextlib.suppress(ConfigError): from_record({"config": "digits", "settings": {"optimiser": {"name": "AdamW", name: value}}})
    assert not (tmp_path / "has_run").exists() and "payload" not in sys.modules


def test_allowing_a_module_allows_no_other(own_package):
    record = {"config": "digits", "settings": {"model": "own_package.nets.Net"}}
    assert "--allow=own_package.nets" in message(from_record, record, allow=["own_package"])
    assert "--allow=torch.hub" in message(from_record, {"config": "digits", "settings": {"model": "torch.hub.load"}}, allow=["torch"])
    for name in ("torch.load", "torch.nn.Linear", "torch.os"): assert "is not a class or function defined in that module" in message(from_record, {"config": "digits", "settings": {"model": name}}, allow=["torch", "torch.nn"])


def test_a_config_json_that_is_trained_from_is_a_record_too(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"format": "learner.run", "version": 1, "config": "digits", "settings": {"model": {"name": "antigravity.Net"}}}))
    assert "is code that is not registered here" in message(resolve, file)
    file.write_text(json.dumps({"format": "learner.run", "version": 1, "config": "digits", "settings": {"epochs": 3}}))
    assert resolve(file, {"seed": 4}).values["epochs"] == 3


# What is built

def state(learn): return {name: value.clone() for name, value in learn.model.state_dict().items()}


def test_the_same_settings_give_the_same_learner_and_the_same_training():
    def run(make):
        torch.rand(7)  # what was drawn before does not matter
        learn = make()
        learn.train(1, learning_rate=0.01)
        return state(learn), learn.history.rows
    makers = [lambda: build("digits", **{"model.width": 4}), lambda: build("digits", model={"width": 4}), lambda: resolve("digits", {"model.width": Text("4")}).build(),
              lambda: from_record(json.loads(json.dumps(resolve("digits", {"model.width": 4}).record()))).build()]
    (weights, rows), *others = map(run, makers)
    for other, other_rows in others: assert all(torch.equal(weights[name], other[name]) for name in weights) and rows == other_rows
    different, _ = run(lambda: build("digits", **{"model.width": 4, "seed": 1}))
    assert not all(torch.equal(weights[name], different[name]) for name in weights)


def test_the_test_data_are_loaded_only_for_a_test(monkeypatch):
    from learner.loop import datasets
    learn = build("digits", **{"model.width": 2})
    assert list(learn.dataloaders) == ["train", "validation"]
    assert list(resolve("digits").build(["test"]).dataloaders) == ["test"]
    opened = []
    try: files = datasets._fashion_files(None)
    except FileNotFoundError: pytest.skip("Fashion-MNIST is not here")
    real = datasets.read_idx
    monkeypatch.setattr(datasets, "read_idx", lambda path: (opened.append(Path(path).name), real(path))[1])
    learn = build("fashion_mnist", model="LeNet")
    assert opened == [file.name for file in files[:2]] and list(learn.dataloaders) == ["train", "validation"]
    reference = datasets.fashion_mnist()
    assert torch.equal(learn.dataloaders["train"].order(3), reference["train"].order(3)) and torch.equal(learn.dataloaders["validation"].order(0), reference["validation"].order(0))
    opened.clear()
    test = resolve("fashion_mnist").build(["test"])
    assert list(test.dataloaders) == ["test"]
    assert torch.equal(next(iter(test.dataloaders["test"]))[0], next(iter(reference["test"]))[0])


def test_a_config_that_knows_no_splits_loses_its_test_loader():
    @register_config
    def three(): return Learner(nn.Linear(1, 1), torch.optim.SGD, nn.functional.mse_loss, {name: [(torch.zeros(1, 1),) * 2] for name in ("train", "validation", "test")})
    assert list(build("three").dataloaders) == ["train", "validation"]
    assert list(resolve("three").build(["test"]).dataloaders) == ["test"]

    @register_config
    def one(): return Learner(nn.Linear(1, 1), torch.optim.SGD, nn.functional.mse_loss, {"train": [(torch.zeros(1, 1),) * 2]})
    assert "one has no loader for test; it has train" in message(resolve("one").build, ["test"])
    assert "splits has 'tset'" in message(resolve("one").build, ["tset"])


@pytest.mark.parametrize("model", ["ConvNet", "LeNet"])
@pytest.mark.parametrize("size", [8, 28])
def test_the_models_that_ship_take_both_sizes_of_images(model, size):
    made = module._registered["model"][model].load()()
    assert made(torch.zeros(2, 1, size, size)).shape == (2, 10)
    with torch.no_grad(): assert made.eval()(torch.rand(2, 1, size, size)).isfinite().all()


def test_every_registered_name_is_there():
    for kind in ("model", "optimiser", "callback", "config"):
        for entry in module.registered(kind): assert callable(entry.load()) and entry.purpose, entry
    from torch.optim import SGD
    for entry in module.registered("optimiser"): assert issubclass(entry.load(), torch.optim.Optimizer), entry.name
    assert resolve("digits", {"optimiser": "SGD", "optimiser.momentum": 0.9}).build().optimiser.func is SGD


def test_settings_need_no_torch():
    code = ("import sys; from learner.runs import config, text; text.read_yaml('a: 1')\n"
            "try: config.resolve('digits', {'modle': 1})\nexcept config.ConfigError: print('torch' in sys.modules)\n"
            "try: config.resolve('digits', {'model.widht': 1})\nexcept config.ConfigError: print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_no_code_is_run_from_text():
    source = "".join((ROOT / f"learner/runs/{name}.py").read_text() for name in ("registry", "text", "signature", "configs", "config", "cli"))
    for word in ("eval(", "exec(", "unsafe_load", "FullLoader", "UnsafeLoader", "full_load"): assert word not in source, word
