"""`jaxclus train`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from jaxclus import attacks, data, evaluation, models, runs, threat, training, zoo
from jaxclus.cli._arguments import Number
from jaxclus.training import TrainingConfig, objectives


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a classifier, plainly or against an adversary.

    A run can be killed at any moment: the same command goes on from its newest checkpoint.

    Try:
      jaxclus train digits
      jaxclus train fashion_mnist --method pgd --eps 0.1 --epochs 5
      jaxclus train cifar10 --model resnet18 --method trades --eps 8/255 --awp 0.005
      jaxclus train fashion_mnist --method pgd --eps 0.1 --cluster logits --beta 0.1
      jaxclus train cifar10 --cluster weight --teacher cifar10-resnet8-pgd --num-groups 2
    """

    dataset: tyro.conf.Positional[str]
    """A name (`jaxclus data list`), a directory of image folders, or an .npz file."""
    model: str = "cnn"
    """Architecture: cnn, resnet8, resnet20, resnet18, resnet34, resnet50, preact_resnet18,
    wide_resnet_DEPTH_WIDTH, vgg11, vgg13, vgg16, vgg19, densenet121, alexnet,
    lipschitz_resnet8, lipschitz_resnet18."""
    method: Literal["standard", "pgd", "trades", "mart", "fast", "free"] = "standard"
    """Plain training, or against an adversary: on PGD's images, TRADES, MART, one step from a
    random start (fast), gradients reused four times over (free: give a quarter of the epochs)."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the adversary's ball."""
    eps: Number | None = None
    """Radius of the ball on the pixel scale [0, 1]; needed for all methods but standard, which
    has no adversary."""
    attack_steps: int | None = None
    """Gradient steps of the adversary of pgd, trades and mart; default 10."""
    step_size: Number | None = None
    """Length of its steps; default 2.5 * eps / attack_steps; fast 1.25 * eps, free eps."""
    tradeoff: float | None = None
    """Weight of the divergence in trades (default 6) and mart (default 5)."""
    awp: float | None = None
    """Size of an adversarial perturbation of the weights (0.005 is usual); default none."""
    cluster: Literal["logits", "weight"] | None = None
    """Clustering regulariser: on the logits, as published, or on the implicit weight."""
    beta: float | None = None
    """Its weight; default 0.1."""
    teacher: Path | None = None
    """A trained network (run, file, or name in `jaxclus zoo`) whose tree gives the groups of the
    regulariser; default: the groups that ship for the data set."""
    num_groups: int | None = None
    """How many groups the teacher's tree is cut into; needed with --teacher."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainingConfig
    )
    """Optimiser, schedule, bookkeeping."""
    validation: Annotated[float, tyro.conf.arg(metavar="[0, 1)")] = 0.05
    """Share of the training set held out, by class, to select the best epoch; 0 for none."""
    num_images: int | None = None
    """Train on the first so many images only."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial weights, data order and attacks; each makes a run of its own."""
    output: Path = Path("runs")
    """Directory for the run directories."""
    name: str | None = None
    """Name of the run directories, before the seed; default DATASET-MODEL-METHOD and more."""
    deterministic: bool = False
    """Bit-identical results on GPUs too, at some cost in speed."""

    def run(self) -> None:
        """Trains one run for each seed; they share one compiled program."""
        if not self.seeds:
            raise ValueError("`seeds` must hold at least one seed, as --seeds 0 1 2, got none")
        if self.deterministic:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
        train = data.load(self.dataset, "train")
        if self.num_images is not None:
            train = train.take(self.num_images)
        for seed in self.seeds:
            directory = self.directory(seed)
            accuracy = self._train(train, seed, directory)
            print(f"{directory}: {accuracy}")

    def directory(self, seed: int) -> Path:
        """The run directory of a seed."""
        default = "-".join([Path(self.dataset).stem, self.model, self._method_name()])
        return self.output / f"{self.name or default}-seed{seed}"

    def _method_name(self) -> str:
        """The method with what is around it, as "pgd-awp-logits_clustering"."""
        parts = [self.method]
        parts += [] if self.awp is None else ["awp"]
        parts += [] if self.cluster is None else [f"{self.cluster}_clustering"]
        return "-".join(parts)

    def objective(self, train: data.Dataset) -> objectives.Objective:
        """What is minimised."""
        self._refuse_what_nobody_reads()
        found = self._method()
        if self.awp is not None:
            found = objectives.AWP(found, self.awp)
        if self.cluster is None:
            return found
        kind = {"logits": objectives.LogitClustering, "weight": objectives.WeightClustering}
        weight = {} if self.beta is None else {"beta": self.beta}
        return kind[self.cluster](found, self._groups(train), **weight)

    def _refuse_what_nobody_reads(self) -> None:
        # Ignored, --beta without --cluster would train another network than the user believes.
        if self.tradeoff is not None and self.method not in ("trades", "mart"):
            raise ValueError(f"`tradeoff` is a setting of trades and mart, not of {self.method}")
        if self.attack_steps is not None and self.method not in ("pgd", "trades", "mart"):
            raise ValueError(
                f"`attack_steps` is a setting of pgd, trades and mart, not of {self.method}"
            )
        # That linf was asked for cannot be told from its being the default.
        norm = None if self.norm == "linf" else self.norm
        for name, value in (("eps", self.eps), ("step_size", self.step_size), ("norm", norm)):
            if value is not None and self.method == "standard":
                raise ValueError(
                    f"`{name}` is a setting of training against an adversary, as --method pgd, "
                    "not of standard"
                )
        for name in ("beta", "teacher", "num_groups"):
            if getattr(self, name) is not None and self.cluster is None:
                raise ValueError(f"`{name}` is a setting of --cluster logits or weight, got none")
        if (self.teacher is None) != (self.num_groups is None):
            raise ValueError("`teacher` and `num_groups` must be given together, got one of them")
        if self.method == "free" and self.norm != "linf":
            raise ValueError(f"`norm` must be linf for --method free, got {self.norm}")

    def _method(self) -> objectives.Objective:
        if self.method == "standard":
            return objectives.Standard()
        if self.eps is None:
            raise ValueError(f"`eps` must be given for --method {self.method}, as --eps 8/255")
        ball = threat.create(self.norm, self.eps)
        steps = 10 if self.attack_steps is None else self.attack_steps
        if self.method == "pgd":
            attack = attacks.PGD(ball, steps=steps, step_size=self.step_size)
            return objectives.Adversarial(attack)
        if self.method == "fast":
            return objectives.FastAdversarial(ball, self.step_size)
        if self.method == "free":
            return objectives.FreeAdversarial(ball, step_size=self.step_size)
        kind = {"trades": objectives.TRADES, "mart": objectives.MART}
        weight = {} if self.tradeoff is None else {"beta": self.tradeoff}
        return kind[self.method](ball, steps=steps, step_size=self.step_size, **weight)

    def _groups(self, train: data.Dataset) -> data.Groups:
        """The groups of the clustering regulariser."""
        if self.teacher is not None and self.num_groups is not None:
            teacher = zoo.load(self.teacher)
            fits, found = (train.num_classes, train.input_shape), teacher.spec
            if found is not None and (found.num_classes, found.input_shape) != fits:
                raise ValueError(
                    f"`teacher` must tell {fits[0]} classes of images {fits[1]} apart, got one for "
                    f"{found.num_classes} classes of images {found.input_shape}"
                )
            return evaluation.discover_groups(teacher, train.input_shape, self.num_groups)
        if train.groups is None:
            raise ValueError(
                f"`teacher` must be given for --cluster, since {train.name} comes without groups"
            )
        return train.groups

    def _train(self, train: data.Dataset, seed: int, directory: Path) -> str:
        init, split, fit = jax.random.split(jax.random.key(seed), 3)
        held_out = None
        if self.validation:
            train, held_out = train.holdout(split, self.validation)
        model = models.create(self.model, train.num_classes, train.input_shape, init)
        objective = self.objective(train)
        record = self._record(train, model, objective, seed)
        # A run that was made with other settings is refused below, and keeps its record.
        if not (directory / "config.json").exists():
            runs.write_json(directory / "config.json", record)
        run = training.fit(
            fit, model, train, objective, self.training, validation=held_out, directory=directory
        )
        runs.write_json(directory / "config.json", record)
        last = next(line for line in reversed(run.history) if "loss" in line)
        shown = [f"training loss {last['loss']:.3f}", f"training accuracy {last['accuracy']:.3f}"]
        if held_out is not None:
            names = ("validation_robust_accuracy", "validation_accuracy")
            lines = [line for line in run.history if names[1] in line]
            # The first of the best: the epoch whose weights `fit` returns.
            best = max(lines, key=lambda line: next(line[n] for n in names if n in line))
            shown.append(f"best epoch {best['epoch']}")
            shown += [f"{n.replace('_', ' ')} {best[n]:.3f}" for n in names[::-1] if n in best]
        return ", ".join(shown)

    def _record(
        self,
        train: data.Dataset,
        model: models.Classifier,
        objective: objectives.Objective,
        seed: int,
    ) -> dict:
        attack = objective.validation_attack()
        adversary = {}
        if attack is not None:
            adversary = {
                "attack": repr(attack),
                "norm": attack.ball.name,
                "eps": float(attack.ball.eps),
            }
        return {
            "name": self.directory(seed).name,
            "dataset": {
                "name": self.dataset,
                "split": "train",
                "num_images": len(train),
                "fingerprint": train.fingerprint,
            },
            "model": model.spec.to_json() if model.spec else {},
            "objective": {"name": self._method_name(), "settings": repr(objective), **adversary},
            "training": dataclasses.asdict(self.training) | {"validation": self.validation},
            "seed": seed,
            **runs.environment(),
        }
