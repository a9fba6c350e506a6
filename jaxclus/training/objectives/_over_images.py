"""A network over a whole training set, for objectives that look at all of it between epochs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxclus import _classifier, parallel
from jaxclus.data import to_float

# Images in one physical batch on each device: one compiled shape, whatever the training's batch.
_BATCH = 256


def over_images(
    fn: Callable[[Any, jax.Array], jax.Array], model: nnx.Module, images: jax.Array
) -> jax.Array:
    """`fn(model, batch)` of all images, one array [n, ...], under matmul precision "highest".

    Args:
        fn: (model, images as they come [b, h, w, c]) -> [b, ...]; a module's own function, so that
            its program is found again.
        model: the network, in eval mode.
        images: [n, h, w, c], n at least 1; split over the devices that it is replicated on.
    """
    mesh = parallel.mesh_of(images)
    size, count = _BATCH * (mesh.size if mesh else 1), len(images)
    bound = _classifier.jit_over_model(fn)(model)  # pyright: ignore[reportArgumentType]
    parts = []
    for start in range(0, count, size):
        # The last batch is filled up with images from the beginning.
        batch = images[(start + jnp.arange(size)) % count]
        if mesh is not None:
            batch = jax.device_put(batch, parallel.over_batch(mesh))
        with jax.default_matmul_precision("highest"):
            parts.append(bound(batch))
    whole = jnp.concatenate(parts)[:count]
    return whole if mesh is None else jax.device_put(whole, parallel.replicated(mesh))


def embeddings(model: nnx.Module, images: jax.Array, *, train_mode: bool = False) -> jax.Array:
    """The embeddings h [n, d] of all images, in batches of 256 for each device.

    Args:
        model: a network with `features`, as `jc.models.create` makes it.
        images: uint8 [n, h, w, c].
        train_mode: whether BatchNorm takes the statistics of each batch, and not its running ones.

    Raises:
        TypeError: the model has no `features`.
    """
    if not hasattr(model, "features"):
        raise TypeError(
            f"`model` must have `features`, as jc.models.create makes it, got {type(model)}"
        )
    if train_mode:
        model = nnx.view(model, use_running_average=False, raise_if_not_found=False)
    return over_images(_features, model, images)


def _features(model, images):
    return model.features(to_float(images))
