"""Plots: what they draw where, and that large ones stay legible."""

import io

import numpy as np
import pytest
from scipy.cluster import hierarchy
from synthetic_runs import CIFAR10, GROUPS100, NAMES100, write_run

from jaxclus.report import _charts, _images
from jaxclus.report._colours import class_colours, group_colours, run_colours
from jaxclus.report._read import Examples, read_runs


def drawn(figure):
    """The pixels [h, w, 3] of a figure as the page saves it."""
    import matplotlib.image

    file = io.BytesIO()
    with _charts.style():
        figure.savefig(file, format="png", bbox_inches="tight")
    file.seek(0)
    return matplotlib.image.imread(file, format="png")[..., :3]


def test_heat_map_follows_the_order_and_colours_names():
    matrix = np.array([[1.0, -0.5, 0.25], [-0.5, 1.0, 0.0], [0.25, 0.0, 1.0]])
    colours = ("#ff0000", "#00ff00", "#0000ff")
    figure = _charts.heat_map(matrix, "abc", colours, np.array([2, 0, 1]), signed=True)
    axes = figure.axes[0]
    expected = [[1, 0.25, 0], [0.25, 1, -0.5], [0, -0.5, 1]]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert axes.images[0].get_clim() == (-1, 1)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["c", "a", "b"]
        assert [label.get_color() for label in labels] == ["#0000ff", "#ff0000", "#00ff00"]
    assert [text.get_text() for text in axes.texts[:3]] == ["1.00", "0.25", "0.00"]


def test_distances_start_at_zero():
    figure = _charts.heat_map(np.array([[0.0, 30.0], [30.0, 0.0]]), "ab", ("k", "k"), signed=False)
    assert figure.axes[0].images[0].get_clim() == (0, 30)
    assert figure.axes[0].texts[1].get_text() == "30.0"


def test_rounded_zeros_have_no_sign():
    figure = _charts.heat_map(np.array([[1, -0.001], [-0.001, 1]]), "ab", ("k", "k"), signed=True)
    assert figure.axes[0].texts[1].get_text() == "0.00"


def test_dendrogram_has_the_leaves_and_pure_branches_in_colour():
    points = np.array([[0.0], [0.1], [5.0], [5.3], [9.0]])
    linkage = hierarchy.linkage(points, "average")
    colours = ("#ff0000", "#ff0000", "#0000ff", "#0000ff", "#0000ff")
    axes = _charts.dendrogram(linkage, "abcde", colours).axes[0]
    labels = axes.get_yticklabels()
    expected = [("abcde"[i], colours[i]) for i in hierarchy.leaves_list(linkage)]
    assert [(label.get_text(), label.get_color()) for label in labels] == expected
    by_height = sorted((max(line.get_xdata()), line.get_color()) for line in axes.lines)
    heights, branch_colours = zip(*by_height, strict=True)
    np.testing.assert_allclose(heights, linkage[:, 2])
    assert branch_colours == ("#ff0000", "#0000ff", "#0000ff", _charts.MUTED)


@pytest.mark.parametrize("kind", ["heat_map", "dendrogram"])
def test_hundred_class_names_do_not_overlap(kind):
    rng = np.random.default_rng(0)
    matrix = np.corrcoef(rng.normal(size=(100, 8)))
    colours = ("#000000",) * 100
    if kind == "heat_map":
        figure = _charts.heat_map(matrix, NAMES100, colours, signed=True)
    else:
        figure = _charts.dendrogram(hierarchy.linkage(matrix), NAMES100, colours)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == 100 and labels[0].get_fontsize() >= 5
    boxes = sorted((box.y0, box.y1) for box in (label.get_window_extent() for label in labels))
    for (_, top), (bottom, _) in zip(boxes, boxes[1:], strict=False):
        assert bottom > top - 2


def test_training_curves_use_steps_unless_all_runs_have_epochs(tmp_path):
    run = write_run(tmp_path / "run")
    (read,) = read_runs([run])
    figure = _charts.training_curves([read], run_colours(1))
    assert figure.axes[0].get_xlabel() == "epoch"
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (read,) = read_runs([run])
    figure = _charts.training_curves([read], run_colours(1))
    assert figure.axes[0].get_xlabel() == "step"
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [2.0, 1.0])


def test_running_mean_is_the_mean_of_a_symmetric_window():
    values = np.random.default_rng(0).normal(size=250)
    expected = [
        values[i - reach : i + reach + 1].mean()
        for i in range(250)
        for reach in [min(2, i, 249 - i)]
    ]
    np.testing.assert_allclose(_charts._running_mean(values), expected, atol=1e-12)


def test_robustness_curves_start_at_the_clean_accuracy(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", norms=("l2", "linf"))])
    figure = _charts.robustness_curves(runs, run_colours(1))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Linf threat model",
        "L2 threat model",
    ]
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0, 2, 4, 8, 12, 16])
    points = [point.robust_accuracy for point in runs[0].evaluations[1].curve]
    np.testing.assert_array_equal(line.get_ydata(), [0.84, *points])


def test_weights_are_scaled_about_the_middle():
    weight = np.zeros((2, 4, 4, 3))
    weight[1, ..., 0] = -2.0
    axes = _images.weight_images(weight, "ab", ("k", "k")).axes[0]
    first, second = (image.get_array() for image in axes.images)
    assert np.all(first == 0.5)
    assert np.all(second[..., 0] == 0.0) and np.all(second[..., 1:] == 0.5)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_weights_of_any_number_and_channels(count, channels):
    weight = np.random.default_rng(0).normal(size=(count, 5, 7, channels))
    figure = _images.weight_images(weight, CIFAR10 + ["x", "y"], ("k",) * 12)
    assert len(figure.axes[0].images) == len(figure.axes[0].texts) == count
    assert drawn(figure).std() > 0.05


def examples_of(delta, count=8):
    images = np.full((count, 3, 3, 1), 0.5, np.float32)
    return Examples(
        images=images,
        adversarial=images + np.float32(delta),
        labels=np.zeros(count, int),
        predictions=np.zeros(count, int),
        adversarial_predictions=np.ones(count, int),
        eps=0.1,
    )


def test_magnification_fills_the_scale():
    assert _images.magnification(examples_of(0.125)) == 4
    assert _images.magnification(examples_of(0.4)) == 1
    assert _images.magnification(examples_of(0.0)) == 1


def test_examples_show_labels_predictions_and_the_magnified_change():
    axes = _images.example_grid(examples_of(0.125), ["cat", "dog"].__getitem__).axes[0]
    assert len(axes.images) == 3 * _images.MOST_EXAMPLES
    original, adversarial, change = (image.get_array() for image in axes.images[:3])
    assert np.all(original == 0.5) and np.all(adversarial == 0.625) and np.all(change == 1.0)
    texts = {(text.get_text(), text.get_color()) for text in axes.texts}
    assert {("→ cat", _images._RIGHT), ("→ dog", _images._WRONG)} < texts
    assert "change ×4" in {text for text, _ in texts}


def test_group_colours_are_distinct_and_dark(tmp_path):
    run = write_run(tmp_path / "run", class_names=NAMES100, groups=GROUPS100, shape=(2, 2, 1))
    (read,) = read_runs([run])
    colours = group_colours(read)
    assert list(colours) == [name for name, _ in GROUPS100]
    assert len(set(colours.values())) == 20
    assert class_colours(read)[7] == colours["superclass 1"]
    for colour in colours.values():
        # The contrast with white that WCAG asks of large text and graphics.
        red, green, blue = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) > 3
    assert len(set(run_colours(6))) == 6
