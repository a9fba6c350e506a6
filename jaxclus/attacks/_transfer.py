"""Transfer attacks: crafted on one model, judged by another."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxclus import _classifier, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._base import Images, State, SteppedAttack
from jaxclus.threat import Threat


@dataclasses.dataclass(frozen=True)
class Sourced(SteppedAttack):
    """An attack that asks `source` for its steps, and the model it is given for verdicts."""

    attack: SteppedAttack
    source: Classifier
    threat: Threat | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, SteppedAttack):
            raise TypeError(f"`attack` must be one that goes by steps, got {type(self.attack)}")
        if not callable(self.source) or not _classifier.is_pytree(self.source):
            raise TypeError(
                "`source` must be a callable pytree of arrays, as an NNX module or "
                f"jax.tree_util.Partial(predict, weights) is, got {type(self.source)}"
            )
        if self.threat is None:
            object.__setattr__(self, "threat", self.attack.threat)
        else:
            # Every attack is a dataclass, but the base class is none.
            attack = dataclasses.replace(self.attack, threat=self.threat)  # pyright: ignore[reportArgumentType]
            object.__setattr__(self, "attack", attack)

    @property
    def ball(self) -> Threat:
        return self.attack.ball

    @property
    def steps_per_round(self) -> int:
        return self.attack.steps_per_round

    def rounds(self, classes: int) -> int:
        return self.attack.rounds(classes)

    def check_classes(self, classes: int) -> None:
        self.attack.check_classes(classes)

    def samples(self, model: Classifier) -> int:
        return compose.samples(self.source)

    def _fooled(
        self, model: Classifier, images: Images, i: jax.Array, x_adv: jax.Array
    ) -> jax.Array:
        """Whether the model misclassifies x_adv [b, h, w, c], inside the threat if there is one."""
        keys = compose.split(images.keys, i)
        _, wrong = _gradient.evaluate(model, keys, losses.margin, x_adv, images.y)
        if self.threat is not None:
            wrong &= self.threat.norm(x_adv - images.x) <= self.threat.limit
        return wrong


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Transfer(Sourced):
    """An attack whose every step asks `source`, while the model it is given only judges.

    `Transfer(PGD(threat), source).run(key, target, x, y)`. The search does not end where the source
    is fooled: each round takes all of its steps, and then asks the target for its verdict on the
    candidate that the attack has come to, the latest iterate that fools the source for most
    attacks, the closest one for minimum-norm attacks. Of several rounds the first success counts.
    Clean predictions, and with them the order of target classes, are the target's. The queries
    count passes through both models; where the source is an EOT, a pass of the target counts as
    often as its samples.

    Attributes:
        attack: the attack, one that proceeds by steps.
        source: the model that is differentiated: a pytree of arrays (an NNX module in eval mode, a
            `jax.tree_util.Partial`), with as many classes as the target.
        threat: the threat model; None means the attack's own, another one replaces it there (as a
            curve over eps does).

    Papernot, McDaniel and Goodfellow, "Transferability in Machine Learning", 2016,
    arXiv:1605.07277.
    """

    @property
    def cost(self) -> tuple[int, int]:
        return self.attack.cost

    @property
    def finish_cost(self) -> tuple[int, int]:
        forward, gradient = self.attack.finish_cost
        return forward + 1, gradient

    def start(self, images: Images) -> State:
        source = compose.with_keys(self.source, images.keys)
        classes, expected = jax.eval_shape(source, images.x).shape[-1], images.ranking.shape[-1]
        if classes != expected:
            raise ValueError(
                f"`source` must have the {expected} classes of the model under attack, "
                f"got {classes}"
            )
        return self.attack.start(images)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        state = self.attack.step(self.source, images, i, state)
        return state._replace(success=state.success & False)

    def finish(self, model: Classifier, images: Images, state: State) -> State:
        state = self.attack.finish(self.source, images, state)
        end = jnp.full(images.y.shape, self.steps_per_round)
        return state._replace(success=self._fooled(model, images, end, state.x_adv))
