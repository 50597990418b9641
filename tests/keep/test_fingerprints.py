"""What is noted, in memory and in files; runs that stop and go on; where two runs part."""
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.provenance import seed_everything
from learner.keep.fingerprints import FingerprintError, Fingerprints, first_difference, read_fingerprints
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException

PARTS = ("model", "optimiser", "order", "rng")


def learner(callbacks=None, seed=0, order=0, rate=0.1):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    seed_everything(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    loaders = DataLoaders.from_tensors(train=(x[:40], y[:40]), validation=(x[40:], y[40:]), batch_size=8, seed=order)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), F.cross_entropy, loaders, callbacks, device="cpu")


def noted(epochs=2, every=1, file=None, callbacks=(), **kwargs):
    prints = Fingerprints(every, file)
    learner([*callbacks, prints], **kwargs).train(epochs)
    return prints


def places(records): return [(record["epoch"], record["batch"]) for record in records]


class At(Callback):
    "Does something after one batch."
    watches = True

    def __init__(self, epoch, batch, what): self.place, self.what = (epoch, batch), what

    def after_batch(self, learn):
        if (len(learn.history), learn.batch_num) == self.place: self.what(learn)


def test_a_record_is_what_the_learner_says_after_the_batch():
    seen = []
    late = At(0, 3, lambda learn: seen.append(learn.fingerprint()))
    prints = noted(callbacks=[late])
    assert places(prints) == [(epoch, batch) for epoch in range(2) for batch in range(5)]
    assert {name: prints[3][name] for name in PARTS} == seen[0]
    assert all(set(record) == {"epoch", "batch", *PARTS} for record in prints)


@pytest.mark.parametrize(("every", "batches"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (4, [0, 4]), (9, [0])])
def test_the_number_of_the_batch_decides(every, batches):
    assert places(noted(every=every)) == [(epoch, batch) for epoch in range(2) for batch in batches]


def test_epochs_number_on_through_calls():
    prints = Fingerprints()
    learn = learner(prints)
    learn.train(1)
    learn.train(1)
    assert places(prints)[-1] == (1, 4)
    assert first_difference(prints, noted()) is None


def test_the_file_has_the_records(tmp_path):
    prints = noted(file=tmp_path / "prints.jsonl")
    assert read_fingerprints(tmp_path / "prints.jsonl") == prints.records
    assert (tmp_path / "prints.jsonl").read_text() == "".join(json.dumps(record) + "\n" for record in prints)


def test_a_new_run_into_an_old_file_replaces_it(tmp_path):
    file = tmp_path / "prints.jsonl"
    noted(3, file=file)
    second = noted(1, seed=1, file=file)
    assert read_fingerprints(file) == second.records


def test_a_run_that_goes_on_from_a_checkpoint_has_the_records_of_one_that_never_stopped(tmp_path):
    file = tmp_path / "prints.jsonl"
    whole = noted(3)

    def fail(learn): raise RuntimeError("a crash")
    def save(learn): learn.save(tmp_path / "state")

    with pytest.raises(RuntimeError):
        learner([At(1, 1, save), At(2, 2, fail), Fingerprints(file=file)]).train(3)
    assert places(read_fingerprints(file))[-1] == (2, 1)  # ten batches after the checkpoint
    with file.open("a") as stream: stream.write('{"epoch": 2, "ba')  # and half a line
    going_on = Fingerprints(file=file)
    learner([going_on], seed=5).train(resume=tmp_path / "state")
    assert places(going_on)[0] == (1, 2)
    assert read_fingerprints(file) == whole.records


def test_in_one_process_the_records_of_batches_that_are_done_again_go():
    prints = Fingerprints()
    learn = learner([At(1, 3, lambda learn: 1 / learn.zero), prints])
    learn.zero = 0
    with pytest.raises(ZeroDivisionError): learn.train(2)
    learn.zero = 1
    learn.train(resume=True)
    assert len(places(prints)) == len(set(places(prints)))
    assert places(prints)[-1] == (1, 4)


def test_a_killed_process_leaves_a_file_that_can_be_read(tmp_path):
    code = ("import os, signal, sys; sys.path.insert(0, 'tests/keep'); from test_fingerprints import *\n"
            "noted(2, file=sys.argv[1], callbacks=[At(1, 2, lambda learn: os.kill(os.getpid(), signal.SIGKILL))])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "prints.jsonl"], capture_output=True)
    assert done.returncode == -9, done.stderr
    killed = read_fingerprints(tmp_path / "prints.jsonl")
    assert places(killed)[-1] == (1, 1)
    assert first_difference(killed, noted()) is None


def test_a_cancelled_batch_is_not_noted():
    class Skip(Callback):
        def before_batch(self, batch_num):
            if batch_num == 2: raise CancelBatchException
    assert places(noted(1, callbacks=[Skip()])) == [(0, 0), (0, 1), (0, 3), (0, 4)]


def draw(learn): torch.rand(1)


def nudge(learn):
    with torch.no_grad(): learn.model[0].weight[0, 0] += 1e-6


def heat(learn): learn.optimiser.param_groups[0]["lr"] = 0.2


@pytest.mark.parametrize(("what", "parts"), [(draw, {"rng"}), (nudge, {"model"}), (heat, {"optimiser"})])
def test_the_part_that_a_change_is_in_is_named(what, parts):
    found = first_difference(noted(), noted(callbacks=[At(1, 3, what)]))
    assert (found.epoch, found.batch, set(found.parts), found.agreed) == (1, 3, parts, (1, 2))


def test_another_order_of_the_data_is_named():
    found = first_difference(noted(), noted(order=1))
    assert (found.epoch, found.batch) == (0, 0) and "order" in found.parts and "rng" not in found.parts
    assert found.agreed is None


def test_what_only_one_has_is_passed_over():
    found = first_difference(noted(every=3), noted(every=2, callbacks=[At(0, 1, draw)]))
    assert (found.epoch, found.batch, found.agreed) == (1, 0, (0, 0))  # 0 is all that both have noted in an epoch
    records = noted().records
    assert first_difference(records[:4], records) is None
    assert first_difference([{"epoch": 0, "batch": 0, "model": "a"}], [{"epoch": 0, "batch": 0, "model": "a", "rng": "b"}]) is None


@pytest.mark.parametrize(("one", "other"), [([], []), ([{"epoch": 0, "batch": 0, "model": "a"}], [{"epoch": 0, "batch": 1, "model": "a"}]),
                                            ([{"epoch": 0, "batch": 0, "model": "a"}], [{"epoch": 0, "batch": 0, "rng": "a"}])])
def test_nothing_in_common_is_an_error_and_not_agreement(one, other):
    with pytest.raises(FingerprintError, match="no batch was noted in both runs"): first_difference(one, other)


@pytest.mark.parametrize(("text", "message"), [
    ("[]\n", "line 1 is not an object"), ("{\n", "line 1 is not JSON"), ('{"epoch": 0}\n', "line 1 has no batch"),
    ('{"epoch": true, "batch": 0}\n', "line 1 has True for epoch"), ('{"epoch": 0, "batch": "1"}\n', "line 1 has '1' for batch"),
    ('{"epoch": 0, "batch": 0}\n{"epoch": 0, "batch": 1, "rng": [1]}\n', "line 2 has no text for 'rng'"),
    ("[" + "[]," * 500_000 + "[]]\n", "line 1 has more than 1,048,576 characters"), ("[" * 100000 + "\n", "line 1 is not JSON"), ('{"epoch": 0, "batch": 1e999}\n', "line 1 has inf for batch"),
])
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "prints.jsonl").write_text(text)
    with pytest.raises(FingerprintError) as raised: read_fingerprints(tmp_path / "prints.jsonl")
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)


def test_what_is_no_text_and_what_is_not_there(tmp_path):
    (tmp_path / "prints.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FingerprintError, match="it is not text"): read_fingerprints(tmp_path / "prints.jsonl")
    with pytest.raises(FingerprintError, match="cannot be read"): read_fingerprints(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean prints\.jsonl"): read_fingerprints(tmp_path / "print.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no folder"): noted(file=tmp_path / "a" / "prints.jsonl")


def test_every_is_checked():
    for bad in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="every is"): Fingerprints(bad)


def test_reading_and_comparing_need_no_torch(tmp_path):
    code = "import learner.keep.fingerprints, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
