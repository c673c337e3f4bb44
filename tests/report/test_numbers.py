"""How numbers are written."""

from __future__ import annotations

import math

import pytest

from contextlm.report import numbers
from contextlm.report.statistics import Stat


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.perplexity(9.994), "9.99"),
        (numbers.perplexity(9.996), "10.0"),
        (numbers.perplexity(1225.63), "1,225.6"),
        (numbers.perplexity(math.inf), "not finite"),
        (numbers.perplexity(math.exp(200)), "7.2e+86"),
        (numbers.human_bytes(0), "0 B"),
        (numbers.human_bytes(1023), "1,023 B"),
        (numbers.human_bytes(1024), "1.0 KB"),
        (numbers.human_bytes(1024 * 1024 - 1), "1.0 MB"),
        (numbers.human_bytes(1536 * 1024), "1.5 MB"),
        (numbers.signed_percent(17.58), "+17.6%"),
        (numbers.signed_percent(-6.7), "-6.7%"),
        (numbers.signed_percent(-0.01), "0.0%"),
        (numbers.signed_percent(1234.5), "+1,234.5%"),
        (numbers.signed_percent(None), numbers.ABSENT),
        (numbers.percent(0.249), "24.9%"),
        (numbers.with_deviation(Stat(97.9, 0.44, 3)), "97.9 ± 0.4"),
        (numbers.with_deviation(Stat(97.9, 0.02, 3)), "97.9 ± 0.02"),
        (numbers.with_deviation(Stat(0.249, 0.01, 3), numbers.percent), "24.9 ± 1.0%"),
        (numbers.with_deviation(Stat(12.0, 0.5, 3), numbers.seconds), "12.0 ± 0.5 s"),
        (numbers.with_deviation(Stat(3 * 1024**2, 2**19, 3), numbers.human_bytes), "3.0 ± 0.5 MB"),
        (numbers.with_deviation(None), numbers.ABSENT),
        (numbers.plain(2403563), "2,403,563"),
        (numbers.significant(1.17541), "1.18"),
        (numbers.significant(0.000123456), "0.000123"),
        (numbers.significant(98765.4), "98,765"),
        (numbers.significant(1e-14), "0.000000000"),
        (numbers.significant(0.0), "0"),
        (numbers.significant(math.nan), "not finite"),
        (
            numbers.with_deviation(Stat(0.00123, 0.0004, 3), numbers.significant),
            "0.00123 ± 0.00040",
        ),
    ],
)
def test_how_numbers_are_written(text, expected):
    assert text == expected


def test_percent_change_needs_a_sound_base():
    assert numbers.percent_change(1.0, 0.0) is None
    assert numbers.percent_change(math.nan, 1.0) is None
