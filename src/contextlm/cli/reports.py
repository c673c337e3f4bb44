"""`contextlm report`: the tables, plots and page of run folders, made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from contextlm.cli.comparisons import AsJson
from contextlm.cli.output import print_json, print_runs, runs_json
from contextlm.errors import InputError, RunError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", show_default=False, help="One or several run folders."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="Where the report goes; by default into the run folder, or for several runs "
            "into the folder `report` beside them.",
        ),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the web browser.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the report of one run, or one report of several, from their folders.

    Several runs share one table and one frontier of perplexity against cache. Nothing is trained
    or measured again.

    Examples:

    ```
    contextlm report runs/demo-001 --open
    contextlm report runs/context-pythia-001 runs/context-kv-001 --out comparison
    ```
    """
    from contextlm.evaluation.result import read_run
    from contextlm.report.page import write_report

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    loaded = [read_run(folder) for folder in runs]
    for run in loaded:
        if not run.outcomes:
            raise InputError(f"{run.folder}: no contender has finished in this run")
    paths = write_report(loaded, out or _default_folder(runs))
    if as_json:
        print_json(runs_json(loaded, paths))
    else:
        print_runs(loaded, paths)
    if open_page:
        _show(paths)


def _default_folder(runs: list[Path]) -> Path:
    if len(runs) == 1:
        return runs[0]
    return Path(os.path.commonpath([run.resolve().parent for run in runs])) / "report"


def _show(paths: dict[str, Path]) -> None:
    import webbrowser

    page = next((path for path in paths.values() if path.suffix == ".html"), None)
    if page is None or not webbrowser.open(page.resolve().as_uri()):
        raise RunError("--open: no web browser was found; open the page's path yourself")
