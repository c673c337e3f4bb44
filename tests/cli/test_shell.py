"""The command line and the shell: exit codes, errors of one line, silence, streams, encodings."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import typer

from contextlm import __version__
from contextlm.base.errors import InputError, RunError
from contextlm.base.interrupts import Terminated
from contextlm.cli import main
from contextlm.cli.output import print_facts, print_json
from contextlm.cli.shell import execute, explain, one_line

SCRIPT = Path(sys.executable).parent / "contextlm"


def test_python_m_is_the_same_command_and_loads_nothing_heavy() -> None:
    """Libraries read when they are imported what the command line sets, such as no telemetry."""
    command = [sys.executable, "-X", "importtime", "-m", "contextlm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"contextlm {__version__}\n"
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")
    }
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "huggingface_hub", "datasets", "numpy"}


def failing(error: BaseException) -> typer.Typer:
    """A command line whose only command raises `error`."""
    one = typer.Typer(add_completion=False)

    @one.callback()
    def group() -> None: ...

    @one.command()
    def fail() -> NoReturn:
        raise error

    return one


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("corpus 'x': no such file"), 2, "corpus 'x': no such file"),
        (RunError("the loss is not finite"), 1, "the loss is not finite"),
        (RunError("two\nlines \x1b[31m"), 1, "two lines \\x1b[31m"),
        (OSError(28, "No space left on device", "runs/x"), 1, "No space left on device: runs/x"),
        (MemoryError(), 1, "out of memory"),
        (OutOfMemoryError("CUDA out of memory"), 1, "out of memory: CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (KeyError("gone"), 1, "KeyError: 'gone' (use --debug for the traceback)"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, message: str
) -> None:
    assert execute(failing(error), ["fail"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"contextlm: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert execute(failing(InputError("no such thing")), arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("contextlm: error: no such thing\n")


def test_being_stopped_is_one_line_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(failing(KeyboardInterrupt()), ["fail"]) == 130
    assert capsys.readouterr().err == "contextlm: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(15, 143), (1, 129), (10, 138)])
def test_a_signal_is_one_line_and_128_more(
    capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    assert execute(failing(Terminated(number)), ["fail"]) == code
    assert capsys.readouterr().err == "contextlm: terminated\n"


def test_a_message_without_text_still_says_what_happened() -> None:
    assert explain(ValueError())[1].startswith("ValueError")
    assert one_line(" a \r\n\t b\u2028c ") == "a b c"


def test_warnings_and_logs_stay_off_the_terminal_unless_debugging(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    noisy = typer.Typer(add_completion=False)

    @noisy.callback()
    def group() -> None: ...

    @noisy.command()
    def work() -> None:
        import logging
        import warnings

        logging.getLogger("noise").warning("a log line")
        warnings.warn("a warning", stacklevel=1)
        print(os.environ.get("TRANSFORMERS_VERBOSITY"))

    assert execute(noisy, ["work"]) == 0
    assert capsys.readouterr() == ("error\n", "")
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    with pytest.warns(UserWarning, match="a warning"):
        assert execute(noisy, ["work", "--debug"]) == 0
    assert capsys.readouterr().out == "None\n"


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_torchs_threads_do_not_keep_a_processor_waiting_unless_asked(monkeypatch, given, found):
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environment = {name: text for name, text in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", environment | given)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(SCRIPT), "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "contextlm: error: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--version"], ["list", "recipes"]])
def test_a_reader_that_has_left_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [str(SCRIPT), *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = subprocess.run(
        f"'{SCRIPT}' list recipes {closed}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (">&- " not in f"{closed} ".replace("2>&-", ""))


@pytest.mark.parametrize("encoding", ["cp932", "ascii", "utf-8"])
def test_any_encoding_of_stdout_will_do(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Tables lose what cannot be said, JSON nothing."""
    names = {"name": "größer 漢字 ✓ 🐍", "also": "—"}
    app = typer.Typer(add_completion=False)

    @app.callback()
    def group() -> None: ...

    @app.command()
    def table() -> None:
        print_facts(names, caption="≥ 50 %")

    @app.command()
    def machine() -> None:
        print_json(names)

    said = {}
    for command in ("table", "machine"):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
        assert execute(app, [command]) == 0
        said[command] = buffer.getvalue().decode(encoding)
    assert json.loads(said["machine"]) == names
    assert "name" in said["table"]
    assert ("?" in said["table"]) == (encoding != "utf-8")
