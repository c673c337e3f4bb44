"""Which text is held out: about the share asked for, and never a copy of what is trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlm.base.errors import InputError
from contextlm.data.corpora import load_corpus, whole_corpus
from contextlm.data.corpus import document_key, split_documents


def size(texts: list[str]) -> int:
    return sum(map(len, texts))


@pytest.mark.parametrize("count", [20, 21, 40, 100, 1000])
def test_documents_of_any_sizes_come_near_the_share(count: int) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        texts = [f"{seed} {n} " + "x" * draw.randint(500, 2000) for n in range(count)]
        train, validation = split_documents(texts, "x")
        assert sorted(train + validation) == sorted(texts)
        assert 0.025 <= size(validation) / size(texts) <= 0.1


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [
        ([100, 100, 100], 100),  # one whole document
        ([100, 300, 5000], 400),  # 270 are wanted
        ([1000, 900], 900),
        ([10, 1000, 1100], 1010),  # ten characters are no validation text
        ([10, 2000], 100),  # what else there is: a cut in the long one
    ],
)
def test_of_few_documents_one_is_held_out(sizes: list[int], held_out: int) -> None:
    texts = [chr(97 + n) * size for n, size in enumerate(sizes)]
    train, validation = split_documents(texts, "x")
    assert size(train) + size(validation) == sum(sizes)
    assert train
    assert size(validation) == pytest.approx(held_out, abs=40)


DOCUMENTS = st.lists(st.text("ab", min_size=2, max_size=30), min_size=1, max_size=12)


@given(texts=DOCUMENTS, copies=st.integers(1, 3), share=st.floats(0.01, 0.9))
def test_copies_are_on_one_side(texts: list[str], copies: int, share: float) -> None:
    texts = [*texts, *[f" {text.upper()}\n" for text in texts] * (copies - 1)]
    train, validation = split_documents(texts, "x", share)
    assert train
    assert validation
    assert all(train + validation)
    assert size(train) + size(validation) == size(texts)
    if len({*map(document_key, texts)}) > 1 and sorted(train + validation) == sorted(texts):
        assert not {*map(document_key, train)} & {*map(document_key, validation)}
        assert [t for t in texts if t in train] == train


def test_one_document_alone_and_its_copies_are_cut() -> None:
    text = "".join(f"line {n}\n" for n in range(1000))
    train, validation = split_documents([text] * 3, "x")
    assert len(set(train)) == len(set(validation)) == 1
    assert train[0] + validation[0] == text
    assert len(validation[0]) / len(text) == pytest.approx(0.05, abs=0.005)
    with pytest.raises(InputError, match="x: too short to split"):
        split_documents(["a"], "x")


def test_the_split_never_moves() -> None:
    texts = [f"document {n}" for n in range(60)]
    assert split_documents(texts, "x")[1] == ["document 21", "document 22", "document 55"]


# --- validation: a share, or a corpus of its own --------------------------------------------------


def notes(folder: Path, name: str, count: int) -> str:
    for n in range(count):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{n:03}.txt").write_text(f"text {n} of {name}")
    return f"text:{folder / name}"


def test_a_share_is_held_out(tmp_path: Path) -> None:
    mine = notes(tmp_path, "mine", 100)
    corpora = {share: load_corpus(mine, None, share) for share in (0.05, 0.2, 0.5)}
    assert [len(c.validation) for c in corpora.values()] == pytest.approx([5, 20, 50], abs=1)
    assert len({c.fingerprint for c in corpora.values()}) == 3
    assert len(load_corpus("pydocs", None, 0.5).validation) > 100
    lines = load_corpus(mine, None, 0.5, lines=True)
    assert len(lines.validation) > 30


def test_text_of_its_own_is_held_out_whole(tmp_path: Path) -> None:
    mine, theirs = notes(tmp_path, "mine", 30), notes(tmp_path, "theirs", 3)
    corpus = load_corpus(mine, None, theirs)
    assert (len(corpus.train), len(corpus.validation)) == (30, 3)
    assert list(corpus.validation) == list(whole_corpus(theirs).validation)
    assert corpus.name == "text:mine, validation text:theirs"
    assert corpus.fingerprint != load_corpus(mine).fingerprint
    few = load_corpus(mine, (4, 2), theirs)
    assert (len(few.train), len(few.validation)) == (4, 2)
    lines = load_corpus(mine, None, theirs, lines=True)
    assert (len(lines.train), list(lines.validation)) == (30, list(corpus.validation))
    assert len(load_corpus("pydocs", None, theirs).validation) == 3


@pytest.mark.parametrize(
    ("name", "validation", "message"),
    [
        ("recall:8", 0.1, "validation: corpus 'recall:8' makes its own"),
        ("wikitext-2", 0.1, "'wikitext-2' has a validation split of its own"),
        ("pydocs", "wikitext-2", "validation: expected text:PATH, jsonl:PATH or a share"),
        ("pydocs", "text:/no/such", "/no/such: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_named(name: str, validation: float | str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_corpus(name, None, validation)
    assert message in str(caught.value)
