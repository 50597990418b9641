"The room that opens files: what is refused, what a crash leaves, what hostile content costs."
import contextlib
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from learner.base import files
from learner.base.files import (
    FileError,
    FileLock,
    LockedError,
    append_text,
    is_file,
    is_locked,
    list_names,
    make_folder,
    open_append,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    remove,
    replacing,
    tidy,
    write_all,
    write_bytes,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parents[2]


def trap(path, kind, outside):
    "Something that is not a regular file."
    if kind == "link": path.symlink_to(outside)
    if kind == "dangling link": path.symlink_to(outside.with_name("to be made"))
    if kind == "circle": path.symlink_to(path)
    if kind == "pipe": os.mkfifo(path)
    if kind == "folder": path.mkdir()
    if kind == "device": path.symlink_to("/dev/zero")
    if kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        try: socket.socket(socket.AF_UNIX).bind(path.name)
        finally: os.chdir(here)


KINDS = ["link", "dangling link", "circle", "pipe", "folder", "device", "socket"]
READERS = [read_bytes, read_text, read_json, open_file]
WRITERS = [lambda p, **o: write_bytes(p, b"x", **o), lambda p, **o: write_text(p, "x", **o), lambda p, **o: write_json(p, 1, **o),
           lambda p, **o: append_text(p, "x", **o), open_append, lambda p, **o: FileLock(p, **o).__enter__()]


@pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path, kind):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "x"
    trap(path, kind, outside)
    before = path.lstat().st_mode
    for work in (*READERS, *WRITERS):
        for options in ({}, {"inside": tmp_path}, {"inside": tmp_path / "run"}):
            with pytest.raises((FileError, OSError)) as caught: work(path, **options)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not is_file(path) and not is_locked(path)
    assert outside.read_text() == "secret" and path.lstat().st_mode == before
    assert sorted(os.listdir(tmp_path)) == ["outside", "run"] and os.listdir(tmp_path / "run") == ["x"]


def test_below_the_folder_that_the_user_names_no_link_is_followed(tmp_path):
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "x").write_text("1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inner").symlink_to(tmp_path / "outside")
    (tmp_path / "named").symlink_to("run")
    path = tmp_path / "named" / "inner" / "deep" / "x"
    works = (*READERS, *WRITERS, remove)
    for work in works:
        with pytest.raises(FileError, match="is a link, which is not followed"): work(path, inside=tmp_path / "named")
    for work in (list_names, tidy):
        with pytest.raises(FileError, match="is a link"): work(path.parent, inside=tmp_path / "named")
    assert read_json(path) == 1 and not is_file(path, inside=tmp_path / "named")  # the user's own path may lead through links
    write_text(tmp_path / "named" / "y", "2", inside=tmp_path / "named")
    assert (tmp_path / "run" / "y").read_text() == "2" and (tmp_path / "outside" / "deep" / "x").read_text() == "1"


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "a/../../b"])
def test_a_path_that_names_no_file_within_is_refused(tmp_path, name):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "b").write_text("{}")
    for work in (read_json, lambda p, **o: write_text(p, "x", **o), remove):
        with pytest.raises(FileError, match="does not name a file"): work(tmp_path / "in" / name, inside=tmp_path / "in")
    assert (tmp_path / "b").read_text() == "{}"


def test_errors_of_the_system_keep_their_type_and_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as caught: read_text(tmp_path / "none" / "x", inside=tmp_path)
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/none/x'"
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file/x"): write_text(tmp_path / "file" / "x", "y")
    with pytest.raises(FileNotFoundError, match="none/x"): write_text(tmp_path / "none" / "x", "y")
    remove(tmp_path / "absent")  # it is gone already
    with pytest.raises(OSError, match="File name too long"): write_text(tmp_path / ("x" * 240), "y")
    assert os.listdir(tmp_path) == ["file"]


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    assert read_bytes(path, limit=1000) == bytes(1000)
    with pytest.raises(FileError, match="x has 1,000 bytes, and at most 999 are read"): read_bytes(path, limit=999)
    os.truncate(path, 2**42)  # four terabytes that take no room
    for read in READERS:
        with pytest.raises(FileError, match="bytes, and at most"): read(path)
    with open_file(path, limit=None) as file: assert file.read(3) == bytes(3)
    if os.path.exists("/proc/self/status"):  # its size is said to be 0
        with pytest.raises(FileError, match="has more than the 10 bytes that are read"): read_bytes("/proc/self/status", limit=10)


def test_text_comes_as_it_is(tmp_path):
    path = tmp_path / "x"
    write_text(path, "é\r\n\0𝄞")
    assert path.read_bytes() == "é\r\n\0𝄞".encode() and read_text(path) == "é\r\n\0𝄞"
    path.write_bytes(b"\xff")
    with pytest.raises(FileError, match="x is not text in UTF-8"): read_text(path)
    append_text(path, "a")
    append_text(path, "b")
    assert path.read_bytes() == b"\xffab"


# ---------------------------------------------------------------------------------------------------- JSON

GOOD = [None, True, 0, -1, 2**300, 0.1, 1e-320, 5e307, "x", "\ud800", [], {}, [[], {"a": {"": [None]}}], {"a": "[" * 1000}]


@pytest.mark.parametrize("value", GOOD, ids=repr)
def test_json_comes_back(tmp_path, value):
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == value
    write_json(tmp_path / "x", value) if value != "\ud800" else (tmp_path / "x").write_text(text)
    assert read_json(tmp_path / "x") == value


BAD = {
    "NaN": ("[NaN]", "has NaN, which is not JSON"), "infinity": ("-Infinity", "has -Infinity, which is not JSON"),
    "too large": ("[1e999]", "has the number 1e999, which is too large"), "digits": ("9" * 4000, "has a number of 4000 digits"),
    "key twice": ('{"a": 1, "b": {"a": 1, "a": 2}}', "has a key twice"), "cut": ('{"a": 1', "is not JSON"), "empty": ("", "is not JSON"),
    "two": ("1 2", "is not JSON (Extra data at character 2)"), "bytes": (b"\xff", "is not text in UTF-8"),
    "mark": (b"\xef\xbb\xbf1", "is not JSON"), "level": ("[" * 101 + "]" * 101, "is nested more than 100 levels deep"),
    "levels": ("[" * 700 + "]" * 700, "is nested more than 100 levels deep"), "objects": ('{"a":' * 101 + "1" + "}" * 101, "is nested more than 100"),
    "abyss": ("[" * 500_000 + "]" * 500_000, "is nested more than 100 levels deep"), "open abyss": ('{"a":' * 300_000, "is nested more than 100"),
    "flood": ("[" + "[]," * 5_000_000 + "1]", "has more than 2,000,000 values"), "flood of objects": ("[" + "{}," * 5_000_000 + "1]", "has more than 2"),
    "flood of numbers": ("[" + "1," * 7_000_000 + "1]", "has more than 2,000,000 values"), "pickle": (b"\x80\x04]\x94.", "is not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_json_of_others_is_bounded(tmp_path, name):
    text, message = BAD[name]
    start = time.monotonic()
    with pytest.raises(ValueError) as caught: parse_json(text)
    assert time.monotonic() - start < 5
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and len(str(caught.value)) < 200
    (tmp_path / "x").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError) as caught: read_json(tmp_path / "x")
    assert str(caught.value) == f"{tmp_path}/x is damaged: it {caught.value.what.removeprefix('is damaged: it ')}" and message in str(caught.value)


def test_the_levels_that_are_allowed_are_allowed():
    for depth in (1, 5, 100): assert parse_json("[" * depth + "]" * depth, depth=depth) is not None
    assert parse_json("[" * 100 + "]" * 100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_not_written(tmp_path, value):
    write_json(tmp_path / "x", 1)
    with pytest.raises((TypeError, ValueError)): write_json(tmp_path / "x", {"a": value})
    assert read_json(tmp_path / "x") == 1 and os.listdir(tmp_path) == ["x"]


def test_hostile_json_takes_little_memory(tmp_path):
    if not os.path.exists("/proc/self/status"): pytest.skip("needs /proc")
    for name, (text, _) in BAD.items(): (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    code = f"""
import os, resource
from learner.base.files import FileError, read_json
have = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (have + 400 * 2**20, resource.RLIM_INFINITY))
for name in os.listdir({str(tmp_path)!r}):
    try: read_json({str(tmp_path)!r} + "/" + name)
    except FileError: pass
    else: raise SystemExit(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- writing

OPERATIONS = ["open", "write", "fsync", "replace", "close"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_error_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, error):
    path, at, results = tmp_path / "x", 0, []
    while True:
        at += 1
        write_text(path, "old")
        seen = []
        def wrap(name, function):
            def operation(*arguments, **options):
                seen.append(name)
                if len(seen) != at: return function(*arguments, **options)
                if name == "write": function(arguments[0], arguments[1][:1])
                if name == "close": function(*arguments)
                raise error
            return operation
        with monkeypatch.context() as patch:
            for name in OPERATIONS: patch.setattr(os, name, wrap(name, getattr(os, name)))
            with contextlib.suppress(OSError, KeyboardInterrupt): write_text(path, "new")
        results.append(read_text(path))
        assert results[-1] in ("old", "new") and os.listdir(tmp_path) == ["x"]
        if len(seen) < at: break
    assert len(results) > 6 and results == sorted(results, reverse=True) and results[-1] == "new"


def test_a_write_may_take_less_than_it_was_given(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    write_text(tmp_path / "x", "0123456789")
    assert read_text(tmp_path / "x") == "0123456789"


def test_a_full_disk_keeps_the_old_one(tmp_path):
    write_text(tmp_path / "x", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as caught: write_bytes(tmp_path / "x", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "x")
    assert read_text(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    log = []
    for name, function in (("fsync", os.fsync), ("replace", os.replace)):
        def record(*arguments, name=name, function=function, **options):
            log.append((name, os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else None))
            return function(*arguments, **options)
        monkeypatch.setattr(os, name, record)
    if not os.path.exists("/proc/self/fd"): pytest.skip("needs /proc")
    write_text(tmp_path / "x", "y")
    assert [name for name, _ in log] == ["fsync", "replace", "fsync"]
    assert log[0][1].endswith(".tmp") and log[2][1] == str(tmp_path)
    log.clear()
    write_text(tmp_path / "x", "y", sync=False)
    assert [name for name, _ in log] == ["replace"]


def test_temporary_names_are_different_each_time_and_never_taken_over(tmp_path, monkeypatch):
    names = set()
    for _ in range(20):
        with replacing(tmp_path / "x"): names |= {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
    assert len(names) == 20
    (tmp_path / "secret").write_text("secret")
    (tmp_path / ".x.0123456789abcdef.tmp").symlink_to("secret")  # even if one were guessed
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0123456789abcdef")
    with pytest.raises(FileExistsError): write_text(tmp_path / "x", "new")
    assert (tmp_path / "secret").read_text() == "secret" and (tmp_path / ".x.0123456789abcdef.tmp").is_symlink()


def test_a_reader_sees_whole_files_while_they_are_replaced_by_two_writers(tmp_path):
    write_text(tmp_path / "x", "0" * 10_000)
    stop, failures = threading.Event(), []
    def writes(digit):
        try:
            while not stop.is_set(): write_text(tmp_path / "x", digit * 10_000, sync=False)
        except BaseException as error: failures.append(error)
    threads = [threading.Thread(target=writes, args=(digit,)) for digit in "12"]
    for thread in threads: thread.start()
    try: seen = {read_text(tmp_path / "x") for _ in range(500)}
    finally:
        stop.set()
        for thread in threads: thread.join()
    assert not failures and seen <= {digit * 10_000 for digit in "012"} and len(seen) > 1
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_tidied_and_what_is_in_use_is_not(tmp_path):
    pytest.importorskip("fcntl")
    code = f"""
import os, signal, sys
from learner.base.files import replacing
with replacing({str(tmp_path / 'x')!r}) as file:
    print("ready", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    for other in (".x.tmp", ".x.0123456789abcdeg.tmp", "x.0123456789abcdef.tmp"): (tmp_path / other).touch()  # are not ours
    (tmp_path / ".y.0123456789abcdef.tmp").touch()
    tidy(tmp_path, "x")
    assert len(os.listdir(tmp_path)) == 5
    process.kill()
    process.communicate()
    tidy(tmp_path, "x")
    assert sorted(os.listdir(tmp_path)) == [".x.0123456789abcdeg.tmp", ".x.tmp", ".y.0123456789abcdef.tmp", "x.0123456789abcdef.tmp"]
    tidy(tmp_path)
    assert ".y.0123456789abcdef.tmp" not in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 3


def test_a_file_that_is_tidied_before_it_is_locked_is_made_once_more(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, times = fcntl.flock, []
    def tidied(file, how):
        times.append(how)
        if len(times) == 1: raise BlockingIOError
        if len(times) == 2:
            for path in tmp_path.iterdir():
                if path.stat().st_ino == os.fstat(file).st_ino: path.unlink()
        flock(file, how)
    monkeypatch.setattr(fcntl, "flock", tidied)
    with replacing(tmp_path / "x") as file:
        monkeypatch.undo()
        for left in os.listdir(tmp_path):  # the first is whoever's has locked it
            if os.stat(tmp_path / left).st_ino != os.fstat(file).st_ino: os.unlink(tmp_path / left)
        write_all(file, b"new")
    assert len(times) >= 3 and read_text(tmp_path / "x") == "new"


def test_no_descriptor_is_left_open(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"): pytest.skip("needs /proc")
    (tmp_path / "link").symlink_to("x")
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        write_text(tmp_path / "x", "[1]")
        append_text(tmp_path / "x", " ")
        read_json(tmp_path / "x")
        list_names(tmp_path)
        tidy(tmp_path)
        with FileLock(tmp_path / "lock"): is_locked(tmp_path / "lock")
        for name in ("link", "pipe", "none", "x/x"):
            for work in (*READERS, *WRITERS):
                if name == "none" and work not in READERS: continue
                with pytest.raises((OSError, FileError)): work(tmp_path / name)
        with pytest.raises(FileError): open_file(tmp_path / "x", limit=1)
        make_folder(tmp_path / "a" / "b")
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------------- locks and folders

def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / ".lock"
    code = f"""
import sys
from learner.base.files import FileLock
with FileLock({str(path)!r}):
    print("held", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n" and is_locked(path)
    with pytest.raises(LockedError, match=".lock is locked by another process"), FileLock(path): pass
    process.kill()
    process.communicate()
    assert not is_locked(path)
    with FileLock(path): assert is_locked(path)
    with FileLock(path): pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_hold_the_lock_of_its_parent(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / ".lock"
    ready, go = os.pipe(), os.pipe()
    with FileLock(path) as lock:
        child = os.fork()
        if not child:
            try:
                os.close(go[1])
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                lock.__exit__(None)  # closes nothing that is somebody else's by now
            finally: os._exit(0)
        os.read(ready[0], 1)
        held = is_locked(path)
    held_after = is_locked(path)  # though the child lives
    for file in (*go, *ready): os.close(file)
    os.waitpid(child, 0)
    assert held and not held_after


def test_folders_are_made_and_are_on_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file))[1])
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and synced == [tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino]
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OSError): make_folder(tmp_path / "file" / "c")


def test_a_file_with_another_name_elsewhere_is_not_added_to_and_may_be_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine")
    os.link(tmp_path / "mine", tmp_path / "stdout.txt")
    with pytest.raises(FileError, match=r"stdout.txt has another name somewhere else \(a hard link\), so nothing is added to it"): append_text(tmp_path / "stdout.txt", "x")
    assert read_text(tmp_path / "stdout.txt") == "mine"
    write_text(tmp_path / "stdout.txt", "new")
    assert (tmp_path / "mine").read_text() == "mine" and read_text(tmp_path / "stdout.txt") == "new"


def test_what_is_exchanged_while_it_is_read_is_neither_followed_nor_waited_for(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "run"
    folder.mkdir()
    for kind in ("pipe", "link", "folder", "circle"): trap(folder / kind, kind, tmp_path / "secret")
    (folder / "plain").write_text("plain")
    stop = threading.Event()

    def exchange():
        while not stop.is_set():
            for kind in ("plain", "pipe", "link", "circle"):
                os.link(folder / kind, folder / "new", follow_symlinks=False)
                os.replace(folder / "new", folder / "x")
    thread = threading.Thread(target=exchange)
    thread.start()
    found, end = set(), time.monotonic() + 1
    try:
        while time.monotonic() < end:
            for work in (read_text, lambda p, **o: write_text(p, "plain", sync=False, **o), lambda p, **o: append_text(p, "", **o)):
                try: found.add(work(folder / "x", inside=tmp_path))
                except (FileError, OSError) as error: found.add(type(error))
    finally:
        stop.set()
        thread.join()
    assert FileError in found and "secret" not in found and found <= {"plain", None, FileError, FileNotFoundError, OSError}
    assert (tmp_path / "secret").read_text() == "secret"
