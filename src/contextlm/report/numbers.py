"""How the report writes numbers: perplexities, bytes, percentages, means with their deviation.

Text only; nothing here knows what a run is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from contextlm.report.language import say

if TYPE_CHECKING:  # scipy takes a second to import, and bytes are printed by every command
    from contextlm.report.statistics import Stat

ABSENT = "–"  # noqa: RUF001 - the dash that stands for "no such figure", in every table
_UNITS = ("B", "KB", "MB", "GB", "TB")


def percent_change(value: float, base: float) -> float | None:
    """By how many percent `value` lies above (+) or below (-) `base`; None without a sound base."""
    if not (math.isfinite(value) and math.isfinite(base)) or base <= 0:
        return None
    return 100 * (value / base - 1)


def decimal(value: float, places: int) -> str:
    """A number with thousands separators and a fixed count of decimals."""
    if not math.isfinite(value):
        return say("not finite")
    if abs(value) >= 1e15:
        return f"{value:.1e}"
    text = f"{value:,.{places}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def significant(value: float) -> str:
    """Three significant digits without an exponent, and nine decimals at most."""
    if not math.isfinite(value) or value == 0:
        return decimal(value, 0)
    return decimal(value, min(max(2 - math.floor(math.log10(abs(value))), 0), 9))


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return decimal(value, 0)


def perplexity(value: float) -> str:
    """One decimal, two below 10."""
    return decimal(value, 2 if round(value, 2) < 10 else 1)


def rate(value: float) -> str:
    """Tokens per second: whole from 100, one decimal below."""
    return decimal(value, 0 if value >= 100 else 1)


def seconds(value: float) -> str:
    """Seconds, one decimal from 10, two below."""
    return decimal(value, 1 if value >= 10 else 2) + " s"


def percent(share: float) -> str:
    """A share in 0..1 as a percentage with one decimal."""
    return decimal(100 * share, 1) + "%"


def signed_percent(change: float | None) -> str:
    """A percentage with its sign and one decimal; zero has no sign, None is a dash."""
    if change is None:
        return ABSENT
    text = decimal(change, 1)
    return f"{'+' if change > 0 and float(text.replace(',', '')) != 0 else ''}{text}%"


def amount(change: float) -> str:
    """The size of a difference in percent, without its sign."""
    size = abs(change)
    return say("less than 0.1%") if round(size, 1) == 0 else f"{decimal(size, 1)}%"


def plain(value: float) -> str:
    """A number as it was given, with thousands separators."""
    return f"{value:,.10g}"


def human_bytes(size: float) -> str:
    """Bytes in the largest unit that leaves at least one; 1 KB = 1024 bytes."""
    if size < 1024:
        return f"{count(size)} B"
    power = min(int(math.log2(size)) // 10, len(_UNITS) - 1)
    if round(size / 1024**power, 1) >= 1024 and power < len(_UNITS) - 1:
        power += 1
    return f"{decimal(size / 1024**power, 1)} {_UNITS[power]}"


def with_deviation(stat: Stat | None, show: Callable[[float], str] = perplexity) -> str:
    """``97.9 ± 0.4``, or ``97.9`` alone with one seed; None is a dash.

    The deviation has the mean's decimals, and up to three more where it would read zero.
    """
    if stat is None:
        return ABSENT
    text = show(stat.mean)
    if stat.sd is None:
        return text
    number = text.rstrip("% BGKMTs")
    unit = text.removeprefix(number)
    places = len(number.partition(".")[2])
    deviation = stat.sd
    if unit == "%":
        deviation *= 100
    elif unit.strip() in _UNITS:
        deviation /= 1024 ** _UNITS.index(unit.strip())
    if deviation > 10.0 ** -(places + 3) and round(deviation, places) == 0:
        places = -math.floor(math.log10(deviation))
    return f"{number} ± {decimal(deviation, places)}{unit}"


def seeds_text(number: int) -> str:
    """``1 seed``, ``3 seeds``."""
    return say("1 seed") if number == 1 else say("{number} seeds", number=number)
