"""The activations that networks know by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def _leaky_relu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, negative_slope=0.01)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def linbp(x: jax.Array) -> jax.Array:
    """ReLU with the derivative of the identity: `x + stop_gradient(relu(-x))`.

    The value is max(x, 0), the derivative 1 everywhere. A network of it has the logits of the ReLU
    network, and gradients that go backward linearly: without max-pools and in eval mode its
    Jacobian at any image is the weight of `jc.linearize`'s affine network, which makes adversarial
    examples that transfer better. As a defence it proves nothing: the gradients are not those of
    the logits, and `jc.attacks.lint` says so.

    Args:
        x: floating-point array of any shape.

    Returns:
        An array of x's shape.

    References:
        Guo, Li, Chen: Backpropagating Linearly Improves Transferability of Adversarial Examples,
        2020, arXiv:2012.03528.
    """
    return x + jax.lax.stop_gradient(jax.nn.relu(-x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": _leaky_relu,
    "gelu": _exact_gelu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "linbp": linbp,
}

# Smallest and largest slope of each activation's values (linbp's values are ReLU's). Those of GELU,
# Phi(x) + x phi(x), are extreme at -+sqrt(2); those of SiLU at -+2.3994. Rounded outwards.
SLOPES: dict[str, tuple[float, float]] = {
    "relu": (0.0, 1.0),
    "leaky_relu": (0.01, 1.0),
    "gelu": (-0.12891, 1.12891),
    "silu": (-0.09984, 1.09984),
    "softplus": (0.0, 1.0),
    "tanh": (0.0, 1.0),
    "linbp": (0.0, 1.0),
}


def slopes(function: Callable[[jax.Array], jax.Array]) -> tuple[float, float]:
    """The smallest and the largest slope of one of the activations known by name.

    Raises:
        TypeError: if it is none of them.
    """
    for name, known in ACTIVATIONS.items():
        if function is known:
            return SLOPES[name]
    raise TypeError(
        f"`model` must have activations of {', '.join(sorted(ACTIVATIONS))}, got {function!r}"
    )
