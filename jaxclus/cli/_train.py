"""`jaxclus train`."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from jaxclus import data, evaluation, models, prototypes, runs, training, zoo
from jaxclus.cli import _methods
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
      jaxclus train fashion_mnist --method clustr --start fashion_mnist-cnn-standard \
        --batch-size 240 --optimizer adamw --learning-rate 1e-3 --weight-decay 0
      jaxclus train digits --method prototypes --embedding-size 20 --generator simplex \
        --distance cosine --rule cosine --optimizer adamw --learning-rate 3e-3 --epochs 12
    """

    dataset: tyro.conf.Positional[str]
    """A name (`jaxclus data list`), a directory of image folders, or an .npz file."""
    model: str | None = None
    """Architecture, default cnn:
    cnn, resnet8, resnet20, resnet18, resnet34, resnet50, preact_resnet18,
    wide_resnet_DEPTH_WIDTH, vgg11, vgg13, vgg16, vgg19, densenet121, alexnet,
    lipschitz_resnet8, lipschitz_resnet18."""
    embedding_size: int | None = None
    """Size of a dense layer, without activation, before the head; default none. The prototypes
    methods need one: as published 100 for 10 classes, 500 for 100."""
    start: Path | None = None
    """A trained network (run, file, or name in `jaxclus zoo`) to go on from, instead of --model;
    the ClusTR methods are published so."""
    method: _methods.Method = "standard"
    """Plain training, or against an adversary: on PGD's images, TRADES, MART, one step from a
    random start (fast), gradients reused four times over (free: give a quarter of the epochs).
    Or ClusTR, classified by nearest clusters: alone, with QTRADES, with the adversary of TRADES,
    or with free perturbations; its batch size must be a multiple of --clusters-per-batch. It is
    published with --batch-size 240 --optimizer adamw --learning-rate 1e-4 --weight-decay 0, and
    learns little at the default rate of sgd. Or onto class prototypes that stand still: plainly
    (Deep Repulsive Prototypes), on PGD's images, by TRADES; or prototypes_learned, which are
    trained along (prototype conformity)."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the adversary's ball."""
    eps: Number | None = None
    """Radius of the ball on the pixel scale [0, 1]; needed for all methods with an adversary, that
    is all but standard, clustr, prototypes and prototypes_learned."""
    attack_steps: int | None = None
    """Gradient steps of the adversary of pgd, trades, mart, clustr_trades, prototypes_pgd and
    prototypes_trades; default 10."""
    step_size: Number | None = None
    """Length of its steps; default 2.5 * eps / attack_steps; fast and clustr_qtrades 1.25 * eps,
    free eps."""
    tradeoff: float | None = None
    """Weight of the divergence in trades (default 6), mart (default 5) and prototypes_trades
    (default 1), and of the consistency term in clustr_qtrades and clustr_trades (default 8)."""
    clusters_per_class: int | None = None
    """ClusTR: clusters of each class; default 2."""
    clusters_per_batch: int | None = None
    """ClusTR: clusters in a batch; default 12. The batch size must be a multiple of it."""
    alpha: float | None = None
    """ClusTR: margin of the Magnet loss; default 12.5."""
    nearest: int | None = None
    """ClusTR: how many clusters the published scores count; default all."""
    cross_entropy_weight: float | None = None
    """ClusTR: weight of an additional cross-entropy on the logits; default 0."""
    num_init: int | None = None
    """ClusTR: restarts of k-means; default 1, as published for CIFAR-10 (10 for other sets)."""
    max_iter: int | None = None
    """ClusTR: iterations of k-means; default 20, as published for CIFAR-10 (40 for others)."""
    as_published: bool = False
    """ClusTR and prototypes: with the published code's mistakes, as far as the library can bring
    them back."""
    generator: prototypes.Generator | None = None
    """Prototypes: where they come from; default repulsive."""
    generator_steps: int | None = None
    """Prototypes: steps of a generator that descends; default 100, of hyperspherical 10,000."""
    distance: prototypes.TrainingDistance | None = None
    """Prototypes: what pulls embeddings to them; default linf."""
    rule: prototypes.Rule | None = None
    """Prototypes: how they classify; default inner_product, of learned ones l2."""
    scale: float | None = None
    """Prototypes: what they are multiplied with; default 1."""
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
    """Share of the training set held out, by class, to select the best epoch, of equal ones the
    first; 0 for none. ClusTR is published without: it begins where accuracy is high already."""
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
        default = "-".join([Path(self.dataset).stem, self._architecture(), self._method_name()])
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
        found = _methods.objective(self.method, self._settings())
        if self.awp is not None:
            found = objectives.AWP(found, self.awp)
        if self.cluster is None:
            return found
        kind = {"logits": objectives.LogitClustering, "weight": objectives.WeightClustering}
        weight = {} if self.beta is None else {"beta": self.beta}
        return kind[self.cluster](found, self._groups(train), **weight)

    def _refuse_what_nobody_reads(self) -> None:
        # Ignored, --beta without --cluster would train another network than the user believes.
        _methods.refuse_what_it_does_not_read(self.method, self._settings())
        for name in ("beta", "teacher", "num_groups"):
            if getattr(self, name) is not None and self.cluster is None:
                raise ValueError(f"`{name}` is a setting of --cluster logits or weight, got none")
        if self.cluster == "weight" and self.method in _methods.WITHOUT_OWN_HEAD:
            raise ValueError(
                "`cluster` must not be weight for a method that does not train the network's own "
                f"head, got --method {self.method}"
            )
        if (self.teacher is None) != (self.num_groups is None):
            raise ValueError("`teacher` and `num_groups` must be given together, got one of them")

    def _settings(self) -> dict[str, Any]:
        """What was given of the settings that some methods read and others do not."""
        return {name: getattr(self, name) for name in _methods.NAMES}

    @functools.cached_property
    def _started(self) -> models.Classifier | None:
        """The network to go on from."""
        if self.start is None:
            return None
        if self.model is not None:
            raise ValueError(f"`model` must not be given beside `start`, got {self.model}")
        if self.embedding_size is not None:
            raise ValueError(
                f"`embedding_size` must not be given beside `start`, got {self.embedding_size}"
            )
        return models.parts(zoo.load(self.start))[0]

    def _architecture(self) -> str:
        if self._started is None:
            return self.model or "cnn"
        return self._started.spec.name if self._started.spec else str(self.start)

    def _initial(self, train: data.Dataset, key: jax.Array) -> models.Classifier:
        """The network before training."""
        if self._started is not None:
            return self._started
        size: dict[str, Any] = (
            {} if self.embedding_size is None else {"embedding_size": self.embedding_size}
        )
        return models.create(
            self._architecture(), train.num_classes, train.input_shape, key, **size
        )

    def _groups(self, train: data.Dataset) -> data.Groups:
        """The groups of the clustering regulariser."""
        if self.teacher is not None and self.num_groups is not None:
            teacher, head = models.parts(zoo.load(self.teacher))
            if head is not None:
                raise ValueError(
                    "`teacher` must be a network that classifies with its own head, got one with a "
                    f"{type(head).__name__}: {self.teacher}"
                )
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
        model = self._initial(train, init)
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
            **({} if self.start is None else {"start": str(self.start)}),
            "objective": {"name": self._method_name(), "settings": repr(objective), **adversary},
            "training": dataclasses.asdict(self.training) | {"validation": self.validation},
            "seed": seed,
            **runs.environment(),
        }
