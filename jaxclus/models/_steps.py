"""What a network does from image to features, step by step, for bounds that go through it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxclus.models._classifier import Classifier, checked
from jaxclus.models._cnn import CNN, ConvBlock
from jaxclus.models._lipschitz_resnet import Halving, LipschitzResNet
from jaxclus.models._preact_resnet import PreActBlock, PreActResNet
from jaxclus.models._resnet import ResidualBlock, ResNet, Shortcut

_FAMILIES = (CNN, ResNet, PreActResNet, LipschitzResNet)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Two paths from the same input, whose outputs are added."""

    branch: Sequence[Any]
    shortcut: Sequence[Any]


def steps_of(model: Classifier) -> Sequence[Any]:
    """The layers from the image to the features, in the order in which they are applied.

    Args:
        model: a float32 network of one of the families.

    Returns:
        Layers, and for residual blocks a `Sum` of two such sequences.

    Raises:
        TypeError: for any other model.
    """
    if checked("model", model, *_FAMILIES).head.dtype != jnp.float32:
        raise TypeError(f"`model` must compute in float32, got one made in {model.head.dtype}")
    return [*_steps(model), model.embedding]


@functools.singledispatch
def _steps(module: Any) -> Sequence[Any]:
    """The steps of a module; a layer is its own."""
    return [module]


def _chain(*modules: Any) -> Sequence[Any]:
    return [step for module in modules for step in _steps(module)]


@_steps.register
def _(model: CNN) -> Sequence[Any]:
    return _chain(model.normalize, *model.blocks, model.flatten, model.dense, model.activation)


@_steps.register
def _(block: ConvBlock) -> Sequence[Any]:
    return [block.conv, block.norm, block.activation]


@_steps.register
def _(model: ResNet) -> Sequence[Any]:
    stem = (model.normalize, model.conv, model.norm, model.activation, model.stem_pool)
    return _chain(*stem, *model.blocks, model.pool)


@_steps.register
def _(block: ResidualBlock) -> Sequence[Any]:
    layers = list(zip(block.convs, block.norms, block.activations, strict=True))
    *branch, last = [step for layer in layers for step in layer]
    return [Sum(branch, _steps(block.shortcut)), last]


@_steps.register
def _(shortcut: Shortcut) -> Sequence[Any]:
    return [shortcut.conv, shortcut.norm]


@_steps.register
def _(model: PreActResNet) -> Sequence[Any]:
    end = (model.norm, model.activation, model.pool)
    return _chain(model.normalize, model.conv, *model.blocks, *end)


@_steps.register
def _(block: PreActBlock) -> Sequence[Any]:
    entry = [block.norm1, block.activation1]
    branch = [block.conv1, block.norm2, block.activation2, block.conv2]
    if block.activates_shortcut:
        return [*entry, Sum(branch, [block.shortcut])]
    return [Sum([*entry, *branch], [block.shortcut])]


@_steps.register
def _(model: LipschitzResNet) -> Sequence[Any]:
    end = (model.flatten, model.dense, model.dense_activation)
    return _chain(model.normalize, model.conv, model.activation, *model.blocks, *end)


@_steps.register
def _(block: Halving) -> Sequence[Any]:
    return [block.rearrange, block.conv, block.activation]
