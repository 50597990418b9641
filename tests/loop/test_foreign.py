"""Words of other libraries: each is answered with a name that exists."""
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learner
from learner.loop.data import DataLoaders
from learner.loop.foreign import FOREIGN_ARGUMENTS, FOREIGN_ATTRIBUTES, FOREIGN_NAMES
from learner.loop.learner import Learner

WORDS = {"in", "for", "or", "of", "the", "with", "that", "among", "callbacks", "a", "as", "values", "every", "step", "itself",
         "arguments", "metric", "learn", "folder", "x", "epochs", "value", "name", "function", "True"}


def fresh(): return Learner(nn.Linear(3, 2), torch.optim.SGD, F.cross_entropy, {"train": [(torch.rand(4, 3), torch.zeros(4).long())]})


def names_in(text):
    "What a text names, without its strings and arguments that are dots."
    return [name for name in re.findall(r"[A-Za-z_][\w.]*\w", re.sub(r'"[^"]*"', "", text)) if name not in WORDS]


def exists(name, learn):
    "Whether a name is one of ours, of torch, of the standard library, or one of our arguments."
    places = [learner.all, learn, learn.dataloaders, DataLoaders, nn.Module, torch, importlib.import_module("functools"), torch.optim.lr_scheduler,
              *(importlib.import_module(f"learner.{place}") for place in
                ("use.export", "use.serve", "watch.outputs", "runs.tensorboard", "base.provenance", "steer.augment", "use.answers"))]
    first, *rest = name.split(".")
    for place in places:
        value = getattr(place, first, None)
        if value is None: continue
        for each in rest: value = getattr(value, each, None)
        if value is not None: return True
    if first in ("learner", "learn", "torch") and rest:
        root = {"learn": learn, "torch": torch}.get(first)
        if root is not None: return exists(".".join(rest), root) or exists(".".join(rest), learn)
        for cut in range(len(rest), 0, -1):
            try: module = importlib.import_module(".".join([first, *rest[:cut]]))
            except ImportError: continue
            for each in rest[cut:]: module = getattr(module, each, None)
            return module is not None
    return False


def test_no_word_takes_the_place_of_a_name_of_ours():
    assert [word for word in FOREIGN_ATTRIBUTES if type(vars(learner.loop.learner.Shown)[word]).__name__ != "ForeignName"] == []
    learn = fresh()
    learn.train(1, 0.1)
    assert [word for word in FOREIGN_ATTRIBUTES if hasattr(learn, word)] == []
    assert not {*FOREIGN_NAMES} & {*learner.all.__all__}
    assert not {*FOREIGN_ATTRIBUTES} & {*dir(learn)}  # Tab offers none


@pytest.mark.parametrize(("word", "ours"), [*FOREIGN_ATTRIBUTES.items(), *FOREIGN_NAMES.items(), *FOREIGN_ARGUMENTS.items()])
def test_what_a_word_is_answered_with_exists(word, ours):
    learn = fresh()
    for name in names_in(ours):
        keyword = re.search(rf"\b{name}=", ours)
        known = exists(name, learn) or name in ("torchmetrics", "torcheval", "validation", "probabilities", "history.plot", "predict",
                                                   "optimiser.param_groups", "data", "labels")  # those are there in training
        assert keyword or known, (word, name)


@pytest.mark.parametrize("word", ["fit", "to_fp16", "metrics", "compile", "show_batch"])
def test_an_attribute_is_answered(word):
    with pytest.raises(AttributeError) as caught: getattr(fresh(), word)
    assert str(caught.value) == f"Learner has no {word}; use {FOREIGN_ATTRIBUTES[word]}"


def test_arguments_are_answered():
    learn, data = fresh(), {"train": [(torch.rand(4, 3), torch.zeros(4).long())]}
    for call, words in ((learn.train, {"lr": 1}), (learn.validate, {"dl": 1}),
                        (lambda **words: Learner(nn.Linear(3, 2), torch.optim.SGD, F.cross_entropy, data, **words), {"metrics": []})):
        with pytest.raises(TypeError) as caught: call(**words)
        word, = words
        assert str(caught.value).endswith(f"() has no argument {word}; use {FOREIGN_ARGUMENTS[word]}")
    with pytest.raises(TypeError, match=r"train\(\) has no argument epoch; did you mean epochs\?"): learn.train(epoch=3)
    with pytest.raises(TypeError, match=r"Learner\(\) has no argument metrics"): Learner(nn.Linear(3, 2), None, F.cross_entropy, data, metrics=[])


def test_an_attribute_of_ones_own_comes_first():
    class Mine(Learner):
        def freeze(self): return "frozen"
    learn = Mine(nn.Linear(3, 2), torch.optim.SGD, F.cross_entropy, {"train": [(torch.rand(4, 3), torch.zeros(4).long())]})
    learn.metrics = ["mine"]
    assert learn.freeze() == "frozen" and learn.metrics == ["mine"]


def test_an_attribute_with_such_a_name_is_still_watched_for_changes():
    class Mine(Learner):
        metrics = 0

        def train_batch(self):
            self.metrics += 1
            super().train_batch()
    from learner.loop.hidden import Note
    learn = Mine(nn.Linear(3, 2), torch.optim.SGD, F.cross_entropy, {"train": [(torch.rand(4, 3), torch.zeros(4).long())]})
    learn.metrics = 0
    note = Note(learn)
    learn.train(1, 0.1)
    assert ["learner", "Mine", "metrics"] in note.changed(learn)
