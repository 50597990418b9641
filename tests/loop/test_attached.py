"""Tensors that are trained and belong to no module: kept, put back, and named where no optimiser has them."""
import pytest
import torch
from torch import nn

from learner.loop.learner import Learner
from learner.steer.stopping import EarlyStopping

torch.manual_seed(0)
X, Y = torch.randn(18, 4), torch.randn(18, 1)
PARTS = list(zip(X.split(8), Y.split(8), strict=True))


def make(kind, *callbacks):
    "A learner whose loss reads a single weight, and that weight."
    torch.manual_seed(1)
    model, noise = nn.Linear(4, 1), kind(torch.zeros(()))
    def loss(predictions, labels): return ((predictions - labels) ** 2 * torch.exp(-noise) + noise).mean()
    optimiser = torch.optim.SGD([*model.parameters(), noise], lr=0.1, momentum=0.9)
    return Learner(model, optimiser, loss, {"train": PARTS, "validation": PARTS}, callbacks, device="cpu"), noise


KINDS = {"parameter": nn.Parameter, "tensor": lambda value: value.requires_grad_()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_single_weight_is_resumed_with_the_model(kind):
    whole, right = make(kind)
    whole.train(4)
    first, _ = make(kind)
    first.train(2)
    again, noise = make(kind)
    again.train(4, resume=first.state_dict())
    assert torch.equal(noise, right) and torch.equal(again.model.weight, whole.model.weight)
    assert again.history.rows == whole.history.rows


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_best_single_weight_is_put_back_with_the_model(kind):
    learn, noise = make(kind, EarlyStopping("score", mode="max", patience=2, restore_best=True))
    seen = []
    def score():
        learn.log(score=-len(seen))
        seen.append(noise.item())
    learn.on("after_validation", score)
    learn.train(5)
    assert len(seen) == 3 and noise.item() == seen[0] != seen[-1]


def test_a_single_weight_that_no_optimiser_has_is_named():
    noise = nn.Parameter(torch.zeros(()))
    learn = Learner(nn.Linear(4, 1), torch.optim.SGD, lambda p, y: ((p - y) ** 2 * noise.exp()).mean(), {"train": PARTS}, device="cpu")
    with pytest.warns(UserWarning, match="loss_func.noise is a parameter that the optimiser does not have"): learn.train(1, 0.1)


def test_a_weight_of_the_model_in_the_loss_is_the_models():
    model = nn.Linear(4, 1)
    learn = Learner(model, torch.optim.SGD, lambda p, y: ((p - y) ** 2).mean() + model.weight.square().sum(), {"train": PARTS}, device="cpu")
    learn.train(1, 0.1)
    assert learn.state_dict()["modules"] == {}
