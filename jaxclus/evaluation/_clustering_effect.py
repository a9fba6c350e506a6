"""The clustering effect of one network: what its linear sub-network says about its classes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxclus import _classifier, clustering, linear, models, parallel
from jaxclus.clustering import ClusteringScore, Hierarchy
from jaxclus.data import Dataset, Groups, to_float
from jaxclus.evaluation._predict import predict
from jaxclus.models._classifier import checked


@dataclasses.dataclass(frozen=True, eq=False)
class LinearVariant:
    """One linear sub-network of a classifier with k classes.

    Attributes:
        weight: implicit weight W, float32 [k, h, w, c].
        bias: float32 [k].
        affine_error: largest |f_lin(x) - (W x + b)| over images of the data set, relative to the
            largest |f_lin(x)|.
        correlation: C [k, k], the correlations of the rows of W.
        hierarchy: average linkage on 1 - C.
        score: how far the data set's class groups stand out in C; None without groups.
    """

    weight: np.ndarray
    bias: np.ndarray
    affine_error: float
    correlation: np.ndarray
    hierarchy: Hierarchy
    score: ClusteringScore | None


@dataclasses.dataclass(frozen=True, eq=False)
class ClusteringEffect:
    """The analysis of one network.

    Attributes:
        variants: "with_batch_norm" keeps BatchNorm as the affine map it is in eval mode;
            "without_batch_norm" leaves it out, as the paper does.
        feature_distance: F [k, k] of the whole network's logits on all images given, symmetric.
        feature_distance_as_published: F [k, k] from the first 128 images of each class, each row
            scaled by its maximum; None where a class has fewer images.
        filters: |V V^T - I| [o, o] for each convolution by its name, V its normalised filters.
        num_images: number of images behind the feature distances.
    """

    variants: Mapping[str, LinearVariant]
    feature_distance: np.ndarray
    feature_distance_as_published: np.ndarray | None
    filters: Mapping[str, np.ndarray]
    num_images: int

    def to_json(self, data: Dataset) -> dict[str, Any]:
        """The figures as JSON values; the arrays are in `arrays`.

        Args:
            data: the data set that was analysed.
        """
        return {
            "class_names": list(data.class_names),
            "groups": data.groups and [[name, list(members)] for name, members in data.groups],
            "dataset": data.name,
            "split": data.split,
            "num_images": self.num_images,
            "variants": {
                name: {
                    "affine_error": variant.affine_error,
                    "score": variant.score and dataclasses.asdict(variant.score),
                }
                for name, variant in self.variants.items()
            },
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, for an .npz file."""
        found = {"feature_distance": self.feature_distance}
        if self.feature_distance_as_published is not None:
            found["feature_distance_as_published"] = self.feature_distance_as_published
        for name, variant in self.variants.items():
            found |= {
                f"{name}/weight": variant.weight,
                f"{name}/bias": variant.bias,
                f"{name}/correlation": variant.correlation,
                f"{name}/linkage": variant.hierarchy.linkage,
                f"{name}/order": variant.hierarchy.order,
            }
        return found | {f"filters/{name}": matrix for name, matrix in self.filters.items()}


def clustering_effect(model: _classifier.Classifier, data: Dataset) -> ClusteringEffect:
    """Linear sub-networks, class correlations with scores, feature distances, filters.

    Args:
        model: a network of `jc.models`, in eval mode.
        data: test images; their groups are scored.

    Raises:
        TypeError: if the model is none of `jc.models`, whose BatchNorms can be taken out.
        ValueError: if the network has no affine sub-network; the message names what is in the way.

    Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
    arXiv:2111.12922.
    """
    model = checked("model", model)
    x = to_float(data.images[:64])
    variants = {
        "with_batch_norm": _variant(model, x, data),
        "without_batch_norm": _variant(models.without_batch_norm(model), x, data),
    }
    logits, _ = predict(jax.random.key(0), model, data.images, parallel.mesh())
    k = data.num_classes
    counts = np.bincount(data.labels, minlength=k)
    published = None
    if counts.min() >= clustering.PUBLISHED_COUNT:
        published = clustering.feature_distance(logits, data.labels, k, as_published=True)
    return ClusteringEffect(
        variants=variants,
        feature_distance=np.asarray(clustering.feature_distance(logits, data.labels, k)),
        feature_distance_as_published=None if published is None else np.asarray(published),
        filters=_filters(model),
        num_images=len(data),
    )


def implicit_correlation(
    model: _classifier.Classifier, input_shape: Sequence[int]
) -> Float[Array, "k k"]:
    """The paper's matrix C of a network: correlations of W of its linear part without BatchNorm.

    Args:
        model: a network of `jc.models` of k classes, in eval mode.
        input_shape: (h, w, c) of its images.

    Returns:
        C [k, k], float32; no image is needed.

    Raises:
        TypeError, ValueError: as `clustering_effect`.

    Bai et al., arXiv:2111.12922.
    """
    affine = linear.linearize(models.without_batch_norm(checked("model", model)))
    weight, _ = linear.implicit_weight(affine, input_shape)
    return clustering.correlation(weight)


def discover_groups(
    teacher: _classifier.Classifier, input_shape: Sequence[int], num_groups: int
) -> Groups:
    """Groups of classes that a trained network, best a robust one, puts together by itself.

    Average linkage on 1 - C, with C its `implicit_correlation`, cut at `num_groups`: groups for a
    clustering regulariser where nobody knows better ones.

    Args:
        teacher: a network of `jc.models`, in eval mode, of k classes.
        input_shape: (h, w, c) of its images.
        num_groups: in [1, k].

    Returns:
        ("group 0", (class, ...)) and so on, numbered by their smallest class.

    Raises:
        TypeError, ValueError: as `clustering_effect`, and if `num_groups` is no integer in [1, k].

    Bai et al., arXiv:2111.12922.
    """
    matrix = implicit_correlation(checked("teacher", teacher), input_shape)
    ids = clustering.hierarchy(matrix).cut(num_groups)
    return tuple(
        (f"group {number}", tuple(np.flatnonzero(ids == number).tolist()))
        for number in range(num_groups)
    )


def _variant(model: models.Classifier, x: jax.Array, data: Dataset) -> LinearVariant:
    affine = linear.linearize(model)
    weight, bias = linear.implicit_weight(affine, data.input_shape)
    with jax.default_matmul_precision("highest"):
        exact = _classifier.logits(affine)(x)
        wanted = jnp.tensordot(x, weight, axes=((1, 2, 3), (1, 2, 3))) + bias[None]
    matrix = clustering.correlation(weight)
    return LinearVariant(
        weight=np.asarray(weight),
        bias=np.asarray(bias),
        affine_error=float(jnp.abs(exact - wanted).max() / jnp.abs(exact).max()),
        correlation=np.asarray(matrix),
        hierarchy=clustering.hierarchy(matrix),
        score=None if data.groups is None else clustering.clustering_score(matrix, data.groups),
    )


def _filters(model: models.Classifier) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if leaf.ndim == 4
    }
    return {
        name.removesuffix("/kernel"): np.asarray(clustering.filter_correlation(kernel))
        for name, kernel in kernels.items()
    }
