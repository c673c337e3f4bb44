"""Corpora by name. Nothing here imports torch, transformers or datasets until it is needed."""

from __future__ import annotations

from contextlm.base.errors import unknown_name
from contextlm.data.corpus import Corpus, first_documents
from contextlm.data.local import jsonl_corpus, text_corpus
from contextlm.data.named import pile, ultrachat, wikitext
from contextlm.data.pydocs import pydocs
from contextlm.data.synthetic import find_task, synthetic

__all__ = ["CORPORA", "Corpus", "load_corpus"]

CORPORA = {
    "pydocs": "docstrings and help topics of the running Python; on every machine, no download",
    "wikitext-2": "Wikipedia articles, 2 million words; CONTEXTLM_DATA or the hub",
    "wikitext-103": "Wikipedia articles, 103 million words; CONTEXTLM_DATA or the hub",
    "ultrachat": "dialogues: samples 0-1999 to train, 50000-50019 to validate; the hub",
    "pile": "the Pile without copyrighted parts, streamed in order; the hub",
    "recall:PAIRS": "made up: pairs of keys and values, then the keys (unit: answers)",
    "passkey:LENGTH": "made up: four digits in noise of up to LENGTH words (unit: answers)",
    "needles:NEEDLES": "made up: up to 32 named numbers in 256 words (unit: answers)",
    "text:PATH": "your own UTF-8 text: a file, or a folder of .txt, .md and .rst files",
    "jsonl:PATH": "your own JSON lines with 'text' or 'messages'",
}


def load_corpus(name: str, documents: tuple[int, int] | None = None) -> Corpus:
    """The corpus called `name`: one of `CORPORA`.

    Args:
        name: a named corpus, one of made-up tasks, ``text:PATH`` or ``jsonl:PATH``.
        documents: keep only the first ``(train, validation)`` documents of the splits. For
            ``ultrachat`` and ``pile`` they say where the slices lie, for tasks how many are made.

    Raises:
        InputError: an unknown name, a path or file that cannot be used, too few documents.
        RunError: the hub could not be reached.
    """
    kind, colon, location = name.partition(":")
    if name == "ultrachat":
        return ultrachat(documents)
    if name == "pile":
        return pile(documents)
    task = find_task(name)
    if task is not None:
        return synthetic(task, documents)
    if name == "pydocs":
        corpus = pydocs()
    elif name in {"wikitext-2", "wikitext-103"}:
        corpus = wikitext(name)
    elif kind == "text" and colon:
        corpus = text_corpus(location)
    elif kind == "jsonl" and colon:
        corpus = jsonl_corpus(location)
    else:
        raise unknown_name("corpus", name, CORPORA)
    return corpus if documents is None else first_documents(corpus, documents)
