"""`contextlm compress`: a smaller cache for a trained model, and what it costs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from contextlm.base.errors import InputError
from contextlm.base.files import is_folder
from contextlm.base.visible import shown, visible
from contextlm.cli.checkpoints import read_lengths
from contextlm.cli.options import AsJson, Device, TrainedModel, optional
from contextlm.cli.output import print_json, print_table, writable_folder


def compress(
    model: TrainedModel,
    policies: Annotated[
        list[str] | None,
        optional(
            "SPEC",
            "A policy, such as window:256,sinks:4, latent:25% or window:512+int8; may be repeated, "
            "or several between spaces (`contextlm list policies`). Without it, all that --budget "
            "proposes.",
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="NAME", help="What to read (`contextlm list corpora`).")
    ] = "pydocs",
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default="512,2048, or the model's positions",
            help="Tokens after which the cache is measured.",
        ),
    ] = None,
    read: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            show_default="the longest of --lengths",
            help="Tokens of the text that are read; beyond, bytes alone are counted.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Shares of the full cache, at the end of the text, to propose settings for.",
        ),
    ] = "0.25",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the run folder goes.")] = "runs",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compress the cache of a model that is trained already, and measure what that costs.

    Each policy reads the same text beside the model's own cache: bytes really held, divergence from
    the full cache, perplexity by position, passkeys, speed. Nothing is trained, and the model's
    files are not changed.

    Examples:

    ```
    contextlm compress my-model/ --text text:my-notes/
    contextlm compress my-model/ --policies window:256,sinks:4 --policies latent:25%
    contextlm compress my-model/ --budget 0.5,0.25,0.125 --lengths 512,2048,8192 --read 2048
    ```
    """
    given = None if lengths is None else read_lengths(lengths, "--lengths")
    budgets = read_budgets(budget)
    place = writable_folder(out, "--out")

    from contextlm.base.progress import RichProgress, SilentProgress
    from contextlm.evaluation.checkpoint import fetched
    from contextlm.lab.compressing import CompressSettings
    from contextlm.lab.compressing import compress as measured
    from contextlm.report.compression import answers, tables

    folder = Path(model) if is_folder(Path(model)) else fetched(model)
    specs = [spec for several in policies or [] for spec in several.split()]
    settings = CompressSettings(specs or None, text, given, read, budgets, device)
    said = ["contextlm", "compress", model, "--text", text, "--budget", budget]
    said += [] if lengths is None else ["--lengths", lengths]
    said += [] if read is None else ["--read", str(read)]
    said += [part for spec in specs for part in ("--policies", spec)]
    with SilentProgress() if as_json else RichProgress() as progress:
        found, run, paths = measured(folder, model, settings, place, shlex.join(said), progress)
    if as_json:
        print_json({"run": run, "report": paths, **found.model_dump()})
        return
    for sentence in answers(found):
        print(visible(sentence))
    table = tables(found)[0]
    print_table(table.headings, table.rows, caption=table.caption)
    for spec, reason in found.refused.items():
        print(f"not measured: {spec}: {visible(reason)}", file=sys.stderr)
    for name, path in paths.items():
        print(f"{name}: {visible(str(path))}")


def read_budgets(text: str) -> list[float]:
    """Comma-separated shares between 0 and 1, the largest first.

    Raises:
        InputError: one of them is not.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 1 for share in shares):
        raise InputError(
            f"--budget {shown(text)}: expected shares between 0 and 1 such as 0.5,0.25"
        )
    return sorted(set(shares), reverse=True)
