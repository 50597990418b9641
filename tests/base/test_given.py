"""The mistakes of the first hour: the error names what met, and the fix."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.given import form_in_words, given
from learner.loop.learner import Learner

IMAGES, CLASSES = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
NET = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))  # noqa: E731
MISTAKES = {
    "labels that are floats": (NET, IMAGES, CLASSES.float(), F.cross_entropy, "labels: float32 of shape (8,); labels that are classes have to be int64"),
    "labels that are int32": (NET, IMAGES, CLASSES.int(), F.cross_entropy, "labels.long()"),
    "labels in a column": (NET, IMAGES, CLASSES[:, None], F.cross_entropy, "labels: int64 of shape (8, 1); labels that are classes are a tensor of one dimension"),
    "one-hot labels that are integers": (NET, IMAGES, F.one_hot(CLASSES), F.cross_entropy, "labels.argmax(1) gives, or probabilities, as labels.float() gives"),
    "a class too many": (NET, IMAGES, CLASSES + 1, F.cross_entropy, "predictions: float32 of shape (8, 3); labels: int64 of shape (8,); labels have to lie between 0 and"),
    "a loss for numbers": (NET, IMAGES, CLASSES.float(), lambda p, y: (p - y).square().mean(), "this loss takes predictions and labels of the same shape"),
    "no Flatten": (lambda: nn.Linear(64, 3), IMAGES, CLASSES, F.cross_entropy, "a linear layer takes 64 numbers and was given 8; put nn.Flatten() before it"),
    "a layer for another size": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(63, 3)), IMAGES, CLASSES, F.cross_entropy, "takes 63 numbers and was given 64"),
    "data in float64": (NET, IMAGES.double(), CLASSES, F.cross_entropy, "data: float64 of shape (8, 1, 8, 8); data have to be of the dtype of the weights"),
    "pixels in bytes": (NET, IMAGES.byte(), CLASSES, F.cross_entropy, "convert them in the loader, with .float()"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_names_the_shapes_and_the_fix(mistake):
    model, data, labels, loss, expected = MISTAKES[mistake]
    learn = Learner(model(), torch.optim.SGD, loss, {"train": [(data, labels)]})
    with pytest.raises((RuntimeError, IndexError, ValueError)) as caught: learn.train(1, 0.1)
    note, place = caught.value.__notes__
    assert expected in note and place == "in train (epoch 0, batch 0)"
    assert "Flatten" not in note or mistake == "no Flatten"


def test_an_error_about_other_things_gets_the_shapes_alone():
    def loss(predictions, labels): raise ValueError("too early")
    with pytest.raises(ValueError) as caught: Learner(NET(), torch.optim.SGD, loss, {"train": [(IMAGES, CLASSES)]}).train(1, 0.1)
    assert caught.value.__notes__[0] == "predictions: float32 of shape (8, 3); labels: int64 of shape (8,)"


def test_an_error_that_takes_no_notes_stays_as_it_is():
    class Silent(ValueError):
        def add_note(self, note): raise TypeError("no notes")
    error = Silent("x")
    assert given(error, data=IMAGES) is error


def test_a_value_of_many_parts_is_named_in_part():
    assert form_in_words([torch.zeros(1)] * 9).count("float32") == 4 and form_in_words([torch.zeros(1)] * 9).endswith("...)")
