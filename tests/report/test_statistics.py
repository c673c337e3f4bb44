"""Statistics over seeds, against scipy and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from contextlm.report.statistics import Difference, corrected, difference, stat


def seeds(*values, first=0):
    return pd.Series(values, index=range(first, first + len(values)), dtype=float)


def test_mean_and_sample_deviation():
    found = stat(seeds(9, 10, 11, math.nan))
    assert (found.mean, found.sd, found.seeds) == (10, 1, 3)
    assert stat(seeds(7)).sd is None
    assert stat(seeds(1, math.inf)).sd is None
    assert stat(seeds(math.nan)) is None


def test_the_interval_of_a_mean():
    values = [4.0, 4.4, 4.1, 4.3]
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stat(values).interval == pytest.approx((known.low, known.high))
    assert stat(values[:2]).interval is None
    assert stat([4.0, 4.1, math.inf]).interval is None


def test_the_same_seeds_are_paired():
    generator = np.random.default_rng(0)
    order = generator.normal(4, 0.5, 16)  # the seeds differ more than the two contenders
    mine = seeds(*(order - 0.1 + generator.normal(0, 0.02, 16)))
    theirs = seeds(*order)
    found = difference(mine.sample(frac=1, random_state=1), theirs)
    known = stats.ttest_rel(mine, theirs)
    assert found.paired
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(known.confidence_interval(0.95))
    assert found.mean == pytest.approx((mine - theirs).mean())
    assert (mine < theirs).all()
    assert found.verdict == "lower"
    assert stats.ttest_ind(mine, theirs).pvalue > 0.05, "unpaired, nothing would be told"


def test_other_seeds_are_compared_by_welch():
    mine, theirs = seeds(4.0, 4.1, 4.2, first=3), seeds(3.0, 3.4, 3.1, 3.0)
    found = difference(mine, theirs)
    known = stats.ttest_ind(mine, theirs, equal_var=False)
    assert not found.paired
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(known.confidence_interval(0.95))
    assert found.verdict == "higher"
    assert found.seeds == (3, 4)


def test_three_overlapping_seeds_are_undecided():
    found = difference(seeds(4.0, 4.2, 4.1), seeds(4.1, 4.15, 4.05))
    assert found.low < 0 < found.high
    assert found.verdict == "undecided"


@pytest.mark.parametrize(("number", "verdict"), [(1, "one seed"), (2, "two seeds")])
def test_few_seeds_have_no_interval(number, verdict):
    found = difference(seeds(*[1.0] * number), seeds(2.0, 2.1, 2.2))
    assert (found.low, found.high, found.p) == (None, None, None)
    assert found.mean == pytest.approx(-1.1)
    assert found.verdict == verdict


def test_no_spread_at_all():
    alike = difference(seeds(1, 2, 3), seeds(1, 2, 3))
    assert alike.verdict == "same"
    shifted = difference(seeds(1, 2, 3), seeds(2, 3, 4))
    assert (shifted.low, shifted.high, shifted.verdict) == (-1, -1, "lower")


def test_holm_by_hand():
    made = Difference(-1.0, -2.0, -0.1, 0.0, True, (3, 3))
    p = [0.01, 0.04, 0.03, 0.005]
    found = corrected([*(replace(made, p=value) for value in p), replace(made, p=None)])
    assert [d.holm for d in found] == pytest.approx([0.03, 0.06, 0.06, 0.02, None])
    assert [d.verdict for d in found[:4]] == ["lower", "undecided", "undecided", "lower"]
    assert corrected([]) == []
