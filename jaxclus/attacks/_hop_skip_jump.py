"""HopSkipJump: a small perturbation found from predicted classes alone."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxclus import _checks, _pytree, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._base import Images, MinimumNormAttack, State
from jaxclus.attacks._search import select

# What an image's next query is for.
_DRAW, _PROBE, _STRIDE, _RETURN = range(4)
# Halvings of a stride or of the way back to x: float32 resolves no more.
_HALVINGS = 24
# Later images of a search, and probes, are so near the boundary that rounding decides over them.
_KEPT_HALVINGS = 12
# Probes move a pixel by at least 4 times what float32 resolves just below 1.
_SMALLEST_MOVE = 2.0**-22


class _Memory(NamedTuple):
    """Where the search for each image stands.

    Attributes:
        phase: what the next query is for [b].
        iteration: number of the iteration, 1 for the first [b].
        count: queries of the phase so far [b].
        edge: a misclassified image next to the boundary [b, h, w, c].
        far: the misclassified image that was last pulled towards x [b, h, w, c].
        low, high: bounds on how far from x to `far` the boundary lies, in [0, 1] [b].
        votes, total, weighted: sums over the probes u, which are misclassified (s = 1) or not
            (s = -1), of s [b], of u, and of s u [b, h, w, c].
        direction: estimate of the boundary's normal, for the stride [b, h, w, c].
        stride: its length [b].
    """

    phase: jax.Array
    iteration: jax.Array
    count: jax.Array
    edge: jax.Array
    far: jax.Array
    low: jax.Array
    high: jax.Array
    votes: jax.Array
    total: jax.Array
    weighted: jax.Array
    direction: jax.Array
    stride: jax.Array


@_pytree.register
@dataclasses.dataclass(frozen=True)
class HopSkipJump(MinimumNormAttack):
    """Walks along the decision boundary towards x, asking for nothing but predicted classes.

    The start is uniform noise that is misclassified, pulled back to the boundary. Iteration t asks
    for B_t = min(initial_evals sqrt(t), max_evals) probes around the point on the boundary, whose
    predictions give the direction into the other class (section III-C of the paper); goes along it
    by |x_t - x| / sqrt(t), halved until the image is misclassified; and bisects the way back to x.
    In L2 the way is the straight line, and the direction is the estimate; in Linf it is x_t clipped
    to balls around x, and the direction is the estimate's sign. Kept is the closest misclassified
    image of the searches' first 12 halvings, not of the probes: 2^-12 of its way from the boundary,
    an image is still misclassified in another program. The trace shows the margins, of which
    nothing is used.

    One `step` of the protocol is one query, so that queries are counted exactly and no image waits
    for others. The budget is enough for `steps` iterations with the longest possible searches; an
    image whose searches are shorter goes on to further iterations.

    Differences from the published code (`hsja.py`):

    - Searches halve at most 24 times, and probes move each pixel by at least 2^-22 on average: the
      code's tolerances, d^(-3/2) in L2 and d^-2 in Linf, and probes are made for float64. A stride
      without success within 24 halvings is given up.
    - The noise of the start is pulled to the boundary along the norm's own way at once, not along
      the straight line first.
    - Noise is drawn until it is misclassified, with no limit but the budget.
    - Each image and query has its own random key.

    Attributes:
        norm: "l2" or "linf".
        threat: the threat model that success is judged by, or None.
        steps: number of iterations that the budget of queries is made for, at least 1. 50 of them
            are 27,000 queries.
        max_evals: largest number of probes in an iteration, at least 1.
        initial_evals: number of probes in the first iteration, at least 1.

    Chen, Jordan and Wainwright, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack", IEEE
    S&P 2020, arXiv:1904.02144, algorithm 2.
    """

    NORMS: ClassVar[tuple[str, ...]] = ("l2", "linf")

    steps: int = dataclasses.field(default=50, metadata={"static": True})
    max_evals: int = dataclasses.field(default=10_000, metadata={"static": True})
    initial_evals: int = dataclasses.field(default=100, metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("steps", self.steps, 1)
        _checks.at_least("max_evals", self.max_evals, 1)
        _checks.at_least("initial_evals", self.initial_evals, 1)

    @property
    def steps_per_round(self) -> int:
        iterations = range(1, self.steps + 1)
        probes = (min(int(self.initial_evals * math.sqrt(t)), self.max_evals) for t in iterations)
        return 1 + _HALVINGS + sum(probes) + 2 * _HALVINGS * self.steps

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def start(self, images: Images) -> State:
        none, zero, blank = images.y * 0, jnp.zeros(images.y.shape), jnp.zeros_like(images.x)
        memory = _Memory(
            phase=none + _DRAW,
            iteration=none,
            count=none,
            edge=images.x,
            far=images.x,
            low=zero,
            high=zero,
            votes=zero,
            total=blank,
            weighted=blank,
            direction=blank,
            stride=zero,
        )
        return State(images.x, zero - jnp.inf, none > 0, zero - jnp.inf, memory)

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        x, memory = images.x, state.memory
        noise = self._noise(compose.split(images.keys, 2 * i), x)
        asked = self._query(x, memory, noise)
        keys = compose.split(images.keys, 2 * i + 1)
        margin, wrong = _gradient.evaluate(model, keys, losses.margin, asked, images.y)
        lasting = (memory.phase != _PROBE) & (memory.count < _KEPT_HALVINGS)
        state = self._keep_smallest(
            state._replace(loss=margin), asked, self.ball.norm(asked - x), wrong & lasting
        )
        answered = (self._drawn, self._probed, self._strode, self._returned)
        new = memory
        for phase, after in zip((_DRAW, _PROBE, _STRIDE, _RETURN), answered, strict=True):
            new = select(memory.phase == phase, after(x, memory, asked, wrong), new)
        return state._replace(memory=new)

    def _noise(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        """Uniform in (-1, 1) for each pixel."""
        low = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
        draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=low, maxval=1.0))
        return draw(keys)

    def _query(self, x: jax.Array, memory: _Memory, noise: jax.Array) -> jax.Array:
        """The images [b, h, w, c] to ask the model about."""
        # Directions uniform on the sphere in L2; in Linf as published.
        raw = jax.lax.erf_inv(noise) if self.norm == "l2" else noise
        probe = memory.edge + _column(self._probe_length(x, memory)) * _unit(raw)
        stride = memory.edge + _column(memory.stride) * memory.direction
        back = self._between(x, memory.far, (memory.low + memory.high) / 2)
        phase = _column(memory.phase)
        asked = jnp.where(phase == _DRAW, (noise + 1) / 2, back)
        asked = jnp.where(phase == _PROBE, probe, asked)
        asked = jnp.where(phase == _STRIDE, stride, asked)
        return jnp.clip(asked, min=0.0, max=1.0)

    def _probe_length(self, x: jax.Array, memory: _Memory) -> jax.Array:
        """The probes' L2 norm [b]: a tenth at first, then a share 1 / d of the last way back."""
        d = math.prod(x.shape[1:])
        length = jnp.maximum(self.ball.norm(memory.far - x) / d, math.sqrt(d) * _SMALLEST_MOVE)
        return jnp.where(memory.iteration == 1, 0.1, length)

    def _between(self, x: jax.Array, far: jax.Array, share: jax.Array) -> jax.Array:
        """The image at a share [b] of the way from x to `far`."""
        if self.norm == "l2":
            return x + _column(share) * (far - x)
        reach = _column(share * self.ball.norm(far - x))
        return jnp.clip(far, min=x - reach, max=x + reach)

    # What the answers to the four kinds of queries change; `wrong` is the verdict on `asked`.

    def _drawn(self, x: jax.Array, memory: _Memory, asked: jax.Array, wrong: jax.Array) -> _Memory:
        return select(wrong, _go_back(memory, asked), memory)

    def _probed(self, x: jax.Array, memory: _Memory, asked: jax.Array, wrong: jax.Array) -> _Memory:
        sign = jnp.where(wrong, 1.0, -1.0)
        moved = (asked - memory.edge) / _column(self._probe_length(x, memory))
        memory = memory._replace(
            count=memory.count + 1,
            votes=memory.votes + sign,
            total=memory.total + moved,
            weighted=memory.weighted + _column(sign) * moved,
        )
        t = jnp.maximum(memory.iteration, 1)
        probes = jnp.minimum(jnp.floor(self.initial_evals * jnp.sqrt(t)), self.max_evals)
        ready = memory._replace(
            phase=memory.phase * 0 + _STRIDE,
            count=memory.count * 0,
            direction=self._direction(memory),
            stride=self.ball.norm(memory.edge - x) / jnp.sqrt(t),
        )
        return select(memory.count >= probes, ready, memory)

    def _direction(self, memory: _Memory) -> jax.Array:
        """The way into the other class; answers count by how they differ from their mean."""
        mean = memory.votes / jnp.maximum(memory.count, 1)
        unanimous = _column(jnp.abs(memory.votes) == memory.count)
        centred = memory.weighted - _column(mean) * memory.total
        estimate = _unit(jnp.where(unanimous, memory.weighted, centred))
        return estimate if self.norm == "l2" else jnp.sign(estimate)

    def _strode(self, x: jax.Array, memory: _Memory, asked: jax.Array, wrong: jax.Array) -> _Memory:
        shorter = memory._replace(count=memory.count + 1, stride=memory.stride / 2)
        given_up = shorter.count >= _HALVINGS
        far = jnp.where(_column(wrong), asked, memory.edge)
        return select(wrong | given_up, _go_back(memory, far), shorter)

    def _returned(
        self, x: jax.Array, memory: _Memory, asked: jax.Array, wrong: jax.Array
    ) -> _Memory:
        middle = (memory.low + memory.high) / 2
        closer = memory._replace(
            count=memory.count + 1,
            edge=jnp.where(_column(wrong), asked, memory.edge),
            low=jnp.where(wrong, memory.low, middle),
            high=jnp.where(wrong, middle, memory.high),
        )
        blank = jnp.zeros_like(x)
        arrived = closer._replace(
            phase=closer.phase * 0 + _PROBE,
            iteration=closer.iteration + 1,
            count=closer.count * 0,
            votes=closer.votes * 0,
            total=blank,
            weighted=blank,
        )
        return select(closer.count >= _HALVINGS, arrived, closer)


def _go_back(memory: _Memory, far: jax.Array) -> _Memory:
    """The memory at the start of the way from a misclassified image back to x."""
    return memory._replace(
        phase=memory.phase * 0 + _RETURN,
        count=memory.count * 0,
        edge=far,
        far=far,
        low=memory.low * 0,
        high=memory.high * 0 + 1,
    )


def _column(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def _unit(values: jax.Array) -> jax.Array:
    """Scaled to an L2 norm of 1; zero where all is zero."""
    norm = jnp.sqrt(jnp.square(values).sum(axis=(1, 2, 3), keepdims=True))
    return values / jnp.where(norm > 0, norm, 1.0)
