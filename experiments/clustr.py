"""ClusTR: how much of its robustness is there when the attack does not look at saturated scores?

    python -m experiments.clustr --dataset fashion_mnist
    python -m experiments.clustr --dataset mnist
    python -m experiments.clustr --dataset cifar10
    python -m experiments.clustr --dataset fashion_mnist --part ablations
    python -m experiments.clustr --dataset fashion_mnist --part certificates
    python -m experiments.clustr --quick

Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682: embeddings that
cluster, classified by their nearest clusters, are said to be more robust than adversarial training,
and most of all with a one-step consistency term (QTRADES). Beside both: networks trained by
themselves, the same continued as ClusTR is trained, networks under PGD and by TRADES; and ClusTR on
a Lipschitz-bounded network, whose distances prove something. Evaluations:

- published: PGD (20 and 100 steps of 2/255, 10 restarts) on the scores S, eps 2, 8, 16 and
  25.5/255; of an image's restarts the one of the largest cross-entropy counts, even if another one
  fooled the network;
- scores: the same points; an image counts where the classifier is right at it and at all of them;
- logits: the same attack on the head's log-domain logits, judged so as well;
- AutoAttack on the logits, at 8/255 and the radius of training;
- worst: an image counts where the classifier withstands all of these at the radius of training, and
  targeted APGD on the distances to the clusters.

The published choice of restarts is applied on the logits as well: what it reports there is not the
scores' doing. Where an attack stands still, all its gradients 0, is counted, on scores and on
logits; and of the images that one restart on the scores leaves, on how many their loss is flat, its
gradient is opposed to that of the logits, at the end and at the start, and as many further steps
succeed, on the logits and on the scores. Networks without clusters have one kind of logits, whose
"published" evaluation is given beside.

Trainings are short and at a higher rate than published: claims are about these. ClusTR goes on from
the standard network, as published; PGD training and TRADES have as many epochs as both together.
Ablations, one factor at a time around QTRADES: lambda, K, m, alpha, L, epochs; the published code's
mistakes, all at once; its adversary of TRADES; ClusTR free; on 500 images, at the radius of
training alone. All trials of a seed start from weights of the same key. The claims were fixed after
a pilot on Fashion-MNIST, on seeds 0 to 5 and the first 1,000 test images; seeds and images here are
others: 1,000 of Fashion-MNIST, 500 of the other sets, 100 for the Lipschitz-bounded network.
Fashion-MNIST's headline took about four hours on two cores, MNIST's over three, CIFAR-10's over
two, the ablations just under two; the certificates about one. p-values as in
`experiments.clustering_effect`. CIFAR-10 is the JPEG q75 re-encoding.

Results: experiments/results/clustr-DATASET.json (-ablations, -certificates), a table in .md, for
the headline a figure in .png. Interrupted, the same command goes on, as long as the library and the
experiment stay as they are.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

import jaxclus as jc
from experiments import clustr_evaluation, clustr_mechanism, clustr_summary, clustr_trials
from experiments.clustr_evaluation import evaluated
from experiments.clustr_trials import Setting, Trial, config, objective, trained, trials
from experiments.records import shown_name, written
from experiments.rows import kept, sources
from jaxclus import runs

# What rows depend on, beside their settings: as it was imported, whatever is edited since.
CODE, MECHANISM = sources(jc, clustr_trials, clustr_evaluation), sources(clustr_mechanism)
NARROW = (("width", 8), ("hidden", 64))  # the Lipschitz-bounded network
SETTINGS = {
    "fashion_mnist": Setting("cnn", (), NARROW, 25.5 / 255, num_images=20_000),
    "mnist": Setting("cnn", (), NARROW, 25.5 / 255, num_images=20_000, test_images=500),
    "cifar10": Setting("cnn", (), NARROW, 8 / 255, num_images=20_000, test_images=500),
    "cifar10 on an accelerator": Setting("resnet18", (), (), 8 / 255, seeds=(6, 7, 8), epochs=15),
    "digits": Setting(
        "cnn", (), NARROW, 25.5 / 255, epochs=20, batch_size=120, first_image=0, test_images=360
    ),
}
QUICK = ("standard", "qtrades", "standard, Lipschitz", "clustr, Lipschitz", "qtrades, as published")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """How much of ClusTR's robustness is gradient masking."""

    dataset: Literal["fashion_mnist", "mnist", "cifar10", "digits"] = "digits"
    """Data set."""
    part: Literal["headline", "ablations", "certificates"] = "headline"
    """Methods and evaluations; one factor at a time; Lipschitz-bounded networks."""
    quick: bool = False
    """Two seeds, few images, few trials: a smoke test, no result."""
    output: Path = Path("experiments/results")
    """Directory for the results."""
    work: Path = Path("runs/clustr")
    """Directory for checkpoints and evaluations."""

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints what holds, and writes results, table and figure."""
        setting = self.setting()
        train, test = jc.data.load(self.dataset, "train"), jc.data.load(self.dataset, "test")
        rows = list(self._rows(setting, train, test))
        result = {
            "dataset": shown_name(test),
            "fingerprints": {"train": train.fingerprint, "test": test.fingerprint},
            "part": self.part,
            "setting": dataclasses.asdict(setting),
            "quick": self.quick,
            "code": CODE,
            "claims": clustr_summary.claims(rows, setting, self.part),
            "rows": rows,
            **runs.environment(),
        }
        name = f"clustr-{self.dataset}"
        name += (self.part != "headline") * f"-{self.part}" + self.quick * "-quick"
        figures = {"": clustr_summary.figure(result)} if self.part == "headline" else {}
        return written(self.output, name, result, clustr_summary.table(result), figures)

    def setting(self) -> Setting:
        """The data set's setting, on this hardware."""
        accelerated = self.dataset == "cifar10" and jax.default_backend() != "cpu"
        setting = SETTINGS[self.dataset + (" on an accelerator" if accelerated else "")]
        if self.part == "ablations":
            setting = dataclasses.replace(setting, test_images=min(500, setting.test_images))
        if not self.quick:
            return setting
        return dataclasses.replace(
            setting, model="cnn", arguments=(("widths", (8,)), ("hidden", 16)), seeds=(0, 1),
            lipschitz=(("width", 2), ("hidden", 16)), num_images=480, epochs=2, batch_size=120,
            first_image=0, test_images=8, lipschitz_images=8, nearest=(1,), short=True,
        )  # fmt: skip

    def _rows(
        self, setting: Setting, train: jc.data.Dataset, test: jc.data.Dataset
    ) -> Iterator[dict[str, Any]]:
        """What was found for each seed and trial."""
        for seed in setting.seeds:
            networks: dict[str, Any] = {}
            for trial in trials(self.part):
                if not self.quick or trial.name in QUICK:
                    yield self._row(trial, setting, seed, train, test, networks)

    def _row(
        self,
        trial: Trial,
        setting: Setting,
        seed: int,
        train: jc.data.Dataset,
        test: jc.data.Dataset,
        networks: dict[str, Any],
    ) -> dict[str, Any]:
        """The row of a trial, computed or kept; its network is remembered for those after it."""
        name = f"{self.dataset}-{self.part}{'-quick' * self.quick}-{trial.name}-{seed}"
        # Of changed code nothing is kept, neither rows nor checkpoints.
        directory = self.work / CODE / name.replace(", ", "-").replace(" ", "_")
        common = dataclasses.replace(setting, seeds=())
        goal = objective(trial, setting), config(trial, setting)
        made_of = (trial, goal, common, train.fingerprint, test.fingerprint)
        if trial.start is not None:
            (source,) = (t for t in trials(self.part) if t.name == trial.start)
            made_of += (source, objective(source, setting), config(source, setting))

        def compute(directory: Path) -> dict[str, Any]:
            start = None if trial.start is None else networks[trial.start]()
            run = trained(trial, setting, seed, train, start, directory)
            row = {"trial": trial.name, "seed": seed, "steps": run.history[-1]["step"]}
            row["epochs"] = config(trial, setting).epochs
            return row | evaluated(
                trial, setting, seed, test, run.model, directory, self.part == "headline"
            )

        def looked_into(_: Path) -> dict[str, Any]:
            key = jax.random.fold_in(jax.random.key(seed), 2)
            few = test.subset(setting.first_image + np.arange(setting.test_images))
            return clustr_mechanism.stopped_short(key, jc.load(directory), few, setting)

        networks[trial.name] = lambda: jc.models.parts(jc.load(directory))[0]
        label = f"{trial.name}, seed {seed}"
        row = kept(directory, made_of, label, compute)
        if self.part == "headline" and trial.method in ("clustr", "qtrades"):
            made_of += (MECHANISM,)
            where = directory / "mechanism"
            row["stopped_short"] = kept(where, made_of, f"{label}, mechanism", looked_into)
        return row


if __name__ == "__main__":
    tyro.cli(Experiment).run()
