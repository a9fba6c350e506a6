"""What all attacks share: the protocol, the verdicts, the bookkeeping.

An attack is a frozen, hashable dataclass of hyper-parameters, and a pytree whose numbers (eps, step
size) are leaves, so that a sweep over them compiles once: a subclass is decorated with
`@_pytree.register` above `@dataclasses.dataclass(frozen=True)`.
x is float32 [b, h, w, c] in [0, 1].
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxclus import _checks, _classifier
from jaxclus._classifier import Classifier
from jaxclus.threat import Threat, image_keys


class Queries(NamedTuple):
    """What an attack asked of the model for each image; an image that is broken asks no more."""

    forward: Int[Array, " b"]
    gradient: Int[Array, " b"]


class AttackResult(NamedTuple):
    """Outcome of an attack on b images; a pytree.

    Attributes:
        x_adv: adversarial images, float32 [b, h, w, c], inside ball and box; x itself where the
            clean image was misclassified already.
        success: whether the model misclassifies `x_adv`, recomputed from `x_adv` itself [b].
        norm: norm of `x_adv - x` [b].
        queries: forward and gradient passes spent on each image [b]. They count the search, one
            forward pass for the clean verdict and, where a search took place, one for the final.
        trace: the loss at every iterate [restarts, steps + 1, b], if asked for, else None.
    """

    x_adv: Float[Array, "b h w c"]
    success: Bool[Array, " b"]
    norm: Float[Array, " b"]
    queries: Queries
    trace: jax.Array | None


class Search(NamedTuple):
    """What an attack's search hands to the verdict."""

    x_adv: jax.Array
    queries: Queries
    trace: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Attack(abc.ABC):
    """An adversary within a threat model. Subclasses implement `_search` and `perturb`.

    Attributes:
        threat: the threat model that bounds the perturbation.
    """

    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")

    def __call__(
        self, key: jax.Array, model: Classifier, x: Any, y: Any, index: Any = None
    ) -> Float[Array, "b h w c"]:
        """The adversarial images alone; arguments as for `run`."""
        return self.run(key, model, x, y, index).x_adv

    def run(
        self,
        key: jax.Array,
        model: Classifier,
        x: Any,
        y: Any,
        index: Any = None,
        *,
        trace: bool = False,
    ) -> AttackResult:
        """Attacks a batch, compiled, under matmul precision "highest".

        Args:
            key: a typed key; each image uses `fold_in(key, index)`.
            model: a classifier; a pytree of arrays (an NNX module in eval mode, a
                `jax.tree_util.Partial`) reuses compiled code, any other callable is traced anew.
            x: clean images, float32 [b, h, w, c] in [0, 1].
            y: true labels, integers [b] in [0, k).
            index: the images' numbers in their data set, integers [b]; default 0..b-1.
            trace: whether to record the loss at every iterate.

        Raises:
            TypeError, ValueError: for images outside [0, 1] or not finite, labels of a wrong dtype,
                length or range, an untyped key, or a model whose logits are not float32 [b, k].
        """
        _checks.typed_key("key", key)
        x = _checks.images("x", x)
        y = _checks.integers("y", y, x.shape[0], _classifier.num_classes(model, x))
        index = jnp.arange(x.shape[0]) if index is None else index
        index = _checks.integers("index", index, x.shape[0])
        with jax.default_matmul_precision("highest"):
            return bind(model)(self, key, x, y, index, trace=trace)

    @abc.abstractmethod
    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array
    ) -> Float[Array, "b h w c"]:
        """The last iterate, without verdicts: the inner step of adversarial training.

        A pure function for use inside compiled code; nothing is checked and every image moves.

        Args:
            keys: typed keys [b], one for each image.
            model: a classifier in eval mode.
            x: images, float32 [b, h, w, c] in [0, 1].
            y: labels, int32 [b].
        """

    @abc.abstractmethod
    def _search(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, trace: bool
    ) -> Search:
        """Best candidates for all images; the caller decides which count."""


def _attack(model, attack, key, x, y, index, *, trace):
    correct = jnp.argmax(model(x), axis=-1) == y
    found = attack._search(image_keys(key, index), model, x, y, trace)
    x_adv = jnp.where(correct[:, None, None, None], found.x_adv, x)
    spent = correct.astype(jnp.int32)
    return AttackResult(
        x_adv=x_adv,
        success=jnp.argmax(model(x_adv), axis=-1) != y,
        norm=attack.threat.norm(x_adv - x),
        queries=Queries(
            forward=1 + spent * (found.queries.forward + 1),
            gradient=spent * found.queries.gradient,
        ),
        trace=found.trace,
    )


#: `bind(model)(attack, key, x, y, index, trace=False)`: `attack.run` without checks, with the
#: model's program bound once for many batches. A model must not change while it is bound.
bind = _classifier.jit_over_model(_attack, static_argnames=("trace",))
