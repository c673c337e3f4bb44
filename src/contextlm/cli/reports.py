"""`contextlm report`: the tables, plots and page of run folders, made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from contextlm.base.errors import InputError, RunError
from contextlm.base.files import is_file
from contextlm.base.visible import shown
from contextlm.cli.options import AsJson
from contextlm.cli.output import print_json, print_runs, runs_json, writable_folder


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", show_default=False, help="One or several run folders."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="Where the report goes; by default into the run folder, or for several runs "
            "into the folder `report` beside them.",
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[#NAME]",
            show_default=False,
            help="Also put a summary into a Markdown file, between the marks "
            "`<!-- results:begin NAME -->` and `<!-- results:end NAME -->`.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Compare with this contender instead of the baseline.",
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="LIST",
            help="What to write, of md, html, csv, latex and json; charts always come as PNG, SVG "
            "and PDF.",
        ),
    ] = "md,html",
    language: Annotated[
        str, typer.Option(metavar="NAME", help="The report's language: en or ja.")
    ] = "en",
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the web browser.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the report of one run, or one report of several, from their folders.

    Several runs share their tables and charts; only those of one budget are ranked in one list.
    Nothing is trained or measured again.

    Examples:

    ```
    contextlm report runs/demo-001 --open
    contextlm report runs/context-pythia-001 runs/context-pythia-002 --out comparison
    contextlm report runs/demo-001 --into README.md
    contextlm report runs/frontier-001 --against mamba --format csv,latex
    contextlm report runs/demo-001 --language ja --open
    ```
    """
    from contextlm.report.embed import embed, embedded
    from contextlm.report.language import speaking
    from contextlm.report.page import render_summary, write_report
    from contextlm.results.result import read_run

    _check_runs(runs)
    wanted = _formats(formats, open_page)
    place = _default_folder(runs) if out is None else writable_folder(out, "--out")
    loaded = [read_run(folder) for folder in runs]
    document, _, block = (into or "").partition("#")
    with speaking(language):
        if into is not None:  # asked before anything is written
            summary = render_summary(loaded, against)
            embedded(Path(document), block or None, summary)
        paths = write_report(loaded, place, wanted, against=against)
        if into is not None:
            embed(Path(document), block or None, summary)
        if as_json:
            print_json(runs_json(loaded, paths, against))
        else:
            print_runs(loaded, paths, against)
    if open_page:
        _show(paths)


def _formats(text: str, open_page: bool) -> list[str]:
    """The forms that ``--format`` names, each once."""
    from contextlm.report.page import FORMATS

    wanted = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = next((name for name in wanted if name not in FORMATS), None)
    if unknown is not None:
        raise InputError(f"--format {shown(unknown)}: expected some of {', '.join(FORMATS)}")
    if open_page and "html" not in wanted:
        raise InputError("--open: shows the page, which --format leaves out")
    return wanted


def _check_runs(runs: list[Path]) -> None:
    seen = set()
    for run in runs:
        if not is_file(run / "recipe.yaml"):
            raise InputError(f"{run}: not a run folder")
        if run.resolve() in seen:
            raise InputError(f"{run}: the same run is named twice")
        seen.add(run.resolve())


def _default_folder(runs: list[Path]) -> Path:
    if len(runs) == 1:
        place = runs[0]
    else:
        place = Path(os.path.commonpath([run.resolve().parent for run in runs])) / "report"
    from contextlm.base.files import why_not_writable

    problem = why_not_writable(place)
    if problem is not None:
        raise InputError(f"{problem}; name another folder with --out")
    return place


def _show(paths: dict[str, Path]) -> None:
    import webbrowser

    page = next((path for path in paths.values() if path.suffix == ".html"), None)
    if page is None or not webbrowser.open(page.resolve().as_uri()):
        raise RunError("--open: no web browser was found; open the page's path yourself")
