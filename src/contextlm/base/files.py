"""Paths as users type them, and files and folders that appear whole or not at all."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic_core import to_jsonable_python

from contextlm.base.errors import InputError, RunError

_PART = ".part"  # ends the hidden name under which something is written
# What a disk says when it is full, over quota, read-only or broken.
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # ends what safetensors and tokenizers say
_TORCH_SHORT_WRITE = "unexpected pos"  # all that `torch.save` says


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` only if the block succeeds.

    The data is flushed to the disk before the rename, so after a crash `path` holds either the old
    content or the new one, never a part. Parent folders are made as needed.

    Args:
        path: the file to create or replace.
        mode: ``"w"`` for UTF-8 text, ``"wb"`` for bytes.

    Raises:
        RunError: the disk is full or failing; `path` is as it was.
    """
    encoding = None if "b" in mode else "utf-8"
    with disk_faults_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, mode, encoding=encoding) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~umask())  # mkstemp's file is private to its owner
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path`; it becomes `path` only if the block succeeds.

    All files in it are flushed to the disk first. A folder that is there already is replaced: for a
    moment there is none, but never a part of one.

    Yields:
        The folder to fill.

    Raises:
        RunError: the disk is full or failing; `path` is as it was.
    """
    with disk_faults_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART))
        try:
            yield partial
            sync_files(partial)
            partial.chmod(0o777 & ~umask())
            if path.exists():
                replaced = partial.with_name(f"{partial.name}.old{_PART}")
                path.rename(replaced)
                partial.rename(path)
                shutil.rmtree(replaced)
            else:
                partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Flush every file in `folder`, and the folders themselves, to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(place, name), os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that a rename outlives a loss of power.

    Windows cannot open a folder for this; there nothing happens.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what a killed process was writing in `folder` when it ended.

    Only for a folder that no other process writes into.
    """
    for place in folder.rglob(f".*{_PART}"):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


@contextmanager
def disk_faults_named(path: Path) -> Iterator[None]:
    """Turn what a disk refuses within the block into one line with `path` and the cause.

    A write that fails raises an error without a file's name, and libraries that write weights or
    tokenizers raise errors of their own.

    Raises:
        RunError: the disk is full or failing.
    """
    try:
        yield
    except Exception as error:  # Rust libraries raise classes of their own, and plain Exception
        cause = _disk_fault(error)
        if cause is None:
            raise
        raise RunError(f"{path}: could not be written: {cause}") from error


def _disk_fault(error: Exception) -> str | None:
    """What the disk said, in the system's words; None if it is another fault."""
    message = str(error)
    in_rust = _RUST_OS_ERROR.search(message)
    number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
    if number in _DISK_FAULTS:
        return os.strerror(number)
    if isinstance(error, RuntimeError) and _TORCH_SHORT_WRITE in message:
        return "the disk is full, or the file larger than is allowed"
    return None


def umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, whole or not at all."""
    with atomic_open(path) as stream:
        stream.write(text)


def plain(value: Any) -> Any:
    """`value` in JSON's own types; numbers that are not finite become null."""
    return to_jsonable_python(value, inf_nan_mode="null")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; a path that cannot even be looked at is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not permitted, a NUL
        return False


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; a path that cannot even be looked at is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def with_home(text: str, where: str) -> Path:
    """`text` as a path, a leading ``~`` or ``~name`` replaced by that user's home.

    Raises:
        InputError: there is no such user, or no home; `where` opens the message.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{where}: no home folder is known for {text.split('/')[0]!r}") from None


def cache_folder() -> Path:
    """``CONTEXTLM_CACHE``, or ``~/.cache/contextlm``; it need not exist yet.

    Raises:
        InputError: nothing could be written there.
    """
    named = os.environ.get("CONTEXTLM_CACHE")
    try:
        folder = Path(named or "~/.cache/contextlm").expanduser()
    except RuntimeError:  # no home
        raise InputError("CONTEXTLM_CACHE: must name a folder here: there is no home") from None
    problem = why_not_writable(folder)
    if problem is not None:
        hint = "" if named else " (it can name another folder for the cache)"
        raise InputError(f"CONTEXTLM_CACHE: {problem}{hint}")
    return folder


def why_not_writable(folder: Path) -> str | None:
    """Why nothing could be written into `folder`, or None if it could.

    A folder that does not exist is asked about in the nearest one above it that does. A nameless
    temporary file is opened there, since permissions alone do not tell (``/proc``, root, read-only
    file systems).
    """
    place = folder.absolute()
    while True:
        try:
            place.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            place = place.parent
        except (OSError, ValueError) as error:  # a name too long, or a NUL in it
            return f"{folder}: {getattr(error, 'strerror', None) or error}"
    if not place.is_dir():
        return f"{place if place != folder.absolute() else folder}: not a folder"
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"{folder}: cannot be written to: {error.strerror or error}"
    return None


def nearest_file(path: Path, suffixes: Container[str]) -> str:
    """A hint at the file beside `path` whose name is nearest, or nothing.

    Args:
        path: that does not exist.
        suffixes: of the files to choose among.
    """
    names: list[str] = []
    with suppress(OSError):
        names = [file.name for file in path.parent.iterdir() if file.suffix in suffixes]
    near = difflib.get_close_matches(path.name, sorted(names), n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
