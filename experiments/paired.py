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
        deviation], "seeds_with_more", "p_value", "smallest_p".
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if None not in (a, b)]
    if len(pairs) < 2:
        return {"seeds": len(pairs)}
    first, second = np.array(pairs).T
    change = np.round(second - first, _DECIMALS)
    test = scipy.stats.permutation_test(
        (change,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    return {
        "seeds": len(pairs),
        "before": spread(first),
        "after": spread(second),
        "change": spread(change),
        "seeds_with_more": int((change > 0).sum()),
        "p_value": float(test.pvalue),
        "smallest_p": 0.5 ** len(pairs),
    }


def spread(values: Sequence[float] | np.ndarray) -> list[float]:
    """[mean, standard deviation] of at least two values."""
    return [float(np.mean(values)), float(np.std(values, ddof=1))]


def verdict(row: dict[str, Any], level: float = 0.05) -> str:
    """What a comparison says of the claim that the value grows: holds, does not, is not decided."""
    if "p_value" not in row:
        return "not decided"
    if row["p_value"] <= level:
        return "holds"
    return "does not hold" if row["change"][0] <= 0 else "not decided"
