"""Projected gradient descent."""

import dataclasses

import jax

from jaxclus import _checks, _pytree, losses
from jaxclus.attacks._ascent import GradientAscent


@_pytree.register
@dataclasses.dataclass(frozen=True)
class PGD(GradientAscent):
    """Projected gradient ascent of the loss from random points of the ball.

    x_0 uniform in the ball, then projected onto ball and box;
    x_{t+1} = project(x_t + step_size * step(grad_x loss(x_t, y))).
    `run` keeps each image's first success over all iterates and restarts, else the iterate of
    highest loss; `perturb` returns the last iterate of one run.

    Attributes:
        threat: the threat model.
        steps: number of gradient steps, at least 1.
        step_size: length of a step in the threat's norm, on the pixel scale, above 0;
            None means 2.5 * eps / steps.
        restarts: number of random starts, at least 1.
        loss: a name in `jaxclus.losses.LOSSES`, or a callable (logits [b, k], y [b]) -> [b].

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
    arXiv:1706.06083, section 2.1.
    """

    steps: int = dataclasses.field(default=10, metadata={"static": True})
    step_size: float | None = None
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    loss: str | losses.Loss = dataclasses.field(default="cross_entropy", metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.at_least("restarts", self.restarts, 1)
        if self.step_size is not None:
            _checks.positive("step_size", self.step_size)
        losses.get(self.loss)

    def _step_length(self) -> jax.Array | float:
        return 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size

    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        return self.threat.random_start(keys, x)
