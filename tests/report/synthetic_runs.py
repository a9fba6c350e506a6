"""Run directories as the other parts of the library write them, filled with made-up figures."""

import json
from pathlib import Path

import numpy as np
from scipy.cluster import hierarchy

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GROUPS10 = [["vehicles", [0, 1, 8, 9]], ["animals", [2, 3, 4, 5, 6, 7]]]
NAMES100 = [f"class number {i}" for i in range(100)]
GROUPS100 = [[f"superclass {g}", list(range(5 * g, 5 * g + 5))] for g in range(20)]


def write_run(
    directory: Path,
    *,
    name: str = "pgd",
    dataset: str = "cifar10",
    class_names: list[str] = CIFAR10,
    groups: list | None = GROUPS10,
    shape: tuple[int, int, int] = (16, 16, 3),
    norms: tuple[str, ...] = ("linf",),
    strength: float = 0.5,
    steps: int = 60,
    seed: int = 0,
) -> Path:
    """A complete run directory; `strength` in [0, 1] moves robustness and clustering together."""
    rng = np.random.default_rng(seed)
    (directory / "attacks").mkdir(parents=True)
    model = {"name": "resnet18", "num_classes": len(class_names), "input_shape": list(shape)}
    config = {
        "name": name,
        "dataset": {"name": dataset, "split": "train", "num_images": 50000, "fingerprint": "9f2c"},
        "model": {**model, "width": 64},
        "objective": {"name": "pgd", "norm": "linf", "eps": 8 / 255, "beta": None},
        "training": {"epochs": 30, "batch_size": 128, "learning_rate": 0.1, "schedule": "cosine"},
        "seed": seed,
        "versions": {"jaxclus": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"},
        "hardware": "1 x NVIDIA H200",
        "command": f"jaxclus train {dataset} --method pgd --seeds {seed}",
    }
    (directory / "config.json").write_text(json.dumps(config))
    _write_metrics(directory, rng, steps, strength)
    for norm in norms:
        for attack in ("PGD(steps=20, restarts=1, step_size=None)", "AutoAttack(version=standard)"):
            _write_attack(directory, rng, attack, norm, strength, dataset, len(class_names), shape)
    _write_linear(directory, rng, class_names, groups, shape, strength)
    _write_masking(directory, strength)
    _write_certificates(directory)
    return directory


def _write_certificates(directory: Path) -> None:
    bracket = {
        "attack": "AutoAttack(version=standard)",
        "norm": "linf",
        "eps": 8 / 255,
        "num_images": 1000,
        "clean_accuracy": 0.9,
        "certified_accuracy": 0.31,
        "undecided": 0.27,
        "broken": 0.32,
        "methods": [
            {"method": "lipschitz", "certified_accuracy": 0.11},
            {"method": "interval", "certified_accuracy": 0.29},
        ],
    }
    (directory / "certificates.json").write_text(json.dumps({"brackets": [bracket]}))


def _write_masking(directory: Path, strength: float) -> None:
    steps = np.arange(101)
    loss = 1 - np.exp(-steps / 20)
    finding = {
        "name": "incomplete optimisation",
        "severity": "suspected",
        "detail": "the loss still rises on 31 % of the images",
        "advice": "Use more steps.",
    }
    record = {
        "attack": "APGD(loss=cross_entropy, steps=100, restarts=1, rho=0.75)",
        "norm": "linf",
        "eps": 8 / 255,
        "num_images": 100,
        "findings": [] if strength > 0.5 else [finding],
        "checks": [
            {"name": "randomised", "figure": 0.0, "limit": 1e-4, "unit": "distance", "found": False}
        ],
        "not_run": {"transfer failure": "no surrogate was given"},
        "loss": {
            name: (scale * loss).tolist()
            for name, scale in (("mean", 1.0), ("low", 0.5), ("median", 0.9), ("high", 2.0))
        },
        "accuracy": {"eps": [4 / 255, 8 / 255, 1.0], "robust": [0.6, strength, 0.0]},
    }
    (directory / "masking.json").write_text(json.dumps(record))


def _write_metrics(directory: Path, rng: np.random.Generator, steps: int, strength: float) -> None:
    lines = []
    for step in range(1, steps + 1):
        epoch = 30 * step / steps
        lines.append(
            {
                "step": step,
                "epoch": epoch,
                "loss": 0.5 + 1.8 * np.exp(-epoch / 8) + 0.1 * rng.normal() ** 2,
                "accuracy": float(
                    np.clip(0.85 - 0.6 * np.exp(-epoch / 7) + 0.03 * rng.normal(), 0, 1)
                ),
                "learning_rate": 0.1,
                "images_per_second": 5100.0,
            }
        )
    for epoch in range(1, 31):
        lines.append(
            {
                "step": epoch * steps // 30,
                "epoch": float(epoch),
                "validation_accuracy": 0.84 - 0.5 * float(np.exp(-epoch / 6)),
                "validation_robust_accuracy": strength * (1 - float(np.exp(-epoch / 6))),
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)


def _write_attack(directory, rng, attack, norm, strength, dataset, k, shape) -> None:
    unit = {"linf": 1 / 255, "l2": 1 / 16, "l1": 1.5}[norm]
    weak = 0.02 if attack.startswith("PGD") else 0.0
    curve = [
        {
            "eps": multiple * unit,
            "robust_accuracy": round(
                0.84 * float(np.exp(-multiple * 0.07 / (0.03 + strength))) + weak, 3
            ),
            "largest_norm": multiple * unit,
            "seconds": 12.5,
            "images_per_second": 80.0,
            "robust": "01" * 500,
            "members": [
                {"name": name, "robust_accuracy": 0.5, "seconds": 3.2}
                for name in (("apgd-ce", "square") if attack.startswith("Auto") else ("PGD",))
            ],
        }
        for multiple in (2, 4, 8, 12, 16)
    ]
    record = {
        "attack": attack,
        "norm": norm,
        "dataset": dataset,
        "split": "test",
        "num_images": 1000,
        "seed": 3,
        "clean_accuracy": 0.84,
        "curve": curve,
        "versions": {"jaxclus": "0.1.0", "jax": "0.10.2"},
        "hardware": "2 CPU cores",
        "command": f"jaxclus attack {directory} --eps 8/255",
    }
    stem = directory / "attacks" / f"{attack.split('(')[0].lower()}-{norm}"
    stem.with_suffix(".json").write_text(json.dumps(record))
    if attack.startswith("PGD"):
        return
    h, w, c = shape
    rows, columns = np.mgrid[0:h, 0:w] / max(h, w)
    phase = rng.uniform(0, 6, (8, c, 3))
    waves = np.sin(
        phase[..., 0, None, None] + 4 * rows + phase[..., 1, None, None] * columns
    ).transpose(0, 2, 3, 1)
    images = (0.5 + 0.4 * waves).astype(np.float32)
    delta = 8 / 255 * rng.choice([-1.0, 1.0], images.shape).astype(np.float32)
    labels = rng.integers(0, k, 8)
    np.savez(
        stem.with_suffix(".npz"),
        images=images,
        adversarial=np.clip(images + delta, 0, 1),
        labels=labels,
        predictions=labels,
        adversarial_predictions=np.where(rng.uniform(size=8) < strength, labels, (labels + 3) % k),
        eps=np.float32(8 * unit),
    )


def _write_linear(directory, rng, class_names, groups, shape, strength) -> None:
    k = len(class_names)
    group = np.zeros(k, int)
    for index, (_, members) in enumerate(groups or []):
        group[members] = index
    variants, arrays = {}, {}
    for name, extra in (("with_batch_norm", 0.15), ("without_batch_norm", 0.0)):
        smooth = _smooth_noise(rng, (k, *shape))
        shared = _smooth_noise(rng, (k, *shape))[group]
        weight = (strength + 0.1 - extra * strength) * shared + (1 - strength + extra) * smooth
        flat = weight.reshape(k, -1)
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        correlation = unit @ unit.T
        condensed = np.maximum(1 - correlation[np.triu_indices(k, 1)], 0)
        linkage = hierarchy.linkage(condensed, "average")
        arrays |= {
            f"{name}/weight": weight.astype(np.float32),
            f"{name}/bias": np.zeros(k, np.float32),
            f"{name}/correlation": correlation,
            f"{name}/linkage": linkage,
            f"{name}/order": hierarchy.leaves_list(linkage),
        }
        variants[name] = {"affine_error": 3e-7, "score": _score(correlation, group, groups)}
    distance = 8 * (1 - correlation) + rng.uniform(0, 1, (k, k))
    arrays["feature_distance"] = (distance + distance.T) / 2 * (1 - np.eye(k))
    arrays["feature_distance_as_published"] = arrays["feature_distance"] / 16
    for layer, width in (("conv1", 8), ("block1/conv1", 16), ("block2/conv1", 32)):
        arrays[f"filters/{layer}"] = np.abs(
            np.corrcoef(rng.normal(size=(width, 9))) - np.eye(width)
        )
    record = {
        "class_names": class_names,
        "groups": groups,
        "num_images": 2000,
        "variants": variants,
    }
    (directory / "linear.json").write_text(json.dumps(record))
    np.savez(directory / "linear.npz", **arrays)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.normal(size=shape)
    for axis in (1, 2):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-2, 3)) / 5
    return noise


def _score(matrix: np.ndarray, group: np.ndarray, groups: list | None) -> dict | None:
    if groups is None:
        return None
    same = group[:, None] == group
    off_diagonal = ~np.eye(len(group), dtype=bool)
    within, between = matrix[same & off_diagonal].mean(), matrix[~same].mean()
    return {
        "within": float(within),
        "between": float(between),
        "difference": float(within - between),
        "p_value": 1 / 210,
        "smallest_p": 1 / 210,
        "num_labellings": 210,
        "exact": True,
        "cophenetic": 0.87,
        "adjusted_rand": 0.61,
        "silhouette": -0.12,
    }
