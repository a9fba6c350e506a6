"""What a model says of many images, in padded batches of one fixed shape."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclus import _classifier, parallel
from jaxclus._classifier import Classifier
from jaxclus.data import Augmentation, to_float
from jaxclus.threat import image_keys

#: Images in one physical batch on each device, by platform: a fixed number, for rounding depends on
#: the shape, and verdicts must not depend on how many images are asked for.
MICROBATCH = {"cpu": 288}
_MICROBATCH_ACCELERATOR = 512


def predict(
    key: jax.Array,
    model: Classifier,
    images: np.ndarray,
    mesh: Mesh,
    *,
    index: np.ndarray | None = None,
    microbatch: int | None = None,
    augmentation: Augmentation | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [n, k], and the predicted class [n], under matmul precision "highest".

    Args:
        key: a typed key; image i uses `fold_in(key, index[i])`.
        model: a classifier.
        images: uint8, or float32 in [0, 1], [n, h, w, c], n at least 1.
        mesh: the devices.
        index: the images' numbers in their data set [n]; default 0..n-1.
        microbatch: images in one physical batch on each device; default by platform.
        augmentation: what is done to each image first, with its key.
    """
    index = np.arange(len(images)) if index is None else index
    size = default_microbatch(mesh) if microbatch is None else microbatch
    key = jax.device_put(key, parallel.replicated(mesh))
    run, results = _bind(placed(model, mesh)), []
    for rows, count in microbatches(np.arange(len(images)), size * mesh.size):
        batch = (images[rows], index[rows].astype(np.int32))
        batch = jax.device_put(batch, parallel.over_batch(mesh))
        with jax.default_matmul_precision("highest"):
            logits, predicted = run(key, *batch, augmentation=augmentation)
        results.append((np.asarray(logits)[:count], np.asarray(predicted)[:count]))
    logits, predicted = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return logits, predicted


def default_microbatch(mesh: Mesh) -> int:
    """`MICROBATCH` of the devices' platform."""
    return MICROBATCH.get(mesh.devices.flat[0].platform, _MICROBATCH_ACCELERATOR)


def placed(model: Classifier, mesh: Mesh) -> Classifier:
    """The model with a copy of its weights on every device; what hides them stays as it is."""
    if not _classifier.is_pytree(model):
        return model
    return jax.device_put(model, parallel.replicated(mesh))


def microbatches(chosen: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Full batches of image numbers, the last one padded with its first, and the true counts."""
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        yield np.concatenate([part, np.full(size - len(part), part[0])]), len(part)


def _predicted(model, key, images, index, *, augmentation):
    keys = image_keys(key, index)
    if augmentation is not None:
        images = augmentation(keys, images)
    x = to_float(images) if images.dtype == np.uint8 else images
    return _classifier.verdict(model, keys, x)


_bind = _classifier.jit_over_model(_predicted, static_argnames=("augmentation",))
