"""One line of text per sample, as document 002 trains (DESIGN 1.1): a corpus's lines, split 80/20.

Shape suffixes: L lines, S samples, N tokens, T tokens of a sample.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from contextlm.base.errors import InputError
from contextlm.data.corpus import Corpus, LaterDocuments, is_validation
from contextlm.data.windows import IGNORED

VALIDATION_PERCENT = 20


def line_corpus(corpus: Corpus) -> Corpus:
    """The corpus whose documents are the lines of `corpus`, those of its two splits pooled.

    White space around a line is dropped, and so are blank lines. A line's text decides where it
    goes, white space counted as one space: equal lines are all on one side, 20 % of the different
    ones in validation. They keep their order. An end-of-text token follows each, as the last target
    of its sample.
    """

    @cache
    def splits() -> tuple[list[str], list[str]]:
        train: list[str] = []
        validation: list[str] = []
        for document in (*corpus.train, *corpus.validation):
            for line in filter(None, map(str.strip, document.split("\n"))):
                held_out = is_validation(" ".join(line.split()), VALIDATION_PERCENT)
                (validation if held_out else train).append(line)
        return train, validation

    return Corpus(
        name=f"{corpus.name}, lines split 80/20",
        train=LaterDocuments(lambda: splits()[0]),
        validation=LaterDocuments(lambda: splits()[1]),
        append_end_of_text=True,
        fingerprint=hashlib.sha256(f"{corpus.fingerprint} lines 1".encode()).hexdigest(),
    )


class Lines(Dataset[dict[str, torch.Tensor]]):
    """Samples of one line each, with targets that are already shifted and padding on the right.

    A line ``w1 .. wn`` has the inputs ``BOS, w1 .. wn`` and the targets ``w1 .. wn, EOS``. More
    than T of them are cut into pieces of T, each a sample of its own: only the first begins with
    BOS, the next ones with the token before their first target, and only the last ends with EOS.
    So each token of a line is a target once, but is predicted from its own piece alone. Items hold
    ``input_ids`` and ``labels``, both int64 ``[T]``, filled up with `pad` and with targets that are
    ignored. Models are causal, so that padding behind a line changes nothing before it, and no
    attention mask is needed.

    The surface is that of `Windows` as far as a recipe of lines needs it; the stream is that of the
    targets.

    Args:
        tokens: of all lines, each line's end-of-text token behind it, ``[N]``, of any integer type;
            read only where looked at.
        offsets: where each line starts, and at last N, ``[L + 1]``.
        sequence_length: T.
        begin: id of BOS.
        pad: id that fills inputs up.
        samples: take exactly the first so many samples; by default all.
        name: of the corpus and split, for messages.

    Raises:
        InputError: a value below 1, or fewer samples than `samples`.
    """

    target_offset = 1
    history = 0

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        sequence_length: int,
        *,
        begin: int,
        pad: int,
        samples: int | None = None,
        name: str = "the corpus",
    ) -> None:
        for key, value in (("sequence_length", sequence_length), ("samples", samples)):
            if value is not None and value < 1:
                raise InputError(f"{key} must be at least 1, got {value}")
        lengths_L = np.diff(offsets)
        pieces_L = -(-lengths_L // sequence_length)
        first_L = np.cumsum(pieces_L) - pieces_L  # each line's first sample
        line_S = np.repeat(np.arange(len(lengths_L)), pieces_L)
        piece_S = np.arange(len(line_S)) - first_L[line_S]
        if samples is not None and len(line_S) < samples:
            raise InputError(
                f"{name} is too small: {len(lengths_L)} lines make {len(line_S)} samples of at "
                f"most {sequence_length} tokens, {samples} samples were asked for"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.begin = begin
        self.pad = pad
        starts_S = offsets[line_S] + piece_S * sequence_length
        stops_S = np.minimum(starts_S + sequence_length, offsets[line_S + 1])
        self._starts_S, self._stops_S = starts_S[:samples], stops_S[:samples]
        self._is_first_S = piece_S[:samples] == 0

    def __len__(self) -> int:
        return len(self._starts_S)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = int(self._starts_S[index]), int(self._stops_S[index])
        before = self.begin if self._is_first_S[index] else int(self.tokens[start - 1])
        targets = torch.from_numpy(np.array(self.tokens[start:stop], dtype=np.int64))
        input_ids = torch.full((self.sequence_length,), self.pad, dtype=torch.int64)
        input_ids[0] = before
        input_ids[1 : len(targets)] = targets[:-1]
        labels = torch.full((self.sequence_length,), IGNORED, dtype=torch.int64)
        labels[: len(targets)] = targets
        return {"input_ids": input_ids, "labels": labels}

    @property
    def tokens_covered(self) -> int:
        """How many targets all samples have together."""
        return int(self._stops_S[-1])

    def stream(self) -> npt.NDArray[Any]:
        """Those targets, one line after the other: a view of `tokens`, ``[tokens_covered]``."""
        return self.tokens[: self.tokens_covered]
