"""The clustering effect of linearised networks: what brings it about, and what it is good for.

    python -m experiments.clustering_effect --dataset fashion_mnist
    python -m experiments.clustering_effect --dataset cifar10
    python -m experiments.clustering_effect --quick

Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
arXiv:2111.12922. One factor at a time around a PGD-trained network (Madry et al.):

- the training method: standard, PGD, TRADES, fast; the architecture; with and without BatchNorm;
- epochs of training; eps of training;
- the clustering regulariser, published (on logits) and ours (on the implicit weight): on or off;
- transfer to unseen subclasses: standard, robust, robust and regularised, without tuning and tuned;
- which wrong class attacks reach.

All trials of one seed start from weights of the same key and see the same batches. The score named
in advance is `difference`, the mean correlation of class weights within groups minus between
groups, in the linear sub-network without BatchNorm; the groups were fixed before any result was
seen (`jaxclus.data`). Seeds are paired: p-values are exact over all 2^n sign flips of the
differences, one-sided in the direction of the paper's claim. Three claims were named in advance and
are corrected for their number (Holm); all others are exploratory, each by itself. (That PGD-trained
networks cluster more had held in an earlier run of this experiment, on the same data.) They speak
of seeds, on these images and groups. CIFAR-10 is the JPEG q75 re-encoding.

Results: experiments/results/clustering_effect-DATASET.json, a table in .md, figures in .png. On 2
CPU cores, at 6 seeds: Fashion-MNIST (all factors) and CIFAR-10 (method, regulariser, transfer, on
20,000 images), about 2 hours each; the files say how long they took. On an accelerator CIFAR-10
trains ResNet-18 on all images, in a setting for 20 minutes that nobody has measured yet.
Interrupted, the same command goes on, as long as the library and the trials stay as they are.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import jaxclus as jc
from experiments import clustering_figures, clustering_summary, clustering_trials
from experiments.clustering_trials import (
    Setting,
    Transfer,
    Trial,
    objective,
    trained,
    transfer_plan,
    transferred,
)
from experiments.records import shown_name, written
from experiments.rows import kept, sources
from jaxclus import runs

# What rows depend on, beside their settings: as it was imported, whatever is edited since.
CODE = sources(jc, clustering_trials)
FACTORS = ("method", "regulariser", "architecture", "batch_norm", "eps", "transfer")
SETTINGS = {
    "fashion_mnist": Setting(
        "cnn", 0.1, seeds=6, epochs=3, attack_steps=7, factors=FACTORS, num_images=40_000
    ),
    "cifar10": Setting(
        "resnet8", 8 / 255, seeds=6, epochs=2, attack_steps=3, num_images=20_000,
        factors=("method", "regulariser", "transfer"), methods=(), autoattack_images=100,
    ),
    "cifar10 on an accelerator": Setting(
        "resnet18", 8 / 255, seeds=6, epochs=5, attack_steps=3, autoattack_images=200,
        factors=("method", "regulariser", "transfer"),
    ),
    "digits": Setting(
        "cnn", 0.2, seeds=6, epochs=30, attack_steps=7, factors=FACTORS, batch_size=64,
        learning_rate=0.05, autoattack_images=364, test_images=364, small_images=1400,
    ),
}  # fmt: skip
# Architectures of a size for 2 cores, far below that of the networks they are named after.
SMALL = {
    "CNN": ("cnn", {}),
    "ResNet-8 of width 8": ("resnet8", {"width": 8}),
    "VGG-11 of width 8": ("vgg11", {"width": 8}),
    "AlexNet of a tenth": ("alexnet", {"widths": (8, 20, 40, 24, 24), "hidden": (400, 400)}),
    "DenseNet (2, 2, 2), growth 4": ("densenet121", {"blocks": (2, 2, 2), "growth": 4}),
}
# Of 0.1, 0.03, 0.02 and 0.01 the highest with which it learns under PGD from all six seeds.
SMALL_RATES = {"AlexNet of a tenth": 0.02}
TRANSFERS = (
    Transfer("transfer, standard", "standard"),
    Transfer("transfer, pgd", "pgd"),
    Transfer("transfer, pgd, logits", "pgd", "mean logits"),
)
QUICK = ("standard", "pgd", "pgd, weight")


def trials(setting: Setting) -> list[Trial]:
    """The trials of a setting's factors."""
    both = ("method", "regulariser")
    found = [
        Trial("standard", both, method="standard"),
        Trial("pgd", (*both, "eps")),
        *(Trial(method, ("method",), method=method) for method in setting.methods),
        Trial("pgd, logits", ("regulariser",), regulariser="logits"),
        Trial("pgd, weight", ("regulariser",), regulariser="weight"),
        Trial("standard, weight", ("regulariser",), "standard", "weight"),
    ]
    methods = ("standard", "pgd")
    found += [
        Trial(
            f"{name}, {method}", ("architecture",), method, model=model,
            arguments=tuple(arguments.items()), num_images=setting.small_images,
            learning_rate=SMALL_RATES.get(name),
        )
        for name, (model, arguments) in SMALL.items()
        for method in methods
    ]  # fmt: skip
    plain = (("batch_norm", False),)
    found += [
        Trial(f"no BatchNorm, {method}", ("batch_norm",), method, model="cnn", arguments=plain)
        for method in methods
    ]
    for factor in setting.eps_factors:
        eps = factor * setting.eps
        found.append(Trial(f"pgd, eps {eps:.3g}", ("eps",), eps=eps))
    return [trial for trial in found if set(trial.factors) & set(setting.factors)]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What brings the clustering effect about, and what it is good for."""

    dataset: Literal["fashion_mnist", "cifar10", "digits"] = "digits"
    """Data set."""
    quick: bool = False
    """Two seeds, two epochs, few images, few trials: a smoke test, no result."""
    output: Path = Path("experiments/results")
    """Directory for the results."""
    work: Path = Path("runs/clustering_effect")
    """Directory for checkpoints and evaluations."""

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints what holds, and writes results, table and figures."""
        setting = self.setting()
        train, test = jc.data.load(self.dataset, "train"), jc.data.load(self.dataset, "test")
        rows = list(self._rows(setting, train, test))
        result = {
            "dataset": shown_name(test),
            "fingerprints": {"train": train.fingerprint, "test": test.fingerprint},
            "class_names": list(test.class_names),
            "groups": [[name, list(members)] for name, members in test.groups],
            "setting": dataclasses.asdict(setting),
            "quick": self.quick,
            "claims": clustering_summary.claims(rows, test.groups),
            "rows": rows,
            "minutes": {
                what: round(sum(row[f"{what}_seconds"] for row in rows) / 60, 1)
                for what in ("training", "evaluation")
            },
            **runs.environment(),
        }
        name = f"clustering_effect-{self.dataset}{'-quick' if self.quick else ''}"
        figures = {f"-{kind}": made for kind, made in clustering_figures.figures(result).items()}
        return written(self.output, name, result, clustering_summary.table(result), figures)

    def setting(self) -> Setting:
        """The data set's setting, on this hardware."""
        accelerated = self.dataset == "cifar10" and jax.default_backend() != "cpu"
        setting = SETTINGS[self.dataset + (" on an accelerator" if accelerated else "")]
        if not self.quick:
            return setting
        return dataclasses.replace(
            setting, model="cnn", arguments=(("widths", (8,)), ("hidden", 16)), seeds=2,
            epochs=2, attack_steps=2, num_images=500, test_images=100, autoattack_images=8,
            factors=("regulariser", "transfer"),
        )  # fmt: skip

    def _rows(
        self, setting: Setting, train: jc.data.Dataset, test: jc.data.Dataset
    ) -> Iterator[dict[str, Any]]:
        """What was found for each seed and trial."""
        transfers = TRANSFERS if "transfer" in setting.factors else ()
        for seed in range(setting.seeds):
            for trial in trials(setting):
                if not self.quick or trial.name in QUICK:
                    yield self._kept(trained, trial, setting, seed, train, test)
            for transfer in transfers[-1:] if self.quick else transfers:
                yield self._kept(transferred, transfer, setting, seed, train, test)

    def _kept(
        self,
        compute: Callable[..., dict[str, Any]],
        trial: Trial | Transfer,
        setting: Setting,
        seed: int,
        train: jc.data.Dataset,
        test: jc.data.Dataset,
    ) -> dict[str, Any]:
        """A row from the last time, if it was made of the same things; else computed and kept."""
        name = f"{self.dataset}{'-quick' if self.quick else ''}-{trial.name}-{seed}"
        # Of changed code nothing is kept, neither rows nor checkpoints.
        directory = self.work / CODE / name.replace(", ", "-").replace(" ", "_")
        # Which other trials and how many seeds there are changes nothing.
        common = dataclasses.replace(setting, seeds=0, factors=(), methods=(), eps_factors=())
        if isinstance(trial, Transfer):
            plan = transfer_plan(trial, setting, seed, train)
            goal = plan.objective, plan.source.fingerprint, plan.target.fingerprint
        else:
            goal = objective(trial, setting.eps, setting, train.groups)
        made_of = (trial, goal, common, train.fingerprint, test.fingerprint)

        def row(directory: Path) -> dict[str, Any]:
            found = compute(trial, setting, seed, train, test, directory)
            return {"trial": trial.name, "seed": seed} | found

        return kept(directory, made_of, f"{trial.name}, seed {seed}", row)


if __name__ == "__main__":
    tyro.cli(Experiment).run()
