"""One process at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contextlm.base.errors import InputError
from contextlm.base.locks import locked

fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, "runs/x") as held:
        assert held
        message = rf"^runs/x: process {os.getpid()} is at work on it$"
        # Another opening of the file is to the system what another process is.
        with pytest.raises(InputError, match=message), locked(file, "runs/x"):
            pass
    with locked(file, "runs/x") as held:
        assert held


def test_it_is_given_back_after_a_fault_too(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "lock", "x"):
        raise KeyError
    with locked(tmp_path / "lock", "x") as held:
        assert held


def test_where_there_are_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with locked(tmp_path / "lock", "x") as one, locked(tmp_path / "lock", "x") as other:
        assert (one, other) == (False, False)
