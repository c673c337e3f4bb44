"""Files appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from contextlm.files import atomic_open, write_json, write_text


def test_a_file_and_its_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "naïve\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "naïve\n".encode()


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
