"""Requests a second and times of answers of a served model, beside a plain handler of FastAPI with the same model.

Each server is a process of its own; wrk (a package of Debian) asks them in turn, so that a busy machine is busy for all:

    python benchmarks/serve.py [--seconds=8] [--rounds=3] [--connections=32] [--size=8]

The model is a small CNN on pictures of 8 x 8 pixels, as `digits` has them, sent as JSON; --size=28 takes larger ones, of which the
convolutions take as long for each picture of a batch as for one alone. "one at a time" is the same server without micro-batching.
The handler of FastAPI is what one writes: a model of Pydantic for the body, `torch.inference_mode`, one example at a time. It
runs on Uvicorn with the same loop and parser. It is timed twice: as a plain function, which FastAPI runs in a pool of threads,
and as an `async` one, which blocks the loop.
"""

import argparse
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import nn


def network(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 10)).eval()


def serve_learner(port: int, size: int, batch: int) -> None:
    import torch.nn.functional as F

    from learner.loop.learner import Learner
    from learner.use.predict import predictor_of
    from learner.use.serve import Limits, Models, Service
    images = torch.rand(8, 1, size, size)
    learn = Learner(network(size), None, F.cross_entropy, {"validation": [(images, torch.zeros(8, dtype=torch.long))]})
    limits = Limits(batch=batch)
    Service(Models({"cnn": predictor_of(learn)}, limits), port=port).run()


def serve_fastapi(port: int, size: int, is_async: bool) -> None:
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    model, app = network(size), FastAPI()

    class Body(BaseModel):
        inputs: list[list[list[float]]]

    def answer(body: Body) -> dict:
        with torch.inference_mode(): output = model(torch.tensor([body.inputs]).reshape(1, 1, size, size))[0]
        shares = output.softmax(0)
        best = int(shares.argmax())
        return {"predictions": [{"output": output.tolist(), "label": str(best), "probability": float(shares[best]),
                                 "probabilities": {str(i): share for i, share in enumerate(shares.tolist())}}]}

    if is_async:
        @app.post("/predict")
        async def predict(body: Body) -> dict: return answer(body)
    else:
        @app.post("/predict")
        def predict(body: Body) -> dict: return answer(body)

    @app.get("/health")
    def health() -> dict: return {}

    uvicorn.run(app, port=port, log_level="critical", access_log=False)


SERVERS = {
    "learner": lambda port, size: serve_learner(port, size, 64),
    "learner, one at a time": lambda port, size: serve_learner(port, size, 1),
    "FastAPI": lambda port, size: serve_fastapi(port, size, False),
    "FastAPI, async": lambda port, size: serve_fastapi(port, size, True),
}
SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '%s'
done = function(summary, latency, requests)
  local errors = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
  local half, most = latency:percentile(50), latency:percentile(99)
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration, half, most, errors))
end
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(name: str, size: int) -> tuple[subprocess.Popen, int]:
    "A process that serves, as soon as it answers."
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, f"--serve={name}", f"--port={port}", f"--size={size}"])
    for _ in range(600):
        try:
            urlopen(f"http://127.0.0.1:{port}/health").close()
            return process, port
        except OSError: time.sleep(0.1)
    raise SystemExit(f"{name} does not answer")


def processor(process: subprocess.Popen) -> float:
    "Seconds of processor time that a process has taken."
    words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def load(server: tuple[subprocess.Popen, int], script: Path, seconds: int, connections: int) -> tuple[float, ...]:
    "Requests a second, median and 99th percentile in milliseconds, milliseconds of the processor a request, and failures."
    process, port = server
    before = processor(process)
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=20s", f"-s{script}", f"http://127.0.0.1:{port}/predict"]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    requests, duration, half, most, errors = map(int, re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", out).groups())
    return requests / duration * 1e6, half / 1000, most / 1000, (processor(process) - before) / requests * 1000, errors


def main(seconds: int, rounds: int, connections: int, size: int, names: list[str]) -> None:
    if not shutil.which("wrk"): raise SystemExit("wrk is not installed: apt install wrk")
    random.seed(0)
    picture = [[[round(random.random(), 6) for _ in range(size)] for _ in range(size)]]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(SCRIPT % json.dumps({"inputs": picture}))
        running = {name: start(name, size) for name in names}
        try:
            for name in names: load(running[name], script, 2, connections)  # to warm up
            for _ in range(rounds):
                for name in names: found[name].append(load(running[name], script, seconds, connections))
        finally:
            for process, _ in running.values():
                process.terminate()
                process.wait(30)
    print(f"{connections} connections, medians of {rounds} rounds of {seconds} s, {torch.get_num_threads()} thread(s) of PyTorch")
    print(f"{'':24}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'CPU ms':>10}{'failed':>8}")
    for name, results in found.items():
        columns = list(zip(*results, strict=True))
        speed, half, most, cost = (statistics.median(column) for column in columns[:4])
        print(f"{name:24}{speed:>12.0f}{half:>10.1f}{most:>10.1f}{cost:>10.3f}{sum(columns[4]):>8.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--servers", default=";".join(SERVERS))
    parser.add_argument("--serve", choices=SERVERS)
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    if given.serve: SERVERS[given.serve](given.port, given.size)
    else: main(given.seconds, given.rounds, given.connections, given.size, given.servers.split(";"))
