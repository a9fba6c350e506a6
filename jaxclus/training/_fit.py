"""The training loop: compiled steps, metrics one step late, checkpoints, exact resume."""

import dataclasses
import hashlib
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxclus import _checks, _pytree, parallel, runs
from jaxclus._version import __version__
from jaxclus.data import Augmentation, Dataset, default_augmentation
from jaxclus.training import _step
from jaxclus.training._checkpoint import Checkpoints
from jaxclus.training._config import TrainingConfig
from jaxclus.training._log import Log, diverged
from jaxclus.training._step import Program, TrainState
from jaxclus.training._validate import validation_scores
from jaxclus.training.objectives import Objective


class Preempted(Exception):
    """SIGTERM came; everything is saved, and the same call goes on from here."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What training gives back.

    Attributes:
        model: the trained network in eval mode: the best on the validation set where one is
            given, else the last; the moving average where one is kept. Where the objective has a
            head of its own, `jc.Chain(jc.models.features(network), head)`.
        history: the lines of metrics, as in `directory/metrics.jsonl`. Each has "step" and "epoch".
            While training: "loss", "learning_rate", "images_per_second" and what the objective's
            `loss` gives, as "accuracy" (of the classifier that is trained, on the images of the
            update, in train mode), means since the line before. After an epoch, where there is
            something to say: what the objective's `summary` gives, "validation_accuracy",
            "validation_robust_accuracy".
        directory: where the run was kept, or None.
    """

    model: Any
    history: tuple[dict[str, int | float], ...]
    directory: Path | None


def fit(
    key: jax.Array,
    model: nnx.Module,
    data: Dataset,
    objective: Objective,
    config: TrainingConfig,
    *,
    validation: Dataset | None = None,
    augmentation: Augmentation | None = None,
    directory: Path | str | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> Run:
    """Trains a network; the given one is left as it is.

    With a directory the run can be killed at any moment: the same call goes on from the newest
    intact checkpoint and ends, on CPUs, with bit-identical weights. On SIGTERM it saves first.
    Runs that differ in key and weights only share one compiled program.

    Args:
        key: a typed key for shuffling, augmentation and the objective.
        model: a Flax NNX network, images [b, h, w, c] -> logits [b, k].
        data: the training set.
        objective: what to minimise.
        config: how.
        validation: a held-out split of the training set. After each epoch the accuracy on it,
            under the objective's attack where there is one, selects the weights to return.
        augmentation: default: `jc.data.default_augmentation` of the data set.
        directory: where to keep checkpoints and metrics; None keeps nothing.
        devices: default: all.
        progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: if the data do not fit the network or the batch size, or the
            directory holds a run with other settings or other initial weights.
        OSError: if the directory cannot be written to.
        CorruptCheckpointError: if the directory holds checkpoints and none is intact.
        TrainingDiverged: if the loss or the weights become NaN or infinite.
        Preempted: after SIGTERM, when all is saved.
    """
    _checks.typed_key("key", key)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a Flax NNX network, got {type(model).__name__}; of a network under "
            "another head take jc.models.parts(model)[0]"
        )
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` must be one as jc.clustr.ClusTR() makes, got {objective!r}")
    mesh = parallel.mesh(devices)
    parallel.check_batch_size("batch_size", config.batch_size, mesh)
    _check_data("data", data, model, config.batch_size)
    if validation is not None:
        _check_data("validation", validation, model, 1)
    if directory is not None:
        _check_writable(Path(directory))
    program = Program.of(
        model,
        objective=objective,
        config=config,
        augmentation=augmentation or default_augmentation(data.name),
        steps_per_epoch=len(data) // config.batch_size * objective.steps_per_batch,
        mesh=mesh,
    )
    placed = jax.device_put((data.images, data.labels), parallel.replicated(mesh))
    images, labels = placed
    start = nnx.view(model, use_running_average=True, raise_if_not_found=False)
    streams = (*jax.random.split(key, 4), jax.random.fold_in(key, 4))
    keys = _Keys(*jax.device_put(streams, parallel.replicated(mesh)))
    objective_state = objective.init(keys.objective, start, images, labels, config.batch_size)
    trainer = _Trainer(program, keys, placed, validation, Log(directory), directory)
    head = objective.head(objective_state)
    trainer.meta = _meta(program, model, data, validation, key) | {"head": _pytree.record(head)}
    state = trainer.start(_step.weights_of(model), objective_state)
    with _sigterm() as stopped:
        state = trainer.run(state, stopped, progress)
    # By way of the host: free of the training's devices, the model works together with anything.
    final = jax.tree.map(jax.numpy.asarray, jax.device_get(state.selected))
    kept = None if directory is None else Path(directory)
    return Run(program.classifier(*final), tuple(trainer.log.lines), kept)


class _Keys(NamedTuple):
    """One stream of randomness for each purpose."""

    objective: jax.Array
    order: jax.Array
    step: jax.Array
    validation: jax.Array
    refresh: jax.Array


class _Trainer:
    """The loop's fixed parts."""

    def __init__(self, program, keys, placed, validation, log, directory):
        self.program: Program = program
        self.keys: _Keys = keys
        self.images, self.labels = placed
        self.validation: Dataset | None = validation
        self.log: Log = log
        self.checkpoints = (
            None if directory is None else Checkpoints(Path(directory) / "checkpoints")
        )
        self.meta: dict[str, Any] = {}

    def start(self, weights: Any, objective_state: Any) -> TrainState:
        """The state of the newest intact checkpoint, or the first one."""
        arguments = (self.program, weights, objective_state)
        validated = self.validation is not None
        if self.checkpoints is not None:
            template = _step.abstract_state(*arguments, validated=validated)
            restored = self.checkpoints.restore(template, self.meta)
            if restored is not None:
                state, _ = restored
                self.log.keep_until(int(state.step))
                return state
        self.log.keep_until(-1)
        return _step.initial_state(*arguments, validated=validated)

    def run(self, state: TrainState, stopped: threading.Event, progress: bool) -> TrainState:
        per_epoch, config = self.program.steps_per_epoch, self.program.config
        done, total = int(state.step), self.program.config.epochs * per_epoch
        name = type(self.program.objective).__name__
        with runs.progress(
            f"training ({name})", total * config.batch_size, "images", enabled=progress,
            done=done * config.batch_size,
        ) as advance:  # fmt: skip
            self.log.begin(self.program, advance)
            order = None
            for step in range(done, total):
                if order is None or step % per_epoch == 0:
                    epoch = np.int32(step // per_epoch)
                    order = _step.epoch_order(self.keys.order, epoch, count=len(self.labels))
                state, metrics = _step.train_step(
                    state, self.keys.step, order, self.images, self.labels, program=self.program
                )
                self.log.add(step + 1, metrics)
                if (step + 1) % per_epoch == 0:
                    state = self._end_epoch(state, step + 1)
                if stopped.is_set() and step + 1 < total:
                    self._stop(state, step + 1)
            self.log.flush()
        return state

    def _end_epoch(self, state: TrainState, step: int) -> TrainState:
        epoch = step // self.program.steps_per_epoch
        self._settle(state, step)
        model = self.program.model(state.current)
        objective, everywhere = self.program.objective, parallel.replicated(self.program.mesh)
        key = jax.random.fold_in(self.keys.refresh, epoch)
        refreshed = objective.refresh(key, model, self.images, self.labels, state.objective)
        refreshed = parallel.copy_to(refreshed, everywhere)
        head = parallel.copy_to(objective.head(refreshed), everywhere)
        state = dataclasses.replace(state, objective=refreshed, head=head)
        found = {name: float(value) for name, value in objective.summary(refreshed).items()}
        if self.validation is not None and state.best is not None:
            scores = validation_scores(
                self.keys.validation, self.program, state.current, state.head, self.validation
            )
            found |= scores
            score = scores.get("validation_robust_accuracy", scores["validation_accuracy"])
            score = np.float32(score)  # as it is kept: of equal scores the first must win
            if score > state.best["score"]:
                best = {"score": score, "weights": state.current, "head": state.head}
                best = parallel.copy_to(best, everywhere)
                state = dataclasses.replace(state, best=best)
        if found:
            self.log.write({"step": step, "epoch": epoch, **found})
        last = epoch == self.program.config.epochs
        if last or epoch % self.program.config.checkpoint_every == 0:
            self._save(state, step)
        return state

    def _settle(self, state: TrainState, step: int) -> None:
        """Writes the metrics that wait, and makes sure that no broken weights are kept."""
        self.log.flush()
        # The loss of a step comes before its update, which alone can overflow.
        if not _step.is_finite(state.weights):
            raise diverged(step, "weights that are not finite", self.program.config)

    def _save(self, state: TrainState, step: int) -> None:
        if self.checkpoints is not None:
            meta = self.meta | {"version": __version__}
            self.checkpoints.save(step, state, meta)

    def _stop(self, state: TrainState, step: int) -> None:
        self._settle(state, step)
        self._save(state, step)
        kept = "nothing is kept: no directory was given"
        if self.checkpoints is not None:
            kept = f"saved in {self.checkpoints.directory.parent}; the same command goes on"
        raise Preempted(f"stopped by SIGTERM after step {step}: {kept}")


class _sigterm:
    """Turns SIGTERM into an event while it is entered; only the main thread may do so."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _meta(
    program: Program, model: nnx.Module, data: Dataset, validation: Dataset | None, key: jax.Array
) -> dict[str, Any]:
    """What a checkpoint belongs to; a run goes on only where all of it is the same."""
    spec = getattr(model, "spec", None)
    return {
        "model": None if spec is None else spec.to_json(),
        "initial weights": _digest(_step.weights_of(model)),
        "objective": _described(program.objective),
        "config": dataclasses.asdict(program.config)
        | {"milestones": list(program.config.milestones)},
        "augmentation": repr(program.augmentation),
        "data": data.fingerprint,
        "validation": None if validation is None else validation.fingerprint,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }


def _digest(weights: Any) -> str:
    """SHA-256 of arrays: networks of one key can differ, as those to be fine-tuned do."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def _described(value: Any) -> str:
    """`repr`, but callables by their name: their address is another in every process."""
    if dataclasses.is_dataclass(value):
        fields = (
            f"{f.name}={_described(getattr(value, f.name))}" for f in dataclasses.fields(value)
        )
        return f"{type(value).__name__}({', '.join(fields)})"
    return value.__qualname__ if callable(value) else repr(value)


def _check_data(name: str, data: Dataset, model: nnx.Module, least: int) -> None:
    if not isinstance(data, Dataset):
        raise TypeError(f"`{name}` must be a jc.data.Dataset, got {type(data).__name__}")
    if len(data) < least:
        raise ValueError(
            f"`{name}` must hold at least one batch of {least} images, got {len(data)}"
        )
    spec = getattr(model, "spec", None)
    if spec is None:
        return
    if tuple(spec.input_shape) != data.input_shape:
        raise ValueError(
            f"`{name}` must hold images of the model's shape {tuple(spec.input_shape)}, "
            f"got {data.input_shape}"
        )
    if spec.num_classes < data.num_classes:
        raise ValueError(
            f"`{name}` must have at most the model's {spec.num_classes} classes, "
            f"got {data.num_classes}"
        )


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"`directory` must be one that can be written to, got {directory}: {error.strerror}"
        ) from error
