"""What is beside the model and no module holds: kept and put back, or named."""
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.loop.learner import Learner
from learner.loop.stages import CallbackError
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


def scheduled(make_hook):
    "A learner with a scheduler that a hook steps."
    torch.manual_seed(1)
    model = nn.Linear(4, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    learn = Learner(model, optimiser, nn.MSELoss(), {"train": PARTS}, device="cpu")
    learn.on("after_epoch", make_hook(torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)))
    return learn


def test_the_step_of_a_scheduler_is_not_a_hook():
    with pytest.raises(CallbackError, match=r"StepLR.step is not a hook.* BatchSchedule\(partial\(StepLR, ...\)\)"):
        scheduled(lambda scheduler: scheduler.step)


def test_a_scheduler_within_a_function_is_named_when_the_state_is_saved():
    learn = scheduled(lambda scheduler: lambda: scheduler.step())
    learn.train(3)
    assert learn.optimiser.param_groups[0]["lr"] == 0.0125
    with pytest.warns(UserWarning, match="<lambda> on after_epoch changes scheduler in training, which no state holds"):
        learn.state_dict()


def test_an_average_in_a_function_is_named_and_what_does_not_change_is_not():
    learn, teacher, losses = make(nn.Parameter)[0], nn.Linear(4, 1), []
    learn.on("after_batch", lambda data, loss: losses.append(loss.item() + teacher(data).mean().item()))
    learn.train(1)
    learn.state_dict()  # warnings are errors
    learn = make(nn.Parameter)[0]
    average = torch.optim.swa_utils.AveragedModel(learn.model)
    learn.on("after_epoch", lambda model: average.update_parameters(model))
    learn.train(1)
    with pytest.warns(UserWarning, match="changes average in training"): learn.state_dict()


def test_a_batch_sampler_that_keeps_its_order_is_named():
    class Rolling:
        def __init__(self): self.order = list(range(18))
        def __len__(self): return 5
        def __iter__(self):
            self.order = self.order[5:] + self.order[:5]
            yield from (self.order[i:i + 4] for i in range(0, 18, 4))
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=Rolling())
    learn = Learner(nn.Linear(4, 1), torch.optim.SGD, nn.MSELoss(), {"train": loader}, device="cpu")
    learn.train(2, 0.1)
    with pytest.warns(UserWarning, match=r"batch_sampler changes its attribute order in training"): learn.state_dict()
