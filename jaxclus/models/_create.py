"""Models by name, and the record from which a model can be built again."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxclus import _checks
from jaxclus.models._alexnet import AlexNet
from jaxclus.models._classifier import Classifier
from jaxclus.models._cnn import CNN
from jaxclus.models._densenet import DenseNet
from jaxclus.models._layers import Conv, Linear, uniform_bound
from jaxclus.models._lipschitz_resnet import LipschitzResNet
from jaxclus.models._preact_resnet import PreActResNet
from jaxclus.models._rescaled import RescaledConv, RescaledLinear
from jaxclus.models._resnet import ResNet
from jaxclus.models._vgg import VGG

_Network = (
    type[CNN]
    | type[ResNet]
    | type[PreActResNet]
    | type[VGG]
    | type[DenseNet]
    | type[AlexNet]
    | type[LipschitzResNet]
)
# The class and the arguments that a name stands for.
_Family = tuple[_Network, dict[str, Any]]
_FAMILIES: dict[str, _Family] = {
    "cnn": (CNN, {}),
    "resnet8": (ResNet, {"blocks": (1, 1, 1), "width": 16}),
    "resnet20": (ResNet, {"blocks": (3, 3, 3), "width": 16}),
    "resnet18": (ResNet, {"blocks": (2, 2, 2, 2)}),
    "resnet34": (ResNet, {"blocks": (3, 4, 6, 3)}),
    "resnet50": (ResNet, {"blocks": (3, 4, 6, 3), "bottleneck": True}),
    "preact_resnet18": (PreActResNet, {"blocks": (2, 2, 2, 2)}),
    "vgg11": (VGG, {"blocks": (1, 1, 2, 2, 2)}),
    "vgg13": (VGG, {"blocks": (2, 2, 2, 2, 2)}),
    "vgg16": (VGG, {"blocks": (2, 2, 3, 3, 3)}),
    "vgg19": (VGG, {"blocks": (2, 2, 4, 4, 4)}),
    "densenet121": (DenseNet, {"blocks": (6, 12, 24, 16)}),
    "alexnet": (AlexNet, {}),
    "lipschitz_resnet8": (LipschitzResNet, {"blocks": (1, 1, 1), "width": 16}),
    "lipschitz_resnet18": (LipschitzResNet, {"blocks": (2, 2, 2, 2)}),
}
_WIDE_RESNET = re.compile(r"wide_resnet_(\d+)_(\d+)")
_COMMON = {"self", "num_classes", "input_shape", "mean", "std", "dtype", "rngs"}
_EMBEDDING = "embedding_size"  # what every family takes beside its own arguments


def names() -> tuple[str, ...]:
    """The names that `create` knows; DEPTH is 10, 16, 22, 28, ..., WIDTH 1, 2, ...."""
    return (*_FAMILIES, "wide_resnet_DEPTH_WIDTH")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights of a model that `create` makes; hashable and JSON-able.

    Args:
        name: one of `jc.models.names()`.
        num_classes: k, the number of logits, at least 1.
        input_shape: (h, w, c) of the images, each at least 1.
        mean: one number for each channel, subtracted from the images, or None for 0.
        std: one number above 0 for each channel, divided by, or None for 1.
        dtype: type of the computation, "float32" or "bfloat16".
        arguments: the family's own arguments that were given, and `embedding_size`, as
            (name, value) sorted by name.

    Raises:
        ValueError, TypeError: if an argument is not as said.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "float32"
    arguments: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        _checks.at_least("num_classes", self.num_classes, 1)
        if not (isinstance(self.input_shape, tuple) and len(self.input_shape) == 3):
            raise ValueError(f"`input_shape` must be (h, w, c), got {self.input_shape!r}")
        for size in self.input_shape:
            _checks.at_least("input_shape", size, 1)
        _check_channels("mean", self.mean, self.input_shape[-1])
        _check_channels("std", self.std, self.input_shape[-1])
        for value in self.std or ():
            _checks.positive("std", value)
        _checks.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        family, _ = family_of(self.name)
        allowed = set(inspect.signature(family.__init__).parameters) - _COMMON | {_EMBEDDING}
        for argument, value in self.arguments:
            if argument == _EMBEDDING:
                _checks.at_least(_EMBEDDING, value, 1)
            if argument not in allowed:
                raise TypeError(
                    f"`{argument}` is no argument of {self.name}, which takes "
                    f"{', '.join(sorted(allowed))}"
                )

    def build(self, key: jax.Array) -> Classifier:
        """A model with fresh weights, in eval mode; the same key gives the same weights.

        Args:
            key: typed PRNG key.
        """
        return _initialise(self, _checks.typed_key("key", key))

    def abstract(self) -> Classifier:
        """The model with `jax.ShapeDtypeStruct`s for weights: a template for restoring; no work."""
        return nnx.eval_shape(lambda: _construct(self))

    def to_json(self) -> dict[str, Any]:
        """The spec as a dict of strings, numbers, lists and dicts."""
        return dataclasses.asdict(self) | {
            "input_shape": list(self.input_shape),
            "mean": self.mean and list(self.mean),
            "std": self.std and list(self.std),
            "arguments": {name: _thawed(value) for name, value in self.arguments},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """The spec that `to_json` gave as `values`, also after a round trip through JSON text."""
        fields = {name: _frozen(value) for name, value in values.items() if name != "arguments"}
        return cls(**fields, arguments=_sorted_items(values["arguments"]))


def create(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    key: jax.Array,
    *,
    mean: Sequence[float] | ArrayLike | None = None,
    std: Sequence[float] | ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
    **arguments: Any,
) -> Classifier:
    """A freshly initialised model in eval mode; `model.spec` says how to build it again.

    Args:
        name: one of `jc.models.names()`.
        num_classes: k, the number of logits, at least 1.
        input_shape: (h, w, c) of the images, for example (32, 32, 3).
        key: typed PRNG key; the same key gives the same weights.
        mean: one number for each channel on the [0, 1] pixel scale; the model subtracts it.
        std: one number above 0 for each channel; the model divides by it.
        dtype: float32, or bfloat16 for faster training on accelerators; parameters, statistics,
            pooled features and logits are float32 always.
        **arguments: the family's own, for example `activation="silu"` or `width=16`; and for every
            family `embedding_size`, the d of a dense layer without activation before the head, as
            prototypes want it (of a LipschitzResNet a rescaled one). Without, features are what
            comes after the last activation.

    Returns:
        A classifier: images [b, h, w, c] in [0, 1] -> float32 logits [b, k].

    Raises:
        ValueError, TypeError: if an argument is not as said; an unknown name lists the known ones.
    """
    spec = spec_of(name, num_classes, input_shape, mean, std, dtype, arguments)
    return spec.build(key)


def spec_of(
    name: str,
    num_classes: int,
    input_shape: Sequence[int],
    mean: Sequence[float] | ArrayLike | None,
    std: Sequence[float] | ArrayLike | None,
    dtype: DTypeLike,
    arguments: Mapping[str, Any],
) -> ModelSpec:
    """The record of the model that `create` makes of these arguments."""
    return ModelSpec(
        name=name,
        num_classes=_frozen(num_classes),
        input_shape=_frozen(input_shape),
        mean=_frozen(mean),
        std=_frozen(std),
        dtype=jnp.dtype(dtype).name,
        arguments=_sorted_items(arguments),
    )


def family_of(name: str) -> _Family:
    """The class that `name` stands for, and its arguments; an unknown name lists the known ones."""
    if name in _FAMILIES:
        return _FAMILIES[name]
    match = _WIDE_RESNET.fullmatch(name)
    depth, width = map(int, match.groups()) if match else (0, 0)
    if depth < 10 or depth % 6 != 4 or width < 1:
        raise ValueError(f"`name` must be one of {', '.join(names())}; got {name!r}")
    blocks = ((depth - 4) // 6,) * 3
    return PreActResNet, {
        "blocks": blocks,
        "width": 16 * width,
        "stem_width": 16,
        "final_norm": True,
    }


def _construct(spec: ModelSpec) -> Classifier:
    family, defaults = family_of(spec.name)
    arguments, rngs = defaults | dict(spec.arguments), nnx.Rngs(0)
    embedding_size = arguments.pop(_EMBEDDING, None)
    model = family(
        spec.num_classes,
        spec.input_shape,
        mean=spec.mean,
        std=spec.std,
        dtype=jnp.dtype(spec.dtype),
        rngs=rngs,
        **arguments,
    )
    if embedding_size is not None:
        model._add_embedding(embedding_size, rngs)
    model.spec = spec
    return model


@functools.partial(jax.jit, static_argnums=0)
def _initialise(spec: ModelSpec, key: jax.Array) -> Classifier:
    """The model with weights from one draw.

    Drawing layer by layer has the same distribution, but XLA takes 0.2 s to compile each draw (15 s
    for a ResNet). Here the layers' own draws are overwritten, hence never compiled.
    """
    model = _construct(spec)
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, (Conv, Linear))]
    weights = [(layer, w) for layer in layers for w in (layer.kernel, layer.bias) if w is not None]
    draws = jax.random.uniform(key, (sum(w.size for _, w in weights),), minval=-1.0, maxval=1.0)
    start = 0
    for layer, weight in weights:
        drawn = draws[start : start + weight.size].reshape(weight.shape)
        weight[...] = _initial(layer, drawn, weight is layer.kernel)
        start += weight.size
    return model


def _initial(layer: Conv | Linear, draws: jax.Array, is_kernel: bool) -> jax.Array:
    """The layer's kernel or bias to start with, from draws in [-1, 1]."""
    if is_kernel and isinstance(layer, (RescaledConv, RescaledLinear)):
        return layer.initial_kernel(draws)
    gain = layer.gain if is_kernel else 1.0
    return draws * (gain * uniform_bound(layer.kernel.shape))


def _check_channels(name: str, values: tuple[float, ...] | None, channels: int) -> None:
    if values is None:
        return
    if not (
        isinstance(values, tuple) and len(values) == channels and all(map(np.isfinite, values))
    ):
        raise ValueError(
            f"`{name}` must be {channels} finite numbers, one for each channel, got {values!r}"
        )


def _sorted_items(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _frozen(arguments[name])) for name in sorted(arguments))


def _frozen(value: Any) -> Any:
    """The value with hashable tuples for lists and arrays, and Python's numbers for NumPy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value
