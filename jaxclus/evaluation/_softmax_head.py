"""A dense layer fitted on given embeddings: the surrogate head of adaptive attacks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy import optimize, special

# Weight of |W|^2 / 2 for embeddings of variance 1: enough for a minimum to exist.
_DECAY = 1e-3


def softmax_head(embeddings: np.ndarray, labels: np.ndarray, classes: int) -> Partial:
    """Multinomial logistic regression: a pytree callable, embeddings [b, d] -> logits [b, k].

    The W, b that minimise mean_i -log softmax(W^T s_i + b)_{y_i} + |W|^2 / 2000, where s_i are the
    embeddings shifted and scaled to mean 0 and variance 1 (entries that do not vary stay as they
    are), by L-BFGS in float64.

    Args:
        embeddings: float32 [n, d].
        labels: y, integers [n] in [0, k).
        classes: k.
    """
    h = np.asarray(embeddings, np.float64)
    mean, spread = h.mean(axis=0), h.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    standard, truth = (h - mean) / spread, np.eye(classes)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:-classes].reshape(-1, classes), flat[-classes:]
        logits = standard @ weights + bias
        loss = (special.logsumexp(logits, axis=1) - (logits * truth).sum(axis=1)).mean()
        error = (special.softmax(logits, axis=1) - truth) / len(h)
        slope = np.concatenate([(standard.T @ error + _DECAY * weights).ravel(), error.sum(axis=0)])
        return loss + _DECAY * np.square(weights).sum() / 2, slope

    start = np.zeros((h.shape[1] + 1) * classes)
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B").x
    weights = found[:-classes].reshape(-1, classes) / spread[:, None]
    bias = found[-classes:] - mean @ weights
    return Partial(_dense, jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))


def _dense(weights: jax.Array, bias: jax.Array, embeddings: jax.Array) -> jax.Array:
    return jnp.matmul(embeddings, weights, precision="highest") + bias[None]
