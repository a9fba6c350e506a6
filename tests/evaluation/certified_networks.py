"""Small networks whose certificates are known, or worth having."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc

SHAPE = (8, 8, 1)


def digits(count):
    return jc.data.load("digits", "test").take(count)


def affine(kernel, head, bias=0.0, classes=10):
    """features(x) = kernel^T x + bias where no ReLU is off, under the head [d, k]."""
    model = jc.models.create(
        "cnn", classes, SHAPE, jax.random.key(0), widths=(), hidden=kernel.shape[1]
    )
    model.dense.kernel[...] = jnp.asarray(kernel, jnp.float32)
    model.dense.bias[...] = jnp.full(kernel.shape[1], bias, jnp.float32)
    model.head.kernel[...] = jnp.asarray(head, jnp.float32)
    model.head.bias[...] = jnp.zeros(classes)
    return model


def least_squares(model, data):
    """The network with a head fitted to its features, at no cost."""
    h = np.asarray(model.features(jc.data.to_float(data.images)), np.float64)
    rows = np.concatenate([h, np.ones((len(h), 1))], axis=1)
    ridge = rows.T @ rows + 1e-3 * np.eye(rows.shape[1])
    solved = np.linalg.solve(ridge, rows.T @ np.eye(10)[data.labels])
    model.head.kernel[...] = jnp.asarray(solved[:-1], jnp.float32)
    model.head.bias[...] = jnp.asarray(solved[-1], jnp.float32)
    return model


@functools.cache
def cnn():
    """Without BatchNorm, near the identity: few layers, so that bounds say something."""
    model = jc.models.create(
        "cnn", 10, SHAPE, jax.random.key(1), widths=(), hidden=64, batch_norm=False
    )
    kernel = np.eye(64) + 0.02 * np.random.default_rng(0).normal(size=(64, 64))
    model.dense.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return least_squares(model, jc.data.load("digits", "train"))


@functools.cache
def cnn_clusters():
    """The same features under clusters."""
    return under_clusters(cnn())


@functools.cache
def lipschitz_clusters():
    """A LipschitzResNet under clusters."""
    key = jax.random.key(0)
    arguments = {"width": 4, "blocks": (1, 1), "hidden": 64}
    return under_clusters(jc.models.create("lipschitz_resnet8", 10, SHAPE, key, **arguments))


def under_prototypes(network, rule):
    """A prototype for each class: the mean of its training images."""
    train = jc.data.load("digits", "train")
    h = np.asarray(jax.jit(type(network).features)(network, jc.data.to_float(train.images)))
    means = np.stack([h[train.labels == c].mean(axis=0) for c in range(10)])
    head = jc.prototypes.PrototypeHead(jnp.asarray(means), rule)
    return jc.Chain(jc.models.features(network), head)


@functools.cache
def cnn_nearest():
    """The CNN's features under the nearest prototype in Linf."""
    return under_prototypes(cnn(), "linf")


@functools.cache
def lipschitz_nearest():
    """A LipschitzResNet under the nearest prototype in L2."""
    key = jax.random.key(0)
    arguments = {"width": 4, "blocks": (1, 1), "hidden": 64}
    network = jc.models.create("lipschitz_resnet8", 10, SHAPE, key, **arguments)
    return under_prototypes(network, "l2")


def under_clusters(network):
    """Two centres for each class: the means of the halves of its training images."""
    train = jc.data.load("digits", "train")
    h = np.asarray(jax.jit(type(network).features)(network, jc.data.to_float(train.images)))
    halves = [np.array_split(h[train.labels == c], 2) for c in range(10)]
    centres = np.stack([half.mean(axis=0) for both in halves for half in both])
    classes = tuple(np.repeat(np.arange(10), 2).tolist())
    head = jc.clustr.ClusterClassifier(jnp.asarray(centres), classes, 0.1)
    return jc.Chain(jc.models.features(network), head)
