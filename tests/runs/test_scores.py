"""Ranking against values by hand; what has no place and why; files that come from anywhere; the page in a browser."""
import csv
import html.parser
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from time import perf_counter

import pytest

from learner.base.files import write_text
from learner.base.words import plain
from learner.runs.config import Text, resolve
from learner.runs.page import asset, embed, quote, rerun_command, train_command
from learner.runs.ranking import ScoreError
from learner.runs.rundir import RunLock, create_run
from learner.runs.runfiles import RunFiles, write_json, write_rows
from learner.runs.scores import scores

NASTY = "<img src=x onerror=alert(1)>\"'`</script><script>document.title='owned'</script>\u202egnp\x1b[2J"


def write_run(folder, name, values=(0.5, 0.9, 0.8), metric="validation_accuracy", mode="max", status="finished", settings=None,
              config="digits", score=True, **meta):
    """A run folder with a history of one metric."""
    def write_json(path, value): path.write_text(json.dumps(plain(value)))  # not forced to the disk, for speed

    path = folder / name
    path.mkdir(parents=True)
    settings = {"model": {"width": 32}, "seed": 0} if settings is None else settings
    write_json(path / "config.json", {"format": "learner.run", "version": 1, "config": config, "settings": settings})
    rows = [{"epoch": i, metric: value, "train_loss": 1 / (i + 1)} for i, value in enumerate(values)]
    if rows:
        lines = (f"{row['epoch']},{row[metric]!r},{row['train_loss']!r}\n" for row in rows)
        (path / "history.csv").write_text(f"epoch,{metric},train_loss\n{''.join(lines)}")
    good = [value for value in values if value == value]
    if score:
        best = (max if mode == "max" else min)(good) if good and mode else None
        write_json(path / "score.json", {metric: {"best": best, "epoch": list(values).index(best) if best is not None else None,
                                                  "last": values[-1] if values else None, "mode": mode}})
    write_json(path / "meta.json", {"status": status, "seed": 0, "epochs_done": len(values), "seconds": 12.5, "evaluations": [],
                                    "started": "2026-01-31T12:00:00+00:00", "git": {"commit": "ab" * 20, "dirty": False}, **meta})
    return path


def ranking(found): return [(row.rank, row.name, row.value) for row in found]


def reasons(found): return {run.name: run.reason for run in found.left_out}


def test_the_highest_first_and_equal_ones_share_a_rank(tmp_path):
    for name, values in {"a": (0.1, 0.7, 0.6), "b": (0.9,), "c": (0.7, 0.2), "d": (0.2,)}.items(): write_run(tmp_path, name, values)
    found = scores(tmp_path)
    assert ranking(found) == [(1, "b", 0.9), (2, "a", 0.7), (2, "c", 0.7), (4, "d", 0.2)]
    assert [(row.epoch, row.last) for row in found] == [(0, 0.9), (1, 0.6), (0, 0.2), (0, 0.2)]
    assert (found.mode, found.total, found[0].path) == ("max", 4, tmp_path / "b")


def test_runs_that_share_the_last_rank_stay_together(tmp_path):
    for name, values in {"a": (0.9,), "b": (0.8,), "c": (0.8,), "d": (0.7,)}.items(): write_run(tmp_path, name, values)
    assert [len(scores(tmp_path, top=top)) for top in (1, 2, 3, 4, None)] == [1, 3, 3, 4, 4]
    assert scores(tmp_path, top=2).total == 4


def test_a_ranking_agrees_with_one_by_hand(tmp_path):
    generator = random.Random(0)
    for i in range(40): write_run(tmp_path, f"{i:02}", [round(generator.random(), 2) for _ in range(5)])
    best = {path.name: max(row["validation_accuracy"] for row in RunFiles(path).rows) for path in tmp_path.iterdir()}
    found = scores(tmp_path, top=None)
    assert [row.value for row in found] == sorted(best.values(), reverse=True)
    for row in found: assert row.rank == 1 + sum(value > row.value for value in best.values()) and best[row.name] == row.value


def test_direction_comes_from_the_runs_then_the_name_then_the_caller(tmp_path):
    write_run(tmp_path / "low", "a", (0.9, 0.3), "validation_loss", "min")
    write_run(tmp_path / "low", "b", (0.2, 0.4), "validation_loss", "min")
    found = scores(tmp_path / "low", "validation_loss")
    assert (found.mode, [row.name for row in found]) == ("min", ["b", "a"])
    turned = scores(tmp_path / "low", "validation_loss", mode="max")  # the best in the other direction is in the history
    assert ranking(turned) == [(1, "a", 0.9), (2, "b", 0.4)]
    assert turned[0].epoch == 0
    write_run(tmp_path / "name", "a", (0.9, 0.3), "validation_loss", None)  # by the name
    assert scores(tmp_path / "name", "validation_loss")[0].value == 0.3
    write_run(tmp_path / "no", "a", (0.9, 0.3), "weight_norm", None)
    with pytest.raises(ScoreError, match=r'is a high weight_norm good or a low one\? its name does not tell; say mode="max"'):
        scores(tmp_path / "no", "weight_norm")
    assert scores(tmp_path / "no", "weight_norm", mode="min")[0].value == 0.3
    for name, mode in (("a", "min"), ("b", "max")): write_run(tmp_path / "both", name, (0.9, 0.3), "weight_norm", mode)
    with pytest.raises(ScoreError, match="the runs disagree"): scores(tmp_path / "both", "weight_norm")


def test_the_last_value_when_it_is_asked_for(tmp_path):
    write_run(tmp_path, "a", (0.9, 0.5))
    write_run(tmp_path, "b", (0.6, 0.7))
    found = scores(tmp_path, by="last")
    assert [(row.name, row.value, row.epoch) for row in found] == [("b", 0.7, 1), ("a", 0.5, 1)]


def test_without_a_score_the_history_counts_and_then_an_evaluation(tmp_path):
    write_run(tmp_path, "a", (0.2, math.nan, 0.9, 0.4), score=False)
    (row,) = scores(tmp_path)
    assert (row.value, row.epoch, row.last) == (0.9, 2, 0.4)
    evaluations = [{"split": "test", "checkpoint": "epoch-0002", "at": "2026-01-31", "results": {"test_accuracy": value}} for value in (0.5, 0.6)]
    write_run(tmp_path, "b", evaluations=evaluations)
    found = scores(tmp_path, "test_accuracy")
    assert [(row.name, row.value, row.epoch) for row in found] == [("b", 0.6, None)]
    assert reasons(found) == {"a": "it has no test_accuracy"}


def test_without_an_accuracy_the_loss_ranks(tmp_path):
    for name, values in {"a": (0.5, 0.4), "b": (0.3, 0.6)}.items(): write_run(tmp_path, name, values, metric="validation_loss", mode="min")
    found = scores(tmp_path)
    assert found.metric == "validation_loss" and found.mode == "min" and [row.name for row in found] == ["b", "a"]
    write_run(tmp_path, "c", (0.9,))
    assert scores(tmp_path).metric == "validation_accuracy" and scores(tmp_path, status="failed").metric == "validation_accuracy"


def test_what_has_no_place_is_named_with_the_reason(tmp_path):
    write_run(tmp_path, "good")
    write_run(tmp_path, "nan", (math.nan, math.nan))
    write_run(tmp_path, "infinite", (math.inf,))
    write_run(tmp_path, "other", metric="validation_f1")
    write_run(tmp_path, "empty", (), score=False)
    write_run(tmp_path, "failed", status="failed", error="ValueError: it broke")
    write_run(tmp_path, "killed", status="running")
    write_run(tmp_path, "stopped", (0.1,), status="stopped")
    write_run(tmp_path, "odd", status="dancing")
    (write_run(tmp_path, "torn") / "score.json").write_text('{"validation_accuracy": ')
    (write_run(tmp_path, "list") / "config.json").write_text("[]")
    (write_run(tmp_path, "bytes") / "meta.json").write_bytes(b"\xff\xfe")
    (write_run(tmp_path, "words") / "score.json").write_text('{"validation_accuracy": {"best": "much"}}')
    (write_run(tmp_path, "newer") / "config.json").write_text('{"format": "learner.run", "version": 99}')
    (write_run(tmp_path, "ragged", score=False) / "history.csv").write_text("epoch,validation_accuracy\n0\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no run, and not mentioned")
    with RunLock(write_run(tmp_path, "running", status="running")): found = scores(tmp_path)
    assert ranking(found) == [(1, "good", 0.9)]
    told = reasons(found)
    expected = {
        "nan": "its validation_accuracy is nan", "infinite": "its validation_accuracy is inf", "other": "it has no validation_accuracy",
        "empty": "it has no validation_accuracy", "failed": "it failed: ValueError: it broke", "killed": "it was stopped after 3 epochs",
        "stopped": "it was stopped after 1 epoch", "odd": "its meta.json has no status", "running": "it is still running",
    }
    assert {name: told[name] for name in expected} == expected
    for name, file in {"torn": "score.json", "list": "config.json", "bytes": "meta.json", "words": "score.json", "newer": "config.json",
                       "ragged": "history.csv"}.items(): assert file in told[name], name
    assert told.keys() == {path.name for path in tmp_path.iterdir()} - {"good", "notes"}
    assert all(name in repr(found) for name in list(told)[:8]) and "left_out" in repr(found)


def test_what_the_caller_wants_is_in(tmp_path):
    write_run(tmp_path, "a", (0.9,), status="stopped")
    write_run(tmp_path, "b", (0.5,))
    write_run(tmp_path, "c", (0.7,), status="failed")
    assert [row.name for row in scores(tmp_path, status=("finished", "stopped"))] == ["a", "b"]
    assert [row.name for row in scores(tmp_path, status=None)] == ["a", "c", "b"]
    assert [row.name for row in scores(tmp_path, status="failed")] == ["c"]


def test_runs_are_found_at_any_depth_but_not_within_runs(tmp_path):
    write_run(tmp_path, "sweep/deep/a")
    write_run(tmp_path, "b")
    write_run(tmp_path, "b/checkpoints/c")
    assert sorted(row.name for row in scores(tmp_path)) == ["b", "sweep/deep/a"]
    assert [row.name for row in scores(tmp_path / "b")] == ["b"]  # a run itself


def test_filters_by_setting_fact_and_function(tmp_path):
    for width in (8, 16): write_run(tmp_path, f"w{width}", (width / 20,), settings={"model": {"width": width}, "rate": 0.1})
    assert [row.name for row in scores(tmp_path, where={"model.width": 8})] == ["w8"]
    assert [row.name for row in scores(tmp_path, where={"model.width": "8", "config": "digits"})] == ["w8"]
    assert [row.name for row in scores(tmp_path, where=lambda row: row.settings["model.width"] > 8)] == ["w16"]
    none = scores(tmp_path, where={"model.width": 9})
    assert (len(none), none.total, none.others) == (0, 0, 2) and "2 others did not match" in repr(none)
    with pytest.raises(ScoreError, match=r"no run has a setting model\.widht; did you mean model\.width"): scores(tmp_path, where={"model.widht": 8})


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"metric": "validation_acuracy"}, ScoreError, "no run has validation_acuracy; did you mean validation_accuracy?"),
    ({"metric": ""}, ScoreError, "metric is ''"), ({"metric": 3}, ScoreError, "metric is 3"),
    ({"mode": "up"}, ScoreError, 'mode is \'up\'; it must be "min" or "max"'), ({"by": "mean"}, ScoreError, "by is 'mean'"),
    ({"top": 0}, ValueError, "top is 0; it must be a whole number of at least 1"), ({"top": True}, ValueError, "top is True"),
    ({"status": "finnished"}, ScoreError, "did you mean finished"), ({"where": 3}, ScoreError, "where is 3; give a mapping"),
])
def test_bad_arguments_are_answered_in_one_line(tmp_path, arguments, error, message):
    write_run(tmp_path, "a")
    with pytest.raises(error) as raised: scores(tmp_path, **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_folders_that_are_not_there_or_hold_nothing(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ScoreError, match="holds no runs"): scores(tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match="did you mean runs"): scores(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoreError, match="is a file"): scores(tmp_path / "file")
    write_run(tmp_path / "runs", "a", status="failed")
    assert "left out: a: it failed" in repr(scores(tmp_path / "runs"))


def test_a_thousand_runs_within_two_seconds(tmp_path):
    generator = random.Random(0)
    for i in range(1000): write_run(tmp_path, f"{i % 10}/{i:04}", [generator.random() for _ in range(10)])
    times = []
    for _ in range(3):
        start = perf_counter()
        found = scores(tmp_path)
        repr(found)
        times.append(perf_counter() - start)
    assert found.total == 1000 and min(times) < 2


def test_ranking_needs_no_torch(tmp_path):
    write_run(tmp_path, "a")
    code = ("import sys; from learner.runs.scores import scores; import learner.runs.compare; found = scores(sys.argv[1]); print(found)\n"
            "found.to_csv(sys.argv[1] + '/s.csv'); print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout.endswith("False\n")


# A folder from elsewhere

def spoil_score(change): return lambda run: (run / "score.json").write_text(change((run / "score.json").read_text()))


def sparse(path):
    with path.open("wb") as file: file.truncate(1 << 40)


def settings_of(count): return json.dumps({"format": "learner.run", "settings": {f"s{i}": {"x": i} for i in range(count)}})


HOSTILE = {
    "digits": spoil_score(lambda text: text.replace("0.9", "9" * 4000)), "huge_float": spoil_score(lambda text: text.replace("0.9", "1e999")),
    "mode": spoil_score(lambda text: text.replace('"max"', "[]")), "deep": lambda run: (run / "config.json").write_text('{"a":' * 700 + "1" + "}" * 700),
    "many": lambda run: (run / "config.json").write_text(settings_of(200_000)), "lists": lambda run: (run / "score.json").write_text("[" + "[]," * 5_500_000 + "[]]"),
    "sparse": lambda run: sparse(run / "score.json"), "sparse_meta": lambda run: sparse(run / "meta.json"), "zero": lambda run: ((run / "config.json").unlink(), (run / "config.json").symlink_to("/dev/zero")),
    "pipe": lambda run: ((run / "score.json").unlink(), os.mkfifo(run / "score.json")), "folder": lambda run: ((run / "score.json").unlink(), (run / "score.json").mkdir()),
    "link": lambda run: ((run / "score.json").unlink(), (run / "score.json").symlink_to("/etc/hostname")), "twice": lambda run: (run / "score.json").write_text('{"a": {}, "a": {}}'),
    "words": spoil_score(lambda text: text.replace("0.9", '"much"')), "steps": lambda run: ((run / "score.json").unlink(), (run / "history.csv").write_text("1," * 3_000_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_run_is_named_and_left_out_and_the_others_are_ranked(tmp_path, kind):
    write_run(tmp_path / "runs", "good")
    HOSTILE[kind](write_run(tmp_path / "runs", "evil"))
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)); from learner.runs.scores import scores\n"
            "found = scores(sys.argv[1]); print(found); found.to_html(sys.argv[2]); found.to_csv(sys.argv[2])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "runs", tmp_path / "page"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr[-500:]
    assert re.search(r"(?m)^1  good ", done.stdout) and "left out: evil: " in done.stdout and len(done.stdout) < 2000


def test_as_many_settings_as_are_read_cost_little(tmp_path):
    for i in range(20): write_run(tmp_path, f"{i:02}", (i / 100,))
    (write_run(tmp_path, "evil", (0.5,)) / "config.json").write_text(settings_of(4_000))
    start = perf_counter()
    found = scores(tmp_path, top=None)
    shown = repr(found)
    for write in (found.to_csv, found.to_json, found.to_html): write(tmp_path / "out")
    assert perf_counter() - start < 10 and found.total == 21 and "more settings differ" in shown and len(shown) < 6000


def test_runs_of_other_data_are_not_ranked_without_a_word(tmp_path):
    for name, digest in (("a", "1" * 64), ("b", "1" * 64), ("c\x1b", "2" * 64), ("d", None)): write_run(tmp_path, name, data={"validation": digest, "train": name})
    found = scores(tmp_path)
    assert found.total == 4 and "not measured on the same data in all runs" in repr(found) and "the data of c\\x1b differs from that of a" in repr(found)
    assert "not measured on the same data" in found._repr_html_()
    found.to_html(tmp_path / "page.html")
    assert "not measured on the same data" in (tmp_path / "page.html").read_text()
    assert "not measured" not in repr(scores(tmp_path, where=lambda row: row.name in "ab"))


def test_columns_without_room_are_named(tmp_path):
    for i in range(2): write_run(tmp_path, f"run{i}", settings={f"setting_number_{j}": i for j in range(9)})
    lines = repr(scores(tmp_path)).split("\n")
    missing = next(line for line in lines if line.startswith("no room for: "))
    shown = lines[1].split()
    assert all(f"setting_number_{j}" in shown or f"setting_number_{j}" in missing for j in range(9)) and "started" in missing
    assert "no room" not in repr(scores(tmp_path, where={"setting_number_0": 1}))


@pytest.mark.parametrize("text, kept", [
    ("=1+1", "'=1+1"), ("+1+1", "'+1+1"), ("-1+1", "'-1+1"), ("@sum", "'@sum"), (" =1+1", "' =1+1"), ("\n=1+1", "'\n=1+1"), ("\t=1", "'\t=1"), ("\rx", "'\rx"),
    ("\uff1d1+1", "'\uff1d1+1"), ("\uff0bx", "'\uff0bx"), ("\uff0dx", "'\uff0dx"), ("\uff20x", "'\uff20x"), ("\ufeff=1", "'\ufeff=1"), ("\"=1", "'\"=1"),
    ("-1", "-1"), ("+1e3", "+1e3"), ("-inf", "-inf"), ("a=b", "a=b"), ("plain", "plain"), ("32x32", "32x32"),
])
def test_no_cell_is_a_formula(tmp_path, text, kept):
    write_run(tmp_path, "a", settings={"x": text})
    scores(tmp_path).to_csv(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file: head, row = csv.reader(file)
    assert row[head.index("settings.x")] == kept


# Text, CSV and JSON

def test_the_table_fits_and_shows_what_differs(tmp_path):
    for width in (8, 16): write_run(tmp_path, f"w{width}", (width / 20,), settings={"model": {"width": width, "depth": 3}, "rate": 1e-05})
    write_run(tmp_path, "x" * 90, (0.01,))
    lines = repr(scores(tmp_path)).split("\n")
    assert lines[0] == f"{tmp_path}: 3 runs by the best validation_accuracy, highest first"
    assert lines[1].split()[:6] == ["#", "run", "validation_accuracy", "epoch", "last", "model.width"] and "seed" in lines[1]
    assert lines[2].split()[:6] == ["1", "w16", "0.8000", "0", "0.8000", "16"]
    assert all(len(line) <= 120 for line in lines[1:]) and "depth" in lines[1] and "…" in lines[4]


def test_what_another_part_does_not_have_is_no_column(tmp_path):
    parts = {"a": {"name": "ConvNet", "width": 8, "depth": 2}, "b": {"name": "ConvNet", "width": 16, "depth": 2}, "c": {"name": "LeNet"}}
    for name, model in parts.items(): write_run(tmp_path, name, settings={"model": model, "extra": {} if name == "a" else {"x": 1}})
    assert scores(tmp_path).differing == ["model.name", "model.width", "extra.x"]


def test_csv_and_json_have_all_of_it_in_full_precision(tmp_path):
    write_run(tmp_path, "a", (1 / 3,), settings={"model": {"width": 8, "sizes": [1, 2]}, "path": "=cmd()", "minus": -1})
    write_run(tmp_path, "b", (math.nan,))
    found = scores(tmp_path)
    found.to_csv(tmp_path / "scores.csv")
    (row,) = csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    assert float(row["validation_accuracy"]) == 1 / 3 and row["settings.model.width"] == "8" and row["settings.model.sizes"] == "[1, 2]"
    assert row["settings.path"] == "'=cmd()" and row["settings.minus"] == "-1" and row["commit"] == "ab" * 20
    found.to_json(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read["rows"][0]["value"] == 1 / 3 and read["rows"][0]["settings"]["model"] == {"width": 8, "sizes": [1, 2]}
    assert read["left_out"] == [{"name": "b", "reason": "its validation_accuracy is nan"}] and read["mode"] == "max"


def test_text_from_files_cannot_command_a_terminal(tmp_path):
    write_run(tmp_path, "a\x1b[2Jb", settings={"x": "\x1b]0;t\x07"})
    write_run(tmp_path, "c", settings={"x": "\u202e"}, status="failed", error="\x1b[31m")
    write_run(tmp_path, "d", settings={"x": "\u202e"})
    shown = repr(scores(tmp_path))
    assert r"a\x1b[2Jb" in shown and r"\u202e" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


# Commands

@pytest.mark.parametrize("word", ["plain", "two words", "it's", "$(rm -rf x)", "`x`", 'a"b', "", "a\nb", "\x1b[201~;x", "\u202egnp", "a\\nb\x01", "é ☃", "-x", "*", "!x"])
def test_a_shell_reads_a_quoted_word_back(word):
    text = quote(word)
    assert text.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True)
    assert done.stdout.decode() == word + "\0"


def test_a_name_that_no_decoder_reads_is_quoted_byte_by_byte():
    word = os.fsdecode(b"a\xffb")
    assert quote(word) == r"$'a\xffb'"
    assert subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True).stdout == b"a\xffb"


@pytest.mark.parametrize("given", [
    {}, {"model.width": 8, "epochs": 3, "learning_rate": 0.01}, {"model": "LeNet", "lr_schedule": [[3, 0.1], [100, 0.01]]},
    {"optimiser": "SGD", "optimiser.momentum": 0.9, "device": "cpu"}, {"callbacks": {"EMA": {"decay": 0.9}, "ChannelsLast": {}}},
    {"validation": 100, "optimiser": {"betas": [0.8, 0.99]}, "optimiser.eps": 1e-7},
])
def test_the_command_gives_the_settings_again(tmp_path, given):
    settings = resolve("digits", given)
    path = create_run(tmp_path / "a run")
    write_json(path / "config.json", {"format": "learner.run", "version": 1, **settings.record()})
    words = train_command(RunFiles(path))
    assert words[:3] == ["learner", "train", "digits"] and words[3] == f"{path}-again"
    options = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
    assert resolve("digits", {name: Text(value) for name, value in options.items()}).values == settings.values
    assert len(options) <= 9 and ("model.width" in options) == ("model.width" in given)
    assert shlex.split(" ".join(map(quote, rerun_command(RunFiles(path))))) == ["learner", "rerun", str(path), f"{path}-again"]


@pytest.mark.parametrize("given", [
    {"callbacks": {"learner.steer.update.EMA": {"decay": 0.9}}}, {"callbacks": {"mine": {"name": "payload.C"}}}, {"callbacks": {"payload.C": {}}}, {"callbacks": "payload.C"},
    {"callbacks": ["payload.C"]}, {"model": "payload.Net"}, {"model": {"name": "payload.Net"}}, {"optimiser": "payload.O"}, {"optimiser.name": "payload.O"}, {"model": "{name: payload.Net}"}])
def test_no_command_names_code_that_is_not_registered_since_pasting_would_import_it(tmp_path, given):
    for number, settings in enumerate((given, {**resolve("digits").values, **given})):
        path = create_run(tmp_path / f"run-{number}")
        write_json(path / "config.json", {"format": "learner.run", "version": 1, "config": "digits", "settings": settings})
        assert train_command(RunFiles(path)) is None



def test_what_a_folder_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = write_run(tmp_path / "runs", "a", config="evil_module:run", settings={"model": {"name": "evil_module.Net"}, "x": "; rm -rf ~"})
    assert train_command(RunFiles(path)) is None  # a command to paste would import it
    assert train_command(RunFiles(write_run(tmp_path, "part", settings={"model": {"name": "evil_module.Net"}}))) is None
    scores(tmp_path / "runs").to_html(tmp_path / "page.html")
    assert "evil_module" not in sys.modules
    assert train_command(RunFiles(write_run(tmp_path, "b", config=None))) is None


# The page

class Reader(html.parser.HTMLParser):
    "Gathers the elements of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def nasty_folder(tmp_path):
    name = NASTY.replace("/", "\u2215")  # what looks like a slash, which no name can have
    write_run(tmp_path, name, settings={"x": NASTY, NASTY: 1, "w": 1}, config=NASTY, evaluations=[
        {"split": NASTY, "checkpoint": NASTY, "at": NASTY, "results": {NASTY: 1.0}}], error=NASTY, host=NASTY, data={"train": NASTY},
        command=["learner", NASTY], versions={NASTY: NASTY}, starts=NASTY, git={"commit": NASTY, "dirty": NASTY})
    write_run(tmp_path, "plain", (0.3,), metric="validation_accuracy", settings={"x": 1, "w": 2})
    (write_run(tmp_path, "b" + name[:40]) / "score.json").write_text("{")
    write_text(tmp_path / name / "code.diff", NASTY + "\n")
    write_rows(tmp_path / name / "history.csv", [{"epoch": 0, "validation_accuracy": 0.9, NASTY: 0.5}, {"epoch": 1, "validation_accuracy": 0.8, NASTY: 0.4}])
    return name


def test_nothing_from_files_becomes_an_element(tmp_path):
    nasty_folder(tmp_path / "runs")
    scores(tmp_path / "runs").to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    reader = Reader(text)
    assert reader.tags.count("script") == 2 and "img" not in reader.tags and not [name for name in reader.attributes if name.startswith("on")]
    assert "<img" not in text and "<script>document" not in text and "\x1b" not in text and "\u202e" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert any(NASTY[:20] in run["name"] for run in data["runs"])
    table = Reader(scores(tmp_path / "runs")._repr_html_())
    assert set(table.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td", "small"} and not table.attributes


def test_the_page_loads_nothing():
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)|innerHTML|\beval\(|fetch\(|XMLHttp", asset("scores.html") + asset("scores.css") + asset("scores.js"))


def test_the_sources_of_the_page_are_well_formed():
    """Brackets, quotes and comments by hand; where there is a node, it reads the script."""
    script, style = asset("scores.js"), asset("scores.css")
    for text, comment in ((script, r"//.*"), (style, r"/\*.*?\*/")):
        bare = re.sub(rf'"(?:[^"\\\n]|\\.)*"|`[^`]*`|/\S.*?[^\\]/(?=[.,)\s])|{comment}', "", text)
        stack = []
        for bracket in re.findall(r"[()\[\]{}]", bare):
            if bracket in "([{": stack.append(bracket)
            else: assert stack and stack.pop() + bracket in ("()", "[]", "{}"), bracket
        assert not stack and max(map(len, text.split("\n"))) <= 100
    used = set(re.findall(r'\$\("([\w-]+)"\)', script)) | {"log", "close-up"}
    assert used <= set(re.findall(r'id="([\w-]+)"', asset("scores.html")))
    assert set(re.findall(r"\{\{(\w+)\}\}", asset("scores.html"))) == {"policy", "title", "style", "lead", "notes", "table", "left_out", "foot", "data", "script"}


def test_node_reads_the_script(tmp_path):
    node = shutil.which("node")
    if node is None: pytest.skip("needs node, to read the script of the page")
    (tmp_path / "scores.js").write_text(asset("scores.js"))
    done = subprocess.run([node, "--check", tmp_path / "scores.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_embedded_data_stay_data():
    value = {"</script>": ["<!--", "&lt;", "\u2028", "\ud800", NASTY, 1.5, None]}
    text = embed(value)
    assert json.loads(text) == value and not set("<>&") & set(text) and text.isascii()
    with pytest.raises(ValueError): embed([math.nan])


def test_a_page_of_many_and_of_none(tmp_path):
    for i in range(300): write_run(tmp_path, f"{i:03}", (i / 1000, i / 900), settings={"model": {"width": i}})
    scores(tmp_path, top=None).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    scores(tmp_path, where={"model.width": -1}).to_html(tmp_path / "none.html")
    write_run(tmp_path / "long", "a", [0.5] * 5000)
    scores(tmp_path / "long").to_html(tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 200_000


# In a browser

@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver: pytest.skip("needs chromium and chromedriver")
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"): options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    try: yield started
    finally: started.quit()


def opened(browser, found, path):
    found.to_html(path)
    browser.get(path.as_uri())
    return lambda selector: browser.find_elements("css selector", selector)


def names(select): return [cell.text for cell in select("#rows .open")]


def width_of(browser, width):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})


@pytest.fixture
def sweep(tmp_path):
    for i, width in enumerate((8, 100, 16)):
        path = write_run(tmp_path / "runs", f"sweep/w{width}", (0.2, 0.5 + i / 10, 0.4), settings={"model": {"width": width}, "seed": 0},
                         data={"train": "cd" * 32}, evaluations=[{"split": "test", "checkpoint": "epoch-0001", "at": "2026-02-01T10:00", "results": {"test_accuracy": 0.61}}])
    write_text(path / "code.diff", "-old\n+new\n")
    write_run(tmp_path / "runs", "killed", status="running")
    return scores(tmp_path / "runs")


def test_sorting_filtering_and_opening_a_run(browser, sweep, tmp_path):
    select = opened(browser, sweep, tmp_path / "page.html")
    assert names(select) == ["sweep/w16", "sweep/w100", "sweep/w8"]
    (head,) = [head for head in select("#head th") if "width" in head.text]
    head.find_element("css selector", "button").click()
    assert names(select) == ["sweep/w8", "sweep/w16", "sweep/w100"] and head.get_attribute("aria-sort") == "ascending"  # as numbers
    head.find_element("css selector", "button").send_keys("\ue007")  # and by the keyboard
    assert names(select) == ["sweep/w100", "sweep/w16", "sweep/w8"] and head.get_attribute("aria-sort") == "descending"
    assert len(select("#head th[aria-sort]")) == 1
    select("#filter")[0].send_keys("width=16")
    assert names(select) == ["sweep/w16"] and select("#count")[0].text == "1 of 3 runs"
    select("#rows .open")[0].click()
    dialog = select("#run")[0]
    text = dialog.get_property("innerText")
    path = tmp_path / "runs" / "sweep" / "w16"
    assert select("#title")[0].text == "sweep/w16" and browser.switch_to.active_element == select("#title")[0]
    assert f"learner rerun {path} {path}-again" in " ".join(text.split()) and f"learner train digits {path}-again" in " ".join(text.split())
    for part in ("--model.width=16", "cd" * 32, "ab" * 20, "test_accuracy 0.6100", "finished", "model.width", "Uncommitted changes"): assert part in text
    browser.execute_script("document.querySelector('#body details').open = true")
    assert "+new" in select("#body details pre")[0].text
    dialog.send_keys("\ue00c")  # Escape
    assert not dialog.is_displayed() and browser.switch_to.active_element.text == "sweep/w16"
    assert "killed" in browser.page_source and "it was stopped" in browser.page_source
    assert browser.get_log("browser") == []


def test_curves_are_chosen_drawn_and_read(browser, sweep, tmp_path):
    select = opened(browser, sweep, tmp_path / "page.html")
    assert len(select("#picture path.curve")) == 3 == len(select("#legend li"))
    colours = [browser.execute_script("return getComputedStyle(arguments[0]).stroke", path) for path in select("#picture path.curve")]
    assert len(set(colours)) == 3
    (picture,) = select("#picture svg")
    picture.send_keys("\ue011\ue014")  # Home, right: epoch 1
    tip = select("#tip")[0].text
    assert "epoch 1" in tip and "0.7000" in tip and tip.index("w16") < tip.index("w100") < tip.index("w8")
    assert "epoch" in picture.text and "validation_accuracy" in picture.text
    select("#rows input")[0].click()
    assert len(select("#picture path.curve")) == 2 and "w16" not in select("#legend")[0].text
    select("#quantity option")[1].click()
    assert "train_loss" in select("#picture svg")[0].text
    select("#log")[0].click()
    assert "logarithmic" in select("#picture svg")[0].text
    select("#close-up")[0].click()
    assert len(select("#picture path.curve")) == 2
    select("#none")[0].click()
    assert not select("#picture path.curve") and "Choose runs" in select("#blank")[0].text
    select("#all")[0].click()
    assert len(select("#picture path.curve")) == 3
    assert browser.get_log("browser") == []


def test_a_run_that_wants_to_be_code_stays_text(browser, tmp_path):
    name = nasty_folder(tmp_path / "runs")
    select = opened(browser, scores(tmp_path / "runs"), tmp_path / "page.html")
    assert browser.title == "Scores of runs" and not select("img")
    assert any(text.startswith("<img src=x") for text in names(select)) and name
    for button in select("#rows .open"):
        button.click()
        assert not select("img")
        assert "<img src=x" in select("#body")[0].get_property("innerText") or "plain" in select("#title")[0].text
        select("#close")[0].click()
    for option in select("#quantity option"): option.click()
    assert browser.title == "Scores of runs" and len(select("script")) == 2
    assert browser.get_log("browser") == []


def test_the_policy_forbids_what_is_not_of_the_page(browser, sweep, tmp_path):
    select = opened(browser, sweep, tmp_path / "page.html")
    browser.execute_script("const s = document.createElement('script'); s.textContent = 'document.title = \"owned\"'; document.body.append(s);"
                           "const i = document.createElement('img'); i.src = 'x'; i.setAttribute('onerror', 'document.title = \"owned\"'); document.body.append(i);")
    log = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert browser.title == "Scores of runs" and "Content Security Policy" in log and names(select)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_hangs_over_the_edge(browser, sweep, tmp_path, width):
    width_of(browser, width)
    try:
        select = opened(browser, sweep, tmp_path / "page.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert select("#rows .open")[0].is_displayed() and select("#picture svg")[0].size["width"] > width * 0.7
        select("#rows .open")[0].click()
        assert select("#close")[0].is_displayed() and browser.execute_script("return document.getElementById('run').scrollWidth") <= width
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
