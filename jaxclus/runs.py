"""What long work needs: atomic files, progress, and a record of where figures come from."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax


def cache_directory() -> Path:
    """Where what can be made again is kept: $JAXCLUS_CACHE, or ~/.cache/jaxclus."""
    return Path(os.environ.get("JAXCLUS_CACHE") or "~/.cache/jaxclus").expanduser()


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write that takes its name only once it is whole.

    A reader, or a crash, sees the old content or the new, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomic(path: Path | str, content: bytes) -> None:
    """Writes a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path | str, value: Any) -> None:
    """Writes JSON, indented, atomically. NaN and infinity are refused: they are not JSON."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path | str) -> Any:
    """Reads a JSON file; a file that is none raises ValueError with its path."""
    try:
        return json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"`path` must be a JSON file, got {path}: {error}") from error


def environment() -> dict[str, Any]:
    """Versions, hardware and command: what a figure needs beside it to be reproduced."""
    names = ("jaxclus", "jax", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    devices = jax.devices()
    kind = _cpu() if devices[0].platform == "cpu" else devices[0].device_kind
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": f"{len(devices)} x {kind}, {os.cpu_count()} CPU cores",
        "command": _command(),
    }


def _command() -> str:
    """The command of this process, to be typed as it is: a script, or `python -m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = None if spec is None else spec.name.removesuffix(".__main__")
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module]
    return shlex.join([*program, *sys.argv[1:]])


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def progress(
    description: str, total: int, unit: str, *, enabled: bool = True, done: int = 0
) -> Iterator[Callable[[float | int, str], None]]:
    """A progress bar on stderr with rate and time left; yields `advance(count, text)`.

    Args:
        description: what is being done.
        total: how much of it there is.
        unit: what is counted, for the rate, as in "images".
        enabled: whether to show anything.
        done: how much of it was done before, by an interrupted run; it does not count as speed.
    """
    if not enabled:
        yield lambda count, text="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), Remaining(), TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, completed=done, rate="", text="")

        def advance(count: float | int, text: str = "") -> None:
            bars.advance(task, count)
            speed = bars.tasks[0].speed
            digits = 0 if speed and speed >= 10 else 2
            rate = f"{speed:,.{digits}f} {unit}/s" if speed else ""
            bars.update(task, rate=rate, text=text)

        yield advance
