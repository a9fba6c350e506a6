"""`jaxclus evaluate`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import tyro

from jaxclus import attacks, evaluation, runs, threat, zoo
from jaxclus.cli._arguments import Number, artefacts, dataset_of
from jaxclus.cli._attack import (
    create,
    file_name,
    print_result,
    record,
    resumable,
    save_examples,
)
from jaxclus.cli._certificates import certify


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """AutoAttack, certificates, the accuracy over eps, and what speaks against believing them.

    A run that was stopped goes on where it was when the same command is given again.

    Try:
      jaxclus evaluate runs/digits-cnn-pgd-seed0 --eps 0.1 --num-images 100
      jaxclus evaluate runs/cifar10-resnet18-pgd-seed0 --eps 8/255 --seeds 3
    """

    run_path: tyro.conf.Positional[Path]
    """A run directory of `jaxclus train`, a .safetensors file, or a network of `jaxclus zoo`."""
    eps: Number
    """Radius on the pixel scale [0, 1]."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    version: Literal["standard", "plus"] = "standard"
    """Version of AutoAttack."""
    curve: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
    """Radii of the curve (APGD on the cross-entropy) as multiples of eps."""
    seeds: int = 1
    """Seeds to repeat AutoAttack with, for the spread."""
    masking: bool = True
    """Whether to look for masked gradients and failing attacks."""
    certify: bool = True
    """Whether to certify images that no attack can break, where the network's bounds are known."""
    surrogate: Path | None = None
    """Another model of the same images, for the checks by transfer."""
    dataset: str | None = None
    """Default: the one the run was trained on."""
    split: str = "test"
    """Split of the data set."""
    num_images: int | None = None
    """Attack the first so many images; default all."""
    batch_size: int = 250
    """Finished images after which the state is saved; it also is once a minute."""
    microbatch: int | None = None
    """Images in one physical batch on each device; fewer need less memory."""
    seed: int = 0
    """Seed of the attacks' randomness."""
    output: Path | None = None
    """Directory for the results; default: the run directory."""

    def run(self) -> None:
        """Evaluates, prints a table, and writes attacks/*.json, certificates.json, masking.json."""
        directory = artefacts(self.run_path, self.output)
        ball = threat.create(self.norm, self.eps)
        model = zoo.load(self.run_path)
        images = dataset_of(self.run_path, self.dataset, self.split, self.num_images)
        surrogate = None if self.surrogate is None else zoo.load(self.surrogate)
        key = jax.random.key(self.seed)
        how = {"batch_size": self.batch_size, "microbatch": self.microbatch}
        ensemble = attacks.AutoAttack(ball, self.version)
        print(f"{len(images)} images of {images.name}, split {images.split}")
        with resumable(directory / "attacks", self) as work:
            found = evaluation.robustness_over_seeds(
                key, model, ensemble, images, self.seeds, directory=work / "seeds", **how
            )
            first = found[0]
            print(f"clean accuracy {first.clean_accuracy:.4f}")
            for number, result in enumerate(found):
                print_result(result, f"{self.seed}, key {number}")
            spread = evaluation.spread(found)
            if self.seeds > 1:
                print(
                    f"over {self.seeds} seeds: {spread.mean:.4f} +- {spread.std:.4f}, "
                    f"broken by none: {spread.worst:.4f}"
                )
            if self.certify:  # before anything is written: a contradiction ends it all
                certificates = directory / "certificates.json"
                certify(certificates, model, images, ball, found, self.microbatch)
            path = (
                directory / "attacks" / f"{file_name('autoattack', self.norm, self.version)}.json"
            )
            seeds = {
                "seeds": [result.to_json() for result in found],
                "spread": dataclasses.asdict(spread),
            }
            runs.write_json(path, record([first], images, self.seed) | seeds)
            save_examples(path.with_suffix(".npz"), model, first, images, 8)
            curve = evaluation.robustness_curve(
                key, model, create("apgd", ball), images,
                [factor * self.eps for factor in self.curve], directory=work / "curve", **how,
            )  # fmt: skip
            for result in curve:
                print_result(result, str(self.seed))
            if curve:
                path = directory / "attacks" / f"apgd-{self.norm}.json"
                runs.write_json(path, record(curve, images, self.seed))
            if self.masking:
                seen = evaluation.masking(
                    key, model, images, ball, robustness=first, surrogate=surrogate
                )
                runs.write_json(directory / "masking.json", seen.to_json())
                print(f"masking checks: {len(seen.findings)} findings")
                for finding in seen.findings:
                    print(f"  {finding.severity}: {finding.name}: {finding.detail}")
                    print(f"    {finding.advice}")
        print(f"written: {directory / 'attacks'}")
