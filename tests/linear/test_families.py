"""Every model family becomes affine, with and without BatchNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc

FAMILIES = {
    "cnn": {"widths": (4, 8), "hidden": 8},
    "resnet8": {"width": 4},
    "resnet20": {"width": 4},
    "resnet18": {"width": 4, "blocks": (1, 1, 1)},
    "resnet34": {"width": 4, "blocks": (1, 2), "stem": "imagenet"},
    "resnet50": {"width": 4, "blocks": (1, 1), "stem": "imagenet", "activation": "gelu"},
    "preact_resnet18": {"width": 4, "blocks": (1, 1)},
    "wide_resnet_10_1": {"activation": "silu"},
    "vgg11": {"width": 4, "blocks": (1, 1)},
    "vgg13": {"width": 8, "blocks": (1,), "batch_norm": False},
    "vgg16": {"width": 4, "blocks": (2,), "activation": "linbp"},
    "vgg19": {"width": 4, "blocks": (1, 1), "activation": "leaky_relu"},
    "densenet121": {"growth": 2, "blocks": (1, 1), "stem": "imagenet"},
    "alexnet": {"widths": (8, 8, 8, 8, 8), "hidden": (16,)},
}

logits_of = jax.jit(lambda model, x: model(x))


# GroupSort is no activation that becomes the identity: these have no linear sub-network.
SORTING = {
    "lipschitz_resnet8": {"width": 2, "blocks": (1, 1)},
    "lipschitz_resnet18": {"width": 2, "blocks": (1, 1)},
}


def test_the_tables_name_every_family():
    named = {name.replace("10_1", "DEPTH_WIDTH") for name in FAMILIES}
    assert named | set(SORTING) == set(jc.models.names())


@pytest.mark.parametrize("name", SORTING)
def test_networks_that_sort_channels_have_no_implicit_weight(name):
    model = jc.models.create(name, 5, (4, 4, 3), jax.random.key(0), **SORTING[name])
    with pytest.raises(ValueError, match="max, min"):
        jc.implicit_weight(jc.linearize(model), (4, 4, 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_network_is_w_x_plus_b(name):
    shape = (16, 16, 3)
    model = jc.models.create(name, 5, shape, jax.random.key(0), mean=(0.5,) * 3, **FAMILIES[name])
    rng = np.random.default_rng(1)
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.BatchNorm):  # as after training: far from the identity
            size = layer.mean.shape
            layer.mean[...] = jnp.asarray(rng.normal(0, 0.1, size), jnp.float32)
            layer.var[...] = jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
            layer.bias[...] = jnp.asarray(rng.normal(0, 0.1, size), jnp.float32)
    x = jax.random.uniform(jax.random.key(2), (8, *shape))
    logits = logits_of(model, x)
    for linear in (jc.linearize(model), jc.linearize(jc.models.without_batch_norm(model))):
        weight, bias = jc.implicit_weight(linear, shape)
        assert weight.shape == (5, *shape) and bias.shape == (5,)
        wanted = np.asarray(logits_of(linear, x))
        found = jnp.tensordot(x, weight, axes=((1, 2, 3), (1, 2, 3))) + bias[None]
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
        assert np.abs(wanted - logits).max() > 1e-3, "nothing was taken out"
