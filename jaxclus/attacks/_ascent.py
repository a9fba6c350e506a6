"""Projected gradient ascent with the bookkeeping of an evaluation: FGSM, PGD and MI-FGSM."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclus import losses
from jaxclus._classifier import Classifier
from jaxclus.attacks._base import Attack, Queries, Search


class _Best(NamedTuple):
    """The candidate kept for each image: the first success, else the iterate of highest loss."""

    x_adv: jax.Array
    loss: jax.Array
    done: jax.Array
    queries: Queries


class GradientAscent(Attack, abc.ABC):
    """x <- project(x + step_size * step(direction)), `steps` times from a start, `restarts` times.

    Subclasses are dataclasses with a field `loss` and say how long, from where and which way.
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

    def _memory(self, x: jax.Array) -> Any:
        """What the direction remembers from step to step; nothing by default."""
        return ()

    def _direction(self, grad: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """The direction to ascend, and the new memory; the gradient itself by default."""
        return grad, memory

    def _ascend(self, model: Classifier, x: jax.Array, y: jax.Array, x_adv: jax.Array, memory: Any):
        """One step from `x_adv`: the next iterate and memory, and losses and logits at `x_adv`."""

        def total(x_adv):
            logits = model(x_adv)
            each = losses.get(self.loss)(logits, y)
            return each.sum(), (each, logits)

        grad, (each, logits) = jax.grad(total, has_aux=True)(x_adv)
        direction, memory = self._direction(grad, memory)
        moved = x_adv + self._step_length() * self.threat.step(direction, x_adv)
        return self.threat.project(moved, x), memory, each, logits

    def perturb(self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
        def body(_, carry):
            x_adv, memory = carry
            return self._ascend(model, x, y, x_adv, memory)[:2]

        start = (self._start(keys, x), self._memory(x))
        return lax.stop_gradient(lax.fori_loop(0, self.steps, body, start)[0])

    def _search(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, trace: bool
    ) -> Search:
        def climb(carry, _):
            x_adv, memory, best = carry
            x_next, memory, each, logits = self._ascend(model, x, y, x_adv, memory)
            best = _keep(best, x_adv, each, logits, y, gradients=1)
            return (x_next, memory, best), each if trace else None

        def restart(best, number):
            start = self._start(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x)
            carry, history = lax.scan(climb, (start, self._memory(x), best), length=self.steps)
            x_adv, _, best = carry
            logits = model(x_adv)
            last = losses.get(self.loss)(logits, y)
            best = _keep(best, x_adv, last, logits, y, gradients=0)
            return best, None if history is None else jnp.concatenate([history, last[None]])

        none = jnp.zeros(x.shape[0], jnp.int32)
        nothing = _Best(x, jnp.full(x.shape[0], -jnp.inf), none > 0, Queries(none, none))
        best, history = lax.scan(restart, nothing, jnp.arange(self.restarts))
        return Search(best.x_adv, best.queries, history)


def _keep(best: _Best, x_adv, loss, logits, y, *, gradients: int) -> _Best:
    wrong = jnp.argmax(logits, axis=-1) != y
    better = ~best.done & (wrong | (loss > best.loss))
    asked = (~best.done).astype(jnp.int32)
    return _Best(
        x_adv=jnp.where(better[:, None, None, None], x_adv, best.x_adv),
        loss=jnp.where(better, loss, best.loss),
        done=best.done | wrong,
        queries=Queries(best.queries.forward + asked, best.queries.gradient + gradients * asked),
    )
