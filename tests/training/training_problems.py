"""Tiny problems on which training is tested."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxclus as jc
from jaxclus.training import TrainingConfig
from jaxclus.training.objectives import Objective, Outcome

ONE = jax.devices()[:1]


def weights(model):
    """All arrays of a model by name."""
    state = nnx.to_pure_dict(nnx.split(model)[1])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_weights(model, other):
    """Bit for bit."""
    ours, theirs = weights(model), weights(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def small_cnn(key=0, **arguments):
    """A network with BatchNorm for the digits."""
    arguments = {"widths": (4,), "hidden": 8} | arguments
    return jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(key), **arguments)


class Softmax(nnx.Module):
    """Softmax regression without bias."""

    def __init__(self, weight):
        self.weight = nnx.Param(jnp.asarray(weight, jnp.float32))

    def __call__(self, x):
        return x.reshape(x.shape[0], -1) @ self.weight[...]


class Memory(nnx.Module):
    """One image [h, w, c] for each label; logits are inner products with them."""

    def __init__(self, data):
        self.seen = nnx.Param(jnp.zeros((data.num_classes, *data.input_shape)))

    def __call__(self, x):
        return jnp.einsum("bhwc,khwc->bk", x, self.seen[...])


@dataclasses.dataclass(frozen=True)
class Memorise(Objective):
    """sum_i <x_i, seen_{y_i}>: one step of SGD takes each image that it sees from its memory.

    With one image for each label the memory shows what training saw of every image.
    """

    order: tuple[int, ...] | None = None

    def batch(self, key, number, state, size):
        return None if self.order is None else jnp.array(self.order)

    def loss(self, model, x, x_adv, y, keys, state):
        logits = model(x)
        own = jnp.take_along_axis(logits, y[:, None], axis=1)
        return Outcome(own.sum(), logits, {"first": y[0].astype(jnp.float32)})


# One step takes away the image itself.
PLAIN_SGD = TrainingConfig(
    epochs=1, learning_rate=1.0, momentum=0.0, weight_decay=0.0, schedule="step", log_every=1
)


def one_image_per_label(n, same=False):
    """n random images 4 x 4 with the labels 0 to n - 1; `same`: the same image n times."""
    images = np.random.default_rng(0).integers(1, 256, (n, 4, 4, 1), dtype=np.uint8)
    return jc.data.Dataset(np.repeat(images[:1], n, axis=0) if same else images, np.arange(n))


def memory_after(key, data, config=PLAIN_SGD, order=None, augmentation=None):
    """What one run saw of each image, summed over its steps [n, 4, 4, 1], and its history."""
    config = dataclasses.replace(config, batch_size=len(order) if order else config.batch_size)
    run = jc.training.fit(
        jax.random.key(key), Memory(data), data, Memorise(order), config,
        augmentation=augmentation, devices=ONE, progress=False,
    )  # fmt: skip
    return -np.asarray(run.model.seen[...]), run.history
