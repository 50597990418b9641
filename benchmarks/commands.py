"""Seconds of the command line where no training is: help, a mistake, the way to the first batch of digits, and `learner scores`
over a thousand run folders.

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

LIMITS = {"learner --help": 0.3, "a mistake": 0.7, "first batch": 1.5, "learner scores": 2.0}  # the third beyond `import torch`
LEAVE = """import os
from learner.loop.stages import Callback
class Leave(Callback):
    "Ends the process when the first batch begins."
    def before_batch(self): os._exit(0)
"""

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


def seconds(place: str, *words: str, status: int = 0) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True)
    took = time.perf_counter() - start
    if done.returncode != status: raise SystemExit(f"{' '.join(words)}: {done.stderr.decode()}")
    return took


def measure(place: str) -> dict[str, float]:
    "One process of each."
    learner = ("-m", "learner")
    new = f"new-{time.monotonic_ns()}"
    torch = seconds(place, "-c", "import torch")
    return {
        "learner --help": seconds(place, *learner, "--help"),
        "a mistake": seconds(place, *learner, "train", "digits", new, "--epochs=many", status=2),
        "first batch": seconds(place, *learner, "train", "digits", new, "--callbacks.leave.name=leave.Leave") - torch,
        "learner scores": seconds(place, *learner, "scores", "runs"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="processes of each (default: 7)")
    parser.add_argument("--runs", type=int, default=1000, help="folders to rank (default: 1000)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.runs) < 1: parser.error("all numbers must be at least 1")

    with tempfile.TemporaryDirectory() as place:
        Path(place, "leave.py").write_text(LEAVE)
        for number in range(arguments.runs): make_run(Path(place) / "runs" / f"run-{number:04}", number)
        rounds = [measure(place) for _ in range(arguments.rounds)]
    print(f"seconds of a process, median of {arguments.rounds} rounds; {arguments.runs:,} run folders")
    for name, limit in LIMITS.items():
        median = statistics.median(found[name] for found in rounds)
        print(f"{name:16}{median:7.2f}   at most {limit}: {'yes' if median <= limit else 'NO'}")
    print("the way to the first batch is counted beyond `import torch`")


if __name__ == "__main__":
    main()
