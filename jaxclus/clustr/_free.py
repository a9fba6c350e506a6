"""ClusTR with free perturbations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD, Attack
from jaxclus.clustr._clustr import ClusTR
from jaxclus.clustr._state import Clusters
from jaxclus.threat import Linf
from jaxclus.training.objectives import FreeAdversarial, Seen


class FreeState(NamedTuple):
    """What free training carries from step to step.

    Attributes:
        replay: how often the present batch has been used, int32 scalar.
        perturbation: d [b, h, w, c].
    """

    replay: jax.Array
    perturbation: jax.Array


@dataclasses.dataclass(frozen=True)
class FreeClusTR(ClusTR):
    """ClusTR on images that carry the perturbation of free adversarial training.

    As `jc.training.objectives.FreeAdversarial` with the mean Magnet loss: each batch is used in
    `replays` consecutive steps at x + d, and each step moves d by eps sign(g), the gradient of the
    same backward pass, within the ball; d goes on to the next batch. The losses stored are those of
    the last replay, where the published code takes one more pass; and pixels that the box has cut
    keep their d, where it clips d.

    Attributes:
        threat: the threat model, Linf; eps 8/255 in the paper.
        replays: r, steps for each batch, at least 1.

    The others are those of `ClusTR`.

    arXiv:2006.07682 (code); Shafahi et al., arXiv:1904.12843, algorithm 1.
    """

    threat: Linf = Linf(8 / 255)
    replays: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._free()  # checks both

    def _free(self) -> FreeAdversarial:
        return FreeAdversarial(self.threat, self.replays)

    @property
    def steps_per_batch(self) -> int:
        return self.replays

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> Clusters:
        state = super().init(key, model, images, labels, batch_size)
        first = self._free().init(key, model, images, labels, batch_size)
        return dataclasses.replace(state, free=FreeState(jnp.int32(0), first))

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        return self._free().perturb(keys, model, x, y, state.free.perturbation)

    def update(self, state: Clusters, seen: Seen) -> Clusters:
        replay, moved = state.free.replay, self._free().update(state.free.perturbation, seen)
        # Stored earlier, they would change the batch that the next replay draws.
        last = replay + 1 == self.replays
        losses = jnp.where(last, super().update(state, seen).losses, state.losses)
        free = FreeState(jnp.where(last, 0, replay + 1), moved)
        return dataclasses.replace(state, losses=losses, free=free)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, steps=10)
