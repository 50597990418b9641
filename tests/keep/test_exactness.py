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


def interrupted(row, hook, way, folder):
    "A learner that was stopped at a hook, and another or the same that has gone on; None if there was nothing to go on with."
    n = CALLS.get(hook.partition("_")[2], 13)
    stop = Press(hook, n=n) if way == "process" else Fail(hook, n)
    kept = {"file": [Checkpoint(folder, steps=1, keep=1, best=None)], "process": [], "rewind": [Rewind(2)]}[way]
    learn = make(row, stop, *kept)
    try: train(learn, row)
    except (KeyboardInterrupt, RuntimeError): pass
    else: return learn  # it was not called that often
    learn.remove(stop)
    if way == "file":
        if Checkpoint.latest(folder) is None: return None
        learn = make(row, seed=9)
    elif learn.cursor.saved is None: return learn if stop.left <= 0 and "all was done" else None
    seed_everything(8)
    train(learn, row, folder if way == "file" else True)
    return learn


def differs(row, hook, way, folder):
    "What is other than in the run that was never stopped; empty also if a warning said so beforehand."
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        whole = never_stopped(row)
        learn = interrupted(row, hook, way, folder)
    texts = {str(warning.message) for warning in told}
    if learn is None: return [], texts
    found = ending(learn)
    return [name for name in {**whole, **found} if whole.get(name) != found.get(name)], texts
