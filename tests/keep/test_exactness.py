"""Exact means exact: sixty configurations, stopped in every hook, go on to the same bits in three ways, or say beforehand that they do not."""
import itertools
import os
import random
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_resume import Fail, Press, outcome
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from learner.base.provenance import seed_everything
from learner.keep.checkpoint import Checkpoint
from learner.loop.data import DataLoaders, DatasetLoader
from learner.loop.learner import Learner
from learner.loop.resume import Rewind
from learner.loop.stages import Callback, CancelBatchException, CancelEpochException, CancelStepException
from learner.loop.state import ResumeError
from learner.loop.together import Together
from learner.steer.accumulate import Accumulate
from learner.steer.augment import Mixup
from learner.steer.freeze import FreezeUntil
from learner.steer.multi import Optimisers
from learner.steer.precision import MixedPrecision
from learner.steer.schedule import BatchSchedule, EpochSchedule
from learner.steer.stopping import EarlyStopping
from learner.steer.update import EMA, ClipGradients

LONG = os.environ.get("LEARNER_LONG") == "1"
EPOCHS, BATCHES = 2, 6  # of a training; in an epoch, the last of two examples


# ---------------------------------------------------------------------------------------------------- loaders

class Noisy(Dataset):
    "Rows that differ, with noise from all three sources of random numbers."

    def __init__(self, n): self.x, self.y = torch.arange(n * 4.0).reshape(n, 4) / (2 * n) - 1, torch.arange(n) % 3

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(4) * 0.1 + random.random() * 0.1 + float(np.random.rand()) * 0.1, self.y[i]


class Endless(IterableDataset):
    "The same in an order that is drawn when it begins."

    def __init__(self, n): self.dataset = Noisy(n)

    def __iter__(self): return (self.dataset[i] for i in torch.randperm(len(self.dataset)).tolist())


def batches(n):
    data = Noisy(n)
    return [(data.x[i:i + 4], data.y[i:i + 4]) for i in range(0, n, 4)]


def own(n): return DatasetLoader(Noisy(n), 4, shuffle=True, seed=n)


def tensors(n):
    data = Noisy(n)
    return DataLoaders.from_tensors((data.x, data.y), batch_size=4).train


def torchdata(n):
    from torchdata.stateful_dataloader import StatefulDataLoader
    return StatefulDataLoader(Noisy(n), 4, shuffle=True, num_workers=1, snapshot_every_n_steps=1)


LOADERS = {
    "list": batches,
    "torch": lambda n: DataLoader(Noisy(n), 4),
    "torch shuffled": lambda n: DataLoader(Noisy(n), 4, shuffle=True, generator=torch.Generator().manual_seed(n)),
    "torch with a worker": lambda n: DataLoader(Noisy(n), 4, shuffle=True, num_workers=1),
    "torchdata with a worker": torchdata,
    "tensors": tensors,
    "own with a worker": lambda n: DatasetLoader(Noisy(n), 4, shuffle=True, num_workers=1),
    "together": lambda n: Together("longest", first=own(n), second=tensors(n // 2)),
    "steps": lambda n: DataLoader(Noisy(n + 4), 4, shuffle=True),  # its end is within an epoch
    "iterable": lambda n: DataLoader(Endless(n), 4),
}
WORKERS = {name for name in LOADERS if "worker" in name}


def joined(learn):
    "Make one batch of the two that are read together."
    if isinstance(learn.batch, dict): learn.batch = tuple(map(torch.cat, zip(*learn.batch.values(), strict=True)))


# ---------------------------------------------------------------------------------------------------- models

class Noise(nn.Module):
    "Adds noise from a generator of its own, also in validations."

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    def forward(self, x): return x + 0.1 * torch.randn(x.shape, generator=self.generator)


class Drift(nn.Module):
    "Subtracts a mean of the past, which its state_dict leaves out."

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.zeros(8), persistent=False)

    def forward(self, x):
        if self.training: self.past.lerp_(x.detach().mean(0), 0.3)
        return x - self.past


def network(*middle): return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


MODELS = {
    "norm and dropout": lambda: network(nn.BatchNorm1d(8), nn.Dropout(0.3)),
    "lazy": lambda: nn.Sequential(nn.Linear(4, 8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3)),
    "generator": lambda: network(Noise()),
    "buffer": lambda: network(Drift(), nn.Dropout(0.3)),
    "bfloat16": lambda: network(nn.Dropout(0.3)),
    "float16": lambda: network(nn.BatchNorm1d(8)),
}
PRECISION = {"bfloat16": lambda: MixedPrecision("bfloat16"),
             "float16": lambda: MixedPrecision("float16", torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2))}


def two(model):
    "An optimiser for each half of a model."
    return Optimisers(body=SGD(model[:-1].parameters(), lr=0.05, momentum=0.9), head=AdamW(model[-1:].parameters(), lr=0.01))


OPTIMISERS = {"SGD": lambda model: partial(SGD, lr=0.05, momentum=0.9), "AdamW": lambda model: partial(AdamW, lr=0.01), "two": two}


# ---------------------------------------------------------------------------------------------------- callbacks

class Counts(Callback):
    "Counts batches of training, and the count changes the loss; its state holds it."
    hook = "after_loss"

    def __init__(self):
        self.n = 0
        setattr(self, self.hook, self.count)

    def count(self, learn):
        self.n += 1
        if learn.phase == "train": learn.loss = learn.loss * (1 + self.n / 50)

    def state_dict(self): return {"n": self.n}

    def load_state_dict(self, state): self.n = state["n"]


class CountsInValidation(Counts):
    "Counts the batches of all passes."

    def before_validation(self): self.n += 5


class Forgets(Callback):
    "Counts, and keeps no state: nobody could go on from it exactly."

    def __init__(self): self.n = 0

    def after_loss(self, learn):
        self.n += 1
        learn.loss = learn.loss * (1 + self.n / 50)


class Draws(Callback):
    "Draws from all three sources of random numbers, in set-up, training and validation."

    def before_train(self): self.draw()

    def after_loss(self, learn): learn.loss = learn.loss * self.draw()

    def before_validation(self): self.draw()

    def draw(self): return 1 + 0.1 * (float(torch.rand(())) + random.random() + float(np.random.rand()))


class OwnGenerator(Callback):
    "Draws from a generator of its own, and has no other state."

    def __init__(self): self.source = torch.Generator().manual_seed(torch.initial_seed())

    def after_loss(self, learn): learn.loss = learn.loss * (1 + 0.1 * torch.rand((), generator=self.source))


def function(learn):
    "A function for a hook, which remembers nothing."
    learn.loss = learn.loss * (1 + learn.epoch + learn.batch_num / 10)


USERS = {"state": Counts, "state in validation": CountsInValidation, "no state": Forgets, "draws": Draws,
         "own generator": OwnGenerator, "function": None}


class Cancels(Callback):
    "Cancels steps, batches or an epoch."
    priority = 100

    def __init__(self, what):
        if what == "step": self.before_step = self.leave_out_step
        if what == "batch": self.after_predict = self.leave_out_batch
        if what == "epoch": self.after_batch = self.leave_out_epoch

    def leave_out_step(self, batch_num):
        if batch_num in (1, 2, 5): raise CancelStepException  # the last one too, so that gradients go over into the next epoch

    def leave_out_batch(self, batch_num, phase):
        if batch_num == 1: raise CancelBatchException

    def leave_out_epoch(self, epoch, batch_num):
        if (epoch, batch_num) == (0, 3): raise CancelEpochException


def scheduled(kind, optimiser, steering):
    name, steps = "head" if optimiser == "two" else None, 3 if steering == "accumulate" else BATCHES
    if kind == "one cycle": return [BatchSchedule(partial(OneCycleLR, max_lr=0.05), name, steps_per_epoch=steps)]
    if kind == "cosine": return [BatchSchedule(partial(CosineAnnealingLR, T_max=9), name)]
    if kind == "plateau": return [EpochSchedule(partial(ReduceLROnPlateau, patience=0, threshold=0.9), optimiser=name)]
    return []


STEERING = {
    "clip": lambda: ClipGradients(0.5), "accumulate": lambda: Accumulate(2), "ema": lambda: EMA(0.9), "mixup": Mixup,
    "freeze": lambda: FreezeUntil(1, "0"), "stopping": lambda: EarlyStopping(patience=1, min_delta=0.1, restore_best=True),
}

FACTORS = {"loader": list(LOADERS), "steering": list(STEERING), "user": list(USERS), "model": list(MODELS),
           "schedule": ["none", "one cycle", "cosine", "plateau"], "cancels": ["none", "step", "batch", "epoch"], "optimiser": list(OPTIMISERS)}


@cache
def configurations():
    "Sixty, in which every level of a factor meets every level of each other factor."
    draw, found, open_pairs = random.Random(0), [], set(pairs_of_all())
    for loader in LOADERS:
        most = None
        for _ in range(400):
            columns = [[loader] * 6]
            for levels in [*FACTORS.values()][1:]:
                columns.append([*levels, *draw.choices(levels, k=6 - len(levels))])
                draw.shuffle(columns[-1])
            rows = [*zip(*columns, strict=True)]
            gain = len(open_pairs & {pair for row in rows for pair in pairs_of(row)})
            if most is None or gain > most[0]: most = gain, rows
        found += most[1]
        open_pairs -= {pair for row in most[1] for pair in pairs_of(row)}
    return found


def pairs_of(row): return {*itertools.combinations(enumerate(row), 2)}


def pairs_of_all():
    for (i, one), (j, other) in itertools.combinations(enumerate(FACTORS.values()), 2):
        yield from (((i, a), (j, b)) for a in one for b in other)


def test_sixty_configurations_cover_every_pair():
    rows = configurations()
    assert len(rows) == len(set(rows)) == 60
    missing = set(pairs_of_all()) - {pair for row in rows for pair in pairs_of(row)}
    assert missing == set()


# ---------------------------------------------------------------------------------------------------- stops

def make(row, *extra, seed=0):
    "A learner of a configuration, ready to train."
    loader, steering, user, model, schedule, cancels, optimiser = row
    seed_everything(seed)
    net = MODELS[model]()
    evaluation = own if loader in WORKERS else LOADERS[loader]  # one worker is enough for a test
    loaders = {"train": LOADERS[loader](22), "validation": evaluation(10), "test": evaluation(6)}
    users = [] if USERS[user] is None else [USERS[user]()]
    joining = [STEERING[steering](), *users, Cancels(cancels), *scheduled(schedule, optimiser, steering)]
    if model in PRECISION: joining.append(PRECISION[model]())
    learn = Learner(net, OPTIMISERS[optimiser](net), F.cross_entropy, loaders, joining, "cpu")
    learn.on("before_prepare", joined)
    if user == "function": learn.on("after_loss", lambda learn: function(learn))
    learn.history.keep_steps = True
    learn.add(*extra)
    return learn


def train(learn, row, resume=None):
    if row[0] != "steps": learn.train(EPOCHS, resume=resume)
    else: learn.train(steps=EPOCHS * BATCHES, validation_steps=BATCHES, resume=resume)


def ending(learn):
    "All in which two runs must agree."
    noise = [module.generator.get_state() for module in learn.model if isinstance(module, Noise)]
    own = [each.source.get_state() for each in learn.callbacks if isinstance(each, OwnGenerator)]
    more = {"noise": noise, "own": own, "epoch": learn.epoch}
    return outcome(learn) | {name: repr(value) if name == "epoch" else [each.tolist() for each in value] for name, value in more.items()}


@cache
def never_stopped(row):
    learn = make(row)
    train(learn, row)
    return ending(learn)


STAGES = [name for name, stage in Learner.tree.stages.items() if not stage.rare]
HOOKS = [f"{kind}_{name}" for name in STAGES for kind in ("before", "after", "cleanup")]
CALLS = {"train": 1, "test": 1, "epoch": 2, "training": 2, "validation": 2, "validation_batch": 4, "test_batch": 2, "batch": 9, "backward": 9, "step": 5}
WAYS = ("file", "process", "rewind")


class First(Callback):
    "Counts the warnings that came before the first batch."
    watches = True

    def __init__(self, told): self.told, self.count = told, None

    def before_any_batch(self):
        if self.count is None: self.count = len(self.told)


def interrupted(row, hook, way, folder, told):
    """A learner that was stopped at a hook, or another, when it has gone on, and how many warnings came before it went on.

    None for the learner if there was nothing to go on with."""
    n = CALLS.get(hook.partition("_")[2], 13)
    stop = Press(hook, n=n) if way == "process" else Fail(hook, n)
    kept = {"file": [Checkpoint(folder, steps=1, keep=1, best=None)], "process": [], "rewind": [Rewind(2)]}[way]
    learn = make(row, stop, *kept)
    try: train(learn, row)
    except (KeyboardInterrupt, RuntimeError): pass
    else: return learn, len(told)  # it was not called that often
    learn.remove(stop)
    if (Checkpoint.latest(folder) if way == "file" else learn.cursor.saved) is None: return None, len(told)
    if way == "file": learn = make(row, seed=9)
    learn.add(first := First(told))
    seed_everything(8)
    train(learn, row, folder if way == "file" else True)
    return learn, len(told) if first.count is None else first.count


NAMED = ("Forgets changes its attribute n in training and has no state_dict, so a training that is resumed would go on with another value",
         "the training loader resumes from its own state, and its workers start with other random numbers")
ELSEWHERE = ("'set_vital' is deprecated", "BatchSchedule")  # in torchdata; steps that are left out leave a schedule unfinished


def goes_on(row, hook, way, folder):
    "Assert that a training which is stopped at a hook ends as one that was not, or that a warning said beforehand that it would not."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole = never_stopped(row)
        learn, before = interrupted(row, hook, way, folder, told)
    texts = [str(warning.message) for warning in told]
    assert [text for text in texts if not text.startswith(NAMED + ELSEWHERE)] == []
    may = [row[2] == "no state", row[0] == "torchdata with a worker"]
    named = [any(text.startswith(name) for text in texts[:before]) for name in NAMED]
    assert all(maybe or not name for maybe, name in zip(may, named, strict=True))  # no false alarm
    if way == "file" and Checkpoint.latest(folder) is not None: assert named[0] == may[0]
    if learn is None or any(named): return
    found = ending(learn)
    assert [name for name in {**whole, **found} if whole.get(name) != found.get(name)] == []


def names_of(row): return " ".join(row).replace(" ", "_")


@pytest.mark.parametrize("number", range(60), ids=lambda number: names_of(configurations()[number]))
def test_a_training_that_is_stopped_ends_as_one_that_was_not_or_says_beforehand_that_it_will_not(tmp_path, number):
    goes_on(configurations()[number], HOOKS[number * 5 % len(HOOKS)], WAYS[number % 3], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(60), ids=lambda number: names_of(configurations()[number]))
def test_a_training_that_is_stopped_in_any_hook_ends_as_one_that_was_not_or_says_beforehand_that_it_will_not(tmp_path, number, way):
    for hook in HOOKS: goes_on(configurations()[number], hook, way, tmp_path / hook)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", ["after_train", "cleanup_train"])
def test_a_schedule_ends_as_it_would_have_when_the_last_hooks_of_a_training_fail(tmp_path, hook, way):
    goes_on(next(row for row in configurations() if "cosine" in row), hook, way, tmp_path)


def test_an_optimiser_whose_step_needs_a_closure_is_refused_before_anything_is_saved(tmp_path):
    learn = make(configurations()[0], Checkpoint(tmp_path / "run", steps=1))
    learn.optimiser = torch.optim.LBFGS(learn.model.parameters())
    learn.remove(*[each for each in learn.callbacks if isinstance(each, BatchSchedule | MixedPrecision)])
    with pytest.raises(TypeError, match="LBFGS.step needs a closure"): learn.train(1)
    assert Checkpoint.latest(tmp_path / "run") is None


# ---------------------------------------------------------------------------------------------------- what no state holds

def small(*extra, model=None, kind=Learner, loader=None):
    torch.manual_seed(0)
    data = batches(14)
    model = model or nn.Linear(4, 3)
    return kind(model, partial(SGD, lr=0.1), F.cross_entropy, {"train": loader or data, "validation": data[:2], "test": data[:2]}, extra, "cpu")


def told_by(learn, tmp_path, **options):
    "The warnings of a training with a Checkpoint."
    learn.add(Checkpoint(tmp_path / "run", steps=1, best=None))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        learn.train(2, **options)
    return [str(warning.message) for warning in told]


class Steps(nn.Module):
    "Counts in a plain attribute."

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return x * (1 + self.steps / 100)


class Saved(Steps):
    "The same, with a way to be saved."

    def get_extra_state(self): return {"steps": self.steps}

    def set_extra_state(self, state): self.steps = state["steps"]


class InValidation(nn.Module):
    "A buffer that changes in validations."

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if not self.training: self.seen += 1
        return x


class Pool(Learner):
    "Keeps loss values in an attribute."

    def __init__(self, *args):
        super().__init__(*args)
        self.pool, self.size = [], 9

    def compute_loss(self):
        super().compute_loss()
        self.pool.append(self.loss.item())


class Holds(Callback):
    "Keeps a value that a function changes."

    def __init__(self, value, change): self.value, self.change = value, change

    def after_batch(self): self.change(self.value)


def test_an_attribute_of_a_module_that_training_changes_is_named_once(tmp_path):
    told = told_by(small(model=nn.Sequential(Steps(), nn.Linear(4, 3))), tmp_path)
    assert told == ["model.0 changes its attribute steps in training, which no state holds, so a training that is resumed would go on with "
                    "another value; make it a buffer, or give the module get_extra_state() and set_extra_state()"]


def test_an_attribute_of_a_learner_that_training_changes_is_named_once(tmp_path):
    told = told_by(small(kind=Pool), tmp_path)
    assert told == ["Pool changes its attribute pool in training, which no state holds, so a training that is resumed would go on with "
                    "another value; keep it in a callback with state_dict() and load_state_dict()"]


class Rolling:
    "Batches in an order that a generator of Python draws."

    def __init__(self): self.draw, self.data = random.Random(0), batches(14)

    def __iter__(self): return iter(self.draw.sample(self.data, len(self.data)))


def test_a_loader_with_a_hidden_order_is_named_once_at_the_first_save_and_again_by_whoever_resumes(tmp_path):
    sentence = "Rolling holds a generator of Python's random (Rolling.draw), so resumed training would get different batches from it"
    told = told_by(small(loader=Rolling()), tmp_path)
    assert len(told) == 1 and told[0].startswith(sentence)
    learn = small(Fail("after_epoch"), loader=Rolling())
    with pytest.raises(RuntimeError): learn.train(2)  # nothing is saved, and nothing said
    with pytest.warns(UserWarning, match="Rolling holds a generator of Python's random"): learn.train(resume=True)


@pytest.mark.parametrize(("value", "change"), [
    ([], lambda it: it.append(1)), ({}, lambda it: it.update(a=len(it))), ({1: {2: [3]}}, lambda it: it[1][2].append(4)),
    (torch.zeros(3), lambda it: it.add_(1)), (np.zeros(3), lambda it: it.__iadd__(1)), (random.Random(0), lambda it: it.random()),
    (np.random.default_rng(0), lambda it: it.random()), (iter(range(99)), next), ((n for n in range(99)), next),
    (torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1), lambda it: it.param_groups[0].update(lr=it.param_groups[0]["lr"] / 2)),
], ids=lambda value: type(value).__name__)
def test_whatever_a_callback_changes_is_found(tmp_path, value, change):
    told = told_by(small(Holds(value, change)), tmp_path)
    assert len(told) == 1 and told[0].startswith("Holds changes its attribute value in training and has no state_dict, so")


@pytest.mark.parametrize("value", [[1, {2: "a"}], torch.ones(3), np.ones(3), nn.Linear(2, 2).requires_grad_(False), {3, 4}, float("nan"), None, len, random.Random(1), torch.Generator(), object()],
                         ids=lambda value: type(value).__name__)
def test_whatever_stays_as_it_is_raises_no_alarm(tmp_path, value):
    assert told_by(small(Holds(value, lambda it: None)), tmp_path) == []
    small_one = small(Holds(value, lambda it: None), Rewind(1), model=nn.Sequential(Saved(), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert told_by(small_one, tmp_path / "again") == []


def test_what_a_hook_leaves_for_the_next_one_raises_no_alarm(tmp_path):
    class Between(Callback):
        def before_step(self, learn): self.before, learn.left = 1 + getattr(self, "before", 0), object()
    assert told_by(small(Between()), tmp_path) == []


def test_a_buffer_that_changes_in_validation_is_named_where_a_validation_begins_again(tmp_path):
    learn = small(model=nn.Sequential(InValidation(), nn.Linear(4, 3)))
    learn.add(press := Press("after_validation_batch", n=1))
    with pytest.raises(KeyboardInterrupt): learn.train(2)
    learn.remove(press)
    with pytest.warns(UserWarning, match="model.0.seen is a buffer that changes in validation, and a training that is stopped there goes"):
        learn.train(resume=True)


def test_a_training_that_is_resumed_in_its_test_knows_its_epoch(tmp_path):
    learn, epochs = small(Fail("before_test_batch"), Checkpoint(tmp_path, best=None)), []
    with pytest.raises(RuntimeError): learn.train(3)
    fresh = small()
    fresh.on("before_test", lambda learn: epochs.append(learn.epoch))
    fresh.train(3, resume=tmp_path)
    assert epochs == [2]


def test_gradients_that_the_last_batch_of_an_epoch_leaves_are_in_its_checkpoint(tmp_path):
    whole, learn, fresh = (small(Cancels("step"), loader=batches(22)) for _ in range(3))
    whole.train(3)
    learn.on("after_epoch", lambda learn, epoch: learn.save(tmp_path / f"{epoch}.safetensors"), priority=5000)
    learn.train(2, test=False)
    fresh.train(3, resume=tmp_path / "1.safetensors")
    assert torch.equal(whole.model.weight, fresh.model.weight)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_lazy_model_goes_back_to_a_copy_in_memory(n):
    def lazy(*extra): return small(*extra, model=nn.Sequential(nn.LazyLinear(5), nn.Dropout(0.2), nn.LazyLinear(3)))
    whole = lazy()
    whole.train(2)
    learn = lazy(Rewind(5), Fail("after_backward", n))
    with pytest.raises(RuntimeError): learn.train(2)
    if n == 1:  # there was no model yet to be copied
        with pytest.warns(UserWarning, match="the batch that failed runs again, but the random numbers it drew"): learn.train(resume=True)
    else:
        learn.train(resume=True)
        assert all(map(torch.equal, whole.model.parameters(), learn.model.parameters()))


FORGED = {"no generators": ({"buffers": {}}, "the generators and buffers in the state are not mappings"),
          "a generator of text": ({"generators": {"model.1.generator": "x"}, "buffers": {}}, "the state of model.1.generator is not that of a generator"),
          "a short generator": ({"generators": {"model.1.generator": torch.zeros(3, dtype=torch.uint8)}, "buffers": {}}, "the state of model.1.generator is not that of a generator"),
          "a buffer of text": ({"generators": {}, "buffers": {"model.1.past": "x"}}, "model.1.past in the state is not a tensor")}


@pytest.mark.parametrize("name", FORGED)
def test_a_state_with_forged_generators_or_buffers_is_refused_and_changes_nothing(name):
    forged, message = FORGED[name]
    learn, other = (small(model=network(Noise())) for _ in range(2))
    with torch.no_grad(): other.model[0].weight.add_(1)
    state, before = other.state_dict(), learn.model[0].weight.clone()
    state["loop"]["hidden"] = forged
    with pytest.raises(ResumeError, match=message) as caught: learn.load_state_dict(state)
    assert "\n" not in str(caught.value) and torch.equal(learn.model[0].weight, before)
