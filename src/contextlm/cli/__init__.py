"""The command line: parse, call, print. Nothing is decided here.

Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from contextlm import __version__
from contextlm.cli import (
    benchmarking,
    checking,
    checkpoints,
    comparisons,
    compressing,
    healing,
    listing,
    reports,
)
from contextlm.cli.shell import PlainCommand, PlainGroup, execute, leave

# How long torch's threads wait awake for more work, in GNU's unit: about 0.1 ms instead of 3, in
# which they would keep a processor from our compiled loops and from others. Read with torch.
_SPINS = ("GOMP_SPINCOUNT", "10000")

app = typer.Typer(
    name="contextlm",
    cls=PlainGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"contextlm {__version__}")
        raise typer.Exit


@app.callback(
    epilog="`contextlm COMMAND --help` explains a command and gives examples.\n\n"
    "CONTEXTLM_DATA names a folder of corpora, CONTEXTLM_CACHE one for tokens."
)
def contextlm(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show tracebacks, and the warnings of the libraries underneath. "
            "Also accepted after the command.",
        ),
    ] = False,
) -> None:
    """Build, train, measure and compare context-compressed language models.

    A recipe names a comparison: its contenders, data and training. `contextlm run` trains them
    all and writes a run folder with tables, plots, a page, and a checkpoint of each.
    """


app.command("run", cls=PlainCommand)(comparisons.run)
app.command("sweep", cls=PlainCommand, hidden=True)(comparisons.sweep)
app.command("params", cls=PlainCommand)(comparisons.params)
app.command("report", cls=PlainCommand)(reports.report)
app.command("eval", cls=PlainCommand)(checkpoints.evaluate)
app.command("generate", cls=PlainCommand)(checkpoints.generate)
app.command("check", cls=PlainCommand)(checking.check)
app.command("compress", cls=PlainCommand)(compressing.compress)
app.command("heal", cls=PlainCommand)(healing.heal)
app.command("bench", cls=PlainCommand)(benchmarking.bench)
app.command("list", cls=PlainCommand)(listing.list_known)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    Args:
        arguments: what follows the program's name; by default this process's own.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*_SPINS)
    leave(execute(app, sys.argv[1:] if arguments is None else arguments))
