"""Giving the command line something bad, and holding it to its promise.

Exit code 2 (or 0, where the input was merely unusual), one line that says what is wrong, no
traceback, and not one file changed, new or half-written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from contextlm.base.visible import visible
from contextlm.cli import app
from contextlm.cli.shell import execute

WORDS = "one two three four five six seven eight nine ten, and eleven.\n" * 10
RECIPE = """\
name: toy
question: Does it work?
corpus: text:notes.txt
tokenizer: bpe:300
sequence_length: 8
samples: {train: 8, validation: 2}
seeds: [0]
training: {learning_rate: 1e-3, betas: [0.8, 0.95], epochs: 1}
evaluation: {cache_lengths: [8], speed_tokens: 8}
contenders:
  - name: base
    baseline: true
    model: {type: gpt2, n_embd: 8, n_layer: 1, n_head: 1, n_positions: 16}
    reported: {val_ppl: 10.5}
  - name: ours
    model: {type: context_pythia, num_hidden_layers: 1, num_attention_heads: 1, hidden_size: 8,
      context_dim: 4}
    phase1: {max_iterations: 2}
    training: {learning_rate: 5e-4}
scales:
  smoke: {samples: {train: 2, validation: 1}, contenders: {base: {model: {n_layer: 1}}}}
"""


@dataclass(frozen=True)
class Attempt:
    """What a command line left."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        return self.err.removeprefix("contextlm: error: ").rstrip("\n")


def attempt(*arguments: str | Path, place: Path, fine: bool = True) -> Attempt:
    """Run a command line in this process and check all that is promised of a refusal.

    Args:
        *arguments: what follows the program's name.
        place: the folder in which nothing may change unless the command succeeds.
        fine: whether success is allowed.
    """
    before = contents(place)
    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b""))  # empty, and no terminal
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


def contents(place: Path) -> dict[Path, str]:
    """Every file below a folder with the hash of what it holds; folders and links too."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            found[path] = f"link to {path.readlink()}"
        elif path.is_file() and path.stat().st_size < 2**24:
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[path] = "no file, or a giant one"
    return found
