"""Ctrl-C at every line (`--long`: at every instruction) of what opens files leaves no descriptor, no lock, no thread and no temporary file."""
import contextlib
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from learner.base import files, store
from learner.base.files import (
    FileLock,
    append_text,
    is_locked,
    list_names,
    make_folder,
    open_file,
    read_bytes,
    remove,
    replacing,
    tidy,
    uninterrupted,
    write_all,
    write_text,
)
from learner.base.store import check_state, load_state, newest_checkpoint, save_state

WATCHED = {files.__file__, store.__file__, contextlib.__file__}
STATE = {"model": {"weight": torch.arange(300.0), "bias": torch.ones(7)}, "epoch": 3}
OLD = {"epoch": 2}


def pressed_at(number, work, opcodes):
    "Press Ctrl-C at one event of some work; how many events there were until then, and whether it came through."
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in WATCHED: return None
        frame.f_trace_opcodes, frame.f_trace_lines = opcodes, not opcodes
        if event in ("line", "opcode"):
            if count == number: signal.raise_signal(signal.SIGINT)
            count += 1
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try: work()
    except KeyboardInterrupt: return count, True
    finally: sys.settrace(previous)
    return count, False


def write_slowly(path):
    with replacing(path, sync=False) as file:
        for _ in range(3): write_all(file, b"x")


def lock(path):
    with FileLock(path): assert is_locked(path)


def make_new(path):
    shutil.rmtree(path, ignore_errors=True)
    make_folder(path / "inner")


def read_some(path):
    with open_file(path) as file: file.read(1)


WORK = {
    "save_state": lambda folder: save_state(folder / "last.safetensors", STATE), "load_state": lambda folder: load_state(folder / "first.safetensors"),
    "check_state": lambda folder: check_state(folder / "first.safetensors"), "newest": lambda folder: newest_checkpoint(folder, load_state),
    "write_text": lambda folder: write_text(folder / "a.txt", "new", inside=folder.parent), "replacing": lambda folder: write_slowly(folder / "a.txt"),
    "append_text": lambda folder: append_text(folder / "b.txt", "x\n"), "read_bytes": lambda folder: read_bytes(folder / "a.txt", inside=folder.parent),
    "open_file": lambda folder: read_some(folder / "a.txt"), "FileLock": lambda folder: lock(folder / ".lock"), "make_folder": lambda folder: make_new(folder / "new"),
    "list_names": lambda folder: list_names(folder, inside=folder.parent), "tidy": lambda folder: tidy(folder), "remove": lambda folder: remove(folder / "c.txt"),
}


def left_behind(folder):
    "Descriptors, threads and temporary files."
    return sorted(os.listdir("/proc/self/fd")), [each.name for each in threading.enumerate()], sorted(name for name in os.listdir(folder) if name.endswith(".tmp"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 256)  # so that it takes several, and a thread to hash them
    monkeypatch.setattr(os, "fsync", lambda file: None)
    place = tmp_path / "run"
    place.mkdir()
    for name in ("last", "first", "epoch-0001"): save_state(place / f"{name}.safetensors", OLD)
    (place / "a.txt").write_text("old")
    return place


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # a file object that is dropped closes itself, and says so
@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_anywhere_leaves_nothing_open_and_nothing_half_done(folder, name, request):
    opcodes = request.config.getoption("--long")
    work = lambda: WORK[name](folder)  # noqa: E731
    work()  # the first call imports, so it has more instructions than the others
    total, pressed = pressed_at(-1, work, opcodes)
    assert total > 10 and not pressed
    before = left_behind(folder)
    came_through = 0
    for number in range(total):
        (folder / "c.txt").touch()
        came_through += pressed_at(number, work, opcodes)[1]
        assert left_behind(folder) == before, number
        assert not is_locked(folder / ".lock")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert load_state(folder / "last.safetensors")["epoch"] in (2, 3)
        assert (folder / "a.txt").read_text() in ("old", "new", "xxx")
    assert came_through == total  # none is lost


def test_a_long_write_answers_between_two_blocks(folder):
    blocks = []
    with pytest.raises(KeyboardInterrupt), replacing(folder / "a.txt") as file:
        for number in range(5):
            write_all(file, b"x")
            blocks.append(number)
            if number == 2: signal.raise_signal(signal.SIGINT)
    assert blocks == [0, 1, 2] and (folder / "a.txt").read_text() == "old"
    assert sorted(os.listdir(folder)) == ["a.txt", "epoch-0001.safetensors", "first.safetensors", "last.safetensors"]


def test_every_press_reaches_the_handler_that_was_there(folder):
    came = []
    previous = signal.signal(signal.SIGINT, lambda *press: came.append(press[0]))
    try:
        with uninterrupted():
            for _ in range(3): signal.raise_signal(signal.SIGINT)
            assert came == []
            write_text(folder / "a.txt", "new")  # within another
            assert came == [signal.SIGINT] * 3
        assert (folder / "a.txt").read_text() == "new"
    finally: signal.signal(signal.SIGINT, previous)


def test_an_ignored_ctrl_c_and_another_thread_are_let_alone(folder):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted(): assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, previous)
    found = []

    def work():
        with uninterrupted(): found.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
