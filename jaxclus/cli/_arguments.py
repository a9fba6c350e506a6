"""Argument types that several commands share."""

import fractions
from pathlib import Path
from typing import Annotated

import tyro

from jaxclus import data, zoo
from jaxclus.runs import read_json


def _number(words: list[str]) -> float:
    """A decimal or a fraction: "0.1" or "8/255"."""
    try:
        return float(fractions.Fraction(words[0]))
    except ZeroDivisionError as error:
        raise ValueError(f"{words[0]} divides by zero") from error


#: A number that may be written as a fraction, as radii on the pixel scale are.
Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|N/255",
        instance_from_str=_number,
        is_instance=lambda value: isinstance(value, float),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]


def dataset_of(run: Path, name: str | None, split: str, num_images: int | None) -> data.Dataset:
    """The data set that a command works on: the run's own unless one is named."""
    if name is None:
        name = _own_dataset(run)
    found = data.load(name, split)
    return found if num_images is None else found.take(min(num_images, len(found)))


def _own_dataset(run: Path) -> str:
    """The name of the data set that a run or a network of the zoo was trained on."""
    config = run / "config.json"
    if config.exists():
        return str(read_json(config)["dataset"]["name"])
    if _of_the_zoo(run):
        return zoo.card(str(run)).dataset
    raise ValueError(f"`dataset` must be given, since {run} is no run directory with a config.json")


def _of_the_zoo(run: Path) -> bool:
    return not run.exists() and str(run) in zoo.list()


def artefacts(run: Path, output: Path | None) -> Path:
    """Where a command writes: into the run directory unless another is named."""
    if not run.exists() and not _of_the_zoo(run):
        raise FileNotFoundError(
            "`run_path` must be a run directory, a .safetensors file or a network of the zoo "
            f"(`jaxclus zoo`), found no {run}"
        )
    if output is not None:
        return output
    if run.is_dir():
        return run
    raise ValueError(f"`output` must be given, since {run} is no run directory")
