"""The state of an evaluation on disk: it goes on where it was stopped, or refuses to mix two."""

import dataclasses
import hashlib
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclus import _classifier, compose, runs
from jaxclus._classifier import Classifier
from jaxclus._version import __version__
from jaxclus.attacks import Attack
from jaxclus.attacks._base import SteppedAttack
from jaxclus.data import Dataset
from jaxclus.data._dataset import digest
from jaxclus.evaluation import _packing
from jaxclus.evaluation._result import MemberResult, Robustness, describe

# The state is saved at least that often, in seconds, if there is anything to save.
_INTERVAL = 60.0

_LEDGER = [field.name for field in dataclasses.fields(_packing.Ledger)]


def identity(
    attack: Attack,
    model: Classifier,
    data: Dataset,
    logits: np.ndarray,
    seed: tuple[int, ...],
    mesh: Mesh,
    microbatch: int,
) -> dict[str, Any]:
    """What two evaluations must share for one to go on with the other's work, as JSON values."""
    known = _classifier.is_pytree(model)
    return {
        "attack": describe(attack),
        "norm": attack.ball.name,
        "eps": float(attack.ball.eps),
        "attack's arrays": _arrays(attack),
        "attack's structure": hash_of(str(jax.tree.structure(attack))),
        "seed": list(seed),
        "images": digest(data.images, data.labels),
        "model": _arrays(model) if known else digest(logits),
        "model's program": _program(model, data),
        "passes": compose.passes(model),
        "samples": compose.samples(model),
        "microbatch": microbatch,
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "versions": {"jaxclus": __version__, "jax": jax.__version__},
    }


def _arrays(tree: Any) -> str:
    return digest(*map(np.asarray, jax.tree.leaves(tree)))


def hash_of(text: str) -> str:
    """Of a text that is the same in every process, but for the addresses of functions."""
    return hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()


def _program(model: Classifier, data: Dataset) -> str:
    """Of what the model computes, forwards and backwards, whatever its weights are."""

    def forward(x: jax.Array) -> jax.Array:
        return _classifier.single_pass(model, x)

    def both(x: jax.Array) -> Any:
        logits, pull_back = jax.vjp(forward, x)
        return logits, pull_back(logits)

    image = jax.ShapeDtypeStruct((1, *data.input_shape), np.float32)
    try:
        return hash_of(str(jax.make_jaxpr(both)(image)))
    except (TypeError, ValueError, NotImplementedError):  # JAX's, of a model without a gradient
        return hash_of(str(jax.make_jaxpr(forward)(image)))


class Progress:
    """What was done so far, in memory and, if there is a directory, on disk.

    The directory holds `evaluation.json` (who, finished attacks, and at the end the report),
    `state.npz` (the unfinished attack) and `adversarial.npy` (the adversarial images, written in
    place: only those that the state says are found count).

    Attributes:
        members: results of the finished attacks.
        x_adv: candidates, float32 [n, h, w, c].
        seconds: time spent on the unfinished attack.
    """

    def __init__(self, directory: Path | None, who: dict[str, Any], shape: tuple[int, ...]):
        self.directory, self.who = directory, who
        self.members: list[MemberResult] = []
        self.seconds = 0.0
        self._unsaved, self._last = 0, time.monotonic()
        if directory is None:
            self.x_adv = np.zeros(shape, np.float32)
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "adversarial.npy"
        mode = "r+" if path.exists() and (directory / "evaluation.json").exists() else "w+"
        if mode == "w+":
            self.x_adv = np.lib.format.open_memmap(path, mode, np.float32, shape)
        else:
            self.x_adv = np.lib.format.open_memmap(path, mode)

    @classmethod
    def open(
        cls, directory: Path | None, who: dict[str, Any], shape: tuple[int, ...]
    ) -> "Progress":
        """The progress that the directory holds, or none yet.

        Raises:
            ValueError: if it is another evaluation's; the message names the first difference.
        """
        record = {}
        if directory is not None and (directory / "evaluation.json").exists():
            record = runs.read_json(directory / "evaluation.json")
            for name, value in who.items():
                if record["evaluation"].get(name) != value:
                    raise ValueError(
                        f"`directory` must be empty or hold this evaluation, but {directory} holds "
                        f"one of {name} {record['evaluation'].get(name)}, and this is {value}"
                    )
        progress = cls(directory, who, shape)
        members = record.get("members", [])
        progress.members = [MemberResult.from_json(member) for member in members]
        if directory is not None and not record:
            progress._write()
        return progress

    def resume(
        self, work: _packing.Work, attack: SteppedAttack, attacked: np.ndarray
    ) -> tuple[_packing.Ledger, _packing.Pending | None]:
        """Ledger and slots of the next attack: as they were saved, or new ones."""
        path = None if self.directory is None else self.directory / "state.npz"
        self.seconds = 0.0
        if path is None or not path.exists():
            return _packing.Ledger.of(attacked), None
        with np.load(path, allow_pickle=False) as saved:
            if int(saved["member"]) != len(self.members):
                return _packing.Ledger.of(attacked), None
            fields: dict[str, Any] = {name: saved[f"ledger/{name}"] for name in _LEDGER}
            fields["finished"] = int(fields["finished"])
            ledger = _packing.Ledger(**fields)
            self.seconds = float(saved["seconds"])
            image, round_ = saved["image"], saved["round"]
            leaves = [saved[f"slots/{i}"] for i in range(int(saved["leaves"]))]
        slots = _packing.restored(work, attack, leaves, len(image))
        return ledger, _packing.Pending(slots, image, round_)

    def keep(
        self, ledger: _packing.Ledger, pending: _packing.Pending, finished: int, every: int
    ) -> None:
        """Saves the state if enough images are finished, or enough time has passed."""
        self._unsaved += finished
        if self.directory is None:
            return
        if self._unsaved < every and time.monotonic() - self._last < _INTERVAL:
            return
        self._unsaved, self._last = 0, time.monotonic()
        self._save(ledger, pending)

    def _save(self, ledger: _packing.Ledger, pending: _packing.Pending) -> None:
        assert self.directory is not None
        self.x_adv.flush()  # pyright: ignore[reportAttributeAccessIssue]
        leaves = _packing.leaves(pending.slots)
        with runs.atomic_file(self.directory / "state.npz") as file:
            arrays: dict[str, Any] = {
                "member": len(self.members),
                "seconds": self.seconds,
                "image": pending.image,
                "round": pending.round,
                "leaves": len(leaves),
            }
            arrays |= {f"ledger/{name}": getattr(ledger, name) for name in _LEDGER}
            arrays |= {f"slots/{i}": leaf for i, leaf in enumerate(leaves)}
            np.savez(file, **arrays)

    def finish_member(self, result: MemberResult) -> None:
        """Notes a finished attack."""
        self.members.append(result)
        self._write()

    def finish(self, result: Robustness) -> None:
        """Writes the report."""
        self._write(result.to_json())
        if self.directory is not None:
            (self.directory / "state.npz").unlink(missing_ok=True)

    def _write(self, report: dict[str, Any] | None = None) -> None:
        if self.directory is None:
            return
        self.x_adv.flush()  # pyright: ignore[reportAttributeAccessIssue]
        members = [member.to_json() for member in self.members]
        record = {"evaluation": self.who, "members": members} | (report or {})
        runs.write_json(self.directory / "evaluation.json", record)
