"""VGG, DenseNet and AlexNet compute what PyTorch's do, from the names that their weights have."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus.models as models

REFERENCE = Path(__file__).with_name("families_reference.npz")
CASES = [
    "vgg", "vgg_without_norm", "densenet", "densenet_imagenet", "alexnet", "alexnet_imagenet",
]  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


@functools.cache
def read(case):
    with np.load(REFERENCE) as stored:
        data = {k.removeprefix(f"{case}/"): stored[k] for k in stored if k.startswith(f"{case}/")}
    return data, json.loads(str(data["call"]))


def weights_of(case, when="weights"):
    data, _ = read(case)
    return {k.removeprefix(f"{when}/"): v for k, v in data.items() if k.startswith(f"{when}/")}


def imported(case, weights, **changes):
    return models.from_torch(weights, **(read(case)[1] | changes))


@cases
def test_logits_equal_torch(case):
    data, _ = read(case)
    model = imported(case, weights_of(case))
    logits = jax.jit(lambda model, x: model(x))(model, jnp.asarray(data["x"]))
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["vgg", "densenet", "densenet_imagenet"])
def test_a_pass_in_train_mode_equals_torch(case):
    data, _ = read(case)

    @jax.jit
    def run(model, x):
        train = nnx.view(model, use_running_average=False)
        return train(x), nnx.state(train, nnx.BatchStat)

    before, after = imported(case, weights_of(case)), imported(case, weights_of(case, "after"))
    logits, stats = run(before, jnp.asarray(data["x"]))
    np.testing.assert_allclose(logits, data["train_logits"], rtol=0, atol=1e-4)
    wanted, old = (jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (after, before))
    for found, value, start in zip(jax.tree.leaves(stats), wanted, old, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)
        assert (np.abs(value - start) > 1e-4).any()
    assert len(wanted) == sum("running" in name for name in weights_of(case))


WRITTEN_OUT = {
    "vgg": {"blocks": (1, 2, 1, 1, 1), "width": 2},
    "vgg_without_norm": {"batch_norm": False, "blocks": (2, 1), "width": 3},
    "densenet": {"blocks": (2, 1, 1), "growth": 3},
    "densenet_imagenet": {"blocks": (1, 2), "growth": 2, "stem": "imagenet"},
    "alexnet": {"hidden": (7, 6), "widths": (3, 4, 5, 4, 3)},
    "alexnet_imagenet": {"hidden": (5, 6), "stem": "imagenet", "widths": (2, 3, 2, 3, 2)},
}


@cases
def test_the_shapes_tell_the_arguments(case):
    spec = imported(case, weights_of(case)).spec
    assert dict(spec.arguments) == WRITTEN_OUT[case] and spec.num_classes == 4


@pytest.mark.parametrize("case, side", [("densenet", 32), ("densenet_imagenet", 224), ("vgg", 32)])
def test_usual_sizes_of_images(case, side):
    assert imported(case, weights_of(case), input_shape=None).spec.input_shape == (side, side, 3)


def test_grey_images_are_seen():
    weights = weights_of("vgg")
    grey = weights | {"features.0.weight": weights["features.0.weight"][:, :1]}
    model = imported("vgg", grey, input_shape=None, mean=None, std=None)
    assert model.spec.input_shape == (32, 32, 1)


def test_the_older_names_of_densenets():
    weights = weights_of("densenet")
    older = {re.sub(r"(layer\d\.\w+)([12])", r"\1.\2", k): v for k, v in weights.items()}
    assert "features.denseblock1.denselayer2.conv.1.weight" in older
    pairs = zip(
        *(jax.tree.leaves(imported("densenet", each)) for each in (weights, older)), strict=True
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("vgg", {"blocks": (1, 1, 1, 1, 1)}, "missing: features.13.bias.*left over: features.7.w"),
        ("alexnet", {"hidden": (7, 6, 5)}, "missing: dense.2.bias, dense.2.weight; misshaped"),
        ("alexnet", {"input_shape": (32, 32, 3)}, r"classifier.1.weight \(7, 18\) instead of"),
        ("densenet", {"blocks": (2, 2, 1)}, "missing: features.denseblock2.denselayer2.conv1.w"),
        ("densenet", {"blocks": (2,)}, "left over: features.transition1.norm.*and 25 more"),
        ("vgg", {"name": "densenet121"}, "missing: features.conv0.weight.*left over: features.0"),
    ],
)
def test_weights_that_do_not_fit_are_listed(case, changes, message):
    with pytest.raises(ValueError, match=message):
        imported(case, weights_of(case), **changes)


def test_a_densenet_that_joins_maps_the_other_way_round_is_refused():
    names = {
        "features.conv0.": "conv1.",
        "denseblock": "dense",
        "features.": "",
        "classifier": "linear",
    }
    weights = {}
    for name, value in weights_of("densenet").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[name] = value
    with pytest.raises(ValueError, match="must hold the arrays of densenet121; missing: classif"):
        imported("densenet", weights)
