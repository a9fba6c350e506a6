"""AutoAttack "standard" by other libraries, unchanged and timed attack by attack, and by ours.

Every side gives an `Outcome`. The peers are packages that whoever runs a benchmark installs, or a
checkout of their repositories.
"""

import dataclasses
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc

#: The attacks of "standard" in order, each with its steps for an image that no attack breaks.
FULL_STEPS = {"apgd-ce": 100, "apgd-t": 900, "fab-t": 900, "square": 5000}
SOURCES = {
    "autoattack": "git+https://github.com/fra31/auto-attack",
    "torchattacks": "git+https://github.com/Harry24k/adversarial-attacks-pytorch",
}
#: The norms in which a peer has the whole ensemble.
NORMS = {"autoattack": ("linf", "l2", "l1"), "torchattacks": ("linf", "l2")}
#: Images in a batch of the peers: the reference's default.
BATCH = 250


@dataclasses.dataclass(frozen=True)
class Part:
    """One attack of the chain.

    Attributes:
        seconds: wall time.
        robust_accuracy: after it and all before it, of all images.
        forward: images that went through the model, with or without a gradient.
        gradient: images whose gradient was taken.
    """

    seconds: float
    robust_accuracy: float
    forward: int
    gradient: int


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What one implementation made of n images.

    Attributes:
        seconds: wall time of everything, clean predictions and final checks included.
        parts: the attacks that were run, by name.
        robust: whether each image is classified correctly at the end, bool [n].
        largest_norm: of the perturbations of the images that it broke.
    """

    seconds: float
    parts: dict[str, Part]
    robust: np.ndarray
    largest_norm: float


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What all sides are given.

    Attributes:
        data: the images.
        threat: the threat model.
        seed: of the attacks.
        steps: None for the attacks as they are; else so many steps of each gradient attack at
            one target, and five times as many queries.
    """

    data: jc.data.Dataset
    threat: jc.threat.Threat
    seed: int
    steps: int | None = None

    def steps_of(self, name: str) -> int:
        """Steps of an attack for an image that no attack breaks."""
        if self.steps is None:
            return FULL_STEPS[name]
        return self.steps * (5 if name == "square" else 1)

    def attack(self) -> jc.attacks.AutoAttack:
        """The ensemble, as jaxclus has it."""
        if self.steps is None:
            return jc.attacks.AutoAttack(self.threat)
        short = (
            jc.attacks.APGD(self.threat, steps=self.steps),
            jc.attacks.TargetedAPGD(self.threat, steps=self.steps, targets=1),
            jc.attacks.TargetedFAB(self.threat.name, self.threat, steps=self.steps, targets=1),
            jc.attacks.Square(self.threat, queries=self.steps_of("square")),
        )
        return jc.attacks.AutoAttack(self.threat, version="custom", attacks=short)


def find(package: str, checkout: Path | None, option: str) -> ModuleType | None:
    """The package, from a checkout if one is given; None, and a line that says why, without it."""
    if checkout is not None:
        sys.path.insert(0, str(checkout.resolve()))
    try:
        importlib.import_module("torch")
        return importlib.import_module(package)
    except ImportError as error:
        print(
            f"skipped: {package} cannot be imported ({error}). Install it, as with "
            f"`pip install {SOURCES[package]}`, or name a checkout: {option} PATH"
        )
        return None


def jaxclus(model: Callable, problem: Problem) -> tuple[Outcome, jc.evaluation.Robustness]:
    """Our AutoAttack, through the evaluation that users call; also its full result."""
    begin = time.perf_counter()
    result = jc.evaluation.robustness(
        jax.random.key(problem.seed), model, problem.attack(), problem.data, progress=False
    )
    seconds = time.perf_counter() - begin
    parts = {
        name: Part(member.seconds, float(member.robust.mean()), member.forward, member.gradient)
        for name, member in zip(FULL_STEPS, result.members, strict=True)
    }
    broken = result.norms[result.clean & ~result.robust]
    return Outcome(seconds, parts, result.robust, float(broken.max(initial=0))), result


class Peers:
    """A PyTorch network under other libraries' attacks.

    Args:
        net: images [b, c, h, w] -> logits [b, k], a module in eval mode.
        problem: what to attack.
    """

    def __init__(self, net: Any, problem: Problem):
        import torch

        self.problem = problem
        self.device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
        for parameter in net.parameters():
            parameter.requires_grad_(False)  # nobody reads their gradients: in the peers' favour
        self.net = _counted(net.to(self.device)).eval()
        images = np.asarray(jc.data.to_float(problem.data.images)).transpose(0, 3, 1, 2)
        self.x = torch.from_numpy(images.copy()).to(self.device)
        self.y = torch.from_numpy(problem.data.labels.astype(np.int64)).to(self.device)
        self.norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[problem.threat.name]

    def logits(self) -> np.ndarray:
        """Of the clean images, float32 [n, k]."""
        import torch

        with torch.no_grad():
            return np.concatenate([self.net(x).cpu().numpy() for x in self.x.split(BATCH)])

    def autoattack(self, package: ModuleType) -> Outcome:
        """The authors' implementation."""
        problem, clock = self.problem, _Clock(self.net)
        adversary = package.AutoAttack(
            self.net, norm=self.norm, eps=float(problem.threat.eps), seed=problem.seed,
            version="standard", device=self.device,
        )  # fmt: skip
        adversary.logger = clock
        if problem.steps is not None:
            for attack in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
                attack.n_iter = problem.steps
            adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = 1
            adversary.square.n_queries = problem.steps_of("square")
        clock.stamp("begin")
        x_adv = adversary.run_standard_evaluation(self.x, self.y, bs=BATCH)
        clock.stamp("end")
        return self._outcome(clock, x_adv)

    def torchattacks(self, package: ModuleType) -> Outcome:
        """torchattacks with the reference's numbers of steps, which are not its defaults."""
        import torch

        problem, clock = self.problem, _Clock(self.net)
        short = problem.steps is not None
        classes = 2 if short else problem.data.num_classes
        shared: dict[str, Any] = {
            "norm": self.norm, "eps": float(problem.threat.eps), "seed": problem.seed,
        }  # fmt: skip
        steps = {"steps": problem.steps if short else 100}
        attacks = {
            "apgd-ce": package.APGD(self.net, **steps, **shared),
            "apgd-t": package.APGDT(self.net, n_classes=classes, **steps, **shared),
            "fab-t": package.FAB(
                self.net, multi_targeted=True, n_classes=classes, **steps, **shared
            ),
            "square": package.Square(
                self.net, n_queries=problem.steps_of("square"), resc_schedule=False, **shared
            ),
        }
        clock.stamp("begin")
        x_adv = self.x.clone()
        right = self._right(self.x, self.y)
        clock.stamp("clean")
        for name, attack in attacks.items():
            for index in torch.nonzero(right).flatten().split(BATCH):
                found = attack(self.x[index], self.y[index]).detach()
                broken = ~self._right(found, self.y[index])
                x_adv[index[broken]], right[index[broken]] = found[broken], False
            clock.stamp(name, float(right.float().mean()))
        clock.stamp("end")
        return self._outcome(clock, x_adv)

    def _right(self, x: Any, y: Any) -> Any:
        import torch

        with torch.no_grad():
            parts = [self.net(part).argmax(1) for part in x.split(BATCH)]
        return torch.cat(parts) == y

    def _outcome(self, clock: "_Clock", x_adv: Any) -> Outcome:
        robust = self._right(x_adv, self.y).cpu().numpy()
        delta = (x_adv - self.x).cpu().numpy()
        norms = np.asarray(self.problem.threat.norm(jnp.asarray(delta)))
        return Outcome(clock.seconds(), clock.parts(), robust, float(norms[~robust].max(initial=0)))

    def bare(self) -> tuple[float, float]:
        """Seconds of a forward pass, and of one with the gradient, for one image in a batch."""
        import torch

        repeats = -(-BATCH // len(self.x))
        x = self.x.repeat(repeats, 1, 1, 1)[:BATCH]
        y = self.y.repeat(repeats)[:BATCH]

        def forward() -> None:
            with torch.no_grad():
                self.net(x).sum().item()

        def gradient() -> None:
            x_adv = x.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.net(x_adv), y, reduction="sum")
            torch.autograd.grad(loss, x_adv)[0].sum().item()

        return median_seconds(forward) / BATCH, median_seconds(gradient) / BATCH


def bare(model: Callable, data: jc.data.Dataset, batch: int) -> tuple[float, float]:
    """Seconds of a forward pass, and of one with the gradient, for one image in a batch; ours."""
    index = np.arange(batch) % len(data)
    x, y = jc.data.to_float(data.images[index]), jnp.asarray(data.labels[index])
    forward = jc.jit(lambda model, x: model(x))
    gradient = jc.jit(
        lambda model, x: jax.grad(lambda x: jc.losses.cross_entropy(model(x), y).sum())(x)
    )
    with jax.default_matmul_precision("highest"):
        return (
            median_seconds(lambda: forward(model, x).block_until_ready()) / batch,
            median_seconds(lambda: gradient(model, x).block_until_ready()) / batch,
        )


def median_seconds(call: Callable[[], object], times: int = 3) -> float:
    """Of several calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _counted(net: Any) -> Any:
    """The network, counting the images that pass through it."""
    import torch

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.forwards, self.gradients = net, 0, 0

        def forward(self, x):
            self.forwards += len(x)
            self.gradients += len(x) * torch.is_grad_enabled()
            return self.net(x)

    return Counted()


class _Clock:
    """Time and passes after each attack; takes the place of the reference's logger too."""

    # What the reference prints once an attack is through.
    _DONE = re.compile(r"robust accuracy after (\S+): ([\d.]+)%")

    def __init__(self, net: Any):
        self.net = net
        self.stamps: dict[str, tuple[float, int, int, float]] = {}

    def stamp(self, name: str, accuracy: float = 0.0) -> None:
        now = time.perf_counter()
        self.stamps[name] = (now, self.net.forwards, self.net.gradients, accuracy)

    def log(self, text: str) -> None:
        print(f"  {text}")
        if text.startswith("initial accuracy"):
            self.stamp("clean")
        elif done := self._DONE.match(text):
            self.stamp(done[1].lower(), float(done[2]) / 100)

    def seconds(self) -> float:
        return self.stamps["end"][0] - self.stamps["begin"][0]

    def parts(self) -> dict[str, Part]:
        names = ["clean", *(name for name in FULL_STEPS if name in self.stamps)]
        parts = {}
        for before, name in zip(names, names[1:], strict=False):
            seconds, forward, gradient, _ = (
                after - earlier
                for after, earlier in zip(self.stamps[name], self.stamps[before], strict=True)
            )
            if name == "square":  # takes no gradient, though torchattacks records for one
                gradient = 0
            parts[name] = Part(seconds, self.stamps[name][3], int(forward), int(gradient))
        return parts
