"""Synthetic tasks: every answer can be found in the text before it, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contextlm.base.errors import InputError
from contextlm.data.corpora import load_corpus
from contextlm.data.samples import Answers
from contextlm.data.synthetic import MARK, QUESTION, find_task
from contextlm.data.token_store import build_token_store
from contextlm.data.tokenizers import load_tokenizer
from contextlm.data.windows import IGNORED

NAMES = ["recall:8", "passkey:40", "needles:8"]
COUNTS = (300, 60)


def solve(kind: str, text: list[str], asked: list[str]) -> list[str]:
    """The answers, found by reading the text alone; `asked` holds None's place for each answer."""
    if kind == "recall":
        known = dict(zip(text[::2], text[1::2], strict=True))
        return [known[word] for word in asked if word != MARK]
    if kind == "passkey":
        at = text.index("key")
        return text[at + 1 : at + 5]
    found = {
        text[at + 1]: text[at + 2 : at + 4] for at, word in enumerate(text) if word == "needle"
    }
    return [digit for word in asked if word != MARK for digit in found[word]]


def parts(document: str) -> tuple[list[str], list[str], list[str]]:
    """The text, what is asked (names and marks), and the answers."""
    words = document.split()
    at = words.index(QUESTION)
    asked, answers, after = [], [], False
    for word in words[at + 1 :]:
        (answers if after else asked).append(word)
        after = word == MARK
    return words[:at], asked, answers


@pytest.mark.parametrize("name", NAMES)
def test_answers_follow_from_the_text(name: str) -> None:
    corpus = load_corpus(name, COUNTS)
    kind = name.partition(":")[0]
    for document in (*corpus.train, *corpus.validation):
        text, asked, answers = parts(document)
        assert MARK not in text
        assert answers == solve(kind, text, asked)
        assert len(answers) == asked.count(MARK)
        names = [word for word in asked if word != MARK]
        assert len(set(names)) == len(names), "nothing is asked twice"


def test_mqar_asks_for_every_pair_in_sixteen_words_a_pair() -> None:
    task = find_task("mqar:16")
    assert task is not None
    assert task.levels == (4, 8, 16)
    places = []
    for number, document in enumerate(load_corpus("mqar:16", COUNTS).train):
        pairs = task.levels[number % 3]
        words = [word for word in document.split() if word != MARK]
        assert len(words) == 16 * pairs
        text, rest = words[: 2 * pairs], words[2 * pairs :]
        known = dict(zip(text[::2], text[1::2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        asked = {at: word for at, word in enumerate(rest[::2]) if word != "w0"}
        assert set(asked.values()) == set(known)
        assert all(rest[2 * at + 1] == known[word] for at, word in asked.items())
        assert rest.count("w0") == len(rest) - 2 * pairs
        answers = [f"{word} {MARK} {known[word]}" for word in asked.values()]
        assert all(answer in document for answer in answers)
        assert document.count(MARK) == pairs
        places += [at / (7 * pairs) for at in asked]
    assert np.median(places) < 0.35, "soon more often than late"


@pytest.mark.parametrize("name", [*NAMES, "mqar:8"])
def test_the_same_documents_come_each_time_and_none_in_both_splits(name: str) -> None:
    corpus, again = load_corpus(name, COUNTS), load_corpus(name, COUNTS)
    more = load_corpus(name, (400, 70))
    assert list(corpus.train) == list(again.train) == list(more.train)[:300]
    assert list(corpus.validation) == list(again.validation) == list(more.validation)[:60]
    assert not set(corpus.train) & set(corpus.validation)
    assert corpus.fingerprint == again.fingerprint != more.fingerprint
    assert len(set(corpus.train)) > 250


def test_levels_come_in_turn() -> None:
    task = find_task("recall:16")
    assert task is not None
    assert task.levels == (2, 4, 8, 16)
    assert task.level_names() == ["2 pairs", "4 pairs", "8 pairs", "16 pairs"]
    pairs = [len(parts(document)[2]) for document in load_corpus("recall:16", COUNTS).train]
    assert pairs == [2, 4, 8, 16] * 75
    lengths = {len(parts(document)[0]) for document in load_corpus("passkey:80", COUNTS).train}
    assert lengths == {10, 20, 40, 80}
    needles = [parts(document)[0] for document in load_corpus("needles:3", COUNTS).train]
    assert {text.count("needle") for text in needles} == {1, 2, 3}
    assert {len(text) for text in needles} == {256}


@pytest.mark.parametrize(
    "name", ["recall", "recall:", "recall:0", "recall:x", "needles:33", "passkey:7", "mqar:257"]
)
def test_bad_sizes_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"corpus '{name}': expected {name.partition(':')[0]}:"):
        load_corpus(name)


# --- samples --------------------------------------------------------------------------------------


def made(
    name: str, folder: Path, length: int | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    corpus = load_corpus(name, COUNTS)
    task = find_task(name)
    assert task is not None
    tokenizer: Any = load_tokenizer(f"word:{task.words + 4}", corpus, folder)
    store = build_token_store(corpus, "validation", tokenizer, folder)
    options = {"pad": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id, **options}
    mark = tokenizer.convert_tokens_to_ids(MARK)
    answers = Answers(store.tokens, store.document_offsets, length, mark=mark, **options)
    return answers, tokenizer, corpus


@pytest.mark.parametrize("name", NAMES)
def test_only_answers_are_scored_and_no_mark_is_read(name: str, tmp_path: Path) -> None:
    samples, tokenizer, corpus = made(name, tmp_path)
    scored = []
    for sample, document in zip(samples, corpus.validation, strict=True):
        text, _, answers = parts(document)
        words = [word for word in document.split() if word != MARK]
        ids = tokenizer.convert_tokens_to_ids(words)
        size = len(words) - 1
        assert sample["input_ids"].tolist()[:size] == ids[:-1]
        assert set(sample["input_ids"].tolist()[size:]) <= {tokenizer.pad_token_id}
        labels = sample["labels"].tolist()
        at = [place for place, label in enumerate(labels) if label != IGNORED]
        assert [labels[place] for place in at] == tokenizer.convert_tokens_to_ids(answers)
        assert [ids[place + 1] for place in at] == [labels[place] for place in at]
        assert min(at) >= len(text), "nothing is scored before the question"
        scored += answers
    assert samples.tokens_covered == len(scored)
    assert samples.stream().tolist() == tokenizer.convert_tokens_to_ids(scored)
    assert tokenizer.unk_token_id not in samples.tokens


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    assert made("recall:8", tmp_path)[0].sequence_length == 32
    assert len(made("recall:8", tmp_path, 40)[0][0]["labels"]) == 40
    with pytest.raises(InputError, match="has 32 tokens, more than sequence_length 31"):
        made("recall:8", tmp_path, 31)
    with pytest.raises(InputError, match="60 documents, 61 samples"):
        made("recall:8", tmp_path, samples=61)
    assert len(made("recall:8", tmp_path, samples=7)[0]) == 7
    with pytest.raises(InputError, match="does not know all of its words"):
        made("recall:8", tmp_path, unknown=9)
    tokens = np.array([3, 4, 5], dtype=np.uint16)
    with pytest.raises(InputError, match="has no answer"):
        Answers(tokens, np.array([0, 3]), None, mark=1, pad=0)
