"""Networks under a head of their own, in and out of a file."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from jaxclus.clustr import ClusterClassifier
from jaxclus.prototypes import PrototypeHead

SHAPE = (12, 12, 1)
NETWORK = jc.models.create("cnn", 3, SHAPE, jax.random.key(0), widths=(4,), hidden=6)
POINTS = jax.random.normal(jax.random.key(1), (6, 6))
HEADS = {
    "clusters": ClusterClassifier(POINTS, (0, 0, 1, 1, 2, 2), 0.7, nearest=3),
    "prototypes": PrototypeHead(POINTS[:3], "linf", 0.3),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_goes_through_a_file(tmp_path, name, dtype):
    model = jc.Chain(jc.models.features(NETWORK), HEADS[name])
    loaded = jc.load(jc.export(model, tmp_path / "model.safetensors", dtype=dtype))
    head = jc.models.parts(loaded)[1]
    assert type(head) is type(HEADS[name])
    assert jax.tree.structure(head) == jax.tree.structure(HEADS[name])
    for found, leaf in zip(*map(jax.tree.leaves, (head, HEADS[name])), strict=True):
        np.testing.assert_array_equal(found, leaf)  # float32 always
    x = jnp.ones((2, *SHAPE))
    if dtype == "float32":
        np.testing.assert_array_equal(loaded(x), model(x))


def test_an_unknown_head_is_refused(tmp_path):
    model = jc.Chain(jc.models.features(NETWORK), jax.tree_util.Partial(lambda h: h[:, :3]))
    with pytest.raises(ValueError, match="a head of ClusterClassifier, PrototypeHead, got"):
        jc.export(model, tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match=re.escape("jc.Chain(jc.models.features(network), head)")):
        jc.models.parts(jc.Chain(NETWORK))
