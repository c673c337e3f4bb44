"""YAML that guesses nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlm.base.errors import InputError
from contextlm.base.strict_yaml import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("7.", 7.0),
        ("0", 0),
        ("-12", -12),
        ("true", True),
        ("~", None),
        ("", None),
        ("2001-01-01", "2001-01-01"),
        ("'064'", "064"),
        ('"no"', "no"),
        ("bpe:4096", "bpe:4096"),
        ("1.2.3", "1.2.3"),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert repr(parse(text, "x")) == repr(value)
    assert repr(parse(dump([value]), "x")) == repr([value])


# YAML 1.1 reads these as 52, 128, 16, text, 5, 1000, 1000.5, 45296 and 0.
@pytest.mark.parametrize(
    ("text", "hint"),
    [
        *[("064", "such as 64,"), ("2:08", ""), ("0x10", ""), ("0o7", ""), ("0b101", "")],
        *[("1_000", "such as 1000,"), ("1_000.5", ""), ("12:34:56", ""), ("-00", ""), ("089", "")],
    ],
)
@pytest.mark.parametrize("form", ["{}", "[1, {}]", "{{a: {}}}"])
def test_numbers_of_other_notations_are_refused(text: str, hint: str, form: str) -> None:
    with pytest.raises(InputError, match=f"'{text}' could be read as several numbers: ") as caught:
        parse(form.format(text), "x")
    assert f"write a decimal number{hint and f' {hint}'}" in str(caught.value)
    assert "in quotes if it is text" in str(caught.value)
    assert parse(dump(text), "x") == text


@pytest.mark.parametrize("text", ["yes", "No", "ON", "off"])
def test_other_words_for_true_and_false_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"'{text}': write true or false, or put it in quotes"):
        parse(f"a: {text}", "x")
    assert parse(dump({"a": text}), "x") == {"a": text}


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "!!python/name:os.system", "!!int x", "9" * 5000])
def test_what_is_refused_besides(text: str) -> None:
    with pytest.raises(InputError, match=r"^x: not valid YAML: "):
        parse(text, "x")


@pytest.mark.parametrize("text", ["text:notes #2", "#2", "a # b # c", "'x' #y", "[a #b, c]"])
def test_a_value_without_comments(text: str) -> None:
    expected = ["a #b", "c"] if text.startswith("[") else text
    if text == "'x' #y":
        with pytest.raises(InputError):
            parse(text, "x", comments=False)
    else:
        assert parse(text, "x", comments=False) == expected


def test_a_comment_may_not_cut_a_path_off() -> None:
    for path in ("text:notes", "jsonl:a.jsonl", "my/tokenizer", "~/x"):
        with pytest.raises(InputError, match=f"a comment follows the path '{path}': put the path"):
            parse(f"a: 1\nb: {path} #2\n", "x")
        assert parse(f"b: '{path} #2'  # fine\n", "x") == {"b": f"{path} #2"}
    assert parse("a: pydocs  # that of Python\nb: text:notes\n# fine\n", "x") == {
        "a": "pydocs",
        "b": "text:notes",
    }


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    | st.from_regex(r"[-+]?[0-9_:.xobe]{1,8}|yes|No|on|text: ?x( #2)?", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    # repr, so that nan equals nan, and 1 differs from 1.0 and from True
    assert repr(parse(dump({"value": value}), "dump")) == repr({"value": value})
