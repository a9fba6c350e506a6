"""The linear sub-network of a classifier."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxclus import _jaxpr
from jaxclus._classifier import Classifier

_ARRAYS = (jax.Array, np.ndarray, np.generic)


def apply_arrays(model: Any) -> tuple[Callable[[list[Any], Any], Any], list[Any]]:
    """The classifier as a function of the arrays among its leaves and of images; those arrays.

    Python numbers, functions and other leaves that are no arrays stay fixed in the function.
    """
    leaves, treedef = jax.tree.flatten(model)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _ARRAYS)]

    def apply(arrays: list[Any], images: Any) -> Any:
        filled = leaves.copy()
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return jax.tree.unflatten(treedef, filled)(images)

    return apply, [leaves[place] for place in places]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearSubnetwork:
    """The linear sub-network of `model`; made by `linearize`.

    A pytree whose leaves are the model's.
    """

    model: Any

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b ..."]:
        apply, arrays = apply_arrays(self.model)
        return _jaxpr.linear_call(apply, arrays, images)


def linearize(model: Classifier) -> LinearSubnetwork:
    """The linear sub-network of a trained classifier (Bai et al., 2021).

    Strips the classifier to its linear parts. **This is not `jax.linearize`**, which gives the
    derivative of a function at a point: here the function itself is replaced by one that is affine
    on all of image space,

        f_lin(x) = W x + b,

    with the weights of the trained network and without retraining. On every value that depends on
    the images:

    - activations become the identity: relu, relu6, leaky_relu, elu, celu, selu, gelu, silu (swish),
      hard_silu, mish, softplus, squareplus and sparse_plus of `jax.nn`, and hand-written ones
      that are an elementwise function f of one value with literal constants, with f(x) = s x for
      large x and a smaller slope of the same sign below zero, such as `jnp.maximum(x, 0)`,
      `jnp.where(x > 0, x, 0.1 * x)`, `x * sigmoid(1.7 * x)`; those become s x;
    - max-pooling becomes the sum over the window divided by the window's size, with padding
      counted in both as in the paper; a maximum over whole axes becomes the mean over them;
    - everything else stays: convolutions, biases, shortcuts, average pooling, batch normalisation
      in eval mode (which is affine).

    So a network with other non-linear parts (attention, tanh, sigmoid gates, normalisation by the
    image's own statistics) is left with these, and not affine; `implicit_weight` refuses it and
    names them. Activations of weights alone stay as they are.

    The classifier is traced at each call for the shape of its images, so wrap repeated calls in
    `jax.jit`. The result is differentiable, in the images and in the weights.

    Args:
        model: callable from images [b, h, w, c] to logits [b, k]; as a pytree (an NNX module in
            eval mode, `jax.tree_util.Partial(predict, params)`) it can be passed through `jax.jit`
            with its weights, and leaves that are no arrays count as fixed. A plain function is
            fixed as a whole.

    Returns:
        Callable from images [b, h, w, c] to logits [b, k]; a pytree whose leaves are the model's.

    Raises:
        TypeError: if `model` cannot be called.

    References:
        Bai, Yan, Jiang, Xia, Wang: Clustering Effect of (Linearized) Adversarial Robust Models,
        2021, arXiv:2111.12922. Their ResNet has no batch normalisation either; see
        `jaxclus.models.without_batch_norm`.
    """
    if not callable(model):
        raise TypeError(f"`model` must be a callable from images to logits, got {model!r}")
    if jax.tree_util.all_leaves([model]):
        model = jax.tree_util.Partial(model)
    return LinearSubnetwork(model)
