"""Samples of one document each: lines of text, and questions that are scored at their answers.

Targets are already shifted; padding stands on the right. Models are causal, so that it changes
nothing before it, and no attention mask is needed. The surface is that of `Windows` as far as
recipes of lines and of answers need it.

Shape suffixes: D documents, S samples, N tokens, T tokens of a sample.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from contextlm.base.errors import InputError
from contextlm.data.windows import IGNORED


class _Samples(Dataset[dict[str, torch.Tensor]]):
    """Items hold ``input_ids``, filled up with `pad`, and ``labels``, int64 ``[T]``."""

    target_offset = 1
    history = 0
    tokens: npt.NDArray[Any]
    sequence_length: int
    pad: int
    _starts_S: npt.NDArray[np.int64]
    _stops_S: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._starts_S)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self._pair(index % len(self))
        input_ids = torch.full((self.sequence_length,), self.pad, dtype=torch.int64)
        labels = torch.full((self.sequence_length,), IGNORED, dtype=torch.int64)
        input_ids[: len(inputs)] = torch.from_numpy(inputs)
        labels[: len(targets)] = torch.from_numpy(targets)
        return {"input_ids": input_ids, "labels": labels}

    def first(self, count: int) -> Self:
        """The first `count` samples, of which there must be so many."""
        part = copy(self)
        part._starts_S, part._stops_S = self._starts_S[:count], self._stops_S[:count]
        part.tokens = self.tokens[: int(part._stops_S[-1])]
        return part

    def _pair(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of a sample, of one length, without padding."""
        raise NotImplementedError

    def _span(self, index: int) -> npt.NDArray[np.int64]:
        return np.array(self.tokens[self._starts_S[index] : self._stops_S[index]], dtype=np.int64)


class Lines(_Samples):
    """Samples of one line each, as document 002 trains (DESIGN 1.1).

    A line ``w1 .. wn`` has the inputs ``BOS, w1 .. wn`` and the targets ``w1 .. wn, EOS``. More
    than T of them are cut into pieces of T, each a sample of its own: only the first begins with
    BOS, the next ones with the token before their first target, and only the last ends with EOS.
    So each token of a line is a target once, but is predicted from its own piece alone.

    Args:
        tokens: of all lines, each line's end-of-text token behind it, ``[N]``, of any integer type;
            read only where looked at.
        offsets: where each line starts, and at last N, ``[D + 1]``.
        sequence_length: T.
        begin: id of BOS.
        pad: id that fills inputs up.
        samples: take exactly the first so many samples; by default all.
        name: of the corpus and split, for messages.

    Raises:
        InputError: a value below 1, or fewer samples than `samples`.
    """

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
        lengths_D = np.diff(offsets)
        pieces_D = -(-lengths_D // sequence_length)
        first_D = np.cumsum(pieces_D) - pieces_D  # each line's first sample
        line_S = np.repeat(np.arange(len(lengths_D)), pieces_D)
        piece_S = np.arange(len(line_S)) - first_D[line_S]
        if samples is not None and len(line_S) < samples:
            raise InputError(
                f"{name} is too small: {len(lengths_D)} lines make {len(line_S)} samples of at "
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

    def _pair(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        targets = self._span(index)
        before = self.begin if self._is_first_S[index] else self.tokens[self._starts_S[index] - 1]
        return np.concatenate([[np.int64(before)], targets[:-1]]), targets

    @property
    def tokens_covered(self) -> int:
        """How many targets all samples have together."""
        return int(self._stops_S[-1])

    def stream(self) -> npt.NDArray[Any]:
        """Those targets, one line after the other: a view of `tokens`, ``[tokens_covered]``."""
        return self.tokens[: self.tokens_covered]


class Answers(_Samples):
    """Samples of one question each, from `data.synthetic`, scored at their answers only.

    A token behind a mark is an answer. The marks are taken out; ``labels[j]`` is the token after
    ``input_ids[j]`` where that is an answer, and is ignored everywhere else.

    Args:
        tokens: of all documents, ``[N]``, of any integer type.
        offsets: where each document starts, and at last N, ``[D + 1]``.
        sequence_length: T; None: that of the longest sample.
        mark: id of the mark.
        pad: id that fills inputs up.
        unknown: id of words that the tokenizer does not know, of which there may be none.
        samples: take exactly the first so many; by default all.
        name: of the corpus and split, for messages.

    Raises:
        InputError: a document is longer than T or has no answer, a word is unknown, or there are
            fewer than `samples`.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        sequence_length: int | None,
        *,
        mark: int,
        pad: int,
        unknown: int | None = None,
        samples: int | None = None,
        name: str = "the corpus",
    ) -> None:
        available = len(offsets) - 1
        if samples is not None and available < samples:
            raise InputError(
                f"{name} is too small: it has {available} documents, {samples} samples were asked "
                "for (documents says how many are made)"
            )
        self._starts_S = offsets[:-1][:samples]
        self._stops_S = offsets[1:][:samples]
        tokens = tokens[: int(self._stops_S[-1])]
        if unknown is not None and bool((tokens == unknown).any()):
            raise InputError(f"{name}: the tokenizer does not know all of its words")
        marks_before = np.concatenate([[0], np.cumsum(tokens == mark)])
        marks_S = marks_before[self._stops_S] - marks_before[self._starts_S]
        # The last token is a target only.
        longest = int((self._stops_S - self._starts_S - marks_S).max()) - 1
        if sequence_length is not None and longest > sequence_length:
            raise InputError(
                f"{name}: its longest sample has {longest} tokens, more than sequence_length "
                f"{sequence_length}"
            )
        if marks_S.min() == 0:
            raise InputError(
                f"{name}: a sample has no answer: unit 'answers' needs a corpus of synthetic tasks"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length or longest
        self.mark = mark
        self.pad = pad

    def _pair(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        marked = self._span(index)
        kept = marked != self.mark
        words = marked[kept]
        is_answer = np.concatenate([[False], ~kept[:-1]])[kept]
        return words[:-1], np.where(is_answer, words, IGNORED)[1:]

    @property
    def tokens_covered(self) -> int:
        """How many answers all samples have together."""
        return int((self.tokens == self.mark).sum())

    def stream(self) -> npt.NDArray[Any]:
        """Those answers, one after the other, ``[tokens_covered]``."""
        return self.tokens[np.flatnonzero(self.tokens == self.mark) + 1]
