"""The corpora of the source documents, with the documents' own slices.

Their published token counts have no end-of-text tokens, so none are added.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.files import is_folder, with_home
from contextlm.data.corpus import Corpus, checked_counts, text_fingerprint
from contextlm.data.hub import load_split

ULTRACHAT_VALIDATION_START = 50_000
ULTRACHAT_DEFAULT = (2_000, 20)
PILE_DEFAULT = (4_500, 500)
_TITLE = re.compile(r" = (?!=).* = ")


def data_folder() -> Path | None:
    """The folder that ``CONTEXTLM_DATA`` names, or None if it is not set.

    Raises:
        InputError: it names no folder.
    """
    value = os.environ.get("CONTEXTLM_DATA")
    if not value:
        return None
    folder = with_home(value, "CONTEXTLM_DATA")
    if not is_folder(folder):
        raise InputError(f"CONTEXTLM_DATA: {value} is not a folder")
    return folder


def wikitext(name: str) -> Corpus:
    """``wikitext-2`` or ``wikitext-103``: lines kept as they are, blank ones dropped.

    One document per article; all documents in a row are the file without its blank lines. Read from
    ``CONTEXTLM_DATA/<name>/wiki.{train,valid}.{raw,tokens}`` where that is, else from the hub.

    Raises:
        InputError: the local folder lacks a file, or a file is not UTF-8.
        RunError: the hub could not be reached.
    """
    folder = data_folder()
    if folder is not None and (folder / name).is_dir():
        edition, train, validation = _local_wikitext(folder / name)
        label = f"{name} ({edition} edition, from CONTEXTLM_DATA)"
    else:
        config = f"{name}-raw-v1"
        local = f"FOLDER/{name}/wiki.train.tokens and FOLDER/{name}/wiki.valid.tokens"
        train, validation = (
            load_split(
                name, "Salesforce/wikitext", split, _articles_of_rows, local=local, name=config
            )
            for split in ("train", "validation")
        )
        label = f"{name} (raw edition, Salesforce/wikitext)"
    return _corpus(label, train, validation)


def ultrachat(documents: tuple[int, int] | None = None) -> Corpus:
    """``ultrachat``: samples 0 .. n-1 to train on, 50000 .. 50000+m-1 to validate.

    Each document is one dialogue, its messages' contents joined by newlines.

    Args:
        documents: ``(n, m)``; by default the 2,000 and 20 of the source document.

    Raises:
        InputError: a count that is below 1, reaches into the validation samples or past the end.
        RunError: the hub could not be reached.
    """
    train, validation = checked_counts(documents or ULTRACHAT_DEFAULT)
    if train > ULTRACHAT_VALIDATION_START:
        raise InputError(
            f"corpus 'ultrachat': {train} train documents would reach into the validation samples, "
            f"which start at {ULTRACHAT_VALIDATION_START}"
        )
    stop = ULTRACHAT_VALIDATION_START + validation

    def read(samples: Any) -> list[str]:
        if len(samples) < stop:
            raise InputError(
                f"corpus 'ultrachat' has {len(samples)} samples, the first {stop} were asked for"
            )
        wanted = [*range(train), *range(ULTRACHAT_VALIDATION_START, stop)]
        return [_dialogue(sample) for sample in samples.select(wanted)]

    texts = load_split("ultrachat", "HuggingFaceH4/ultrachat_200k", "train_sft", read)
    label = "ultrachat (HuggingFaceH4/ultrachat_200k)"
    return _corpus(label, texts[:train], texts[train:])


def pile(documents: tuple[int, int] | None = None) -> Corpus:
    """``pile``: the first n documents to train on, the next m to validate, streamed in order.

    Args:
        documents: ``(n, m)``. The default of 4,500 and 500 gives several times the 9,000 and 1,000
            samples of 129 tokens that the source document uses.

    Raises:
        InputError: a count that is below 1 or past the end.
        RunError: the hub could not be reached.
    """
    train, validation = checked_counts(documents or PILE_DEFAULT)
    wanted = train + validation

    def read(samples: Iterable[Any]) -> list[str]:
        return [sample["text"] for sample in islice(samples, wanted)]

    texts = load_split("pile", "monology/pile-uncopyrighted", "train", read, streaming=True)
    if len(texts) < wanted:
        raise InputError(f"corpus 'pile' has {len(texts)} documents, {wanted} were asked for")
    return _corpus("pile (monology/pile-uncopyrighted)", texts[:train], texts[train:])


def _corpus(label: str, train: Sequence[str], validation: Sequence[str]) -> Corpus:
    return Corpus(
        name=label,
        read=lambda: (train, validation),
        append_end_of_text=False,
        fingerprint=text_fingerprint("named 1", train, validation),
    )


def _dialogue(sample: Any) -> str:
    return "\n".join(message["content"] for message in sample["messages"])


def _local_wikitext(folder: Path) -> tuple[str, list[str], list[str]]:
    for suffix, edition in (("raw", "raw"), ("tokens", "tokenised")):
        train, validation = (folder / f"wiki.{split}.{suffix}" for split in ("train", "valid"))
        if train.is_file() and validation.is_file():
            return edition, _articles_of_file(train), _articles_of_file(validation)
    raise InputError(f"{folder}: needs wiki.train.raw and wiki.valid.raw, or both with .tokens")


def _articles_of_file(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    documents = articles(text.split("\n"))
    if not documents:
        raise InputError(f"{path}: holds no text")
    return documents


def _articles_of_rows(rows: Any) -> list[str]:
    return articles([row["text"] for row in rows])


def articles(lines: Sequence[str]) -> list[str]:
    """The documents of a WikiText file, given as its lines.

    An article starts at a line `` = Title = `` between blank lines; a line of that form inside a
    paragraph is no title. Joined, the articles are the lines that are not blank, each ended by one
    newline.
    """
    blank = [not line.strip() for line in lines]
    found: list[list[str]] = []
    for index, line in enumerate(lines):
        if blank[index]:
            continue
        alone = all(blank[max(index - 1, 0) : index]) and all(blank[index + 1 : index + 2])
        if not found or (alone and _TITLE.fullmatch(line.removesuffix("\n"))):
            found.append([])
        found[-1].append(line.removesuffix("\n") + "\n")
    return ["".join(article) for article in found]
