"""A summary inside a user's document: only what stands between the marks changes."""

from __future__ import annotations

import pytest

from contextlm.base.errors import InputError
from contextlm.report.embed import embed
from contextlm.report.page import render_summary

TEXT = (
    "before\n<!-- results:begin -->\nold\n<!-- results:end -->\n"
    "<!-- results:begin b -->\n<!-- results:end b -->\nafter\n"
)


def test_only_the_named_block_changes(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(TEXT, "utf-8")
    embed(document, "b", "new")
    embed(document, "b", "newer\n")
    expected = TEXT.replace("begin b -->\n<", "begin b -->\nnewer\n<")
    assert document.read_text("utf-8") == expected
    embed(document, None, "first")
    assert document.read_text("utf-8") == expected.replace("old", "first")


@pytest.mark.parametrize(
    "content",
    [
        "no marks",
        "<!-- results:begin -->",
        "<!-- results:end --> <!-- results:begin -->",
        "<!-- results:begin --> <!-- results:begin --> <!-- results:end -->",
    ],
)
def test_a_document_without_its_marks_stays_as_it_is(tmp_path, content):
    document = tmp_path / "page.md"
    document.write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"page\.md"):
        embed(document, None, "new")
    assert document.read_text("utf-8") == content


def test_a_document_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        embed(tmp_path / "nothing.md", None, "new")
    (tmp_path / "bytes.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        embed(tmp_path / "bytes.md", None, "new")


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(InputError, match="no run"):
        render_summary([])
