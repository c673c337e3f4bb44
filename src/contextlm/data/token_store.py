"""Token stores: a split's tokens, memory-mapped, with a sidecar that says what they are.

Two files: ``NAME.bin``, the ids one after the other, little-endian, in the smallest unsigned type
that fits; and ``NAME.json``, the sidecar, written last. A store never holds embeddings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from contextlm.base.errors import InputError
from contextlm.base.files import atomic_open, sha256_of, write_json
from contextlm.data.corpus import Corpus, document_key
from contextlm.data.pieces import encode_pieces
from contextlm.data.tokenizers import encode, keeps_text, tokenizer_hash, vocab_entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 3
_BATCH_CHARACTERS = 1_000_000
_LONGEST_PIECE = 4_000_000


@dataclass(frozen=True)
class Facts:
    """A token store's sidecar.

    Attributes:
        corpus, split: what was tokenised.
        corpus_fingerprint, tokenizer_sha256: what must be unchanged for the store to be reused.
        end_of_text: the id that ends each document, or None.
        dtype: numpy name of the ids' type.
        tokens: how many there are, ends of text included.
        sha256: hexadecimal, of the token file.
        document_offsets: where each document starts, and at last `tokens`.
        document_bytes: UTF-8 bytes of each document's text.
        document_keys: of each document; equal ones differ in white space and case at most.
        keeps_text: whether the tokens of each document decode to the very text: only then is there
            a number of bits per byte.
        format: version of this file.
    """

    corpus: str
    split: str
    corpus_fingerprint: str
    tokenizer_sha256: str
    end_of_text: int | None
    dtype: str
    tokens: int
    sha256: str
    document_offsets: list[int]
    document_bytes: list[int]
    document_keys: list[str]
    keeps_text: bool
    format: int = _FORMAT


class TokenStore:
    """The tokens of one split of a corpus, read-only.

    Attributes:
        name: of the corpus, as reports give it.
        path: of the token file.
        facts: the sidecar.
        tokens: memory-mapped ids, ``[facts.tokens]``, uint16 or uint32.
        document_offsets: int64 ``[documents + 1]``, from 0 to the number of tokens.
        bytes: UTF-8 bytes of all the text.
    """

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path = path
        self.facts = facts
        self.name = facts.corpus
        self.tokens: npt.NDArray[Any] = np.memmap(path, dtype=facts.dtype, mode="r")
        self.document_offsets = np.array(facts.document_offsets, dtype=np.int64)
        self._bytes_before = np.concatenate([[0], np.cumsum(facts.document_bytes, dtype=np.int64)])
        self.bytes = int(self._bytes_before[-1])

    def __len__(self) -> int:
        return self.facts.tokens

    @property
    def documents(self) -> list[npt.NDArray[Any]]:
        """The ids of each document."""
        return [self.tokens[start:end] for start, end in pairwise(self.document_offsets)]

    def byte_count(self, tokens: int) -> int:
        """UTF-8 bytes of the text behind the first `tokens` tokens.

        Exact where a document ends; inside one, its bytes in proportion to its tokens, rounded
        down. An end-of-text token stands for no bytes.

        Raises:
            ValueError: `tokens` is negative or more than the store holds.
        """
        if not 0 <= tokens <= len(self):
            raise ValueError(f"tokens must lie in 0 .. {len(self)}, got {tokens}")
        whole = int(np.searchsorted(self.document_offsets, tokens, side="right")) - 1
        count = int(self._bytes_before[whole])
        if whole == len(self.facts.document_bytes):
            return count
        start, stop = (int(offset) for offset in self.document_offsets[whole : whole + 2])
        of_text = stop - start - (self.facts.end_of_text is not None)
        if of_text == 0:
            return count
        return count + self.facts.document_bytes[whole] * min(tokens - start, of_text) // of_text


def build_token_store(
    corpus: Corpus,
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> TokenStore:
    """The tokens of a corpus's split: the stored ones if they still hold, else made anew.

    Reused when the sidecar names this corpus fingerprint, tokenizer and format, and the token file
    has the SHA-256 that it names. Both files appear whole or not at all.

    Args:
        corpus: where the documents come from; not read when the store is reused.
        split: ``"train"`` or ``"validation"``.
        tokenizer: its end-of-text token follows each document if `corpus` wants that.
        folder: may be shared by all corpora and tokenizers; made if needed.

    Raises:
        InputError: the split gives no tokens.
    """
    expected = {
        "corpus": corpus.name,
        "split": split,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "end_of_text": tokenizer.eos_token_id if corpus.append_end_of_text else None,
        "dtype": "<u2" if vocab_entries(tokenizer) <= 2**16 else "<u4",
        "format": _FORMAT,
    }
    key = hashlib.sha256(json.dumps(expected).encode()).hexdigest()[:16]
    slug = re.sub(r"[^A-Za-z0-9]+", "-", corpus.name).strip("-")[:40]
    path = folder / f"{slug}-{split}-{key}.bin"
    facts = _reusable(path, expected)
    if facts is None:
        facts = _build(path, expected, corpus.documents(split), tokenizer)
    return TokenStore(path, facts)


def _reusable(path: Path, expected: dict[str, Any]) -> Facts | None:
    """The sidecar, if it and the token file are whole and are what is expected."""
    try:
        facts = Facts(**json.loads(path.with_suffix(".json").read_text("utf-8")))
        digest = sha256_of(path)
    except (OSError, ValueError, TypeError):
        return None
    as_expected = all(getattr(facts, field) == value for field, value in expected.items())
    return facts if as_expected and digest == facts.sha256 else None


def _build(
    path: Path,
    expected: dict[str, Any],
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
) -> Facts:
    digest = hashlib.sha256()
    offsets = [0]
    sizes: list[int] = []
    keys: list[str] = []
    kept = True
    end = [] if expected["end_of_text"] is None else [expected["end_of_text"]]
    with atomic_open(path, "wb") as stream:
        for batch in _batches(documents):
            rows = _encode_documents(tokenizer, batch)
            kept = kept and keeps_text(tokenizer, batch, rows)
            for text, ids in zip(batch, rows, strict=True):
                data = np.asarray(ids + end, dtype=expected["dtype"]).tobytes()
                digest.update(data)
                stream.write(data)
                offsets.append(offsets[-1] + len(ids) + len(end))
                sizes.append(len(text.encode("utf-8")))
                keys.append(document_key(text))
        if offsets[-1] == 0:  # raised in here, so that no file is left
            raise InputError(
                f"corpus {expected['corpus']!r}: its {expected['split']} split has no tokens"
            )
    facts = Facts(
        **expected,
        tokens=offsets[-1],
        sha256=digest.hexdigest(),
        document_offsets=offsets,
        document_bytes=sizes,
        document_keys=keys,
        keeps_text=kept,
    )
    write_json(path.with_suffix(".json"), asdict(facts))
    return facts


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    """Runs of documents of about a million characters, as much as is encoded at once."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_documents(tokenizer: PreTrainedTokenizerFast, batch: list[str]) -> list[list[int]]:
    """Token ids of each document; a very long one goes through the tokenizer in pieces."""
    if all(len(text) <= _LONGEST_PIECE for text in batch):
        return encode(tokenizer, batch)
    return [
        [i for ids in encode_pieces(tokenizer, _blocks(text), _LONGEST_PIECE) for i in ids]
        for text in batch
    ]


def _blocks(text: str) -> Iterator[str]:
    """`text` in slices, so that cutting a piece off does not copy all the rest."""
    return (text[at : at + _LONGEST_PIECE] for at in range(0, len(text), _LONGEST_PIECE))


def repeated_documents(train: TokenStore, validation: TokenStore) -> tuple[int, int]:
    """Documents that repeat an earlier one, and those of validation that training holds too.

    Counted without regard to white space and case.
    """
    keys = [*train.facts.document_keys, *validation.facts.document_keys]
    in_training = set(train.facts.document_keys)
    shared = sum(key in in_training for key in validation.facts.document_keys)
    return len(keys) - len(set(keys)), shared
