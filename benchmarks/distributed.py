"""A step in two processes: a plain DDP loop, Distributed(), and Distributed(shards=4). `python benchmarks/distributed.py`

Gloo on the CPU of one machine. The three are timed in turns in the same processes, so that what else the machine does falls
on all of them alike; the medians of the turns are compared. Then what a step moves, and what that means for more ranks.
"""
import json
import os
import sys
import tempfile
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import spawn

from learner import DataLoaders, Learner
from learner.keep.distributed import Distributed
from learner.loop.data import TensorLoader

BATCH, BATCHES, TURNS, PROCESSES = 128, 8, 9, 2


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


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


def work(rank, store, path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LEARNER_STORE": f"file://{store}"}
    torch.set_num_threads(1)
    ways = {"Distributed()": learner(), "Distributed(shards=4)": learner(shards=4)}
    for run in ways.values(): run()  # they meet, and warm up
    ways = {"plain DDP": plain(rank), **ways}
    ways["plain DDP"]()
    took = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            took[name].append((time.perf_counter() - began) / BATCHES * 1e3)
    if rank == 0:
        with open(path, "w") as file: json.dump(took, file)


def main():
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (f"{folder}/store", f"{folder}/took"), nprocs=PROCESSES)
        with open(f"{folder}/took") as file: took = json.load(file)
    base = took["plain DDP"]
    print(f"ms a step of {BATCH} images in {PROCESSES} processes, median of {TURNS} turns; and the median of the ratios of a turn")
    for name, each in took.items():
        ratio = median(one / other for one, other in zip(each, base, strict=True))
        print(f"{name:22} {median(each):7.2f} {ratio:6.2f}")
    size = sum(p.numel() * p.element_size() for p in net().parameters())
    print(f"\na step moves {size:,} bytes of gradients; each rank sends so many bytes, and waits so often, by the number of ranks:")
    print("ranks   DDP: bytes   shards: bytes   sum of 4 numbers: messages one after another")
    for ranks in (2, 8, 64, 1024):
        moved = 2 * size * (ranks - 1) / ranks  # ring all-reduce; all-to-all and all-gather
        print(f"{ranks:5} {moved:12,.0f} {moved:15,.0f}   {2 * (ranks - 1).bit_length():5}")


if __name__ == "__main__":
    sys.exit(main())
