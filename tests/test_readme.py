"""The README is run: its commands, its two make targets, and its Python."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contextlm.cli import app
from contextlm.cli.shell import execute

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BIN = Path(sys.executable).parent
JAPANESE = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "ja").glob("*.md"))


def fenced(language: str, page: str = README) -> list[str]:
    """A page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all, so that the demo's text is read once."""
    return str(tmp_path_factory.mktemp("cache"))


def run(*command: str, folder: Path, **options: str) -> str:
    """Run a command in `folder`; what it printed to stdout."""
    # A make around the tests must not speak to the one inside them.
    kept = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    environment = {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        **options,
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_the_two_commands_stand_on_the_first_screen() -> None:
    first_screen = README.splitlines()[:24]
    for target in ("demo", "test"):
        assert any(line.startswith(f"    make {target} ") for line in first_screen)


def test_there_is_one_place_for_the_generated_results() -> None:
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert README.count(begin) == README.count(end) == 1
    assert README.index(begin) < README.index(end)


def test_commands_and_python_work_in_order(
    tmp_path: Path,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (commands,) = fenced("bash")
    lines = [line for line in commands.splitlines() if line.strip()]
    assert len(lines) >= 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTEXTLM_CACHE", cache)
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        assert name == "contextlm"
        assert execute(app, arguments) == 0, line
        assert capsys.readouterr().out.strip(), line
    examples = fenced("python")
    assert len(examples) == 2
    for example in examples:
        assert run(sys.executable, "-c", example, folder=tmp_path).strip()


def test_the_japanese_readme_has_the_same_commands_and_python() -> None:
    page = (ROOT / "README.ja.md").read_text("utf-8")
    assert fenced("python", page) == fenced("python")
    ours, theirs = (
        [shlex.split(line, comments=True) for line in block.splitlines()]
        for block in (*fenced("bash"), *fenced("bash", page))
    )
    assert ours == theirs
    for target in ("demo", "test"):
        assert any(line.startswith(f"    make {target} ") for line in page.splitlines()[:24])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo(tmp_path: Path, cache: str) -> None:
    # The environment at work stands in for the one that make would install; its stamp counts as
    # up to date, so that nothing is downloaded.
    prefix = BIN.parent
    arguments = f"--scale smoke --out {tmp_path / 'runs'}"
    before = set(ROOT.glob("runs/*"))
    printed = run(
        *("make", "-C", str(ROOT), "-o", f"{prefix}/.installed", f"VENV={prefix}"),
        *("demo", f"ARGS={arguments}"),
        folder=tmp_path,
        CONTEXTLM_CACHE=cache,
    )
    assert str(tmp_path / "runs" / "demo-001" / "report.html") in printed
    for name in ("report.html", "report.md", "recipe.yaml", "environment.json"):
        assert (tmp_path / "runs" / "demo-001" / name).is_file()
    assert set(ROOT.glob("runs/*")) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_runs_pytest(tmp_path: Path) -> None:
    planned = run("make", "-C", str(ROOT), "-n", "test", folder=tmp_path)
    assert "-m pytest" in planned


@pytest.mark.parametrize(
    "page", ["README.md", "README.ja.md", "CONTRIBUTING.md", *JAPANESE], ids=str
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
