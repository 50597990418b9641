"""A routine that does nothing, in two epochs of two batches, and callbacks for it."""
import itertools
from contextlib import suppress

from learner.loop.explain import Timed
from learner.loop.stages import TREE, Callback, CancelEpochException, CancelTrainException, provides

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


def define(**methods): return type("Loud", (Callback,), methods)


def attribute(**attributes):
    callback = Callback()
    vars(callback).update(attributes)
    return callback


def yielding(self): yield


async def asynchronous(self): ...


class Gives(Callback):
    @provides("epoch")
    def basket(self): return []
