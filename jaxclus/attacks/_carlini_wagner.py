"""Carlini and Wagner's attack: a small L2 perturbation, by Adam and a search for its weight."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._base import Images, MinimumNormAttack, State
from jaxclus.attacks._search import select

# How far inside of (-1, 1) pixels are pulled before arctanh, as in the published code.
_INSIDE = 0.999999


class _Memory(NamedTuple):
    """Where the search for each image stands.

    Attributes:
        w: the iterate, x_adv = (tanh(w) + 1) / 2 [b, h, w, c].
        adam: the optimiser's state, every leaf with leading axis b.
        const: the weight c of the classification term [b].
        lower: the largest weight with which no adversarial image was found, 0 at first [b].
        upper: the smallest weight with which one was found, infinity at first [b].
        found: whether one was found with the present weight [b].
    """

    w: jax.Array
    adam: Any
    const: jax.Array
    lower: jax.Array
    upper: jax.Array
    found: jax.Array


@_pytree.register
@dataclasses.dataclass(frozen=True)
class CarliniWagner(MinimumNormAttack):
    """Minimises |x_adv - x|_2^2 + c * max(0, confidence - margin(x_adv)) over the whole box.

    margin = max_{i != y} z_i - z_y, and x_adv = (tanh(w) + 1) / 2 keeps to the box. Adam takes
    `steps` steps from w = arctanh(2 x - 1); then c is lowered if an adversarial image was found,
    else raised (tenfold, or to the middle between the bounds known), and Adam begins anew. Kept is
    the closest of all iterates that are misclassified with a margin of at least `confidence`.
    The trace shows the margins.

    The constants are those of the published code (`l2_attack.py`), but for `steps`, 10,000 there.
    That code also stops a round of Adam early once the loss stagnates, and repeats the last search
    with the largest c if there are 10 or more: neither is done here. With an `EOT` model the margin
    is the mean over its passes.

    Attributes:
        norm: "l2".
        threat: the threat model that success is judged by, or None.
        binary_search_steps: number of weights c that are tried, at least 1.
        steps: Adam's steps for each of them, at least 1.
        learning_rate: Adam's, above 0, on the scale of w.
        initial_const: the first c, above 0.
        confidence: the margin that is asked for (kappa), at least 0.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017,
    arXiv:1608.04644, sections V and VI-A.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("l2",)

    binary_search_steps: int = dataclasses.field(default=9, metadata={"static": True})
    steps: int = dataclasses.field(default=1000, metadata={"static": True})
    learning_rate: float = 0.01
    initial_const: float = 0.001
    confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("binary_search_steps", self.binary_search_steps, 1)
        _checks.at_least("steps", self.steps, 1)
        _checks.positive("learning_rate", self.learning_rate)
        _checks.positive("initial_const", self.initial_const)
        _checks.not_negative("confidence", self.confidence)

    @property
    def steps_per_round(self) -> int:
        return self.binary_search_steps * self.steps

    def start(self, images: Images) -> State:
        none = jnp.zeros(images.y.shape)
        memory = _Memory(
            *self._restart(images.x), none + self.initial_const, none, none + jnp.inf, none > 0
        )
        return State(images.x, none - jnp.inf, none > 0, none - jnp.inf, memory)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        due = (i > 0) & (i % self.steps == 0)
        memory = select(due, self._next_const(images.x, state.memory), state.memory)
        x_adv, keys = _image(memory.w), compose.split(images.keys, i)
        at = _gradient.evaluate_with_gradient(model, keys, losses.margin, x_adv, images.y)
        wrong = at.wrong & (at.loss >= self.confidence)
        weight = jnp.where(at.loss < self.confidence, memory.const, 0.0)[:, None, None, None]
        # Where arctanh took the clean image, which is not exactly x.
        origin = _image(_unbounded(images.x))
        gradient = 2 * (x_adv - origin) - weight * at.gradient
        slope = 2 * x_adv * (1 - x_adv)  # of x_adv in w
        update, adam = jax.vmap(self._adam.update)(gradient * slope, memory.adam)
        state = self._keep_smallest(
            state._replace(loss=at.loss), x_adv, self.ball.norm(x_adv - images.x), wrong
        )
        moved = memory._replace(w=memory.w + update, adam=adam, found=memory.found | wrong)
        return state._replace(memory=moved)

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)

    def _restart(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """The first w, and a new optimiser for each image."""
        w = _unbounded(x)
        return w, jax.vmap(self._adam.init)(w)

    def _next_const(self, x: jax.Array, memory: _Memory) -> _Memory:
        """The memory at the start of the search with the next weight."""
        const, found = memory.const, memory.found
        upper = jnp.where(found, jnp.minimum(memory.upper, const), memory.upper)
        lower = jnp.where(found, memory.lower, jnp.maximum(memory.lower, const))
        const = jnp.where(jnp.isfinite(upper), (lower + upper) / 2, 10 * const)
        return _Memory(*self._restart(x), const, lower, upper, found & False)


def _image(w: jax.Array) -> jax.Array:
    return (jnp.tanh(w) + 1) / 2


def _unbounded(x: jax.Array) -> jax.Array:
    """The w of an image."""
    return jnp.arctanh((2 * x - 1) * _INSIDE)
