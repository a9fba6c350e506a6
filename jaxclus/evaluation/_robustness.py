"""Accuracy of a classifier over a data set, clean and under attack."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxclus import _checks, _classifier, compose, parallel, runs
from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack
from jaxclus.attacks._base import SteppedAttack
from jaxclus.data import Dataset, to_float
from jaxclus.evaluation import _packing
from jaxclus.evaluation._predict import default_microbatch, microbatches, placed, predict
from jaxclus.evaluation._progress import Progress, identity
from jaxclus.evaluation._result import MemberResult, Robustness, describe
from jaxclus.threat import Threat, image_keys


def correct(
    model: Classifier, data: Dataset, *, devices: Sequence[Any] | None = None
) -> np.ndarray:
    """Whether each image of the data set is classified correctly, bool [n].

    Args:
        model: a classifier.
        data: the data set.
        devices: default: all.
    """
    _check(model, data)
    mesh = parallel.mesh(devices)
    return predict(jax.random.key(0), model, data.images, mesh)[1] == data.labels


def robustness(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    *,
    batch_size: int = 250,
    directory: Path | str | None = None,
    microbatch: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> Robustness:
    """Attacks every image that the model classifies correctly.

    Images that are broken leave the batch, waiting ones take their place. Verdicts are recomputed
    from the final images in float32 under matmul precision "highest", and an image whose
    perturbation leaves ball or box does not count as broken; a second pass at half the batch counts
    the predictions that depend on rounding.

    Args:
        key: a typed key; image i uses `fold_in(key, i)`.
        model: a classifier, images [b, h, w, c] in [0, 1] -> float32 logits [b, k].
        attack: the attack. A minimum-norm attack needs its `threat`.
        data: the data set.
        batch_size: number of finished images after which the state is saved (it also is once a
            minute), at least 1; no verdict depends on it.
        directory: where to keep the state, the adversarial images and the report; an evaluation
            that was stopped goes on from there, one that was finished is read. Losses given as
            functions are told apart by their names alone. None keeps nothing.
        microbatch: images in one physical batch on each device, at least 1; default 288 on CPUs,
            512 on accelerators. Fewer need less memory. Rounding, and with it the verdict of an
            image in a thousand, can depend on it.
        devices: default: all.
        progress: whether to show a progress bar for each attack.

    Raises:
        TypeError, ValueError: if the key, the model or the data do not fit, the attack needs more
            classes, or `directory` holds another evaluation.
    """
    _check_attack(attack)
    _checks.at_least("batch_size", batch_size, 1)
    found = _robustness(
        key, model, [attack], data, batch_size, directory, microbatch, devices, progress
    )
    return found[0]


def robustness_curve(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    eps: Sequence[float],
    *,
    batch_size: int = 250,
    directory: Path | str | None = None,
    microbatch: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> list[Robustness]:
    """`robustness` at several radii, with one compiled program.

    Args:
        eps: the radii, each above 0, on the pixel scale. They replace the attack's own; a step
            size given in the attack stays as it is.
        directory: as for `robustness`; each radius has a folder "eps-0.1" in it.
    """
    _check_attack(attack)
    attacks = []
    for radius in eps:
        threat = type(attack.ball)(float(radius))
        attacks.append(dataclasses.replace(attack, threat=threat))  # pyright: ignore[reportArgumentType]
    return _robustness(
        key, model, attacks, data, batch_size, directory, microbatch, devices, progress,
        folder=lambda attack: f"eps-{float(attack.ball.eps):.6g}",
    )  # fmt: skip


def robustness_over_seeds(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    seeds: int,
    *,
    batch_size: int = 250,
    directory: Path | str | None = None,
    microbatch: int | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> list[Robustness]:
    """`robustness` with several keys, `fold_in(key, 0)`, `fold_in(key, 1)`, ...; see `spread`.

    Args:
        seeds: number of keys, at least 1.
        directory: as for `robustness`; each key has a folder "seed-0" in it.
    """
    _check_attack(attack)
    _checks.typed_key("key", key)
    _checks.at_least("seeds", seeds, 1)
    folders = [None if directory is None else Path(directory) / f"seed-{i}" for i in range(seeds)]
    return [
        robustness(
            jax.random.fold_in(key, number), model, attack, data, batch_size=batch_size,
            directory=folder, microbatch=microbatch, devices=devices, progress=progress,
        )
        for number, folder in enumerate(folders)
    ]  # fmt: skip


def _robustness(
    key: jax.Array,
    model: Classifier,
    attacks: Sequence[Attack],
    data: Dataset,
    batch_size: int,
    directory: Path | str | None,
    microbatch: int | None,
    devices: Sequence[Any] | None,
    progress: bool,
    folder: Callable[[Attack], str] = lambda attack: "",
) -> list[Robustness]:
    """`robustness` under each attack, with the model's programs bound once."""
    _checks.typed_key("key", key)
    _check(model, data)
    mesh = parallel.mesh(devices)
    size = default_microbatch(mesh) if microbatch is None else microbatch
    _checks.at_least("microbatch", size, 1)
    key = jax.device_put(key, parallel.replicated(mesh))
    evaluation = _Evaluation(key, placed(model, mesh), data, mesh, size, batch_size, progress)
    found = []
    for attack in attacks:
        evaluation.check(attack)
        place = None if directory is None else Path(directory) / folder(attack)
        found.append(evaluation.under(attack, place))
    return found


class _Evaluation:
    """A model and a data set that attacks are judged on."""

    def __init__(
        self,
        key: jax.Array,
        model: Classifier,
        data: Dataset,
        mesh: Mesh,
        microbatch: int,
        batch_size: int,
        progress: bool,
    ):
        self.key, self.model, self.data, self.mesh = key, model, data, mesh
        self.microbatch, self.batch_size, self.progress = microbatch, batch_size, progress
        self.logits, predicted = predict(key, model, data.images, mesh, microbatch=microbatch)
        self.clean = predicted == data.labels
        self.ranking = np.argsort(-self.logits, axis=-1, kind="stable").astype(np.int32)
        self.advance, self.judge = _packing.bind(model), _bind_judge(model)
        self.flops = _flops(model, data)

    def check(self, attack: Attack) -> None:
        if attack.threat is None:
            raise ValueError(
                "`attack` must have a threat model to be judged by, as FAB(norm, threat=Linf(8 / "
                f"255)), got {attack!r}"
            )
        attack.check_classes(self.logits.shape[1])
        attack.check_model(self.model)

    def under(self, attack: Attack, directory: Path | None) -> Robustness:
        """The verdicts of one attack, going on from what the directory holds."""
        seed = tuple(np.asarray(jax.random.key_data(self.key)).tolist())
        who = {} if directory is None else identity(
            attack, self.model, self.data, self.logits, seed, self.mesh, self.microbatch
        )  # fmt: skip
        saved = Progress.open(directory, who, self.data.images.shape)
        classes = self.logits.shape[1]
        members, broken = attack.members(classes), np.zeros(len(self.data), bool)
        for number, (name, member) in enumerate(members):
            if number < len(saved.members):
                broken = self.clean & ~saved.members[number].robust
                continue
            single = len(members) == 1 and isinstance(attack, SteppedAttack)
            saved.finish_member(
                self._member(saved, name, member, None if single else number, broken)
            )
            broken = self.clean & ~saved.members[-1].robust
        return self._result(attack, seed, saved)

    def _member(
        self,
        saved: Progress,
        name: str,
        attack: SteppedAttack,
        number: int | None,
        broken: np.ndarray,
    ) -> MemberResult:
        """The verdicts of one attack on the images that still stand."""
        begin, attacked = time.perf_counter(), self.clean & ~broken
        member = None if number is None else jax.device_put(
            np.int32(number), parallel.replicated(self.mesh)
        )  # fmt: skip
        work = _packing.Work(
            self.key, member, self.data.images, self.data.labels, self.ranking, self.mesh,
            self.microbatch, self.flops,
        )  # fmt: skip
        ledger, pending = saved.resume(work, attack, attacked)
        label = f"{name} {attack.ball.name} eps {float(attack.ball.eps):.4g}"
        total, seconds = int(attacked.sum()), saved.seconds
        with runs.progress(label, total, "images", enabled=self.progress) as advance:
            shown = 0.0

            def after(pending: _packing.Pending, finished: int, done: float) -> None:
                nonlocal shown
                advance(done - shown, f"{int(ledger.success.sum())} broken")
                shown = done
                saved.seconds = seconds + time.perf_counter() - begin
                saved.keep(ledger, pending, finished, self.batch_size)

            if total:
                with jax.default_matmul_precision("highest"):
                    _packing.run(work, self.advance, attack, ledger, saved.x_adv, pending, after)
        found, samples = np.flatnonzero(attacked), attack.samples(self.model)
        wrong, norms, low, high = self._judge(saved.x_adv, found, attack.ball, self.microbatch)
        inside = (norms <= float(attack.ball.limit)) & (low >= 0) & (high <= 1)
        result = np.zeros_like(attacked)
        result[found] = wrong & inside
        if number is not None:  # what did not break is the clean image again
            standing = np.flatnonzero(attacked & ~result)
            saved.x_adv[standing] = np.asarray(to_float(self.data.images[standing]))
        else:
            outside = found[~((norms < np.inf) & inside)]
            saved.x_adv[outside] = np.asarray(to_float(self.data.images[outside]))
        return MemberResult(
            name=name,
            attack=describe(attack),
            attacked=total,
            robust=attacked & ~result,
            seconds=seconds + time.perf_counter() - begin,
            forward=samples * int(ledger.forward.sum(dtype=np.int64)),
            gradient=samples * int(ledger.gradient.sum(dtype=np.int64)),
        )

    def _result(self, attack: Attack, seed: tuple[int, ...], saved: Progress) -> Robustness:
        clean, data = np.flatnonzero(self.clean), self.data
        robust = saved.members[-1].robust if saved.members else self.clean
        norms, low, high = np.zeros(len(data), np.float32), 0.0, 1.0
        disagreements = 0
        if len(clean):
            first, norms[clean], lows, highs = self._judge(
                saved.x_adv, clean, attack.ball, self.microbatch
            )
            low, high = float(lows.min()), float(highs.max())
            second, *_ = self._judge(saved.x_adv, clean, attack.ball, max(1, self.microbatch // 2))
            disagreements = int((second != first).sum())
        wrong = np.flatnonzero(~self.clean)
        saved.x_adv[wrong] = np.asarray(to_float(data.images[wrong]))
        result = Robustness(
            attack=attack,
            dataset=data.name,
            split=data.split,
            seed=seed,
            clean=self.clean,
            robust=robust,
            norms=norms,
            low=low,
            high=high,
            members=tuple(saved.members),
            skipped=attack.skipped(self.logits.shape[1]),
            disagreements=disagreements,
            microbatch=self.microbatch,
            num_devices=self.mesh.size,
            passes=compose.passes(self.model),
            samples=compose.samples(self.model),
            adversarial=saved.x_adv,
        )
        saved.finish(result)
        return result

    def _judge(
        self, x_adv: np.ndarray, chosen: np.ndarray, ball: Threat, microbatch: int
    ) -> tuple[np.ndarray, ...]:
        """Whether each adversarial image is misclassified, its norm, lowest and highest pixel."""
        results, size = [], microbatch * self.mesh.size
        ball = jax.device_put(ball, parallel.replicated(self.mesh))
        for index, count in microbatches(chosen, size):
            images, labels = self.data.images[index], self.data.labels[index]
            batch = (x_adv[index], images, labels, index.astype(np.int32))
            batch = jax.device_put(batch, parallel.over_batch(self.mesh))
            with jax.default_matmul_precision("highest"):
                out = self.judge(ball, self.key, *batch)
            results.append([np.asarray(leaf)[:count] for leaf in out])
        if not results:
            nothing = np.zeros(0, np.float32)
            return nothing > 0, nothing, nothing, nothing
        return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))


def _judged(model, ball, key, x_adv, images, y, index):
    _, predicted = _classifier.verdict(model, image_keys(key, index), x_adv)
    pixels = x_adv.reshape(x_adv.shape[0], -1)
    norm = ball.norm(x_adv - to_float(images))
    return predicted != y, norm, pixels.min(axis=1), pixels.max(axis=1)


_bind_judge = _classifier.jit_over_model(_judged)


def _flops(model: Classifier, data: Dataset) -> float:
    """Floating-point operations of a forward pass for one image, as XLA counts them."""
    image = jax.ShapeDtypeStruct((1, *data.input_shape), jnp.float32)
    lowered = jax.jit(lambda x: _classifier.single_pass(model, x)).lower(image)
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def _check_attack(attack: Attack) -> None:
    if not isinstance(attack, Attack):
        raise TypeError(f"`attack` must be one of jc.attacks, got {type(attack).__name__}")


def _check(model: Classifier, data: Dataset) -> None:
    if not isinstance(data, Dataset):
        raise TypeError(f"`data` must be a jc.data.Dataset, got {type(data).__name__}")
    classes = _classifier.num_classes(model, to_float(data.images[:1]))
    if int(data.labels.max()) >= classes:
        raise ValueError(
            f"`data` must have labels in [0, {classes - 1}], the model's classes, "
            f"got {int(data.labels.max())}"
        )
