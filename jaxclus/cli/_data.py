"""`jaxclus data list | info | prepare`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxclus import data


@dataclasses.dataclass(frozen=True)
class List:
    """List the data sets that can be loaded now.

    Try: jaxclus data list
    """

    data_dir: Path | None = None
    """Where TFDS data sets stand; default: $TFDS_DATA_DIR, else TFDS's own default."""

    def run(self) -> None:
        """Prints a line for each data set."""
        for found in data.available(self.data_dir):
            print(_line(found))


@dataclasses.dataclass(frozen=True)
class Info:
    """Say what is known of a data set.

    Try: jaxclus data info fashion_mnist
    """

    name: tyro.conf.Positional[str]
    """Name of the data set."""
    data_dir: Path | None = None
    """Where TFDS data sets stand."""

    def run(self) -> None:
        """Prints version, splits, place, classes and groups."""
        found = data.info(self.name, self.data_dir)
        print(_line(found))
        groups = data.class_groups(self.name)
        for group, members in groups or ():
            print(f"  group {group}: classes {', '.join(map(str, members))}")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download and prepare a TFDS data set. Needs the network and `pip install jaxclus[prepare]`.

    Try: jaxclus data prepare cifar10
    """

    name: tyro.conf.Positional[str]
    """Name of the data set in TFDS."""
    data_dir: Path | None = None
    """Where to put it."""

    def run(self) -> None:
        """Prepares it in the array_record format."""
        print(f"prepared: {data.prepare(self.name, self.data_dir)}")


def _line(found: data.DatasetInfo) -> str:
    splits = ", ".join(f"{split} {size:,}" for split, size in found.splits)
    return f"{found.name} {found.version}: {splits} images ({found.path or 'built in'})"


@dataclasses.dataclass(frozen=True)
class Data:
    """List, describe or prepare data sets.

    Try:
      jaxclus data list
      jaxclus data info cifar10
      jaxclus data prepare cifar10
    """

    command: (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    )

    def run(self) -> None:
        """Runs the sub-command."""
        self.command.run()
