"""Corpora of every malformed kind, and those that are merely unusual: the latter work.

Through `--dry-run`, which reads the corpus, trains its tokenizer and makes its token stores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, tries
from hypothesis import given
from hypothesis import strategies as st

RECIPE = """\
name: toy
question: Is this text?
tokenizer: TOKENIZER
unit: UNIT
sequence_length: 8
contenders:
  - {name: base, baseline: true, model: {type: gpt2, n_embd: 8, n_layer: 1, n_head: 1}}
"""
WORDS = ("one two three four five six seven eight nine ten " * 40).strip()


def dry_run(
    place: Path,
    corpus: str,
    *,
    tokenizer: str = "bpe:300",
    unit: str = "windows",
    fine: bool = True,
) -> Any:
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.replace("TOKENIZER", tokenizer).replace("UNIT", unit))
    return attempt("run", recipe, "--set", f"corpus={corpus}", "--dry-run", place=place, fine=fine)


TEXTS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [
            b"",
            b"\n" * 50,
            b"a",
            b"\x00" * 100,
            bytes(range(256)),
            WORDS.encode("utf-16"),
            WORDS.encode("utf-32"),
            "grün ".encode("latin-1") * 50,
            b"\xed\xa0\x80" * 10,
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"\x1b[31m" * 40,
            "\u200b\u2028\u202e".encode() * 40,
            b"%PDF-1.7\n\x00",
            b"PK\x03\x04\xff\xff",
            b" \t \r\n" * 99,
            b"\r" * 300,
        ]
    ),
)


@tries("text corpus")
@given(
    data=TEXTS,
    tokenizer=st.sampled_from(["bpe:300", "bpe:300", "word:20"]),
    unit=st.sampled_from(["windows", "windows", "lines"]),
)
def test_any_text_is_planned_or_refused(
    place: Path, data: bytes, tokenizer: str, unit: str
) -> None:
    file = place / "notes.txt"
    file.write_bytes(data)
    done = dry_run(place, f"text:{file}", tokenizer=tokenizer, unit=unit)
    assert done.code == 0 or "notes.txt" in done.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.one_of(
    JSON.map(json.dumps),
    st.text(max_size=20),
    st.sampled_from(
        [
            '{"text": "\\ud800"}',
            '{"text": "\\u0000"}',
            '{"text": ' + "[" * 3000,
            '{"text": ' + "9" * 5000 + "}",
            '{"text": 1e999}',
            '{"text": "a", "text": 3}',
            '{"messages": [{"content": null}]}',
            '{"messages": {"content": "x"}}',
            '{"messages": []}',
            "\ufeff{}",
            "NaN",
            "{'text': 'x'}",
        ]
    ),
)


@tries("jsonl corpus")
@given(lines=st.lists(LINES, max_size=3), end=st.sampled_from(["\n", "\r\n", "\r", "\u2028"]))
def test_any_json_lines_are_planned_or_refused(place: Path, lines: list[str], end: str) -> None:
    file = place / "notes.jsonl"
    file.write_bytes(end.join(lines).encode("utf-8", "surrogatepass"))
    done = dry_run(place, f"jsonl:{file}")
    assert done.code == 0 or "notes.jsonl" in done.message


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + WORDS.encode(),
        WORDS.replace(" ", "\r\n").encode(),
        WORDS.replace(" ", "\r").encode(),
        WORDS.replace(" ", "").encode() * 40,
        WORDS.encode() * 40,
        ("🐍" * 7 + " " + "🐢" * 5).encode() * 300,
        b"\x1b[31m \x07" * 400,
        (WORDS + "\u202e\u2028\u200b").encode(),
    ],
    ids=["BOM", "CRLF", "CR", "endless word", "endless line", "emoji", "controls", "separators"],
)
def test_text_that_is_merely_unusual_works(place: Path, data: bytes) -> None:
    file = place / "notes.txt"
    file.write_bytes(data)
    assert dry_run(place, f"text:{file}").code == 0


def test_documents_without_tokens_are_passed_over(place: Path) -> None:
    file = place / "notes.jsonl"
    lines = [{"text": ""}, {"text": " \n"}, {"messages": []}, *({"text": WORDS} for _ in range(40))]
    file.write_text("\r\n\r\n".join(map(json.dumps, lines)))
    assert dry_run(place, f"jsonl:{file}").code == 0


def test_places_that_are_no_text(place: Path) -> None:
    folder = place / "folder"
    folder.mkdir()
    (folder / "gone.txt").symlink_to(place / "nowhere")
    for corpus in (
        *("text:no-such", "text:~nobody-x/notes", "text:/dev/zero", f"text:{folder}", "text:"),
        *("jsonl:.", "jsonl:no-such", "txt:recipe.yaml", "x" * 5000, "text:" + "x" * 5000),
        *("jsonl:\udcff", "hub:some/thing", "wikitext-4", "''", "[]", "null"),
    ):
        dry_run(place, corpus, fine=False)


def test_a_pipe_in_a_folder_is_passed_over_and_names_may_be_bytes(place: Path) -> None:
    import os

    folder = place / "mixed"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    for number in range(30):
        (folder / f"{number}.txt").write_text(WORDS)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text(WORDS)
    assert dry_run(place, f"text:{folder}").code == 0
