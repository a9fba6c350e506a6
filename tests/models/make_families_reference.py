"""PyTorch's side of test_families_parity.py: writes families_reference.npz beside this file.

Run it where torch is installed: `python tests/models/make_families_reference.py`. The modules name
their layers as the usual CIFAR VGG, and torchvision's DenseNet and AlexNet do.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from make_torch_reference import conv, perturb
from torch import nn

REFERENCE = Path(__file__).with_name("families_reference.npz")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class VGG(nn.Module):
    """Flattens, as the usual one: its images must leave a single pixel."""

    def __init__(self, classes, blocks, width, batch_norm=True):
        super().__init__()
        layers, inputs = [], 3
        for stage, count in enumerate(blocks):
            for _ in range(count):
                outputs = width * [1, 2, 4, 8, 8][stage]
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
                layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
                layers += [nn.ReLU()]
                inputs = outputs
            layers += [nn.MaxPool2d(2, 2)]
        self.features = nn.Sequential(*layers, nn.AvgPool2d(1, 1))
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = conv(4 * growth, growth, 3)

    def forward(self, x):
        y = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
        return torch.cat((x, y), dim=1)


class DenseNet(nn.Module):
    def __init__(self, classes, blocks, growth, stem="cifar"):
        super().__init__()
        features, parts = 2 * growth, OrderedDict()
        if stem == "cifar":
            parts["conv0"] = conv(3, features, 3)
        else:
            parts["conv0"] = conv(3, features, 7, 2)
            parts["norm0"] = nn.BatchNorm2d(features)
            parts["relu0"] = nn.ReLU()
            parts["pool0"] = nn.MaxPool2d(3, 2, 1)
        for stage, count in enumerate(blocks, start=1):
            layers = OrderedDict()
            for number in range(1, count + 1):
                layers[f"denselayer{number}"] = DenseLayer(features, growth)
                features += growth
            parts[f"denseblock{stage}"] = nn.Sequential(layers)
            if stage < len(blocks):
                parts[f"transition{stage}"] = nn.Sequential(
                    OrderedDict(
                        norm=nn.BatchNorm2d(features),
                        relu=nn.ReLU(),
                        conv=conv(features, features // 2, 1),
                        pool=nn.AvgPool2d(2, 2),
                    )
                )
                features //= 2
        parts["norm5"] = nn.BatchNorm2d(features)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x):
        return self.classifier(self.features(x).relu().mean(dim=(2, 3)))


class AlexNet(nn.Module):
    """`positions`: pixels that the convolutions leave of an image."""

    def __init__(self, classes, widths, hidden, positions, stem="cifar"):
        super().__init__()
        a, b, c, d, e = widths
        cifar = stem == "cifar"
        pool = nn.MaxPool2d(2, 2) if cifar else nn.MaxPool2d(3, 2)
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 3, 2, 1) if cifar else nn.Conv2d(3, a, 11, 4, 2),
            nn.ReLU(),
            pool,
            nn.Conv2d(a, b, 3, padding=1) if cifar else nn.Conv2d(a, b, 5, padding=2),
            nn.ReLU(),
            pool,
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, d, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(d, e, 3, padding=1),
            nn.ReLU(),
            pool,
        )
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(e * positions, hidden[0]),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], classes),
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


# The module, the images' height and width, and the name and arguments with which from_torch takes
# its state_dict: those that the shapes do not tell.
CASES = {
    "vgg": (lambda: VGG(4, (1, 2, 1, 1, 1), 2), (32, 32), "vgg11", {"blocks": (1, 2, 1, 1, 1)}),
    "vgg_without_norm": (
        lambda: VGG(4, (2, 1), 3, batch_norm=False),
        (4, 4),
        "vgg16",
        {"blocks": (2, 1)},
    ),
    "densenet": (lambda: DenseNet(4, (2, 1, 1), 3), (9, 8), "densenet121", {"blocks": (2, 1, 1)}),
    "densenet_imagenet": (
        lambda: DenseNet(4, (1, 2), 2, stem="imagenet"),
        (19, 22),
        "densenet121",
        {"blocks": (1, 2)},
    ),
    "alexnet": (lambda: AlexNet(4, (3, 4, 5, 4, 3), (7, 6), 6), (32, 48), "alexnet", {}),
    "alexnet_imagenet": (
        lambda: AlexNet(4, (2, 3, 2, 3, 2), (5, 6), 2, stem="imagenet"),
        (64, 96),
        "alexnet",
        {},
    ),
}


@torch.no_grad()
def main():
    arrays = {}
    for number, (case, (make, size, name, arguments)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        model = make().eval()
        perturb(model)
        x = torch.randint(0, 5, (3, *size, 3)) / 4  # five levels take little space in a file
        nchw = ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        call = {"name": name, "input_shape": (*size, 3), "mean": MEAN, "std": STD}
        arrays[f"{case}/call"] = np.array(json.dumps(call | arguments))
        arrays[f"{case}/x"] = x.numpy()
        arrays[f"{case}/logits"] = model(nchw).numpy()
        arrays |= {f"{case}/weights/{k}": v.numpy().copy() for k, v in model.state_dict().items()}
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            arrays[f"{case}/train_logits"] = model.train()(nchw).numpy()
            arrays |= {f"{case}/after/{k}": v.numpy() for k, v in model.state_dict().items()}
    np.savez_compressed(REFERENCE, **arrays)
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
