"""Models from PyTorch's weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jaxclus.models._classifier import Classifier
from jaxclus.models._create import ModelSpec, family_of, spec_of
from jaxclus.models._torch_arguments import inferred
from jaxclus.models._torch_names import Naming, naming_of

_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "net", "network", "model")
_PREFIXES = ("module", "model", "net", "network", "_orig_mod")
_NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
_SHOWN = 5  # names of a kind that an error lists
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO -> OIHW, [in, out] -> [out, in]
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def from_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    name: str,
    *,
    mean: Sequence[float] | ArrayLike | None = None,
    std: Sequence[float] | ArrayLike | None = None,
    input_shape: Sequence[int] | None = None,
    **arguments: Any,
) -> Classifier:
    """A network with the weights and statistics of a PyTorch one, in eval mode.

    Names are those of torchvision's and the usual CIFAR ResNets and PreActResNets, of TRADES' wide
    ResNets and of DeepMind's (arXiv 2010.03593) networks, hence of most ResNets, PreActResNets and
    WideResNets in RobustBench (arXiv 2010.09670); of the usual CIFAR VGGs, and of torchvision's
    DenseNets and AlexNet, which the usual CIFAR AlexNet has too. Ignored are `num_batches_tracked`,
    wrappers such as `{"state_dict": ...}`, prefixes such as `module.`, and the `sub_block1` of
    TRADES' networks, which these never run. Some things do not show in a file:

    - The usual PreActResNet-18 gives its shortcuts the activated input, but RobustBench's
      Wong2020Fast, Andriushchenko2020Understanding and, for CIFAR-100, Rice2020Overfitting the
      raw one: pass `shortcut_input="raw"` for these.
    - An AlexNet's images: pass `input_shape` where they have not the usual size.
    - DeepMind's networks have ReLU or, as all of RobustBench's, SiLU, and normalise in their code:
      `activation="silu"`, mean and std (for CIFAR-10 0.4914, 0.4822, 0.4465 and 0.2471, 0.2435,
      0.2616) must be given, unless the file has these as buffers.

    Not read are VGGs with three dense layers (torchvision's), and DenseNets that put new maps
    before old ones (the usual CIFAR ones in PyTorch): these are other networks than ours.

    Args:
        source: a mapping of names to NumPy arrays or tensors; or a .safetensors file; or another
            file, which torch.load reads with weights_only=True.
        name: one of `jc.models.names()`, except "cnn" and the Lipschitz ones. It fixes the number
            of blocks; classes, channels, ImageNet's stem, BatchNorms of a VGG, a PreActResNet's
            last one and, but for wide ResNets, the widths are read off the arrays.
        mean: one number for each channel on the [0, 1] pixel scale, for networks whose
            normalisation is in their code; buffers called mean and std, or mu and sigma, are used.
        std: one number above 0 for each channel, likewise.
        input_shape: (h, w, c) of the images; default 32 x 32, with ImageNet's stem 224 x 224.
        **arguments: the family's own, as for `jc.models.create`.

    Returns:
        The model; `spec` says how to build it. Its arrays are copies, in float32.

    Raises:
        ValueError: if the name is not known; arrays are missing, left over or misshaped (the first
            five of each are listed); the file's normalisation is not the given one; the network is
            one of DeepMind's and something of the above is not given; or the file cannot be read.
        FileNotFoundError: if there is no such file.
        ImportError: if the file is PyTorch's, and PyTorch is not installed.
    """
    family, defaults = family_of(name)
    arrays = _unwrapped(source if isinstance(source, Mapping) else _read(Path(source)))
    arrays, constants = _without_normalisation(_by_plain_name(arrays))
    naming = naming_of(name, arrays)
    given = arguments | {"mean": mean, "std": std} | constants
    for argument in naming.untold:
        if given.get(argument) is None:
            raise ValueError(
                f"`{argument}` must be given for DeepMind's networks, as this file does not tell it"
            )
    arrays = {key: value for key, value in arrays.items() if not key.startswith(naming.ignored)}
    shapes = {key: tuple(value.shape) for key, value in arrays.items()}
    blocks = arguments.get("blocks", defaults.get("blocks", ()))

    def size(axis: int, *path: Any) -> int | None:
        shape = shapes.get(naming.name(path, blocks, shapes), ())
        return shape[axis] if axis < len(shape) else None

    # What cannot be read is missing or misshaped, which `_filled` reports whatever stands here.
    arguments = inferred(family, defaults, size) | dict(naming.arguments) | arguments
    if input_shape is None:
        side = 224 if arguments.get("stem") == "imagenet" else 32
        input_shape = (side, side, size(1, *naming.first, "kernel") or 3)
    mean, std = _normalisation(constants, mean, std, input_shape[-1])
    classes = size(0, "head", "kernel") or 1
    spec = spec_of(name, classes, input_shape, mean, std, jnp.float32, arguments)
    return _filled(spec, arrays, shapes, naming, blocks)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"`source` must be a file of weights, found no {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"`source` must be a safetensors file, got {path}: {error}") from error
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f'reading {path} needs PyTorch: pip install "jaxclus[torch]" '
            "(a .safetensors file or a dict of NumPy arrays does not)"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load names no exceptions: it raises what it stumbles over
        raise ValueError(
            "`source` must be a file that torch.load(weights_only=True) reads: tensors in dicts, "
            f"no pickled modules or other objects; got {path} ({type(error).__name__})"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"`source` must hold a state_dict, got {type(content)} in {path}")
    return content


def _unwrapped(tree: Mapping[Any, Any]) -> Mapping[Any, Any]:
    inner = [key for key in _WRAPPERS if isinstance(tree.get(key), Mapping)]
    if len(inner) > 1:
        raise ValueError(
            f"`source` must hold the weights of one network, got {' and '.join(inner)}: "
            "pass the right one of them"
        )
    return _unwrapped(tree[inner[0]]) if inner else tree


def _by_plain_name(arrays: Mapping[Any, Any]) -> dict[str, Any]:
    """The arrays by their names without prefixes, all without the counts of batches."""
    plain: dict[str, Any] = {}
    for name, value in arrays.items():
        if not (isinstance(name, str) and hasattr(value, "shape")):
            raise ValueError(
                "`source` must map names to arrays, as it is or under one of "
                f"{', '.join(_WRAPPERS)}; got {type(value)} at {name!r}"
            )
        *parents, leaf = name.split(".")
        while parents and (parents[0] in _PREFIXES or parents[0].isdigit()):
            parents = parents[1:]
        short = ".".join([*parents, leaf])
        if short in plain:
            raise ValueError(f"`source` must hold each array once, got {short} also as {name}")
        if leaf != "num_batches_tracked":
            plain[short] = value
    return plain


def _without_normalisation(
    arrays: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The arrays without the constants of a normalisation, and these as "mean" and "std"."""
    rest, constants = {}, {}
    for name, value in arrays.items():
        kind = _NORMALISATION.get(name.split(".")[-1])
        if kind is None:
            rest[name] = value
        elif kind in constants:
            raise ValueError(f"`source` must hold one {kind} to normalise with, got also {name}")
        else:
            constants[kind] = np.ravel(_numpy(value))
    return rest, constants


def _normalisation(
    constants: Mapping[str, np.ndarray], mean: Any, std: Any, channels: int
) -> tuple[Any, Any]:
    """Mean and std: those of the file, else those given; raises where they are not the same."""
    chosen = {"mean": mean, "std": std}
    for kind, stored in constants.items():
        stored = np.repeat(stored, channels) if stored.size == 1 else stored
        given = chosen[kind]
        if given is not None and not (
            np.shape(given) == stored.shape and np.allclose(given, stored, rtol=1e-5, atol=0)
        ):
            raise ValueError(
                f"`{kind}` must be left out or as in the file, {stored.tolist()}, got {given}"
            )
        chosen[kind] = stored
    for kind, value in chosen.items():
        if constants and value is None:
            raise ValueError(
                f"`{kind}` must be given, as the file holds only {', '.join(constants)}"
            )
    return chosen["mean"], chosen["std"]


def _filled(
    spec: ModelSpec,
    arrays: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    naming: Naming,
    blocks: Sequence[int],
) -> Classifier:
    """The model of a record with the arrays, all of which must fit."""
    graph, state = nnx.split(spec.abstract())
    template = nnx.to_pure_dict(state)
    names, expected = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(template):
        name = names[path] = naming.name([entry.key for entry in path], blocks, arrays)
        expected[name] = tuple(leaf.shape[axis] for axis in _TO_TORCH[len(leaf.shape)])
    _check_fit(spec.name, expected, shapes)

    def value_at(path: Any, _: Any) -> jax.Array:
        value = _numpy(arrays[names[path]])
        # A copy: jnp.asarray may share the memory of an array that its owner goes on training.
        return jnp.array(value.transpose(_FROM_TORCH[value.ndim]))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(value_at, template))


def _check_fit(
    network: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises one error that lists the arrays that are missing, left over and misshaped."""
    misshaped = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in sorted(expected)
        if name in found and found[name] != expected[name]
    ]
    problems = {
        "missing": [name for name in sorted(expected) if name not in found],
        "left over": [name for name in found if name not in expected],
        "misshaped": misshaped,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_shown(each)}" for kind, each in problems.items() if each)
        raise ValueError(f"`source` must hold the arrays of {network}; {listed}")


def _shown(entries: Sequence[str]) -> str:
    more = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _numpy(value: Any) -> np.ndarray:
    """A float32 array of NumPy, of any array or tensor; NumPy has no bfloat16 of torch's."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)
