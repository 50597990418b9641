import gc
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import weakref
from contextlib import suppress
from fcntl import ioctl

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException, CancelEpochException, CancelTrainException
from learner.watch import progress
from learner.watch.metrics import BinaryAUROC, Metrics, MulticlassAccuracy
from learner.watch.notebook_view import LossGraph, NotebookView
from learner.watch.progress import Progress
from learner.watch.views import LogView, TerminalView, View

SETUP = """
import time, torch, torch.nn.functional as F
from torch import nn
from learner.loop.learner import Learner
from learner.watch.progress import Progress
from learner.loop.stages import Callback

class Slow(Callback):
    def after_batch(self): time.sleep(0.03)

torch.manual_seed(0)
batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(8)]
loaders = {"train": batches, "validation": batches[:3]}
learn = Learner(nn.Linear(4, 2), torch.optim.SGD, F.cross_entropy, loaders, Progress())
"""
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def batches(count=8):
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(count)]


def learner(*callbacks, **loaders):
    torch.manual_seed(0)
    loaders = loaders or {"train": batches(), "validation": batches(3)}
    return Learner(nn.Linear(4, 2), torch.optim.SGD, F.cross_entropy, loaders, callbacks)


def script(code):
    return [sys.executable, "-c", SETUP + textwrap.dedent(code)]


def in_pipe(code):
    done = subprocess.run(script(code), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_terminal(code, columns, interrupt_at=None):
    """What the program writes to a terminal of this width, and its exit status; Ctrl-C when the text shows up."""
    terminal, inside = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(script(code), stdin=inside, stdout=inside, stderr=inside, env=environment)
    os.close(inside)
    written = b""
    while True:
        try: part = os.read(terminal, 4096)
        except OSError: break  # how Linux says that the other side is closed
        if not part: break
        written += part
        if interrupt_at and interrupt_at in written.decode(errors="ignore"):
            process.send_signal(signal.SIGINT)
            interrupt_at = None
    os.close(terminal)
    return written.decode().replace("\r\n", "\n"), process.wait(60)


def screen(written, columns):
    """The lines that stand on the screen in the end, and the length of the longest thing drawn in one line."""
    lines, longest = [], 0
    for line in written.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[:len(part)] = part
            longest = max(longest, len(part) if "|" in part else 0)
        text = "".join(cells).rstrip()
        lines += [text[i:i + columns] for i in range(0, max(len(text), 1), columns)]
    return lines, longest


# A pipe or a file


def test_pipe_gets_plain_rows():
    written = in_pipe("learn.train(2, learning_rate=0.1)")
    assert re.fullmatch(r"epoch  train_loss  validation_loss\n"
                        r"    0      0\.\d{4}           0\.\d{4}\n"
                        r"    1      0\.\d{4}           0\.\d{4}\n", written)


def test_pipe_gets_no_control_characters():
    written = in_pipe("learn.dataloaders['test'] = batches\n"
                      "learn.train(2, learning_rate=0.1, callbacks=Slow())\nlearn.validate()\nlearn.test()")
    assert not CONTROL.search(written)
    assert [line.split()[0] for line in written.splitlines()] == [
        "epoch", "0", "1", "test_loss", "validation_loss", "test_loss"]


def test_rows_are_written_at_once(tmp_path):
    code = script("learn.train(1000, learning_rate=0.1, callbacks=Slow())")
    with (tmp_path / "log").open("w") as file, subprocess.Popen(code, stdout=file) as process:
        try:
            end = time.monotonic() + 60
            while (tmp_path / "log").read_text().count("\n") < 2 and time.monotonic() < end: time.sleep(0.05)
            assert process.poll() is None
            assert (tmp_path / "log").read_text().splitlines()[1].split()[0] == "0"
        finally:
            process.kill()


def test_values_are_those_of_the_history(capsys):
    learn = learner(Progress())
    learn.train(3, learning_rate=0.1)
    assert capsys.readouterr().out == repr(learn.history) + "\n"


def test_numbering_goes_on(capsys):
    learn = learner(Progress())
    learn.train(2, learning_rate=0.1)
    learn.train(1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["epoch", "0", "1", "epoch", "2"]


@pytest.mark.parametrize(("reason", "told"), [("enough", ["training has ended: enough"]), ("", [])])
@pytest.mark.parametrize("view", [LogView, TerminalView])
def test_says_why_a_callback_has_ended_training(capsys, monkeypatch, view, reason, told):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: view(first, epochs))

    class Enough(Callback):
        def after_epoch(self, epoch):
            if epoch == 1: raise CancelTrainException(reason)

    learn = learner(Progress(), Enough())
    learn.train(5, learning_rate=0.1)
    lines = re.sub(r"[^\n]*\r", "", capsys.readouterr().out).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["epoch", "0", "1"] and lines[3:] == told
    learn.train(1)  # it is told once
    assert "ended" not in capsys.readouterr().out


def test_columns_that_come_later_get_a_new_head(capsys):
    learn = learner(Progress())
    learn.train(4, learning_rate=0.1, validation_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    first, later = "epoch  train_loss", "epoch  train_loss  validation_loss"
    assert [re.sub(r"\d\.\d{4}", "_.____", line) for line in lines] == [
        first, "    0      _.____", "    1      _.____",
        later, "    2      _.____           _.____", "    3      _.____           _.____"]  # fmt: skip


def test_missing_values_are_blank(capsys):
    view = LogView(0, 2)
    view.row({"epoch": 0, "train_loss": 1.0, "validation_loss": 2.0, "norm": 3.0})
    view.row({"epoch": 1, "train_loss": 1.0, "norm": 1e-12})
    assert capsys.readouterr().out == ("epoch  train_loss  validation_loss      norm\n"
                                       "    0      1.0000           2.0000    3.0000\n"
                                       "    1      1.0000                      1e-12\n")


def test_what_others_log_after_the_epoch_is_in_the_row(capsys):
    class Late(Callback):
        priority = 99

        def after_epoch(self, learn): learn.log(norm=7)

    learner(Progress(), Late()).train(1, learning_rate=0.1)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "norm"
    assert row.split()[-1] == "7"


def test_result_of_the_test_follows_training(capsys):
    learn = learner(Progress(), train=batches(), test=batches(2))
    learn.train(1, learning_rate=0.1)
    learn.test()
    line = f"test_loss {learn.history[-1]['test_loss']:.4f}"
    assert capsys.readouterr().out.splitlines()[-2:] == [line, line]


# A terminal


@pytest.mark.parametrize("columns", [80, 40])
def test_terminal(columns):
    code = "learn.train(2, learning_rate=0.1, callbacks=Slow())\nlearn.validate()"
    written, status = in_terminal(code, columns)
    lines, longest = screen(written, columns)
    assert status == 0
    assert not CONTROL.search(written.replace("\r", ""))
    assert 0 < longest < columns
    assert "epoch 0/1 train |" in written
    assert not any("|" in line or "█" in line for line in lines), lines
    assert [line.split()[0] for line in lines if line] == ["epoch", "0", "1", "validation_loss"]
    if columns == 80:
        assert "█" in written
        assert "end in 00:0" in written


@pytest.mark.parametrize("columns", [200, 100, 40, 20, 5, 1])
def test_bar_fits(screen_and_clock, monkeypatch, capsys, columns):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

    monkeypatch.setenv("COLUMNS", str(columns))
    learner(Progress(), Tick()).train(2, learning_rate=0.1)
    written = capsys.readouterr().out
    lines, longest = screen(written, 200)
    assert longest <= max(columns - 1, len(" || "))
    assert [line.split()[0] for line in lines if re.match(r" *\d", line)] == ["0", "1"]
    assert not any("|" in line or "█" in line for line in lines), lines
    assert ("loss 0." in written) == (columns >= 100)


def test_a_long_head_takes_two_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    view = TerminalView(0, 1)
    row = {"epoch": 0, "train_loss": 1.0, "validation_loss": 2.0, "train_accuracy": 0.5, "validation_accuracy": 0.25}
    view.row(row)
    view.end({}, interrupted=False)
    assert capsys.readouterr().out == ("          train  validation     train  validation\n"
                                       "epoch      loss        loss  accuracy    accuracy\n"
                                       "    0    1.0000      2.0000    0.5000      0.2500\n")


def test_a_shorter_text_leaves_nothing_behind(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    view = TerminalView(0, 1)
    view.begin("train", 20)
    view.update(1, 1.5e-7)
    view.update(2, 0.5)
    lines, _ = screen(capsys.readouterr().out, 80)
    assert lines[-1].endswith("loss 0.5000]")


def test_time_left_is_never_negative(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    view = TerminalView(0, 2)
    view.row({"epoch": 0})
    view.started -= 100  # the second epoch takes longer than the first
    view.epoch_ended = view.started + 1
    view.begin("train", 20)
    view.update(1)
    assert "end in 00:00" in capsys.readouterr().out


def test_ctrl_c_leaves_the_bar_on_a_line_of_its_own():
    code = """
        try: learn.train(50, learning_rate=0.1, callbacks=Slow())
        except KeyboardInterrupt: print("caught")
        learn.train(1)
        """
    written, status = in_terminal(code, 80, interrupt_at="epoch 2/49 train")
    lines = [line for line in screen(written, 80)[0] if line]
    assert status == 0
    lines.remove("stopping after this batch; Ctrl-C again stops at once")
    caught = lines.index("caught")
    assert lines[caught - 1].startswith("epoch 2/49 ")
    rows = [line for line in lines[:caught] if not line.startswith("epoch 2/49 ")]  # the bar may be drawn once more below the notice
    assert [line.split()[0] for line in rows] == ["epoch", "0", "1"]
    assert [line.split()[0] for line in lines[caught + 1:]] == ["epoch", "2"]


# A notebook


@pytest.fixture(scope="module")
def cells():
    """The outputs of cells that a real kernel ran."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    sources = [
        SETUP + "learn.remove(learn.callbacks[0])\nlearn.add(Progress(plot=True))\nlearn.dataloaders['test'] = batches",
        "learn.train(3, learning_rate=0.1, validation_epochs=2)",
        "learn.on('after_batch', lambda epoch, batch_num: [].pop() if (epoch, batch_num) == (1, 5) else None)\n"
        "try: learn.train(4)\nexcept IndexError: pass",
        "learn.remove(learn.callbacks[0])\nlearn.validate()",
        "import matplotlib.pyplot\nprint(matplotlib.pyplot.get_fignums())",
        "class Stream:\n    def __iter__(self): return iter(batches)\n"
        "learn.dataloaders = {'train': Stream()}\nlearn.train(102)",
        "learn.dataloaders = {'validation': batches}\nlearn.validate();",
        "found = learn.validate()\nfound['validation_loss']",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def htmls(outputs): return [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]


def table(html): return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", html)]


def test_notebook_shows_graph_table_and_test(cells):
    graph, rows, test = cells[1]
    assert "image/png" in graph.data
    head, *rows = table(rows.data["text/html"])
    assert head == ["epoch", "train_loss", "validation_loss", "seconds"]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert all(re.fullmatch(r"\d+\.\d", row[3]) for row in rows)
    assert [bool(row[2]) for row in rows] == [False, True, True]
    assert re.search(r"<p[^>]*>3 epochs in \d+\.\d s</p>", cells[1][1].data["text/html"])
    assert re.search(r"<p[^>]*>test_loss 0\.\d{4}</p>", test.data["text/html"])


def test_notebook_keeps_no_bar_that_has_finished(cells):
    assert not any("<progress" in html or "<style" in html for i in (1, 3, 5) for html in htmls(cells[i]))


def test_notebook_marks_an_interruption(cells):
    graph, rows = cells[2]
    assert "image/png" in graph.data
    assert "progress-bar-interrupted" in rows.data["text/html"]
    assert "interrupted: epoch 4/6 train, 6/8" in rows.data["text/html"] and re.search(r'value="6"', rows.data["text/html"])
    assert [row[0] for row in table(rows.data["text/html"])] == ["epoch", "3"]


def test_notebook_shows_the_result_of_a_validation_once(cells):
    bar, result = cells[3]
    assert bar.data == {"text/html": "", "text/plain": ""}  # it is gone
    assert re.fullmatch(r"\{'validation_loss': 0\.\d+\}", result.data["text/plain"])


@pytest.mark.parametrize("number, others", [(6, []), (7, ["execute_result"])])
def test_notebook_shows_the_result_of_a_validation_that_the_cell_does_not_show(cells, number, others):
    line, *rest = cells[number]
    assert re.search(r"<p[^>]*>validation_loss \d\.\d{4}</p>", line.data["text/html"])
    assert [output.output_type for output in rest] == others


def test_notebook_leaves_no_figure_open(cells):
    assert cells[4][0].text == "[]\n"


def test_notebook_shows_the_last_rows_of_a_long_training(cells):
    _, rows = cells[5]
    assert len(table(rows.data["text/html"])) == 1 + 100
    assert "The last 100 of 102 epochs." in rows.data["text/html"]


def test_graph_keeps_no_more_points_than_can_be_told_apart(monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: None)
    graph = LossGraph(5, 10)
    for i in range(100_000): graph.add("batches", 5 + i / 10_000, float(i))
    assert 900 <= len(graph.curves["batches"][0]) <= 1001
    graph.add("validation_loss", 6, None)
    assert graph.curves["validation_loss"] == ([], [])


# The clock


@pytest.fixture
def screen_and_clock(monkeypatch, capsys):
    """A terminal of 80 columns, in which a pass starts with a redraw, and a clock that the test moves."""
    clock = [1000.0]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: TerminalView(first, epochs))
    monkeypatch.setattr(progress, "monotonic", lambda: clock[0])
    return clock


@pytest.mark.parametrize(("step", "redraws"), [(0.0, 0), (0.03, 12), (1.0, 50)])
def test_reads_the_loss_only_when_it_redraws(screen_and_clock, elsewhere, waits, step, redraws):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += step

        def before_training(self): waits.clear()

        def after_training(self): self.reads = len(waits)

    tick = Tick()
    learn = learner(Progress(), tick, train=batches(50))
    learn.loss_func = lambda predictions, labels: elsewhere(F.cross_entropy(predictions, labels))
    learn.train(1, learning_rate=0.1)
    assert tick.reads - 1 == redraws  # one read is the mean of the pass


def test_shows_the_loss_of_the_batch(screen_and_clock, capsys):
    losses = []

    class Tick(Callback):
        def after_batch(self, loss):
            screen_and_clock[0] += 1
            losses.append(f"loss {loss.item():.4f}")

    learner(Progress(), Tick(), train=batches(10)).train(1, learning_rate=0.1)
    shown = re.findall(r"\[(\d+)/10[^\]]*?(loss [\d.]+)", capsys.readouterr().out)
    assert [(int(n), loss) for n, loss in shown] == list(enumerate(losses, 1))[:-1]  # at the end the bar has gone


# Whatever happens


class At(Callback):
    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.act)

    def act(self, learn):
        if learn.epoch == 1 and learn.batch_num in (-1, 2): raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CancelTrainException, CancelEpochException,
                                   CancelBatchException])
@pytest.mark.parametrize("hook", ["before_training", "after_loss", "before_validation_batch", "after_epoch"])
def test_ends_clean_and_starts_again(screen_and_clock, capsys, hook, error):
    shown = Progress()
    learn = learner(shown)
    learn.train(1, learning_rate=0.1)
    with suppress(RuntimeError, KeyboardInterrupt, ValueError): learn.train(3, callbacks=At(hook, error))
    assert shown.view is None
    capsys.readouterr()
    rows = len(learn.history)
    learn.train(2)
    lines, _ = screen(capsys.readouterr().out, 80)
    assert [line.split()[0] for line in lines if line] == ["epoch", str(rows), str(rows + 1)]


def test_added_while_training_goes_on(capsys):
    class Adds(Callback):
        def after_epoch(self, learn, epoch):
            if epoch == 0: learn.add(Progress())

    learn = learner(Adds())
    learn.train(3, learning_rate=0.1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["train_loss", "validation_loss"] * 2
    learn.remove(learn.callbacks[0])
    learn.train(1)
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "3"


def test_removed_while_training_goes_on(capsys):
    class Removes(Callback):
        def after_epoch(self, learn):
            if shown in learn.callbacks: learn.remove(shown)

    shown = Progress()
    learner(shown, Removes()).train(3, learning_rate=0.1)
    assert shown.view is None
    assert len(capsys.readouterr().out.splitlines()) == 2


class Stream:
    def __iter__(self): return iter(batches())


def test_loader_without_length(screen_and_clock, capsys):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

    learn = learner(Progress(), Tick(), train=Stream(), validation=Stream())
    learn.train(2, learning_rate=0.1)
    written = capsys.readouterr().out
    assert "[8/? 00:00<?" in written
    assert [line.split()[0] for line in screen(written, 80)[0] if line] == ["epoch", "0", "1"]


def test_loader_longer_than_it_says(screen_and_clock, capsys):
    class Liar(Stream):
        def __len__(self): return 3

    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

    learner(Progress(), Tick(), train=Liar()).train(1, learning_rate=0.1)
    written = capsys.readouterr().out
    assert "[2/3 " in written
    assert "[3/3 " not in written
    assert [line.split()[0] for line in screen(written, 80)[0] if line] == ["epoch", "0"]


@pytest.mark.filterwarnings("ignore:the routine of .* took no step")
def test_routine_without_a_loss(screen_and_clock, capsys):
    class Own(Learner):
        def train_batch(self):
            screen_and_clock[0] += 1
            return {"mine": 2.0}

    Own(nn.Linear(4, 2), torch.optim.SGD, None, {"train": batches()}, Progress()).train(1, learning_rate=0.1)
    assert screen(capsys.readouterr().out, 80)[0][:2] == ["epoch  train_mine", "    0      2.0000"]


def test_no_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw
    learner(Progress()).train(1, learning_rate=0.1)


# It only watches


@pytest.mark.parametrize("view", [LogView, TerminalView])
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_are_the_same(monkeypatch, optimiser, view):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: view(first, epochs))
    trained = []
    for callbacks in ([], [Progress()]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        loaders = {"train": batches(), "validation": batches(2)}
        Learner(model, optimiser, F.cross_entropy, loaders, callbacks).train(3, 0.1)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*trained)


@pytest.mark.parametrize("fails", [False, True])
def test_keeps_nothing_alive(screen_and_clock, fails):
    shown = Progress()
    learn = learner(shown)
    references = [weakref.ref(learn.model), weakref.ref(learn)]
    losses = []
    learn.on("after_loss", lambda loss: losses.append(weakref.ref(loss)))
    gc.collect()
    gc.disable()
    try:
        guest = At("after_loss", RuntimeError) if fails else None
        with suppress(RuntimeError): learn.train(2, learning_rate=0.1, callbacks=guest)
        del learn
        assert [reference() for reference in references] == [None, None]
        assert losses
        assert not any(loss() is not None for loss in losses)
    finally: gc.enable()


def test_import_is_cheap():
    code = "import sys, learner.watch.progress; print(*{'fastprogress', 'fasthtml', 'matplotlib'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("plot", ["loss", 1, None])
def test_plot_must_be_true_or_false(plot):
    with pytest.raises(TypeError, match=re.escape(f"plot is {plot!r}; it must be True or False")): Progress(plot=plot)


@pytest.mark.parametrize("hook", ["after_epoch", "after_validation", "after_batch"])
def test_the_row_of_a_cancelled_epoch_is_shown(hook, capsys):
    learn = learner(Progress())

    @learn.on(hook)
    def stop(epoch):
        if epoch == 1: raise CancelTrainException
    learn.train(5)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["0", "1"] and len(learn.history) == 2


# A training that is resumed


class Stop(Callback):
    def after_batch(self, learn):
        if (learn.epoch, learn.batch_num) == (7, 3): raise KeyboardInterrupt


def stopped(tmp_path, *callbacks):
    """A checkpoint of a training of twelve epochs that was stopped in the eighth, and a fresh learner."""
    learn = learner()
    with suppress(KeyboardInterrupt): learn.train(12, learning_rate=0.1, callbacks=Stop())
    learn.save(tmp_path / "stopped")
    return tmp_path / "stopped", learner(*callbacks)


def epochs_in(text): return [line.split()[0] for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("view", [LogView, TerminalView])
def test_a_resumed_training_shows_the_earlier_rows_and_goes_on(tmp_path, capsys, monkeypatch, view):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: view(first, epochs))
    path, learn = stopped(tmp_path, Progress())
    learn.train(12, resume=path)
    written = capsys.readouterr().out
    lines = [line for line in screen(written, 80)[0] if line]
    assert [line.split()[0] for line in lines] == ["epoch", *map(str, range(12))] and len(learn.history) == 12
    assert lines[1:] == repr(learn.history).splitlines()[1:]
    if view is TerminalView: assert "epoch 7/11 train" in written and "epoch 0/" not in written


def test_a_bar_of_a_resumed_pass_begins_where_it_stood(tmp_path, screen_and_clock, capsys):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

    path, learn = stopped(tmp_path, Progress(), Tick())
    learn.train(12, resume=path)
    bars = re.findall(r"epoch (\d+)/11 train [^\[]*\[(\d+)/8", capsys.readouterr().out)
    assert [int(batch) for epoch, batch in bars if epoch == "7"] == [0, 4, 5, 6, 7]  # four were done
    assert [int(batch) for epoch, batch in bars if epoch == "8"] == [0, *range(1, 8)]


def test_time_left_in_a_resumed_pass_leaves_out_what_was_done_before(monkeypatch):
    from fastprogress.fastprogress import ProgressBar

    from learner.watch import views
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr(views, "time", lambda: now[0])
    bar = views.start_bar(ProgressBar(None, 100, display=False), now[0], skipped=90)
    now[0] += 5
    views.update_bar(bar, 95)  # five batches in five seconds
    assert bar.pred_t - (bar.last_t - bar.start_t) == pytest.approx(5)


def test_the_notebook_shows_the_epochs_that_are_done_of_all(monkeypatch):
    pages = []

    class Handle:
        def update(self, page, raw=False): pages.append(page)
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: Handle())
    view = NotebookView(7, 5, False)
    view.earlier([{"epoch": epoch, "train_loss": 1.0} for epoch in range(7)])
    view.begin("train", 8)
    view.update(4, 0.5)
    view.row({"epoch": 7, "train_loss": 0.5})
    assert [row[0] for row in table(pages[-1]["text/html"])] == ["epoch", *map(str, range(7))]
    assert "[7/12 " in pages[-1]["text/html"]
    view.begin("validation", 8)
    view.update(1, 0.5)
    assert "[8/12 " in pages[-1]["text/html"]


def test_a_training_after_another_is_numbered_on_and_shows_its_own_rows(capsys, monkeypatch):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: TerminalView(first, epochs))
    learn = learner(Progress())
    learn.train(2, learning_rate=0.1)
    capsys.readouterr()
    learn.train(2)
    written = capsys.readouterr().out
    assert "epoch 2/3 train" in written
    assert [line.split()[0] for line in screen(written, 100)[0] if line] == ["epoch", "2", "3"]


def test_steps_are_counted_in_the_bars(screen_and_clock, capsys):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

    learner(Progress(), Tick()).train(steps=10, validation_steps=4, learning_rate=0.1)
    bars = re.findall(r"epoch (\d+)/2 train [^\[]*\[(\d+)/(\d+)", capsys.readouterr().out)
    assert {(epoch, total) for epoch, _, total in bars} == {("0", "4"), ("1", "4"), ("2", "2")}


# What stands beside a bar


def test_the_bar_of_a_test_is_called_so(capsys, monkeypatch):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: TerminalView(first, epochs))
    learn = learner(Progress(), train=batches(), test=batches(2))
    learn.train(3, learning_rate=0.1)
    written = capsys.readouterr().out
    assert "\rtest |" in written and not re.search(r"epoch \S+ test", written)


def test_loaders_with_names_have_bars_with_names(screen_and_clock, capsys):
    def tick(): screen_and_clock[0] += 1
    learn = learner(Progress(), train=batches(), validation={"clean": batches(3), "noisy": batches(2)})
    learn.on("before_validation", tick)
    learn.train(1, learning_rate=0.1)
    assert "epoch 0 validation noisy |" in capsys.readouterr().out


def test_metrics_so_far_stand_beside_the_bar(screen_and_clock, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    seen = []

    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += 1

        def after_batch(self, predictions, labels):
            seen.append((predictions.argmax(1) == labels).float().mean().item())

    def hits(predictions, labels): return (predictions.argmax(1) == labels).float().mean()
    metrics = Metrics(accuracy=MulticlassAccuracy(), hits=hits)
    learner(Progress(), Tick(), metrics, train=batches(12)).train(1, learning_rate=0.1)
    shown = re.findall(r"\[(\d+)/12[^\]]*?accuracy ([\d.]+), hits ([\d.]+)", capsys.readouterr().out)
    assert [int(n) for n, *_ in shown] == list(range(1, 12))
    for n, accuracy, hits in shown:
        mean = sum(seen[:int(n)]) / int(n)
        assert float(accuracy) == pytest.approx(mean, abs=6e-5) and float(hits) == pytest.approx(mean, abs=6e-5)


@pytest.mark.parametrize("step", [0.0, 0.03, 1.0])
def test_metrics_do_not_depend_on_who_looks(screen_and_clock, step):
    class Tick(Callback):
        def before_batch(self): screen_and_clock[0] += step

    def mean(predictions, labels): return predictions.mean()

    def rows(*callbacks):
        metrics = Metrics(MulticlassAccuracy(average="macro", num_classes=2), mean)
        learn = learner(metrics, Tick(), *callbacks, train=batches(200))
        learn.train(2, learning_rate=0.1)
        return learn.history.rows
    assert rows(Progress()) == rows()


def test_a_metric_that_keeps_much_is_not_copied_to_be_shown():
    values = []

    class Scores(nn.Linear):
        def forward(self, x): return super().forward(x)[:, 0]
    loaders = {"train": [(torch.randn(600, 4), torch.randint(2, (600,))) for _ in range(140)]}
    metrics = Metrics(auroc=BinaryAUROC(), mean=lambda p, y: p.mean())
    learn = Learner(Scores(4, 2), torch.optim.SGD, lambda p, y: p.square().mean(), loaders, metrics, device="cpu")
    learn.on("after_batch", lambda: values.append(metrics.glance()), priority=10)
    learn.train(1, learning_rate=0.1)
    assert set(values[0]) == {"auroc", "mean"} and set(values[-1]) == {"mean"}


# Narrow and simple places


def test_rows_that_do_not_fit_are_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = [f"{phase}_{name}" for name in ("loss", "accuracy", "f1", "precision") for phase in ("train", "validation")]
    view = TerminalView(0, 2)
    for epoch in range(2): view.row({"epoch": epoch} | dict.fromkeys(names, 0.5))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and lines[0].startswith("epoch 0  train_loss 0.5000") and lines[1].startswith("  ")
    assert " ".join(lines).count("0.5000") == 16


@pytest.mark.parametrize("columns", [60, 80])
def test_at_60_columns_nothing_is_wider(columns):
    code = """
        from learner.watch.metrics import Metrics, MulticlassAccuracy
        learn.add(Metrics(accuracy=MulticlassAccuracy()))
        learn.train(2, learning_rate=0.1, callbacks=Slow())
        """
    written, status = in_terminal(code, columns)
    lines, longest = screen(written, 1000)
    assert status == 0 and longest < columns and max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if re.match(r" *\d", line)] == ["0", "1"]
    assert re.search(r"epoch 1/1 train \|[█-]{5,}\| \[\d/8 00:00<00:00\.\.\. loss \d\.\d{4}", written)
    assert not re.search(r"\[\d/8[^]\r]*\r", written)  # no comment is cut in the middle


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_place_that_knows_few_characters(encoding):
    code = """
        def wert_ä(predictions, labels): return predictions.mean()
        from learner.watch.metrics import Metrics
        learn.add(Metrics(wert_ä))
        learn.train(2, learning_rate=0.1, callbacks=Slow())
        """
    terminal, inside = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(script(code), stdin=inside, stdout=inside, stderr=inside, env={**os.environ, "PYTHONIOENCODING": encoding})
    os.close(inside)
    written = b""
    with suppress(OSError):
        while part := os.read(terminal, 4096): written += part
    assert process.wait(60) == 0, written.decode(encoding)
    assert {"ascii": b"wert_?", "cp1252": b"wert_\xe4"}[encoding] in written and b"|XXX" in written


def test_the_graph_is_never_empty(monkeypatch):
    shown = []

    class Handle:
        def update(self, picture): shown.append(picture)
    monkeypatch.setattr("IPython.display.display", lambda *args, **kwargs: Handle())
    graph = LossGraph(0, 3)
    graph.redraw()
    graph.end()
    assert shown == []  # an error before the first batch
    graph.add("batches", 0.1, 2.0)
    graph.redraw()
    assert shown == []  # a point is no curve
    graph.add("batches", 0.2, 1.5)
    graph.redraw()
    assert len(shown) == 1
    alone = LossGraph(0, 1)
    alone.add("batches", 1.0, 2.0)
    alone.end()
    assert len(shown) == 2  # an epoch of one batch has no more


def test_no_metric_is_shown_before_a_batch_has_been_seen(monkeypatch):
    told = []

    class Told(View):
        live = True
        def update(self, batches, loss=None): told.append((batches, set(self.values)))
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: Told(first, epochs))
    monkeypatch.setattr(Progress, "pause", 0.0)
    learner(Metrics(size=lambda predictions, labels: predictions.mean()), Progress()).train(1, learning_rate=0.1)
    assert told[0] == (0, set()) and told[1] == (1, {"size"})


def test_a_view_of_ones_own_needs_no_more_than_it_shows(capsys):
    class Rows(View):
        def row(self, row): print(row["epoch"])

    class Mine(Progress):
        def new_view(self, learn, epochs): return Rows(len(learn.history), epochs)
    learner(Mine()).train(2, learning_rate=0.1)
    assert capsys.readouterr().out == "0\n1\n"


def test_a_note_numbers_epochs_as_bars_and_rows_do(capsys, monkeypatch):
    monkeypatch.setattr(progress, "new_view", lambda first, epochs, plot: TerminalView(first, epochs))
    learn = learner(Progress())
    learn.train(2, learning_rate=0.1)
    with pytest.raises(RuntimeError) as caught: learn.train(3, callbacks=At("after_loss", RuntimeError("stop")))
    assert "(epoch 3, batch 2)" in caught.value.__notes__[0]
    assert re.findall(r"epoch (\d+)/4 train", capsys.readouterr().out)[-1] == "3"
