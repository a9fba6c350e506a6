import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus.models as models

SMALL = {"widths": (4,), "hidden": 5}


def create(key=0, **changes):
    arguments = {"name": "cnn", "num_classes": 3, "input_shape": (4, 4, 1)} | SMALL | changes
    return models.create(key=jax.random.key(key), **arguments)


def parameters(name, classes, **arguments):
    spec = models.ModelSpec(name, classes, (32, 32, 3), arguments=tuple(sorted(arguments.items())))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(spec.abstract(), nnx.Param)))


@pytest.mark.parametrize(
    "name, classes, arguments, count",
    [
        ("resnet20", 10, {}, 272_474),
        ("resnet18", 10, {}, 11_173_962),
        ("resnet18", 1000, {"stem": "imagenet"}, 11_689_512),
        ("resnet34", 1000, {"stem": "imagenet"}, 21_797_672),
        ("resnet50", 1000, {"stem": "imagenet"}, 25_557_032),
        ("preact_resnet18", 10, {}, 11_171_146),
        ("preact_resnet18", 10, {"final_norm": True}, 11_172_170),
        ("wide_resnet_28_10", 10, {}, 36_479_194),
        ("vgg11", 10, {}, 9_231_114),
        ("vgg13", 10, {}, 9_416_010),
        ("vgg16", 10, {}, 14_728_266),
        ("vgg19", 10, {}, 20_040_522),
        ("densenet121", 10, {}, 6_956_298),
        ("densenet121", 1000, {"stem": "imagenet"}, 7_978_856),
    ],
)
def test_published_parameter_counts(name, classes, arguments, count):
    assert parameters(name, classes, **arguments) == count


def test_published_parameter_count_of_alexnet():
    """Its dense layers, and so its parameters, depend on the size of the images."""
    spec = models.ModelSpec("alexnet", 1000, (224, 224, 3), arguments=(("stem", "imagenet"),))
    assert sum(leaf.size for leaf in jax.tree.leaves(spec.abstract())) == 61_100_840


def test_one_key_gives_one_model_in_eval_mode():
    first, again, other = create(0), create(0), create(1)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.head.kernel[...] != other.head.kernel[...]).any()
    assert first.blocks[0].norm.use_running_average is True
    # A trained model must not write into one created with the same key.
    first.head.kernel[...] += 1
    assert (first.head.kernel[...] != again.head.kernel[...]).all()


def test_weights_start_uniform_and_normalisations_neutral():
    model = models.create("resnet8", 40, (4, 4, 3), jax.random.key(0), width=8)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, (models.Conv, models.Linear)):
            kernel = np.asarray(module.kernel[...])
            bound = np.prod(kernel.shape[:-1]) ** -0.5
            assert 0.9 * bound < np.abs(kernel).max() <= bound
            # The sample deviation of n uniform draws scatters by about 0.45 / sqrt(n).
            tolerance = 3 * 0.45 / kernel.size**0.5
            np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=tolerance)
        if isinstance(module, models.BatchNorm):
            for variable, value in [("scale", 1), ("bias", 0), ("mean", 0), ("var", 1)]:
                assert (getattr(module, variable)[...] == value).all()
    bias = np.asarray(model.head.bias[...])
    assert 0.85 * 32**-0.5 < np.abs(bias).max() <= 32**-0.5


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("vgg13", {"width": 16, "blocks": (2, 2, 2), "batch_norm": False}),
        ("alexnet", {"widths": (16,) * 5, "hidden": (64, 64)}),
    ],
)
def test_signals_do_not_fade_without_batch_norm(name, arguments):
    model = models.create(name, 10, (32, 32, 3), jax.random.key(0), **arguments)
    x = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
    # He's gain keeps the second moment of each layer; PyTorch's divides it by six.
    assert 0.2 < jnp.square(model.features(x)).mean() < 5


def test_the_gain_is_that_of_kernels_but_not_of_biases():
    model = models.create("alexnet", 10, (32, 32, 3), jax.random.key(0))
    for layer in (model.convs[1], model.dense[0]):
        bound = math.prod(layer.kernel.shape[:-1]) ** -0.5
        assert 2.4 * bound < jnp.abs(layer.kernel[...]).max() <= 6**0.5 * bound * (1 + 1e-6)
        assert 0.9 * bound < jnp.abs(layer.bias[...]).max() <= bound
    assert jnp.abs(model.head.kernel[...]).max() <= model.head.kernel.shape[0] ** -0.5


def test_layers_of_one_shape_start_differently():
    model = models.create("resnet8", 3, (4, 4, 1), jax.random.key(0), width=2)
    first, second = (conv.kernel[...] for conv in model.blocks[0].convs)
    assert first.shape == second.shape and (first != second).all()


def test_spec_survives_json_and_rebuilds():
    model = create(mean=[0.5], std=np.array([0.25]), dtype=jnp.bfloat16, activation="silu")
    spec = model.spec
    assert spec == models.ModelSpec(
        name="cnn",
        num_classes=3,
        input_shape=(4, 4, 1),
        mean=(0.5,),
        std=(0.25,),
        dtype="bfloat16",
        arguments=(("activation", "silu"), ("hidden", 5), ("widths", (4,))),
    )
    text = json.dumps(spec.to_json())
    again = models.ModelSpec.from_json(json.loads(text))
    assert again == spec and hash(again) == hash(spec)
    rebuilt = again.build(jax.random.key(0))
    assert nnx.graphdef(rebuilt) == nnx.graphdef(model)
    for a, b in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_spec_without_normalisation_survives_json():
    spec = models.ModelSpec("resnet8", 10, (32, 32, 3))
    assert models.ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_abstract_model_is_a_template_for_weights():
    model = create()
    template = model.spec.abstract()
    assert jax.tree.structure(template) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(template), jax.tree.leaves(model), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"name": "resnet19"}, ValueError, "`name` must be one of cnn, .*wide_resnet_DEPTH_WIDTH"),
        ({"name": "wide_resnet_27_10"}, ValueError, "got 'wide_resnet_27_10'"),
        ({"name": "wide_resnet_28_0"}, ValueError, "got 'wide_resnet_28_0'"),
        ({"num_classes": 0}, ValueError, "`num_classes` must be at least 1, got 0"),
        ({"input_shape": (4, 4)}, ValueError, r"`input_shape` must be \(h, w, c\), got \(4, 4\)"),
        ({"input_shape": (4, 0, 1)}, ValueError, "`input_shape` must be at least 1, got 0"),
        ({"input_shape": (4, True, 1)}, TypeError, "`input_shape` must be an integer"),
        ({"mean": (0.5, 0.5)}, ValueError, "`mean` must be 1 finite numbers"),
        ({"mean": (float("nan"),)}, ValueError, "`mean` must be 1 finite numbers"),
        ({"std": (0.0,)}, ValueError, "`std` must be a finite number above 0, got 0.0"),
        ({"dtype": jnp.float16}, ValueError, "`dtype` must be one of bfloat16, float32"),
        ({"depth": 3}, TypeError, "`depth` is no argument of cnn, which takes activation, batch_"),
        ({"widths": (4, 0)}, ValueError, "`widths` must be at least 1, got 0"),
        ({"hidden": 0}, ValueError, "`hidden` must be at least 1, got 0"),
        ({"activation": "step"}, ValueError, "`activation` must be one of"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        create(**changes)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet18", {"stem": "tiny"}, "`stem` must be one of cifar, imagenet; got 'tiny'"),
        ("resnet18", {"width": 0}, "`width` must be at least 1, got 0"),
        ("preact_resnet18", {"stem_width": 0}, "`stem_width` must be at least 1, got 0"),
        ("vgg11", {"width": 0}, "`width` must be at least 1, got 0"),
        ("vgg11", {"blocks": (1, 0)}, "`blocks` must be at least 1, got 0"),
        ("vgg11", {"activation": "step"}, "`activation` must be one of gelu, .*linbp.*; got 'st"),
        ("densenet121", {"growth": 0}, "`growth` must be at least 1, got 0"),
        ("densenet121", {"stem": "tiny"}, "`stem` must be one of cifar, imagenet; got 'tiny'"),
        ("alexnet", {"widths": (4, 4)}, r"`widths` must be 5 numbers, got \(4, 4\)"),
        ("alexnet", {"widths": (4, 4, 4, 4, 0)}, "`widths` must be at least 1, got 0"),
        ("alexnet", {"hidden": (4, 0)}, "`hidden` must be at least 1, got 0"),
        ("alexnet", {"stem": "tiny"}, "`stem` must be one of cifar, imagenet; got 'tiny'"),
    ],
)
def test_bad_family_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, 3, (8, 8, 3), jax.random.key(0), **arguments)


def test_raw_key_is_refused():
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        models.create("cnn", 3, (4, 4, 1), jnp.zeros(2, jnp.uint32), **SMALL)
