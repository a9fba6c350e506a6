"""The clustering regularisers: any objective, plus a term that pulls classes of one group together.

Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
arXiv:2111.12922.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxclus import _checks, clustering, linear, models
from jaxclus.clustering._score import count_classes, scored_ids
from jaxclus.training.objectives._base import Outcome, TrainingModel
from jaxclus.training.objectives._wrapped import Wrapped, WrappedState


@dataclasses.dataclass(frozen=True)
class _Clustering(Wrapped, abc.ABC):
    """Another objective plus beta times a regulariser; with beta 0 it is the other one exactly."""

    groups: Sequence[Any] | ArrayLike
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.not_negative("beta", self.beta)
        # One form of all that groups can be given as, and hashable.
        ids = scored_ids(self.groups, count_classes(self.groups))
        object.__setattr__(self, "groups", tuple(ids.tolist()))

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: WrappedState,
    ) -> Outcome:
        found = super().loss(model, x, x_adv, y, keys, state)
        if self.beta == 0:
            return found
        term = self._regulariser(model, x, found.logits)
        metrics = found.metrics | {"regulariser": term}
        return found._replace(loss=found.loss + self.beta * term, metrics=metrics)

    @abc.abstractmethod
    def _regulariser(self, model: TrainingModel, x: jax.Array, logits: jax.Array) -> jax.Array:
        """What is added, a scalar."""


@dataclasses.dataclass(frozen=True)
class LogitClustering(_Clustering):
    """The published regulariser: L + beta R, with R the spread of logits within groups.

    With the logits z [b, k] of the images that the objective's update sees (the adversarial ones,
    where it makes some), and zbar_bg their mean over the classes of group g,

        form "sum", the paper's for CIFAR-10:   R = 0.1 sum_g sum_{c in g} mean_b (z_bc - zbar_bg)^2
        form "mean", the paper's for CIFAR-20:  R = 1/k sum_g sum_{c in g} mean_b (z_bc - zbar_bg)^2

    For ten classes both are the same number. Whether zbar is detached makes no difference to the
    gradient, as sum_{c in g} (z_bc - zbar_bg) = 0. The term pulls the logits of a group together
    for every image, whatever its label, and so works against the cross-entropy: beta is small.

    Attributes:
        objective: L; Adversarial(PGD(...)) in the paper.
        groups: the group id of each class [k], or a partition with names, as `Dataset.groups`,
            `jc.data.class_groups(name)` and `jc.evaluation.discover_groups(teacher, ...)` give it;
            at least two, one of them with at least two classes.
        beta: weight, at least 0; in the paper 0.1 for CIFAR-10 and 1 for CIFAR-20. 0 is the
            objective itself, bit for bit.
        form: "sum" or "mean".
    """

    beta: float = 0.1
    form: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.one_of("form", self.form, ("sum", "mean"))

    def _regulariser(self, model: TrainingModel, x: jax.Array, logits: jax.Array) -> jax.Array:
        spread = clustering.within_group_spread(logits, self.groups).mean()
        return 0.1 * spread if self.form == "sum" else spread / logits.shape[-1]


@dataclasses.dataclass(frozen=True)
class WeightClustering(_Clustering):
    """L + beta R, with R = mean of C between groups - mean of C within groups: the effect itself.

    C [k, k] is the correlation matrix of the implicit weight W of the linear sub-network without
    BatchNorm, at the weights of this step, and -R in [-2, 2] its clustering score (`difference` of
    `jc.clustering.clustering_score`). The gradient flows through W: k backward passes through the
    linear sub-network, whatever the batch size, and their derivative. The term depends on no image.
    The network must have an affine linear sub-network; `jc.training.fit` raises ValueError for
    others, naming what is in the way.

    This regulariser is ours; the published ones act on logits (`LogitClustering`).

    Attributes:
        objective: L.
        groups: as for `LogitClustering`.
        beta: weight, at least 0. 0 is the objective itself, bit for bit; with 0.1, -R is close to
            its maximum within an epoch on small networks.
    """

    beta: float = 0.1

    def own_state(
        self, key: jax.Array, model: nnx.Module, images: jax.Array, labels: jax.Array
    ) -> Any:
        # Inside a step nothing can be checked: a network that is not affine raises here.
        if self.beta > 0:
            _implicit_weight(model, images.shape[1:])
        return ()

    def _regulariser(self, model: TrainingModel, x: jax.Array, logits: jax.Array) -> jax.Array:
        matrix = clustering.correlation(_implicit_weight(model.network, x.shape[1:]))
        return -clustering.within_minus_between(matrix, self.groups)


def _implicit_weight(network: Any, input_shape: tuple[int, ...]) -> jax.Array:
    """W [k, h, w, c] of the linear sub-network without BatchNorm."""
    bare = models.without_batch_norm(network)
    return linear.implicit_weight(linear.linearize(bare), input_shape).weight
