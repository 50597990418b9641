"""The table of stages, and every message for a callback that is wrong by itself."""
import inspect
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
from routine import asynchronous, define, yielding

from learner.loop.stages import STAGES, TREE, Callback, CallbackError, Stage, StageTree

PASSES, BATCHES = ("training", "validation", "test"), ("batch", "validation_batch", "test_batch")


def test_the_groups_and_the_hooks_that_they_stand_for():
    assert TREE.groups == {"pass": PASSES, "any_batch": BATCHES}
    assert TREE.expand("before_pass") == ["before_training", "before_validation", "before_test"]
    assert TREE.expand("after_batch") == ["after_batch"] and TREE.expand("loss") == ["loss"]
    assert TREE.expand("after_bach") == [] and TREE.expand("any_batch") == []


DEFINITIONS = {
    "misspelt stage": ({"after_bacth": lambda self: 0}, "Loud.after_bacth names no stage; did you mean after_batch?"),
    "misspelt kind": ({"befor_batch": lambda self: 0}, "Loud.befor_batch names no stage; did you mean before_batch?"),
    "American": ({"canceled_epoch": lambda self: 0}, "Loud.canceled_epoch names no stage; did you mean cancelled_epoch?"),
    "dead fixture": ({"before_epoch": lambda self, loss: 0},
                     "Loud.before_epoch asks for loss, which lives from after_loss to the end of a batch"),
    "dead counter": ({"before_train": lambda self, epoch: 0}, "Loud.before_train asks for epoch, which lives in epoch"),
    "too early": ({"before_predict": lambda self, predictions: 0},
                  "Loud.before_predict asks for predictions, which lives from after_predict to the end of a batch"),
    "no yield": ({"around_batch": lambda self: 0},
                 "Loud.around_batch does not yield; an around_ hook yields once, where its stage runs"),
    "yield": ({"after_batch": yielding}, "Loud.after_batch yields, and would never run; only around_ hooks yield"),
    "yielding action": ({"predict": yielding}, "Loud.predict yields, and would never run; only around_ hooks yield"),
    "async": ({"after_batch": asynchronous}, "Loud.after_batch is async and would never run; drop async"),
    "context manager": ({"around_batch": contextmanager(yielding)},
                        "Loud.around_batch is a context manager; drop @contextmanager from the generator"),
    "no self": ({"after_batch": lambda: 0}, "Loud.after_batch has no self; a hook is a method"),
    "the learner's method": ({"compute_loss": lambda self: 0},
                             "Loud.compute_loss would never be called; to replace the learner's own, call it loss"),
    "the learner's routine": ({"train_batch": lambda self: 0},
                              "Loud.train_batch would never be called; override it in a subclass of the learner"),
    "the learner's other routine": ({"validation_batch": lambda self: 0},
                                    "Loud.validation_batch would never be called; override it in a subclass of the learner"),
    "misspelt action": ({"backwards": lambda self: 0}, "Loud.backwards would never be called; did you mean backward?"),
    "of another library": ({"before_fit": lambda self: 0}, "Loud.before_fit names no stage; did you mean before_train?"),
    "forward": ({"after_forward": lambda self: 0}, "Loud.after_forward names no stage; did you mean after_predict?"),
    "validate": ({"before_validate": lambda self: 0},
                 "Loud.before_validate names no stage; did you mean before_validation?"),
    "train batch": ({"after_train_batch": lambda self: 0},
                    "Loud.after_train_batch names no stage; did you mean after_batch?"),
    "misspelt group": ({"after_any_bach": lambda self: 0},
                       "Loud.after_any_bach names no stage; did you mean after_any_batch?"),
    "in some stages of a group": ({"before_pass": lambda self, epoch: 0},
                                  "Loud.before_pass asks for epoch, which lives in epoch, and not in test; "
                                  "give it a default: epoch=None"),
    "in no stage of a group": ({"before_any_batch": lambda self, loss: 0},
                               "Loud.before_any_batch asks for loss, which lives from after_loss to the end of a batch"),
    "a group that yields": ({"after_pass": yielding}, "Loud.after_pass yields, and would never run; only around_ hooks yield"),
    "parts that are a method": ({"parts": lambda self: 0}, "Loud.parts is a method; parts are callbacks, so make it a property"),
    "on": ({"on_train_epoch_end": lambda self: 0}, "Loud.on_train_epoch_end would never be called; hooks are named "
           "before_X and after_X for a stage X, such as after_epoch"),
}


@pytest.mark.parametrize("case", DEFINITIONS)
def test_a_class_that_cannot_work_is_refused_when_it_is_defined(case):
    methods, message = DEFINITIONS[case]
    with pytest.raises(CallbackError) as caught: define(**methods)
    assert str(caught.value) == message


def test_the_docstring_of_a_callback_names_all_there_is():
    text = inspect.getdoc(Callback)
    words = set(re.findall(r"\w+", text))
    assert {*TREE.hooks, *TREE.actions, *TREE.names, *TREE.fixtures()} <= words
    assert {stage.cancel.__name__ for stage in STAGES if stage.cancel} <= words
    for fixture in TREE.fixtures(): assert re.search(rf"^    {fixture} +{TREE.lifetime(fixture)}$", text, re.M), fixture
    for group, members in TREE.groups.items():
        assert re.search(rf"^    {group} +{', '.join(members[:-1])} and {members[-1]}$", text, re.M)
    assert "yields once" in text and max(map(len, text.splitlines())) <= 106


def test_the_outline_has_every_stage_in_each_of_its_places():
    found = [(depth, stage.name) for depth, stage in TREE.outline()]
    assert found[:4] == [(0, "train"), (1, "epoch"), (2, "training"), (3, "batch")]
    assert {name for _, name in found} == TREE.stages.keys() and len(found) == 21
    assert [depth for depth, name in found if name == "predict"] == [4, 4, 2]


def test_every_stage_says_what_it_is():
    assert all(stage.about for stage in STAGES)


OWN = {
    "a stage before its place": ([Stage("a", inside="b"), Stage("b")],
                                 "stage a names b, and no stage before it is called that"),
    "a stage twice": ([*STAGES, Stage("batch")], "two stages are called batch; rename one"),
    "a group called like a stage": ([Stage("a", group="b"), Stage("b")], "a stage and a group are called b; rename one"),
    "a group that is nested": ([Stage("a", group="g"), Stage("b", "a", group="g")],
                               "the group g has b and a, which is around it; the stages of a group stand beside each other"),
}


@pytest.mark.parametrize("case", OWN)
def test_stages_that_cannot_be(case):
    stages, message = OWN[case]
    with pytest.raises(CallbackError) as caught: StageTree(stages)
    assert str(caught.value) == message


WRONG = ("Checkpoint('x', every=-3)", "EarlyStopping(patience=-1)", "Metrics(3)", "ClipGradients(-1)", "Accumulate(0)", "Mixup(-1)",
         "EMA(decay=2)", "Run(3)", "type('Mine', (EarlyStopping,), {})(patience=-1)")


@pytest.mark.parametrize("full", [False, True])
def test_in_ipython_a_wrong_argument_of_a_callback_shows_none_of_our_frames(full, tmp_path):
    pytest.importorskip("IPython", reason="the frames are those that IPython shows: pip install ipython")
    code = ("import sys; from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance(colors='NoColor')\n"
            "shell.run_cell('from learner.all import *')\n"
            "for each in sys.argv[1:]: assert shell.run_cell(each).error_in_exec is not None; print('=' * 9)")
    env = {**os.environ, "IPYTHONDIR": str(tmp_path), "LEARNER_TRACEBACK": "full" if full else ""}
    done = subprocess.run([sys.executable, "-c", code, *WRONG], capture_output=True, text=True, env=env, check=True)
    shown = done.stdout.split("=" * 9)[:-1]
    assert len(shown) == len(WRONG)
    for call, text in zip(WRONG, shown, strict=True):
        assert call in text and re.search(r"^(Value|Type)Error: .+", text, re.MULTILINE), text
        assert full == bool(re.search(r"learner/\w+/\w+\.py", text)), text
