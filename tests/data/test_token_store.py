from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import make_corpus

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder
from contextlm.data import token_store
from contextlm.data.corpus import Corpus
from contextlm.data.pieces import pieces
from contextlm.data.token_store import build_token_store, repeated_documents
from contextlm.data.tokenizers import encode, load_tokenizer

SPLITS = ("train", "validation")


def files(folder: Path) -> tuple[Path, Path]:
    """The one token file in `folder`, and its sidecar."""
    (binary,) = folder.glob("*.bin")
    (sidecar,) = folder.glob("*.json")
    assert binary.stem == sidecar.stem
    assert len(list(folder.iterdir())) == 2, "nothing else is left behind"
    return binary, sidecar


def expected_ids(corpus: Corpus, tokenizer: Any) -> list[int]:
    end = [tokenizer.eos_token_id] if corpus.append_end_of_text else []
    return [i for ids in encode(tokenizer, corpus.train) for i in ids + end]


@pytest.mark.parametrize("append_end_of_text", [True, False])
def test_a_store_holds_the_documents_in_order(
    tokenizer: Any, tmp_path: Path, append_end_of_text: bool
) -> None:
    corpus = make_corpus(["one two", "", "drei ☕", "fünf\n"], None, append_end_of_text)
    store = build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    assert isinstance(store.tokens, np.memmap)
    assert store.tokens.tolist() == expected_ids(corpus, tokenizer)
    assert len(store) == len(store.tokens)
    ends = 1 if append_end_of_text else 0
    for index, text in enumerate(corpus.train):
        start, stop = store.document_offsets[index : index + 2]
        assert tokenizer.decode(store.tokens[start : stop - ends].tolist()) == text
    assert store.bytes == len("".join(corpus.train).encode())
    assert store.name == "small"
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


def test_byte_count(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    store = build_token_store(corpus, "train", tokenizer, tmp_path)
    sizes = [len(text.encode()) for text in corpus.train]
    for index, offset in enumerate(store.document_offsets):
        assert store.byte_count(int(offset)) == sum(sizes[:index])
    counts = [store.byte_count(n) for n in range(len(store) + 1)]
    assert counts == sorted(counts)
    for index in range(len(sizes)):
        start, stop = store.document_offsets[index : index + 2]
        of_text = stop - start - 1
        for n in range(of_text + 1):
            inside = sizes[index] * n // of_text if of_text else 0
            assert counts[start + n] == sum(sizes[:index]) + inside
        assert counts[stop] == counts[stop - 1], "an end-of-text token stands for no bytes"
    for wrong in (-1, len(store) + 1):
        with pytest.raises(ValueError, match="tokens must lie in"):
            store.byte_count(wrong)


def test_byte_count_without_ends_of_text(tokenizer: Any, tmp_path: Path) -> None:
    corpus = make_corpus(["", "qq", "", "zz zz"], None, append_end_of_text=False)
    store = build_token_store(corpus, "train", tokenizer, tmp_path)
    assert [store.byte_count(n) for n in range(len(store) + 1)] == list(range(8))


def bigger(tokenizer: Any, entries: int) -> Any:
    have = token_store.vocab_entries(tokenizer)
    tokenizer.add_tokens([f"<new {i}>" for i in range(entries - have)])
    return tokenizer


@pytest.mark.parametrize(("entries", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_smallest_type_that_fits(
    tokenizer: Any, tmp_path: Path, entries: int, dtype: type
) -> None:
    tokenizer = bigger(tokenizer, entries)
    largest = tokenizer.convert_ids_to_tokens(entries - 1)
    store = build_token_store(make_corpus([largest]), "train", tokenizer, tmp_path)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [entries - 1, tokenizer.eos_token_id]
    assert store.path.stat().st_size == 2 * np.dtype(dtype).itemsize


def never() -> Any:
    raise AssertionError("the documents were read again")


def test_a_whole_store_is_reused_without_reading_the_corpus(
    corpus: Corpus, tokenizer: Any, tmp_path: Path
) -> None:
    first = build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    times = [path.stat().st_mtime_ns for path in files(tmp_path / "store")]
    again = build_token_store(replace(corpus, read=never), "train", tokenizer, tmp_path / "store")
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.facts == first.facts
    assert [path.stat().st_mtime_ns for path in files(tmp_path / "store")] == times


def test_changed_inputs_give_another_store(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    def tokens(corpus: Corpus, tokenizer: Any) -> list[int]:
        ids: list[int] = build_token_store(corpus, "train", tokenizer, tmp_path).tokens.tolist()
        assert ids == expected_ids(corpus, tokenizer)
        return ids

    other_text = make_corpus([*corpus.train[:-1], "The end\n"])
    other_ends = replace(corpus, append_end_of_text=False)
    other_tokenizer = load_tokenizer("bpe:257", corpus, tmp_path / "cache")
    results = [
        tokens(corpus, tokenizer),
        tokens(other_text, tokenizer),
        tokens(other_ends, tokenizer),
        tokens(corpus, other_tokenizer),
        tokens(corpus, tokenizer),
    ]
    assert results[0] == results[4]
    assert len({tuple(ids) for ids in results}) == 4


@pytest.mark.parametrize("damage", ["a flipped bit", "no token file", "half a sidecar"])
def test_a_damaged_store_is_made_anew(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "store"
    facts = build_token_store(corpus, "train", tokenizer, folder).facts
    binary, sidecar = files(folder)
    before = [binary.read_bytes(), sidecar.read_bytes()]
    if damage == "a flipped bit":
        binary.write_bytes(bytes([before[0][0] ^ 1]) + before[0][1:])
    elif damage == "no token file":
        binary.unlink()
    else:
        sidecar.write_bytes(before[1][:40])
    store = build_token_store(corpus, "train", tokenizer, folder)
    assert store.tokens.tolist() == expected_ids(corpus, tokenizer)
    assert store.facts == facts
    assert [binary.read_bytes(), sidecar.read_bytes()] == before


def test_an_interrupted_build_leaves_nothing(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_store, "document_key", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_split_without_tokens_is_named(tokenizer: Any, tmp_path: Path) -> None:
    corpus = make_corpus(["", ""], None, append_end_of_text=False)
    with pytest.raises(InputError, match="'small': its train split has no tokens"):
        build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_batches_and_pieces_change_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "\n".join(["a line of words ☕", "", "  indented", "x", "y\r", "z"] * 20)
    corpus = make_corpus([long, "short", "", "w" * 200, long + "\n"] * 3)
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 150)
    monkeypatch.setattr(token_store, "_LONGEST_PIECE", 40)
    store = build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    assert store.tokens.tolist() == expected_ids(corpus, tokenizer)
    assert len(list(pieces(tokenizer, [long], 40))) > 3


def test_repeated_documents_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    corpus = make_corpus(["a b", "A  b\n", "c", "c", "d"], ["c", "e", "d ", "e"])
    stores = [build_token_store(corpus, split, tokenizer, tmp_path) for split in SPLITS]
    assert repeated_documents(*stores) == (5, 2)
    other = build_token_store(make_corpus(["x"]), "train", tokenizer, tmp_path)
    assert repeated_documents(other, stores[1]) == (1, 0)


@pytest.mark.parametrize("spec", ["bpe:300", "word:60"])
def test_whether_tokens_keep_the_text_is_found_out_by_decoding(tmp_path: Path, spec: str) -> None:
    from tokenizers import normalizers

    corpus = make_corpus(["the cat <|endoftext|> sat"] * 3, ["A text", "with (signs)\n"])
    tokenizer: Any = load_tokenizer(spec, corpus, tmp_path)
    store = build_token_store(corpus, "validation", tokenizer, tmp_path)
    assert store.facts.keeps_text == (spec == "bpe:300")
    # Others of the same class that lose something: case, characters.
    for normalizer in (normalizers.Lowercase(), normalizers.Replace("(", "")):
        tokenizer.backend_tokenizer.normalizer = normalizer
        assert not build_token_store(corpus, "validation", tokenizer, tmp_path).facts.keeps_text
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    store = build_token_store(corpus, "validation", tokenizer, tmp_path)
    assert store.facts.keeps_text == (spec == "bpe:300"), "what changes nothing here loses nothing"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert not cache_folder().exists()
    monkeypatch.setenv("CONTEXTLM_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "contextlm"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"CONTEXTLM_CACHE: .*file: not a folder"):
        cache_folder()
