"""What a corpus is: documents in two splits, and how a split is decided."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from contextlm.base.errors import InputError

VALIDATION_PERCENT = 5


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text in two splits of documents.

    Attributes:
        name: what a report names: the corpus and the edition that was really read.
        train: the training documents, in a fixed order.
        validation: the validation documents; no text is in both splits.
        append_end_of_text: whether a document's tokens are followed by the end-of-text token.
        fingerprint: hexadecimal; changes when the documents or the way of reading them changes.
    """

    name: str
    train: Sequence[str]
    validation: Sequence[str]
    append_end_of_text: bool
    fingerprint: str

    def documents(self, split: str) -> Sequence[str]:
        """The documents of `split`, which is ``"train"`` or ``"validation"``."""
        return {"train": self.train, "validation": self.validation}[split]


class LaterDocuments(Sequence[str]):
    """Documents that are read when first looked at: never, where their tokens are stored."""

    def __init__(self, read: Callable[[], Sequence[str]]) -> None:
        self._read = read

    @cached_property
    def _documents(self) -> Sequence[str]:
        return self._read()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._documents[index]

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)


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


def is_validation(name: str, percent: int = VALIDATION_PERCENT) -> bool:
    """Whether what is called `name` is one of the `percent` held out: its SHA-256 decides."""
    data = name.encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8
    number = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return number % 100 < percent


def split_documents(named: Sequence[tuple[str, str]], where: str) -> tuple[list[str], list[str]]:
    """Split ``(name, text)`` pairs 95/5 into train and validation documents, in their order.

    The hash of a name decides. Where that leaves a split empty, as with a single document, the text
    is cut at 95 % of its characters instead, at a line's end or else between words.

    Raises:
        InputError: there are fewer than two characters; the message names `where`.
    """
    train = [text for name, text in named if not is_validation(name)]
    validation = [text for name, text in named if is_validation(name)]
    if train and validation:
        return train, validation
    return split_by_position([text for _, text in named], where)


def split_by_position(texts: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Cut the row of `texts` in two at 95 % of its characters; both parts hold some text."""
    total = sum(map(len, texts))
    if total < 2:
        raise InputError(f"{where}: too short to split into train and validation text")
    left = min(max(total * (100 - VALIDATION_PERCENT) // 100, 1), total - 1)
    for index, text in enumerate(texts):
        if left < len(text):
            cut = _border_near(text, left)
            head, tail = [text[:cut]], [text[cut:]]
            return [*texts[:index], *(t for t in head if t)], [*tail, *texts[index + 1 :]]
        left -= len(text)
        if left == 0:
            return list(texts[: index + 1]), list(texts[index + 1 :])
    raise AssertionError("the cut lies inside the text")


def _border_near(text: str, target: int) -> int:
    """A line's or a word's border just before `target`, or `target` itself; never 0."""
    lowest = max(1, target - max(80, len(text) // 20))
    for mark in ("\n", " "):
        found = text.rfind(mark, lowest - 1, target)
        if found >= 0:
            return found + 1
    return target


def first_documents(corpus: Corpus, documents: tuple[int, int]) -> Corpus:
    """`corpus` with only its first ``documents = (train, validation)`` documents.

    Raises:
        InputError: a count is below 1, or the corpus has fewer documents (raised when those are
            first read).
    """

    def first(split: str, count: int) -> Sequence[str]:
        every = corpus.documents(split)

        def read() -> Sequence[str]:
            if len(every) < count:
                raise InputError(
                    f"corpus {corpus.name!r} has {len(every)} {split} documents, "
                    f"{count} were asked for"
                )
            return every[:count]

        return LaterDocuments(read) if isinstance(every, LaterDocuments) else read()

    train, validation = checked_counts(documents)
    limited = hashlib.sha256(f"{corpus.fingerprint} first {train} {validation}".encode())
    return Corpus(
        name=corpus.name,
        train=first("train", train),
        validation=first("validation", validation),
        append_end_of_text=corpus.append_end_of_text,
        fingerprint=limited.hexdigest(),
    )


def checked_counts(documents: tuple[int, int]) -> tuple[int, int]:
    """`documents` when both counts are at least 1, else an `InputError`."""
    for split, count in zip(("train", "validation"), documents, strict=True):
        if count < 1:
            raise InputError(f"documents: {split} must be at least 1, got {count}")
    return documents
