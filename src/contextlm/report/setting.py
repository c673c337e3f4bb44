"""The notes on how far runs are from the settings that they stand for, a document's or a recipe's.

A run's recipe says itself, in ``departs_from_full``, in which keys it departs from its top level:
a list of dotted keys, empty where there are none. Older runs lack it; of them only the scale is
known.
"""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report import numbers
from contextlm.report.summary import SummaryRow, run_labels
from contextlm.results.result import Run

FULL = "full"
SMOKE = "smoke"
NAMED_KEYS = 6  # of the departures; a report's settings list them all
_CONTENDERS = "contenders."


def setting_notes(runs: Sequence[Run], rows: Sequence[SummaryRow]) -> list[str]:
    """Sentences on runs that are not at the full setting; none for those that are.

    Args:
        runs: what is reported.
        rows: `summarise_runs(runs)`.
    """
    by_scale: list[SummaryRow] = []
    departed: dict[tuple[str, ...], list[str]] = {}
    for run, label in zip(runs, run_labels(runs), strict=True):
        mine = [row for row in rows if row.run == label]
        keys = run.recipe.get("departs_from_full")
        if not isinstance(keys, list) or any(row.scale == SMOKE for row in mine):
            by_scale += mine
        elif any(map(_documented, mine)):
            differing, names = _departures(list(map(str, keys)), mine)
            if names:
                departed.setdefault(differing, []).extend(names)
        elif keys:
            by_scale += mine
    documented = sum(map(_documented, rows))
    return [
        *_scale_notes(by_scale),
        *(
            f"Not the document's setting{_of(names, documented)}: {_differ(keys)}; compare the "
            "differences from the baseline rather than the figures themselves."
            for keys, names in departed.items()
        ),
    ]


def _departures(
    keys: Sequence[str], rows: Sequence[SummaryRow]
) -> tuple[tuple[str, ...], list[str]]:
    """The keys in which a run's documented contenders depart, and the names of those that do.

    Other contenders' own keys are left out: no figure of the document stands beside them.
    """
    shared = [key for key in keys if not key.startswith(_CONTENDERS)]
    differing, names = list(shared), []
    for row in filter(_documented, rows):
        own = [key for key in keys if key.startswith(f"{_CONTENDERS}{row.contender}.")]
        differing += own
        if shared or own:
            names.append(row.name)
    return tuple(differing), names


def _scale_notes(rows: Sequence[SummaryRow]) -> list[str]:
    found = []
    for scale in dict.fromkeys(row.scale for row in rows if row.scale != FULL):
        if scale == SMOKE:
            sizes = {row.corpus.validation_tokens for row in rows if row.scale == scale}
            found.append(
                f"Scale {scale} only tests that everything runs "
                f"({' or '.join(map(numbers.count, sorted(sizes)))} validation tokens): "
                "draw no conclusions from these figures."
            )
        elif any(_documented(row) for row in rows if row.scale == scale):
            found.append(
                f"Measured at scale {scale}; the document's figures are for its own setting, "
                "so compare the differences from the baseline rather than the figures themselves."
            )
        else:
            found.append(f"Measured at scale {scale}, not at the recipe's full setting.")
    return found


def _documented(row: SummaryRow) -> bool:
    """Whether figures of the document stand beside the contender's."""
    return bool(row.reported or row.reported_epochs)


def _of(names: Sequence[str], documented: int) -> str:
    return "" if len(names) == documented else f" ({', '.join(names)})"


def _differ(keys: Sequence[str]) -> str:
    named, more = list(keys[:NAMED_KEYS]), len(keys) - NAMED_KEYS
    if more > 0:
        named.append(f"{more} more")
    *first, last = named
    return f"{', '.join(first)} and {last} differ" if first else f"{last} differs"
