"""A folder from elsewhere is data: hundreds of hostile folders through every command and every loading function."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def attacked(tmp_path, most, seconds):
    "How many folders there were, and a line for each thing that went wrong."
    words = [sys.executable, str(HERE / "attack.py"), str(tmp_path), str(most)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds, cwd=HERE, env={**os.environ, "MPLBACKEND": "Agg"})
    lines = done.stdout.splitlines()
    assert lines and done.returncode == 0, done.stderr[-2000:]
    *failures, summary = map(json.loads, lines)
    return summary, [": ".join(map(str, failure)) for failure in failures]


def test_hostile_folders_run_nothing_leave_nothing_and_break_nothing(tmp_path):
    summary, failures = attacked(tmp_path, 520, 1800)
    assert not failures, "\n".join(failures[:50])
    assert summary["folders"] >= 500


@pytest.mark.long
def test_all_hostile_folders(tmp_path):
    summary, failures = attacked(tmp_path, "all", 7200)
    assert not failures, "\n".join(failures[:50])
    assert summary["folders"] >= 2000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Two runs of digits, one of them hostile: pipes, a link to the user's own file, code, escapes."
    home = tmp_path_factory.mktemp("real")
    learner(home, "train", "digits", "good", "--epochs=1", "--model=LeNet")
    (home / "mine.txt").write_text("mine")
    evil = home / "evil"
    subprocess.run(["cp", "-r", home / "good", evil], check=True)
    record = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**record, "config": "payload:build"}))
    (evil / "payload.py").write_text("open('RAN', 'w')\ndef build(): pass\n")
    for name in ("stdout.txt", "score.json", "checkpoints/index.json"):
        (evil / name).unlink()
        os.mkfifo(evil / name)
    (evil / "stderr.txt").unlink()
    (evil / "stderr.txt").symlink_to(home / "mine.txt")
    return home


def learner(home, *words):
    done = subprocess.run([sys.executable, "-m", "learner", *words], cwd=home, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", [["scores", "."], ["compare", "good", "evil"], ["show", "evil"], ["train", "evil", "new"], ["resume", "evil"], ["evaluate", "evil"], ["rerun", "evil", "new"]])
def test_real_commands(home, words):
    code, text = learner(home, *words)
    assert "Traceback" not in text
    assert not list(home.rglob("RAN")) and (home / "mine.txt").read_text() == "mine" and not (home / "new").exists()
    if words[0] == "scores": assert code == 0 and " good " in text and "left out: evil: evil/score.json is not a regular file" in text
    elif words[0] == "compare": assert code in (0, 2) and "evil" in text
    else: assert code == 2 and f"learner {words[0]}: config payload:build is code that is not registered here" in text and len(text.splitlines()) == 1


def test_allowing_a_module_allows_no_other(home):
    elsewhere = "is not a class or function defined in that module"
    for module, name, why in (("torch", "torch.hub:load", "is code that is not registered here"), ("torch", "torch:load", elsewhere), ("os", "os:system", elsewhere),
                              ("importlib", "importlib:import_module.x", "importlib has no import_module.x")):
        record = json.loads((home / "good" / "config.json").read_text())
        (home / "evil" / "config.json").write_text(json.dumps({**record, "config": name}))
        code, text = learner(home, "show", "evil", f"--allow={module}")
        assert code == 2 and text.startswith(f"learner show: config {name}") and why in text and len(text.splitlines()) == 1


def test_a_resume_that_is_refused_is_not_a_failure_of_training(home):
    folder = home / "refused"
    subprocess.run(["cp", "-r", home / "good", folder], check=True)
    before = (folder / "meta.json").read_bytes()
    (folder / "checkpoints" / "index.json").unlink()
    (folder / "checkpoints" / "index.json").symlink_to(home / "mine.txt")
    code, text = learner(home, "resume", "refused", "--epochs=2")
    assert (code, text) == (2, "learner resume: refused/checkpoints/index.json is not a regular file; remove it to continue the run\n")
    assert (folder / "meta.json").read_bytes() == before and not (folder / "stderr.txt").read_text()
