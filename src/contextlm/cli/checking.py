"""`contextlm check`: whether architectures and mixers of one's own keep the contract."""

from __future__ import annotations

from typing import Annotated

import typer

from contextlm.base.errors import InputError, RunError
from contextlm.cli.options import optional


def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|MODULE...",
            show_default=False,
            help="Python code that registers architectures or mixers; it is run.",
        ),
    ],
    only: Annotated[
        str | None, optional("WORDS", "Only tests whose names hold these words (pytest's -k).")
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="Stop at the first failure.")] = False,
) -> None:
    """Test what a file registers as our own architectures are tested.

    The tests ask for causality, decoding in pieces, left padding, beams, saving, gradients, bytes
    of cache and more, on the settings that the file gives as `tiny`, or for a mixer on patterns
    with its letter. They are tests of pytest (the extra `check`): pip install pytest.

    Examples:

    ```
    contextlm check my_model.py
    contextlm check my_model.py --only padding --first
    ```
    """
    from contextlm.contract.check import check as run
    from contextlm.models.outside import import_outside

    options = [*(["-k", only] if only else []), *(["-x"] if first else [])]
    code = run(lambda: import_outside(files), options)
    if code == 5:
        raise InputError(f"--only {only}: no test of that name")
    if code:
        raise RunError(f"{', '.join(files)}: not all of the contract is kept")
