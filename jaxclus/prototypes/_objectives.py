"""Training onto class prototypes that stand still: on clean images, on PGD's, and by TRADES."""

import dataclasses
import warnings
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jaxclus import _checks, models
from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD
from jaxclus.compose import Chain
from jaxclus.models._classifier import checked
from jaxclus.prototypes._generators import hadamard, hyperspherical, repulsive, simplex
from jaxclus.prototypes._head import RULES, PrototypeHead, Rule
from jaxclus.prototypes._losses import PrototypeDistance, prototype_loss, published_loss
from jaxclus.threat import Linf, Threat
from jaxclus.training.objectives import Objective, Outcome, TrainingModel, embeddings
from jaxclus.training.objectives._base import accuracy, num_classes
from jaxclus.training.objectives._consistency import FromNearby, divergence

#: Where the prototypes of `PrototypeTraining` come from.
Generator = Literal[
    "repulsive", "repulsive_mean", "uniform", "hyperspherical", "simplex", "hadamard"
]
#: What `PrototypeTraining` minimises.
TrainingDistance = Literal[PrototypeDistance, "linf_sum"]
# How many training images the head's temperature is calibrated on.
_CALIBRATED_ON = 1024


@dataclasses.dataclass(frozen=True)
class PrototypeTraining(Objective):
    """Deep Repulsive Prototypes: mean_b D(f(x_b), p_{y_b}) on clean images, with p fixed.

    The prototypes are drawn once, before training, of the size of the network's features. The
    trained model is these features under a `PrototypeHead`, whose temperature is calibrated on
    1,024 training images after every epoch: `jc.Chain(jc.models.features(network), head)`.
    Features should take both signs: create the network with `embedding_size`, as published (d = 100
    for 10 classes, 500 for 100).

    Logged: "accuracy", of the head on the batches in train mode.

    Attributes:
        generator: where prototypes come from: "repulsive" (100 steps on the sum, published),
            "repulsive_mean", "uniform" (where these start: entries from [-1, 1]),
            "hyperspherical", "simplex" or "hadamard".
        generator_steps: of "repulsive", "repulsive_mean" and "hyperspherical", at least 0; None for
            100, 100 and 10,000. Published for 100 classes, of the mean: 1,000 and 5,000.
        distance: D, a name of `prototype_loss`; "linf" is the published runs'. With "linf_sum" and
            "cosine_squared" sums over the batch take the place of means, as published.
        rule: of the head; the published one is "inner_product".
        scale: the prototypes are multiplied with it, above 0; Pang et al. have 10 for "simplex".
        as_published: with the published code's mistakes: cosines are those of the columns of the
            batch, f(x) and the prototypes both [b, d], instead of the rows, so that an image's loss
            depends on the others; and Linf distances are those of f(x) + 1e-6. Not with "l2",
            which that code lacks.

    Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness",
    arXiv:2105.12427, and its code. With "simplex", "l2" and a scale, Max-Mahalanobis training (Pang
    et al., arXiv:1905.10626); with "hyperspherical" and "cosine_squared", Hyperspherical Prototype
    Networks (Mettes et al., arXiv:1901.10514).
    """

    generator: Generator = "repulsive"
    generator_steps: int | None = None
    distance: TrainingDistance = "linf"
    rule: Rule = "inner_product"
    scale: float = 1.0
    as_published: bool = False

    def __post_init__(self) -> None:
        _checks.one_of("generator", self.generator, get_args(Generator))
        if self.generator_steps is not None:
            _checks.at_least("generator_steps", self.generator_steps, 0)
            if self.generator in ("uniform", "simplex", "hadamard"):
                raise ValueError(
                    f"`generator_steps` must be None for {self.generator}, which takes none, got "
                    f"{self.generator_steps}"
                )
        _checks.one_of("distance", self.distance, get_args(TrainingDistance))
        if self.as_published and self.distance == "l2":
            raise ValueError(
                "`as_published` must be False for l2, which was not published, got True"
            )
        _checks.one_of("rule", self.rule, RULES)
        _checks.positive("scale", self.scale)

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> PrototypeHead:
        h = embeddings(model, some(images))
        if (h >= 0).all():
            warnings.warn(
                "`model` has features of at least 0 only, which reach no prototype with negative "
                "entries: create it with `embedding_size`",
                stacklevel=2,
            )
        classes = several_classes(model, labels)
        try:
            prototypes = self._generated(key, classes, h.shape[1])
        except ValueError as error:
            raise ValueError(
                f"`model` must have features that prototypes of {classes} classes fit into, got "
                f"{h.shape[1]} of them: {error}. `embedding_size` of jc.models.create sets that"
            ) from error
        return self._head(self.scale * prototypes, h)

    def refresh(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        state: PrototypeHead,
    ) -> PrototypeHead:
        return self._head(state.prototypes, embeddings(model, some(images)))

    def head(self, state: PrototypeHead) -> PrototypeHead:
        return state

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: PrototypeHead,
    ) -> Outcome:
        return self._pull(model.features(x_adv), y, state)

    def _pull(self, h: jax.Array, y: jax.Array, state: PrototypeHead) -> Outcome:
        """The loss of a batch's embeddings."""
        loss = published_loss if self.as_published else prototype_loss
        found = loss(h, state.prototypes[y], self._of_one_image)
        logits = state(h)
        return Outcome(self._reduced(found), logits, accuracy(logits, y))

    @property
    def _of_one_image(self) -> PrototypeDistance:
        return "linf" if self.distance == "linf_sum" else self.distance

    def _reduced(self, losses: jax.Array) -> jax.Array:
        """The batch's loss."""
        return losses.sum() if self.distance in ("linf_sum", "cosine_squared") else losses.mean()

    def _generated(self, key: jax.Array, classes: int, dim: int) -> jax.Array:
        """The prototypes [k, d], without the scale."""
        steps = self.generator_steps
        if self.generator == "simplex":
            return simplex(classes, dim)
        if self.generator == "hadamard":
            return hadamard(classes, dim)
        if self.generator == "uniform":
            return repulsive(key, classes, dim, 0)
        if self.generator == "hyperspherical":
            return hyperspherical(key, classes, dim, 10_000 if steps is None else steps)
        reduction = "mean" if self.generator == "repulsive_mean" else "sum"
        return repulsive(key, classes, dim, 100 if steps is None else steps, reduction)

    def _head(self, prototypes: jax.Array, h: jax.Array) -> PrototypeHead:
        return PrototypeHead(prototypes, self.rule).calibrated(h)


@dataclasses.dataclass(frozen=True)
class AdversarialPrototypes(PrototypeTraining):
    """Prototypes under adversarial training: mean_b D(f(x'_b), p_{y_b}), with x' by PGD on D.

    x' maximises each image's own D in `steps` projected steps from a random point of the ball, in
    eval mode. The published code contains such training and never calls it.

    Attributes:
        threat: the threat model.
        steps: of the adversary, at least 1.
        step_size: in the threat's norm, on the pixel scale, above 0; None means 2.5 eps / steps.

    The others are those of `PrototypeTraining`. As published, what is attacked is each image's own
    cosine too: the columns' has no meaning for one image.
    """

    threat: Threat = Linf(8 / 255)
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validation_attack()  # checks the rest

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: PrototypeHead
    ) -> jax.Array:
        own = dataclasses.replace(
            self.validation_attack(),
            loss=lambda h, y: prototype_loss(h, state.prototypes[y], self._of_one_image),
        )
        return own.perturb(keys, models.features(checked("model", model)), x, y)

    def validation_attack(self) -> PGD:
        return PGD(self.threat, self.steps, self.step_size)


@dataclasses.dataclass(frozen=True)
class PrototypeTRADES(AdversarialPrototypes):
    """TRADES with prototypes: mean_b D(f(x_b), p_{y_b}) + beta mean_b KL(q(x_b) || q(x'_b)).

    (With "linf_sum" and "cosine_squared" both means are sums.) q = softmax(s / T) with the head's
    scores s and the T of `PrototypeHead.calibrated` on the prototypes themselves: where these are
    equally long and equally far apart, the largest probability there is 0.9, and less at most of
    them where a few long ones decide T, as with inner products of repulsive ones. What a beta comes
    to depends on D, and so on the scale of the prototypes. x' maximises the same divergence, in
    `steps` projected steps from x + 0.001 N(0, 1) in eval mode. The logged accuracy is that on x';
    also logged: "natural_loss", "divergence".

    Attributes:
        beta: weight of the divergence, at least 0. TRADES has 6 beside a cross-entropy; cosine
            distances are at most 2.

    The others are those of `AdversarialPrototypes`. The consistency term is that of Zhang et al.,
    arXiv:1901.08573, equation 5.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.not_negative("beta", self.beta)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: PrototypeHead
    ) -> jax.Array:
        embed, head = models.features(checked("model", model)), _at_the_prototypes(state)
        clean = head(embed(x))
        attack = FromNearby(
            self.threat, self.steps, self.step_size, loss=lambda z, _: divergence(clean, z)
        )
        return attack.perturb(keys, Chain(embed, head), x, y)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: PrototypeHead,
    ) -> Outcome:
        h, h_adv = model.features(x), model.features(x_adv)
        natural = self._pull(h, y, state).loss
        head = _at_the_prototypes(state)
        clean, attacked = head(h), head(h_adv)
        gap = self._reduced(divergence(clean, attacked))
        metrics = accuracy(attacked, y) | {"natural_loss": natural, "divergence": gap}
        return Outcome(natural + self.beta * gap, attacked, metrics)


def _at_the_prototypes(head: PrototypeHead) -> PrototypeHead:
    """The head calibrated on its prototypes.

    Not on embeddings: early in training, where they hardly differ, that makes the divergence so
    large that the network learns to ignore its input.
    """
    return head.calibrated(head.prototypes)


def several_classes(model: nnx.Module, labels: jax.Array) -> int:
    """k, which is at least 2; raises for fewer."""
    classes = num_classes(model, labels)
    if classes < 2:
        raise ValueError(f"`labels` must be of at least 2 classes, got {classes}: all are 0")
    return classes


def some(images: jax.Array) -> jax.Array:
    """At most `_CALIBRATED_ON` of the images, spread over the set, which may be sorted by class."""
    count = min(len(images), _CALIBRATED_ON)
    return images[jnp.arange(count) * len(images) // count]
