"""Classifiers made of parts, and classifiers that draw random numbers.

Both are pytrees, so that the weights of their parts are seen and compiled code is reused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Stochastic:
    """A classifier, or a part of a `Chain`, that draws random numbers.

    Every image has its own key, so that what an image meets does not depend on its batch: `fn` is
    mapped over the images, and sees batches of one. Attacks draw anew at every step; `EOT` averages
    their gradients. A verdict is the class that most of `passes` passes predict, with keys of its
    own; ties go to the lower class. A success inside a threat model counts only if the verdict
    confirms it.

    Attributes:
        fn: (key, images [b, h, w, c]) -> logits [b, k], or images for a part that comes first; a
            pytree (`jax.tree_util.Partial(fn, weights)`) lets compiled code be reused.
        passes: number of passes behind a verdict, at least 1.
    """

    fn: Callable[[jax.Array, jax.Array], jax.Array]
    passes: int = dataclasses.field(default=20, metadata={"static": True})

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"`fn` must be a callable (key, images) -> logits, got {self.fn!r}")
        _checks.at_least("passes", self.passes, 1)

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """`fn(key, x)`, one pass over a batch with one key."""
        return self.fn(key, x)


@_pytree.register
@dataclasses.dataclass(frozen=True, init=False)
class Chain:
    """One function after the other, as in purifier and network: Chain(f, g)(x) = g(f(x)).

    Attributes:
        parts: callables, the first of which takes images; `Stochastic` ones make a stochastic
            chain, whose calls take a key as theirs do.
    """

    parts: tuple[Callable[..., Any], ...]

    def __init__(self, *parts: Callable[..., Any]):
        object.__setattr__(self, "parts", parts)
        if not parts or not all(callable(part) for part in parts):
            raise TypeError(f"`parts` must be one callable or more, got {parts!r}")
        if any(isinstance(part, EOT) for part in parts):
            raise TypeError(
                "`parts` must hold no EOT: it averages whole models, as EOT(Chain(...))"
            )

    def __call__(self, *args: jax.Array) -> jax.Array:
        """The chain's output on images; before them the key, if a part is stochastic."""
        *key, x = args
        for number, part in enumerate(self.parts):
            if is_stochastic(part):
                if not key:
                    raise TypeError("a chain with a `Stochastic` part is called with (key, images)")
                x = part(jax.random.fold_in(key[0], number), x)
            else:
                x = part(x)
        return x


@_pytree.register
@dataclasses.dataclass(frozen=True)
class EOT:
    """A stochastic classifier whose gradients attacks average: expectation over transformation.

    grad = 1/samples sum_s grad_x loss(f(key_s, x), y). The loss is averaged likewise, and an
    iterate counts as misclassified if most of the passes are. (The reference implementation of
    APGD takes loss and prediction from the last pass alone, and drops an image by one lucky draw.)

    Attributes:
        model: a `Stochastic` classifier, or a `Chain` that holds one.
        samples: passes for each gradient, at least 1.

    Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018, arXiv:1707.07397,
    section 2.1; Athalye, Carlini and Wagner, arXiv:1802.00420, section 4.2.
    """

    model: Callable[..., Any]
    samples: int = dataclasses.field(default=20, metadata={"static": True})

    def __post_init__(self) -> None:
        if not is_stochastic(self.model):
            raise TypeError(
                f"`model` must be a jc.Stochastic, or a jc.Chain with one, got {type(self.model)}"
            )
        _checks.at_least("samples", self.samples, 1)

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """One pass of the model."""
        return self.model(key, x)


def is_stochastic(model: Any) -> bool:
    """Whether the classifier is called with a key before the images."""
    if isinstance(model, Chain):
        return any(is_stochastic(part) for part in model.parts)
    return isinstance(model, (Stochastic, EOT))


def passes(model: Any) -> int:
    """The number of passes behind a verdict; 1 for a deterministic classifier."""
    if isinstance(model, EOT):
        return passes(model.model)
    if isinstance(model, Chain):
        return max(passes(part) for part in model.parts)
    return model.passes if isinstance(model, Stochastic) else 1


def samples(model: Any) -> int:
    """Passes behind one gradient: those of an EOT wrapper, else 1."""
    return model.samples if isinstance(model, EOT) else 1


def with_keys(model: Any, keys: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The classifier as a function of images alone: image i is seen under keys[i]."""
    if not is_stochastic(model):
        return model

    def one_pass(x: jax.Array) -> jax.Array:
        return jax.vmap(lambda key, image: model(key, image[None])[0])(keys, x)

    return one_pass


def split(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Keys [b] for the number-th use; `number` is one for all images, or one for each [b]."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
