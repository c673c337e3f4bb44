"""Who chooses the backend of an op, and in which order."""

from __future__ import annotations

import pytest

from contextlm.ops.backends import AUTO, VARIABLE, requested_backend

KNOWN = ("eager", "numba")


def requested(given: str = AUTO, op: str = "scan") -> str:
    return requested_backend(op, given, KNOWN)


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("numba", "numba"),
        ("scan=numba", "numba"),
        ("other=numba", AUTO),
        ("eager, scan = numba", "numba"),
        ("scan=numba,eager", "numba"),
        ("other=numba,eager", "eager"),
        ("", AUTO),
        ("scan=", AUTO),
    ],
)
def test_the_user_chooses(monkeypatch, variable, expected):
    monkeypatch.setenv(VARIABLE, variable)
    assert requested() == expected


def test_the_call_counts_more(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    assert requested("numba") == "numba"


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"'fast' \(known: auto, eager, numba\)"):
        requested()
