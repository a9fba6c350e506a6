"""Where the prototypes of classes stand: points of R^d far apart, chosen before training."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Float

from jaxclus import _checks, _compile
from jaxclus._distances import directions


def repulsive(
    key: jax.Array,
    num_classes: int,
    dim: int,
    steps: int = 100,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Array, "k d"]:
    """Prototypes that push each other away in Linf, as Deep Repulsive Prototypes have them.

    From entries drawn uniformly from [-1, 1], gradient descent with momentum on

        J(C) = -sum_{i < j} |c_i - c_j|_inf,

    at the published rate of 0.01 and momentum of 0.9. (The published J has two constants more, by
    which its gradient does not change.) Nothing holds the entries back: J has no minimum, and the
    longer the descent, the longer are the prototypes. Of each pair only the entry that differs most
    moves; of several equal ones, each by its share.

    Prototypes of the sum are of very different length, so that with many classes the inner product
    of a third or more of them is largest with another one; see `separation`.

    Args:
        key: a typed key.
        num_classes: k, at least 2.
        dim: d, at least 1.
        steps: of the descent, at least 0. Published with d = 100 for 10 classes: 100; with d = 500
            for 100 classes: 1,000 and 5,000.
        reduction: "sum", as the published code; or "mean" over the pairs, as the name of the files
            that its configurations for 100 classes read says.

    Returns:
        The prototypes, float32 [k, d].

    Raises:
        ValueError, TypeError: a value is not as said.

    Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness",
    arXiv:2105.12427, as in their code.
    """
    _check(num_classes, dim)
    _checks.at_least("steps", steps, 0)
    _checks.one_of("reduction", reduction, ("sum", "mean"))
    shape, pairs = (num_classes, dim), num_classes * (num_classes - 1) / 2
    start = jax.random.uniform(_checks.typed_key("key", key), shape, minval=-1.0, maxval=1.0)
    return _repelled(start, 1.0 if reduction == "sum" else 1 / pairs, steps)


@_compile.jit
def _repelled(start: jax.Array, weight: jax.Array | float, steps: jax.Array | int) -> jax.Array:
    """The prototypes after `steps` steps on J times `weight`."""
    first, second = np.triu_indices(len(start), 1)

    def energy(prototypes: jax.Array) -> jax.Array:
        return -weight * jnp.abs(prototypes[first] - prototypes[second]).max(axis=1).sum()

    return _descended(energy, optax.sgd(0.01, momentum=0.9), start, steps)


def hyperspherical(
    key: jax.Array, num_classes: int, dim: int, steps: int = 10_000, *, as_published: bool = False
) -> Float[Array, "k d"]:
    """Unit vectors whose largest cosine is small: an approximate answer to Tammes's problem.

    From normalised normal draws, projected gradient descent with momentum on

        mean_i max_{j != i} <p_i, p_j>,        p_i <- p_i / |p_i|_2 after each step,

    at a rate of 0.1 that falls to 0 (cosine), with a momentum of 0.9. Where d >= k - 1 the optimum
    is `simplex`, which is exact.

    Args:
        key: a typed key.
        num_classes: k, at least 2.
        dim: d, at least 2.
        steps: of the descent, at least 0; 10,000 in the published code.
        as_published: at a constant rate and without momentum, of which the published code has one
            that it forgets after every step.

    Returns:
        The prototypes, float32 [k, d], each of length 1.

    Raises:
        ValueError, TypeError: a value is not as said.

    Mettes, van der Pol and Snoek, "Hyperspherical Prototype Networks", NeurIPS 2019,
    arXiv:1901.10514, as in their code.
    """
    _check(num_classes, dim)
    _checks.at_least("dim", dim, 2)
    _checks.at_least("steps", steps, 0)
    start = jax.random.normal(_checks.typed_key("key", key), (num_classes, dim))
    return _spread(start, steps=steps, as_published=as_published)


@functools.partial(_compile.jit, static_argnames=("steps", "as_published"))
def _spread(start: jax.Array, *, steps: int, as_published: bool) -> jax.Array:
    others = ~np.eye(len(start), dtype=bool)

    def largest_cosine(prototypes: jax.Array) -> jax.Array:
        cosines = jnp.matmul(prototypes, prototypes.T, precision="highest")
        return jnp.where(others, cosines, -jnp.inf).max(axis=1).mean()

    rate = optax.cosine_decay_schedule(0.1, max(steps, 1))
    sgd = optax.sgd(0.1) if as_published else optax.sgd(rate, momentum=0.9)
    return _descended(largest_cosine, sgd, directions(start), steps, directions)


def _descended(
    energy: Callable[[jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    start: jax.Array,
    steps: jax.Array | int,
    project: Callable[[jax.Array], jax.Array] = lambda point: point,
) -> jax.Array:
    """Where the optimiser's steps, each followed by the projection, lead."""

    def step(_: jax.Array, carry: tuple[jax.Array, optax.OptState]):
        point, state = carry
        updates, state = optimizer.update(jax.grad(energy)(point), state)
        moved: Any = optax.apply_updates(point, updates)  # which allows for other pytrees
        return project(moved), state

    return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]


def simplex(num_classes: int, dim: int) -> Float[Array, "k d"]:
    """The vertices of a regular simplex: unit vectors with all cosines -1 / (k - 1).

    No k unit vectors have a smaller largest cosine. They are c_i = sqrt(k / (k - 1)) (e_i - 1 / k)
    in an orthonormal basis of the k - 1 dimensions that these span; further entries are 0. Times a
    number they are the centres of Max-Mahalanobis distributions, as of Pang et al.,
    arXiv:1905.10626.

    Args:
        num_classes: k, at least 2.
        dim: d, at least k - 1.

    Returns:
        The prototypes, float32 [k, d], each of length 1.

    Raises:
        ValueError, TypeError: a value is not as said.
    """
    _check(num_classes, dim)
    if dim < num_classes - 1:
        raise ValueError(f"`dim` must be at least `num_classes` - 1 = {num_classes - 1}, got {dim}")
    basis = scipy.linalg.helmert(num_classes)  # [k - 1, k], orthonormal rows that sum to 0
    vertices = basis.T * np.sqrt(num_classes / (num_classes - 1))
    return _padded(vertices, dim)


def hadamard(num_classes: int, dim: int) -> Float[Array, "k d"]:
    """Rows of a Hadamard matrix: orthogonal, with entries of 1 and -1.

    Any two differ by 2 in half of the entries that are not 0, so that they are apart in every norm.
    With n the least power of 2 that is at least k, Sylvester's n x n matrix is repeated as often as
    it fits into d columns; entries of the columns that are left are 0.

    Args:
        num_classes: k, at least 2.
        dim: d, at least n.

    Returns:
        The prototypes, float32 [k, d].

    Raises:
        ValueError, TypeError: a value is not as said.

    Sylvester's construction (1867).
    """
    _check(num_classes, dim)
    size = 1 << (num_classes - 1).bit_length()
    if dim < size:
        raise ValueError(
            f"`dim` must be at least {size}, the least power of 2 not below `num_classes` = "
            f"{num_classes}, got {dim}"
        )
    rows = scipy.linalg.hadamard(size)[:num_classes]
    return _padded(np.tile(rows, dim // size), dim)


def _check(num_classes: int, dim: int) -> None:
    _checks.at_least("num_classes", num_classes, 2)
    _checks.at_least("dim", dim, 1)


def _padded(points: np.ndarray, dim: int) -> jax.Array:
    """The points as float32 with zeros up to `dim` entries."""
    filled = np.pad(points, ((0, 0), (0, dim - points.shape[1])))
    return jnp.asarray(filled, jnp.float32)
