"""Losses against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import losses

NAMES = sorted(losses.LOSSES)
UNBOUNDED = [name for name in NAMES if name != "dlr"]
TARGETED = {"targeted_dlr": losses.targeted_dlr, "logit_difference": losses.logit_difference}
GUARD = 1e-12


def reference(name, logits, labels):
    z = np.float64(logits)
    rows = np.arange(len(z))
    own = z[rows, labels]
    if name in ("margin", "dlr"):
        others = z.copy()
        others[rows, labels] = -np.inf
        margin = others.max(axis=1) - own
        if name == "margin":
            return margin
        down = -np.sort(-z, axis=1)
        return margin / (down[:, 0] - down[:, 2] + GUARD)
    shift = z.max(axis=1, keepdims=True)
    return np.log(np.exp(z - shift).sum(axis=1)) + shift[:, 0] - own


def targeted_reference(name, logits, labels, targets):
    z = np.float64(logits)
    rows = np.arange(len(z))
    difference = z[rows, targets] - z[rows, labels]
    if name == "logit_difference":
        return difference
    down = -np.sort(-z, axis=1)
    return difference / (down[:, 0] - (down[:, 2] + down[:, 3]) / 2 + GUARD)


def batch(seed=0, b=50, k=7, size=3.0):
    rng = np.random.default_rng(seed)
    logits = (size * rng.normal(size=(b, k))).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(k, size=b), jnp.int32)


def test_by_hand():
    logits, labels = jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), jnp.array([1, 0])
    np.testing.assert_array_equal(losses.margin(logits, labels), [-1, 2])
    total = np.log(np.exp([1, 2, 3]).sum())
    expected = [total - 3, total - 1]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 3.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_against_reference(name, size):
    for k in (3 if name == "dlr" else 2, 7):
        logits, labels = batch(k=k, size=size)
        expected = reference(name, logits, labels)
        out = losses.LOSSES[name](logits, labels)
        assert out.dtype == jnp.float32 and out.shape == labels.shape
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jax.jit(losses.LOSSES[name])(logits, labels), out, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    logits, labels = batch()
    loss = losses.LOSSES[name]
    stacked = jax.vmap(loss)(logits.reshape(5, 10, 7), labels.reshape(5, 10))
    np.testing.assert_allclose(stacked.reshape(-1), loss(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    logits, labels = batch(b=10)
    grad = jax.grad(lambda z: losses.LOSSES[name](z, labels).sum())(logits)
    h = 1e-6
    for i in range(logits.shape[1]):
        change = np.zeros(logits.shape)
        change[:, i] = h
        plus = reference(name, np.float64(logits) + change, labels)
        minus = reference(name, np.float64(logits) - change, labels)
        np.testing.assert_allclose(grad[:, i], (plus - minus) / (2 * h), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_example_stands_alone(name):
    logits, _ = batch(b=4)
    labels = jnp.argmax(logits, axis=1)  # not the third highest: there DLR is constant
    jacobian = jax.jacobian(losses.LOSSES[name])(logits, labels)  # [b, b, k]
    for i, row in enumerate(jacobian):
        assert np.any(row[i] != 0)
        np.testing.assert_array_equal(np.delete(row, i, axis=0), 0)


def test_margin_tells_wrong_predictions():
    logits, labels = batch(b=2000, k=3)
    wrong = np.argmax(logits, axis=1) != labels
    assert 0 < wrong.sum() < 2000
    np.testing.assert_array_equal(losses.margin(logits, labels) > 0, wrong)


def test_margin_of_ties():
    logits, labels = jnp.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), jnp.arange(3)
    np.testing.assert_array_equal(losses.margin(logits, labels), [0, 0, 1])
    grad = jax.grad(lambda z: losses.margin(z, labels).sum())(logits)
    np.testing.assert_array_equal(grad, [[-1, 1, 0], [1, -1, 0], [0.5, 0.5, -1]])


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_stay_finite(name):
    logits, labels = jnp.array([[1e30, -1e30, 0.0], [1e4, 0.0, -1e4]]), jnp.array([1, 2])
    slope = 0 if name == "dlr" else 1  # of which both labels have the lowest logit: a plateau
    out, grad = jax.jit(
        lambda z: (
            losses.LOSSES[name](z, labels),
            jax.grad(lambda z: losses.LOSSES[name](z, labels).sum())(z),
        )
    )(logits)
    np.testing.assert_allclose(out, reference(name, logits, labels), rtol=1e-6)
    np.testing.assert_allclose(grad, [[slope, -slope, 0], [slope, 0, -slope]], atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_an_excluded_class_does_not_matter(name):
    logits, labels = batch(b=6, k=4)
    labels = labels % 3
    excluded = logits.at[:, 3].set(-jnp.inf)
    loss = losses.LOSSES[name]
    np.testing.assert_allclose(loss(excluded, labels), loss(logits[:, :3], labels), rtol=1e-6)
    grad = jax.grad(lambda z: loss(z, labels).sum())(excluded)
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[:, 3], 0)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_an_excluded_label_is_infinitely_wrong(name):
    logits = jnp.array([[-jnp.inf, 1.0, 2.0]])
    np.testing.assert_array_equal(losses.LOSSES[name](logits, jnp.array([0])), [np.inf])


@pytest.mark.parametrize(
    "logits, label, expected",
    [
        ([5.0, 4.0, 1.0, 0.0], 0, -1 / 4),  # right
        ([5.0, 4.0, 1.0, 0.0], 1, 1 / 4),  # wrong, the label second
        ([5.0, 4.0, 1.0, 0.0], 2, 1.0),  # third
        ([5.0, 4.0, 1.0, 0.0], 3, 5 / 4),  # last
        ([3.0, 3.0, 1.0, 0.0], 0, 0.0),  # two of the highest logits are equal
        ([3.0, 3.0, 1.0, 0.0], 1, 0.0),
        ([3.0, 3.0, 1.0, 0.0], 2, 1.0),
        ([3.0, 1.0, 1.0, 1.0], 0, -1.0),
        ([3.0, 3.0, 3.0, 1.0], 0, 0.0),  # three
        ([0.0, 0.0, 0.0, -1.0], 3, 1e12),
        ([7.0, 7.0, 7.0, 7.0], 2, 0.0),  # all
        ([-1.0, -3.0, -2.0], 0, -1 / 2),  # three classes
        ([-1.0, -3.0, -2.0], 1, 1.0),
    ],
)
def test_dlr_by_hand(logits, label, expected):
    out = losses.dlr(jnp.array([logits]), jnp.array([label]))
    np.testing.assert_allclose(out, [expected], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reference("dlr", [logits], [label]), [expected], rtol=1e-6)


@pytest.mark.parametrize(
    "logits, label, target, expected",
    [
        ([5.0, 4.0, 2.0, 0.0], 0, 1, -1 / 4),  # (5 - 4) / (5 - 2 / 2)
        ([5.0, 4.0, 2.0, 0.0], 0, 2, -3 / 4),
        ([5.0, 4.0, 2.0, 0.0], 0, 3, -5 / 4),
        ([5.0, 4.0, 2.0, 0.0], 1, 0, 1 / 4),  # wrong, as the target
        ([5.0, 4.0, 2.0, 0.0], 1, 2, -1 / 2),  # wrong, as another class
        ([5.0, 4.0, 2.0, 0.0], 2, 3, -1 / 2),
        ([5.0, 4.0, 2.0, 0.0], 1, 1, 0.0),
        ([3.0, 3.0, 1.0, 1.0, 0.0], 0, 1, 0.0),  # ties
        ([3.0, 1.0, 1.0, 1.0, 0.0], 0, 4, -3 / 2),
        ([3.0, 3.0, 3.0, 1.0, 0.0], 0, 3, -2.0),
        ([2.0, 2.0, 2.0, 2.0, 1.0], 0, 4, -1e12),
        ([7.0, 7.0, 7.0, 7.0], 0, 2, 0.0),
    ],
)
def test_targeted_dlr_by_hand(logits, label, target, expected):
    arguments = [logits], [label], [target]
    out = losses.targeted_dlr(*map(jnp.array, arguments))
    np.testing.assert_allclose(out, [expected], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(targeted_reference("targeted_dlr", *arguments), out, rtol=1e-6)
    difference = losses.logit_difference(*map(jnp.array, arguments))
    np.testing.assert_array_equal(difference, [logits[target] - logits[label]])


@pytest.mark.parametrize("k", [4, 10])
@pytest.mark.parametrize("name", TARGETED)
def test_targeted_against_reference(name, k):
    logits, labels = batch(k=k)
    targets = jnp.asarray(np.random.default_rng(1).integers(k, size=len(labels)), jnp.int32)
    loss, expected = TARGETED[name], targeted_reference(name, logits, labels, targets)
    out = loss(logits, labels, targets)
    assert out.dtype == jnp.float32 and out.shape == labels.shape
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(loss)(logits, labels, targets), out, rtol=1e-6, atol=1e-7)
    stacked = [array.reshape(5, 10, *array.shape[1:]) for array in (logits, labels, targets)]
    np.testing.assert_allclose(jax.vmap(loss)(*stacked).reshape(-1), out, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_gradients(name):
    logits, labels = batch(b=10)
    targets = (labels + 1 + jnp.arange(10, dtype=jnp.int32) % 6) % 7
    grad = jax.grad(lambda z: TARGETED[name](z, labels, targets).sum())(logits)
    h = 1e-6
    for i in range(logits.shape[1]):
        change = np.zeros(logits.shape)
        change[:, i] = h
        plus = targeted_reference(name, np.float64(logits) + change, labels, targets)
        minus = targeted_reference(name, np.float64(logits) - change, labels, targets)
        np.testing.assert_allclose(grad[:, i], (plus - minus) / (2 * h), atol=1e-6)


@pytest.mark.parametrize("scale, shift", [(1.0, 5.0), (0.01, -1.0), (300.0, 0.0)])
def test_dlr_forgets_scale_and_shift(scale, shift):
    """Of the logits; from float64 values, since float32 would round away what is left of them."""
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(50, 6)), jnp.asarray(rng.integers(6, size=50), jnp.int32)
    targets = (labels + 2) % 6
    with jax.enable_x64(True):
        original, moved = jnp.asarray(logits), jnp.asarray(scale * logits + shift)
        for loss in (losses.dlr, lambda z, y: losses.targeted_dlr(z, y, targets)):
            out = loss(moved, labels)
            assert out.dtype == jnp.float64
            np.testing.assert_allclose(out, loss(original, labels), rtol=1e-9)
        difference = losses.logit_difference(moved, labels, targets)
        expected = scale * losses.logit_difference(original, labels, targets)
        np.testing.assert_allclose(difference, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [losses.dlr, *(lambda z, y, loss=loss: loss(z, y, y + 1) for loss in TARGETED.values())],
    ids=["dlr", *TARGETED],
)
def test_constant_logits(loss):
    logits = jnp.broadcast_to(jnp.array([[0.0], [-3.0], [1e30]]), (3, 5))
    labels = jnp.array([0, 3, 2])
    out, grad = jax.jit(lambda z: (loss(z, labels), jax.grad(lambda z: loss(z, labels).sum())(z)))(
        logits
    )
    np.testing.assert_array_equal(out, [0, 0, 0])
    assert np.all(np.isfinite(grad))


def test_check_classes():
    for loss in ("dlr", losses.dlr):
        losses.check_classes(loss, 3)
        with pytest.raises(
            ValueError, match="^`loss` dlr needs at least 3 classes, got a model of 2$"
        ):
            losses.check_classes(loss, 2)
    for loss in ("cross_entropy", "margin", losses.margin, lambda z, y: losses.dlr(z, y)):
        losses.check_classes(loss, 2)


def test_get():
    assert losses.get("margin") is losses.margin
    assert losses.get("cross_entropy") is losses.cross_entropy
    assert losses.get("dlr") is losses.dlr
    assert losses.get(abs) is abs
    with pytest.raises(
        ValueError, match="^`loss` must be one of cross_entropy, dlr, margin; got 'hinge'$"
    ):
        losses.get("hinge")
