"""What stands between a command and the user's shell: exit codes, one-line errors, silence, help.

Exit codes: 0 done, 1 a fault while running, 2 bad input or usage, 130 interrupted by Ctrl-C, 128
and its number for another signal (SIGTERM: 143).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.main import get_command

from contextlm.base.distribution import ToldByMainError, launched_rank
from contextlm.base.errors import InputError, RunError, is_out_of_memory
from contextlm.base.interrupts import Terminated
from contextlm.base.visible import shortened, visible

FAULT, USAGE, INTERRUPTED = 1, 2, 130

_LONGEST_MESSAGE = 1000  # characters; some libraries' messages hold a whole file

# Read by the libraries when they are imported, hence set before any command imports them.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def execute(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        app: the commands.
        arguments: what follows the program's name; none stands for ``--help``.

    Returns:
        The exit code. Errors are on stderr by then, one line each.
    """
    arguments, debug = _take_debug(arguments)
    _make_printable()
    try:
        with nullcontext() if debug else _quiet():
            code = _invoke(app, arguments or ["--help"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _settle_stdout()
        word, code = "interrupted", INTERRUPTED
        if isinstance(error, Terminated):
            word, code = "terminated", 128 + error.number
        _say(one_line(_with_notes(f"contextlm: {word}", error)))
        return code
    except Exception as error:  # the command's outermost frame: no traceback may escape it
        _settle_stdout()
        if debug:
            traceback.print_exc()
        # The reader of our output has left, or another process tells: nobody to tell here.
        if isinstance(error, (BrokenPipeError, ToldByMainError)):
            return FAULT
        code, message = explain(error)
        who = f"rank {launched_rank()}: " if launched_rank() else ""
        _say(f"contextlm: error: {who}{one_line(_with_notes(message, error))}")
        return code


def leave(code: int) -> NoReturn:
    """End this process with an exit code; one that a launcher started, without Python's shutdown.

    There, threads of gloo were seen to abort a process that had done all its work (2 of 20 runs),
    and the launcher called the run failed.
    """
    if "LOCAL_RANK" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an exception that a command let through."""
    if isinstance(error, InputError):
        return USAGE, str(error)
    if isinstance(error, RunError):
        return FAULT, str(error)
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        # pydantic's words for a value that typer's own check has refused
        message = message.replace("Value error, ", "")
        return error.exit_code, message[:1].lower() + message[1:]
    if is_out_of_memory(error):
        return FAULT, f"out of memory: {error} (smaller batches or sequences need less)"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return FAULT, f"{error.strerror}{where}"
    kind = type(error).__name__
    return FAULT, f"{kind}: {error} (use --debug for the traceback)"


def one_line(message: str) -> str:
    """`message` on one line that fits a screen, without characters that could steer a terminal."""
    return visible(shortened(" ".join(message.split()), _LONGEST_MESSAGE))


def _with_notes(message: str, error: BaseException) -> str:
    """`message` and what was noted on the error, such as where finished work is."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _invoke(app: typer.Typer, arguments: list[str]) -> int:
    # Not `app()`: typer would catch interrupts and end-of-file itself, and exit.
    command = get_command(app)
    try:
        with command.make_context("contextlm", arguments) as context:
            command.invoke(context)
    except typer.Exit as leave:
        return leave.exit_code
    return 0


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``--debug`` out of the arguments, wherever it stands before a ``--``.

    Done before parsing, so that it also works after the command, and for errors of parsing.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head = [argument for argument in arguments[:end] if argument != "--debug"]
    return head + arguments[end:], len(head) < end


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings, log lines and progress bars off the user's terminal.

    What the user set in the environment or with ``python -W`` stays as it is.
    """
    absent = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(absent)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        for name in absent:
            os.environ.pop(name, None)


def _make_printable() -> None:
    """See to it that printing cannot end a command whose work is done.

    Stdout may be of an encoding that lacks a character (cp932, ascii), and it may be closed: then
    Python has none, and would send to stdout what is meant for a closed stderr.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115, until the end
            setattr(sys, name, nowhere)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _settle_stdout() -> None:
    """Write what is left for stdout; if that fails, keep the interpreter from trying at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # nobody may be left to read stderr either
        print(line, file=sys.stderr, flush=True)


def _without_types(params: list[Any]) -> list[Any]:
    """Help without Python's names for types: a flag takes no value, an argument says its own."""
    for param in params:
        if isinstance(param, TyperArgument):
            # Only the display: `<list[Path]>` says nothing beside RUN... and its explanation.
            vars(param)["display_type_rich"] = lambda ctx: None
        elif getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class PlainCommand(TyperCommand):
    """A command whose help shows no type of a flag or of an argument."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, help option included, as typer has them."""
        return _without_types(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, help option included, as typer has them."""
        return _without_types(super().get_params(ctx))
