"""Corpora by name. Nothing here imports torch, transformers or datasets until it is needed."""

from __future__ import annotations

import hashlib

from contextlm.base.errors import InputError, unknown_name
from contextlm.data.corpus import (
    VALIDATION_SHARE,
    VALIDATION_SHARE_OF_LINES,
    Corpus,
    first_documents,
    line_corpus,
)
from contextlm.data.local import jsonl_corpus, text_corpus
from contextlm.data.named import pile, ultrachat, wikitext
from contextlm.data.pydocs import pydocs
from contextlm.data.synthetic import find_task, synthetic

__all__ = ["CORPORA", "Corpus", "load_corpus", "whole_corpus"]

CORPORA = {
    "pydocs": "docstrings and help topics of the running Python; on every machine, no download",
    "wikitext-2": "Wikipedia articles, 2 million words; CONTEXTLM_DATA or the hub",
    "wikitext-103": "Wikipedia articles, 103 million words; CONTEXTLM_DATA or the hub",
    "ultrachat": "dialogues: samples 0-1999 to train, 50000-50019 to validate; the hub",
    "pile": "the Pile without copyrighted parts, streamed in order; the hub",
    "recall:PAIRS": "synthetic: pairs of keys and values, then the keys (unit: answers)",
    "mqar:PAIRS": "synthetic: pairs, then the keys far apart, as in Zoology (unit: answers)",
    "passkey:LENGTH": "synthetic: four digits in noise of up to LENGTH words (unit: answers)",
    "needles:NEEDLES": "synthetic: up to 32 named numbers in 256 words (unit: answers)",
    "text:PATH": "your own UTF-8 text: a file, or a folder of .txt, .md and .rst files",
    "jsonl:PATH": "your own JSON lines with 'text' or 'messages'",
}
_SPLIT_ALREADY = {"wikitext-2", "wikitext-103", "ultrachat", "pile"}
_OWN_TEXT = {"text": text_corpus, "jsonl": jsonl_corpus}


def load_corpus(
    name: str,
    documents: tuple[int, int] | None = None,
    validation: float | str | None = None,
    *,
    lines: bool = False,
) -> Corpus:
    """The corpus called `name`: one of `CORPORA`.

    Args:
        name: a named corpus, one of synthetic tasks, ``text:PATH`` or ``jsonl:PATH``.
        documents: keep only the first ``(train, validation)`` documents of the splits. For
            ``ultrachat`` and ``pile`` they say where the slices lie, for tasks how many are made.
        validation: the share of the text to hold out (5 % by default), for corpora that have no
            validation split of their own; or ``text:PATH`` or ``jsonl:PATH``, all of which is then
            the validation split.
        lines: documents are the corpus's lines, 20 % of which are held out by default.

    Raises:
        InputError: an unknown name, a path or file that cannot be used, too few documents, or a
            `validation` that does not fit the corpus.
        RunError: the hub could not be reached.
    """
    if lines:
        if isinstance(validation, str):
            return line_corpus(load_corpus(name, documents, validation), None)
        return line_corpus(load_corpus(name, documents), validation or VALIDATION_SHARE_OF_LINES)
    kind, _, location = name.partition(":")
    task = find_task(name)
    if task is not None and validation is not None:
        raise InputError(f"validation: corpus {name!r} makes its own")
    if name in _SPLIT_ALREADY and isinstance(validation, float):
        raise InputError(
            f"validation: corpus {name!r} has a validation split of its own; "
            "text:PATH or jsonl:PATH can stand in its place, but no share"
        )
    held_out = whole_corpus(validation) if isinstance(validation, str) else None
    share = validation if isinstance(validation, float) else VALIDATION_SHARE
    if held_out is not None:
        share = 0.0
    if task is not None:
        return synthetic(task, documents)
    if name in {"ultrachat", "pile"}:
        corpus = (ultrachat if name == "ultrachat" else pile)(documents)
        return corpus if held_out is None else _with_validation(corpus, held_out)
    if name == "pydocs":
        corpus = pydocs(share)
    elif name in _SPLIT_ALREADY:
        corpus = wikitext(name)
    elif kind in _OWN_TEXT and name != kind:
        corpus = _OWN_TEXT[kind](location, share)
    else:
        raise unknown_name("corpus", name, CORPORA)
    if held_out is not None:
        corpus = _with_validation(corpus, held_out)
    return corpus if documents is None else first_documents(corpus, documents)


def whole_corpus(name: str) -> Corpus:
    """A user's own text, ``text:PATH`` or ``jsonl:PATH``, all of it as the validation split.

    Raises:
        InputError: another corpus, or a path or file that cannot be used.
    """
    kind, _, location = name.partition(":")
    if kind not in _OWN_TEXT or name == kind:
        raise InputError(f"validation: expected text:PATH, jsonl:PATH or a share, got {name!r}")
    corpus = _OWN_TEXT[kind](location, 0.0)
    return Corpus(
        name=corpus.name,
        read=lambda: (corpus.validation, corpus.train),
        append_end_of_text=True,
        fingerprint=hashlib.sha256(f"{corpus.fingerprint} whole".encode()).hexdigest(),
    )


def _with_validation(corpus: Corpus, held_out: Corpus) -> Corpus:
    known = f"{corpus.fingerprint} validated on {held_out.fingerprint}"
    return Corpus(
        name=f"{corpus.name}, validation {held_out.name}",
        read=lambda: (corpus.train, held_out.validation),
        append_end_of_text=corpus.append_end_of_text,
        fingerprint=hashlib.sha256(known.encode()).hexdigest(),
    )
