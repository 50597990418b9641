"""Looks at a learner against the model called by hand, and what a look must leave as it was."""

import gc
import random
import threading
import time
import weakref
from copy import deepcopy
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix as oracle_confusion
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learner.base.provenance import rng_state
from learner.loop.data import DataLoaders, TensorLoader
from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.loop.stages import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    provides,
)
from learner.steer.precision import MixedPrecision
from learner.steer.update import EMA
from learner.watch.confusion import confusion, confusion_matrix, plot_confusion
from learner.watch.look import class_names, show_batch, show_predictions, show_top_losses
from learner.watch.metrics import Metrics
from learner.watch.outputs import example_losses, predict, predictions, top_losses
from learner.watch.progress import Progress

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 4


def predict_new(learn, phase=None): return predict(learn, data()[0], 20)


LOOKS = [predictions, predict_new, show_batch, show_predictions, confusion_matrix, top_losses, show_top_losses]


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close("all")


def data(count=50, seed=0, shape=(1, 6, 6)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def network(outputs=CLASSES):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, outputs))


def loaders(**options):
    return DataLoaders(
        train=TensorLoader(data(50, 0), 16, shuffle=True, **options), validation=TensorLoader(data(37, 1), 16),
        test=TensorLoader(data(21, 2), 16),
    )


def learner(callbacks=None, model=None, loss_func=F.cross_entropy, given=None, cls=Learner):
    return cls(model or network(), torch.optim.AdamW, loss_func, given or loaders(), callbacks, device="cpu")


def by_hand(model, x):
    model = deepcopy(model).eval()
    with torch.no_grad(): return model(x)


def titles(ax): return [text.get_text() for text in ax.texts]


# Predictions are what the model says

@pytest.mark.parametrize(("phase", "seed", "count"), [("validation", 1, 37), ("test", 2, 21)])
def test_predictions_are_those_of_the_model(phase, seed, count):
    learn = learner()
    learn.train(2, learning_rate=0.01)
    x, y = data(count, seed)
    found = predictions(learn, phase, inputs=True)
    expected = by_hand(learn.model, x)
    torch.testing.assert_close(found.predictions, expected)
    assert torch.equal(found.labels, y) and torch.equal(found.inputs, x)
    torch.testing.assert_close(found.losses, F.cross_entropy(expected, y, reduction="none"))
    assert found.positions.tolist() == list(range(count))
    for part in found: assert part.device.type == "cpu" and not part.requires_grad
    evaluate = learn.validate if phase == "validation" else learn.test
    assert found.losses.mean().item() == pytest.approx(evaluate()[f"{phase}_loss"], rel=1e-5)


def test_the_shuffled_training_data_come_in_the_order_of_the_next_pass():
    learn = learner()
    learn.train(1, learning_rate=0.01)
    loader, (x, y) = learn.dataloaders["train"], data(50, 0)
    found = predictions(learn, "train", inputs=True)
    order = loader.order(loader.epoch)
    assert order.tolist() != list(range(50))
    assert torch.equal(found.inputs, x[order]) and torch.equal(found.labels, y[order])
    torch.testing.assert_close(found.predictions, by_hand(learn.model, x)[order])
    assert torch.equal(next(iter(loader))[1], found.labels[:16])


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_loader_of_torch_is_put_back(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(TensorDataset(*data()), 16, shuffle=True, generator=generator)
    learn = learner(given={"train": loader})
    torch.manual_seed(3)
    state = (generator or torch.default_generator).get_state()
    first, second = predictions(learn, "train"), predictions(learn, "train")
    show_batch(learn)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal((generator or torch.default_generator).get_state(), state)
    assert torch.equal(torch.cat([y for _, y in loader]), first.labels)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 37, 100])
def test_count_takes_the_first(count):
    learn, all_of_them = learner(), predictions(learner())
    found = predictions(learn, count=count, inputs=True)
    assert len(found.labels) == len(found.inputs) == len(found.losses) == len(found.positions) == min(count, 37)
    assert torch.equal(found.predictions, all_of_them.predictions[:count])


def test_count_reads_no_more_batches_than_it_needs():
    read = []

    class Counted(list):
        def __iter__(self):
            for batch in super().__iter__():
                read.append(1)
                yield batch

    x, y = data()
    learn = learner(given={"validation": Counted(zip(x.split(10), y.split(10), strict=True))})
    predictions(learn, count=11)
    assert len(read) == 2


class Fail(Callback):
    def __init__(self, error): self.error = error

    def after_batch(self, batch_num, epoch):
        if (epoch, batch_num) == (1, 1): raise self.error


@pytest.mark.parametrize("error", [CancelTrainException(), CancelEpochException(), RuntimeError("boom"), KeyboardInterrupt()])
def test_predictions_after_training_was_cut_short(error):
    fail = Fail(error)
    learn = learner(fail)
    try: learn.train(3, learning_rate=0.01)
    except (RuntimeError, KeyboardInterrupt): assert not isinstance(error, CancelTrainException)
    x, y = data(37, 1)
    found = predictions(learn)
    torch.testing.assert_close(found.predictions, by_hand(learn.model, x))
    assert torch.equal(found.labels, y)
    for do in LOOKS: do(learn)


def test_a_model_that_cannot_be_copied():
    learn = learner()
    learn.model.held = learn.model[1].weight * 2  # deepcopy refuses a tensor of a graph
    with pytest.raises(RuntimeError): deepcopy(learn.model)
    assert predictions(learn).predictions.shape == (37, 4)


def test_losses_that_are_not_numbers_are_no_news():
    learn = learner()
    with torch.no_grad(): learn.model[1].weight.fill_(torch.nan)
    assert predictions(learn).losses.isnan().all()
    assert predictions(learn, "test").losses.isnan().all()


# The learner's own ways

class Swap(Callback):
    """Other weights for validation and test, as averaged ones."""

    def before_validation(self, model):
        self.kept = deepcopy(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters(): parameter.mul_(0.5)

    def cleanup_validation(self, model): model.load_state_dict(self.kept)

    before_test, cleanup_test = before_validation, cleanup_validation


@pytest.mark.parametrize("phase", ["train", "validation", "test"])
def test_steering_callbacks_steer(phase):
    swap = Swap()
    learn = learner(swap)
    x = predictions(learner(), phase, inputs=True).inputs
    halved = deepcopy(learn.model)
    with torch.no_grad():
        for parameter in halved.parameters(): parameter.mul_(0.5)
    torch.testing.assert_close(predictions(learn, phase).predictions, by_hand(halved, x))
    assert not torch.equal(predictions(learner(), phase).predictions, predictions(learn, phase).predictions)


def test_the_learners_own_methods_are_used():
    class Own(Learner):
        def prepare(self):
            super().prepare()
            self.data = self.data * 2

        def predict(self):
            super().predict()
            self.predictions = self.predictions + 1

    learn = learner(cls=Own)
    x, _ = data(37, 1)
    found = predictions(learn, inputs=True)
    torch.testing.assert_close(found.predictions, by_hand(learn.model, x * 2) + 1)
    assert torch.equal(found.inputs, x * 2)


def test_watchers_have_no_part_in_it(capsys):
    calls = []

    class Watcher(Callback):
        watches = True

        def before_validation(self): calls.append(1)

    learn = learner([Progress(), Metrics(accuracy=lambda p, y: (p.argmax(1) == y).float().mean()), Watcher()])
    for do in LOOKS: do(learn)
    assert not calls and capsys.readouterr().out == ""
    learn.validate()
    assert calls and "accuracy" in capsys.readouterr().out


def test_a_cancelled_batch_is_left_out_and_counted():
    class Skip(Callback):
        def before_validation_batch(self, batch_num):
            if batch_num == 1: raise CancelBatchException

    found, whole = predictions(learner(Skip())), predictions(learner())
    assert found.positions.tolist() == [*range(16), *range(32, 37)]
    assert torch.equal(found.predictions, whole.predictions[found.positions])


class Nested(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.inner, self.form = network(), form

    def forward(self, x): return self.form(self.inner(x))


def first_loss(output, labels, reduction="mean"): return F.cross_entropy(output[0], labels, reduction=reduction)


def test_nested_outputs_and_inputs():
    learn = learner(model=Nested(lambda p: (p, {"twice": 2 * p, "no": None})), loss_func=first_loss)
    found, plain = predictions(learn), predictions(learner())
    torch.testing.assert_close(found.predictions[0], plain.predictions)
    torch.testing.assert_close(found.predictions[1]["twice"], 2 * plain.predictions)
    torch.testing.assert_close(found.losses, plain.losses)
    assert found.predictions[1]["no"] is None

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, a, b): return self.inner(a + b)

    x, y = data()
    several = learner(model=Two(), given={"validation": list(zip(x.split(20), x.split(20), y.split(20), strict=True))})
    found = predictions(several, inputs=True)
    assert torch.equal(found.inputs[1], x)
    best = top_losses(several, count=3)
    assert torch.equal(best.inputs[0], x[best.positions])
    assert len(titles(show_predictions(several, count=5))) == 5


@pytest.mark.parametrize("size", [1, 20, 50, 1000])
def test_new_data_come_out_as_the_model_says(size):
    x, _ = data()
    learn = learner()
    learn.train(1, learning_rate=0.01)
    with torch.no_grad(): expected = by_hand(learn.model, x)
    torch.testing.assert_close(predict(learn, x, size), expected)
    assert learn.model.training and not predict(learn, x).requires_grad


def test_new_data_in_every_form():
    x, expected = data()[0], predict(learner(), data()[0])

    class Two(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.inner, self.form = network(), form

        def forward(self, a, b): return self.form(self.inner(a + b))

    two = learner(model=Two(lambda p: (p, {"twice": 2 * p})))
    for inputs in ((x, 0 * x), [x, 0 * x], {"b": 0 * x, "a": x}):
        first, more = predict(two, inputs, 20)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(more["twice"], 2 * expected)
    logits = learner(model=Two(lambda p: SimpleNamespace(logits=p)), loss_func=None)
    torch.testing.assert_close(predict(logits, {"a": x, "b": 0 * x}), expected)


def test_new_data_meet_what_steers_but_no_loss_and_no_watcher():
    def loss_func(*_): raise AssertionError("there are no labels")
    x, seen = data()[0], []
    learn = learner([ema := EMA(0.5), MixedPrecision()])
    learn.train(2, learning_rate=0.05)
    learn.add(Metrics(accuracy=loss_func))
    learn.loss_func = loss_func
    learn.on("after_predict", lambda predictions: seen.append(predictions.dtype))
    found = predict(learn, x)
    assert seen == [torch.bfloat16] and found.dtype == torch.bfloat16
    raw = by_hand(learn.model, x)
    learn.remove(ema)
    assert (found - raw).abs().max() > 2 * (predict(learn, x) - raw).abs().max()  # the averaged weights are others


def test_new_data_end_before_what_needs_losses():
    seen = []

    class Reads(Callback):
        def before_validation(self): seen.append("before")
        def after_validation_batch(self, loss): seen.append(loss)
        def after_validation(self, results): seen.append(results["validation_loss"])
        def cleanup_validation(self): seen.append("cleanup")

    x = data()[0]
    torch.testing.assert_close(predict(learner(Reads()), x, 20), predict(learner(), x))
    assert seen == ["before", "cleanup"]
    cancelled_late = learner([Reads(), CancelsLast()])
    with pytest.raises(ValueError, match="1 of 3 batches"): predict(cancelled_late, x, 20)
    assert seen == ["before", "cleanup"] * 2


class CancelsLast(Callback):
    def before_validation_batch(self, batch_num):
        if batch_num == 2: raise CancelBatchException


@pytest.mark.parametrize("do", [predictions, predict_new, top_losses, confusion_matrix], ids=lambda f: f.__name__)
def test_what_asks_for_fixtures_of_watchers_still_steers(do):
    calls = []

    class Gives(Callback):
        watches = True
        @provides("train")
        def run(self):
            calls.append("train")
            yield "the run"
        @provides("validation")
        def share(self):
            calls.append("share")
            try: yield 0.5
            finally: calls.append("end")
        def before_validation(self): calls.append("watched")

    class Asks(Swap):
        def after_epoch(self, run, epoch): calls.append(run)
        def before_validation(self, model, share):
            super().before_validation(model)
            calls.append(share)

    learn = learner([Gives(), Asks()])
    callbacks, given = learn.callbacks, []
    do(learn), given.append(predict(learn, data()[0]))
    assert calls == ["share", 0.5, "end"] * 2 and learn.callbacks == callbacks
    torch.testing.assert_close(given[0], predict(learner(Swap()), data()[0]))


@pytest.mark.parametrize("do", [predictions, predict_new, show_predictions, confusion_matrix, top_losses, show_top_losses],
                         ids=lambda f: f.__name__)
def test_a_look_after_a_failed_run_keeps_the_gradients(do):
    learn = learner(fail := Fail(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"): learn.train(2, learning_rate=0.01)
    learn.remove(fail)
    for parameter in learn.model.parameters(): parameter.grad = torch.ones_like(parameter)
    before = snapshot(learn)
    do(learn)
    after = snapshot(learn)
    for name in before: assert same(before[name], after[name]), name
    assert all(parameter.grad is not None for parameter in learn.model.parameters())


def test_looks_from_two_threads_do_not_mix():
    modes, errors = [], []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            time.sleep(0.002)
            modes.append(self.training)
            return self.inner(x)

    learn, x = learner(model=Slow()), data()[0]
    expected = by_hand(learn.model.inner, x)

    def look_often():
        try:
            for _ in range(6): torch.testing.assert_close(predict(learn, x, 10), expected)
        except BaseException as error: errors.append(error)

    threads = [threading.Thread(target=look_often) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors and not any(modes) and learn.model.training


def test_models_that_make_their_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, labels):
            logits = self.inner(x)
            return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))

    x, y = data()
    batches = [{"x": a, "labels": b} for a, b in zip(x.split(20), y.split(20), strict=True)]
    learn = learner(model=Own(), loss_func=None, given={"train": batches, "validation": batches})
    found = predictions(learn)
    torch.testing.assert_close(found.predictions, by_hand(learn.model.inner, x))
    assert torch.equal(found.labels, y) and found.losses is None
    show_batch(learn), show_predictions(learn), confusion_matrix(learn)
    with pytest.raises(ValueError, match="gives no loss for each example"): top_losses(learn)


@pytest.mark.parametrize(("form", "message"), [
    (lambda p: SimpleNamespace(scores=p), "predictions are a SimpleNamespace; they must be tensors with a row for each example"),
    (lambda p: (p, "words"), "predictions hold a str; they must be tensors"),
    (lambda p: (p, p.mean()), "predictions hold a scalar tensor; they must be tensors"),
])
def test_outputs_that_cannot_be_kept(form, message):
    learn = learner(model=Nested(form), loss_func=lambda p, y: torch.zeros(()))
    with pytest.raises(TypeError, match=message) as error: predictions(learn)
    assert "\n" not in str(error.value)


def test_outputs_of_several_shapes():
    sequences = [(torch.randn(4, length, 3), torch.randint(0, 2, (4,))) for length in (5, 7)]
    learn = learner(model=nn.Linear(3, 2), loss_func=lambda p, y: F.cross_entropy(p.mean(1), y), given={"test": sequences})
    with pytest.raises(ValueError, match=r"predictions differ from batch to batch, \(4, 5, 2\) and then \(4, 7, 2\)"):
        predictions(learn, "test")
    assert predictions(learn, "test", count=4).predictions.shape == (4, 5, 2)


def test_predictions_are_copies():
    class Reuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.buffer = nn.Parameter(torch.ones(())), torch.zeros(10, 2)

        def forward(self, x): return self.buffer.copy_(x) * 1 if self.training else self.buffer.copy_(x)

    x, y = torch.randn(40, 2), torch.randint(0, 2, (40,))
    given = {"validation": list(zip(x.split(10), y.split(10), strict=True))}
    found = predictions(learner(model=Reuses(), given=given))
    assert torch.equal(found.predictions, x)


# The loss of each example

LOGITS, TARGETS = torch.linspace(-2, 1, 24).sin().mul(3).reshape(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])


@pytest.mark.parametrize(("loss_func", "p", "y", "expected"), [
    (F.cross_entropy, LOGITS, TARGETS, F.cross_entropy(LOGITS, TARGETS, reduction="none")),
    (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, TARGETS, F.cross_entropy(LOGITS, TARGETS, reduction="none", label_smoothing=0.1)),
    (nn.CrossEntropyLoss(torch.arange(1.0, 5)), LOGITS, TARGETS, F.cross_entropy(LOGITS, TARGETS, torch.arange(1.0, 5), reduction="none")),
    (F.mse_loss, LOGITS, LOGITS * 2, LOGITS.square().mean(1)),
    (nn.MSELoss(reduction="sum"), LOGITS, LOGITS * 2, LOGITS.square().sum(1)),
    (nn.KLDivLoss(reduction="batchmean"), LOGITS.log_softmax(1), LOGITS.softmax(1).flip(1), (LOGITS.softmax(1).flip(1) * (LOGITS.softmax(1).flip(1).log() - LOGITS.log_softmax(1))).sum(1)),
    (lambda p, y: F.mse_loss(p, y), LOGITS, LOGITS, None),
    (nn.Module(), LOGITS, LOGITS, None),
    (None, LOGITS, TARGETS, None),
    (lambda p, y, reduction="mean": p.mean(), LOGITS, TARGETS, None),
], ids=["function", "smoothed", "weighted", "several", "summed", "batchmean", "lambda", "module", "none", "scalar"])
def test_example_losses(loss_func, p, y, expected):
    reduction = getattr(loss_func, "reduction", None)
    found = example_losses(loss_func, p, y)
    if expected is None: assert found is None
    else: torch.testing.assert_close(found, expected)
    assert getattr(loss_func, "reduction", None) == reduction  # the module is as it was


# Top losses

@pytest.mark.parametrize("count", [1, 5, 16, 37, 99])
def test_top_losses_are_the_highest(count):
    learn = learner()
    learn.train(2, learning_rate=0.01)
    x, y = data(37, 1)
    losses = F.cross_entropy(by_hand(learn.model, x), y, reduction="none")
    expected, order = losses.topk(min(count, 37))
    best = top_losses(learn, count=count)
    torch.testing.assert_close(best.losses, expected)
    assert best.positions.tolist() == order.tolist()
    assert torch.equal(best.inputs, x[order]) and torch.equal(best.labels, y[order])
    torch.testing.assert_close(best.predictions, by_hand(learn.model, x)[order])


def test_a_loss_that_is_not_a_number_comes_first():
    x, y = data(37, 1)
    x[23] = torch.nan
    best = top_losses(learner(given={"validation": TensorLoader((x, y), 16)}), count=2)
    assert best.positions[0] == 23 and best.losses[0].isnan() and best.losses[1].isfinite()


def test_top_losses_of_what_is_no_picture():
    x, y = torch.randn(30, 5), torch.randn(30, 1)
    learn = learner(model=nn.Linear(5, 1), loss_func=F.mse_loss, given={"validation": TensorLoader((x, y), 7)})
    best = top_losses(learn, count=4)
    losses = (by_hand(learn.model, x) - y).square().flatten()
    assert best.positions.tolist() == losses.topk(4).indices.tolist()
    text = repr(best)
    assert text.startswith("Predictions for 4 examples:") and f"{best.losses[0]:.4f}" in text and "label" in text
    assert "<table>" in best._repr_html_()
    with pytest.raises(TypeError, match="the inputs are not images"): show_top_losses(learn)


# Confusion

@pytest.mark.parametrize("classes", [2, 4, 11])
def test_confusion_counts_as_sklearn(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes - 1, (300,), generator=generator)  # one class has no example
    scores = torch.randn(300, classes, generator=generator)
    expected = oracle_confusion(labels, scores.argmax(1), labels=range(classes))
    assert confusion(scores, labels).tolist() == expected.tolist()
    assert confusion(scores.argmax(1), labels, classes).tolist() == expected.tolist()
    assert confusion(scores.argmax(1).int(), labels.int()).tolist() == expected.tolist()


def test_confusion_of_pictures_and_of_two_classes():
    scores, labels = torch.randn(3, 4, 5, 6), torch.randint(0, 4, (3, 5, 6))
    expected = oracle_confusion(labels.flatten(), scores.argmax(1).flatten(), labels=range(4))
    assert confusion(scores, labels).tolist() == expected.tolist()
    assert confusion(torch.tensor([True, False, True]), torch.tensor([1, 0, 0])).tolist() == [[1, 1], [0, 1]]


def test_the_picture_of_the_matrix():
    learn = learner()
    x, y = data(37, 1)
    expected = oracle_confusion(y, by_hand(learn.model, x).argmax(1), labels=range(CLASSES))
    ax = confusion_matrix(learn, classes=[*"abcd"])
    cells = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in ax.texts}
    assert cells == {(i, j): str(expected[i, j]) for i in range(4) for j in range(4) if expected[i, j]}
    assert [text.get_text() for text in ax.get_yticklabels()] == [*"abcd"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")
    assert ax.get_title() == f"{np.trace(expected)} of 37 right"
    shares = confusion_matrix(learn, normalise=True)
    cells = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in shares.texts}
    rows = expected / expected.sum(1, keepdims=True)
    assert cells == {(i, j): f"{100 * rows[i, j]:.0f}%" for i in range(4) for j in range(4) if rows[i, j]}
    np.testing.assert_allclose(ax.images[0].get_array(), rows)


def test_a_class_without_examples_and_many_classes():
    ax = plot_confusion(torch.tensor([[3, 1], [0, 0]]), normalise=True)
    assert titles(ax) == ["75%", "25%"]
    assert not plot_confusion(torch.eye(40)).texts
    assert titles(plot_confusion(torch.zeros(3, 3))) == []
    assert titles(plot_confusion(torch.tensor([[999, 1], [0, 5]]), normalise=True)) == ["100%", "100%"]


@pytest.mark.parametrize("size", [(8, 3.5), (3, 2), (12, 6)])
@pytest.mark.parametrize("normalise", [False, True])
def test_numbers_stay_in_their_cells(size, normalise):
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    ax = plot_confusion(torch.full((10, 10), 1234), [f"a long name {i}" for i in range(10)], normalise, axes[0])
    figure.draw_without_rendering()
    room = ax.get_window_extent().width / 10
    points = ax.texts[0].get_size()
    if points > 4: assert all(text.get_window_extent().width <= room for text in ax.texts)
    else: assert size[0] <= 8  # too small to read, whatever one does


# Pictures

def drawn(ax): return [np.asarray(image.get_array()) for image in ax.images]


def test_show_batch_shows_the_batch():
    learn = learner()
    x, y = data(50, 0)
    order = learn.dataloaders["train"].order(0)
    ax = show_batch(learn, count=9)
    assert titles(ax) == [str(label) for label in y[order[:9]].tolist()]
    for image, pixels in zip(x[order[:9], 0], drawn(ax), strict=True):
        np.testing.assert_allclose(pixels, image)
    assert len(drawn(show_batch(learn, count=99))) == 16
    x, y = data(21, 2)
    assert titles(show_batch(learn, "test", 5)) == [str(label) for label in y[:5].tolist()]
    assert titles(show_batch(learn, "validation", 2, ["zero", "one", "two", "three"])) == [
        ["zero", "one", "two", "three"][label] for label in data(37, 1)[1][:2]]


def test_show_batch_shows_what_goes_to_the_model():
    class Augment(Callback):
        def after_prepare(self, learn):
            if learn.phase == "train": learn.data = learn.data + 100

        def before_predict(self, learn): learn.data = learn.data * 2

    learn = learner(Augment())
    x, _ = data(50, 0)
    order = learn.dataloaders["train"].order(0)
    np.testing.assert_allclose(drawn(show_batch(learn, count=1))[0], (x[order[0], 0] + 100) * 2, rtol=1e-5)
    np.testing.assert_allclose(drawn(show_batch(learn, "validation", count=1))[0], data(37, 1)[0][0, 0] * 2, rtol=1e-5)


def test_show_batch_takes_no_step_and_no_test():
    calls = []

    class Tell(Callback):
        def before_step(self): calls.append("step")

        def before_predict(self): calls.append("predict")

        def before_test(self): calls.append("test")

        def before_validation(self): calls.append("validation")

    show_batch(learner(Tell()))
    assert calls == ["predict"]


def test_a_batch_routine_of_ones_own():
    class Own(Learner):
        def train_batch(self):
            self.act("prepare")
            self.predictions = self.model(self.data)
            self.loss = self.loss_func(self.predictions, self.labels)
            self.act("backward", "step")

        def validation_batch(self):
            self.act("prepare")
            self.loss = self.loss_func(self.model(self.data), self.labels)

    learn = learner(cls=Own)
    before = deepcopy(learn.model.state_dict())
    assert len(titles(show_batch(learn, count=4))) == 4
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    with pytest.raises(ValueError, match=r"this learner's own batch routine leaves no learn\.predictions"): predictions(learn)


@pytest.mark.parametrize(("images", "low", "high"), [
    (torch.tensor([0.0, 0.1]), 0, 1),  # dark ones look dark
    (torch.tensor([-2.0, 3.0]), -2, 3),
    (torch.tensor([0.0, 255.0]), 0, 255),
    (torch.tensor([0.0, torch.nan, -1.0]), -1, 0),
    (torch.tensor([0, 300]), 0, 300),
])
def test_black_and_white(images, low, high):
    x = images[torch.arange(36 * 4) % len(images)].reshape(4, 1, 6, 6)
    x = torch.cat([x, x[:1].clone().fill_(images[0])])  # one that is all the same
    ax = show_batch(learner(given={"validation": [(x, torch.arange(5))]}), "validation")
    assert {image.get_clim() for image in ax.images} == {(low, high)}


def test_bytes_are_shown_as_bytes():
    x = torch.randint(0, 200, (4, 3, 6, 6), dtype=torch.uint8)
    ax = show_batch(learner(given={"validation": [(x, torch.arange(4))]}), "validation")
    np.testing.assert_array_equal(drawn(ax)[0], x[0].permute(1, 2, 0))


def test_show_predictions_colours_right_and_wrong():
    learn = learner()
    x, y = data(37, 1)
    taken_for = by_hand(learn.model, x).argmax(1)[:12].tolist()
    names = ["cat", "dog", "cow", "hen"]
    ax = show_predictions(learn, count=12, classes=names)
    expected = [(names[p], "green") if p == t else (f"{names[p]}\nis {names[t]}", "red") for p, t in zip(taken_for, y.tolist(), strict=False)]
    assert [(text.get_text(), text.get_color()) for text in ax.texts] == expected
    assert {"green", "red"} == {colour for _, colour in expected}


def test_pictures_of_numbers_and_of_pictures():
    x, _ = data()
    learn = learner(model=network(1), loss_func=F.mse_loss, given={"validation": TensorLoader((x, torch.full((50, 1), 2.5)))})
    value = by_hand(learn.model, x[:1]).item()
    assert titles(show_predictions(learn, count=1)) == [f"{value:.3g}\nis 2.5"]
    assert titles(show_batch(learn, "validation", count=1)) == ["2.5"]
    repeat = learner(model=nn.Conv2d(1, 1, 1), loss_func=F.mse_loss, given={"validation": TensorLoader(x)})
    best = top_losses(repeat, count=2)
    assert titles(show_top_losses(repeat, count=2)) == [f"loss {loss:.3g}" for loss in best.losses.tolist()]
    assert titles(show_batch(repeat, "validation", count=2)) in ([], ["", ""])
    with pytest.raises(ValueError, match="neither scores of classes and the classes, nor a number"): show_predictions(repeat)


def test_every_picture_goes_where_it_is_told():
    learn = learner()
    for do in (show_batch, show_predictions, confusion_matrix, show_top_losses):
        _, axes = plt.subplots(1, 2)
        assert do(learn, ax=axes[1]) is axes[1]
        assert axes[1].images and not axes[0].images


# Names of classes

def test_where_names_come_from():
    learn = learner(given=digits())
    assert class_names(learn, "train") == [*"0123456789"]
    assert class_names(learn, "train", ["a"]) == ["a"]
    named = TensorDataset(*data())
    named.classes = ["p", "q", "r", "s"]
    parts = torch.utils.data.Subset(named, range(30))
    learn = learner(given={"train": DataLoader(parts, 10), "validation": list(DataLoader(named, 10))})
    assert class_names(learn, "train") == ["p", "q", "r", "s"]
    assert class_names(learn, "validation") is None
    assert set(titles(show_batch(learn))) <= set("pqrs")


def test_a_table_of_predictions_shows_names():
    named = TensorDataset(*data())
    named.classes = ["p", "q", "r", "s"]
    learn = learner(given={"train": DataLoader(named, 10), "validation": list(DataLoader(named, 10))})
    for found in (predictions(learn, "train"), top_losses(learn, "train")):
        table = found.table()
        assert table["label"] == ["pqrs"[label] for label in found.labels[:10]]
        assert table["predicted"] == ["pqrs"[best] for best in found.predictions.argmax(1)[:10]]
    assert set(predictions(learn, "validation").table()["label"]) <= set(range(4))  # which has no names
    named.classes = ["p"]  # too few
    assert set(predictions(learn, "train").table()["label"]) <= set(range(4))
    named.classes = 4
    assert predictions(learn, "train").classes is None


# Nothing is changed

class Steer(Callback):
    def after_loss(self): torch.rand(1), random.random(), np.random.rand()


def snapshot(learn):
    return {
        "weights": {name: value.clone() for name, value in learn.model.state_dict().items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in learn.model.named_parameters()},
        "modes": [module.training for module in learn.model.modules()],
        "moments": deepcopy(learn.optimiser.state_dict()) if isinstance(learn.optimiser, torch.optim.Optimizer) else learn.optimiser,
        "history": deepcopy(learn.history.rows), "steps": deepcopy(learn.history.steps),
        "results": dict(learn.results), "times": deepcopy(learn.times), "callbacks": learn.callbacks,
        "epochs": [loader.epoch for loader in learn.dataloaders.values()],
        "rng": rng_state(),
        "rest": {name: value for name, value in vars(learn).items() if isinstance(value, int | str | float | bool)},
        "names": set(vars(learn)), "objects": [id(value) for value in (learn.model, learn.history, learn.results, learn.dataloaders)],
        "grad": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Broken(Callback):
    def after_loss(self): raise RuntimeError("broken")


@pytest.mark.parametrize("phase", ["train", "validation", "test"])
@pytest.mark.parametrize("do", LOOKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("trained", [True, False])
def test_a_look_changes_nothing(do, phase, trained):
    learn = learner([Steer(), Metrics(accuracy=lambda p, y: (p.argmax(1) == y).float().mean())])
    learn.history.keep_steps = True
    if trained: learn.train(2, learning_rate=0.01)
    learn.model[2].eval()  # modes that are mixed
    learn.model[1].weight.grad = torch.ones_like(learn.model[1].weight)
    before = snapshot(learn)
    do(learn, phase)
    after = snapshot(learn)
    for name in before: assert same(before[name], after[name]), name
    learn.add(Broken())
    before = snapshot(learn)
    if do not in (show_batch, predict_new):  # which have no loss
        with pytest.raises(RuntimeError, match="broken"): do(learn, phase)
    after = snapshot(learn)
    for name in before: assert same(before[name], after[name]), name


def test_training_goes_on_as_if_nobody_had_looked():
    def run(looks):
        torch.manual_seed(7)
        learn = learner(Steer())
        for _ in range(2):
            learn.train(2, learning_rate=0.01)
            for do in looks:
                for phase in ("train", "validation", "test"): do(learn, phase)
            plt.close("all")
        return learn

    plain, looked = run([]), run(LOOKS)
    assert same(dict(plain.model.state_dict()), dict(looked.model.state_dict()))
    assert plain.history.rows == looked.history.rows


def test_nothing_is_kept_alive():
    learn = learner()
    kept = [do(learn) for do in LOOKS]
    model = weakref.ref(learn.model)
    gc.disable()
    try:
        del learn
        assert model() is None
    finally: gc.enable()
    assert kept


# Bad input

ITERATOR = iter([data()])

BAD = [
    (lambda: predictions(nn.Linear(1, 1)), TypeError, "learn is a Linear; pass a Learner"),
    (lambda: predictions(learner(), "valid"), ValueError, "phase is 'valid'; it must be one of ['train', 'validation', 'test']; did you mean validation?"),
    (lambda: predict(nn.Linear(1, 1), data()[0]), TypeError, "learn is a Linear; pass a Learner"),
    (lambda: predict(learner(), data()[0], 0), ValueError, "batch_size is 0;"),
    *[(lambda inputs=inputs: predict(learner(), inputs), ValueError, "inputs is empty; give at least one example")
      for inputs in (data()[0][:0], (), {}, [], None, (data()[0][:0], data()[0][:0]))],
    (lambda: predict(learner(), (data()[0], data(3)[0])), ValueError, "inputs have [3, 50] rows"),
    (lambda: predict(learner(), "text"), TypeError, "inputs are a str; they must be tensors with a row for each example"),
    (lambda: predict(learner(), torch.tensor(1.0)), TypeError, "inputs are a scalar tensor"),
    (lambda: predict(learner(), [1, 2]), TypeError, "inputs hold an int; they must be tensors with a row for each example, alone or in tuples, lists and mappings; convert with torch.as_tensor"),
    (lambda: predict(learner(), np.zeros((3, 1, 6, 6))), TypeError, "inputs are an ndarray; they must be tensors with a row for each example, alone or in tuples, lists and mappings; convert with torch.as_tensor"),
    (lambda: predict(learner(model=nn.Linear(4, 3)), torch.randn(4)), ValueError, "predictions have shape (3,) for 4 examples; the model must give a row for each (inputs[None] makes a batch of a single example)"),
    (lambda: predict(learner(model=Nested(lambda p: (p, p[:1]))), data()[0]), ValueError, "predictions have shape (50, 4), (1, 4) for 50 examples; the model must give a row for each"),
    (lambda: predict(learner(cls=OwnRoutine), data()[0]), ValueError, "1 of 1 batches did not reach the action predict: a callback cancels them, or the learner's own validation_batch leaves it out"),
    (lambda: predict(learner(SkipsSecond()), data()[0], 20), ValueError, "1 of 3 batches did not reach the action predict: a callback cancels them"),
    (lambda: show_batch(learner(), "trian"), ValueError, "did you mean train?"),
    (lambda: confusion_matrix(learner(), ["test"]), ValueError, "phase is ['test']; it must be one of"),
    (lambda: show_top_losses(learner(given={"train": [data()]})), ValueError, "dataloaders has no \"validation\" loader, only ['train']; look at one of these"),
    (lambda: predictions(learner(given={"train": []}), "train"), ValueError, "dataloaders[\"train\"] is empty; give it at least one batch"),
    (lambda: predictions(learner(given={"train": ITERATOR}), "train"), ValueError, "dataloaders[\"train\"] is an iterator, and reading it would use it up"),
    (lambda: predictions(learner(), count=0), ValueError, "count is 0; it must be a whole number of at least 1"),
    (lambda: show_batch(learner(), count=0), ValueError, "count is 0;"),
    (lambda: show_predictions(learner(), count=2.5), ValueError, "count is 2.5;"),
    (lambda: show_predictions(learner(), count=None), ValueError, "count is None;"),
    (lambda: top_losses(learner(), count=-1), ValueError, "count is -1;"),
    (lambda: show_top_losses(learner(), count=True), ValueError, "count is True;"),
    (lambda: show_predictions(learner(), classes=["a", "b", "c"]), ValueError, "classes has 3 names, but there are 4 classes; pass one name for each"),
    (lambda: show_predictions(learner(), classes=[*"abcde"]), ValueError, "classes has 5 names, but there are 4 classes"),
    (lambda: show_top_losses(learner(), classes=["a"]), ValueError, "classes has 1 names, but there are 4 classes"),
    (lambda: confusion_matrix(learner(), classes=[]), ValueError, "classes has 0 names, but there are 4 classes"),
    (lambda: show_batch(learner(), classes=["a", "b"]), ValueError, "label 3 has no name: classes has 2 names, for labels from 0 to 1"),
    (lambda: show_batch(learner(), classes="abcd"), TypeError, "classes is 'abcd'; pass a list with the name of each class"),
    (lambda: confusion_matrix(learner(), classes={0: "a"}), TypeError, "classes is {0: 'a'}; pass a list"),
    (lambda: confusion_matrix(learner(), classes=4), TypeError, "classes is 4; pass a list"),
    (lambda: confusion_matrix(learner(), normalise="true"), TypeError, "normalise is 'true'; it must be True or False"),
    (lambda: confusion_matrix(learner(model=network(1), loss_func=F.mse_loss, given={"validation": [(data()[0], torch.randn(50, 1))]})), ValueError, "predictions of shape (50, 1) and float32 are not Nxclasses scores; pass classes to confusion"),
    (lambda: confusion_matrix(learner(loss_func=F.mse_loss, given={"validation": [(data()[0], torch.randn(50, 4))]})), ValueError, "labels of shape (50, 4) and float32 are not classes for predictions of shape (50, 4)"),
    (lambda: confusion(torch.randn(3, 2), torch.tensor([0, 1, 2])), ValueError, "labels go from 0 to 2, but the 2 classes go from 0 to 1"),
    (lambda: confusion(torch.randn(3, 2), torch.tensor([0, 1, -100])), ValueError, "labels go from -100 to 1, but the 2 classes"),
    (lambda: confusion(torch.randn(3, 2), torch.tensor([0, 1])), ValueError, "they must be whole numbers of shape (3,)"),
    (lambda: confusion(torch.tensor([0, 5]), torch.tensor([0, 1]), 3), ValueError, "predictions go from 0 to 5, but the 3 classes go from 0 to 2"),
    (lambda: confusion(torch.tensor([0]), torch.tensor([0]), 0), ValueError, "num_classes is 0;"),
    (lambda: confusion([0, 1], torch.tensor([0, 1])), TypeError, "predictions is a list; pass a tensor"),
    (lambda: confusion(torch.tensor([0, 1]), [0, 1]), TypeError, "labels is a list; pass a tensor"),
    (lambda: confusion(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), ValueError, "labels is empty"),
    (lambda: plot_confusion(torch.zeros(2, 3)), ValueError, "matrix must be a square tensor"),
    (lambda: plot_confusion([[1]]), ValueError, "matrix must be a square tensor"),
    (lambda: plot_confusion(torch.eye(2), ["a"]), ValueError, "classes has 1 names, but there are 2 classes"),
    (lambda: plot_confusion(torch.eye(2), ax=plt.subplots(1, 2)[1]), TypeError, "ax must be one matplotlib Axes"),
    (lambda: show_batch(learner(model=nn.Linear(5, 4), given={"train": [(torch.randn(8, 5), torch.zeros(8).long())]})), TypeError, "the inputs are not images: their shape is (8, 5) and not Nx1xHxW"),
    (lambda: show_batch(learner(model=nn.Linear(5, 4), given={"train": [(torch.randn(8, 2, 6, 6), torch.zeros(8).long())]})), TypeError, "the inputs are not images: their shape is (8, 2, 6, 6)"),
    (lambda: show_predictions(learner(model=nn.Linear(5, 4), given={"validation": [(torch.randn(8, 5), torch.zeros(8).long())]})), TypeError, "the inputs are not images"),
    (lambda: top_losses(learner(loss_func=lambda p, y: F.cross_entropy(p, y))), ValueError, "loss_func <lambda> gives no loss for each example; give it a parameter `reduction`"),
    (lambda: predictions(learner(Skips())), ValueError, "no batch of dataloaders[\"validation\"] was completed; does a callback cancel them all?"),
    (lambda: show_batch(learner(SkipsTraining())), ValueError, "no batch of dataloaders[\"train\"] reached the model"),
]


class OwnRoutine(Learner):
    def validation_batch(self): self.loss, self.batch_size = torch.tensor(0.0), 1


class Skips(Callback):
    def before_validation_batch(self): raise CancelBatchException


class SkipsSecond(Callback):
    def before_validation_batch(self, batch_num):
        if batch_num == 1: raise CancelBatchException


class SkipsTraining(Callback):
    def before_batch(self): raise CancelBatchException


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error: call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_not_inside_a_run():
    errors = []
    learn = learner()

    @learn.on("after_batch")
    def look_now(learn):
        for do in LOOKS:
            try: do(learn)
            except RuntimeError as error: errors.append(str(error))

    learn.train(1, learning_rate=0.01)
    assert len(errors) == 4 * len(LOOKS) and set(errors) == {"the learner is in the middle of a run; look at it afterwards"}


def test_the_memory_of_top_losses_does_not_grow():
    held = []

    class Watched(list):
        def __iter__(self):
            for number in range(40):
                x = torch.randn(8, 1, 6, 6)
                held.append(weakref.ref(x))
                yield x, torch.randint(0, CLASSES, (8,))
                del x
                alive = sum(reference() is not None for reference in held)
                assert alive <= 3, (number, alive)

        def __len__(self): return 40

    best = top_losses(learner(given={"validation": Watched()}), count=5)
    assert len(best.inputs) == 5
    assert best.inputs.untyped_storage().nbytes() == 5 * 36 * 4
