"""Random noise: the attack that every other one must beat."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._ascent import keep
from jaxclus.attacks._base import BoundedAttack, Images, State


@_pytree.register
@dataclasses.dataclass(frozen=True)
class RandomNoise(BoundedAttack):
    """Points drawn from the ball, uniformly and then projected onto ball and box.

    Kept is the first that is misclassified, else that of the largest margin loss,
    max_{i != y} z_i - z_y.

    Attributes:
        threat: the threat model.
        steps: number of points for each image, at least 1.
    """

    steps: int = dataclasses.field(default=100, metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)

    @property
    def steps_per_round(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def start(self, images: Images) -> State:
        lowest = jnp.full(images.y.shape, -jnp.inf)
        return State(images.x, lowest, images.y < 0, lowest, ())

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        keys = compose.split(images.keys, i)
        x_adv = self.threat.random_start(keys, images.x)
        # The start uses the keys themselves; a stochastic model's passes must not.
        passes = compose.split(keys, 1)
        found = _gradient.evaluate(model, passes, losses.margin, x_adv, images.y)
        return keep(state, x_adv, *found)
