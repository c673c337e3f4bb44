"""YAML that guesses nothing."""

from __future__ import annotations

import pytest

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
    with pytest.raises(InputError, match="^x: not valid YAML: "):
        parse(text, "x")
