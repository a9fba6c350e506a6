"""Prototypes that are learned with the network, and push the other classes away."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxclus import _checks, _pytree, losses
from jaxclus._distances import DISTANCES
from jaxclus.prototypes._head import RULES, PrototypeHead, Rule
from jaxclus.prototypes._objectives import several_classes, some
from jaxclus.training.objectives import Objective, Outcome, Seen, TrainingModel, embeddings
from jaxclus.training.objectives._base import accuracy


def attraction(h: jax.Array, y: jax.Array, own: jax.Array) -> jax.Array:
    """mean_b |h_b - w_{y_b}|^2, of embeddings [b, d], labels [b] and prototypes w [k, d]."""
    return DISTANCES["squared_l2"](h, own[y]).mean()


def repulsion(h: jax.Array, y: jax.Array, rivals: jax.Array) -> jax.Array:
    """mean_b mean_{j != y_b} |h_b - v_j|^2, of embeddings [b, d], labels [b] and v [k, d]."""
    distances = DISTANCES["squared_l2"](h[:, None], rivals[None])
    others = jnp.arange(len(rivals))[None] != y[:, None]
    return jnp.where(others, distances, 0).sum() / (len(h) * (len(rivals) - 1))


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class Centres:
    """What training knows of the classes; a pytree.

    Attributes:
        head: the prototypes w, which attract, and how they classify.
        rivals: v, which repel the other classes' embeddings [k, d].
    """

    head: PrototypeHead
    rivals: jax.Array


@dataclasses.dataclass(frozen=True)
class LearnedPrototypes(Objective):
    """Prototype conformity: cross-entropy, with embeddings pulled to w_y and pushed from v_j.

        mean_b CE(z_b, y_b) + attraction P - repulsion C,
        P = mean_b |h_b - w_{y_b}|^2,    C = mean_b mean_{j != y_b} |h_b - v_j|^2,

    with h the network's features and z the logits of its own dense head. w and v, two sets of
    centres [k, d], start from N(0, 1) and take their own gradient steps after each of the
    network's, which do not depend on the two weights:

        w <- w - attraction_rate dP/dw,    v <- v + repulsion_rate dC/dv.

    Nothing bounds C: with weights far above the published ones features grow without limit. The
    published code does this to the features of two layers, here to those before the head; it starts
    from a network trained with cross-entropy (SGD at 0.01, momentum 0.9), and predicts by z.

    Logged: "accuracy", of the classifier on the batches in train mode; "cross_entropy",
    "attraction" (P), "repulsion" (C).

    Attributes:
        attraction: weight of P, at least 0.
        repulsion: weight of C, at least 0.
        attraction_rate: above 0.
        repulsion_rate: above 0.
        rule: how w classifies, as in `PrototypeHead`; the temperature is calibrated after every
            epoch. None for the network's own head, as published: then w is kept in checkpoints
            alone.

    Mustafa et al., "Adversarial Defense by Restricting the Hidden Space of Deep Neural Networks",
    arXiv:1904.00887 (code).
    """

    attraction: float = 1.0
    repulsion: float = 1e-4
    attraction_rate: float = 0.5
    repulsion_rate: float = 1e-4
    rule: Rule | None = "l2"

    def __post_init__(self) -> None:
        _checks.not_negative("attraction", self.attraction)
        _checks.not_negative("repulsion", self.repulsion)
        _checks.positive("attraction_rate", self.attraction_rate)
        _checks.positive("repulsion_rate", self.repulsion_rate)
        if self.rule is not None:
            _checks.one_of("rule", self.rule, RULES)

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> Centres:
        h, classes = embeddings(model, some(images)), several_classes(model, labels)
        own, rivals = jax.random.normal(key, (2, classes, h.shape[1]))
        return Centres(PrototypeHead(own, self.rule or "l2").calibrated(h), rivals)

    def refresh(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        state: Centres,
    ) -> Centres:
        if self.rule is None:  # nobody classifies by them
            return state
        head = state.head.calibrated(embeddings(model, some(images)))
        return dataclasses.replace(state, head=head)

    def head(self, state: Centres) -> PrototypeHead | None:
        return None if self.rule is None else state.head

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Centres,
    ) -> Outcome:
        h = model.features(x_adv)
        z = model.network.head(h)
        own, rivals = state.head.prototypes, state.rivals
        pull, push = attraction(h, y, own), repulsion(h, y, rivals)
        entropy = losses.cross_entropy(z, y).mean()
        loss = entropy + self.attraction * pull - self.repulsion * push
        logits = z if self.rule is None else state.head(h)
        metrics = {"cross_entropy": entropy, "attraction": pull, "repulsion": push}
        fixed = jax.lax.stop_gradient(h)
        slopes = jax.grad(attraction, 2)(fixed, y, own), jax.grad(repulsion, 2)(fixed, y, rivals)
        return Outcome(loss, logits, metrics | accuracy(logits, y), slopes)

    def update(self, state: Centres, seen: Seen) -> Centres:
        pull, push = seen.noted
        moved = state.head.prototypes - self.attraction_rate * pull
        return Centres(
            dataclasses.replace(state.head, prototypes=moved),
            state.rivals + self.repulsion_rate * push,
        )
