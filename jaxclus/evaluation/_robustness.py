"""Accuracy of a classifier over a data set, clean and under attack."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclus import _checks, _classifier, metrics, parallel, runs
from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack, bind
from jaxclus.data import Dataset, to_float

#: Images in one compiled call on each device. One fixed shape for all of an evaluation: rounding
#: depends on the shape, and verdicts must not depend on how many images are asked for.
MICROBATCH = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Robustness:
    """Verdicts of one attack on one data set.

    Attributes:
        attack: the attack with all its settings.
        dataset: name of the data set.
        split: name of its split.
        seed: the key's data.
        clean: whether each clean image is classified correctly, bool [n].
        robust: whether each image still is under attack, bool [n]; never where `clean` is not.
        norms: norm of each perturbation, float32 [n]; 0 for images that were not attacked.
        low: smallest pixel of all adversarial images.
        high: largest pixel of all adversarial images.
        seconds: wall time of the attack, with compilation.
    """

    attack: Attack
    dataset: str
    split: str
    seed: tuple[int, ...]
    clean: np.ndarray
    robust: np.ndarray
    norms: np.ndarray
    low: float
    high: float
    seconds: float

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without attack."""
        return float(self.clean.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of images classified correctly without and under attack."""
        return float(self.robust.mean())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, the verdicts as strings of 0 and 1.

        "images_per_second" counts the images that were attacked, those that `clean` holds.
        """
        return {
            "attack": describe(self.attack),
            "norm": self.attack.threat.name,
            "eps": float(self.attack.threat.eps),
            "dataset": self.dataset,
            "split": self.split,
            "num_images": len(self.clean),
            "seed": list(self.seed),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "largest_norm": float(self.norms.max()),
            "range": [self.low, self.high],
            "seconds": round(self.seconds, 3),
            "images_per_second": round(int(self.clean.sum()) / self.seconds, 1),
            "clean": "".join(map(str, self.clean.astype(int))),
            "robust": "".join(map(str, self.robust.astype(int))),
        }


def describe(attack: Attack) -> str:
    """The attack's name and settings but for the threat model, as "PGD(steps=20, restarts=1)"."""
    fields = (field.name for field in dataclasses.fields(attack) if field.name != "threat")
    settings = ((name, getattr(attack, name)) for name in fields)
    # A callable by its name: its repr holds an address, which another run does not have.
    shown = (
        f"{name}={getattr(value, '__name__', value)}"
        for name, value in settings
        if value is not None
    )
    return f"{type(attack).__name__}({', '.join(shown)})"


def correct(
    model: Classifier, data: Dataset, *, devices: Sequence[Any] | None = None
) -> np.ndarray:
    """Whether each image of the data set is classified correctly, bool [n].

    Args:
        model: a classifier.
        data: the data set.
        devices: default: all.
    """
    _check(model, data)
    mesh = parallel.mesh(devices)
    predict = _classifier.logits(_placed(model, mesh))

    def verdicts(x, y, index):
        return metrics.correct(predict(x), y)

    with jax.default_matmul_precision("highest"):
        return _over(data, np.arange(len(data)), verdicts, mesh, lambda count: None)


def robustness(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    *,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> Robustness:
    """Attacks every image that the model classifies correctly.

    Verdicts are recomputed from the final images in float32 under matmul precision "highest", and
    an image whose perturbation leaves ball or box does not count as broken. Work goes in full
    microbatches of one shape over all devices, in the order of the data set.

    Args:
        key: a typed key; image i uses `fold_in(key, i)`.
        model: a classifier, images [b, h, w, c] in [0, 1] -> float32 logits [b, k].
        attack: the attack.
        data: the data set.
        devices: default: all.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: if the key, the model or the data do not fit.
    """
    _check_attack(attack)
    return _robustness(key, model, [attack], data, devices=devices, progress=progress)[0]


def robustness_curve(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    eps: Sequence[float],
    *,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> list[Robustness]:
    """`robustness` at several radii, with one compiled program.

    Args:
        eps: the radii, each above 0, on the pixel scale. They replace the attack's own; a step
            size given in the attack stays as it is.
    """
    _check_attack(attack)
    threats = [type(attack.threat)(float(radius)) for radius in eps]
    attacks = [dataclasses.replace(attack, threat=threat) for threat in threats]
    return _robustness(key, model, attacks, data, devices=devices, progress=progress)


def _robustness(
    key: jax.Array,
    model: Classifier,
    attacks: Sequence[Attack],
    data: Dataset,
    *,
    devices: Sequence[Any] | None,
    progress: bool,
) -> list[Robustness]:
    """`robustness` under each attack, with the model's program bound once."""
    _checks.typed_key("key", key)
    clean = correct(model, data, devices=devices)
    mesh = parallel.mesh(devices)
    key = jax.device_put(key, parallel.replicated(mesh))
    run = bind(_placed(model, mesh))
    return [_under(key, run, attack, data, clean, mesh, progress) for attack in attacks]


def _under(
    key: jax.Array,
    run: Callable[..., Any],
    attack: Attack,
    data: Dataset,
    clean: np.ndarray,
    mesh: Mesh,
    progress: bool,
) -> Robustness:
    """The verdicts of one attack on the images that are classified correctly."""
    begin = time.perf_counter()
    attacked = np.flatnonzero(clean)

    def verdicts(x, y, index):
        result = run(attack, key, x, y, index, trace=False)
        pixels = result.x_adv.reshape(x.shape[0], -1)
        return result.success, result.norm, pixels.min(axis=1), pixels.max(axis=1)

    robust, norms = clean.copy(), np.zeros(len(data), np.float32)
    low, high = np.float32(0), np.float32(1)
    label = f"{type(attack).__name__} {attack.threat.name} eps {float(attack.threat.eps):.4g}"
    if len(attacked):
        with (
            runs.progress(label, len(attacked), "images", enabled=progress) as advance,
            jax.default_matmul_precision("highest"),
        ):
            broken, norms[attacked], lows, highs = _over(data, attacked, verdicts, mesh, advance)
        low, high = lows.min(), highs.max()
        robust[attacked] = ~(broken & _inside(attack, norms[attacked], lows, highs))
    return Robustness(
        attack=attack,
        dataset=data.name,
        split=data.split,
        seed=tuple(np.asarray(jax.random.key_data(key)).tolist()),
        clean=clean,
        robust=robust,
        norms=norms,
        low=float(low),
        high=float(high),
        seconds=time.perf_counter() - begin,
    )


def _inside(attack: Attack, norms: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether each image is inside ball and box, but for rounding."""
    eps = float(attack.threat.eps)
    slack = 1e-6 if attack.threat.name == "linf" else 1e-5 * eps
    return (norms <= eps + slack) & (low >= 0) & (high <= 1)


def _check_attack(attack: Attack) -> None:
    if not isinstance(attack, Attack):
        raise TypeError(f"`attack` must be one of jc.attacks, got {type(attack).__name__}")


def _placed(model: Classifier, mesh: Mesh) -> Classifier:
    """The model with a copy of its weights on every device; what hides them stays as it is."""
    if not _classifier.is_pytree(model):
        return model
    return jax.device_put(model, parallel.replicated(mesh))


def _check(model: Classifier, data: Dataset) -> None:
    if not isinstance(data, Dataset):
        raise TypeError(f"`data` must be a jc.data.Dataset, got {type(data).__name__}")
    classes = _classifier.num_classes(model, to_float(data.images[:1]))
    if int(data.labels.max()) >= classes:
        raise ValueError(
            f"`data` must have labels in [0, {classes - 1}], the model's classes, "
            f"got {int(data.labels.max())}"
        )


def _over(
    data: Dataset,
    chosen: np.ndarray,
    verdicts: Callable[..., Any],
    mesh: Mesh,
    advance: Callable[..., None],
) -> Any:
    """`verdicts(x, y, index)` over the chosen images, the padding cut off, on the host."""
    results = []
    for index, count in _microbatches(chosen, MICROBATCH * mesh.size):
        batch = (data.images[index], data.labels[index], index.astype(np.int32))
        images, y, placed = jax.device_put(batch, parallel.over_batch(mesh))
        out = verdicts(to_float(images), y, placed)
        results.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:count], out))  # noqa: B023
        advance(count)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _microbatches(chosen: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Full batches of image numbers, the last one padded with its first, and the true counts."""
    for start in range(0, len(chosen), size):
        part = chosen[start : start + size]
        yield np.concatenate([part, np.full(size - len(part), part[0])]), len(part)
