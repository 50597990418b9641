"""Hands hostile folders to every command and every loading function, in a process of its own that watches what they do.

    python attack.py FOLDER all|NUMBER [PATTERN]    prints a line of JSON for each thing that went wrong, and how many folders there were"""
import contextlib
import csv
import ctypes
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from itertools import islice
from pathlib import Path

import folders
import torch
from torch import nn

import learner
from learner.base.data_hash import data_hash
from learner.base.files import read_json
from learner.base.hashing import hash_file
from learner.base.provenance import git_state
from learner.base.store import check_state, load_state, read_checkpoint
from learner.keep.checkpoint import Checkpoint, read_index
from learner.keep.fingerprints import read_fingerprints
from learner.loop.datasets import read_idx
from learner.runs import cli, config, layers, signature
from learner.runs import run as run_module
from learner.runs import runs as runs_module
from learner.runs.compare import compare_runs
from learner.runs.config import Model, Optimiser, build, read_settings, register_config, register_model, resolve
from learner.runs.rundir import find_runs, new_name
from learner.runs.runfiles import RunFiles, iter_rows, read_run
from learner.runs.runs import Run, checkpoint_of, evaluate_run, load_run, rerun, resume_run, train_run
from learner.runs.scores import scores
from learner.use import serve

SECONDS, HANGS, MEMORY = 3, 60, 1 << 30  # that one call may take of a processor and of time, and of memory beyond what there is
IN_OPEN, IN_ALL, LARGE = 0x20, 0xFFF, 1 << 26


# ---- what a run is made of here: as small as can be ----

@register_model
def Tiny(width: int = 2):
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))


@register_config(model="Tiny", optimiser="AdamW", learning_rate=0.01, epochs=2)
def tiny(model: Model, optimiser: Optimiser, seed: int = 0):
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
    return learner.Learner(model, optimiser, nn.functional.cross_entropy, {"train": batches, "validation": batches, "test": batches}, device="cpu")


def healthy_run(folder):
    train_run("tiny", folder, fingerprints=1, log_every=1)
    evaluate_run(folder, "test")


# ---- what must not happen ----

class TooSlow(BaseException):
    pass


def alarm(number, _):
    raise TooSlow("hangs" if number == signal.SIGALRM else f"takes more than {SECONDS} s")


class Watch:
    "Opens, reads, changes and removals of what is not the folder's, as the kernel reports them."

    def __init__(self, place):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.place, self.file, self.names = place, self.libc.inotify_init1(os.O_NONBLOCK), {}
        for folder in [place, *(each for each in place.rglob("*") if each.is_dir())]:
            self.names[self.libc.inotify_add_watch(self.file, os.fsencode(folder), IN_ALL)] = folder

    def events(self):
        found, data = set(), b""
        with contextlib.suppress(BlockingIOError):
            while True: data += os.read(self.file, 1 << 16)
        while data:
            watch, mask, _, length = struct.unpack("iIII", data[:16])
            name = data[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
            found.add(f"{self.names[watch].name}/{name} ({mask:#x})")
            data = data[16 + length :]
        return found


def drop_rights():
    "Root reads everything; nobody else can read what is unreadable."
    if os.geteuid(): return
    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    if libc.capget(head, sets): return
    values = list(struct.unpack("6I", sets.raw))
    for index in (0, 1): values[index] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(head, struct.pack("6I", *values))


imported, started = [], []


def audit(event, arguments):
    if event == "import" and str(arguments[0]).partition(".")[0] in ("payload", "evil"): imported.append(arguments[0])
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork") or (event == "subprocess.Popen" and arguments[0] != "git"): started.append((event, str(arguments[0])[:80]))


# ---- what is done with each folder ----

def named_by_user(file):
    "Whether whoever names this file means something else: what a link leads to, or code in settings that do not say that they are of a run."
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        if os.path.islink(file): return True
        text = file.read_bytes() if file.is_file() and file.stat().st_size < LARGE else b""  # anything else is no settings
        return b"payload" in text and json.loads(text).get("format") != "learner.run"
    return False


def commands(evil):
    "Words of the command line: those that only read, and those that train."
    file = os.path.join(evil, "config.json")
    safe = "./" + evil if evil.startswith("-") else evil
    reading = {
        "scores": [["scores", ".", "--top=null", "--csv=out/s.csv", "--json=out/s.json", "--html=out/s.html"], ["scores", safe, "--metric=test_loss", "--by=last", "--status=null"]],
        "compare": [["compare", "good", safe], ["compare", safe, "good"]], "configs": [], "show": [["show", safe], ["show", file]],
        "train": [["train", safe, "--help"], ["train", "tiny", safe]], "rerun": [["rerun", "good", safe]], "resume": [["resume", safe]],
        "serve": [["serve", safe, "--port=0"]],
    }
    training = [["evaluate", safe], ["evaluate", safe, "--split=test", "--checkpoint=last"], ["train", safe, "new"], ["train", file, "new2"], ["rerun", safe, "new3"],
                ["resume", safe, "--epochs=3"], ["train", "tiny", safe, "--new-name"], ["train", "tiny", safe, "--overwrite"]]
    others = set(cli._commands) - {words[0] for words in training}
    reads = [words for name in cli._commands for words in reading.get(name, [[name, safe]] if name in others else [])]
    if named_by_user(Path(file)): reads, training = ([words for words in each if file not in words] for each in (reads, training))
    return reads, training


def functions(evil, good):
    "Everything that loads, by name: what only reads, and what trains."
    def all_of(run):
        found = [getattr(run, name) for name in ("name", "status", "checkpoints", "settings", "config", "meta", "rows")]
        return found, run.score, run.last_epoch, list(run.steps()), [run.text(name) for name in folders.TEXTS]

    def learn(): return tiny(Tiny(), lambda p, lr=0.1: torch.optim.AdamW(p, lr))
    place, last = evil / "checkpoints", evil / "checkpoints" / "epoch-0002.safetensors"
    reading = {
        "repr": lambda: repr(RunFiles(evil)), "read_run": lambda: all_of(read_run(evil)), "load_run": lambda: load_run(evil),
        "load_run last": lambda: load_run(evil, "last"), "checkpoint_of": lambda: [checkpoint_of(evil, name) for name in ("last", "best")],
        "scores": lambda: (repr(found := scores(evil.parent, status=None)), found._repr_html_()),
        "compare_runs": lambda: (repr(found := compare_runs(evil, good)), found._repr_html_()), "build": lambda: build(evil),
        "resolve": lambda: str(resolve(str(evil / "config.json"))), "read_settings": lambda: read_settings(evil / "config.json"),
        "find_runs": lambda: (find_runs(evil.parent), new_name(evil)), "Checkpoint.latest": lambda: (Checkpoint.latest(place), read_index(place)),
        "Checkpoint.best": lambda: Checkpoint.best(place), "read_checkpoint": lambda: read_checkpoint(evil), "load_state": lambda: load_state(last),
        "check_state": lambda: check_state(last, inside=evil), "read_fingerprints": lambda: read_fingerprints(evil / "fingerprints.jsonl"),
        "load": lambda: learn().load(last), "hash_file": lambda: (check_state(last), hash_file(last)), "read_idx": lambda: read_idx(evil / "stdout.txt"),
        "Run": lambda: Run(evil), "git_state": lambda: repr(git_state(evil)), "data_hash": lambda: data_hash(load_state(last)),
        **{f"read_json {name}": lambda name=name: read_json(evil / name) for name in folders.JSON},
        **{f"iter_rows {name}": lambda name=name: sum(1 for _ in islice(iter_rows(evil / name), 50_000)) for name in folders.TABLES},
    }
    training = {
        "train(resume=)": lambda: learn().train(2, resume=evil), "train(resume=, in it)": lambda: learn().train(3, resume=place, callbacks=Checkpoint(place)),
        "Run(resume=True)": lambda: learn().train(3, resume=evil, callbacks=Run(evil, resume=True)), "evaluate_run": lambda: str(evaluate_run(evil, "test", "last")),
        "resume_run": lambda: resume_run(evil, 4), "rerun": lambda: str(rerun(evil, evil.parent / "new4")),
    }
    named = {evil / "config.json": ("resolve", "read_settings"), last: ("load",), evil / "stdout.txt": ("read_idx",),
             place: ("Checkpoint.latest", "Checkpoint.best", "train(resume=, in it)", "load", "load_state", "hash_file", "data_hash", "read_json checkpoints/index.json")}
    for path in [path for path in named if os.path.islink(path) or (path.name == "config.json" and named_by_user(path))]:
        for name in named[path]:
            reading.pop(name, None)
            training.pop(name, None)
    return reading, training


def fault(error):
    "What is wrong with an error, if anything is."
    kind, last = type(error), traceback.extract_tb(error.__traceback__)[-1]
    ours = kind.__module__.startswith("learner.") or isinstance(error, OSError)
    meant = kind in (ValueError, TypeError) and "/learner/" in last.filename and "raise" in (last.line or "")
    if not ours and not meant: return f"{kind.__name__} from {last.filename}:{last.lineno}: {error!s:.200}"
    if bad := raw(str(error)): return f"{kind.__name__} has {bad}: {str(error)!r:.300}"
    return None


def number(text):
    try: return [float(text)]
    except ValueError: return None


def raw(text):
    "Characters that a terminal would obey."
    found = {c for c in text if not c.isprintable() and c not in "\n\t"}
    return f"raw characters {sorted(found)[:5]}" if found else None


class Attack:
    "One folder, everything that is done with it, and what went wrong."

    def __init__(self, base, healthy, some):
        self.base, self.healthy, self.some = base, healthy, some
        self.home, self.outside, self.good = base / "runs", base / "outside", base / "runs" / "good"
        self.calls = []
        self.build()

    def build(self):
        "What is not to be touched."
        for folder in (self.home, self.outside): folders.clear(folder)
        for folder in (self.good, self.outside / "copy"): shutil.copytree(self.healthy, folder)
        (self.home / "out").mkdir()
        (self.outside / "mine.txt").write_text("my own\n")
        self.before, self.watch = self.state(), Watch(self.outside)
        self.watch.events()

    def run(self, number, case):
        self.case, self.number = case, number
        os.chdir(self.home)
        reading, training = commands(self.make().name)
        for words in (*self.half(reading), *self.share(training)): self.command(words)
        reading, training = functions(self.make(), self.good)
        for name in (*self.half(list(reading)), *self.share(list(training))): self.function(name, {**reading, **training}[name])
        os.chdir(self.base)
        seen = self.watch.events()
        if seen: self.fail("outside", f"was touched: {sorted(seen)[:4]}")
        if self.before != self.state():
            self.fail("outside or the healthy run", "was changed")
            os.close(self.watch.file)
            self.build()
        self.watch.events()  # of the look that has just been taken
        if os.path.exists(os.environ["CANARY"]) or any(self.home.rglob("RAN")):
            Path(os.environ["CANARY"]).unlink(missing_ok=True)
            self.fail("code", "of the folder ran")

    def make(self):
        "The folder, made anew."
        for left in [path for path in self.home.iterdir() if path.name not in ("good", "out")]: folders.clear(left)
        evil = self.home / "evil"
        shutil.copytree(self.healthy, evil)
        for name in ("payload.py", "__init__.py"): (evil / name).write_text(folders.PAYLOAD)
        return self.case.spoil(evil, self.outside) or evil

    def share(self, training):
        "What trains takes long: in the short form each folder is given to some of it, all in turn."
        if not self.some: return training
        return [training[(self.number * self.some + i) % len(training)] for i in range(self.some)]

    def half(self, reading):
        "In the short form each folder is given to every second of what only reads, and always to the first, which ranks the runs."
        return [reading[0], *reading[1 + self.number % 2 :: 2]] if self.some else reading

    def state(self):
        "Everything outside the folder, and when it was changed."
        paths = (path for folder in (self.good, self.outside) for path in folder.rglob("*"))
        return {path: (info.st_mtime_ns, info.st_size, info.st_mode, info.st_ino) for path in paths if (info := path.lstat())}

    def fail(self, what, how): print(json.dumps([self.case.name, what, how]), file=sys.__stdout__, flush=True)

    def command(self, words):
        out, err, what = io.StringIO(), io.StringIO(), " ".join(words)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = self.bounded(what, lambda: cli.main(words))
        text = out.getvalue() + err.getvalue()
        if bad := raw(text): self.fail(what, f"{bad} in {text!r:.300}")
        if "Traceback" in text or "with --debug" in text or "MemoryError" in text: self.fail(what, f"unexpected: {text[-400:]!r}")
        elif code not in (0, 2, None): self.fail(what, f"exit status {code}: {text[-300:]!r}")
        if words[:2] == ["scores", "."] and " good " not in out.getvalue(): self.fail(what, f"does not rank the healthy run: {text!r:.300}")
        if "--csv=out/s.csv" in words and code == 0: self.table(what)
        if len(text) > 20_000: self.fail(what, f"prints {len(text)} characters")

    def table(self, what):
        "A table for a spreadsheet holds no formula, and a command to copy names nothing that is not registered."
        with (self.home / "out" / "s.csv").open(newline="") as file: cells = [cell for row in csv.reader(file) for cell in row]
        for cell in cells:
            if cell.strip()[:1] in ("=", "@", "\uff1d", "\uff20") or (cell[:1] in "+-\t\r\n" and cell and not number(cell)): self.fail(what, f"a formula {cell!r:.60}")
        page = json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', (self.home / "out" / "s.html").read_text(), re.S)[1])
        for run in page["runs"]:
            items = [item for section in run["details"] for part in section["parts"] if part["kind"] == "commands" for item in part["items"]]
            for item in items:
                if item["label"].startswith("From the configuration") and "payload" in str(item["words"]): self.fail(what, f"a command to copy: {item['words']!r:.200}")

    def function(self, name, function):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try: self.bounded(name, function)
            except Exception as error:
                if bad := fault(error): self.fail(name, bad)
        for text in (out.getvalue(), *(str(warning.message) for warning in caught)):
            if bad := raw(text): self.fail(name, f"{bad} in {text!r:.200}")

    def bounded(self, what, function):
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, HANGS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try: return function()
        except TooSlow as error: self.fail(what, str(error))
        except MemoryError: self.fail(what, "takes too much memory")
        except SystemExit as error: self.fail(what, f"ends the process: {error}")
        finally:
            for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF): signal.setitimer(timer, 0)
            self.calls.append((round(time.process_time() - begun, 2), self.case.name, what))
            if seen := self.watch.events(): self.fail(what, f"touches what is outside: {sorted(seen)[:4]}")
            if imported or started: self.fail(what, f"imported {imported}, started {started}")
            imported.clear()
            started.clear()
        return None


def remembered(function):
    "The form of a function is the same every time, and takes long to find out."
    known = {}

    def read(of, defaults=None, kind=""):
        key = of, repr(defaults), kind
        if key not in known: known[key] = function(of, defaults, kind)
        return known[key]
    return read


def quick():
    "Leave out what takes long and has nothing to do with what is looked for here."
    os.fsync = lambda file: None
    for module in (config, layers): module.read_signature = remembered(signature.read_signature)
    run_module.write_plots = runs_module.write_predictions = lambda *_: None  # drawing
    serve.Service.run = lambda service: service._listener.close()  # it has read the folder by then, and would wait for requests


def main():
    csv.field_size_limit(1 << 30)
    base, which = Path(sys.argv[1]).resolve(), sys.argv[2]
    torch.set_num_threads(1)
    os.environ |= {"CANARY": str(base / "RAN"), "GIT_CEILING_DIRECTORIES": str(base)}
    os.chdir(base)
    healthy_run(base / "healthy")
    found = folders.cases(base / "healthy")
    if len(sys.argv) > 3: found = [case for case in found if re.search(sys.argv[3], case.name)]
    elif which != "all": found = folders.chosen(found, int(which))
    drawing = run_module.write_plots, runs_module.write_predictions
    for number in (signal.SIGALRM, signal.SIGPROF): signal.signal(number, alarm)
    drop_rights()
    sys.addaudithook(audit)
    status = Path("/proc/self/status").read_text()
    data = int(status.partition("VmData:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    attack = Attack(base, base / "healthy", 0 if which == "all" else 1)
    quick()
    for number, case in enumerate(found):
        if "plot" in case.name: run_module.write_plots, runs_module.write_predictions = drawing
        attack.run(number, case)
        run_module.write_plots = runs_module.write_predictions = lambda *_: None
    slow = sorted(attack.calls, reverse=True)[:15]
    by_name = {}
    for seconds, _, what in attack.calls: by_name[what] = by_name.get(what, 0) + seconds
    print(sorted(((round(v, 1), k) for k, v in by_name.items()), reverse=True)[:40], file=sys.__stderr__)
    print(json.dumps({"folders": len(found), "calls": len(attack.calls), "slowest": slow, "seconds": time.process_time()}), file=sys.__stdout__)


if __name__ == "__main__": main()
