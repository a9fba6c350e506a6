"""What counts as a classifier, and that none is ever remembered with old weights or classes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclus import _classifier

X = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2, 2, 1)), jnp.float32)
TRACES = []


def predict(kernel, x):
    TRACES.append(x.shape)
    return x.reshape(x.shape[0], -1) @ kernel


class Net(nnx.Module):
    def __init__(self, num_classes=2):
        self.kernel = nnx.Param(kernel(0, num_classes))

    def __call__(self, x):
        return predict(self.kernel[...], x)


def kernel(seed, num_classes=2):
    return jax.random.normal(jax.random.key(seed), (4, num_classes))


def traces(f, *args):
    """The result, and how often the model was traced for it."""
    before = len(TRACES)
    return f(*args), len(TRACES) - before


@pytest.mark.parametrize(
    "model, visible",
    [
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), True),
        (nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu), True),
        (jax.tree_util.Partial(predict, kernel(0)), True),
        (jax.tree_util.Partial(predict, np.ones((4, 2), np.float32)), True),
        (jax.tree_util.Partial(predict, {"scale": 2.0, "kernel": kernel(0)}), True),
        (jax.tree_util.Partial(predict), False),
        (jax.tree_util.Partial(predict, {"name": "net", "kernel": kernel(0)}), False),
        (lambda x: x, False),
        (jax.jit(predict), False),
        (Net().__call__, False),
    ],
)
def test_is_pytree(model, visible):
    assert _classifier.is_pytree(model) is visible


def test_logits_of_a_pytree_reuse_the_program():
    _classifier.logits(jax.tree_util.Partial(predict, kernel(0)))(X)
    model = jax.tree_util.Partial(predict, kernel(1))
    out, count = traces(lambda: _classifier.logits(model)(X))
    assert count == 0
    np.testing.assert_allclose(out, predict(kernel(1), X), rtol=1e-6)


def test_logits_of_a_closure_see_what_it_sees_now():
    weights = [kernel(0)]
    model = lambda x: predict(weights[0], x)  # noqa: E731
    bound = _classifier.logits(model)
    np.testing.assert_allclose(bound(X), predict(kernel(0), X), rtol=1e-6)
    _, count = traces(bound, X)
    assert count == 0  # bound once, the program is kept
    weights[0] = kernel(1)
    out, count = traces(_classifier.logits(model), X)
    assert count == 1
    np.testing.assert_allclose(out, predict(kernel(1), X), rtol=1e-6)


@pytest.mark.parametrize("bind", [lambda net: net, lambda net: net.__call__])
def test_logits_of_a_mutated_module(bind):
    net = Net()
    first = _classifier.logits(bind(net))(X)
    net.kernel[...] = -net.kernel[...]
    np.testing.assert_allclose(_classifier.logits(bind(net))(X), -first, rtol=1e-6)


def test_jit_over_model_passes_static_arguments():
    def repeat(model, x, *, times):
        return model(x) * sum(1 for _ in range(times))

    bind = _classifier.jit_over_model(repeat, static_argnames=("times",))
    for model in (jax.tree_util.Partial(predict, kernel(0)), lambda x: predict(kernel(0), x)):
        np.testing.assert_allclose(bind(model)(X, times=3), 3 * model(X), rtol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_num_classes(num_classes):
    weights = kernel(0, num_classes)
    net = Net(num_classes)
    partial = jax.tree_util.Partial(predict, weights)
    for model in (partial, net, net.__call__, lambda x: predict(weights, x)):
        assert _classifier.num_classes(model, X) == num_classes
    assert traces(_classifier.num_classes, partial, X) == (num_classes, 0)
    assert traces(_classifier.num_classes, net, X) == (num_classes, 0)


@pytest.mark.parametrize("bind", [lambda net: net, lambda net: net.__call__])
def test_num_classes_of_a_new_head(bind):
    net = Net(2)
    assert _classifier.num_classes(bind(net), X) == 2
    net.kernel = nnx.Param(kernel(0, 5))
    assert _classifier.num_classes(bind(net), X) == 5


def test_num_classes_inside_a_transformation():
    @jax.jit
    def f(weights, x):
        assert _classifier.num_classes(jax.tree_util.Partial(predict, weights), x) == 2
        assert _classifier.num_classes(lambda x: predict(weights, x), x) == 2
        return x

    f(kernel(0), X)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (
            lambda x: x,
            ValueError,
            r"must map images \(3, 2, 2, 1\) to logits \(3, k\), got \(3, 2,",
        ),
        (lambda x: x.sum(), ValueError, r"to logits \(3, k\), got \(\)$"),
        (lambda x: x[:, 0, 0, 0], ValueError, r"to logits \(3, k\), got \(3,\)$"),
        (lambda x: x[:2, :, 0, 0], ValueError, r"to logits \(3, k\), got \(2, 2\)$"),
        (lambda x: (x[:, :, 0, 0],), ValueError, r"to logits \(3, k\), got <class 'tuple'>$"),
        (lambda x: x[:, 0, 0], ValueError, r"logits of at least 2 classes, got \(3, 1\)$"),
        (lambda x: x[:, :, 0, 0] > 0, TypeError, "must return float32 logits .*, got bool$"),
        (lambda x: jnp.int32(x[:, :, 0, 0]), TypeError, "must return float32 logits"),
        (lambda x: jnp.bfloat16(x[:, :, 0, 0]), TypeError, "must return float32 .*, got bfloat16$"),
        (lambda x: jnp.float16(x[:, :, 0, 0]), TypeError, "must return float32 .*, got float16$"),
    ],
)
def test_unfit_models(model, error, message):
    with pytest.raises(error, match="^`model` .*" + message) as raised:
        _classifier.num_classes(model, X)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("model", [3, None, {"kernel": kernel(0)}])
def test_no_callables(model):
    # Annotations, which only tests check, come before the check of the function itself.
    with pytest.raises(TypeError, match="model"):
        _classifier.num_classes(model, X)
    unannotated = inspect.unwrap(_classifier.num_classes)
    with pytest.raises(TypeError, match="^`model` must be a callable from images to logits, got <"):
        unannotated(model, X)
