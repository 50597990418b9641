"""Contracts that hold for every callback of the package."""
import importlib
import inspect
import pkgutil

import pytest
import torch

import learner
from learner.activations import ActivationStats, GradientStats
from learner.checks import NaNGuard
from learner.conformance import RULES, Bystander, check_callback, example_learner
from learner.metrics import Metrics, MulticlassAccuracy
from learner.profiler import Profiler
from learner.progress import Progress
from learner.recorder import Recorder
from learner.stages import Callback, FunctionCallback

TABLE = {  # how to make each; one that needs a learner of its own gets it in LEARNERS
    "ActivationStats": ActivationStats,
    "Bystander": Bystander,
    "FunctionCallback": lambda: FunctionCallback("after_loss", lambda loss: None),
    "GradientStats": GradientStats,
    "Metrics": lambda: Metrics(accuracy=MulticlassAccuracy()),
    "NaNGuard": NaNGuard,
    "Profiler": Profiler,
    "Progress": Progress,
    "Recorder": lambda: Recorder("loss", "learning_rate", "gradient_norm", norm=lambda learn: learn.loss.detach() ** 2),
}

BASES = {"ModuleStats"}  # of others; they have no hook that works alone


def public_callbacks():
    """Every public, complete class of callbacks in the modules of the package, by name."""
    modules = [importlib.import_module(f"learner.{found.name}") for found in pkgutil.iter_modules(learner.__path__)
               if not found.name.startswith("_")]
    return {cls.__name__: cls for module in modules for cls in vars(module).values()
            if inspect.isclass(cls) and issubclass(cls, Callback) and cls is not Callback
            and cls.__module__.startswith("learner.") and not cls.__name__.startswith("_") and cls.__name__ not in BASES}


def missing(found, table): return [f"add {name} to the table" for name in sorted(found.keys() - table.keys())]


FOUND = public_callbacks()


def test_every_callback_of_the_package_is_in_the_table():
    assert not missing(FOUND, TABLE)
    assert TABLE.keys() == FOUND.keys()


def test_a_callback_that_is_not_in_the_table_is_noticed():
    table = {name: make for name, make in TABLE.items() if name != "Metrics"}
    assert missing(FOUND, table) == ["add Metrics to the table"]


@pytest.mark.parametrize("name", TABLE)
def test_it_keeps_all_rules(name):
    torch.set_num_threads(1)
    report = check_callback(TABLE[name])
    assert report.ok, report


def test_there_is_a_rule_for_each_contract():
    assert [rule.name for rule in RULES] == ["runs", "interrupts", "repeats", "resumes", "leaks", "syncs", "order", "watches"]


# The oracle for watchers: plain trainings with and without, which share no code with the kit.

def trained(callbacks):
    torch.manual_seed(0)
    learn = example_learner()
    learn.train(3, callbacks=callbacks)
    state = learn.optimiser.state_dict()["state"]
    return [*learn.model.state_dict().values(), *(slot["momentum_buffer"] for slot in state.values()), torch.get_rng_state()]


def identical(one, other): return all(map(torch.equal, one, other)) and len(one) == len(other)


@pytest.mark.parametrize("name", [name for name, cls in FOUND.items() if cls.watches and name in TABLE])
def test_a_watcher_leaves_weights_optimiser_and_random_numbers_bit_identical(name, capsys):
    assert identical(trained(None), trained(TABLE[name]()))


def test_all_watchers_together_leave_them_bit_identical(capsys):
    assert identical(trained(None), trained([TABLE[name]() for name, cls in FOUND.items() if cls.watches and name in TABLE]))


def test_a_callback_that_steers_is_told_from_one_that_watches():
    class Nudge(Callback):
        def after_step(self, model):
            with torch.no_grad(): next(model.parameters()).mul_(1.001)
    assert not identical(trained(None), trained(Nudge()))
