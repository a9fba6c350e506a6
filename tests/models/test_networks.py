"""What holds for every family, on small versions and images that are not square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus.models as models

SHAPE = (8, 12, 1)
# name, arguments, size of the features
FAMILIES = {
    "cnn": ("cnn", {"widths": (4, 6), "hidden": 5}, 5),
    "cnn_without_norm": (
        "cnn",
        {"widths": (4,), "hidden": 5, "batch_norm": False, "activation": "silu"},
        5,
    ),
    "resnet8": ("resnet8", {"width": 2}, 8),
    "resnet18_imagenet": ("resnet18", {"width": 2, "blocks": (1, 1), "stem": "imagenet"}, 4),
    "resnet50": ("resnet50", {"width": 2, "blocks": (1, 1)}, 16),
    "preact_resnet18": ("preact_resnet18", {"width": 2, "blocks": (1, 1)}, 4),
    "wide_resnet": ("wide_resnet_10_1", {"width": 3, "stem_width": 2}, 12),
    "vgg": ("vgg11", {"width": 4, "blocks": (1, 1, 1, 1)}, 32),
    "densenet": ("densenet121", {"growth": 2, "blocks": (1, 2)}, 7),
    "alexnet": ("alexnet", {"widths": (6, 6, 6, 6, 6), "hidden": (24, 16)}, 16),
    "lipschitz": ("lipschitz_resnet8", {"width": 4, "blocks": (1, 1), "hidden": 6}, 6),
}
WITHOUT_NORM = ("cnn_without_norm", "alexnet", "lipschitz")
families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family, dtype="float32"):
    name, arguments, _ = FAMILIES[family]
    key = jax.random.key(0)
    return models.create(name, 3, SHAPE, key, mean=[0.4], std=[0.3], dtype=dtype, **arguments)


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (4, *SHAPE))


apply = jax.jit(lambda model, x: model(x))


@jax.jit
def everything(model, x):
    logits = model(x)
    gradient = jax.grad(lambda x: jnp.square(model(x)).sum())(x)
    return logits, model.features(x), gradient, nnx.state(model, nnx.BatchStat)


@jax.jit
def train_mode(model, x):
    model = nnx.view(model, use_running_average=False, raise_if_not_found=False)
    return model(x), nnx.state(model, nnx.BatchStat)


def batch_stats(model):
    return jax.tree.leaves(nnx.state(model, nnx.BatchStat))


@families
def test_eval_mode(family, x):
    model, size = model_of(family), FAMILIES[family][2]
    logits, features, gradient, stats = everything(model, x)
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32
    assert features.shape == (4, size) and features.dtype == jnp.float32
    np.testing.assert_allclose(model.head(features), logits, atol=1e-5)
    assert gradient.shape == x.shape and np.isfinite(gradient).all()
    # Each image influences its own logits, and (eval mode) no other's.
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()
    np.testing.assert_allclose(everything(model, x[::-1])[0], logits[::-1], atol=1e-5)
    for before, after in zip(batch_stats(model), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(after, before)


@families
def test_train_mode_updates_every_statistic_and_only_in_the_view(family, x):
    model = model_of(family)
    before = [np.array(value) for value in batch_stats(model)]
    logits, stats = train_mode(model, x)
    assert np.isfinite(logits).all()
    assert len(before) == (0 if family in WITHOUT_NORM else len(jax.tree.leaves(stats)))
    for old, new, now in zip(before, jax.tree.leaves(stats), batch_stats(model), strict=True):
        assert (old != new).any()
        np.testing.assert_array_equal(now, old)


@pytest.mark.parametrize(
    "family", ["cnn", "resnet18_imagenet", "wide_resnet", "densenet", "lipschitz"]
)
def test_bfloat16_keeps_parameters_and_logits_in_float32(family, x):
    model = model_of(family, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    logits = apply(model, x)
    assert logits.dtype == jnp.float32
    reference = everything(model_of(family), x)[0]
    difference = np.abs(logits - reference).max()
    assert 0 < difference < 0.05 * (1 + np.abs(reference).max())


def test_training_on_plain_dicts_lowers_the_loss(x):
    model = model_of("cnn")
    graph = nnx.graphdef(nnx.view(model, use_running_average=False))
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    labels = jnp.array([0, 1, 2, 0])

    def loss(params, stats):
        train = nnx.merge(graph, params, stats)
        picked = jnp.take_along_axis(jax.nn.log_softmax(train(x)), labels[:, None], axis=1)
        return -picked.mean(), nnx.to_pure_dict(nnx.state(train, nnx.BatchStat))

    @jax.jit
    def step(params, stats):
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), stats, value

    values = []
    for _ in range(30):
        params, stats, value = step(params, stats)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_models_of_one_architecture_share_compiled_code(x):
    compiled = jax.jit(lambda model, x: model(x))
    for seed in range(2):
        name, arguments, _ = FAMILIES["cnn"]
        compiled(models.create(name, 3, SHAPE, jax.random.key(seed), **arguments), x)
    assert compiled._cache_size() == 1


def test_normalisation_is_part_of_the_model(x):
    name, arguments, _ = FAMILIES["cnn"]
    bare = models.create(name, 3, SHAPE, jax.random.key(0), **arguments)
    normalised = model_of("cnn")
    np.testing.assert_allclose(apply(normalised, x), apply(bare, (x - 0.4) / 0.3), atol=1e-5)


def test_mean_or_std_alone(x):
    name, arguments, _ = FAMILIES["cnn"]
    bare = models.create(name, 3, SHAPE, jax.random.key(0), **arguments)
    centred = models.create(name, 3, SHAPE, jax.random.key(0), mean=[0.5], **arguments)
    scaled = models.create(name, 3, SHAPE, jax.random.key(0), std=[0.5], **arguments)
    np.testing.assert_allclose(apply(centred, x), apply(bare, x - 0.5), atol=1e-5)
    np.testing.assert_allclose(apply(scaled, x), apply(bare, x * 2), atol=1e-5)


@pytest.mark.parametrize("family", ["resnet8", "vgg", "densenet"])
def test_globally_averaging_networks_take_other_sizes(family):
    small = jnp.zeros((1, 5, 7, 1))
    assert jax.eval_shape(apply, model_of(family), small).shape == (1, 3)


@pytest.mark.parametrize("family", ["cnn", "alexnet"])
def test_networks_that_see_every_position_do_not(family):
    with pytest.raises(ValueError, match=r"`x` must be images of \(8, 12\) pixels, got \(5, 7\)"):
        model_of(family)(jnp.zeros((1, 5, 7, 1)))


@pytest.mark.parametrize(
    "size, sizes",
    [
        ((32, 32), [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]),
        ((28, 28), [(14, 14), (7, 7), (3, 3), (1, 1), (1, 1)]),
        ((2, 9), [(1, 4)] * 5),
        ((1, 1), [(1, 1)] * 5),
    ],
)
def test_vgg_pools_while_there_are_pixels(size, sizes):
    arguments = (("blocks", (1, 1, 1, 1, 1)),)
    model = models.ModelSpec("vgg11", 10, (*size, 1), arguments=arguments).abstract()
    maps, found = jax.ShapeDtypeStruct((2, *size, 1), jnp.float32), []
    for block in model.blocks:
        maps = jax.eval_shape(lambda block, x: block(x), block, maps)
        found.append(maps.shape[1:3])
    assert found == sizes


def test_densenet_refuses_images_that_its_transitions_use_up():
    with pytest.raises(ValueError, match=r"`x` must be images of at least 2 pixels .* \(1, 7\)"):
        model_of("densenet")(jnp.zeros((1, 1, 7, 1)))
    for stem, least in [("cifar", 8), ("imagenet", 29)]:
        arguments = (("blocks", (1, 1, 1, 1)), ("growth", 1), ("stem", stem))
        model = models.ModelSpec("densenet121", 3, (least, 40, 1), arguments=arguments).abstract()
        shapes = jax.make_jaxpr(lambda m, x: m(x))(model, jnp.zeros((1, least, 40, 1)))
        assert all(v.aval.size > 0 for e in shapes.eqns for v in e.outvars)
        message = f"`input_shape` must be images of at least {least} pixels"
        with pytest.raises(ValueError, match=message):
            models.ModelSpec("densenet121", 3, (40, least - 1, 1), arguments=arguments).abstract()


@pytest.mark.parametrize("side, positions", [(8, 1), (28, 1), (32, 4), (64, 16)])
def test_alexnet_takes_small_images(side, positions):
    model = models.ModelSpec("alexnet", 10, (side, side, 3)).abstract()
    assert model.dense[0].kernel.shape == (256 * positions, 4096)
    assert jax.eval_shape(apply, model, jnp.zeros((2, side, side, 3))).shape == (2, 10)


def test_alexnet_refuses_images_that_its_first_convolution_uses_up():
    arguments = (("hidden", ()), ("stem", "imagenet"))
    least = models.ModelSpec("alexnet", 2, (7, 9, 1), arguments=arguments).abstract()
    assert least.head.kernel.shape == (256, 2)
    with pytest.raises(ValueError, match=r"`input_shape` must be .* at least 7 pixels .*\(9, 6\)"):
        models.ModelSpec("alexnet", 2, (9, 6, 1), arguments=arguments).abstract()


@pytest.mark.parametrize("shape", [(1, 8, 12, 3), (1, 1, 8, 12)])
def test_wrong_channels_are_named(shape):
    with pytest.raises(ValueError, match=r"`x` must be images of the shape \[b, h, w, 1\], got"):
        model_of("cnn")(jnp.zeros(shape))


def test_cnn_without_convolutions_is_a_perceptron(x):
    model = models.create("cnn", 3, SHAPE, jax.random.key(0), widths=(), hidden=7)
    assert model.dense.kernel.shape == (96, 7)
    assert apply(model, x).shape == (4, 3)


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (8, 8, 1)])
def test_default_cnn_is_small(shape):
    model = models.ModelSpec("cnn", 10, shape).abstract()
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) < 100_000
    assert jax.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, *shape))).shape == (2, 10)
