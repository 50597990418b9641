import enum
import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from learner.base import provenance
from learner.base.provenance import (
    GitState,
    data_hash,
    git_state,
    kept_rng,
    rng_state,
    seed_everything,
    set_rng_state,
)


@pytest.fixture(autouse=True)
def same_generators_after():
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def normals():
    """Numbers from every generator; an odd number of normal ones, so that each keeps one for later."""
    return random.gauss(0, 1), float(np.random.randn()), float(torch.randn(1)), *draws(), torch.randn(17).tolist()


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
    )


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Seeds


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, np.int64(7), np.uint32(7)])
def test_seeds_every_generator(seed):
    assert seed_everything(seed) == seed and type(seed_everything(seed)) is int
    generator = torch.Generator().manual_seed(int(seed))
    expected = random.Random(int(seed)), np.random.RandomState(int(seed)), generator
    assert random.random() == expected[0].random()
    assert np.array_equal(np.random.randn(3), expected[1].randn(3))
    assert torch.equal(torch.randn(3), torch.randn(3, generator=expected[2]))


@pytest.mark.parametrize("used", [0, 1])
def test_a_seed_forgets_kept_normal_numbers(used):
    seed_everything(3)
    expected = normals()
    for _ in range(used):
        normals()
    seed_everything(3)
    assert normals() == expected


@pytest.mark.parametrize(
    ("seed", "kind", "message"),
    [
        (-1, ValueError, "seed must be at least 0 and below 2**32, got -1"),
        (2**32, ValueError, "seed must be at least 0 and below 2**32, got 4294967296"),
        (1.0, TypeError, "seed must be an int, got float 1.0"),
        (math.nan, TypeError, "seed must be an int, got float nan"),
        (True, TypeError, "seed must be an int, got bool True"),
        ("7", TypeError, "seed must be an int, got str '7'"),
        (None, TypeError, "seed must be an int, got NoneType None"),
    ],
)
def test_bad_seeds_change_nothing(seed, kind, message):
    before = rng_state()
    with pytest.raises(kind) as caught:
        seed_everything(seed)
    assert str(caught.value) == message
    assert equal(rng_state(), before)


# State


def stored(state):
    """The state as it comes back from JSON for plain values, and from the bytes of a tensor."""
    plain = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: torch.tensor(list(value.numpy().tobytes()), dtype=torch.uint8) for name, value in state.items()
               if isinstance(value, torch.Tensor)}  # fmt: skip
    return json.loads(json.dumps(plain)) | tensors


@pytest.mark.parametrize("used", range(4))
def test_round_trip_is_exact(used):
    seed_everything(5)
    for _ in range(used):
        normals()
    state = stored(rng_state())
    expected = [normals() for _ in range(3)]
    seed_everything(1)
    set_rng_state(state)
    assert equal(rng_state(), state)
    assert [normals() for _ in range(3)] == expected


def test_state_is_flat_and_plain():
    for used in range(2):
        for name, value in rng_state().items():
            assert isinstance(name, str) and isinstance(value, torch.Tensor | int | float | str | list)
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.uint8 and value.device.type == "cpu" and value.is_contiguous()
            if isinstance(value, list):
                assert all(type(item) in (int, float) for item in value)
        assert len(rng_state()["python.gauss"]) == used
        seed_everything(0)
        random.gauss(0, 1)


def test_state_is_a_copy():
    state = rng_state()
    before = stored(state)
    normals()
    assert equal(state, before)
    set_rng_state(state)
    normals()
    assert equal(state, before)


def test_state_goes_on_in_another_process():
    seed_everything(11)
    normals()
    state = rng_state()
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    expected = normals()
    code = f"""
import json, random, numpy as np, torch
from learner.base.provenance import set_rng_state
state = json.loads('''{json.dumps(plain)}''')
state["torch"] = torch.tensor(state["torch"], dtype=torch.uint8)
set_rng_state({{name: value for name, value in state.items() if ":" not in name}})
print(json.dumps([random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]))
"""
    assert tuple(json.loads(run(code))) == expected[:3]


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_other_generators_of_numpy(kind):
    ours = np.random.get_bit_generator()
    np.random.set_bit_generator(getattr(np.random, kind)(3))
    try:
        np.random.randn(3), np.random.randint(9, dtype=np.uint32)
        state = stored(rng_state())
        assert state["numpy.bit_generator"] == kind
        expected = np.random.randn(5), np.random.randint(99, size=5, dtype=np.uint32)
        np.random.rand(7)
        set_rng_state(state)
        again = np.random.randn(5), np.random.randint(99, size=5, dtype=np.uint32)
        assert np.array_equal(again, expected)
    finally:
        np.random.set_bit_generator(ours)


def test_generators_that_are_not_named_stay():
    state = rng_state()
    first = draws()
    set_rng_state({"torch": state["torch"]})
    second = draws()
    assert first[2] == second[2] and first[0] != second[0] and first[1] != second[1]
    before = rng_state()
    set_rng_state({})
    assert equal(rng_state(), before)


def bad_states():
    state = rng_state()
    yield {"torch": state["torch"][:10]}, "RuntimeError: "
    yield {"torch": state["torch"].float()}, "TypeError: RNG state must be a torch.ByteTensor"
    yield {"torch": [1, 2]}, "TypeError"
    yield state | {"python.state": [1, 2]}, "ValueError: state vector is the wrong size"
    yield state | {"python.version": 99}, "ValueError: state with version 99"
    yield {"python.version": 3}, "KeyError: 'state'"
    yield state | {"numpy.bit_generator": "Dice"}, "ValueError: "
    yield state | {"numpy.state.key": [1, 2]}, ""
    yield state | {"tensorflow": 1}, "ValueError: 'tensorflow' names no generator"
    yield [1, 2], "AttributeError"
    yield None, "AttributeError"


@pytest.mark.parametrize("number", range(11))
def test_bad_states_change_nothing(number):
    seed_everything(2)
    state, reason = list(bad_states())[number]
    if isinstance(state, dict):
        seed_everything(3)
        state = {"torch": rng_state()["torch"]} | state  # some of it would be fine
    before = rng_state()
    with pytest.raises(ValueError, match=r"^state is not from rng_state \(.*\): nothing was changed$") as caught:
        set_rng_state(state)
    assert reason in str(caught.value)
    assert equal(rng_state(), before)


def test_devices_that_are_absent_give_a_warning_and_the_rest_is_set():
    state = rng_state() | {"tpu:0": torch.zeros(16, dtype=torch.uint8), "cuda:99": torch.zeros(16, dtype=torch.uint8)}
    expected = draws()
    with pytest.warns(UserWarning, match=r"no such device here.*: tpu:0, cuda:99$") as caught:
        set_rng_state(state)
    assert caught[0].filename == __file__
    assert draws() == expected


class StandIn:
    """As `torch.cuda` for two devices, with generators of the CPU."""

    def __init__(self):
        self.generators = [torch.Generator().manual_seed(i) for i in range(2)]
        self.forked = False

    def device_count(self):
        return len(self.generators)

    def get_rng_state(self, device):
        return self.generators[device].get_state()

    def set_rng_state(self, state, device):
        self.generators[device].set_state(state)

    def _is_in_bad_fork(self):
        return self.forked


@pytest.fixture
def accelerator(monkeypatch):
    module = StandIn()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_every_accelerator_has_its_state(accelerator):
    state = stored(rng_state())
    assert [name for name in state if ":" in name] == ["cuda:0", "cuda:1"]
    expected = [torch.rand(3, generator=generator) for generator in accelerator.generators]
    set_rng_state(state)
    again = [torch.rand(3, generator=generator) for generator in accelerator.generators]
    assert all(map(torch.equal, again, expected)) and not torch.equal(*again)
    before = rng_state()
    for wrong in ({"cuda:1": torch.zeros(3, dtype=torch.uint8)}, {"cuda:first": state["cuda:0"]}):
        with pytest.raises(ValueError, match="nothing was changed"):
            set_rng_state({"cuda:0": state["cuda:0"], **wrong})
        assert equal(rng_state(), before)
    with pytest.warns(UserWarning, match=r"cuda:2, xpu:0$"):
        set_rng_state({"cuda:2": state["cuda:0"], "xpu:0": state["cuda:0"]})


def test_an_accelerator_out_of_reach_counts_as_absent(accelerator):
    accelerator.forked = True
    assert not [name for name in rng_state() if ":" in name]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_real_accelerator():
    device = torch.accelerator.current_accelerator()
    seed_everything(4)
    first = torch.randn(5, device=device)
    with kept_rng():
        torch.randn(7, device=device)
        seed_everything(1)
    second = torch.randn(5, device=device)
    seed_everything(4)
    assert torch.equal(torch.randn(5, device=device), first)
    assert torch.equal(torch.randn(5, device=device), second)
    assert data_hash(first) == data_hash(first.cpu())


# Keeping


def test_kept_after_an_error_and_when_nested():
    seed_everything(6)
    expected = [normals() for _ in range(2)]
    seed_everything(6)
    assert normals() == expected[0]
    with pytest.raises(KeyError), kept_rng():
        normals()
        with kept_rng():
            seed_everything(1)
        normals()
        raise KeyError
    assert normals() == expected[1]


def test_kept_as_a_decorator():
    @kept_rng()
    def split(seed):
        seed_everything(seed)
        return draws()

    before = rng_state()
    assert split(1) == split(1) != split(2)
    assert equal(rng_state(), before)


# Git


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A repository with two commits, and the command to change it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "config").write_text("[user]\nname = Ada\nemail = ada@example.com\n")
    work = tmp_path / "work"
    work.mkdir()

    def git(*arguments, folder=work):
        done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init", "-q", "-b", "main")
    (work / "package").mkdir()
    (work / "package" / "model.py").write_text("".join(f"line {i}\n" for i in range(30)))
    (work / "old.py").write_text("old\n")
    (work / "run.sh").write_text("echo\n")
    (work / "image.bin").write_bytes(bytes(range(256)))
    (work / ".gitignore").write_text("*.log\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git.work = work
    return git


def contents(folder):
    """Every file below `folder`, except what git keeps."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    names = {str(path.relative_to(folder)): path for path in files if ".git" not in path.relative_to(folder).parts}
    return {
        name: (path.lstat().st_mode, path.readlink() if path.is_symlink() else path.read_bytes())
        for name, path in names.items()
    }


def test_a_clean_repository(git):
    (git.work / "x.log").write_text("ignored\n")
    assert git_state(git.work) == GitState(git("rev-parse", "HEAD"), "main", False, "", "")
    assert git_state(str(git.work)) == git_state(git.work / "package") == git_state(git.work / "old.py")


def test_the_current_folder_is_the_default(git, monkeypatch):
    monkeypatch.chdir(git.work / "package")
    assert git_state() == git_state(git.work)


def edit(path):
    path.write_text(path.read_text().replace("line 3\n", "line three\n") + "more\n")


ODD_NAMES = ["a b.txt", "é.txt", 'q"uote.txt', "tab\t.txt", "-n", ":x", "new\nline", " b", "a b"]
CHANGES = {
    "edit": lambda work: edit(work / "package" / "model.py"),
    "delete": lambda work: (work / "old.py").unlink(),
    "rename": lambda work: (work / "old.py").rename(work / "new.py"),
    "mode": lambda work: (work / "run.sh").chmod(0o755),
    "empty": lambda work: (work / "old.py").write_text(""),
    "new": lambda work: (work / "train.py").write_text("import model\n"),
    "new in a new folder": lambda work: [(work / "a" / "b").mkdir(parents=True), (work / "a/b/c.py").write_text("c\n")],
    "new and empty": lambda work: (work / "package" / "__init__.py").touch(),
    "new without a last newline": lambda work: (work / "end.txt").write_text("a\nb"),
    "new with carriage returns": lambda work: (work / "dos.txt").write_bytes(b"a\r\nb\r\n"),
    "new script": lambda work: [(work / "go.sh").write_text("echo\n"), (work / "go.sh").chmod(0o755)],
    "new link": lambda work: (work / "link").symlink_to("old.py"),
    "file becomes link": lambda work: [(work / "old.py").unlink(), (work / "old.py").symlink_to("run.sh")],
    "odd names": lambda work: [(work / name).write_text(name) for name in ODD_NAMES],
    "looks like a patch": lambda work: (work / "old.py").write_text("diff --git a/x b/x\nBinary files x and y differ"),
    "utf-8": lambda work: (work / "old.py").write_text("naïve 数\n", encoding="utf-8"),
}
CONFIGS = {
    "plain": "",
    "hostile": """
[diff]
noprefix = true
mnemonicPrefix = true
relative = true
renames = copies
context = 0
suppressBlankEmpty = true
submodule = log
[color]
ui = always
[core]
quotePath = false
pager = false
""",
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, "everything"])
def test_the_diff_makes_the_same_files(git, tmp_path, change, staged, config):
    for name in CHANGES if change == "everything" else [change]:
        if change != "everything" or name not in ("delete", "rename", "file becomes link"):
            CHANGES[name](git.work)
    if staged:
        git("add", ".")
    with (tmp_path / "config").open("a") as file:
        file.write(CONFIGS[config])
    state = git_state(git.work / "package")
    assert state.problem == "" and state.dirty and "\x1b" not in state.diff

    copy = tmp_path / "copy"
    git("clone", "-q", str(git.work), str(copy))
    git("checkout", "-q", state.commit, folder=copy)
    (tmp_path / "run.diff").write_bytes(state.diff.encode())
    git("apply", "--whitespace=nowarn", str(tmp_path / "run.diff"), folder=copy)
    assert contents(copy) == contents(git.work)


def test_both_staged_and_unstaged(git):
    (git.work / "old.py").write_text("staged\n")
    git("add", ".")
    (git.work / "old.py").write_text("newest\n")
    diff = git_state(git.work).diff
    assert "+newest" in diff and "-old" in diff and "staged" not in diff


def test_a_change_that_is_taken_back_is_clean(git):
    (git.work / "old.py").write_text("staged\n")
    git("add", ".")
    (git.work / "old.py").write_text("old\n")
    os.utime(git.work / "run.sh", (1, 1))
    assert not git_state(git.work).dirty


def test_nothing_is_written(git):
    edit(git.work / "package" / "model.py")
    (git.work / "new.py").write_text("new\n")
    os.utime(git.work / "run.sh", (1, 1))  # git would like to note in its index that the file is as it was

    def everything():
        paths = list(git.work.rglob("*"))
        return {str(path): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in paths}

    before = everything()
    assert git_state(git.work).dirty
    assert everything() == before
    git("status")
    assert everything() != before  # that is how it looks when git writes


def test_programs_that_git_is_set_to_run_do_not_run(git, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/it-ran'\n")
    program.chmod(0o755)
    for name in ("diff.external", "core.fsmonitor", "core.pager", "pager.diff", "diff.py.textconv", "core.askPass"):
        git("config", name, str(program))
    (git.work / ".gitattributes").write_text("*.py diff=py\n")
    edit(git.work / "package" / "model.py")
    (git.work / "new.py").write_text("new\n")
    (tmp_path / "it-ran").unlink(missing_ok=True)
    state = git_state(git.work)
    assert "+line three" in state.diff and "+new" in state.diff
    assert not (tmp_path / "it-ran").exists()


def test_what_is_not_text_is_named(git):
    (git.work / "image.bin").write_bytes(b"\0" * 10)
    (git.work / "new.bin").write_bytes(b"\0" * 10)
    state = git_state(git.work)
    assert state.diff == "# left out: 'image.bin': not text\n# left out: 'new.bin': not text\n"
    assert state.dirty


def test_what_is_too_large_is_named(git):
    edit(git.work / "package" / "model.py")
    (git.work / "old.py").write_text("x" * 5000)
    (git.work / "data.csv").write_text("1,2\n" * 5000)
    (git.work / "small.py").write_text("small\n")
    state = git_state(git.work, limit=2000)
    assert "+line three" in state.diff and "+small" in state.diff
    lines = state.diff.splitlines()[-2:]
    assert lines[0].startswith("# left out: 'old.py': 5,") and lines[0].endswith(" bytes")
    assert lines[1] == "# left out: 'data.csv': 20,000 bytes"
    assert len(state.diff) < 2200
    assert git_state(git.work).diff.count("left out") == 0
    assert git_state(git.work, limit=0).diff.count("# left out") == 4


def test_a_folder_of_many_new_files(git):
    (git.work / "data").mkdir()
    for i in range(1234):
        (git.work / "data" / f"{i:04}.txt").touch()
    state = git_state(git.work)
    assert state.diff.count("diff --git") == 100
    assert state.diff.endswith("\n# left out: '1,134 new files': too many\n")


def test_a_repository_inside(git):
    inner = git.work / "inner"
    inner.mkdir()
    git("init", "-q", folder=inner)
    assert git_state(git.work).diff == "# left out: 'inner/': not a file\n"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read(git):
    (git.work / "secret").write_text("secret\n")
    (git.work / "secret").chmod(0)
    (git.work / "other").write_text("other\n")
    state = git_state(git.work)
    assert "# left out: 'secret': " in state.diff and "+other" in state.diff and state.problem == ""


def test_a_file_that_goes_away_meanwhile(git, monkeypatch):
    (git.work / "a.txt").write_text("a\n")
    (git.work / "b.txt").write_text("b\n")
    real = provenance._git

    def slow(folder, *arguments, **options):
        output = real(folder, *arguments, **options)
        if arguments[0] == "ls-files":
            (git.work / "a.txt").unlink()
        return output

    monkeypatch.setattr(provenance, "_git", slow)
    state = git_state(git.work)
    assert "+b" in state.diff and "# left out: 'a.txt': not a file" in state.diff and state.problem == ""


def test_no_branch(git):
    git("checkout", "-q", "--detach")
    assert git_state(git.work) == GitState(git("rev-parse", "HEAD"), None, False, "", "")


def test_before_the_first_commit(git, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    git("init", "-q", "-b", "trunk", folder=new)
    assert git_state(new) == GitState(None, "trunk", False, "", "")
    (new / "a.py").write_text("a\n")
    (new / "b.py").write_text("b\n")
    git("add", "a.py", folder=new)
    state = git_state(new)
    assert state[:3] == (None, "trunk", True)
    assert "+++ b/a.py" in state.diff and "+++ b/b.py" in state.diff


def test_outside_a_repository(git, tmp_path):
    empty = GitState(None, None, False, "")
    (tmp_path / "empty").mkdir()
    state = git_state(tmp_path / "empty")
    assert state[:4] == empty[:4] and "not a git repository" in state.problem
    state = git_state(tmp_path / "nowhere")
    assert state[:4] == empty[:4] and state.problem == f"no such folder: {tmp_path / 'nowhere'}"
    git("clone", "-q", "--bare", str(git.work), str(tmp_path / "bare"))
    state = git_state(tmp_path / "bare")
    assert state[:4] == empty[:4] and "work tree" in state.problem
    assert git_state("nul\0").problem


def test_without_git(git, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(git.work) == GitState(problem="git is not installed")


def test_a_git_that_is_too_slow(git, monkeypatch, tmp_path):
    real = shutil.which("git")
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\ncase "$*" in *" diff "*) exec sleep 60;; esac\nexec {real} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "_TIMEOUT", 0.5)
    state = git_state(git.work)
    assert state == GitState(git("rev-parse", "HEAD"), "main", True, "", "git diff took more than 0.5 s")


def test_a_repository_of_somebody_else(git, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests use this
    state = git_state(git.work)
    assert state[:4] == (None, None, False, "") and "dubious ownership" in state.problem


def test_variables_of_a_hook_name_another_repository(git, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git("init", "-q", folder=other)
    expected = git_state(git.work)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "index"))
    assert git_state(git.work) == expected


# Data


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_by_hand():
    assert data_hash(None) == sha(b"None\n")
    assert data_hash(True) == sha(b"bool True\n")
    assert data_hash(-7) == sha(b"int -7\n")
    assert data_hash(10**40) == sha(b"int 1" + b"0" * 40 + b"\n")
    assert data_hash(0.1) == sha(b"float\n", struct.pack("<d", 0.1))
    assert data_hash(1 - 2j) == sha(b"complex\n", struct.pack("<dd", 1, -2))
    assert data_hash("é") == sha(b"str 2\n\xc3\xa9")
    assert data_hash(b"\0\n") == data_hash(bytearray(b"\0\n")) == sha(b"bytes 2\n\0\n")
    assert data_hash([]) == sha(b"list 0\n")
    assert data_hash(("a", [1])) == sha(b"tuple 2\nstr 1\nalist 1\nint 1\n")
    assert data_hash({"a": 1}) == sha(b"dict 1\n", hashlib.sha256(b"str 1\na").digest(), b"int 1\n")
    assert data_hash(torch.tensor(2.5)) == sha(b"array float32 \n", struct.pack("<f", 2.5))
    assert data_hash(torch.tensor([True, False])) == sha(b"array bool 2\n\1\0")
    assert data_hash(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)) == sha(b"array bfloat16 2\n\x80\x3f\x00\xc0")
    assert data_hash(np.array([[1, 2, 3]], dtype=np.int16)) == sha(b"array int16 1,3\n", struct.pack("<3h", 1, 2, 3))
    items = [(torch.tensor([5], dtype=torch.uint8), 0), (torch.tensor([6], dtype=torch.uint8), 1)]
    by_hand = b"dataset 2\ntuple 2\narray uint8 1\n\5int 0\ntuple 2\narray uint8 1\n\6int 1\n"
    assert data_hash(Items(items)) == sha(by_hand)


def test_different_values_have_different_hashes():
    x = torch.arange(6)
    values = [None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, 0j, "", "0", "None", b"", b"0"]
    values += [[], (), {}, [[]], [()], [[], []]]
    values += ["ab", ["ab"], ["a", "b"], ["ab", ""], ["", "ab"], [["a"], "b"], [["a", "b"]], ["a", ["b"]], ("a", "b")]
    values += [{"a": "b"}, {"b": "a"}, {"a": ["b"]}, {"a": {"b": 1}}, {"a": {}, "b": 1}, {0: 1}, {"0": 1}, {(0,): 1}]
    values += [x, x.view(2, 3), x.view(3, 2), x.view(1, 6), x.int(), x.float(), x.double(), x.half(), x.bfloat16()]
    values += [x.flip(0), x[:5], x[0], x[:1], x[:0], x[:0].view(0, 3), x[:0].view(3, 0), [x], (x,), [x, x], x.tolist()]
    values += [x.to(torch.complex64), torch.view_as_real(x.to(torch.complex64)), x.to(torch.uint8), x.to(torch.int8)]
    values += [Items([]), Items([1]), Items([x]), np.array(["a"]), np.array(["a"], "U2"), np.array([b"a"])]
    values += [np.array([1], "datetime64[s]"), np.array([1], "datetime64[D]"), np.array([1], "m8[s]"), np.int64(1)]
    values += ["array int64 1\n" + "\1" + "\0" * 7, "list 1\nint 1\n", "\ud800"]
    assert len({data_hash(value) for value in values}) == len(values)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@pytest.mark.parametrize("block", [1, 7, 16, 100, 2**24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_blocks_do_not_count(monkeypatch, dtype, block):
    x = (torch.arange(2 * 3 * 4 * 5) % 7).float().view(2, 3, 4, 5).to(dtype)
    expected = data_hash(x)
    monkeypatch.setattr(provenance, "_BLOCK", block)
    wide = torch.zeros(2, 3, 4, 10, dtype=dtype)
    wide[..., ::2] = x
    same = [x, x.clone(), torch.nn.Parameter(x, requires_grad=False), wide[..., ::2], x.detach()]
    same += [x.permute(order).contiguous().permute(back) for order, back in [((3, 1, 0, 2), (2, 1, 3, 0))]]
    same += [x.contiguous(memory_format=torch.channels_last), x.as_subclass(torch.Tensor)]
    if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        array = x.numpy()
        frozen = array.copy()
        frozen.flags.writeable = False
        swapped = array.astype(array.dtype.newbyteorder(">"))
        same += [array, np.asfortranarray(array), np.ascontiguousarray(array[::-1])[::-1], swapped, frozen]
    assert {data_hash(value) for value in same} == {expected}


def test_views_that_are_lazy():
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert data_hash(z.conj()) == data_hash(torch.tensor([1 - 2j, 3 + 4j]))
    assert data_hash(z.conj().imag) == data_hash(torch.tensor([-2.0, 4.0]))
    assert data_hash(torch.zeros(()).expand(3, 4)) == data_hash(torch.zeros(3, 4))
    assert data_hash(torch.ones(2, requires_grad=True) * 2) == data_hash(torch.full((2,), 2.0))


def test_numbers_and_scalars():
    class Colour(enum.IntEnum):
        RED = 3

    Point = namedtuple("Point", "x y")
    assert data_hash(Colour.RED) == data_hash(3)
    assert data_hash(Point(1, 2)) == data_hash((1, 2))
    assert data_hash(np.float64(1)) == data_hash(np.array(1.0)) == data_hash(torch.tensor(1.0).double())
    assert data_hash(np.float64(1)) != data_hash(1.0)
    assert data_hash(np.bool_(True)) == data_hash(torch.tensor(True)) != data_hash(True)
    assert data_hash(Image.new("RGB", (3, 2), "red")) == data_hash(np.array([[[255, 0, 0]] * 3] * 2, dtype=np.uint8))


def test_the_order_of_a_mapping_does_not_count():
    keys = ["b", "a", 3, 1.5, None, (1, "x"), b"y", True]
    expected = data_hash({key: i for i, key in enumerate(keys)})
    for seed in range(5):
        pairs = list(enumerate(keys))
        random.Random(seed).shuffle(pairs)
        assert data_hash({key: i for i, key in pairs}) == expected
        assert data_hash(OrderedDict((key, i) for i, key in pairs)) == expected
    model = torch.nn.Linear(3, 2)
    assert data_hash(model.state_dict()) == data_hash({"bias": model.bias, "weight": model.weight})


def test_a_hash_is_the_same_in_every_process():
    code = """
import torch
from learner.base.provenance import data_hash
print(data_hash({"x": torch.arange(5), "y": ["a", 1.5, None], "z": {"k": (True, b"0")}, 7: "seven"}))
"""
    for seed in ("1", "2"):
        assert run(code, PYTHONHASHSEED=seed) == "0c6dfbc58b003b0a283e6a4a7db1e9dcdaa881dba799deab2e64950bfaec7ada"


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Fetched(Items):
    """Gives many items at once, and counts how often."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self.items[i] for i in indices]


class Batched(Items):
    """Gives a batch at once, not items."""

    def __getitems__(self, indices):
        return torch.stack([self.items[i][0] for i in indices]), [self.items[i][1] for i in indices]


class Plain:
    """A map-style dataset by its methods alone."""

    def __init__(self, items):
        self.items = items

    __len__, __getitem__ = Items.__len__, Items.__getitem__


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1024, 1025, 3000])
def test_datasets(count):
    x, y = torch.rand(count, 2, 3), torch.arange(count)
    items = [(x[i], int(y[i])) for i in range(count)]
    fetched = Fetched(items)
    datasets = [Items(items), Plain(items), fetched, Batched(items), Subset(Items(items), range(count))]
    hashes = {data_hash(dataset) for dataset in datasets}
    assert len(hashes) == 1
    assert fetched.calls == math.ceil(count / 1024)
    assert data_hash(items) not in hashes
    if count:
        changed = list(items)
        changed[-1] = (items[-1][0], 99999)
        assert data_hash(Items(changed)) not in hashes
        changed[-1] = (items[-1][0] + 1, items[-1][1])
        assert data_hash(Fetched(changed)) not in hashes
    assert data_hash(TensorDataset(x, y)) == data_hash((x, y))


def test_a_tensor_dataset_of_ones_own_is_read_by_its_items():
    class Doubled(TensorDataset):
        def __getitem__(self, i):
            return self.tensors[0][i] * 2

    x = torch.arange(3.0)
    assert data_hash(Doubled(x)) == data_hash(Items([x[i] * 2 for i in range(3)]))


class Augmented(Items):
    def __getitem__(self, i):
        return self.items[i], *normals()


def test_reading_a_random_dataset_is_repeatable_and_leaves_no_trace():
    dataset = Augmented([1, 2, 3])
    first = data_hash(dataset)
    normals()
    before = rng_state()
    assert data_hash(dataset) == first
    assert equal(rng_state(), before)
    assert data_hash(Augmented([1, 2, 4])) != first


class Broken(Items):
    def __getitem__(self, i):
        torch.rand(1)
        if i == 2:
            raise OSError("no such image")
        return i


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_an_error_of_the_dataset_passes_through():
    before = rng_state()
    with pytest.raises(OSError, match="no such image"):
        data_hash(Broken([0] * 5))
    assert equal(rng_state(), before)


GIVE = "give tensors, arrays, numbers, text, or lists, tuples, mappings and map-style datasets of them"
BAD_DATA = [
    (object(), f"data of type object cannot be hashed: {GIVE}"),
    ({1, 2}, f"data of type set cannot be hashed: {GIVE}"),
    ((i for i in range(3)), f"data of type generator cannot be hashed: {GIVE}"),
    (Endless(), f"data of type Endless cannot be hashed: {GIVE}"),
    (print, f"data of type builtin_function_or_method cannot be hashed: {GIVE}"),
    (torch.nn.Linear, f"data of type type cannot be hashed: {GIVE}"),
    ([1, {"a": (0, {2})}], f"data[1]['a'][1] of type set cannot be hashed: {GIVE}"),
    ({frozenset(): 1}, f"data[frozenset()] of type frozenset cannot be hashed: {GIVE}"),
    (Items([(1, 2), (1, {2})]), f"data[1][1] of type set cannot be hashed: {GIVE}"),
    (DataLoader(Items([1])), "data of type DataLoader cannot be hashed: give its .dataset"),
    (torch.eye(2).to_sparse(), "data of type Tensor cannot be hashed: give a dense tensor with values"),
    ([torch.empty(2, device="meta")], "data[0] of type Tensor cannot be hashed: give a dense tensor with values"),
    (np.array([1, "a"], dtype=object), "data of type ndarray cannot be hashed: its dtype is object; convert it"),
    (np.zeros(2, "V3"), "data of type ndarray cannot be hashed: its dtype is |V3; convert it"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA)
def test_what_cannot_be_hashed(data, message):
    before = rng_state()
    with pytest.raises(TypeError) as caught:
        data_hash(data)
    assert str(caught.value) == message
    assert equal(rng_state(), before)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_long_doubles_have_bytes_without_meaning():
    with pytest.raises(TypeError, match="convert it"):
        data_hash(np.zeros(2, np.longdouble))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss differs")
def test_large_tensors_are_not_copied():
    code = """
import resource, torch
from learner.base.provenance import data_hash
x = torch.ones(9000, 9000)  # 324 MB
data_hash(x[0]), x.numpy()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for view in (x, x.t(), x[:, ::2], x.t().numpy(), x.view(1, 1, -1), x[:1].expand(9000, -1)):
    data_hash(view)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(run(code)) < 80


def test_import_is_cheap():
    names = ("numpy.random", "matplotlib", "pandas", "sklearn")
    assert run(f"import learner.base.provenance, sys; print([name for name in {names} if name in sys.modules])") == "[]"
