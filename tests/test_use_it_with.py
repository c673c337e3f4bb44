"""docs/use-it-with.md: the examples whose programs are installed for the tests are run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "clients"
sys.path.insert(0, str(CLIENTS))
import page  # noqa: E402

TEXT = page.PAGE.read_text("utf-8")
# Other examples are run by `make clients`.
INSTALLED = (
    "Use it with other programs",
    "Programs that never import contextlm",
    "lm-eval",
    "accelerate",
)


def test_the_table_of_target_modules_is_that_of_the_models() -> None:
    assert page.between("targets", page.targets(), TEXT) == TEXT


def test_examples_of_installed_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = [example for example in page.examples(TEXT) if example[0] in ("", *INSTALLED)]
    assert len(run) == 4
    for _, language, code in run:
        assert page.run_example(language, code, tmp_path).strip()
