"""Correlation matrices side by side: what is drawn where, and what is refused."""

import numpy as np
import pytest

import jaxclus as jc
from jaxclus.report._colours import palette

NAMES = ("ant", "bus", "cat", "dog")
GROUPS = (("animals", (3, 0, 2)), ("vehicles", (1,)))
ORDER = [3, 0, 2, 1]


def matrix(seed):
    return np.corrcoef(np.random.default_rng(seed).normal(size=(4, 6)))


def panels(figure, count):
    """The panels of a figure; behind them comes the colour bar."""
    assert len(figure.axes) == count + 1
    return figure.axes[:count]


@pytest.mark.parametrize("count", [1, 3])
def test_one_panel_for_each_matrix_on_one_scale(count):
    matrices = {f"network {i}": matrix(i) for i in range(count)}
    figure = jc.report.correlation_panels(matrices, NAMES, GROUPS)
    for axes, (title, wanted) in zip(panels(figure, count), matrices.items(), strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), wanted[np.ix_(ORDER, ORDER)])
        assert image.get_clim() == (-1, 1)
        assert axes.get_title() == title
    assert figure.axes[-1].get_ylim() == (-1, 1)


def test_classes_stand_group_by_group_in_their_colours():
    figure = jc.report.correlation_panels({"a": matrix(0), "b": matrix(1)}, NAMES, GROUPS)
    animals, vehicles = palette(2)
    wanted = [("dog", animals), ("ant", animals), ("cat", animals), ("bus", vehicles)]

    def shown(labels):
        return [(label.get_text(), label.get_color()) for label in labels]

    first, second = panels(figure, 2)
    assert shown(first.get_yticklabels()) == wanted  # the second has the same rows
    assert not any(text for text, _ in shown(second.get_yticklabels()))
    for axes in (first, second):
        assert shown(axes.get_xticklabels()) == wanted
        across, down = (line.get_xydata() for line in axes.lines)
        assert set(across[:, 1]) == {2.5} and set(down[:, 0]) == {2.5}  # between the groups


def test_jax_arrays_are_drawn_and_long_names_cut():
    import jax.numpy as jnp

    names = ("a name of many letters", *NAMES[1:])
    figure = jc.report.correlation_panels({"": jnp.eye(4)}, names, GROUPS)
    (axes,) = panels(figure, 1)
    assert axes.get_xticklabels()[1].get_text() == "a name of man…"
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(4))


@pytest.mark.parametrize(
    "matrices, names, groups, message",
    [
        ({}, NAMES, GROUPS, "`matrices` must hold at least one matrix, got none"),
        ({"one": np.eye(3)}, NAMES, GROUPS, r"`matrices` .* the 4 classes, got \(3, 3\) for 'one'"),
        ({"one": np.eye(4), "two": np.ones((4, 5))}, NAMES, GROUPS, r"got \(4, 5\) for 'two'"),
        ({"one": np.ones(4)}, NAMES, GROUPS, r"got \(4,\) for 'one'"),
        ({"one": np.eye(4)}, NAMES, (("a", (0, 1, 2)),), "`groups` .* class 3 is in none"),
        ({"one": np.eye(4)}, NAMES, (("a", (0, 1, 2)), ("b", (2, 3))), "`groups` .* class 2"),
        ({"one": np.eye(4)}, NAMES, (("a", (0, 1, 2, 4)),), r"`groups` .* in \[0, 3\], got 4"),
        # As many classes as there are, but not the same.
        ({"one": np.eye(4)}, NAMES, (("a", (0, 1)), ("b", (2, 2))), "`groups` .* class 2"),
    ],
)
def test_what_does_not_fit_is_named(matrices, names, groups, message):
    with pytest.raises(ValueError, match=message):
        jc.report.correlation_panels(matrices, names, groups)
