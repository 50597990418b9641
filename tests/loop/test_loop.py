"""The loop by itself, and what it takes: plans, training by steps, named loaders, losses that ask, modules beside the model."""
import ast
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from learner.base.batch import total
from learner.loop.data import TensorLoader
from learner.loop.learner import Learner
from learner.loop.loop import Loop, LossError, Plan
from learner.loop.passes import Stream
from learner.loop.resume import Rewind
from learner.loop.stages import Callback, CancelTrainException
from learner.loop.state import ResumeError

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
PARTS = [*zip(X.split(8), Y.split(8), strict=True)]  # seven batches, the last of two


def net(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def made(train=PARTS, callbacks=(), kind=Learner, loss=F.mse_loss, optimiser=torch.optim.AdamW, dropout=0.0, **loaders):
    return kind(net(dropout), optimiser, loss, {"train": train, **loaders}, list(callbacks), device="cpu")


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def by_hand(batches, steps, rate=0.01, loss=F.mse_loss):
    model = net()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for x, y in itertools.islice(batches, steps):
        loss(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------------------------------------------- the page

def test_the_loop_is_half_a_page_and_knows_nothing_of_resuming():
    source = (ROOT / "learner/loop/loop.py").read_text()
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    lines = sum(functions[name].end_lineno - functions[name].lineno + 1 for name in ("_train", "_pass"))
    assert lines <= 45
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#"))
    for word in ("resum", "rewind", "cursor", "signal", "arriv"): assert word not in code.lower(), word


def test_a_learner_has_at_most_twelve_private_attributes():
    learn = made(validation=PARTS, callbacks=[Rewind(2)])
    seen = set()
    learn.on("after_batch", lambda learn: seen.update(vars(learn)))
    learn.train(2, 0.01)
    private = {name for name in {*seen, *vars(learn)} if name.startswith("_")}
    assert len(private) <= 12, private


def test_the_loop_alone_trains_as_the_learner_does():
    ends = []
    for kind in (Loop, Learner):
        learn = made(kind=kind, validation=PARTS, test=PARTS, dropout=0.3)
        learn.train(3, learning_rate=0.01, validation_epochs=2)
        ends.append((weights(learn), learn.history.rows, learn.results))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1:] == ends[1][1:]
    assert "validation_loss" not in ends[0][1][0] and "test_loss" in ends[0][2]


@pytest.mark.parametrize(("options", "columns"), [
    (dict(validate=False), {"epoch", "train_loss", "test_loss"}), (dict(test=False), {"epoch", "train_loss", "validation_loss"}),
])
def test_validations_and_the_test_can_be_left_out(options, columns):
    learn = made(validation=PARTS, test=PARTS)
    learn.train(1, 0.01, **options)
    assert set(learn.history[-1]) == columns


# ---------------------------------------------------------------------------------------------------- steps

@pytest.mark.parametrize("way", ["process", "state"])
@pytest.mark.parametrize(("again", "columns"), [
    ({}, {"epoch", "train_loss"}), (dict(validate=True, test=True), {"epoch", "train_loss", "validation_loss", "test_loss"}),
])
def test_what_is_left_out_stays_left_out_on_resume(again, columns, way):
    learn = made(validation=PARTS, test=PARTS)
    with pytest.raises(KeyboardInterrupt): learn.train(2, 0.01, validate=False, test=False, callbacks=Stop(9))
    if way == "state":
        state, learn = learn.state_dict(), made(validation=PARTS, test=PARTS)
        learn.train(resume=state, **again)
    else: learn.train(resume=True, **again)
    assert set(learn.history[-1]) == columns
    learn.train(1)
    assert set(learn.history[-1]) == {"epoch", "train_loss", "validation_loss", "test_loss"}


class Endless:
    def __iter__(self): return itertools.cycle(PARTS)


@pytest.mark.parametrize("loader", [PARTS, Endless()], ids=["list", "endless"])
@pytest.mark.parametrize("every", [None, 7, 3, 20])
def test_steps_are_those_of_a_plain_loop(loader, every):
    learn, taken = made(loader, validation=PARTS), []
    learn.on("after_step", lambda: taken.append(1))
    learn.train(steps=20, validation_steps=every, learning_rate=0.01)
    assert len(taken) == 20 and torch.equal(weights(learn), by_hand(itertools.cycle(PARTS), 20))
    assert len(learn.history) == -(-20 // (every or 20)) and "validation_loss" in learn.history[-1]


class Stop(Callback):
    watches = True
    def __init__(self, at): self.left = at
    def after_batch(self):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt


def shuffled(kind):
    if kind == "tensors": return TensorLoader((X, Y), 8, shuffle=True)
    return DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(3) if kind == "generator" else None)


@pytest.mark.parametrize("kind", ["tensors", "torch", "generator"])
@pytest.mark.parametrize("at", [1, 4, 5, 7, 8, 13, 14, 19])
@pytest.mark.parametrize("way", ["process", "state", "rewind"])
def test_a_training_by_steps_goes_on_exactly(kind, at, way):
    def learner(): return made(shuffled(kind), dropout=0.4, validation=PARTS)
    torch.manual_seed(5)
    whole = learner()
    whole.train(steps=20, validation_steps=5, learning_rate=0.01)
    torch.manual_seed(5)
    broken = learner()
    extra = [Stop(at), Rewind(3)] if way == "rewind" else [Stop(at)]
    with pytest.raises(KeyboardInterrupt): broken.train(steps=20, validation_steps=5, learning_rate=0.01, callbacks=extra)
    if way == "state":
        state, broken = broken.state_dict(), learner()
        broken.train(resume=state)
    else: broken.train(resume=True)
    assert torch.equal(weights(whole), weights(broken)) and whole.history.rows == broken.history.rows


def test_a_training_by_steps_can_be_made_longer():
    whole, learn = made(validation=PARTS), made(validation=PARTS)
    whole.train(steps=20, validation_steps=5, learning_rate=0.01)
    with pytest.raises(KeyboardInterrupt): learn.train(steps=10, validation_steps=5, learning_rate=0.01, callbacks=Stop(9))
    learn.train(steps=20, resume=True)
    assert torch.equal(weights(whole), weights(learn)) and len(learn.history) == 4


@pytest.mark.parametrize("way", ["process", "state"])
@pytest.mark.parametrize(("first", "stop", "then", "rows"), [
    (dict(steps=7, validation_steps=5), None, dict(steps=20), [5, 2, 5, 5, 3]),  # the last stretch was short
    (dict(steps=7, validation_steps=5), None, dict(steps=20, validation_steps=10), [5, 2, 10, 3]),
    (dict(steps=7, validation_steps=5), 6, dict(steps=20), [5, 5, 5, 5]),
    (dict(steps=7, validation_steps=5), 6, dict(steps=7), [5, 2]),
    (dict(steps=10, validation_steps=5), None, dict(steps=20, validation_steps=4), [5, 5, 4, 4, 2]),
    (dict(steps=20, validation_steps=5), 8, dict(validation_steps=10), [5, 10, 5]),
    (dict(steps=20, validation_steps=5), 8, dict(steps=8), [5, 3]),
    (dict(steps=20, validation_steps=5), "validation", dict(validation_steps=10), [5, 10, 5]),
    (dict(steps=7, validation_steps=5), "last validation", dict(steps=20), [5, 2, 5, 5, 3]),
    (dict(steps=7, validation_steps=5), "test", dict(steps=20), [5, 2, 5, 5, 3]),
    (dict(steps=7, validation_steps=5), "test", dict(), [5, 2]),
])
def test_a_training_by_steps_makes_as_many_as_it_is_asked_for(first, stop, then, rows, way):
    def learner(): return made(shuffled("torch"), dropout=0.4, validation=PARTS, test=PARTS)
    torch.manual_seed(5)
    whole = learner()
    whole.train(steps=sum(rows), learning_rate=0.01)
    torch.manual_seed(5)
    learn, taken = learner(), []
    learn.on("after_step", lambda: taken.append(1))
    if stop is None: learn.train(**first, learning_rate=0.01)
    else:
        halt = {"validation": StopIn("validation", 1), "last validation": StopIn("validation", 2),
                "test": StopIn("test", 1)}.get(stop) or Stop(stop)
        with pytest.raises(KeyboardInterrupt): learn.train(**first, learning_rate=0.01, callbacks=halt)
    if way == "process": learn.train(**then, resume=True if stop else learn.state_dict())
    else:
        state, learn = learn.state_dict(), learner()
        learn.on("after_step", lambda: taken.append(1))
        learn.train(**then, resume=state)
    assert len(taken) == sum(rows) and torch.equal(weights(whole), weights(learn))
    assert len(learn.history) == len(rows) and all("validation_loss" in row for row in learn.history)


class StopIn(Callback):
    watches = True
    def __init__(self, phase, at): self.phase, self.left = phase, at
    def stop(self, phase):
        self.left -= phase == self.phase
        if not self.left: raise KeyboardInterrupt
    def before_validation(self): self.stop("validation")
    def before_test(self): self.stop("test")


def test_more_epochs_after_a_stop_in_the_test():
    whole, learn = made(shuffled("tensors"), validation=PARTS, test=PARTS), made(shuffled("tensors"), validation=PARTS, test=PARTS)
    torch.manual_seed(5)
    whole.train(4, 0.01)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt): learn.train(2, 0.01, callbacks=StopIn("test", 1))
    learn.train(4, resume=True)
    assert torch.equal(weights(whole), weights(learn)) and whole.history.rows == learn.history.rows


@pytest.mark.parametrize(("then", "message"), [
    (dict(steps=7), "steps is 7, and the training to resume has begun 8; they count from its beginning: ask for more"),
    (dict(validation_steps=2), "validation_steps is 2, and the training to resume has made 3 batches since"),
])
def test_a_training_by_steps_refuses_to_be_shorter_than_it_is(then, message):
    learn = made(validation=PARTS)
    with pytest.raises(KeyboardInterrupt): learn.train(steps=20, validation_steps=5, learning_rate=0.01, callbacks=Stop(8))
    with pytest.raises(ValueError, match=message): learn.train(**then, resume=True)
    learn.train(resume=True)
    assert torch.equal(weights(learn), by_hand(itertools.cycle(PARTS), 20)) and len(learn.history) == 4


def read_by(learn):
    found = []
    learn.on("after_prepare", lambda data: found.append(data.tolist()))
    return found


@pytest.mark.parametrize("way", ["process", "state"])
@pytest.mark.parametrize("kind", ["tensors", "distributed"])
def test_each_call_by_steps_reads_the_loader_in_another_order(kind, way):
    def learner():
        if kind == "tensors": return made(shuffled("tensors"))
        data = TensorDataset(X, Y)
        return made(DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0)))
    torch.manual_seed(3)
    learn, orders = learner(), []
    for _ in range(3):
        found = read_by(learn)
        learn.train(steps=3, learning_rate=0.01)
        orders.append(str(found[:3]))
        if way == "state":
            state, learn = learn.state_dict(), learner()
            learn.load_state_dict(state)
    assert len({*orders}) == 3


@pytest.mark.parametrize("way", ["process", "state"])
@pytest.mark.parametrize("at", [1, 3, 8, 9])
def test_the_second_call_by_steps_goes_on_exactly(at, way):
    def learner():
        torch.manual_seed(5)
        learn = made(shuffled("tensors"), dropout=0.4)
        learn.train(steps=3, learning_rate=0.01)
        return learn
    whole = learner()
    whole.train(steps=20, validation_steps=6)
    learn = learner()
    with pytest.raises(KeyboardInterrupt): learn.train(steps=20, validation_steps=6, callbacks=Stop(at))
    if way == "state":
        state, learn = learn.state_dict(), made(shuffled("tensors"), dropout=0.4)
        learn.train(resume=state)
    else: learn.train(resume=True)
    assert torch.equal(weights(whole), weights(learn)) and whole.history.rows == learn.history.rows


@pytest.mark.parametrize("options", [dict(epochs=2), dict(steps=14)])
def test_another_batch_size_within_a_pass_is_refused_and_changes_nothing(options):
    learn = made(TensorLoader((X, Y), 5, shuffle=True))
    with pytest.raises(KeyboardInterrupt): learn.train(**options, learning_rate=0.01, callbacks=Stop(4))
    before, loaders = weights(learn), learn.dataloaders
    learn.dataloaders = {"train": TensorLoader((X, Y), 10, shuffle=True)}
    with pytest.raises(ResumeError, match="the training loader now has 5 batches; it had 10 when training stopped after 4 of them; give it"):
        learn.train(resume=True)
    assert torch.equal(before, weights(learn)) and learn.place.batch == 4
    learn.dataloaders = loaders
    learn.train(resume=True)


def test_between_two_epochs_the_batch_size_may_change():
    learn = made(TensorLoader((X, Y), 5, shuffle=True))
    learn.train(1, 0.01)
    learn.dataloaders = {"train": TensorLoader((X, Y), 10, shuffle=True)}
    learn.train(2, resume=learn.state_dict())
    assert len(learn.history) == 2


def test_a_training_by_steps_that_a_callback_ended_has_ended():
    learn = made(validation=PARTS)
    def end(epoch):
        if epoch == 1: raise CancelTrainException
    learn.on("after_epoch", end)
    learn.train(steps=20, validation_steps=5, learning_rate=0.01)
    before = weights(learn)
    learn.train(resume=learn.state_dict())
    assert len(learn.history) == 2 and torch.equal(before, weights(learn))


@pytest.mark.parametrize(("options", "message"), [
    (dict(epochs=2, steps=3), "asks for two lengths"), (dict(validation_steps=3), "validation_steps goes with steps"),
    (dict(steps=0), "steps is 0; it must be a whole number of at least 1"), (dict(steps=3, validation_steps=-1), "validation_steps is -1"),
])
def test_lengths_that_cannot_be(options, message):
    learn = made()
    before = weights(learn)
    with pytest.raises(ValueError, match=message): learn.train(learning_rate=0.1, **options)
    assert torch.equal(before, weights(learn)) and not len(learn.history)


def test_epochs_cannot_be_resumed_as_steps():
    learn = made()
    with pytest.raises(KeyboardInterrupt): learn.train(3, 0.01, callbacks=Stop(9))
    with pytest.raises(ValueError, match="counts epochs"): learn.train(steps=50, resume=True)
    learn.train(resume=True)
    assert len(learn.history) == 3


def test_a_stream_begins_its_loader_again_and_refuses_an_empty_one():
    passes = []
    stream = Stream("ab", lambda stream: passes.append(stream.passes))
    assert [next(stream) for _ in range(5)] == [*"ababa"] and passes == [0, 1, 2]
    with pytest.raises(ValueError, match="yielded no batch"): next(Stream(iter([])))


def test_what_is_planned_is_known():
    learn = made()
    found = []
    learn.on("before_batch", lambda learn: found.append((learn.plan.length(learn), learn.plan.total(learn))))
    learn.train(2, 0.01)
    assert set(found) == {(7, 14)}
    found.clear()
    learn.train(steps=10, validation_steps=4)
    assert set(found) == {(4, 10), (2, 10)}
    assert Plan().total(made(Endless())) is None


# ---------------------------------------------------------------------------------------------------- named loaders

EASY, HARD = [PARTS[0]], PARTS[1:]


def exact(model, batches):
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    with torch.no_grad(): return F.mse_loss(model(x), y).item()


def test_each_named_loader_has_its_columns():
    learn = made(validation={"easy": EASY, "hard": HARD}, test={"easy": EASY, "hard": HARD})
    learn.train(2, 0.01)
    row = learn.history[-1]
    for phase in ("validation", "test"):
        assert row[f"{phase}_easy_loss"] == pytest.approx(exact(learn.model, EASY))
        assert row[f"{phase}_hard_loss"] == pytest.approx(exact(learn.model, HARD))
    assert learn.validate() == {name: value for name, value in row.items() if name.startswith("validation")}
    alone = made(validation=PARTS)
    alone.train(2, 0.01)
    assert torch.equal(weights(alone), weights(learn))


@pytest.mark.parametrize("hook", ["before_validation", "after_validation_batch", "after_validation", "before_test_batch"])
@pytest.mark.parametrize("nth", [1, 2, 3, 9])
def test_a_stop_among_named_loaders_is_exact(hook, nth):
    class Fail(Callback):
        watches, left = True, nth

    def fail(self):
        self.left -= 1
        if self.left == 0: raise KeyboardInterrupt
    setattr(Fail, hook, fail)
    def learner(): return made(shuffled("torch"), dropout=0.3, validation={"easy": EASY, "hard": HARD}, test={"a": EASY, "b": HARD})
    torch.manual_seed(3)
    whole = learner()
    whole.train(3, 0.01)
    torch.manual_seed(3)
    learn = learner()
    try: learn.train(3, 0.01, callbacks=Fail())
    except KeyboardInterrupt: learn.train(resume=True)
    assert torch.equal(weights(whole), weights(learn)) and whole.history.rows == learn.history.rows


# ---------------------------------------------------------------------------------------------------- losses and modules

def test_a_loss_gets_the_fixtures_that_it_names():
    def loss(predictions, labels, data, *, epoch, weight=0.0): return ((predictions - labels) * data.abs().mean()).square().mean() + epoch
    learn = made(loss=loss, validation=PARTS)
    learn.train(1, 0.01)
    want = by_hand(PARTS, 7, loss=lambda p, y: p.sum())  # another loss gives other weights
    assert not torch.equal(weights(learn), want)
    with torch.no_grad():
        losses = [(loss(learn.model(x), y, x, epoch=0).item(), len(x)) for x, y in PARTS]
    assert learn.history[-1]["validation_loss"] == pytest.approx(sum(value * n for value, n in losses) / 50)


def test_a_loss_that_asks_for_what_is_not_there_is_refused_before_the_first_batch():
    learn = made(loss=lambda predictions, labels, dta: predictions.mean())
    with pytest.raises(LossError, match="loss_func asks for dta, .* did you mean data?"): learn.train(1, 0.01)
    assert learn.history.rows == [] and not learn.is_running


class Weighted(nn.Module):
    def __init__(self, note=lambda training: None):
        super().__init__()
        self.log_variance, self.drop, self.note = nn.Parameter(torch.zeros(())), nn.Dropout(0.2), note

    def forward(self, predictions, labels):
        self.note(self.training)
        return F.mse_loss(self.drop(predictions), labels) * (-self.log_variance).exp() + self.log_variance


def test_a_loss_with_parameters_is_trained_switched_and_kept():
    torch.manual_seed(2)
    modes = []
    learn = made(loss=Weighted(modes.append), validation=PARTS)
    learn.train(2, 0.05)
    loss = learn.loss_func
    assert loss.log_variance.item() != 0 and modes == ([True] * 7 + [False] * 7) * 2
    torch.manual_seed(2)
    broken = made(loss=Weighted(), validation=PARTS)
    with pytest.raises(KeyboardInterrupt): broken.train(2, 0.05, callbacks=Stop(9))
    fresh = made(loss=Weighted(), validation=PARTS)
    fresh.train(resume=broken.state_dict())
    assert torch.equal(fresh.loss_func.log_variance, loss.log_variance) and torch.equal(weights(fresh), weights(learn))
    with pytest.raises(ResumeError, match="loss_func"): made(loss=Weighted()).load_state_dict({**broken.state_dict(), "modules": {}})


def test_modules_on_callbacks_are_kept_and_a_frozen_one_stays_frozen():
    class Distil(Callback):
        def __init__(self): self.teacher, self.norm = net().eval().requires_grad_(False), nn.BatchNorm1d(4, affine=False)
        def after_prepare(self, learn, data):
            learn.data = self.norm(data)
            seen.append((self.teacher.training, self.norm.training, learn.phase))
    seen, distil = [], Distil()
    learn = made(callbacks=[distil], validation=PARTS)
    learn.train(1, 0.01)
    assert set(seen) == {(False, True, "train"), (False, False, "validation")} and distil.norm.num_batches_tracked == 7
    state = learn.state_dict()
    assert {"Distil.teacher", "Distil.norm"} == set(state["modules"])
    other = Distil()
    made(callbacks=[other]).load_state_dict(state)
    assert torch.equal(other.norm.running_mean, distil.norm.running_mean)


def test_a_submodule_in_evaluation_mode_stays_in_it():
    learn = made(validation=PARTS)
    learn.model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    learn.model[0].eval()
    before = learn.model[0].running_mean.clone()
    learn.train(2, 0.01)
    assert torch.equal(before, learn.model[0].running_mean)
    assert [m.training for m in learn.model.modules()] == [True, False, True]
    learn.model.eval()
    learn.train(1)
    assert not torch.equal(before, learn.model[0].running_mean)  # all of it was in evaluation mode, and is trained


def test_a_total_is_divided_by_the_examples():
    class Own(Learner):
        def train_batch(self):
            self.act("prepare", "predict", "loss", "backward", "step")
            return {"labels": total(self.labels.sum())}
    learn = made(kind=Own)
    learn.on("after_loss", lambda learn, labels: learn.log(again=total(labels.sum().item())))
    learn.train(1, 0.0)
    assert learn.history[-1]["train_labels"] == pytest.approx(Y.mean().item()) == pytest.approx(learn.history[-1]["train_again"])
    with pytest.raises(ValueError, match="no batch is under way"): learn.log(labels=total(1.0))


# ---------------------------------------------------------------------------------------------------- only to measure, and what is left

def test_a_learner_without_optimiser_and_loss_measures():
    learn = made(optimiser=None, loss=None, validation=PARTS)
    learn.on("after_validation_batch", lambda learn, predictions: learn.log(mean=predictions.mean()))
    with torch.no_grad(): want = learn.model.eval()(X).mean().item()
    assert learn.validate() == {"validation_mean": pytest.approx(want, abs=1e-6)}
    with pytest.raises(TypeError, match="optimiser is None"): learn.train(1, 0.01)
    assert learn.validate().keys() == {"validation_mean"}


def test_the_last_batch_stays_if_asked():
    learn = made(validation=PARTS)
    learn.train(1, 0.01)
    assert not hasattr(learn, "predictions")
    learn.keep_last = True
    learn.train(1, 0.01)
    assert learn.predictions.shape == (2, 1) and learn.labels.shape == (2, 1) and learn.loss.ndim == 0


@pytest.mark.parametrize(("word", "ours"), [("fit", "train"), ("evaluate", "validate or test"), ("opt", "optimiser")])
def test_words_of_other_libraries_are_answered_with_ours(word, ours):
    with pytest.raises(AttributeError, match=ours): getattr(made(), word)


@pytest.mark.parametrize(("given", "ours"), [({"lr": 0.1}, "learning_rate"), ({"max_epochs": 3}, "epochs"), ({"learning_rat": 1}, "learning_rate")])
def test_arguments_of_other_libraries_are_answered_with_ours(given, ours):
    with pytest.raises(TypeError, match=ours): made().train(1, **given)


def test_verbs_of_other_modules_are_methods_too():
    learn = made()
    assert learn.predict(X[:3]).outputs.shape == (3, 1)
    shown = dir(learn)
    assert {"train", "lr_find", "summary", "predict"} <= set(shown) and not {"fit", "opt", "evaluate"} & set(shown)
    assert not {"silenced", "update_guard", "resolution", "act", "train_batch"} & set(shown), "machinery"


def test_a_learner_has_no_getattr_since_one_slows_every_attribute_down():
    assert not any("__getattr__" in vars(kind) for kind in type(made()).__mro__)


# ---------------------------------------------------------------------------------------------------- a pass that starts over

@pytest.mark.parametrize("phase", ["validation", "test"])
@pytest.mark.parametrize("way", ["process", "state"])
def test_a_pass_that_starts_over_starts_with_the_states_of_callbacks_that_it_had(phase, way):
    class Counts(Callback):
        def __init__(self): self.seen = 0
        def after_any_batch(self, learn):
            self.seen += 1
            learn.log(seen=self.seen)
        def state_dict(self): return {"seen": self.seen}
        def load_state_dict(self, state): self.seen = state["seen"]

    class Break(Callback):
        watches, left = True, 3
        def after_any_batch(self, learn):
            if learn.phase != phase: return
            self.left -= 1
            if not self.left: raise KeyboardInterrupt

    def learner(): return made(validation=PARTS, test=PARTS, callbacks=[Counts()])
    whole, learn = learner(), learner()
    whole.train(2, 0.01)
    with pytest.raises(KeyboardInterrupt): learn.train(2, 0.01, callbacks=Break())
    if way == "state":
        state, learn = learn.state_dict(), learner()
        learn.train(resume=state)
    else: learn.train(resume=True)
    assert learn.history.rows == whole.history.rows and learn.callbacks[0].seen == whole.callbacks[0].seen
