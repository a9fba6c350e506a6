"""DeepFool."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient, _hyperplane
from jaxclus.attacks._base import Images, MinimumNormAttack, State

# Classes that are looked at, the label's among them, as published.
_TOP = 10


@_pytree.register
@dataclasses.dataclass(frozen=True)
class DeepFool(MinimumNormAttack):
    """The first misclassified image on the way to the closest linearised decision boundaries.

    At the iterate x_adv, with f_t = z_t - z_y, w_t = grad f_t and 1/p + 1/q = 1, the class t that
    minimises |f_t| / ||w_t||_q is taken among those of the 10 highest clean logits; then
    r <- r + |f_t| / ||w_t||_q^q |w_t|^(q-1) sign(w_t),
    x_adv = clip(x + (1 + overshoot) r),
    until x_adv is misclassified; at most `steps` times, after which the last one is returned.

    As the published code (LTS4/DeepFool), which differs from the paper in that the overshoot is
    part of every iterate, not of the last alone. Neither knows the box; here x_adv is clipped.
    A cheap estimate of robustness rather than the smallest norm, for which there is `FAB`.

    Attributes:
        norm: norm p that is made small, "linf" or "l2".
        threat: the threat model that success is judged by, of the same norm, or None.
        steps: largest number of steps, at least 1.
        overshoot: how far beyond the boundary, as a part of the way there, at least 0.

    Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks",
    CVPR 2016, arXiv:1511.04599, algorithm 2 and equations (10) and (11).
    """

    NORMS: ClassVar[tuple[str, ...]] = ("linf", "l2")

    steps: int = dataclasses.field(default=50, metadata={"static": True})
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.not_negative("overshoot", self.overshoot)

    @property
    def steps_per_round(self) -> int:
        return self.steps

    @property
    def cost(self) -> tuple[int, int]:
        """One forward pass and its gradients, whatever the number of classes."""
        return 1, 1

    @property
    def finish_cost(self) -> tuple[int, int]:
        return 1, 0

    def start(self, images: Images) -> State:
        lowest = jnp.full(images.y.shape, -jnp.inf)
        return State(images.x, lowest, images.y < 0, lowest, jnp.zeros_like(images.x))

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        x_adv, keys = self._iterate(images, state), compose.split(images.keys, i)
        others = _hyperplane.rivals(images)[:, : _TOP - 1]
        at = _hyperplane.nearest_boundary(model, keys, x_adv, images.y, others, self.norm)
        w, slope = at.normal, _hyperplane.dual_norm(self.norm, at.normal)
        distance = (jnp.abs(at.gap) / jnp.maximum(slope, 1e-12))[:, None, None, None]
        r = distance * self.ball.step(w)
        state = self._judge(images, state, x_adv, at.loss, at.wrong)
        # An iterate that is misclassified is the last one, whether inside the threat or not.
        onwards = ~at.wrong[:, None, None, None]
        return state._replace(memory=jnp.where(onwards, state.memory + r, state.memory))

    def finish(self, model: Classifier, images: Images, state: State) -> State:
        x_adv, keys = self._iterate(images, state), compose.split(images.keys, self.steps)
        loss, wrong = _gradient.evaluate(model, keys, losses.margin, x_adv, images.y)
        state = self._judge(images, state, x_adv, loss, wrong)
        # Where nothing is misclassified, the last iterate is what there is to show.
        nothing = jnp.isneginf(state.value)
        return state._replace(
            x_adv=jnp.where(nothing[:, None, None, None], x_adv, state.x_adv),
            value=jnp.where(nothing, jnp.finfo(jnp.float32).min, state.value),
        )

    def _iterate(self, images: Images, state: State) -> jax.Array:
        return jnp.clip(images.x + (1 + self.overshoot) * state.memory, min=0.0, max=1.0)

    def _judge(
        self, images: Images, state: State, x_adv: jax.Array, loss: jax.Array, wrong: jax.Array
    ) -> State:
        """The state with a misclassified iterate as candidate; that is the end, if no threat."""
        norm = self.ball.norm(x_adv - images.x)
        state = self._keep_smallest(state, x_adv, norm, wrong)._replace(loss=loss)
        return state._replace(success=wrong) if self.threat is None else state
