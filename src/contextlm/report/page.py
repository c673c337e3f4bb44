"""The report of one or several runs: ``report.md``, ``report.html`` and the two plots.

The HTML is one self-contained file without scripts. Both texts come from templates that hold words
only: every figure, and every sentence with one, is computed from the results.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from contextlm.base.errors import InputError
from contextlm.base.files import atomic_open, is_folder, write_text
from contextlm.base.visible import visible
from contextlm.report import details, plots, resource_tables, tables, words
from contextlm.report.epoch_tables import epoch_tables
from contextlm.report.notes import detail_notes, notes
from contextlm.report.remarks import data_remarks, unigram_remarks
from contextlm.report.retrieval_table import retrieval_table
from contextlm.report.sheet import Column, Table, escape_markdown, markdown_table
from contextlm.report.summary import SummaryRow, run_labels, summarise_runs
from contextlm.report.terms import terms
from contextlm.results.result import Run

FILES = ("report.md", "report.html", "curves.png", "frontier.png")


@dataclass(frozen=True)
class _RunPart:
    """What the page says about one run alone."""

    label: str
    settings: Table
    contenders: Table
    environment: Table


def write_report(runs: list[Run], folder: Path) -> dict[str, Path]:
    """Write the report of `runs` into `folder`, each file whole or not at all.

    Args:
        runs: usually one, with ``folder == run.folder``. Several are compared with each other;
            contenders whose names clash get their run folder's name in front.
        folder: made if it does not exist; earlier reports in it are replaced.

    Returns:
        The paths by file name: ``report.md``, ``report.html``, ``curves.png``, ``frontier.png``.

    Raises:
        InputError: there is no run, a run in which no contender has finished, or a folder where a
            file of the report should go.
    """
    _check(runs)
    for name in FILES:  # before the first of them is written
        if is_folder(folder / name):
            raise InputError(f"{folder / name}: is a folder, the report needs that name for a file")
    rows = summarise_runs(runs)
    pictures = {
        "curves.png": plots.png(plots.curves_figure(rows)),
        "frontier.png": plots.png(plots.frontier_figure(rows)),
    }
    facts = _facts(runs, rows)
    embedded = {name: _data_uri(picture) for name, picture in pictures.items()}
    texts = {
        "report.md": render_markdown({**facts, "images": {name: name for name in pictures}}),
        "report.html": render_html({**facts, "images": embedded}),
    }
    for name, picture in pictures.items():
        with atomic_open(folder / name, "wb") as stream:
            stream.write(picture)
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in (*texts, *pictures)}


def render_html(facts: dict[str, Any]) -> str:
    """The HTML page; whatever is not marked up by the template itself is escaped."""
    environment = _environment(autoescape=True, finalize=_visible_unless_marked)
    return environment.get_template("report.html.j2").render(facts)


def render_markdown(facts: dict[str, Any], template: str = "report.md.j2") -> str:
    """The Markdown page; whatever is not marked up by the template itself is escaped."""
    environment = _environment(autoescape=False, finalize=_escape_unless_marked)
    environment.filters["table"] = lambda table: Markup(markdown_table(table))
    return environment.get_template(template).render(facts)


def render_summary(runs: list[Run]) -> str:
    """The answer, the main table and the findings as Markdown, to stand in another document.

    Raises:
        InputError: there is no run, or a run in which no contender has finished.
    """
    _check(runs)
    return render_markdown(_facts(runs, summarise_runs(runs)), "summary.md.j2")


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise InputError("report: no run was given")
    for run in runs:
        if not run.outcomes:
            raise InputError(f"{run.folder}: no contender has finished, nothing to report")


def _environment(*, autoescape: bool, finalize: Callable[[object], object]) -> Environment:
    return Environment(
        loader=PackageLoader("contextlm.report"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _visible_unless_marked(value: object) -> object:
    return value if isinstance(value, Markup) else visible(str(value))


def _escape_unless_marked(value: object) -> object:
    return value if isinstance(value, Markup) else escape_markdown(value)


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _facts(runs: Sequence[Run], rows: Sequence[SummaryRow]) -> dict[str, Any]:
    """All that the templates may show."""
    answers_by_level = retrieval_table(rows)
    measured = [
        answers_by_level,
        tables.quality_table(rows),
        tables.training_table(rows),
        tables.phase1_table(rows),
        resource_tables.store_table(rows),
        tables.cache_table(rows),
        tables.speed_table(rows),
        resource_tables.stage_table(rows),
    ]
    parts = [
        _RunPart(
            label,
            details.settings_table(run),
            details.contenders_table(run),
            details.environment_table(run),
        )
        for run, label in zip(runs, run_labels(runs), strict=True)
    ]
    return {
        "title": _title(runs),
        "answers_by_level": answers_by_level,
        "questions": _distinct(runs, "question"),
        "documents": _distinct(runs, "document"),
        "answer": words.answer(rows),
        "verdicts": words.verdicts(rows),
        "notes": notes(runs, rows),
        "detail_notes": detail_notes(rows),
        "main": tables.main_table(rows),
        "document_table": tables.document_table(rows),
        "epoch_tables": epoch_tables(rows),
        "measured": [table for table in measured if table is not None],
        "terms": terms(rows),
        "data": details.data_table(rows),
        "data_remarks": data_remarks(rows),
        "unigram_remarks": unigram_remarks(rows),
        "runs": parts,
        "histories": [(row.name, details.history_tables(row)) for row in rows],
        "curves_alt": words.curves_alt(rows),
        "frontier_alt": words.frontier_alt(rows),
        "kinds": _kinds,
    }


def _kinds(table: Table, row: tuple[str, ...]) -> list[tuple[Column, str]]:
    """The cells of a row after the first, each with its column."""
    return list(zip(table.columns[1:], row[1:], strict=True))


def _title(runs: Sequence[Run]) -> str:
    """The recipe's name of one run; several are told apart by their folders."""
    if len(runs) == 1:
        return _said(runs[0], "name") or runs[0].folder.name
    return " · ".join(run_labels(runs))


def _said(run: Run, key: str) -> str:
    value = run.recipe.get(key)
    return "" if value is None else str(value)


def _distinct(runs: Sequence[Run], key: str) -> list[str]:
    return [text for text in dict.fromkeys(_said(run, key) for run in runs) if text]
