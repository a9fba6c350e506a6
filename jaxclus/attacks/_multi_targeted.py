"""Multi-targeted projected gradient descent."""

import dataclasses

import jax

from jaxclus import _checks, _pytree, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks._ascent import GradientAscent
from jaxclus.attacks._base import Images, SteppedAttack


@_pytree.register
@dataclasses.dataclass(frozen=True)
class MultiTargetedPGD(GradientAscent):
    """Projected gradient ascent of z_t - z_y for one target class t after the other.

    x_0 uniform in the ball, then projected onto ball and box;
    x_{i+1} = project(x_i + step_size * step(grad_x (z_t - z_y)(x_i))).
    The targets are the classes of highest clean logit but for the first, highest first, each with
    `restarts` starts. An image is broken by any misclassification, whatever the target was. `run`
    keeps each image's first success over all iterates and rounds, else the iterate of highest loss;
    so does `perturb`.

    The paper takes all k - 1 classes in turn, and prefers Adam to such steps.

    Attributes:
        threat: the threat model.
        steps: number of gradient steps, at least 1.
        step_size: length of a step in the threat's norm, on the pixel scale, above 0;
            None means 2.5 * eps / steps.
        targets: number of target classes, at least 1; k - 1 of them if there are fewer.
        restarts: number of random starts for each target, at least 1.

    Gowal et al., "An Alternative Surrogate Loss for PGD-based Adversarial Testing", 2019,
    arXiv:1910.09338, section 3.
    """

    steps: int = dataclasses.field(default=20, metadata={"static": True})
    step_size: float | None = None
    targets: int = dataclasses.field(default=9, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.at_least("targets", self.targets, 1)
        _checks.at_least("restarts", self.restarts, 1)
        if self.step_size is not None:
            _checks.positive("step_size", self.step_size)

    def check_classes(self, classes: int) -> None:
        """Two are enough."""

    def rounds(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def perturb(self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
        return SteppedAttack.perturb(
            self, keys, model, x, y
        )  # all rounds: targets need clean logits

    def _loss(self, images: Images) -> losses.Loss:
        rank = 1 + images.round // self.restarts
        targets = jax.vmap(lambda ranking, place: ranking[place])(images.ranking, rank)
        return lambda logits, y: losses.logit_difference(logits, y, targets)

    def _step_length(self) -> jax.Array | float:
        return 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size

    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        return self.threat.random_start(keys, x)
