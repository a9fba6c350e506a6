import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc
import jaxclus.models as models

SHAPE = (6, 4, 1)
NAMES = {
    "cnn": {"widths": (3,), "hidden": 4},
    "resnet8": {"width": 2, "blocks": (1, 1)},
    "preact_resnet18": {"width": 2, "blocks": (1, 1), "final_norm": True},
}
apply = jax.jit(lambda model, x: model(x))


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (3, *SHAPE))


@pytest.fixture(params=NAMES)
def model(request):
    model = models.create(request.param, 3, SHAPE, jax.random.key(0), **NAMES[request.param])
    # Statistics off their initial values, so that taking them away shows.
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = jnp.asarray(np.full(module.mean.shape, 0.3, np.float32))
            module.var[...] = jnp.asarray(np.full(module.var.shape, 0.5, np.float32))
    return model


def modules_of(model, kind):
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, kind)]


def snapshot(model):
    return nnx.graphdef(model), [np.array(leaf) for leaf in jax.tree.leaves(model)]


def assert_untouched(model, taken):
    assert nnx.graphdef(model) == taken[0]
    for now, before in zip(jax.tree.leaves(model), taken[1], strict=True):
        np.testing.assert_array_equal(now, before)


def overwrite(copy):
    """Sets every variable of the copy to 7, in place."""
    for _, variable in nnx.to_flat_state(nnx.state(copy)):
        variable[...] = jnp.full_like(variable[...], 7.0)


def test_without_batch_norm_leaves_only_convolutions_and_dense_layers(model, x):
    taken, before = snapshot(model), apply(model, x)
    bare = models.without_batch_norm(model)
    assert modules_of(model, nnx.BatchNorm) and not modules_of(bare, nnx.BatchNorm)
    assert not jax.tree.leaves(nnx.state(bare, nnx.BatchStat))
    layers = len(modules_of(bare, nnx.Conv)) + 2 * len(modules_of(bare, nnx.Linear))
    assert len(jax.tree.leaves(bare)) == layers
    assert bare.spec is None and model.spec is not None
    assert np.abs(apply(bare, x) - before).max() > 1e-3
    overwrite(bare)
    assert_untouched(model, taken)


def test_without_batch_norm_equals_a_batch_norm_that_does_nothing(model, x):
    # BatchNorm with mean 0, var 1 - epsilon, scale 1 and bias 0 is the identity.
    neutral = nnx.clone(model)
    for module in modules_of(neutral, nnx.BatchNorm):
        module.mean[...] = jnp.zeros_like(module.mean[...])
        module.var[...] = jnp.full_like(module.var[...], 1 - 1e-5)
    np.testing.assert_allclose(
        apply(models.without_batch_norm(model), x), apply(neutral, x), atol=1e-5
    )


def test_replace_activation_swaps_all_of_them(model, x):
    taken = snapshot(model)
    smooth = models.replace_activation(model, jax.nn.softplus)
    count = len(modules_of(model, models.Activation))
    swapped = modules_of(smooth, models.Activation)
    assert len(swapped) == count > 0
    assert all(module.function is jax.nn.softplus for module in swapped)
    assert smooth.spec is None
    assert np.abs(apply(smooth, x) - apply(model, x)).max() > 1e-3
    overwrite(smooth)
    assert_untouched(model, taken)


def test_replacing_an_activation_by_itself_changes_nothing(model, x):
    same = models.replace_activation(model, jax.nn.relu)
    np.testing.assert_array_equal(apply(same, x), apply(model, x))


def test_swapped_activation_equals_the_one_created_by_name(x):
    arguments = {"input_shape": SHAPE, "num_classes": 3, "key": jax.random.key(0)} | NAMES["cnn"]
    relu = models.create("cnn", **arguments)
    silu = models.create("cnn", activation="silu", **arguments)
    swapped = models.replace_activation(relu, jax.nn.silu)
    np.testing.assert_array_equal(apply(swapped, x), apply(silu, x))


def test_linbp_has_the_logits_of_relu_and_the_gradients_of_the_linear_network(model, x):
    """None of these networks has a max-pool, so activations are all that is not affine."""

    @jax.jit
    def logits_and_jacobians(model, x):
        return model(x), jax.vmap(jax.jacrev(lambda image: model(image[None])[0]))(x)

    logits, jacobians = logits_and_jacobians(model, x)
    linear = models.replace_activation(model, models.linbp)
    same_logits, linear_jacobians = logits_and_jacobians(linear, x)
    np.testing.assert_allclose(same_logits, logits, atol=1e-6)
    weight, _ = jc.implicit_weight(jc.linearize(model), SHAPE)
    scale = np.abs(weight).max()
    for found, own in zip(linear_jacobians, jacobians, strict=True):
        np.testing.assert_allclose(found, weight, rtol=0, atol=1e-5 * scale)
        assert np.abs(own - weight).max() > 1e-2 * scale


def test_features_is_a_pytree_callable_and_a_copy(model, x):
    taken, expected = snapshot(model), jax.jit(lambda model, x: model.features(x))(model, x)
    embed = models.features(model)
    assert len(jax.tree.leaves(embed)) == len(jax.tree.leaves(model))
    np.testing.assert_allclose(apply(embed, x), expected, atol=1e-5)
    np.testing.assert_allclose(model.head(apply(embed, x)), apply(model, x), atol=1e-5)
    overwrite(embed.args[0])
    assert_untouched(model, taken)


def test_features_of_models_of_one_architecture_share_compiled_code(x):
    compiled = jax.jit(lambda embed, x: embed(x))
    for seed in range(2):
        model = models.create("cnn", 3, SHAPE, jax.random.key(seed), **NAMES["cnn"])
        compiled(models.features(model), x)
    assert compiled._cache_size() == 1


def test_copies_of_copies_and_views_still_work(x):
    model = models.create("cnn", 3, SHAPE, jax.random.key(0), **NAMES["cnn"])
    bare = models.replace_activation(models.without_batch_norm(model), jnp.tanh)
    train = nnx.view(bare, use_running_average=False, raise_if_not_found=False)
    embedded = apply(models.features(bare), x)
    expected = embedded @ bare.head.kernel[...] + bare.head.bias[...].reshape(1, -1)
    np.testing.assert_allclose(apply(train, x), expected, atol=1e-5)


def test_new_head_on_the_same_features(model, x):
    taken = snapshot(model)
    old = model.features(x)
    renewed = models.with_new_head(model, 5, jax.random.key(2))
    np.testing.assert_array_equal(renewed.features(x), old)
    kernel, bias = np.asarray(renewed.head.kernel[...]), np.asarray(renewed.head.bias[...])
    assert kernel.shape == (old.shape[1], 5) and bias.shape == (5,)
    np.testing.assert_allclose(apply(renewed, x), np.asarray(old) @ kernel + bias, atol=1e-5)
    # The network of that name with 5 classes, to the compiler too.
    assert renewed.spec == dataclasses.replace(model.spec, num_classes=5)
    assert nnx.graphdef(renewed) == nnx.graphdef(renewed.spec.build(jax.random.key(0)))
    assert_untouched(model, taken)
    overwrite(renewed)
    assert_untouched(model, taken)


def test_new_head_is_drawn_as_every_layer_is():
    model = models.create("cnn", 3, SHAPE, jax.random.key(0), widths=(3,), hidden=400)
    first, again, other = (
        np.asarray(models.with_new_head(model, 50, jax.random.key(k)).head.kernel[...])
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    bound = 400**-0.5
    for kernel in (first, other):  # uniform in the bound, by its moments, 20,000 draws
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.mean()) < 5 * bound / np.sqrt(3 * kernel.size)
        assert kernel.var() == pytest.approx(bound**2 / 3, rel=0.05)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


def test_new_head_goes_through_a_file(model, x, tmp_path):
    renewed = models.with_new_head(model, 4, jax.random.key(3))
    loaded = jc.load(jc.export(renewed, tmp_path / "model.safetensors"))
    assert loaded.spec == renewed.spec
    np.testing.assert_array_equal(apply(loaded, x), apply(renewed, x))


def test_new_head_of_a_changed_network_has_no_spec(x):
    model = models.create("cnn", 3, SHAPE, jax.random.key(0), **NAMES["cnn"])
    renewed = models.with_new_head(models.without_batch_norm(model), 2, jax.random.key(1))
    assert renewed.spec is None and apply(renewed, x).shape == (3, 2)


def test_networks_under_another_head_are_refused(monkeypatch):
    # In the tests annotations are checked before our own checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    network = models.create("cnn", 3, SHAPE, jax.random.key(0), **NAMES["cnn"])
    chain = jc.Chain(models.features(network), jnp.sin)
    for call in (
        lambda: models.without_batch_norm(chain),
        lambda: models.replace_activation(chain, jnp.sin),
        lambda: models.with_new_head(chain, 2, jax.random.key(0)),
        lambda: models.lipschitz_bound(chain, SHAPE),
    ):
        wanted = r"`model` must be a .*, got a Chain; .* take jc.models.parts\(model\)\[0\]"
        with pytest.raises(TypeError, match=wanted):
            call()


def test_bad_new_heads(model):
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        models.with_new_head(model, 0, jax.random.key(0))
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        models.with_new_head(model, 2, jax.random.key_data(jax.random.key(0)))
