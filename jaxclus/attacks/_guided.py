"""Attacks whose gradients come from somewhere else than from the model that is attacked."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxclus import _pytree, compose
from jaxclus._classifier import Classifier
from jaxclus.attacks._apgd import AutoPGD
from jaxclus.attacks._ascent import GradientAscent
from jaxclus.attacks._base import Images, State
from jaxclus.attacks._transfer import Sourced


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Guided(Sourced):
    """An attack that follows the gradients of `source`, every iterate judged by the model.

    `Guided(APGD(threat, loss=own_loss), embed).run(key, jc.Chain(embed, head), x, y)`: the loss is
    of the source's outputs, and a success is a misclassification by the model,
    of any iterate. For losses that are not of the model's logits: of its embeddings, of another
    head on them, of a smooth copy. (`Transfer` asks the model once at the end of a round.)

    An iterate becomes the candidate where it is misclassified or its loss is the highest so far.
    Clean predictions, and with them the order of target classes, are the model's. The queries count
    passes through both.

    Attributes:
        attack: FGSM, PGD, MI-FGSM, multi-targeted PGD, APGD or targeted APGD.
        source: the function that is differentiated, images [b, h, w, c] -> outputs [b, m], a pytree
            of arrays; m is the model's number of classes unless the attack's loss is a callable.
        threat: the threat model; None means the attack's own, another one replaces it there.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.attack, (GradientAscent, AutoPGD)):
            raise TypeError(
                "`attack` must be one that climbs by gradients (FGSM, PGD, MIFGSM, "
                f"MultiTargetedPGD, APGD, TargetedAPGD), got {type(self.attack)}"
            )
        super().__post_init__()

    @property
    def cost(self) -> tuple[int, int]:
        forward, gradient = self.attack.cost
        return forward + 1, gradient

    @property
    def finish_cost(self) -> tuple[int, int]:
        forward, gradient = self.attack.finish_cost
        return (forward + 1, gradient) if forward else (0, 0)

    def start(self, images: Images) -> State:
        source = compose.with_keys(self.source, images.keys)
        shape, classes = jax.eval_shape(source, images.x).shape, images.ranking.shape[-1]
        own_loss = callable(getattr(self.attack, "loss", None))
        if len(shape) != 2 or (not own_loss and shape[1] != classes):
            wanted = "m" if own_loss else f"{classes}, the classes of the model under attack"
            raise ValueError(f"`source` must return outputs [b, {wanted}], got {shape}")
        return self.attack.start(images)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        return self._judged(
            model, images, i, state, self.attack.step(self.source, images, i, state)
        )

    def finish(self, model: Classifier, images: Images, state: State) -> State:
        end = jnp.full(images.y.shape, self.steps_per_round)
        return self._judged(
            model, images, end, state, self.attack.finish(self.source, images, state)
        )

    def _judged(
        self, model: Classifier, images: Images, i: jax.Array, old: State, new: State
    ) -> State:
        """The new state, with a verdict on the iterate that was evaluated, the old state's."""
        iterate = old.memory.iterate
        wrong = self._fooled(model, images, i, iterate)
        inside = self.ball.norm(iterate - images.x) <= self.ball.limit
        better = wrong | (inside & (new.loss > old.value))
        return new._replace(
            x_adv=jnp.where(better[:, None, None, None], iterate, old.x_adv),
            value=jnp.where(better, new.loss, old.value),
            success=wrong,
        )
