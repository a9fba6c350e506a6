"""The fast gradient sign method."""

import dataclasses

import jax

from jaxclus import _pytree, losses
from jaxclus.attacks._ascent import GradientAscent


@_pytree.register
@dataclasses.dataclass(frozen=True)
class FGSM(GradientAscent):
    """One step of length eps along the steepest ascent of the loss, from the clean image.

    x_adv = project(x + eps * step(grad_x loss(x, y))); in the Linf norm, step is the sign.
    `run` keeps x where the step lowers the loss without breaking the prediction; `perturb` moves.

    Attributes:
        threat: the threat model.
        loss: a name in `jaxclus.losses.LOSSES`, or a callable (logits [b, k], y [b]) -> [b].

    Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015,
    arXiv:1412.6572, section 4.
    """

    loss: str | losses.Loss = dataclasses.field(default="cross_entropy", metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.get(self.loss)

    steps = 1
    restarts = 1

    def _step_length(self) -> jax.Array | float:
        return self.threat.eps

    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        return x
