"""The Square attack: random search with square windows, no gradients."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _checks, _pytree, compose, losses, threat
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._ascent import keep
from jaxclus.attacks._base import BoundedAttack, Images, State

# The window's share of the image halves after these proposals, counted from 0.
_LIMITS = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
# What norms have added before something is divided by them, as in the published code.
_TINY = 1e-12


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Square(BoundedAttack):
    """Random search: a square window of the perturbation is replaced if that lowers the margin.

    The margin is z_y - max_{j != y} z_j. A proposal is accepted if its margin is lower than the
    best one so far, and ends the search if it is misclassified. The window has the side
    round(sqrt(p h w)), where p starts at `p_init` and is halved after 10, 50, 200, 500, 1000, 2000,
    4000, 6000 and 8000 proposals (from 29 down to 3 pixels on an image of 32 x 32).

    - Linf: starts from vertical stripes x +- eps; a proposal sets each channel of the window to
      x + eps or x - eps.
    - L2, L1: starts from a grid of tiles +-eta, a pattern of two bumps of opposite sign; a proposal
      adds +-eta to the direction of the perturbation in the window, clears a second window, and
      gives its norm to the first. The side is odd and at least 3.

    The published code (`autoattack/square.py`, as AutoAttack runs it) differs from the paper, and
    is followed: the schedule is that of 10,000 proposals whatever `queries` is; windows never reach
    the last row and column (offsets in [0, h - side - 1]); L1 exists. In L1, the window's new norm
    is c times what is left, for the projection to cut. It is left in these points:

    - There one window, sign and orientation is drawn for the whole batch. Here every image draws
      its own, proposal i from `fold_in(key of the image and round, i)`.
    - There a tie of the two highest logits is a success. Here the predicted class decides.
    - Tiles at an edge are cut off, and are one pixel at least: there some sizes fail, as 14 rows
      or fewer than 5.
    - L1 projections are exact, not onto 1 - 1e-6 of the ball.

    Attributes:
        threat: the threat model.
        queries: number of proposals, at least 1; the start takes one more forward pass.
        restarts: number of random starts, at least 1.
        p_init: the window's first share of the image's area, in (0, 1].

    Andriushchenko, Croce et al., "Square Attack: a query-efficient black-box adversarial attack via
    random search", ECCV 2020, arXiv:1912.00049, algorithms 1 to 3.
    """

    queries: int = dataclasses.field(default=5000, metadata={"static": True})
    restarts: int = dataclasses.field(default=1, metadata={"static": True})
    p_init: float = dataclasses.field(default=0.8, metadata={"static": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least("queries", self.queries, 1)
        _checks.at_least("restarts", self.restarts, 1)
        _checks.positive("p_init", self.p_init)
        _checks.within("p_init", self.p_init, 0, 1)

    @property
    def steps_per_round(self) -> int:
        return self.queries + 1

    def rounds(self, classes: int) -> int:
        return self.restarts

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def start(self, images: Images) -> State:
        start = _stripes if self.threat.name == "linf" else _tiles
        x_adv = start(self.threat, compose.split(images.keys, 0), images.x)
        lowest = jnp.full(images.y.shape, -jnp.inf)
        return State(x_adv, lowest, images.y < 0, lowest, ())

    def step(self, model: Classifier, images: Images, i: jax.Array, state: State) -> State:
        propose = _propose_signs if self.threat.name == "linf" else _propose_pattern
        schedule = Schedule.create(self, *images.x.shape[1:3])
        keys = compose.split(images.keys, i)
        proposal = propose(self.threat, keys, images.x, state.x_adv, schedule, _level(i - 1))
        # The first step evaluates the start.
        proposal = jnp.where((i > 0)[:, None, None, None], proposal, state.x_adv)
        keys = compose.split(images.keys, self.steps_per_round + i)
        found = _gradient.evaluate(model, keys, losses.margin, proposal, images.y)
        return keep(state, proposal, *found)


class Schedule(NamedTuple):
    """The windows of an image size, from the first to the last.

    Attributes:
        sides: their sides [levels].
        profiles: for L2 and L1, the pattern eta of each: amplitude, profile along and profile
            across the axis on which it changes its sign [levels, largest side + 1, 3]; the last
            entry, and those beyond a side, are zeros.
    """

    sides: np.ndarray
    profiles: np.ndarray

    @classmethod
    def create(cls, attack: Square, h: int, w: int) -> "Schedule":
        """The schedule for images of h x w pixels."""
        linf = attack.threat.name == "linf"
        shares = attack.p_init / 2.0 ** np.arange(len(_LIMITS) + 1)
        sides = [max(round(math.sqrt(p * h * w)), 1 if linf else 3) for p in shares]
        sides = [min(side if linf else side | 1, h, w) for side in sides]
        profiles = np.zeros((len(sides), max(sides) + 1, 3), np.float32)
        if not linf:
            for level, side in enumerate(sides):
                profiles[level, :side] = eta_profiles(side, attack.threat.name)
        return cls(np.array(sides), profiles)


def eta_profiles(side: int, norm: str) -> np.ndarray:
    """The pattern eta of norm 1 as a product of profiles.

    The upper half, of side // 2 rows, is a bump and the lower half a bump of the other sign. At the
    Chebyshev distance d from its centre a bump is t_d = sum_{k=d}^{side // 2} (k + 1)^-power. Since
    t falls with d, and d = max(d_row, d_column), that is min(t_{d_row}, t_{d_column}).

    Args:
        side: number of rows and columns.
        norm: "l2" (power 2) or "l1" (power 4).

    Returns:
        a, p, q [side, 3] with eta[row, column] = a[row] min(p[row], q[column]).
    """
    half, place = side // 2, np.arange(side)
    t = np.cumsum((np.arange(half, -1, -1) + 1.0) ** {"l2": -2, "l1": -4}[norm])[::-1]
    centre = np.where(place < half, half // 2, half + (side - half) // 2)
    along, across = t[np.abs(place - centre)], t[np.abs(place - half)]
    bumps = np.minimum(along[:, None], across[None])
    order = {"l2": 2, "l1": 1}[norm]
    upper, lower = (np.linalg.norm(bump.ravel(), order) for bump in (bumps[:half], bumps[half:]))
    amplitude = np.where(place < half, 1.0, -1.0) / np.where(place < half, upper, lower)
    amplitude /= np.linalg.norm((amplitude[:, None] * bumps).ravel(), order)
    return np.stack([amplitude, along, across], axis=1)


def _level(proposal: jax.Array) -> jax.Array:
    """How often the window's share was halved before proposal number 0, 1, ... [b]."""
    return jnp.sum(proposal[:, None] > _LIMITS[None], axis=1)


def _bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words uint32 [b, *shape], from a key for each image [b]."""
    return jax.vmap(lambda key: jax.random.bits(key, shape))(keys)


def _sign(bits: jax.Array) -> jax.Array:
    """Random words -> -1 or 1."""
    return 1.0 - 2.0 * (bits >> 31).astype(jnp.float32)


def _offset(bits: jax.Array, room: jax.Array) -> jax.Array:
    """Random words [b] -> int32, uniform in [0, room - 1], 0 if there is no room [b]."""
    return ((bits >> 8).astype(jnp.float32) * 2.0**-24 * room).astype(jnp.int32)


def _places(size: int, offset: jax.Array, side: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the pixels along an axis: places in the window, and whether they are in it [b, size]."""
    place = jnp.arange(size)[None] - offset[:, None]
    return place, (place >= 0) & (place < side[:, None])


def _window(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """[b, h], [b, w] -> [b, h, w, 1]."""
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def _stripes(ball: threat.Threat, keys: jax.Array, x: jax.Array) -> jax.Array:
    """x +- eps, with one sign for each column and channel."""
    _, _, w, c = x.shape
    return jnp.clip(x + ball.eps * _sign(_bits(keys, (1, w, c))), min=0.0, max=1.0)


def _propose_signs(
    ball: threat.Threat,
    keys: jax.Array,
    x: jax.Array,
    x_adv: jax.Array,
    schedule: Schedule,
    level: jax.Array,
) -> jax.Array:
    """`x_adv` with a window where each channel is at x + eps or at x - eps.

    The published code adds +-2 eps and projects, which gives the same.
    """
    _, h, w, c = x.shape
    bits, side = _bits(keys, (2 + c,)), jnp.asarray(schedule.sides)[level]
    rows = _places(h, _offset(bits[:, 0], h - side), side)[1]
    columns = _places(w, _offset(bits[:, 1], w - side), side)[1]
    step = ball.eps * _sign(bits[:, None, None, 2:])
    moved = jnp.clip(x + step, min=0.0, max=1.0)
    return jnp.where(_window(rows, columns), moved, x_adv)


def _tiles(ball: threat.Threat, keys: jax.Array, x: jax.Array) -> jax.Array:
    """x + a grid of tiles +-eta of h // 5 pixels, each turned or not and with signs of its own."""
    _, h, w, c = x.shape
    side = max(h // 5, 1)
    margin = max((h - 5 * side) // 2, 0)
    bits = _bits(keys, (h // side, w // side, 1 + c))
    amplitude, along, across = eta_profiles(side, ball.name).T
    eta = amplitude[:, None] * np.minimum(along[:, None], across[None])
    # Tile by tile [b, tiles, side, tiles, side, c], then as an image, cut to its size.
    eta = jnp.asarray(eta, jnp.float32)[None, None, :, None, :, None]
    turned = bits[:, :, None, :, None, :1] >> 31 == 1
    tile = jnp.where(turned, eta.swapaxes(2, 4), eta)
    delta = tile * _sign(bits[:, :, None, :, None, 1:])
    delta = delta.reshape(-1, h // side * side, w // side * side, c)
    delta = jnp.pad(delta, ((0, 0), (margin, side), (margin, side), (0, 0)))[:, :h, :w]
    if ball.name == "l1":
        return ball.project(x + delta, x)
    scale = ball.eps / (_TINY + ball.norm(delta))
    return _move(x, scale[:, None, None, None] * delta)


def _propose_pattern(
    ball: threat.Threat,
    keys: jax.Array,
    x: jax.Array,
    x_adv: jax.Array,
    schedule: Schedule,
    level: jax.Array,
) -> jax.Array:
    """`x_adv` with a pattern added in one window, which gets the norm of a second one too.

    With order 2 for L2 and 1 for L1, sizes are sums of |delta|^order, per channel.
    """
    _, h, w, c = x.shape
    bits, side = _bits(keys, (5 + c,)), jnp.asarray(schedule.sides)[level]
    rows = _places(h, _offset(bits[:, 0], h - side), side)
    columns = _places(w, _offset(bits[:, 1], w - side), side)
    first = _window(rows[1], columns[1])
    second = _window(
        _places(h, _offset(bits[:, 2], h - side), side)[1],
        _places(w, _offset(bits[:, 3], w - side), side)[1],
    )
    eta = _eta(schedule, level, rows, columns, bits[:, 4] >> 31 == 1)

    l2 = ball.name == "l2"
    size_of, root = (jnp.square, jnp.sqrt) if l2 else (jnp.abs, lambda size: size)

    def total(mask, values):
        return jnp.where(mask, size_of(values), 0.0).sum(axis=(1, 2), keepdims=True)

    # The clip changes nothing, but XLA's CPU code for a subtraction alone is 10 times slower.
    delta = jnp.clip(x_adv - x, min=-1.0, max=1.0)
    inside = total(first, delta)
    windows = total(first | second, delta)
    outside = total(~(first | second), delta)
    image = (windows + outside).sum(axis=3, keepdims=True)
    new = _sign(bits[:, None, None, 5:]) * eta + delta / (_TINY + root(inside))
    size = total(first, new)
    left = jnp.maximum((ball.eps**2 if l2 else ball.eps) - image, 0.0) / c + windows
    scale = root(left) * (1 if l2 else c) / (_TINY + root(size))
    moved = jnp.where(first, scale * new, jnp.where(second, 0.0, delta))
    if not l2:
        # With no norm to place the point is inside already. More to the point: XLA's CPU code for
        # a condition computes it once, and not anew in each of the projection's many passes.
        return jax.lax.cond(jnp.any(left > 0), ball.project, _box, x + moved, x)
    norm = root((scale**2 * size + outside).sum(axis=3, keepdims=True))
    return _move(x, ball.eps / (_TINY + norm) * moved)


def _eta(
    schedule: Schedule,
    level: jax.Array,
    rows: tuple[jax.Array, jax.Array],
    columns: tuple[jax.Array, jax.Array],
    turned: jax.Array,
) -> jax.Array:
    """The pattern in its window, zero outside of it [b, h, w, 1]."""
    profiles = jnp.asarray(schedule.profiles)

    def lookup(place, inside):
        place = jnp.where(inside, place, profiles.shape[1] - 1)
        return jnp.moveaxis(profiles[level[:, None], place], -1, 0)

    turned = turned[:, None]
    amplitude, along, across = lookup(*rows)
    down, row = jnp.where(turned, 1.0, amplitude), jnp.where(turned, across, along)
    amplitude, along, across = lookup(*columns)
    right, column = jnp.where(turned, amplitude, 1.0), jnp.where(turned, along, across)
    bumps = jnp.minimum(row[:, :, None], column[:, None, :])
    return (down[:, :, None] * right[:, None, :] * bumps)[..., None]


def _box(x_adv: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.clip(x_adv, min=0.0, max=1.0)


def _move(x: jax.Array, delta: jax.Array) -> jax.Array:
    """x + delta, cut by the box, rounded so as not to leave the ball."""
    return jnp.clip(threat._add(x, delta), min=0.0, max=1.0)
