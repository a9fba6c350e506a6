"""Certificates over a data set: images that no attack can break, whatever it does."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxclus import (
    _checks,
    _classifier,
    _linear_head,
    clustr,
    models,
    parallel,
    prototypes,
    runs,
)
from jaxclus._classifier import Classifier
from jaxclus.data import Dataset, to_float
from jaxclus.evaluation._predict import default_microbatch, microbatches, placed
from jaxclus.evaluation._result import as_digits
from jaxclus.evaluation._robustness import _check as _check_data
from jaxclus.threat import Linf, Threat

#: The methods that `certify` knows.
METHODS = ("lipschitz", "interval")


def _of_dense(bound: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The bound of `_linear_head` as a function of the layer."""

    def of_layer(head: models.Linear, h: jax.Array, *limits: jax.Array) -> jax.Array:
        assert head.bias is not None
        return bound(head.kernel[...], head.bias[...], h, head(h).argmax(axis=1), *limits)

    return of_layer


# The radius and the margin of each kind of head.
_OF_HEADS: dict[type, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    models.Linear: (_of_dense(_linear_head.radius), _of_dense(_linear_head.margin)),
    clustr.ClusterClassifier: (clustr.certified_radius, clustr.certified_margin),
    prototypes.PrototypeHead: (prototypes.certified_radius, prototypes.certified_margin),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Certificates:
    """What `certify` found on one data set of n images.

    Attributes:
        method: "lipschitz" or "interval".
        threat: the perturbations that are certified against.
        dataset: name of the data set.
        split: name of its split.
        clean: whether each image is classified correctly, bool [n].
        certified: whether it is for every image inside the threat model too, bool [n].
        radius: radius below which no perturbation changes the class, float32 [n], in the threat's
            norm on the pixel scale; 0 where `clean` is not; None for intervals.
        lipschitz: the bound of the features' Lipschitz constant in the L2 norm, on the pixel scale;
            None for intervals.
        microbatch: images in one physical batch on each device.
        num_devices: number of devices.
    """

    method: str
    threat: Threat
    dataset: str
    split: str
    clean: np.ndarray
    certified: np.ndarray
    radius: np.ndarray | None
    lipschitz: float | None
    microbatch: int
    num_devices: int

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without attack."""
        return float(self.clean.mean())

    @property
    def certified_accuracy(self) -> float:
        """Share of images certified to be classified correctly, a lower bound under attack."""
        return float(self.certified.mean())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, the verdicts as strings of 0 and 1, infinite radii as None."""
        eps = float(self.threat.eps)
        radius = self.radius
        return {
            "method": self.method,
            "norm": self.threat.name,
            "eps": eps,
            "eps_255": eps * 255,
            "dataset": self.dataset,
            "split": self.split,
            "num_images": len(self.clean),
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": self.certified_accuracy,
            "lipschitz": self.lipschitz,
            "radius": None if radius is None else [_finite(value) for value in radius.tolist()],
            "microbatch": self.microbatch,
            "num_devices": self.num_devices,
            "clean": as_digits(self.clean),
            "certified": as_digits(self.certified),
            **runs.environment(),
        }


def certify(
    model: Classifier,
    data: Dataset,
    threat: Threat,
    *,
    method: Literal["lipschitz", "interval"] = "lipschitz",
    microbatch: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Certificates:
    """Which images no perturbation in the threat model turns: a lower bound of robust accuracy.

    "lipschitz": |h(x + d) - h(x)|_2 <= Lip |d|_2 for the features h, with Lip from
    `jc.models.lipschitz_bound`; and |d|_2 <= sqrt(h w c) |d|_inf, |d|_2 <= |d|_1. The radius is
    that of `jc.clustr.certified_radius` for clusters, of `jc.prototypes.certified_radius` for
    prototypes, and for a network's own head

        radius = min_c (z_y - z_c) / (Lip |w_y - w_c|_2),    y the predicted class.

    "interval": the box of `jc.models.interval_bounds` goes through the head, by
    `jc.clustr.certified_margin` or `jc.prototypes.certified_margin`, and for a network's own head

        min_c (w_y - w_c) . m + b_y - b_c - |w_y - w_c| . r,    m its centre, r its radius,

    must be above 0. It knows that pixels stay in [0, 1], which the other method does not.

    An image counts as certified if it is classified correctly and the class holds for all norms up
    to `threat.limit`, up to which attacks are allowed to go.

    Computed in float32 under matmul precision "highest". Both methods allow for the rounding of the
    head, and "interval" also for that of the layers, as `interval_bounds` says. "lipschitz" is a
    statement about the features in exact arithmetic: their float32 rounding, about 1e-6 of their
    size, is not covered, nor is, for either, a network run at a lower precision.

    Args:
        model: a float32 network of `jc.models` with its own head, or
            `jc.Chain(jc.models.features(network), head)` with a `jc.clustr.ClusterClassifier` or
            `jc.prototypes.PrototypeHead`.
        data: the data set.
        threat: the threat model; `jc.Linf` for intervals.
        method: how the features are bounded.
        microbatch: as for `jc.evaluation.robustness`.
        devices: default: all.

    Raises:
        TypeError: if the model is no such model, or its family or dtype is one that
            `lipschitz_bound` and `interval_bounds` do not know.
        ValueError: if model and data do not fit, the norm is not one of the method's, or the
            activations are not monotone (GELU, SiLU) where intervals need it.

    References:
        Tsuzuku, Sato, Sugiyama: Lipschitz-Margin Training, 2018, arXiv:1802.04034, section 3.1.
        Gowal et al.: On the Effectiveness of Interval Bound Propagation, 2018, arXiv:1810.12715.
    """
    _checks.one_of("method", method, METHODS)
    if not isinstance(threat, Threat):
        raise TypeError(f"`threat` must be jc.Linf, jc.L2 or jc.L1 with its eps, got {threat!r}")
    if method == "interval" and not isinstance(threat, Linf):
        raise ValueError(f'`threat` must be a jc.Linf for method="interval", got {threat!r}')
    network = _network(model)
    _check_data(model, data)
    mesh = parallel.mesh(devices)
    size = default_microbatch(mesh) if microbatch is None else microbatch
    _checks.at_least("microbatch", size, 1)
    limit, lipschitz = float(threat.limit), None
    # Pixels at the ball's edge are rounded: by less than 1e-7, as they are at most 1.
    number = limit + 1e-7
    if method == "lipschitz":
        lipschitz = models.lipschitz_bound(network, data.input_shape)
        number = lipschitz * _l2_per_unit(threat, data)
    predicted, values = _over_data(model, number, data, mesh, size, method)
    clean = predicted == data.labels
    return Certificates(
        method=method,
        threat=threat,
        dataset=data.name,
        split=data.split,
        clean=clean,
        certified=clean & (values > (limit if method == "lipschitz" else 0)),
        radius=np.where(clean, values, np.float32(0)) if method == "lipschitz" else None,
        lipschitz=lipschitz,
        microbatch=size,
        num_devices=mesh.size,
    )


def _network(model: Any) -> models.Classifier:
    """The network behind the model; raises unless its head is one of those with a certificate."""
    network, head = models.parts(model)
    head = network.head if head is None else head
    if type(head) not in _OF_HEADS:
        raise TypeError(
            "`model` must have a head that is a jc.models.Linear, a jc.clustr.ClusterClassifier or "
            f"a jc.prototypes.PrototypeHead, got one of {type(head)}"
        )
    return network


def _l2_per_unit(threat: Threat, data: Dataset) -> float:
    """The largest |d|_2 among perturbations d of norm 1."""
    return math.prod(data.input_shape) ** 0.5 if isinstance(threat, Linf) else 1.0


def _over_data(
    model: Classifier, number: float, data: Dataset, mesh: Any, size: int, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted class and the radius or margin of each image [n], as `_of_batch` gives them."""
    run, results = _bind(placed(model, mesh)), []
    rounded_up = np.nextafter(np.float32(number), np.float32(np.inf))
    scalar = jax.device_put(rounded_up, parallel.replicated(mesh))
    for rows, count in microbatches(np.arange(len(data)), size * mesh.size):
        images = jax.device_put(data.images[rows], parallel.over_batch(mesh))
        with jax.default_matmul_precision("highest"):
            out = run(scalar, images, method=method)
        results.append([np.asarray(part)[:count] for part in out])
    predicted, values = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return predicted, values


def _of_batch(model, number, images, *, method):
    """The predicted class, and the radius for a Lipschitz bound or the margin at an Linf eps."""
    network, head = models.parts(model)
    x = to_float(images)
    embeddings = network.features(x)
    head: Any = network.head if head is None else head
    radius, margin = _OF_HEADS[type(head)]
    predicted = head(embeddings).argmax(axis=1)
    if method == "lipschitz":
        return predicted, radius(head, embeddings, number)
    return predicted, margin(head, embeddings, *models.interval_bounds(network, x, number))


_bind = _classifier.jit_over_model(_of_batch, static_argnames=("method",))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
