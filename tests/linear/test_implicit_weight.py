import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxclus.linear import implicit_weight, linearize, nonlinear_primitives

SHAPE = (4, 5, 2)
PIXELS = 40


def weights(key=0, hidden=6, classes=3):
    keys = jax.random.split(jax.random.key(key), 4)
    return {
        "first": jax.random.normal(keys[0], (PIXELS, hidden)),
        "bias": jax.random.normal(keys[1], (1, hidden)),
        "second": jax.random.normal(keys[2], (hidden, classes)),
        "offset": jax.random.normal(keys[3], (1, classes)),
    }


def predict(w, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ w["first"] + w["bias"])
    return hidden @ w["second"] + w["offset"]


def closed_form(w):
    """Weight and bias of the two layers without their ReLU, in float64."""
    first, bias, second, offset = (
        np.asarray(w[name], np.float64) for name in ("first", "bias", "second", "offset")
    )
    return (first @ second).T.reshape(-1, *SHAPE), (bias @ second + offset)[0]


def test_two_layers_against_their_product():
    linear = linearize(Partial(predict, weights()))
    weight, bias = implicit_weight(linear, SHAPE)
    assert weight.shape == (3, *SHAPE) and weight.dtype == bias.dtype == jnp.float32
    wanted_weight, wanted_bias = closed_form(weights())
    np.testing.assert_allclose(weight, wanted_weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, wanted_bias, rtol=1e-4, atol=1e-5)


def test_an_affine_classifier_that_was_never_linearised():
    offset = jnp.array([[1.0, -1.0]])
    pixel = implicit_weight(lambda x: x[:, 1, 2, :] * 3 + offset, SHAPE)
    wanted = np.zeros((2, *SHAPE))
    wanted[[0, 1], 1, 2, [0, 1]] = 3
    np.testing.assert_array_equal(pixel.weight, wanted)
    np.testing.assert_array_equal(pixel.bias, [1, -1])


def test_many_classes_of_large_images_are_pulled_back_in_parts():
    # Class j is j times the mean of column j; 12 classes of this size are pulled back at a time.
    shape, classes = (512, 512, 1), 20

    def columns(x):
        return x[:, :, :classes, 0].mean(axis=1) * jnp.arange(classes)[None]

    weight, bias = implicit_weight(columns, shape)
    text = str(jax.make_jaxpr(lambda _: implicit_weight(columns, shape))(0))
    assert "scan" in text
    wanted = np.zeros((classes, *shape))
    wanted[np.arange(classes), :, np.arange(classes), 0] = np.arange(classes)[:, None] / 512
    np.testing.assert_allclose(weight, wanted, rtol=1e-6)
    np.testing.assert_array_equal(bias, 0)


def test_a_thousand_classes_of_small_images_take_no_loop():
    w = weights(classes=1000)
    linear = linearize(Partial(predict, w))
    weight, bias = implicit_weight(linear, SHAPE)
    wanted_weight, wanted_bias = closed_form(w)
    np.testing.assert_allclose(weight, wanted_weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, wanted_bias, rtol=1e-4, atol=1e-5)
    assert "scan" not in str(jax.make_jaxpr(lambda _: implicit_weight(linear, SHAPE))(0))


def test_gradient_with_respect_to_the_weights_against_finite_differences():
    def energy(w):
        weight, bias = implicit_weight(linearize(Partial(predict, w)), SHAPE)
        return jnp.mean(weight**2) + jnp.mean(bias**2)

    w = weights()
    gradient, direction = jax.jit(jax.grad(energy))(w), weights(1)
    slope = sum((gradient[name] * direction[name]).sum() for name in w)
    along = jax.jit(lambda t: energy(jax.tree.map(lambda a, b: a + t * b, w, direction)))
    # The energy is a polynomial of degree 4 along the line: this difference is exact for it.
    h = 0.25
    difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def attention(w, x):
    tokens = x.reshape(len(x), 10, 4)
    scores = jax.nn.softmax(tokens @ tokens.transpose(0, 2, 1), axis=-1)
    return (scores @ tokens).mean(1)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda w, x: jnp.tanh(predict(w, x)), "tanh"),
        (attention, "div, dot_general, exp"),
        (lambda w, x: predict(w, x) ** 2, "integer_pow|square"),
        (lambda w, x: jax.lax.stop_gradient(predict(w, x)), "stop_gradient"),
        (lambda w, x: predict(w, x * (x - x.mean((0, 1, 2, 3), keepdims=True))), "mul"),
    ],
)
def test_what_is_not_affine_is_refused_by_name(model, names):
    with pytest.raises(ValueError, match=f"must be affine.*in the way: .*({names})"):
        implicit_weight(linearize(Partial(model, weights())), SHAPE)


def test_a_loop_without_reverse_mode_is_refused():
    def model(x):
        x = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]
        return x.sum((1, 2))

    assert nonlinear_primitives(linearize(model), SHAPE) == ("while",)
    with pytest.raises(ValueError, match="while_loop"):
        implicit_weight(linearize(model), SHAPE)


def test_overflow_is_refused():
    with pytest.raises(ValueError, match="rounding or overflow"):
        implicit_weight(lambda x: x.sum((1, 2)) * 1e38 * 1e38, SHAPE)


def test_the_activation_is_refused_where_it_was_not_removed():
    with pytest.raises(ValueError, match="in the way: max$"):
        implicit_weight(Partial(predict, weights()), SHAPE)


def counting():
    traces = []

    def model(w, x):
        traces.append(x.shape)
        return predict(w, x)

    return model, traces


def test_new_weights_reuse_the_program():
    model, traces = counting()
    implicit_weight(linearize(Partial(model, weights(0))), SHAPE)
    count = len(traces)
    weight, _ = implicit_weight(linearize(Partial(model, weights(1))), SHAPE)
    assert len(traces) == count > 0
    np.testing.assert_allclose(weight, closed_form(weights(1))[0], rtol=1e-4, atol=1e-5)
    implicit_weight(linearize(Partial(model, weights(1))), (5, 4, 2))
    assert len(traces) > count


def test_hidden_weights_are_read_at_every_call():
    w = weights(0)
    linear = linearize(lambda x: predict(w, x))
    implicit_weight(linear, SHAPE)
    w.update(weights(1))
    weight, _ = implicit_weight(linear, SHAPE)
    np.testing.assert_allclose(weight, closed_form(weights(1))[0], rtol=1e-4, atol=1e-5)


def test_inside_jit():
    run = jax.jit(lambda linear: implicit_weight(linear, SHAPE))
    for key in (0, 1):
        weight, bias = run(linearize(Partial(predict, weights(key))))
        wanted_weight, wanted_bias = closed_form(weights(key))
        np.testing.assert_allclose(weight, wanted_weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias, wanted_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [implicit_weight, nonlinear_primitives])
def test_bad_arguments(function):
    linear = linearize(Partial(predict, weights()))
    with pytest.raises(ValueError, match=r"`input_shape` must be \(h, w, c\)"):
        function(linear, (4, 5))
    with pytest.raises(ValueError, match="`input_shape` must be at least 1"):
        function(linear, (4, 0, 2))
    with pytest.raises(TypeError, match="input_shape"):
        function(linear, (4, 5.0, 2))
    with pytest.raises(TypeError, match="[Cc]allable"):
        function(weights(), SHAPE)


def test_output_must_be_logits():
    with pytest.raises(ValueError, match=r"must be logits \[b, k\], got \(1, 4, 5, 2\)"):
        implicit_weight(lambda x: x, SHAPE)
