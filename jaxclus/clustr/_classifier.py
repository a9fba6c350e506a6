"""Classification of embeddings by their nearest clusters."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks, _pytree
from jaxclus.clustr._magnet import squared_distances


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class ClusterClassifier:
    """Embeddings [b, d] -> logits [b, k] by the distances to the clusters of each class.

    With s_j = exp(-|h - mu_j|^2 / (2 sigma^2)), the logits are G_c = log sum_{j of c} s_j over all
    clusters of class c. Their argmax is that of the published scores where those count every
    cluster and do not underflow. Far from all centres every score is 0 in float32, and a
    cross-entropy on scores has no gradient left, while that on G still says where to go. Attack
    these. (Where one class leads by far, their cross-entropy saturates as that of any logits does;
    AutoAttack's other losses and targets do not depend on it.)

    `scores` are the published ones: S_c sums s_j over those of the `nearest` clusters that are of
    class c, and `probabilities` are S / sum S. `score_classifier` takes scores for logits, to
    repeat the published evaluation. A pytree, for `jc.Chain(jc.models.features(network), head)`.

    Attributes:
        centres: mu, float32 [m, d].
        centre_classes: classes of the centres, a tuple of m integers, every class from 0 to the
            largest among them.
        variance: sigma^2, a number above 0.
        nearest: L, how many clusters the scores count, in [1, m]; None for all.

    Raises:
        ValueError, TypeError: a value is not as said.

    Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682 (code).
    """

    centres: Float[Array, "m d"]
    centre_classes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    variance: Float[Array, ""] | float
    nearest: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        centres = _checks.vectors("centres", self.centres)
        classes = _classes(self.centre_classes, len(centres))
        _checks.positive("variance", self.variance)
        if self.nearest is not None:
            _checks.at_least("nearest", self.nearest, 1)
            _checks.within("nearest", self.nearest, 1, len(centres))
        object.__setattr__(self, "centres", centres)
        object.__setattr__(self, "centre_classes", classes)
        object.__setattr__(self, "variance", jnp.asarray(self.variance, centres.dtype))

    @property
    def num_classes(self) -> int:
        """k."""
        return max(self.centre_classes) + 1

    def __call__(self, embeddings: ArrayLike) -> Float[Array, "b k"]:
        """The logits G [b, k] of embeddings [b, d]."""
        return self.log_sums(self._exponents(embeddings))

    def log_sums(self, exponents: Float[Array, "b m"]) -> Float[Array, "b k"]:
        """log sum_{j of c} exp(exponents_j) for each class c [b, k]."""
        members, present = self.members
        return jax.nn.logsumexp(jnp.where(present, exponents[:, members], -jnp.inf), axis=2)

    @property
    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of each class's centres [k, K], and which entries count [k, K].

        K is the most that a class has; classes with fewer repeat theirs.
        """
        classes = np.asarray(self.centre_classes)
        counts = np.bincount(classes)
        table = [np.resize(np.flatnonzero(classes == c), counts.max()) for c in range(len(counts))]
        return np.array(table), np.arange(counts.max()) < counts[:, None]

    def distances(self, embeddings: ArrayLike) -> Float[Array, "b m"]:
        """Squared Euclidean distances [b, m] to the centres."""
        return squared_distances(self.checked(embeddings), self.centres)

    def checked(self, embeddings: ArrayLike, name: str = "embeddings") -> Float[Array, "b d"]:
        """The embeddings as an array; raises unless they are finite and of the right size."""
        return _checks.embeddings(name, embeddings, self.centres, "centres")

    def scores(self, embeddings: ArrayLike) -> Float[Array, "b k"]:
        """The published scores S [b, k], in [0, clusters of a class]."""
        return self._sums_of_nearest(self._exponents(embeddings))

    def probabilities(self, embeddings: ArrayLike) -> Float[Array, "b k"]:
        """S / sum S [b, k], also where S is 0 in float32.

        The published code divides by max(sum S, 1e-12), which leaves zeros far from all centres.
        """
        exponents = self._exponents(embeddings)
        # Both sums relative to the nearest cluster's term, which never underflows.
        largest = jax.lax.stop_gradient(exponents.max(axis=1, keepdims=True))
        sums = self._sums_of_nearest(exponents - largest)
        return sums / sums.sum(axis=1, keepdims=True)

    def _exponents(self, embeddings: ArrayLike) -> jax.Array:
        """-|h - mu_j|^2 / (2 sigma^2) for each centre [b, m]."""
        return -self.distances(embeddings) / (2 * self.variance)

    def _sums_of_nearest(self, exponents: jax.Array) -> jax.Array:
        """sum_j exp(exponents_j) over each class's clusters that count [b, k]."""
        similarity = jnp.exp(exponents)
        if self.nearest is not None:
            # By rank, so that exactly L count where distances tie.
            rank = jnp.argsort(jnp.argsort(-exponents, axis=1), axis=1)
            similarity = jnp.where(rank < self.nearest, similarity, 0)
        own = jax.nn.one_hot(np.asarray(self.centre_classes), self.num_classes)
        return jnp.matmul(similarity, own, precision="highest")

    @property
    def score_classifier(self) -> Callable[[jax.Array], jax.Array]:
        """A pytree callable, embeddings [b, d] -> scores [b, k], for published evaluations."""
        return jax.tree_util.Partial(ClusterClassifier.scores, self)


def _classes(value: tuple[int, ...], count: int) -> tuple[int, ...]:
    with jax.ensure_compile_time_eval():  # static, also inside compiled code
        classes = _checks.integers("centre_classes", np.asarray(value), count).tolist()
    missing = sorted(set(range(max(classes) + 1)) - set(classes))
    if missing:
        raise ValueError(
            f"`centre_classes` must hold each class from 0 to {max(classes)}, but {missing} have "
            "no centre"
        )
    return tuple(classes)
