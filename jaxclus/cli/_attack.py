"""`jaxclus attack`."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from jaxclus import _classifier, attacks, evaluation, runs, threat, zoo
from jaxclus._classifier import Classifier
from jaxclus.cli._arguments import Number, artefacts, dataset_of
from jaxclus.data import Dataset, to_float

# What the command line gives an attack where it is not told: more steps than in training.
_DEFAULTS: dict[str, dict[str, Any]] = {"pgd": {"steps": 20}, "mi-fgsm": {"steps": 20}}


@dataclasses.dataclass(frozen=True)
class Attack:
    """Measure the accuracy of a trained model under attack, at one or several radii.

    A run that was stopped goes on where it was when the same command is given again.

    Try:
      jaxclus attack runs/digits-cnn-pgd-seed0 --eps 0.05 0.1 0.2
      jaxclus attack runs/cifar10-resnet18-pgd-seed0 --eps 8/255 --attack autoattack
      jaxclus attack model.safetensors --dataset mnist --norm l2 --eps 2 --output out
    """

    run_path: tyro.conf.Positional[Path]
    """A run directory of `jaxclus train`, a .safetensors file, or a network of `jaxclus zoo`."""
    eps: tuple[Number, ...]
    """Radii on the pixel scale [0, 1]."""
    attack: Literal[
        "pgd", "fgsm", "mi-fgsm", "mt-pgd", "apgd", "apgd-t", "fab", "fab-t", "square",
        "autoattack", "carlini-wagner", "deepfool", "hop-skip-jump",
    ] = "pgd"  # fmt: skip
    """The attack."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    steps: int | None = None
    """Steps of a search; default 20 for pgd and mi-fgsm, else the published number."""
    restarts: int | None = None
    """Searches from other random points; default 1."""
    loss: Literal["cross_entropy", "margin", "dlr"] | None = None
    """What the attack maximises; default cross_entropy."""
    targets: int | None = None
    """Target classes of each image (apgd-t, fab-t, mt-pgd); default 9."""
    queries: int | None = None
    """Queries of square; default 5,000."""
    version: Literal["standard", "plus"] | None = None
    """Version of autoattack; default standard."""
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
    examples: int = 8
    """Adversarial images to keep for the report, at the middle radius."""
    seed: int = 0
    """Seed of the attack's randomness."""
    output: Path | None = None
    """Directory for the results; default: the run directory."""

    def run(self) -> None:
        """Attacks, prints a table, and writes attacks/NAME.json and .npz."""
        if not self.eps:
            raise ValueError("`eps` must hold at least one radius, as --eps 4/255 8/255, got none")
        directory = artefacts(self.run_path, self.output) / "attacks"
        adversary = create(
            self.attack, threat.create(self.norm, self.eps[0]), steps=self.steps,
            restarts=self.restarts, loss=self.loss, targets=self.targets, queries=self.queries,
            version=self.version,
        )  # fmt: skip
        model = zoo.load(self.run_path)
        images = dataset_of(self.run_path, self.dataset, self.split, self.num_images)
        key = jax.random.key(self.seed)
        with resumable(directory, self) as work:
            found = evaluation.robustness_curve(
                key, model, adversary, images, self.eps, batch_size=self.batch_size,
                directory=work, microbatch=self.microbatch,
            )  # fmt: skip
            path = directory / f"{file_name(self.attack, self.norm, self.version)}.json"
            runs.write_json(path, record(found, images, self.seed))
        middle = found[(len(found) - 1) // 2]
        save_examples(path.with_suffix(".npz"), model, middle, images, self.examples)
        print(
            f"clean accuracy {found[0].clean_accuracy:.4f} on {len(images)} images of {images.name}"
        )
        for result in found:
            print_result(result, str(self.seed))
        print(f"written: {path}")


def file_name(attack: str, norm: str, version: str | None) -> str:
    """The name of the results, as "autoattack-plus-linf"."""
    versions = [] if version in (None, "standard") else [version]
    return "-".join([attack, *versions, norm])


def create(name: str, ball: threat.Threat, **settings: Any) -> attacks.Attack:
    """The attack of a name, with the settings that are not None."""
    cls = attacks.ATTACKS[name]
    known = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in known:
            raise ValueError(f"`{key}` is no setting of {name}")
    norms = getattr(cls, "NORMS", tuple(threat.THREATS))
    if ball.name not in norms:
        raise ValueError(f"`norm` must be one of {', '.join(norms)} for {name}, got {ball.name}")
    chosen = {"threat": ball} | ({"norm": ball.name} if "norm" in known else {})
    return cls(**chosen | _DEFAULTS.get(name, {}) | given)


@contextmanager
def resumable(directory: Path, command: Any) -> Iterator[Path]:
    """A folder for the state of this command, which the end of the work removes.

    Commands with other settings have other folders.
    """
    digest = hashlib.sha256(repr(command).encode()).hexdigest()[:12]
    folder = directory / f".unfinished-{digest}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def record(found: list[evaluation.Robustness], images: Dataset, seed: int) -> dict[str, Any]:
    """What attacks/NAME.json holds."""
    first = found[0].to_json()
    shared = ("attack", "norm", "split", "num_images", "clean_accuracy")
    return {
        **{name: first[name] for name in shared},
        "dataset": images.name,
        "seed": seed,
        "curve": [result.to_json() for result in found],
        **runs.environment(),
    }


def save_examples(
    path: Path, model: Classifier, found: evaluation.Robustness, images: Dataset, count: int
) -> None:
    """Some images with their adversarial ones and the model's predictions, as an .npz file."""
    few = images.take(min(count, len(images)))
    x, x_adv = to_float(few.images), found.adversarial[: len(few)]
    predict = _classifier.logits(model)
    with jax.default_matmul_precision("highest"):  # as in the verdicts
        before, after = predict(x).argmax(axis=1), predict(jax.numpy.asarray(x_adv)).argmax(axis=1)
    with runs.atomic_file(path) as file:
        np.savez_compressed(
            file,
            images=np.asarray(x),
            adversarial=np.asarray(x_adv),
            labels=few.labels,
            predictions=np.asarray(before),
            adversarial_predictions=np.asarray(after),
            eps=np.asarray(found.attack.ball.eps, np.float32),
        )  # pyright: ignore[reportArgumentType]


def print_result(result: evaluation.Robustness, seed: str) -> None:
    """One line with the robust accuracy and, for an ensemble, one for each member."""
    eps = float(result.attack.ball.eps)
    print(
        f"robust accuracy {result.robust_accuracy:.4f}  {result.attack.ball.name} eps {eps:.4g} "
        f"({eps * 255:.4g}/255), {evaluation.describe(result.attack)}, seed {seed}"
    )
    if len(result.members) > 1:
        for member in result.members:
            print(
                f"  after {member.name:<10} {member.robust.mean():.4f}  "
                f"{member.attacked} images attacked, {member.seconds:.1f} s"
            )
    for name, reason in result.skipped.items():
        print(f"  without {name}: {reason}")
    if result.disagreements:
        print(f"  {result.disagreements} images are judged otherwise in batches of half the size")
