"""What pyproject.toml, the package, CI and the documentation say of one another."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import contextlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]


def test_one_version() -> None:
    assert PROJECT["version"] == contextlm.__version__


def test_types_are_shipped() -> None:
    assert (Path(contextlm.__file__).parent / "py.typed").is_file()


def test_ci_tests_the_ends_of_what_is_allowed() -> None:
    (allowed,) = [it for it in PROJECT["dependencies"] if it.startswith("transformers")]
    oldest, above = re.findall(r"\d+\.\d+", allowed)
    tested = CI["contract"]["strategy"]["matrix"]["transformers"]
    assert tested[0] == f"{oldest}.0"
    major, minor = above.split(".")
    assert tested[-1].startswith(f"{major}.{int(minor) - 1}.")
    named = [it.rpartition(" :: ")[2] for it in PROJECT["classifiers"] if ":: 3." in it]
    assert CI["checks"]["strategy"]["matrix"]["python"] == named


def test_nobody_is_told_to_install_contextlm_from_an_index() -> None:
    """The name is not ours there: it is installed from its folder."""
    files = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py")]
    for file in files:
        told = re.findall(r"pip install[^`\n]*?['\" ]contextlm\b[^`\n]*", file.read_text("utf-8"))
        assert not told, f"{file.name}: {told}"
