"""What seeds tell: means, deviations, and differences from a baseline, from pandas and scipy.

With one or two seeds there is a difference and no interval. Several comparisons in one table are
corrected by Holm's method (Holm, "A simple sequentially rejective multiple test procedure", 1979).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
SEEDS_TO_TELL = 3

Verdict = Literal["lower", "higher", "undecided", "same", "one seed", "two seeds"]


@dataclass(frozen=True)
class Stat:
    """A mean over seeds and its sample standard deviation (ddof=1); one seed has none."""

    mean: float
    sd: float | None
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The bounds of the mean's 95 % interval (Student's t), from three seeds on."""
        if self.sd is None or self.seeds < SEEDS_TO_TELL:
            return None
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.seeds - 1)) * self.sd
        half /= math.sqrt(self.seeds)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Difference:
    """A mean minus the baseline's, in their own unit, with the bounds of its 95 % interval.

    `paired` says that both have the same seeds, and that differences were taken seed by seed
    (paired t); else the test is Welch's. `p` is two-sided; `holm` is `p` after `corrected`.
    Interval and p are None with fewer than three seeds on a side.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    paired: bool
    seeds: tuple[int, int]
    holm: float | None = None

    @property
    def verdict(self) -> Verdict:
        """``lower`` and ``higher`` only where the corrected test rejects that both are equal."""
        if self.p is None:
            return "one seed" if min(self.seeds) == 1 else "two seeds"
        if self.mean == self.low == self.high == 0:
            return "same"
        if (self.p if self.holm is None else self.holm) >= 1 - CONFIDENCE:
            return "undecided"
        return "lower" if self.mean < 0 else "higher"


def stat(values: Iterable[float]) -> Stat | None:
    """Mean and deviation of one value a seed; missing ones are left out, None without any."""
    known = np.array([value for value in values if not pd.isna(value)], dtype=float)
    if not len(known):
        return None
    finite = bool(np.isfinite(known).all())
    sd = float(known.std(ddof=1)) if len(known) > 1 and finite else None
    return Stat(float(known.mean()), sd, len(known))


def difference(mine: pd.Series[float], theirs: pd.Series[float]) -> Difference:
    """`mine` against `theirs`, each one finite value a seed, indexed by seed."""
    mine, theirs = mine.sort_index(), theirs.sort_index()
    paired = mine.index.equals(theirs.index)
    seeds = len(mine), len(theirs)
    mean = float(mine.mean() - theirs.mean())
    if min(seeds) < SEEDS_TO_TELL:
        return Difference(mean, None, None, None, paired, seeds)
    with warnings.catch_warnings():  # where all differences are equal there is no spread to test
        warnings.simplefilter("ignore", RuntimeWarning)
        if paired:
            test = stats.ttest_rel(mine, theirs)
        else:
            test = stats.ttest_ind(mine, theirs, equal_var=False)
        interval, p = test.confidence_interval(CONFIDENCE), float(test.pvalue)
    low, high = float(interval.low), float(interval.high)
    if math.isnan(p):  # the seeds differ by exactly nothing, or by exactly the same
        low, high, p = mean, mean, float(mean == 0)
    return Difference(mean, low, high, p, paired, seeds)


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The same with Holm's correction over those that have a p."""
    p = np.array([d.p for d in differences if d is not None and d.p is not None])
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    left = iter(adjusted.tolist())
    return [d if d is None or d.p is None else replace(d, holm=next(left)) for d in differences]
