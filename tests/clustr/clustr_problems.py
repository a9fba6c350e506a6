"""Clusters to test on, and the specification once more in NumPy, float64, example by example."""

import numpy as np

ALPHA = 12.5


def clusters(seed=0, classes=4, per_class=2, members=6, dim=5, spread=1.0):
    """Embeddings, cluster ids and labels of a batch that is contiguous by cluster."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes * per_class, dim)) * 3
    ids = np.repeat(np.arange(classes * per_class), members)
    points = centres[ids] + spread * rng.standard_normal((len(ids), dim))
    return points.astype(np.float32), ids.astype(np.int32), (ids // per_class).astype(np.int32)


def capped(numerator, denominator):
    return max(0.0, -np.log(numerator / (denominator + 1e-8) + 1e-8))


def magnet(points, ids, labels, alpha=ALPHA):
    """Losses [b] of the stochastic Magnet loss."""
    points = np.asarray(points, np.float64)
    means = {j: points[ids == j].mean(axis=0) for j in set(ids.tolist())}
    class_of = {j: labels[ids == j][0] for j in means}
    own = np.array([np.sum((r - means[j]) ** 2) for r, j in zip(points, ids.tolist(), strict=True)])
    variance = own.sum() / (len(points) - 1)
    losses = []
    for n, r in enumerate(points):
        others = [
            np.exp(-np.sum((r - mean) ** 2) / (2 * variance))
            for j, mean in means.items()
            if class_of[j] != labels[n]
        ]
        losses.append(capped(np.exp(-own[n] / (2 * variance) - alpha), sum(others)))
    return np.array(losses)


def nearest_own(points, labels, centres, classes):
    """Squared distances [n] to the nearest centre of each example's class."""
    points, centres = np.asarray(points, np.float64), np.asarray(centres, np.float64)
    return np.array(
        [
            min(np.sum((r - mu) ** 2) for mu, c in zip(centres, classes, strict=True) if c == y)
            for r, y in zip(points, labels, strict=True)
        ]
    )


def full_magnet(points, labels, centres, classes, alpha=ALPHA, as_published=False):
    """Losses [n] of the full-set loss, right or with the published mistake."""
    own = nearest_own(points, labels, centres, classes)
    variance = own.sum() / (len(own) - 1)
    losses = []
    for r, y, d in zip(np.asarray(points, np.float64), labels, own, strict=True):
        denominator = 0.0
        for mu, c in zip(np.asarray(centres, np.float64), classes, strict=True):
            if c != y:
                denominator += np.exp(-np.sum((r - mu) ** 2) / (2 * variance))
            elif as_published:
                denominator += 1.0
        losses.append(capped(np.exp(-d / (2 * variance) - alpha), denominator))
    return np.array(losses)


def scores(h, centres, classes, variance, nearest):
    """Published scores [b, k]."""
    found = np.zeros((len(h), max(classes) + 1))
    for row, point in zip(found, np.asarray(h, np.float64), strict=True):
        squares = np.sum((np.asarray(centres, np.float64) - point) ** 2, axis=1)
        for j in np.argsort(squares)[:nearest]:
            row[classes[j]] += np.exp(-squares[j] / (2 * variance))
    return found
