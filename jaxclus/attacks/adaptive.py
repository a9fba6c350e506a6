"""Wrappers for attacks that know the defence: other gradients, other scales, other logits.

They are classifiers or parts of them, and pytrees: `attack(key, wrapped, x, y)`. Report the verdict
of the defence itself where the wrapper changes it; `BPDA` and `Temperature` do not.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jaxclus import _checks, _pytree, compose
from jaxclus._distances import DISTANCES
from jaxclus.compose import EOT, Chain

__all__ = ["EOT", "BPDA", "DistanceLogits", "Temperature", "calibrated_temperature"]

#: For `BPDA`: the input as it is.
identity = Partial(lambda x: x)


@jax.custom_jvp
def _value_and_derivative(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value`, with the derivative of `surrogate`."""
    return value


@_value_and_derivative.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


@_pytree.register
@dataclasses.dataclass(frozen=True)
class BPDA:
    """A function with another one's derivative: backward pass differentiable approximation.

    Its value is forward(x), its derivative that of backward at x. For a step of a defence that has
    no useful gradient, as rounding, thresholds, or a search:
    `jc.Chain(jc.attacks.BPDA(jax.tree_util.Partial(quantise)), net)`. A step that draws random
    numbers goes into a `jc.Stochastic`: `jc.Stochastic(lambda key, x: BPDA(partial(f, key))(x))`.

    Attributes:
        forward: the function to be evaluated; need not be differentiable.
        backward: the function to be differentiated, of the same output shape and dtype; by default
            the identity, for a forward(x) near x.

    Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018,
    arXiv:1802.00420, section 4.1.
    """

    forward: Callable[[jax.Array], jax.Array]
    backward: Callable[[jax.Array], jax.Array] = identity

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            part = getattr(self, name)
            if not callable(part) or compose.is_stochastic(part):
                raise TypeError(f"`{name}` must be a callable of images alone, got {type(part)}")

    def __call__(self, x: jax.Array) -> jax.Array:
        """forward(x)."""
        value, surrogate = self.forward(jax.lax.stop_gradient(x)), self.backward(x)
        if (value.shape, value.dtype) != (surrogate.shape, surrogate.dtype):
            raise ValueError(
                f"`backward` must return what `forward` does, {value.dtype} {value.shape}, "
                f"got {surrogate.dtype} {surrogate.shape}"
            )
        return _value_and_derivative(value, surrogate)


@_pytree.register
class Temperature(Chain):
    """A classifier with its logits divided by a number: the same verdicts, other gradients.

    Above 1 against a cross-entropy that is saturated by large logits, below 1 against one whose
    gradients vanish as the logits are small (probabilities, for instance). Losses of logit
    differences that are not normalised only change their scale. An `EOT` goes around it.
    """

    def __init__(self, model: Callable[..., Any], temperature: float | jax.Array):
        """Args:
        model: a classifier.
        temperature: number to divide by, above 0.
        """
        _check_part("model", model)
        _checks.positive("temperature", temperature)
        super().__init__(model, Partial(divided, temperature))


def calibrated_temperature(logits: Float[Array, "b k"]) -> Float[Array, ""]:
    """The T at which 95 % of the largest logits lead the next by at most log(9 (k - 1)).

    With such a lead over logits that are all equal, the largest probability is 0.9: the
    cross-entropy of logits / T is neither saturated nor flat. Not the median, as some classes can
    lead by far more than others. Where that lead is 0, as where all logits are equal, or not
    finite, T is 1.

    Args:
        logits: of images as they are to be classified, float32 [b, k], k at least 2.

    Returns:
        T, a scalar above 0.

    Raises:
        TypeError, ValueError: if it is no array, or the shape is another one.
    """
    logits = jnp.asarray(_checks.array("logits", logits, "floats [b, k]"))
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"`logits` must be floating point, got {logits.dtype}")
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            "`logits` must have the shape [b, k], k at least 2 and b at least 1, got "
            f"{logits.shape}"
        )
    best, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], 1, 0)
    ratio = jnp.quantile(best - second, 0.95) / math.log(9 * (logits.shape[1] - 1))
    return jnp.where((ratio > 0) & jnp.isfinite(ratio), ratio, 1.0)


@_pytree.register
class DistanceLogits(Chain):
    """An embedding and centres of classes as a classifier: logits that never saturate.

    z_j = -min over the centres c of class j of distance(embed(x), c), where the distance is

    - "l2": |e - c|_2, with gradient 0 at distance 0;
    - "squared_l2": |e - c|_2^2;
    - "l8": (sum_i (e_i - c_i)^8)^(1/8), a smooth bound of the next, with gradient 0 at distance 0;
    - "linf": max_i |e_i - c_i|;
    - "cosine": 1 - <e, c> / (|e|_2 |c|_2), 1 where either is zero.

    For attacks on classifiers by nearest centre, whose own scores may be constant or saturate. Its
    verdict is theirs where they take the nearest centre too.
    """

    def __init__(
        self,
        embed: Callable[..., Any],
        centres: Float[Array, "m d"] | np.ndarray,
        rule: str = "l2",
        classes: Sequence[int] | np.ndarray | jax.Array | None = None,
    ):
        """Args:
        embed: images [b, h, w, c] -> embeddings [b, d].
        centres: centres, float32 [m, d].
        rule: "l2", "squared_l2", "l8", "linf" or "cosine".
        classes: the class of each centre, integers [m] that cover 0 to k - 1; by default centre
            j is that of class j. Read at once: it cannot be traced.
        """
        _check_part("embed", embed)
        _checks.one_of("rule", rule, DISTANCES)
        centres = _centres(centres)
        count = centres.shape[0]
        members = np.arange(count)[:, None] if classes is None else _members(classes, count)
        super().__init__(embed, _NearestCentre(centres, members, rule))


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class _NearestCentre:
    """Embeddings [b, d] -> logits [b, k].

    Attributes:
        centres: [m, d].
        members: numbers of each class's centres, the first one repeated to fill up [k, p].
        rule: name of the distance.
    """

    centres: Any
    members: Any
    rule: str = dataclasses.field(metadata={"static": True})

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"`embed` must return embeddings [b, {self.centres.shape[1]}], as the centres "
                f"have, got {embeddings.shape}"
            )
        distance = DISTANCES[self.rule](embeddings[:, None, :], jnp.asarray(self.centres)[None])
        return -distance[:, jnp.asarray(self.members)].min(axis=-1)


def divided(temperature: jax.Array | float, logits: jax.Array) -> jax.Array:
    """The logits of a `Temperature`."""
    return logits / temperature


def _check_part(name: str, part: Any) -> None:
    if not callable(part) or isinstance(part, EOT):
        raise TypeError(
            f"`{name}` must be a callable, and an EOT goes around the whole; got {type(part)}"
        )


def _centres(centres: Any) -> Any:
    dtype, shape = getattr(centres, "dtype", None), np.shape(centres)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`centres` must be an array of floats [m, d], got {type(centres)}")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"`centres` must have the shape [m, d], got {shape}")
    return centres


def _members(classes: Any, count: int) -> np.ndarray:
    """The table [k, p] of each class's centres."""
    classes = np.asarray(classes)
    if classes.dtype.kind not in "iu":
        raise TypeError(f"`classes` must be integers, got dtype {classes.dtype}")
    if classes.shape != (count,):
        raise ValueError(
            f"`classes` must have the shape ({count},), one entry for each centre, "
            f"got {classes.shape}"
        )
    found, sizes = np.unique(classes, return_counts=True)
    if not np.array_equal(found, np.arange(len(found))):
        raise ValueError(f"`classes` must cover 0 to k - 1, got the classes {found.tolist()}")
    table = []
    for number in found:
        own = np.flatnonzero(classes == number)
        table.append(np.concatenate([own, np.full(sizes.max() - len(own), own[0])]))
    return np.stack(table)
