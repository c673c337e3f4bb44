"""Who chooses the backend of an op, and in which order; and what of compiled code is kept."""

from __future__ import annotations

import importlib.util

import pytest

from contextlm.ops import backends
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


def test_compiled_code_is_kept_until_any_op_changes(monkeypatch, tmp_path):
    """Also one in another file, which may have been compiled into it."""
    file = tmp_path / "doubling.py"
    file.write_text(
        "from contextlm.ops.backends import compiled\n\n"
        "@compiled()\ndef double(x):\n    return x + x\n"
    )

    def compiles() -> bool:
        """In what a new process would do."""
        spec = importlib.util.spec_from_file_location("doubling", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.double(2) == 4
        return bool(module.double.stats.cache_misses)

    assert [compiles(), compiles()] == [True, False]
    monkeypatch.setattr(backends, "_sources", lambda: "others")
    assert [compiles(), compiles()] == [True, False]
