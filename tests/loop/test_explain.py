"""Times and what is printed of a routine."""

from routine import Gives, Routine, define, recorder

from learner.loop.stages import Callback, provides


def test_explain_tells_all(capsys):
    class Half(Callback):
        def loss(self, learn, predictions): learn.loss = predictions
        def after_loss(self, loss, epoch): ...
        @provides("train")
        def gift(self, learn): return 1
    routine = Routine(Half())
    routine.explain()
    before = capsys.readouterr().out
    assert "replaces Routine.compute_loss" in before and "provides gift" in before and "µs" not in before
    routine.train()
    routine.explain()
    after = capsys.readouterr().out
    assert [line.split()[0] for line in after.splitlines() if "·" not in line] == [
        "train", "epoch", "training", "batch", "prepare", "predict", "loss", "backward", "step", "validation",
        "validation_batch", "prepare", "predict", "loss", "test", "test_batch", "prepare", "predict", "loss"]
    assert "Half.after_loss(loss, epoch)" in after and "µs" in after


def test_times_belong_to_a_pass_and_every_kind_of_hook_has_one(capsys):
    kinds = ("before", "around", "after", "cleanup")
    routine = Routine([recorder([], kinds), recorder([], kinds), Gives()])
    routine.train()
    counts = {path: int(count) for path, (count, _) in routine.times.items()}
    assert counts[("train",)] == 1 and counts[("train", "epoch")] == 2 and counts[("train", "epoch", "training", "batch")] == 4
    assert counts[("train", "epoch", "validation", "validation_batch", "predict")] == 2
    assert counts[("test", "test_batch", "predict")] == 1 and ("predict",) not in counts
    assert counts[("train", "epoch", "Gives.basket")] == 4  # opened and closed
    here = ("train", "epoch", "training", "batch", "predict")
    for hook, calls in (("before_predict", 1), ("around_predict", 2), ("after_predict", 1), ("cleanup_predict", 1)):
        for label in (f"Recorder.{hook}", f"Recorder.{hook} (2)"): assert counts[(*here, label)] == 4 * calls
    routine.explain()
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("s") for line in lines if "cancelled" not in line), lines
    assert routine._timing.path == []


def test_explain_shows_the_hook_of_a_group_under_each_of_its_stages(capsys):
    routine = Routine(define(after_any_batch=lambda self, loss: 0)())
    routine.train()
    routine.explain()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if "Loud.after_any_batch(loss)" in line]
    assert len(shown) == 3 and all(line[1] == "after" and line[-1] in ("ns", "µs", "ms") for line in shown)
