"""`jaxclus linearize`."""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from jaxclus import evaluation, runs, zoo
from jaxclus.cli._arguments import artefacts, dataset_of


@dataclasses.dataclass(frozen=True)
class Linearize:
    """Take the linear sub-networks of a trained model apart and score how its classes cluster.

    Try:
      jaxclus linearize runs/digits-cnn-pgd-seed0
      jaxclus linearize model.safetensors --dataset fashion_mnist --output out
    """

    run_path: tyro.conf.Positional[Path]
    """A run directory of `jaxclus train`, a .safetensors file, or a network of `jaxclus zoo`."""
    dataset: str | None = None
    """Default: the one the run was trained on; its class groups are scored."""
    split: str = "test"
    """Split whose images give the feature distances."""
    num_images: int | None = None
    """Use the first so many images; default all."""
    output: Path | None = None
    """Directory for the results; default: the run directory."""

    def run(self) -> None:
        """Analyses, prints the scores, and writes linear.json and linear.npz."""
        directory = artefacts(self.run_path, self.output)
        images = dataset_of(self.run_path, self.dataset, self.split, self.num_images)
        effect = evaluation.clustering_effect(zoo.load(self.run_path), images)
        with runs.atomic_file(directory / "linear.npz") as file:
            np.savez_compressed(file, **effect.arrays())  # pyright: ignore[reportArgumentType]
        runs.write_json(directory / "linear.json", effect.to_json(images) | runs.environment())
        for name, variant in effect.variants.items():
            print(f"{name.replace('_', ' ')}: {_summary(variant)}")
        print(f"written: {directory / 'linear.json'}")


def _summary(variant: evaluation.LinearVariant) -> str:
    affine = f"affine to {variant.affine_error:.1e}"
    score = variant.score
    if score is None:
        return f"{affine}; no class groups to score"
    return (
        f"correlation within groups {score.within:.3f}, between {score.between:.3f}, "
        f"difference {score.difference:.3f} (p = {score.p_value:.4f}, smallest possible "
        f"{score.smallest_p:.2g}); adjusted Rand index {score.adjusted_rand:.2f}; {affine}"
    )
