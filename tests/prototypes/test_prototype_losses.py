from typing import get_args

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxclus.prototypes import prototype_loss
from jaxclus.prototypes._losses import PrototypeDistance, published_loss

RNG = np.random.default_rng(0)
Z, P = RNG.standard_normal((2, 12, 5)).astype(np.float32)


def reference(name, z, p):
    z, p = np.asarray(z, np.float64), np.asarray(p, np.float64)
    lengths = np.linalg.norm(z, axis=1) * np.linalg.norm(p, axis=1)
    return {
        "linf": lambda: np.abs(z - p).max(axis=1),
        "cosine": lambda: 1 - (z * p).sum(axis=1) / lengths,
        "cosine_squared": lambda: (1 - (z * p).sum(axis=1) / lengths) ** 2,
        "l2": lambda: ((z - p) ** 2).sum(axis=1) / 2,
    }[name]()


@pytest.mark.parametrize("name", get_args(PrototypeDistance))
def test_losses_equal_the_specification(name):
    found = prototype_loss(Z, P, name)
    np.testing.assert_allclose(found, reference(name, Z, P), rtol=1e-5, atol=1e-6)
    jitted = jax.jit(lambda z, p: prototype_loss(z, p, name))(Z, P)
    np.testing.assert_allclose(jitted, found, rtol=1e-5, atol=1e-6)
    one_by_one = jax.vmap(lambda z, p: prototype_loss(z[None], p[None], name)[0])(Z, P)
    np.testing.assert_allclose(one_by_one, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", get_args(PrototypeDistance))
def test_gradients_equal_finite_differences(name):
    slope, step = jax.grad(lambda z: prototype_loss(z, P, name).sum())(jnp.asarray(Z)), 1e-5
    for i in range(5):
        move = step * np.eye(5)[i]
        ends = [reference(name, Z.astype(np.float64) + sign * move, P) for sign in (1, -1)]
        wanted = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slope[:, i], wanted, rtol=1e-3, atol=1e-4)


def test_equal_entries_share_the_gradient_of_linf():
    slope = jax.grad(lambda z: prototype_loss(z[None], jnp.zeros((1, 3)))[0])
    np.testing.assert_array_equal(slope(jnp.array([2.0, -2.0, 1.0])), [0.5, -0.5, 0.0])


@pytest.mark.parametrize("name", get_args(PrototypeDistance))
def test_gradients_are_finite_at_zero_and_at_the_prototype(name):
    for z in (jnp.zeros((1, 5)), jnp.asarray(P[:1])):
        loss, slope = jax.value_and_grad(lambda z: prototype_loss(z, P[:1], name)[0])(z)
        assert np.isfinite(loss) and np.isfinite(slope).all()


@pytest.mark.parametrize("name", get_args(PrototypeDistance))
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_of_low_precision_are_float32(name, dtype):
    z, p = jnp.asarray(100 * Z, dtype), jnp.asarray(100 * P, dtype)
    found = prototype_loss(z, p, name)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference(name, z, p), rtol=1e-5)


def test_the_gradient_of_cosines_at_zero_leads_to_the_prototype():
    slope = jax.grad(lambda z: prototype_loss(z, P[:1], "cosine")[0])(jnp.zeros((1, 5)))
    np.testing.assert_allclose(slope[0], -P[0] / np.linalg.norm(P[0]), rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "cosine_squared"])
def test_published_cosines_are_those_of_columns(name):
    found = published_loss(jnp.asarray(Z), jnp.asarray(P), name)
    np.testing.assert_allclose(found, reference(name, Z.T, P.T), rtol=1e-5)
    # So that one image's place moves the loss of others.
    moved = published_loss(jnp.asarray(Z).at[0].multiply(-1.0), jnp.asarray(P), name)
    assert np.abs(moved - found).min() > 1e-3


def test_published_linf_is_that_of_a_place_nearby():
    z = jnp.array([[2e-6, 0.0], [-2e-6, 0.0], [0.0, 0.0]])
    found = published_loss(z, jnp.zeros((3, 2)), "linf")
    np.testing.assert_allclose(found, [3e-6, 1e-6, 1e-6], rtol=1e-5)


@pytest.mark.parametrize(
    "z, p, error, message",
    [
        (Z[:, :4], P, ValueError, "`targets` must have the embeddings' shape .12, 4., got .12, 5."),
        (Z[0], P, ValueError, "`embeddings` must have the shape"),
        (Z.astype(int), P, TypeError, "`embeddings` must be floating point"),
        (Z, np.full_like(P, np.nan), ValueError, "`targets` must be finite"),
    ],
)
def test_bad_arguments(z, p, error, message):
    with pytest.raises(error, match=message):
        prototype_loss(z, p)


def test_an_unknown_distance():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="distance"):
        prototype_loss(Z, P, "l1")
