"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models

from contextlm.base.errors import RunError
from contextlm.base.files import atomic_folder, atomic_open, remove_parts, write_json, write_text

WEIGHTS = {"weight": torch.zeros(50_000)}


def test_an_existing_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    write_json(path, {"new": "é"})
    assert json.loads(path.read_text("utf-8")) == {"new": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, existing: str | None) -> None:
    path = tmp_path / "x.txt"
    if existing is not None:
        path.write_text(existing)

    def fail_midway() -> None:
        with atomic_open(path) as stream:
            stream.write("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([existing] if existing else [])


def test_bytes_and_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_open(tmp_path / "x.bin", "wb") as stream:
            stream.write(b"\x00\xff")
    finally:
        os.umask(before)
    assert (tmp_path / "x.bin").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE((tmp_path / "x.bin").stat().st_mode) == 0o640


def fill(path: Path, text: str, fails: BaseException | None = None) -> None:
    with atomic_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x.txt").write_text(text)
        if fails is not None:
            raise fails


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        fill(tmp_path / "a" / "b", text)
        assert (tmp_path / "a" / "b" / "inner" / "x.txt").read_text() == text
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_no_part_of_a_folder(tmp_path: Path, existing: bool) -> None:
    if existing:
        fill(tmp_path / "b", "old")
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "b", "new", KeyboardInterrupt())
    assert [p.read_text() for p in tmp_path.rglob("*.txt")] == (["old"] if existing else [])
    assert len(list(tmp_path.iterdir())) == existing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_is_one_line_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    for write in (lambda: write_text(tmp_path / "x", "text"), lambda: fill(tmp_path / "x", "text")):
        with pytest.raises(RunError) as caught:
            write()
        said = f"{tmp_path / 'x'}: could not be written: {os.strerror(number)}"
        assert str(caught.value) == said
        assert list(tmp_path.iterdir()) == []


@contextmanager
def no_larger_files_than(size: int) -> Iterator[None]:
    """The system refuses what is larger, as it does what is more than a disk holds."""
    resource = pytest.importorskip("resource", reason="there are no limits for files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_tokenizer(path: Path) -> None:
    words = {f"word {number}": number for number in range(10_000)}
    Tokenizer(models.WordLevel(words, unk_token="word 0")).save(str(path))


@pytest.mark.parametrize(
    ("write", "cause"),
    [
        (lambda path: path.write_bytes(bytes(50_000)), "File too large"),
        (lambda path: safetensors.torch.save_file(WEIGHTS, path), "File too large"),
        (save_tokenizer, "File too large"),
        (lambda path: torch.save(WEIGHTS, path), "the disk is full, or "),
    ],
    ids=["Python", "safetensors", "tokenizers", "torch"],
)
def test_what_a_library_cannot_write_is_one_line_too(
    tmp_path: Path, write: Callable[[Path], None], cause: str
) -> None:
    with (
        pytest.raises(RunError) as caught,
        no_larger_files_than(10_000),
        atomic_folder(tmp_path / "checkpoint") as partial,
    ):
        write(partial / "file")
    assert str(caught.value).startswith(f"{tmp_path / 'checkpoint'}: could not be written: {cause}")
    assert list(tmp_path.iterdir()) == []


def test_other_faults_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        fill(tmp_path / "x", "text", PermissionError(errno.EACCES, "denied"))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / ".b.k3j.part").mkdir(parents=True)
    (tmp_path / "a" / ".b.k3j.part" / "x").write_text("half")
    (tmp_path / "a" / ".c.txt.x_y.part").write_text("half")
    (tmp_path / "a" / "kept.part").write_text("a user's own")
    remove_parts(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept.part"]
