"""One process at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from contextlm.base.errors import InputError
from contextlm.base.locks import locked

fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    for _ in range(2):  # it is given back at the block's end
        with locked(file, "runs/x"):
            message = rf"^runs/x: process {os.getpid()} is at work on it$"
            with pytest.raises(InputError, match=message), locked(file, "runs/x"):
                pass
            file.write_text("")
            with (
                pytest.raises(InputError, match="another process is"),
                locked(file, "runs/x"),
            ):
                pass


def test_it_ends_with_a_fault_and_with_its_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "lock", "x"):
        raise KeyError
    code = (
        "import os, sys; from pathlib import Path; from contextlm.base.locks import locked\n"
        "with locked(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], check=False)
    assert killed.returncode == -9
    with locked(tmp_path / "lock", "x"):
        pass


def test_the_folder_may_be_renamed_and_the_file_removed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "lock", "x"):
        (tmp_path / "a").rename(tmp_path / "b")
        with pytest.raises(InputError), locked(tmp_path / "b" / "lock", "x"):
            pass
        (tmp_path / "b" / "lock").unlink()


def test_where_there_are_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with locked(tmp_path / "lock", "x"), locked(tmp_path / "lock", "x"):
        pass
