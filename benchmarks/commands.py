"""Seconds of the command line where no training is: `learner --help`, and `learner scores` over a thousand run folders.

Each is a process of its own, started anew in every round; the medians are printed: python benchmarks/commands.py
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from learner.runs.rundir import create_run
from learner.runs.runfiles import write_json, write_rows

LIMITS = {"learner --help": 0.7, "learner scores": 2.0}  # seconds


def make_run(folder: Path, number: int, epochs: int = 10) -> None:
    "A folder as a finished run leaves it, without the weights."
    create_run(folder)
    rows = [{"epoch": epoch, "validation_accuracy": (number % 997 + epoch) / 1010} for epoch in range(epochs)]
    best = {"best": rows[-1]["validation_accuracy"], "epoch": epochs - 1, "last": rows[-1]["validation_accuracy"], "mode": "max"}
    settings = {"model": {"name": "ConvNet", "width": number}, "learning_rate": 0.003, "seed": number}
    config = {"format": "learner.run", "version": 1, "config": "digits", "settings": settings}
    write_json(folder / "config.json", config, sync=False)
    write_json(folder / "meta.json", {"status": "finished", "epochs": epochs, "epochs_done": epochs}, sync=False)
    write_json(folder / "score.json", {"validation_accuracy": best}, sync=False)
    write_rows(folder / "history.csv", rows)


def seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "learner", *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes of each (default: 7)")
    parser.add_argument("--runs", type=int, default=1000, help="folders to rank (default: 1000)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.runs) < 1: parser.error("all numbers must be at least 1")

    with tempfile.TemporaryDirectory() as place:
        for number in range(arguments.runs): make_run(Path(place) / f"run-{number:04}", number)
        ways = {"learner --help": ["--help"], "learner scores": ["scores", place]}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, words in ways.items(): times[name].append(seconds(*words))
    print(f"seconds of a process, median of {arguments.rounds} rounds; {arguments.runs:,} run folders")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:16}{median:7.2f}   at most {LIMITS[name]}: {'yes' if median <= LIMITS[name] else 'NO'}")


if __name__ == "__main__":
    main()
