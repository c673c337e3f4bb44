"""What a corpus is, and which of its text is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from contextlm.base.errors import InputError

VALIDATION_SHARE = 0.05
VALIDATION_SHARE_OF_LINES = 0.2


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in two splits of documents.

    Attributes:
        name: what a report names: the corpus and the edition that was really read.
        read: gives the training and the validation documents, each in a fixed order. Called when
            they are first looked at: never, where their tokens are stored.
        append_end_of_text: whether a document's tokens are followed by the end-of-text token.
        fingerprint: hexadecimal; changes when the documents or the way of reading them changes.
    """

    name: str
    read: Callable[[], tuple[Sequence[str], Sequence[str]]]
    append_end_of_text: bool
    fingerprint: str

    @cached_property
    def _splits(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.read()

    @property
    def train(self) -> Sequence[str]:
        return self._splits[0]

    @property
    def validation(self) -> Sequence[str]:
        return self._splits[1]

    def documents(self, split: str) -> Sequence[str]:
        """The documents of `split`, which is ``"train"`` or ``"validation"``."""
        return {"train": self.train, "validation": self.validation}[split]


def text_fingerprint(version: str, *splits: Iterable[str]) -> str:
    """SHA-256 (hexadecimal) of the documents, their borders, and the reader's `version`."""
    digest = hashlib.sha256(version.encode())
    for split in splits:
        digest.update(b"split")
        for document in split:
            data = document.encode("utf-8")
            digest.update(f"\0{len(data)}\0".encode())
            digest.update(data)
    return digest.hexdigest()


def document_key(text: str) -> str:
    """The same 16 hexadecimal digits for texts that differ in white space and case only."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:16]


def is_held_out(text: str, share: float) -> bool:
    """Whether `text` is in the held-out `share` of all texts: its `document_key` decides."""
    number = int(document_key(text), 16)
    # Whole percents by one part of the hash, their fractions by another.
    return number % 100 + (number >> 32) % 10**6 / 10**6 < 100 * share


def split_documents(
    texts: Sequence[str], where: str, share: float = VALIDATION_SHARE
) -> tuple[list[str], list[str]]:
    """Hold out about `share` of the characters; copies of a document are all on one side.

    Documents are taken in the order of their `document_key` as long as each brings the held-out
    text nearer to the share. Of few documents at least one is taken: the smallest, where none comes
    near the share. One document alone is cut at a line's end or else between words, and so is what
    remains where all other documents together are less than half the share.

    Args:
        texts: with some text in each. The splits keep their order.
        where: opens the message.
        share: 0 holds out nothing.

    Raises:
        InputError: there are fewer than two characters.
    """
    if share == 0:
        return list(texts), []
    keys = [document_key(text) for text in texts]
    sizes = dict.fromkeys(keys, 0)
    for key, text in zip(keys, texts, strict=True):
        sizes[key] += len(text)
    target = share * sum(sizes.values())
    held: set[str] = set()
    missing = target
    for key in sorted(sizes):
        if sizes[key] < 2 * missing and len(held) + 1 < len(sizes):
            held.add(key)
            missing -= sizes[key]
    for key in sorted(sizes.keys() - held, key=lambda key: (sizes[key], key)):
        if missing > target / 2 and len(held) + 1 < len(sizes):
            held.add(key)
            missing -= sizes[key]
    train = [text for key, text in zip(keys, texts, strict=True) if key not in held]
    validation = [text for key, text in zip(keys, texts, strict=True) if key in held]
    if missing <= target / 2:
        return train, validation
    cuts = [_cut(text, missing / sum(map(len, train)), where) for text in train]
    return [head for head, _ in cuts], [*validation, *(tail for _, tail in cuts)]


def _cut(text: str, share: float, where: str) -> tuple[str, str]:
    """Both parts hold some text."""
    if len(text) < 2:
        raise InputError(f"{where}: too short to split into train and validation text")
    at = min(max(int(len(text) * (1 - share)), 1), len(text) - 1)
    lowest = max(1, at - max(80, len(text) // 20))
    for mark in ("\n", " "):
        found = text.rfind(mark, lowest - 1, at)
        if found >= 0:
            return text[: found + 1], text[found + 1 :]
    return text[:at], text[at:]


def line_corpus(corpus: Corpus, share: float | None) -> Corpus:
    """The corpus whose documents are the lines of `corpus`, those of its two splits pooled.

    White space around a line is dropped, and so are blank lines. `is_held_out` says which side a
    line is on, so that copies of a line are all on one. Lines keep their order. An end-of-text
    token follows each, as the last target of its sample.

    Args:
        corpus: whose documents are read when the lines are.
        share: of the different lines, held out; None: each split keeps its own lines.
    """

    def read() -> tuple[list[str], list[str]]:
        train, validation = _lines(corpus.train), _lines(corpus.validation)
        if share is None:
            return train, validation
        every = [*train, *validation]
        return (
            [line for line in every if not is_held_out(line, share)],
            [line for line in every if is_held_out(line, share)],
        )

    percents = "" if share is None else f" split {100 * (1 - share):g}/{100 * share:g}"
    return Corpus(
        name=f"{corpus.name}, lines{percents}",
        read=read,
        append_end_of_text=True,
        fingerprint=hashlib.sha256(f"{corpus.fingerprint} lines 2 {share}".encode()).hexdigest(),
    )


def _lines(documents: Iterable[str]) -> list[str]:
    lines = (line.strip() for document in documents for line in document.split("\n"))
    return [line for line in lines if line]


def first_documents(corpus: Corpus, documents: tuple[int, int]) -> Corpus:
    """`corpus` with only its first ``documents = (train, validation)`` documents.

    Raises:
        InputError: a count is below 1; or, when the documents are read, there are fewer.
    """
    counts = checked_counts(documents)

    def read() -> tuple[Sequence[str], Sequence[str]]:
        for split, count in zip(("train", "validation"), counts, strict=True):
            available = len(corpus.documents(split))
            if available < count:
                raise InputError(
                    f"corpus {corpus.name!r} has {available} {split} documents, "
                    f"{count} were asked for"
                )
        return corpus.train[: counts[0]], corpus.validation[: counts[1]]

    limited = hashlib.sha256(f"{corpus.fingerprint} first {counts[0]} {counts[1]}".encode())
    return Corpus(corpus.name, read, corpus.append_end_of_text, limited.hexdigest())


def checked_counts(documents: tuple[int, int]) -> tuple[int, int]:
    """`documents` when both counts are at least 1, else an `InputError`."""
    for split, count in zip(("train", "validation"), documents, strict=True):
        if count < 1:
            raise InputError(f"documents: {split} must be at least 1, got {count}")
    return documents
