"""The CIFAR ResNet-18 in PyTorch with the weights of one of ours: the peer of the benchmarks."""

import numpy as np
import torch
from torch import nn

import jaxclus as jc


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, features: int, width: int, stride: int):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(features, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.shortcut = nn.Identity()
        if stride != 1 or features != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(features, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](self.convs[0](x)))
        return torch.relu(self.norms[1](self.convs[1](y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """3x3 stem, stages of 2 blocks with 64 to 512 channels, average pool, linear head."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 128, 256, 256, 512, 512]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nn.Sequential(
            *(Block(a, b, s) for a, b, s in zip([64, *widths], widths, strides, strict=False))
        )
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def resnet18(model: jc.models.Classifier) -> ResNet18:
    """The PyTorch network that computes what our ResNet-18 (CIFAR stem) computes."""
    net = ResNet18(model.head.bias.shape[0])
    _copy(net.conv, model.conv)
    _norm(net.norm, model.norm)
    for theirs, ours in zip(net.blocks, model.blocks, strict=True):
        for i in range(2):
            _copy(theirs.convs[i], ours.convs[i])
            _norm(theirs.norms[i], ours.norms[i])
        if isinstance(theirs.shortcut, nn.Sequential):
            _copy(theirs.shortcut[0], ours.shortcut.conv)
            _norm(theirs.shortcut[1], ours.shortcut.norm)
    net.head.weight.data = torch.from_numpy(np.array(model.head.kernel[...]).T.copy())
    net.head.bias.data = torch.from_numpy(np.array(model.head.bias[...]))
    return net


def _copy(theirs: nn.Conv2d, ours) -> None:
    theirs.weight.data = torch.from_numpy(np.array(ours.kernel[...]).transpose(3, 2, 0, 1).copy())


def _norm(theirs: nn.BatchNorm2d, ours) -> None:
    theirs.weight.data = torch.from_numpy(np.array(ours.scale[...]))
    theirs.bias.data = torch.from_numpy(np.array(ours.bias[...]))
    theirs.running_mean.data = torch.from_numpy(np.array(ours.mean[...]))
    theirs.running_var.data = torch.from_numpy(np.array(ours.var[...]))
