import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import metrics

LOGITS = jnp.array([[1.0, 2.0, 0.0], [3.0, 3.0, 1.0], [3.0, 3.0, 1.0], [0.0, 0.0, -1.0]])
LABELS = jnp.array([1, 0, 1, 2])


def test_correct_by_hand():
    # Of equal largest logits the first one counts.
    assert metrics.correct(LOGITS, LABELS).tolist() == [True, True, False, False]


def test_count_leaves_padding_out():
    hits = jnp.array([True, True, False, True])
    assert metrics.count(hits, jnp.array([True, False, True, True])) == 2
    assert metrics.count(hits, jnp.zeros(4, bool)) == 0
    assert metrics.count(hits, jnp.ones(4, bool)).dtype == jnp.int32


def test_batches_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(10, 3)).astype(np.float32), rng.integers(0, 3, 10)
    wanted = (logits.argmax(axis=1) == labels).sum()
    total = 0
    for start in range(0, 10, 4):
        index = np.minimum(np.arange(start, start + 4), 9)
        valid = jnp.arange(start, start + 4) < 10
        hits = metrics.correct(jnp.asarray(logits[index]), jnp.asarray(labels[index]))
        total += int(metrics.count(hits, valid))
    assert total == wanted > 0


@pytest.mark.parametrize("transform", [jax.jit, lambda fn: jax.vmap(fn)])
def test_jit_and_vmap(transform):
    logits, labels = LOGITS[None], LABELS[None]
    if transform is jax.jit:
        logits, labels = LOGITS, LABELS
    found = transform(metrics.correct)(logits, labels)
    assert found.reshape(-1).tolist() == metrics.correct(LOGITS, LABELS).tolist()
