"""What all attacks share: the protocol, the verdicts, the bookkeeping.

An attack is a frozen, hashable dataclass of hyper-parameters, and a pytree whose numbers (eps, step
size) are leaves, so that a sweep over them compiles once: a subclass is decorated with
`@_pytree.register` above `@dataclasses.dataclass(frozen=True)`.

It searches in rounds (restarts, target classes), each of a fixed number of steps from a fresh
start; an image takes no further steps once it is broken. Every image counts its own rounds and
steps, so that images at different stages share a batch (`_search.py`).
x is float32 [b, h, w, c] in [0, 1].
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxclus import _checks, _classifier, compose
from jaxclus._classifier import Classifier
from jaxclus.threat import THREATS, Threat, create, image_keys


class Queries(NamedTuple):
    """What an attack asked of the model for each image; an image that is broken asks no more."""

    forward: Int[Array, " b"]
    gradient: Int[Array, " b"]


class AttackResult(NamedTuple):
    """Outcome of an attack on b images; a pytree.

    Attributes:
        x_adv: adversarial images, float32 [b, h, w, c], inside ball and box; x itself where the
            clean image was misclassified already, or the best candidate is outside the threat
            model.
        success: whether the model misclassifies `x_adv`, recomputed from `x_adv` itself [b].
        norm: norm of `x_adv - x` [b].
        queries: forward and gradient passes spent on each image [b]. They count the search (all
            samples of an EOT), one forward pass for the clean verdict and, where a search took
            place, one for the final; each counts as one where the classifier is stochastic, and the
            verdicts that confirm such a classifier's successes do not count.
        trace: the loss at every iterate [rounds, steps, b], if asked for, else None; a tuple of
            those of the members if the attack is an ensemble.
    """

    x_adv: Float[Array, "b h w c"]
    success: Bool[Array, " b"]
    norm: Float[Array, " b"]
    queries: Queries
    trace: Any


class Images(NamedTuple):
    """What an attack knows of the images of one round.

    Attributes:
        keys: typed keys [b], other ones in every round.
        verdict_keys: typed keys [b] that a stochastic classifier's verdicts draw from.
        x: clean images [b, h, w, c].
        y: labels [b].
        ranking: classes by clean logit, highest first [b, k].
        round: number of the round [b].
    """

    keys: jax.Array
    verdict_keys: jax.Array
    x: jax.Array
    y: jax.Array
    ranking: jax.Array
    round: jax.Array


class State(NamedTuple):
    """Where the search for each image stands.

    Attributes:
        x_adv: the candidate [b, h, w, c]: adversarial if `success`, else the best so far.
        value: how good the candidate is, to compare rounds; larger is better [b].
        success: whether the candidate was misclassified, inside the threat if there is one [b].
        loss: the loss at the iterate that was evaluated last [b].
        memory: the attack's own, a pytree of arrays with leading axis b.
    """

    x_adv: jax.Array
    value: jax.Array
    success: jax.Array
    loss: jax.Array
    memory: Any


class Search(NamedTuple):
    """What an attack's search hands to the verdict.

    Attributes:
        x_adv: the best candidates [b, h, w, c].
        success: whether the search saw them misclassified, inside the threat if there is one [b].
        queries: passes spent.
        trace: the loss at every iterate [rounds, steps, b], or None.
    """

    x_adv: jax.Array
    success: jax.Array
    queries: Queries
    trace: Any


class Attack(abc.ABC):
    """An adversary: a dataclass with a field `threat`, the threat model; None means no bound."""

    threat: Threat | None

    @property
    @abc.abstractmethod
    def ball(self) -> Threat:
        """The threat model or, without one, some ball of the norm that is measured."""

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
            trace: whether to record the loss at every iterate; no image stops early then.

        Raises:
            TypeError, ValueError: for images outside [0, 1] or not finite, labels of a wrong dtype,
                length or range, an untyped key, a model whose logits are not float32 [b, k] or
                that computes in another precision, or fewer classes than the attack needs.
        """
        _checks.typed_key("key", key)
        x = _checks.images("x", x)
        classes = _classifier.num_classes(model, x)
        self.check_classes(classes)
        self.check_model(model)
        y = _checks.integers("y", y, x.shape[0], classes)
        index = jnp.arange(x.shape[0]) if index is None else index
        index = _checks.integers("index", index, x.shape[0])
        with jax.default_matmul_precision("highest"):
            return bind(model)(self, key, x, y, index, trace=trace)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array
    ) -> Float[Array, "b h w c"]:
        """The best candidates inside ball and box, without verdicts, for adversarial training.

        A pure function for use inside compiled code; nothing is checked. Images are attacked
        whether or not they are classified correctly; attacks by gradient ascent return their last
        iterate.

        Args:
            keys: typed keys [b], one for each image.
            model: a classifier in eval mode.
            x: images, float32 [b, h, w, c] in [0, 1].
            y: labels, int32 [b].
        """
        logits, _ = _classifier.verdict(model, keys, x)
        found = self._search(keys, model, x, y, logits, jnp.full(y.shape, True), trace=False)
        kept = found.x_adv if self.threat is None else self.threat.project(found.x_adv, x)
        return jax.lax.stop_gradient(kept)

    def check_classes(self, classes: int) -> None:  # noqa: B027 (most attacks need no more than 2)
        """Raises ValueError if the attack cannot work with so few classes."""

    def check_model(self, model: Classifier) -> None:  # noqa: B027 (most attacks take any)
        """Raises ValueError if the attack is not made for such a model."""

    @abc.abstractmethod
    def members(self, classes: int) -> "list[tuple[str, SteppedAttack]]":
        """The attacks that this one consists of, by name, for a model of so many classes."""

    def skipped(self, classes: int) -> dict[str, str]:
        """The members that so few classes leave out, each with the reason."""
        return {}

    @abc.abstractmethod
    def _search(
        self,
        keys: jax.Array,
        model: Classifier,
        x: jax.Array,
        y: jax.Array,
        logits: jax.Array,
        active: jax.Array,
        *,
        trace: bool,
        member: int | None = None,
    ) -> Search:
        """The best candidates of the images that are `active` [b], x itself for the others.

        Args:
            keys: the images' typed keys [b].
            logits: the clean images' logits [b, k].
            member: number of the attack in its ensemble, for random numbers of its own.
        """


class SteppedAttack(Attack):
    """An attack of rounds and steps. Subclasses say how a round starts and what a step does."""

    @property
    @abc.abstractmethod
    def steps_per_round(self) -> int:
        """How many times `step` is called in a round."""

    def rounds(self, classes: int) -> int:
        """The number of rounds for each image, given the number of classes."""
        return 1

    @property
    def cost(self) -> tuple[int, int]:
        """Forward and gradient passes of one step."""
        return 1, 1

    @property
    def finish_cost(self) -> tuple[int, int]:
        """Forward and gradient passes of `finish`."""
        return 0, 0

    def samples(self, model: Classifier) -> int:
        """Passes behind each one that `cost` and `finish_cost` count: those of an EOT, else 1."""
        return compose.samples(model)

    @abc.abstractmethod
    def start(self, images: Images) -> State:
        """The state before the first step; does not call the model."""

    @abc.abstractmethod
    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        """The state after one step.

        Args:
            model: a classifier.
            images: the images.
            i: number of steps that each image has taken [b].
            state: the state before the step.
        """

    def finish(self, model: Classifier, images: Images, state: State) -> State:
        """The state at the end of a round, where the last iterate is still to be judged."""
        return state

    def members(self, classes: int) -> "list[tuple[str, SteppedAttack]]":
        return [(type(self).__name__, self)]

    def _search(
        self,
        keys: jax.Array,
        model: Classifier,
        x: jax.Array,
        y: jax.Array,
        logits: jax.Array,
        active: jax.Array,
        *,
        trace: bool,
        member: int | None = None,
    ) -> Search:
        from jaxclus.attacks import _search

        return _search.search(self, keys, model, x, y, logits, active, trace=trace, member=member)


@dataclasses.dataclass(frozen=True)
class BoundedAttack(SteppedAttack):
    """An adversary within a threat model.

    Attributes:
        threat: the threat model that bounds the perturbation.
    """

    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")

    @property
    def ball(self) -> Threat:
        return self.threat


@dataclasses.dataclass(frozen=True)
class MinimumNormAttack(SteppedAttack):
    """An adversary that looks for the closest misclassified image, in the box alone.

    A candidate's value is minus its norm. Without `threat`, success is misclassification, and the
    search for every image goes to its end; with it, success is misclassification inside the threat
    model (norm at most eps, exactly), and the search for an image ends there. (Of a stochastic
    classifier's candidates, the verdict confirms those inside the threat alone.)

    Attributes:
        norm: norm that is made small, "linf", "l2" or "l1".
        threat: the threat model that success is judged by, of the same norm, or None.
    """

    norm: str = dataclasses.field(metadata={"static": True})
    threat: Threat | None = None

    #: The norms that the attack is made for.
    NORMS: ClassVar[tuple[str, ...]] = tuple(THREATS)

    def __post_init__(self) -> None:
        _checks.one_of("norm", self.norm, self.NORMS)
        if self.threat is not None and not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")
        if self.threat is not None and self.threat.name != self.norm:
            raise ValueError(
                f"`threat` must be of the attack's norm {self.norm}, got {self.threat!r}"
            )

    @property
    def ball(self) -> Threat:
        return create(self.norm, 1.0) if self.threat is None else self.threat

    def _keep_smallest(
        self, state: State, x_adv: jax.Array, norm: jax.Array, wrong: jax.Array
    ) -> State:
        """The state with an iterate as candidate where it is wrong and closer than the one so far.

        `value` is minus infinity, and the candidate x itself, until the first one is found. Success
        is left as it is without a threat: there is always a closer one to look for.

        Args:
            state: the state.
            x_adv: the iterate [b, h, w, c].
            norm: its distance from x [b].
            wrong: whether it is misclassified [b].
        """
        better = wrong & (-norm > state.value)
        state = state._replace(
            x_adv=jnp.where(better[:, None, None, None], x_adv, state.x_adv),
            value=jnp.where(better, -norm, state.value),
        )
        if self.threat is None:
            return state
        return state._replace(success=-state.value <= self.threat.eps)


def _attack(model, attack, key, x, y, index, *, trace):
    keys = image_keys(key, index)
    logits, predicted = _classifier.verdict(model, keys, x)
    correct = predicted == y
    found = attack._search(keys, model, x, y, logits, correct, trace=trace)
    norm = attack.ball.norm(found.x_adv - x)
    limit = jnp.inf if attack.threat is None else attack.threat.limit
    sound = correct & (norm <= limit)  # not so for NaN
    x_adv = jnp.where(sound[:, None, None, None], found.x_adv, x)
    success = _classifier.verdict(model, keys, x_adv)[1] != y
    spent = correct.astype(jnp.int32)
    return AttackResult(
        x_adv=x_adv,
        success=success,
        norm=jnp.where(sound, norm, 0.0),
        queries=Queries(
            forward=1 + spent * (found.queries.forward + 1),
            gradient=spent * found.queries.gradient,
        ),
        trace=found.trace,
    )


#: `bind(model)(attack, key, x, y, index, trace=False)`: `attack.run` without checks, with the
#: model's program bound once for many batches. A model must not change while it is bound.
bind = _classifier.jit_over_model(_attack, static_argnames=("trace",))
