"""A server as a process: strange clients, thousands of bodies, models that change, and an end that loses no request."""
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.use.export import export

np = pytest.importorskip("numpy")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, where the memory of a process is seen")
ROOT = Path(__file__).resolve().parents[2]
LONG = pytest.mark.long
SECONDS = 60  # that a busy machine may take for one thing
IMAGE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
BODY = json.dumps({"inputs": IMAGE.tolist()}).encode()


def small_model(seed):
    torch.manual_seed(seed)
    return Learner(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)), None, F.cross_entropy, digits())


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    "Two exports of models with other weights."
    place = tmp_path_factory.mktemp("exports")
    for seed in (0, 1): export(small_model(seed), place / str(seed))
    return place


class Process:
    "A server that the command line has started."

    def __init__(self, *words):
        command = [sys.executable, "-m", "learner", "serve", *map(str, words), "--port=0"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stdout.readline, "")
        line = next((line for line in lines if "served at" in line), None)
        assert line, self.process.stderr.read()
        self.port = int(re.search(r":(\d+);", line)[1])
        self.errors = []
        self.reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self): return self

    def __exit__(self, *error):
        if self.process.poll() is None: self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()

    def connect(self, timeout=SECONDS): return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def memory(self): return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def files(self): return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def ask(self, body=BODY, path="/predict", method="POST", headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally: connection.close()

    def output(self):
        status, text = self.ask()
        assert status == 200, text
        return torch.tensor(json.loads(text)["predictions"][0]["output"])

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def server(exports):
    with Process(exports / "0", "--seconds=4") as server:
        for _ in range(50): server.ask()  # whatever is loaded once is loaded
        until(lambda: server.ask(path="/saliency")[0] == 200)  # captum too
        yield server


def until(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.05)


def received(connection):
    "All that comes until the server closes."
    parts = []
    try:
        while part := connection.recv(65536): parts.append(part)
    except ConnectionResetError: pass
    return b"".join(parts)


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


# Strange clients

def test_a_client_that_has_sent_all_and_closed_its_half_gets_its_answer(server):
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(WHOLE)
            connection.shutdown(socket.SHUT_WR)
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 200") and b'"predictions"' in answer


def test_clients_that_are_slow_silent_or_gone_cost_nothing(server):
    files, memory = server.files(), server.memory()
    several = [server.connect() for _ in range(60)]
    for place, connection in enumerate(several):
        cut = [b"", WHOLE[:20], HEAD, WHOLE[:-5]][place % 4]
        connection.sendall(cut)
    assert server.ask()[0] == 200  # they keep nobody away
    answers = [received(connection) for connection in several]  # they are closed in time
    for answer in answers: assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
    for connection in several: connection.close()
    for _ in range(60):  # with a reset, in the middle of a body or of the answer
        with server.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(random.choice([WHOLE, WHOLE[:-5]]))
    assert server.ask()[0] == 200
    until(lambda: server.files() <= files + 2)
    assert server.memory() < memory + 60


def test_a_body_that_comes_byte_by_byte_is_answered_if_in_time(server):
    with server.connect() as connection:
        for start in range(0, len(WHOLE), 400):
            connection.sendall(WHOLE[start:start + 400])
            time.sleep(0.02)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_bodies_of_100_megabytes_are_refused_without_being_kept(server):
    memory, part, total = server.memory(), bytes(2**20), 100 * 2**20

    def send(head, chunked):
        with server.connect() as connection:
            connection.sendall(head)
            try:
                for _ in range(100): connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n" if chunked else part)
            except (BrokenPipeError, ConnectionResetError): pass
            return received(connection)[:200]

    for _ in range(2):
        answer = send(HEAD + b"Content-Length: %d\r\n\r\n" % total, False)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
        answer = send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", True)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    with server.connect() as connection:  # one that asks first is told before it sends
        connection.sendall(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % total)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert server.ask()[0] == 200 and server.memory() < memory + 60


def test_requests_one_after_the_other_without_waiting_are_all_answered(server):
    with server.connect() as connection:
        connection.sendall(WHOLE * 20)
        connection.shutdown(socket.SHUT_WR)
        found = received(connection).count(b"HTTP/1.1 200")
    assert found >= 1  # the half that is closed may end the connection, but not the server
    with server.connect() as connection:
        connection.sendall(WHOLE * 20)
        parts = b""
        while parts.count(b"HTTP/1.1 200") < 20:
            part = connection.recv(65536)
            assert part
            parts += part
    assert server.ask()[0] == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 1000, b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                  b"POST /predict HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
                                  b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                  b"POST /predict HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}"])
def test_what_is_not_http_is_refused(server, data):
    with server.connect() as connection:
        with suppress(BrokenPipeError, ConnectionResetError): connection.sendall(data)
        connection.settimeout(10)
        answer = connection.recv(100)
    assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d", answer), answer
    assert server.ask()[0] == 200


# Thousands of bodies

def as_npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def as_png():
    from PIL import Image
    Image.fromarray((IMAGE[0] * 255).byte().numpy()).save(file := io.BytesIO(), "png")
    return file.getvalue()


PNG = as_png()
FORM = (b'--x\r\nContent-Disposition: form-data; name="inputs"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + PNG + b"\r\n--x--\r\n")
SEEDS = [(BODY, "application/json"), (b'{"inputs": [[[1, 2.5e3, -0, true]]]}', "application/json"), (as_npy(IMAGE.numpy()), "application/octet-stream"),
         (as_npy(np.zeros((2, 1, 8, 8), ">f8", order="F")), "application/x-npy"), (PNG, "image/png"), (FORM, "multipart/form-data; boundary=x")]
WORDS = [b"NaN", b"1e999", b"-", b"null", b"{", b"}", b"[", b"]" * 50, b'"inputs"', b"\\ud800", b"\xff\xfe", b"\0", b"9" * 400, b"'descr'", b"(1, 8, 8)", b"(99999999, 99999999)", b"|O", b"<f8",
         b"--x\r\n", b"\r\n\r\n", b"IHDR", b"\x93NUMPY", b"../../etc/passwd", b"__import__('os')", b"true", b",", b":"]
TYPES = [kind for _, kind in SEEDS] + ["", "text/plain", "image/svg+xml", "application/xml", "multipart/form-data", "image/*", "\x7f", "application/json; charset=utf-16"]


def mutated(source):
    "A body that may be anything, and its type."
    body, kind = source.choice(SEEDS)
    body = bytearray(body)
    for _ in range(source.choice([0, 1, 1, 2, 5, 30])):
        place = source.randrange(len(body) + 1)
        change = source.randrange(6)
        if change == 0: body[place:place + 1] = bytes([source.randrange(256)])
        elif change == 1: del body[place:place + source.choice([1, 3, 100])]
        elif change == 2: body[place:place] = source.choice(WORDS)
        elif change == 3: body[place:place] = source.randbytes(source.choice([1, 8, 200]))
        elif change == 4: body += body[:place]
        else: body[place:place + 4] = source.choice(WORDS)
        del body[20_000:]
    if source.random() < 0.15: kind = source.choice(TYPES)
    return bytes(body), kind


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=LONG)])
def test_no_body_breaks_the_server_or_makes_it_grow(server, count):
    source, found = random.Random(count), {}
    memory = server.memory()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    for number in range(count):
        body, kind = mutated(source)
        path = source.choice(["/predict", "/predict", "/predict", "/models/0/predict", "/saliency" if number % 10 == 0 else "/predict"])
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        text = answer.read()
        found[answer.status] = found.get(answer.status, 0) + 1
        assert answer.status < 500, (number, kind, body[:300], text)
        if answer.status != 200:
            error = json.loads(text)
            assert error["error"] and "\n" not in error["error"] and error["error"].isprintable()
        if number == 100: memory = server.memory()
    connection.close()
    print(found, f"memory from {memory:.0f} to {server.memory():.0f} MB")
    assert found[200] > count / 20 and found[422] > count / 20 and found[400] > count / 50, found
    assert server.ask()[0] == 200 and server.memory() < memory + 80 and server.errors == []


# Models that change

class Asking:
    "Clients that ask again and again, each over one connection as long as it lasts, and note what they got."

    def __init__(self, server, clients=8, pause=0):
        self.server, self.going, self.pause = server, True, pause
        self.outputs, self.bad, self.lost, self.times, self.count, self.refused = set(), [], [], [], 0, 0
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]
        for thread in self.threads: thread.start()

    def run(self):
        while self.going:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=SECONDS)
            try:
                connection.connect()
                while self.going and self.ask(connection): pass
            except ConnectionRefusedError:  # nothing was accepted, and the client knows it
                self.refused += 1
                return
            except Exception as error:
                self.lost.append(repr(error))
                return
            finally: connection.close()

    def ask(self, connection):
        "Ask once; returns whether the connection lasts."
        start = time.monotonic()
        connection.request("POST", "/predict", BODY, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        self.times.append(time.monotonic() - start)
        self.count += 1
        if answer.status == 200: self.outputs.add(tuple(json.loads(text)["predictions"][0]["output"]))
        else: self.bad.append((answer.status, text))
        time.sleep(self.pause)
        return not answer.will_close

    def wait_for(self, more):
        "Wait for so many answers."
        end = self.count + more
        until(lambda: self.count >= end)

    def end(self):
        self.going = False
        for thread in self.threads: thread.join(SECONDS)


@pytest.mark.parametrize(("way", "number"), [("signal", signal.SIGTERM), ("watch", signal.SIGINT)])
def test_a_model_is_loaded_again_and_the_server_ends_without_losing_a_request(exports, tmp_path, way, number):
    folder = tmp_path / "model"
    shutil.copytree(exports / "0", folder)

    def loaded(words):
        if way == "signal": server.process.send_signal(signal.SIGHUP)
        until(lambda: any(words in line for line in server.errors))

    with Process(folder, *(["--watch=0.1"] if way == "watch" else [])) as server:
        first = server.output()
        asking = Asking(server)
        try:
            asking.wait_for(20)
            export(small_model(1), folder)
            loaded("was loaded again")
            second = server.output()
            asking.wait_for(20)
            (folder / "program.json").write_text("{}")  # a damaged one does not take over
            (folder / "hashes.json").touch()
            loaded("program.json was changed")
            asking.wait_for(20)
            assert server.stop(number) == 0
        finally: asking.end()
        assert asking.lost == [] and asking.bad == []
        assert asking.refused == 8  # whoever comes later is told at once
        assert (second - first).abs().max() > 0.01
        near = [min(float((torch.tensor(each) - which).abs().max()) for which in (first, second)) for each in asking.outputs]
        assert max(near) < 1e-5  # every answer is of one model or of the other
        assert len(server.errors) == 2 and "stays as it is" in server.errors[1]


def test_a_second_ctrl_c_ends_at_once(exports):
    with Process(exports / "0") as server, server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.process.wait(SECONDS)
        assert time.monotonic() - start < 8


def test_a_service_ends_with_its_process(exports):
    code = f"from learner.use.serve import serve; service = serve({str(exports / '0')!r}, port=0); print(service)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and "0 served at" in done.stdout and done.stderr == ""


def test_a_process_that_ends_answers_first_and_leaves_no_thread_in_the_model(exports):
    code = """if True:
        import atexit, threading, time
        atexit.register(lambda: print("alive:", [thread.name for thread in threading.enumerate() if thread.name == "predictor"]))  # the last that is called
        import torch, torch.nn.functional as F
        from torch import nn
        from urllib.request import Request, urlopen
        from learner.loop.learner import Learner
        from learner.use.serve import serve

        class Slow(nn.Module):
            def forward(self, x):
                time.sleep(0.5)
                return x

        service = serve(Learner(Slow(), None, F.mse_loss, dict(validation=[(torch.rand(2, 3), torch.rand(2, 3))])), port=0)
        def ask(): print(urlopen(Request(service.url + "/predict", b'{"inputs": [1, 2, 3]}')).read().decode())
        threading.Thread(target=ask).start()
        time.sleep(0.2)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"output":[1.0,2.0,3.0]' in done.stdout and done.stdout.endswith("alive: []\n")


def test_a_key_from_the_environment(monkeypatch):
    from learner.runs.command import UsageError
    from learner.use.commands import _key
    monkeypatch.setenv("LEARNER_KEY", "from-the-environment")
    assert [_key("env"), _key("another"), _key(None)] == ["from-the-environment", "another", None]
    monkeypatch.delenv("LEARNER_KEY")
    with pytest.raises(UsageError, match="LEARNER_KEY is not set"): _key("env")


# An hour

@LONG
def test_an_hour_under_load_leaves_the_memory_flat_and_loses_nothing(exports, tmp_path):
    seconds = float(os.environ.get("LEARNER_SOAK", 3600))
    folder = tmp_path / "model"
    shutil.copytree(exports / "0", folder)
    with Process(folder) as server:
        asking = Asking(server, clients=4, pause=0.05)  # up to 80 requests a second, which leave a processor to others
        source, begin = random.Random(0), time.monotonic()
        sizes, reloads = [], 0
        while time.monotonic() - begin < seconds:
            time.sleep(min(5, seconds / 40))
            body, kind = mutated(source)
            assert server.ask(body, headers={"Content-Type": kind})[0] < 500
            assert server.ask(path="/saliency")[0] == 200 and server.ask(path="/metrics", method="GET")[0] == 200
            sizes.append((server.memory(), server.files()))
            if len(sizes) % 6 == 0:
                export(small_model(reloads % 2), folder)
                server.process.send_signal(signal.SIGHUP)
                reloads += 1
                until(lambda: sum("was loaded again" in line for line in server.errors) == reloads)
            if len(sizes) % 60 == 0: print(f"{time.monotonic() - begin:.0f} s: {asking.count} answers, {sizes[-1]}", flush=True)
        assert server.stop() == 0
        asking.end()
        assert asking.lost == [] and asking.bad == [] and asking.refused == 4
        third = len(sizes) // 3
        (memory, files), times = zip(*sizes, strict=True), sorted(asking.times)
        print(f"{asking.count} answers, {reloads} reloads, memory from {memory[third]:.0f} to {memory[-1]:.0f} MB, at most {max(memory):.0f}, "
              f"{max(files)} open files, p50 {times[len(times) // 2] * 1e3:.1f} ms, p99 {times[len(times) * 99 // 100] * 1e3:.1f} ms")
        assert asking.count > seconds and max(memory[-third:]) < max(memory[third:2 * third]) + 30
        assert max(files[-third:]) <= max(files[:third]) + 4
