"""Contracts that hold for every callback of the package."""
import importlib
import inspect
import pkgutil
import tempfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import learner
from learner.base.hashing import hash_state
from learner.base.nested import snapshot
from learner.check.bench import example_learner
from learner.check.conformance import check_callback
from learner.check.nan_guard import NaNGuard
from learner.check.rules import RULES
from learner.check.watching import Bystander
from learner.keep.checkpoint import Checkpoint
from learner.keep.distributed import Distributed
from learner.keep.fingerprints import Fingerprints
from learner.loop.learner import Learner
from learner.loop.resume import Rewind
from learner.loop.stages import Callback, FunctionCallback
from learner.runs.background import Silence
from learner.runs.live import ProgressReport
from learner.runs.loggers import Announcement, ConsoleTable, CSVLogger, JSONLinesLogger, Logger
from learner.runs.runs import Run
from learner.runs.tensorboard import TensorBoard
from learner.steer.accumulate import Accumulate
from learner.steer.augment import TTA, BatchTransform, CutMix, Mixup
from learner.steer.curves import cosine
from learner.steer.freeze import FreezeUntil
from learner.steer.precision import ChannelsLast, Compile, MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule, PiecewiseSchedule, Schedule
from learner.steer.stopping import EarlyStopping
from learner.steer.update import EMA, ClipGradients
from learner.steer.whole_step import WholeStep
from learner.watch.activations import ActivationStats, GradientStats
from learner.watch.metrics import Metrics, MulticlassAccuracy
from learner.watch.profiler import Profiler
from learner.watch.progress import Progress
from learner.watch.recorder import Recorder

SCRATCH = TemporaryDirectory()  # until the process ends


def path(name=""): return Path(tempfile.mkdtemp(dir=SCRATCH.name)) / (name or "new")  # of nothing yet


TABLE = {  # how to make each; one that needs a learner of its own gets it in LEARNERS
    "Accumulate": lambda: Accumulate(2),
    "ActivationStats": ActivationStats,
    "Announcement": Announcement,
    "BatchSchedule": lambda: BatchSchedule(partial(StepLR, step_size=2)),
    "BatchTransform": lambda: BatchTransform(lambda data: data * 1.1),
    "Bystander": Bystander,
    "CSVLogger": lambda: CSVLogger(path("history.csv")),
    "ChannelsLast": ChannelsLast,
    "Checkpoint": lambda: Checkpoint(path()),
    "ClipGradients": lambda: ClipGradients(0.1),
    "Compile": lambda: Compile(disable=True),  # the rest of it has tests of its own: compiling takes long
    "ConsoleTable": ConsoleTable,
    "CutMix": CutMix,
    "Distributed": Distributed,  # alone; with others it has tests of its own
    "EMA": EMA,
    "EarlyStopping": EarlyStopping,
    "EpochSchedule": lambda: EpochSchedule(partial(StepLR, step_size=1)),
    "Fingerprints": lambda: Fingerprints(2),
    "FreezeUntil": lambda: FreezeUntil(1, nn.BatchNorm1d),
    "FunctionCallback": lambda: FunctionCallback("after_loss", lambda loss: None),
    "GradientStats": GradientStats,
    "JSONLinesLogger": lambda: JSONLinesLogger(path("log.jsonl")),
    "Logger": Logger,
    "Metrics": lambda: Metrics(accuracy=MulticlassAccuracy()),
    "MixedPrecision": MixedPrecision,
    "Mixup": Mixup,
    "NaNGuard": NaNGuard,
    "PiecewiseSchedule": lambda: PiecewiseSchedule([[1, 0.1], [2, 0.01]]),
    "Profiler": Profiler,
    "Progress": Progress,
    "ProgressReport": lambda: ProgressReport(path("progress.json")),
    "Recorder": lambda: Recorder("loss", "learning_rate", "gradient_norm", norm=lambda learn: learn.loss.detach() ** 2),
    "Rewind": lambda: Rewind(2),
    "Run": lambda: Run(path(), plots=False, log_every=1),
    "Schedule": lambda: Schedule(cosine(0.1, 0.01)),
    "Silence": Silence,
    "TTA": lambda: TTA(lambda data: data * 1.01),
    "TensorBoard": lambda: TensorBoard(path()),
    "WholeStep": lambda: WholeStep("eager"),  # runs the graph as it was caught
}

def of_images():
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    loaders = {"train": batches, "validation": batches[:2], "test": batches[:2]}
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), loaders, device="cpu")


LEARNERS = {"CutMix": of_images}  # for those that the kit's own learner, with its rows of numbers, is not for
REFUSES = {"WholeStep": {"syncs", "order", "watches"}}  # a graph has no place for what looks in between; its tests look from outside
MAY = {"WholeStep": {"leaks"}}  # its graphs are made in the few steps that the rule counts; test_whole_step counts many
BASES = {"ModuleStats", "HookedStats", "GradientNorm", "RunFrame", "RunHooks", "StepLogger", "PassLogger", "Destination", "Board", "Graph", "Histograms", "Images", "Gradients", "MeanGradients", "DDPGradients", "TreeGradients", "SharedGradients"}  # bases and parts of others, which do not work alone


def public_callbacks():
    """Every public, complete class of callbacks in the modules of the package, by name."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(learner.__path__, "learner.")
               if not found.name.rpartition(".")[2].startswith("_")]
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
    report = check_callback(TABLE[name], LEARNERS[name]() if name in LEARNERS else None)
    assert {*report.broken} - MAY.get(name, set()) == REFUSES.get(name, set()), report


def test_there_is_a_rule_for_each_contract():
    assert [rule.name for rule in RULES] == ["runs", "interrupts", "repeats", "resumes", "leaks", "syncs", "order", "watches"]


# The oracle for a resume: a training that was never stopped.

FILES = {"CSVLogger", "Checkpoint", "JSONLinesLogger", "Run", "TensorBoard"}  # write to a path; have tests of their own


class Stop(Exception): pass


def of(name, seed=0):
    torch.manual_seed(seed)
    return LEARNERS[name]() if name in LEARNERS else example_learner()


def ended(learn):
    states = [callback.state_dict() for callback in learn.callbacks if hasattr(callback, "state_dict")]
    return hash_state({"model": learn.model.state_dict(), "optimiser": learn.optimiser.state_dict(),
                       "history": learn.history.rows, "rng": torch.get_rng_state(), "callbacks": states})


@pytest.mark.parametrize("name", sorted(TABLE.keys() - FILES - {"Profiler"}))  # of whose state clocks are a part
def test_training_goes_on_with_it_from_any_batch_as_if_it_had_never_stopped(name, capsys):
    whole = of(name)
    whole.add(TABLE[name]())
    whole.train(3)
    expected = ended(whole)
    for stop in range(9):
        learn, fresh = of(name), of(name)
        for each in (learn, fresh): each.add(TABLE[name]())
        states = []

        def save(learn, epoch, batch_num, stop=stop, states=states):
            if 3 * epoch + batch_num == stop:
                states.append(snapshot(learn.state_dict()))
                raise Stop
        function = FunctionCallback("after_batch", save, 10**6)
        learn.add(function)
        with pytest.raises(Stop): learn.train(3)
        fresh.load_state_dict(states[0])
        torch.manual_seed(1)  # whatever has been drawn since
        fresh.train(resume=True)
        assert ended(fresh) == expected, f"from a state, after batch {stop}"
        learn.remove(function)
        learn.train(resume=True)
        assert ended(learn) == expected, f"in process, after batch {stop}"


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
