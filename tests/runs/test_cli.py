"""The command line as real processes: what is asked for happens, mistakes are answered in one line, every end has its exit status."""
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SMALL = ("--epochs=1", "--model.width=2", "--device=cpu")


class Done:
    "How a process has ended."
    def __init__(self, returncode, out, err): self.returncode, self.out, self.err = returncode, out, err


def learner(*words, cwd):
    "The command as a user starts it."
    done = subprocess.run([sys.executable, "-W", "error", "-m", "learner", *words], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


# Loading PyTorch takes seconds. So where it is needed, the processes are made by one that has loaded it already.

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["torch", "learner.runs.runs", "learner.runs.loggers", "learner.keep.checkpoint", "learner.runs.cli", "jsonargparse", "yaml", "sklearn.datasets", "torcheval.metrics", "matplotlib.pyplot"])


def in_child(words, cwd, files):
    from learner.runs.cli import main
    os.chdir(cwd)
    for number, file in enumerate(files, 1): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    warnings.simplefilter("error")
    sys.argv = ["learner", *words]
    sys.exit(main(words))


class Started:
    "A process that is running."
    def __init__(self, words, cwd, scratch):
        self.files = [str(scratch / f"{name}-{time.monotonic_ns()}") for name in ("out", "err")]
        self.process = FORKING.Process(target=in_child, args=(words, str(cwd), self.files))
        self.process.start()

    def end(self):
        self.process.join(120)
        assert self.process.exitcode is not None, "still running"
        out, err = (Path(file).read_text() for file in self.files)
        return Done(self.process.exitcode, out, err)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("output")
    return lambda *words, cwd: Started(words, cwd, scratch)


@pytest.fixture(scope="module")
def quick(start): return lambda *words, cwd: start(*words, cwd=cwd).end()


def passed(done):
    assert (done.returncode, done.err) == (0, ""), done.err
    return done.out


def good(*words, cwd): return passed(learner(*words, cwd=cwd))


def read(path): return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with a run in it, some damaged things, and files of settings."
    place = tmp_path_factory.mktemp("cli")
    good("train", "digits", "runs/first", "--epochs=2", "--model.width=2", "--device=cpu", "--log_every=10", cwd=place)
    (place / "empty").mkdir()
    (place / "file").touch()
    (place / "full").mkdir()
    (place / "full/thesis.txt").write_text("of great worth")
    for name, text in {"good.yaml": "config: digits\nmodel: {width: 2}\nepochs: 1\n", "typo.yaml": "config: digits\nmodle: LeNet\n", "none.yaml": "", "twice.yaml": "config: digits\nepochs: 1\nepochs: 2\n",
                       "evil.yaml": "config: digits\nmodel: !!python/object/apply:os.system ['touch pwned']\n", "float.yaml": "config: digits\nlearning_rate: 1e-3\n"}.items(): (place / name).write_text(text)
    foreign = place / "foreign"
    shutil.copytree(place / "runs/first", foreign)
    config = read(foreign / "config.json")
    config["settings"]["model"] = {"name": "evil.Net"}
    (foreign / "config.json").write_text(json.dumps(config))
    (place / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('pwned').touch()\n")
    damaged = place / "damaged"
    shutil.copytree(place / "runs/first", damaged)
    (damaged / "config.json").write_text('{"format": "learner.run", ')
    return place


# Mistakes. None of these has to load PyTorch; a few that do are below.

MISTAKES = [
    # command line, words of the message
    ("", "usage: learner COMMAND"),
    ("trian digits runs/x", "learner: there is no command trian; did you mean train?"),
    ("frobnicate", "learner: there is no command frobnicate; there are train, resume, watch, stop, evaluate, rerun, scores, compare, show, configs"),
    ("--overwrite", "there is no command --overwrite"),
    # train
    ("train", "learner train: CONFIG is missing: learner train CONFIG RUN_DIR [options] [--key=value ...]"),
    ("train digits", "learner train: RUN_DIR is missing: learner train digits RUN_DIR [options]"),
    ("train digits runs/x epochs=3", "'epochs=3' is one word too many: write --epochs=3"),
    ("train digits runs/x runs/y", "'runs/y' is one word too many"),
    ("train digits runs/x -e 3", "-e is not an option; options begin with two dashes"),
    ("train digits runs/x -- 3", "-- is not an option"),
    ("train digits runs/x --epochs", "--epochs has no value; write --epochs=VALUE"),
    ("train digits runs/x --overwrit", "did you mean --overwrite?"),
    ("train digits runs/x --overwrite=perhaps", "--overwrite is \"perhaps\"; it must be true or false"),
    ("train digits runs/x --log_every=x", "--log_every is \"x\"; it must be a whole number"),
    ("train digits runs/x --epochs=many", "epochs is \"many\"; it must be a whole number"),
    ("train digits runs/x --epochs=2.0", "epochs is 2.0; it must be a whole number"),
    ("train digits runs/x --epochs=true", "epochs is true; it must be a whole number"),
    ("train digits runs/x --batch_size=[1]", "batch_size is [1]; it must be a whole number"),
    ("train digits runs/x --learning_rate=fast", "learning_rate is \"fast\"; it must be a number"),
    ("train digits runs/x --lr_schedule=[[3,0.1],[x,0.01]]", "lr_schedule is [[3, 0.1], [x, 0.01]]; it must be one of constant, linear, cosine or a list of [a whole number, a number]"),
    ("train digits runs/x --modle=LeNet", "modle: digits has no setting modle; did you mean model?"),
    ("train digits runs/x --width=8", "did you mean model.width?"),
    ("train digits runs/x --model.widht=8", "model.widht: ConvNet has no setting widht; did you mean model.width?"),
    ("train digits runs/x --model=LeNet --model.width=8", "model.width: LeNet has no setting width; it has classes"),
    ("train digits runs/x --model=LeNett", "model: no model is called LeNett; did you mean LeNet?"),
    ("train digits runs/x --model=no_such_package.Net", "model: there is no module no_such_package"),
    ("train digits runs/x --model.width=wide", "model.width is \"wide\"; it must be a whole number"),
    ("train digits runs/x --optimiser=Adamm", "optimiser: no optimiser is called Adamm; did you mean"),
    ("train digits runs/x --callbacks.EAM.decay=1", "callbacks.EAM: no callback is called EAM; did you mean EMA?"),
    ("train digits runs/x --.a=1", "'.a' is not the name of a setting"),
    ("train digts runs/x", "no config is called \"digts\"; did you mean digits?"),
    ("train nothing_like_it runs/x", "there are digits, fashion_mnist, or give a file or module:function"),
    ("train missing.yaml runs/x", "missing.yaml: there is no such file"),
    ("train god.yaml runs/x", "god.yaml: there is no such file; did you mean good.yaml?"),
    ("train typo.yaml runs/x", "typo.yaml: modle: digits has no setting modle; did you mean model?"),
    ("train none.yaml runs/x", "none.yaml: it is empty"),
    ("train twice.yaml runs/x", "twice.yaml: line 3: epochs occurs twice"),
    ("train evil.yaml runs/x", "evil.yaml: line 2: tag:yaml.org,2002:python/object/apply:os.system is not a plain value"),
    ("train no_such:thing runs/x", "no_such:thing: there is no module no_such"),
    ("train json:no_such runs/x", "json has no no_such"),
    ("train foreign/config.json runs/x", "model: evil.Net is code that is not registered here; if you trust it, allow its module: --allow=evil"),
    ("train digits runs/first", "runs/first exists already: continue that run (learner resume; or Run(..., resume=True) and train(resume=...)), choose another name (first-2 is free), or move the old one aside (--overwrite, or overwrite=True)"),
    ("train digits full", "full exists and is not a run, so it stays as it is"),
    ("train digits file", "file is a file"),
    ("train digits runs/x --log_every=0", "learner train: --log_every is 0; it must be a whole number of at least 1"),
    ("train digits runs/x --fingerprints=-1", "learner train: --fingerprints is -1; it must be a whole number of at least 0; 0 means never"),
    ("train digits '' --epochs=1", "the path of the run is empty; name a folder"),
    ("train digits '' --new_name", "the path of the run is empty; name a folder"),
    ("help nothing", "learner: there is no command nothing; there are train, resume"),
    ("help trian", "there is no command trian; did you mean train?"),
    # resume
    ("resume ''", "learner resume: the path of the run is empty; name a folder, such as runs/first"),
    ("resume", "RUN_DIR is missing"),
    ("resume runs/first --epochs=0", "epochs is 0"),
    ("resume runs/frist", "there is no run runs/frist; did you mean first?"),
    ("resume empty", "empty is not a run"),
    ("resume file", "file is a file, and a run is a folder"),
    ("resume damaged", "config.json is damaged"),
    ("resume runs/first --epochs=x", "--epochs is \"x\"; it must be a whole number or null"),
    ("resume runs/first --epoch=3", "--epoch is not an option of resume; did you mean --epochs?"),
    ("resume runs/first --model.width=3", "--model.width is not an option of resume; there are --epochs"),
    ("resume foreign", "evil.Net is code that is not registered here"),
    ("resume runs/first --allow=no_such_module", "allow: there is no module no_such_module"),
    ("resume runs/first --allow=../evil", "is not the name of a module"),
    # watch and stop
    ("watch runs/frist", "there is no run runs/frist; did you mean first?"),
    ("watch", "RUN_DIR is missing"),
    ("stop runs/first", "runs/first is not in training: it is finished"),
    ("stop runs/frist", "there is no run runs/frist; did you mean first?"),
    ("stop runs/first --wait=-1", "--wait is -1; it must be a whole number of at least 0"),
    # evaluate
    ("evaluate", "RUN_DIR is missing"),
    ("evaluate runs/frist", "there is no run runs/frist; did you mean first?"),
    ("evaluate runs/first --split=tset", "--split is \"tset\"; it must be one of validation, test; did you mean test?"),
    ("evaluate foreign --split=test", "evil.Net is code that is not registered here"),
    ("evaluate runs/first --chekpoint=best", "--chekpoint is not an option of evaluate; did you mean --checkpoint?"),
    # rerun
    ("rerun runs/first", "NEW_DIR is missing"),
    ("rerun runs/frist runs/x", "did you mean first?"),
    ("rerun runs/first runs/first", "runs/first exists already"),
    ("rerun foreign runs/x", "evil.Net is code that is not registered here"),
    # scores
    ("scores", "FOLDER is missing"),
    ("scores nowhere", "nowhere"),
    ("scores file", "file"),
    ("scores empty", "empty holds no runs"),
    ("scores runs --metric=validation_acuracy", "did you mean validation_accuracy?"),
    ("scores runs --metrc=x", "--metrc is not an option of scores; did you mean --metric?"),
    ("scores runs --top=x", "--top is \"x\"; it must be a whole number or null"),
    ("scores runs --top=0", "top is 0"),
    ("scores runs --mode=mox", "--mode is \"mox\"; it must be one of max, min or null; did you mean max?"),
    ("scores runs --by=first", "--by is \"first\"; it must be one of best, last"),
    ("scores runs --csv=nowhere/x.csv", "--csv is nowhere/x.csv, and there is no folder nowhere"),
    ("scores runs --html", "--html has no value"),
    ("scores runs --html=", "--html is empty; name a file: --html=scores.html"),
    ("scores runs --html=nodir/x.html", "learner scores: --html is nodir/x.html, and there is no folder nodir; make it first"),
    ("scores runs --json=full", "--json is full, which is a folder; name a file in it"),
    # compare
    ("compare runs/first", "RUN_B is missing"),
    ("compare runs/first runs/frist", "frist"),
    ("compare empty runs/first", "empty"),
    # show, configs
    ("show", "CONFIG is missing"),
    ("show digts", "did you mean digits?"),
    ("show digits --epochs=x", "epochs is \"x\""),
    ("show foreign", "evil.Net is code that is not registered here"),
    ("configs no_such_module", "configs: there is no module no_such_module"),
    ("configs --part", "--part is not an option of configs; did you mean --parts?"),
]


@pytest.mark.parametrize("line, words", MISTAKES, ids=[line or "nothing" for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_status_2(runs, quick, line, words):
    before = sorted(runs.rglob("*"))
    done = quick(*shlex.split(line), cwd=runs)
    assert done.returncode == 2, done.err
    assert words in done.err and done.out == ""
    assert line == "" or len(done.err.splitlines()) == 1
    assert "Traceback" not in done.err and len(done.err) < 2000
    assert [path for path in sorted(runs.rglob("*")) if path not in before and "__pycache__" not in path.parts] == []  # nothing is begun, nothing run


@pytest.mark.parametrize("line, words", [
    ("train digits runs/x --optimiser.lr=3", "optimiser.lr: set learning_rate instead"),
    ("train digits runs/x --model.width=0", "model: ConvNet cannot be built: width is 0; it must be a whole number of at least 1"),
    ("train digits runs/x --lr_schedule=[[3,0.1],[2,0.1]] --model.width=2", "digits cannot be built: PiecewiseSchedule: the epochs [3, 2] do not rise"),
    ("train fashion_mnist runs/x --root=nowhere --model.width=2", "fashion_mnist cannot be built: the four files of Fashion-MNIST are not in nowhere"),
    ("train digits runs/x --device=gpu7", "device"),
    ("evaluate runs/first --checkpoint=../../x", "checkpoint"),
    ("evaluate runs/first --checkpoint=epoch-0099", "epoch-0099"),
])
def test_mistakes_that_are_found_when_it_is_built(runs, quick, line, words):
    done = quick(*line.split(), cwd=runs)
    assert done.returncode == 2 and words in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (runs / "runs/x").exists()


def test_debug_shows_where_a_mistake_was_found(runs):
    done = learner("show", "digits", "--epochs=x", "--debug", cwd=runs)
    assert done.returncode == 2 and "Traceback" in done.err and done.err.splitlines()[-1] == "learner show: epochs is \"x\"; it must be a whole number"


# What it does

def test_mistakes_are_answered_without_torch(runs):
    for words in (["train", "digits", "runs/x", "--epochs=many"], ["resume", "foreign"], ["scores", "empty"], ["show", "digts"]):
        code = f"import sys; from learner.runs.cli import main; print(main({words}), 'torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, env=ENVIRONMENT).stdout.split() == ["2", "False"]


def test_a_run_from_the_command_line(runs):
    config, meta = (read(runs / "runs/first" / name) for name in ("config.json", "meta.json"))
    assert config["config"] == "digits" and config["settings"]["model"] == {"name": "ConvNet", "width": 2, "classes": 10, "dropout": 0.2}
    assert isinstance(config["settings"]["epochs"], int) and config["settings"]["optimiser"]["betas"] == [0.9, 0.999]
    assert meta["status"] == "finished" and meta["command"][:3] == ["learner", "train", "digits"] and meta["data"]["test"] is None and meta["evaluations"] == []
    rows = (runs / "runs/first/history.csv").read_text().splitlines()
    assert len(rows) == 3 and "test" not in rows[0]
    assert "validation_accuracy" in (runs / "runs/first/stdout.txt").read_text()


def test_the_command_line_and_the_notebook_build_the_same(runs):
    from learner.runs.config import build
    from learner.runs.facts import model_hash
    assert read(runs / "runs/first/meta.json")["initial_model"] == model_hash(build("digits", **{"model.width": 2, "device": "cpu"}).model)


def test_the_list_of_commands_fits_a_terminal(tmp_path, quick):
    lines = passed(quick("--help", cwd=tmp_path)).splitlines()
    assert len(lines) > 10 and max(map(len, lines)) <= 80


def test_evaluating_with_changed_settings_says_so(runs, tmp_path, quick):
    shutil.copytree(runs / "runs/first", tmp_path / "run")
    out = passed(quick("evaluate", "run", "--model.dropout=0.5", cwd=tmp_path))
    assert re.match(r"run, checkpoint epoch-\d{4}, on validation data, with model\.dropout=0\.5:\n", out)


def test_evaluating_on_the_test_set_is_written_down(runs, tmp_path, quick):
    shutil.copytree(runs / "runs/first", tmp_path / "run")
    out = passed(quick("evaluate", "run", "--split=test", "--checkpoint=last", cwd=tmp_path))
    head, *lines = out.splitlines()
    values = dict(line.split() for line in lines)
    meta = read(tmp_path / "run/meta.json")
    assert re.fullmatch(r"run, checkpoint epoch-\d{4}, on test data:", head)
    (entry,) = meta["evaluations"]
    assert entry["split"] == "test" and re.match(r"20\d\d-\d\d-\d\dT", entry["at"]) and float(values["test_loss"]) == pytest.approx(entry["results"]["test_loss"], rel=1e-5)
    assert re.fullmatch("[0-9a-f]{64}", meta["data"]["test"])


def test_a_file_of_settings_and_the_command_line_merge(runs, tmp_path, quick):
    (tmp_path / "own.yaml").write_text("config: digits\nmodel: {width: 2, dropout: 0.5}\nlearning_rate: 1e-3\nepochs: 7\n")
    passed(quick("train", "own.yaml", "run", "--epochs", "1", "--model.width=3", "--quiet", cwd=tmp_path))
    settings = read(tmp_path / "run/config.json")["settings"]
    assert settings["model"] == {"name": "ConvNet", "width": 3, "classes": 10, "dropout": 0.5} and settings["epochs"] == 1 and settings["learning_rate"] == 0.001
    shown = passed(quick("show", "run", cwd=tmp_path))
    (tmp_path / "again.yaml").write_text(shown)
    assert passed(quick("show", "again.yaml", cwd=tmp_path)) == shown  # what is printed gives the same settings


def test_going_on_and_running_again_end_in_the_same_history(runs, tmp_path, quick):
    shutil.copytree(runs / "runs/first", tmp_path / "first")
    for more in ((), ("--epochs=1",)):
        assert passed(quick("resume", "first", *more, cwd=tmp_path)) == "first: finished after 2 epochs; for more: learner resume first --epochs=3\n"
    passed(quick("resume", "first", "--epochs=3", "--quiet", cwd=tmp_path))
    out = passed(quick("rerun", "first", "again", "--quiet", cwd=tmp_path))
    assert "the history is identical" in out
    assert (tmp_path / "first/history.csv").read_text() == (tmp_path / "again/history.csv").read_text()
    out = passed(quick("scores", ".", "--csv=scores.csv", "--json=scores.json", "--html=scores.html", cwd=tmp_path))
    assert "again" in out and "written: scores.html" in out and all((tmp_path / f"scores.{ending}").stat().st_size for ending in ("csv", "json", "html"))
    assert "2 runs" in passed(quick("scores", ".", "--where.model.width=2", cwd=tmp_path))
    assert "first" in passed(quick("compare", "first", "again", cwd=tmp_path))


def test_words_reach_a_setting_as_they_were_typed(tmp_path, quick):
    (tmp_path / "own.py").write_text("import torch\nfrom learner import Learner\ndef make(tag: str | None = 'none', names: list[str] = ['a'], extra: dict[str, str] = {}):\n    return Learner(torch.nn.Linear(1, 1), torch.optim.SGD, torch.nn.functional.mse_loss, {'train': [(torch.ones(1, 1), torch.ones(1, 1))]}, device='cpu')\n")
    out = passed(quick("show", "own:make", "--tag=#7", "--names=[007]", "--names+=no", "--names+=1e-3", "--extra={a: 010}", cwd=tmp_path))
    (tmp_path / "own.yaml").write_text(out)
    assert passed(quick("show", "own.yaml", cwd=tmp_path)) == out
    from learner.runs.text import read_yaml
    shown = read_yaml(out)
    assert (shown["tag"], shown["names"], shown["extra"]) == ("#7", ["007", "no", "1e-3"], {"a": "010"})
    assert read_yaml(passed(quick("show", "own:make", "--tag=null", cwd=tmp_path)))["tag"] is None


def test_callbacks_are_added_one_by_one(runs, quick):
    out = passed(quick("show", "digits", "--callbacks+=EMA", "--callbacks+=NaNGuard", "--callbacks.EMA.decay=0.5", cwd=runs))
    assert re.search(r"callbacks: .*\n  EMA:\n    decay: 0.5 .*\n(.*\n)*  NaNGuard:\n", out)


ODD = "o\x1b[2Jd\x07\u202e\x9b1m"  # clears a screen, rings, turns text around


@pytest.mark.parametrize("words", [["resume", ODD], ["scores", ODD], ["compare", ODD, ODD], ["show", ODD], ["train", "digits", "x", f"--model={ODD}"], ["train", "digits", "x", f"--{ODD}=3"], [ODD], ["train", f"{ODD}.yaml", "x"], ["evaluate", "first", f"--checkpoint={ODD}"],
                                   ["configs", ODD], ["show", "digits", f"--{ODD}", "--debug"]])
def test_no_control_characters_reach_the_terminal(runs, quick, words):
    done = quick(*words, cwd=runs / "runs")
    assert done.returncode == 2 and "\\x1b[2J" in done.err and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.err + done.out), done.err


def test_no_control_characters_of_a_folder_reach_the_terminal(runs, tmp_path, quick):
    run = shutil.copytree(runs / "runs/first", tmp_path / "first")
    for name in ("config.json", "meta.json", "score.json"): (run / name).write_text((run / name).read_text().replace("digits", "di\\u001b[2Jgits").replace("validation_", "vali\\u001b[2J").replace("finished", "fin\\u001b[2Jished"))
    for words in (["resume", "first"], ["scores", ".", "--status=null", "--metric=x"], ["compare", "first", str(runs / "runs/first")], ["evaluate", "first"], ["show", "first"], ["train", "first", "new"], ["rerun", "first", "new"]):
        done = quick(*words, cwd=tmp_path)
        assert "\x1b" not in done.out + done.err, (words, done.out, done.err)


def test_a_warning_is_one_line(runs, tmp_path):
    shutil.copytree(runs / "runs/first", tmp_path / "first")
    meta = read(tmp_path / "first/meta.json")
    meta["data"]["validation"] = "0" * 64
    (tmp_path / "first/meta.json").write_text(json.dumps(meta))
    done = subprocess.run([sys.executable, "-m", "learner", "evaluate", "first"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "warning: first: the validation data has changed since the run began\n")


def test_a_run_is_trained_again_from_its_folder(runs, tmp_path, quick):
    passed(quick("train", str(runs / "runs/first"), "again", "--epochs=1", "--quiet", cwd=tmp_path))
    assert read(tmp_path / "again/config.json")["settings"] == {**read(runs / "runs/first/config.json")["settings"], "epochs": 1}


def test_free_names_and_moving_aside(runs, tmp_path, quick):
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs / "runs/first", tmp_path / "runs/demo")
    assert "runs/demo-2" in passed(quick("train", "digits", "runs/demo", *SMALL, "--new_name", "--quiet", cwd=tmp_path))
    passed(quick("train", "digits", "runs/demo", *SMALL, "--overwrite", "--quiet", cwd=tmp_path))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["demo", "demo-2", "demo-old"]
    assert read(tmp_path / "runs/demo/meta.json")["epochs_done"] == 1 and read(tmp_path / "runs/demo-old/meta.json")["epochs_done"] == 2


def test_the_example_of_ones_own_trainer(tmp_path, quick):
    shutil.copytree(ROOT / "nbs/examples/own_trainer", tmp_path / "own", ignore=shutil.ignore_patterns("__pycache__", "runs"))
    out = passed(quick("train", "own/spirals.yaml", "runs/first", "--epochs=12", "--seed=1", cwd=tmp_path))  # the module lies beside the file
    assert float(re.search(r"validation_accuracy ([\d.]+)", out.splitlines()[-2])[1]) > 0.9
    settings = read(tmp_path / "runs/first/config.json")
    assert settings["config"] == "own_trainer:spiral_arms" and settings["settings"]["model"] == {"name": "Perceptron", "width": 64, "depth": 2, "classes": 3}
    assert (tmp_path / "runs/first/script.py").read_text() == (ROOT / "nbs/examples/own_trainer/own_trainer.py").read_text()
    refused = quick("evaluate", "../runs/first", "--split=test", cwd=tmp_path / "own")
    assert refused.returncode == 2 and "--allow=own_trainer" in refused.err
    assert "test_accuracy" in passed(quick("evaluate", "../runs/first", "--split=test", "--allow=own_trainer", cwd=tmp_path / "own"))
    assert "spiral_arms    Which arm of a spiral" in passed(quick("configs", "own_trainer", cwd=tmp_path / "own"))


OWN = """
import os, signal, sys, time, torch
from torch import nn
from learner import Learner, Callback
from learner.runs.config import register_config

class Bad(Callback):
    def __init__(self, what): self.what = what
    def after_batch(self, epoch, batch_num):
        if (epoch, batch_num) != (1, 1): return
        if self.what == "fail": raise ZeroDivisionError("by\\nnothing")
        if self.what == "wait":
            open("waiting", "w").close()
            time.sleep(60)

@register_config(epochs=3)
def own(what: str = ""):
    x = torch.ones(8, 2)
    return Learner(nn.Linear(2, 1), torch.optim.SGD, nn.functional.mse_loss, {"train": [(x, x[:, :1])] * 4, "validation": [(x, x[:, :1])]}, [Bad(what)], device="cpu")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_failure_in_training_is_one_line_and_exit_status_1(own, quick):
    done = quick("train", "own:own", "run", "--what=fail", "--learning_rate=0.1", "--quiet", cwd=own)
    assert done.returncode == 1
    assert len(done.err.splitlines()) == 1 and "ZeroDivisionError: by" in done.err and "Bad.after_batch (epoch 1, batch 1)" in done.err and "the traceback is in run/stderr.txt" in done.err
    kept = (own / "run/stderr.txt").read_text()
    assert "Traceback" in kept and "raise ZeroDivisionError" in kept
    assert read(own / "run/meta.json")["status"] == "failed" and read(own / "run/meta.json")["error"].startswith("ZeroDivisionError")
    done = quick("train", "own:own", "run", "--overwrite", "--what=fail", "--learning_rate=0.1", "--quiet", "--debug", cwd=own)
    assert done.returncode == 1 and "Traceback" in done.err and "raise ZeroDivisionError" in done.err


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_training_in_order_and_resume_goes_on(own, start, quick, number, status):
    process = start("train", "own:own", "run", "--what=wait", "--learning_rate=0.1", "--quiet", cwd=own)
    deadline = time.monotonic() + 60
    while not (own / "waiting").exists() and time.monotonic() < deadline and process.process.is_alive(): time.sleep(0.05)
    os.kill(process.process.pid, number)
    process.process.join(1)
    if process.process.is_alive(): os.kill(process.process.pid, number)  # the batch takes a minute: now at once
    done = process.end()
    assert done.returncode == status, done.err
    assert "learner resume run --allow=own\n" in done.err and "Traceback" not in done.err
    assert read(own / "run/meta.json")["status"] == "stopped"
    (own / "own.py").write_text(OWN.replace("time.sleep(60)", "pass"))
    done = quick("resume", "run", "--allow=own", "--quiet", cwd=own)
    assert (done.returncode, done.err) == (0, ""), done.err
    assert read(own / "run/meta.json")["status"] == "finished" and len((own / "run/history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_the_end_of_the_batch_and_leaves_a_checkpoint_of_it(own, start, number, status):
    (own / "own.py").write_text(OWN.replace("time.sleep(60)", "time.sleep(2)"))
    process = start("train", "own:own", "run", "--what=wait", "--learning_rate=0.1", "--quiet", cwd=own)
    deadline = time.monotonic() + 60
    while not (own / "waiting").exists() and time.monotonic() < deadline and process.process.is_alive(): time.sleep(0.05)
    os.kill(process.process.pid, number)
    done = process.end()
    assert done.returncode == status, done.err
    assert any("-batch-" in path.name for path in (own / "run/checkpoints").iterdir())


def test_a_reader_that_goes_away_is_no_error(runs):
    process = subprocess.Popen([sys.executable, "-m", "learner", "--help"], cwd=runs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.close()
    with process.stderr: assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_training_needs_no_screen(tmp_path):
    command = f"{sys.executable} -m learner train digits runs/x {' '.join(SMALL)} >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "runs/x/meta.json")["status"] == "finished"


def test_a_run_whose_checkpoints_are_elsewhere_or_lost_is_left_as_it_is(runs, tmp_path, quick):
    run = shutil.copytree(runs / "runs/first", tmp_path / "run")
    def refused(words):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = quick("resume", "run", "--epochs=3", cwd=tmp_path)
        assert done.returncode == 2 and words in done.err and len(done.err.splitlines()) == 1, done.err
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "checkpoints").rename(tmp_path / "large")
    refused("run has 2 epochs and no checkpoint to resume from")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    refused("checkpoints is a link, which is not followed")


# Help

@pytest.mark.parametrize("line", ["--help", "-h", "help", "train --help", "resume -h", "evaluate --help", "rerun --help", "scores --help", "compare --help", "show --help", "configs --help", "help train"])
def test_help(runs, quick, line):
    out = passed(quick(*line.split(), cwd=runs))
    assert out.startswith("usage: learner") and "noqa" not in out and "==" not in out
    if line == "train --help": assert all(word in out for word in ("CONFIG", "RUN_DIR", "--overwrite", "--new_name", "[--key=value ...]"))


def test_help_lists_the_settings_of_a_config(runs, quick):
    out = passed(quick("train", "digits", "--help", "--model=LeNet", cwd=runs))
    assert "settings of digits" in out and "name: LeNet" in out and "# examples" in out


def test_version(runs):
    from configparser import ConfigParser
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    assert good("--version", cwd=runs) == f"learner {config['DEFAULT']['version']}\n"


def test_the_script_leads_here():
    from configparser import ConfigParser
    from importlib import import_module
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    name, _, place = config["DEFAULT"]["console_scripts"].partition("=")
    module, _, function = place.strip().partition(":")
    assert name.strip() == "learner" and callable(getattr(import_module(module), function))
    assert "console_scripts" in (ROOT / "setup.py").read_text()


def test_configs(runs, quick):
    out = passed(quick("configs", cwd=runs))
    assert [line.split()[0] for line in out.splitlines()] == ["digits", "fashion_mnist"] and all(len(line.split()) > 3 for line in out.splitlines())


def test_help_loads_no_torch():
    loaded = subprocess.run([sys.executable, "-X", "importtime", "-m", "learner", "--help"], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT).stderr
    modules = {line.rpartition("|")[2].strip() for line in loaded.splitlines() if line.startswith("import time:")}
    assert "learner.runs.cli" in modules and not modules & {"torch", "numpy", "matplotlib", "yaml", "jsonargparse"}
