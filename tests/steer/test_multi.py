"""Several optimisers as one: against plain loops, over every optimiser of PyTorch, and what is refused."""
import gc
import inspect
import pickle
import weakref
from copy import copy, deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, lr_scheduler

from learner.base.parts import is_optimiser
from learner.base.provenance import rng_state, set_rng_state
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CallbackError, CancelBatchException, CancelStepException, Stage
from learner.steer.multi import Optimisers, check_optimisers


def networks(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({
        "generator": nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)),
        "discriminator": nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1)),
    })


def adams(model):
    return Optimisers(generator=Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
                      discriminator=Adam(model.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.99)))


def real_batches(count=5, ragged=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ragged if i + 1 == count else 8, 8, generator=generator) for i in range(count)]


class GAN(Learner):
    stages = (*Learner.stages, Stage("discriminator", "batch", leaves="discriminator_loss", follows="prepare"),
              Stage("generator", "batch", leaves="generator_loss", follows="discriminator"))

    def train_batch(self):
        self.act("prepare")
        drawn, judge = self.model.generator(torch.randn(len(self.data), 4)), self.model.discriminator
        with self.stage("discriminator"):
            self.discriminator_loss = F.softplus(-judge(self.data)).mean() + F.softplus(judge(drawn.detach())).mean()
            self.discriminator_loss.backward()
        with self.stage("generator"):
            self.generator_loss = F.softplus(-judge(drawn)).mean()
            self.generator_loss.backward(inputs=[*self.model.generator.parameters()])
        self.act("step")
        return {"discriminator_loss": self.discriminator_loss, "generator_loss": self.generator_loss}


class DiscriminatorFirst(Callback):
    def after_discriminator(self, optimiser):
        optimiser.discriminator.step()
        optimiser.discriminator.zero_grad()


def gan(model=None, *callbacks, make=adams):
    model = networks() if model is None else model
    return GAN(model, make(model), None, {"train": real_batches()}, callbacks, device="cpu")


def by_hand(epochs, alternate=False, each_step=lambda adam_g, adam_d: (lambda: None)):
    "Neither learner nor Optimisers: the loop that everybody writes. Returns networks, losses by epoch, optimisers."
    model = networks()
    g, d = model.generator, model.discriminator
    adam_g = Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.99))
    adam_d = Adam(d.parameters(), lr=2e-3, betas=(0.5, 0.99))
    after_step, losses = each_step(adam_g, adam_d), []
    for _ in range(epochs):
        total_g = total_d = count = 0
        for real in real_batches():
            drawn = g(torch.randn(len(real), 4))
            loss_d = F.softplus(-d(real)).mean() + F.softplus(d(drawn.detach())).mean()
            loss_d.backward()
            if alternate:
                adam_d.step()
                adam_d.zero_grad()
            loss_g = F.softplus(-d(drawn)).mean()
            loss_g.backward(inputs=list(g.parameters()))
            adam_g.step()
            if not alternate: adam_d.step()
            adam_g.zero_grad()
            adam_d.zero_grad()
            after_step()
            total_g, total_d = total_g + loss_g.item() * len(real), total_d + loss_d.item() * len(real)
            count += len(real)
        losses.append((total_g / count, total_d / count))
    return model, losses, (adam_g, adam_d)


def tensors(tree):
    "Every tensor and number of a nested state, in order."
    if isinstance(tree, dict): return [leaf for key in tree for leaf in tensors(tree[key])]
    if isinstance(tree, (list, tuple)): return [leaf for item in tree for leaf in tensors(item)]
    return [tree]


def equal(one, other):
    one, other = tensors(one), tensors(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def same_weights(one, other): return equal(dict(one.state_dict()), dict(other.state_dict()))


# The loop by hand

@pytest.mark.parametrize("alternate", [False, True])
def test_a_gan_is_bit_identical_to_the_loop_by_hand(alternate):
    learn = gan(None, *[DiscriminatorFirst()] * alternate)
    learn.train(3)
    model, losses, (adam_g, adam_d) = by_hand(3, alternate)
    for name in ("generator", "discriminator"): assert same_weights(learn.model[name], model[name])
    assert equal(learn.optimiser.generator.state_dict()["state"], adam_g.state_dict()["state"])
    assert equal(learn.optimiser.discriminator.state_dict()["state"], adam_d.state_dict()["state"])
    for row, (loss_g, loss_d) in zip(learn.history, losses, strict=True):  # weighted by batch size, the last is ragged
        assert row["train_generator_loss"] == pytest.approx(loss_g, abs=1e-7)
        assert row["train_discriminator_loss"] == pytest.approx(loss_d, abs=1e-7)


def test_the_two_orders_differ():
    assert not same_weights(by_hand(3, True)[0], by_hand(3, False)[0])


def test_two_optimisers_of_one_model_are_two_groups_of_one():
    def parts(model): return model[0].parameters(), model[2].parameters()

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    batches = [(torch.randn(4, 8).double(), torch.randint(3, (4,))) for _ in range(6)]
    one, other = model(), model()
    body, head = parts(one)
    Learner(one, Optimisers(body=SGD(body, lr=0.1, momentum=0.9), head=SGD(head, lr=0.3, momentum=0.9)),
            F.cross_entropy, {"train": batches}).train(4)
    body, head = parts(other)
    groups = SGD([{"params": body, "lr": 0.1}, {"params": head, "lr": 0.3}], momentum=0.9)
    Learner(other, groups, F.cross_entropy, {"train": batches}).train(4)
    assert same_weights(one, other)


# One step a batch

@pytest.mark.parametrize("alternate", [False, True])
def test_a_batch_is_one_step(alternate):
    counts = dict.fromkeys(["after_step", "after_batch", "after_generator", "after_discriminator"], 0)
    learn = gan(None, *[DiscriminatorFirst()] * alternate)
    def counter(hook): return lambda: counts.update({hook: counts[hook] + 1})
    for hook in counts: learn.on(hook, counter(hook))
    learn.train(3)
    assert set(counts.values()) == {15}
    for optimiser in learn.optimiser.values():
        assert {int(state["step"]) for state in optimiser.state_dict()["state"].values()} == {15}


@pytest.mark.parametrize("alternate", [False, True])
def test_torch_schedulers_on_each_are_those_stepped_by_hand(alternate):
    def schedules(adam_g, adam_d):
        made = [lr_scheduler.OneCycleLR(adam_g, 0.01, total_steps=15), lr_scheduler.StepLR(adam_d, 4, 0.5)]
        return lambda: [schedule.step() for schedule in made]

    rates = []
    learn = gan(None, *[DiscriminatorFirst()] * alternate)
    step = schedules(learn.optimiser.generator, learn.optimiser.discriminator)
    learn.on("after_step", lambda: step())
    learn.on("after_batch", lambda optimiser: rates.append([group["lr"] for group in optimiser.param_groups]))
    learn.train(3)

    expected = []
    def noted(adam_g, adam_d):
        step = schedules(adam_g, adam_d)
        return lambda: (step(), expected.append([adam_g.param_groups[0]["lr"], adam_d.param_groups[0]["lr"]]))
    model, _, _ = by_hand(3, alternate, noted)
    assert rates == expected and len({rate for rate, _ in rates}) == 15
    assert same_weights(learn.model, model)


def test_a_scheduler_on_one_leaves_the_other_alone():
    learn = gan()
    schedule = lr_scheduler.ExponentialLR(learn.optimiser.discriminator, 0.5)
    learn.on("after_step", lambda: schedule.step())
    learn.train(1)
    assert [group["lr"] for group in learn.optimiser.param_groups] == [1e-3, 2e-3 * 0.5 ** 5]


def test_a_step_that_is_left_out_is_left_out_of_both_and_gradients_add_up():
    class EverySecond(Callback):
        def before_step(self, batch_num):
            if batch_num % 2 == 0: raise CancelStepException

    steps, gradients = [], []
    class Watch(Callback):
        def before_batch(self, model): gradients.append([p.grad is not None for p in model.parameters()])
        def after_step(self, batch_num): steps.append(batch_num)

    learn = gan(None, EverySecond(), Watch())
    learn.train(1)
    assert steps == [1, 3]
    assert [all(row) for row in gradients] == [False, True, False, True, False] and not any(gradients[2])
    assert {int(s["step"]) for o in learn.optimiser.values() for s in o.state_dict()["state"].values()} == {2}


def test_a_cancelled_batch_leaves_no_gradients_in_either():
    class Stop(Callback):
        def after_generator(self, generator_loss, discriminator_loss): raise CancelBatchException
    learn, before = gan(None, Stop()), networks()
    learn.train(1)
    assert all(p.grad is None for p in learn.model.parameters())
    assert equal([*learn.model.parameters()], [*before.parameters()])


def test_a_gradient_scaler_takes_them_as_one():
    torch.manual_seed(0)
    data = torch.randn(6, 8)
    outcomes = []
    for together in (True, False):
        model = networks()
        optimisers, scaler = adams(model), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for i in range(4):
            torch.manual_seed(i)
            loss = model.discriminator(data).mean() + model.generator(data[:, :4]).square().mean()
            scaler.scale(loss * (float("inf") if i == 1 else 1.0)).backward()
            for optimiser in [optimisers] if together else optimisers.values(): scaler.step(optimiser)
            scaler.update()
            optimisers.zero_grad()
        outcomes.append(([*model.parameters()], scaler.state_dict()))
    assert equal(*outcomes)


def test_clipping_sees_the_gradients_of_both():
    norms = []
    class Clip(Callback):
        def before_step(self, optimiser):
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            norms.append((len(parameters), nn.utils.clip_grad_norm_(parameters, 0.1)))
    learn = gan(None, Clip())
    learn.train(1)
    assert [count for count, _ in norms] == [len(list(learn.model.parameters()))] * 5


# Hooks and fixtures of the stages

def test_hooks_of_the_stages_get_their_losses_by_name():
    seen = []
    class Losses(Callback):
        def after_discriminator(self, discriminator_loss): seen.append(("d", discriminator_loss.item()))
        def before_generator(self, discriminator_loss): seen.append(("before", discriminator_loss.item()))
        def after_generator(self, generator_loss): seen.append(("g", generator_loss.item()))
        def before_step(self, generator_loss): seen.append(("step", generator_loss.item()))
    learn = gan(None, Losses())
    learn.train(1)
    assert [what for what, _ in seen[:4]] == ["d", "before", "g", "step"]
    assert seen[0][1] == seen[1][1] and seen[2][1] == seen[3][1]
    assert not {"generator_loss", "discriminator_loss"} & vars(learn).keys()


@pytest.mark.parametrize("hook, fixture, said", [
    ("before_discriminator", "generator_loss", "lives from after_generator to the end of a batch"),
    ("before_generator", "generator_los", "did you mean generator_loss?"),
    ("after_genrator", "learn", "did you mean after_generator?"),
])
def test_a_hook_that_cannot_work_is_refused(hook, fixture, said):
    with pytest.raises(CallbackError, match=said.replace("?", r"\?")):
        gan().on(hook, eval(f"lambda {fixture}: None"))


# State

def test_the_state_goes_round():
    learn = gan()
    learn.train(2)
    state = deepcopy(learn.optimiser.state_dict())
    fresh = adams(networks(3))
    fresh.load_state_dict(state)
    assert equal(fresh.state_dict(), state)
    assert state["generator"]["param_groups"][0]["lr"] == 1e-3


def test_the_state_of_one_is_that_of_the_optimiser_itself():
    learn = gan()
    learn.train(1)
    for name in ("generator", "discriminator"):
        assert equal(learn.optimiser.state_dict()[name], learn.optimiser[name].state_dict())
        other = Adam(networks()[name].parameters())
        other.load_state_dict(learn.optimiser.state_dict()[name])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = gan()
    whole.train(4)
    first = gan()
    first.train(2)
    torch.save({"model": first.model.state_dict(), "optimiser": first.optimiser.state_dict()}, tmp_path / "state.pt")
    random = rng_state()
    second = gan(networks(5))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.model.load_state_dict(state["model"])
    second.optimiser.load_state_dict(state["optimiser"])
    set_rng_state(random)
    second.train(2)
    assert same_weights(second.model, whole.model)
    assert equal(second.optimiser.state_dict(), whole.optimiser.state_dict())
    assert second.history.rows[-1]["train_generator_loss"] == whole.history.rows[-1]["train_generator_loss"]


@pytest.mark.parametrize("state, said", [
    ({}, "the state is of []"),
    ({"generator": {}}, "the state is of ['generator']"),
    ({"generator": {}, "critic": {}}, "and the optimisers are ['generator', 'discriminator']"),
    ([1], "the state is of list"),
    (None, "the state is of NoneType"),
    ({"generator": "fits", "discriminator": {"state": {}, "param_groups": []}}, "the state of discriminator does not fit"),
    ({"generator": {}, "discriminator": "fits"}, "the state of generator does not fit"),
])
def test_a_state_that_does_not_fit_changes_nothing(state, said):
    learn, donor = gan(), gan()
    learn.train(1)
    donor.train(2)
    if isinstance(state, dict):
        state = {name: donor.optimiser[name].state_dict() if part == "fits" else part for name, part in state.items()}
    before = deepcopy(learn.optimiser.state_dict())
    with pytest.raises(ValueError) as raised: learn.optimiser.load_state_dict(state)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert equal(learn.optimiser.state_dict(), before)


# Copies

def test_a_copy_with_the_model_keeps_the_tie():
    learn = gan()
    learn.train(1)
    twin = deepcopy(learn)
    own = {id(p) for p in twin.model.parameters()}
    assert own == {id(p) for group in twin.optimiser.param_groups for p in group["params"]}
    assert not own & {id(p) for p in learn.model.parameters()}
    random = rng_state()
    learn.train(1)
    set_rng_state(random)
    twin.train(1)
    assert same_weights(twin.model, learn.model) and equal(twin.optimiser.state_dict(), learn.optimiser.state_dict())


def test_a_trial_leaves_no_trace():
    learn = gan()
    learn.train(1)
    weights, state, random = deepcopy(learn.model.state_dict()), deepcopy(learn.optimiser.state_dict()), rng_state()
    with learn.trial() as trial:
        trial.optimiser.generator.param_groups[0]["lr"] = 1.0
        trial.train(2)
        assert not equal(dict(trial.model.state_dict()), dict(weights))
    assert equal(dict(learn.model.state_dict()), dict(weights)) and equal(learn.optimiser.state_dict(), state)
    assert torch.equal(rng_state()["torch"], random["torch"])


def test_a_trial_while_a_scheduler_has_its_wrapper_around_step():
    learn = gan()
    lr_scheduler.StepLR(learn.optimiser.generator, 1)
    state = deepcopy(learn.optimiser.state_dict())
    with learn.trial() as trial: trial.train(1)
    assert equal(learn.optimiser.state_dict(), state)


@pytest.mark.parametrize("duplicate", [deepcopy, copy, lambda value: pickle.loads(pickle.dumps(value))])
def test_it_can_be_copied_and_pickled(duplicate):
    learn = gan()
    learn.train(1)
    twin = duplicate(learn.optimiser)
    assert type(twin) is Optimisers and [*twin] == ["generator", "discriminator"]
    assert equal(twin.state_dict(), learn.optimiser.state_dict())
    twin.zero_grad()
    twin.step()


def test_a_learner_with_it_can_be_pickled():
    learn = Learner(model := networks().discriminator, Optimisers(all=Adam(model.parameters())), F.mse_loss,
                    {"train": [(torch.randn(4, 8), torch.randn(4, 1))]})
    learn.train(1)
    twin = pickle.loads(pickle.dumps(learn))
    assert {id(p) for p in twin.model.parameters()} == {id(p) for g in twin.optimiser.param_groups for p in g["params"]}


def test_it_keeps_nothing_alive():
    learn = gan()
    learn.train(1)
    optimiser, model = weakref.ref(learn.optimiser), weakref.ref(learn.model)
    gc.disable()
    try:
        del learn
        assert optimiser() is None and model() is None
    finally: gc.enable()


# Groups, names, rates

def test_groups_are_the_real_ones_and_know_their_optimiser():
    model = networks()
    body, head = model.generator[0], model.generator[3]
    optimisers = Optimisers(one=SGD([{"params": body.parameters(), "name": "body"}, {"params": head.parameters()}], lr=0.1),
                            two=Adam(model.discriminator.parameters()))
    groups = optimisers.param_groups
    assert [group["optimiser"] for group in groups] == ["one", "one", "two"] and groups[0]["name"] == "body"
    assert groups[0] is optimisers.one.param_groups[0] and groups[2] is optimisers.two.param_groups[0]
    optimisers.one.add_param_group({"params": model.generator[1].parameters()})
    assert [group["optimiser"] for group in optimisers.param_groups] == ["one", "one", "one", "two"]


def test_a_rate_given_to_train_is_the_highest_and_the_others_keep_their_proportion():
    learn = gan()
    learn.train(1, learning_rate=0.5)
    assert {group["optimiser"]: group["lr"] for group in learn.optimiser.param_groups} == {"generator": 0.25, "discriminator": 0.5}


def test_it_is_an_optimiser_and_a_mapping():
    optimisers = adams(networks())
    assert is_optimiser(optimisers) and not is_optimiser(Optimisers)
    assert len(optimisers) == 2 and "generator" in optimisers and optimisers["generator"] is optimisers.generator
    assert {**optimisers} == optimisers and {"generator", "step"} <= set(dir(optimisers))
    with pytest.raises(KeyError): optimisers["critic"]


def test_it_says_what_it_holds():
    model = networks()
    optimisers = Optimisers(generator=SGD([{"params": model.generator[0].parameters()},
                                           {"params": model.generator[3].parameters(), "lr": 0.2}], lr=0.1),
                            lazy=SGD(nn.LazyLinear(2).parameters(), lr=torch.tensor(0.5)),
                            single=SGD([nn.Parameter(torch.zeros(1))], lr=1e-4))
    assert repr(optimisers) == ("Optimisers\n  generator  SGD, 216 parameters, lr 0.1 and 0.2\n"
                                "  lazy       SGD, 0 parameters, lr 0.5\n  single     SGD, 1 parameter, lr 0.0001")
    assert "optimiser: Optimisers" in repr(gan())


def test_setting_and_dropping_gradients():
    model = networks()
    optimisers = adams(model)
    model.discriminator(torch.randn(3, 8)).sum().backward()
    optimisers.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in model.discriminator.parameters())
    optimisers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


class Plain:
    "An optimiser that knows nothing of PyTorch's."
    def __init__(self, parameters, rate): self.param_groups = [{"params": list(parameters), "rate": rate}]
    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]: parameter.grad = None
    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]: parameter -= self.param_groups[0]["rate"] * parameter.grad


def test_anything_that_steps_will_do():
    model = networks()
    weight = model.discriminator[0].weight
    optimisers = Optimisers(plain=Plain([weight], 0.5), torch=SGD([model.discriminator[3].weight], lr=0.1))
    before = weight.detach().clone()
    model.eval().discriminator(torch.randn(3, 8)).sum().backward()
    gradient = weight.grad.clone()
    optimisers.step()
    optimisers.zero_grad()
    assert torch.equal(weight, before - 0.5 * gradient) and weight.grad is None
    assert repr(optimisers).splitlines()[1] == "  plain  Plain, 128 parameters"


CLASSES = sorted((cls for cls in vars(torch.optim).values() if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
                  and cls is not torch.optim.Optimizer and cls is not LBFGS), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_optimiser_passes_over_parameters_without_gradients(cls):
    "What the notebook promises of a second `step` in a batch."
    sparse = cls.__name__ == "SparseAdam"
    table = nn.Embedding(5, 3, sparse=sparse)
    optimisers = Optimisers(tested=cls(table.parameters(), lr=0.1), other=SGD([nn.Parameter(torch.zeros(1))], lr=1))
    table(torch.tensor([1, 2])).square().sum().backward()
    optimisers.step()
    optimisers.zero_grad()
    weight, state = table.weight.detach().clone(), deepcopy(optimisers.state_dict())
    optimisers.step()
    assert torch.equal(table.weight, weight) and equal(optimisers.state_dict(), state)


# What is refused

NET = networks()


def sgd(part): return SGD(part.parameters(), lr=0.1)


BAD = [
    ({}, ValueError, "Optimisers() holds no optimiser; give it one for each part of the model, as in Optimisers(generator=Adam(model.generator.parameters()))"),
    ({"generator": Adam}, TypeError, "Optimisers: generator is <class 'torch.optim.adam.Adam'>, which is not an optimiser; make it first: Adam(model.generator.parameters())"),
    ({"generator": None}, TypeError, "Optimisers: generator is None, which is not an optimiser"),
    ({"generator": 0.1}, TypeError, "Optimisers: generator is 0.1, which is not an optimiser"),
    ({"": sgd(NET.generator)}, ValueError, "Optimisers: '' cannot be a name; use letters, digits and _, as in generator"),
    ({"my net": sgd(NET.generator)}, ValueError, "Optimisers: 'my net' cannot be a name; use letters, digits and _, as in generator"),
    ({"0": sgd(NET.generator)}, ValueError, "Optimisers: '0' cannot be a name; use letters, digits and _, as in generator"),
    ({"class": sgd(NET.generator)}, ValueError, "Optimisers: 'class' cannot be a name; use letters, digits and _, as in generator"),
    ({"_named": sgd(NET.generator)}, ValueError, "Optimisers: '_named' cannot be a name; use letters, digits and _, as in generator"),
    *(({name: sgd(NET.generator)}, ValueError, f"Optimisers: {name} is an attribute that every Optimisers has; use another name")
      for name in ("step", "zero_grad", "param_groups", "state_dict", "load_state_dict", "items", "get")),
    ({"a": sgd(NET.generator), "b": sgd(NET)}, ValueError, "Optimisers: a parameter of shape (16, 4) is in both a and b; give it to one"),
    ({"a": (one := sgd(NET.generator)), "b": one}, ValueError, "Optimisers: a parameter of shape (16, 4) is in both a and b; give it to one"),
    ({"a": (lazy := sgd(nn.LazyLinear(2))), "b": lazy}, ValueError, "Optimisers: a parameter is in both a and b; give it to one"),
    ({"both": adams(NET)}, TypeError, "Optimisers: both is an Optimisers itself; give its optimisers one by one, as **both"),
]


@pytest.mark.parametrize("named, kind, said", BAD)
def test_bad_input_gets_one_line(named, kind, said):
    for attempt in (lambda: Optimisers(**named), lambda: check_optimisers(named)):
        with pytest.raises(kind) as raised: attempt()
        assert str(raised.value) == said


@pytest.mark.parametrize("name, value, kind, said", [
    ("generator", Adam, TypeError, "generator is <class"),
    ("generator", sgd(NET.discriminator), ValueError, "in both generator and discriminator"),
    ("generater", sgd(NET.generator), ValueError, "in both generator and generater"),
    ("step", sgd(nn.Linear(2, 2)), ValueError, "step is an attribute"),
])
def test_a_bad_replacement_changes_nothing(name, value, kind, said):
    optimisers = Optimisers(generator=sgd(NET.generator), discriminator=sgd(NET.discriminator))
    before = dict(optimisers)
    with pytest.raises(kind, match=said): setattr(optimisers, name, value)
    assert dict(optimisers) == before


def test_an_optimiser_can_be_replaced_and_added():
    optimisers = Optimisers(generator=sgd(NET.generator))
    optimisers.generator = new = AdamW(NET.generator.parameters())
    optimisers.discriminator = sgd(NET.discriminator)
    assert optimisers["generator"] is new and [*optimisers] == ["generator", "discriminator"]
    assert len(optimisers.param_groups) == 2


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError) as raised: getattr(adams(NET), "generater")  # noqa: B009
    assert str(raised.value) == "Optimisers has no generater; it holds generator, discriminator; did you mean generator?"


def test_optimisers_of_another_model_are_refused_by_the_learner():
    with pytest.raises(ValueError, match="Optimisers holds no parameter of the model"):
        Learner(networks(), adams(NET), None, {"train": real_batches()})


def test_one_that_needs_a_closure_is_told_before_any_step():
    model = networks().discriminator
    optimisers = Optimisers(first=SGD(model[0].parameters(), lr=0.1), second=LBFGS(model[3].parameters()))
    learn = Learner(model, optimisers, F.mse_loss, {"train": [(torch.randn(4, 8), torch.randn(4, 1))]})
    before = deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="second is LBFGS, whose step needs a closure; override step"): learn.train(1)
    assert equal(dict(model.state_dict()), dict(before))

    class WithClosure(Learner):
        def step(self):
            self.optimiser.first.step()
            def closure():
                self.optimiser.zero_grad()
                loss = self.loss_func(self.model(self.data), self.labels)
                loss.backward()
                return loss
            self.optimiser.second.step(closure)
            self.optimiser.zero_grad()
    learn = WithClosure(model.eval(), optimisers, F.mse_loss, learn.dataloaders)
    learn.train(5)
    assert learn.history[-1]["train_loss"] < learn.history[0]["train_loss"]


class WithModes(SGD):
    "Trains at one place and is evaluated at another, as optimisers without a schedule do."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.told = []
    def train(self): self.told.append("train")
    def eval(self): self.told.append("eval")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.filterwarnings("ignore:.*in no group of the optimiser")
def test_optimisers_that_have_modes_are_told_before_each_pass(several):
    model = networks()
    one, other = WithModes(model.generator.parameters(), lr=0.1), Adam(model.discriminator.parameters())
    class Plain(Learner):
        def predict(self): self.predictions = self.model.discriminator(self.data)
    data = [(x, torch.zeros(len(x), 1)) for x in real_batches()]
    learn = Plain(model, Optimisers(one=one, other=other) if several else one, F.mse_loss, {"train": data, "validation": data, "test": data}, device="cpu")
    seen = []
    for stage in ("training", "validation", "test"): learn.on(f"before_{stage}", lambda: seen.append(one.told[-1]))
    if not several: learn.model.requires_grad_(True)
    learn.train(2)
    learn.validate()
    assert seen == ["train", "eval"] * 2 + ["eval"] * 2 and one.told == ["train", "eval"] * 2 + ["eval"] * 2
