"""Adversarial weight perturbation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks
from jaxclus.training.objectives._base import Outcome, TrainingModel
from jaxclus.training.objectives._wrapped import Wrapped, WrappedState


@dataclasses.dataclass(frozen=True)
class AWP(Wrapped):
    """Another objective at adversarially perturbed weights: min_w max_v L(w + v).

    For each kernel w_l of more than one axis, v_l = gamma |w_l| g_l / |g_l| in the Frobenius norm,
    with g the gradient of L at w on the same adversarial images, in train mode; biases and
    BatchNorm's parameters stay. The update is the gradient at w + v applied to w; weight decay
    acts at w, where the published code's acts at w + v. One more forward and backward pass for each
    step.

    Attributes:
        objective: what is minimised at w + v: Adversarial for AT-AWP, TRADES for TRADES-AWP.
        gamma: size of the perturbation relative to the weights, at least 0.

    Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020,
    arXiv:2004.05884, equations 7 to 10 with one step for v.
    """

    gamma: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.not_negative("gamma", self.gamma)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: WrappedState,
    ) -> Outcome:
        def loss(model: TrainingModel) -> Outcome:
            return self.objective.loss(model, x, x_adv, y, keys, state.inner)

        def ascent(params: Any) -> jax.Array:
            return loss(model.at(params)).loss

        # v is fixed in both gradients of the step, that of the weights and that of x_adv.
        params = jax.lax.stop_gradient(model.params)
        slope = jax.lax.stop_gradient(jax.grad(ascent)(params))
        v = jax.tree.map(self._direction, params, slope)
        moved = model.at(jax.tree.map(jnp.add, model.params, v))
        found = loss(moved)
        model.take_stats(moved)
        return found

    def _direction(self, weight: jax.Array, gradient: jax.Array) -> jax.Array:
        if weight.ndim < 2:
            return jnp.zeros_like(weight)
        size = jnp.linalg.norm(gradient)
        # A gradient of zero, as a saturated loss has, leaves the weights where they are.
        scale = jnp.where(size > 0, jnp.linalg.norm(weight) / jnp.where(size > 0, size, 1), 0)
        return self.gamma * scale * gradient
