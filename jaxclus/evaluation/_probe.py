"""What the masking checks ask of a model: all that is compiled for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _classifier, compose, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks._base import BoundedAttack
from jaxclus.attacks._gradient import evaluate_with_gradient
from jaxclus.data import Dataset, to_float
from jaxclus.evaluation._predict import microbatches
from jaxclus.threat import L2, Threat, image_keys

#: Passes over the same images that must agree, as in the reference implementation of AutoAttack.
PASSES = 5
#: Draws of noise for each image. The authors' code of the indicators takes 100 for single images.
DRAWS = 10
#: Noise is uniform in [-NOISE, NOISE] for each pixel, as in the same code.
NOISE = 4 / 255

# The numbers under which an image's key is split for noise and for the random start: none that
# attacks count up to.
_NOISE, _START = 2**31 - 2, 2**31 - 3


class Searched(NamedTuple):
    """What an attack did to n images.

    Attributes:
        x_adv: what it returned, the image itself where that is outside the threat model.
        passed: whether the search saw a misclassified iterate [n].
        success: whether `x_adv` is misclassified [n].
        trace: the loss at every iterate [rounds, steps, n], finite; no steps if not asked for.
    """

    x_adv: jax.Array
    passed: np.ndarray
    success: np.ndarray
    trace: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """The loss at every iterate [steps, n], in each image's round of highest loss."""
        if not self.trace.shape[1]:
            return self.trace[0]
        highest = self.trace.max(axis=1).argmax(axis=0)
        return np.take_along_axis(self.trace, highest[None, None], axis=0)[0]


class Probe:
    """A model, and the first images of a data set that it classifies correctly.

    Attributes:
        model: the classifier.
        key: a typed key; image i uses `fold_in(key, i)`.
        index: numbers of the images in the data set, int32 [n].
        x: the images, float32 [n, h, w, c].
        y: their labels, int32 [n].
    """

    def __init__(self, key: jax.Array, model: Classifier, data: Dataset, num_images: int):
        self.key, self.model = key, model
        self._verdict, self._norms = _bind_verdict(model), _bind_gradient_norms(model)
        found: list[int] = []
        for numbers, count in microbatches(np.arange(len(data)), min(num_images, len(data))):
            index = jnp.asarray(numbers, jnp.int32)
            _, predicted = self._verdict(key, to_float(data.images[numbers]), index)
            right = np.asarray(predicted)[:count] == data.labels[numbers[:count]]
            found += numbers[:count][right].tolist()
            if len(found) >= num_images:
                break
        if not found:
            raise ValueError(
                "`data` must hold images that the model classifies correctly, "
                f"got {len(data)} of which none is"
            )
        chosen = np.array(found[:num_images], np.int32)
        self.index, self.y = jnp.asarray(chosen), jnp.asarray(data.labels[chosen])
        self.x = to_float(data.images[chosen])

    def passes(self) -> np.ndarray:
        """Logits of several passes over the images [passes, n, k].

        In each pass the images stand at other places of the batch, and a callable without visible
        weights is traced anew: random numbers that are fixed for a place or a program show too.
        """
        logits = []
        for shift in range(PASSES):
            order = np.roll(np.arange(len(self.index)), shift)
            verdict = _bind_verdict(self.model)
            rolled, _ = verdict(self.key, self.x[order], self.index[order])
            logits.append(np.roll(np.asarray(rolled), -shift, axis=0))
        return np.stack(logits)

    def margins(self) -> tuple[np.ndarray, np.ndarray]:
        """Margins of the images [n], and with noise added [draws, n]."""
        keys = self._keys(_NOISE)

        def margin(x: jax.Array) -> np.ndarray:
            logits, _ = self._verdict(self.key, x, self.index)
            return np.asarray(losses.margin(logits, self.y))

        def uniform(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, self.x.shape[1:], minval=-NOISE, maxval=NOISE)

        noise = (jax.vmap(uniform)(compose.split(keys, draw)) for draw in range(DRAWS))
        noisy = [margin(jnp.clip(self.x + each, min=0.0, max=1.0)) for each in noise]
        return margin(self.x), np.stack(noisy)

    def right(self, x: jax.Array) -> np.ndarray:
        """Whether the model classifies x [n, h, w, c] as the images, bool [n]."""
        _, predicted = self._verdict(self.key, x, self.index)
        return np.asarray(predicted == self.y)

    def random_start(self, threat: Threat) -> jax.Array:
        """A random point of the ball around each image [n, h, w, c]."""
        return threat.random_start(self._keys(_START), self.x)

    def gradient_norms(
        self, x: jax.Array, used: Mapping[str, losses.Loss]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The gradient's L2 norm at x [n, h, w, c], for each loss, float32 [n].

        And whether the same pass classifies x correctly, bool [n].
        """
        data = (self.key, x, self.y, self.index)
        norms, wrong = self._norms(*data, used=tuple(used.values()))
        return dict(zip(used, map(np.asarray, norms), strict=True)), ~np.asarray(wrong)

    def attacked(self, search: Any, attack: BoundedAttack, *, trace: bool) -> Searched:
        """The attack on the images, by `bind_search` of this model or another one."""
        data = (self.key, self.x, self.y, self.index)
        x_adv, passed, success, history = search(attack, *data, trace=trace)
        if history is None:
            history = self.not_attacked().trace
        # Differences of losses must be finite.
        history = np.clip(np.nan_to_num(np.asarray(history)), -1e30, 1e30)
        return Searched(x_adv, np.asarray(passed), np.asarray(success), history)

    def not_attacked(self) -> Searched:
        """What an attack does that cannot be run."""
        none = np.zeros(len(self.index), bool)
        return Searched(self.x, none, none, np.zeros((1, 0, len(none)), np.float32))

    def _keys(self, number: int) -> jax.Array:
        return compose.split(image_keys(self.key, self.index), number)


def _verdict(model, key, x, index):
    return _classifier.verdict(model, image_keys(key, index), x)


def _gradient_norms(model, key, x, y, index, *, used):
    keys = compose.split(image_keys(key, index), 0)
    found = [evaluate_with_gradient(model, keys, loss, x, y) for loss in used]
    return [L2(1.0).norm(at.gradient) for at in found], found[0].wrong


def _search(model, attack, key, x, y, index, *, trace):
    # `attack.run` does not say what the search itself took for a success.
    keys = image_keys(key, index)
    logits, _ = _classifier.verdict(model, keys, x)
    found = attack._search(keys, model, x, y, logits, y >= 0, trace=trace)
    inside = attack.ball.norm(found.x_adv - x) <= attack.ball.limit  # False for NaN too
    x_adv = jnp.where(inside[:, None, None, None], found.x_adv, x)
    wrong = _classifier.verdict(model, keys, x_adv)[1] != y
    return x_adv, found.success, wrong, found.trace


_bind_verdict = _classifier.jit_over_model(_verdict)
_bind_gradient_norms = _classifier.jit_over_model(_gradient_norms, static_argnames=("used",))

#: `bind_search(model)(attack, key, x, y, index, trace=...)`, for `Probe.attacked`.
bind_search = _classifier.jit_over_model(_search, static_argnames=("trace",))
