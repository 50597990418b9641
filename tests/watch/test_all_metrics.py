"""Every metric of torcheval and torchmetrics that takes predictions and labels: over ragged batches as the library has it over all data."""
import inspect
import random
import warnings

import pytest
import torch
from torch import nn

from learner.loop.learner import Learner
from learner.watch.metric_forms import columns_of
from learner.watch.metrics import Metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torcheval.metrics
    from torchmetrics import classification, regression

SIZES = (16, 16, 16, 7, 1)  # ragged, and some alike, which are handed on together
N, CLASSES = sum(SIZES), 4
torch.manual_seed(0)
SCORES = torch.randn(N, CLASSES).softmax(1)
DATA = {  # forms of predictions and labels
    "binary": (torch.rand(N), torch.randint(2, (N,))), "multiclass": (SCORES, torch.randint(CLASSES, (N,))),
    "multilabel": (torch.rand(N, CLASSES), torch.randint(2, (N, CLASSES))), "regression": (torch.rand(N) + 0.1, torch.rand(N) + 0.1),
    "columns": (torch.rand(N, CLASSES) + 0.1, torch.rand(N, CLASSES) + 0.1), "distributions": (SCORES, torch.rand(N, CLASSES).softmax(1)),
}
OPTIONS = [{}, {"num_classes": CLASSES}, {"num_labels": CLASSES}, {"num_classes": CLASSES, "average": None}, {"num_labels": CLASSES, "average": None}, {"num_outputs": CLASSES},
           {"min_precision": 0.5}, {"min_recall": 0.5}, {"beta": 0.5}, {"beta": 0.5, "num_classes": CLASSES}, {"beta": 0.5, "num_labels": CLASSES}, {"criteria": "hamming"}]


def whole(metric, predictions, labels):
    "What the library makes of all data at once, as columns; None if it does not take them."
    try:
        metric.update(predictions, labels)
        return columns_of("m", metric.compute())
    except Exception:
        return None


def classes():
    "The classes of metrics of both libraries, by name."
    modules = {"torcheval": torcheval.metrics, "torchmetrics": classification, "torchmetrics regression": regression}
    return {(library, name): cls for library, module in modules.items() for name, cls in sorted(vars(module).items())
            if inspect.isclass(cls) and hasattr(cls, "compute") and "torcheval.metrics.metric" not in cls.__module__}


def configurations(chosen):
    "By name: a class, its options, and the form of data that it takes."
    found = {}
    for (library, name), cls in chosen.items():
        form = next((form for form in ("binary", "multiclass", "multilabel") if name.lower().startswith(form)), None)
        for options in OPTIONS:
            for kind in [form] if form else DATA:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try: metric = cls(**options)
                    except Exception: continue
                    if whole(metric, *DATA[kind]): found[f"{library} {name} {options} {kind}"] = cls, options, kind
    return found


class Given(nn.Module):
    def forward(self, x): return x


def check(cls, options, kind):
    predictions, labels = DATA[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = whole(cls(**options), predictions, labels)
        batches = list(zip(predictions.split(SIZES), labels.split(SIZES), strict=True))
        got = Learner(Given(), None, None, {"validation": batches}, Metrics(m=cls(**options)), device="cpu").validate()
    assert got == {f"validation_{name}": pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True) for name, value in right.items()}


@pytest.mark.long
def test_all_of_them():
    found, wrong = configurations(classes()), {}
    for name, each in found.items():
        try: check(*each)
        except Exception as error: wrong[name] = str(error)[:200]
    assert not wrong and len(found) > 200


def test_some_of_them():
    every = classes()
    found = configurations({key: every[key] for key in random.Random(3).sample(sorted(every), 14)})
    assert len(found) >= 10
    for each in found.values(): check(*each)
