"""Pictures of black boxes say what is known of functions whose answers can be computed by hand."""
import matplotlib
import matplotlib.figure
import matplotlib.pyplot
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learner.loop.datasets import digits
from learner.loop.learner import Learner
from learner.steer.augment import BatchTransform, normalise
from learner.steer.update import EMA
from learner.use.asked import opened, scores_function
from learner.use.calibration import (
    calibration_error,
    confusion_by_slice,
    reliability,
    slice_table,
    threshold_curves,
    threshold_table,
)
from learner.use.neighbours import features, nearest, show_neighbours
from learner.use.predict import predictor_of
from learner.use.regions import Plane, decision_regions
from learner.use.saliency import METHODS, attributions, saliency
from learner.use.tables import importances, partial_dependence, permutation_importance, sliders, what_if

matplotlib.use("agg")


@pytest.fixture(scope="module")
def learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    steer = [BatchTransform(normalise(0.3, 0.4), phases=("train", "validation", "test")), EMA(0.9)]
    learn = Learner(model, torch.optim.AdamW, F.cross_entropy, digits(), steer)
    learn.train(2, learning_rate=0.01)
    return learn


@pytest.fixture(scope="module")
def data(learn): return next(iter(learn.dataloaders["test"]))


@pytest.fixture
def ax():
    figure = matplotlib.figure.Figure()
    return figure.subplots()


def plain(batch): return torch.stack([batch.flatten(1)[:, 0], -batch.flatten(1)[:, 0]], 1)


def test_every_picture_is_drawn_on_the_axes_that_are_given_for_learner_predictor_and_function(learn, data, ax):
    images, labels = data
    x, y = torch.randn(60, 4), torch.arange(60) % 2
    models = [learn, predictor_of(learn), plain]
    for model in models:
        assert decision_regions(model, images, labels, size=12, ax=ax) is ax
        assert saliency(model, images[0], ax=ax) is ax
        assert show_neighbours(model, images[0], images, labels=labels, ax=ax) is not None
        assert reliability(scores_function(model)(images).softmax(1), labels.clamp(max=1), ax=ax) is ax
    assert partial_dependence(plain, x, 0, ax=ax) is ax
    assert permutation_importance(plain, x, y, repeats=2, ax=ax) is ax
    assert what_if(plain, x[0], x, ax=ax) is ax
    assert threshold_curves(torch.rand(60), y, ax=ax) is ax
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 2)
    assert confusion_by_slice(y, y, {"a": x[:, 0] > 0, "b": x[:, 0] <= 0}, ax=axes) == list(axes)


def test_looking_leaves_the_learner_as_it_was(learn, data):
    before, modes = learn.fingerprint(), [module.training for module in learn.model.modules()]
    decision_regions(learn, data[0], size=6)
    for method in METHODS: attributions(learn, data[0][0], method=method)
    features(learn, data[0])
    assert learn.fingerprint() == before and modes == [module.training for module in learn.model.modules()]
    assert not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    matplotlib.pyplot.close("all")


def test_gradients_are_of_what_validation_sees(learn, data):
    module, seen = opened(learn, data[0])
    assert torch.allclose(seen, (data[0] - 0.3) / 0.4, atol=1e-6)
    with torch.no_grad(): assert torch.allclose(module(seen), learn.predict(data[0]).outputs, atol=1e-5)


def test_occlusion_of_one_pixel_is_the_fall_of_the_score():
    weights = torch.randn(1, 6, 6)
    def function(batch): return (batch * weights).sum((1, 2, 3))[:, None]
    image = torch.rand(1, 6, 6)
    found = attributions(function, image, window=1)
    assert torch.allclose(found, (image * weights)[0], atol=1e-4)


def test_integrated_gradients_of_a_linear_model_are_its_terms():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    image = torch.rand(1, 6, 6)
    found = attributions(model, image, 2, method="integrated_gradients")
    assert torch.allclose(found, (image[0] * model[1].weight[2].reshape(6, 6)).detach(), atol=1e-4)


def test_grad_cam_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(32, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        model[2].weight.copy_(torch.cat([torch.full((16,), 2.0), torch.zeros(16)])[None])
    image = torch.rand(1, 4, 4)
    assert torch.allclose(attributions(model, image, 0, method="grad_cam"), 2 * image[0], atol=1e-5)


def test_partial_dependence_and_importance_of_a_known_function():
    x = torch.randn(300, 3)
    def function(batch): return 2 * batch[:, 0] - batch[:, 1]
    found = importances(function, x, function(x), repeats=5).mean(1)
    assert found[0] > found[1] > found[2] == 0
    assert (found[0] / found[1]).item() == pytest.approx(4, rel=0.3)  # the variances are 4 and 1
    axes = partial_dependence(function, x, 0, lines=0)
    line = max(axes.lines, key=lambda each: each.get_linewidth()).get_xydata()
    assert (line[-1, 1] - line[0, 1]) / (line[-1, 0] - line[0, 0]) == pytest.approx(2, rel=1e-3)
    matplotlib.pyplot.close("all")


def test_importance_agrees_with_scikit_learn():
    from sklearn.inspection import permutation_importance as theirs
    from sklearn.linear_model import LinearRegression
    x = torch.randn(200, 3, dtype=torch.float64)
    y = x[:, 0] - 3 * x[:, 2] + 0.1 * torch.randn(200, dtype=torch.float64)
    model = LinearRegression().fit(x.numpy(), y.numpy())
    ours = importances(lambda batch: model.predict(batch.numpy()), x, y, repeats=4, seed=1)
    assert torch.allclose(ours, torch.from_numpy(theirs(model, x.numpy(), y.numpy(), n_repeats=4, random_state=1).importances), atol=1e-5)


def test_a_plane_goes_there_and_back():
    x = torch.randn(40, 2, 3)
    for inputs in (None, (1, 4)):
        plane = Plane(x, inputs)
        points = torch.randn(5, 2)
        assert plane.lift(points).shape == (5, 2, 3)
        assert torch.allclose(plane.project(plane.lift(points)), points, atol=1e-4)
    first = (Plane(x).project(x)).var(0)
    flat = x.flatten(1)
    assert torch.allclose(first, torch.linalg.eigvalsh(torch.cov(flat.T)).flip(0)[:2], rtol=1e-2)


def test_calibration_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error
    torch.manual_seed(0)
    p, y = torch.randn(500, 4).softmax(1), torch.randint(0, 4, (500,))
    assert calibration_error(p, y, 15) == pytest.approx(multiclass_calibration_error(p, y, 4, n_bins=15).item(), abs=1e-5)
    assert calibration_error(torch.eye(4)[y], y) == 0 and calibration_error(1 - torch.eye(2)[y % 2], y % 2) == 1


def test_thresholds_agree_with_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
    torch.manual_seed(0)
    p, y = torch.rand(200), torch.randint(0, 2, (200,))
    table = threshold_table(p, y, 11)
    for i in range(1, 10):
        said = (p.double() >= table["threshold"][i]).long()
        for name, theirs in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score), ("accuracy", accuracy_score)):
            assert table[name][i].item() == pytest.approx(theirs(y, said))


def test_slices_and_neighbours(learn, data):
    images = data[0]
    table = slice_table(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1]), {"first": torch.tensor([True, True, False, False])})
    assert table == {"all": (4, 0.5), "first": (2, 1.0)}
    for model in (learn, plain):
        places, distances = nearest(model, images[3], images, count=5)
        assert distances[0] < 1e-4 and (distances.diff() >= 0).all() and len(places) == 5
    assert nearest(learn, images[3], images)[0][0] == 3


def test_sliders_answer_and_a_picture_does_without(monkeypatch):
    x = torch.randn(30, 2)
    box = sliders(plain, x[0], x, names=["a", "b"])
    before = box.children[1].value
    box.children[0].children[0].value += 1.0
    assert box.children[1].value != before
    far = torch.tensor([9.0, 0.1234567])  # beyond the table: the sliders reach it, and what is not moved keeps every digit
    asked = []
    box = sliders(lambda rows: asked.append(rows.clone()) or plain(rows), far, x)
    box.children[0].children[1].value = 0.5
    assert torch.equal(asked[0][0], far) and asked[-1].tolist() == [[9.0, 0.5]]
    whole = sliders(plain, torch.tensor([1, 2]), torch.tensor([[0, 0], [3, 3]]))
    whole.children[0].children[0].value = 3
    for wrong, words in ((x[0, :1], {}), (x[0], {"names": ["a"]}), (x[0], {"classes": ["one"]})):
        with pytest.raises(ValueError, match=r"give a row of x|names for 2"): sliders(plain, wrong, x, **words)
    with pytest.raises(ValueError, match="give a row of x, of 2 inputs"): what_if(plain, torch.zeros(5), x)
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"nblearner\[widgets\]"): sliders(plain, x[0], x)
    what_if(plain, x[0], x)
    matplotlib.pyplot.close("all")


def test_without_captum_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum", None)
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"nblearner\[explain\]"): attributions(plain, torch.rand(1, 8, 8))


@pytest.mark.parametrize("call, words", [
    (lambda learn: attributions(learn, torch.rand(8, 8)), "channels x height x width"),
    (lambda learn: attributions(learn, torch.rand(1, 8, 8), method="gradcam"), "did you mean grad_cam"),
    (lambda learn: attributions(predictor_of(learn), torch.rand(1, 8, 8), method="grad_cam"), "gradients need a learner or a module"),
    (lambda learn: scores_function(3), "model is an int"),
    (lambda learn: scores_function(lambda x: x.sum())(torch.ones(2, 2)), "must give each a row"),
    (lambda learn: decision_regions(plain, torch.ones(5, 1)), "two inputs"),
    (lambda learn: decision_regions(plain, torch.rand(5, 3), inputs=(0, 7)), "inputs is (0, 7)"),
    (lambda learn: partial_dependence(plain, torch.rand(5, 3), "agee", names=["age", "b", "c"]), "did you mean age"),
    (lambda learn: partial_dependence(plain, torch.rand(5, 3), 3), "feature is 3"),
    (lambda learn: importances(plain, torch.rand(5), torch.ones(5)), "give a table"),
    (lambda learn: reliability(torch.randn(5, 2), torch.ones(5).long()), "softmax"),
    (lambda learn: threshold_curves(torch.rand(5), torch.full((5,), 2)), "0 or 1"),
    (lambda learn: slice_table(torch.zeros(3), torch.zeros(3), {"a": torch.zeros(2).bool()}), "slice 'a'"),
    (lambda learn: features(learn, torch.rand(2, 1, 8, 8), layer="nothing"), "no layer 'nothing'"),
])
def test_mistakes_are_answered_in_a_line(learn, call, words):
    with pytest.raises((ValueError, TypeError)) as error: call(learn)
    assert words in str(error.value) and "\n" not in str(error.value)
