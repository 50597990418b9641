"""Seconds and bytes of a checkpoint: `save_state` and `load_state`, torch.save and torch.load, and the disk alone.

The state is what AdamW needs to go on: a model of float32 and two moments of its size. "the disk alone" writes the same
bytes to a new file, syncs it and renames it over the last one. torch.save is shown as it is, and done the same way,
since a file in the memory of the system is no checkpoint yet. The ways take turns, and the medians are compared:
python benchmarks/checkpoint.py

With --training it shows what share of an epoch of the config fashion_mnist its checkpoint takes, as the learner measures it.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from learner.base.nested import snapshot
from learner.base.store import check_state, load_state, save_state

LIMIT = 1.5  # save_state may take this much of the disk's own time
SHARE = 2**22  # parameters of one tensor


def made(millions: int) -> dict:
    "A model and its moments."
    sizes = [SHARE] * (millions * 10**6 // SHARE) + [millions * 10**6 % SHARE]
    def tensors() -> list[torch.Tensor]: return [torch.randn(size) for size in sizes]
    model = {f"{i}.weight": tensor for i, tensor in enumerate(tensors())}
    moments = zip(tensors(), tensors(), strict=True)
    state = {i: {"exp_avg": a, "exp_avg_sq": b, "step": torch.tensor(1.0)} for i, (a, b) in enumerate(moments)}
    return {"model": model, "optimiser": {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]}, "epoch": 1}


def replace(path: Path, work: Callable[[Path], object]) -> None:
    "Make a new file, have it on the disk, and put it in the place of the old one."
    new = path.with_suffix(".new")
    work(new)
    file = os.open(new, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
    os.replace(new, path)


def write(path: Path, blocks: list[memoryview]) -> None:
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            for start in range(0, len(block), 2**22): file.write(block[start : start + 2**22])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[10, 100], help="parameters (default: 10 100)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way (default: 5)")
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: one for temporary files)")
    parser.add_argument("--training", action="store_true", help="only the share of a real epoch, on Fashion-MNIST")
    arguments = parser.parse_args()
    if arguments.training: return training(arguments.folder)
    if min(arguments.rounds, *arguments.millions) < 1: parser.error("all numbers must be at least 1")

    block = bytes(2**28)
    speed = len(block) / seconds(lambda: hashlib.sha256(block)) / 1e6
    print(f"SHA-256 on one thread: {speed:,.0f} MB/s; torch {torch.__version__}")
    for millions in arguments.millions:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try: measure(folder, millions, arguments.rounds)
        finally: shutil.rmtree(folder)


def measure(folder: Path, millions: int, rounds: int) -> None:
    state = made(millions)
    moments = state["optimiser"]["state"].values()
    tensors = [*state["model"].values(), *(moment[name] for name in ("exp_avg", "exp_avg_sq") for moment in moments)]
    blocks = [memoryview(tensor.view(torch.uint8).numpy()) for tensor in tensors]
    size = sum(len(block) for block in blocks)

    ways: dict[str, Callable[[], object]] = {
        "the disk alone": lambda: replace(folder / "plain", lambda path: write(path, blocks)),
        "save_state": lambda: save_state(folder / "ours.safetensors", state),
        "torch.save, replacing": lambda: replace(folder / "torch.pt", lambda path: torch.save(state, path)),
        "torch.save": lambda: torch.save(state, folder / "fast.pt"),
        "snapshot": lambda: snapshot(state),
        "check_state": lambda: check_state(folder / "ours.safetensors"),
        "load_state": lambda: load_state(folder / "ours.safetensors"),
        "torch.load": lambda: torch.load(folder / "torch.pt"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            took = seconds(way)
            if number: times[name].append(took)  # the first round makes the files
            os.sync()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = (folder / "ours.safetensors").stat().st_size
    print(f"\n{millions} M parameters of float32 and two moments, {size / 1e6:,.1f} MB; files: save_state {ours / 1e6:,.3f} MB, "
          f"torch.save {(folder / 'torch.pt').stat().st_size / 1e6:,.3f} MB; median of {rounds} rounds")
    print(f"{'':24}{'seconds':>9}{'least':>9}{'most':>9}{'MB/s':>8}")
    for name, median in medians.items():
        print(f"{name:24}{median:9.3f}{min(times[name]):9.3f}{max(times[name]):9.3f}{size / median / 1e6:8,.0f}")
    ratios = [a / b for a, b in zip(times["save_state"], times["the disk alone"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"save_state takes {ratio:.2f} of the disk's own time: {'within' if ratio <= LIMIT else 'over'} {LIMIT}")


def training(folder: str | None) -> None:
    from learner import Checkpoint, build
    learn = build("fashion_mnist")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        learn.add(Checkpoint(place))
        learn.train(2)
        size = Path(place, "epoch-0002.safetensors").stat().st_size
    epochs, whole = learn.times["train", "epoch"]
    saves, saving = learn.times["train", "epoch", "Checkpoint.after_epoch"]
    epoch, save = whole / epochs, saving / saves
    print(f"an epoch of 54,000 images takes {epoch:.1f} s, and its checkpoint of {size / 1e6:.1f} MB {save:.3f} s of it: "
          f"{save / (epoch - save):.2%} more than without")


if __name__ == "__main__":
    main()
