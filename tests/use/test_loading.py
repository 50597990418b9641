"""Settings may be changed on loading where the weights still fit; what cannot be is refused by name."""
import json
import sys

import pytest
import torch

from learner.runs.cli import main
from learner.runs.config import ConfigError
from learner.runs.rundir import RunError
from learner.runs.runs import evaluate_run, load_run

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.runs.registry import register_config, register_model
from learner.runs.signature import Model, Optimiser

class Net(nn.Module):
    def __init__(self, width: int = 4, threshold: float = 0.5):
        super().__init__()
        self.threshold, self.body = threshold, nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    def forward(self, x): return self.body(x) - self.threshold * x[:, :1]

@register_config(model="thresholds.Net", optimiser="SGD", learning_rate=0.1, epochs=2)
def small(model: Model, optimiser: Optimiser, seed: int = 0):
    "Random numbers."
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return Learner(model, optimiser, F.cross_entropy, DataLoaders.from_tensors(train=(x, y), validation=(x, y), batch_size=8))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("loading")
    (place / "thresholds.py").write_text(SOURCE)
    sys.path.insert(0, str(place))
    assert main(["train", "thresholds:small", str(place / "run"), "--quiet"]) == 0
    yield place / "run"
    sys.path.remove(str(place))
    sys.modules.pop("thresholds", None)


def test_a_setting_is_changed_on_loading(run):
    plain, other = (load_run(run, allow=["thresholds"], **settings) for settings in ({}, {"model.threshold": 0.4}))
    assert (plain.model.threshold, other.model.threshold) == (0.5, 0.4)
    assert torch.equal(plain.model.body[0].weight, other.model.body[0].weight)
    x = torch.ones(1, 3)
    assert torch.allclose(other.predict(x[0]).output, plain.predict(x[0]).output + 0.1, atol=1e-6)


def test_a_run_predicts(run):
    answers = load_run(run, allow=["thresholds"]).predict(torch.randn(5, 3))
    assert len(answers) == 5 and answers.probabilities.shape == (5, 2)


@pytest.mark.parametrize("name, value, words", [
    ("model.width", 8, "model.width=8"), ("optimiser.momentum", 0.9, "optimiser.momentum cannot be changed"),
    ("learning_rate", 0.5, "learning_rate cannot be changed"), ("epochs", 9, "epochs cannot be changed")])
def test_what_would_change_the_weights_or_be_overwritten_is_refused_by_name(run, name, value, words):
    before = (run / "meta.json").read_text()
    with pytest.raises(RunError) as error: load_run(run, allow=["thresholds"], **{name: value})
    assert words in str(error.value) and "\n" not in str(error.value)
    assert main(["evaluate", str(run), "--allow=thresholds", f"--{name}={value}"]) == 2
    assert (run / "meta.json").read_text() == before


def test_names_that_are_not_settings_get_the_nearest(run):
    with pytest.raises(ConfigError, match="did you mean model.threshold"): load_run(run, allow=["thresholds"], **{"model.treshold": 1})
    with pytest.raises(ConfigError, match="allow"): load_run(run, **{"model.threshold": 0.4})


def test_an_evaluation_writes_down_what_was_changed(run, capsys):
    usual = evaluate_run(run, allow=["thresholds"])
    assert main(["evaluate", str(run), "--allow=thresholds", "--model.threshold=0.4"]) == 0
    entries = json.loads((run / "meta.json").read_text())["evaluations"]
    assert "settings" not in entries[-2] and entries[-1]["settings"] == {"model.threshold": 0.4}
    assert entries[-2]["results"] == usual and entries[-1]["results"] != entries[-2]["results"]
