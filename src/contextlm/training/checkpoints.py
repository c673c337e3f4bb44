"""Working checkpoints: numbered folders, each sealed by a manifest of checksums, written last.

A process can be killed while it writes one, and a disk can spoil one later. A folder without a
manifest was never finished; one whose files do not match it is damaged. Both are left aside.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from contextlm.base.files import sync_files, write_json

MANIFEST = "manifest.json"
KEPT = 2  # so that there is one to fall back on

Tell = Callable[[str], None]


def silent(text: str) -> None:
    """Tells nobody."""


def seal(folder: Path) -> None:
    """Flush all of a checkpoint's files to the disk, then write their checksums beside them."""
    sync_files(folder)
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    write_json(folder / MANIFEST, {path.name: _sha256(path) for path in files})


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint, naming the file; None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return f"{folder / MANIFEST} cannot be read"
    if not isinstance(manifest, dict):
        return f"{folder / MANIFEST} is no manifest"
    for name, digest in manifest.items():
        file = folder / Path(name).name
        try:
            if _sha256(file) != digest:
                return f"{file} does not match its checksum"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
    return None


def number(folder: Path) -> int:
    """What a checkpoint's name ends with: its step or iteration."""
    return int(folder.name.rpartition("-")[2])


def sealed(folder: Path, prefix: str, tell: Tell) -> list[Path]:
    """The whole checkpoints in `folder`, newest first. Others are removed, damaged ones are told.

    Args:
        folder: where they are; it need not exist.
        prefix: what their names begin with, before ``-NUMBER``.
        tell: takes one line for each damaged one.
    """
    found = []
    for place in checkpoints(folder, prefix):
        if not (place / MANIFEST).exists():  # its process was killed while it wrote
            shutil.rmtree(place)
            continue
        problem = damage(place)
        if problem is None:
            found.append(place)
        else:
            tell(f"damaged checkpoint: {problem}; going on from the one before it, if there is one")
            shutil.rmtree(place)
    return found


def prune(folder: Path, prefix: str, keep: Collection[int] = ()) -> None:
    """Remove all but the newest checkpoints and those whose numbers are to be kept."""
    for place in checkpoints(folder, prefix)[KEPT:]:
        if number(place) not in keep:
            shutil.rmtree(place)


def checkpoints(folder: Path, prefix: str) -> list[Path]:
    """All checkpoints in `folder`, whole or not, newest first."""
    places = [p for p in folder.glob(f"{prefix}-*") if p.name[len(prefix) + 1 :].isdecimal()]
    return sorted(places, key=number, reverse=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
