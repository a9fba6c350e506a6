"""PGD-10 on a ResNet-18 against PyTorch: same weights, same images, same run.

    python -m benchmarks.pgd
    python -m benchmarks.pgd --rounds 3 --batch-size 64     # -> benchmarks/results/pgd-DEVICE.json

Needs torch (`pip install "jaxclus[bench]"`). On a CPU the peer is eager PyTorch in the
channels-last layout; on a GPU it is eager float32 in channels-last, bfloat16 autocast, and
`torch.compile`. Both sides take 10 gradient steps and return the last iterate; `jaxclus run` also
gives the verdicts of `PGD.run` (three more forward passes and the bookkeeping); `jax.jit` is the
same program without the settings of `jc.jit`. The sides take turns; the median round counts.

Work per image: 10 forward and 10 input-gradient passes of 0.56 GMAC each, 22.3 GFLOP.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxclus as jc
from jaxclus import runs
from jaxclus.threat import image_keys

STEPS, EPS = 10, 8 / 255
FLOP_PER_IMAGE = 2 * STEPS * 2 * 0.5566e9
#: Dense peak of the cards we know, FLOP/s, by the vendor's datasheet: (float32 as TF32, bfloat16).
PEAKS = {"H200": (494e12, 989e12), "H100": (494e12, 989e12), "A100": (156e12, 312e12)}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time PGD-10 on ResNet-18."""

    batch_size: int = 64
    """Images in a batch."""
    rounds: int = 5
    """Timed calls of each side, taken in turns after one to compile."""
    seed: int = 0
    """Seed of weights and images."""
    output: Path = Path("benchmarks/results")
    """Directory for the result."""

    def run(self) -> None:
        """Measures, prints a table, writes the result."""
        sides = self._ours() | self._torch()
        seconds = {name: [] for name in sides}
        for side in sides.values():
            side()
        for _ in range(self.rounds):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                seconds[name].append(time.perf_counter() - begin)
        rows = {name: self._row(name, times) for name, times in seconds.items()}
        for name, row in rows.items():
            print(f"{name:28s} {row['seconds']:8.3f} s  {row['images_per_second']:9.1f} images/s")
        ratio = rows["torch eager"]["seconds"] / rows["jaxclus"]["seconds"]
        print(f"jaxclus is {ratio:.2f} times as fast as eager PyTorch")
        import torch

        kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
        runs.write_json(
            self.output / f"pgd-{kind}.json",
            {
                "what": f"PGD-{STEPS} linf eps 8/255, ResNet-18, 32x32x3",
                "batch_size": self.batch_size,
                "rounds": self.rounds,
                "seed": self.seed,
                "rows": rows,
                "ratio_to_eager": round(ratio, 3),
                "torch": torch.__version__,
                "machine": platform.machine(),
                **runs.environment(),
            },
        )

    def _row(self, name: str, times: list[float]) -> dict:
        seconds = statistics.median(times)
        row = {
            "seconds": round(seconds, 4),
            "all_seconds": [round(t, 4) for t in times],
            "images_per_second": round(self.batch_size / seconds, 1),
            "flops": round(FLOP_PER_IMAGE * self.batch_size / seconds),
        }
        for card, (single, half) in PEAKS.items():
            if card in jax.devices()[0].device_kind:
                peak = half if "bfloat16" in name else single
                row["share_of_peak"] = round(row["flops"] / peak, 4)
        return row

    def _inputs(self) -> tuple[jc.models.Classifier, jax.Array, jax.Array]:
        init, draw = jax.random.split(jax.random.key(self.seed))
        model = jc.models.create("resnet18", 10, (32, 32, 3), init)
        x = jax.random.uniform(draw, (self.batch_size, 32, 32, 3))
        return model, x, jnp.argmax(model(x), axis=1)

    def _ours(self) -> dict[str, Callable[[], object]]:
        model, x, y = self._inputs()
        init, _ = jax.random.split(jax.random.key(self.seed))
        attack = jc.attacks.PGD(jc.Linf(EPS), steps=STEPS)
        key = jax.random.key(self.seed)
        keys = image_keys(key, jnp.arange(self.batch_size))
        perturb = jc.jit(lambda model, attack, x: attack.perturb(keys, model, x, y))
        half = dataclasses.replace(model.spec, dtype="bfloat16").build(init)
        plain = jax.jit(lambda model, attack, x: attack.perturb(keys, model, x, y))
        sides = {
            "jaxclus": lambda: perturb(model, attack, x).block_until_ready(),
            "jaxclus, jax.jit": lambda: plain(model, attack, x).block_until_ready(),
            "jaxclus run (verdicts)": lambda: attack.run(
                key, model, x, y
            ).x_adv.block_until_ready(),
        }
        if jax.default_backend() != "cpu":
            sides["jaxclus bfloat16"] = lambda: perturb(half, attack, x).block_until_ready()
        return sides

    def _torch(self) -> dict[str, Callable[[], object]]:
        import torch

        from benchmarks.torch_resnet import resnet18

        model, x, y = self._inputs()
        cuda = jax.default_backend() == "gpu"
        device = torch.device("cuda" if cuda else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cuda
        net = resnet18(model).to(device).to(memory_format=torch.channels_last).eval()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        images = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.from_numpy(np.array(y, np.int64)).to(device)
        with torch.no_grad():
            agree = (net(images).argmax(1) == labels).float().mean().item()
        assert agree > 0.98, f"the two networks disagree: {agree}"

        def attack(network: Callable, half: bool) -> None:
            _torch_pgd(network, images, labels, half)
            if cuda:
                torch.cuda.synchronize()

        sides = {"torch eager": lambda: attack(net, False)}
        if cuda:
            compiled = torch.compile(net)
            sides["torch bfloat16 autocast"] = lambda: attack(net, True)
            sides["torch.compile"] = lambda: attack(compiled, False)
            sides["torch.compile bfloat16"] = lambda: attack(compiled, True)
        return sides


def _torch_pgd(net: Callable, x, y, half: bool):
    """PGD as PyTorch users write it: random start, sign steps, projection, clamp."""
    import torch

    step = 2.5 * EPS / STEPS
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            loss = torch.nn.functional.cross_entropy(net(x_adv).float(), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        with torch.no_grad():
            x_adv = x_adv + step * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
