"""AutoAttack "standard" against the authors' implementation and torchattacks: same weights, run.

    python -m benchmarks.autoattack --networks DIR --data-dir DIR
    python -m benchmarks.autoattack --networks DIR --data-dir DIR --l1
    python -m benchmarks.autoattack --resnet18 --checkpoint FILE --data-dir DIR
    python -m benchmarks.autoattack --resnet18 --num-images 32    # random weights: see below

Needs torch (`pip install "jaxclus[bench]"`) and the peers, which nothing here installs: packages
`autoattack` (github.com/fra31/auto-attack) and `torchattacks`; `--reference PATH` and
`--torchattacks PATH` name checkouts. A peer that is absent is skipped, and said to be.

All sides get the same images in this process and the same CPU cores (`taskset -c 0,1` sets which;
PyTorch gets one thread for each). torchattacks gets the reference's numbers of steps, which are not
its defaults. Ours runs twice: the first run compiles, and it is the one that the ratio of record
takes. PyTorch networks are in the faster of its two layouts. Run it on an idle machine: PyTorch's
threads wait busily for each other, and on cores that do other work too its small networks take 50
times as long (measured); the load before each case is in the results.

Random weights give no images worth attacking: then eps is 1e-6, so that no image breaks, each
gradient attack takes `--steps` steps at one target, Square five times as many queries, and the
time of the whole AutoAttack on images that stand to the end is EXTRAPOLATED from that. Ours works
in batches of up to 288 images on a CPU (ninths of that: 256, 224, ...) and 512 elsewhere: take one
of these numbers or a multiple of the largest, for what is padded would be extrapolated too.

A pass is one image through the model. "Model alone" is the time that the passes that were needed
take in full batches, without any attack around them.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxclus as jc
from benchmarks import autoattack_peers as peers
from benchmarks import reference_networks
from jaxclus import runs

#: File, data set, norm and eps.
NETWORKS_L1 = (("cifar10_cnn_a_adv4", "cifar10", "l1", 4.0),)
NETWORKS = (
    ("mnist_madry_tiny", "mnist", "linf", 0.3),
    ("cifar10_cnn_a_adv4", "cifar10", "linf", 8 / 255),
    ("cifar10_cnn_a_adv4", "cifar10", "l2", 0.5),
    ("fashion_mmr_universal", "fashion_mnist", "linf", 0.1),
)
RESNET_EPS, TINY_EPS = 8 / 255, 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """A network in both frameworks, and what to attack it with."""

    name: str
    model: Callable
    net: Callable[[], Any]
    problem: peers.Problem


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time AutoAttack."""

    networks: Path | None = None
    """Directory of the reference networks, .npz files."""
    only: tuple[str, ...] = ()
    """Names of the reference networks to take; default all."""
    l1: bool = False
    """Take the networks in the L1 norm, with files of their own, instead of Linf and L2."""
    resnet18: bool = False
    """Take a ResNet-18 (CIFAR stem)."""
    checkpoint: Path | None = None
    """Its weights: a jaxclus .safetensors file or run directory; default random ones."""
    dataset: str = "cifar10"
    """Data set of the checkpoint."""
    data_dir: Path | None = None
    """Where TFDS data sets stand; default: $TFDS_DATA_DIR, else TFDS's own default."""
    num_images: int = 500
    """The first so many images of the test split."""
    steps: int = 10
    """Steps of the gradient attacks, for random weights."""
    reference: Path | None = None
    """A checkout of fra31/auto-attack."""
    torchattacks: Path | None = None
    """A checkout of torchattacks."""
    tf32: bool = True
    """Let PyTorch's convolutions use TF32 on a GPU, as they do by default; ours are in float32."""
    seed: int = 0
    """Seed of attacks, random weights and random images."""
    output: Path = Path("benchmarks/results")
    """Directory for the results."""

    def __post_init__(self) -> None:
        if self.networks is None and not self.resnet18:
            raise ValueError("`networks` must be given unless --resnet18 is, got neither")
        known = {name for name, *_ in self._known()}
        if not known.issuperset(self.only):
            raise ValueError(f"`only` must hold names of {sorted(known)}, got {self.only}")

    def _known(self) -> tuple[tuple[str, str, str, float], ...]:
        return NETWORKS_L1 if self.l1 else NETWORKS

    def run(self) -> list[dict[str, Any]]:
        """Measures, prints the tables, writes a file for the networks and one for the ResNet."""
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.allow_tf32 = self.tf32
        packages = {
            name: peers.find(name, checkout, option)
            for name, checkout, option in (
                ("autoattack", self.reference, "--reference"),
                ("torchattacks", self.torchattacks, "--torchattacks"),
            )
        }
        found = []
        first = "l1-" if self.l1 else ""
        for part, cases in ((first, self._reference_cases()), ("resnet18-", self._resnet_cases())):
            rows = []
            for case in cases:
                rows.append(self._measure(case, packages))
                print(table(rows[-1]))
                self._write(part, rows)
            found += rows
        return found

    def _write(self, part: str, rows: list[dict[str, Any]]) -> None:
        import torch

        kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
        runs.write_json(
            self.output / f"autoattack-{part}{kind}.json",
            {
                "what": "AutoAttack standard: jaxclus, fra31/auto-attack, torchattacks",
                "ratio_of_record": "first run, "
                + ("persistent compilation cache on" if _cache() else "with compilation"),
                "seed": self.seed,
                "peers_batch_size": peers.BATCH,
                "threads": len(os.sched_getaffinity(0)),
                "torch_threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "tf32": self.tf32,
                "cases": rows,
                **runs.environment(),
            },
        )

    def _reference_cases(self) -> list[Case]:
        cases = []
        if self.networks is None:
            return cases
        for name, dataset, norm, eps in self._known():
            if self.only and name not in self.only:
                continue
            path = self.networks / f"{name}.npz"
            data = jc.data.load(dataset, "test", self.data_dir).take(self.num_images)
            problem = peers.Problem(data, jc.threat.create(norm, eps), self.seed)
            model = reference_networks.load(path)
            cases.append(
                Case(name, model, lambda p=path: reference_networks.load_torch(p), problem)
            )
        return cases

    def _resnet_cases(self) -> list[Case]:
        if not self.resnet18:
            return []
        if self.checkpoint is not None:
            model = jc.load(self.checkpoint)
            data = jc.data.load(self.dataset, "test", self.data_dir).take(self.num_images)
            problem = peers.Problem(data, jc.Linf(RESNET_EPS), self.seed)
            return [Case("resnet18", model, lambda: _torch_resnet(model), problem)]
        init, draw = jax.random.split(jax.random.key(self.seed))
        model = jc.models.create("resnet18", 10, (32, 32, 3), init)
        images = np.asarray(jax.random.randint(draw, (self.num_images, 32, 32, 3), 0, 256))
        images = images.astype(np.uint8)
        predict = jc.jit(lambda model, x: model(x).argmax(1))
        labels = np.concatenate(
            [
                predict(model, jc.data.to_float(images[i : i + peers.BATCH]))
                for i in range(0, len(images), peers.BATCH)
            ]
        )
        names = tuple(map(str, range(10)))
        data = jc.data.Dataset(images, labels, names, name="uniform noise", split="test")
        problem = peers.Problem(data, jc.Linf(TINY_EPS), self.seed, self.steps)
        return [Case("resnet18, random weights", model, lambda: _torch_resnet(model), problem)]

    def _measure(self, case: Case, packages: dict[str, Any]) -> dict[str, Any]:
        problem = case.problem
        load = os.getloadavg()[0]
        print(f"\n{case.name}, {len(problem.data)} images of {problem.data.name}, load {load:.1f}")
        jax.clear_caches()
        first, result = peers.jaxclus(case.model, problem)
        ours, theirs = [("jaxclus", first)], []
        if any(packages.values()):
            peer, bare = _faster_layout(case, result)
            for name, package in packages.items():
                if package is not None and problem.threat.name in peers.NORMS[name]:
                    theirs.append((name, getattr(peer, name)(package)))
        again, _ = peers.jaxclus(case.model, problem)
        ours.append(("jaxclus again", again))
        own = peers.bare(case.model, problem.data, result.microbatch)
        sides = {name: _side(problem, outcome, own) for name, outcome in ours}
        sides |= {name: _side(problem, outcome, bare) for name, outcome in theirs}
        if problem.steps is not None:
            _extrapolate(problem, sides)
        measure = "seconds" if problem.steps is None else "extrapolated_seconds"
        for name, outcome in theirs:
            seconds = sides[name][measure]
            sides[name] |= _agreement(result, outcome.robust) | {
                "ratio": round(seconds / sides["jaxclus"][measure], 3),
                "ratio_again": round(seconds / sides["jaxclus again"][measure], 3),
            }
        return {
            "network": case.name,
            "dataset": problem.data.name,
            "norm": problem.threat.name,
            "eps": float(problem.threat.eps),
            "num_images": len(problem.data),
            "steps": problem.steps,
            "clean_accuracy": result.clean_accuracy,
            "clean": _digits(result.clean),
            "disagreements": result.disagreements,
            "microbatch": result.microbatch,
            "load_before": load,
            "sides": sides,
        }


def _cache() -> bool:
    return bool(jax.config.values["jax_compilation_cache_dir"])


def _torch_resnet(model: jc.models.Classifier) -> Any:
    """Our ResNet-18 in PyTorch, with the normalisation that it has."""
    import torch

    from benchmarks.torch_resnet import resnet18

    assert model.spec is not None

    class Normalized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = resnet18(model)
            for name, default in (("mean", 0.0), ("std", 1.0)):
                value = torch.tensor(getattr(model.spec, name) or (default,) * 3)
                self.register_buffer(name, value.view(1, 3, 1, 1))

        def forward(self, x):
            return self.net((x - self.mean) / self.std)

    return resnet18(model) if model.spec.mean is model.spec.std is None else Normalized()


def _faster_layout(
    case: Case, result: jc.evaluation.Robustness
) -> tuple[peers.Peers, tuple[float, float]]:
    """The PyTorch network in the layout in which a gradient takes less time, and its times."""
    import torch

    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        net = case.net().to(memory_format=layout)
        peer = peers.Peers(net, case.problem)
        found[layout] = (peer.bare(), peer)
    layout, (bare, peer) = min(found.items(), key=lambda entry: entry[1][0][1])
    print(f"PyTorch's layout: {layout}")
    right = peer.logits().argmax(1) == case.problem.data.labels
    agree = float((right == result.clean).mean())
    if agree < 0.98:
        raise RuntimeError(f"the two networks must agree on clean images, got {agree:.4f}")
    return peer, bare


def _side(
    problem: peers.Problem, outcome: peers.Outcome, bare: tuple[float, float]
) -> dict[str, Any]:
    """What one side did, as JSON values; milliseconds are for a batch of `peers.BATCH`."""
    forward, gradient = bare
    parts = {}
    for name, part in outcome.parts.items():
        alone = part.gradient * gradient + (part.forward - part.gradient) * forward
        steps = max(1, part.gradient or part.forward) / peers.BATCH
        parts[name] = {
            "seconds": round(part.seconds, 3),
            "share": round(part.seconds / outcome.seconds, 4),
            "robust_accuracy": part.robust_accuracy,
            "forward": part.forward,
            "gradient": part.gradient,
            "ms_per_step": round(1000 * part.seconds / steps, 2),
            "model_alone_ms_per_step": round(1000 * alone / steps, 2),
        }
    return {
        "seconds": round(outcome.seconds, 3),
        "robust_accuracy": float(outcome.robust.mean()),
        "largest_norm": outcome.largest_norm,
        "within": outcome.largest_norm <= float(problem.threat.limit),
        "parts": parts,
        "forward_ms": round(1000 * forward * peers.BATCH, 2),
        "gradient_ms": round(1000 * gradient * peers.BATCH, 2),
        "robust": _digits(outcome.robust),
    }


def _extrapolate(problem: peers.Problem, sides: dict[str, dict[str, Any]]) -> None:
    """Seconds of the whole AutoAttack if no image breaks, compilation counted once."""

    def full(side: dict[str, Any]) -> float:
        return sum(
            part["seconds"] / problem.steps_of(name) * peers.FULL_STEPS[name]
            for name, part in side["parts"].items()
        )

    compiling = max(0.0, sides["jaxclus"]["seconds"] - sides["jaxclus again"]["seconds"])
    for name, side in sides.items():
        once = compiling if name == "jaxclus" else 0.0
        steady = sides["jaxclus again"] if name == "jaxclus" else side
        side["extrapolated_seconds"] = round(full(steady) + once, 1)


def _agreement(result: jc.evaluation.Robustness, robust: np.ndarray) -> dict[str, Any]:
    """Share of images with our verdict, and the numbers of the others."""
    return {
        "agreement": float((robust == result.robust).mean()),
        "only_jaxclus_breaks": np.flatnonzero(robust & ~result.robust).tolist(),
        "only_peer_breaks": np.flatnonzero(~robust & result.robust).tolist(),
    }


def _digits(verdicts: np.ndarray) -> str:
    return "".join("01"[int(verdict)] for verdict in verdicts)


def table(case: dict[str, Any]) -> str:
    """A case as text."""
    steps = "" if case["steps"] is None else f", {case['steps']} steps of each attack"
    lines = [
        f"{case['network']}, {case['norm']} eps {case['eps']:.4g}, {case['num_images']} images of "
        f"{case['dataset']}{steps}, clean accuracy {case['clean_accuracy']:.4f}",
        "  seconds          " + "".join(f"{name:>9s}" for name in peers.FULL_STEPS)
        + "    total  robust  ratio  again  agreement",
    ]  # fmt: skip
    labels = {
        "jaxclus": "first, persistent cache on" if _cache() else "first, compiling",
        "jaxclus again": "again",
    }
    for name, side in case["sides"].items():
        label = f"  {name.split()[0]}" if name not in labels else f"  ours {labels[name]}"
        seconds = [side["parts"].get(part, {}).get("seconds") for part in peers.FULL_STEPS]
        line = f"{label:24s}" + "".join("        -" if s is None else f"{s:9.2f}" for s in seconds)
        line += f"{side['seconds']:9.2f}  {side['robust_accuracy']:6.4f}"
        if "ratio" in side:
            line += f"  {side['ratio']:5.2f}  {side['ratio_again']:5.2f}  {side['agreement']:9.4f}"
        lines.append(line)
        if "extrapolated_seconds" in side:
            lines.append(f"    EXTRAPOLATED to AutoAttack: {side['extrapolated_seconds']:.0f} s")
    lines.append(f"  ms per step of {peers.BATCH} images (model alone), share of the time:")
    for name, side in case["sides"].items():
        parts = ", ".join(
            f"{part} {row['ms_per_step']:.1f} ({row['model_alone_ms_per_step']:.1f}) "
            f"{100 * row['share']:.0f} %"
            for part, row in side["parts"].items()
        )
        lines.append(
            f"    {name}: {parts}; forward {side['forward_ms']:.1f}, "
            f"with gradient {side['gradient_ms']:.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
