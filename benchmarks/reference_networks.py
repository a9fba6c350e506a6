"""Small published networks as lists of layers, in JAX and, the same weights, in PyTorch.

A network is an .npz of arrays and a JSON text `meta` that says how they follow each other: first
(pixel - mean) / std, then "conv" [stride, padding, HWIO weight, bias], "dense" [weight, bias],
"relu", "maxpool" (2 x 2) and "flatten" ("chw" or "hwc": the order of the flattened vector).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus.models import _ops


def read(path: Path | str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `meta` says, and the arrays by name."""
    with np.load(path, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved.files if name != "meta"}
        return json.loads(str(saved["meta"])), arrays


def load(path: Path | str) -> jax.tree_util.Partial:
    """The network as a classifier, a pytree: images [b, h, w, c] in [0, 1] -> logits [b, k]."""
    meta, arrays = read(path)
    layers = json.dumps([meta["mean"], meta["std"], meta["layers"]])
    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    return jax.tree_util.Partial(_Predict(layers), weights)


class _Predict:
    """The function of a list of layers; equal for equal lists, so that programs are shared."""

    def __init__(self, text: str):
        self.text = text

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Predict) and other.text == self.text

    def __call__(self, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        mean, std, layers = json.loads(self.text)
        # For every pixel: XLA's CPU backend is slow with patterns that repeat after 3 numbers.
        mean, std = (np.broadcast_to(np.float32(each), x.shape[1:])[None] for each in (mean, std))
        x = (x - mean) / std
        for kind, *values in layers:
            x = _apply(kind, values, weights, x)
        return x


def _apply(kind: str, values: list, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    if kind == "conv":
        stride, padding, kernel, bias = values
        padding = [tuple(sides) for sides in padding]
        x = _ops.conv_general_dilated(
            x, weights[kernel], (stride, stride), padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return x + weights[bias][None, None, None]
    if kind == "dense":
        weight = weights[values[0]]
        if x.ndim == 4:  # to be flattened by channels: the weight takes the new order, not x
            _, h, w, c = x.shape
            weight = weight.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(h * w * c, -1)
            x = x.reshape(-1, h * w * c)
        return x @ weight + weights[values[1]][None]
    if kind == "relu":
        return jax.nn.relu(x)  # not `jnp.maximum`, whose derivative at 0 is 1 / 2
    if kind == "maxpool":
        return _ops.max_pool(x, (2, 2), (2, 2), ((0, 0), (0, 0)))
    if kind == "flatten":
        return x if values[0] == "chw" else x.reshape(x.shape[0], -1)
    raise ValueError(f"`meta` must hold known layers, got {kind!r}")


def load_torch(path: Path | str) -> Callable[[Any], Any]:
    """The network in PyTorch, a module in eval mode: images [b, c, h, w] -> logits [b, k]."""
    import torch
    from torch import nn

    meta, arrays = read(path)

    def tensor(name: str, axes: tuple[int, ...] | None = None) -> Any:
        array = arrays[name] if axes is None else arrays[name].transpose(axes)
        return torch.tensor(np.ascontiguousarray(array))

    class Flatten(nn.Module):
        def __init__(self, order: str):
            super().__init__()
            self.order = order

        def forward(self, x):
            return (x if self.order == "chw" else x.permute(0, 2, 3, 1)).flatten(1)

    class Normalize(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("mean", "std"):
                value = torch.tensor(meta[name], dtype=torch.float32).view(1, -1, 1, 1)
                self.register_buffer(name, value)

        def forward(self, x):
            return (x - self.mean) / self.std

    def layer(kind: str, *values: Any) -> Any:
        if kind == "conv":
            stride, ((top, bottom), (left, right)), kernel, bias = values
            if (top, left) != (bottom, right):
                raise ValueError("PyTorch's convolution pads both sides alike")
            weight = tensor(kernel, (3, 2, 0, 1))
            made = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
            made.stride, made.padding = (stride, stride), (top, left)
        elif kind == "dense":
            weight, bias = tensor(values[0], (1, 0)), values[1]
            made = nn.Linear(weight.shape[1], weight.shape[0])
        else:
            return {"relu": nn.ReLU, "maxpool": lambda: nn.MaxPool2d(2), "flatten": Flatten}[kind](
                *values
            )
        made.weight, made.bias = nn.Parameter(weight), nn.Parameter(tensor(bias))
        return made

    net = nn.Sequential(Normalize(), *(layer(*entry) for entry in meta["layers"])).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net
