"""How to train: the hyper-parameters that have nothing to do with the objective."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax

from jaxclus import _checks


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, schedule and bookkeeping of a training run; hashable.

    Attributes:
        epochs: passes over the training set, at least 1. The last, incomplete batch of a pass is
            left out; each pass is shuffled anew.
        batch_size: images in a step, over all devices; a multiple of the number of devices.
        optimizer: "sgd" (momentum, weight decay added to the gradient, as PyTorch's SGD) or
            "adamw" (decoupled weight decay).
        learning_rate: highest learning rate, above 0.
        momentum: of SGD, in [0, 1].
        weight_decay: at least 0, on all parameters.
        schedule: "step" (times `decay` at each milestone), "cosine" (to 0), or "cyclic" (linearly
            up from 0 over the first 40 % of the steps, then down to 0).
        milestones: epochs after which the "step" schedule decays.
        decay: factor of the "step" schedule, in (0, 1].
        ema_decay: decay of an exponential moving average of weights and statistics, in [0, 1);
            the average is then the model that is validated and returned. None for none.
        precision: "float32", or "bfloat16" for activations and gradients in training. Weights,
            statistics, logits and every evaluation stay float32.
        checkpoint_every: epochs between checkpoints, at least 1.
        log_every: steps averaged in one line of metrics, at least 1.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 2e-4
    schedule: Literal["step", "cosine", "cyclic"] = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    ema_decay: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: int = 1
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every", "log_every"):
            _checks.at_least(name, getattr(self, name), 1)
        _checks.positive("learning_rate", self.learning_rate)
        _checks.not_negative("weight_decay", self.weight_decay)
        _checks.within("momentum", self.momentum, 0, 1)
        _checks.positive("decay", self.decay)
        _checks.within("decay", self.decay, 0, 1)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1) or None, got {self.ema_decay!r}")
        _checks.one_of("optimizer", self.optimizer, ("sgd", "adamw"))
        _checks.one_of("schedule", self.schedule, ("step", "cosine", "cyclic"))
        _checks.one_of("precision", self.precision, ("float32", "bfloat16"))
        if not isinstance(self.milestones, tuple):
            raise TypeError(f"`milestones` must be a tuple of epochs, got {self.milestones!r}")
        for milestone in self.milestones:
            _checks.at_least("milestones", milestone, 1)


def learning_rate(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate as a function of the number of steps taken."""
    total = config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, total)
    if config.schedule == "cyclic":
        peak = jnp.array([0.0, config.learning_rate, 0.0])
        return lambda step: jnp.interp(step / total, jnp.array([0.0, 0.4, 1.0]), peak)
    scales = {epoch * steps_per_epoch: config.decay for epoch in config.milestones}
    return optax.piecewise_constant_schedule(config.learning_rate, scales)


def optimizer(config: TrainingConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser with its schedule."""
    rate = learning_rate(config, steps_per_epoch)
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )
