"""Metrics of a training run as JSON lines, read from the device one step late."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclus import runs
from jaxclus.training._config import TrainingConfig, learning_rate
from jaxclus.training._step import Program


class TrainingDiverged(ArithmeticError):
    """Loss or weights are no longer finite. The last checkpoint is from before."""


class Log:
    """Metrics as JSON lines, in memory and in a file; reads the device one step late."""

    def __init__(self, directory: Path | str | None):
        self.path = None if directory is None else Path(directory) / "metrics.jsonl"
        self.lines: list[dict[str, int | float]] = []
        self._waiting: list[tuple[int, Any]] = []

    def keep_until(self, step: int) -> None:
        """Drops what was logged after `step`: a resumed run logs it again."""
        if self.path is None:
            return
        if self.path.exists():
            # What follows the last line break was cut off when the run was killed.
            whole = self.path.read_text().rpartition("\n")[0]
            lines = map(json.loads, whole.splitlines())
            self.lines = [line for line in lines if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        runs.write_atomic(self.path, text.encode())

    def begin(self, program: Program, advance: Any) -> None:
        self._program, self._advance = program, advance
        self._rate = learning_rate(program.config, program.steps_per_epoch)
        self._clock = _Clock(program.config.batch_size)

    def add(self, step: int, metrics: Any) -> None:
        """Takes a step's metrics; those of the step before are ready, or nearly, by now."""
        self._waiting.append((step, metrics))
        if len(self._waiting) > self._program.config.log_every:
            self._emit(self._waiting[:-1])
            self._waiting = self._waiting[-1:]

    def flush(self) -> None:
        if self._waiting:
            self._emit(self._waiting)
        self._waiting = []

    def _emit(self, waiting: list[tuple[int, Any]]) -> None:
        values = jax.device_get([metrics for _, metrics in waiting])
        step = waiting[-1][0]
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        if not all(map(math.isfinite, means.values())):
            shown = ", ".join(f"{name} {value:g}" for name, value in means.items())
            raise diverged(step, shown, self._program.config)
        self.write(
            {
                "step": step,
                "epoch": step / self._program.steps_per_epoch,
                **means,
                "learning_rate": float(jax.numpy.asarray(self._rate(step - 1))),
                "images_per_second": self._clock.rate(len(waiting)),
            }
        )
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        self._advance(len(waiting) * self._program.config.batch_size, text)

    def write(self, line: dict[str, int | float]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def diverged(step: int, shown: str, config: TrainingConfig) -> TrainingDiverged:
    """The error that says by which step what was not finite, and what to do."""
    return TrainingDiverged(
        f"training diverged by step {step} ({shown}); lower `learning_rate`, now at most "
        f"{config.learning_rate:g}"
    )


class _Clock:
    """Images per second since the last time it was asked."""

    def __init__(self, batch_size: int):
        self._batch, self._last = batch_size, time.perf_counter()

    def rate(self, steps: int) -> float:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return round(steps * self._batch / elapsed, 1)
