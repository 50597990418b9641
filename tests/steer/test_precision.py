"""Mixed precision, compilation and memory format against plain loops that do the same by hand."""
import copy
import gc
import io
import pickle
import sys
import warnings
import weakref
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CancelTrainException,
    FunctionCallback,
    Stage,
)
from learner.steer.multi import Optimisers
from learner.steer.precision import ChannelsLast, Compile, MixedPrecision, autocast_kept, check_autocast

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def nothing_leaked():
    yield
    assert switch() == (False, torch.bfloat16, True, 0)


def switch(device="cpu"):
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    return (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled(), depth)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 5))


def batches(count=5, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [size // 2]  # the last one is smaller
    return [(torch.randn(n, 3, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)) for n in sizes]


def adam(model): return torch.optim.AdamW(model.parameters(), lr=0.01)
def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def learner(*callbacks, loaders=None, model=None, cls=Learner, device="cpu", optimiser=None, loss_func=F.cross_entropy):
    model = model or net()
    torch.manual_seed(2)
    return cls(model, optimiser or adam(model), loss_func, loaders or {"train": batches()}, callbacks, device=device)


def identical(one, other):
    one, other = ([*thing.values()] if isinstance(thing, dict) else list(thing) for thing in (one, other))
    return len(one) == len(other) and all(map(torch.equal, one, other))


def by_hand(dtype, scaler=None, epochs=2, clip=None, every=1, spoil=(), device="cpu", steps=None, loss_func=F.cross_entropy,
            make=adam):
    "A plain loop; `spoil` are batches whose gradient is made infinite, `every` batches add up to a step."
    model = net().to(device)
    optimiser = make(model)
    scaler = scaler or torch.amp.GradScaler(device, enabled=False)
    torch.manual_seed(2)
    losses, count = [], 0
    for _ in range(epochs):
        for x, y in batches():
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, dtype): loss = loss_func(model(x), y)
            losses.append(loss.detach())
            scaler.scale(loss).backward()
            if count in spoil: next(model.parameters()).grad[0, 0, 0, 0] = torch.inf
            count += 1
            if (count - 1) % len(batches()) % every != every - 1 and every > 1: continue
            if clip:
                scaler.unscale_(optimiser)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimiser)
            scaler.update()
            if steps is not None: steps.append(scaler.get_scale() >= before)
            optimiser.zero_grad()
    return model, optimiser, losses


class Spoil(Callback):
    "Makes a gradient infinite in some batches."
    def __init__(self, *which): self.which, self.count = which, -1
    def after_backward(self, model):
        self.count += 1
        if self.count in self.which: next(model.parameters()).grad[0, 0, 0, 0] = torch.inf


class Clip(Callback):
    priority = -20
    def __init__(self, norm): self.norm, self.seen = norm, []
    def before_step(self, model): self.seen.append(nn.utils.clip_grad_norm_(model.parameters(), self.norm))


class Every(Callback):
    "Steps every n batches of a pass."
    def __init__(self, n, priority=-40): self.n, self.priority = n, priority
    def before_step(self, batch_num):
        if batch_num % self.n != self.n - 1: raise CancelStepException


class Count(Callback):
    watches = True
    def __init__(self): self.steps, self.cancelled, self.losses = 0, 0, []
    def after_step(self): self.steps += 1
    def cancelled_step(self): self.cancelled += 1
    def after_batch(self, loss): self.losses.append(loss.detach().clone())


def scaler(interval=3, scale=2.0 ** 10, device="cpu"):
    return torch.amp.GradScaler(device, init_scale=scale, growth_interval=interval)


def states(optimiser): return [t for state in optimiser.state_dict()["state"].values() for t in state.values()]


# Autocast

def test_bfloat16_is_the_plain_loop_to_the_bit():
    model, optimiser, losses = by_hand(torch.bfloat16)
    count = Count()
    learn = learner(MixedPrecision(), count)
    learn.train(2)
    assert identical(learn.model.state_dict(), model.state_dict()) and identical(states(learn.optimiser), states(optimiser))
    assert identical(count.losses, losses)
    plain = learner()
    plain.train(2)
    assert not identical(plain.model.state_dict(), model.state_dict())  # or the test would say nothing


def test_evaluation_is_in_low_precision_too():
    seen = []
    loaders = {"train": batches(), "validation": batches(2, seed=3), "test": batches(2, seed=4)}
    learn = learner(MixedPrecision(), loaders=loaders)
    learn.on("after_predict", lambda learn: seen.append((learn.phase, learn.predictions.dtype)))
    learn.train(1)
    assert set(seen) == {(phase, torch.bfloat16) for phase in ("train", "validation", "test")}
    for call, phase in ((learn.validate, "validation"), (learn.test, "test")):
        found = call()[f"{phase}_loss"]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            learn.model.eval()
            values = [(F.cross_entropy(learn.model(x), y).item(), len(y)) for x, y in loaders[phase]]
        assert found == pytest.approx(sum(v * n for v, n in values) / sum(n for _, n in values), abs=1e-12)


def test_backward_and_step_are_outside_of_autocast():
    seen = {}
    learn = learner(MixedPrecision())
    for hook in ("before_predict", "after_predict", "before_loss", "after_loss", "before_backward", "before_step", "after_step"):
        learn.on(hook, lambda hook=hook: seen.__setitem__(hook, torch.is_autocast_enabled("cpu")))
    learn.train(1)
    assert len(seen) == 7 and not any(seen.values())


def test_autocast_of_the_user_around_it_stays():
    with torch.autocast("cpu", torch.float16):
        before = switch()
        learner(MixedPrecision()).train(1)
        assert switch() == before


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, CancelTrainException, CancelEpochException,
                                  CancelBatchException])
def test_nothing_leaks_from_any_hook(dtype, kind):
    stages = ("train", "epoch", "training", "batch", "validation", "validation_batch", "prepare", "predict", "loss", "backward", "step")
    def generator():
        raise error
        yield
    for stage in stages:
        for hook in ("before", "around", "after", "cleanup"):
            error = kind("planted")
            def fail(): raise error
            fault = FunctionCallback(f"{hook}_{stage}", generator if hook == "around" else fail, -30)
            learn = learner(MixedPrecision(dtype), fault, loaders={"train": batches(2), "validation": batches(1)})
            try: learn.train(1)
            except BaseException as raised: assert raised is error or "raised Cancel" in str(raised)
            assert switch() == (False, torch.bfloat16, True, 0), (stage, hook)
            learn.remove(fault)
            copy.deepcopy(learn)
            learn.train(1)


def test_nothing_leaks_where_an_interrupt_hits_between_two_lines():
    "Ctrl-C at each line of autocast, and of the hooks that enter it, in turn."
    ours, torchs = sys.modules["learner.steer.precision"].__file__, sys.modules["torch.amp.autocast_mode"].__file__
    def interrupted(at):
        count, previous = 0, sys.gettrace()
        def local(frame, event, arg):
            nonlocal count
            if event == "line":
                count += 1
                if count == at: raise KeyboardInterrupt
            return local
        def trace(frame, event, arg):
            code = frame.f_code
            entering = code.co_filename == ours and code.co_name in ("around_predict", "around_validation", "around_backward")
            return local if entering or code.co_filename == torchs else None
        x = torch.randn(2, 3)
        learn = learner(MixedPrecision("float16", scaler()), model=nn.Linear(3, 5), loaders={"train": [(x, torch.tensor([0, 1]))]})
        sys.settrace(trace)
        try: learn.train(1)
        except KeyboardInterrupt: pass
        finally: sys.settrace(previous)
        assert switch() == (False, torch.bfloat16, True, 0), at
        return count >= at
    at = 1
    while interrupted(at): at += 1
    gc.collect()
    assert at > 60


def test_autocast_kept_puts_everything_back():
    with autocast_kept("cpu"):
        torch.autocast("cpu", torch.float16, cache_enabled=False).__enter__()
        torch.autocast("cpu", torch.float16).__enter__()
        assert switch() == (True, torch.float16, False, 2)
    with torch.autocast("cpu", torch.float16):
        with autocast_kept("cpu"): torch.autocast("cpu", enabled=False).__enter__()
        assert switch()[0] and switch()[3] == 1


# float16

@pytest.mark.parametrize("spoil", [(), (0, 4, 5)])
def test_float16_is_the_plain_loop_to_the_bit(spoil):
    its, mine, steps, count = scaler(), scaler(), [], Count()
    model, optimiser, losses = by_hand(torch.float16, its, 4, spoil=spoil, steps=steps)
    half = MixedPrecision(torch.float16, mine)
    learn = learner(half, Spoil(*spoil), count)
    learn.train(4)
    assert identical(learn.model.state_dict(), model.state_dict()) and identical(states(learn.optimiser), states(optimiser))
    assert half.state_dict() == its.state_dict() == mine.state_dict()
    assert identical(count.losses, losses)  # the loss itself, not the scaled one
    assert (count.steps, count.cancelled) == (steps.count(True), steps.count(False)) and half.skipped == steps.count(False)
    assert learn.history["train_loss"][-1] == pytest.approx(sum(
        loss.item() * len(y) for loss, (_, y) in zip(losses[-5:], batches(), strict=True)) / 36, abs=1e-6)


def test_a_step_that_is_left_out_changes_nothing_but_the_scale():
    half = MixedPrecision("float16", scaler())
    learn = learner(half, Spoil(*range(100)))
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.train(1)
    assert identical(learn.model.parameters(), before) and not states(learn.optimiser)
    assert half.skipped == 5 and half.state_dict()["scale"] == 2.0 ** 5
    assert all(p.grad is None for p in learn.model.parameters())


def test_clipping_sees_the_true_gradients_and_finite_ones():
    its, clip = scaler(), Clip(0.5)
    model, *_ = by_hand(torch.float16, its, 3, clip=0.5, spoil=(4,))
    half = MixedPrecision("float16", scaler())
    learn = learner(clip, half, Spoil(4))  # added before it: the priorities decide
    learn.train(3)
    assert identical(learn.model.state_dict(), model.state_dict()) and half.state_dict() == its.state_dict()
    assert 0.5 < max(clip.seen) < 100 and len(clip.seen) == 15 - half.skipped


@pytest.mark.parametrize("priority", [-40, 0])
@pytest.mark.parametrize("dtype", HALF)
def test_accumulation_by_whoever(dtype, priority):
    its = scaler(1, 2.0 ** 4) if dtype == "float16" else None
    model, *_ = by_hand(HALF[dtype], its, 4, every=2)
    half, count = MixedPrecision(dtype, scaler(1, 2.0 ** 4) if its else None), Count()
    learn = learner(half, Every(2, priority), count)
    learn.train(4)
    assert identical(learn.model.state_dict(), model.state_dict())
    if its: assert half.state_dict() == its.state_dict()
    assert count.steps + half.skipped == 8 and half.skipped == 0


def test_the_scale_does_not_change_within_a_group():
    half, scales = MixedPrecision("float16", scaler(1)), []
    learn = learner(half, Every(4, 0))
    learn.on("before_backward", lambda: scales.append(half.scaler.get_scale() if half.scaler else None))
    learn.train(1)
    assert scales == [2.0 ** 10] * 4 + [2.0 ** 11]


def test_a_weight_on_the_loss_of_others_is_left_in_place():
    class Weigh(Callback):
        def before_backward(self, learn): self.loss, learn.loss = learn.loss, learn.loss * 0.25
        def cleanup_backward(self, learn): learn.loss = self.loss
    its = scaler()
    model, *_ = by_hand(torch.float16, its, 2, loss_func=lambda p, y: F.cross_entropy(p, y) * 0.25)
    half, count = MixedPrecision("float16", scaler()), Count()
    learn = learner(Weigh(), half, count)
    learn.train(2)
    assert identical(learn.model.state_dict(), model.state_dict()) and half.state_dict() == its.state_dict()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_fused_optimisers(name):
    def make(model): return getattr(torch.optim, name)(model.parameters(), lr=0.01, fused=True)
    model = net()
    optimiser, its = make(model), scaler()
    torch.manual_seed(2)
    for x, y in batches():
        with torch.autocast("cpu", torch.float16): loss = F.cross_entropy(model(x), y)
        its.scale(loss).backward()
        its.unscale_(optimiser)
        its.step(optimiser)
        its.update()
        optimiser.zero_grad()
    own = net()
    learn = learner(MixedPrecision("float16", scaler()), model=own, optimiser=make(own))
    learn.train(1)
    assert identical(own.state_dict(), model.state_dict())


def test_several_optimisers_step_together_or_not_at_all():
    class Both:
        def __init__(self, *optimisers): self.optimisers = optimisers
        @property
        def param_groups(self): return [group for optimiser in self.optimisers for group in optimiser.param_groups]
        def step(self):
            for optimiser in self.optimisers: optimiser.step()
        def zero_grad(self):
            for optimiser in self.optimisers: optimiser.zero_grad()
    model = net()
    both = Both(adam(model[0]), torch.optim.SGD(model[1:].parameters(), lr=0.01))
    half, count = MixedPrecision("float16", scaler()), Count()
    learn = learner(half, Spoil(1), count, model=model, optimiser=both)
    learn.train(1)
    assert (count.steps, half.skipped) == (4, 1) and both.optimisers[0].state_dict()["state"][0]["step"] == 4


def test_parameters_without_gradient_are_no_obstacle():
    model = net()
    for parameter in model[0].parameters(): parameter.requires_grad = False
    learn = learner(MixedPrecision("float16"), model=model)
    learn.train(1)
    class NoGradient(Callback):
        def after_backward(self, optimiser): optimiser.zero_grad()
    learner(MixedPrecision("float16"), NoGradient()).train(1)


def test_it_warns_where_no_scale_will_do():
    with pytest.warns(UserWarning, match="skipped 32 steps in a row: the gradients are infinite or NaN at any scale"):
        learner(MixedPrecision("float16"), Spoil(*range(100))).train(8)


# State

def test_a_fresh_callback_with_the_state_goes_on_exactly():
    whole, parts = learner(MixedPrecision("float16", scaler()), Spoil(6)), learner()
    whole.train(4)
    torch.manual_seed(2)
    first, spoil = MixedPrecision("float16", scaler()), Spoil(6)
    parts.train(2, callbacks=[first, spoil])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second = MixedPrecision("float16")
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert second.state_dict() == first.state_dict()
    parts.train(2, callbacks=[second, spoil])
    assert identical(whole.model.state_dict(), parts.model.state_dict())
    assert whole.callbacks[0].state_dict() == second.state_dict()


def test_states_of_other_kinds():
    half = MixedPrecision("float16")
    assert half.state_dict() == {} == MixedPrecision().state_dict()
    half.load_state_dict({})
    learner(half).train(1)
    state = half.state_dict()
    MixedPrecision().load_state_dict(state)
    half.load_state_dict(state | {"scale": 4.0})  # into a scaler that is there
    assert half.state_dict()["scale"] == 4.0
    with pytest.raises(ValueError, match=r"load_state_dict: the state has no _growth_tracker; it has \['scale'\]"):
        half.load_state_dict({"scale": 1.0})
    assert half.state_dict()["scale"] == 4.0


@pytest.mark.parametrize("make", [MixedPrecision, lambda: MixedPrecision("float16"), lambda: Compile(backend="eager"), ChannelsLast])
def test_copies_and_pickles(make):
    learn = learner(make())
    learn.train(1)
    with learn.trial() as trial: trial.train(1)
    again = pickle.loads(pickle.dumps(learn.callbacks[0]))
    assert repr(again) == repr(learn.callbacks[0])
    learn.train(1)
    learner(again).train(1)


# Routines of one's own

class Around(Learner):
    stages = (*Learner.stages, Stage("own", inside="batch", follows="prepare"))
    def train_batch(self):
        self.act("prepare")
        with self.stage("own"): self.loss = F.cross_entropy(self.model(self.data), self.labels)
        self.act("backward", "step")


def test_a_subclass_can_hook_other_stages():
    class Own(MixedPrecision): around_own = MixedPrecision.around_predict
    learn = learner(Own(), cls=Around)
    learn.train(2)
    assert identical(learn.model.state_dict(), by_hand(torch.bfloat16)[0].state_dict())


class NoStep(Learner):
    def train_batch(self):
        self.act("prepare", "predict", "loss", "backward")
        self.optimiser.step()
        self.optimiser.zero_grad()


class NoBackward(Learner):
    def train_batch(self):
        self.act("prepare", "predict", "loss")
        self.loss.backward()
        self.act("step")


def double(): return net().double()
def half_model(): return net().half()


class Rnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 5)
    def forward(self, x): return self.out(self.rnn(x[:, 0])[0][:, -1])


def _lstm():
    from learner.steer.precision import _has_lstm
    return _has_lstm(torch.device("cpu"), torch.float16)


def train(*callbacks, **options): learner(*callbacks, **options).train(1)


BAD = {  # what is wrong: how it is said
    "name": (lambda: MixedPrecision("bf16"), 'dtype is \'bf16\'; it must be "bfloat16" or "float16"; did you mean bfloat16?'),
    "dtype": (lambda: MixedPrecision(torch.float32), 'dtype is torch.float32; it must be "bfloat16" or "float16"'),
    "nothing": (lambda: MixedPrecision(None), 'dtype is None; it must be "bfloat16" or "float16"'),
    "list": (lambda: MixedPrecision([]), 'dtype is []; it must be "bfloat16" or "float16"'),
    "scaler": (lambda: MixedPrecision("float16", 1024), "scaler is 1024; pass a torch.amp.GradScaler, or None for a new one"),
    "needless scaler": (lambda: MixedPrecision("bfloat16", scaler()),
                        "scaler: bfloat16 has the range of float32 and needs none; leave it out"),
    "float64": (lambda: train(MixedPrecision(), model=double(), loaders={"train": []} | {"train": batches()}),
                "MixedPrecision: the model is in float64, which autocast leaves as it is; call model.float()"),
    "float16 weights": (lambda: train(MixedPrecision("float16"), model=half_model()),
                        "MixedPrecision: the model has weights in float16, too coarse for steps; call model.float(), "
                        "and autocast uses 16 bits where that is safe"),
    "no device": (lambda: check_autocast(net(), torch.device("meta"), torch.bfloat16),
                  "MixedPrecision: there is no autocast on meta; leave it out there"),
    "no predict": (lambda: train(MixedPrecision(), cls=Around),
                   'MixedPrecision had no effect: train_batch opened neither predict nor loss; call self.act("predict", "loss"), or '
                   "hook your own stages in a subclass: around_generator = MixedPrecision.around_predict"),
    "no step": (lambda: train(MixedPrecision("float16"), cls=NoStep),
                "MixedPrecision.after_step is never called: the routine of NoStep changes the weights itself; "
                'call self.act("step") in place of optimiser.step(), or remove MixedPrecision("float16")'),
    "no backward": (lambda: train(MixedPrecision("float16"), cls=NoBackward),
                    "MixedPrecision: the step would divide gradients that were not scaled; "
                    'call self.act("backward") in place of loss.backward()'),
    "option": (lambda: Compile(dynamics=True), "Compile: torch.compile has no option dynamics, it has *; did you mean dynamic?"),
    "backend": (lambda: train(Compile(backend="inductr")),
                "Compile: there is no backend 'inductr'; it must be a function, or a name such as *; did you mean inductor?"),
    "compiled": (lambda: train(Compile(), model=torch.compile(net(), backend="eager")),
                 "Compile: learn.model is compiled already; leave the callback out, or give it a plain model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    action, said = BAD[name]
    with pytest.raises((ValueError, TypeError)) as caught: action()
    message, (start, _, end) = str(caught.value), said.partition("*")
    assert message.startswith(start) and message.endswith(end) and "\n" not in message
    assert "*" in said or message == said


def test_float16_without_lstm_is_said_before_training():
    learn = learner(MixedPrecision("float16"), model=Rnn())
    before = copy.deepcopy(learn.model.state_dict())
    if _lstm(): return learn.train(1)
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match='MixedPrecision: this processor cannot train an LSTM in float16; use "bfloat16"'): learn.train(1)
    assert identical(before, learn.model.state_dict()) and not len(learn.history)
    assert torch.equal(generator, torch.get_rng_state())
    train(MixedPrecision(), model=Rnn())


def test_it_can_come_and_go_in_a_run():
    half = MixedPrecision()
    class Later(Callback):
        def after_epoch(self, learn, epoch):
            if epoch == 0: learn.add(half)
            if epoch == 1: learn.remove(half)
    seen, learn = [], learner(Later())
    learn.on("after_predict", lambda learn: seen.append(learn.predictions.dtype))
    learn.train(3)
    assert seen == [torch.float32] * 5 + [torch.bfloat16] * 5 + [torch.float32] * 5


# Compile

def counter():
    graphs = []
    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward
    backend.graphs = graphs
    return backend


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x): return self.inner(x)


@pytest.mark.parametrize("make", [net, Wrapped])
def test_compiled_once_for_all_passes_and_runs(make):
    loaders = {"train": batches(), "validation": batches(2), "test": batches(2)}
    plain = learner(model=make(), loaders=loaders)
    backend = counter()
    learn = learner(Compile(backend=backend), model=make(), loaders=loaders)
    model, keys = learn.model, list(learn.model.state_dict())
    for _ in range(2):
        torch.manual_seed(2)
        learn.train(2)
        if _ == 0: first = len(backend.graphs)
        torch.manual_seed(2)
        plain.train(2)
    assert 2 <= first <= 4 and len(backend.graphs) == first  # a code for the smaller batch, one without gradients
    assert True in backend.graphs and False in backend.graphs
    assert learn.model is model and list(model.state_dict()) == keys and "_compiled_call_impl" not in vars(model)
    assert identical(model.state_dict(), plain.model.state_dict()) and learn.history.rows == plain.history.rows
    with learn.trial() as trial: trial.train(1)
    learn.validate()
    assert len(backend.graphs) == first


def test_it_is_in_use_while_a_pass_runs_and_copies_are_plain():
    learn, seen = learner(Compile(backend="eager")), []
    learn.on("after_predict", lambda model: seen.append((model._compiled_call_impl, copy.deepcopy(model)._compiled_call_impl)))
    learn.train(1)
    assert all(compiled is not None and its_copy is None for compiled, its_copy in seen) and len(seen) == 5


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, CancelTrainException, CancelBatchException])
def test_the_model_is_plain_after_any_end(kind):
    def fail(): raise kind
    for hook in ("before_batch", "after_predict", "before_step", "after_training"):
        learn = learner(Compile(backend="eager"), FunctionCallback(hook, fail))
        with suppress(KeyboardInterrupt, RuntimeError, ValueError): learn.train(1)
        assert "_compiled_call_impl" not in vars(learn.model)
    assert torch._dynamo.config.skip_nnmodule_hook_guards


def test_hooks_on_modules_that_come_later_are_called():
    learn, calls = learner(Compile(backend="eager")), []
    learn.train(1)
    handle = learn.model[1].register_forward_hook(lambda *args: calls.append(1))
    learn.train(1)
    assert len(calls) == 5
    handle.remove()
    learn.train(1)
    assert len(calls) == 5


def test_the_callback_does_not_keep_the_model():
    compile = Compile(backend="eager")
    learn = learner(compile)
    learn.train(1)
    model = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert model() is None


def test_compiled_in_mixed_precision():
    learn = learner(Compile(backend="eager"), MixedPrecision())
    learn.train(2)
    assert identical(learn.model.state_dict(), by_hand(torch.bfloat16)[0].state_dict())


def test_inductor():
    model = nn.Linear(3, 2)
    data = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 2
    start = copy.deepcopy(model)
    learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy, {"train": data}, Compile(), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        try: learn.train(1)
        except Exception as error:
            if "compiler" in str(error).lower() or "cxx" in type(error).__name__.lower(): pytest.skip("no C++ compiler")
            raise
    plain = Learner(start, torch.optim.SGD(start.parameters(), 0.1), F.cross_entropy, {"train": data}, device="cpu")
    plain.train(1)
    torch.testing.assert_close(model.state_dict(), start.state_dict())


# ChannelsLast

def formats(learn): return [p.stride() for p in learn.model.parameters()]


def test_channels_last_for_the_run_and_no_longer():
    model, loaders = net(), {"train": batches(), "validation": batches(2), "test": batches(2)}
    learn = learner(ChannelsLast(), loaders=loaders, model=model, optimiser=sgd(model))
    before, identities, seen = formats(learn), [*map(id, learn.model.parameters())], []
    def look(learn, model, optimiser):
        channels_last = [t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
                         for t in (learn.data, model[0].weight)]
        state = optimiser.state.get(model[0].weight, {}).get("momentum_buffer", model[0].weight)
        seen.append((*channels_last, state.stride() == model[0].weight.stride()))
    learn.on("after_predict", look)
    learn.train(2)
    learn.train(1)
    assert set(seen) == {(True, True, True)}
    assert formats(learn) == before and [*map(id, learn.model.parameters())] == identities
    assert all(value.stride() == p.stride() for p, state in learn.optimiser.state.items()
               for value in state.values() if value.shape == p.shape)
    model = net()
    plain = learner(loaders=loaders, model=model, optimiser=sgd(model))
    plain.train(2)
    plain.train(1)
    torch.testing.assert_close(learn.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-3)
    seen.clear()
    learn.validate()
    assert set(seen) == {(True, True, True)} and formats(learn) == before


@pytest.mark.filterwarnings("ignore:the routine of .* took no step")
def test_values_are_the_same_there_and_back():
    class Nothing(Learner):
        def train_batch(self): self.act("prepare")
    learn = learner(ChannelsLast(), cls=Nothing)
    before = copy.deepcopy(learn.model.state_dict())
    learn.train(1)
    assert identical(before, learn.model.state_dict())
    model = net().to(memory_format=torch.channels_last)
    learn = learner(ChannelsLast(), model=model)
    strides = formats(learn)
    learn.train(1)
    assert formats(learn) == strides and model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_several_optimisers_by_name_keep_the_format_too():
    model = net()
    both = Optimisers(conv=torch.optim.Adam(model[0].parameters(), 0.001, fused=True), rest=sgd(model[1:]))
    learn = learner(ChannelsLast(), MixedPrecision("float16", scaler()), model=model, optimiser=both)
    state, seen = both["conv"].state, []
    learn.on("after_step", lambda model: seen.append(state[model[0].weight]["exp_avg"].stride() == model[0].weight.stride()))
    learn.train(1)
    learn.train(1)
    assert all(seen) and len(seen) == 10 and state[model[0].weight]["exp_avg"].is_contiguous()


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_fused_optimisers_with_it_and_without(name):
    model = net()
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimiser = getattr(torch.optim, name)(model.parameters(), lr=0.001, fused=True, **options)
    learn = learner(model=model, optimiser=optimiser)
    learn.train(1)
    learn.train(1, callbacks=ChannelsLast())
    learn.train(1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, CancelTrainException, CancelBatchException])
def test_the_format_is_put_back_after_any_end(kind):
    def fail(): raise kind
    for hook in ("before_epoch", "after_predict", "before_step", "after_epoch"):
        learn = learner(ChannelsLast(), FunctionCallback(hook, fail))
        before = formats(learn)
        with suppress(KeyboardInterrupt, RuntimeError, ValueError): learn.train(1)
        assert formats(learn) == before


def test_other_inputs_and_lazy_models_pass():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.LazyConv2d(4, 3), nn.LazyLinear(5)
        def forward(self, image, number): return self.out(torch.cat([self.conv(image).flatten(1), number], 1))
    data = [(x, torch.randn(len(x), 2), y) for x, y in batches()]
    model = Two()
    model(*data[0][:2])
    learner(ChannelsLast(), model=model, loaders={"train": data}).train(1)
    lazy = Two()
    Learner(lazy, torch.optim.SGD(lazy.parameters(), 0.1), F.cross_entropy, {"train": data}, ChannelsLast(), "cpu").train(1)


def test_all_three_together():
    half = MixedPrecision("float16", scaler())
    model = net()
    learn = learner(ChannelsLast(), Compile(backend="eager"), half, Clip(0.5), Every(2), model=model, optimiser=sgd(model))
    learn.train(8)
    its = scaler()
    plain, *_ = by_hand(torch.float16, its, 8, clip=0.5, every=2, make=sgd)
    assert half.state_dict() == its.state_dict()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0.01, atol=0.01)
    assert learn.history["train_loss"][-1] < learn.history["train_loss"][0]


# On a GPU

@gpu
@pytest.mark.parametrize("dtype", HALF)
def test_on_a_gpu(dtype):
    torch.backends.cudnn.deterministic = True
    its = torch.amp.GradScaler("cuda", init_scale=2.0 ** 10, growth_interval=3) if dtype == "float16" else None
    model, *_ = by_hand(HALF[dtype], its, 4, clip=0.5, spoil=(4,) if its else (), device="cuda")
    half = MixedPrecision(dtype, scaler(device="cuda") if its else None)
    learn = learner(half, Clip(0.5), Spoil(4) if its else Count(), device="cuda")
    learn.train(4)
    torch.testing.assert_close(learn.model.state_dict(), model.state_dict())
    if its: assert half.state_dict() == its.state_dict()
    assert switch("cuda")[0] is False


@gpu
def test_all_on_a_gpu():
    learn = learner(MixedPrecision("float16"), ChannelsLast(), Compile(), device="cuda")
    learn.train(8)
    assert learn.history["train_loss"][-1] < 0.5 * learn.history["train_loss"][0]
