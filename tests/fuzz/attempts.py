"""Giving the command line something bad, and holding it to its promise.

Exit code 2 (or 0, where the input was merely unusual), one line that says what is wrong, no
traceback, and not one file changed, new or half-written. The messages are kept, with paths and
numbers made equal, for a person to read: ``make fuzz`` prints the list.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings

from contextlm.base.visible import visible
from contextlm.cli import app
from contextlm.cli.shell import execute

TIMES = int(os.environ.get("CONTEXTLM_FUZZ", "1"))  # `make fuzz` tries so many times as much
MESSAGES: Counter[str] = Counter()

# How many inputs each test tries, in process; test_budget holds their sum to its promise.
EXAMPLES = {
    "recipe": 350,
    "mutated recipe": 450,
    "damaged recipe": 250,
    "override": 400,
    "arguments": 250,
    "model": 60,
    "text corpus": 80,
    "jsonl corpus": 120,
    "run folder": 150,
    "reported run": 12,
    "checkpoint": 60,
}


def tries(name: str) -> settings:
    """So many examples of one kind; the same ones each time, unless they are many."""
    return settings(
        max_examples=EXAMPLES[name] * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Attempt:
    """What a command line left."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error's text."""
        return self.err.removeprefix("contextlm: error: ").rstrip("\n")


class _Stdin(io.TextIOWrapper):
    """An empty stdin that is no terminal."""


def attempt(*arguments: str | Path, place: Path, fine: bool = True) -> Attempt:
    """Run a command line in this process and check all that is promised of a refusal.

    Args:
        *arguments: what follows the program's name.
        place: the folder in which nothing may change unless the command succeeds.
        fine: whether success is allowed.
    """
    before = contents(place)
    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, _Stdin(io.BytesIO(b""))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = execute(app, [str(argument) for argument in arguments])
    finally:
        sys.stdin = stdin
    done = Attempt(code, out.getvalue(), err.getvalue())
    check(done, fine=fine)
    if done.code:
        assert contents(place) == before
    return done


def attempt_for_real(*arguments: str | bytes, place: Path) -> Attempt:
    """The same through the console script, in a process of its own."""
    before = contents(place)
    script = Path(sys.executable).parent / "contextlm"
    done = subprocess.run(
        [str(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
        cwd=place,
    )
    err = done.stderr.decode()
    found = Attempt(done.returncode, done.stdout.decode(), err)
    check(found, fine=False)
    assert contents(place) == before
    return found


def check(done: Attempt, *, fine: bool) -> None:
    """What is promised of every ending: never a traceback, and of a refusal one helpful line."""
    assert "Traceback" not in done.err, done.err
    if done.code == 0:
        assert fine, done
        return
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("contextlm: error: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    assert visible(done.message) == done.message, ascii(done.message)
    assert 10 < len(done.message) <= 1000, done.message
    assert "--debug" not in done.message
    MESSAGES[normalised(done.message)] += 1


def contents(place: Path) -> dict[str, str]:
    """Every file below a folder with the hash of what it holds; folders and links too."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = os.fsdecode(os.fsencode(path.relative_to(place)))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "no file"
    return found


def normalised(message: str) -> str:
    """A message without what differs from input to input: paths, quoted values, numbers."""
    message = re.sub(r"/(?:tmp|var)/[^\s:']*", "PATH", message)
    message = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'X'", message)
    message = re.sub(r"extra argument\(s\) \(.*\)", "extra argument(s) (X)", message)
    return re.sub(r"-?\d[\d,.e+-]*", "N", message)
