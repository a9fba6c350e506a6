"""Checkpoints that are whole or not there: Orbax for the arrays, a SHA-256 manifest as the seal.

Orbax restores flipped bytes in array data without a word. A checkpoint counts here only once a
manifest of its files' digests stands beside it, which is written after Orbax has committed.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxclus import runs

_KEPT = 2  # the newest may turn out damaged


class CorruptCheckpointError(ValueError):
    """No checkpoint of a directory can be trusted."""


class Checkpoints:
    """The checkpoints of one run: `directory/STEP/` and `directory/STEP.sha256.json`.

    Args:
        directory: where they stand; made if it is missing.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory).absolute()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves state and meta data under a step's number, and drops all but the newest two.

        Args:
            step: number of steps taken.
            state: a pytree of arrays.
            meta: JSON values that say what the state belongs to.
        """
        import orbax.checkpoint as ocp

        # Left by a kill between commit and seal; Orbax would refuse to save over it.
        if self._path(step).exists() and not self._manifest(step).exists():
            shutil.rmtree(self._path(step))
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
        with ocp.CheckpointManager(self.directory, options=options) as manager:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            )
            manager.save(step, args=items, force=True)
            manager.wait_until_finished()
            kept = set(manager.all_steps())
        runs.write_json(self._manifest(step), _digests(self._path(step)))
        for old in self._steps():
            if old not in kept:
                self._manifest(old).unlink()

    def restore(self, template: Any = None, meta: dict[str, Any] | None = None) -> Any:
        """The newest intact checkpoint as (state, meta), or None if there is none at all.

        A checkpoint that does not match its manifest is passed over with a warning; one without
        a manifest never was complete.

        Args:
            template: pytree of `jax.ShapeDtypeStruct`s with shardings, or None for host arrays
                in plain dicts.
            meta: what the checkpoint must belong to, or None for anything.

        Raises:
            CorruptCheckpointError: if there are checkpoints, but none matches its manifest.
            ValueError: if the checkpoint belongs to something else.
        """
        damaged = []
        for step in self._intact(damaged):
            found = self._read_meta(step)
            if meta is not None:
                _check_same(self.directory, found, json.loads(json.dumps(meta)))
            return self._read_state(step, template), found
        if damaged:
            raise CorruptCheckpointError(
                f"`directory` must hold an intact checkpoint; damaged: {'; '.join(damaged)}"
            )
        return None

    def _intact(self, damaged: list[str]) -> Iterator[int]:
        for step in sorted(self._steps(), reverse=True):
            wrong = _mismatch(self._path(step), self._manifest(step))
            if wrong is None:
                yield step
                continue
            damaged.append(
                f"{self._path(step)} does not match {self._manifest(step)} ({wrong} differs)"
            )
            warnings.warn(f"checkpoint passed over: {damaged[-1]}", stacklevel=4)

    def _read_meta(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        with ocp.CheckpointManager(self.directory) as manager:
            return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]

    def _read_state(self, step: int, template: Any) -> Any:
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        with ocp.CheckpointManager(self.directory) as manager:
            return manager.restore(step, args=args)["state"]

    def _steps(self) -> list[int]:
        names = (path.name.split(".")[0] for path in self.directory.glob("*.sha256.json"))
        return [int(name) for name in names if name.isdigit()]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _manifest(self, step: int) -> Path:
        return self.directory / f"{step}.sha256.json"


def _digests(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def _mismatch(path: Path, manifest: Path) -> str | None:
    """The first file that differs from the manifest, or None if all match."""
    try:
        wanted = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return manifest.name
    found = _digests(path)
    names = sorted(wanted.keys() | found.keys())
    return next((name for name in names if wanted.get(name) != found.get(name)), None)


def _check_same(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"`directory` must be new or hold a run with the same settings, but {directory} "
                f"was made with {name} = {found.get(name)!r}, not {value!r}"
            )
