"""Attacks made for classifiers by prototypes or clusters, all of them in one call."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import parallel, runs
from jaxclus._classifier import Classifier
from jaxclus.attacks import Temperature
from jaxclus.attacks.adaptive import calibrated_temperature
from jaxclus.clustr import ClusterClassifier
from jaxclus.compose import Chain
from jaxclus.data import Dataset
from jaxclus.evaluation._adaptive_inputs import ITEMS, check, named_loss, parts
from jaxclus.evaluation._adaptive_plan import ATTACKS, Plan
from jaxclus.evaluation._masking import Masking, box_radius, masking
from jaxclus.evaluation._predict import predict
from jaxclus.evaluation._result import Robustness, as_digits
from jaxclus.evaluation._robustness import robustness
from jaxclus.evaluation._softmax_head import softmax_head
from jaxclus.losses import Loss
from jaxclus.prototypes import PrototypeHead
from jaxclus.threat import Threat


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveSuite:
    """What `adaptive_suite` found on n images.

    Attributes:
        results: the verdicts of each item that ran, by its name; every item attacks all images.
        not_run: items, or attacks of items, that did not run, each with the reason.
        masking: the masking checks, if they ran.
        temperature: what the logits were divided by for AutoAttack.
        seed: the key's data.
    """

    results: Mapping[str, Robustness]
    not_run: Mapping[str, str]
    masking: Masking | None
    temperature: float
    seed: tuple[int, ...]

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without attack."""
        return self._any.clean_accuracy

    @property
    def robust(self) -> np.ndarray:
        """Whether each image stands after every item, bool [n]."""
        return np.all([found.robust for found in self.results.values()], axis=0)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that stand after every item: the worst case."""
        return float(self.robust.mean())

    @property
    def masking_gap(self) -> float | None:
        """Share of images that stand after "own-loss" and not in the worst case.

        What an evaluation that attacks the defence's own loss takes for robustness, however hard it
        tries: with many restarts of which every iterate is judged. A published evaluation that
        tries less is off by more. None if that item did not run.
        """
        own = self.results.get("own-loss")
        return None if own is None else own.robust_accuracy - self.robust_accuracy

    @property
    def gradient_free_alone(self) -> float | None:
        """Share of images that noise, Square or HopSkipJump break, and no attack with gradients.

        Above 0, gradients fail to find what is there. None if no item of a kind ran.
        """
        free = self.results.keys() & {"noise", "gradient-free"}
        # AutoAttack ends with Square.
        others = [
            [member for member in self.results[name].members if member.name != "square"][-1].robust
            for name in self.results.keys() - free
        ]
        if not free or not others:
            return None
        return float((np.all(others, axis=0) & ~self.robust).mean())

    @property
    def adversarial(self) -> np.ndarray:
        """For each image what the first item to break it found, else itself, [n, h, w, c]."""
        x_adv = np.array(self._any.adversarial)  # in memory, where it may be a file
        for found in reversed(list(self.results.values())):
            broken = found.clean & ~found.robust
            x_adv[broken] = found.adversarial[broken]
        return x_adv

    def to_json(self) -> dict[str, Any]:
        """All of it but the images as JSON values, the verdicts as strings of 0 and 1."""
        ball = self._any.attack.ball
        return {
            "norm": ball.name,
            "eps": float(ball.eps),
            "eps_255": float(ball.eps) * 255,
            "dataset": self._any.dataset,
            "split": self._any.split,
            "num_images": len(self._any.clean),
            "seed": list(self.seed),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "masking_gap": self.masking_gap,
            "gradient_free_alone": self.gradient_free_alone,
            "temperature": self.temperature,
            "robust": as_digits(self.robust),
            "items": {name: found.to_json() for name, found in self.results.items()},
            "not_run": dict(self.not_run),
            "masking": None if self.masking is None else self.masking.to_json(),
            **runs.environment(),
        }

    @property
    def _any(self) -> Robustness:
        return next(iter(self.results.values()))


def adaptive_suite(
    key: jax.Array,
    model: Classifier,
    data: Dataset,
    threat: Threat,
    own_loss: Loss | None = None,
    embed: Callable[[jax.Array], jax.Array] | None = None,
    head: PrototypeHead | ClusterClassifier | None = None,
    surrogates: Mapping[str, Classifier] | None = None,
    *,
    items: Sequence[str] = ITEMS,
    steps: int = 100,
    restarts: int = 10,
    directory: Path | str | None = None,
    microbatch: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> AdaptiveSuite:
    """Attacks a classifier by prototypes or clusters with all that is made for such models.

    Each item attacks every image that is classified correctly; inside an item, each attack those
    that the ones before it left standing. Every iterate of every restart is judged by the model.

    1. "noise": 100 points drawn from the ball.
    2. "own-loss" (A1): PGD and APGD on `own_loss`, with `restarts` restarts.
    3. "margin" (A2): PGD on max_{i != y} z_i - z_y with `restarts` restarts, and on z_t - z_y for 9
       targets t.
    4. "prototypes" (A3): targeted APGD, 9 targets t, on -D_t and on D_y - D_t, D_c the distance of
       the embedding to the nearest prototype or centre of class c: L2, 1 - cos, and the L8 norm for
       a smooth Linf.
    5. "autoattack" (A4): standard AutoAttack on logits / T, T from
       `jc.attacks.adaptive.calibrated_temperature`.
    6. "gradient-free" (A5): Square with 5,000 queries, and HopSkipJump in the threat's norm, where
       it is made for it (in another norm what it finds is rarely in the ball).
    7. "transfer" (A6): APGD and targeted APGD on a linear softmax head that is fitted on the
       embeddings of `data` with its labels, and on each surrogate.
    8. "masking": `jc.evaluation.masking` on logits / T, 100 images in one batch; not kept in
       `directory`, and not run where the ball covers the whole pixel box.

    An item whose inputs are missing is reported in `not_run`.

    Args:
        key: a typed key.
        model: a classifier that draws no random numbers.
        data: the images.
        threat: the threat model.
        own_loss: what the defence's own evaluation maximises, (embeddings [b, d], y [b]) -> [b], as
            `lambda h, y: jc.prototypes.prototype_loss(h, head.prototypes[y])`; of the logits [b, k]
            where there is no `embed`.
        embed: images -> embeddings [b, d], a pytree of arrays; default: all of a `jc.Chain` before
            its prototype or cluster head, whatever chains and temperatures are around it.
        head: the head that has the prototypes or centres; default: that of such a chain.
        surrogates: other classifiers of the same images, by name: pytrees of arrays.
        items: names of `jc.evaluation.ITEMS`, those to run; at least one other than "masking",
            whose inputs are there.
        steps: of each round of PGD and APGD in items 2 to 4 and 7, at least 1.
        restarts: in items 2 and 3, at least 1.
        directory: where to keep each item, in a folder of its name, to go on from there (on a
            machine of the same kind: T and the linear head, computed anew, must be the same).
        microbatch, devices, progress: as for `jc.evaluation.robustness`.

    Returns:
        The verdicts of each item that ran, their worst case, and what did not run.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    References:
        Tramer, Carlini, Brendel, Madry, "On Adaptive Attacks to Adversarial Example Defenses",
        2020, arXiv:2002.08347. Carlini et al., arXiv:1902.06705. The items are those that fit the
        defences of arXiv:2105.12427 and arXiv:2006.07682.
    """
    check(key, model, data, threat, items, steps, restarts)
    embed, head = parts(model, embed, head)
    surrogates = {} if surrogates is None else surrogates
    if not isinstance(surrogates, Mapping):
        raise TypeError(
            f"`surrogates` must be a mapping of names to classifiers, got {type(surrogates)}"
        )
    own_loss = named_loss(model, data, own_loss, embed, head, surrogates)
    mesh = parallel.mesh(devices)
    logits, _ = predict(key, model, data.images, mesh, microbatch=microbatch)
    temperature = calibrated_temperature(jnp.asarray(logits))
    softened = Temperature(model, temperature)

    def linear_head(embed: Classifier) -> Classifier:
        outputs, _ = predict(key, embed, data.images, mesh, microbatch=microbatch)
        return Chain(embed, softmax_head(outputs, data.labels, logits.shape[1]))

    plan = Plan(threat, steps, restarts, own_loss, embed, head, linear_head, surrogates)
    not_run = {name: "not asked for" for name in ITEMS if name not in items}
    results: dict[str, Robustness] = {}
    for number, name in enumerate(ATTACKS):
        if name in not_run:
            continue
        attack, missing = plan.attack(name)
        not_run |= missing
        if attack is not None:
            results[name] = robustness(
                jax.random.fold_in(key, number), softened if name == "autoattack" else model,
                attack, data, directory=None if directory is None else Path(directory) / name,
                microbatch=microbatch, devices=devices, progress=progress,
            )  # fmt: skip
    if not results:
        raise ValueError(f"`items` must hold an attack that can run, but {not_run}")
    checks = None
    if "masking" not in not_run and not next(iter(results.values())).clean.any():
        not_run["masking"] = "no image is classified correctly"
    if "masking" not in not_run and threat.eps >= box_radius(threat, data.input_shape):
        not_run["masking"] = "the ball covers the whole pixel box"
    if "masking" not in not_run:
        checks = masking(
            jax.random.fold_in(key, len(ATTACKS)), softened, data, threat,
            robustness=results.get("autoattack"),
            surrogate=next(iter(surrogates.values()), None), progress=progress,
        )  # fmt: skip
    seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
    return AdaptiveSuite(results, not_run, checks, float(temperature), seed)
