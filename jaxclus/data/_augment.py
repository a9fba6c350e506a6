"""Random crops and flips on the device, inside `jax.jit`, with one key for each image."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxclus import _checks, threat


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Zero padding with a random crop back to the same size, and a random horizontal flip.

    Zeros p pixels wide are put around the image; the crop's corner is uniform over the
    (2p + 1)^2 places; then the image is mirrored left to right with probability 1/2. This is the
    usual augmentation of CIFAR-10 (crop_padding 4 and flip).

    Attributes:
        crop_padding: p, in pixels, at least 0; 0 does no crop.
        flip: whether to mirror at random.
    """

    crop_padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        _checks.at_least("crop_padding", self.crop_padding, 0)

    def __call__(
        self, key: jax.Array, images: Shaped[Array, "b h w c"]
    ) -> Shaped[Array, "b h w c"]:
        """Augments each image with its own key, so that it does not depend on the others.

        Args:
            key: one typed key, folded in with each image's position, or typed keys [b].
            images: [b, h, w, c], float32 or uint8.

        Returns:
            Images of the same shape and dtype.

        Raises:
            TypeError: `key` is a raw key.
            ValueError: `key` or `images` has another shape, or `images` another dtype.
        """
        if images.ndim != 4 or images.dtype not in (jnp.float32, jnp.uint8):
            raise ValueError(
                "`images` must be float32 or uint8 [b, h, w, c], "
                f"got {images.dtype} of the shape {images.shape}"
            )
        return jax.vmap(self._augment)(_keys(key, len(images)), images)

    def _augment(self, key: jax.Array, image: jax.Array) -> jax.Array:
        # Both keys are always drawn: switching the crop off leaves the flips as they were.
        crop_key, flip_key = jax.random.split(key)
        p = self.crop_padding
        if p:
            padded = jnp.pad(image, ((p, p), (p, p), (0, 0)))
            top, left = jax.random.randint(crop_key, (2,), 0, 2 * p + 1)
            image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        if self.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image


def _keys(key: jax.Array, batch: int) -> jax.Array:
    """One key for each image."""
    many = (
        isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim
    )
    if not many:
        return threat.image_keys(_checks.typed_key("key", key), jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"`key` must be one key or keys [{batch}], got the shape {key.shape}")
    return key


NO_AUGMENTATION = Augmentation(crop_padding=0, flip=False)

# Digits change their meaning when mirrored, and stand centred in train and test alike. A mirrored
# garment or shoe is the same thing, and Fashion-MNIST too is centred: flips without crops.
_DEFAULTS = {
    "cifar10": Augmentation(crop_padding=4, flip=True),
    "cifar100": Augmentation(crop_padding=4, flip=True),
    "fashion_mnist": Augmentation(crop_padding=0, flip=True),
}


def default_augmentation(name: str) -> Augmentation:
    """The augmentation that a data set is trained with unless another is asked for.

    CIFAR-10 and CIFAR-100: crops with padding 4, and flips. Fashion-MNIST: flips. Everything else,
    digits and unknown names among them: none, since only who knows the data knows what changes
    leave the labels true.

    Args:
        name: name of the data set, as `Dataset.name`.
    """
    return _DEFAULTS.get(name.split("/")[0].split(":")[0], NO_AUGMENTATION)
