"""Numbers, plain values, columns and settings: how they are checked, called and shown."""
import enum
import json
import math
import subprocess
import sys
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.base.words import (
    as_number,
    check_number,
    check_whole,
    flatten,
    format_value,
    kind_of,
    mode_of,
    plain,
    split_column,
    with_article,
)
from learner.runs.config import nested


def test_names_need_no_torch():
    code = "import sys, learner.base.words; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("name, parts", [("validation_loss", ("validation", "loss")), ("train_top5_accuracy", ("train", "top5_accuracy")),
                                         ("epoch", ("", "epoch")), ("test_", ("", "test_")), ("trainloss", ("", "trainloss")), ("learning_rate", ("", "learning_rate")), ("", ("", ""))])
def test_split_column(name, parts): assert split_column(name) == parts


def test_mode_of():
    names = {"validation_loss": "min", "train_error": "min", "validation_accuracy": "max", "validation_top5_accuracy": "max", "validation_f1": "max", "fid": None, "score": None, "loss_accuracy": None}
    assert {name: mode_of(name) for name in names} == names


@pytest.mark.parametrize("value, text", [(None, ""), (0.0, "0.0000"), (0.001, "0.0010"), (0.000999, "0.000999"), (99999.0, "99999.0000"), (1e5, "1e+05"),
                                         (-0.5, "-0.5000"), (float("nan"), "nan"), (float("inf"), "inf"), (3, "3"), ("x", "x"), (True, "True")])
def test_format_value(value, text): assert format_value(value) == text


@pytest.mark.parametrize("settings", [
    {}, {"epochs": 3}, {"model": {"name": "Net", "head": {"dropout": 0.1}}, "epochs": 3}, {"callbacks": {}},
    {"callbacks": {"EMA": {}, "slow": {"name": "EMA"}}}, {"callbacks": {"package.Part": {"size": 3}, "EMA": {"decay": 0.9}}}, {"betas": [0.9, {"a": 1}]},
])
def test_names_with_dots_give_the_settings_again(settings):
    flat = flatten(settings)
    assert nested(flat) == settings and not any(isinstance(value, dict) and value for name, value in flat.items() if name != "callbacks")


def test_a_prefix_stands_before_all_names(): assert flatten({"a": 1, "b": {"c": 2}}, "x.") == {"x.a": 1, "x.b.c": 2}


NUMPY = (np.float64, np.float32, np.float16, np.longdouble, np.int64, np.uint8)


@pytest.mark.parametrize("kind", [*NUMPY, lambda v: np.array(v, np.float32), lambda v: np.array(v, np.int16), torch.tensor,
                                  lambda v: torch.tensor(v, dtype=torch.bfloat16), lambda v: torch.nn.Parameter(torch.tensor(float(v))), Fraction, float])
def test_numbers_of_every_library_are_numbers(kind):
    number = as_number(kind(1))
    assert type(number) in (int, float) and number == 1
    assert json.dumps(plain({"a": [kind(1)]})) in ('{"a": [1]}', '{"a": [1.0]}')


@pytest.mark.parametrize("kind", NUMPY)
def test_numbers_of_numpy_pass_as_arguments(kind):
    assert check_number("rate", kind(2)) == 2.0
    if kind in (np.int64, np.uint8): assert check_whole("count", kind(2)) == 2


@pytest.mark.parametrize("value", ["1", None, 1j, np.complex64(1), torch.tensor(1j), np.array([1.0]), torch.ones(1), [1], np.datetime64("2026-01-01"), object()])
def test_what_is_not_a_number(value): assert as_number(value) is None


def test_nan_stays_a_number_and_becomes_text_only_when_it_is_written():
    assert math.isnan(as_number(np.float32("nan"))) and plain(np.float32("nan")) == "nan" and plain(torch.tensor(-math.inf)) == "-inf"


class Colour(enum.IntEnum):
    red = 3


@pytest.mark.parametrize("value, wanted", [
    (None, None), (True, True), (np.bool_(False), False), (10**30, 10**30), (Colour.red, 3), ((1, 2.5, "x"), [1, 2.5, "x"]), ({"b", "a"}, ["a", "b"]),
    ({1: {"a": Path("x/y")}}, {"1": {"a": "x/y"}}), (datetime(2026, 1, 2, 3, 4, 5, 678), "2026-01-02T03:04:05"), (range(2), "range(0, 2)"), (1j, "1j")])
def test_plain(value, wanted):
    assert plain(value) == wanted and type(plain(value)) is type(wanted)
    json.dumps(plain(value), allow_nan=False)


def test_a_name_with_two_meanings_is_not_guessed(): assert mode_of("validation_error_free_accuracy") is None


@pytest.mark.parametrize("spoken", ["an int", "an optimiser", "an ndarray", "an LSTM", "an MSELoss", "an F1", "a ReLU", "a Metric", "a list", "a UNet", "a UUID",
                                    "a Union", "a uint8", "a OneCycleLR", "a Euclidean", "an UntypedStorage", "an _Inner", "a _Hidden", "a nested"])
def test_the_article_follows_the_sound(spoken): assert with_article(spoken.split()[1]) == spoken


def test_the_kind_of_a_value_has_its_article(): assert (kind_of(np.ones(2)), kind_of(1), kind_of("")) == ("an ndarray", "an int", "a str")
