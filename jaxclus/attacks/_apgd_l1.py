"""APGD in the L1 norm: sparse steps, first in larger balls (arXiv:2103.01208).

A step moves the pixels of the largest gradients by the same amount and projects onto ball and box:

    x_{t+1} = project(x_t + step_size s / |s|_1),  s = sign(grad) on the share q of largest |grad|.

A share q of 1 / 1.5 of the pixels that the best iterate has moved is reviewed every 4 % of a
phase's steps. Where the best iterate now moves less than 95 % of the pixels that it had, the step
size is eps again and the search goes back to the best iterate; elsewhere the step size is divided
by 1.5, down to eps / 10. The radius is 3 eps for the first 30 % of all steps, 2 eps for the next
30 %, then eps; each phase starts from the projection of the best iterate of the one before, and
only iterates of the last count as adversarial.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxclus.attacks._base import Images
from jaxclus.attacks._gradient import Evaluation
from jaxclus.attacks._search import select
from jaxclus.threat import L1, kth_largest

_RADII = (3, 2, 1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which phase an evaluation is in; a phase of n steps evaluates n + 1 iterates.

    Attributes:
        steps: number of steps of all phases.
    """

    steps: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of steps of each phase, at least 0."""
        early = min(math.ceil(0.3 * self.steps), self.steps // 2)
        return early, early, self.steps - 2 * early

    @property
    def evaluations(self) -> int:
        """Number of iterates that are evaluated."""
        return self.steps + len(_RADII)

    def _table(self) -> list[tuple[int, int, int]]:
        """Phase, number of the iterate in it and number of steps in it, for each evaluation."""
        return [(p, j, n) for p, n in enumerate(self.lengths) for j in range(n + 1)]

    def inside(self, i: jax.Array) -> jax.Array:
        """Whether the i-th iterate is in the ball of radius eps."""
        return jnp.array([phase == len(_RADII) - 1 for phase, _, _ in self._table()])[i]

    def radius(self, i: jax.Array) -> jax.Array:
        """Radius of the i-th iterate's phase over eps."""
        return jnp.array([float(_RADII[phase]) for phase, _, _ in self._table()])[i]

    def first(self, i: jax.Array) -> jax.Array:
        """Whether a phase begins with the i-th iterate."""
        return jnp.array([j == 0 for _, j, _ in self._table()])[i]

    def last(self, i: jax.Array) -> jax.Array:
        """Whether a phase ends with the i-th iterate."""
        return jnp.array([j == n for _, j, n in self._table()])[i]

    def review(self, i: jax.Array) -> jax.Array:
        """Whether the step size is reviewed at the i-th iterate."""
        due = [j > 0 and j % max(int(0.04 * n), 1) == 0 for _, j, n in self._table()]
        return jnp.array(due)[i]


class Ascent(NamedTuple):
    """The memory of a search; b images each.

    Attributes:
        iterate: x_t [b, h, w, c].
        best: the iterate of highest loss in this phase [b, h, w, c].
        best_gradient: the gradient there [b, h, w, c].
        best_loss: the loss there [b].
        step_size: length of a step [b].
        share: share q of the pixels that a step moves [b].
        moved: how many pixels the best iterate had moved at the last review [b].
    """

    iterate: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    step_size: jax.Array
    share: jax.Array
    moved: jax.Array


def start(threat: L1, images: Images) -> Ascent:
    """From standard normal noise, projected onto the first and largest ball."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.x.shape[1:]))(images.keys)
    ones = jnp.ones(images.y.shape)
    iterate = _scaled(threat, _RADII[0] * ones).project(images.x + noise, images.x)
    return Ascent(iterate, iterate, jnp.zeros_like(iterate), -jnp.inf * ones, ones, ones, ones)


def move(
    threat: L1, schedule: Schedule, images: Images, i: jax.Array, at: Evaluation, old: Ascent
) -> Ascent:
    """The memory after the bookkeeping of the i-th iterate and the step to the next one."""
    first, last, review = schedule.first(i), schedule.last(i), schedule.review(i)
    ball = _scaled(threat, schedule.radius(i))
    pixels = math.prod(images.x.shape[1:])

    best, best_gradient, best_loss = select(
        first | (at.loss > old.best_loss),
        (old.iterate, at.gradient, at.loss),
        (old.best, old.best_gradient, old.best_loss),
    )
    now = (best != images.x).sum(axis=(1, 2, 3), dtype=jnp.float32)
    sparser = review & (now < 0.95 * old.moved)
    shorter = jnp.clip(old.step_size / 1.5, min=ball.eps / 10, max=ball.eps)
    step_size = jnp.where(review, jnp.where(sparser, ball.eps, shorter), old.step_size)
    step_size = jnp.where(first, ball.eps, step_size)
    share = jnp.where(first | review, now / pixels / 1.5, old.share)
    x, gradient = select(sparser, (best, best_gradient), (old.iterate, at.gradient))

    direction = _sparse_sign(gradient, share)
    count = jnp.abs(direction).sum(axis=(1, 2, 3))
    stepped = x + (step_size / (count + 1e-10))[:, None, None, None] * direction
    following = _scaled(threat, schedule.radius(jnp.minimum(i + 1, schedule.evaluations - 1)))
    return Ascent(
        iterate=following.project(select(last, best, stepped), images.x),
        best=best,
        best_gradient=best_gradient,
        best_loss=best_loss,
        step_size=step_size,
        share=share,
        moved=jnp.where(first | review, now, old.moved),
    )


def _scaled(threat: L1, factor: jax.Array) -> L1:
    """A ball for each image, of radius eps times its factor [b]."""
    return jax.tree.map(lambda eps: eps * factor, threat)


def _sparse_sign(gradient: jax.Array, share: jax.Array) -> jax.Array:
    """The sign of the gradient where its size is among the largest `share` [b], else 0."""
    sizes = jnp.abs(gradient)
    n = math.prod(sizes.shape[1:])
    smaller = jnp.clip(((1 - share) * n).astype(jnp.int32), min=0, max=n - 1)
    threshold = kth_largest(sizes, n - smaller)[:, None, None, None]
    return jnp.where(sizes >= threshold, jnp.sign(gradient), 0.0)
