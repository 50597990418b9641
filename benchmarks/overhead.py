"""What a training loop costs on a small step: microseconds per batch and the ratio to a plain loop.

Linear(16, 16)-ReLU-Linear(16, 10), batches of 32, SGD, ready batches in a list, one thread; with --width=4096 a step of
about half a millisecond. The rounds of all rows
alternate in one process, each run right after one of the plain loop, to which its ratio is; the medians are printed.
Callbacks that watch are compared with the same learner without them, in a table of their own; each callback that steers
is compared with a plain loop that does the same by hand. `WholeStep` is compared with the plain eager loop of the same
optimiser, on this net, on one of 256 hidden units and on a small CNN (--only=whole); its graphs are made before anything is
timed, and take a minute. Where others use the machine, --processor-time counts the time of the processor alone.
Output goes to a file. Peers that are installed are timed beside; those that are not are left out.
"""
import argparse
import contextlib
import importlib
import logging
import sys
import tempfile
import warnings
from functools import partial
from statistics import median
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import nn

from learner import Learner

WIDTH = 16  # hidden units
CLOCK = perf_counter


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.01)


def timed(run):
    def once():
        start = CLOCK()
        run()
        return CLOCK() - start
    return once


# Each row is a function of the batches that returns a function which trains one epoch and returns its seconds.

def plain(batches, make=net, optimiser=sgd, clip=False, schedule=False, average=False):
    "The loop by hand; what is asked for beside it is written into it as one would."
    model = make()
    optimiser = optimiser(model)
    parameters, decay = list(model.parameters()), 0.999
    if schedule: schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10**6)
    if average: averages = [parameter.detach().clone() for parameter in parameters]

    def run():
        model.train()
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if clip: nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if schedule: schedule.step()
            optimiser.zero_grad()
            if average:
                with torch.no_grad(): torch._foreach_lerp_(averages, parameters, 1 - decay)
    return timed(run)


def plain_shown(batches):
    from tqdm import tqdm
    model = net()
    optimiser = sgd(model)

    def run():
        total, correct, count = 0.0, 0, 0
        model.train()
        bar = tqdm(batches, file=sys.stdout)
        for x, y in bar:
            predictions = model(x)
            loss = F.cross_entropy(predictions, y)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            total += loss.item() * len(x)
            correct += (predictions.argmax(1) == y).sum().item()
            count += len(x)
            bar.set_postfix(loss=total / count, accuracy=correct / count, refresh=False)
    return timed(run)


def learner(batches, callbacks=()):
    model = net()
    learn = Learner(model, sgd(model), F.cross_entropy, {"train": batches}, callbacks)
    return timed(learn.train)


def learner_shown(batches): return learner(batches, shown())


WATCHERS = {  # callbacks by class: the module, and what to make of it
    "Recorder": ("watch.recorder", lambda module: module.Recorder("loss", "learning_rate")),
    "NaNGuard": ("check.nan_guard", lambda module: module.NaNGuard()),
    "ActivationStats": ("watch.activations", lambda module: module.ActivationStats()),
}


def there(table):
    "A row for each callback of a table."
    rows = {}
    for name, (module, make, *_) in table.items():
        found = importlib.import_module(f"learner.{module}")
        rows[f"Learner: {name}"] = partial(watched, make=partial(make, found))
    return rows


def watched(batches, make): return learner(batches, [make()])


def plain_accumulate(batches, n=4):
    model = net()
    optimiser = sgd(model)

    def run():
        model.train()
        for i, (x, y) in enumerate(batches, 1):
            loss = F.cross_entropy(model(x), y)
            (loss / n).backward()
            if i % n == 0 or i == len(batches):
                optimiser.step()
                optimiser.zero_grad()
    return timed(run)


STEERERS = {  # callbacks by class: the module, what to make of it, and the loop that does the same by hand
    "BatchSchedule": ("steer.schedule", lambda module: module.BatchSchedule(
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10**6)), partial(plain, schedule=True)),
    "ClipGradients": ("steer.update", lambda module: module.ClipGradients(1.0), partial(plain, clip=True)),
    "Accumulate": ("steer.accumulate", lambda module: module.Accumulate(4), plain_accumulate),
    "EMA": ("steer.update", lambda module: module.EMA(0.999), partial(plain, average=True)),
}


def steerers():
    "For each callback that steers and is there: a row, and the loop to compare it with."
    return {name: (row, STEERERS[name.removeprefix("Learner: ")][2]) for name, row in there(STEERERS).items()}


# The whole step in one graph, against the plain eager loop of the same optimiser.

def adam(model): return torch.optim.AdamW(model.parameters(), lr=0.003)


def momentum(model): return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn():
    "For batches of 32 images of 4 x 4."
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def whole(batches, make=net, optimiser=adam, callbacks=list):
    from learner.steer.whole_step import WholeStep
    model = make()
    learn = Learner(model, optimiser(model), F.cross_entropy, {"train": batches}, [*callbacks(), WholeStep("inductor")])
    return timed(learn.train)


def shown():
    from learner.watch.metrics import Metrics, MulticlassAccuracy
    from learner.watch.progress import Progress
    return [Metrics(accuracy=MulticlassAccuracy()), Progress()]


def steered(): return [make(importlib.import_module(f"learner.{module}")) for name, (module, make, _) in STEERERS.items()
                       if name != "Accumulate"]


def wholes():
    "For each row: how to make it, and the plain loop of the same optimiser."
    extras = {"clip": True, "schedule": True, "average": True}
    rows = {}
    for name, optimiser in (("AdamW", adam), ("SGD, momentum", momentum)):
        row, base = partial(whole, optimiser=optimiser), partial(plain, optimiser=optimiser)
        rows |= {
            f"{name}": (row, base), f"{name}: accuracy, progress": (partial(row, callbacks=shown), base),
            f"{name}: clip, schedule, EMA": (partial(row, callbacks=steered), partial(base, **extras)),
            f"{name}: 256 wide": (partial(row, make=wide), partial(base, make=wide)),
            f"{name}: small CNN": (partial(row, make=cnn), partial(base, make=cnn)),
        }
    return {f"whole step, {name}": row for name, row in rows.items()}


def miniai_(batches, shown=False):
    from miniai import learner as m
    from torcheval.metrics import MulticlassAccuracy

    class Loaders:
        train, valid = batches, []

    class ProgressCB(m.ProgressCB):
        def _log(self, row): super()._log({name: str(value) for name, value in row.items()})  # for today's fastprogress

    model = net()
    callbacks = [m.MetricsCB(accuracy=MulticlassAccuracy()), ProgressCB()] if shown else []
    learn = m.TrainLearner(model, Loaders, F.cross_entropy, lr=0.01, cbs=callbacks, opt_func=torch.optim.SGD)
    return timed(lambda: learn.fit(1, valid=False))


def ignite_(batches, shown=False):
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers.tqdm_logger import ProgressBar
    from ignite.metrics import Accuracy, RunningAverage
    model = net()
    trainer = create_supervised_trainer(model, sgd(model), F.cross_entropy,
                                        output_transform=lambda x, y, predictions, loss: (predictions, y, loss))
    if shown:
        Accuracy(output_transform=lambda out: out[:2]).attach(trainer, "accuracy")
        RunningAverage(output_transform=lambda out: out[2].item()).attach(trainer, "loss")
        ProgressBar(file=sys.stdout).attach(trainer, ["loss"])
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: print(engine.state.metrics))
    return timed(lambda: trainer.run(batches, max_epochs=1))


def fastai_(batches, shown=False):
    import fastai.callback.progress  # noqa: F401  adds no_bar to the learner
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as Fastai
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD

    class Loader(list):
        "The least that fastai asks of a loader."
        device, after_batch = torch.device("cpu"), None
    loader = Loader(batches)
    learn = Fastai(DataLoaders(loader, Loader(batches[:1])), net(), loss_func=F.cross_entropy, opt_func=SGD, lr=0.01,
                   metrics=accuracy if shown else None)

    def run():
        with contextlib.nullcontext() if shown else learn.no_bar(), learn.no_logging(): learn.fit(1)
    return timed(run)


def lightning_(batches, shown=False):
    import lightning
    from torchmetrics.classification import MulticlassAccuracy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.accuracy = net(), MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, index):
            x, y = batch
            predictions = self.net(x)
            loss = F.cross_entropy(predictions, y)
            if shown:
                self.accuracy(predictions, y)
                self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
                self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def configure_optimizers(self): return sgd(self)
        def on_train_epoch_start(self): self.start = CLOCK()
        def on_train_epoch_end(self): self.seconds = CLOCK() - self.start

    class Loader:
        "Lightning takes a list for a list of loaders."
        def __iter__(self): return iter(batches)
        def __len__(self): return len(batches)

    module, loader = Module(), Loader()

    def once():
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_model_summary=False, enable_progress_bar=shown)
        trainer.fit(module, loader)
        return module.seconds  # of the epoch alone, without what is set up before it
    return once


PEERS = {"miniai": miniai_, "fastai": fastai_, "ignite": ignite_, "lightning": lightning_}


def installed(name):
    try: return bool(importlib.import_module(name))
    except ImportError: return False


def all_rows():
    rows = {"plain loop": plain, "Learner": learner, "Learner: accuracy, progress": learner_shown}
    if installed("tqdm"): rows["plain loop: accuracy by hand, tqdm"] = plain_shown
    for name, make in PEERS.items():
        if installed(name): rows |= {name: make, f"{name}: accuracy, progress": partial(make, shown=True)}
    return rows


def in_pairs(base, rows, batches, args):
    "Of each row: pairs of seconds, of the base just before and of the row."
    rows = {name: make(batches) for name, make in rows.items() if args.only in name}
    bare, pairs = base(batches), {}
    for _ in range(args.rounds + 1):
        for name, run in rows.items(): pairs.setdefault(name, []).append((bare(), run()))
    return {name: counted for name, (_, *counted) in pairs.items()}  # the first round warms up


def main():
    global WIDTH, CLOCK
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden units (default: 16); more make a longer step")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-whole", dest="whole", action="store_false", help="leave the rows of whole steps out")
    parser.add_argument("--processor-time", action="store_true", help="count the processor's time, not the clock's")
    args = parser.parse_args()
    WIDTH, CLOCK = args.width, process_time if args.processor_time else perf_counter
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(32, 16, generator=generator), torch.randint(10, (32,), generator=generator))
               for _ in range(args.batches)]
    with tempfile.TemporaryFile("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        tables = {"the plain loop": in_pairs(plain, all_rows(), batches, args),
                  "Learner": in_pairs(learner, there(WATCHERS), batches, args),
                  "the same by hand": {}, "the plain loop, same optimiser": {}}
        for name, (row, base) in steerers().items():
            tables["the same by hand"] |= in_pairs(base, {name: row}, batches, args)
        for name, (row, base) in wholes().items():
            if args.whole and args.only in name:
                tables["the plain loop, same optimiser"] |= in_pairs(base, {name: row}, batches, args)
    for base, pairs in tables.items():
        if not pairs: continue
        print(f"{'':<54}{'µs per batch':>14}{'more':>8}{'ratio':>8}  over {base}")
        for name, counted in pairs.items():
            own, more = (median(times) / args.batches * 1e6
                         for times in ([row for _, row in counted], [row - bare for bare, row in counted]))
            ratio = median(row / bare for bare, row in counted)
            print(f"{name:<54}{own:>14.1f}{more:>8.1f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
