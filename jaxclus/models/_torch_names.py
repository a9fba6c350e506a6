"""The names that PyTorch code bases give to the layers of our networks."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxclus.models._alexnet import AlexNet
from jaxclus.models._create import family_of
from jaxclus.models._densenet import DenseNet
from jaxclus.models._preact_resnet import PreActResNet
from jaxclus.models._resnet import ResNet
from jaxclus.models._vgg import VGG

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class Naming:
    """How one code base names the layers of a family.

    Args:
        block: name of a block, with {stage} and {number}, which counts through each stage.
        layers: for each of our layers, those of a block included, the names in use for it.
        first_stage: what {stage} starts at.
        first_number: what {number} starts at.
        first: path of our first convolution.
        ignored: start of the names of layers that the network has and never runs.
        arguments: arguments of the family that all networks with these names need.
        untold: arguments, mean and std included, that no network has a usual value of, so that
            they must be given where the file does not hold them.
    """

    block: str
    layers: Mapping[str, tuple[str, ...]]
    first_stage: int = 1
    first_number: int = 0
    first: tuple[Any, ...] = ("conv",)
    ignored: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    untold: tuple[str, ...] = ()

    def block_name(self, stage: int, number: int) -> str:
        """The name, with a dot at its end, of a block of a stage, both counted from 0."""
        stage, number = stage + self.first_stage, number + self.first_number
        return self.block.format(stage=stage, number=number) + "."

    def name(self, path: Sequence[Any], blocks: Sequence[int], present: Collection[str]) -> str:
        """The name of the variable at `path` of our model.

        Args:
            path: keys of our variable, for example ("blocks", 0, "conv1", "kernel").
            blocks: number of blocks in each stage.
            present: names in the file: where several are in use, the one found there.
        """
        *layer, leaf = path
        block = ""
        if layer[0] == "blocks":
            _, index, *layer = layer
            block = self.block_name(*_place(index, blocks))
        ours = ".".join(map(str, layer))
        known = self.layers.get(ours, (ours,))  # of a layer without a name, none is in the file
        options = [f"{block}{name}.{_LEAVES[leaf]}" for name in known]
        return next((option for option in options if option in present), options[0])


class _NumberedBlocks(Naming):
    """A VGG's naming: layers with and without weights are counted through in one sequence."""

    def name(self, path: Sequence[Any], blocks: Sequence[int], present: Collection[str]) -> str:
        if path[0] != "blocks":
            return super().name(path, blocks, present)
        _, index, layer, leaf = path
        stage, _ = _place(index, blocks)
        # Convolution, activation and perhaps BatchNorm of each block; a pool ends each stage.
        normed = any(name.endswith(".running_mean") for name in present)
        number = index * (3 if normed else 2) + stage + (layer == "norm")
        return f"{self.block}.{number}.{_LEAVES[leaf]}"


def naming_of(name: str, present: Collection[str]) -> Naming:
    """The naming that the names in a file of the network `name` follow; else the most usual one.

    Raises:
        ValueError: if the network is not known, or has no counterpart in PyTorch.
    """
    family, _ = family_of(name)
    if family not in _NAMINGS:
        raise ValueError(
            f"`name` must be that of a network known in PyTorch, not of a {family.__name__}, "
            f"got {name!r}"
        )
    first, *others = _NAMINGS[family]
    matching = (n for n in others if any(key.startswith(n.block_name(0, 0)) for key in present))
    return next(matching, first)


def _place(index: int, blocks: Sequence[int]) -> tuple[int, int]:
    """Stage and number within it of a block that is counted through all stages."""
    stage = 0
    while index >= blocks[stage]:
        index, stage = index - blocks[stage], stage + 1
    return stage, index


_HEAD = ("linear", "fc")
_PREACT_BLOCK = {
    "norm1": ("bn1",),
    "conv1": ("conv1",),
    "norm2": ("bn2",),
    "conv2": ("conv2",),
}
_TORCHVISION = Naming(
    "layer{stage}.{number}",
    {
        "conv": ("conv1",),
        "norm": ("bn1",),
        "convs.0": ("conv1",),
        "convs.1": ("conv2",),
        "convs.2": ("conv3",),
        "norms.0": ("bn1",),
        "norms.1": ("bn2",),
        "norms.2": ("bn3",),
        "shortcut.conv": ("shortcut.0", "downsample.0"),
        "shortcut.norm": ("shortcut.1", "downsample.1"),
        "head": _HEAD,
    },
)
_PREACT = Naming(
    "layer{stage}.{number}",
    _PREACT_BLOCK
    | {
        "conv": ("conv1",),
        "shortcut": ("shortcut.0", "shortcut", "downsample.0"),
        "norm": ("bn", "bn1"),
        "head": _HEAD,
    },
)
# TRADES' code, which most of RobustBench's wide networks use. Its checkpoints may hold the layers
# of a `sub_block1` that no forward pass goes through.
_WIDE = Naming(
    "block{stage}.layer.{number}",
    _PREACT_BLOCK
    | {"conv": ("conv1",), "shortcut": ("convShortcut",), "norm": ("bn1",), "head": _HEAD[::-1]},
    ignored=("sub_block1.",),
)
_DEEPMIND_OUTER = {"norm": ("batchnorm",), "head": ("logits",)}
_DEEPMIND_BLOCK = {
    "norm1": ("batchnorm_0",),
    "norm2": ("batchnorm_1",),
    "shortcut": ("shortcut",),
}
# The code base has networks with ReLU and with SiLU, and normalises for each data set, with buffers
# that its older versions store and its newer ones do not.
_DEEPMIND_UNTOLD = ("activation", "mean", "std")
_DEEPMIND_WIDE = Naming(
    "layer.{stage}.block.{number}",
    _DEEPMIND_OUTER
    | _DEEPMIND_BLOCK
    | {"conv": ("init_conv",), "conv1": ("conv_0",), "conv2": ("conv_1",)},
    first_stage=0,
    arguments={"stride_padding": "after"},
    untold=_DEEPMIND_UNTOLD,
)
_DEEPMIND_PREACT = Naming(
    "layer_{stage}.{number}",
    _DEEPMIND_OUTER
    | _DEEPMIND_BLOCK
    | {"conv": ("conv_2d",), "conv1": ("conv_2d_1",), "conv2": ("conv_2d_2",)},
    first_stage=0,
    arguments={"stride_padding": "after", "shortcut_input": "raw", "shortcut_size": 3},
    untold=_DEEPMIND_UNTOLD,
)
_VGG = _NumberedBlocks("features", {"head": ("classifier",)}, first=("blocks", 0, "conv"))
# In older files, torchvision's own among them, the layers are called norm.1, conv.1 and so on.
_DENSENET = Naming(
    "features.denseblock{stage}.denselayer{number}",
    {
        "conv": ("features.conv0",),
        "norm": ("features.norm0",),
        "last_norm": ("features.norm5",),
        "head": ("classifier",),
    }
    | {kind + n: (kind + n, f"{kind}.{n}") for kind in ("norm", "conv") for n in ("1", "2")}
    | {
        f"transitions.{stage}.{layer}": (f"features.transition{stage + 1}.{layer}",)
        for stage in range(3)
        for layer in ("norm", "conv")
    },
    first_number=1,
)
_ALEXNET = Naming(
    "",
    {f"convs.{i}": (f"features.{n}",) for i, n in enumerate((0, 3, 6, 8, 10))}
    | {"dense.0": ("classifier.1",), "dense.1": ("classifier.4",), "head": ("classifier.6",)},
    first=("convs", 0),
)
_NAMINGS: dict[type, tuple[Naming, ...]] = {
    ResNet: (_TORCHVISION,),
    PreActResNet: (_PREACT, _WIDE, _DEEPMIND_WIDE, _DEEPMIND_PREACT),
    VGG: (_VGG,),
    DenseNet: (_DENSENET,),
    AlexNet: (_ALEXNET,),
}
