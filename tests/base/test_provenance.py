import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from learner.base import provenance
from learner.base.data_hash import data_hash
from learner.base.provenance import (
    GitState,
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
    yield state | {"tensorflow": 1}, "ValueError: 'tensorflow' is not the name of a generator"
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
        if "--others" in arguments:
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


EVIL = """#!/bin/sh
touch '{flag}'
cat
"""


@pytest.fixture
def evil(git, tmp_path):
    "A program that leaves a trace, and whether it has run."
    program = tmp_path / "evil"
    program.write_text(EVIL.format(flag=tmp_path / "it-ran"))
    program.chmod(0o755)

    def ran():
        flag = tmp_path / "it-ran"
        there = flag.exists()
        flag.unlink(missing_ok=True)
        return there

    ran.program = str(program)
    return ran


def bring_filter(git, evil, folder, place="config"):
    "Settings that came along with a repository: every file goes through a program."
    settings = f"[filter \"x.y\"]\n\tclean = {evil.program}\n\tsmudge = {evil.program}\n\tprocess = {evil.program}\n\trequired = true\n"
    if place == "config":
        with (folder / ".git" / "config").open("a") as file: file.write(settings)
    elif place == "include":
        (folder / ".git" / "more").write_text(settings)
        git("config", "include.path", "more", folder=folder)
    else:
        git("config", "extensions.worktreeConfig", "true", folder=folder)
        (folder / ".git" / "config.worktree").write_text(settings)
    (folder / ".git" / "info" / "attributes").write_text("* filter=x.y\n")


@pytest.mark.parametrize("place", ["config", "include", "worktree"])
def test_filters_that_came_along_do_not_run(git, evil, place):
    bring_filter(git, evil, git.work, place)
    edit(git.work / "package" / "model.py")
    (git.work / "new.py").write_text("new\n")
    evil()
    state = git_state(git.work)
    assert not evil() and state.problem == "" and "+line three" in state.diff and "+new" in state.diff
    subprocess.run(["git", "diff"], cwd=git.work, capture_output=True)
    assert evil()  # git alone runs it


def test_hooks_and_monitors_that_came_along_do_not_run(git, evil):
    hooks = git.work / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "query-watchman"): shutil.copy(evil.program, hooks / name)
    git("config", "core.fsmonitor", str(hooks / "query-watchman"))
    edit(git.work / "package" / "model.py")
    evil()
    assert "+line three" in git_state(git.work).diff and not evil()


def test_a_filter_of_the_user_is_used(git, tmp_path):
    with (tmp_path / "config").open("a") as file: file.write('[filter "lower"]\n\tclean = "tr A-Z a-z"\n')
    (git.work / ".git" / "info" / "attributes").write_text("*.py filter=lower\n")
    (git.work / "old.py").write_text("OLD\n")
    assert not git_state(git.work).dirty
    git("config", "filter.lower.clean", "false")  # the repository says otherwise
    assert git_state(git.work).dirty


def test_a_filter_that_cannot_be_named_is_refused(git, evil):
    git("config", "filter.a=b.clean", evil.program)
    state = git_state(git.work)
    assert state.problem == "the repository has a filter with an odd name, 'filter.a=b'" and not evil()


def test_a_submodule(git, evil, tmp_path):
    inner = tmp_path / "inner"
    git("clone", "-q", str(git.work), str(inner))
    git("-c", "protocol.file.allow=always", "submodule", "-q", "add", str(inner), "sub")
    git("commit", "-q", "-m", "two")
    assert git_state(git.work) == GitState(git("rev-parse", "HEAD"), "main", False, "", "")
    settings = git.work / ".git" / "modules" / "sub"
    with (settings / "config").open("a") as file: file.write(f'[filter "x"]\n\tclean = {evil.program}\n')
    (settings / "info" / "attributes").write_text("* filter=x\n")
    (git.work / "sub" / "old.py").write_text("other\n")
    evil()
    assert git_state(git.work).diff == "# left out: 'sub': changes inside this submodule\n" and not evil()
    assert "+other" in git_state(git.work / "sub").diff and not evil()


def test_a_repository_whose_files_are_elsewhere(git, tmp_path):
    secret, bait = tmp_path / "secret", tmp_path / "bait"
    for folder in (secret, bait): folder.mkdir()
    (secret / "password.txt").write_text("hunter2\n")
    git("init", "-q", folder=bait)
    git("config", "core.worktree", str(secret), folder=bait)
    state = git_state(bait)
    assert "hunter2" not in state.diff and state.problem == f"the repository of {bait} has its files elsewhere, in {secret}"


def test_import_is_cheap():
    names = ("numpy.random", "matplotlib", "pandas", "sklearn")
    assert run(f"import learner.base.provenance, sys; print([name for name in {names} if name in sys.modules])") == "[]"
