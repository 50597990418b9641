"""Seconds per epoch over 60,000 images in memory: `from_tensors`, torch's DataLoader, and `index_select` by hand.

The ways take turns in one process with one thread, and the medians are compared: python benchmarks/loading.py
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader, TensorDataset

from learner.loop.data import DataLoaders

LIMIT = 1.3  # from_tensors may cost this much over index_select by hand


def by_hand(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.randperm(len(images))
    for start in range(0, len(images), batch_size):
        rows = order[start : start + batch_size]
        yield images.index_select(0, rows), labels.index_select(0, rows)


def seconds(batches: Callable[[], Iterable]) -> float:
    start = time.perf_counter()
    for _ in batches(): pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="passes of each (default: 11)")
    parser.add_argument("--examples", type=int, default=60_000, help="images of 1x28x28 floats (default: 60000)")
    parser.add_argument("--batch-size", type=int, default=256, help="examples in a batch (default: 256)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.examples, arguments.batch_size) < 1:
        parser.error("all numbers must be at least 1")

    torch.set_num_threads(1)
    images = torch.rand(arguments.examples, 1, 28, 28)
    labels = torch.randint(10, (arguments.examples,))
    ours = DataLoaders.from_tensors(train=(images, labels), batch_size=arguments.batch_size).train
    theirs = DataLoader(TensorDataset(images, labels), batch_size=arguments.batch_size, shuffle=True)
    ways: dict[str, Callable[[], Iterable]] = {
        "index_select by hand": lambda: by_hand(images, labels, arguments.batch_size),
        "DataLoaders.from_tensors": lambda: ours,
        "DataLoader(TensorDataset)": lambda: theirs,
    }
    for way in ways.values(): seconds(way)  # warm up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items(): times[name].append(seconds(way))

    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["index_select by hand"]
    print(f"{arguments.examples:,} images of 1x28x28 floats, batches of {arguments.batch_size}, one thread, "
          f"median of {arguments.rounds} rounds, torch {torch.__version__}")  # fmt: skip
    print(f"{'':26}{'ms per epoch':>13}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:26}{1000 * median:13.1f}{median / bare:8.2f}")
    ratio = medians["DataLoaders.from_tensors"] / bare
    print(f"from_tensors at most {LIMIT} times index_select by hand: {'yes' if ratio <= LIMIT else 'NO'}, {ratio:.2f}")


if __name__ == "__main__":
    main()
