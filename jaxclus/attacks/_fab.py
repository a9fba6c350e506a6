"""The fast adaptive boundary attack, untargeted and targeted."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient, _hyperplane
from jaxclus.attacks._base import Images, MinimumNormAttack, State

# Radii of random starts without a threat model, as published.
_START_EPS = {"linf": 0.3, "l2": 1.0, "l1": 5.0}


class _Memory(NamedTuple):
    """The iterate and the image, flat: their shape would slow every operation on them (on a CPU).

    Attributes:
        point: the iterate [b, h * w * c].
        origin: the image [b, h * w * c].
    """

    point: jax.Array
    origin: jax.Array


class _FastAdaptiveBoundary(MinimumNormAttack, abc.ABC):
    """What both variants share; subclasses are dataclasses and say which boundary a step uses."""

    steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.at_least("restarts", self.restarts, 1)
        _checks.not_negative("alpha_max", self.alpha_max)
        _checks.positive("eta", self.eta)
        _checks.not_negative("beta", self.beta)

    @abc.abstractmethod
    def _linearise(
        self, model: Classifier, keys: jax.Array, images: Images, x_adv: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gap [b] and normal [b, h, w, c] of the boundary, linearised at the iterate."""

    @abc.abstractmethod
    def _restart(self, images: Images) -> jax.Array:
        """Number of the restart that each image's round is [b]; number 0 starts at the image."""

    @property
    def steps_per_round(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        """Two forward passes and the gradients of one, whatever the number of classes."""
        return 2, 1

    def start(self, images: Images) -> State:
        lowest = jnp.full(images.y.shape, -jnp.inf)
        memory = _Memory(*(_flat(image) for image in (self._start(images), images.x)))
        return State(images.x, lowest, images.y < 0, lowest, memory)

    def _start(self, images: Images) -> jax.Array:
        """The images in the first run, then points at a distance of half the radius."""
        if self.restarts == 1:
            return images.x
        noise = jax.vmap(lambda key: self._noise(key, images.x.shape[1:]))(images.keys)
        radius = _START_EPS[self.norm] if self.threat is None else self.threat.eps
        length = radius / 2 / jnp.maximum(self.ball.norm(noise), 1e-12)
        drawn = jnp.clip(images.x + _per_image(length) * noise, min=0.0, max=1.0)
        return jnp.where(_per_image(self._restart(images) > 0), drawn, images.x)

    def _noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.norm == "linf":
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        return jax.random.normal(key, shape)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        point, origin = state.memory
        keys = compose.split(images.keys, 2 * i)
        gap, normal = self._linearise(model, keys, images, point.reshape(images.x.shape))
        normal = _gradient.computed_once(_flat(normal))
        moved = _gradient.computed_once(self._move(origin, point, gap, normal))
        x_adv = moved.reshape(images.x.shape)
        keys = compose.split(images.keys, 2 * i + 1)
        loss, wrong = _gradient.evaluate(model, keys, losses.margin, x_adv, images.y)
        state = self._keep_smallest(state, x_adv, self.ball.norm(moved - origin), wrong)
        point = jnp.where(wrong[:, None], origin + self.beta * (moved - origin), moved)
        return state._replace(loss=loss, memory=_Memory(point, origin))

    def _move(
        self, origin: jax.Array, point: jax.Array, gap: jax.Array, normal: jax.Array
    ) -> jax.Array:
        """The next iterate: beyond the hyperplane, and biased towards the original; all flat."""
        d = _hyperplane.project(self.norm, point, normal, gap)
        gap_at_origin = gap + (normal * (origin - point)).sum(axis=1)
        d_origin = _hyperplane.project(self.norm, origin, normal, gap_at_origin)
        length, length_origin = (jnp.maximum(self.ball.norm(step), 1e-8) for step in (d, d_origin))
        alpha = jnp.minimum(length / (length + length_origin), self.alpha_max)[:, None]
        moved = (point + self.eta * d) * (1 - alpha) + (origin + self.eta * d_origin) * alpha
        return jnp.clip(moved, min=0.0, max=1.0)


@_pytree.register
@dataclasses.dataclass(frozen=True)
class FAB(_FastAdaptiveBoundary):
    """The closest misclassified image, by steps onto the closest linearised decision boundary.

    At the iterate z, the boundary between y and the class t that minimises
    |z_t - z_y| / ||grad z_t - grad z_y||_dual is linearised, and both z and the image x are
    projected onto it inside the box, by the steps d and d_x:
    alpha = min(||d|| / (||d|| + ||d_x||), alpha_max),
    z <- clip((1 - alpha) (z + eta d) + alpha (x + eta d_x)).
    If that is misclassified, it is kept if it is the closest so far, and
    z <- x + beta (z - x). The first run starts at x, further ones at random at the distance eps / 2
    (before the box cuts).

    As the published code (fra31/auto-attack), which differs from the paper: no search along the
    line to the image at the end; random starts at eps / 2 in every run, not at half of the smallest
    norm so far; norms below 1e-8 count as 1e-8 in alpha. Other than there, an image's random
    numbers do not depend on its batch, and an image stops at the first step that succeeds within
    the threat model. The k - 1 gradients of a step count as one in `queries`.

    Attributes:
        norm: norm that is made small, "linf", "l2" or "l1".
        threat: the threat model that success is judged by, of the same norm, or None; its eps (else
            0.3, 1.0 and 5.0 for the three norms) is also the radius of random starts.
        steps: number of steps in a run, at least 1.
        restarts: number of runs, at least 1.
        alpha_max: largest bias towards the image, at least 0.
        eta: extrapolation beyond the boundary, above 0; 1 is none.
        beta: how far misclassified iterates stay from the image, at least 0; 1 is no step back.

    Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    ICML 2020, arXiv:1907.02044, algorithm 1.
    """

    steps: int = dataclasses.field(default=100, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def rounds(self, classes: int) -> int:
        return self.restarts

    def _restart(self, images: Images) -> jax.Array:
        return images.round

    def _linearise(
        self, model: Classifier, keys: jax.Array, images: Images, x_adv: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        others = _hyperplane.rivals(images)
        at = _hyperplane.nearest_boundary(model, keys, x_adv, images.y, others, self.norm)
        return at.gap, at.normal


@_pytree.register
@dataclasses.dataclass(frozen=True)
class TargetedFAB(_FastAdaptiveBoundary):
    """`FAB` against one boundary at a time: that to the class of the r-th largest clean logit.

    r = 2, 3, ..., `targets` + 1, with one gradient per step; every misclassified iterate counts,
    whichever class it is taken for. With few classes there are fewer targets.

    Attributes:
        norm: norm that is made small, "linf", "l2" or "l1".
        threat: the threat model that success is judged by, of the same norm, or None; its eps (else
            0.3, 1.0 and 5.0 for the three norms) is also the radius of random starts.
        steps: number of steps in a run, at least 1.
        targets: number of classes to aim at, at least 1.
        restarts: number of runs for each target, at least 1; the first starts at the image.
        alpha_max: largest bias towards the image, at least 0.
        eta: extrapolation beyond the boundary, above 0; 1 is none.
        beta: how far misclassified iterates stay from the image, at least 0; 1 is no step back.

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020, arXiv:2003.01690, section 5 (the FAB-T of AutoAttack).
    """

    steps: int = dataclasses.field(default=100, metadata={"static": True})
    targets: int = dataclasses.field(default=9, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("targets", self.targets, 1)

    def rounds(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def _restart(self, images: Images) -> jax.Array:
        return images.round % self.restarts

    def _linearise(
        self, model: Classifier, keys: jax.Array, images: Images, x_adv: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        number = (images.round // self.restarts)[:, None]
        target = jnp.take_along_axis(_hyperplane.rivals(images), number, axis=1)[:, 0]

        def gap(logits: jax.Array, y: jax.Array) -> jax.Array:
            return losses.logit_difference(logits, y, target)

        at = _gradient.evaluate_with_gradient(model, keys, gap, x_adv, images.y)
        return at.loss, at.gradient


def _flat(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, h * w * c]."""
    return images.reshape(images.shape[0], -1)


def _per_image(values: jax.Array) -> jax.Array:
    """[b] -> [b, 1, 1, 1], to broadcast against images."""
    return values[:, None, None, None]
