"""Verdicts of AutoAttack on 1, 2 and 8 devices, image by image, on a published network.

    python -m benchmarks.devices PATH/networks/mnist_madry_tiny.npz --num-images 1000

On a CPU the devices are virtual ones, which say nothing about speed. The network is one of
benchmarks/reference_networks.py. Each device takes a share of the same batch, so that rounding
differs; at most 0.1 % of the verdicts may, or the command fails.
"""

import dataclasses
import os
from pathlib import Path

import jax
import tyro

import jaxclus as jc
from benchmarks import reference_networks
from jaxclus import runs

COUNTS = (1, 2, 8)
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Devices:
    """Compare verdicts over numbers of devices."""

    network: tyro.conf.Positional[Path]
    """A network, .npz."""
    norm: str = "linf"
    """Norm of the ball."""
    eps: float = 0.3
    """Its radius."""
    num_images: int = 1000
    """The first so many images of the test split."""
    seed: int = 0
    """Seed of the attacks."""
    output: Path = Path("benchmarks/results/devices.json")
    """File for the result."""

    def run(self) -> None:
        """Evaluates on each number of devices, counts the images whose verdict differs."""
        if len(jax.devices()) < max(COUNTS):
            raise RuntimeError(f"needs {max(COUNTS)} devices, found {len(jax.devices())}")
        meta, _ = reference_networks.read(self.network)
        data = jc.data.load(meta["dataset"], "test").take(self.num_images)
        attack = jc.attacks.AutoAttack(jc.threat.create(self.norm, self.eps))
        found = [
            jc.evaluation.robustness(
                jax.random.key(self.seed), reference_networks.load(self.network), attack, data,
                devices=jax.devices()[:count], microbatch=BATCH // count,
            )
            for count in COUNTS
        ]  # fmt: skip
        rows = [
            {
                "devices": each.num_devices,
                "robust": int(each.robust.sum()),
                "other_verdicts_than_on_one": int((each.robust != found[0].robust).sum()),
                "other_verdicts_at_second_batch_size": each.disagreements,
            }
            for each in found
        ]
        for row in rows:
            print(row)
        result = {
            "network": meta["name"], "dataset": data.name, "num_images": len(data),
            "norm": self.norm, "eps": self.eps, "seed": self.seed, "rows": rows,
            **runs.environment(),
        }  # fmt: skip
        runs.write_json(self.output, result)
        if max(row["other_verdicts_than_on_one"] for row in rows) > 0.001 * len(data):
            raise RuntimeError("more than 0.1 % of the verdicts depend on the number of devices")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(COUNTS)}"
    )
    tyro.cli(Devices).run()
