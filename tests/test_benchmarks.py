"""The benchmarks run, in a small form whose figures say nothing."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "dispatch": "--batches 20 --rounds 1", "overhead": "--batches 5 --rounds 1 --no-whole",
    "loading": "--examples 512 --rounds 1", "checkpoint": "--millions 1 --rounds 1",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name, tmp_path):
    words = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *SMALL[name].split()]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) > 2
