"""The Profiler against a clock that is set by hand."""
import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.learner import Learner
from learner.loop.stages import Callback, Stage
from learner.watch.profiler import Profiler

matplotlib.use("agg")


class Clock:
    "Stands still unless it is told how long something took."
    now = 0.0
    def __call__(self): return self.now
    def pass_(self, seconds): self.now += seconds


def loader(clock, seconds, batches=5):
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                clock.pass_(seconds)
                yield batch
    return Loader((torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(batches))


class Spender(Callback):
    def __init__(self, clock): self.clock = clock
    def before_training(self): self.clock.pass_(50)
    def before_predict(self): self.clock.pass_(1)
    def around_backward(self):
        self.clock.pass_(2)
        yield
        self.clock.pass_(3)
    def cleanup_step(self): self.clock.pass_(4)


def learner(clock, cls=Learner, callbacks=()):
    model = nn.Linear(3, 2)
    learn = cls(model, torch.optim.SGD(model.parameters()), F.cross_entropy,
                {"train": loader(clock, 10), "validation": loader(clock, 7, 1)}, callbacks, device="cpu")
    learn.clock = clock
    return learn


def test_every_part_gets_its_own_time():
    class Own(Learner):
        stages = (*Learner.stages, Stage("extra", inside="batch", follows="step"))
        def predict(self):
            self.clock.pass_(20)
            super().predict()

        def train_batch(self):
            super().train_batch()
            self.clock.pass_(0.5)
            with self.stage("extra"): self.clock.pass_(6)

    clock, profiler = Clock(), Profiler()
    learn = learner(clock, Own, [Spender(clock), profiler])
    learn.train(2)
    parts = profiler.seconds()
    assert parts == pytest.approx({"data": 10, "prepare": 0, "predict": 20, "loss": 0, "backward": 0, "step": 0, "extra": 6,
                                   "Profiler": 0, "Spender": 1 + 2 + 3 + 4 + 50 / 5, "the loop": 0.5})
    assert list(parts)[:3] == ["data", "prepare", "predict"]
    validation = profiler.seconds("validation")  # a pass of one batch
    assert validation["data"] == 7 and validation["predict"] == 20 and validation["Spender"] == 1
    table = profiler.table()
    assert table.columns == ["part", "milliseconds", "share"] and table[-1]["part"] == "total"
    assert table[-1]["milliseconds"] == pytest.approx(1e3 * sum(parts.values())) and table[-1]["share"] == "100.0%"


def test_every_batch_is_measured_and_then_no_more(capsys):
    clock = Clock()
    learn = learner(clock)
    before = learn.measure_every
    learn.train(callbacks=Profiler())
    assert learn.times[("train", "epoch", "training", "batch")][0] == 5
    assert learn.measure_every == before and learn.clock is clock
    learn.train()
    assert learn.times[("train", "epoch", "training", "batch")][0] == 1
    with pytest.raises(ZeroDivisionError): learn.train(callbacks=[Profiler(), failing()])
    assert learn.measure_every == before and learn.clock is clock


def failing():
    class Fails(Callback):
        def after_loss(self): raise ZeroDivisionError
    return Fails()


def test_a_validation_of_its_own_and_a_pass_that_was_not_measured():
    clock, profiler = Clock(), Profiler()
    learn = learner(clock, callbacks=profiler)
    learn.validate()
    assert profiler.seconds("validation")["data"] == 7
    with pytest.raises(ValueError, match="^the profiler has measured no train pass; let it take part in one$"): profiler.table()
    with pytest.raises(ValueError, match="^phase: 'tests' is not one of .*; did you mean test\\?$"): profiler.plot("tests")


def test_weights_are_the_same_with_and_without():
    def trained(callbacks):
        torch.manual_seed(0)
        learn = learner(Clock(), callbacks=callbacks)
        learn.train(2)
        return list(learn.model.parameters())
    assert all(map(torch.equal, trained(()), trained(Profiler())))


def test_the_picture():
    import matplotlib.pyplot as plt
    clock, profiler = Clock(), Profiler()
    learner(clock, callbacks=[profiler, Spender(clock)]).train()
    _, given = plt.subplots()
    ax = profiler.plot("validation", ax=given)
    assert ax is given and ax.get_xlabel() == "milliseconds a batch" and "validation" in ax.get_ylabel()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(profiler.seconds("validation"))
    plt.close("all")
