"""Means with their spread, shares with their interval, agreement in rank. Plain Python: small numbers of values."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Give the mean and its standard error (sample deviation / sqrt(n)); the error of one value is 0, of none nan."""
    count = len(values)
    if not count:
        return math.nan, math.nan
    mean = math.fsum(values) / count
    return mean, deviation(values) / math.sqrt(count)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, divided by n - 1; 0 for fewer than two values."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))


def interval(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: where the true share lies (95 % with z = 1.96). Honest at 0 and 1, too."""
    if not count:
        return 0.0, 1.0
    share = hits / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: 1 when two instruments order the same things alike, -1 when reversed; ties share their mean rank.

    nan with fewer than two values, or where one side does not differ at all.
    """
    a, b = ranks(one), ranks(other)
    mean = (len(a) + 1) / 2
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in a) * math.fsum((y - mean) ** 2 for y in b))
    if not spread:
        return math.nan
    return math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / spread


def ranks(values: Sequence[float]) -> list[float]:
    """Rank from 1, smallest first; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in range(start, end + 1):
            found[order[position]] = (start + end) / 2 + 1
        start = end + 1
    return found


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Write mean and standard error for a table: "0.812 ± 0.013"; "–" for nothing."""
    mean, error = mean_spread(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if values else "–"
