"""Paired comparisons over seeds: mean, spread, exact p-value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

# Scores of float32 matrices: differences below 1e-6 are none.
_DECIMALS = 6


def paired(before: Sequence[float | None], after: Sequence[float | None]) -> dict[str, Any]:
    """Did the second of two values for each of n seeds grow?

    The p-value is exact over all 2^n sign flips of the differences after - before, one-sided, so
    that it is at least 1 / 2^n. Seeds for which a value is None are left out.

    Args:
        before: one value for each seed, in the order of `after`.
        after: one value for each seed.

    Returns:
        "seeds" (n), and for at least two: "before", "after" and "change" as [mean, standard
        deviation], "interval" (95 %, Student's t, of the mean change), "seeds_with_more",
        "p_value", "p_reversed" (that it fell), "smallest_p".
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if None not in (a, b)]
    if len(pairs) < 2:
        return {"seeds": len(pairs)}
    first, second = np.array(pairs).T
    change = np.round(second - first, _DECIMALS)
    half = scipy.stats.t.ppf(0.975, len(pairs) - 1) * scipy.stats.sem(change)
    grew, fell = (
        scipy.stats.permutation_test(
            (change,), np.mean, permutation_type="samples", alternative=side, n_resamples=np.inf
        ).pvalue
        for side in ("greater", "less")
    )
    return {
        "seeds": len(pairs),
        "before": spread(first),
        "after": spread(second),
        "change": spread(change),
        "interval": [float(change.mean() - half), float(change.mean() + half)],
        "seeds_with_more": int((change > 0).sum()),
        "p_value": float(grew),
        "p_reversed": float(fell),
        "smallest_p": 0.5 ** len(pairs),
    }


def spread(values: Sequence[float] | np.ndarray) -> list[float]:
    """[mean, standard deviation] of at least two values."""
    return [float(np.mean(values)), float(np.std(values, ddof=1))]


def verdict(row: dict[str, Any], level: float = 0.05) -> str:
    """What a comparison says of the claim that the value grows: holds, reversed, not decided."""
    if "p_value" in row and row["p_value"] <= level:
        return "holds"
    if "p_reversed" in row and row["p_reversed"] <= level:
        return "reversed"
    return "not decided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: max_{j <= i} min(1, (m - j) p_(j)) over the sorted p_(0..m-1).

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = np.argsort(p_values, kind="stable")
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()
