"""The cost of the loop itself: nanoseconds per batch over the same bare Python loop.

The model, the loss and the optimiser do nothing, so that what is left is dispatch: stages, hooks, bookkeeping.
Rounds of all rows alternate in one process; the figures are medians of rounds.
"""
import argparse
from statistics import median
from time import perf_counter

import torch
from torch import nn

from learner import Callback, Learner


class Nothing(torch.Tensor):
    "A loss, which is a scalar tensor, and an optimiser in one, without any work."
    __torch_function__ = torch._C._disabled_torch_function_impl

    def backward(self): pass
    def step(self): pass
    def zero_grad(self): pass


def nothing(): return torch.tensor(0.5).as_subclass(Nothing)


class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    __call__ = lambda self, x: x  # noqa: E731  without the price of nn.Module.__call__, which the loop does not make


class Hooks(Callback):
    "Four hooks a batch, two of which ask for values."
    def before_batch(self, learn): pass
    def after_predict(self, predictions): pass
    def after_loss(self, loss, epoch): pass
    def after_batch(self, learn): pass


def bare(model, loss_func, optimiser, batches):
    for x, y in batches:
        loss = loss_func(model(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def learner(callbacks, batches):
    both, model = nothing(), Empty()
    both.param_groups = [{"params": list(model.parameters()), "lr": 0.0}]
    learn = Learner(model, both, lambda predictions, labels: both, {"train": batches}, callbacks, device="cpu")
    return learn.train


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.zeros(4, 2), torch.zeros(4)
    batches = [(x, y)] * args.batches
    both, model = nothing(), Empty()
    rows = {
        "bare loop": lambda: bare(model, lambda predictions, labels: both, both, batches),
        "Learner": learner(None, batches),
        "Learner, 10 callbacks of 4 hooks": learner([Hooks() for _ in range(10)], batches),
    }
    times = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, run in rows.items():
            start = perf_counter()
            run()
            times[name].append((perf_counter() - start) / args.batches * 1e9)
    base = median(times["bare loop"])
    print(f"{'ns per batch':<34}{'total':>8}{'over bare':>11}{'aim':>8}")
    for name, aim in zip(rows, ("", "2400", "4000"), strict=True):
        print(f"{name:<34}{median(times[name]):>8.0f}{median(times[name]) - base:>11.0f}{aim:>8}")


if __name__ == "__main__":
    main()
