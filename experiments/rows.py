"""Rows of experiments: computed once and kept, then compared over seeds and put into tables."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.paired import holm, paired, spread, verdict
from jaxclus import runs

Row = dict[str, Any]


def kept(directory: Path, made_of: Any, label: str, compute: Callable[[Path], Row]) -> Row:
    """The row of the last time, if it was made of the same things; else computed and kept.

    Args:
        directory: where it is kept, for this row alone.
        made_of: all that the row depends on; compared by its repr.
        label: what is printed when it has to be computed.
        compute: makes the row, in the directory.
    """
    where = {key: runs.environment()[key] for key in ("versions", "hardware")}
    wanted, path = repr((made_of, where)), directory / "row.json"
    found = runs.read_json(path) if path.exists() else {}
    if found.get("made_of") == wanted:
        return found["row"]
    print(label, flush=True)
    row = json.loads(json.dumps(compute(directory)))
    runs.write_json(path, {"made_of": wanted, "row": row})
    return row


def sources(*modules: ModuleType) -> str:
    """The beginning of the SHA-256 of modules' code, of packages all of it."""
    sha = hashlib.sha256()
    for module in modules:
        file = Path(str(module.__file__))
        files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
        for each in files:
            sha.update(each.read_bytes())
    return sha.hexdigest()[:12]


def value(row: Any, path: str) -> Any:
    """An entry of nested dicts and lists, as "without_batch_norm.difference" or "epochs.0".

    Names may have dots of their own, as "logits.25.5/255".
    """
    if not path:
        return row
    names = path.split(".")
    if isinstance(row, list):
        return value(row[int(names[0])], ".".join(names[1:]))
    for count in range(len(names), 0, -1):
        name = ".".join(names[:count])
        if name in row:
            return value(row[name], ".".join(names[count:]))
    raise KeyError(f"{path} is not among {list(row)}")


def found_before(path: Path, code: str, setting: Any) -> list[Row]:
    """The rows of a results file of the same code and setting; none where there is no such file.

    What was committed seed by seed is gone on with on another machine.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    same = result["code"] == code and result["setting"] == json.loads(json.dumps(setting))
    return result["rows"] if same else []


class Claims:
    """Collects comparisons of trials over seeds; rows have "trial" and "seed"."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = {(row["trial"], row["seed"]): row for row in rows}
        self.trials = list(dict.fromkeys(row["trial"] for row in rows))
        self.found: list[dict[str, Any]] = []

    def values(self, trial: str, path: str, seeds: Sequence[int]) -> list[Any]:
        """One value for each seed."""
        return [value(self.rows[trial, seed], path) for seed in seeds]

    def seeds(self, *trials: str) -> list[int]:
        """The seeds that all of these trials were run with."""
        every = sorted({seed for _, seed in self.rows})
        return [seed for seed in every if all((trial, seed) in self.rows for trial in trials)]

    def add(
        self, claim: str, before: tuple[str, str], after: tuple[str, str], kind: str = "exploratory"
    ) -> None:
        """That the second (trial, path) is higher than the first.

        Args:
            claim: in words.
            before: the first trial and path.
            after: the second trial and path.
            kind: "primary", named in advance; "exploratory"; or "check", which is no evidence.
        """
        values = before[1] if before[1] == after[1] else f"{before[1]} to {after[1]}"
        row = {"claim": claim, "from": before[0], "to": after[0], "value": values, "kind": kind}
        if before[0] in self.trials and after[0] in self.trials:
            seeds = self.seeds(before[0], after[0])
            row |= paired(self.values(*before, seeds), self.values(*after, seeds))
            row["verdict"] = verdict(row)
        else:
            row["verdict"] = "not run"
        self.found.append(row)

    def correct(self) -> None:
        """Holm's correction of the primary claims, for rises and for falls."""
        primary = [row for row in self.found if row["kind"] == "primary" and "p_value" in row]
        for name in ("p_value", "p_reversed"):
            for row, p in zip(primary, holm([row[name] for row in primary]), strict=True):
                row[f"{name}_corrected"] = p
        for row in primary:
            corrected = {name: row[f"{name}_corrected"] for name in ("p_value", "p_reversed")}
            row["verdict"] = verdict(corrected)


def cell(rows: Sequence[Row], path: str, percent: bool = False) -> str:
    """Mean and standard deviation over the rows, or nothing where the value was not measured.

    Rows where it is None are left out and counted.
    """
    if path.split(".")[0] not in rows[0]:
        return ""
    values = [v for v in (value(row, path) for row in rows) if v is not None]
    if len(values) < 2:
        return "-"
    mean, deviation = spread([100 * v if percent else v for v in values])
    shown = f"{mean:.1f} ± {deviation:.1f}" if percent else f"{mean:.2f} ± {deviation:.2f}"
    return shown + (f" ({len(values)} seeds)" if len(values) < len(rows) else "")


def statistics(row: dict[str, Any], percent: bool = True) -> list[str]:
    """Change (in points or as it is), seeds with more, and p of a claim."""
    if "p_value" not in row:
        return ["", "", ""]
    name = "p_reversed" if row["verdict"] == "reversed" else "p_value"
    p = f"{row[name]:.4f}"
    if f"{name}_corrected" in row:
        p += f" ({row[f'{name}_corrected']:.4f})"
    if name == "p_reversed":
        p += " of a fall"
    if "change" not in row:
        return [f"{row['within']:.1%} within", "", p]
    scale, decimals, unit = (100, 1, " points") if percent else (1, 3, "")
    mean, deviation, low, high = (scale * x for x in (*row["change"], *row["interval"]))
    change = f"{mean:+.{decimals}f} ± {deviation:.{decimals}f}{unit}"
    change += f" ({low:+.{decimals}f} to {high:+.{decimals}f})"
    return [change, f"{row['seeds_with_more']} of {row['seeds']}", p]


def claim_lines(
    found: Sequence[dict[str, Any]], no_accuracies: tuple[str, ...] = ()
) -> Iterable[str]:
    """What claims mean and a table of them, in Markdown.

    Args:
        found: of `Claims`.
        no_accuracies: beginnings of the paths whose values are not shares, to be shown as they are.
    """
    exploratory = sum(row["kind"] == "exploratory" and "p_value" in row for row in found)
    lines = [
        "Claims: that a value grows from the first to the second. Change: mean and standard "
        "deviation over seeds, and the mean's 95 % interval (Student's t). p is exact over all "
        "sign flips of the seeds' differences, one-sided. Holds: p at most 0.05; reversed: the "
        "same for a fall. Primary claims are corrected (Holm, rises and falls apart, so that for "
        f"both together the level is 0.1), the {exploratory} exploratory ones are not: if nothing "
        f"were true, about {0.05 * exploratory:.1f} of them would hold by chance alone, and as "
        "many be reversed."
    ]
    if any("within" in row for row in found):
        lines[0] += " For attacks p is over all labellings of the classes, all seeds together."
    if any(row["kind"] == "check" for row in found):
        lines[0] += " A check can hardly come out otherwise, and is no evidence."
    lines += ["", "| kind | claim | from | to | value | change | more in | p | verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in found:
        names = [row[name] for name in ("kind", "claim", "from", "to", "value")]
        percent = not row["value"].startswith(no_accuracies)
        lines.append(f"| {' | '.join([*names, *statistics(row, percent), row['verdict']])} |")
    return lines
