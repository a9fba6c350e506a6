"""Image classifiers in Flax NNX: networks by name, their layers, and changed copies of them."""

from jaxclus.models._activations import linbp
from jaxclus.models._alexnet import AlexNet
from jaxclus.models._classifier import Classifier
from jaxclus.models._cnn import CNN
from jaxclus.models._create import ModelSpec, create, names
from jaxclus.models._densenet import DenseNet
from jaxclus.models._from_torch import from_torch
from jaxclus.models._interval import interval_bounds
from jaxclus.models._layers import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Flatten,
    GlobalAvgPool,
    Identity,
    Linear,
    MaxPool,
    Normalize,
)
from jaxclus.models._lipschitz import lipschitz_bound
from jaxclus.models._lipschitz_resnet import LipschitzResNet
from jaxclus.models._preact_resnet import PreActResNet
from jaxclus.models._rescaled import GroupSort, RescaledConv, RescaledLinear, SpaceToDepth
from jaxclus.models._resnet import ResNet
from jaxclus.models._surgery import (
    features,
    parts,
    replace_activation,
    with_new_head,
    without_batch_norm,
)
from jaxclus.models._vgg import VGG

__all__ = [
    "AlexNet",
    "CNN",
    "VGG",
    "Activation",
    "AvgPool",
    "BatchNorm",
    "Classifier",
    "Conv",
    "DenseNet",
    "Flatten",
    "GlobalAvgPool",
    "GroupSort",
    "Identity",
    "Linear",
    "LipschitzResNet",
    "MaxPool",
    "ModelSpec",
    "Normalize",
    "PreActResNet",
    "RescaledConv",
    "RescaledLinear",
    "ResNet",
    "SpaceToDepth",
    "create",
    "features",
    "from_torch",
    "interval_bounds",
    "linbp",
    "lipschitz_bound",
    "names",
    "parts",
    "replace_activation",
    "with_new_head",
    "without_batch_norm",
]
