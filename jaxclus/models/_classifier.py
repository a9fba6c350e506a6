"""The base class of all networks: normalisation, features, head."""

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxclus.compose import Chain
from jaxclus.models._layers import Identity, Linear, Normalize

if TYPE_CHECKING:
    from jaxclus.models._create import ModelSpec


class Classifier(nnx.Module):
    """Images [b, h, w, c] in [0, 1] -> float32 logits [b, k] = head(features(images)).

    The features are what `body` returns, or with `embedding_size` a dense layer of it.

    A family sets its layers, then calls `__init__` of this class for normalisation and head, and
    implements `body`. Models come in eval mode; `nnx.view(model, use_running_average=False,
    raise_if_not_found=False)` is the same model in train mode (the last argument because not every
    network has a BatchNorm). A model is a pytree: `jax.jit(lambda m, x: m(x))(model, x)`.

    Args:
        num_features: d, the size of what `body` returns.
        num_classes: k, the number of logits.
        channels: c of the images.
        mean: subtracted per channel, or None for 0.
        std: divided by per channel, or None for 1.
        dtype: type of the head's computation.
        rngs: source of the head's initial values.

    Attributes:
        spec: what `jc.models.create` built the model from; None for a model that was changed since.
    """

    spec: "ModelSpec | None"
    #: The type of `embedding`'s layer.
    EMBEDDING: ClassVar[type[Linear]] = Linear

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        channels: int,
        *,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.spec = None
        self.channels = channels
        if mean is None and std is None:
            self.normalize = Identity()
        else:
            self.normalize = Normalize(mean or (0.0,) * channels, std or (1.0,) * channels)
        self.embedding = Identity()
        self.head = Linear(num_features, num_classes, dtype=dtype, rngs=rngs)

    def _add_embedding(self, size: int, rngs: nnx.Rngs) -> None:
        """Puts a dense layer without activation between body and head: d becomes `size`.

        Args:
            size: d, at least 1.
            rngs: source of the initial values of this layer and of the head.
        """
        old, dtype = self.head, self.head.dtype
        assert dtype is not None
        self.embedding = self.EMBEDDING(old.in_features, size, dtype=dtype, rngs=rngs)
        self.head = Linear(size, old.out_features, dtype=dtype, rngs=rngs)

    def body(self, x: jax.Array) -> jax.Array:
        """The family's layers between normalisation and head: [b, h, w, c] -> [b, d]."""
        raise NotImplementedError(f"{type(self).__name__} must implement `body`")

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """What the head sees, in float32: pooled maps after the last activation, or embedded.

        Args:
            x: images [b, h, w, c] in [0, 1].

        Returns:
            The embeddings [b, d].

        Raises:
            ValueError: if x is no batch of images with the model's number of channels.
        """
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"`x` must be images of the shape [b, h, w, {self.channels}], got {x.shape}"
            )
        return self.embedding(self.body(self.normalize(x))).astype(jnp.float32)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """The float32 logits [b, k] of images [b, h, w, c] in [0, 1]."""
        return self.head(self.features(x)).astype(jnp.float32)


def checked(name: str, model: Any, *families: type[Classifier]) -> Classifier:
    """The network; raises unless it is of one of these families, if any are given.

    The error says how to get at the network of a chain, as training with clusters gives it back.
    """
    if isinstance(model, families or Classifier):
        return model
    known = ", ".join(family.__name__ for family in families) or "jc.models.Classifier"
    hint = ""
    if isinstance(model, Chain):
        hint = "; of a network under another head take jc.models.parts(model)[0]"
    raise TypeError(f"`{name}` must be a {known}, got a {type(model).__name__}{hint}")
