"""Threat models: norm balls of radius eps around an image, cut by the pixel box [0, 1].

Images x and perturbations are float32 [b, h, w, c] (any shape with a leading batch axis works);
`eps` is on the pixel scale. A threat model is a frozen, hashable dataclass and a pytree whose leaf
is `eps`: passed through `jax.jit` it is a traced number, so a sweep over eps compiles once.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxclus import _checks, _pytree

Images = Float[Array, "b ..."]


def image_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each image, `fold_in(key, index)`, independent of batches and devices.

    Args:
        key: a typed key.
        index: integers [b], the images' numbers in their data set.

    Returns:
        Typed keys [b].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


@dataclasses.dataclass(frozen=True)
class Threat(abc.ABC):
    """All images z in [0, 1] with |z - x| <= eps in some norm.

    Attributes:
        eps: radius, above 0, on the pixel scale [0, 1].
    """

    eps: float

    def __init_subclass__(cls) -> None:
        _pytree.register(cls)

    def __post_init__(self) -> None:
        _checks.positive("eps", self.eps)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the norm: "linf", "l2" or "l1"."""

    @property
    def limit(self) -> jax.Array | float:
        """The largest norm that counts as inside, eps and the rounding of float32: 1e-5 of eps."""
        return self.eps * (1 + 1e-5)

    @abc.abstractmethod
    def norm(self, delta: Images) -> Float[Array, " b"]:
        """The norm of each perturbation."""

    @abc.abstractmethod
    def project(self, x_adv: Images, x: Images) -> Images:
        """The point of ball and box that is closest to `x_adv` in the Euclidean distance.

        Args:
            x_adv: points to project, any finite values.
            x: centres of the balls, in [0, 1].
        """

    @abc.abstractmethod
    def shrink_and_clip(self, x_adv: Images, x: Images) -> Images:
        """A point of ball and box near `x_adv`: scaled onto the ball, then clipped to the box.

        The cheaper map that the reference implementation of APGD uses for the L2 norm
        (Croce and Hein, arXiv:2003.01690); it is the exact projection for Linf and L1.
        """

    @abc.abstractmethod
    def step(self, grad: Images, x: Images | None = None) -> Images:
        """Direction of steepest ascent, of norm 1 (zero where the gradient is zero).

        Args:
            grad: gradients of a loss with respect to the images.
            x: the images, in [0, 1]; where they are given, the L1 step leaves out pixels that
                stand at the edge of the box and would leave it.
        """

    @abc.abstractmethod
    def _uniform(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """One perturbation, uniform in the ball."""

    def random_start(self, key: jax.Array, x: Images) -> Images:
        """A point drawn uniformly from the ball around each image, projected onto the box.

        Args:
            key: a typed key, folded with each image's position in the batch, or keys [b].
            x: images in [0, 1].
        """
        keys = image_keys(key, jnp.arange(x.shape[0])) if key.ndim == 0 else key
        delta = jax.vmap(lambda k: self._uniform(k, x.shape[1:]))(keys)
        return self.project(x + self.eps * delta, x)


def _per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    """[b] -> [b, 1, ..., 1], to broadcast against `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _sum(values: jax.Array) -> jax.Array:
    return values.reshape(values.shape[0], -1).sum(axis=1)


@jax.custom_jvp
def _largest(values: jax.Array) -> jax.Array:
    """The largest size of each image's entries, max_i |v_i| [b].

    As the largest and the smallest entry in one pass: XLA's CPU backend does not vectorise the
    largest alone, which takes seven times as long.
    """

    def both(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jnp.maximum(one[0], other[0]), jnp.minimum(one[1], other[1])

    values = values.reshape(values.shape[0], -1)
    zero = jnp.zeros((), values.dtype)
    high, low = jax.lax.reduce((values, values), (zero, zero), both, (1,))
    return jnp.maximum(high, -low)


@_largest.defjvp
def _(primals, tangents):
    """The derivative of the plain formula: ties share it."""
    return jax.jvp(lambda v: jnp.abs(v).reshape(v.shape[0], -1).max(axis=1), primals, tangents)


def kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of each image's values, none of which is negative.

    Floats without a sign are ordered as their bits are, so that counting gives the answer's bits,
    the highest first. XLA's CPU backend takes 50 times as long to sort 3,072 values.

    Args:
        values: floating point [b, ...].
        k: integers [b], from 1 to the number of an image's values.

    Returns:
        One value for each image [b].
    """
    width = jnp.finfo(values.dtype).bits
    integer = jnp.dtype(f"int{width}")
    bits = jax.lax.bitcast_convert_type(values, integer)

    def add(number: jax.Array, found: jax.Array) -> jax.Array:
        bit = jnp.left_shift(jnp.ones((), integer), (width - 2 - number).astype(integer))
        larger = bits >= _per_image(found | bit, bits)
        enough = larger.sum(axis=tuple(range(1, bits.ndim))) >= k
        return jnp.where(enough, found | bit, found)

    found = jax.lax.fori_loop(0, width - 1, add, jnp.zeros(k.shape, integer))
    return jax.lax.bitcast_convert_type(found, values.dtype)


def _clip_to_box(delta: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.clip(delta, min=-x, max=1 - x)


def _add(x: jax.Array, delta: jax.Array) -> jax.Array:
    """x + delta, rounded towards x: to the nearest, many pixels together could leave the ball."""
    moved = x + delta
    near, far = jax.lax.stop_gradient((x, moved))
    too_far = jnp.abs(far - near) > jnp.abs(delta)
    return moved + jnp.where(too_far, jnp.nextafter(far, near) - far, 0.0)


class Linf(Threat):
    """max_i |z_i - x_i| <= eps."""

    @property
    def name(self) -> str:
        return "linf"

    @property
    def limit(self) -> jax.Array | float:
        """The largest norm that counts as inside, eps and the rounding of float32: 1e-6."""
        return self.eps + 1e-6

    def norm(self, delta: Images) -> Float[Array, " b"]:
        return _largest(delta)

    def project(self, x_adv: Images, x: Images) -> Images:
        return jnp.clip(
            x_adv, min=jnp.maximum(x - self.eps, 0.0), max=jnp.minimum(x + self.eps, 1.0)
        )

    def shrink_and_clip(self, x_adv: Images, x: Images) -> Images:
        return self.project(x_adv, x)

    def step(self, grad: Images, x: Images | None = None) -> Images:
        return jnp.sign(grad)

    def _uniform(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


class L2(Threat):
    """(sum_i (z_i - x_i)^2)^(1/2) <= eps."""

    @property
    def name(self) -> str:
        return "l2"

    def norm(self, delta: Images) -> Float[Array, " b"]:
        # Scaled by the largest entry, so that tiny perturbations do not vanish when squared.
        scale = _largest(delta)
        safe = jnp.where(scale > 0, scale, 1.0)
        return scale * jnp.sqrt(jnp.maximum(_sum((delta / _per_image(safe, delta)) ** 2), 1e-30))

    def project(self, x_adv: Images, x: Images) -> Images:
        """z - x = clip(s (x_adv - x), -x, 1 - x) with the largest s <= 1 that keeps the norm.

        Given which pixels the box clips, s has a closed form; starting with none, each round can
        only clip more of them, so the rounds end at the exact projection.
        """
        delta = x_adv - x
        fixed = jax.lax.stop_gradient(delta)

        def clipped(s):
            scaled = _per_image(s, fixed) * fixed
            return scaled != _clip_to_box(scaled, x)

        def scale(delta, clip):
            free = self.norm(jnp.where(clip, 0.0, delta))
            used = self.norm(jnp.where(clip, _clip_to_box(delta, x), 0.0))
            # sqrt(eps^2 - used^2) without squares, which overflow, and away from sqrt's pole at 0.
            left = jnp.sqrt(jnp.maximum(self.eps - used, 1e-37)) * jnp.sqrt(self.eps + used)
            outside = free > left  # else the point is inside the ball already: s = 1
            return jnp.where(outside, left / jnp.where(outside, free, 1.0), 1.0)

        def another_round(carry):
            clip, _ = carry
            more = clip | clipped(scale(fixed, clip))
            return more, jnp.any(more != clip)

        start = (jnp.zeros(x.shape, bool), jnp.array(True))
        clip, _ = jax.lax.while_loop(lambda carry: carry[1], another_round, start)
        return _add(x, _clip_to_box(_per_image(scale(delta, clip), delta) * delta, x))

    def shrink_and_clip(self, x_adv: Images, x: Images) -> Images:
        delta = x_adv - x
        factor = jnp.minimum(1.0, self.eps / jnp.maximum(self.norm(delta), 1e-12))
        return jnp.clip(_add(x, _per_image(factor, delta) * delta), min=0.0, max=1.0)

    def step(self, grad: Images, x: Images | None = None) -> Images:
        norm = self.norm(grad)
        return jnp.where(_per_image(norm > 0, grad), grad, 0.0) / _per_image(
            jnp.where(norm > 0, norm, 1.0), grad
        )

    def _uniform(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # jax.random.ball does the same by rejection sampling, 70 times slower on a CPU.
        direction, radius = jax.random.split(key)
        delta = jax.random.normal(direction, (1, *shape))
        root = jax.random.uniform(radius) ** (1 / math.prod(shape))
        return (root * delta / _per_image(self.norm(delta), delta))[0]


class L1(Threat):
    """sum_i |z_i - x_i| <= eps."""

    @property
    def name(self) -> str:
        return "l1"

    def norm(self, delta: Images) -> Float[Array, " b"]:
        return _sum(jnp.abs(delta))

    def project(self, x_adv: Images, x: Images) -> Images:
        """|z - x|_i = min(max(|x_adv - x|_i - t, 0), bound_i) with the smallest t >= 0 that fits.

        t is bracketed by bisection, then solved for exactly on the pixels that are neither zero
        nor at the box (Croce and Hein, arXiv:2103.01208, section 3).
        """
        delta = x_adv - x
        bound = jnp.where(delta < 0, x, 1 - x)

        def shrunk(size, t):
            return jnp.clip(size - _per_image(t, size), min=0.0, max=bound)

        size = jnp.abs(delta)
        fixed = jax.lax.stop_gradient(size)

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            outside = _sum(shrunk(fixed, middle)) > self.eps
            return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

        largest = _largest(fixed)
        low, high = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(largest), largest))
        middle = _per_image((low + high) / 2, fixed)
        free = (fixed > middle) & (fixed < middle + bound)
        full = fixed >= middle + bound
        excess = _sum(jnp.where(free, size, 0.0) + jnp.where(full, bound, 0.0)) - self.eps
        exact = excess / jnp.maximum(_sum(free.astype(size.dtype)), 1.0)
        # Rounding must not push t out of its bracket, nor the bracket's edges stop its gradient.
        exact += jax.lax.stop_gradient(jnp.clip(exact, low, high) - exact)
        t = jnp.where(free.any(axis=tuple(range(1, free.ndim))), exact, high)
        inside = _sum(shrunk(fixed, jnp.zeros_like(t))) <= self.eps
        kept = shrunk(size, jnp.where(inside, 0.0, t))
        # Far outside, where floats are coarse, the sizes that remain are too.
        fit = jnp.minimum(1.0, self.eps / jnp.maximum(_sum(kept), self.eps))
        return _add(x, jnp.sign(delta) * _per_image(jax.lax.stop_gradient(fit), kept) * kept)

    def shrink_and_clip(self, x_adv: Images, x: Images) -> Images:
        return self.project(x_adv, x)

    def step(self, grad: Images, x: Images | None = None) -> Images:
        """The signs of the largest 1 % of the gradient's entries, at least one, scaled to norm 1.

        One pixel alone would be the steepest direction; sharing the step among the largest few
        needs far fewer steps (SLIDE, Tramer and Boneh, arXiv:1904.13000, section 4).
        """
        if x is not None:
            grad = jnp.where((grad > 0) & (x >= 1) | (grad < 0) & (x <= 0), 0.0, grad)
        size = jnp.abs(grad)
        count = max(1, round(0.01 * math.prod(size.shape[1:])))
        threshold = kth_largest(size, jnp.full(size.shape[:1], count))
        chosen = jnp.where(size >= _per_image(threshold, size), jnp.sign(grad), 0.0)
        return chosen / _per_image(jnp.maximum(self.norm(chosen), 1.0), grad)

    def _uniform(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        # Exponential sizes over their sum and one more are uniform in the simplex.
        sizes, sign, rest = jax.random.split(key, 3)
        delta = jax.random.exponential(sizes, shape)
        signed = delta * jax.random.rademacher(sign, shape, delta.dtype)
        return signed / (delta.sum() + jax.random.exponential(rest))


THREATS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2, "l1": L1}


def create(norm: str, eps: float) -> Threat:
    """The threat model of a norm's name: "linf", "l2" or "l1"."""
    _checks.one_of("norm", norm, THREATS)
    return THREATS[norm](eps)
