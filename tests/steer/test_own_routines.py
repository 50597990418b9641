"""A batch routine of the user's own, beside callbacks that hang on the backward pass or the step: they work, or say at once that they cannot."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from learner.keep.range_test import lr_find
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CallbackError
from learner.steer.accumulate import Accumulate
from learner.steer.curves import linear
from learner.steer.multi import Optimisers
from learner.steer.precision import MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule, Schedule
from learner.steer.update import EMA, ClipGradients
from learner.watch.recorder import Recorder

torch.manual_seed(0)
X, Y = torch.randn(40, 4), torch.randn(40, 1)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))

ON_THE_STEP = {
    "Accumulate": partial(Accumulate, 4), "ClipGradients": partial(ClipGradients, 0.01), "EMA": partial(EMA, 0.5),
    "BatchSchedule": lambda: BatchSchedule(partial(OneCycleLR, max_lr=0.1)), "Schedule": lambda: Schedule(linear(0.1, 0)),
    "Recorder": partial(Recorder, "learning_rate", "gradient_norm"), "MixedPrecision": lambda: MixedPrecision("float16"),
}


class OwnStep(Learner):
    "Computes its loss and takes its step by itself."
    def train_batch(self):
        self.act("prepare")
        error = F.mse_loss(self.model(self.data), self.labels)
        error.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return {"error": error}


class HalfOwn(Learner):
    "Opens all stages but the last."
    def train_batch(self):
        self.act("prepare", "predict", "loss", "backward")
        self.optimiser.step()
        self.optimiser.zero_grad()


class OwnBackward(Learner):
    "Opens all stages but that of the backward pass."
    def train_batch(self):
        self.act("prepare", "predict", "loss")
        self.loss.backward()
        self.act("step")


def make(kind, *callbacks, optimiser=None):
    torch.manual_seed(1)
    model = nn.Linear(4, 1)
    optimiser = optimiser(model) if optimiser else torch.optim.SGD(model.parameters(), lr=0.1)
    return kind(model, optimiser, F.mse_loss, {"train": BATCHES}, callbacks, device="cpu")


def refused(learn, match):
    batches = []
    learn.on("before_batch", lambda: batches.append("begun"))
    learn.on("after_batch", lambda: batches.append("done"))
    with pytest.raises(ValueError, match=match): learn.train(2)
    assert batches == ["begun"]


@pytest.mark.parametrize("kind", [OwnStep, HalfOwn])
@pytest.mark.parametrize("name", ON_THE_STEP)
def test_a_callback_on_the_step_refuses_in_the_first_batch_whose_step_it_does_not_see(name, kind):
    match = r"is never called|MixedPrecision"
    refused(make(kind, ON_THE_STEP[name]()), match)


@pytest.mark.parametrize("name", ["Accumulate", "MixedPrecision"])
def test_a_callback_on_the_backward_pass_refuses_too(name):
    refused(make(OwnBackward, ON_THE_STEP[name]()), "backward")


def test_the_error_says_which_callback_and_what_to_write():
    with pytest.raises(CallbackError) as caught: make(OwnStep, EMA(0.5)).train()
    assert str(caught.value) == ("EMA.after_step is never called: the routine of OwnStep changes the weights itself; "
                                 'call self.act("step") in place of optimiser.step(), or remove EMA(0.5)')


@pytest.mark.parametrize("hook", ["before_step", "after_step", "before_backward", "after_backward"])
def test_functions_are_not_forgotten_either(hook):
    learn = make(OwnStep)
    learn.on(hook, lambda: None)
    refused(learn, f"on {hook} is never called")


def test_a_replaced_step_that_is_never_asked_for_is_refused():
    class Mine(Callback):
        def step(self, learn): learn.step()
    refused(make(OwnStep, Mine()), "Mine.step is never called")


def test_each_of_several_optimisers_is_looked_at():
    def both(model): return Optimisers(weight=torch.optim.SGD([model.weight], lr=0.1), bias=torch.optim.Adam([model.bias], lr=0.1))

    class Named(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward")
            self.optimiser.bias.step()
            self.optimiser.zero_grad()
    refused(make(Named, EMA(0.5), optimiser=both), "EMA.after_step is never called")


def test_a_step_beside_the_stage_is_no_mistake():
    "As of a discriminator that is trained more often than the generator."
    class Often(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss")
            self.loss.backward(retain_graph=True)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.act("predict", "loss", "backward", "step")
    learn = make(Often, ema := EMA(0.5))
    learn.train(2)
    assert ema.updates == 10


def test_an_optimiser_without_hooks_is_found_out_at_the_end_of_the_pass():
    class Plain:
        "Looks like an optimiser, and is none of PyTorch's."
        def __init__(self, parameters): self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        def zero_grad(self):
            for p in self.param_groups[0]["params"]: p.grad = None
        def step(self):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]: p -= 0.1 * p.grad
    learn = make(OwnStep, EMA(0.5), optimiser=lambda model: Plain(model.parameters()))
    with pytest.raises(CallbackError, match="is never called"): learn.train(2)
    assert not learn.history.rows
    make(Learner, EMA(0.5), optimiser=lambda model: Plain(model.parameters())).train(2)


def test_those_that_do_without_a_step_are_left_alone_and_the_optimiser_is_as_before():
    class Watches(Callback):
        needs_stages = ()
        def after_step(self): raise AssertionError
    learn = make(OwnStep, EpochSchedule(partial(LambdaLR, lr_lambda=lambda epoch: 0.5 ** epoch)), Recorder("learning_rate", per="batch"), Watches())
    learn.train(2)
    assert not learn.optimiser._optimizer_step_pre_hooks
    for kind in (Learner, OwnBackward):
        learn = make(kind, ClipGradients(1.0))
        learn.train(2)
        assert not learn.optimiser._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", ["ClipGradients", "EMA", "Schedule"])
def test_a_step_within_its_stage_is_seen(name):
    class Declared(Learner):
        "The declared way for what act() does not do: the body of the step is one's own."
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward")
            with self.stage("step"): self.optimiser.step()
            self.optimiser.zero_grad()
    seen = []
    for kind in (Learner, Declared):
        learn = make(kind, callback := ON_THE_STEP[name]())
        learn.train(2)
        seen.append([*learn.model.parameters(), *(callback.model().parameters() if name == "EMA" else ())])
    assert all(map(torch.equal, *seen))


def test_a_routine_that_seldom_takes_a_step_is_right():
    class Seldom(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward")
            if self.batch_num % 3 == 2: self.act("step")
    learn = make(Seldom, ema := EMA(0.5))
    learn.train(2)
    assert ema.updates == 2


def test_lr_find_works_with_a_step_of_ones_own():
    class Sets(OwnStep):
        def train_batch(self):
            self.act("prepare", "predict", "loss")
            self.loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
    assert len(lr_find(make(Sets), steps=20).rates) > 8


def penalty(learn): return learn.loss_func(learn.model(learn.data), learn.labels)


class SecondPass(Learner):
    "Makes a second gradient within the step, behind the back of the stages."
    def step(self):
        self.optimiser.zero_grad()
        penalty(self).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


class Closure(Learner):
    "Gives the optimiser a closure that knows nothing of stages."
    def step(self):
        def closure():
            self.optimiser.zero_grad()
            loss = penalty(self)
            loss.backward()
            return loss
        self.optimiser.step(closure)
        self.optimiser.zero_grad()


@pytest.mark.parametrize("kind", [SecondPass, Closure])
def test_a_gradient_that_is_made_within_the_step_is_not_left_as_it_is(kind):
    for callback in (ClipGradients(0.01), Accumulate(5)):
        learn = make(kind, callback)
        before = learn.model.weight.clone()
        with pytest.raises(CallbackError, match="second backward pass within the step"): learn.train(2)
        assert torch.equal(before, learn.model.weight)
        assert not learn.optimiser._optimizer_step_pre_hooks and not learn.model.weight._post_accumulate_grad_hooks
    learn, plain = make(kind, EMA(0.5)), make(Learner, EMA(0.5))
    learn.train(2)
    plain.train(2)
    assert torch.equal(learn.model.weight, plain.model.weight)


def test_a_user_may_hook_the_step_within_training():
    learn, steps = make(Learner), []
    def count(batch_num, optimiser):
        if batch_num == 0: optimiser.register_step_pre_hook(lambda *_: steps.append(1))
    learn.on("before_batch", count)
    learn.train(1)
    assert len(steps) == 5


@pytest.mark.parametrize("opens", [(), ("backward",)])
def test_a_routine_that_takes_no_step_says_so_once(opens):
    class Returns(Learner):
        "As other libraries have it: the loss is returned, and nobody steps on it."
        def train_batch(self):
            self.act("prepare", "predict", "loss", *opens)
            return {"loss": self.loss}
    with pytest.warns(UserWarning, match="took no step in the first epoch") as said: make(Returns).train(3)
    assert len(said) == 1
