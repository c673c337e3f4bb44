"""What stands between a command and the user's shell: exit codes, one-line errors, silence.

Exit codes: 0 done, 1 a fault while running, 2 bad input or usage, 130 interrupted by Ctrl-C, 143
by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

import typer
from typer.main import get_command

from contextlm.base.distribution import ToldByMainError, launched_rank
from contextlm.base.errors import InputError, RunError, is_out_of_memory
from contextlm.base.interrupts import Terminated
from contextlm.base.visible import shortened, visible

FAULT, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

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
    try:
        with nullcontext() if debug else _quiet():
            code = _invoke(app, arguments or ["--help"])
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _settle_stdout()
        terminated = isinstance(error, Terminated)
        word = "terminated" if terminated else "interrupted"
        _say(one_line(_with_notes(f"contextlm: {word}", error)))
        return TERMINATED if terminated else INTERRUPTED
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
            with suppress(OSError, ValueError, AttributeError):
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


def _settle_stdout() -> None:
    """Write what is left for stdout; if that fails, keep the interpreter from trying at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())


def _say(line: str) -> None:
    # Nobody may be left to read stderr either.
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
