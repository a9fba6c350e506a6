"""The arguments of a network that the shapes of its PyTorch weights tell."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxclus.models._alexnet import AlexNet
from jaxclus.models._densenet import DenseNet
from jaxclus.models._preact_resnet import PreActResNet
from jaxclus.models._resnet import ResNet
from jaxclus.models._vgg import VGG

# Size of an axis, in PyTorch's order, of our variable at a path; None where it cannot be read.
Size = Callable[..., int | None]


def inferred(family: type, defaults: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Arguments of the family, as far as the shapes show others than the usual ones."""
    if "stem_width" in defaults:  # a wide network, whose name says it all
        return {}
    usual = {key: p.default for key, p in inspect.signature(family.__init__).parameters.items()}
    usual |= defaults
    found = _READERS[family](size)
    return {key: v for key, v in found.items() if v is not None and v != usual[key]}


def _resnet(size: Size) -> dict[str, Any]:
    stem = size(0, "conv", "kernel")
    width = size(0, "blocks", 0, "convs", 0, "kernel") or stem
    return {"width": width, "stem": _stem(size(2, "conv", "kernel") == 7)}


def _preact_resnet(size: Size) -> dict[str, Any]:
    stem = size(0, "conv", "kernel")
    width = size(0, "blocks", 0, "conv1", "kernel") or stem
    return {
        "width": width,
        "stem_width": None if stem == width else stem,
        "final_norm": size(0, "norm", "scale") is not None,
    }


def _vgg(size: Size) -> dict[str, Any]:
    return {
        "width": size(0, "blocks", 0, "conv", "kernel"),
        "batch_norm": size(0, "blocks", 0, "norm", "scale") is not None,
    }


def _densenet(size: Size) -> dict[str, Any]:
    growth = size(0, "blocks", 0, "conv2", "kernel")
    return {"growth": growth, "stem": _stem(size(2, "conv", "kernel") == 7)}


def _alexnet(size: Size) -> dict[str, Any]:
    widths = tuple(size(0, "convs", number, "kernel") for number in range(5))
    hidden = tuple(size(0, "dense", number, "kernel") for number in range(2))
    return {
        "widths": None if None in widths else widths,
        "hidden": None if None in hidden else hidden,
        "stem": _stem(size(2, "convs", 0, "kernel") == 11),
    }


def _stem(imagenet: bool) -> str:
    return "imagenet" if imagenet else "cifar"


_READERS: dict[type, Callable[[Size], dict[str, Any]]] = {
    ResNet: _resnet,
    PreActResNet: _preact_resnet,
    VGG: _vgg,
    DenseNet: _densenet,
    AlexNet: _alexnet,
}
