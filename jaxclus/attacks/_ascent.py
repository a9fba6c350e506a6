"""Projected gradient ascent with the bookkeeping of an evaluation: FGSM, PGD and MI-FGSM."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclus import compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._base import BoundedAttack, Images, State


class _Memory(NamedTuple):
    """Where the ascent stands: the iterate, and what the direction remembers."""

    iterate: jax.Array
    direction: Any


class GradientAscent(BoundedAttack, abc.ABC):
    """x <- project(x + step_size * step(direction)), `steps` times from a start, `restarts` times.

    Subclasses are dataclasses with a field `loss`, unless they say which loss a round has, and say
    how long, from where and which way the steps go.
    """

    loss: str | losses.Loss
    steps: int
    restarts: int

    @abc.abstractmethod
    def _step_length(self) -> jax.Array | float:
        """Length of one step in the threat's norm."""

    @abc.abstractmethod
    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """The first iterate."""

    def _loss(self, images: Images) -> losses.Loss:
        """What is maximised in a round; the field `loss` by default."""
        return losses.get(self.loss)

    def _memory(self, x: jax.Array) -> Any:
        """What the direction remembers from step to step; nothing by default."""
        return ()

    def _direction(self, grad: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """The direction to ascend, and the new memory; the gradient itself by default."""
        return grad, memory

    def _ascend(
        self, gradient: jax.Array, x: jax.Array, x_adv: jax.Array, memory: Any
    ) -> tuple[jax.Array, Any]:
        """The next iterate and memory, given the gradient at `x_adv`."""
        direction, memory = self._direction(gradient, memory)
        moved = x_adv + self._step_length() * self.threat.step(direction, x_adv)
        return self.threat.project(moved, x), memory

    def perturb(self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
        loss = losses.get(self.loss)

        def body(number, carry):
            x_adv, memory = carry
            step_keys = compose.split(keys, number) if compose.is_stochastic(model) else keys
            found = _gradient.evaluate_with_gradient(model, step_keys, loss, x_adv, y)
            return self._ascend(found.gradient, x, x_adv, memory)

        start = (self._start(keys, x), self._memory(x))
        return lax.stop_gradient(lax.fori_loop(0, self.steps, body, start)[0])

    def check_classes(self, classes: int) -> None:
        losses.check_classes(self.loss, classes)

    @property
    def steps_per_round(self) -> int:
        return self.steps

    def rounds(self, classes: int) -> int:
        return self.restarts

    @property
    def finish_cost(self) -> tuple[int, int]:
        return 1, 0

    def start(self, images: Images) -> State:
        memory = _Memory(self._start(images.keys, images.x), self._memory(images.x))
        lowest = jnp.full(images.y.shape, -jnp.inf)
        return State(images.x, lowest, images.y < 0, lowest, memory)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        x_adv, memory = state.memory
        loss, keys = self._loss(images), compose.split(images.keys, i)
        at = _gradient.evaluate_with_gradient(model, keys, loss, x_adv, images.y)
        moved = _Memory(*self._ascend(at.gradient, images.x, x_adv, memory))
        return keep(state, x_adv, at.loss, at.wrong)._replace(memory=moved)

    def finish(self, model: Classifier, images: Images, state: State) -> State:
        x_adv, keys = state.memory.iterate, compose.split(images.keys, self.steps)
        found = _gradient.evaluate(model, keys, self._loss(images), x_adv, images.y)
        return keep(state, x_adv, *found)


def keep(state: State, x_adv: jax.Array, loss: jax.Array, wrong: jax.Array) -> State:
    """The state with an iterate as candidate if it is wrong, or its loss the highest so far."""
    better = wrong | (loss > state.value)
    return state._replace(
        x_adv=jnp.where(better[:, None, None, None], x_adv, state.x_adv),
        value=jnp.where(better, loss, state.value),
        success=wrong,
        loss=loss,
    )
