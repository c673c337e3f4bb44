"""The report of one or several runs: a page, Markdown, LaTeX, tables for programs, and figures.

The page is one self-contained file. Its scripts, Vega among them, stand in it under a policy that
names their hashes and forbids everything else, and what is not script is data. All texts come from
templates that hold words only: every figure, and every sentence with one, is computed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import vl_convert
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder, is_file, is_folder, plain, write_json, write_text
from contextlm.base.visible import visible
from contextlm.report import charts, notes, tables
from contextlm.report.contenders import Contender, comparable_groups, contenders, row_facts
from contextlm.report.document import document_table, epoch_tables
from contextlm.report.frame import run_labels
from contextlm.report.language import say, spoken
from contextlm.report.numbers import ABSENT
from contextlm.report.sheet import Table, escape_markdown, latex_table, markdown_table
from contextlm.results.result import Run, seed_folder
from contextlm.results.run_files import check_inside

# What each form is called, and the file that it makes.
FORMATS = {
    "md": "report.md",
    "html": "report.html",
    "csv": "report.csv",
    "latex": "report.tex",
    "json": "report.json",
}
USUAL = ("md", "html")
FIGURES = "figures"  # the folder of the charts' files


def write_report(
    runs: list[Run],
    folder: Path,
    formats: Sequence[str] = USUAL,
    *,
    against: str | None = None,
) -> dict[str, Path]:
    """Write the report of `runs` into `folder`, each file whole or not at all.

    Args:
        runs: usually one, with ``folder == run.folder``. Several are compared with each other.
        folder: made if it does not exist; earlier reports in it are replaced.
        formats: keys of `FORMATS`.
        against: a contender that takes the baseline's place.

    Returns:
        The paths by file name; ``figures`` is a folder with each chart as PNG, SVG and PDF.

    Raises:
        InputError: there is no run, a run in which no contender has finished, no contender of that
            name, or a folder where a file of the report should go.
    """
    _check(runs)
    paths = {FORMATS[name]: folder / FORMATS[name] for name in formats}
    for path in paths.values():  # before the first of them is written
        if is_folder(path):
            raise InputError(f"{path}: is a folder, the report needs that name for a file")
    check_inside(folder, folder / FIGURES)
    if is_file(folder / FIGURES):
        raise InputError(f"{folder / FIGURES}: is a file, the report needs that name for a folder")
    rows = contenders(runs, against)
    drawn = charts.figures(rows)
    facts = _facts(runs, rows, folder, drawn)
    written: dict[str, Callable[[Path], None]] = {
        "md": lambda path: write_text(path, markdown_page("report.md.j2", facts)),
        "html": lambda path: write_text(path, _html(facts, pictures=True)),
        "csv": lambda path: write_text(path, _csv(rows)),
        "latex": lambda path: write_text(path, "\n".join(map(latex_table, facts["main"]))),
        "json": lambda path: write_json(path, plain(report_facts(runs, rows))),
    }
    for figure in drawn:
        figure.save(folder / FIGURES)
    for name in formats:
        written[name](folder / FORMATS[name])
    return {**paths, FIGURES: folder / FIGURES}


def render_summary(runs: list[Run], against: str | None = None) -> str:
    """The answer, the comparison and what to beware of as Markdown, for another document.

    Raises:
        InputError: there is no run, or a run in which no contender has finished.
    """
    _check(runs)
    return markdown_page("summary.md.j2", _facts(runs, contenders(runs, against), Path(), []))


def report_facts(runs: Sequence[Run], rows: Sequence[Contender]) -> dict[str, Any]:
    """The report for programs: answers, notes, rows, and every seed's result."""
    return {
        "runs": [run.folder for run in runs],
        "answers": notes.answers(rows),
        "notes": notes.notes(runs, rows),
        "rows": [row_facts(row) for row in rows],
        "results": [o.result.model_dump() for run in runs for o in run.outcomes],
    }


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise InputError("report: no run was given")
    for run in runs:
        if not run.outcomes:
            raise InputError(f"{run.folder}: no contender has finished, nothing to report")


def _facts(
    runs: Sequence[Run], rows: Sequence[Contender], folder: Path, drawn: Sequence[charts.Figure]
) -> dict[str, Any]:
    """All that the templates may show."""
    retrieval, document = tables.retrieval_table(rows), document_table(rows)
    main = tables.main_tables(rows)
    return {
        "language": spoken(),
        "title": _title(runs),
        "questions": _distinct(runs, "question"),
        "documents": _distinct(runs, "document"),
        "answers": notes.answers(rows),
        "main": main,
        "lists": [
            _topics(table, group, _files(runs, group, folder))
            for table, group in zip(main, comparable_groups(rows), strict=True)
        ],
        "retrieval": [retrieval] if retrieval else [],
        "document": [*([document] if document else []), *epoch_tables(rows)],
        "notes": notes.notes(runs, rows),
        "measured": tables.measured_tables(rows),
        "terms": _terms(),
        "data": tables.data_table(rows),
        "figures": drawn,
        "most": max(map(len, comparable_groups(rows)), default=0),
        "live": None,
        "folder": FIGURES,
        "runs": [
            (
                label,
                {
                    say("Recipe"): _yaml(run.recipe),
                    say("Environment"): _yaml(run.environment),
                },
            )
            for run, label in zip(runs, run_labels(runs), strict=True)
        ],
    }


def _topics(main: Table, group: Sequence[Contender], links: list[list[Markup]]) -> dict[str, Any]:
    """One table of everything that was measured of a list, its columns sorted by topic."""
    topics = [main, *tables.measured_tables(group)]
    return {
        "caption": main.caption,
        "note": main.note,
        "topics": [say("Comparison"), *(topic.caption for topic in topics[1:]), say("Files")],
        "headings": [
            *(
                (number, kind, heading)
                for number, topic in enumerate(topics)
                for kind, heading in list(zip(topic.kinds, topic.headings, strict=True))[1:]
            ),
            (len(topics), "text", say("by seed")),
        ],
        "rows": [
            (
                row.shown_name,
                [
                    *(
                        (number, kind, cell)
                        for number, topic in enumerate(topics)
                        for kind, cell in zip(topic.kinds[1:], _line(topic, row), strict=True)
                    ),
                    (len(topics), "text", Markup("<br>").join(own)),
                ],
            )
            for row, own in zip(group, links, strict=True)
        ],
    }


def _line(table: Table, row: Contender) -> Sequence[str]:
    """The cells of a row; dashes where the topic has nothing of it."""
    own = (line[1:] for line in table.rows if line[0] == row.shown_name)
    return next(own, (ABSENT,) * (len(table.headings) - 1))


def _files(runs: Sequence[Run], group: Sequence[Contender], folder: Path) -> list[list[Markup]]:
    """Links to what each seed of each contender left, relative to the report's folder."""
    folders = dict(zip(run_labels(runs), (run.folder for run in runs), strict=True))
    names = {
        "result.json": say("result"),
        "history.jsonl": say("history"),
        "checkpoint": say("checkpoint"),
    }

    def links(row: Contender) -> list[Markup]:
        found = []
        for label, outcome in zip(row.seeds.run, row.outcomes, strict=True):
            result = outcome.result
            own = (result.contender, result.seed, result.budget)
            place = quote(os.path.relpath(seed_folder(folders[label], *own), folder))
            link = Markup('<a href="{}/{}">{}</a>').format
            shown = Markup(" · ").join(link(place, file, said) for file, said in names.items())
            found.append(Markup("{} {}").format(say("seed {seed}:", seed=result.seed), shown))
        return found

    return [links(row) for row in group]


def _csv(rows: Sequence[Contender]) -> str:
    """A line a row: nested figures become columns such as ``validation_ppl.mean``."""
    flat = pd.json_normalize([plain(row_facts(row)) for row in rows])
    for name in ("seeds", "diverged"):
        flat[name] = [" ".join(map(str, numbers)) for numbers in flat[name]]
    return str(flat.to_csv(index=False, lineterminator="\n"))


def render_page(runs: Sequence[Run], folder: Path, *, live: dict[str, Any]) -> str:
    """The page of runs that are not finished, with what they are doing, for links from `folder`."""
    finished = [run for run in runs if run.outcomes]
    rows = contenders(finished) if finished else []
    drawn = [*live["figures"], *(charts.figures(rows) if rows else [])]
    return _html(_facts(finished, rows, folder, drawn) | {"live": live, "title": _title(runs)})


def _html(facts: dict[str, Any], *, pictures: bool = False) -> str:
    """The page; with `pictures` its charts can be seen where scripts do not run, and printed."""
    scripts = [_vega(), (files("contextlm.report") / "templates" / "page.js").read_text("utf-8")]
    drawn = {
        "light": charts.LIGHT,
        "dark": charts.DARK,
        "charts": {figure.name: figure.chart for figure in facts["figures"]},
    }
    template = _environment(True, _visible_unless_marked).get_template("report.html.j2")
    return template.render(
        **facts,
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        drawn=Markup(json.dumps(drawn).replace("<", "\\u003c")),
        pictures={figure.name: _data_uri(figure.svg) for figure in facts["figures"] if pictures},
    )


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; made in seconds, hence kept in the cache."""
    file = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    if not file.is_file():
        bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
        write_text(file, bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--"))
    return file.read_text("utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def static_page(template: str, facts: dict[str, Any]) -> str:
    """A page without scripts, of a template of this package."""
    return _environment(True, _visible_unless_marked).get_template(template).render(facts)


def markdown_page(template: str, facts: dict[str, Any]) -> str:
    """The same as Markdown; a filter ``table`` makes tables."""
    environment = _environment(False, _escape_unless_marked)
    environment.filters["table"] = lambda table: Markup(markdown_table(table))
    return environment.get_template(template).render(facts)


def _environment(autoescape: bool, finalize: Callable[[object], object]) -> Environment:
    environment = Environment(
        loader=PackageLoader("contextlm.report"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["say"] = say
    return environment


def _visible_unless_marked(value: object) -> object:
    return value if isinstance(value, Markup) else visible(str(value))


def _escape_unless_marked(value: object) -> object:
    return value if isinstance(value, Markup) else escape_markdown(value)


def _yaml(value: dict[str, Any]) -> Markup:
    """A mapping as text between ``<pre>`` marks, which Markdown and HTML both show as it is."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    shown = escape(visible(text)).replace("[", Markup("&#91;"))  # no link even to careless readers
    return Markup("<pre>") + shown + Markup("</pre>")


def _data_uri(picture: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode("ascii")


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


def _terms() -> dict[str, str]:
    """The words of the tables that a newcomer may not know."""
    return {
        say("PPL vs baseline"): say(
            "The mean difference in validation loss, as percent of perplexity."
        ),
        say("share of unigram PPL"): say(
            "Of the perplexity that the training tokens' frequencies alone reach."
        ),
        say("running"): say("Averaged over an epoch's batches while the weights still changed."),
        say("train / validation PPL"): say(
            "Both with the best weights; far below 1, the model learned its text by heart."
        ),
        say("bits per byte"): say(
            "The validation loss for each UTF-8 byte; it compares lossless tokenizers."
        ),
        say("converged"): say(
            "The share of positions whose context hardly changed in phase 1's last iteration."
        ),
        say("effective rank"): say(
            "How many dimensions the contexts really use, at most their width."
        ),
        say("drift"): say(
            "Mean-square difference, per number, between parallel contexts and the exact ones."
        ),
        say("resident"): say(
            "The memory that holds a cache; all other sizes count the elements kept."
        ),
    }
