"""docs/use-it-with.md: the examples whose programs are installed for the tests are run.

In this process, with a small checkpoint instead of the demo's, whose command the README's test
runs; `make clients` runs all examples as they stand.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.models.hybrid import ContextHybridConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "clients"))
import page  # noqa: E402

TEXT = page.PAGE.read_text("utf-8")
INSTALLED = ("Programs that never import contextlm", "lm-eval", "accelerate")


def test_the_table_of_target_modules_is_that_of_the_models() -> None:
    assert page.between("targets", page.targets(), TEXT) == TEXT


def test_the_demo_is_that_of_the_readme() -> None:
    heading, language, code = page.examples(TEXT)[0]
    assert (heading, language) == ("", "bash")
    assert f"\n{code.splitlines()[0]} " in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("wanted", INSTALLED)
def test_examples_of_installed_programs(
    wanted: str,
    tmp_path: Path,
    saved: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_attention_heads": 2, "window": 4}
    config = ContextHybridConfig(**sizes, pattern="RW", intermediate_size=32)
    saved(tmp_path / "checkpoint", config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    found = [example for example in page.examples(TEXT) if example[0] == wanted]
    assert found
    for _, language, code in found:
        if language == "python":
            exec(compile(code, wanted, "exec"), {})
        else:
            # The shell does the rest: it makes the files.
            programs = "contextlm() { :; }; lm_eval() { :; }\n"
            subprocess.run(["bash", "-ec", programs + code], cwd=tmp_path, check=True)
            for line in re.findall(r"^(?:\w+=\w+ )*contextlm .*$", code, re.MULTILINE):
                *settings, command = re.split(r" ?\bcontextlm ", line)
                for name, _, value in (it.partition("=") for it in " ".join(settings).split()):
                    monkeypatch.setitem(os.environ, name, value)
                assert execute(app, shlex.split(command)) == 0
        assert capsys.readouterr().out.strip()
