"""Text from elsewhere, made fit to be shown."""

from __future__ import annotations

from contextlm.base.visible import shortened, shown, visible


def test_text_that_can_be_seen_stays_as_it_is() -> None:
    plain = "grün 日本 👩\u200d🚀 a\tb\n\u3000\xa0"
    assert visible(plain) == plain
    assert visible("\x00\x1b\x85\u2028\u202e\ufeff\ud800\U000e0001") == (
        "\\x00\\x1b\\x85\\u2028\\u202e\\ufeff\\ud800\\U000e0001"
    )


def test_long_values_are_shortened_in_the_middle() -> None:
    assert shown("x" * 9) == repr("x" * 9)
    assert len(shown("a" * 5000 + "z")) == 120
    assert shown("a" * 5000 + "z").endswith("z'")
    assert shown(10**5000) == "a number of thousands of digits"
    assert shortened("abc", 3) == "abc"
