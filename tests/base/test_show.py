import math
import os
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from learner.base import show
from learner.base.show import new_axes, plot_curves, show_image, show_images, smoothed

HABIT = {
    "new_axes": new_axes,
    "show_image": lambda ax=None: show_image(torch.rand(4, 4), ax=ax),
    "show_images": lambda ax=None: show_images(torch.rand(5, 4, 4), titles=range(5), ax=ax),
    "plot_curves": lambda ax=None: plot_curves({"loss": [1, 2]}, ax=ax),
    "smoothed curves": lambda ax=None: plot_curves({"loss": [1, 2]}, ax=ax, smooth=0.5),
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    def shown(*args, **kwargs):
        raise AssertionError("a plotting function must not show anything")

    monkeypatch.setattr(plt, "show", shown)
    plt.close("all")
    yield
    plt.close("all")


def rendered(figure):
    """The pixels of the figure as HxWx3 bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


def run(code, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# The habit


@pytest.mark.parametrize("draw", HABIT.values(), ids=HABIT)
def test_draws_on_the_axes_it_is_given(draw):
    ax = Figure().subplots()
    assert draw(ax=ax) is ax
    assert plt.get_fignums() == []
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize("draw", HABIT.values(), ids=HABIT)
def test_makes_one_figure_with_one_axes(draw):
    ax = draw()
    assert plt.get_fignums() == [ax.figure.number]
    assert ax.figure.axes == [ax]


@pytest.mark.parametrize("draw", HABIT.values(), ids=HABIT)
@pytest.mark.parametrize("wrong", [plt, Figure(), np.array([1, 2]), "ax", 0])
def test_refuses_what_is_no_axes(draw, wrong):
    with pytest.raises(TypeError, match=f"ax must be one matplotlib Axes, got {type(wrong).__name__}"):
        draw(ax=wrong)
    assert plt.get_fignums() == []


def test_new_axes_labels_only_what_it_is_told():
    ax = Figure().subplots()
    ax.set(title="a", xlabel="b", ylabel="c")
    new_axes(ax, xlabel="steps")
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("a", "steps", "c")
    new_axes(ax, title="", ylabel="loss")
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("", "steps", "loss")
    assert tuple(new_axes(figsize=(3, 2)).figure.get_size_inches()) == (3, 2)


def test_import_loads_no_matplotlib():
    assert run("import learner.base.show, sys; print('matplotlib' in sys.modules)") == ["False"]


DRAW_AND_SAVE = """
import io, matplotlib
from learner.base.show import show_images, plot_curves
for ax in [show_images([[[0, 1]]]), plot_curves({"loss": [1, 2]})]:
    ax.figure.savefig(io.BytesIO(), format="png")
print(matplotlib.get_backend().lower())
"""


def test_leaves_the_backend_alone():
    assert run(DRAW_AND_SAVE) == ["agg"]
    assert run(DRAW_AND_SAVE, MPLBACKEND="svg") == ["svg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a screen without DISPLAY")
def test_draws_without_a_screen_where_a_backend_with_windows_is_set():
    assert run(DRAW_AND_SAVE, MPLBACKEND="TkAgg") == ["agg"]


# Images


def drawn(image, **arguments):
    """The colour of each pixel as `show_image` draws it, HxWx3 bytes."""
    ax = show_image(image, ax=Figure().subplots(), **arguments)
    (shown,) = ax.images
    return shown.to_rgba(shown.get_array())[:, :, :3] if shown.get_array().ndim == 2 else shown.get_array()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (4, 5, 3), (3, 4, 3), (3, 3), (1, 1, 1)])
def test_all_forms_of_an_image(dtype, shape):
    image = (torch.arange(math.prod(shape)) % 2).view(shape).to(dtype)
    white = 255 if dtype == torch.uint8 else 1
    first = shape[0] in (1, 3) if len(shape) == 3 else False
    expected = image.double().numpy() / white
    expected = expected.transpose(1, 2, 0) if first else expected.reshape(*expected.shape[:2], -1)
    if image.double().min() == image.double().max() and dtype not in (torch.uint8, torch.bool):
        expected = np.full_like(expected, 0.5)
    colours = drawn(image)
    colours = colours / 255 if colours.dtype == np.uint8 else colours
    assert np.abs(colours - expected).max() < 1 / 254
    if dtype != torch.bfloat16:
        assert np.array_equal(drawn(image.numpy()), drawn(image))
    assert np.array_equal(drawn(image.tolist() if dtype != torch.uint8 else image), drawn(image))


@pytest.mark.parametrize("image", [torch.rand(3, 4, 5), torch.rand(4, 5, requires_grad=True), np.random.rand(4, 5)])
def test_the_image_itself_is_not_changed(image):
    before = image.detach().clone() if isinstance(image, torch.Tensor) else image.copy()
    show_image(image, limits=(0.2, 0.3))
    assert (image == before).all()


def test_scale():
    assert drawn(torch.tensor([[-3.0, 0.0, 1.0]]))[0, :, 0].tolist() == pytest.approx([0, 0.75, 1], abs=1 / 254)
    assert drawn(torch.tensor([[1e-9, 2e-9]]))[0, :, 0].tolist() == [0, 1]
    assert drawn(torch.tensor([[0, 51, 255]], dtype=torch.uint8))[0, :, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert drawn(torch.full((2, 2), 1e30)).ravel().tolist() == pytest.approx([0.5] * 12, abs=1 / 254)
    assert drawn(torch.full((3, 2, 2), -7.0)).ravel().tolist() == pytest.approx([0.5] * 12)
    infinite = torch.tensor([[-math.inf, 0.0, 1.0, math.inf]])
    assert drawn(infinite)[0, :, 0].tolist() == [0, 0, 1, 1]
    assert drawn(infinite.expand(3, 1, 4))[0, :, 0].tolist() == [0, 0, 1, 1]


def test_limits():
    dim = torch.tensor([[0.0, 0.25]])
    assert drawn(dim, limits=(0, 1))[0, :, 0].tolist() == pytest.approx([0, 0.25], abs=1 / 254)
    assert drawn(dim.expand(3, 1, 2), limits=(0, 1))[0, :, 2].tolist() == [0, 0.25]
    wide = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert drawn(wide, limits=(-255, 510))[0, :, 0].tolist() == pytest.approx([1 / 3, 2 / 3], abs=1 / 254)
    assert drawn(wide, limits=[100, 200])[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(2, 2), (3, 2, 2)])
def test_not_a_number_is_red(shape):
    image = torch.zeros(shape)
    image[..., 0, 0], image[..., 1, 1] = math.nan, 1
    pixels = rendered(show_image(image, title="x").figure)
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 0), (255, 255, 255)} <= colours
    assert rendered(show_image(torch.full(shape, math.nan)).figure).min(axis=(0, 1)).tolist() == [255, 0, 0]


FORMS = "must be HxW, 1xHxW, 3xHxW or HxWx3, got"
BAD_IMAGES = [
    (torch.zeros(5), ValueError, FORMS + r" shape \(5,\): pick the channels to show"),
    (torch.zeros(2, 5, 5), ValueError, FORMS + r" shape \(2, 5, 5\): pick the channels to show"),
    (np.zeros((5, 5, 4)), ValueError, FORMS + r" shape \(5, 5, 4\): pick the channels to show"),
    (torch.zeros(8, 3, 5, 5), ValueError, FORMS + r" shape \(8, 3, 5, 5\): use show_images for a batch"),
    (torch.zeros(0, 5), ValueError, FORMS + r" shape \(0, 5\)"),
    (torch.zeros(()), ValueError, FORMS + r" shape \(\)"),
    ([[1, 2], [3]], ValueError, FORMS + " rows of unequal length"),
    (torch.zeros(5, 5, dtype=torch.complex64), TypeError, "must be a tensor or an array of real numbers, got complex"),
    (np.array([["a", "b"]]), TypeError, "must be a tensor or an array of real numbers, got ndarray"),
    ("digit.png", TypeError, "must be a tensor or an array of real numbers, got str"),
    (None, TypeError, "must be a tensor or an array of real numbers, got NoneType"),
]


@pytest.mark.parametrize(("image", "kind", "message"), BAD_IMAGES)
def test_bad_images(image, kind, message):
    ax = Figure().subplots()
    with pytest.raises(kind, match="^image " + message) as caught:
        show_image(image, ax=ax, title="title")
    assert "\n" not in str(caught.value)
    with pytest.raises(kind, match=r"^images\[1\] " + message):
        show_images([torch.zeros(5, 5), image], ax=ax, title="title")
    with pytest.raises(kind):
        show_images([image])
    assert (ax.get_title(), len(ax.images), plt.get_fignums()) == ("", 0, [])


# Grids

THREE = torch.rand(3, 4, 4)
BAD_GRIDS = [
    ({"images": []}, "images is empty"),
    ({"titles": ["a", "b"]}, "titles must hold one entry for each image, got 2 for 3 images"),
    ({"titles": "title"}, "titles must hold one entry for each image, got 5 for 3 images"),
    ({"colours": ["red"]}, "colours must hold one entry for each image, got 1 for 3 images"),
    ({"titles": "abc", "colours": ["red", None, "rde"]}, r"colours\[2\] is 'rde', which is not a colour"),
    ({"colours": "red"}, r"colours\[1\] is 'e', which is not a colour"),
    ({"columns": 0}, "columns must be a whole number of at least 1, or None, got 0"),
    ({"columns": -2}, "columns must be .* got -2"),
    ({"columns": 2.0}, "columns must be .* got 2.0"),
    ({"columns": True}, "columns must be .* got True"),
    ({"limits": (1, 1)}, r"limits must be \(black, white\) with black < white, got \(1, 1\)"),
    ({"limits": (0, math.nan)}, "limits must be"),
    ({"limits": (0, 1, 2)}, "limits must be"),
    ({"limits": 1}, "limits must be"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_GRIDS)
def test_bad_grids_draw_nothing(arguments, message):
    ax = Figure().subplots()
    for axes in (ax, None):
        with pytest.raises(ValueError, match=message) as caught:
            show_images(**{"images": THREE, "ax": axes, "title": "title"} | arguments)
        assert "\n" not in str(caught.value)
    assert (ax.get_title(), len(ax.images), len(ax.texts), plt.get_fignums()) == ("", 0, 0, [])


def test_titles_and_colours():
    ax = show_images(THREE, titles=["7", None, "3 (is 5)"], colours=[None, None, "red"])
    assert [text.get_text() for text in ax.texts] == ["7", "", "3 (is 5)"]
    assert [text.get_color() for text in ax.texts] == ["black", "black", "red"]
    ax = show_images(THREE, titles=torch.tensor([3, 1, 4]), colours=iter(["C0", (1, 0, 0), "#00ff00"]))
    assert [text.get_text() for text in ax.texts] == ["3", "1", "4"]
    assert (rendered(show_images(THREE, titles=["$5", "$x", "^_"], title="$").figure) < 255).any()  # no formulas


@pytest.mark.parametrize("as_batch", [lambda x: x, list, iter, lambda x: x.numpy(), lambda x: x[:, None]])
def test_forms_of_a_batch(as_batch):
    ax = show_images(as_batch(THREE))
    assert [np.asarray(image.get_array()).tolist() for image in ax.images] == THREE.double().tolist()


def boxes(ax):
    """Left, right, bottom and top of every image and of every title, in pixels from below."""
    ax.figure.canvas.draw()
    images = []
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        (x0, y0), (x1, y1) = ax.transData.transform([(left, bottom), (right, top)])
        images.append((x0, x1, y0, y1))
    texts = [text.get_window_extent() for text in ax.texts if text.get_text()]
    return images, [(box.x0, box.x1, box.y0, box.y1) for box in texts]


def overlap(a, b, slack=1.0):
    return min(a[1], b[1]) - max(a[0], b[0]) > slack and min(a[3], b[3]) - max(a[2], b[2]) > slack


LENGTHS = [0, 1, 8, 23, 40]
# On small axes that are given, long titles may overlap: letters are not made smaller than 4 points.
PLACES = [(letters, None) for letters in LENGTHS]
PLACES += [(letters, given) for letters in LENGTHS[:3] for given in [(4, 3), (3, 6), (8, 2)]]


@pytest.mark.parametrize(("letters", "given"), PLACES)
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_nothing_overlaps_and_all_is_inside(count, letters, shape, given):
    ax = given and plt.figure(figsize=given, layout="constrained").subplots()
    titles = [text[:letters] for text in ["Ankle boot (is Sneaker) or a thing to wear", "W" * 50]] * count
    titles = titles[:count]
    ax = show_images(torch.rand(count, *shape), titles, ax=ax)
    images, texts = boxes(ax)
    everything = images + texts
    assert len(everything) == count * (1 + (letters > 0))
    assert not [(a, b) for i, a in enumerate(everything) for b in everything[:i] if overlap(a, b)]
    width, height = ax.figure.get_size_inches() * ax.figure.dpi
    for left, right, bottom, top in everything:
        assert left > -1 and right < width + 1 and bottom > -1 and top < height + 1
    for (left, right, bottom, top), text in zip(images, texts, strict=False):
        assert (right - left) / (top - bottom) == pytest.approx(shape[1] / shape[0])
        assert 0 < text[2] - top < 4  # a title stands right above its image
    order = [(round(-top), round(left)) for left, _, _, top in images]
    assert order == sorted(order)  # row by row


@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_columns(columns):
    for ax in (None, Figure().subplots()):
        images, _ = boxes(show_images(torch.rand(5, 4, 4), columns=columns, ax=ax))
        assert len({round(left) for left, *_ in images}) == min(columns, 5)


def test_a_new_figure_is_at_most_as_wide_as_a_notebook():
    for count in (1, 3, 8, 30):
        for letters in LENGTHS:
            width = show_images(torch.rand(count, 4, 4), ["x" * letters] * count).figure.get_size_inches()[0]
            assert width <= 8 + 1e-9
            plt.close("all")


def test_images_of_several_shapes():
    images, _ = boxes(show_images([torch.rand(8, 8), torch.rand(3, 4, 8), torch.rand(8, 2), torch.rand(1, 40)]))
    ratios = [(right - left) / (top - bottom) for left, right, bottom, top in images]
    assert ratios == pytest.approx([1, 2, 0.25, 40])


# Curves


@pytest.mark.parametrize("smooth", [0.0, 0.5, 0.9, 0.999])
def test_smoothed_is_a_weighted_mean(smooth):
    values = np.random.default_rng(0).normal(size=50)
    result = smoothed(values.tolist(), smooth)
    for t in range(50):
        weights = smooth ** np.arange(t, -1, -1.0)  # the newest has weight 1
        assert result[t] == pytest.approx((weights * values[: t + 1]).sum() / weights.sum(), rel=1e-9)
    gaps = [None, *values[:25].tolist(), math.nan, None, *values[25:].tolist()]
    with_gaps = smoothed(gaps, smooth)
    assert [value for value in with_gaps if not math.isnan(value)] == result
    assert [i for i, value in enumerate(with_gaps) if math.isnan(value)] == [0, 26, 27]


@pytest.mark.parametrize("smooth", [1, 1.5, -0.1, math.nan, math.inf])
def test_bad_smooth(smooth):
    for call in (lambda: smoothed([1.0], smooth), lambda: plot_curves({"loss": [1.0]}, smooth=smooth)):
        with pytest.raises(ValueError, match="smooth must be at least 0 and below 1, got"):
            call()
    assert plt.get_fignums() == []


def lines(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines}


@pytest.mark.parametrize(
    "values",
    [
        [3.0, 1.0, 2.0],
        (3, 1, 2),
        np.array([3, 1, 2]),
        torch.tensor([3.0, 1.0, 2.0], requires_grad=True),
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.bfloat16),
        [torch.tensor(3.0), torch.tensor(1), np.float32(2)],
        {3: "a", 1: "b", 2: "c"}.keys(),
    ],
)
def test_forms_of_a_curve(values):
    assert lines(plot_curves({"loss": values})) == {"loss": [[0, 3], [1, 1], [2, 2]]}
    assert lines(plot_curves({"loss": ([5, 6, 8.5], values)})) == {"loss": [[5, 3], [6, 1], [8.5, 2]]}
    assert lines(plot_curves({"loss": [torch.tensor([5, 6, 8.5]), values]})) == {"loss": [[5, 3], [6, 1], [8.5, 2]]}


def test_two_numbers_are_two_values():
    for values in ((3, 1), [3, 1], torch.tensor([3, 1]), [torch.tensor(3), torch.tensor(1)], (3, np.float64(1))):
        assert lines(plot_curves({"loss": values})) == {"loss": [[0, 3], [1, 1]]}
        plt.close("all")


def test_what_is_missing_is_a_gap():
    ax = plot_curves({"loss": [1.0, None, 3.0, math.nan, math.inf, -math.inf, 7.0]})
    (line,) = ax.lines
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [1, 3, 4, 5]
    assert line.get_markevery() == [0, 2, 6]
    assert plot_curves({"loss": [1.0, 2.0, None, 4.0]}).lines[0].get_markevery() == [3]
    assert plot_curves({"loss": [1.0, 2.0]}).lines[0].get_marker() == "None"


@pytest.mark.parametrize("smooth", [0.0, 0.9])
def test_lonely_points_are_visible(smooth):
    plain = rendered(plot_curves({"loss": [None] * 5}).figure)
    plt.close("all")
    ax = plot_curves({"loss": [None, 1.0, None, 2.0, None]}, smooth=smooth)
    blue = (rendered(ax.figure) == (31, 119, 180)).all(2)
    ax.get_legend().remove()
    assert blue.sum() > (plain == (31, 119, 180)).all(2).sum()
    assert (rendered(ax.figure) == (31, 119, 180)).all(2).sum() > 5


def test_smoothed_line_over_a_faint_one():
    ax = plot_curves({"loss": [4, 8], "error": [1, 1]}, smooth=0.5)
    raw, smooth, _, error = ax.lines
    assert raw.get_ydata().tolist() == [4, 8] and raw.get_alpha() == 0.25
    assert smooth.get_ydata().tolist() == [4, 5 / 0.75] and smooth.get_alpha() is None
    assert raw.get_color() == smooth.get_color() != error.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["loss", "error"]


def ticks(ax):
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    return [tick for tick in ax.get_xticks() if low <= tick <= high]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100])
def test_whole_x_get_whole_ticks(count):
    shown = ticks(plot_curves({"loss": list(range(count)), "late": ([count - 1], [0.5])}))
    assert shown and all(tick == int(tick) for tick in shown)
    assert shown == sorted(set(shown))


def test_ticks_are_left_alone_for_other_x():
    assert any(tick != int(tick) for tick in ticks(plot_curves({"loss": ([0, 0.5, 1], [1, 2, 3])})))
    ax = Figure().subplots()
    ax.set_xscale("log")
    locator = ax.xaxis.get_major_locator()
    plot_curves({"loss": ([1, 10, 100], [1, 2, 3])}, ax=ax)
    assert ax.xaxis.get_major_locator() is locator


def test_labels():
    ax = plot_curves({"a": [1], "b": [2], 3: [3]}, xlabel="epoch", ylabel="loss", title="run")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("epoch", "loss", "run")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "3"]
    ax = plot_curves({"empty": []})
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "value")
    plot_curves({"more": [1, 2]}, ax=ax)  # drawn beside what is there
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["empty", "more"]


BAD_CURVES = [
    ([1, 2], TypeError, "curves must map names to values, got list: write {'loss': values}"),
    (None, TypeError, "curves must map names to values, got NoneType"),
    ({}, ValueError, "curves is empty"),
    ({"a": [1], "loss": 0.5}, TypeError, "curves['loss'] must be a sequence of numbers, got 0.5"),
    ({"loss": None}, TypeError, "curves['loss'] must be a sequence of numbers, got None"),
    ({"loss": "low"}, TypeError, "curves['loss'] must be a sequence of numbers, got 'low'"),
    ({"loss": [1, "low"]}, TypeError, "curves['loss'] must be a sequence of numbers, got [1, 'low']"),
    ({"loss": [1, 2j]}, TypeError, "curves['loss'] must be a sequence of numbers, got [1, 2j]"),
    ({"loss": torch.zeros(2, 2)}, TypeError, "curves['loss'] must be a sequence of numbers, got [[0.0, 0.0], [0.0"),
    ({"loss": torch.zeros(())}, TypeError, "curves['loss'] must be a sequence of numbers, got 0.0"),
    ({"loss": ([0, 1], [1, [2]])}, TypeError, "y of curves['loss'] must be a sequence of numbers, got [1, [2]]"),
    ({"loss": ("ab", [1, 2])}, TypeError, "x of curves['loss'] must be a sequence of numbers, got 'ab'"),
    ({"loss": ([0, 1, 2], [1, 2])}, ValueError, "curves['loss'] has 3 values of x and 2 of y: give as many of each"),
]


@pytest.mark.parametrize(("curves", "kind", "message"), BAD_CURVES)
def test_bad_curves_draw_nothing(curves, kind, message):
    ax = Figure().subplots()
    for axes in (ax, None):
        with pytest.raises(kind) as caught:
            plot_curves(curves, ax=axes)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert (len(ax.lines), ax.get_xlabel(), plt.get_fignums()) == (0, "", [])


def test_a_notebook_puts_no_background_behind_a_picture(monkeypatch):
    inline = pytest.importorskip("matplotlib_inline.backend_inline")
    monkeypatch.setattr(show, "_in_notebook", lambda: True)
    ax = new_axes(None, (4, 2))
    ax.plot([1, 2])
    assert inline._fetch_figure_metadata(ax.figure) is None  # else JupyterLab fills it with black on a light page
    picture = BytesIO()
    ax.figure.canvas.print_figure(picture, facecolor=ax.figure.get_facecolor())
    picture.seek(0)
    assert plt.imread(picture)[0, 0, 3] == 0  # one sees the page
    plt.close(ax.figure)
