"""PyTorch's side of test_from_torch.py: writes from_torch_reference.npz beside this file.

Run it where torch is installed: `python tests/models/make_from_torch_reference.py`. The modules
name their layers as the networks of RobustBench's model zoo do, and normalise with buffers.
"""

import json
from pathlib import Path

import numpy as np
import torch
from make_torch_reference import conv, perturb
from torch import nn
from torch.nn import functional as F

REFERENCE = Path(__file__).with_name("from_torch_reference.npz")


class Normalised(nn.Module):
    """A network that holds its own normalisation, under the names of `buffers`."""

    def normalise_with(self, buffers, shape):
        self.buffer_names = buffers
        for name, values in zip(buffers, [(0.49, 0.48, 0.45), (0.25, 0.24, 0.26)], strict=True):
            self.register_buffer(name, torch.tensor(values).view(shape))

    def normalised(self, x):
        shift, scale = (getattr(self, name) for name in self.buffer_names)
        return (x - shift) / scale


class PlainBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    activated = True

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = nn.Sequential()
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x):
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + self.shortcut(active if self.projects and self.activated else x)


class RawShortcutBlock(PreActBlock):
    activated = False


class Staged(Normalised):
    """ResNet and PreActResNet: conv1, layer1, layer2, ..., linear."""

    def __init__(self, classes, blocks, width, block, final_norm=False):
        super().__init__()
        self.conv1 = conv(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width) if block is PlainBlock else None
        features = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for number in range(count):
                outputs = width * 2**stage
                layer.append(block(features, outputs, 2 if stage and not number else 1))
                features = outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.stages = len(blocks)
        self.bn = nn.BatchNorm2d(features) if final_norm else None
        self.linear = nn.Linear(features, classes)
        self.normalise_with(("mu", "sigma"), (1, 3, 1, 1))

    def forward(self, x):
        x = self.conv1(self.normalised(x))
        if self.bn1 is not None:
            x = F.relu(self.bn1(x))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        if self.bn is not None:
            x = F.relu(self.bn(x))
        return self.linear(x.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """The blocks of a stage, under an attribute of the given name."""

    def __init__(self, attribute, block, count, inputs, outputs, stride):
        super().__init__()
        self.attribute = attribute
        blocks = [block(inputs, outputs, stride)]
        blocks += [block(outputs, outputs, 1) for _ in range(count - 1)]
        self.add_module(attribute, nn.Sequential(*blocks))

    def forward(self, x):
        return getattr(self, self.attribute)(x)


class WideResNet(Normalised):
    """TRADES' names; `sub_block1` has weights, and no part in the forward pass."""

    def __init__(self, classes, count=1, stem=16, width=16, sub_block1=False):
        super().__init__()
        self.conv1 = conv(3, stem, 3)
        self.block1 = Group("layer", WideBlock, count, stem, width, 1)
        if sub_block1:
            self.sub_block1 = Group("layer", WideBlock, count, stem, width, 1)
        self.block2 = Group("layer", WideBlock, count, width, 2 * width, 2)
        self.block3 = Group("layer", WideBlock, count, 2 * width, 4 * width, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, classes)
        self.normalise_with(("mu", "sigma"), (1, 3, 1, 1))

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(self.normalised(x)))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


def pad(x, stride):
    """Zeros on all sides of a 3x3 convolution, or below and on the right if its stride is 2."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class DeepMindWideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_1 = conv(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        active = F.silu(self.batchnorm_0(x))
        y = self.conv_0(pad(active, self.stride))
        y = self.conv_1(F.silu(self.batchnorm_1(y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class DeepMindWideResNet(Normalised):
    def __init__(self, classes, stem, width):
        super().__init__()
        self.init_conv = conv(3, stem, 3)
        self.layer = nn.Sequential(
            Group("block", DeepMindWideBlock, 2, stem, width, 1),
            Group("block", DeepMindWideBlock, 2, width, 2 * width, 2),
            Group("block", DeepMindWideBlock, 2, 2 * width, 4 * width, 2),
        )
        self.batchnorm = nn.BatchNorm2d(4 * width)
        self.logits = nn.Linear(4 * width, classes)
        self.normalise_with(("mean", "std"), (3, 1, 1))

    def forward(self, x):
        x = F.silu(self.batchnorm(self.layer(self.init_conv(self.normalised(x)))))
        return self.logits(x.mean(dim=(2, 3)))


class DeepMindPreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = conv(outputs, outputs, 3)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 3, stride, bias=False)

    def forward(self, x):
        y = self.conv_2d_1(pad(F.silu(self.batchnorm_0(x)), self.stride))
        y = self.conv_2d_2(F.silu(self.batchnorm_1(y)))
        return y + (x if self.shortcut is None else self.shortcut(pad(x, self.stride)))


class DeepMindPreActResNet(Normalised):
    def __init__(self, classes, width):
        super().__init__()
        self.conv_2d = conv(3, width, 3)
        features, self.stages = width, 4
        for stage in range(self.stages):
            outputs = width * 2**stage
            first = DeepMindPreActBlock(features, outputs, 2 if stage else 1)
            second = DeepMindPreActBlock(outputs, outputs, 1)
            self.add_module(f"layer_{stage}", nn.Sequential(first, second))
            features = outputs
        self.batchnorm = nn.BatchNorm2d(features)
        self.logits = nn.Linear(features, classes)
        self.normalise_with(("mean", "std"), (3, 1, 1))

    def forward(self, x):
        x = self.conv_2d(self.normalised(x))
        for stage in range(self.stages):
            x = getattr(self, f"layer_{stage}")(x)
        return self.logits(F.silu(self.batchnorm(x)).mean(dim=(2, 3)))


# The module, and the name and arguments with which from_torch takes its state_dict.
CASES = {
    "resnet": (lambda: Staged(5, (1, 1, 1), 3, PlainBlock), "resnet8", {}),
    "preact": (
        lambda: Staged(5, (2, 2, 2, 2), 2, PreActBlock, final_norm=True),
        "preact_resnet18",
        {},
    ),
    "preact_raw": (
        lambda: Staged(5, (2, 2, 2, 2), 2, RawShortcutBlock),
        "preact_resnet18",
        {"shortcut_input": "raw"},
    ),
    "wide": (
        lambda: WideResNet(5, 2, stem=2, width=3, sub_block1=True),
        "wide_resnet_16_1",
        {"stem_width": 2, "width": 3},
    ),
    "deepmind_wide": (
        lambda: DeepMindWideResNet(5, 2, 3),
        "wide_resnet_16_1",
        {"stem_width": 2, "width": 3, "activation": "silu"},
    ),
    "deepmind_preact": (
        lambda: DeepMindPreActResNet(5, 2),
        "preact_resnet18",
        {"activation": "silu"},
    ),
}


def seeded(case):
    """The case's module in eval mode, with weights and statistics off their initial values."""
    torch.manual_seed(list(CASES).index(case))
    module = CASES[case][0]().eval()
    perturb(module)
    return module


@torch.no_grad()
def main():
    arrays = {}
    for case, (_, name, arguments) in CASES.items():
        module = seeded(case)
        x = torch.rand(4, 16, 24, 3)
        arrays[f"{case}/call"] = np.array(json.dumps([name, arguments]))
        arrays[f"{case}/x"] = x.numpy()
        arrays[f"{case}/logits"] = module(x.permute(0, 3, 1, 2)).numpy()
        arrays |= {f"{case}/weights/{k}": v.numpy() for k, v in module.state_dict().items()}
    np.savez_compressed(REFERENCE, **arrays)
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
