"""A step by eager training, by a compiled model and by `WholeStep`: microseconds, waits for the device and memory.

On a small net and on a transformer of ten million parameters, with AdamW, on a GPU: python benchmarks/whole_step.py
With --device=cpu there are no waits and no memory to be counted; --net=small leaves the transformer out, which is slow there.
The first epoch compiles and records, and is not counted.
"""
import argparse
import contextlib
import io
import warnings
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from learner import Learner
from learner.steer.precision import Compile
from learner.steer.whole_step import WholeStep

WAYS = {"eager": list, "compiled model": lambda: [Compile()], "whole step": lambda: [WholeStep("inductor")]}
WORDS, LENGTH, WIDTH, LAYERS = 1_000, 64, 320, 8


class Transformer(nn.Module):
    "Predicts a word at each place."

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x):
        return self.head(self.layers(self.words(x) + self.places.weight[:x.shape[1]])).transpose(1, 2)


def small(): return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
def vectors(): return torch.randn(32, 16), torch.randint(10, (32,))
def sentences(): return torch.randint(WORDS, (32, LENGTH)), torch.randint(WORDS, (32, LENGTH))


NETS = {"small": (small, vectors), "transformer": (Transformer, sentences)}


def learner(name, way, device, num_batches):
    torch.manual_seed(0)
    make, batch = NETS[name]
    model = make().to(device)
    batches = [tuple(part.to(device) for part in batch()) for _ in range(num_batches)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Learner(model, optimiser, F.cross_entropy, {"train": batches}, WAYS[way](), device=device)


class Epochs:
    "Counts the seconds and the waits of each epoch of one training."

    def __init__(self, learn, device):
        self.seconds, self.waits, self.on_gpu, self.peak = [], [], device == "cuda", 0.0
        for hook in ("before_training", "before_batch", "after_batch", "after_training"): learn.on(hook, getattr(self, hook))

    def before_training(self):
        self.waits.append(0)
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = perf_counter()

    def before_batch(self, epoch):
        if epoch == 1: self._watch()  # one epoch is for the waits, which take time to be counted

    def after_batch(self):
        if not self.on_gpu or len(self.waits) != 2: return
        torch.cuda.set_sync_debug_mode("default")
        self.waits[-1] += sum("synchronizing" in str(each.message) for each in self.found)
        self.caught.__exit__(None, None, None)

    def _watch(self):
        if not self.on_gpu: return
        self.caught = warnings.catch_warnings(record=True)
        self.found = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def after_training(self):
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / 1e6
        self.seconds.append(perf_counter() - self.start)


def row(name, way, args):
    "Microseconds a batch by epoch, waits a batch, and the most memory of the last epoch."
    learn = learner(name, way, args.device, args.batches)
    epochs = Epochs(learn, args.device)
    with contextlib.redirect_stdout(io.StringIO()): learn.train(args.rounds + 2)
    return [seconds / args.batches * 1e6 for seconds in epochs.seconds[2:]], epochs.waits[1] / args.batches, epochs.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--net", choices=list(NETS), action="append", help="one of the nets (default: all)")
    parser.add_argument("--batches", type=int, default=200, help="of an epoch (default: 200)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs that are counted (default: 7)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available(): parser.error("torch can use no GPU here; try --device=cpu")
    if args.device == "cuda": print(torch.cuda.get_device_name())
    else: torch.set_num_threads(1)
    for name in args.net or NETS:
        size = sum(p.numel() for p in NETS[name][0]().parameters())
        print(f"{name + f', {size:,} parameters':<34}{'µs per batch':>14}{'ratio':>8}{'waits':>8}{'MB':>10}")
        base = None
        for way in WAYS:
            times, waits, peak = row(name, way, args)
            base = base or median(times)
            shown = (f"{waits:>8.2f}{peak:>10.1f}" if args.device == "cuda" else "")
            print(f"{way:<34}{median(times):>14.1f}{median(times) / base:>8.3f}{shown}", flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
