"""The page of errors: each class with an example, which is run to get its message."""

import linecache
import os
import tempfile
import warnings
from contextlib import chdir, redirect_stdout
from importlib import import_module
from io import StringIO

from docstrings import escaped, purpose
from pages import cancelling, errors

BEGIN = """\
import torch
import torch.nn.functional as F
from torch import nn
from learner import *

def fresh(*callbacks, loss=F.cross_entropy):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Learner(model, torch.optim.SGD, loss, digits(), callbacks)
"""

# For each class: code that raises it, and what to do.
EXAMPLES = {
    "CallbackError": (
        """\
class Typo(Callback):
    def after_bacth(self, loss): ...""",
        "[All hooks and fixtures](hooks.md) are on one page.",
    ),
    "ConformanceError": (
        """\
class Slower(Callback):
    watches = True
    def after_batch(self, optimiser): optimiser.param_groups[0]["lr"] *= 0.9

check_callback(Slower(), strict=True)""",
        "The report says which rule is broken.",
    ),
    "BatchError": (
        """\
class Strange:
    def __repr__(self): return "Strange()"

model = nn.Linear(1, 1)
Learner(model, torch.optim.SGD, F.mse_loss, {"train": [Strange()]}).train(1)""",
        "Give batches as tensors, pairs, mappings or objects with a method `to`.",
    ),
    "NoLoader": ('digits()["valid"]', "The loaders are called train, validation and test."),
    "LossError": (
        "fresh(loss=lambda predictions, labels: predictions - 1).train(1)",
        "A loss is one number: take its mean.",
    ),
    "NonFiniteError": (
        "fresh(NaNGuard(every=1)).train(1, learning_rate=1e38)",
        "Lower the learning rate, or look at the module that is named.",
    ),
    "HistoryError": (
        """\
learn = fresh()
learn.train(1)
learn.history.plot("accuracy")""",
        "`learn.history.columns` lists the columns.",
    ),
    "MetricError": (
        """\
def wrong(predictions, labels): return predictions

fresh(Metrics(wrong)).train(1)""",
        "A metric of your own returns one number, the mean over the batch.",
    ),
    "RecorderError": (
        'fresh(Recorder("momentumm"))',
        "Name a known quantity, or pass a function under a name.",
    ),
    "MonitorError": (
        'fresh(EarlyStopping("accuracy")).train(1)',
        "Name a column of the history, such as `validation_accuracy`.",
    ),
    "ScheduleError": (
        'fresh(Schedule(lambda share: 0.1, "momentun")).train(1)',
        "Name a hyperparameter that is in `optimiser.param_groups`.",
    ),
    "InitError": (
        "LSUV(nn.ReLU(), torch.ones(2, 1))",
        "Give a model with layers that have weights.",
    ),
    "ResumeError": (
        "fresh().train(1, resume=True)",
        "Name what to resume from, or train from the beginning.",
    ),
    "CheckpointError": (
        """\
fresh(Checkpoint("run")).train(1)
fresh(Checkpoint("run")).train(1)""",
        "A folder has the checkpoints of one training.",
    ),
    "DamagedError": (
        """\
from pathlib import Path

fresh().save("good.safetensors")
data = bytearray(Path("good.safetensors").read_bytes())
data[-1] ^= 1
Path("bad.safetensors").write_bytes(data)
fresh().load("bad.safetensors")""",
        "Use the previous checkpoint. Given a folder, `resume` does so by itself.",
    ),
    "FileError": (
        """\
from learner.base.files import read_text

read_text("..")""",
        "The base of errors about files; `path` is the file and `what` the fault.",
    ),
    "LockedError": (
        """\
from learner.base.files import FileLock

with FileLock("run.lock"):
    with FileLock("run.lock"): ...""",
        "Wait for the other process, or take another folder.",
    ),
    "FingerprintError": (
        """\
from pathlib import Path
from learner.keep.fingerprints import read_fingerprints

Path("prints.jsonl").write_text("epoch 1\\n")
read_fingerprints("prints.jsonl")""",
        "Read what `Fingerprints` has written.",
    ),
    "ConfigError": (
        """\
from learner.runs.config import build

build("digits", widht=32)""",
        "`learner show digits` prints all settings.",
    ),
    "RunError": ('load_run(".")', "Name the folder of a run."),
    "RunExistsError": (
        """\
fresh(Run("runs/first", plots=False)).train(1)
fresh(Run("runs/first", plots=False)).train(1)""",
        "Every run has a folder of its own.",
    ),
    "ScoreError": (
        """\
from learner.runs.scores import scores

fresh(Run("runs/first", plots=False)).train(1)
scores("runs", metric="f1")""",
        "Rank by a column that the runs have.",
    ),
    "CompareError": (
        """\
from learner.runs.compare import compare_runs

compare_runs(1, 2)""",
        "Give two run folders, histories or fingerprints.",
    ),
    "UsageError": (
        """\
from learner.runs.command import Command, split_words

def greet(name: str, /, *, twice: bool = False): ...

split_words(Command(greet), ["you", "--thrice"])""",
        "`learner COMMAND --help` says what can be typed.",
    ),
    "PrintableError": (
        """\
from pathlib import Path
from learner.loop.datasets import read_idx

Path("images").write_bytes(b"not images at all")
read_idx("images")""",
        "The base of errors about data from elsewhere: nothing in a message can control a terminal.",
    ),
    "GraphError": (
        """\
from learner.steer.torch_update import update_function

class Own(torch.optim.SGD): ...

update_function(Own([nn.Parameter(torch.zeros(1))]))""",
        "`WholeStep` runs a step that cannot become a graph without one, and says why; use an "
        "optimiser of `torch.optim`.",
    ),
    "ShardError": (
        """\
from learner.keep.distributed import Distributed

model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
Learner(model, torch.optim.SGD, F.cross_entropy, digits(), Distributed(shards=4)).train(1)""",
        "Change what is named, or leave `shards` out.",
    ),
    "RankError": (
        """\
from learner.keep.distributed import Distributed

class Own:
    "A metric that cannot be merged."
    def update(self, predictions, labels): ...
    def compute(self): return 0.0
    def reset(self): ...

fresh(Metrics(own=Own()), Distributed(shards=4)).train(1)""",
        "The message says which rank, and what all ranks have to do alike.",
    ),
    "InputError": (
        """\
learn = fresh()
learn.train(1)
learn.predict(torch.zeros(64, dtype=torch.uint8))""",
        "Give inputs as in training; `read=` may prepare them.",
    ),
    "ExportError": (
        """\
from learner.use.export import export

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x):
        x = self.layer(x.flatten(1))
        return x if x.sum() > 0 else -x

learn = Learner(Branching(), torch.optim.SGD, F.cross_entropy, digits())
learn.train(1)
export(learn, "exported")""",
        "The line of the model that cannot be followed is named.",
    ),
    "ProgramError": (
        """\
from learner.use.program import operator_of

operator_of("aten.from_file.default")""",
        "Export the model again; `learner verify` checks a folder.",
    ),
    "RequestError": (
        """\
from learner.use.inputs import Preparation
from learner.use.serve_inputs import BodyReader

reader = BodyReader(Preparation(torch.empty(3, device="meta")))
reader(b'{"input": [1, 2, 3]}')""",
        "A client of a served model gets this line, with the status of HTTP and the field.",
    ),
    "WeightsError": (
        """\
from safetensors.torch import save_file
from learner.use.hub import load_weights

save_file({"weight": torch.zeros(2, 3)}, "model.safetensors")
load_weights(nn.Linear(3, 2), ".")""",
        "Take the weights of this very model, or give `prefix=`.",
    ),
}


def message(name, code):
    "Run an example in an empty folder; returns what the error says, which must be of that class."
    kind = getattr(import_module(errors()[name]), name)
    with (
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
        redirect_stdout(StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        source, place = BEGIN + code, f"the example of {name}"
        linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
        try:
            exec(compile(source, place, "exec"), {"__name__": "__main__"})
        except kind as error:
            if type(error) is not kind:
                raise
            return str(error).replace(os.path.realpath(folder), "...")
    raise AssertionError(f"the example of {name} does not raise it")


def errors_page():
    "Every class of errors with its example."
    missing = errors().keys() ^ EXAMPLES.keys()
    if missing:
        raise AssertionError(
            f"docs/errors.py: no example, or no such error: {', '.join(sorted(missing))}"
        )
    parts = [
        "# Errors",
        "An error says what is wrong, where, and the fix, in one line. A mistake in what was asked "
        "for is a `ValueError`, a `TypeError` or a `LookupError`. An exception of a callback keeps "
        "its type, and a note says where it came from: "
        "`in Metrics.after_any_batch (epoch 0, batch 0)`.",
        "The examples share this beginning:",
        f"```python\n{BEGIN}```",
    ]
    for name, (code, advice) in EXAMPLES.items():
        kind = getattr(import_module(errors()[name]), name)
        bases = (
            " ← ".join(f"`{base.__name__}`" for base in kind.__mro__[1:-3])
            or f"`{kind.__mro__[1].__name__}`"
        )
        parts += [
            f"## {name}",
            f"`from {errors()[name]} import {name}`; it is a {bases}.",
            escaped(purpose(kind)),
            f"```python\n{code}\n```",
            f"```{{code-block}} text\n:class: message\n\n{message(name, code)}\n```",
            advice,
        ]
    parts += [
        "## Exceptions that cancel",
        "They end a stage early and are no errors; a hook raises them.",
    ]
    parts += [f"`{name}`\n: {escaped(purpose(kind))}" for name, kind in cancelling().items()]
    return "\n\n".join(parts)
