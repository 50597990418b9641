"""Folders of runs as somebody with bad intentions could hand them over: each kind of file with each kind of content."""
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ESCAPES = "\x1b]0;owned\x07\x1b[2J\n=HYPERLINK(1)\r\u202e"
PAYLOAD = "import os\nopen(os.environ['CANARY'], 'w')\nraise SystemExit('ran')\n"
JSON = ("config.json", "meta.json", "score.json", "checkpoints/index.json")
TABLES = ("history.csv", "steps.csv")
TEXTS = ("script.py", "code.diff", "stdout.txt", "stderr.txt", ".gitignore")
LOCKS = (".lock", "checkpoints/.lock")
OTHERS = ("fingerprints.jsonl", "checkpoints/epoch-0002.safetensors", "checkpoints/epoch-0001.safetensors")
FILES = (*JSON, *TABLES, *TEXTS, *LOCKS, *OTHERS)
FOLDERS = ("checkpoints", "plots", "tensorboard")


class Case(NamedTuple):
    "One folder: how it is called, and what makes it of a copy of a healthy run, beside a folder that is not to be touched."
    name: str
    spoil: Callable[[Path, Path], Path | None]  # gives the path of the run if that has changed


def cases(healthy: Path) -> list[Case]:
    "The whole corpus, made from what a healthy run says."
    makers = (special, others, json_contents, wrong_types, tables, texts, fingerprints, names, code, checkpoints, temporary, repositories)
    found = [case for maker in makers for case in maker(healthy)]
    assert len({case.name for case in found}) == len(found)
    return found


def chosen(found: list[Case], most: int, seed: int = 0) -> list[Case]:
    "A part of the corpus: a few of the kinds of which there are very many, and as many of the others as may be."
    draw, many = random.Random(seed), []
    for label, share in ((r"type .*(?<!in a checkpoint)$", 60), (r"type .* in a checkpoint$", 40), (r".* in place of .*", 30)):
        kind = [case for case in found if re.match(label, case.name)]
        many += draw.sample(kind, share)
        found = [case for case in found if case not in kind]
    return [*draw.sample(found, min(len(found), most - len(many))), *many]


def put(path: Path, content: str | bytes) -> None:
    clear(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path): Path(folder).chmod(0o700)  # one may be locked up
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


# ---- what is not a regular file, or not one that can be read ----

def bind(path: Path) -> None:
    home = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as made: made.bind(path.name)
    finally: os.chdir(home)


def sparse(path: Path, size: int = 1 << 40) -> None:
    with path.open("wb") as file: file.truncate(size)


def unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, outside: path.symlink_to(outside / "mine.txt"),
    "link to the same kind": lambda path, outside: path.symlink_to(outside / "copy" / path.name),
    "dangling link": lambda path, outside: path.symlink_to(outside / "to-be-made"),
    "link to a folder": lambda path, outside: path.symlink_to(outside),
    "relative link": lambda path, outside: path.symlink_to(os.path.relpath(outside / "mine.txt", path.parent)),
    "circle": lambda path, _: path.symlink_to(path.name),
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": lambda path, _: bind(path),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "unreadable": lambda path, _: unreadable(path),
    "folder": lambda path, _: path.mkdir(),
    "empty": lambda path, _: path.touch(),
    "bytes": lambda path, _: (path.write_bytes(bytes(range(256)) * 8), None)[1],
    "zeros": lambda path, _: (path.write_bytes(bytes(4096)), None)[1],
    "terabyte": lambda path, _: sparse(path),
    "brackets": lambda path, _: (path.write_bytes(b"[]," * (16 << 20)), None)[1] if path.suffix == ".json" else None,
}


def special(_: Path) -> Iterator[Case]:
    for name in (*FILES, *FOLDERS):
        for kind, make in KINDS.items():
            if kind == "brackets" and not name.endswith(".json"): continue

            def spoil(run: Path, outside: Path, name: str = name, make: Any = make) -> None:
                clear(run / name)
                make(run / name, outside)
            yield Case(f"{kind}: {name}", spoil)


# ---- what a regular file can be up to ----

def others(_: Path) -> Iterator[Case]:
    def linked(name: str) -> Callable[[Path, Path], None]:
        def spoil(run: Path, outside: Path) -> None:
            clear(run / name)
            os.link(outside / "mine.txt", run / name)
        return spoil
    for name in FILES: yield Case(f"hard link: {name}", linked(name))
    for label, seconds in {"future": 2**40, "past": -(2**31), "year 1": -62135596800}.items():
        def spoil(run: Path, _: Path, seconds: int = seconds) -> None:
            for path in run.rglob("*"): os.utime(path, (seconds, seconds), follow_symlinks=False)
        yield Case(f"time of {label}", spoil)
    for name in FOLDERS[:2]:
        for mode in (0, 0o400, 0o100, 0o500):
            def locked(run: Path, _: Path, name: str = name, mode: int = mode) -> None:
                (run / name).mkdir(exist_ok=True)
                (run / name).chmod(mode)
            yield Case(f"mode {mode:o} of {name}", locked)
    for name in ("Config.json", "META.JSON", "Checkpoints", "checkpoints/INDEX.json", "checkpoints/EPOCH-0002.safetensors", "History.csv"):
        yield Case(f"case: {name}", lambda run, _, name=name: put(run / name, '{"config": "payload:build"}'))
    marks = "\u202e\u2066\u200f\u061c\ufeff\u2028\u0085"
    yield Case("marks in names", lambda run, _: put(run / f"plots/{marks}.png", b"x"))
    yield Case("marks in settings", lambda run, _: put(run / "config.json", (run / "config.json").read_text().replace('"settings": {', f'"settings": {{"{marks}": "{marks}",', 1)))


# ---- JSON ----

NESTED = {"objects": ('{"a":', "1", "}"), "lists": ("[", "1", "]"), "settings": ('{"settings":', "{}", "}")}


def json_contents(healthy: Path) -> Iterator[Case]:
    for name in JSON:
        whole = json.loads((healthy / name).read_text())
        known = json.dumps(whole)
        texts = {
            "list": "[]", "null": "null", "text": '"x"', "number": "9" * 4000, "half": known[: len(known) // 2],
            "many lists": "[" + "[]," * (5 << 20) + "[]]", "nan": known[:-1] + ', "x": NaN}', "infinity": known[:-1] + ', "x": -Infinity}',
            "float": known[:-1] + ', "x": 1e9999}', "digits": known[:-1] + f', "x": {"9" * 4000}}}', "twice": known[:-1] + ", " + known[1:],
            "many keys": known[:-1] + "".join(f', "s{i}": {i}' for i in range(200_000)) + "}", "mark": "\ufeff" + known,
            "escapes": json.dumps({**whole, ESCAPES: ESCAPES}), "surrogate": known[:-1] + ', "\\ud800": "\\udfff"}',
            "long key": json.dumps({**whole, "k" * 1_000_000: 1}), "comment": f"// {known}", "nul": json.dumps({**whole, "\0": "\0"}),
        }
        for shape, (begin, middle, end) in NESTED.items():
            for depth in (45, 99, 700, 100_000): texts[f"{depth} {shape}"] = begin * depth + middle + end * depth
        for label, text in texts.items():
            yield Case(f"{label}: {name}", lambda run, _, name=name, text=text: put(run / name, text))
    yield from settings(healthy)


def settings(healthy: Path) -> Iterator[Case]:
    record = json.loads((healthy / "config.json").read_text())
    deep: Any = 1
    for _ in range(40): deep = {"a": deep}
    wide: Any = {"a": {f"k{i}": {f"l{j}": {} for j in range(60)} for i in range(60)}}
    several = {
        "many": {f"s{i}": i for i in range(200_000)}, "nine thousand": {f"s{i}": i for i in range(9_000)}, "deep": {"model": deep}, "wide": wide,
        "dots": {".".join("abcdefgh" * 500): 1}, "escapes": {ESCAPES: ESCAPES}, "formula": {"=1+1": "\n=1+1", "x": "\uff1d1+1", "y": "\t@x", "z": "+1"},
        "long": {"x" * 100_000: "y" * 1_000_000}, "overlong": {"model": {"name": "M" * 1_000_000}}, "plus": {"model+": 1}, "many dots": {"a" + "." * 5000: 1},
    }
    for label, values in several.items():
        for merged in (False, True):
            new = {**record, "settings": {**record["settings"], **values} if merged else values}
            yield Case(f"{label} settings{' more' * merged}", lambda run, _, new=new: put(run / "config.json", json.dumps(new)))


WRONG: tuple[Any, ...] = ([], {}, None, ESCAPES, -1, 1e308, 10**3999, True, [[]], {"name": []})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def wrong_types(healthy: Path) -> Iterator[Case]:
    for name in JSON:
        whole = json.loads((healthy / name).read_text())
        for path in places(whole):
            for number, value in enumerate(WRONG):
                def spoil(run: Path, _: Path, name: str = name, path: Any = path, value: Any = value) -> None:
                    content = json.loads((run / name).read_text())
                    inside = content
                    for key in path[:-1]: inside = inside[key]
                    inside[path[-1]] = value
                    put(run / name, json.dumps(content))
                yield Case(f"type {number} of {'.'.join(map(str, path))}: {name}", spoil)


# ---- tables, texts, fingerprints ----

def tables(healthy: Path) -> Iterator[Case]:
    for name in TABLES:
        text = (healthy / name).read_text()
        head, *rows = text.splitlines()
        count = head.count(",")
        contents = {
            "line": head + "\n" + "1" * (3 << 20) + "\n", "field": head + '\n"' + "x" * 200_000 + '"' + "," * count + "\n",
            "columns": ",".join(f"c{i}" for i in range(50_000)) + "\n" + "," * 49_999 + "\n", "million rows": "epoch\n" + "1\n" * 1_000_000,
            "escapes": f'"{ESCAPES}",x\n1,2\n', "quote": head + '\n"1\n2,3\n', "nul": head + "\n\0" + "," * count + "\n",
            "twice": "epoch,epoch\n1,2\n", "ragged": text + "1,2,3\n", "digits": head + "\n" + ",".join(["9" * 4000] * (count + 1)) + "\n",
            "exponent": head + "\n" + ",".join(["1e999999"] * (count + 1)) + "\n", "words": head + "\n" + ",".join(["word"] * (count + 1)) + "\n",
            "formula": f"{head},=1+1\n{rows[0]},=1+1\n", "no epoch": "train_loss\n1\n", "nothing": "\n\n\n", "half": text[: len(text) * 2 // 3],
            "backwards": head + "\n" + "\n".join(f"{9 - i}" + ",1" * count for i in range(9)) + "\n", "latin": "épo\xff\n".encode("latin-1"),
            "negative": head + "\n" + ",".join(["-1"] * (count + 1)) + "\n", "many digits": head + "\n" + ",".join(["0." + "1" * 9000] * (count + 1)) + "\n",
        }
        for label, content in contents.items():
            yield Case(f"{label}: {name}", lambda run, _, name=name, content=content: put(run / name, content))


def texts(_: Path) -> Iterator[Case]:
    for name in TEXTS[:4]:
        contents = {"escapes": ESCAPES * 100, "latin": b"\xff\xfe\xfd", "large": "x" * (17 << 20), "lines": "x\n" * 200_000, "nul": "\0" * 1000, "code": PAYLOAD,
                    "script": "</script><script>alert(1)</script>" * 10}
        for label, content in contents.items():
            yield Case(f"{label}: {name}", lambda run, _, name=name, content=content: put(run / name, content))


def fingerprints(healthy: Path) -> Iterator[Case]:
    line = json.loads((healthy / "fingerprints.jsonl").read_text().splitlines()[0])
    contents = {
        "deep": "[" * 100_000 + "]" * 100_000, "digits": json.dumps({**line, "batch": 10**3999}), "list": "[]", "escapes": json.dumps({**line, ESCAPES: ESCAPES}),
        "text": json.dumps({**line, "epoch": ESCAPES}), "negative": json.dumps({**line, "epoch": -1}), "nan": '{"epoch": NaN, "batch": 0}', "half": json.dumps(line)[:20],
        "many": "\n".join(json.dumps({**line, "batch": i}) for i in range(50_000)), "brackets": "[" + "[]," * (5 << 20) + "[]]", "twice": '{"epoch":0,"epoch":1,"batch":0}',
        "true": json.dumps({**line, "epoch": True}), "huge float": '{"epoch": 1e999, "batch": 0}', "long": json.dumps({**line, "k" * 1_000_000: "v"}),
    }
    for label, content in contents.items():
        yield Case(f"{label}: fingerprints.jsonl", lambda run, _, content=content: put(run / "fingerprints.jsonl", content + "\n"))


# ---- names ----

NAMES = ("\x1b[2Jrun", "a\nb", "a\rb", "$(touch RAN)", "`touch RAN`", "-rf", "--overwrite", "a b'c\"d", "\u202egpj.exe", "\udcff\udcfe", "=1+1", "x" * 250, "%s%n", "<img src=x onerror=alert(1)>",
         ";touch RAN", "\uff1d1+1", "*", "~", "\x9b2J", "a\tb", "\\", "#x", "CON", "a.json", "tiny", "payload", "x=1")


def names(_: Path) -> Iterator[Case]:
    for index, name in enumerate(NAMES):
        yield Case(f"name {index} of the run", lambda run, _, name=name: run.rename(run.with_name(name)))
    for index, name in enumerate(("\x1b[2J.safetensors", "epoch-9999.safetensors\n", "epoch-\u0661\u0661\u0661\u0661.safetensors", "epoch-999999999-batch-999999999999.safetensors",
                                  "epoch-0000.safetensors", "../epoch-0001.safetensors", "\udcff.safetensors", "=1.safetensors")):
        yield Case(f"name {index} of a checkpoint", lambda run, _, name=name: put(run / "checkpoints" / name, b"x"))
    for index, name in enumerate(("\x1b[2J.png", "a\nb.png", "\udcff.png", "$(touch RAN).png")):
        yield Case(f"name {index} of a plot", lambda run, _, name=name: put(run / "plots" / name, b"x"))


# ---- names of code ----

CODE = ("payload:build", "evil.payload:build", "os:system", "subprocess:run", "torch.hub:load", "learner.runs.cli:main", "builtins:exec", "__main__:main", "posix:abort", "attack:build",
        "payload.Net", "./payload.py", "../evil", "evil", "evil/other.yaml", "/etc/passwd", "payload", ":", "a:b:c", "http://x/y.yaml", "torch:load", "pickle:loads", "tiny:x", "")


def code(healthy: Path) -> Iterator[Case]:
    record = json.loads((healthy / "config.json").read_text())
    old = record["settings"]
    for name in CODE:
        dotted = name.replace(":", ".")
        changes = {
            "config": {**record, "config": name}, "model": {**record, "settings": {**old, "model": {"name": dotted}}},
            "optimiser": {**record, "settings": {**old, "optimiser": {"name": dotted}}},
            "callbacks": {**record, "settings": {**old, "callbacks": {dotted or "x": {}, "mine": {"name": dotted}}}},
        }
        for label, new in changes.items():
            yield Case(f"code {name!r} as {label}", lambda run, _, new=new: put(run / "config.json", json.dumps(new)))
    for label, new in {"without a format": {"config": "payload:build"}, "format 1": {"format": 1, "config": "payload:build"}, "yaml": {"config": "payload:build", "settings": {}}}.items():
        yield Case(f"code {label}", lambda run, _, new=new: put(run / "config.json", json.dumps(new)))
    for inner in ({"root": "OUTSIDE"}, {"model": {"name": "ConvNet", "width": 10**9}}, {"device": "cuda:99"}, {"device": ESCAPES}, {"batch_size": 10**18}, {"seed": 10**18}):
        name = "fashion_mnist" if "root" in inner else "digits"
        new = {**record, "config": name, "settings": inner}
        yield Case(f"code with {next(iter(inner))} {next(iter(inner.values()))!r:.30}", lambda run, _, new=new: put(run / "config.json", json.dumps(new)))


# ---- checkpoints ----

def checkpoints(healthy: Path) -> Iterator[Case]:
    from hashlib import sha256
    name = "checkpoints/epoch-0002.safetensors"
    data = (healthy / name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    state, tensors = json.loads(head["__metadata__"]["state"]), {key: value for key, value in head.items() if key != "__metadata__"}
    body = data[8 + size :]

    def forged(new_state: Any, new_tensors: Any = tensors, new_body: bytes = body, **metadata: Any) -> bytes:
        "A file whose hash is right."
        text = new_state if isinstance(new_state, str) else json.dumps(new_state)
        inner = {**head["__metadata__"], "sha256": "0" * 64, "state": text, **metadata}
        encoded = json.dumps({"__metadata__": inner, **new_tensors}, separators=(",", ":")).encode()
        whole = len(encoded).to_bytes(8, "little") + encoded + new_body
        return whole.replace(b"0" * 64, sha256(whole).hexdigest().encode(), 1)

    first = next(iter(tensors))
    entry = tensors[first]
    million = {"shape": [250_000, 4], "dtype": "F32", "data_offsets": [len(body), len(body) + 4_000_000]}  # 400 copies take 1.6 GB, and one second to hash
    large = (forged({**state, "x": [{"$tensor": "big"}] * 200, "y": [{"$array": "big"}] * 200}, {**tensors, "big": million}, body + bytes(4_000_000)))
    bytes_ = {"shape": [6_000_000], "dtype": "U8", "data_offsets": [len(body), len(body) + 6_000_000]}
    sparse_ = {"sparse_coo": ["big", "big", [10**9, 10**9], True]}
    contents: dict[str, bytes] = {
        "half": data[: len(data) // 2], "short": data[:50], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "header too long": (1 << 62).to_bytes(8, "little") + data[8:],
        "header of 90 MB": (90_000_000).to_bytes(8, "little") + data[8:] + bytes(90_000_000), "more": data + b"x", "state [] ": forged([]), "state null": forged(None),
        "state text": forged('"x"'), "state deep": forged('{"a":' * 700 + "1" + "}" * 700), "state very deep": forged('{"a":' * 100_000 + "1" + "}" * 100_000),
        "one part 200 times": large, "bytes 200 times": forged({**state, "x": [{"$bytes": "big"}] * 200}, {**tensors, "big": bytes_}, body + bytes(6_000_000)),
        "sparse 200 times": forged({**state, "x": [{"$tensor": sparse_}] * 200}, {**tensors, "big": bytes_}, body + bytes(6_000_000)),
        "int of 4,000 digits": forged(json.dumps(state)[:-1] + f', "x": {"9" * 4000}}}'), "hex of 10 MB": forged({**state, "x": {"$int": "0x" + "f" * 10_000_000}}),
        "unknown tag": forged({**state, "x": {"$exec": "import payload"}}), "no tensor": forged({**state, "x": {"$tensor": ESCAPES}}), "a million values": forged({**state, "x": [0] * 1_000_000}),
        "too many values": forged({**state, "x": [0] * 3_000_000}), "tensor of a petabyte": forged(state, {**tensors, first: {**entry, "shape": [10**15]}}), "shape with zero": forged(state, {**tensors, first: {**entry, "shape": [0, 10**18]}}),
        "negative shape": forged(state, {**tensors, first: {**entry, "shape": [-1]}}), "offsets outside": forged(state, {**tensors, first: {**entry, "data_offsets": [0, 10**12]}}),
        "overlap": forged(state, {key: {**each, "data_offsets": [0, 16]} for key, each in tensors.items()}), "dtype": forged(state, {**tensors, first: {**entry, "dtype": "PICKLE"}}),
        "entry list": forged(state, {**tensors, first: []}), "names": forged({**state, ESCAPES: 1}, {**{key + ESCAPES: each for key, each in tensors.items()}}), "version": forged(state, learner="2"), "version escape": forged(state, learner=ESCAPES),
        "pickle": b"\x80\x04cos\nsystem\n(S'touch RAN'\ntR.", "zip": b"PK\x03\x04" + bytes(1000), "sixty tensors": forged({**state, "x": [{"$tensor": first}] * 100_000}),
        "nan": forged(json.dumps(state)[:-1] + ', "x": NaN}'), "twice": forged('{"a": 1, "a": 2}'),
    }
    for label, content in contents.items():
        yield Case(f"checkpoint {label}", lambda run, _, content=content: put(run / name, content))
    yield from forged_states(state, forged, name)
    for label, best in {"path": "../../outside/mine.txt", "absolute": "/etc/passwd", "escape": ESCAPES, "list": [], "old": "epoch-0001.safetensors"}.items():
        yield Case(f"best is {label}", lambda run, _, best=best: put(run / "checkpoints/index.json", json.dumps({"training": "x", "checkpoint": best})))


def forged_states(state: Any, forged: Callable[..., bytes], name: str) -> Iterator[Case]:
    "Checkpoints that are whole but for one value of a wrong type."
    for path in places(state):
        if len(path) > 4 or any(key == "rng" for key in path[:-1]): continue
        for number, value in enumerate((None, [], {}, ESCAPES, -1, {"$float": "nan"}, {"$int": "0x" + "f" * 400})):
            def spoil(run: Path, _: Path, path: Any = path, value: Any = value) -> None:
                new = json.loads(json.dumps(state))
                inside = new
                for key in path[:-1]: inside = inside[key]
                inside[path[-1]] = value
                put(run / name, forged(new))
            yield Case(f"type {number} of {'.'.join(map(str, path))} in a checkpoint", spoil)


# ---- names that the library uses for itself, and repositories that came along ----

def temporary(_: Path) -> Iterator[Case]:
    for place in ("meta.json", "config.json", "score.json", "history.csv", "checkpoints/index.json", "checkpoints/epoch-0002.safetensors", "checkpoints/epoch-0003.safetensors"):
        folder, name = os.path.split(place)
        for form in (f".{name}.0123456789abcdef.tmp", f".{name}.tmp", f"{name}.tmp", f".{name}.new", f".{name}.old", f"{name}~"):
            for kind in ("link", "link to a folder", "pipe", "folder"):
                path = os.path.join(folder, form)  # without a folder it is not to begin with a slash
                yield Case(f"{kind} in place of {path}", lambda run, outside, path=path, kind=kind: KINDS[kind](run / path, outside))
    for path in ("script-2.py", "code-2.diff", "plots/loss.png", "plots/accuracy.png", "tensorboard/x", ".config.json.0123456789abcdef.tmp/x"):
        def spoil(run: Path, outside: Path, path: str = path) -> None:
            (run / path).parent.mkdir(exist_ok=True)
            clear(run / path)
            KINDS["link"](run / path, outside)
        yield Case(f"link in place of {path}", spoil)


GIT = """[core]
	repositoryformatversion = 0
	fsmonitor = "touch $CANARY; false"
	hooksPath = hooks
	pager = touch $CANARY
	editor = touch $CANARY
	sshCommand = touch $CANARY
	alternateRefsCommand = touch $CANARY
	worktree = %s
[filter "x"]
	clean = touch $CANARY
	smudge = touch $CANARY
	process = touch $CANARY
	required = true
[diff "x"]
	command = touch $CANARY
	textconv = touch $CANARY
[diff]
	external = touch $CANARY
[include]
	path = more
[alias]
	diff = "!touch $CANARY"
"""


def repositories(_: Path) -> Iterator[Case]:
    for label, worktree in {"own": "..", "outside": "../../outside", "root": "/"}.items():
        def spoil(run: Path, _: Path, worktree: str = worktree) -> None:
            git = run / ".git"
            for inner in ("objects", "refs/heads", "hooks", "info"): (git / inner).mkdir(parents=True)
            (git / "HEAD").write_text("ref: refs/heads/main\n")
            (git / "config").write_text(GIT % worktree)
            (git / "more").write_text('[filter "y"]\n\tclean = touch $CANARY\n')
            (git / "info/attributes").write_text("* filter=x diff=x\n")
            (run / ".gitattributes").write_text("* filter=x diff=x\n*.csv filter=y\n")
            for hook in ("post-index-change", "pre-commit", "reference-transaction", "fsmonitor-watchman"):
                (git / "hooks" / hook).write_text("#!/bin/sh\ntouch $CANARY\n")
                (git / "hooks" / hook).chmod(0o755)
        yield Case(f"repository, worktree {label}", spoil)
    yield Case("repository that is a file", lambda run, _: put(run / ".git", "gitdir: ../outside\n"))
    yield Case("repository that is a link", lambda run, outside: (run / ".git").symlink_to(outside))
    yield Case("repository that is a pipe", lambda run, _: os.mkfifo(run / ".git"))
