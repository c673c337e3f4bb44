"""A run's folder: made whole, held by one process, and known as unfinished until all is done.

While a run is at work, its folder holds `_working` (no contender can be named so): what a killed
process goes on from, the lock, and `run.json`, which says what recipe and data the run began with.
`run.json` goes first when the run is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from contextlm.base.errors import InputError
from contextlm.base.files import remove_parts, write_json, write_text
from contextlm.base.locks import locked
from contextlm.data.tokenizers import tokenizer_hash
from contextlm.lab.preparation import Prepared

_WORKING = "_working"
_STATE = "run.json"
_LOCK = "lock"
_VERSION = 1


def working_folder(run: Path, *parts: str) -> Path:
    """Where a run keeps what a killed process goes on from; `parts` name a place in it."""
    return run.joinpath(_WORKING, *parts)


def is_unfinished(run: Path) -> bool:
    """Whether a folder is that of a run that has begun and is not finished."""
    return (run / _WORKING / _STATE).is_file()


def data_fingerprint(prepared: Prepared) -> dict[str, str]:
    """Hashes of the data that decide a run's figures, by names for a message."""
    hashes = {
        "tokenizer": tokenizer_hash(prepared.tokenizer),
        "training text": _sha256(prepared.stream),
        "validation text": _sha256(prepared.validation_stream),
    }
    if prepared.learning_text is not None:
        hashes["text that embeddings are learned from"] = _sha256(prepared.learning_text.train)
    if prepared.embedding is not None:
        hashes["embedding"] = _sha256(prepared.embedding.weight_VD.numpy())
    return hashes


@contextmanager
def new_run(
    out: Path, name: str, recipe: str, environment: dict[str, Any], data: dict[str, str]
) -> Iterator[Path]:
    """Make the next free folder ``NAME-001`` and hold its lock for the time of the block.

    The folder appears with its first files in it, so that a killed process leaves a run that can
    be resumed, or none.

    Args:
        out: where run folders go; made if needed.
        name: of the recipe.
        recipe: the resolved recipe, as YAML.
        environment: for ``environment.json``.
        data: as `data_fingerprint` gives it.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out, prefix=f".{name}.", suffix=".part"))
    try:
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        write_text(partial / "recipe.yaml", recipe)
        write_json(partial / "environment.json", environment)
        state = {
            "version": _VERSION,
            "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
            "device": environment.get("device"),
            "data": data,
        }
        write_json(partial / _WORKING / _STATE, state)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with locked(partial / _WORKING / _LOCK, str(out / name)):
        yield _numbered(partial, out, name)


@contextmanager
def held_run(run: Path) -> Iterator[dict[str, Any]]:
    """Hold the lock of an unfinished run for the time of the block.

    Yields:
        What is in its ``run.json``.

    Raises:
        InputError: another process is at work on it, it finished meanwhile, its ``recipe.yaml`` is
            not the one that it began with, or ``run.json`` is damaged or of another version.
    """
    if not is_unfinished(run):
        raise InputError(f"{run}: no unfinished run is in there")
    with locked(run / _WORKING / _LOCK, str(run)):
        file = run / _WORKING / _STATE
        try:
            state = json.loads(file.read_bytes())
            version, recipe, _ = state["version"], state["recipe_sha256"], state["data"]
        except FileNotFoundError:
            raise InputError(f"{run}: it has just been finished by another process") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{file}: is damaged, the run cannot be resumed") from None
        if version != _VERSION:
            raise InputError(f"{file}: is of version {version}, this contextlm reads {_VERSION}")
        if hashlib.sha256(_read(run / "recipe.yaml")).hexdigest() != recipe:
            raise InputError(
                f"{run / 'recipe.yaml'}: has changed since the run began; a run is resumed with "
                "the recipe that it began with"
            )
        remove_parts(run)
        yield state


def check_data(run: Path, state: dict[str, Any], data: dict[str, str]) -> None:
    """Compare the data with what the run began with.

    Raises:
        InputError: it differs; the message says in what.
    """
    known = state["data"]
    for what in dict.fromkeys([*known, *data]):
        if known.get(what) != data.get(what):
            raise InputError(
                f"{run}: the {what} has changed since the run began; a run is resumed with the "
                "data that it began with"
            )


def finish(run: Path) -> None:
    """Mark a run as finished and remove what it might have gone on from."""
    (run / _WORKING / _STATE).unlink()
    shutil.rmtree(run / _WORKING, ignore_errors=True)


def _numbered(partial: Path, out: Path, name: str) -> Path:
    """Give the folder the next free number; the rename decides when two runs start at once."""
    number = 1
    while True:
        folder = out / f"{name}-{number:03d}"
        try:
            if not folder.exists():
                partial.rename(folder)
                return folder
        except OSError:
            if not folder.exists():  # it was not the name
                raise
        number += 1


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
