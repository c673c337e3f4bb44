from __future__ import annotations

import json
from pathlib import Path

import pytest

from contextlm.base.errors import InputError
from contextlm.data.corpora import load_corpus, whole_corpus


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def jsonl(path: Path, *values: object) -> Path:
    return write(path, "".join(json.dumps(value) + "\n" for value in values))


def problem(name: str, documents: tuple[int, int] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(name, documents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_read_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    names = [f"{folder}/{i:02}.md" for folder in "ba" for i in range(30)]
    for name in [*names, "z.TXT", "sub/deep/x.rst"]:
        write(tmp_path / "notes" / name, f"text of {name}\n")
    for name in (".hidden.txt", ".git/config.txt", "code.py"):
        write(tmp_path / "notes" / name, "not this\n")
    write(tmp_path / "notes/blank.txt", " \n")
    corpus = load_corpus(f"text:{tmp_path / 'notes'}")
    every = sorted([*names, "z.TXT", "sub/deep/x.rst"])
    texts = [f"text of {name}\n" for name in every]
    held_out = set(corpus.validation)
    assert 2 <= len(held_out) <= 4
    assert list(corpus.train) == [text for text in texts if text not in held_out]
    assert list(corpus.validation) == [text for text in texts if text in held_out]
    assert list(whole_corpus(f"text:{tmp_path / 'notes'}").validation) == texts
    assert corpus.name == "text:notes"
    assert corpus.append_end_of_text


def test_a_single_file_is_cut_at_a_line_near_95_percent(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    corpus = load_corpus(f"text:{write(tmp_path / 'any.name', text)}")
    (train,), (validation,) = corpus.train, corpus.validation
    assert train + validation == text
    assert train.endswith("\n")
    assert 0.93 < len(train) / len(text) <= 0.95


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("word " * 1000, "word " * 950),
        ("x" * 1000, "x" * 950),
        ("ab", "a"),
        ("first\n" + "x" * 994, "first\n" + "x" * 944),
    ],
    ids=["one line of words", "one endless word", "two characters", "a border too far away"],
)
def test_odd_single_texts_are_cut_so_that_both_parts_hold_text(
    tmp_path: Path, text: str, train: str
) -> None:
    corpus = load_corpus(f"text:{write(tmp_path / 'odd.txt', text)}")
    assert list(corpus.train) == [train]
    assert list(corpus.validation) == [text[len(train) :]]


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    for place, count in (("notes", 5), ("elsewhere/deep", 50)):
        for n in range(count):
            write(tmp_path / place / f"{n}.txt", f"text {n} of {place}\n")
    (tmp_path / "notes" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes" / "same").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "notes")
    corpus = load_corpus(f"text:{tmp_path / 'notes'}")
    every = [*corpus.train, *corpus.validation]
    assert len(every) == len(set(every)) == 55


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    file = write(tmp_path / "dos.txt", b"\xef\xbb\xbf" + "é one\r\ntwo\r\n".encode() * 10)
    corpus = load_corpus(f"text:{file}")
    assert "".join([*corpus.train, *corpus.validation]) == "é one\ntwo\n" * 10


def test_bad_text_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder / "good.txt", "good\n")
    bad = write(folder / "bad.txt", b"fine\nnot \xff fine\n")
    assert problem(f"text:{folder}") == f"{bad}: line 2: not UTF-8 text"
    binary = write(tmp_path / "binary.txt", b"PNG\0\1")
    assert problem(f"text:{binary}").startswith(f"{binary}: holds a NUL")
    wide = write(tmp_path / "wide.txt", "text".encode("utf-16"))
    assert problem(f"text:{wide}") == f"{wide}: UTF-16 text; save it as UTF-8"
    empty = write(tmp_path / "empty.txt", "")
    assert problem(f"text:{empty}") == f"{empty}: holds no text"
    single = write(tmp_path / "single.txt", "a")
    assert problem(f"text:{single}").startswith(f"{single}: too short")
    (tmp_path / "none").mkdir()
    assert problem(f"text:{tmp_path / 'none'}").startswith(f"{tmp_path / 'none'}: the folder holds")
    missing = tmp_path / "missing"
    assert problem(f"text:{missing}") == f"{missing}: no such file or folder"
    assert "text:PATH" in problem("text:")
    assert "no such file" in problem("text:a\0b")


def test_json_lines_of_both_kinds(tmp_path: Path) -> None:
    values = [{"text": f"plain {i}\u2028still {i}", "extra": 1} for i in range(50)]
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ho"}]}
    lines = [json.dumps(value, ensure_ascii=False) for value in [*values, talk]]
    file = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n\r\n".join(lines))
    corpus = load_corpus(f"jsonl:{file}")
    texts = [*(str(value["text"]) for value in values), "Hi\nHo"]
    assert list(corpus.validation) == [text for text in texts if text not in set(corpus.train)]
    assert sorted([*corpus.train, *corpus.validation]) == sorted(texts)
    assert corpus.name == "jsonl:a.jsonl"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'text': 1}", "not valid JSON"),
        (b"[1]", "expected an object with 'text' or 'messages'"),
        (b'{"text": 3}', "'text' is not a string"),
        (b'{"messages": [{"content": "a"}, {"content": null}]}', "messages[1] has no 'content'"),
        (b'{"text": "a \\ud800"}', "lone surrogate (\\ud800)"),
        (b'{"text": "a \\u0000"}', "NUL"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = write(tmp_path / "bad.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    message = problem(f"jsonl:{file}")
    assert message.startswith(f"{file}: line 3: ")
    assert reason in message


def test_the_fingerprint_follows_the_text(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    before = load_corpus(f"jsonl:{file}").fingerprint
    assert load_corpus(f"jsonl:{file}").fingerprint == before
    jsonl(file, {"text": "one"}, {"text": "twO"})
    assert load_corpus(f"jsonl:{file}").fingerprint != before


def test_only_the_first_documents(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", *({"text": f"document {i}"} for i in range(100)))
    whole, part = load_corpus(f"jsonl:{file}"), load_corpus(f"jsonl:{file}", (10, 2))
    assert list(part.train) == list(whole.train[:10])
    assert list(part.validation) == list(whole.validation[:2])
    assert part.fingerprint != whole.fingerprint
    with pytest.raises(InputError, match="has 5 validation documents, 6 were asked for"):
        len(load_corpus(f"jsonl:{file}", (1, 6)).train)
    assert "validation must be at least 1" in problem(f"jsonl:{file}", (1, 0))


@pytest.mark.parametrize("name", ["pydoc", "wikitext", "text", "wikitext-2:x", ""])
def test_an_unknown_corpus_is_named(name: str) -> None:
    message = problem(name)
    assert message.startswith(f"unknown corpus {name!r}")
    assert "pydocs" in problem("pydoc")
