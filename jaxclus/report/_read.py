"""Typed reading of what a run directory holds; nothing is computed and no model is loaded.

A run directory has `config.json`; everything else (`metrics.jsonl`, `attacks/*.json` with optional
examples in `attacks/*.npz`, `linear.json` with `linear.npz`) may be missing and is then `None` or
empty here. Accuracies are fractions in [0, 1], images float32 NHWC in [0, 1], `eps` is on that
pixel scale.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = ("with_batch_norm", "without_batch_norm")
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclasses.dataclass(frozen=True)
class Point:
    """Robust accuracy at one `eps`; what was not recorded is None."""

    eps: float
    robust_accuracy: float
    largest_norm: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Attacked images: images and adversarial [m, h, w, c]; labels and predictions [m]."""

    images: np.ndarray
    adversarial: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    adversarial_predictions: np.ndarray
    eps: float


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """One file of `attacks/`; `record` is the whole of it, `curve` is sorted by eps."""

    path: Path
    attack: str
    norm: str
    num_images: int
    seed: int
    clean_accuracy: float
    curve: tuple[Point, ...]
    examples: Examples | None
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """The linear sub-network with or without BatchNorm; arrays that are not stored are None.

    weight [k, h, w, c], correlation [k, k], linkage [k-1, 4] in SciPy's form, order [k].
    """

    affine_error: float | None
    score: Mapping[str, Any] | None
    weight: np.ndarray | None
    correlation: np.ndarray | None
    linkage: np.ndarray | None
    order: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """`linear.json`, which is `record`, and `linear.npz`.

    `group_of` [k] holds the name of each class's group, or None.
    """

    class_names: tuple[str, ...]
    group_of: tuple[str | None, ...]
    num_images: int | None
    variants: Mapping[str, Variant]
    feature_distance: np.ndarray | None
    feature_distance_as_published: np.ndarray | None
    filters: Mapping[str, np.ndarray]
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run directory; `label` is its name, made unique among the runs of the report.

    `masking` is `masking.json`, what `jaxclus evaluate` found, or None; `brackets` are those of its
    `certificates.json`, empty where there is none.
    """

    directory: Path
    label: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    linear: Linear | None
    masking: Mapping[str, Any] | None
    brackets: tuple[Mapping[str, Any], ...]

    @property
    def dataset(self) -> str:
        """The name of the data set, or "not recorded"."""
        return self.setting("dataset", "name")

    def setting(self, part: str, key: str) -> str:
        """The text of one entry of `config.json`, or "not recorded"."""
        section = self.config.get(part)
        value = section.get(key) if isinstance(section, Mapping) else section
        return "not recorded" if value is None else str(value)

    @property
    def groups(self) -> tuple[str | None, ...]:
        """The name of each class's group, None for none; empty where classes are unknown."""
        return self.linear.group_of if self.linear else ()

    def variant(self, name: str) -> Variant | None:
        """The linear sub-network of this name, if it was measured."""
        return self.linear.variants.get(name) if self.linear else None

    def class_name(self, index: int) -> str:
        """The name of a class, or its number where the names are unknown."""
        names = self.linear.class_names if self.linear else ()
        return names[index] if 0 <= index < len(names) else str(index)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, epochs (NaN where not recorded) and values of one metric, sorted by step.

        A resumed run writes some steps again: the later line wins.
        """
        lines = {m["step"]: m for m in self.metrics if _is_number(m.get(key)) and "step" in m}
        chosen = [lines[step] for step in sorted(lines)]
        epochs = [m["epoch"] if _is_number(m.get("epoch")) else math.nan for m in chosen]
        return (
            np.array(sorted(lines), float),
            np.array(epochs, float),
            np.array([m[key] for m in chosen], float),
        )


def read_runs(paths: Sequence[str | os.PathLike]) -> tuple[Run, ...]:
    """Reads run directories, in the order given; runs of the same name are numbered."""
    directories = [Path(path) for path in paths]
    for directory in directories:
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"`runs` must hold run directories, each with a config.json; got {directory}"
            )
    configs = [_read_json(directory / "config.json") for directory in directories]
    names = [
        str(config.get("name") or d.name) for config, d in zip(configs, directories, strict=True)
    ]
    labels = [n if names.count(n) == 1 else f"{n} [{i + 1}]" for i, n in enumerate(names)]
    return tuple(
        Run(
            directory=directory,
            label=label,
            config=config,
            metrics=_read_metrics(directory / "metrics.jsonl"),
            evaluations=tuple(
                _read_evaluation(path) for path in sorted((directory / "attacks").glob("*.json"))
            ),
            linear=_read_linear(directory),
            masking=_read_masking(directory / "masking.json"),
            brackets=_read_brackets(directory / "certificates.json"),
        )
        for directory, label, config in zip(directories, labels, configs, strict=True)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`runs` holds {path}, which is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`runs` holds {path}, which must be a JSON object, got {value!r:.60}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`runs` holds {path}, which is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(path, _read_text(path))


def _read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    text = _read_text(path)
    # A last line without its end is what a killed run leaves behind: it is no error.
    lines = text[: text.rfind("\n") + 1].splitlines()
    return tuple(_parse(path, line) for line in lines if line.strip())


def _field(path: Path, record: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`runs` holds {path}, where {key!r} is missing or wrong: {value!r:.60}")
    return value


def _accuracy(path: Path, record: Mapping[str, Any], key: str) -> float:
    value = _field(path, record, key, (int, float))
    if not 0 <= value <= 1:
        raise ValueError(f"`runs` holds {path}, where {key!r} must be in [0, 1], got {value!r}")
    return float(value)


def _optional_number(path: Path, record: Mapping[str, Any], key: str) -> float | None:
    if record.get(key) is None:
        return None
    return float(_field(path, record, key, (int, float)))


def _read_point(path: Path, point: Any) -> Point:
    if not isinstance(point, dict):
        raise ValueError(f"`runs` holds {path}, where 'curve' must hold objects, got {point!r:.60}")
    eps = float(_field(path, point, "eps", (int, float)))
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(
            f"`runs` holds {path}, where 'eps' must be finite and at least 0, got {eps!r}"
        )
    return Point(
        eps=eps,
        robust_accuracy=_accuracy(path, point, "robust_accuracy"),
        largest_norm=_optional_number(path, point, "largest_norm"),
    )


def _read_masking(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    record = _read_json(path)
    kinds = {"attack": str, "norm": str, "num_images": int, "findings": list, "checks": list}
    for name, kind in (kinds | {"not_run": dict, "loss": dict, "accuracy": dict}).items():
        _field(path, record, name, kind)
    return record


def _read_brackets(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    found = _field(path, _read_json(path), "brackets", list)
    kinds = {"attack": str, "norm": str, "num_images": int, "eps": (int, float), "methods": list}
    for record in found:
        if not isinstance(record, dict):
            raise ValueError(
                f"`runs` holds {path}, where 'brackets' must hold objects, got {record!r:.60}"
            )
        for name, kind in kinds.items():
            _field(path, record, name, kind)
        for name in ("clean_accuracy", "certified_accuracy", "undecided", "broken"):
            _accuracy(path, record, name)
    return tuple(found)


def _read_evaluation(path: Path) -> Evaluation:
    record = _read_json(path)
    points = [_read_point(path, point) for point in _field(path, record, "curve", list)]
    norm = _field(path, record, "norm", str)
    if norm not in NORMS:
        raise ValueError(f"`runs` holds {path}, where 'norm' must be linf, l2 or l1, got {norm!r}")
    num_images = _field(path, record, "num_images", int)
    if num_images < 1:
        raise ValueError(
            f"`runs` holds {path}, where 'num_images' must be at least 1, got {num_images}"
        )
    return Evaluation(
        path=path,
        attack=_field(path, record, "attack", str),
        norm=norm,
        num_images=num_images,
        seed=_field(path, record, "seed", int),
        clean_accuracy=_accuracy(path, record, "clean_accuracy"),
        curve=tuple(sorted(points, key=lambda point: point.eps)),
        examples=_read_examples(path.with_suffix(".npz")),
        record=record,
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, or nothing if there is no such file."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"`runs` holds {path}, which is no readable .npz: {error}") from error


def _shaped(path: Path, arrays: Mapping[str, np.ndarray], key: str, shape: tuple) -> np.ndarray:
    """The array `key`, whose shape must match `shape` (None: any length)."""
    if key not in arrays:
        raise ValueError(f"`runs` holds {path}, which lacks the array {key!r}")
    array = arrays[key]
    fits = array.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(
            f"`runs` holds {path}, where {key!r} must have the shape [{wanted}], got {array.shape}"
        )
    return array


def _read_examples(path: Path) -> Examples | None:
    arrays = _read_arrays(path)
    if not arrays:
        return None
    images = _shaped(path, arrays, "images", (None, None, None, None))
    count = images.shape[0]
    return Examples(
        images=images,
        adversarial=_shaped(path, arrays, "adversarial", images.shape),
        labels=_shaped(path, arrays, "labels", (count,)),
        predictions=_shaped(path, arrays, "predictions", (count,)),
        adversarial_predictions=_shaped(path, arrays, "adversarial_predictions", (count,)),
        eps=float(_shaped(path, arrays, "eps", ())),
    )


def _read_linear(directory: Path) -> Linear | None:
    path = directory / "linear.json"
    if not path.is_file():
        return None
    record = _read_json(path)
    names = tuple(str(name) for name in _field(path, record, "class_names", list))
    arrays_path = directory / "linear.npz"
    arrays = _read_arrays(arrays_path)

    def optional(key: str, *shape: int | None) -> np.ndarray | None:
        return _shaped(arrays_path, arrays, key, shape) if key in arrays else None

    k = len(names)
    return Linear(
        class_names=names,
        group_of=_group_of(path, record.get("groups"), k),
        num_images=record.get("num_images"),
        variants={
            name: Variant(
                affine_error=_optional_number(path, variant, "affine_error"),
                score=variant.get("score"),
                weight=optional(f"{name}/weight", k, None, None, None),
                correlation=optional(f"{name}/correlation", k, k),
                linkage=optional(f"{name}/linkage", k - 1, 4),
                order=_permutation(arrays_path, f"{name}/order", optional(f"{name}/order", k)),
            )
            for name, variant in _field(path, record, "variants", dict).items()
        },
        feature_distance=optional("feature_distance", k, k),
        feature_distance_as_published=optional("feature_distance_as_published", k, k),
        filters={
            key.removeprefix("filters/"): _shaped(arrays_path, arrays, key, (None, None))
            for key in arrays
            if key.startswith("filters/")
        },
        record=record,
    )


def _permutation(path: Path, key: str, order: np.ndarray | None) -> np.ndarray | None:
    if order is not None and sorted(order.tolist()) != list(range(len(order))):
        raise ValueError(
            f"`runs` holds {path}, where {key!r} must hold each of 0 to {len(order) - 1} once"
        )
    return order


def _group_of(path: Path, groups: Any, num_classes: int) -> tuple[str | None, ...]:
    """The name of each class's group; None for a class of no group."""
    group_of: list[str | None] = [None] * num_classes
    for name, members in groups or ():
        for index in members:
            if not 0 <= index < num_classes:
                raise ValueError(
                    f"`runs` holds {path}, where group {name!r} has class {index} "
                    f"of {num_classes} classes"
                )
            group_of[index] = str(name)
    return tuple(group_of)
