"""Dispatch in detail: every kind of hook against every way a stage can end."""
import gc
import re
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
from routine import OPENED, Gives, Routine, attribute, define, live, recorder, yielding

from learner.loop.stages import (
    TREE,
    Callback,
    CallbackError,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelStepException,
    CancelTrainException,
    Stage,
    provides,
)


def expected(stage, kinds, children):
    "What the log should say of a stage that completes, from the table alone."
    lines = [f"before_{stage}"] * ("before" in kinds) + [f"around_{stage} in"] * ("around" in kinds)
    lines += children + [f"around_{stage} out"] * ("around" in kinds) + [f"after_{stage}"] * ("after" in kinds)
    return lines + [f"cleanup_{stage}"] * ("cleanup" in kinds)


@pytest.mark.parametrize("kinds", [("before", "after"), ("before", "around", "after", "cancelled", "cleanup"),
                                   ("cleanup",), ("around",), ("after", "cleanup")])
def test_every_hook_fires_in_order(kinds):
    def run(stage, *inner): return expected(stage, kinds, [line for lines in inner for line in lines])

    def actions(*names): return [run(name) for name in names]
    batch = run("batch", *actions("prepare", "predict", "loss", "backward", "step"))
    validation = run("validation", run("validation_batch", *actions("prepare", "predict", "loss")))
    epoch = run("epoch", run("training", batch, batch), validation)
    test = run("test", run("test_batch", *actions("prepare", "predict", "loss")))
    log = []
    Routine(recorder(log, kinds)).train()
    assert log == run("train", epoch, epoch) + test


ENDS = {CancelTrainException: "train", CancelEpochException: "epoch", CancelBatchException: "batch",
        CancelStepException: "step"}


@pytest.mark.parametrize("plain", [True, False], ids=["only the raiser", "with a recorder of every kind"])
@pytest.mark.parametrize("cancel", ENDS)
@pytest.mark.parametrize("stage", ["train", "epoch", "training", "batch", "prepare", "predict", "loss", "backward", "step"])
@pytest.mark.parametrize("kind", ["before", "around", "after"])
def test_a_cancel_ends_the_innermost_stage_that_names_it(kind, stage, cancel, plain):
    log, raised = [], []

    def hook(self):
        if not raised:
            raised.append(True)
            raise cancel
        if kind == "around": yield
    if kind != "around":
        def hook(self):
            if not raised:
                raised.append(True)
                raise cancel
    raiser = type("Raiser", (Callback,), {f"{kind}_{stage}": hook})()
    routine = Routine([raiser] if plain else [recorder(log), raiser])
    open_stages = [stage, *_outer(stage)]
    named = [name for name in open_stages if TREE.stages[name].cancel is cancel]
    if not named:
        with pytest.raises(CallbackError, match=f"Raiser.{kind}_{stage} raised {cancel.__name__} where no .* is open"):
            routine.train()
        return
    routine.train()
    ended = named[0]
    steps = len(routine.log)
    if ended == "train": assert steps == (1 if (stage, kind) in {("batch", "after"), ("step", "after")} else
                                          4 if (stage, kind) == ("train", "after") else
                                          2 if (stage, kind) == ("training", "after") else
                                          2 if (stage, kind) == ("epoch", "after") else 0)
    if ended in ("batch", "step") and (stage, kind) not in {("batch", "after"), ("step", "after")}: assert steps == 3
    if not plain:  # every stage that the cancel passed through is told so once, and cleaned up
        passed = open_stages[:open_stages.index(ended) + 1]
        cancelled = [line for line in log if line.startswith("cancelled_")]
        assert cancelled == [f"cancelled_{name}" for name in passed]
        for name in TREE.stages: assert log.count(f"cleanup_{name}") == log.count(f"before_{name}")


def _outer(stage):
    inside = TREE.stages[stage].inside
    return [inside[0], *_outer(inside[0])] if inside else []


@pytest.mark.parametrize("stage", OPENED)
@pytest.mark.parametrize("kind", ["before", "around", "after", "cleanup"])
def test_an_error_passes_through_once_and_everything_is_cleaned_up(kind, stage):
    log = []

    def fail(self): raise KeyError("broken")

    def fail_around(self):
        raise KeyError("broken")
        yield
    broken = type("Broken", (Callback,), {f"{kind}_{stage}": fail_around if kind == "around" else fail})()
    routine = Routine([recorder(log), broken])
    with pytest.raises(KeyError, match="broken") as caught: routine.train(callbacks=recorder([], ("before",), "Guest"))
    assert caught.value.__notes__ == [f"in Broken.{kind}_{stage} (epoch {routine.epoch}, batch {routine.batch_num})"]
    for name in TREE.stages: assert log.count(f"cleanup_{name}") == log.count(f"before_{name}")
    assert not any(line.startswith("cancelled") for line in log)
    assert len(routine.callbacks) == 2 and not routine.is_running
    assert not {"batch", "data", "labels", "predictions", "loss"} & live(routine)
    routine.remove(broken)
    routine.log.clear()
    routine.train()
    assert routine.log == ["step"] * 4


def test_all_cleanups_run_even_if_one_raises():
    log = []

    class Bad(Callback):
        def cleanup_batch(self): raise ValueError("bad cleanup")
    with pytest.raises(ValueError, match="bad cleanup"): Routine([recorder(log, name="A"), Bad(), recorder(log, name="B")]).train()
    assert log.count("cleanup_batch") == 2


def test_a_cleanup_cannot_hide_an_error_by_cancelling():
    class Broken(Callback):
        def after_loss(self): raise ValueError("the error")
        def cleanup_batch(self): raise CancelBatchException
    with pytest.raises(CallbackError, match="a cleanup_ hook cannot cancel") as caught: Routine(Broken()).train()
    assert str(caught.value.__context__.__context__) == "the error"  # the cancel stands between


def test_order_is_priority_then_addition_for_every_kind():
    order = []

    def make(name, rank):
        hooks = {f"{kind}_batch": (lambda kind: lambda self: order.append((kind, name)))(kind)
                 for kind in ("before", "after", "cleanup")}
        return type(name, (Callback,), {**hooks, "priority": rank})()
    a, b, c, d = make("A", 5), make("B", 0), make("C", 5), make("D", -1)
    Routine([a, b, c, d]).train(epochs=1)
    for kind in ("before", "after", "cleanup"):
        assert [name for k, name in order if k == kind][:4] == ["D", "B", "A", "C"]


def test_an_around_hook_can_swallow_an_error_and_the_stage_completes():
    log = []

    class Rescue(Callback):
        def around_backward(self):
            with suppress(ZeroDivisionError): yield
        def after_backward(self): log.append("after")
        def backward(self): return 1 / 0
    routine = Routine(Rescue())
    routine.train(epochs=1)
    assert log == ["after"] * 2 and routine.log == ["step"] * 2


def test_an_around_hook_that_swallows_what_another_raises_on_entering():
    class Swallows(Callback):
        def around_predict(self):
            with suppress(ZeroDivisionError): yield

    class Fails(Callback):
        def around_predict(self):
            raise ZeroDivisionError
            yield
    with pytest.raises(CallbackError, match="^an around_predict hook swallowed what another raised before the stage had"):
        Routine([Swallows(), Fails()]).train()


def test_an_around_hook_that_yields_twice_is_blamed():
    class Twice(Callback):
        def around_predict(self):
            yield
            yield
    with pytest.raises(RuntimeError) as caught: Routine(Twice()).train()
    assert "in Twice.around_predict (epoch 0, batch 0)" in caught.value.__notes__


def test_changes_of_callbacks_take_effect_from_the_next_stage_that_opens():
    log = []

    class Late(Callback):
        def before_batch(self): log.append("before")
        def after_batch(self): log.append("after")
        def after_predict(self): log.append("predict")
    late = Late()
    routine = Routine()

    @routine.on("before_batch")
    def come_and_go(learn, batch_num, epoch):
        if (epoch, batch_num) == (0, 0): learn.add(late)
        if (epoch, batch_num) == (1, 0): learn.remove(late)
    routine.train()
    # Added while batch 0 was open: takes part from its `predict` on, and whole from the next batch.
    assert log[:4] == ["predict", "before", "predict", "after"]
    # Then the predict of the validation; and it is removed while a batch is open, which keeps its hooks to its end.
    assert log[4:] == ["predict", "before", "after"]
    assert late not in routine.callbacks


def test_changes_take_effect_within_a_batch():
    log = []

    class Late(Callback):
        def after_predict(self): log.append("late after_predict")
        def before_loss(self): log.append("late before_loss")
    late = Late()
    routine = Routine()
    routine.on("before_predict", lambda learn, batch_num: learn.add(late) if not batch_num and late not in learn.callbacks else None)
    routine.on("after_loss", lambda learn: learn.remove(late) if late in learn.callbacks else None)
    routine.on("before_backward", lambda: log.append("backward"))
    routine.train(epochs=1)
    assert log[:2] == ["late before_loss", "backward"]  # predict was open when it came; loss was not
    assert log.count("late after_predict") == 0 and routine.log == ["step", "step"]


def test_a_provider_that_comes_too_late_is_named():
    routine = Routine()
    routine.on("before_training", lambda learn: learn.add(Gives()))
    routine.on("before_batch", lambda learn: learn.basket)
    with pytest.raises(AttributeError) as caught: routine.train()
    assert "learn.basket lives in epoch; its provider has to be there when that opens" in caught.value.__notes__


def test_an_exception_that_takes_no_notes_keeps_its_type():
    class Strict(Exception):
        def add_note(self, note): raise TypeError("no notes")

    def fail(): raise Strict
    routine = Routine()
    routine.on("after_loss", fail)
    with pytest.raises(Strict): routine.train()


def test_an_error_is_not_taken_for_one_before_it():
    class Fails(Routine):
        def predict(self):
            if self.epoch == 1: raise ValueError("of the model")  # may stand where the exceptions before it stood

    for _ in range(20):
        routine = Fails()

        @routine.on("before_predict")
        def skip(epoch):
            if epoch == 0: raise CancelBatchException
        with pytest.raises(ValueError) as caught: routine.train()
        assert caught.value.__notes__ == ["in train (epoch 1, batch 0)"]


def test_a_routine_may_have_a_path_of_its_own():
    routine = Routine()
    routine.path = routine.entered = routine.changes = "mine"
    routine.train()
    assert routine.path == routine.entered == routine.changes == "mine"


def test_an_error_that_is_raised_again_is_noted_each_time():
    error = RuntimeError("again")

    def fail(): raise error
    for i in (1, 2):
        routine = Routine()
        routine.on("after_loss", fail)
        with pytest.raises(RuntimeError): routine.train()
        assert len(error.__notes__) == i


def test_stages_of_a_subclass():
    log = []

    class Own(Routine):
        stages = (*Routine.stages, Stage("mix", "batch", leaves="mixed", follows="prepare"))
        def _train_batch(self):
            self.act("prepare")
            with self.stage("mix"): self.mixed = self.data * 2
            self.act("predict", "loss")
    class Hook(Callback):
        def before_predict(self, learn): log.append("predict")
        def after_mix(self, mixed): log.append(mixed)
        def before_loss(self, mixed=None): log.append(mixed)
    Own(Hook()).train(epochs=1)
    assert log[:6] == ["aa", "predict", "aa", "bb", "predict", "bb"]
    assert [s.name for s in Own.tree.children("batch")][:2] == ["prepare", "mix"]
    with pytest.raises(CallbackError, match=r"Hook.after_mix names no stage"): Routine(Hook())
    def early(mixed): ...
    with pytest.raises(CallbackError, match="early on before_prepare asks for mixed, which lives from after_mix to the end of a batch"):
        Own().on("before_prepare", early)


def test_nothing_keeps_a_learner_alive():
    class Every(Callback):
        def before_batch(self, learn): ...
        def around_predict(self): yield
        def cleanup_loss(self): ...
        @provides("epoch")
        def thing(self, learn): yield learn.model
        def predict(self, learn): learn.predictions = learn.data
    gc.collect()
    gc.disable()
    try:
        routine = Routine([Every(), recorder([])])
        routine.train()
        alive = weakref.ref(routine)
        del routine
        assert alive() is None
    finally:
        gc.enable()


def test_copies_and_pickles_are_learners_of_their_own():
    import copy
    import pickle
    routine = Routine(Gives())
    routine.train()
    for make in (copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))):
        other = make(routine)
        other.log = []
        assert len(other.callbacks) == 1
        other.train()
        assert other.log == ["step"] * 4 and routine.log == ["step"] * 4
        assert other.stage("batch").learn is other


@pytest.mark.parametrize("kind", ["before", "around", "after", "cleanup"])
@pytest.mark.parametrize(("group", "members"), TREE.groups.items())
def test_a_hook_of_a_group_is_called_where_the_hooks_of_its_stages_would_be(kind, group, members):
    def log_of(names):
        log = []

        def plain(self, learn): log.append((learn.phase, learn.epoch, learn.batch_num))

        def around(self, learn):
            plain(self, learn)
            yield
            plain(self, learn)
        hook = around if kind == "around" else plain
        Phases(type("Loud", (Callback,), {f"{kind}_{name}": hook for name in names})()).train()
        return log
    log = log_of([group])
    assert log == log_of(members) and len({phase for phase, *_ in log}) == 3


class Phases(Routine):
    def stage(self, name):
        phases = {"training": "train", "validation": "validation", "test": "test"}
        self.phase = phases.get(name, getattr(self, "phase", ""))
        return super().stage(name)


def test_a_cancelled_pass_is_told_so_by_the_name_of_its_group():
    log = []

    class Skips(Callback):
        def before_any_batch(self, learn): raise CancelEpochException
        def cancelled_pass(self): log.append("pass")
        def cancelled_any_batch(self): log.append("batch")
    routine = Routine(Skips())
    routine.train(epochs=1)
    assert log == ["batch", "pass"] * 3 and routine.log == []


def test_the_hook_of_a_group_comes_before_that_of_the_stage_for_every_kind():
    log = []

    def plain(hook): return lambda self: log.append(hook)

    def around(hook):
        def wrapper(self):
            log.append(f"{hook} in")
            yield
            log.append(f"{hook} out")
        return wrapper
    hooks = [f"{kind}_{stage}" for kind in ("before", "around", "after", "cleanup") for stage in ("batch", "any_batch")]
    Routine(define(**{hook: (around if "around" in hook else plain)(hook) for hook in hooks})()).train(epochs=1)
    assert log[:10] == ["before_any_batch", "before_batch", "around_any_batch in", "around_batch in", "around_batch out",
                        "around_any_batch out", "after_any_batch", "after_batch", "cleanup_any_batch", "cleanup_batch"]
    assert log[20:25] == ["before_any_batch", "around_any_batch in", "around_any_batch out", "after_any_batch",
                          "cleanup_any_batch"]  # the validation


def test_an_error_in_the_hook_of_a_group_is_named_as_it_was_written():
    def fail(self): raise KeyError
    with pytest.raises(KeyError) as caught: Routine(define(before_pass=fail)()).train()
    assert caught.value.__notes__ == ["in Loud.before_pass (epoch 0, batch 0)"]


def cancel_nothing(): raise CancelException


same = Gives()


def with_whole(routine):
    "Another routine, with a callback that has a part."
    return Routine(type("Whole", (Callback,), {"parts": (same,)})())


OTHERS = {
    "remove": (lambda r: r.remove(same), "remove: Gives() is not among the callbacks []"),
    "on": (lambda r: r.on("after_lss", print), "print on after_lss names no stage; did you mean after_loss?"),
    "on a number": (lambda r: r.on("after_loss", 3), "on: the hook after_loss got 3; pass a function"),
    "act of nothing": (lambda r: r.act(), "act() names no action; name at least one"),
    "act outside": (lambda r: r.act("batch"), "act(batch) was called outside a run; it belongs where a stage is open"),
    "provides without a stage": (lambda r: provides(yielding), f"provides takes the name of a stage, as in "
                                 f"@provides(\"epoch\"); it got {yielding!r}"),
    "a provider overridden": (lambda r: type("Heir", (Gives,), {"basket": lambda self: 0}),
                              "Heir.basket takes the place of a provider of Gives; mark it with @provides(\"epoch\") too"),
    "a hook on the learner": (lambda r: type("Own", (Routine,), {"after_batch": lambda self: 0}),
                              "Own.after_batch would never be called: hooks belong to a Callback; give it to callbacks, "
                              "or use learn.on"),
    "a hook that is a number": (lambda r: r.add(attribute(after_batch=3)),
                                "Callback.after_batch is 3; a hook is a function, or None for no hook"),
    "an attribute that names no stage": (lambda r: r.add(attribute(after_bacth=print)),
                                         "Callback.after_bacth names no stage; did you mean after_batch?"),
    "a cancel that ends nothing": (lambda r: r.train(define(after_batch=lambda self: cancel_nothing())()),
                                   "Loud.after_batch raised CancelException, which ends no stage; raise one of "
                                   "CancelTrainException, CancelEpochException, CancelBatchException, CancelStepException"),
    "a value returned": (lambda r: r.train(define(loss=lambda self, predictions: predictions)()),
                         "Loud.loss returned a value; assign learn.loss instead"),
    "stage": (lambda r: r.stage("bach"), "no stage is called bach; did you mean batch?"),
    "act": (lambda r: r.act("epoch"), "act: epoch is not an action; open it with learn.stage(...)"),
    "nested train": (lambda r: r.train(define(before_batch=lambda self, learn: learn.train())()),
                     "train() was called inside train(); call it afterwards"),
    "a part alone": (lambda r: with_whole(r).remove(same), "remove: Gives() is a part of Whole() and leaves with it; "
                     "remove that"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_mistakes(case):
    call, message = OTHERS[case]
    routine = Routine()
    with pytest.raises((CallbackError, RuntimeError, TypeError)) as caught: call(routine)
    assert str(caught.value) == message
    assert routine.callbacks == ()


def test_a_routine_has_few_private_attributes():
    routine = Routine(recorder([]))
    routine.train()
    assert len([name for name in vars(routine) if name.startswith("_")]) <= 5


def test_fixtures_are_in_slots_and_those_of_a_subclass_beside_them():
    seen, name = [], "loss"

    class Own(Routine):
        stages = (*Routine.stages, Stage("mix", "batch", leaves="mixed", follows="prepare"))
        def _train_batch(self):
            self.act("prepare")
            with self.stage("mix"): self.mixed = 1
            self.act("predict", "loss", "backward", "step")

        def step(self): seen.append((live(self), "mixed" in vars(self), vars(self).get(name)))
    Own().train(epochs=1)
    assert seen == [({"batch", "data", "labels", "batch_size", "predictions", "loss"}, True, None)] * 2
    Own(define(before_batch=lambda self, learn: seen.append((live(learn), hasattr(learn, "mixed"))))()).train(epochs=1)
    assert seen[2::2] == [({"batch"}, False)] * 2


def test_nobody_looks_for_a_fixture_in_the_dictionary_of_a_learner():
    names = "|".join(TREE.passing())
    wrong = re.compile(rf'"({names})" (not )?in vars\((learn|self|routine|self\.learn)\)|vars\(\w+\)(\.get\(|\.pop\(|\[)"({names})"|"({names})"[^\n]*& vars\(')
    root = Path(__file__).parents[2]
    for path in [*(root / "learner").rglob("*.py"), *(root / "tests").rglob("*.py")]:
        found = wrong.search(path.read_text())
        assert not found, f"{path.name}: {found[0]} is always empty; use getattr or hasattr"
