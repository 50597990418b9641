"""Columns, values and settings: how they are called and shown."""
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from learner.base.words import as_number, check_number, check_whole, flatten, format_value, mode_of, split_column
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


@pytest.mark.parametrize("value, number", [
    (3, 3), (True, True), (0.5, 0.5), (np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.float16(0.5), 0.5), (np.longdouble(0.5), 0.5), (np.int64(3), 3),
    (np.uint8(3), 3), (np.bool_(True), True), (np.array(0.5, dtype=np.float32), 0.5), (np.array(3), 3), (torch.tensor(0.5), 0.5), (torch.tensor(3), 3),
    (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5), (Fraction(1, 2), 0.5)])
def test_a_number_of_any_kind_becomes_a_plain_one(value, number):
    plain = as_number(value)
    assert plain == number and type(plain) is type(number)
    assert format_value(value) == format_value(number)


@pytest.mark.parametrize("value", [None, "3", 1j, np.complex64(1), np.ones(1), np.str_("3"), np.datetime64("2024-01-01"), torch.ones(1), torch.tensor(1j), [3]])
def test_what_is_not_one_real_number(value): assert as_number(value) is None


def test_numbers_of_numpy_are_arguments_too():
    assert check_number("rate", np.array(0.5)) == 0.5 and type(check_whole("epochs", np.int32(3))) is int
    for check, value in [(check_number, np.float32("nan")), (check_number, np.bool_(True)), (check_whole, np.float32(3)), (check_whole, np.int64(0))]:
        with pytest.raises(ValueError, match="^x is .*; it must be a"): check("x", value)


@pytest.mark.parametrize("settings", [
    {}, {"epochs": 3}, {"model": {"name": "Net", "head": {"dropout": 0.1}}, "epochs": 3}, {"callbacks": {}},
    {"callbacks": {"EMA": {}, "slow": {"name": "EMA"}}}, {"callbacks": {"package.Part": {"size": 3}, "EMA": {"decay": 0.9}}}, {"betas": [0.9, {"a": 1}]},
])
def test_names_with_dots_give_the_settings_again(settings):
    flat = flatten(settings)
    assert nested(flat) == settings and not any(isinstance(value, dict) and value for name, value in flat.items() if name != "callbacks")


def test_a_prefix_stands_before_all_names(): assert flatten({"a": 1, "b": {"c": 2}}, "x.") == {"x.a": 1, "x.b.c": 2}
