"""The momentum iterative fast gradient sign method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, losses
from jaxclus.attacks._ascent import GradientAscent


@_pytree.register
@dataclasses.dataclass(frozen=True)
class MIFGSM(GradientAscent):
    """Gradient ascent along an accumulated direction, from the clean image.

    g_{t+1} = decay * g_t + grad / |grad|_1, x_{t+1} = project(x_t + (eps / steps) * step(g_{t+1})).
    `run` keeps each image's first success over all iterates, else the iterate of highest loss;
    `perturb` returns the last iterate.

    Attributes:
        threat: the threat model.
        steps: number of gradient steps, at least 1.
        decay: weight mu of the past directions, at least 0.
        loss: a name in `jaxclus.losses.LOSSES`, or a callable (logits [b, k], y [b]) -> [b].

    Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv:1710.06081,
    equations 6 to 8.
    """

    steps: int = dataclasses.field(default=10, metadata={"static": True})
    decay: float = 1.0
    loss: str | losses.Loss = dataclasses.field(default="cross_entropy", metadata={"static": True})

    restarts = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.not_negative("decay", self.decay)
        losses.get(self.loss)

    def _step_length(self) -> jax.Array | float:
        return self.threat.eps / self.steps

    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        return x

    def _memory(self, x: jax.Array) -> Any:
        return jnp.zeros_like(x)

    def _direction(self, grad: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        size = jnp.abs(grad).sum(axis=(1, 2, 3), keepdims=True)
        direction = self.decay * memory + grad / jnp.where(size > 0, size, 1.0)
        return direction, direction
