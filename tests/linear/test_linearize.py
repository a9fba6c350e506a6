import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.tree_util import Partial

from jaxclus.linear import implicit_weight, linearize, nonlinear_primitives
from jaxclus.models import _ops, linbp

SHAPE = (6, 6, 2)
X = jax.random.uniform(jax.random.key(1), (3, *SHAPE))


def weights(key=0):
    normal = jax.random.normal
    keys = jax.random.split(jax.random.key(key), 5)
    return {
        "conv1": normal(keys[0], (3, 3, 2, 4)),
        "conv2": normal(keys[1], (3, 3, 4, 4)) / 3,
        "bias": normal(keys[2], (1, 1, 1, 4)),
        "head": normal(keys[3], (4, 3)),
        "offset": normal(keys[4], (1, 3)),
    }


def conv(x, kernel, convolution=lax.conv_general_dilated):
    return convolution(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def residual(act):
    def predict(w, x):
        x = act(conv(x, w["conv1"]) + w["bias"])
        x = act(x + conv(x, w["conv2"]))
        return x.mean((1, 2)) @ w["head"] + w["offset"]

    return predict


def identity(x):
    return x


def layer(act):
    """One activation between two linear maps, of values on both sides of zero."""
    w = weights()
    return lambda x: act(5 * conv(x, w["conv1"])).mean((1, 2)) @ w["head"]


NAMED = [
    jax.nn.relu, jax.nn.relu6, jax.nn.leaky_relu, jax.nn.elu, jax.nn.celu, jax.nn.selu,
    jax.nn.gelu, jax.nn.silu, jax.nn.hard_silu, jax.nn.mish, jax.nn.softplus, jax.nn.squareplus,
    jax.nn.sparse_plus,
]  # fmt: skip

HAND_WRITTEN = {
    "maximum": lambda x: jnp.maximum(x, 0),
    "maximum, swapped": lambda x: jnp.maximum(0.0, x),
    "maximum of zeros": lambda x: jnp.maximum(jnp.zeros_like(x), x),
    "where": lambda x: jnp.where(x > 0, x, 0),
    "where, swapped": lambda x: jnp.where(x <= 0, 0.0, x),
    "step": lambda x: x * (x > 0),
    "leaky where": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "leaky maximum": lambda x: jnp.maximum(x, 0.2 * x),
    "leaky sum": lambda x: jnp.maximum(x, 0) + 0.2 * jnp.minimum(x, 0),
    "celu": lambda x: jnp.maximum(x, 0) + jnp.minimum(0, 2 * jnp.expm1(x / 2)),
    "elu": lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1),
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "swish by exp": lambda x: x / (1 + jnp.exp(-x)),
    "quick gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu by erf": lambda x: 0.5 * (x * (1 + lax.erf(x / jnp.sqrt(2.0)))),
    "gelu by tanh": lambda x: (
        0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x * x * x)))
    ),
    "hard swish": lambda x: x * jax.nn.relu6(x + 3) / 6,
    "LinBP": linbp,
    "mish": lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
    "compiled": jax.jit(lambda x: jnp.maximum(jax.jit(lambda x: -x)(x), 0) * -1),
}


@pytest.mark.parametrize("act", NAMED, ids=lambda act: act.__name__)
def test_named_activations_become_the_identity(act):
    check_becomes_identity(act)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_activations_become_the_identity(name):
    check_becomes_identity(HAND_WRITTEN[name])


def check_becomes_identity(act):
    wanted = layer(identity)(X)
    linear = linearize(layer(act))
    np.testing.assert_allclose(linear(X), wanted, rtol=1e-5, atol=1e-5)
    assert nonlinear_primitives(linear, SHAPE) == ()
    assert nonlinear_primitives(layer(act), SHAPE) != ()


def test_the_slope_on_the_right_is_kept():
    np.testing.assert_allclose(
        linearize(layer(lambda x: 2 * x * jax.nn.sigmoid(x)))(X), 2 * layer(identity)(X),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (jnp.tanh, {"tanh"}),
        (jax.nn.sigmoid, {"logistic"}),
        (jnp.square, {"square"}),
        (lambda x: x * x, {"mul"}),
        (jnp.abs, {"abs"}),
        (lambda x: jnp.maximum(x, -x), {"max"}),
        (lambda x: x * jnp.tanh(x), {"mul", "tanh"}),
        (lambda x: jnp.clip(x, -1, 1), {"max", "min"}),
        (lambda x: x * jax.nn.sigmoid(x[..., ::-1]), {"mul", "logistic"}),
        (lambda x: x * jax.nn.sigmoid(x.mean((1, 2), keepdims=True)), {"mul", "logistic"}),
        (lambda x: x * jax.nn.sigmoid(weights()["bias"] * x), {"mul", "logistic"}),
        (lambda x: jnp.maximum(x, weights()["bias"]), {"max"}),
    ],
)
def test_what_is_no_rectifier_stays(act, names):
    linear = linearize(layer(act))
    np.testing.assert_allclose(linear(X), layer(act)(X), rtol=1e-5, atol=1e-5)
    assert set(nonlinear_primitives(linear, SHAPE)) == names


def window_mean(x, window, stride, padding):
    """Float64 sums over windows of the zero-padded images, over the window's size."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *[(padding, padding)] * 2, (0, 0)))
    view = np.lib.stride_tricks.sliding_window_view(x, (window, window), axis=(1, 2))
    return view[:, ::stride, ::stride].sum((-2, -1)) / window**2


def nnx_pool(x):
    return nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def linen_pool(x):
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


def own_pool(x):
    return _ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@pytest.mark.parametrize("pool", [nnx_pool, linen_pool, own_pool])
def test_max_pool_becomes_window_sum_over_window_size(pool):
    linear = linearize(lambda x: pool(x - 0.5))
    np.testing.assert_allclose(linear(X), window_mean(X - 0.5, 3, 2, 1), rtol=1e-5, atol=1e-6)
    assert nonlinear_primitives(linear, SHAPE) == ()


def test_maximum_over_axes_becomes_the_mean():
    linear = linearize(lambda x: jnp.max(x, axis=(1, 2)))
    np.testing.assert_allclose(linear(X), X.mean((1, 2)), rtol=1e-6)
    blocks = linearize(lambda x: x.reshape(3, 3, 2, 3, 2, 2).max((2, 4)))
    np.testing.assert_allclose(blocks(X), window_mean(X, 2, 2, 0), rtol=1e-5)


class Network(nnx.Module):
    """Convolution, BatchNorm, activation, max-pool, dropout, head."""

    def __init__(self, act, pool, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.act, self.pool = act, pool

    def __call__(self, x):
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.head(self.dropout(x.mean((1, 2))))


def network(act, pool):
    model = Network(act, pool, nnx.Rngs(0))
    model.norm.mean[...] = jnp.array([0.1, -0.2, 0.3, 0.0])
    model.norm.var[...] = jnp.array([0.5, 2.0, 1.0, 0.1])
    model.norm.bias[...] = jnp.array([0.1, 0.0, -1.0, 0.3])
    model.eval()
    return model


class LinenNetwork(nn.Module):
    act: object

    @nn.compact
    def __call__(self, x):
        x = self.act(nn.Conv(4, (3, 3), strides=2)(x))
        x = self.act(nn.Dense(5)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


def linen(act):
    module = LinenNetwork(act)
    return Partial(module.apply, module.init(jax.random.key(0), X))


def mean_pool(x):
    return nnx.avg_pool(x, (2, 2), (2, 2))


def max_pool(x):
    return nnx.max_pool(x, (2, 2), (2, 2))


def own_convolution(act):
    def predict(w, x):
        return act(conv(x, w["conv1"], _ops.conv_general_dilated)).mean((1, 2)) @ w["head"]

    return predict


PAIRS = {
    "function": (
        Partial(residual(jax.nn.relu), weights()),
        Partial(residual(identity), weights()),
    ),
    "closure": (layer(jax.nn.relu), layer(identity)),
    "own convolution": (
        Partial(own_convolution(jax.nn.relu), weights()),
        Partial(own_convolution(identity), weights()),
    ),
    "nnx": (network(nnx.relu, max_pool), network(identity, mean_pool)),
    "linen": (linen(nn.relu), linen(identity)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_equals_the_network_written_without_activations(kind):
    model, by_hand = PAIRS[kind]
    linear = linearize(model)
    wanted = by_hand(X)
    assert np.abs(model(X) - wanted).max() > 0.01
    np.testing.assert_allclose(jax.jit(linear)(X), wanted, rtol=1e-4, atol=1e-5)
    weight, bias = map(np.asarray, implicit_weight(linear, SHAPE))
    affine = np.tensordot(X, weight, ((1, 2, 3), (1, 2, 3))) + bias
    np.testing.assert_allclose(affine, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_custom_derivative_of_the_convolution_is_kept():
    linear = linearize(PAIRS["own convolution"][0])
    assert "custom_jvp_call" in str(jax.make_jaxpr(linear)(X))


def test_is_a_pytree_with_the_leaves_of_the_model():
    model = network(nnx.relu, max_pool)
    linear = linearize(model)
    assert all(a is b for a, b in zip(jax.tree.leaves(linear), jax.tree.leaves(model), strict=True))
    out = jax.jit(lambda f, x: f(x))(linear, X)
    np.testing.assert_allclose(out, linear(X), rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(linearize(lambda x: x)) == []
    jax.jit(lambda f, x: f(x))(linearize(layer(jax.nn.relu)), X)


def test_leaves_that_are_no_arrays_are_fixed():
    model = Partial(lambda act, k, x: act(x)[:, :, :k].sum((1, 2)), Partial(jax.nn.relu), 2)
    np.testing.assert_allclose(
        linearize(model)(X - 0.5), (X - 0.5)[:, :, :2].sum((1, 2)), rtol=1e-5
    )


def test_gradients_are_those_of_the_network_without_activations():
    linear, by_hand = (
        lambda w, x: linearize(Partial(residual(jax.nn.relu), w))(x),
        residual(identity),
    )
    for argument in (0, 1):
        got, wanted = (
            jax.jit(jax.grad(lambda w, x, f=f: (f(w, x) ** 2).sum(), argument))(weights(), X)
            for f in (linear, by_hand)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_jit_and_vmap_agree():
    linear = linearize(Partial(residual(jax.nn.relu), weights()))
    np.testing.assert_allclose(jax.jit(linear)(X), linear(X), rtol=1e-5, atol=1e-5)
    one_by_one = jax.vmap(lambda x: linear(x[None])[0])(X)
    np.testing.assert_allclose(one_by_one, linear(X), rtol=1e-5, atol=1e-5)
    many = jax.tree.map(lambda a, b: jnp.stack([a, b]), weights(0), weights(1))
    outs = jax.vmap(lambda w: linearize(Partial(residual(jax.nn.relu), w))(X))(many)
    np.testing.assert_allclose(outs[0], linear(X), rtol=1e-4, atol=1e-4)


def test_traced_anew_for_another_input_shape():
    linear = linearize(Partial(residual(jax.nn.relu), weights()))
    for size in (4, 7):
        x = jax.random.uniform(jax.random.key(size), (2, size, size, 2))
        wanted = residual(identity)(weights(), x)
        np.testing.assert_allclose(linear(x), wanted, rtol=1e-5, atol=1e-5)


def test_precision_of_the_model_is_kept():
    linear = linearize(lambda x: jax.nn.gelu(3 * x.astype(jnp.bfloat16)) * jnp.bfloat16(0.5))
    out = linear(X)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.5 * X, rtol=0.02)


def test_rejects_a_model_with_two_outputs():
    with pytest.raises(ValueError, match="one array of logits, got 2"):
        linearize(lambda x: (x, x))(X)


def test_rejects_what_is_no_callable():
    with pytest.raises(TypeError, match="model"):
        linearize(weights())
