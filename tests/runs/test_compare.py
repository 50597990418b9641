"""Differences against what was done differently: settings, code, data, results, and the batch from which on two runs part."""
import json
import math
import os
import subprocess
import sys
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.files import write_text
from learner.base.provenance import seed_everything
from learner.keep.fingerprints import FingerprintError, Fingerprints
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback
from learner.runs.compare import ABSENT, CompareError, compare_runs, differences
from learner.runs.rundir import RunError
from learner.runs.runfiles import read_run, write_json, write_rows
from learner.runs.runs import Run
from learner.watch.metrics import Metrics, MulticlassAccuracy


class At(Callback):
    "Does something after one batch."
    def __init__(self, epoch, batch, what): self.place, self.what = (epoch, batch), what

    def after_batch(self, learn):
        if (len(learn.history), learn.batch_num) == self.place: self.what(learn)


def train(folder, *callbacks, epochs=2, seed=0, rate=0.1, prints=1, steps=1, x=0.0):
    "A real run of a small network."
    generator = torch.Generator().manual_seed(7)
    data, labels = torch.randn(50, 6, generator=generator) + x, torch.randint(3, (50,), generator=generator)
    seed_everything(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    loaders = DataLoaders.from_tensors(train=(data[:40], labels[:40]), validation=(data[40:], labels[40:]), batch_size=8)
    run = Run(folder, checkpoint=False, log_every=steps, plots=False, fingerprints=prints, seed=seed,
              settings={"rate": rate, "model": {"width": 8}})
    Learner(model, torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), F.cross_entropy, loaders,
            [Metrics(accuracy=MulticlassAccuracy()), *callbacks, run], device="cpu").train(epochs)
    return folder


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    "Outside of any repository, so that the state of the code is the same for all."
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory): return train(tmp_path_factory.mktemp("runs") / "base")


def test_the_same_again_is_the_same(base, tmp_path):
    found = compare_runs(base, train(tmp_path / "again"))
    assert found.same and found.first is None and not (found.settings or found.code or found.data or found.start or found.results)
    assert {"settings", "data", "start", "machine", "fingerprints", "results"} <= set(found.compared)
    text = repr(found)
    assert "first difference  none" in text and "settings" in text and len(text.split("\n")) < 12


def test_a_group_that_one_leaves_empty_is_no_difference_of_its_own(tmp_path):
    for name, callbacks in (("a", {}), ("b", {"EMA": {"decay": 0.9}, "package.Part": {}})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"format": "learner.run", "version": 1, "config": "digits", "settings": {"callbacks": callbacks}})
        write_rows(tmp_path / name / "history.csv", [{"epoch": 0, "train_loss": 1.0}])
    assert compare_runs(tmp_path / "a", tmp_path / "b").settings == {"callbacks": ({}, {"EMA": {"decay": 0.9}, "package.Part": {}})}
    write_json(tmp_path / "b/config.json", {"format": "learner.run", "version": 1, "config": "digits", "settings": {"callbacks": {"EMA": {"decay": 0.9}}}})
    assert compare_runs(tmp_path / "a", tmp_path / "b").settings == {"callbacks.EMA.decay": (ABSENT, 0.9)}


def draw(learn): torch.rand(1)


def nudge(learn):
    with torch.no_grad(): learn.model[0].weight[0, 0] += 1e-6


def shove(learn):
    with torch.no_grad(): learn.model[0].weight += 0.3


@pytest.mark.parametrize(("what", "parts"), [(draw, ("rng",)), (nudge, ("model",))])
def test_the_first_batch_and_the_part_are_named(base, tmp_path, what, parts):
    found = compare_runs(base, train(tmp_path / "other", At(1, 2, what)))
    assert (found.first.epoch, found.first.batch, found.first.what, found.first.source, found.first.agreed) == (1, 2, parts, "fingerprints", (1, 1))
    assert f"epoch 1, batch 2: {parts[0]} differs (by fingerprints; they agree up to epoch 1, batch 1)" in repr(found)
    assert not found.settings and not found.same
    assert compare_runs(tmp_path / "other", base).first == found.first


def test_without_fingerprints_the_steps_tell(tmp_path):
    one, other = train(tmp_path / "a", prints=None), train(tmp_path / "b", At(1, 2, shove), prints=None)
    found = compare_runs(one, other)
    assert (found.first.epoch, found.first.batch, found.first.what, found.first.source) == (1, 3, ("loss",), "steps")
    assert found.first.agreed == (1, 2)


def test_without_steps_the_epochs_tell_and_by_how_much(tmp_path):
    one, other = train(tmp_path / "a", prints=None, epochs=3), train(tmp_path / "b", At(1, 2, shove), prints=None, epochs=4)
    for folder in (one, other): (folder / "steps.csv").unlink()
    found = compare_runs(one, other)
    assert (found.first.epoch, found.first.batch, found.first.source, found.first.agreed) == (1, None, "history", (0,))
    assert "train_loss" in found.first.what and found.epochs == (3, 4) and "3 and 4" in repr(found)
    a, b = read_run(one).rows[1]["train_loss"], read_run(other).rows[1]["train_loss"]
    assert found.results["train_loss"] == (a, b) and a != b and f"{b - a:+.3g}" in repr(found)
    assert found.last["train_loss"] == (read_run(one).rows[2]["train_loss"], read_run(other).rows[3]["train_loss"])


def test_settings_seed_data_and_model_are_told_apart(base, tmp_path):
    found = compare_runs(base, train(tmp_path / "other", rate=0.2, seed=1, x=0.5))
    assert found.settings == {"rate": (0.1, 0.2)}
    assert found.start["seed"] == (0, 1) and found.start.keys() == {"seed", "initial_model"}
    assert found.data.keys() == {"train", "validation"}
    assert (found.first.epoch, found.first.batch, found.first.agreed) == (0, 0, None) and "from the very first on" in repr(found)
    assert not compare_runs(base, train(tmp_path / "rate", rate=0.2)).data


def change(folder, name, **values):
    path = folder / name
    write_json(path, json.loads(path.read_text()) | values)


def test_code_machine_and_versions(base, tmp_path):
    other = train(tmp_path / "other")
    change(base, "meta.json", git={"commit": "a" * 40, "dirty": True})
    change(other, "meta.json", git={"commit": "b" * 40, "dirty": False}, host="elsewhere", versions={"torch": "9.9"}, facts={"device": "cuda:0"})
    write_text(base / "code.diff", "-a\n+b\n")
    found = compare_runs(base, other)
    assert found.code == {"commit": ("a" * 40, "b" * 40), "dirty": (True, False), "code.diff": ("2 lines", "0 lines")}
    assert "-+b" in found.diff and "a" * 12 in repr(found) and "a" * 13 not in repr(found)
    assert found.machine["torch"] == (torch.__version__, "9.9") and found.machine["device"] == ("cpu", "cuda:0") and found.machine["host"][1] == "elsewhere"
    assert found.machine["python"][1] is ABSENT
    (base / "code.diff").unlink()
    change(base, "meta.json", git=None)
    assert not compare_runs(base, other).code  # what one of them does not know is no difference


def test_what_is_damaged_is_noted_and_the_rest_is_compared(base, tmp_path):
    other = train(tmp_path / "other", At(0, 1, shove))
    (other / "fingerprints.jsonl").write_text("[]\n")
    (other / "history.csv").write_text("epoch,x\n1\n")
    change(other, "meta.json", status="failed")
    found = compare_runs(base, other)
    assert found.first.source == "steps" and found.first.epoch == 0
    assert any("fingerprints.jsonl: line 1 is not an object" in note for note in found.notes) and any("history.csv is damaged" in note for note in found.notes)
    assert any("is failed" in note for note in found.notes) and all(note in repr(found) for note in found.notes)
    (other / "fingerprints.jsonl").unlink()
    assert f"only {base} has fingerprints" in compare_runs(base, other).notes
    (other / "history.csv").unlink()
    assert f"only {base} has a history" in compare_runs(base, other).notes


def test_one_that_went_further_is_the_same_up_to_there(tmp_path):
    rows = [{"epoch": i, "train_loss": 1 / (i + 1)} for i in range(4)]
    for name, count in (("a", 4), ("b", 2)): write_rows(tmp_path / f"{name}.csv", rows[:count])
    found = compare_runs(tmp_path / "a.csv", tmp_path / "b.csv")
    assert not found.same and found.first is None and found.last == {"train_loss": (0.25, 0.5)}
    assert "results up to epoch 1" in repr(found) and "results of the last epoch" in repr(found)


def test_runs_that_share_no_batch_are_not_called_the_same(base, tmp_path):
    other = train(tmp_path / "other")
    (other / "fingerprints.jsonl").write_text('{"epoch": 9, "batch": 0, "model": "a"}\n')
    found = compare_runs(base, other)
    assert "fingerprints" not in found.compared and any("no batch was noted in both" in note for note in found.notes)


def test_histories_and_fingerprints_by_themselves(base, tmp_path):
    other = train(tmp_path / "other", At(1, 2, shove))
    by_file = compare_runs(base / "history.csv", other / "history.csv")
    assert by_file.first.epoch == 1 and by_file.compared == ["results"]
    assert compare_runs(str(base / "fingerprints.jsonl"), other / "fingerprints.jsonl").first.batch == 2
    assert compare_runs(base, other / "history.csv").first.source == "history"
    assert compare_runs(base, other / "fingerprints.jsonl").first.batch == 2
    prints = Fingerprints()
    learn = Learner(nn.Linear(2, 2), torch.optim.SGD, F.mse_loss, {"train": [(torch.ones(2, 2), torch.ones(2, 2))]}, prints, device="cpu")
    learn.train(2, 0.1)
    assert compare_runs(prints, prints.records).same and compare_runs(learn.history, learn.history).same
    assert compare_runs(read_run(base), base).same


def test_tables_without_epochs_or_with_several_rows_an_epoch(tmp_path):
    def table(name, *lines): (tmp_path / name).write_text("\n".join(lines) + "\n")
    table("a.csv", "loss", "0.5", "0.25")
    table("b.csv", "loss", "0.5", "0.375")
    found = compare_runs(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (found.first.epoch, found.first.agreed, found.results) == (1, (0,), {"epoch": (1, 1), "loss": (0.25, 0.375)})
    table("a.csv", "step,epoch,batch,loss", "0,0,0,0.5", "1,0,1,0.25", "2,1,0,0.1")
    table("b.csv", "step,epoch,batch,loss", "0,0,0,0.5", "2,1,0,0.2")
    found = compare_runs(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (found.first.epoch, found.first.batch, found.first.agreed) == (1, 0, (0, 0))
    assert found.results == {"epoch": (1, 1), "loss": (0.1, 0.2)} and "0.1" in repr(found) and "+0.1" in repr(found)


def test_nan_is_equal_to_nan_and_times_do_not_count():
    class Table:
        def __init__(self, *rows): self.rows = list(rows)
    one = Table({"epoch": 0, "loss": math.nan, "seconds": 1.0, "lap_seconds": 3.0, "new": None})
    assert compare_runs(one, Table({"epoch": 0, "loss": math.nan, "seconds": 2.0, "lap_seconds": 4.0})).same
    found = compare_runs(one, Table({"epoch": 0, "loss": 0.5}))
    assert found.first.what == ("loss",) and "nan" in repr(found)
    assert differences({"a": 1, "b": None}, {"a": 1.0, "c": 2}) == {"b": (None, ABSENT), "c": (ABSENT, 2)}


def test_as_many_digits_as_tell_values_apart():
    class Table:
        def __init__(self, value): self.rows = [{"epoch": 0, "loss": value}]
    text = repr(compare_runs(Table(0.1), Table(0.1 + 1e-15)))
    assert f"{0.1 + 1e-15:.17g}" in text and "+9.99e-16" in text
    assert " 0.1  " in repr(compare_runs(Table(0.1), Table(0.2)))


def test_a_screen_is_enough_even_for_much(base, tmp_path):
    other = train(tmp_path / "other", seed=3, rate=0.2, x=1.0)
    change(other, "config.json", settings={f"setting{i}": "x" * 500 for i in range(100)})
    write_text(other / "script.py", "\n".join(f"line {i}" for i in range(500)))
    text = repr(compare_runs(base, other))
    lines = text.split("\n")
    assert len(lines) < 60 and all(len(line) <= 220 for line in lines) and "more" in text


def test_text_from_files_cannot_command_a_terminal_or_a_page(base, tmp_path):
    other = train(tmp_path / "other")
    bad = "\x1b[2J<script>\u202e"
    change(other, "config.json", settings={bad: bad})
    write_text(other / "code.diff", bad)
    found = compare_runs(base, other)
    assert all(c.isprintable() or c == "\n" for c in repr(found)) and "<script>" not in found._repr_html_()


def test_names_of_columns_cannot_command_a_terminal(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)): write_rows(tmp_path / f"{name}.csv", [{"epoch": 0, "\x1b]0;t\x07<b>": value}])
    found = compare_runs(tmp_path / "a.csv", tmp_path / "b.csv")
    assert found.first.what == ("\x1b]0;t\x07<b>",) and all(c.isprintable() or c == "\n" for c in repr(found)) and "<b>" not in found._repr_html_() and "\x1b" not in found._repr_html_()


def test_many_settings_and_empty_groups_cost_little(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        settings = {f"s{i}": {} if name == "a" else {"x": i} for i in range(3000)}
        write_json(tmp_path / name / "config.json", {"format": "learner.run", "version": 1, "config": "digits", "settings": settings})
        write_rows(tmp_path / name / "history.csv", [{"epoch": 0, "train_loss": 1.0}])
    start = perf_counter()
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert len(repr(found)) < 3000 and perf_counter() - start < 5 and len(found.settings) == 3000 and found.settings["s7.x"] == (ABSENT, 7)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40)])
@pytest.mark.parametrize("file", ["config.json", "history.csv", "steps.csv", "script.py"])
def test_hostile_files_end_in_a_line(base, tmp_path, put, file):
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "meta.json", {"status": "finished"})
    put(other / file)
    try: text = repr(compare_runs(base, other))
    except ValueError as error: text = str(error)
    assert file in text and len(text) < 6000


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda base: base / "nothing", FileNotFoundError, "there is no run"), (lambda base: 3, CompareError, "the second is an int; give a run folder"),
    (lambda base: base.parent, RunError, "is not a run"), (lambda base: base / "stdout.txt", CompareError, "is neither a run folder"),
    (lambda base: base.parent / "bas", FileNotFoundError, "did you mean base"), (lambda base: [{"loss": 1}], CompareError, "the second is a list"),
])
def test_bad_arguments(base, make, error, message):
    with pytest.raises(error) as raised: compare_runs(base, make(base))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_file_that_was_named_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(FingerprintError): compare_runs(tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("epoch,loss\n0,1\n")
    (tmp_path / "c.jsonl").write_text('{"epoch": 0, "batch": 0, "model": "a"}\n')
    with pytest.raises(CompareError, match="nothing in common"): compare_runs(tmp_path / "b.csv", tmp_path / "c.jsonl")


def test_comparing_needs_no_torch(base):
    code = "import sys; from learner.runs.compare import compare_runs; print(compare_runs(sys.argv[1], sys.argv[1])); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, base], capture_output=True, text=True, check=True).stdout.endswith("False\n")
