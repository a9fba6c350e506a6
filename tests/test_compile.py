"""`jc.jit` computes what `jax.jit` computes, at top level and inside other programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from jaxclus import _compile

TRACES = []
X = jnp.arange(6.0).reshape(2, 3)


@jc.jit
def cubed(x):
    TRACES.append(x.shape)
    return x**3


def test_the_settings_are_known_to_this_xla():
    convolutions = {"xla_cpu_experimental_ynn_fusion_type": ""}
    assert _compile.settings() == convolutions
    assert _compile.settings(True) == convolutions | {"xla_backend_optimization_level": "1"}


def test_a_setting_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(_compile, "_SETTINGS", {"no_such_setting": ""})
    assert _compile.settings.__wrapped__() == {}
    assert list(_compile.settings.__wrapped__(True)) == ["xla_backend_optimization_level"]


def test_at_top_level_it_compiles_once():
    before = len(TRACES)
    for shift in range(3):
        np.testing.assert_allclose(cubed(X + shift), (np.asarray(X) + shift) ** 3)
    assert len(TRACES) == before + 1
    assert cubed.outermost._cache_size() == 1


def test_quickly_compiled_programs_do_the_same():
    quick = jc.jit(lambda x: x**3, quickly=True)
    np.testing.assert_array_equal(quick(X), cubed(X))
    assert quick.outermost._cache_size() == 1


def test_inside_other_programs_and_transformations():
    np.testing.assert_allclose(jax.jit(lambda x: cubed(x) + 1)(X), X**3 + 1)
    np.testing.assert_allclose(jax.jit(lambda: cubed(X) + 1)(), X**3 + 1)  # no traced argument
    np.testing.assert_allclose(jax.grad(lambda x: cubed(x).sum())(X), 3 * X**2)
    np.testing.assert_allclose(jax.vmap(cubed)(X), X**3)
    assert jax.eval_shape(cubed, X).shape == X.shape


def test_gradient_with_respect_to_what_a_function_closes_over():
    def total(weight):
        return jc.jit(lambda x: (weight * x).sum())(X)

    np.testing.assert_allclose(jax.grad(total)(jnp.ones_like(X)), X)


def test_errors_of_the_function_come_through():
    with pytest.raises(ValueError, match="mine"):
        jc.jit(lambda x: _raise(x))(X)


def _raise(x):
    raise ValueError("mine")


def test_arguments_of_jax_jit():
    power = jc.jit(lambda x, n: x**n, static_argnames=("n",))
    np.testing.assert_allclose(power(X, n=2), X**2)


def test_convolutions_avoid_ynnpack_on_cpus():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    compiled = jc.jit(convolve).outermost.lower(x, kernel).compile().as_text()
    assert "ynn_fusion" not in compiled
