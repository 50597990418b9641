"""The kit for callbacks: bad ones, each found by its rule and by no other; good ones; the learners and the machinery."""
import copy
import gc
import random
import threading
import time
import weakref
from collections import deque
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.provenance import rng_state
from learner.check.bench import Bench, example_learner
from learner.check.condition import changed, condition, differing, reachable, same, values
from learner.check.conformance import ConformanceError, check_callback, judge
from learner.check.rules import RULES, misfit
from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelTrainException,
    provides,
)

RULE = {rule.name: rule for rule in RULES}


class Watcher(Callback):
    watches = True


BAD = []  # rule, class, a part of what is said


def breaks(rule, text):
    def register(cls):
        BAD.append(pytest.param(rule, cls, text, id=f"{rule}-{cls.__name__}"))
        return cls
    return register


# 1. It runs

@breaks("runs", "learn.train() raised ZeroDivisionError")
class Raises(Watcher):
    def after_batch(self): 1 / 0  # noqa: B018


@breaks("runs", "learn.validate() raised AttributeError")
class NeedsTrain(Watcher):
    def before_train(self): self.best = 9.0
    def after_validation(self, results): self.best = min(self.best, results["validation_loss"])
    def cleanup_train(self): self.best = 9.0


@breaks("runs", "raised CallbackError: CancelsInATest.after_loss")
class CancelsInATest(Callback):
    def after_loss(self, phase):
        if phase == "test": raise CancelTrainException


@breaks("runs", "learn.trial() raised TypeError: CannotBeCopied() cannot be copied (cannot pickle '_thread.lock' object)")
class CannotBeCopied(Callback):
    def __init__(self): self.lock = threading.Lock()
    def after_backward(self, model): model[0].weight.grad.mul_(0.5)


@breaks("runs", "fixture")
class AsksForWhatNobodyHas(Watcher):
    def after_loss(self, los): pass


# 2. It can be stopped anywhere

@breaks("interrupts", "requires_grad of 0.weight was True and is False")
class Freezes(Callback):
    def before_epoch(self, model): model[0].weight.requires_grad_(False)
    def after_epoch(self, model): model[0].weight.requires_grad_(True)


@breaks("interrupts", "the number of hooks on 0 was 0 and is 1")
class ForgetsItsHook(Watcher):
    def before_train(self, model): self.handle = model[0].register_forward_hook(lambda *_: None)
    def after_train(self): self.handle.remove()
    cancelled_train = after_train


@breaks("interrupts", "the number of hooks on 0.weight was 0 and is 1")
class ForgetsAHookOnAParameter(Watcher):
    def before_train(self, model): self.handle = model[0].weight.register_hook(lambda grad: None)
    def after_train(self): self.handle.remove()


@breaks("interrupts", "the number of hooks on the optimiser was 0 and is 1")
class ForgetsAHookOnTheOptimiser(Watcher):
    def before_train(self, optimiser): self.handle = optimiser.register_step_post_hook(lambda *_: None)
    def after_train(self): self.handle.remove()


@breaks("interrupts", "autocast on the CPU was False and is True")
class LeavesAutocastOn(Callback):
    def before_predict(self): torch.set_autocast_enabled("cpu", True)
    def after_predict(self): torch.set_autocast_enabled("cpu", False)


@breaks("interrupts", "deterministic algorithms was False and is True")
class LeavesDeterminismOn(Watcher):
    def before_train(self): torch.use_deterministic_algorithms(True)
    def after_train(self): torch.use_deterministic_algorithms(False)


@breaks("interrupts", "after train deterministic algorithms was False and is True")
class NeverPutsDeterminismBack(Watcher):
    def before_train(self): torch.use_deterministic_algorithms(True)


@breaks("interrupts", "Linear.forward was Linear.forward and is")
class PatchesAClass(Watcher):
    def before_train(self):
        self.forward = nn.Linear.forward
        nn.Linear.forward = lambda module, x: F.linear(x, module.weight, module.bias)

    def after_train(self): nn.Linear.forward = self.forward


@breaks("interrupts", "step of the optimiser was absent and is")
class PatchesTheOptimiser(Watcher):
    def before_train(self, optimiser):
        step = type(optimiser).step
        optimiser.step = lambda: step(optimiser)

    def after_train(self, optimiser): del optimiser.step


@breaks("interrupts", "learn.callbacks was ()")
class LeavesAnotherBehind(Watcher):
    def before_train(self, learn):
        self.other = Watcher()
        learn.add(self.other)

    def after_train(self, learn): learn.remove(self.other)


@breaks("interrupts", "learn.loss_func was cross_entropy and is")
class LeavesALossBehind(Callback):
    def before_train(self, learn):
        self.loss_func = learn.loss_func
        learn.loss_func = partial(F.cross_entropy, label_smoothing=0.1)

    def after_train(self, learn): learn.loss_func = self.loss_func


@breaks("interrupts", "is not as it was before the validation pass")
class LendsOtherWeights(Callback):
    def __init__(self): self.own = {}

    def before_validation(self, model):
        self.own = {name: part.clone() for name, part in model.state_dict().items()}
        with torch.no_grad(): model[0].weight.mul_(0.9)

    def after_validation(self, model):
        if self.own: model.load_state_dict(self.own)
        self.own = {}


@breaks("interrupts", "was raised in its place")
class CleansUpWhatIsNotThere(Watcher):
    def before_epoch(self): self.file = []
    def cleanup_epoch(self): self.__dict__.pop("file").clear()


@breaks("interrupts", "the exception was swallowed")
class CatchesTooMuch(Watcher):
    def around_epoch(self):
        try: yield
        except BaseException: self.caught = True


@breaks("interrupts", "the next train raised RuntimeError: still open")
class StaysOpen(Watcher):
    def __init__(self): self.open = False

    def before_train(self):
        if self.open: raise RuntimeError("still open")
        self.open = True

    def after_train(self): self.open = False


# 3. A second train

@breaks("repeats", "a second train with the same callback raised RuntimeError: used up")
class UsedUp(Watcher):
    def __init__(self): self.used = False
    def before_train(self):
        if self.used: raise RuntimeError("used up")
    def cleanup_train(self): self.used = True


@breaks("repeats", "differs from one with a fresh callback in")
class FlagStaysUp(Callback):
    """Stops after two epochs, and from then on at once."""
    def __init__(self): self.stopped = False

    def after_epoch(self, epoch):
        self.stopped = self.stopped or epoch == 1
        if self.stopped: raise CancelTrainException


@breaks("repeats", "differs from one with a fresh callback in")
class RecordsTheFirstTrainOnly(Watcher):
    def __init__(self): self.losses, self.done = [], False

    def after_epoch(self, results):
        if not self.done: self.losses.append(results["train_loss"])

    def after_train(self): self.done = True


# 4. Resume

class Decay(Callback):
    """A learning rate that falls with every step of its life."""
    def __init__(self): self.steps = 0

    def after_step(self, optimiser):
        self.steps += 1
        for group in optimiser.param_groups: group["lr"] = 0.05 / (1 + 0.1 * self.steps)


class DecayWithState(Decay):
    def state_dict(self): return {"steps": self.steps}
    def load_state_dict(self, state): self.steps = state["steps"]


@breaks("resumes", "it has no state_dict; DecayWithoutState.steps changes from train to train")
class DecayWithoutState(Decay): pass


@breaks("resumes", "it has state_dict and no load_state_dict")
class HalfAState(Decay):
    def state_dict(self): return {"steps": self.steps}


@breaks("resumes", "it has load_state_dict and no state_dict")
class OtherHalf(Decay):
    def load_state_dict(self, state): self.steps = state["steps"]


@breaks("resumes", "resumed from its state differs from training that never stopped")
class SavesTooLittle(DecayWithState):
    def __init__(self):
        super().__init__()
        self.offset = 0.0

    def after_step(self, optimiser):
        self.offset += 0.001
        super().after_step(optimiser)
        for group in optimiser.param_groups: group["lr"] += self.offset


@breaks("resumes", "state.steps is lost when a state from after train is loaded")
class LoadsNothing(DecayWithState):
    def load_state_dict(self, state): pass


@breaks("resumes", "state['seen'] is a set, after train")
class KeepsASet(DecayWithState):
    def state_dict(self): return {"steps": self.steps, "seen": {1} if self.steps else None}


@breaks("resumes", "state has the key 0")
class NumbersForKeys(DecayWithState):
    def state_dict(self): return {0: self.steps}
    def load_state_dict(self, state): self.steps = state[0]


@breaks("resumes", "state_dict() before the first train raised AttributeError")
class HasNoStateYet(Callback):
    def before_train(self):
        if not hasattr(self, "steps"): self.steps = 0
    after_step = Decay.after_step
    state_dict = DecayWithState.state_dict
    load_state_dict = DecayWithState.load_state_dict


@breaks("resumes", "load_state_dict() of a state from before the first train raised KeyError")
class CannotLoad(DecayWithState):
    def state_dict(self): return {}


# 5. Leaks

@breaks("leaks", "KeepsGraphs.losses[0] holds the graph of a batch")
class KeepsGraphs(Watcher):
    def __init__(self): self.losses = []
    def after_loss(self, loss): self.losses.append(loss)


@breaks("leaks", "KeepsAView.last holds the predictions of a batch")
class KeepsAView(Watcher):
    def after_batch(self, predictions): self.last = predictions.detach()[:1]


@breaks("leaks", "KeepsLabels.seen[0].labels holds the labels of a batch")
class KeepsLabels(Watcher):
    def __init__(self): self.seen = deque(maxlen=1)
    def after_validation_batch(self, labels): self.seen.append({"labels": labels})


@breaks("leaks", "CapturesTheData.later (captures data) holds the data of a batch")
class CapturesTheData(Watcher):
    def after_batch(self, data): self.later = lambda: data


@breaks("leaks", "KeepsTheLearner.learn is the learner")
class KeepsTheLearner(Watcher):
    def before_train(self, learn): self.learn = learn


@breaks("leaks", "CapturesTheLearner.look (captures learn) is the learner")
class CapturesTheLearner(Watcher):
    def before_train(self, learn): self.look = lambda: learn.loss


@breaks("leaks", "the learner outlives its last user")
class TiesAKnot(Watcher):
    def before_train(self, learn): learn.model.notes = [learn]


@breaks("leaks", "bytes in each step")
class CollectsPredictions(Watcher):
    def __init__(self): self.all = []
    def after_batch(self, predictions): self.all.append(predictions.detach().clone())


@breaks("leaks", "bytes in each step")
class CollectsLabels(Watcher):
    def __init__(self): self.all = []
    def after_batch(self, labels): self.all.append(labels.clone())


@breaks("leaks", "bytes in each step")
class CollectsWeights(Watcher):
    def __init__(self): self.all = []
    def after_batch(self, model): self.all.append(model[0].weight.detach().clone())


# 6. Reading from the device

@breaks("syncs", "after_loss reads from the device in every train batch: `self.losses.append(loss.item())`")
class ReadsTheLoss(Watcher):
    def __init__(self): self.losses = []
    def after_loss(self, loss):
        self.losses.append(loss.item())


def reading(name, read):
    return breaks("syncs", "reads from the device in every")(type(name, (Watcher,), {"after_batch": lambda self, learn: read(learn)}))


reading("Float", lambda learn: float(learn.loss.detach()))
reading("Format", lambda learn: f"{learn.loss:.3f}")
reading("Condition", lambda learn: 1 if learn.loss > 0 else 2)
reading("ToList", lambda learn: learn.labels.tolist())
reading("ToNumpy", lambda learn: learn.predictions.detach().numpy())
reading("ToCpu", lambda learn: learn.loss.detach().cpu())
reading("ToCpuByName", lambda learn: learn.loss.detach().to("cpu"))
reading("ByMask", lambda learn: learn.data[learn.labels == 1])
reading("Nonzero", lambda learn: learn.labels.nonzero())
reading("Equal", lambda learn: torch.equal(learn.labels, learn.labels))


@breaks("syncs", "after_validation_batch reads from the device in every validation batch")
class ReadsInValidation(Watcher):
    def after_validation_batch(self, loss): self.last = loss.item()


@breaks("syncs", "ReadsInAModule.look")
class ReadsInAModule(Watcher):
    def __init__(self): self.handle = None
    def before_training(self, model): self.handle = model[0].register_forward_hook(self.look)
    def look(self, module, inputs, output): self.mean = output.mean().item()
    def cleanup_training(self):
        if self.handle: self.handle.remove()


# 7. Order

@breaks("order", "depends on whether another watcher stands before it or after it")
class TrustsItsPlace(Callback):
    def before_train(self, learn): self.first = learn.callbacks[0] is self
    def after_backward(self, model):
        if self.first: model[0].weight.grad.mul_(0.5)


@breaks("order", "bystander")
class WipesTheLabels(Watcher):
    def after_backward(self, labels): labels.zero_()


# 8. Its word

@breaks("watches", "epoch 0, train batch 0: weights['0.weight']")
class Nudges(Watcher):
    def after_step(self, model):
        with torch.no_grad(): model[0].weight.mul_(1.0001)


@breaks("watches", "epoch 0, train batch 0: gradient['0.weight']")
class Clips(Watcher):
    def after_backward(self, model): model[0].weight.grad.clamp_(-0.001, 0.001)


@breaks("watches", "random numbers.torch differs")
class DrawsANumber(Watcher):
    def after_test_batch(self): torch.rand(1)


@breaks("watches", "random numbers['python.state']")
class DrawsAPythonNumber(Watcher):
    def after_validation_batch(self): random.random()


@breaks("watches", "running_mean")
class ForwardsAgain(Watcher):
    def after_batch(self, model, data):
        with torch.no_grad(): model[:2](data)


@breaks("watches", "momentum_buffer")
class ForgetsMomentum(Watcher):
    def after_step(self, optimiser, epoch, batch_num):
        for state in optimiser.state.values(): state["momentum_buffer"].mul_(0.5)


@breaks("watches", "is missing")
class SkipsBatches(Watcher):
    def before_batch(self, batch_num):
        if batch_num == 1: raise CancelBatchException


@pytest.mark.parametrize("rule, cls, text", BAD)
def test_a_bad_callback_is_found_by_its_rule(rule, cls, text):
    verdict = judge(RULE[rule], Bench(cls))
    assert not verdict.ok and verdict.name == rule
    assert text in " ".join(finding.message for finding in verdict.values["findings"]), verdict


FEW = [case for i, case in enumerate(BAD) if [other.values[0] for other in BAD[:i]].count(case.values[0]) < 2]


@pytest.mark.parametrize("rule, cls, text", FEW)
def test_a_bad_callback_is_found_by_no_other_rule(rule, cls, text):
    report = check_callback(cls)
    assert report.broken == [rule], report
    assert not report.ok


def test_there_are_bad_callbacks_for_each_rule():
    assert {case.values[0] for case in FEW} == set(RULE)


# Good ones

class EMA(Callback):
    """An average of the weights, which takes their place in validation and test."""
    def __init__(self): self.average = {}

    def after_step(self, model):
        for name, part in model.named_parameters():
            if name in self.average: self.average[name].lerp_(part.detach(), 0.1)
            else: self.average[name] = part.detach().clone()

    def swap(self, model):
        own = {name: part.detach().clone() for name, part in model.named_parameters()}
        with torch.no_grad():
            for name, part in model.named_parameters():
                if name in self.average: part.copy_(self.average[name])
        return own

    def around_validation(self, model):
        own = self.swap(model)
        try: yield
        finally:
            with torch.no_grad():
                for name, part in model.named_parameters(): part.copy_(own[name])

    around_test = around_validation

    def state_dict(self): return {"average": self.average}
    def load_state_dict(self, state): self.average = dict(state["average"])


class Accumulate(Callback):
    """Replaces an action."""
    def __init__(self): self.count = 0

    def step(self, optimiser):
        self.count += 1
        if self.count % 2 == 0:
            optimiser.step()
            optimiser.zero_grad()

    def before_training(self): self.count = 0


class Smoothed(Callback):
    """Replaces the loss."""
    def loss(self, learn):
        learn.loss = F.cross_entropy(learn.predictions, learn.labels, label_smoothing=0.1)


class MixUp(Callback):
    """Draws a random number on the CPU in every batch and reads it there."""
    def before_predict(self, learn):
        if learn.phase != "train": return
        share = torch.distributions.Beta(0.4, 0.4).sample().item()
        learn.data = share * learn.data + (1 - share) * learn.data.flip(0)


class Patience(Callback):
    """What it holds belongs to one train, at whose beginning it is set."""
    def __init__(self): self.best = float("inf")
    def before_train(self): self.best = float("inf")

    def after_validation(self, results, optimiser):
        self.best = min(self.best, results["validation_loss"])
        for group in optimiser.param_groups: group["lr"] = 0.01 * self.best


class EveryThird(Watcher):
    """Reads the loss now and then."""
    def __init__(self): self.losses = []
    def after_batch(self, loss, batch_num):
        if batch_num % 3 == 0: self.losses.append(loss.item())


class Means(Watcher):
    """Keeps a small tensor for each step, and tensors of the device until the pass ends."""
    def __init__(self): self.curve, self.kept = [], []
    def after_predict(self, predictions): self.kept.append(predictions.detach().mean(0))
    def after_training(self): self.curve += torch.stack(self.kept).tolist()
    def cleanup_training(self): self.kept = []
    cleanup_validation = cleanup_test = cleanup_training


class Hooked(Watcher):
    """Puts a hook on a module and takes it away."""
    def __init__(self): self.means, self.handle = [], None
    def before_training(self, model):
        self.handle = model[0].register_forward_hook(lambda module, inputs, output: self.means.append(output.detach().mean()))
    def cleanup_training(self):
        if self.handle: self.handle.remove()
        self.handle, self.means = None, []


class Clock(Watcher):
    """What differs from run to run by its nature."""
    def before_train(self): self.start = time.perf_counter()
    def after_epoch(self, learn): learn.log(seconds=time.perf_counter() - self.start)


class SteeringClock(DecayWithState):
    def before_train(self): self.start = time.perf_counter()


class Providing(Callback):
    watches = True
    @provides("batch")
    def scale(self):
        yield 2.0

    def after_loss(self, scale=1.0): assert scale in (1.0, 2.0)


@pytest.mark.parametrize("cls", [EMA, Accumulate, Smoothed, MixUp, Patience, EveryThird, Means, Hooked, Clock, SteeringClock, DecayWithState, Providing])
def test_a_good_callback_keeps_all_rules(cls):
    assert check_callback(cls, strict=True).ok
    assert judge(RULE["resumes"], Bench(partial(copy.deepcopy, cls()))).ok  # a copy does as well


def test_a_callback_that_changes_nothing_gets_a_hint_and_passes():
    class Silent(Callback):
        def after_batch(self): pass
    report = check_callback(Silent(), strict=True)
    assert report["watches"].ok and len(report["watches"].values["findings"]) == 1
    assert "✓ watches: hint: it changed nothing" in repr(report)
    assert len(check_callback(DecayWithState())["watches"].values["findings"]) == 0


# Learners that are given

def own_learner(callbacks=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.1), nn.Linear(6, 1))
    x = torch.randn(80, 3)
    batches = [(part, part.sum(1, keepdim=True)) for part in x.split(8)]
    return Learner(model, torch.optim.AdamW, F.mse_loss, {"train": batches, "validation": batches[:2]}, callbacks, device="cpu")


class NeedsOneOutput(Watcher):
    def after_predict(self, predictions):
        if predictions.shape[1] != 1: raise ValueError("this is for regression")


def test_a_learner_of_ones_own_can_be_given_and_stays_as_it_was():
    report = check_callback(NeedsOneOutput())
    assert report.broken == ["runs"] and "pass a learner" in str(report["runs"])
    learn = own_learner([NeedsOneOutput()])
    before, rng = copy.deepcopy(learn.model.state_dict()), rng_state()
    check_callback(NeedsOneOutput(), learn, strict=True)
    assert not differing(values(before), values(learn.model.state_dict()))
    assert not differing(values(rng), values(rng_state()))
    assert len(learn.callbacks) == 1 and len(learn.history) == 0 and learn.optimiser is torch.optim.AdamW


def test_the_rules_hold_with_a_given_learner_too():
    learn = own_learner()
    for cls, rule in [(KeepsGraphs, "leaks"), (ReadsTheLoss, "syncs"), (Nudges, "watches"), (DecayWithoutState, "resumes")]:
        bench = Bench(cls, learn)
        assert [name for name in RULE if name != "interrupts" and not judge(RULE[name], bench).ok] == [rule]


def test_a_callback_that_the_learner_has_already_is_not_there_twice():
    class Once(Callback):
        count = 0
        def before_train(self, learn): assert sum(type(other) is Once for other in learn.callbacks) == 1
        def after_backward(self, model): model[0].weight.grad.mul_(0.5)
    once = Once()
    check_callback(once, own_learner([DecayWithState(), once]), strict=True)


def test_a_trained_learner_on_adam_that_a_callback_steps_is_no_read():
    learn = own_learner()
    learn.train()
    assert check_callback(Accumulate, learn)["syncs"].ok  # AdamW reads its count of steps, on the CPU


def test_an_optimiser_that_needs_a_learning_rate_gets_one():
    learn = own_learner()
    learn.optimiser = lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)
    check_callback(NeedsOneOutput, learn, strict=True)


def test_few_batches_are_used():
    seen = []
    class Counts(Watcher):
        def after_batch(self, batch_num): seen.append(batch_num)
    check_callback(Counts, own_learner())
    assert max(seen) == 3


# What remains

def test_nothing_remains_of_what_a_bad_callback_does(capsys):
    class Vandal(Watcher):
        def before_train(self, learn):
            print("here I am")
            random.seed(1)
            torch.use_deterministic_algorithms(True)
            torch.set_default_dtype(torch.float64)
            torch.set_default_dtype(torch.float32)
            torch.set_anomaly_enabled(True)
            torch.set_grad_enabled(False)
            nn.Linear.forward = lambda module, x: F.linear(x, module.weight, module.bias)
    forward, rng = nn.Linear.forward, rng_state()
    report = check_callback(Vandal)
    assert "interrupts" in report.broken
    assert nn.Linear.forward is forward and torch.is_grad_enabled() and not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled() and gc.isenabled()
    assert not differing(values(rng), values(rng_state()))
    assert capsys.readouterr() == ("", "")


def test_an_instance_is_copied_and_stays_as_it_was():
    callback = DecayWithState()
    check_callback(callback)
    assert callback.steps == 0 and vars(callback) == {"steps": 0}


def test_ctrl_c_of_a_person_stops_the_check():
    class Impatient(Watcher):
        def after_batch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): check_callback(Impatient)


# The report

def test_strict_raises_with_the_report_as_its_message():
    with pytest.raises(ConformanceError, match=r"(?s)KeepsGraphs breaks 1 of 8 rules.*✗ leaks: "): check_callback(KeepsGraphs(), strict=True)
    check_callback(KeepsGraphs())  # otherwise it says so, and raises nothing


def test_the_report_has_one_line_for_each_rule():
    for cls in (KeepsGraphs, Raises):
        lines = repr(check_callback(cls)).splitlines()
        assert [line.split(":")[0][4:] for line in lines[1:]] == list(RULE)


def test_what_does_not_run_is_not_judged_further():
    report = check_callback(Raises)
    assert not report.ok and report.broken == ["runs"]
    assert [finding.skipped for finding in report.findings] == [False] + [True] * 7


class NoCopy(Watcher):
    def __init__(self, size=1): self.lock = threading.Lock()


class NeedsArgument(Watcher):
    def __init__(self, size): self.size = size


SAME = Watcher()


@pytest.mark.parametrize("arguments, message", [
    ((3,), "callback is 3; pass a Callback or a function that makes one"),
    ((NoCopy(),), "callback: NoCopy() cannot be copied (TypeError: cannot pickle '_thread.lock' object); pass a function that makes a new one: check_callback(lambda: ...)"),
    ((NeedsArgument,), "callback: NeedsArgument() raised TypeError: NeedsArgument.__init__() missing 1 required positional argument: 'size'; pass an instance, or a function without arguments"),
    ((lambda: SAME,), "returned the same object twice; it must make a new one each time"),
    ((lambda: None,), "returned None; it must make a Callback"),
    ((Watcher(), 3), "learn is 3; pass a Learner, or nothing"),
    ((Watcher(), Learner), "learn is Learner; pass a Learner, or nothing"),
])
def test_bad_input(arguments, message):
    with pytest.raises(TypeError) as caught: check_callback(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_copied_can_be_made_by_a_function():
    check_callback(NoCopy, strict=True)


# The machinery

def test_reachable_finds_things_where_one_does_not_look():
    class Slots:
        __slots__ = ("inner",)
    def generator(secret):
        yield
        yield secret
    tensor, holder, slots = torch.zeros(1), Watcher(), Slots()
    slots.inner = tensor
    running = generator(tensor)
    next(running)
    ways = {
        "h.x": tensor, "h.x[1].a": [0, {"a": tensor}], "h.x['a b']": {"a b": tensor}, "h.x.inner": slots,
        "h.x[0]": deque([tensor]), "h.x (captures tensor)": lambda: tensor, "h.x[0][0]": partial(print, tensor), "h.x.secret": running,
    }
    for way, value in ways.items():
        holder.x = value
        found = [where for where, thing in reachable(holder, "h") if thing is tensor]
        assert len(found) == 1, way
        if not isinstance(value, partial): assert found == [way]
    holder.x = weakref.ref(tensor)
    assert not any(thing is tensor for _, thing in reachable(holder))
    holder.x = holder.__repr__
    assert len(list(reachable(holder))) < 10  # a circle


def test_reachable_does_not_go_into_a_learner():
    learn = example_learner()
    assert [thing for _, thing in reachable({"learn": learn})][1:] == [learn]


@pytest.mark.parametrize("one, other, equal", [
    (1, 1, True), (1, 1.0, False), (True, 1, False), (float("nan"), float("nan"), True), (0.0, -0.0, True), ("a", "b", False), (None, None, True),
    (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True), (torch.tensor(0.0), torch.tensor(-0.0), False),
    (torch.ones(2), torch.ones(2).double(), False), (torch.ones(2), torch.ones(1, 2), False), (torch.ones(2, 2).t(), torch.ones(2, 2), True),
    (torch.ones(2), [1.0, 1.0], False), (torch.tensor(True), torch.tensor(True), True), (torch.ones(3), torch.tensor([1, 1, 1 + 2**-23]), False),
    (torch.empty(0), torch.empty(0), True), (torch.ones(2).to_sparse(), torch.ones(2).to_sparse(), True),
])
def test_same_is_to_the_bit(one, other, equal): assert same(one, other) is equal


@pytest.mark.parametrize("state, problem", [
    ({"a": [1, 2.0, "x", None, True, torch.ones(1), {"b": []}]}, ""), ((1,), "state is a tuple"), ({"a": [{1}]}, "state['a'][0] is a set"),
    ({1: 2}, "state has the key 1"), ({"a": {"b": nn.Linear(1, 1)}}, "state['a']['b'] is a Linear"), (b"", "state is a bytes"),
])
def test_misfits_in_a_state(state, problem): assert misfit(state) == problem


def test_condition_notices_each_change():
    learn = example_learner()
    assert changed(condition(learn), condition(learn)) == ""
    for change, undo, text in [
        (lambda: learn.model[2].eval(), lambda: learn.model[2].train(), "the training mode of 2 was True and is False"),
        (lambda: learn.add(SAME), lambda: learn.remove(SAME), "learn.callbacks was () and is (Watcher(),)"),
        (lambda: setattr(learn, "step", print), lambda: delattr(learn, "step"), ""),  # a builtin is not looked for
        (lambda: setattr(learn, "predict", lambda: None), lambda: delattr(learn, "predict"), "predict of learn was absent and is"),
        (lambda: setattr(learn.model, "forward", lambda x: x), lambda: delattr(learn.model, "forward"), "forward of the model was absent"),
    ]:
        before = condition(learn)
        change()
        assert text in changed(before, condition(learn))
        assert bool(text) == bool(changed(before, condition(learn)))
        undo()
        assert changed(before, condition(learn)) == ""


def test_the_example_learner_has_what_callbacks_stumble_over():
    learn = example_learner(8, 3)
    sizes = {phase: [len(labels) for _, labels in learn.dataloaders[phase]] for phase in learn.dataloaders}
    assert sizes == {"train": [8, 8, 4], "validation": [8, 4], "test": [8, 4]}
    kinds = {type(module) for module in learn.model}
    assert {nn.Dropout, nn.BatchNorm1d} <= kinds and learn.device.type == "cpu"
    data, labels = next(iter(learn.dataloaders.train))
    assert labels.max() < 4 and torch.equal(labels, data[:, :4].argmax(1))


def test_rules_catch_what_a_callback_raises_where_it_ran_before():
    class Shy(Watcher):
        def before_train(self, learn): assert len(learn.callbacks) == 1, "too many watch"
    report = check_callback(Shy)
    assert not report.ok and "too many watch" in repr(report)
