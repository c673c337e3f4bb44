"""The report of one or several runs: ``report.md``, ``report.html`` and the two charts.

The HTML is one self-contained file without scripts. Both texts come from templates that hold words
only: every figure, and every sentence with one, is computed from the results.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from contextlm.base.errors import InputError
from contextlm.base.files import atomic_open, is_folder, write_text
from contextlm.base.visible import visible
from contextlm.report import charts, notes, tables
from contextlm.report.contenders import Contender, contenders
from contextlm.report.document import document_table, epoch_tables
from contextlm.report.frame import run_labels
from contextlm.report.sheet import escape_markdown, markdown_table
from contextlm.results.result import Run

FILES = ("report.md", "report.html", "curves.png", "frontier.png")

# The words of the tables that a newcomer may not know.
TERMS = {
    "PPL vs baseline": "The mean difference in validation loss, as percent of perplexity.",
    "share of unigram PPL": "Of the perplexity that the training tokens' frequencies alone reach.",
    "running": "Averaged over an epoch's batches while the weights still changed.",
    "train / validation PPL": "Both with the best weights; far below 1, the model learned its text "
    "by heart.",
    "bits per byte": "The validation loss for each UTF-8 byte; it compares lossless tokenizers.",
    "converged": "The share of positions whose context hardly changed in phase 1's last iteration.",
    "effective rank": "How many dimensions the contexts really use, at most their width.",
    "drift": "Mean-square difference, per number, between parallel contexts and the exact ones.",
    "resident": "The memory that holds a cache; all other sizes count the elements kept.",
}


def write_report(runs: list[Run], folder: Path) -> dict[str, Path]:
    """Write the report of `runs` into `folder`, each file whole or not at all.

    Args:
        runs: usually one, with ``folder == run.folder``. Several are compared with each other.
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
    rows = contenders(runs)
    pictures = {
        "curves.png": charts.png(charts.curves_figure(rows)),
        "frontier.png": charts.png(charts.frontier_figure(rows)),
    }
    facts = _facts(runs, rows)
    embedded = {name: _data_uri(picture) for name, picture in pictures.items()}
    texts = {
        "report.md": _markdown("report.md.j2", {**facts, "images": {n: n for n in pictures}}),
        "report.html": _environment(True, _visible_unless_marked)
        .get_template("report.html.j2")
        .render({**facts, "images": embedded}),
    }
    for name, picture in pictures.items():
        with atomic_open(folder / name, "wb") as stream:
            stream.write(picture)
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in FILES}


def render_summary(runs: list[Run]) -> str:
    """The answer, the comparison and what to beware of as Markdown, for another document.

    Raises:
        InputError: there is no run, or a run in which no contender has finished.
    """
    _check(runs)
    return _markdown("summary.md.j2", _facts(runs, contenders(runs)))


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise InputError("report: no run was given")
    for run in runs:
        if not run.outcomes:
            raise InputError(f"{run.folder}: no contender has finished, nothing to report")


def _facts(runs: Sequence[Run], rows: Sequence[Contender]) -> dict[str, Any]:
    """All that the templates may show."""
    retrieval, document = tables.retrieval_table(rows), document_table(rows)
    return {
        "title": _title(runs),
        "questions": _distinct(runs, "question"),
        "documents": _distinct(runs, "document"),
        "answers": notes.answers(rows),
        "main": tables.main_tables(rows),
        "retrieval": [retrieval] if retrieval else [],
        "document": [*([document] if document else []), *epoch_tables(rows)],
        "notes": notes.notes(runs, rows),
        "measured": tables.measured_tables(rows),
        "terms": TERMS,
        "data": tables.data_table(rows),
        "runs": [
            (label, {"Recipe": _yaml(run.recipe), "Environment": _yaml(run.environment)})
            for run, label in zip(runs, run_labels(runs), strict=True)
        ],
    }


def _markdown(template: str, facts: dict[str, Any]) -> str:
    environment = _environment(False, _escape_unless_marked)
    environment.filters["table"] = lambda table: Markup(markdown_table(table))
    return environment.get_template(template).render(facts)


def _environment(autoescape: bool, finalize: Callable[[object], object]) -> Environment:
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


def _yaml(value: dict[str, Any]) -> Markup:
    """A mapping as text between ``<pre>`` marks, which Markdown and HTML both show as it is."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    shown = escape(visible(text)).replace("[", Markup("&#91;"))  # no link even to careless readers
    return Markup("<pre>") + shown + Markup("</pre>")


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


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
