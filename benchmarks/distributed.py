"""A step in two processes: a plain DDP loop, Distributed(), with shards=4, and with shard=True. `python benchmarks/distributed.py`

Gloo on the CPU of one machine. They are timed in turns in the same processes, so that what else the machine does falls on all
of them alike; the medians of the turns are compared, of the time on the wall and of the processor time of the first process.
Then what a step sends is counted, and what that means for more ranks is computed.
"""
import json
import os
import sys
import tempfile
import time
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from learner import DataLoaders, Learner
from learner.keep.distributed import Distributed
from learner.loop.data import TensorLoader

BATCH, BATCHES, TURNS, PROCESSES = 128, 469, 7, 2  # an epoch of Fashion-MNIST has 469 batches of 128


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


@cache
def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH * BATCHES, 1, 28, 28, generator=generator), torch.randint(10, (BATCH * BATCHES,), generator=generator)


def plain(rank):
    "The loop that one writes by hand: DDP, and the mean of the loss over ranks at the end."
    from torch.distributed import all_reduce
    from torch.nn.parallel import DistributedDataParallel
    model = DistributedDataParallel(net())
    optimiser, half = torch.optim.AdamW(model.parameters()), BATCH // PROCESSES
    loader = TensorLoader(data(), BATCH, shuffle=True)

    def epoch():
        total = torch.zeros((), dtype=torch.float64)
        for images, labels in loader:
            own = slice(rank * half, (rank + 1) * half)
            loss = F.cross_entropy(model(images[own]), labels[own])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            total += loss.item()
        all_reduce(total)
    return epoch


def learner(**options):
    learn = Learner(net(), torch.optim.AdamW, F.cross_entropy, DataLoaders(train=TensorLoader(data(), BATCH, shuffle=True)),
                    Distributed(**options), device="cpu")
    return lambda: learn.train(1)


class Sent(TorchDispatchMode):
    "Counts the collective operations within a `with`, and the bytes that a rank sends in them to others."

    def __init__(self):
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            self.count += 1
            part = 1 / PROCESSES
            shares = {"gather": PROCESSES - 1, "alltoall": 1 - part, "scatter": 1 - part, "reduce": 2 - 2 * part}
            kind = next((each for each in shares if each in name), "")  # a broadcast is sent once
            given = args[1] if kind and kind != "reduce" else args[0]
            leaves = torch.utils._pytree.tree_leaves(given)
            self.bytes += shares.get(kind, 1) * sum(each.nbytes for each in leaves if isinstance(each, torch.Tensor))
        return func(*args, **(kwargs or {}))


def work(rank, store, path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LEARNER_STORE": f"file://{store}"}
    torch.set_num_threads(1)
    ways = {"Distributed()": learner(), "Distributed(shards=4)": learner(shards=4), "Distributed(shard=True)": learner(shard=True)}
    for run in ways.values(): run()  # they meet, and warm up
    ways = {"plain DDP": plain(rank), **ways}
    ways["plain DDP"]()
    took = {name: ([], [], []) for name in ways}
    for _ in range(TURNS):
        for name, run in ways.items():
            began, processor = time.perf_counter(), time.process_time()
            run()
            took[name][0].append((time.perf_counter() - began) / BATCHES * 1e3)
            took[name][1].append((time.process_time() - processor) / BATCHES * 1e3)
    for name, run in ways.items():
        with Sent() as sent: run()
        took[name][2].extend((sent.count / BATCHES, sent.bytes / BATCHES))
    if rank == 0:
        with open(path, "w") as file: json.dump(took, file)


def main():
    # What one way gives back to the system, another would pay for when it asks again: thousands of page faults a step.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (f"{folder}/store", f"{folder}/took"), nprocs=PROCESSES)
        with open(f"{folder}/took") as file: took = json.load(file)
    base = took["plain DDP"]
    print(f"ms a step of {BATCH} images in {PROCESSES} processes, in calls of {BATCHES} steps with all that begins and ends them;")
    print(f"medians of {TURNS} turns, and of their ratios to plain DDP")
    print(f"{'':24}{'wall':>8}{'ratio':>7}{'processor':>11}{'ratio':>7}{'collectives':>13}{'bytes':>12}")
    for name, (wall, processor, (count, sent)) in took.items():
        ratios = [median(one / other for one, other in zip(each, plain, strict=True))
                  for each, plain in zip((wall, processor), base, strict=False)]
        print(f"{name:24}{median(wall):8.2f}{ratios[0]:7.2f}{median(processor):11.2f}{ratios[1]:7.2f}{count:13.1f}{sent:12,.0f}")
    size = sum(p.numel() * p.element_size() for p in net().parameters())
    print(f"\nThe gradients have {size:,} bytes. On paper, for more ranks: bytes that a rank sends in a step, rounds of messages")
    print("that wait for each other, their time at 1.25 GB/s (10 Gb/s) and 50 us a round, none of it hidden by the backward pass")
    print("ranks   DDP: bytes  rounds     ms   shards: bytes  rounds     ms   agreeing: rounds     ms")
    for ranks in (2, 8, 64, 256, 1024):
        moved = 2 * size * (ranks - 1) / ranks  # ring all-reduce; all-to-all twice
        told = 24 * (ranks - 1)  # three numbers to each of the others, at once
        ring, direct = 2 * (ranks - 1), 2  # each rank to all others at once, and again with the sums
        one, other, third = (1e3 * (b / 1.25e9 + n * 50e-6) for b, n in ((moved, ring), (moved, direct), (told, 1)))
        print(f"{ranks:5} {moved:12,.0f} {ring:7} {one:6.1f} {moved:15,.0f} {direct:7} {other:6.1f} {1:18} {third:6.2f}")


if __name__ == "__main__":
    sys.exit(main())
