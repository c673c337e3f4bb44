"""A corpus from lists of documents, for tests."""

from __future__ import annotations

from contextlm.data.corpus import Corpus, text_fingerprint


def make_corpus(
    train: list[str], validation: list[str] | None = None, append_end_of_text: bool = True
) -> Corpus:
    validation = validation or ["held out"]
    return Corpus(
        name="small",
        read=lambda: (train, validation),
        append_end_of_text=append_end_of_text,
        fingerprint=text_fingerprint("test", train, validation),
    )
