"""Classification of embeddings by class prototypes."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks, _pytree
from jaxclus._distances import DISTANCES, directions
from jaxclus.attacks.adaptive import calibrated_temperature

#: How a `PrototypeHead` classifies.
Rule = Literal["inner_product", "cosine", "linf", "l2"]
RULES: tuple[Rule, ...] = get_args(Rule)


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class PrototypeHead:
    """Embeddings z [b, d] -> logits [b, k], s_j(z) / T for the prototypes p_j, with

    - "inner_product": s_j = <z, p_j>, the published rule. Long prototypes are favoured, and z = p_y
      need not be classified as y;
    - "cosine": s_j = <z, p_j> / (|z|_2 |p_j|_2), 0 at z = 0, where its gradient is the direction
      of p_j;
    - "linf": s_j = -max_i |z_i - p_ji|;
    - "l2": s_j = -|z - p_j|_2, with gradient 0 at z = p_j.

    (The published code divides z by its Linf or L2 norm before the inner product, which changes no
    prediction.) T changes no prediction either, but the cross-entropy: with inner products of
    repulsive prototypes the logits' differences are hundreds at T = 1, and its gradient is exactly
    0. `calibrated` chooses T. A pytree, for `jc.Chain(jc.models.features(network), head)`.

    Attributes:
        prototypes: p, floating point [k, d], k at least 2; kept as float32.
        rule: "inner_product", "cosine", "linf" or "l2".
        temperature: T, a number above 0.

    Raises:
        ValueError, TypeError: a value is not as said.

    Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness",
    arXiv:2105.12427 (code).
    """

    prototypes: Float[Array, "k d"]
    rule: Rule = dataclasses.field(default="inner_product", metadata={"static": True})
    temperature: Float[Array, ""] | float = 1.0

    def __post_init__(self) -> None:
        prototypes = _checks.vectors("prototypes", self.prototypes, at_least=2)
        prototypes = prototypes.astype(jnp.float32)
        _checks.one_of("rule", self.rule, RULES)
        _checks.positive("temperature", self.temperature)
        object.__setattr__(self, "prototypes", prototypes)
        object.__setattr__(self, "temperature", jnp.asarray(self.temperature, prototypes.dtype))

    @property
    def num_classes(self) -> int:
        """k."""
        return self.prototypes.shape[0]

    def __call__(self, embeddings: ArrayLike) -> Float[Array, "b k"]:
        """The logits [b, k] of embeddings [b, d]."""
        return self.scores(embeddings) / self.temperature

    def scores(self, embeddings: ArrayLike) -> Float[Array, "b k"]:
        """s [b, k], the logits at T = 1, of embeddings [b, d]."""
        z = self.checked(embeddings)
        if self.rule == "inner_product":
            return jnp.matmul(z, self.prototypes.T, precision="highest")
        if self.rule == "cosine":
            # Not as 1 - distance, whose rounding cosines near 0 do not survive.
            return jnp.matmul(directions(z), directions(self.prototypes).T, precision="highest")
        return -DISTANCES[self.rule](z[:, None], self.prototypes[None])

    def checked(self, embeddings: ArrayLike, name: str = "embeddings") -> Float[Array, "b d"]:
        """The embeddings as an array; raises unless they are finite and of the right size."""
        return _checks.embeddings(name, embeddings, self.prototypes, "prototypes")

    def calibrated(self, embeddings: ArrayLike) -> "PrototypeHead":
        """The head with the T of `jc.attacks.adaptive.calibrated_temperature`.

        Predictions are the same; cross-entropies neither saturate nor are they flat.

        Args:
            embeddings: of images as they are to be classified, float32 [b, d].

        Returns:
            The head with T; 1 where the scores tie.
        """
        temperature = calibrated_temperature(self.scores(embeddings))
        return dataclasses.replace(self, temperature=temperature)
