"""Implicit weight of a linear sub-network against the published procedure in PyTorch: same run.

    python -m benchmarks.linearize              # writes benchmarks/results/linearize.json
    python -m benchmarks.linearize --calls 50   # times 50 of the peer's 1280 calls, extrapolates

Needs torch (`pip install "jaxclus[bench]"`). Both sides get the same weights of a CIFAR ResNet-8 of
width 16: 3x3 stem, stages of 16, 32 and 64 channels with one basic block each, 1x1 shortcuts,
average pool, linear layer, no BatchNorm. The published procedure (Bai et al., 2021,
arXiv:2111.12922) copies the weights into a network written without activations and calls
`logits[i, j].backward(retain_graph=True)` once for each of 128 images and 10 classes; gradients of
the weights, which nobody reads, are switched off here, in the peer's favour. jaxclus gets the
network with its ReLUs. Since the network is affine, 10 calls for one image are enough: timed too.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import jaxclus as jc
from jaxclus import runs
from jaxclus.linear import implicit_weight, linearize

BATCH, CLASSES, SIZE = 128, 10, 32
TOTAL = BATCH * CLASSES
#: Name of each stage, its input and output channels, and its stride.
STAGES = (("stage0", 16, 16, 1), ("stage1", 16, 32, 2), ("stage2", 32, 64, 2))

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time the implicit weight of a ResNet-8, ours and as published."""

    calls: int = TOTAL
    """Backward calls of the peer to time, from 10 (one image) to 1280 (all)."""
    seed: int = 0
    """Seed of weights and images."""
    output: Path = Path("benchmarks/results")
    """Directory for the result."""

    def __post_init__(self) -> None:
        if not CLASSES <= self.calls <= TOTAL:
            raise ValueError(f"`calls` must be in [{CLASSES}, {TOTAL}], got {self.calls}")

    def run(self) -> None:
        """Measures, prints the times, writes the result."""
        import torch

        rng = np.random.default_rng(self.seed)
        weights = random_weights(rng)
        images = rng.random((BATCH, SIZE, SIZE, 3), dtype=np.float32)
        ours, compiling, seconds = time_ours(weights)
        theirs, timed = time_published(weights, images, self.calls)
        published = timed * TOTAL / self.calls
        _, one_image = time_published(weights, images[:1], CLASSES)
        difference = np.abs(jc.clustering.correlation(ours) - jc.clustering.correlation(theirs))
        note = f" (EXTRAPOLATED from {self.calls} calls)" if self.calls < TOTAL else ""
        print(f"published procedure, PyTorch: {published:.2f} s, {TOTAL} backward calls{note}")
        print(f"least that PyTorch needs: {one_image:.4f} s, {CLASSES} calls for 1 image")
        print(f"jaxclus: {compiling:.2f} s with compilation, {seconds:.4f} s after that")
        print(f"ratio: {published / compiling:.1f}, {published / seconds:.0f} after that{note}")
        print(f"max |C_ours - C_theirs|: {difference.max():.2e}")
        runs.write_json(
            self.output / "linearize.json",
            {
                "what": "implicit weight, ResNet-8 of width 16, 32x32x3, 10 classes",
                "peer": f"PyTorch, a backward call for each of {BATCH} images x {CLASSES} classes",
                "peer_calls_timed": self.calls,
                "peer_extrapolated": self.calls < TOTAL,
                "peer_seconds": published,
                "peer_one_image_seconds": one_image,
                "seconds_with_compilation": compiling,
                "seconds": seconds,
                "ratio_with_compilation": published / compiling,
                "ratio": published / seconds,
                "max_difference_correlation": float(difference.max()),
                "max_difference_weight": float(np.abs(ours - theirs).max()),
                "max_weight": float(np.abs(theirs).max()),
                "seed": self.seed,
                "torch": torch.__version__,
                "torch_threads": torch.get_num_threads(),
                **runs.environment(),
            },
        )


def random_weights(rng: np.random.Generator) -> Weights:
    """He-initialised kernels [height, width, in, out], and the linear layer."""

    def kernel(size: int, before: int, after: int) -> np.ndarray:
        return rng.normal(0, np.sqrt(2 / (size**2 * before)), (size, size, before, after))

    weights = {"stem": kernel(3, 3, 16)}
    for stage, before, after, _ in STAGES:
        weights[f"{stage}.conv1"] = kernel(3, before, after)
        weights[f"{stage}.conv2"] = kernel(3, after, after)
        weights[f"{stage}.shortcut"] = kernel(1, before, after)
    weights["head"] = rng.normal(0, 1 / 8, (64, CLASSES))
    weights["bias"] = rng.normal(0, 1 / 8, (1, CLASSES))
    return {name: array.astype(np.float32) for name, array in weights.items()}


def predict(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """The ResNet-8 with its ReLUs: images [b, h, w, c] -> logits [b, k]."""

    def conv(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        pad = weights[name].shape[0] // 2
        return jax.lax.conv_general_dilated(
            x, weights[name], (stride, stride), [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x = jax.nn.relu(conv("stem", images))
    for stage, _, _, stride in STAGES:
        y = conv(f"{stage}.conv2", jax.nn.relu(conv(f"{stage}.conv1", x, stride)))
        x = jax.nn.relu(y + conv(f"{stage}.shortcut", x, stride))
    return x.mean((1, 2)) @ weights["head"] + weights["bias"]


def time_ours(weights: Weights) -> tuple[np.ndarray, float, float]:
    """W [k, h, w, c], seconds of the first call with compilation, seconds of the second."""
    model = jax.tree_util.Partial(predict, jax.tree.map(jax.numpy.asarray, weights))
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        weight = np.asarray(implicit_weight(linearize(model), (SIZE, SIZE, 3)).weight)
        seconds.append(time.perf_counter() - begin)
    return weight, *seconds


def time_published(weights: Weights, images: np.ndarray, calls: int) -> tuple[np.ndarray, float]:
    """W [k, h, w, c] read off the first image, and the seconds of the first `calls` calls."""
    import torch

    tensors = {
        name: torch.from_numpy(array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array)
        for name, array in weights.items()
    }

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        kernel = tensors[name]
        return torch.nn.functional.conv2d(x, kernel, None, stride, kernel.shape[2] // 2)

    def linear_logits(x: torch.Tensor) -> torch.Tensor:
        x = conv("stem", x)
        for stage, _, _, stride in STAGES:
            y = conv(f"{stage}.conv2", conv(f"{stage}.conv1", x, stride))
            x = y + conv(f"{stage}.shortcut", x, stride)
        return x.mean((2, 3)) @ tensors["head"] + tensors["bias"]

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    gradients = torch.zeros(len(images), CLASSES, 3, SIZE, SIZE)
    begin = time.perf_counter()
    logits = linear_logits(x)
    for call in range(calls):
        i, j = divmod(call, CLASSES)
        x.grad = None
        logits[i, j].backward(retain_graph=True)
        assert x.grad is not None
        gradients[i, j] = x.grad[i]
    seconds = time.perf_counter() - begin
    return gradients[0].numpy().transpose(0, 2, 3, 1), seconds


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
