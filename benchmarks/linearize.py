"""Implicit weight of a linear sub-network: jaxclus against the published procedure in PyTorch.

    python benchmarks/linearize.py --output benchmarks/results/linearize.json

Both sides get the same network with the same weights, in the same run: a CIFAR ResNet-8 of width
16 (3x3 stem, stages of 16, 32 and 64 channels with one basic block each, 1x1 shortcuts, average
pool, linear layer; no batch normalisation). The published procedure (Bai et al., 2021,
arXiv:2111.12922) copies the weights into a network written without activations and calls
`logits[i, j].backward(retain_graph=True)` once for each of 128 images and 10 classes; gradients
of the weights, which it does not need, are switched off here in its favour. jaxclus gets the
network with its ReLUs. Needs the extra `bench`. About 3 minutes on 2 cores.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxclus.linear import implicit_weight, linearize

BATCH, CLASSES, SIZE = 128, 10, 32
# Name, kernel size, input and output channels, stride.
CONVS = [("stem", 3, 3, 16, 1)] + [
    conv
    for stage, (before, after, stride) in enumerate([(16, 16, 1), (16, 32, 2), (32, 64, 2)])
    for conv in [
        (f"stage{stage}.conv1", 3, before, after, stride),
        (f"stage{stage}.conv2", 3, after, after, 1),
        (f"stage{stage}.shortcut", 1, before, after, stride),
    ]
]


def random_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """He-initialised kernels [height, width, in, out] and the linear layer."""
    weights = {
        name: rng.normal(0, np.sqrt(2 / (kernel**2 * before)), (kernel, kernel, before, after))
        for name, kernel, before, after, _ in CONVS
    }
    weights["head.weight"] = rng.normal(0, 1 / 8, (64, CLASSES))
    weights["head.bias"] = rng.normal(0, 1 / 8, CLASSES)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def predict(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """The ResNet-8 with its ReLUs: images [b, h, w, c] -> logits [b, k]."""
    strides = {name: stride for name, _, _, _, stride in CONVS}

    def conv(name, x):
        stride, pad = strides[name], weights[name].shape[0] // 2
        return jax.lax.conv_general_dilated(
            x, weights[name], (stride, stride), [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x = jax.nn.relu(conv("stem", images))
    for stage in ("stage0", "stage1", "stage2"):
        residual = conv(f"{stage}.conv2", jax.nn.relu(conv(f"{stage}.conv1", x)))
        x = jax.nn.relu(residual + conv(f"{stage}.shortcut", x))
    bias = weights["head.bias"]
    return x.mean((1, 2)) @ weights["head.weight"] + jnp.expand_dims(bias, 0)


def torch_logits(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The same network without ReLUs, written in PyTorch: images [b, c, h, w] -> logits [b, k]."""
    strides = {name: stride for name, _, _, _, stride in CONVS}

    def conv(name, x):
        kernel = weights[name]
        return torch.nn.functional.conv2d(x, kernel, None, strides[name], kernel.shape[2] // 2)

    x = conv("stem", images)
    for stage in ("stage0", "stage1", "stage2"):
        x = conv(f"{stage}.conv2", conv(f"{stage}.conv1", x)) + conv(f"{stage}.shortcut", x)
    return x.mean((2, 3)) @ weights["head.weight"] + weights["head.bias"]


def published(weights: dict[str, np.ndarray], images: np.ndarray, calls: int):
    """Weight [k, h, w, c] of image 0 and the seconds of the first `calls` backward calls."""
    tensors = {
        name: torch.from_numpy(array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array)
        for name, array in weights.items()
    }
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    gradients = torch.zeros(BATCH, CLASSES, 3, SIZE, SIZE)
    start = time.perf_counter()
    logits = torch_logits(tensors, x)
    for call in range(calls):
        i, j = divmod(call, CLASSES)
        x.grad = None
        logits[i, j].backward(retain_graph=True)
        gradients[i, j] = x.grad[i]
    seconds = time.perf_counter() - start
    return gradients[0].numpy().transpose(0, 2, 3, 1), seconds


def ours(weights: dict[str, np.ndarray]):
    """Weight [k, h, w, c], seconds of the first call with compilation, and of the second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        arrays = {name: jnp.asarray(array) for name, array in weights.items()}
        linear = linearize(jax.tree_util.Partial(predict, arrays))
        weight = np.asarray(implicit_weight(linear, (SIZE, SIZE, 3)).weight)
        seconds.append(time.perf_counter() - start)
    return weight, *seconds


def correlation(weight: np.ndarray) -> np.ndarray:
    rows = weight.reshape(CLASSES, -1).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    total = BATCH * CLASSES
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calls", type=int, default=total,
        help=f"backward calls of the peer to time, {CLASSES} to {total}; fewer are extrapolated",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not CLASSES <= arguments.calls <= total:
        parser.error(f"--calls must be in [{CLASSES}, {total}], got {arguments.calls}")

    rng = np.random.default_rng(arguments.seed)
    weights = random_weights(rng)
    images = rng.random((BATCH, SIZE, SIZE, 3), dtype=np.float32)
    weight, first, second = ours(weights)
    peer_weight, timed = published(weights, images, arguments.calls)
    peer = timed * total / arguments.calls
    result = {
        "network": "ResNet-8, width 16, 32x32x3, 10 classes, without batch normalisation",
        "peer": f"PyTorch, {total} backward calls for {BATCH} images x {CLASSES} classes",
        "peer_calls_timed": arguments.calls,
        "peer_extrapolated": arguments.calls < total,
        "peer_seconds": peer,
        "jaxclus_seconds_with_compilation": first,
        "jaxclus_seconds": second,
        "ratio_with_compilation": peer / first,
        "ratio": peer / second,
        "max_abs_difference_correlation": float(
            np.abs(correlation(weight) - correlation(peer_weight)).max()
        ),
        "max_abs_difference_weight": float(np.abs(weight - peer_weight).max()),
        "max_abs_weight": float(np.abs(peer_weight).max()),
        "seed": arguments.seed,
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "jax_device": jax.devices()[0].device_kind,
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    note = f" (EXTRAPOLATED from {arguments.calls} calls)" if result["peer_extrapolated"] else ""
    print(f"published procedure, PyTorch: {peer:.2f} s for {total} backward calls{note}")
    print(f"jaxclus: {first:.2f} s with compilation, {second:.4f} s after that")
    print(f"ratio: {peer / first:.1f} with compilation, {peer / second:.0f} after that{note}")
    print(f"max |C_ours - C_theirs|: {result['max_abs_difference_correlation']:.2e}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
