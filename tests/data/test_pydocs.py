from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from contextlm.base.errors import RunError
from contextlm.data.corpora import load_corpus
from contextlm.data.pydocs import read_pydocs

MODULES = {"alpha", "beta", "broken", "latin", "package", "pydoc_data", "quiet", "test", "idlelib"}

FILES = {
    "alpha.py": '''"""Alpha's own words."""
raise SystemExit("alpha was executed")
open("executed", "w")
if True:
    def first():
        """
        First.

            Indented.
        """
        def inner():
            "Inner."
try:
    class Thing:
        """A thing."""
        async def method(self): "Method."
except ImportError:
    def fallback(): "Fallback."
''',
    "beta.py": "def only():\n    '''Only \\ud800.'''\n",
    "broken.py": "def (:\n    '''no'''\n",
    "quiet.py": "x = 1\n",
    "package/__init__.py": "'''The package.'''\n",
    "package/part.py": "'''Its part.'''\n",
    "package/tests/test_part.py": "'''Not this.'''\n",
    "test/support.py": "'''Not this.'''\n",
    "idlelib/editor.py": "'''Not this.'''\n",
    "site-packages/thirdparty.py": "'''Not this.'''\n",
    "thirdparty.py": "'''Not this.'''\n",
    "pydoc_data/__init__.py": "",
    "pydoc_data/topics.py": "print('executed')\n"
    + "topics = {'while': 'The while\\n  statement.\\n', "
    + ", ".join(f"'topic{i:03}': 'About {i}.'" for i in range(100))
    + "}\n",
}


def plant(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILES[name], encoding="utf-8")
    (folder / "latin.py").write_bytes(b"'''caf\xe9'''\n")  # neither UTF-8 nor declared
    return folder


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    return plant(tmp_path / "lib", list(FILES))


def documents_of(folder: Path) -> list[str]:
    corpus = read_pydocs(folder, MODULES)
    return [*corpus.train, *corpus.validation]


def test_a_document_holds_every_docstring_under_its_qualified_name(stdlib: Path) -> None:
    (alpha,) = (text for text in documents_of(stdlib) if text.startswith("alpha\n"))
    assert alpha == (
        "alpha\n\nAlpha's own words.\n\n"
        "alpha.first\n\nFirst.\n\n    Indented.\n\n"
        "alpha.first.inner\n\nInner.\n\n"
        "alpha.Thing\n\nA thing.\n\n"
        "alpha.Thing.method\n\nMethod.\n\n"
        "alpha.fallback\n\nFallback.\n"
    )


def test_topics_are_documents_and_oddities_are_passed_over(stdlib: Path) -> None:
    documents = documents_of(stdlib)
    assert "while\n\nThe while\nstatement.\n" in documents
    assert "beta\n\nbeta.only\n\nOnly ?.\n" in documents, "a lone surrogate is not UTF-8 text"
    assert not any("Not this." in text for text in documents)
    assert len(documents) == 1 + 1 + 2 + 101, "alpha, beta, the package and its part, the topics"


def test_nothing_is_imported_or_executed(
    stdlib: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stdlib)
    before = set(sys.modules)
    documents_of(stdlib)
    assert not set(sys.modules) - before
    assert not (stdlib / "executed").exists()
    assert capsys.readouterr().out == ""


def test_the_order_of_the_file_system_does_not_matter(
    stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = read_pydocs(stdlib, MODULES)
    other = plant(tmp_path / "other", list(reversed(FILES)))
    walk = os.walk

    def backwards(top: Path):
        for folder, folders, files in walk(top):
            folders.sort(reverse=True)
            yield folder, folders, sorted(files, reverse=True)

    monkeypatch.setattr("os.walk", backwards)
    again = read_pydocs(other, MODULES)
    assert list(corpus.train) == list(again.train)
    assert list(corpus.validation) == list(again.validation)
    assert corpus.fingerprint == again.fingerprint


def test_a_share_is_held_out_and_nothing_is_read_before(stdlib: Path) -> None:
    whole = read_pydocs(stdlib, MODULES, share=0.0)
    assert (len(whole.train), len(whole.validation)) == (105, 0)
    corpus = read_pydocs(stdlib, MODULES, share=0.2)
    (stdlib / "beta.py").unlink()  # which only the documents can tell
    assert len(corpus.train) + len(corpus.validation) == 104
    assert 15 < len(corpus.validation) < 30
    assert corpus.fingerprint != whole.fingerprint


def test_a_python_without_sources_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no Python source files"):
        read_pydocs(tmp_path)


def test_this_python_gives_about_two_million_characters() -> None:
    corpus = load_corpus("pydocs")
    train, validation = (sum(map(len, texts)) for texts in (corpus.train, corpus.validation))
    assert 1_000_000 < train + validation < 5_000_000
    assert validation / (train + validation) == pytest.approx(0.05, abs=0.003)
    assert corpus.append_end_of_text
    assert corpus.name.startswith("pydocs (Python 3.")
    documents = [*corpus.train, *corpus.validation]
    (json,) = (text for text in documents if text.startswith("json\n"))
    assert "\njson.dumps\n\nSerialize" in json
    assert any(text.startswith("while\n\n") for text in documents)
    for text in documents:
        text.encode("utf-8")
    again = load_corpus("pydocs")
    assert list(again.train) == list(corpus.train)
    assert again.fingerprint == corpus.fingerprint
