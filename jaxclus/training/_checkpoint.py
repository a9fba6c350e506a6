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

import jax
import numpy as np

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
        """Saves state and meta data under a step's number, and drops all older than the newest two.

        Whatever has this number already, a damaged checkpoint or one without a seal, is replaced.

        Args:
            step: number of steps taken.
            state: a pytree of arrays.
            meta: JSON values that say what the state belongs to.
        """
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manifest(step).unlink(missing_ok=True)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(self._path(step), args=items, force=True)
        runs.write_json(self._manifest(step), _digests(self._path(step)))
        # Sealed checkpoints of later steps were passed over as damaged: they do not count.
        oldest = sorted(sealed for sealed in self._steps() if sealed <= step)[-_KEPT:][0]
        self._drop_before(oldest)

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

        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return checkpointer.restore(self._path(step), args=items)["meta"]

    def _read_state(self, step: int, template: Any) -> Any:
        import orbax.checkpoint as ocp

        if template is not None:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
                return checkpointer.restore(self._path(step), args=items)["state"]
        # Without a template Orbax asks for the devices that the state was saved from.
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
        )
        with ocp.Checkpointer(handler) as checkpointer:
            tree = checkpointer.metadata(self._path(step)).item_metadata["state"].tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=on_host))
            return checkpointer.restore(self._path(step), args=items)["state"]

    def _drop_before(self, oldest: int) -> None:
        """Removes everything that has a smaller step's number, whole or not."""
        for path in list(self.directory.iterdir()):
            number = path.name.split(".")[0]
            if not number.isdigit() or int(number) >= oldest:
                continue
            if path.is_dir():
                # The seal first: a checkpoint that is half gone must not look whole.
                self._manifest(int(number)).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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


def _check_same(directory: Path, found: Any, wanted: Any, name: str = "") -> None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key, value in wanted.items():
            _check_same(directory, found.get(key), value, f"{name}.{key}" if name else key)
    elif found != wanted:
        raise ValueError(
            f"`directory` must be new or hold a run with the same settings, but {directory} "
            f"was made with {name} = {found!r}, not {wanted!r}"
        )
