"""Files are opened in one room, `learner.base.files`, which follows no links, never blocks and reads no more than it has to."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "learner"
ROOM = "base/files.py"
METHODS = {  # of paths, whatever they are called on
    "open", "read_text", "write_text", "read_bytes", "write_bytes", "mkdir", "rmdir", "unlink", "rename", "symlink_to", "hardlink_to", "touch", "chmod",
    "iterdir", "glob", "rglob", "walk", "tofile", "fromfile", "memmap", "genfromtxt", "loadtxt", "savetxt", "from_file", "load_file", "save_file"}
FUNCTIONS = {  # by module
    "os": {"open", "fdopen", "mkdir", "makedirs", "rmdir", "removedirs", "remove", "unlink", "rename", "renames", "replace", "link", "symlink", "mkfifo", "mknod", "truncate",
           "chmod", "chown", "utime", "listdir", "scandir", "walk", "fwalk", "system", "popen", "startfile"},
    "shutil": {"copy", "copy2", "copyfile", "copytree", "rmtree", "move", "make_archive", "unpack_archive"}, "tempfile": None, "subprocess": None, "mmap": None, "pickle": None, "shelve": None, "dbm": None, "sqlite3": None, "socket": {"socket", "create_connection"},
    "io": {"open", "open_code", "FileIO"}, "gzip": {"open"}, "bz2": {"open"}, "lzma": {"open"}, "zipfile": None, "tarfile": None, "urllib": None, "codecs": {"open"},
    "torch": {"load", "save", "from_file", "jit", "hub"}, "np": {"load", "save", "savez", "fromfile", "memmap", "loadtxt", "savetxt"}, "numpy": {"load", "save", "savez"},
    "runpy": None, "builtins": {"open"}, "csv": set(), "yaml": {"unsafe_load", "full_load"}}
SAFE = {  # methods of the same names on what is not a path: a tree, the plan of a pass, TensorBoard's writer, a bar, sums of a batch
    "ast.walk", "plan.open", "self.open", "board.open", "self.board.open", "self._folder.open", "self.parts.open", "self._sums.open"}

# What is not in the room, and why that is right. Each entry has to be found, so that none outlives its reason.
ALLOWED = {
    ("base/store.py", "open(file, 'rb'"): "reads a descriptor again that the room has opened",
    ("base/provenance.py", "subprocess.run(['git'"): "git is asked, with filters, hooks and monitors of the repository turned off",
    ("runs/cli.py", "os.open(os.devnull"): "the screen has gone, and Python flushes to it once more",
    ("runs/page.py", "files('learner.runs').joinpath"): "the page's own style and script, which come with the package",
    ("runs/rundir.py", "path.mkdir(parents=True)"): "makes the new folder that the user has named, or fails if anything is there",
    ("runs/rundir.py", "path.rename(aside)"): "moves the folder that the user has named, which is no link, beside itself",
    ("runs/rundir.py", "os.walk(folder)"): "looks for the names of runs, and follows no links",
    ("runs/background.py", "os.open(os.devnull"): "the terminal has gone, and nothing is read from it or written to it",
    ("runs/background.py", "os.listdir(f'/proc/{process}/fd')"): "whether a process holds the lock, which the kernel knows",
    ("keep/launch.py", "tempfile.TemporaryDirectory("): "a new folder with a name that nobody can guess, which only this user may enter; it goes with the call",
    ("keep/launch.py", "subprocess.Popen([sys.executable"): "the processes that the user has asked for; the learner is theirs",
    ("keep/launch.py", "Path(folder, f'output {rank}').open('wb')"): "in that folder: an open file has to be handed to a process",
    ("keep/launch.py", "pickle.dumps(message)"): "from one process of this user to another, over a socket in that folder, with a key",
    ("keep/launch.py", "pickle.loads(each.recv_bytes())"): "what was sent so, once the key was proved",
    ("keep/launch.py", "pickle.loads(packed or b'')"): "an error that a process of this launch has sent, over that socket",
    ("base/warned.py", "mmap.mmap(-1"): "memory without a file, which processes that are forked here share",
    ("keep/launch.py", "pickle.load(file)"): "the learner that the parent has put in that folder",
    ("use/export.py", "torch.export.save(exported, file)"): "to memory",
    ("use/export.py", "torch.export.load(BytesIO"): "from memory, what has just been saved",
    ("use/inputs.py", "Image.open(BytesIO"): "from memory, what the room has read",
    ("use/serve_app.py", "files('learner.use').joinpath"): "the page's own style and script, which come with the package",
    ("check/rules.py", "torch.save(state, file)"): "to memory, to see what a state becomes",
    ("check/rules.py", "torch.load(io.BytesIO"): "from memory, what has just been saved",
}


def accesses(tree):
    "Calls that open, list, make, move or remove files, or start programs; with what they are called on."
    names = {}  # what `from os import open` and `import numpy as np` stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level: names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        if isinstance(node, ast.Import): names |= {each.asname or each.name: each.name for each in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call | ast.Attribute | ast.Name): continue
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and names.get(node.func.id, node.func.id) == "open": yield node
            if isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                module = names.get(owner.partition(".")[0], "")
                if module not in FUNCTIONS and node.func.attr in METHODS and f"{owner}.{node.func.attr}" not in SAFE: yield node
                if module in FUNCTIONS and (FUNCTIONS[module] is None or node.func.attr in FUNCTIONS[module]): yield node
            if isinstance(node.func, ast.Name):
                module, _, name = names.get(node.func.id, "").rpartition(".")
                if module in FUNCTIONS and name and (FUNCTIONS[module] is None or name in FUNCTIONS[module]): yield node


def found():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name == ROOM: continue
        for node in accesses(ast.parse(path.read_text())): yield name, node.lineno, ast.unparse(node)


def test_files_are_opened_in_one_room():
    used, wrong = set(), []
    for name, line, text in found():
        entry = next(((place, start) for place, start in ALLOWED if place == name and text.startswith(start)), None)
        if entry: used.add(entry)
        else: wrong.append(f"learner/{name}:{line}: {text[:80]}")
    assert not wrong, "files are opened in learner.base.files:\n" + "\n".join(wrong)
    assert used == set(ALLOWED), f"not there any more: {set(ALLOWED) - used}"


@pytest.mark.parametrize("line", [
    "open('x')", "Path('x').open()", "path.read_text()", "import os; os.open('x', 0)", "from os import replace; replace('a', 'b')", "import shutil as s; s.rmtree('x')",
    "import torch; torch.load('x')", "import numpy as np; np.load('x')", "from tempfile import mkdtemp; mkdtemp()", "folder.iterdir()", "import os; os.scandir('x')",
    "import subprocess; subprocess.Popen(['x'])", "from pathlib import Path as P; P('x').write_bytes(b'')", "import io; io.FileIO('x')", "import pickle; pickle.loads(b'')"])
def test_the_search_finds(line): assert list(accesses(ast.parse(line)))


@pytest.mark.parametrize("line", ["plan.open(self, each)", "text.replace('a', 'b')", "handles.remove(x)", "import os; os.fspath('x')", "import torch; torch.zeros(1)", "file.read()"])
def test_and_nothing_else(line): assert not list(accesses(ast.parse(line)))
