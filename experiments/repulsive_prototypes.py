"""Deep repulsive prototypes: what is left of "robust without adversarial training"?

    python -m experiments.repulsive_prototypes --dataset fashion_mnist
    python -m experiments.repulsive_prototypes --dataset cifar10
    python -m experiments.repulsive_prototypes --dataset fashion_mnist --part ablations
    python -m experiments.repulsive_prototypes --quick

Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness", arXiv:2105.12427:
networks that map images onto fixed, far-apart class prototypes are said to keep more than half of
CIFAR-10 under attack without adversarial training, competitively with it, and to lose less at large
radii. Beside what the released runs trained (repulsive prototypes, Linf distance, inner products):
prototypes, distance and rule that fit together (simplex, cosine), Max-Mahalanobis centres, learned
prototypes (prototype conformity, here from the start and not after a training with cross-entropy),
prototypes under PGD and by TRADES (beta 1), softmax networks trained plainly, by PGD and by TRADES
(beta 6). All are trained alike (Adam), with twice the epochs under an adversary, from weights of
the same key for each seed. Evaluations:

- published: PGD-100 (steps of 2/255) on the network's own loss, one run from a random start, its
  last iterate, eps 2 to 32/255, and PGD-20;
- published on margins: the same run, on max_{j != y} z_j - z_y instead;
- targeted: APGD on z_t - z_y for 9 targets, every iterate judged, at the same radii;
- cross-entropy: PGD on the cross-entropy of the head, at temperature 1 and at its own;
- the adaptive suite at the radius of training, `jc.evaluation.adaptive_suite`;
- common: right under the targeted attack and the suite's own loss, margins and AutoAttack, which
  every network has; this is what claims compare. Worst: under the rest of the suite as well;
- on fewer images: Square, HopSkipJump (in L2 the median distance), transfer from the two softmax
  networks of the seed, and the same embeddings by each rule.

Ablations, one factor at a time around "published" and "cosine": generators, distances, scale, d,
epochs. Claims were fixed after pilots on seeds 0 to 5 and the first 1,000 test images; seeds and
images here are others. p-values as in `experiments.clustering_effect`; three seeds, as on an
accelerator, decide none. CIFAR-10 is the JPEG q75 re-encoding.

Results: experiments/results/repulsive_prototypes-DATASET.json (-ablations), a table in .md, for the
headline figures in .png. Interrupted, the same command goes on, and parts share what they have in
common, as long as the library and the experiment stay as they are; whole seeds are also taken from
the results file.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

import jaxclus as jc
from experiments import prototypes_evaluation, prototypes_summary, prototypes_trials
from experiments.prototypes_evaluation import evaluated
from experiments.prototypes_trials import Setting, Trial, config, objective, trained, trials
from experiments.records import shown_name, written
from experiments.rows import found_before, kept, sources
from jaxclus import runs

# What rows depend on, beside their settings: as it was imported, whatever is edited since.
CODE = sources(jc, prototypes_trials, prototypes_evaluation)
SETTINGS = {
    "fashion_mnist": Setting("cnn", (), 24 / 255),
    "cifar10": Setting("cnn", (), 8 / 255),
    "cifar10 on an accelerator": Setting(
        "resnet18", (), 8 / 255, seeds=(6, 7, 8), num_images=None, epochs=15, test_images=1000,
        few_images=500, steps=100, restarts=10,
    ),
    "digits": Setting("cnn", (), 8 / 255, epochs=20, batch_size=120, first_image=0),
}  # fmt: skip
QUICK = ("standard", "published")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is left of repulsive prototypes under adaptive attacks."""

    dataset: Literal["fashion_mnist", "cifar10", "digits"] = "digits"
    """Data set."""
    part: Literal["headline", "ablations"] = "headline"
    """Methods and evaluations; one factor at a time."""
    quick: bool = False
    """Two seeds, few images, few trials: a smoke test, no result."""
    only: tuple[int, ...] = ()
    """Compute the rows of these seeds alone, so that processes or sessions share the work; results
    are written of all that there are."""
    output: Path = Path("experiments/results")
    """Directory for the results."""
    work: Path = Path("runs/repulsive_prototypes")
    """Directory for checkpoints and evaluations."""

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints what holds, and writes results, table and figures."""
        setting = self.setting()
        train, test = jc.data.load(self.dataset, "train"), jc.data.load(self.dataset, "test")
        name = f"repulsive_prototypes-{self.dataset}"
        name += (self.part != "headline") * f"-{self.part}" + self.quick * "-quick"
        known = self.output / f"{name}.json", CODE, dataclasses.asdict(setting)
        seeds = {row["seed"] for row in found_before(*known)}
        rows = list(self._rows(setting, train, test, without=seeds))
        # Another process may have written meanwhile.
        seeds = {row["seed"] for row in rows}
        rows += [row for row in found_before(*known) if row["seed"] not in seeds]
        rows.sort(key=lambda row: row["seed"])
        result = {
            "dataset": shown_name(test),
            "fingerprints": {"train": train.fingerprint, "test": test.fingerprint},
            "part": self.part,
            "setting": dataclasses.asdict(setting),
            "quick": self.quick,
            "code": CODE,
            "claims": prototypes_summary.claims(rows, setting, self.part),
            "rows": rows,
            **runs.environment(),
        }
        figures = prototypes_summary.figures(result) if self.part == "headline" else {}
        return written(self.output, name, result, prototypes_summary.table(result), figures)

    def setting(self) -> Setting:
        """The data set's setting, on this hardware."""
        accelerated = self.dataset == "cifar10" and jax.default_backend() != "cpu"
        setting = SETTINGS[self.dataset + (" on an accelerator" if accelerated else "")]
        if not self.quick:
            return setting
        return dataclasses.replace(
            setting, model="cnn", arguments=(("widths", (8,)), ("hidden", 16)), seeds=(0, 1),
            num_images=480, epochs=2, batch_size=120, first_image=0, test_images=8,
            few_images=8, embedding_size=20, steps=3, restarts=1, pictured=0, short=True,
        )  # fmt: skip

    def _rows(
        self, setting: Setting, train: jc.data.Dataset, test: jc.data.Dataset, without: set[int]
    ) -> Iterator[dict[str, Any]]:
        """What was found for each trial and each seed but these."""
        for seed in self.only or setting.seeds:
            if seed in without:
                continue
            networks: dict[str, Path] = {}
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
        networks: dict[str, Path],
    ) -> dict[str, Any]:
        """The row of a trial, computed or kept; where its network is goes into `networks`."""
        name = f"{self.dataset}{'-quick' if self.quick else ''}-{trial.name}-{seed}"
        # Of changed code nothing is kept, neither rows nor checkpoints.
        directory = self.work / CODE / name.replace(", ", "-").replace(" ", "_")
        common = dataclasses.replace(setting, seeds=())
        goal = objective(trial, setting), config(trial, setting)
        made_of = (trial, goal, common, train.fingerprint, test.fingerprint)
        sources_of_transfer = {
            name: path for name, path in networks.items() if name in ("standard", "pgd")
        }

        def compute(directory: Path) -> dict[str, Any]:
            run = trained(trial, setting, seed, train, directory)
            row = {"trial": trial.name, "seed": seed, "epochs": config(trial, setting).epochs}
            row["hardware"] = runs.environment()["hardware"]
            row |= {name: run.history[-1][name] for name in ("step", "loss", "accuracy")}
            others = {name: jc.load(path) for name, path in sources_of_transfer.items()}
            return row | evaluated(trial, setting, seed, test, run.model, others, directory)

        networks[trial.name] = directory
        made_of += (tuple(sources_of_transfer),)
        return kept(directory, made_of, f"{trial.name}, seed {seed}", compute)


if __name__ == "__main__":
    tyro.cli(Experiment).run()
