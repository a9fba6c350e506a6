"""PyTorch's side of the parity test: writes torch_reference.npz beside this file.

Run it where torch is installed: `python tests/models/make_torch_reference.py`. The modules use the
names of torchvision's ResNets, so that real checkpoints map alike.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

REFERENCE = Path(__file__).with_name("torch_reference.npz")
CASES = {
    "resnet18": {
        "name": "resnet18",
        "input_shape": (11, 8, 3),
        "mean": (0.49, 0.48, 0.45),
        "std": (0.25, 0.24, 0.26),
        "arguments": {"width": 2, "blocks": (1, 2, 1)},
    },
    "resnet50_imagenet": {
        "name": "resnet50",
        "input_shape": (33, 30, 3),
        "mean": (0.49, 0.48, 0.45),
        "std": (0.25, 0.24, 0.26),
        "arguments": {"width": 2, "stem": "imagenet", "blocks": (1, 1)},
    },
    "preact_resnet18": {
        "name": "preact_resnet18",
        "input_shape": (9, 8, 1),
        "mean": (0.3,),
        "std": (0.2,),
        "arguments": {"width": 3, "blocks": (1, 2, 1)},
    },
    "wide_resnet": {
        "name": "wide_resnet_10_2",
        "input_shape": (8, 7, 3),
        "mean": (0.49, 0.48, 0.45),
        "std": (0.25, 0.24, 0.26),
        "arguments": {"width": 4, "stem_width": 3},
    },
}


def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, inputs, width, stride, bottleneck):
        super().__init__()
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        else:
            plan = [(width, 3, stride), (width, 3, 1)]
        features, self.depth = inputs, len(plan)
        for number, (outputs, size, step) in enumerate(plan, start=1):
            self.add_module(f"conv{number}", conv(features, outputs, size, step))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
            features = outputs
        self.outputs = features
        self.downsample = None
        if stride != 1 or inputs != features:
            self.downsample = nn.Sequential(
                conv(inputs, features, 1, stride), nn.BatchNorm2d(features)
            )

    def forward(self, x):
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.depth:
                y = y.relu()
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, classes, channels, blocks, width=64, bottleneck=False, stem="cifar"):
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv1 = conv(channels, width, 7, 2) if imagenet else conv(channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        features, self.stages = width, len(blocks)
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for number in range(count):
                stride = 2 if stage and not number else 1
                layer.append(Block(features, width * 2**stage, stride, bottleneck))
                features = layer[-1].outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x):
        active = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(active)).relu())
        return y + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    def __init__(self, classes, channels, blocks, width=64, stem_width=None, final_norm=False):
        super().__init__()
        features, self.stages = stem_width or width, len(blocks)
        self.conv1 = conv(channels, features, 3)
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for number in range(count):
                outputs = width * 2**stage
                layer.append(PreActBlock(features, outputs, 2 if stage and not number else 1))
                features = outputs
            self.add_module(f"layer{stage + 1}", layer)
        self.bn = nn.BatchNorm2d(features) if final_norm else None
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        if self.bn is not None:
            x = self.bn(x).relu()
        return self.fc(x.mean(dim=(2, 3)))


def build(name, classes, channels, **arguments):
    """The torch module of the same name and arguments as `jc.models.create` takes."""
    if name.startswith("wide_resnet"):
        depth, width = map(int, name.split("_")[2:])
        defaults = {"blocks": ((depth - 4) // 6,) * 3, "width": 16 * width, "stem_width": 16}
        return PreActResNet(classes, channels, final_norm=True, **(defaults | arguments))
    defaults = {
        "resnet18": {"blocks": (2, 2, 2, 2)},
        "resnet50": {"blocks": (3, 4, 6, 3), "bottleneck": True},
        "preact_resnet18": {"blocks": (2, 2, 2, 2)},
    }[name]
    family = PreActResNet if name.startswith("preact") else ResNet
    return family(classes, channels, **(defaults | arguments))


def perturb(model):
    """Off their initial values, scales, biases and statistics that are mixed up show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


@torch.no_grad()
def main():
    arrays = {}
    for number, (case, spec) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = build(spec["name"], 4, spec["input_shape"][-1], **spec["arguments"]).eval()
        perturb(model)
        x = torch.rand(5, *spec["input_shape"])
        normalised = (x - torch.tensor(spec["mean"])) / torch.tensor(spec["std"])
        nchw = normalised.permute(0, 3, 1, 2)

        # num_batches_tracked plays no role with a fixed momentum.
        def state(model=model):
            tensors = model.state_dict().items()
            return {k: v.numpy().copy() for k, v in tensors if "num_batches" not in k}

        before = state()
        arrays[f"{case}/spec"] = np.array(json.dumps(spec | {"num_classes": 4}))
        arrays[f"{case}/x"] = x.numpy()
        arrays[f"{case}/logits"] = model(nchw).numpy()
        arrays[f"{case}/train_logits"] = model.train()(nchw).numpy()
        after = state()
        arrays |= {f"{case}/weights/{name}": value for name, value in before.items()}
        arrays |= {f"{case}/after/{name}": v for name, v in after.items() if "running" in name}
    np.savez_compressed(REFERENCE, **arrays)
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
