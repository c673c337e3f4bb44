from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import make_corpus

from contextlm.base.errors import InputError, RunError
from contextlm.base.visible import shown
from contextlm.data import tokenizer_training as training
from contextlm.data import tokenizers as ours
from contextlm.data.corpus import Corpus
from contextlm.data.tokenizer_training import END_OF_TEXT, train_bpe, train_word_level
from contextlm.data.tokenizers import (
    encode,
    known_vocab_size,
    load_tokenizer,
    tokenizer_hash,
    vocab_entries,
)

ODD_TEXTS = [
    "",
    " ",
    "  two spaces , and a comma .",
    "emoji 😀👩‍👩‍👧 ☕",
    "\r\n\t\0\x7f\x85\u2028\ufeff\ufffd",
    "é e\u0301 ﬁ 中文 العربية",
    "\U0010ffff" * 3,
    "x" * 5000,
    f"a {END_OF_TEXT} b",
]

_BPE = ours._wrap(train_bpe(["some few words and more"], 270), training.all_roles(END_OF_TEXT))
_ALPHABET = "abAB_1 \n\t.,'<>€☕é中"


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_bpe_gives_every_text_back(text: str) -> None:
    assert _BPE.decode(encode(_BPE, [text])[0]) == text


def test_bpe_gives_odd_texts_back(tokenizer: Any) -> None:
    ids = encode(tokenizer, ODD_TEXTS)
    assert [tokenizer.decode(row) for row in ids] == ODD_TEXTS
    assert ids[0] == []
    assert max(max(row) for row in ids if row) < vocab_entries(tokenizer) <= 300


@pytest.mark.parametrize("spec", ["bpe:300", "word:40", "folder"])
def test_the_spelling_of_a_special_token_is_ordinary_text(tmp_path: Path, spec: str) -> None:
    texts = ["<p>one</s> two <|endoftext|> <unk> <pad> three</p>"]
    corpus = make_corpus(texts * 3)
    if spec == "folder":  # a saved tokenizer that would find them, as those of the hub do
        saved: Any = load_tokenizer("bpe:300", corpus, tmp_path)
        saved.add_special_tokens({"additional_special_tokens": ["</s>", "<pad>"]})
        assert saved(texts)["input_ids"][0].count(saved.eos_token_id) == 1
        saved.save_pretrained(tmp_path / "saved")
        spec = str(tmp_path / "saved")
    tokenizer: Any = load_tokenizer(spec, corpus, tmp_path)
    (ids,) = encode(tokenizer, texts)
    assert not set(ids) & set(tokenizer.all_special_ids)
    if spec != "word:40":
        assert tokenizer.decode(ids, skip_special_tokens=True) == texts[0]
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"), corpus, tmp_path)
    assert encode(again, texts) == [ids]


def test_bpe_learns_from_the_train_documents_only(tmp_path: Path) -> None:
    corpus = make_corpus(["abcabcabc " * 20], ["xyzxyzxyz " * 20])
    vocabulary = load_tokenizer("bpe:262", corpus, tmp_path).get_vocab()
    assert "abc" in vocabulary
    assert "xyz" not in vocabulary


def test_an_endless_word_is_learnt_from_in_parts(tmp_path: Path) -> None:
    corpus = make_corpus(["ab" * 100_000, " " * 5000])
    tokenizer = load_tokenizer("bpe:270", corpus, tmp_path)
    assert "abab" in tokenizer.get_vocab()
    ids = encode(tokenizer, corpus.train)
    assert [tokenizer.decode(row) for row in ids] == list(corpus.train)


def words_of(text: str) -> list[str]:
    """Words and punctuation marks, character by character."""
    words: list[str] = []
    inside = False
    for character in text:
        letter = character.isalnum() or character == "_"
        if letter and inside:
            words[-1] += character
        elif not character.isspace():
            words.append(character)
        inside = letter
    return words


@given(st.lists(st.text(st.sampled_from(_ALPHABET)), min_size=1), st.integers(5, 12))
@settings(max_examples=200, deadline=None)
def test_word_level_is_a_table_of_the_most_frequent_words(texts: list[str], size: int) -> None:
    tokenizer = ours._wrap(train_word_level(texts, size), training.WORD_ROLES)
    counts = Counter(word for text in texts for word in words_of(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - 4]
    table = {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3}
    table |= {word: 4 + rank for rank, word in enumerate(ranked)}
    assert tokenizer.get_vocab() == table
    ids = encode(tokenizer, texts)
    assert ids == [[table.get(word, 1) for word in words_of(text)] for text in texts]
    for text, row in zip(texts, ids, strict=True):
        known = [word if word in table else "<unk>" for word in words_of(text)]
        assert tokenizer.decode(row) == " ".join(known)


def test_word_level_learns_from_the_train_documents_only(tmp_path: Path) -> None:
    corpus = make_corpus(["seen often, seen"], ["held out held out held out"])
    tokenizer = load_tokenizer("word:100", corpus, tmp_path)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == [
        *("<pad>", "<unk>", "<bos>", "<eos>", "seen", ",", "often")
    ]
    assert vocab_entries(tokenizer) == 7
    assert encode(tokenizer, ["seen out.", "Seen", ""]) == [[4, 1, 1], [1], []]


def test_word_level_names_its_special_tokens(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("word:10", corpus, tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, load_tokenizer(str(tmp_path / "saved"), corpus, tmp_path)):
        assert [each.pad_token, each.unk_token, each.bos_token, each.eos_token] == [
            *("<pad>", "<unk>", "<bos>", "<eos>")
        ]
        ids = [each.pad_token_id, each.unk_token_id, each.bos_token_id, each.eos_token_id]
        assert ids == [0, 1, 2, 3]
        assert each.decode([2, 4, 1, 3, 0], skip_special_tokens=True) == "café"


def test_word_level_is_the_same_each_time() -> None:
    """Many equally frequent words, counted by several threads."""
    words = [f"w{n}" for n in range(5000)]
    states = set()
    for seed in range(3):
        texts = random.Random(seed).sample(words, len(words))
        states.add(train_word_level(texts, 3000).to_str())
    assert len(states) == 1


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_a_trained_tokenizer_is_kept_and_reused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cache = tmp_path / "cache"
    first = load_tokenizer(f"{kind}:280", corpus, cache)
    (file,) = (cache / "tokenizers").iterdir()
    whole = file.read_bytes()

    def untrained(*_: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setitem(ours.KINDS, kind, replace(ours.KINDS[kind], train=untrained))
        assert load_tokenizer(f"{kind}:280", corpus, cache).get_vocab() == first.get_vocab()
        for spec, other in ((f"{kind}:281", corpus), (f"{kind}:280", make_corpus(["other"]))):
            with pytest.raises(AssertionError, match="trained again"):
                load_tokenizer(spec, other, cache)
    file.write_bytes(whole[: len(whole) // 2])
    load_tokenizer(f"{kind}:280", corpus, cache)
    assert file.read_bytes() == whole, "a damaged file is made anew, byte for byte"


def test_no_length_is_too_long(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer("bpe:257", corpus, tmp_path)
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(4)
    before = tokenizer_hash(tokenizer)
    assert len(encode(tokenizer, ["a" * 100])[0]) == 100
    assert not caplog.records
    assert tokenizer_hash(tokenizer) == before, "truncation is no part of what a tokenizer is"


def test_the_hash_tells_tokenizers_apart(corpus: Corpus, tmp_path: Path) -> None:
    hashes = {tokenizer_hash(load_tokenizer(f"bpe:{n}", corpus, tmp_path)) for n in (257, 258, 257)}
    assert len(hashes) == 2


@pytest.mark.parametrize("saved", [True, False], ids=["a saved tokenizer", "tokenizer.json only"])
def test_a_folder(tokenizer: Any, corpus: Corpus, tmp_path: Path, saved: bool) -> None:
    folder = tmp_path / "mine"
    if saved:
        tokenizer.save_pretrained(folder)
    else:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    again = load_tokenizer(str(folder), corpus, tmp_path)
    assert encode(again, ODD_TEXTS) == encode(tokenizer, ODD_TEXTS)
    assert [again.decode(row) for row in encode(again, ODD_TEXTS)] == ODD_TEXTS
    assert (again.eos_token_id, again.pad_token_id) == (0, 0)
    assert known_vocab_size(str(folder)) == vocab_entries(tokenizer)


def test_named_tokenizers_come_from_the_local_folder_first(
    tokenizer: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokenizers" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    monkeypatch.setenv("CONTEXTLM_DATA", str(tmp_path))
    assert load_tokenizer("gpt2", corpus, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_named_tokenizers_come_from_the_hub_else(
    tokenizer: Any, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    asked = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, name, local_files_only))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer("pythia", corpus, tmp_path).get_vocab() == tokenizer.get_vocab()
    assert asked == [("EleutherAI/pythia-70m", "tokenizer.json", False)]


def test_without_a_network_one_line_says_what_to_do(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, name: str, local_files_only: bool) -> str:
        assert local_files_only
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RunError, match=r"tokenizer 'gpt2': the hub .* could not be reached.*bpe:S"):
        load_tokenizer("gpt2", corpus, tmp_path)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("bpe:256", "at least 257"),
        ("bpe:999999999", "at most 1,000,000"),
        ("bep:512", "did you mean 'bpe:512'"),
        ("bpe", "whole number"),
        ("word:4", "at least 5 (padding, unknown, beginning, end and one word)"),
        ("word", "expected word:SIZE with a whole number, e.g. word:1000"),
        ("bpe:٣٠٠", "whole number"),
        ("gtp2", "did you mean 'gpt2'"),
        ("no/such/folder", "no such folder"),
        ("", "unknown tokenizer"),
    ],
)
def test_a_bad_spec_is_named(corpus: Corpus, tmp_path: Path, spec: str, reason: str) -> None:
    for call in (lambda: known_vocab_size(spec), lambda: load_tokenizer(spec, corpus, tmp_path)):
        with pytest.raises(InputError) as caught:
            call()
        assert shown(spec) in str(caught.value)
        assert reason in str(caught.value)


def test_a_bad_folder_is_named(tokenizer: Any, corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()

    def problem() -> str:
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(folder), corpus, tmp_path)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no tokenizer.json" in problem()
    assert known_vocab_size(str(folder)) is None
    file = folder / "tokenizer.json"
    file.write_text('{"model": 1}', "utf-8")
    assert "not a tokenizer" in problem()
    state = tokenizer.backend_tokenizer.to_str().replace(END_OF_TEXT, "<other>")
    file.write_text(state, "utf-8")
    assert "has no end-of-text entry" in problem()
    shutil.copy(file, folder / "tokenizer_config.json")
    file.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Nonesuch"}))
    assert "cannot be loaded" in problem()


@pytest.mark.parametrize(("before", "after"), [(None, "false"), ("0", "0"), ("true", "true")])
def test_parallelism_is_left_off_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setattr(training, "_set_here", set())
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    for _ in range(2):
        with training.parallel_tokenizers():
            assert os.environ[name] == (before or "true")
        assert os.environ[name] == after
