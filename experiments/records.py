"""What experiments leave behind: a record, its table, figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclus import runs
from jaxclus.data import Dataset

# Fingerprint of the CIFAR-10 test set of TFDS 3.0.2 re-encoded as JPEG of quality 75.
JPEG_Q75 = "7646112d96e33c80d5d6efb5aa8eaa6c6842eed8c73497f60e522f45ca730872"


def shown_name(test: Dataset) -> str:
    """The name of a data set, which of a re-encoded one says so."""
    return test.name + " (JPEG q75)" * (test.fingerprint == JPEG_Q75)


def written(
    output: Path,
    name: str,
    record: dict[str, Any],
    table: str,
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the record, its table and its figures, prints the table, and returns the record.

    Args:
        output: directory for NAME.json, NAME.md and a NAME.png for each figure.
        name: of the results.
        record: what was found.
        table: the record as Markdown.
        figures: Matplotlib figures by what follows the name, as "-effect" or nothing.
    """
    runs.write_json(output / f"{name}.json", record)
    runs.write_atomic(output / f"{name}.md", table.encode())
    for kind, figure in figures.items():
        with runs.atomic_file(output / f"{name}{kind}.png") as file:
            figure.savefig(file, format="png", bbox_inches="tight")
    print(table)
    print(f"written: {output / name}.json, .md{' and .png' if figures else ''}")
    return record
