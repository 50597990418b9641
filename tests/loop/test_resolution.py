"""Who asks for what: every way to have a hook, fixtures, parts, and every message for callbacks that do not fit."""
import gc
import weakref
from functools import partial, partialmethod

import pytest
from routine import Gives, Routine, define

from learner.loop.stages import Callback, CallbackError, CancelBatchException, Stage, provides


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


def test_callbacks_can_be_added_while_a_fixture_is_alive():
    routine = Routine(Gives())
    late = define(after_training=lambda self, basket: basket.append("late"))()
    routine.on("before_batch", lambda learn, epoch, batch_num: epoch == batch_num == 0 and learn.add(late))
    routine.train()
    assert late in routine.callbacks


def test_a_function_comes_and_goes():
    seen = []
    routine = Routine()
    function = routine.on("after_loss", lambda loss: seen.append(loss))
    routine.train(epochs=1)
    assert seen == ["a", "b", "c", "d"]
    routine.remove(function)
    routine.train(epochs=1)
    assert len(seen) == 4


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


def test_callbacks_are_let_go_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        whole = Part("whole", [], [Part("part", [])])
        routine = Routine(whole)
        routine.train(callbacks=Part("guest", []))
        routine.remove_watchers()
        alive = [weakref.ref(each) for each in (whole, *whole.parts)]
        routine.remove(whole)
        del whole
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_parts_are_read_again_when_a_run_begins():
    log = []
    whole = Part("whole", log)
    routine = Routine(whole)
    whole.parts = [Part("late", log)]
    routine.train(epochs=1)
    assert "late before train" in log


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
