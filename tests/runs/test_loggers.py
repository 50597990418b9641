"""Loggers: what they get and when, the table on a terminal and in a file, files after interrupts, TensorBoard read back."""
import importlib.util
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.base.history import History
from learner.base.words import flatten
from learner.check.bench import example_learner
from learner.loop.data import DataLoaders
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException, CancelEpochException, CancelTrainException
from learner.runs.live import ProgressReport
from learner.runs.loggers import (
    BestSoFar,
    ConsoleTable,
    CSVLogger,
    JSONLinesLogger,
    Logger,
    StarredRows,
    StarredTerminal,
    StepValues,
    describe_settings,
)
from learner.runs.runfiles import iter_rows
from learner.steer.accumulate import Accumulate
from learner.watch.metrics import Metrics, MulticlassAccuracy

ROOT = Path(__file__).resolve().parents[2]


class Keep(Logger):
    """Writes down every call."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def log_settings(self, settings): self.calls.append(("settings", settings))
    def log_steps(self, rows): self.calls.append(("steps", rows))
    def log_row(self, row): self.calls.append(("row", dict(row)))
    def log_results(self, results): self.calls.append(("results", results))
    def close(self): self.calls.append(("close", None))

    def names(self): return [name for name, _ in self.calls]
    def all(self, name): return [value for kind, value in self.calls if kind == name]


def no_test(learn):
    learn.dataloaders = {name: loader for name, loader in learn.dataloaders.items() if name != "test"}
    return learn


# What a logger gets

def test_each_portion_comes_once_and_in_order():
    learn, keep = example_learner(), Keep(every=1)
    learn.train(2, callbacks=keep)
    assert keep.names() == ["settings", "steps", "row", "steps", "row", "close", "results", "close"]
    rows = [{k: v for k, v in row.items() if not k.startswith("test")} for row in learn.history]
    assert keep.all("row") == rows
    assert keep.all("results") == [{"epoch": 1, "test_loss": learn.history[-1]["test_loss"]}]


def test_passes_of_their_own():
    learn, keep = example_learner(), Keep()
    learn.add(keep)
    assert learn.validate() == keep.all("results")[0] and learn.test() == keep.all("results")[1]
    assert keep.names() == ["results", "close"] * 2


@pytest.mark.parametrize("every, steps", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (4, [0, 4]), (50, [0])])
def test_steps_number_on_through_epochs_and_calls(every, steps):
    learn, keep = no_test(example_learner()), Keep(every=every)
    learn.add(keep)
    for _ in range(2): learn.train(1)
    rows = [row for block in keep.all("steps") for row in block]
    assert [row["step"] for row in rows] == steps
    assert [(row["epoch"], row["batch"]) for row in rows] == [divmod(step, 3) for step in steps]


def test_losses_are_those_of_the_batches_in_blocks():
    batches = [(torch.randn(2, 16), torch.randint(4, (2,))) for _ in range(300)]
    model = nn.Linear(16, 4)
    learn, keep = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches}, device="cpu"), Keep(every=1)
    learn.history.keep_steps = True
    learn.train(1, callbacks=keep)
    assert [len(block) for block in keep.all("steps")] == [128, 128, 44]
    assert [row["loss"] for block in keep.all("steps") for row in block] == learn.history.steps["train_loss"]


def test_nothing_is_read_from_the_device_within_a_pass(elsewhere, waits, tmp_path):
    learn, found = no_test(example_learner(batches=9)), []
    plain = learn.loss_func
    learn.loss_func = lambda predictions, labels: elsewhere(plain(predictions, labels))
    learn.on("after_batch", lambda: found.append(len(waits)), priority=5000)
    learn.train(1, callbacks=[Keep(every=1), JSONLinesLogger(tmp_path / "log.jsonl", every=1)])
    assert found == [0] * 9 and len(waits) >= 4  # after the passes


@pytest.mark.parametrize("step, most", [(0.0, 0), (0.1, 2), (0.5, 10), (1.0, 20), (3.0, 20)])  # of 20 batches, so many seconds apart
def test_the_file_of_progress_reads_from_the_device_at_most_once_a_second(elsewhere, waits, monkeypatch, tmp_path, step, most):
    class Tick(Callback):
        def before_training(self): self.start = len(waits)
        def before_batch(self): clock[0] += step
        def after_training(self): reads.append(len(waits) - self.start)
    clock, reads, learn = [1000.0], [], no_test(example_learner(batches=10))
    monkeypatch.setattr("learner.watch.progress.monotonic", lambda: clock[0])
    plain = learn.loss_func
    learn.loss_func = lambda predictions, labels: elsewhere(plain(predictions, labels))
    def trained(*callbacks):
        reads.clear()
        learn.train(2, callbacks=[Tick(), *callbacks])
        return sum(reads)
    without = trained()
    found = trained(ProgressReport(tmp_path / "progress.json")) - without
    assert found <= most and (found > 0) == (step > 0)


@pytest.mark.parametrize("optimiser, extra", [("plain", {}), ("tensor", {})])
def test_the_learning_rate_is_that_of_the_start_of_the_batch(optimiser, extra):
    class Halve(Callback):
        def after_step(self, optimiser):
            for group in optimiser.param_groups: group["lr"] = group["lr"] / 2
    learn, keep = no_test(example_learner()), Keep(every=1)
    if optimiser == "tensor": learn.optimiser = torch.optim.Adam(learn.model.parameters(), lr=torch.tensor(0.05))
    learn.train(1, callbacks=[Halve(), keep])
    assert [row["learning_rate"] for row in keep.all("steps")[0]] == pytest.approx([0.05, 0.025, 0.0125])


def test_cancelled_batches_are_no_steps_and_accumulated_ones_are():
    class Skip(Callback):
        def before_loss(self, batch_num):
            if batch_num == 1: raise CancelBatchException
    learn, keep = no_test(example_learner()), Keep(every=1)
    learn.train(1, callbacks=[Skip(), keep, Accumulate(2)])
    assert [(row["step"], row["batch"]) for row in keep.all("steps")[0]] == [(0, 0), (1, 2)]


@pytest.mark.parametrize("stop, rows", [(CancelEpochException, 2), (CancelTrainException, 1)])
def test_an_epoch_that_is_cancelled_hands_on_its_row(stop, rows):
    class Stop(Callback):
        def after_batch(self, epoch):
            if epoch == 0: raise stop
    learn, keep = no_test(example_learner()), Keep(every=1)
    learn.train(2, callbacks=[keep, Stop()])
    assert keep.all("row") == learn.history.rows and len(keep.all("row")) == rows and keep.names()[-1] == "close"


def test_after_an_error_it_is_closed_and_the_next_training_starts_right():
    learn, keep = no_test(example_learner()), Keep(every=1)
    fail = learn.on("after_batch", lambda batch_num: 1 / (batch_num - 1))
    with pytest.raises(ZeroDivisionError): learn.train(1, callbacks=keep)
    assert keep.names() == ["settings", "close"]
    learn.remove(fail)
    learn.train(1, callbacks=keep)
    assert [row["batch"] for row in keep.all("steps")[0]] == [0, 1, 2]


def test_rows_of_earlier_trainings_are_not_handed_on_again():
    learn, keep = no_test(example_learner()), Keep()
    learn.train(2)
    learn.train(1, callbacks=keep)
    assert [row["epoch"] for row in keep.all("row")] == [2]


def test_a_logger_without_steps_has_no_hook_in_the_batch():
    assert CSVLogger("x").after_batch is None and CSVLogger("x").before_batch is None and Keep().after_batch is not None


@pytest.mark.parametrize("every", [0, -1, 1.5, None, "2", True])
def test_every_is_a_whole_number(every):
    with pytest.raises(ValueError, match="every is"): StepValues(every)


def test_settings_of_a_learner_by_hand():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimiser = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}], lr=0.1)
    loaders = DataLoaders.from_tensors((torch.randn(9, 4), torch.randint(2, (9,))), batch_size=4, seed=3)
    learn = Learner(model, optimiser, F.cross_entropy, loaders, [Accumulate(2), Keep()], device="cpu")
    flat = flatten(describe_settings(learn))
    assert flat["model.parameters"] == 23 and flat["optimiser.lr"] == 0.1 and flat["optimiser.group_1.lr"] == 0.5
    assert flat["optimiser.betas"] == [0.9, 0.999] and flat["data.train.batch_size"] == 4 and flat["data.train.seed"] == 3
    assert flat["loss_func"] == "cross_entropy" and flat["callbacks"] == ["Accumulate(2)"]
    json.dumps(flat, allow_nan=False)


# The table

def test_stars_follow_the_direction_of_each_column(capsys):
    table = StarredRows(History(), 4, seconds=False)
    rows = [dict(zip(("train_loss", "accuracy", "error", "size"), values, strict=True)) for values in
            ((1.0, 0.5, 0.5, 1.0), (0.5, 0.4, 0.5, 2.0), (math.nan, 0.6, 0.4, 3.0), (0.7, 0.6, math.inf, 0.0))]
    for epoch, row in enumerate(rows): table.row({"epoch": epoch, **row})
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert [[name for name, cell in zip(lines[0].split(), line.split(), strict=True) if cell.endswith("*")] for line in lines[1:]] == [
        ["train_loss", "accuracy", "error"], ["train_loss"], ["accuracy", "error"], []]
    assert len({line.rstrip("* ").rfind(".") for line in lines[1:]}) == 1  # aligned


def test_the_table_of_a_training_that_goes_on_knows_the_best_of_before(capsys):
    learn = no_test(example_learner())
    learn.history.rows.append({"epoch": 0, "train_loss": 0.0, "validation_loss": 9.0})
    learn.train(1, callbacks=ConsoleTable())
    head, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.split(), row.split(), strict=True))
    assert not cells["train_loss"].endswith("*") and cells["validation_loss"].endswith("*") and float(cells["seconds"]) >= 0


def test_on_a_terminal_a_bar_runs_below_the_rows(capsys, monkeypatch):
    learn = no_test(example_learner())
    learn.history.rows.append({"epoch": 0, "train_loss": 0.0})
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = ConsoleTable()
    assert type(table.new_view(learn, 1)) is StarredTerminal
    learn.train(2, callbacks=table)
    out = capsys.readouterr().out
    assert "epoch 1/2 train" in out and "[0/3 " in out
    rows = [line.rpartition("\r")[2] for line in out.split("\n") if line]
    assert len(rows) == 3 and "-" not in "".join(rows) and rows[0].split()[0] == "epoch" and rows[1].split()[0] == "1" and "*" in rows[1]


def test_colour_is_for_terminals_only():
    code = """
import os
from learner.base.history import History
from learner.runs.loggers import StarredRows
for os.environ["NO_COLOR"] in ("", "1"): StarredRows(History(), 1, seconds=False).row({"epoch": 0, "train_loss": 0.5, "note": "x"})
"""
    here, there = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stdout=there, cwd=ROOT, env={**os.environ, "TERM": "xterm"})
    os.close(there)
    lines = os.read(here, 100_000).decode().splitlines()
    os.close(here)
    assert done.returncode == 0 and "\x1b[32m0.5000\x1b[0m*" in lines[1] and "\x1b" not in lines[3] and "0.5000*" in lines[3]


def test_without_a_screen_rows_are_written_to_nobody(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    no_test(example_learner()).train(1, callbacks=ConsoleTable())


# Files

def test_the_csv_file_is_the_history(tmp_path):
    learn = example_learner()
    learn.train(3, validation_epochs=2, callbacks=[Metrics(accuracy=MulticlassAccuracy()), CSVLogger(tmp_path / "deep" / "h.csv")])
    rows = [*iter_rows(tmp_path / "deep" / "h.csv")]
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == learn.history.rows
    assert [*rows[0]] == learn.history.columns  # with those of the test, which came last
    before = (tmp_path / "deep" / "h.csv").read_text()
    learn.add(CSVLogger(tmp_path / "other.csv"))
    learn.validate()
    assert (tmp_path / "deep" / "h.csv").read_text() == before and not (tmp_path / "other.csv").exists()


def test_json_lines_are_valid_json_whatever_the_values(tmp_path):
    def refuse(name): pytest.fail(f"{name} is no JSON")
    learn = example_learner()
    learn.on("after_epoch", lambda history: history[-1].update(odd=math.nan, text="a\nb"))
    logger = JSONLinesLogger(tmp_path / "log.jsonl", {"a": {"b": Path("c"), "clip": math.inf}}, every=1)
    learn.train(2, callbacks=logger)
    events = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["settings", *["step"] * 3, "row", *["step"] * 3, "row", "results"]
    assert events[0]["a"] == {"b": "c", "clip": "inf"} and events[4]["odd"] == "nan" and events[4]["text"] == "a\nb"



@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.uint8, lambda value: np.array(value, dtype=np.float32), torch.tensor])
def test_numbers_of_numpy_are_numbers_in_all_files(tmp_path, kind):
    learn = no_test(example_learner())
    learn.on("after_epoch", lambda: learn.log(validation_accuracy=kind(1)))
    learn.train(1, callbacks=[CSVLogger(tmp_path / "h.csv"), JSONLinesLogger(tmp_path / "log.jsonl")])
    (row,) = iter_rows(tmp_path / "h.csv")
    events = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    found = [row["validation_accuracy"], *(event["validation_accuracy"] for event in events if event["event"] == "row")]
    assert found == [1, 1] and all(type(value) in (int, float) for value in found)
    assert BestSoFar(learn.history).score["validation_accuracy"] == {"best": 1, "epoch": 0, "last": 1, "mode": "max"}


@pytest.mark.parametrize("make", [CSVLogger, JSONLinesLogger])
def test_what_is_written_in_an_epoch_does_not_grow(tmp_path, make, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the time of the disk does not matter here
    batches, model, marks = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))], nn.Linear(2, 2), []
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches}, make(tmp_path / "log"), device="cpu")
    learn.on("after_epoch", lambda: marks.append(written()), priority=9000)
    learn.train(301)
    early, late = (marks[100] - marks[50]) / 50, (marks[300] - marks[250]) / 50
    assert 10 < late < 1.2 * early + 50


def written():
    "Bytes that this process has written so far."
    if not os.path.exists("/proc/self/io"): pytest.skip("the system does not count what a process writes")
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def test_a_csv_file_follows_a_row_that_was_changed_later(tmp_path):
    learn = no_test(example_learner())
    learn.on("after_epoch", lambda history, epoch: history[0].update(later=epoch))
    learn.train(3, callbacks=CSVLogger(tmp_path / "h.csv"))
    assert [row["later"] for row in iter_rows(tmp_path / "h.csv")] == [2, None, None]


# TensorBoard

@pytest.fixture
def board(tmp_path):
    if importlib.util.find_spec("tensorboard") is None: pytest.skip("tensorboard is not installed: pip install 'nblearner[tensorboard]'")
    from learner.runs.tensorboard import TensorBoard
    return lambda **options: TensorBoard(tmp_path / "board", **options)


def read_back(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()


def images_learner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3))
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(3)]
    model(batches[0][0])
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, {"train": batches, "validation": batches[:2]}, device="cpu")


def test_tensorboard_has_what_the_history_has(board, tmp_path):
    learn = images_learner()
    learn.train(2, callbacks=[Metrics(accuracy=MulticlassAccuracy()), board(every=1, settings={"model": {"width": 2}})])
    events = read_back(tmp_path / "board")
    tags = events.Tags()
    for column, tag in {"train_loss": "loss/train", "validation_loss": "loss/validation", "validation_accuracy": "accuracy/validation"}.items():
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(learn.history[column])
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
    assert [event.step for event in events.Scalars("step/learning_rate")] == [0, 1, 2, 3, 4, 5]
    weight = events.Histograms("weights/0.weight")[-1].histogram_value
    assert weight.num == learn.model[0].weight.numel() and weight.max == pytest.approx(learn.model[0].weight.max().item())
    assert len(events.Histograms("gradients/4.bias")) == 2 and len(events.Images("predictions")) == 2 and tags["graph"]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert HParamsPluginData.FromString(content).session_start_info.hparams["model.width"].number_value == 2


def test_tensorboard_changes_nothing(board):
    def trained(*callbacks):
        learn = images_learner()
        torch.manual_seed(1)
        learn.train(2, callbacks=callbacks)
        return [*learn.model.state_dict().values(), torch.rand(3)]
    assert all(map(torch.equal, trained(), trained(board(every=1))))


def test_parts_can_be_left_out_and_broken_values_are_counted(board, tmp_path):
    learn = images_learner()
    with torch.no_grad(): learn.model[4].bias[0] = math.nan
    with pytest.warns(UserWarning, match="nan"): learn.train(1, callbacks=board(images=0, graph=False))
    tags = read_back(tmp_path / "board").Tags()
    assert not tags["images"] and not tags["graph"] and "not finite/weights/4.bias" in tags["scalars"]
    assert not [part for part in board(histograms=0).parts if hasattr(part, "after_backward")]


def test_without_tensorboard_the_error_names_the_extra():
    code = """
import sys
sys.modules["tensorboard"] = None
from learner.runs.tensorboard import TensorBoard
try: TensorBoard("x")
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'nblearner[tensorboard]'" in done.stdout, done.stderr


def test_an_old_event_file_stays_and_a_second_training_adds_one(board, tmp_path):
    learn, logger = images_learner(), board(graph=False)
    for _ in range(2): learn.train(1, callbacks=logger)
    assert [event.step for event in read_back(tmp_path / "board").Scalars("loss/train")] == [0, 1]
