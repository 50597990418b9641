"""A served model says what `predict` says, refuses what it cannot take in one line that names the field, and does nothing else."""
import asyncio
import io
import json
import pickle
import re
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.use import serve as module
from learner.use.export import export
from learner.use.inputs import ImageReader, InputError, Preparation
from learner.use.predict import predictor_of
from learner.use.predictor import Predictor
from learner.use.serve import serve
from learner.use.serve_batches import Batcher, Limits
from learner.use.serve_inputs import BodyReader, RequestError
from learner.use.serve_models import Models

httpx = pytest.importorskip("httpx")
np = pytest.importorskip("numpy")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    learn = Learner(model, torch.optim.AdamW, F.cross_entropy, digits())
    learn.train(1, learning_rate=0.01, test=False)
    return learn


def embedding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))]
    return Learner(net, None, F.cross_entropy, {"validation": data})


class TwoInputs(nn.Module):
    def forward(self, age, scores): return age[:, None] + scores @ scores.new_ones(3, 1)  # exactly three, as the OpenAPI text says


def two_inputs():
    data = [({"age": torch.rand(4), "scores": torch.rand(4, 3)}, torch.zeros(4, 1))]
    return Learner(TwoInputs(), None, F.mse_loss, {"validation": data})


@pytest.fixture(scope="module")
def learn(): return trained()


@pytest.fixture(scope="module")
def images(learn): return next(iter(learn.dataloaders["test"]))[0]


@pytest.fixture(scope="module")
def folder(learn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "digits"
    export(learn, folder)
    return folder


@pytest.fixture(scope="module")
def service(learn, folder):
    models = {"notebook": learn, "exported": folder, "words": embedding(), "table": two_inputs()}
    with serve(models, port=0, limits=Limits(body=2**20)) as service: yield service


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service.url, timeout=30) as client: yield client


def as_npy(value):
    np.save(file := io.BytesIO(), np.asarray(value))
    return file.getvalue()


def as_png(image):
    from PIL import Image
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(file := io.BytesIO(), "png")
    return file.getvalue()


def predicted(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def same(found, answer):
    "Whether what came over the wire is an answer of `predict` bit for bit."
    assert torch.equal(torch.tensor(found["output"]), answer.output)
    assert torch.equal(torch.tensor(list(found["probabilities"].values())), answer.probabilities)
    assert found["label"] == answer.label and found["probability"] == answer.probability


# What is served is what `predict` says

@pytest.mark.parametrize("name", ["notebook", "exported"])
def test_one_example_is_answered_as_by_predict_bit_for_bit(client, learn, folder, images, name):
    from learner.use.folder import Exported
    ask = learn.predict if name == "notebook" else Exported(folder).predictor
    for image in images[:5]:
        expected = ask(image)
        same(predicted(client.post(f"/models/{name}/predict", json={"inputs": image.tolist()}))[0], expected)
        same(predicted(client.post(f"/models/{name}/predict", json={"inputs": [image.tolist()]}))[0], expected)
        same(predicted(client.post(f"/models/{name}/predict", content=as_npy(image)))[0], expected)
        same(predicted(client.post(f"/models/{name}/predict", content=as_npy(image.double())))[0], expected)
        png = as_png(image)
        same(predicted(client.post(f"/models/{name}/predict", content=png, headers={"content-type": "image/png"}))[0], ask(png))


def test_a_batch_of_one_request_is_answered_as_by_predict_bit_for_bit(client, learn, images):
    expected = learn.predict(images[:20])
    for answer in (client.post("/predict", json={"inputs": images[:20].tolist()}), client.post("/predict", content=as_npy(images[:20]))):
        for found, one in zip(predicted(answer), expected, strict=True): same(found, one)
    pngs = [as_png(image) for image in images[:4]]
    found = predicted(client.post("/predict", files=[("inputs", ("x.png", png, "image/png")) for png in pngs]))
    for row, one in zip(found, learn.predict(pngs), strict=True): same(row, one)


def test_requests_that_are_answered_together_are_answered_as_alone_to_a_millionth(service, learn, images):
    alone = [learn.predict(image) for image in images[:40]]
    examples, batches = (f'learner_{name}_total{{model="notebook"}}' for name in ("examples", "batches"))

    def counts():
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{service.url}/metrics").text.splitlines() if line[0] != "#")
        return float(lines.get(examples, 0)), float(lines.get(batches, 0))

    before = counts()
    with httpx.Client(base_url=service.url, timeout=30) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda image: client.post("/predict", content=as_npy(image)), [*images[:40]] * 3))
    worst = 0.0
    for answer, expected in zip(answers, alone * 3, strict=True):
        found = predicted(answer)[0]
        scale = expected.output.abs().max().clamp(min=1)
        worst = max(worst, float((torch.tensor(found["output"]) - expected.output).abs().max() / scale),
                    float((torch.tensor(list(found["probabilities"].values())) - expected.probabilities).abs().max()))
        assert found["label"] == expected.label
    assert worst <= 1e-6
    after = counts()
    assert after[0] - before[0] == 120 and after[1] - before[1] < 100  # some were answered together


def test_batched_predict_equals_single_predict_to_a_millionth(learn, images):
    together = learn.predict(images[:32])
    for image, one in zip(images[:32], together, strict=True):
        assert torch.allclose(learn.predict(image).probabilities, one.probabilities, rtol=0, atol=1e-6)


def test_named_inputs_and_outputs_without_classes(client):
    rows = [{"age": 1, "scores": [1, 2, 3]}, {"age": 2.5, "scores": [0, 0, 0]}]
    assert [row["output"] for row in predicted(client.post("/models/table/predict", json={"inputs": rows}))] == [[7.0], [2.5]]
    columns = {"age": [1, 2.5], "scores": [[1, 2, 3], [0, 0, 0]]}
    assert [row["output"] for row in predicted(client.post("/models/table/predict", json={"inputs": columns}))] == [[7.0], [2.5]]
    assert predicted(client.post("/models/table/predict", json={"inputs": rows[0]})) == [{"output": [7.0]}]


def test_the_learner_may_train_while_it_is_served(learn, images):
    with serve(learn, port=0) as service:
        before = httpx.post(f"{service.url}/predict", json={"inputs": images[0].tolist()}).json()
        copy = Learner(learn.model, torch.optim.AdamW, F.cross_entropy, digits())
        state = {name: value.clone() for name, value in learn.model.state_dict().items()}
        copy.train(1, learning_rate=0.1, test=False)
        after = httpx.post(f"{service.url}/predict", json={"inputs": images[0].tolist()}).json()
        learn.model.load_state_dict(state)
    assert before == after


# Bad input

ZEROS = [[[0.0] * 8] * 8]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
BAD = {  # name: model, body, content type, status, what the line says, the field
    "no JSON": ("notebook", b'{"inputs": [1,', "application/json", 400, "the body is not JSON", None),
    "not UTF-8": ("notebook", b'{"inputs": "\xff"}', "application/json", 400, "the body is not text in UTF-8", None),
    "no mapping": ("notebook", b"[1, 2]", "application/json", 422, "the body is not a mapping", None),
    "empty": ("notebook", b"", "application/json", 400, "the body is empty", None),
    "wrong key": ("notebook", {"imputs": ZEROS}, None, 422, "imputs is not a field; did you mean inputs?", "imputs"),
    "half a character": ("notebook", b'{"i\\ud800": 1}', "application/json", 422, "i\\ud800 is not a field", "i\\ud800"),
    "a key that steers a terminal": ("notebook", b'{"\\u001b[2J": 1}', "application/json", 422, "\\x1b[2J is not a field", "\\x1b[2J"),
    "no key": ("notebook", {}, None, 422, "inputs is missing", "inputs"),
    "two keys": ("notebook", b'{"inputs": 1, "inputs": 2}', "application/json", 400, "the body has a key twice", None),
    "dimensions": ("notebook", {"inputs": [1, 2]}, None, 422, "inputs are float32 of shape (2,); one example is float32 of shape (1, 8, 8)", "inputs"),
    "width": ("notebook", {"inputs": [[[0.0] * 7] * 8]}, None, 422, "cannot take an example that is float32 of shape (1, 8, 7)", "inputs"),
    "ragged": ("notebook", {"inputs": [[[0, 0], [0]]]}, None, 422, "inputs is not an array: its lists differ in length", "inputs"),
    "text": ("notebook", {"inputs": "../../secret.txt"}, None, 422, "inputs holds text", "inputs"),
    "paths": ("notebook", {"inputs": ["/etc/passwd"]}, None, 422, "inputs holds text", "inputs"),
    "numbers as text": ("notebook", {"inputs": [[["0"] * 8] * 8]}, None, 422, "inputs holds text", "inputs"),
    "null": ("notebook", {"inputs": None}, None, 422, "inputs holds something that is not a number", "inputs"),
    "none": ("notebook", {"inputs": []}, None, 422, "shape (0,)", "inputs"),
    "NaN": ("notebook", b'{"inputs": [NaN]}', "application/json", 400, "the body has NaN, which is not JSON", None),
    "too large a number": ("notebook", b'{"inputs": [1e999]}', "application/json", 400, "which is too large", None),
    "beyond float32": ("notebook", {"inputs": [[[1e300] * 8] * 8]}, None, 422, "inputs[0][0][0] is 1e+300, which is not a finite number", "inputs"),
    "too long a number": ("notebook", b'{"inputs": ' + b"9" * 200 + b"}", "application/json", 400, "a number of 200 digits", None),
    "deep": ("notebook", b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", "application/json", 400, "nested more than 100 levels", None),
    "too many": ("notebook", {"inputs": [ZEROS] * 257}, None, 413, "inputs has 257 examples, and at most 256", "inputs"),
    "far too large": ("notebook", as_npy(np.zeros((1, 300, 300), np.float16)), "application/octet-stream", 413, "inputs has 90,000 numbers in an example", "inputs"),
    "too long a body": ("notebook", bytes(2**20 + 1), "application/json", 413, "more than 1,048,576 bytes", None),
    "type": ("notebook", b"<x/>", "application/xml", 415, "the content type application/xml is not supported", None),
    "NaN in an array": ("notebook", as_npy(np.full((1, 8, 8), np.nan)), "application/octet-stream", 422, "inputs[0][0][0] is nan", "inputs"),
    "bytes": ("notebook", as_npy(np.zeros((1, 8, 8), np.uint8)), "application/octet-stream", 422, "inputs is uint8 of shape (1, 8, 8)", "inputs"),
    "a cut array": ("notebook", as_npy(np.zeros((1, 8, 8)))[:-3], "application/octet-stream", 400, "509 follow the header", "inputs"),
    "objects": ("notebook", b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 13 + b"\n" + pickle.dumps([1]),
                "application/octet-stream", 422, "an array of object", "inputs"),
    "a header of code": ("notebook", b"\x93NUMPY\x01\x00F\x00__import__('os').system('x')".ljust(79) + b"\n", "application/octet-stream", 400, "not a .npy file", "inputs"),
    "an array of Python 2": ("notebook", as_npy(np.zeros((1, 8, 8))).replace(b"(1, 8, 8)", b"(1L,8, 8)"), "application/octet-stream", 400, "not a .npy file", "inputs"),
    "complex numbers": ("notebook", as_npy(np.zeros((1, 8, 8), complex)), "application/octet-stream", 422, "complex128, which are not numbers", "inputs"),
    "a broken picture": ("notebook", PNG, "image/png", 422, "not a picture that can be read", "inputs"),
    "a pickle": ("notebook", pickle.dumps({"inputs": 1}), "application/octet-stream", 422, "not a picture that can be read", "inputs"),
    "no pictures": ("words", PNG, "image/png", 415, "this model takes no pictures", None),
    "a form with text": ("notebook", b'--x\r\nContent-Disposition: form-data; name="inputs"\r\n\r\n1\r\n--x--\r\n', "multipart/form-data; boundary=x", 422, "is not a file", "inputs"),
    "a form with another name": ("notebook", b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n1\r\n--x--\r\n', "multipart/form-data; boundary=x", 422,
                                 "image is not a field of the form", "image"),
    "a form without end": ("notebook", b"--x\r\nContent", "multipart/form-data; boundary=x", 422, "inputs is empty", "inputs"),
    "a form without boundary": ("notebook", b"abc", "multipart/form-data", 400, "Missing boundary", None),
    "floats": ("words", {"inputs": [0.5, 1, 2]}, None, 422, "the model takes whole numbers", "inputs"),
    "out of the vocabulary": ("words", {"inputs": [1, 2, 99]}, None, 422, "the model cannot take these inputs: index out of range", "inputs"),
    "a field with a typo": ("table", {"inputs": {"aeg": 1, "scores": [1, 2, 3]}}, None, 422, "inputs.aeg is not a field; did you mean age?", "inputs.aeg"),
    "a field is missing": ("table", {"inputs": {"age": 1}}, None, 422, "inputs.scores is missing", "inputs.scores"),
    "one of many": ("table", {"inputs": [{"age": 1, "scores": [1, 2, 3]}, {"age": "x", "scores": [1, 2, 3]}]}, None, 422, "inputs[1].age holds text", "inputs[1].age"),
    "columns of two lengths": ("table", {"inputs": {"age": [1, 2], "scores": [[1, 2, 3]]}}, None, 422, "scores has 1 examples, and age has 2", "inputs"),
    "an array for two inputs": ("table", as_npy(np.zeros(3)), "application/octet-stream", 415, "the model takes age, scores, and a .npy file holds one array", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_that_names_the_field(client, name):
    model, body, kind, status, line, field = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(f"/models/{model}/predict", content=content, headers={"content-type": kind or "application/json"})
    found = answer.json()
    assert answer.status_code == status, found
    assert line in found["error"] and "\n" not in found["error"] and len(found["error"]) < 600, found
    assert found["field"] == field or line.startswith("scores"), found


def test_an_archive_of_arrays_is_not_opened(client):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive: archive.writestr("a.npy", as_npy(np.zeros((1, 8, 8))))
    answer = client.post("/predict", content=file.getvalue(), headers={"content-type": "application/octet-stream"})
    assert answer.status_code == 422 and "picture" in answer.json()["error"]


def test_bytes_and_other_dtypes_are_not_changed_in_silence():
    reader = BodyReader(Preparation(torch.empty(2, dtype=torch.uint8, device="meta")))
    assert reader(b'{"inputs": [0, 255]}').tolist() == [[0, 255]]
    for body in (b'{"inputs": [0, 256]}', b'{"inputs": [-1, 0]}'):
        with pytest.raises(RequestError, match="whole numbers from 0 to 255"): reader(body)
    flags = BodyReader(Preparation(torch.empty(2, dtype=torch.bool, device="meta")))
    assert flags(b'{"inputs": [true, 0]}').tolist() == [[True, False]]
    with pytest.raises(RequestError, match="from 0 to 1"): flags(b'{"inputs": [2, 0]}')
    exact = BodyReader(Preparation(torch.empty(1, dtype=torch.float64, device="meta")))
    assert exact(b'{"inputs": [0.1]}').item() == 0.1 and exact(as_npy(np.array([0.1], ">f8"))).item() == 0.1
    assert exact(b'{"inputs": [123456789012345678901234567890]}').item() == 123456789012345678901234567890.0


# Nothing of a body is executed, imported or opened

WATCHED = {"open", "import", "exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.listdir", "os.remove", "os.rename", "shutil.rmtree"}
EVENTS: list | None = None


def _audit(event, arguments):
    if EVENTS is not None and event in WATCHED: EVENTS.append((event, str(arguments)[:200]))


def test_nothing_of_a_body_is_opened_imported_or_executed(learn, images, tmp_path):
    global EVENTS
    class Evil:
        def __reduce__(self): return open, (str(tmp_path / "made"), "w")
    reader = BodyReader(predictor_of(learn).preparation)
    np.save(file := io.BytesIO(), np.array([Evil()], dtype=object), allow_pickle=True)
    bodies = [pickle.dumps(Evil()), file.getvalue(), json.dumps({"inputs": str(tmp_path)}).encode(), json.dumps({"inputs": [str(tmp_path / "x.png")]}).encode(),
              json.dumps({"inputs": {"__class__": "os.system", "args": ["x"]}}).encode(), *(body for _, body, *_ in BAD.values() if isinstance(body, bytes))]
    for body in [as_npy(images[0]), as_png(images[0]), *bodies]:  # whatever is loaded once
        with suppress(InputError): reader(body)
    sys.addaudithook(_audit)
    EVENTS = []
    for body in bodies:
        with pytest.raises(InputError): reader(body)
    found, EVENTS = EVENTS, None
    assert [event for event in found if "importlib" not in event[1]] == []
    assert list(tmp_path.iterdir()) == []


# Who may ask

def test_a_key_is_asked_for(learn, images):
    with serve(learn, port=0, key="a-long-secret") as service, httpx.Client(base_url=service.url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a-long-secret"}, {"x-api-key": "a-long-secreT"}):
            for path in ("/predict", "/saliency"):
                answer = client.post(path, json={"inputs": images[0].tolist()}, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            for path in ("/model", "/models", "/metrics", "/openapi.json"): assert client.get(path, headers=headers).status_code == 401
        for headers in ({"authorization": "Bearer a-long-secret"}, {"x-api-key": "a-long-secret"}):
            assert client.post("/predict", json={"inputs": images[0].tolist()}, headers=headers).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200
        assert client.post("/predict", headers={"x-api-key": "sécret".encode("latin-1")}).status_code == 401


def test_a_page_of_another_name_cannot_ask(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil"):
        answer = client.get("/models", headers={"host": host})
        assert answer.status_code == 403 and "answers to localhost" in answer.json()["error"]
    for host in ("localhost", "127.0.0.1:9", "[::1]:8000"): assert client.get("/health", headers={"host": host}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/models", headers={"origin": "http://evil.example"}).headers


@pytest.mark.parametrize(("options", "line"), [
    ({"host": "0.0.0.0"}, "host is 0.0.0.0, so others on the network can ask the model; give a key, or public=True"),
    ({"key": "short"}, "key is too short"), ({"key": "a key\nwith a line"}, "key is too short, or has characters"),
    ({"port": 99999}, "port is 99999; it must be from 0 to 65535"), ({"host": "no.such.host.invalid", "key": "long enough"}, "is not available")])
def test_an_address_that_cannot_be_served_is_refused(learn, options, line):
    with pytest.raises(ValueError, match=re.escape(line)): serve(learn, **{"port": 0, **options})


def test_a_server_for_the_network_needs_a_key_or_says_that_it_is_public(learn):
    with serve(learn, host="0.0.0.0", port=0, key="long enough") as service: assert httpx.get(f"{service.url}/health").status_code == 200
    with serve(learn, host="0.0.0.0", port=0, public=True) as service:
        assert httpx.get(f"{service.url}/models", headers={"host": "my.machine"}).status_code == 200


# Too much at a time

class Sleepy:
    "A model that takes its time."

    def __init__(self, seconds): self.seconds, self.rows = seconds, []

    def __call__(self, batch):
        self.rows.append(len(batch))
        time.sleep(self.seconds)
        return batch.sum(1)


def sleepy(seconds): return Predictor(Sleepy(seconds), Preparation(torch.empty(3, device="meta")))


def test_a_full_queue_refuses_and_says_when_to_come_again():
    predictor = sleepy(0.05)
    limits = Limits(batch=4, queue=8, rows=4)
    with serve(predictor, port=0, limits=limits) as service, ThreadPoolExecutor(40) as pool, httpx.Client(base_url=service.url, timeout=30,
                                                                                                           limits=httpx.Limits(max_connections=40)) as client:
        answers = list(pool.map(lambda i: client.post("/predict", json={"inputs": [i, 0, 0]}), range(80)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        for i, answer in enumerate(answers):
            if answer.status_code == 200: assert answer.json()["predictions"] == [{"output": float(i)}]
            else: assert answer.headers["retry-after"] == "1" and "the server is busy" in answer.json()["error"]
        assert client.post("/predict", json={"inputs": [1, 2, 3]}).status_code == 200
    assert max(predictor.ask.rows) <= 4 and sum(predictor.ask.rows) == codes.count(200) + 1


def test_a_model_that_hangs_is_given_up():
    with serve(sleepy(1.5), port=0, limits=Limits(seconds=0.3)) as service:
        start = time.monotonic()
        answer = httpx.post(f"{service.url}/predict", json={"inputs": [1, 2, 3]}, timeout=10)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and 0.25 < time.monotonic() - start < 1.4
        assert httpx.get(f"{service.url}/health").json()["status"] == "ok"  # it is awake meanwhile


def test_all_bodies_together_are_bounded(learn):
    import socket
    limits = Limits(body=2**20, memory=2**21, seconds=3)
    with serve(learn, port=0, limits=limits) as service:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        several = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(2)]
        for each in several: each.sendall(head + bytes(950_000))
        for _ in range(100):
            if service.server.app.bodies.held == 1_900_000: break
            time.sleep(0.02)
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as third:
            third.sendall(head)
            assert b"busy with other large requests" in third.recv(1000)
        for each in several: each.close()
        for _ in range(100):
            if service.server.app.bodies.held == 0: break
            time.sleep(0.02)
        assert service.server.app.bodies.held == 0


def test_one_bad_example_does_not_spoil_those_beside_it(service):
    with httpx.Client(base_url=service.url, timeout=30) as client, ThreadPoolExecutor(16) as pool:
        rows = [[1, 2, 99 if i % 5 == 0 else 3] for i in range(20)]
        answers = list(pool.map(lambda row: client.post("/models/words/predict", json={"inputs": row}), rows))
    assert [answer.status_code for answer in answers] == [422 if row[2] == 99 else 200 for row in rows]


def test_only_examples_of_one_shape_go_together():
    seen = []

    def work(batch):
        seen.append(tuple(batch.shape))
        time.sleep(0.01)
        return batch.flatten(1).sum(1).tolist()

    async def go():
        batcher = Batcher(work, Limits(batch=8, wait=0.01))
        rows = await asyncio.gather(*(batcher.submit(torch.ones(1, 2 + i % 2)) for i in range(10)), batcher.submit(torch.ones(20, 2)))
        await batcher.close()
        return rows

    rows = asyncio.run(go())
    assert rows[:10] == [[2.0 + i % 2] for i in range(10)] and rows[10] == [2.0] * 20
    assert sum(shape[0] for shape in seen) == 30 and (20, 2) in seen


@pytest.mark.parametrize("values", [{"batch": 0}, {"wait": -1}, {"queue": 10}, {"seconds": 0}, {"memory": 10}, {"rows": 1.5}, {"wait": float("nan")}])
def test_limits_are_checked(values):
    with pytest.raises(ValueError): Limits(**values)


# The other routes

def test_the_routes_say_what_is_served(client, folder):
    assert client.get("/health").json() == {"status": "ok", "models": ["notebook", "exported", "words", "table"]}
    found = client.get("/models/exported").json()
    assert found["inputs"] == [{"name": "inputs", "dtype": "float32", "shape": [1, 8, 8]}] and found["classes"] == [str(i) for i in range(10)]
    assert found["card"] == (folder / "README.md").read_text() == client.get("/models/exported", headers={"accept": "text/markdown"}).text
    assert client.get("/model").json()["name"] == "notebook"
    assert [each["name"] for each in client.get("/models").json()["models"]] == ["notebook", "exported", "words", "table"]
    for path, status, line in (("/models/exportd", 404, "did you mean exported?"), ("/nothing", 404, "there is nothing at /nothing"), ("/predict", 405, "/predict does not take GET requests"),
                               ("/../../etc/passwd", 404, "there is nothing"), ("/%2e%2e/page.js", 404, "there is nothing")):
        answer = client.get(path)
        assert answer.status_code == status and line in answer.json()["error"]
    assert client.get("/predict").headers["allow"] == "POST"


def test_metrics_are_in_the_format_of_prometheus(client, images):
    parser = pytest.importorskip("prometheus_client.parser")
    client.post("/predict", json={"inputs": images[0].tolist()})
    families = {family.name: family for family in parser.text_string_to_metric_families(client.get("/metrics").text)}
    assert families["learner_examples"].type == "counter" and families["learner_request_seconds"].type == "histogram"
    requests = {(sample.labels["route"], sample.labels["status"]): sample.value for sample in families["learner_requests"].samples}
    assert requests["/predict", "200"] >= 1


def test_saliency_is_that_of_the_library(client, learn, images):
    from learner.use.saliency import attributions
    pytest.importorskip("captum")
    answer = client.post("/saliency", json={"inputs": images[3].tolist()})
    assert torch.equal(torch.tensor(answer.json()["saliency"]), attributions(predictor_of(learn), images[3]))
    assert client.post("/saliency", json={"inputs": images[:2].tolist()}).status_code == 422
    assert "takes neither images" in client.post("/models/words/saliency", json={"inputs": [1, 2, 3]}).json()["error"]


def test_what_speaks_for_the_answer_about_a_row_of_a_table(client):
    pytest.importorskip("captum")
    body = {"inputs": {"age": 10, "scores": [1, 2, 3]}}
    answer = client.post("/models/table/saliency", json=body)
    typical = {each["name"]: each["typical"] for each in client.get("/models/table").json()["inputs"]}
    differences = torch.tensor([10 - typical["age"], *(torch.tensor([1.0, 2, 3]) - torch.tensor(typical["scores"])).tolist()])
    assert torch.allclose(torch.tensor(answer.json()["saliency"]), differences, atol=1e-5)  # the model adds its inputs
    assert client.post("/models/table/saliency", json={"inputs": [body["inputs"]] * 2}).status_code == 422


def test_one_score_of_two_classes_speaks_for_the_class_that_is_answered(tmp_path):
    pytest.importorskip("captum")
    net = nn.Linear(2, 1)
    with torch.no_grad(): net.weight.copy_(torch.tensor([[1.0, 0.0]])), net.bias.zero_()
    rows = torch.tensor([[0.0, 0.0], [0.0, 5.0], [1.0, 5.0]])

    class Data(dict): classes, columns = ["no", "yes"], ["dose", "weight"]
    learn = Learner(net, None, F.binary_cross_entropy_with_logits, Data(validation=[(rows, torch.zeros(3, 1))]))
    export(learn, tmp_path / "exported")
    with serve({"notebook": learn, "exported": tmp_path / "exported"}, port=0) as service:
        for name in ("notebook", "exported"):
            about = httpx.get(f"{service.url}/models/{name}").json()["inputs"]
            assert about == [{"name": "inputs", "dtype": "float32", "shape": [2], "columns": ["dose", "weight"], "typical": [0.0, 5.0]}]
            for dose, label in ((-2.0, "no"), (2.0, "yes")):
                found = httpx.post(f"{service.url}/models/{name}/saliency", json={"inputs": [dose, 7]}).json()
                assert found["label"] == label and found["saliency"] == [pytest.approx(torch.sigmoid(torch.tensor(2.0)).item() - 0.5), 0.0]


def test_the_openapi_text_has_the_routes_that_there_are(client):
    text = client.get("/openapi.json").json()
    assert set(text["paths"]) >= {"/predict", "/saliency", "/models/words/predict", "/model", "/health", "/metrics"}
    assert "/models/words/saliency" not in text["paths"]
    assert text["paths"]["/models/table/predict"]["post"]["requestBody"]["content"].keys() == {"application/json"}


SCHEMATHESIS = """
import sys, schemathesis, httpx
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (content_type_conformance, negative_data_rejection, response_schema_conformance,
                                               status_code_conformance)
url, count = sys.argv[1], int(sys.argv[2])
schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
schema.config.checks.negative_data_rejection.expected_statuses = ["400", "413", "415", "422"]  # 413 is for too many examples
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection]
asked = 0
for operation in schema.get_all_operations():
    operation = operation.ok()
    for mode in schemathesis.GenerationMode:
        strategy = operation.as_strategy(generation_mode=mode)
        from hypothesis import given
        @given(strategy)
        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        def test(case):
            global asked
            asked += 1
            case.call_and_validate(base_url=url, checks=CHECKS)
        try: test()
        except Exception as error:
            if type(error).__name__ in ("SkipTest", "Unsatisfiable", "InvalidArgument"): continue
            raise
print("asked", asked)
"""


@pytest.mark.parametrize("count", [6, pytest.param(300, marks=pytest.mark.long)])
def test_schemathesis_finds_nothing(service, count, tmp_path):
    import subprocess
    pytest.importorskip("schemathesis")
    script = tmp_path / "script.py"
    script.write_text(SCHEMATHESIS)
    done = subprocess.run([sys.executable, script, service.url, str(count)], capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.rsplit("asked ", 1)[1]) >= 15 * min(count, 4)


# A notebook's way

def test_a_service_is_shown_stopped_and_used_with_with(learn):
    before = threading.active_count()
    service = serve(learn, port=0)
    assert threading.active_count() > before and f'<iframe src="{service.url}/"' in service._repr_html_() and repr(service) == f"model served at {service.url}"
    service.stop()
    service.stop()
    assert "was served" in repr(service) and service._repr_html_() == repr(service)  # no frame around nothing
    with pytest.raises(httpx.ConnectError): httpx.get(service.url)
    assert service._thread.name == "server" and not service._thread.is_alive()


def test_a_cell_that_is_run_again_serves_on_the_next_port(learn):
    with serve(learn) as one, serve(learn) as other:
        assert 8000 <= one.port < other.port < 8200 and httpx.get(f"{other.url}/health").status_code == 200
        with pytest.raises(ValueError, match=f"port {one.port} of 127.0.0.1 is not available"): serve(learn, port=one.port)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, learn, capsys, folder):
    from learner.runs.cli import main
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("uvicorn", "starlette") else True)
    with pytest.raises(ImportError, match=r"a server needs Starlette, Uvicorn, which are not installed; pip install 'nblearner\[serve\]'"): serve(learn, port=0)
    assert main(["serve", str(folder)]) == 2
    assert capsys.readouterr().err == "learner serve: a server needs Starlette, Uvicorn, which are not installed; pip install 'nblearner[serve]'\n"


def test_what_cannot_be_served_is_refused(learn, tmp_path):
    nothing = Learner(nn.Linear(1, 1), None, F.mse_loss, {"train": iter([])})
    with pytest.raises(InputError, match="the form of an example is not known"): serve(nothing, port=0)
    with pytest.raises(ValueError, match="there is no model to serve"): serve({}, port=0)
    with pytest.raises(TypeError, match="a Linear cannot be served"): serve(nn.Linear(1, 1), port=0)
    with pytest.raises(ValueError, match="has no hashes.json"): serve(tmp_path, port=0)
    with pytest.raises(ValueError, match="two classes named a"):
        serve(Predictor(lambda batch: batch, Preparation(torch.empty(2)), ["a", "a"], "softmax"), port=0)


def test_a_mounted_application_answers(folder):
    fastapi = pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from learner.use.serve_app import Application
    app = fastapi.FastAPI()
    app.mount("/digits", Application(Models({"digits": folder})))
    with TestClient(app) as client:
        assert client.post("/digits/predict", json={"inputs": ZEROS}).status_code == 200
        for path in ("/", "/page.js", "/page.css"): assert client.get(f"/digits{path}").status_code == 200


def test_a_picture_of_any_size_is_taken_where_the_reader_scales():
    reader = BodyReader(Preparation(torch.empty(3, 4, 4, device="meta"), ImageReader(3, (4, 4), resize=True)))
    assert reader(as_png(torch.rand(1, 9, 7))).shape == (1, 3, 4, 4)
    exact = BodyReader(Preparation(torch.empty(1, 4, 4, device="meta"), ImageReader(1, (4, 4))))
    with pytest.raises(RequestError, match="the picture is 7 x 9 pixels and the model's are 4 x 4"): exact(as_png(torch.rand(1, 9, 7)))


def test_a_fault_of_the_server_is_told_to_nobody_but_the_terminal(learn, capsys, monkeypatch):
    from learner.use.serve_models import Served
    with serve(learn, port=0) as service:
        def broken(self): raise AssertionError("a secret detail")
        monkeypatch.setattr(Served, "info", broken)
        answer = httpx.get(f"{service.url}/model")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "a secret detail" in capsys.readouterr().err
