"""Run folders: atomic writing, names, locks across processes, and reading of what is damaged or hostile."""
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from learner.base import files
from learner.base.files import FileError, write_text
from learner.base.words import plain
from learner.runs.rundir import (
    VERSION,
    RunError,
    RunExistsError,
    RunLock,
    check_name,
    create_run,
    find_runs,
    is_locked,
    move_aside,
    new_name,
)
from learner.runs.runfiles import GrowingTable, iter_rows, read_cell, read_json, read_run, write_json, write_rows

ROOT = Path(__file__).resolve().parents[2]


def process(code, **options):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def a_run(folder, **meta):
    create_run(folder)
    write_json(folder / "config.json", {"format": "learner.run", "version": 1, "config": "digits", "settings": {"width": 3}})
    write_json(folder / "meta.json", {"status": "finished", **meta})
    return folder


# Writing

@pytest.mark.parametrize("value, expected", [
    (float("nan"), "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1.5, 1.5), (True, True), (None, None), (2**70, 2**70),
    ((1, (2,)), [1, [2]]), ({1: {2: 3}}, {"1": {"2": 3}}), ({"b", "a"}, ["a", "b"]), (Path("a") / "b", "a/b"), (object, repr(object)),
])
def test_every_value_becomes_valid_json(tmp_path, value, expected):
    assert plain(value) == expected
    write_json(tmp_path / "x.json", {"value": value})
    text = (tmp_path / "x.json").read_text()
    refuse = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    assert json.loads(text, parse_constant=refuse) == {"value": expected} == read_json(tmp_path / "x.json")


def test_numbers_in_tables_come_back_to_the_last_digit(tmp_path):
    rows = [{"epoch": 0, "loss": 0.1 + 0.2, "big": 1e300, "word": "a,\"b"}, {"epoch": 1, "loss": math.nan, "later": -0.0}]
    write_rows(tmp_path / "x.csv", rows)
    one, two = iter_rows(tmp_path / "x.csv")
    assert one == {**rows[0], "later": None}
    assert math.isnan(two["loss"]) and math.copysign(1, two["later"]) == -1 and two["big"] is None


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", "\r", "\"a\r\",b", "1_000", "\uff11\uff12", " 3", "0x10", "True", "1e", "\u0131nf"])
def test_texts_in_tables_come_back(tmp_path, text):
    rows = [{"epoch": 0, "note": text, "loss": 0.5, "later": None}, {"epoch": 1, "note": "fine", "loss": None, "later": -1e-05}]
    write_rows(tmp_path / "x.csv", rows)
    assert [*iter_rows(tmp_path / "x.csv")] == rows


@pytest.mark.parametrize("text, number", [("12", 12), ("-3", -3), ("+3", 3), ("1.", 1.0), (".5", 0.5), ("-1.5E-3", -0.0015), ("-inf", -math.inf), ("Infinity", math.inf), ("9" * 5000, math.inf)])
def test_numbers_in_tables_of_others_are_numbers(text, number): assert read_cell(text) == number and type(read_cell(text)) is type(number)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "half a pair: \ud800")
    assert (tmp_path / "x.txt").read_text() == "half a pair: \\ud800"
    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(ValueError, match="Out of range"): files.write_json(tmp_path / "x.txt", [float("nan")])

    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"): write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_reader_never_sees_half_a_file_though_its_writer_is_killed_again_and_again(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"text": "a" * 200_000})
    code = f"""
from learner.runs.runfiles import write_json
print(1, flush=True)
while True:
    for letter in "bc": write_json({str(file)!r}, {{"text": letter * 200_000}}, sync=False)
"""
    seen = set()
    for round in range(8):
        with process(code) as writer:
            writer.stdout.readline()
            until = time.monotonic() + 0.02 * round + 0.02
            while time.monotonic() < until: seen.add(read_json(file)["text"])
            writer.send_signal(signal.SIGKILL)
        seen.add(read_json(file)["text"])
    assert {len(text) for text in seen} == {200_000} and all(len(set(text)) == 1 for text in seen)


# Names

BAD_NAMES = [
    ("../x", "must be a name, not a path"), ("..", "must be a name, not a path"), (".", "must be a name"), ("a/b", "not a path"),
    ("/etc/passwd", "not a path"), ("a\\b", "not a path"), ("C:x", "not every system allows"), ("a\nb", "not every system allows"),
    ("a\0", "not every system allows"), ("-rf", "begins with a letter"), ("~", "begins with a letter"), ("", "is empty"), (" a", "begins"),
    ("a.", "not every system"), ("a ", "not every system"), ("x" * 201, "longer than 200"), (None, "must be text"), (3, "must be text"), (Path("a"), "must be text"),
]


@pytest.mark.parametrize("name, message", BAD_NAMES)
def test_a_bad_name_is_refused_in_one_line(name, message):
    with pytest.raises(RunError, match=message) as caught: check_name(name, "checkpoint")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("checkpoint is ")


@pytest.mark.parametrize("name", ["first", "epoch-0003-batch-00120", ".hidden", "größe", "a b", "v1.2"])
def test_a_good_name_comes_back(name): assert check_name(name) == name


def test_free_names(tmp_path):
    assert new_name(tmp_path / "a") == tmp_path / "a"
    for name in ("a", "a-2"): (tmp_path / name).mkdir()
    (tmp_path / "a-3").symlink_to("nowhere")  # a link that leads nowhere takes its name all the same
    assert new_name(tmp_path / "a").name == "a-4"


def test_a_run_that_exists_is_not_made_again(tmp_path):
    a_run(tmp_path / "a")
    with pytest.raises(RunExistsError, match=r"resume.*a-2 is free.*overwrite"): create_run(tmp_path / "a")
    with pytest.raises(FileExistsError): create_run(tmp_path / "a")


@pytest.mark.parametrize("function", [create_run, move_aside, new_name, read_run])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, function):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="the path of the run is empty; name a folder, such as runs/first"): function("")
    assert os.listdir(tmp_path) == []


def test_other_things_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunExistsError, match="is a file, and a run is a folder"): create_run(tmp_path / "file")
    with pytest.raises(RunExistsError, match="above it is a file"): create_run(tmp_path / "file" / "run")
    with pytest.raises(RunExistsError, match="is not a run, so it stays as it is"): create_run(tmp_path / "full")
    with pytest.raises(RunExistsError): create_run(tmp_path / "link")
    assert create_run(tmp_path / "empty") == tmp_path / "empty"
    assert create_run(tmp_path / "new" / "deep" / "run").is_dir()
    for name in ("full", "file", "link"):
        with pytest.raises(RunError): move_aside(tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_moving_aside(tmp_path):
    assert move_aside(tmp_path / "a") is None
    for expected in ("a-old", "a-old-2"):
        a_run(tmp_path / "a", seed=7)
        moved = move_aside(tmp_path / "a")
        assert moved.name == expected and read_run(moved).meta["seed"] == 7 and not (tmp_path / "a").exists()
    a_run(tmp_path / "a")
    with RunLock(tmp_path / "a"), pytest.raises(RunError, match="in use"): move_aside(tmp_path / "a")
    assert (tmp_path / "a").exists()


# The lock

def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path):
    run = a_run(tmp_path / "a", status="running")
    code = f"""
import os, time
from learner.runs.rundir import RunLock
with RunLock({str(run)!r}):
    child = os.fork()
    if not child: time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""
    with process(code) as trainer:
        child = int(trainer.stdout.readline())
        try:
            assert is_locked(run) and read_run(run).status == "running"
            with pytest.raises(RunError, match="in use by another process"): RunLock(run).__enter__()
            trainer.send_signal(signal.SIGKILL)
            trainer.wait()
            os.kill(child, 0)  # it lives on
            assert not is_locked(run) and read_run(run).status == "stopped"
        finally: os.kill(child, signal.SIGKILL)


def test_readers_do_not_keep_a_trainer_out(tmp_path):
    run, stop = a_run(tmp_path / "a"), threading.Event()

    def look():
        while not stop.is_set(): is_locked(run)
    RunLock(run).__enter__().__exit__()
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads: thread.start()
    try:
        for _ in range(30):
            with RunLock(run): pass
    finally:
        stop.set()
        for thread in threads: thread.join()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    run = a_run(tmp_path / "a")
    (run / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(FileError, match="is a link, which is not followed"): RunLock(run).__enter__()
    assert not (tmp_path / "victim").exists() and not is_locked(run)


# Reading

@pytest.mark.parametrize("status, shown", [("running", "stopped"), ("finished", "finished"), ("failed", "failed"), ("stopped", "stopped"),
                                           ("dancing", "unknown"), (None, "unknown"), (["running"], "unknown")])
def test_statuses(tmp_path, status, shown): assert read_run(a_run(tmp_path / "a", status=status)).status == shown


def test_what_is_missing_is_empty(tmp_path):
    (tmp_path / "config.json").write_text("{\"config\": null, \"format\": \"learner.run\"}")
    run = read_run(tmp_path)
    assert (run.settings, run.rows, run.score, run.checkpoints, run.last_epoch, run.text("code.diff"), [*run.steps()]) == ({}, [], {}, [], None, "", [])
    assert run.status == "unknown"


DAMAGED = [
    ("config.json", "{", "config.json is damaged"), ("config.json", "", "damaged"), ("config.json", "[1]", "holds a list"),
    ("config.json", '{"format": "other"}', "its format is 'other'"), ("config.json", '{"format": "learner.run", "version": 9}', "update learner"),
    ("config.json", '{"format": "learner.run", "version": "x"}', "version 'x'"), ("config.json", '{"format": "learner.run", "settings": [1]}', "settings are not an object"),
    ("config.json", "[" * 100_000, "has more than 10,000 values"), ("config.json", "[" * 700 + "]" * 700, "is nested more than 50 levels deep"), ("config.json", b"\xff\xfe", "is not text in UTF-8"),
    ("meta.json", "null", "holds a NoneType"), ("meta.json", "{\"status\": ", "damaged"),
    ("score.json", '{"a": 3}', "a is not an object"), ("score.json", '{"a": {"best": "good"}}', "is not a number"), ("score.json", '{"a": {"last": [1]}}', "is not a number"),
    ("history.csv", "epoch,loss\n0,1\n1\n", "has 1 cells in line 3, and 2 in its head"), ("history.csv", "epoch,a,a\n", "a column twice"), ("history.csv", b"epoch\n\xff\n", "is not text in UTF-8"),
    ("history.csv", "epoch\n" + "9" * 200_000 + "\n", "damaged"),
]
PARTS = {"config.json": lambda run: run.config, "meta.json": lambda run: run.meta, "score.json": lambda run: run.score, "history.csv": lambda run: run.rows}


@pytest.mark.parametrize("file, content, message", DAMAGED, ids=[f"{row[0]}-{row[2]}" for row in DAMAGED])
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path, file, content, message):
    run = a_run(tmp_path / "a")
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=message) as caught: PARTS[file](read_run(run))
    assert file in str(caught.value) and "\n" not in str(caught.value)
    for other in PARTS.keys() - {file}: PARTS[other](read_run(run))
    repr(read_run(run))


@pytest.mark.parametrize("file", PARTS)
def test_links_pipes_devices_and_folders_are_not_read(tmp_path, file):
    for number, put in enumerate([lambda p: p.symlink_to("/etc/hostname"), lambda p: p.symlink_to("/dev/zero"), os.mkfifo, os.mkdir]):
        run = a_run(tmp_path / str(number))
        (run / file).unlink(missing_ok=True)
        if file == "config.json": write_json(run / "meta.json", {})
        put(run / file)
        with pytest.raises(RunError, match=file): PARTS[file](read_run(run))


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    run = a_run(tmp_path / "a")
    (run / "steps.csv").write_text("step,loss\n0,0.5\n50,0.25\n100,0.1")
    assert [row["step"] for row in read_run(run).steps()] == [0, 50]


def test_checkpoints_in_order_without_strangers(tmp_path):
    run = a_run(tmp_path / "a")
    (run / "checkpoints").mkdir()
    for name in ("epoch-0010", "epoch-0002", "epoch-0002-batch-00120", ".epoch-0011", "best", "epoch-x", "epoch-" + "9" * 200):
        (run / "checkpoints" / f"{name}.safetensors").write_bytes(b"")
    (run / "checkpoints" / "epoch-0012.safetensors").symlink_to(tmp_path / "a" / "meta.json")
    (run / "checkpoints" / "best.json").write_text("{}")
    assert read_run(run).checkpoints == ["epoch-0002.safetensors", "epoch-0002-batch-00120.safetensors", "epoch-0010.safetensors"]
    assert read_run(run).last_epoch == 10


def test_reading_names_no_way_out(tmp_path):
    run = a_run(tmp_path / "a")
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(RunError, match="not a path"): read_run(run).text("../secret")


def test_no_run_there(tmp_path):
    a_run(tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="did you mean first"): read_run(tmp_path / "frist")
    with pytest.raises(FileNotFoundError, match="there is no run"): read_run(tmp_path / "no" / "where")
    with pytest.raises(RunError, match="is a file"): read_run(tmp_path / "first" / "meta.json")
    with pytest.raises(RunError, match="is not a run"): read_run(tmp_path)


def test_runs_are_found_at_any_depth_once_and_not_through_links(tmp_path):
    for name in ("a", "deep/er/b"): a_run(tmp_path / name)
    a_run(tmp_path / "a" / "checkpoints" / "inner")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "deep/er/b"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"] and find_runs(tmp_path / "none") == []


def test_it_is_read_without_torch(tmp_path):
    run = a_run(tmp_path / "a")
    with process(f"import sys; from learner.runs.runfiles import read_run; print(read_run({str(run)!r}).status, 'torch' in sys.modules)") as reader:
        assert reader.communicate() == ("finished False\n", "")


def test_a_thousand_folders_are_read(tmp_path):
    for i in range(1000):
        run = tmp_path / f"run-{i}"
        run.mkdir()
        write_json(run / "config.json", {"format": "learner.run", "version": 1, "settings": {"width": i}}, sync=False)
        write_json(run / "meta.json", {"status": "finished"}, sync=False)
        write_json(run / "score.json", {"loss": {"best": 0.5, "last": 0.5, "mode": "min"}}, sync=False)
    for path in find_runs(tmp_path): assert read_run(path).score["loss"]["best"] == 0.5 and read_run(path).status == "finished"


def test_the_format_that_others_wrote_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"format": "learner.run", "version": 1, "config": "digits", "settings": {}, "later": 1}')
    (tmp_path / "meta.json").write_text('{"status": "finished", "seed": 3, "later": {"a": 1}}')
    (tmp_path / "history.csv").write_text("epoch,loss,note\r\n0,nan,\r\n1,1e-3,good\r\n")  # with the line ends of other systems
    run = read_run(tmp_path)
    assert VERSION == 1 and run.rows[1] == {"epoch": 1, "loss": 1e-3, "note": "good"} and run.rows[0]["note"] is None


def sparse(path):
    with path.open("wb") as file: file.truncate(1 << 40)


HUGE = [
    ("config.json", lambda p: p.write_text(json.dumps({"format": "learner.run", "settings": {f"s{i}": i for i in range(200_000)}})), "more than 10,000 values"),
    ("config.json", lambda p: p.write_text("{" + '"a":{' * 700 + "}" * 701), "nested more than 50 levels deep"),
    ("meta.json", lambda p: p.write_text("[" + "[]," * 5_500_000 + "[]]"), "bytes"), ("meta.json", lambda p: p.write_text("[" + "[]," * 2_000_000 + "[]]"), "more than 200,000 values"),
    ("score.json", lambda p: p.write_text('{"loss": {"best": ' + "9" * 4000 + "}}"), "a number of 4000 digits"), ("score.json", lambda p: p.write_text('{"loss": {"best": ' + "9" * 90 + "." + "9" * 4000 + "e900}}"), "too large"),
    ("score.json", lambda p: p.write_text('{"loss": {"best": 1, "mode": []}}'), "the mode of loss is"), ("score.json", lambda p: p.write_text('{"loss": {"best": 1, "mode": "up"}}'), "the mode of loss is 'up'"),
    ("config.json", sparse, "bytes"), ("meta.json", sparse, "bytes"), ("score.json", sparse, "bytes"), ("history.csv", sparse, "bytes"),
    ("history.csv", lambda p: p.write_text("1," * 2_000_000 + "1\n"), "a line of more than"), ("history.csv", lambda p: p.write_text(",".join(map(str, range(1000))) + "\n" + ("1," * 999 + "1\n") * 2100), "more than 2,000,000 cells"),
]


@pytest.mark.parametrize("file, put, message", HUGE, ids=[f"{row[0]}-{row[2]}" for row in HUGE])
def test_what_is_far_too_large_is_refused_in_bounded_time_and_memory(tmp_path, file, put, message):
    run = a_run(tmp_path / "a")
    put(run / file)
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
from learner.runs.runfiles import RunFiles
from learner.runs.rundir import RunError
try: getattr(RunFiles({str(run)!r}), {dict(zip(PARTS, ("config", "meta", "score", "rows"), strict=True))[file]!r})
except RunError as error: print(error)
"""
    with process(code) as reader: out, err = reader.communicate(timeout=20)
    assert message in out and file in out and out.count("\n") == 1, err


def test_a_long_table_of_steps_is_read_without_a_limit_and_a_sparse_one_ends(tmp_path):
    run = a_run(tmp_path / "a")
    (run / "steps.csv").write_text("step,loss\n" + "".join(f"{i},0.5\n" for i in range(50_000)))
    assert sum(row["step"] for row in read_run(run).steps()) == 50_000 * 49_999 // 2
    sparse(run / "steps.csv")
    with pytest.raises(RunError, match="a line of more than"): next(read_run(run).steps())


def test_pipes_and_links_do_not_hang_the_lock(tmp_path):
    run = a_run(tmp_path / "a")
    os.mkfifo(run / ".lock")
    assert not is_locked(run)
    with pytest.raises(FileError, match="not a regular file"): RunLock(run).__enter__()


def test_what_a_run_says_is_shown_without_escapes(tmp_path):
    (run := a_run(tmp_path / "a").rename(tmp_path / "a\x1b[2J"))
    (run / "history.csv").write_text("epoch,\x1b]0;t\x07\n0\n")
    assert repr(read_run(run)).isprintable()


# Tables that grow

def test_a_growing_table_is_at_any_time_what_writing_it_whole_would_give(tmp_path):
    table, rows = GrowingTable(tmp_path / "t.csv"), []

    def columns(): return list(dict.fromkeys(name for row in rows for name in row))
    for epoch in range(12):
        rows.append({"epoch": epoch, "train_loss": 1 / (epoch + 1)})
        if epoch % 3 == 2: rows[-1]["validation_loss"] = math.nan if epoch == 5 else 0.1 + 0.2
        if epoch == 7: rows[-1]["note"] = 'a "quoted"\r, text'
        table.follow(rows, columns)
        write_rows(tmp_path / "whole.csv", rows, columns())
        assert repr([*iter_rows(tmp_path / "t.csv")]) == repr([*iter_rows(tmp_path / "whole.csv")])
    rows[0]["train_loss"] = 7.0
    table.rewrite(rows, columns())
    assert next(iter_rows(tmp_path / "t.csv"))["train_loss"] == 7.0


def test_a_row_appended_behind_half_a_line_is_not_lost_when_training_is_begun_again(tmp_path):
    table, rows = GrowingTable(tmp_path / "t.csv"), [{"epoch": 0, "loss": 0.5}]
    table.follow(rows, lambda: ["epoch", "loss"])
    with (tmp_path / "t.csv").open("a") as file: file.write("1,0.2")  # the process was killed here
    assert len([*iter_rows(tmp_path / "t.csv")]) == 1
    table = GrowingTable(tmp_path / "t.csv")
    rows.append({"epoch": 1, "loss": 0.25})
    table.follow(rows, lambda: ["epoch", "loss"])
    assert [row["loss"] for row in iter_rows(tmp_path / "t.csv")] == [0.5, 0.25]


def test_a_growing_table_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "t.csv").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(FileError, match="is a link"): GrowingTable(tmp_path / "t.csv").follow([{"epoch": 0}], lambda: ["epoch"])
    assert (tmp_path / "mine.txt").read_text() == "mine"
