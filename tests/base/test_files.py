"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from contextlm.base.errors import RunError
from contextlm.base.files import atomic_folder, atomic_open, remove_parts, write_json, write_text


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
        assert str(caught.value).startswith(f"{tmp_path / 'x'}: {os.strerror(number)}: ")
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / ".b.k3j.part").mkdir(parents=True)
    (tmp_path / "a" / ".b.k3j.part" / "x").write_text("half")
    (tmp_path / "a" / ".c.txt.x_y.part").write_text("half")
    (tmp_path / "a" / "kept.part").write_text("a user's own")
    remove_parts(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept.part"]
