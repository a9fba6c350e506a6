"""Auto-PGD: gradient ascent that chooses its step size by itself."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _apgd_l1, _gradient
from jaxclus.attacks._ascent import keep
from jaxclus.attacks._base import BoundedAttack, Images, State
from jaxclus.attacks._search import select
from jaxclus.threat import L1, Linf


def checkpoints(steps: int) -> tuple[int, ...]:
    """After how many steps the step size is reviewed: windows of 22 % of them, shrinking by 3 %.

    No window is below 6 %. For 100 steps: 22, 41, 57, 70, 80, 87, 93, 99, as in the paper; for
    other numbers the reference implementation, which this follows, rounds otherwise than the paper.

    Args:
        steps: number of steps, at least 1.
    """
    return tuple(_windows(steps))


def _windows(steps: int) -> dict[int, int]:
    """The length of the window that ends at each checkpoint."""
    window, shrink, smallest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, done = {}, window
    while done <= steps:
        found[done] = window
        window = max(window - shrink, smallest)
        done += window
    return found


class _Ascent(NamedTuple):
    """The memory of a search in the Linf or L2 norm; b images each.

    Attributes:
        iterate: x_t [b, h, w, c].
        previous: x_{t-1} [b, h, w, c].
        best: the iterate of highest loss [b, h, w, c].
        best_gradient: the gradient there [b, h, w, c].
        best_loss: the loss there [b].
        last_loss: the loss at x_{t-1} [b].
        step_size: length of a step [b].
        rises: how often the loss rose from step to step since the last checkpoint [b].
        best_at_checkpoint: `best_loss` at the last checkpoint [b].
        halved: whether the step size was halved there [b].
    """

    iterate: jax.Array
    previous: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    last_loss: jax.Array
    step_size: jax.Array
    rises: jax.Array
    best_at_checkpoint: jax.Array
    halved: jax.Array


class AutoPGD(BoundedAttack, abc.ABC):
    """The search that APGD and its targeted version share; they differ in what they maximise."""

    steps: int
    rho: float

    @abc.abstractmethod
    def _loss(self, images: Images) -> losses.Loss:
        """What is maximised, (logits [b, k], y [b]) -> [b]."""

    @property
    def steps_per_round(self) -> int:
        """Evaluations of iterates, the last one's included; no step follows its gradient."""
        l1 = isinstance(self.threat, L1)
        return _apgd_l1.Schedule(self.steps).evaluations if l1 else self.steps + 1

    def start(self, images: Images) -> State:
        low = jnp.full(images.y.shape, -jnp.inf)
        l1 = self.threat if isinstance(self.threat, L1) else None
        memory = self._start(images) if l1 is None else _apgd_l1.start(l1, images)
        return State(images.x, low, images.y < 0, low, memory)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        memory, loss = state.memory, self._loss(images)
        at = _gradient.evaluate_with_gradient(
            model, compose.split(images.keys, i), loss, memory.iterate, images.y
        )
        if isinstance(self.threat, L1):
            schedule = _apgd_l1.Schedule(self.steps)
            inside = schedule.inside(i)  # before, the iterates are in larger balls
            kept = keep(
                state, memory.iterate, jnp.where(inside, at.loss, -jnp.inf), at.wrong & inside
            )
            moved = _apgd_l1.move(self.threat, schedule, images, i, at, memory)
            return kept._replace(loss=at.loss, memory=moved)
        kept = keep(state, memory.iterate, at.loss, at.wrong)
        return kept._replace(memory=self._move(images, i, at, memory))

    def _start(self, images: Images) -> _Ascent:
        """A random point of the ball's surface, clipped to the box."""
        shape = images.x.shape[1:]
        if isinstance(self.threat, Linf):
            delta = jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1.0))(images.keys)
        else:
            delta = jax.vmap(lambda key: jax.random.normal(key, shape))(images.keys)
        delta = self.threat.eps * delta / _column(jnp.maximum(self.threat.norm(delta), 1e-12))
        iterate, zero = jnp.clip(images.x + delta, min=0.0, max=1.0), jnp.zeros(images.y.shape)
        return _Ascent(
            iterate=iterate,
            previous=iterate,
            best=iterate,
            best_gradient=jnp.zeros_like(iterate),
            best_loss=zero,
            last_loss=zero,
            step_size=2 * self.threat.eps + zero,
            rises=zero,
            best_at_checkpoint=zero,
            halved=images.y >= 0,
        )

    def _move(
        self, images: Images, i: jax.Array, at: _gradient.Evaluation, old: _Ascent
    ) -> _Ascent:
        """The memory after the bookkeeping of x_i and the step to x_{i+1}."""
        first = i == 0
        # The reference compares the loss after the first step with 0, not with that at the start.
        rose = (at.loss > jnp.where(i == 1, 0.0, old.last_loss)) & ~first
        better = first | (at.loss > old.best_loss)
        best, best_gradient, best_loss = select(
            better,
            (old.iterate, at.gradient, at.loss),
            (old.best, old.best_gradient, old.best_loss),
        )
        windows = _windows(self.steps)
        window = jnp.array([windows.get(step, 0) for step in range(self.steps + 1)])[i]
        review, rises = window > 0, old.rises + rose
        best_at_checkpoint = jnp.where(first, best_loss, old.best_at_checkpoint)
        halve = review & (
            (rises <= self.rho * window) | (~old.halved & (best_at_checkpoint >= best_loss))
        )
        step_size = jnp.where(halve, old.step_size / 2, old.step_size)
        x, gradient = select(halve, (best, best_gradient), (old.iterate, at.gradient))

        z = x + _column(step_size) * self.threat.step(gradient)
        z = self.threat.shrink_and_clip(z, images.x)
        weight = _column(jnp.where(first, 1.0, 0.75))
        moved = x + weight * (z - x) + (1 - weight) * (x - old.previous)
        return _Ascent(
            iterate=self.threat.shrink_and_clip(moved, images.x),
            previous=x,
            best=best,
            best_gradient=best_gradient,
            best_loss=best_loss,
            last_loss=at.loss,
            step_size=step_size,
            rises=jnp.where(review, 0.0, rises),
            best_at_checkpoint=jnp.where(review, best_loss, best_at_checkpoint),
            halved=jnp.where(review, halve, old.halved),
        )


def _column(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


@_pytree.register
@dataclasses.dataclass(frozen=True)
class APGD(AutoPGD):
    """Auto-PGD: gradient ascent with momentum whose step size halves where progress stalls.

    Linf and L2: from a random point of the ball's surface and a step size of 2 eps,

        z_t = P(x_t + step_size dir(grad_t)),
        x_{t+1} = P(x_t + a (z_t - x_t) + (1 - a) (x_t - x_{t-1})),  a = 1 for t = 0, then 0.75,

    with P = `threat.shrink_and_clip` and dir = `threat.step`. At every checkpoint the step size of
    an image is halved, and it goes back to its point of highest loss, if the loss rose in at most
    rho of the steps since the last checkpoint, or if the step size was not halved there and the
    highest loss has not risen since. L1: see `_apgd_l1`, "L1-APGD" (arXiv:2103.01208).

    Follows the reference implementation (fra31/auto-attack, revision a392200) where it differs
    from the paper: the checkpoints are sums of whole windows; the loss after the first step counts
    as risen if it is above 0. Other than it, every image has its own random numbers, a search ends
    at the first misclassified iterate (the reference goes on and returns the last one; verdicts are
    the same), and with an EOT classifier the loss and the prediction are averaged over all passes,
    not those of the last.

    Attributes:
        threat: the threat model.
        loss: a name in `jaxclus.losses.LOSSES`, or a callable (logits [b, k], y [b]) -> [b].
        steps: number of steps, at least 1.
        restarts: number of random starts, at least 1.
        rho: share of steps that must raise the loss, in [0, 1].

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020, arXiv:2003.01690, algorithm 1.
    """

    loss: str | losses.Loss = dataclasses.field(default="cross_entropy", metadata={"static": True})
    steps: int = dataclasses.field(default=100, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    rho: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.get(self.loss)
        _check(self.steps, self.restarts, self.rho)

    def check_classes(self, classes: int) -> None:
        losses.check_classes(self.loss, classes)

    def rounds(self, classes: int) -> int:
        return self.restarts

    def _loss(self, images: Images) -> losses.Loss:
        return losses.get(self.loss)


@_pytree.register
@dataclasses.dataclass(frozen=True)
class TargetedAPGD(AutoPGD):
    """APGD on a targeted loss, towards each of the classes with the highest clean logits.

    Target t of round r is the class of the (r + 2)-th highest logit of the clean image, for r = 0,
    1, ... up to `targets`, or to all k - 1 other classes if those are fewer. Any misclassification
    counts as success, not only one as the target.

    Attributes:
        threat: the threat model.
        loss: "dlr", the published one, which needs 4 classes; another name in
            `jaxclus.losses.TARGETED_LOSSES`; or a callable (logits [b, k], y [b], targets [b]) ->
            [b], which grows as the target comes closer.
        steps: number of steps, at least 1.
        targets: number of target classes, at least 1.
        restarts: number of random starts for each target, at least 1.
        rho: share of steps that must raise the loss, in [0, 1].

    Croce and Hein, arXiv:2003.01690, section 4.2 and algorithm 1.
    """

    loss: str | losses.TargetedLoss = dataclasses.field(default="dlr", metadata={"static": True})
    steps: int = dataclasses.field(default=100, metadata={"static": True})
    targets: int = dataclasses.field(default=9, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    rho: float = 0.75

    #: The targeted DLR loss needs the fourth highest logit.
    CLASSES: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.get_targeted(self.loss)
        _checks.at_least("targets", self.targets, 1)
        _check(self.steps, self.restarts, self.rho)

    def check_classes(self, classes: int) -> None:
        if self.loss in ("dlr", losses.targeted_dlr) and classes < self.CLASSES:
            raise ValueError(
                f"`model` must have at least {self.CLASSES} classes for the targeted DLR loss, "
                f"got {classes}"
            )

    def rounds(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def _loss(self, images: Images) -> losses.Loss:
        loss, target = losses.get_targeted(self.loss), targets(images, self.restarts)
        return lambda logits, y: loss(logits, y, target)


def targets(images: Images, restarts: int) -> jax.Array:
    """The target class of each image's round [b]: the second highest clean logit first."""
    rank = 1 + images.round // restarts
    return jnp.take_along_axis(images.ranking, rank[:, None], axis=1)[:, 0]


def _check(steps: int, restarts: int, rho: float) -> None:
    _checks.at_least("steps", steps, 1)
    _checks.at_least("restarts", restarts, 1)
    if _checks.is_concrete(rho):
        _checks.within("rho", rho, 0, 1)
