"""Several attacks as one: an image is broken if any of them breaks it."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxclus import _pytree
from jaxclus._classifier import Classifier
from jaxclus.attacks._base import Attack, Queries, Search, SteppedAttack
from jaxclus.threat import Threat


@dataclasses.dataclass(frozen=True)
class InTurn(Attack):
    """Attacks one after the other, each on the images that all before it left standing.

    Every member starts from the clean image. The adversarial image of an unbroken one is the clean
    image itself.
    """

    threat: Threat

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")

    @property
    def ball(self) -> Threat:
        return self.threat

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
        x_adv, broken, traces = x, jnp.zeros_like(active), []
        spent = Queries(jnp.zeros_like(y), jnp.zeros_like(y))
        for number, (_, attack) in enumerate(self.members(logits.shape[1])):
            found = attack._search(
                keys, model, x, y, logits, active & ~broken, trace=trace, member=number
            )
            x_adv = jnp.where(found.success[:, None, None, None], found.x_adv, x_adv)
            broken |= found.success
            spent = jax.tree.map(jnp.add, spent, found.queries)
            traces.append(found.trace)
        return Search(x_adv, broken, spent, tuple(traces) if trace else None)


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Ensemble(InTurn):
    """The given attacks in turn, each on the images that all before it left standing.

    Other than AutoAttack's "custom" version it takes attacks that hold arrays, as `Transfer` and
    `Guided` do. Every member starts from the clean image, and has random numbers of its own. The
    adversarial image of an unbroken one is the clean image itself.

    Attributes:
        threat: the threat model; it replaces the members' own.
        attacks: the members in order, at least one, of the threat's norm.
        names: as many different names for them.
    """

    attacks: tuple[SteppedAttack, ...]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attacks:
            raise ValueError("`attacks` must hold at least one attack, got none")
        for member in self.attacks:
            if not isinstance(member, SteppedAttack):
                raise TypeError(f"`attacks` must be attacks that go by steps, got {type(member)}")
            if member.ball.name != self.threat.name:
                raise ValueError(
                    f"`attacks` must be of the threat's norm {self.threat.name}, got one of "
                    f"{member.ball.name}"
                )
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.attacks):
            raise ValueError(
                f"`names` must be {len(self.attacks)} different ones, got {self.names!r}"
            )
        object.__setattr__(self, "attacks", tuple(self._within(each) for each in self.attacks))

    def _within(self, member: SteppedAttack) -> SteppedAttack:
        return dataclasses.replace(member, threat=self.threat)  # pyright: ignore[reportArgumentType]

    def check_classes(self, classes: int) -> None:
        for member in self.attacks:
            member.check_classes(classes)

    def members(self, classes: int) -> list[tuple[str, SteppedAttack]]:
        """The attacks by name, in order."""
        return list(zip(self.names, self.attacks, strict=True))
