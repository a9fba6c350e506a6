"""Our AutoAttack against the authors' verdicts, image by image, on small published networks.

    python -m benchmarks.conformance PATH            # -> benchmarks/results/conformance.json
    python -m benchmarks.conformance PATH --only chain --networks mnist_madry_tiny

PATH holds `autoattack.json`, what the authors' implementation made of the networks, and
`networks/NAME.npz`. Per run: robust accuracy after each attack of the chain, and of each attack
alone, must be within max(0.4 points, 2 images, 3 standard deviations of the authors' seeds) of
theirs; on the images whose verdict all of their seeds share, ours must agree on 99 %. Images that
only ours breaks are listed with norm, range, label and prediction, computed here anew.

About 15 minutes on 2 cores.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

import jaxclus as jc
from benchmarks import reference_networks
from jaxclus import attacks, runs
from jaxclus.data import to_float


@dataclasses.dataclass(frozen=True)
class Conformance:
    """Compare our AutoAttack with the authors' verdicts."""

    path: tyro.conf.Positional[Path]
    """Directory with autoattack.json and networks/."""
    networks: tuple[str, ...] = ()
    """Names of networks; default all."""
    only: Literal["chain", "alone"] | None = None
    """Compare whole chains or single attacks only."""
    seed: int = 0
    """Seed of our attacks."""
    output: Path = Path("benchmarks/results/conformance.json")
    """File for the result."""

    def run(self) -> None:
        """Compares, prints a line for each attack, writes the result."""
        theirs = json.loads((self.path / "autoattack.json").read_text())
        rows = []
        if self.only != "alone":
            for _, same in _grouped(theirs["runs"], ("network", "norm", "eps_text")):
                rows += self._chain(same)
        if self.only != "chain":
            for _, same in _grouped(
                theirs["individual"], ("network", "norm", "eps_text", "attack")
            ):
                rows += self._alone(same)
        rows = [row for row in rows if row]
        failed = [row for row in rows if not row["conforms"]]
        result = {"conforms": not failed, "seed": self.seed, "rows": rows, **runs.environment()}
        runs.write_json(self.output, result)
        print(f"{len(rows) - len(failed)} of {len(rows)} conform; written: {self.output}")

    def _chain(self, same: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._wanted(same[0]):
            return []
        found, checked = self._evaluate(same[0], lambda threat: attacks.AutoAttack(threat))
        rows = []
        for number, member in enumerate(found.members):
            verdicts = [run["chain"][number]["still_correct"] for run in same]
            seconds = [run["chain"][number]["seconds"] for run in same]
            rows.append(
                _row(same[0], f"chain: {member.name}", member.robust, verdicts, seconds,
                     member.seconds, found.clean, checked)
            )  # fmt: skip
        return rows

    def _alone(self, same: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._wanted(same[0]):
            return []
        name = same[0]["attack"]
        found, checked = self._evaluate(
            same[0], lambda threat: attacks.AutoAttack(threat, "custom", (name,))
        )
        verdicts = [run["verdict"] for run in same]
        seconds = [run["seconds"] for run in same]
        return [
            _row(
                same[0], name, found.robust, verdicts, seconds, found.seconds, found.clean, checked
            )
        ]

    def _wanted(self, run: dict[str, Any]) -> bool:
        return not self.networks or run["network"] in self.networks

    def _evaluate(self, run: dict[str, Any], attack: Any) -> tuple[Any, "Checked"]:
        model = reference_networks.load(self.path / "networks" / f"{run['network']}.npz")
        data = jc.data.load(run["dataset"], "test").take(run["n"])
        threat = jc.threat.create(run["norm"].lower(), run["eps"])
        found = jc.evaluation.robustness(
            jax.random.key(self.seed), model, attack(threat), data, progress=False
        )
        with jax.default_matmul_precision("highest"):
            predicted = np.argmax(model(found.adversarial), axis=1)
        x = np.asarray(to_float(data.images))
        checked = Checked(threat.name, x, found.adversarial, data.labels, predicted)
        return found, checked


@dataclasses.dataclass(frozen=True, eq=False)
class Checked:
    """The images before and after the attack, their labels and what is predicted afterwards."""

    norm: str
    x: np.ndarray
    x_adv: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray

    def of(self, image: int) -> dict[str, Any]:
        """Norm and range of an adversarial image in float64, label and prediction."""
        x_adv = np.float64(self.x_adv[image])
        order = {"linf": np.inf, "l2": 2, "l1": 1}[self.norm]
        return {
            "image": image,
            "norm": float(np.linalg.norm((x_adv - self.x[image]).ravel(), order)),
            "range": [float(x_adv.min()), float(x_adv.max())],
            "label": int(self.labels[image]),
            "predicted": int(self.predicted[image]),
        }


def _grouped(entries: list[dict[str, Any]], names: tuple[str, ...]) -> list[tuple[Any, list]]:
    groups: dict[Any, list] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[name] for name in names), []).append(entry)
    return list(groups.items())


def _row(
    run: dict[str, Any],
    attack: str,
    robust: np.ndarray,
    verdicts: list[str],
    their_seconds: list[float],
    seconds: float,
    clean: np.ndarray,
    checked: Checked,
) -> dict[str, Any]:
    """The comparison of one attack; prints its line."""
    theirs = np.array([[digit == "1" for digit in verdict] for verdict in verdicts])
    counts, n = theirs.sum(axis=1), theirs.shape[1]
    allowed = max(0.004 * n, 2, 3 * float(np.std(counts, ddof=1)) if len(counts) > 1 else 0)
    shared = (theirs == theirs[0]).all(axis=0)
    agreement = float((robust == theirs[0])[shared].mean())
    off = abs(int(robust.sum()) - float(counts.mean()))
    only_ours = np.flatnonzero(theirs.all(axis=0) & ~robust)
    row = {
        "network": run["network"], "norm": run["norm"], "eps": run["eps"], "attack": attack,
        "num_images": n, "ours": int(robust.sum()), "theirs": counts.tolist(),
        "allowed": round(allowed, 2), "agreement": agreement,
        "conforms": bool(off <= allowed and agreement >= 0.99),
        "seconds": round(seconds, 2), "their_seconds_then": their_seconds,
        "only_ours_breaks": [checked.of(int(image)) for image in only_ours],
        "only_theirs_breaks": np.flatnonzero(~theirs.any(axis=0) & robust & clean).tolist(),
    }  # fmt: skip
    print(
        f"{row['network']:<22}{row['norm']:<5}{row['eps']:<7.4g}{attack:<16}ours {row['ours']:>4}"
        f"  theirs {', '.join(map(str, row['theirs'])):<16} of {n}  agreement {agreement:.4f}  "
        f"{'conforms' if row['conforms'] else 'DOES NOT CONFORM'}  {seconds:.1f} s",
        flush=True,
    )
    return row


if __name__ == "__main__":
    tyro.cli(Conformance).run()
