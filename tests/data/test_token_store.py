from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import make_corpus

from contextlm.base.errors import InputError
from contextlm.data import token_store
from contextlm.data.corpus import Corpus
from contextlm.data.pieces import pieces
from contextlm.data.token_store import (
    TokenStore,
    build_token_store,
    cache_folder,
    repeated_documents,
)
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


def test_the_splits_do_not_mix(corpus: Corpus, tokenizer: Any, tmp_path: Path) -> None:
    train = build_token_store(corpus, "train", tokenizer, tmp_path)
    validation = build_token_store(corpus, "validation", tokenizer, tmp_path)
    assert train.path != validation.path
    assert tokenizer.decode(validation.tokens[:-1].tolist()) == "held out"


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


def flip_a_bit(binary: Path, sidecar: Path) -> None:
    data = bytearray(binary.read_bytes())
    data[3] ^= 1
    binary.write_bytes(data)


def edit(key: str, value: Any) -> Any:
    def damage(binary: Path, sidecar: Path) -> None:
        facts = json.loads(sidecar.read_text("utf-8"))
        sidecar.write_text(json.dumps({**facts, key: value}), "utf-8")

    return damage


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "a truncated token file": lambda b, s: b.write_bytes(b.read_bytes()[:-2]),
    "an empty token file": lambda b, s: b.write_bytes(b""),
    "no token file": lambda b, s: b.unlink(),
    "no sidecar": lambda b, s: s.unlink(),
    "a truncated sidecar": lambda b, s: s.write_text(s.read_text("utf-8")[:40], "utf-8"),
    "a sidecar of another form": lambda b, s: s.write_text("[]", "utf-8"),
    "an unknown key": edit("surprise", 1),
    "another fingerprint": edit("corpus_fingerprint", "0"),
    "another format": edit("format", 0),
    "other offsets": edit("document_offsets", [0, 1]),
    "another count": edit("tokens", 3),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_store_is_made_anew(
    corpus: Corpus, tokenizer: Any, tmp_path: Path, damage: Any
) -> None:
    folder = tmp_path / "store"
    facts = build_token_store(corpus, "train", tokenizer, folder).facts
    before = [path.read_bytes() for path in files(folder)]
    damage(*files(folder))
    store = build_token_store(corpus, "train", tokenizer, folder)
    assert store.tokens.tolist() == expected_ids(corpus, tokenizer)
    assert store.facts == facts
    assert [path.read_bytes() for path in files(folder)] == before


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


def test_the_sidecar_holds_no_more_than_facts(
    corpus: Corpus, tokenizer: Any, tmp_path: Path
) -> None:
    store = build_token_store(corpus, "train", tokenizer, tmp_path / "store")
    binary, sidecar = files(tmp_path / "store")
    facts = json.loads(sidecar.read_text("utf-8"))
    assert facts["corpus"] == "small"
    assert facts["document_bytes"] == [len(text.encode()) for text in corpus.train]
    assert binary.stat().st_size == 2 * len(store), "ids only"
    reopened = TokenStore(binary, token_store.Facts(**facts))
    assert reopened.tokens.tolist() == store.tokens.tolist()


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
    # Others of the same class that lose something: case, accents, characters.
    for normalizer in (
        *(normalizers.Lowercase(), normalizers.Replace("(", ""), normalizers.Strip()),
        normalizers.Replace("w", "v"),
    ):
        tokenizer.backend_tokenizer.normalizer = normalizer
        assert not build_token_store(corpus, "validation", tokenizer, tmp_path).facts.keeps_text
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    store = build_token_store(corpus, "validation", tokenizer, tmp_path)
    assert store.facts.keeps_text == (spec == "bpe:300"), "what changes nothing here loses nothing"


def test_a_sample_of_many_documents_is_decoded(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(tokenizer: Any, texts: list[str], ids: Any) -> bool:
        seen.extend(texts)
        return True

    monkeypatch.setattr(token_store, "keeps_text", noted)
    monkeypatch.setattr(token_store, "_CHECKED_CHARACTERS", 20)
    texts = [f"text {n:02}" for n in range(40)]
    build_token_store(make_corpus(texts), "train", tokenizer, tmp_path)
    assert seen == [*texts[:3], texts[16], texts[32]]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert not cache_folder().exists()
    monkeypatch.setenv("CONTEXTLM_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "contextlm"


def test_a_cache_that_cannot_be_written_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"CONTEXTLM_CACHE: .*file: not a folder"):
        cache_folder()
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match=r"CONTEXTLM_CACHE: .*file: not a folder"):
        cache_folder()

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "new"))
    with pytest.raises(InputError, match=r"CONTEXTLM_CACHE: .*new: cannot .* Permission denied"):
        cache_folder()
