"""The report in another language: the table is complete, and what is read is in it."""

from __future__ import annotations

import ast
import re
import string
from importlib.resources import files
from typing import get_args

import pytest

from contextlm.base.errors import InputError
from contextlm.report import charts
from contextlm.report.contenders import contenders
from contextlm.report.document import FIGURES
from contextlm.report.language import say, speaking, translations
from contextlm.report.notes import answers
from contextlm.report.page import write_report
from contextlm.report.sheet import Kind
from contextlm.report.statistics import Verdict
from contextlm.results.facts import EmbeddingFacts

JAPANESE = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff]")
# What is called with a text of the report as its first argument.
SPEAK = {"say", "mean", "shared", "change", "Column", "make_table"}


def constants(node):
    if isinstance(node, ast.IfExp):
        return [*constants(node.body), *constants(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def spoken():
    """Every text that the report may say."""
    found = {*get_args(Verdict), *get_args(Kind)} - {"text"}
    found |= set(get_args(EmbeddingFacts.model_fields["source"].annotation))
    found |= {figure.label for figure in FIGURES.values()}
    room = files("contextlm.report")
    for file in room.iterdir():
        if file.name.endswith(".py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and node.args:
                    name = node.func
                    if getattr(name, "id", getattr(name, "attr", "")) in SPEAK:
                        found.update(constants(node.args[0]))
    for file in (room / "templates").iterdir():
        found.update(re.findall(r'say\("([^"]+)"', file.read_text("utf-8")))
    return found - {""}


def names(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_the_table_is_complete_and_has_nothing_else():
    assert set(translations("ja")) == spoken()


def test_translations_are_japanese_and_fill_in_the_same():
    for text, found in translations("ja").items():
        assert names(found) == names(text), text
        assert JAPANESE.search(found), text


def test_a_language_without_a_table_is_refused():
    with pytest.raises(InputError, match=r"--language 'xx': expected en or ja"), speaking("xx"):
        pass
    assert say("contender") == "contender", "outside the block it is English"


def test_a_report_in_japanese(run, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "has_glyphs", lambda language: True)
    with speaking("ja"):
        paths = write_report([run], tmp_path / "ja", ["html", "md", "csv"])
        (answer,) = answers(contenders([run]))
    assert "hybrid" in answer
    assert JAPANESE.search(answer)
    assert not re.search(r"[a-z]{3,} (the|has|is) ", answer)
    page = paths["report.html"].read_text("utf-8")
    assert '<html lang="ja">' in page
    assert answer in page
    assert "キャッシュ" in page
    header = paths["report.csv"].read_text("utf-8").splitlines()[0]
    assert header.startswith("name,seeds,"), "programs read the same names in every language"


def test_without_a_font_charts_fall_back_to_english(run, monkeypatch):
    monkeypatch.setattr(charts, "has_glyphs", lambda language: language == "en")
    with speaking("ja"):
        figures = charts.figures(contenders([run]))
    assert not JAPANESE.search(str(figures))


def test_glyphs_are_looked_for_in_pictures(monkeypatch):
    assert charts.has_glyphs("en")
    charts.has_glyphs.cache_clear()
    drawn = iter([b"box", b"box", b"box"])
    monkeypatch.setattr(charts.vl_convert, "svg_to_png", lambda svg: next(drawn))
    assert not charts.has_glyphs("ja"), "all three look alike"
    charts.has_glyphs.cache_clear()
