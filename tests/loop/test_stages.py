"""Stages in detail: every kind of hook against every way a stage can end, and every message for a mistake."""
import gc
import itertools
import weakref
from contextlib import contextmanager, suppress
from functools import partial, partialmethod

import pytest

from learner.loop.explain import Timed
from learner.loop.stages import (
    STAGES,
    TREE,
    Callback,
    CallbackError,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelStepException,
    CancelTrainException,
    Stage,
    StageTree,
    provides,
)

OPENED = [name for name, stage in TREE.stages.items() if not stage.rare]  # by every run


def live(routine): return {name for name in ("batch", "data", "labels", "batch_size", "predictions", "loss") if hasattr(routine, name)}


class Routine(Timed):
    "Two epochs of two batches that do nothing."
    fixtures = ("model",)

    def __init__(self, callbacks=None):
        self.model, self.log, self.epoch, self.batch_num = "model", [], 0, 0
        super().__init__(callbacks)

    def prepare(self): self.data = self.labels = self.batch; self.batch_size = 1
    def predict(self): self.predictions = self.data
    def compute_loss(self): self.loss = self.predictions
    def backward(self): pass
    def step(self): self.log.append("step")
    def _train_batch(self): self.act("prepare", "predict", "loss", "backward", "step")
    def _validation_batch(self): self.act("prepare", "predict", "loss")
    def position(self): return f"epoch {self.epoch}, batch {self.batch_num}"

    def train(self, callbacks=None, epochs=2):
        with self.running("train", callbacks):
            with suppress(CancelTrainException), self.stage("train"):
                for self.epoch in range(epochs):
                    with suppress(CancelEpochException), self.stage("epoch"):
                        with suppress(CancelEpochException), self.stage("training"):
                            for self.batch_num, self.batch in enumerate("ab"): self.act("batch")
                        with suppress(CancelEpochException), self.stage("validation"):
                            for self.batch_num, self.batch in enumerate("c"): self.act("validation_batch")
            with suppress(CancelEpochException), self.stage("test"):
                for self.batch_num, self.batch in enumerate("d"): self.act("test_batch")


def recorder(log, kinds=("before", "around", "after", "cancelled", "cleanup"), name=""):
    "A callback with hooks of these kinds at every stage, which write what they are into the log."
    def plain(hook): return lambda self: log.append(hook)

    def around(hook):
        def wrapper(self):
            log.append(f"{hook} in")
            try: yield
            finally: log.append(f"{hook} out")
        return wrapper
    hooks = {f"{kind}_{stage}": (around if kind == "around" else plain)(f"{kind}_{stage}")
             for kind, stage in itertools.product(kinds, OPENED)}
    return type(f"Recorder{name}", (Callback,), hooks)()


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


def test_every_way_to_have_a_hook():
    log = []

    class Callable_:
        def __call__(self, batch_num): log.append(("object", batch_num))

    class Ways(Callback):
        before_predict = partialmethod(lambda self, what, batch_num: log.append((what, batch_num)), "partialmethod")
        loss = None  # a value of its own, not an action

        def __init__(self):
            self.before_batch = lambda batch_num: log.append(("attribute", batch_num))
            self.after_loss = partial(lambda what, batch_num: log.append((what, batch_num)), "partial")
            self.after_batch = Callable_()
            self.loss = print  # its own too
            self.step, self.hooks, self.label, self.providers = 3, [], "mine", {}
            self.after_all = 3  # a value too

        @property
        def after_predict(self): return lambda batch_num: log.append(("property", batch_num))

        @staticmethod
        def before_loss(batch_num): log.append(("static", batch_num))

    class Off(Ways): before_loss = None
    Routine(Ways()).train(epochs=1)
    assert [what for what, n in log if n == 0][:6] == ["attribute", "partialmethod", "property", "static", "partial", "object"]
    log.clear()
    Routine(Off()).train(epochs=1)
    assert "static" not in [what for what, _ in log] and log


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


def test_a_function_comes_and_goes():
    seen = []
    routine = Routine()
    function = routine.on("after_loss", lambda loss: seen.append(loss))
    routine.train(epochs=1)
    assert seen == ["a", "b", "c", "d"]
    routine.remove(function)
    routine.train(epochs=1)
    assert len(seen) == 4


def test_what_hooks_can_ask_for():
    seen = []

    class Asks(Callback):
        def after_loss(self, learn, model, batch, data, labels, batch_size, predictions, loss, epoch, num_epochs=7, *,
                       batch_num, other="default"):
            seen.append((learn is routine, model, batch, data, loss, epoch, num_epochs, batch_num, other))
        def cleanup_batch(self, loss=None): seen.append(("cleanup", loss))
        @staticmethod
        def before_step(loss): seen.append(("static", loss))
        @classmethod
        def after_step(cls, predictions): seen.append((cls.__name__, predictions))
    routine = Routine(Asks())
    routine.num_epochs = 3
    routine.train(epochs=1)
    assert seen[:4] == [(True, "model", "a", "a", "a", 0, 3, 0, "default"), ("static", "a"), ("Asks", "a"), ("cleanup", "a")]


def test_a_cleanup_gets_the_default_where_the_stage_was_cut_short():
    seen = []

    class Asks(Callback):
        def before_predict(self): raise CancelBatchException
        def cleanup_batch(self, loss=None, data=None): seen.append((loss, data))
    Routine(Asks()).train(epochs=1)
    assert seen == [(None, "a"), (None, "b")]


def test_provided_fixtures_live_as_long_as_their_stage():
    log = []

    class Gives(Callback):
        @provides("epoch")
        def basket(self, epoch):
            log.append(f"made {epoch}")
            yield [epoch]
            log.append(f"tidied {epoch}")
        @provides("epoch")
        def twice(self, basket): return basket * 2

    class Takes(Callback):
        def before_epoch(self, basket): basket.append("x")
        def after_training(self, basket, twice): log.append((basket, twice))
        def cleanup_epoch(self, basket): log.append("cleanup")
        def after_test(self, learn): log.append(hasattr(learn, "basket"))
    Routine([Takes(), Gives()]).train()
    assert log == ["made 0", ([0, "x"], [0, 0]), "cleanup", "tidied 0", "made 1", ([1, "x"], [1, 1]), "cleanup", "tidied 1",
                   False]


def test_the_same_fixture_may_live_in_stages_apart():
    class Gives(Callback):
        @provides("training")
        def here(self): return "training"

    class Also(Callback):
        @provides("validation")
        def here(self): return "validation"
        def after_validation(self, here): assert here == "validation"
    Routine([Gives(), Also()]).train()


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


def test_callbacks_can_be_added_while_a_fixture_is_alive():
    routine = Routine(Gives())
    late = define(after_training=lambda self, basket: basket.append("late"))()
    routine.on("before_batch", lambda learn, epoch, batch_num: epoch == batch_num == 0 and learn.add(late))
    routine.train()
    assert late in routine.callbacks


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


# Groups


PASSES, BATCHES = ("training", "validation", "test"), ("batch", "validation_batch", "test_batch")


def test_the_groups_and_the_hooks_that_they_stand_for():
    assert TREE.groups == {"pass": PASSES, "any_batch": BATCHES}
    assert TREE.expand("before_pass") == ["before_training", "before_validation", "before_test"]
    assert TREE.expand("after_batch") == ["after_batch"] and TREE.expand("loss") == ["loss"]
    assert TREE.expand("after_bach") == [] and TREE.expand("any_batch") == []


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


def test_a_function_on_a_group_and_what_it_can_ask_for():
    seen = []
    routine = Routine()

    @routine.on("after_any_batch")
    def see(loss, batch_num, epoch=None): seen.append((loss, epoch))
    routine.train(epochs=1)
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("d", None)]  # there is no epoch in a test
    routine.remove(see)
    assert routine.callbacks == ()


def test_a_fixture_of_a_group_lives_in_each_of_its_stages():
    log = []

    class Gives(Callback):
        @provides("pass")
        def seen(self, learn):
            yield (inputs := [])
            log.append(inputs)

    class Takes(Callback):
        def after_predict(self, seen, data): seen.append(data)
        def before_epoch(self, seen=None): assert seen is None
    routine = Routine([Takes(), Gives()])
    routine.train(epochs=1)
    assert log == [["a", "b"], ["c"], ["d"]] and "seen" not in vars(routine)
    with pytest.raises(CallbackError, match="^GivesHere.seen provides seen in batch, and Gives.seen provides it in training"):
        routine.add(type("GivesHere", (Callback,), {"seen": provides("any_batch")(lambda self: 0)})())


def test_a_stage_of_a_subclass_joins_a_group_or_makes_one():
    log = []

    class Own(Routine):
        stages = (*Routine.stages, Stage("calibration", group="pass"), Stage("early", group="mine"))
        def train(self):
            with self.running("train"), self.stage("early"), self.stage("calibration"): pass
    Own(define(before_pass=lambda self: log.append("pass"), after_mine=lambda self: log.append("mine"))()).train()
    assert log == ["pass", "mine"]
    with pytest.raises(CallbackError, match="Loud.after_mine names no stage"):
        Routine(define(after_mine=lambda self: 0)())


def test_explain_shows_the_hook_of_a_group_under_each_of_its_stages(capsys):
    routine = Routine(define(after_any_batch=lambda self, loss: 0)())
    routine.train()
    routine.explain()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if "Loud.after_any_batch(loss)" in line]
    assert len(shown) == 3 and all(line[1] == "after" and line[-1] in ("ns", "µs", "ms") for line in shown)


def test_an_error_in_the_hook_of_a_group_is_named_as_it_was_written():
    def fail(self): raise KeyError
    with pytest.raises(KeyError) as caught: Routine(define(before_pass=fail)()).train()
    assert caught.value.__notes__ == ["in Loud.before_pass (epoch 0, batch 0)"]


# Parts


class Part(Callback):
    def __init__(self, name, log, parts=()): self.name, self.log, self.parts = name, log, parts
    def before_train(self): self.log.append(f"{self.name} before train")
    def after_epoch(self): self.log.append(f"{self.name} after epoch")
    def cleanup_train(self): self.log.append(f"{self.name} cleanup")
    def __repr__(self): return self.name


def test_parts_come_and_go_with_their_callback():
    log = []
    inner = Part("inner", log)
    part = Part("part", log, [inner])
    first = Part("first", log)
    whole = Part("whole", log, (part, first))
    routine = Routine(whole)
    assert routine.callbacks == (whole, part, inner, first)
    routine.train(epochs=1)
    assert log == [f"{name} {what}" for what in ("before train", "after epoch", "cleanup")
                   for name in ("whole", "part", "inner", "first")]
    part.priority = -1
    assert routine.callbacks == (part, whole, inner, first)
    routine.remove(whole)
    assert routine.callbacks == ()


def test_parts_of_a_callback_of_one_call_leave_with_it():
    log = []
    routine = Routine(own := Part("own", log))
    routine.train(callbacks=Part("guest", log, [Part("part", log)]), epochs=1)
    assert [line for line in log if "cleanup" in line] == ["own cleanup", "guest cleanup", "part cleanup"]
    assert routine.callbacks == (own,)


def test_a_part_that_was_also_added_by_itself_is_there_once_and_stays():
    for order in (0, 1):
        log = []
        part = Part("part", log)
        whole = Part("whole", log, [part])
        routine = Routine([part, whole][::1 if order else -1])
        routine.train(epochs=1)
        assert log.count("part after epoch") == 1 and len(routine.callbacks) == 2
        routine.remove(whole)
        assert routine.callbacks == (part,)


def test_parts_that_come_from_a_hook_act_from_the_next_stage_that_opens():
    log = []
    whole = Part("whole", log, [Part("part", log)])
    routine = Routine()
    routine.on("before_training", lambda learn, epoch: learn.remove(whole) if epoch else learn.add(whole))
    routine.train()
    # It came when the first epoch was open, and it goes when the second is: that one keeps its hooks to its end.
    assert log == ["whole after epoch", "part after epoch"] and whole not in routine.callbacks


def test_parts_may_be_a_property_and_name_each_other():
    class Whole(Callback):
        def __init__(self): self.own = Part("own", [], [self])
        @property
        def parts(self): return [self.own]
    whole = Whole()
    assert Routine(whole).callbacks == (whole, whole.own)


def test_parts_are_read_again_when_a_run_begins():
    log = []
    whole = Part("whole", log)
    routine = Routine(whole)
    whole.parts = [Part("late", log)]
    routine.train(epochs=1)
    assert "late before train" in log


# Without watchers


def test_without_watchers_what_steers_keeps_its_fixtures_and_its_parts():
    log = []

    class Watches(Callback):
        watches, priority = True, 7
        def after_epoch(self): log.append("watched")

    class Counts(Watches):
        @provides("train")
        def counts(self, learn): return ["count"]
        @provides("epoch")
        def unused(self): log.append("unused")

    class Gives(Watches):
        @provides("epoch")
        def basket(self, counts): return [*counts]

    class Steers(Callback):
        def after_training(self, basket): log.append(basket)

    steers, with_part = Steers(), Part("steers", log, [Watches()])
    mixed = type("Mixed", (Watches,), {"parts": [Part("part", log)]})()
    routine = Routine([Counts(), Gives(), steers, with_part, watcher := Watches(), mixed])
    assert [type(each).__name__ for each in routine.watchers()] == ["Counts", "Gives", "Watches"] and watcher in routine.watchers()
    routine.remove_watchers()
    assert [type(each).__name__ for each in routine.callbacks] == ["Steers", "Part", "Part", "Counts", "Gives", "Watches", "Mixed"]
    routine.train(epochs=1)
    assert log[1] == "part before train" and ["count"] in log and "unused" not in log
    assert log.count("watched") == 2  # a part stays with what it is a part of
    assert [type(each).__name__ for each in routine.watchers()] == ["Counts", "Gives"]


# Mistakes

def define(**methods): return type("Loud", (Callback,), methods)


def cancel_nothing(): raise CancelException


def attribute(**attributes):
    callback = Callback()
    vars(callback).update(attributes)
    return callback


def yielding(self): yield
async def asynchronous(self): ...


DEFINITIONS = {
    "misspelt stage": ({"after_bacth": lambda self: 0}, "Loud.after_bacth names no stage; did you mean after_batch?"),
    "misspelt kind": ({"befor_batch": lambda self: 0}, "Loud.befor_batch names no stage; did you mean before_batch?"),
    "American": ({"canceled_epoch": lambda self: 0}, "Loud.canceled_epoch names no stage; did you mean cancelled_epoch?"),
    "dead fixture": ({"before_epoch": lambda self, loss: 0},
                     "Loud.before_epoch asks for loss, which lives from after_loss to the end of a batch"),
    "dead counter": ({"before_train": lambda self, epoch: 0}, "Loud.before_train asks for epoch, which lives in epoch"),
    "too early": ({"before_predict": lambda self, predictions: 0},
                  "Loud.before_predict asks for predictions, which lives from after_predict to the end of a batch"),
    "no yield": ({"around_batch": lambda self: 0},
                 "Loud.around_batch does not yield; an around_ hook yields once, where its stage runs"),
    "yield": ({"after_batch": yielding}, "Loud.after_batch yields, and would never run; only around_ hooks yield"),
    "yielding action": ({"predict": yielding}, "Loud.predict yields, and would never run; only around_ hooks yield"),
    "async": ({"after_batch": asynchronous}, "Loud.after_batch is async and would never run; drop async"),
    "context manager": ({"around_batch": contextmanager(yielding)},
                        "Loud.around_batch is a context manager; leave @contextmanager out, a plain generator will do"),
    "no self": ({"after_batch": lambda: 0}, "Loud.after_batch has no self; a hook is a method"),
    "the learner's method": ({"compute_loss": lambda self: 0},
                             "Loud.compute_loss would never be called; to replace the learner's own, call it loss"),
    "the learner's routine": ({"train_batch": lambda self: 0},
                              "Loud.train_batch would never be called; override it in a subclass of the learner"),
    "the learner's other routine": ({"validation_batch": lambda self: 0},
                                    "Loud.validation_batch would never be called; override it in a subclass of the learner"),
    "misspelt action": ({"backwards": lambda self: 0}, "Loud.backwards would never be called; did you mean backward?"),
    "of another library": ({"before_fit": lambda self: 0}, "Loud.before_fit names no stage; did you mean before_train?"),
    "forward": ({"after_forward": lambda self: 0}, "Loud.after_forward names no stage; did you mean after_predict?"),
    "validate": ({"before_validate": lambda self: 0},
                 "Loud.before_validate names no stage; did you mean before_validation?"),
    "train batch": ({"after_train_batch": lambda self: 0},
                    "Loud.after_train_batch names no stage; did you mean after_batch?"),
    "misspelt group": ({"after_any_bach": lambda self: 0},
                       "Loud.after_any_bach names no stage; did you mean after_any_batch?"),
    "in some stages of a group": ({"before_pass": lambda self, epoch: 0},
                                  "Loud.before_pass asks for epoch, which lives in epoch, and not in test; "
                                  "give it a default: epoch=None"),
    "in no stage of a group": ({"before_any_batch": lambda self, loss: 0},
                               "Loud.before_any_batch asks for loss, which lives from after_loss to the end of a batch"),
    "a group that yields": ({"after_pass": yielding}, "Loud.after_pass yields, and would never run; only around_ hooks yield"),
    "parts that are a method": ({"parts": lambda self: 0}, "Loud.parts is a method, and parts are the callbacks that a "
                                "callback brings along; make it a property or an attribute, or rename it"),
    "on": ({"on_train_epoch_end": lambda self: 0}, "Loud.on_train_epoch_end would never be called; hooks are named "
           "before_X and after_X for a stage X, such as after_epoch"),
}


@pytest.mark.parametrize("case", DEFINITIONS)
def test_a_class_that_cannot_work_is_refused_when_it_is_defined(case):
    methods, message = DEFINITIONS[case]
    with pytest.raises(CallbackError) as caught: define(**methods)
    assert str(caught.value) == message


class Gives(Callback):
    @provides("epoch")
    def basket(self): return []


class GivesToo(Callback):
    @provides("batch")
    def basket(self): return []


class Replaces(Callback):
    def loss(self, learn): ...


class ReplacesToo(Callback):
    def loss(self, learn): ...


same = Gives()
ATTACHMENTS = {
    "unknown stage": ([define(after_zebra=lambda self: 0)()], "Loud.after_zebra names no stage"),
    "unknown fixture": ([define(after_loss=lambda self, los: 0)()],
                        "Loud.after_loss asks for los, a fixture that nobody provides; did you mean loss?"),
    "provided elsewhere": ([Gives(), define(before_train=lambda self, basket: 0)()],
                           "Loud.before_train asks for basket, which lives in epoch"),
    "not in every pass": ([Gives(), define(after_loss=lambda self, basket: 0)()],
                          "Loud.after_loss asks for basket, which lives in epoch, and may be absent here; "
                          "give it a default: basket=None"),
    "not in every ending": ([define(cleanup_batch=lambda self, loss: 0)()],
                            "Loud.cleanup_batch asks for loss, which lives from after_loss to the end of a batch, "
                            "and may be absent here; give it a default: loss=None"),
    "everything": ([define(after_loss=lambda self, *args: 0)()],
                   "Loud.after_loss takes *args; name the fixtures that it wants, or take learn"),
    "two providers": ([Gives(), GivesToo()],
                      "GivesToo.basket provides basket in batch, and Gives.basket provides it in epoch; rename one"),
    "taken name": ([define(loss=provides("epoch")(lambda self: 0))()],
                   "Loud.loss provides loss, which Routine has already; rename one"),
    "taken attribute": ([define(train=provides("epoch")(lambda self: 0))()],
                        "Loud.train provides train, which Routine has already; rename one"),
    "taken value": ([define(model=provides("epoch")(lambda self: 0))()],
                    "Loud.model provides model, which Routine has already; rename one"),
    "taken instance attribute": ([define(times=provides("epoch")(lambda self: 0))()],
                                 "Loud.times provides times, which Routine has already; rename one"),
    "provided at no stage": ([define(thing=provides("epok")(lambda self: 0))()],
                             "Loud.thing is provided at epok, which is not a stage; did you mean epoch?"),
    "provided in some stages of a group": ([Gives(), define(after_pass=lambda self, basket: 0)()],
                                           "Loud.after_pass asks for basket, which lives in epoch, and not in test; "
                                           "give it a default: basket=None"),
    "provided at no group": ([define(thing=provides("any_bach")(lambda self: 0))()],
                             "Loud.thing is provided at any_bach, which is not a stage; did you mean any_batch?"),
    "a part that is a class": ([define(parts=[Gives])()], "parts of Loud: Gives is a class; pass an instance: Gives()"),
    "parts that are no callbacks": ([define(parts=[3])()], "parts of Loud: 3 is not a Callback; pass a function to "
                                    "learn.on(hook, function)"),
    "a part that cannot work": ([define(parts=[define(after_loss=lambda self, los: 0)()])()],
                                "Loud.after_loss asks for los, a fixture that nobody provides; did you mean loss?"),
    "two replace": ([Replaces(), ReplacesToo()],
                    "Replaces.loss and ReplacesToo.loss both replace loss; only one callback can"),
    "twice": ([same, same], "callbacks: Gives() is there twice; add another instance"),
    "class": (Gives, "callbacks: Gives is a class; pass an instance: Gives()"),
    "class in a list": ([Gives], "callbacks: Gives is a class; pass an instance: Gives()"),
    "function": ([len], "callbacks: <built-in function len> is not a Callback; pass a function to learn.on(hook, function)"),
    "number": (3, "callbacks: 3 is not a Callback; pass a function to learn.on(hook, function)"),
    "priority": ([define(priority=1.5)()], "callbacks: Loud() has priority 1.5; it must be a whole number"),
}


@pytest.mark.parametrize("case", ATTACHMENTS)
def test_callbacks_that_cannot_work_are_refused_together_and_nothing_changes(case):
    callbacks, message = ATTACHMENTS[case]
    fine = define(before_batch=lambda self: 0)()
    for call in ("init", "add", "train"):
        routine = Routine(fine)
        with pytest.raises((CallbackError, TypeError)) as caught:
            if call == "init": Routine(callbacks)
            elif call == "add": routine.add(*callbacks) if isinstance(callbacks, list) else routine.add(callbacks)
            else: routine.train(callbacks=callbacks)
        assert str(caught.value) == message
        assert routine.callbacks == (fine,) and not routine.is_running and routine.log == []



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
    "stage before its place": (lambda r: StageTree([Stage("a", inside="b"), Stage("b")]),
                               "stage a names b, and no stage before it is called that"),
    "a part alone": (lambda r: with_whole(r).remove(same), "remove: Gives() is a part of Whole() and leaves with it; "
                     "remove that"),
    "a group called like a stage": (lambda r: StageTree([Stage("a", group="b"), Stage("b")]),
                                    "a stage and a group are called b; rename one"),
    "a group that is nested": (lambda r: StageTree([Stage("a", group="g"), Stage("b", "a", group="g")]),
                               "the group g has b and a, which is around it; the stages of a group stand beside each other"),
    "stage twice": (lambda r: StageTree([*STAGES, Stage("batch")]), "two stages are called batch; rename one"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_mistakes(case):
    call, message = OTHERS[case]
    routine = Routine()
    with pytest.raises((CallbackError, RuntimeError, TypeError)) as caught: call(routine)
    assert str(caught.value) == message
    assert routine.callbacks == ()
