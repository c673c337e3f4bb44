"""A sweep's one table: mean and standard deviation over the seeds, per setting and contender."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contextlm.report.numbers import ABSENT, decimal, percent, signed_percent, with_deviation
from contextlm.report.summary import SummaryRow, summarise
from contextlm.results.result import Run


@dataclass(frozen=True)
class SettingRun:
    """A setting's values by key, and its run as far as it has finished."""

    values: dict[str, Any]
    run: Run


HEADINGS = (
    "contender",
    "validation PPL",
    "PPL vs baseline",
    "accuracy",
    "best epoch",
    "parameters",
    "seeds",
)


def sweep_rows(settings: Sequence[SettingRun]) -> list[tuple[SettingRun, SummaryRow]]:
    """Each setting with each of its contenders, compared with the setting's own baseline."""
    return [(setting, row) for setting in settings for row in summarise(setting.run.outcomes)]


def headings(settings: Sequence[SettingRun]) -> list[str]:
    """The grid's keys, then the figures."""
    keys = list(settings[0].values) if settings else []
    return [*keys, *HEADINGS]


def cells(setting: SettingRun, row: SummaryRow) -> list[str]:
    """One line of the table."""
    values = [v if isinstance(v, str) else json.dumps(v) for v in setting.values.values()]
    change = row.comparison.ppl
    return [
        *values,
        row.shown_name,
        with_deviation(row.ppl),
        ABSENT if change is None else signed_percent(change),
        with_deviation(row.accuracy, percent),
        with_deviation(row.best_epoch, lambda value: decimal(value, 1)),
        f"{row.parameters_total:,}",
        str(len(row.seeds)),
    ]


def best_lines(settings: Sequence[SettingRun]) -> list[str]:
    """For each contender the setting with the lowest mean perplexity, in a sentence."""
    best: dict[str, tuple[SettingRun, SummaryRow]] = {}
    for setting, row in sweep_rows(settings):
        if row.name not in best or row.ppl.mean < best[row.name][1].ppl.mean:
            best[row.name] = (setting, row)
    lines = []
    for name, (setting, row) in best.items():
        values = ", ".join(f"{key} {value}" for key, value in setting.values.items())
        seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
        lines.append(f"{name} is best with {values}: {with_deviation(row.ppl)} ({seeds})")
    return lines


def markdown(name: str, settings: Sequence[SettingRun], failed: Mapping[str, str]) -> str:
    """The table and what failed, as Markdown."""
    columns = headings(settings)
    lines = [f"# Sweep of {_text(name)}", ""]
    lines += ["| " + " | ".join(map(_text, columns)) + " |"]
    lines += ["| " + " | ".join(":---" for _ in columns) + " |"]
    for setting, row in sweep_rows(settings):
        lines.append("| " + " | ".join(map(_text, cells(setting, row))) + " |")
    lines += [
        "",
        "Mean and standard deviation over the seeds; perplexities compared within a setting.",
    ]
    lines += ["", *(f"- {_text(line)}" for line in best_lines(settings))]
    lines += [f"- failed: {_text(task)}: {_text(reason)}" for task, reason in failed.items()]
    return "\n".join(lines) + "\n"


def facts(setting: SettingRun, row: SummaryRow) -> dict[str, Any]:
    """One line of the table for programs."""
    return {
        "setting": setting.values,
        "run": str(setting.run.folder),
        "contender": row.contender,
        "baseline": row.baseline,
        "seeds": list(row.seeds),
        "validation_ppl": row.ppl,
        "validation_loss": row.loss,
        "accuracy": row.accuracy,
        "best_epoch": row.best_epoch,
        "ppl_vs_baseline_percent": row.comparison.ppl,
        "parameters": row.parameters_total,
    }


def _text(value: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    marked = " ".join(value.split())
    for character in "\\`*_[]<>|#":
        marked = marked.replace(character, f"\\{character}")
    return marked.replace("\\<", "&lt;").replace("\\>", "&gt;")
