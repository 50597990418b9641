"""Metrics against the same metrics over all predictions at once, and its faults, bounds and costs."""

import gc
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from copy import deepcopy
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from learner.base.warned import quiet
from learner.loop.learner import Learner
from learner.loop.stages import Callback, CancelBatchException, CancelEpochException, CancelTrainException
from learner.watch import metrics as module
from learner.watch.metrics import (
    BinaryAccuracy,
    BinaryAUROC,
    MeanSquaredError,
    MetricError,
    Metrics,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    PassMetrics,
    R2Score,
    WindowedMeanSquaredError,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchmetrics
    from torchmetrics import classification, regression

N = 1003  # ragged in every batch size below
torch.manual_seed(0)
LOGITS, CLASSES = torch.randn(N, 4), torch.randint(0, 4, (N,))
SCORES, TRUTH = torch.rand(N), torch.randint(0, 2, (N,))
SCORES = (SCORES + TRUTH * torch.linspace(0, 0.5, N)) / 1.5  # ordered, so that batches differ from each other
VALUES, TARGETS = torch.randn(N), torch.linspace(-1, 1, N)


class Given(nn.Module):
    """A model whose predictions are its inputs, and which can be trained."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


def zero_loss(predictions, labels):
    return predictions.sum() * 0.0


def batches(data, labels, size):
    return list(zip(data.split(size), labels.split(size), strict=True))


def given(data, labels, size, callbacks=None, phases=("train", "validation", "test")):
    loaders = {phase: batches(data, labels, size) for phase in phases}
    return Learner(Given(), torch.optim.SGD, zero_loss, loaders, callbacks, device="cpu")


def accuracy(predictions, labels):
    return (predictions.argmax(1) == labels).float().mean()


# Results

CASES = [
    (MulticlassAccuracy(), LOGITS, CLASSES),
    (MulticlassAccuracy(average="macro", num_classes=4), LOGITS, CLASSES),
    (MulticlassF1Score(average="macro", num_classes=4), LOGITS, CLASSES),
    (MulticlassAUROC(num_classes=4), LOGITS, CLASSES),
    (BinaryAUROC(), SCORES, TRUTH),
    (BinaryAccuracy(), SCORES, TRUTH),
    (MeanSquaredError(), VALUES, TARGETS),
    (R2Score(), VALUES, TARGETS),
    (classification.MulticlassAccuracy(num_classes=4), LOGITS, CLASSES),
    (classification.MulticlassF1Score(num_classes=4), LOGITS, CLASSES),
    (classification.MulticlassAUROC(num_classes=4), LOGITS, CLASSES),
    (classification.BinaryAUROC(), SCORES, TRUTH),
    (classification.BinaryAUROC(thresholds=50), SCORES, TRUTH),
    (classification.MulticlassCalibrationError(num_classes=4), LOGITS.softmax(1), CLASSES),
    (classification.MulticlassMatthewsCorrCoef(num_classes=4), LOGITS, CLASSES),
    (classification.MulticlassCohenKappa(num_classes=4), LOGITS, CLASSES),
    (classification.BinaryHingeLoss(), SCORES, TRUTH),
    (regression.PearsonCorrCoef(), VALUES, TARGETS),
    (regression.R2Score(), VALUES, TARGETS),
    (regression.MeanAbsoluteError(), VALUES, TARGETS),
    (regression.ExplainedVariance(), VALUES, TARGETS),
]


@pytest.mark.parametrize("size", [1, 16, 100, N])
@pytest.mark.parametrize("metric, data, labels", CASES, ids=lambda value: type(value).__name__)
def test_equals_the_metric_over_all_predictions_at_once(metric, data, labels, size):
    if size == 1 and isinstance(metric, classification.BinaryHingeLoss | regression.PearsonCorrCoef):
        pytest.skip("torchmetrics cannot take the first example alone")
    whole = deepcopy(metric)
    with quiet(*module._TORCHEVALS): whole.update(data, labels)
    learn = given(data, labels, size, Metrics(it=metric))
    learn.train(1)
    for phase in ("train", "validation", "test"):
        assert learn.history[-1][f"{phase}_it"] == pytest.approx(float(whole.compute()), rel=2e-5, abs=1e-6)


def test_a_mean_of_batch_means_would_be_wrong():
    learn = given(SCORES, TRUTH, 16, Metrics(auroc=BinaryAUROC()))
    learn.train(1)
    of_batches = [BinaryAUROC().update(s, t).compute().item() for s, t in batches(SCORES, TRUTH, 16)]
    assert learn.history[-1]["train_auroc"] == pytest.approx(roc_auc_score(TRUTH, SCORES), abs=1e-6)
    assert abs(sum(of_batches) / len(of_batches) - roc_auc_score(TRUTH, SCORES)) > 0.005


def test_f1_is_that_of_sklearn():
    results = given(LOGITS, CLASSES, 32).validate(Metrics(f1=MulticlassF1Score(average="macro", num_classes=4)))
    assert results["validation_f1"] == pytest.approx(f1_score(CLASSES, LOGITS.argmax(1), average="macro"), abs=1e-6)


def test_a_function_is_averaged_over_the_examples():
    results = given(LOGITS, CLASSES, 100).test(Metrics(accuracy, number=lambda p, t: len(t)))
    assert results["test_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item(), abs=1e-6)
    assert results["test_number"] == pytest.approx((10 * 100 * 100 + 3 * 3) / N)


def test_columns_stand_right_after_the_losses_and_every_call_gives_them():
    learn = given(LOGITS, CLASSES, 100, Metrics(MulticlassAccuracy(), MulticlassAccuracy(k=2), second=accuracy))
    learn.train(2, validation_epochs=2)
    learn.train(1)
    names = ["multiclass_accuracy", "multiclass_accuracy_2", "second"]
    columns = [f"{phase}_{name}" for name in names for phase in ("train", "validation", "test")]
    assert learn.history.columns == ["epoch", "train_loss", "validation_loss", "test_loss", *columns]
    top1, top2 = MulticlassAccuracy(), MulticlassAccuracy(k=2)
    for metric in (top1, top2): metric.update(LOGITS, CLASSES)
    for row in learn.history:
        assert row["train_multiclass_accuracy"] == pytest.approx(top1.compute().item())
        assert row["train_multiclass_accuracy_2"] == pytest.approx(top2.compute().item())
    assert learn.history["validation_second"][0] is None
    assert all(type(value) in (int, float) for row in learn.history for value in row.values())
    assert list(learn.validate()) == ["validation_loss", *(f"validation_{name}" for name in names)]
    assert list(learn.test()) == ["test_loss", *(f"test_{name}" for name in names)]


def test_phases_choose_the_passes():
    learn = given(LOGITS, CLASSES, 100, [Metrics(a=accuracy, phases="train"), Metrics(a=accuracy, phases=["test"])])
    learn.train(1)
    assert learn.history.columns[4:] == ["train_a", "test_a"]


def test_objects_of_the_user_are_never_updated():
    used = MulticlassAccuracy()
    used.update(LOGITS[:10], CLASSES[:10])
    state = {name: value.clone() for name, value in used.state_dict().items()}
    results = given(LOGITS, CLASSES, 100).validate(Metrics(accuracy=used))
    assert all(torch.equal(value, state[name]) for name, value in used.state_dict().items())
    assert results["validation_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item())  # without the ten


class Output(Given):
    """A model whose output is an object, a mapping or a tuple, with a loss of its own where there are labels."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, labels=None):
        logits = super().forward(x)
        if labels is None: return self.form(logits=logits)
        return self.form(loss=logits.sum() * 0.0, logits=logits)


@pytest.mark.parametrize("form", [SimpleNamespace, dict], ids=["object", "mapping"])
def test_logits_of_a_model_that_computes_its_own_loss(form):
    loaders = {"train": [{"x": x, "labels": y} for x, y in batches(LOGITS, CLASSES, 32)]}
    learn = Learner(Output(form), torch.optim.SGD, None, loaders, Metrics(accuracy=MulticlassAccuracy()), device="cpu")
    learn.train(1)
    assert learn.history[-1]["train_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


@pytest.mark.parametrize("form", [SimpleNamespace, dict], ids=["object", "mapping"])
def test_a_metric_gets_the_very_object_that_the_loss_function_gets(form):
    seen = {"loss": set(), "metric": set()}

    def loss(output, labels):
        seen["loss"].add(type(output))
        return (output["logits"] if form is dict else output.logits).sum() * 0.0

    def metric(output, labels):
        seen["metric"].add(type(output))
        return 0.0

    learn = Learner(Output(form), torch.optim.SGD, loss, {"train": batches(LOGITS, CLASSES, 32)}, device="cpu")
    learn.train(1, callbacks=[Metrics(metric), Metrics(accuracy=MulticlassAccuracy(), of="logits")])
    assert seen["loss"] == seen["metric"] == {form}
    assert learn.history[-1]["train_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item())
    with pytest.raises((AttributeError, TypeError, ValueError), match=r"metric accuracy: predictions a \w+, labels \(32,\) \(Metrics\(..., of=...\) picks a part\)"):
        learn.train(1, callbacks=Metrics(accuracy=MulticlassAccuracy()))


def test_a_distribution_is_measured_as_it_is():
    class Policy(Given):
        def forward(self, x): return torch.distributions.Categorical(logits=super().forward(x))

    def entropy(distribution, labels): return distribution.entropy().mean()
    learn = Learner(Policy(), torch.optim.SGD, lambda d, y: -d.log_prob(y).mean(), {"train": batches(LOGITS, CLASSES, 32)},
                    Metrics(entropy, log_prob=lambda d, y: -d.log_prob(y).mean()), device="cpu")
    learn.train(1, 0.0)
    assert learn.history[-1]["train_entropy"] == pytest.approx(torch.distributions.Categorical(logits=LOGITS).entropy().mean().item(), rel=1e-5)
    assert learn.history[-1]["train_log_prob"] == pytest.approx(learn.history[-1]["train_loss"], rel=1e-6)


class Heads(Given):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        kind, size = super().forward(x), x.sum(1)
        return (kind, size) if self.form is tuple else {"kind": kind, "size": size} if self.form is dict else SimpleNamespace(kind=kind, size=size)


def heads_loss(output, labels):
    kind = output[0] if isinstance(output, tuple) else output["kind"] if isinstance(output, dict) else output.kind
    return kind.sum() * 0.0


@pytest.mark.parametrize("form, of", [(tuple, 0), (tuple, -2), (dict, "kind"), (SimpleNamespace, "kind"), (tuple, lambda p: p[0]),
                                      (dict, lambda p, y: (p["kind"], y))])
def test_a_metric_of_one_head(form, of):
    learn = Learner(Heads(form), torch.optim.SGD, heads_loss, {phase: batches(LOGITS, CLASSES, 32) for phase in ("train", "validation")},
                    Metrics(MulticlassAccuracy(), mine=accuracy, of=of), device="cpu")
    learn.train(1)
    for phase in ("train", "validation"):
        for name in ("multiclass_accuracy", "mine"):
            assert learn.history[-1][f"{phase}_{name}"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


@pytest.mark.parametrize("form", [tuple, dict])
def test_labels_in_the_same_form_are_picked_with_the_head(form):
    def labelled(x, y): return (y, x.sum(1) + 1) if form is tuple else {"kind": y, "size": x.sum(1) + 1}
    loader = [(x, labelled(x, y)) for x, y in batches(LOGITS, CLASSES, 32)]
    metrics = [Metrics(accuracy=MulticlassAccuracy(), of=0 if form is tuple else "kind"), Metrics(error=F.l1_loss, of=1 if form is tuple else "size")]
    results = Learner(Heads(form), torch.optim.SGD, heads_loss, {"validation": loader}, device="cpu").validate(metrics)
    assert results["validation_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item())
    assert results["validation_error"] == pytest.approx(1.0, rel=1e-5)


def test_labels_that_are_a_list_are_left_alone():
    def count(size, labels):
        assert len(labels) == len(size) and isinstance(labels[0], dict)
        return float(len(labels))
    loader = [(x, [{"box": row} for row in x]) for x, _ in batches(LOGITS, CLASSES, 100)]
    results = Learner(Heads(tuple), torch.optim.SGD, heads_loss, {"validation": loader}, device="cpu").validate(Metrics(count, of=1))
    assert results["validation_count"] == pytest.approx((10 * 100 * 100 + 3 * 3) / N)


def test_functions_weigh_by_the_batch_size_of_the_learner():
    def first(predictions, labels): return predictions[0, 0]
    learn = given(LOGITS, CLASSES, 100)
    learn.on("after_prepare", lambda learn: setattr(learn, "batch_size", 1 if learn.batch_num else 5))
    got = learn.validate(Metrics(first))["validation_first"]
    values = LOGITS[::100, 0].double()
    assert got == pytest.approx((5 * values[0] + values[1:].sum()).item() / (5 + 10), rel=1e-6)


# Several numbers

def test_a_number_for_each_class_is_a_column_for_each_class():
    learn = given(LOGITS, CLASSES, 100, Metrics(f1=MulticlassF1Score(average=None, num_classes=4), recall=classification.MulticlassRecall(4, average="none")))
    learn.train(1)
    expected = f1_score(CLASSES, LOGITS.argmax(1), average=None)
    for phase in ("train", "validation", "test"):
        assert [learn.history[-1][f"{phase}_f1_{i}"] for i in range(4)] == pytest.approx(expected, abs=1e-6)
        assert [f"{phase}_recall_{i}" in learn.history[-1] for i in range(5)] == [True] * 4 + [False]


def test_a_collection_is_its_metrics():
    def make(): return torchmetrics.MetricCollection({"accuracy": classification.MulticlassAccuracy(4), "recall": classification.MulticlassRecall(4)})
    unnamed, named = Metrics(make(), torchmetrics.MetricCollection([regression.R2Score()])), Metrics(all=make())
    assert list(unnamed.metrics) == ["accuracy", "recall", "r2_score"] and list(named.metrics) == ["all_accuracy", "all_recall"]
    results = given(LOGITS, CLASSES, 100).validate([Metrics(make()), named])
    whole = make()(LOGITS, CLASSES)
    for name in ("accuracy", "recall"):
        assert results[f"validation_{name}"] == results[f"validation_all_{name}"] == pytest.approx(whole[name].item(), rel=1e-5)


def test_mappings_and_matrices_are_columns():
    metrics = Metrics(range=torchmetrics.wrappers.MinMaxMetric(classification.MulticlassAccuracy(4, average="micro")),
                      table=classification.MulticlassConfusionMatrix(4), of_two=lambda p, y: {"low": p.min(), "mean": p.mean()})
    results = given(LOGITS, CLASSES, 100).validate(metrics)
    assert [results[f"validation_range_{key}"] for key in ("raw", "max", "min")] == pytest.approx([accuracy(LOGITS, CLASSES).item()] * 3)
    table = torch.tensor([[results[f"validation_table_{i}_{j}"] for j in range(4)] for i in range(4)])
    assert torch.equal(table, torch.bincount(CLASSES * 4 + LOGITS.argmax(1), minlength=16).view(4, 4).float())
    assert results["validation_of_two_mean"] == pytest.approx(LOGITS.mean().item(), abs=1e-6)


class Typo(MulticlassAccuracy):
    def compute(self): return self.num_corect / self.num_total


class Large(MulticlassAccuracy):
    def compute(self): return torch.ones(40, 40)


class Needs(MulticlassAccuracy):
    def compute(self):
        if self.num_total < 500: raise ValueError("too few examples")
        return super().compute()


@pytest.mark.parametrize("metric, error", [(Typo(), AttributeError), (classification.MulticlassROC(4), MetricError),
                                           (Large(), MetricError)], ids=["typo", "curves", "large table"])
def test_a_wrong_metric_fails_in_the_first_batch(metric, error):
    learn, done = given(LOGITS, CLASSES, 10), []
    learn.on("after_batch", lambda: done.append(1), priority=-100)
    with pytest.raises(error, match="metric wrong") as caught: learn.train(1, callbacks=Metrics(wrong=metric))
    assert len(done) == 1 and "\n" not in str(caught.value)


def test_a_metric_that_needs_more_than_a_batch_is_not_wrong():
    results = given(LOGITS, CLASSES, 10).validate(Metrics(a=Needs()))
    assert results["validation_a"] == pytest.approx(accuracy(LOGITS, CLASSES).item())
    with pytest.raises(ValueError, match="metric a: too few examples"): given(LOGITS[:40], CLASSES[:40], 10).validate(Metrics(a=Needs()))


def test_a_trial_leaves_the_metric_alone():
    metric, reads = regression.PearsonCorrCoef(), []

    class Counted(MulticlassAccuracy):
        def compute(self):
            reads.append(int(self.num_total))
            return super().compute()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a trial on one example does not warn either
        given(VALUES, TARGETS, 100).validate(Metrics(metric))
    metrics = Metrics(Counted())
    given(LOGITS, CLASSES, 100, metrics, ["train", "validation"]).train(2)
    assert reads == [100, N, N, N, N]


def test_a_pass_over_named_loaders_has_columns_of_their_names():
    loaders = {"train": batches(LOGITS, CLASSES, 32), "validation": {"clean": batches(LOGITS, CLASSES, 64), "few": batches(LOGITS[:50], CLASSES[:50], 20)}}
    learn = Learner(Given(), torch.optim.SGD, zero_loss, loaders, Metrics(a=MulticlassAccuracy()), device="cpu")
    learn.train(1)
    assert learn.history[-1]["validation_clean_a"] == pytest.approx(accuracy(LOGITS, CLASSES).item())
    assert learn.history[-1]["validation_few_a"] == pytest.approx(accuracy(LOGITS[:50], CLASSES[:50]).item())


def test_predictions_of_several_tensors_reach_a_function_without_their_graph():
    class Two(Given):
        def forward(self, x): return super().forward(x), {"again": super().forward(x)}

    def measured(predictions, labels):
        assert not predictions[0].requires_grad and not predictions[1]["again"].requires_grad
        return accuracy(predictions[1]["again"], labels)

    learn = Learner(Two(), torch.optim.SGD, lambda p, t: p[0].sum() * 0.0, {"train": batches(LOGITS, CLASSES, 32)},
                    Metrics(accuracy=measured), device="cpu")
    learn.train(1)
    assert learn.history[-1]["train_accuracy"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


# Chunks

class Counting(MulticlassAccuracy):
    """Like a metric of torcheval that notes the size of every update."""

    sizes: list[int] = []

    def update(self, input, target):
        self.sizes.append(len(target))
        return super().update(input, target)


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setattr(Counting, "__module__", MulticlassAccuracy.__module__)
    Counting.sizes.clear()
    return Counting.sizes


def test_updates_go_by_chunks_but_the_first_and_the_ragged_batch_at_once(sizes):
    given(LOGITS, CLASSES, 5, Metrics(Counting()), ["train"]).train(1)
    assert sizes == [5, 128 * 5, 71 * 5, 3]


def test_a_class_of_the_user_is_updated_batch_by_batch(sizes, monkeypatch):
    monkeypatch.setattr(Counting, "__module__", "mine")
    given(LOGITS, CLASSES, 100, Metrics(Counting(), MulticlassAccuracy()), ["train"]).train(1)
    assert sizes == [100] * 10 + [3]


def test_predictions_held_are_bounded_and_large_ones_go_straight_through(sizes, monkeypatch):
    metrics = Metrics(Counting())
    held = []

    class Watch(Callback):
        def after_batch(self): held.append(sum(store.nbytes for store in metrics.under_way.chunk.stores))

    def one_pass(width, size):
        sizes.clear(), held.clear()
        data = [(torch.randn(size, width), torch.zeros(size, dtype=torch.long)) for _ in range(6)]
        Learner(Given(), torch.optim.SGD, zero_loss, {"train": data}, [metrics, Watch()], device="cpu").train(1)

    one_pass(1000, 100)  # 0.4 MB a batch: five of them
    assert sizes == [100, 500] and 0 < max(held) <= PassMetrics.max_bytes
    one_pass(1000, 300)  # 1.2 MB a batch: two do not fit
    assert sizes == [300] * 6 and max(held) == 0
    monkeypatch.setattr(PassMetrics, "max_batches", 2)
    one_pass(4, 100)
    assert sizes == [100, 200, 200, 100]


def test_windows_count_batches():
    window = WindowedMeanSquaredError(max_num_updates=3, enable_lifetime=False)
    by_hand = WindowedMeanSquaredError(max_num_updates=3, enable_lifetime=False)
    for values, targets in batches(VALUES, TARGETS, 10): by_hand.update(values, targets)
    results = given(VALUES, TARGETS, 10).validate(Metrics(window))
    assert results["validation_windowed_mean_squared_error"] == pytest.approx(by_hand.compute().item())


def test_tasks_in_the_first_dimension_are_not_joined():
    scores, truth = SCORES[:1000].reshape(-1, 2, 10), TRUTH[:1000].reshape(-1, 2, 10)
    metric, seen = BinaryAUROC(num_tasks=2), []

    class Mean(type(metric)):
        def compute(self): return super().compute().mean()

    loaders = {"validation": list(zip(scores, truth, strict=True))}
    learn = Learner(Given(), torch.optim.SGD, zero_loss, loaders, device="cpu")
    results = learn.validate(Metrics(auroc=Mean(num_tasks=2)))
    for task in range(2): seen.append(roc_auc_score(truth[:, task].flatten(), scores[:, task].flatten()))
    assert results["validation_auroc"] == pytest.approx(sum(seen) / 2, abs=1e-6)
    assert not module.adds_up(metric)


def test_shapes_and_dtypes_that_change_from_batch_to_batch():
    pieces, start = [], 0
    for n in (3, 3, 5, 5, 5, 1, 3, 3, 8):
        labels = CLASSES[start:start + n]
        pieces.append((LOGITS[start:start + n], labels.int() if n == 5 else labels))
        start += n
    learn = Learner(Given(), torch.optim.SGD, zero_loss, {"validation": pieces}, device="cpu")
    assert learn.validate(Metrics(a=MulticlassAccuracy()))["validation_a"] == pytest.approx(
        accuracy(LOGITS[:start], CLASSES[:start]).item())


def test_a_dtype_that_changes_loses_no_digits():
    half, full, labels = torch.zeros(4, dtype=torch.float16), torch.full((4,), 2049.0), torch.zeros(4)
    pieces = [(half, labels)] * 3 + [(full, labels)] * 2
    learn = Learner(Given(), torch.optim.SGD, zero_loss, {"validation": pieces}, device="cpu")
    by_hand = 2049.0 ** 2 * 2 / 5  # float16 would make it 2048
    assert learn.validate(Metrics(mse=MeanSquaredError()))["validation_mse"] == pytest.approx(by_hand, rel=1e-6)


def test_a_loader_and_a_model_that_write_over_their_memory():
    class Reuse(Given):
        def __init__(self):
            super().__init__()
            self.out = torch.empty(17, 4)

        def forward(self, x): return self.out.copy_(x)

    class Loader:
        def __iter__(self):
            data, labels = torch.empty(17, 4), torch.empty(17, dtype=torch.long)
            for x, y in batches(LOGITS, CLASSES, 17): yield data.copy_(x), labels.copy_(y)  # 59 whole batches

    learn = Learner(Reuse(), torch.optim.SGD, zero_loss, {"validation": Loader()}, device="cpu")
    assert learn.validate(Metrics(a=MulticlassAccuracy()))["validation_a"] == pytest.approx(
        accuracy(LOGITS, CLASSES).item())


# Passes that end early

class CancelAt(Callback):
    def __init__(self, error, *, phase="train", batch=3):
        self.error, self.phase_wanted, self.batch_wanted = error, phase, batch

    def after_loss(self, learn):
        if (learn.phase, learn.batch_num) == (self.phase_wanted, self.batch_wanted): raise self.error


@pytest.mark.parametrize("phase", ["train", "validation", "test"])
def test_a_cancelled_pass_has_the_metrics_of_its_whole_batches(phase):
    learn = given(LOGITS, CLASSES, 10, [Metrics(a=MulticlassAccuracy()), CancelAt(CancelEpochException(), phase=phase)])
    learn.train(1)
    for other in ("train", "validation", "test"):
        n = 30 if other == phase else N
        assert learn.history[-1][f"{other}_a"] == pytest.approx(accuracy(LOGITS[:n], CLASSES[:n]).item())


def test_cancelled_training_is_measured():
    found = {}
    learn = given(LOGITS, CLASSES, 10, [Metrics(a=MulticlassAccuracy()), CancelAt(CancelTrainException())])
    learn.on("cleanup_epoch", lambda results: found.update(results))
    learn.train(3)
    assert found["train_a"] == pytest.approx(accuracy(LOGITS[:30], CLASSES[:30]).item())


def test_a_cancelled_batch_does_not_count():
    learn = given(LOGITS, CLASSES, 10, [Metrics(a=MulticlassAccuracy(), b=accuracy), CancelAt(CancelBatchException())])
    learn.train(1)
    rest = [*range(30), *range(40, N)]
    for name in ("a", "b"):
        assert learn.history[-1][f"train_{name}"] == pytest.approx(accuracy(LOGITS[rest], CLASSES[rest]).item())


def test_a_pass_without_a_whole_batch_has_no_column():
    class Always(Callback):
        def after_predict(self): raise CancelBatchException

    assert given(LOGITS, CLASSES, 100, [Metrics(MulticlassAccuracy()), Always()]).validate() == {}


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_of_a_broken_pass_is_left_in_the_next(error):
    metrics = Metrics(a=MulticlassAccuracy(), b=accuracy)
    learn = given(LOGITS, CLASSES, 10, metrics)
    with pytest.raises(type(error)): learn.train(1, callbacks=CancelAt(error))
    assert not metrics.running and metrics.under_way is None
    learn.train(1)
    for name in ("a", "b"):
        assert learn.history[-1][f"train_{name}"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


def test_added_in_mid_pass_it_begins_with_the_next():
    learn = given(LOGITS, CLASSES, 100)

    class Late(Callback):
        def after_batch(self, learn):
            if learn.batch_num == 3: learn.add(Metrics(a=MulticlassAccuracy()))

    learn.train(1, callbacks=Late())
    assert learn.history.columns[4:] == ["validation_a", "test_a"]
    assert learn.history[-1]["validation_a"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


# Watching changes nothing

def trained(optimiser, callbacks):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    loaders = {"train": batches(LOGITS, CLASSES, 32), "validation": batches(LOGITS, CLASSES, 64)}
    Learner(model, optimiser, F.cross_entropy, loaders, callbacks, device="cpu").train(2, learning_rate=0.01)
    return [*model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_are_the_same_to_the_last_bit_with_and_without(optimiser):
    metrics = Metrics(MulticlassAccuracy(), MulticlassAUROC(num_classes=4), accuracy,
                      classification.MulticlassF1Score(num_classes=4))
    (bare, state), (watched, watched_state) = trained(optimiser, None), trained(optimiser, metrics)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    assert torch.equal(state, watched_state)


def test_nothing_is_kept_alive():
    learn = given(LOGITS, CLASSES, 10, Metrics(MulticlassAUROC(num_classes=4), MulticlassAccuracy(), accuracy))
    learn.train(1)
    before = tensors_alive()
    learn.train(2)
    assert tensors_alive() == before


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


class Reads(TorchDispatchMode):
    """Notes the operations for which the host waits for the device."""

    waiting = ("_local_scalar_dense", "is_nonzero", "aten.nonzero", "unique", "masked_select", "aten.equal.")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.waiting): self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def reads_in_batches(*metrics, **named):
    reads = Reads()

    class Watched(Metrics):
        def after_any_batch(self, learn):
            with reads if self.tried else nullcontext(): super().after_any_batch(learn)  # in the first batch it is tried

    given(LOGITS, CLASSES, 3, Watched(*metrics, **named)).train(1)  # 335 batches: several chunks
    return reads.seen


def test_no_value_is_read_within_a_batch(elsewhere):
    metrics = [MulticlassAccuracy(), MulticlassF1Score(average="macro", num_classes=4), MulticlassAUROC(num_classes=4)]
    assert reads_in_batches(*metrics, mine=lambda p, t: elsewhere(accuracy(p, t))) == []
    assert reads_in_batches(item=lambda p, t: accuracy(p, t).item())  # the detector works


def test_torchmetrics_reads_once_a_chunk():
    seen = reads_in_batches(classification.MulticlassAUROC(num_classes=4))
    assert 0 < len(seen) <= 2 * 3 * (1 + 335 // 128 + 2)  # of two operations, in three passes


# Bad input

def broken_shape(**named):
    return lambda: given(LOGITS, CLASSES[:, None], 32, Metrics(**named)).train(1)


def scalar_or_error(function):
    return lambda: given(LOGITS, CLASSES, 32, Metrics(mine=function)).train(1)


class NoReset:
    def update(self, predictions, labels): ...
    def compute(self): ...


class Pair(NoReset):
    def reset(self): ...
    def compute(self): return {1, 2}


BAD = [
    (lambda: Metrics(), ValueError, "Metrics() measures nothing; give it a metric, as in Metrics(accuracy=...)"),
    (lambda: Metrics(MulticlassAccuracy), TypeError,
     "metric multiclass_accuracy: MulticlassAccuracy is a class; pass an instance: MulticlassAccuracy(...)"),
    (lambda: Metrics(a=MulticlassAccuracy), TypeError,
     "metric a: MulticlassAccuracy is a class; pass an instance: MulticlassAccuracy(...)"),
    (lambda: Metrics("accuracy"), TypeError,
     "metric str is 'accuracy', without update, compute, reset; pass a metric of torcheval or torchmetrics, or a "
     "function of predictions and labels"),
    (lambda: Metrics([accuracy]), TypeError, "metric list is [<function accuracy"),
    (lambda: Metrics(a=NoReset()), TypeError, "without reset; pass a metric of torcheval or torchmetrics"),
    (lambda: Metrics(a=lambda predictions: 0), TypeError,
     "metric a: its parameters are (predictions); it is called as function(predictions, labels); log what needs more from a hook: learn.log(name=value)"),
    (lambda: Metrics(lambda p, t: 0), ValueError,
     "metrics: a lambda has no name of its own; give it one: Metrics(name=...)"),
    (lambda: Metrics(**{"top 1": accuracy}), ValueError,
     "metrics: 'top 1' cannot be a name; use letters, digits and _, as in top_5"),
    (lambda: Metrics(loss=accuracy), ValueError,
     "metrics: loss is a name that the history needs itself; use another"),
    (lambda: Metrics(epoch=accuracy), ValueError,
     "metrics: epoch is a name that the history needs itself; use another"),
    (lambda: Metrics(a=accuracy, phases="valid"), ValueError,
     "phases: 'valid' is not one of ['train', 'validation', 'test']; did you mean validation?"),
    (broken_shape(accuracy=MulticlassAccuracy()), ValueError,
     "metric accuracy: predictions (32, 4), labels (32, 1): target should be a one-dimensional tensor"),
    (broken_shape(f1=classification.MulticlassF1Score(num_classes=4)), ValueError,
     "metric f1: predictions (32, 4), labels (32, 1): "),
    (scalar_or_error(lambda p, t: p), MetricError,
     "metric mine: predictions (32, 4), labels (32,): the function returned (32, 4); it must return a scalar, such as "
     "a .mean(), or a mapping of scalars"),
    (scalar_or_error(lambda p, t: None), MetricError, "the function returned None; it must return a scalar"),
    (scalar_or_error(Pair()), MetricError, "metric mine gave a set; it must give a number, or a mapping or a tensor of numbers; a curve is read after training, from predictions(learn)"),
    (lambda: Metrics(a=accuracy, of=1.5), TypeError, "of is 1.5; it must be an index, a key, or a function of the predictions"),
    (lambda: given(LOGITS, CLASSES, 32).validate(Metrics(a=accuracy, of="kind")), MetricError, "of='kind' picks nothing from (32, 4)"),
    (lambda: Learner(Heads(dict), torch.optim.SGD, heads_loss, {"validation": [(LOGITS, CLASSES)]}).validate(Metrics(a=accuracy, of="kin")), MetricError,
     "of='kin' picks nothing from a dict with ['kind', 'size']; did you mean kind?"),
    (lambda: Learner(Heads(tuple), torch.optim.SGD, heads_loss, {"validation": [(LOGITS, CLASSES)]}).validate(Metrics(a=accuracy, of=2)), MetricError,
     "of=2 picks nothing from a tuple of 2"),
    (lambda: Learner(Heads(tuple), torch.optim.SGD, heads_loss, {"validation": [(LOGITS, CLASSES)]}).validate(Metrics(a=accuracy, of=lambda p, y: p[0])), MetricError,
     "of returned (1003, 4); a function of predictions and labels must return both"),
    (lambda: given(LOGITS, CLASSES, 32, [Metrics(a=accuracy), Metrics(b=accuracy, a=accuracy)]).train(1), MetricError,
     "Metrics(a) and Metrics(b, a) both measure a; rename one"),
]


@pytest.mark.parametrize("call, kind, message", BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as caught: call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_learner_is_whole_after_a_metric_failed():
    learn = given(LOGITS, CLASSES, 32)
    with pytest.raises(MetricError) as caught: learn.train(1, callbacks=Metrics(mine=lambda p, t: p))
    assert caught.value.__notes__ == ["in Metrics.after_any_batch (epoch 0, batch 0)"]
    learn.train(1)
    assert len(learn.history) == 1 and learn.callbacks == ()


def test_what_has_no_plain_message_gets_a_note():
    def fails(predictions, labels): raise KeyError(3)

    with pytest.raises(KeyError) as caught: given(LOGITS, CLASSES, 32, Metrics(fails)).train(1)
    assert "metric fails: predictions (32, 4), labels (32,)" in caught.value.__notes__


def test_a_value_that_was_logged_under_the_same_name():
    class Logs(Learner):
        def train_batch(self):
            super().train_batch()
            return {"a": 0.5}

    loaders = {"train": batches(LOGITS, CLASSES, 100)}
    learn = Logs(Given(), torch.optim.SGD, zero_loss, loaders, Metrics(a=accuracy), device="cpu")
    with pytest.raises(MetricError, match="metric a: train_a was logged already; rename one"): learn.train(1)


@pytest.mark.filterwarnings("ignore:the routine of .* took no step")
def test_a_routine_without_predictions():
    class Own(Learner):
        def train_batch(self): return {"loss": torch.tensor(1.0)}

    loaders = {"train": batches(LOGITS, CLASSES, 100), "validation": batches(LOGITS, CLASSES, 100)}
    own = Own(Given(), torch.optim.SGD, zero_loss, loaders, device="cpu")
    with pytest.raises(MetricError, match=r"Metrics\(a\) finds no learn.predictions in this train batch; set it in"):
        own.train(1, callbacks=Metrics(a=accuracy))
    own.train(1, callbacks=Metrics(a=accuracy, phases="validation"))
    assert own.history[-1]["validation_a"] == pytest.approx(accuracy(LOGITS, CLASSES).item())


# torcheval at arm's length

def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_importing_metrics_imports_neither_package_and_taking_one_warns_of_nothing():
    done = python("import sys\nfrom learner.watch.metrics import *\nassert Metrics\n"
                  "assert not {'torcheval', 'torchmetrics', 'sklearn'} & set(sys.modules)\n"
                  "from learner.watch.metrics import MulticlassAccuracy\nassert 'torcheval' in sys.modules\n"
                  "import warnings\n"
                  "try: warnings.warn('others still count', DeprecationWarning)\n"
                  "except DeprecationWarning: print('raised')")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "raised", "")


def test_the_first_update_warns_of_nothing():
    done = python("import torch\nfrom torch import nn\nfrom learner.loop.learner import Learner\n"
                  "from learner.watch.metrics import Metrics, MulticlassAccuracy\n"
                  "loaders = {'train': [(torch.randn(8, 4), torch.arange(8) % 3)] * 3}\n"
                  "metrics = Metrics(a=MulticlassAccuracy(average='macro', num_classes=3))\n"
                  "Learner(nn.Linear(4, 3), torch.optim.SGD, nn.CrossEntropyLoss(), loaders, metrics).train(1)")
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_names():
    with pytest.raises(AttributeError, match=r"has no attribute BinaryAURO; did you mean BinaryAUROC\?"):
        module.BinaryAURO  # noqa: B018
    assert not hasattr(module, "_private") and not hasattr(module, "classification")
    with pytest.raises(ImportError): exec("from learner.watch.metrics import Nonsense")


def test_torchvision_is_imported_when_it_is_used(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("")
    (tmp_path / "torchvision/models.py").write_text("def inception_v3(weights): raise SystemExit('asked for the model')")
    code = ("import sys\nfrom learner.watch.metrics import MulticlassAccuracy, FrechetInceptionDistance\n"
            "assert 'torchvision' not in sys.modules\nfrom torcheval.metrics.image import fid\nassert fid._TORCHVISION_AVAILABLE\n"
            "import torchvision\nFrechetInceptionDistance()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert done.stderr.strip() == "asked for the model"


def test_a_warning_of_the_users_own_comes_once(capfd):
    "It would come again after each `warnings.catch_warnings`, and from each worker of a loader in each epoch."
    code = """
        import warnings, torch
        from torch.nn import functional as F
        from torch.utils.data import DataLoader, Dataset
        from learner.all import Callback, Learner, Metrics, MulticlassAccuracy, Progress
        from learner.watch.views import View

        class Examples(Dataset):
            def __len__(self): return 16
            def __getitem__(self, i):
                warnings.warn("the dataset warns")
                return torch.ones(4), torch.tensor(i % 2)

        def loss(predictions, labels):
            warnings.warn("the loss warns")
            return F.cross_entropy(predictions, labels)

        class Hook(Callback):
            def after_batch(self): warnings.warn("the hook warns")

        class Eager(Progress):
            "Looks at metrics in every batch."
            pause = 0.0
            def new_view(self, learn, epochs):
                view = View(0, epochs)
                view.live = True
                return view

        loaders = {name: DataLoader(Examples(), 4, num_workers=2) for name in ("train", "validation")}
        Learner(torch.nn.Linear(4, 2), torch.optim.SGD, loss, loaders,
                [Hook(), Metrics(accuracy=MulticlassAccuracy()), Eager()]).train(10, 0.1)
        """
    subprocess.run([sys.executable, "-c", dedent(code)], check=True)
    shown = capfd.readouterr().err
    assert [shown.count(f"UserWarning: the {name} warns") for name in ("dataset", "loss", "hook")] == [1, 1, 1], shown
