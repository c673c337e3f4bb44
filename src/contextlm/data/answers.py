"""One question a sample: documents of `data.synthetic`, scored at their answers only.

Shape suffixes: S samples, N tokens, T tokens of a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from contextlm.base.errors import InputError
from contextlm.data.windows import IGNORED


class Answers(Dataset[dict[str, torch.Tensor]]):
    """Samples of one document each, with targets that are already shifted and padding on the right.

    A token behind a mark is an answer. The marks are taken out; ``labels[j]`` is the token after
    ``input_ids[j]`` where that is an answer, and is ignored everywhere else. Both are int64
    ``[T]``. The surface is that of `Windows` as far as a recipe of questions needs it; the stream
    is that of the answers.

    Args:
        tokens: of all documents, ``[N]``, of any integer type.
        offsets: where each document starts, and at last N, ``[documents + 1]``.
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

    target_offset = 1
    history = 0

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
                f"{name}: a sample has no answer: unit 'answers' needs a corpus of tasks"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length or longest
        self.mark = mark
        self.pad = pad

    def __len__(self) -> int:
        return len(self._starts_S)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        marked = np.array(self.tokens[self._starts_S[index] : self._stops_S[index]], dtype=np.int64)
        kept = marked != self.mark
        words = torch.from_numpy(marked[kept])
        is_answer = torch.from_numpy(np.concatenate([[False], ~kept[:-1]])[kept])
        size = len(words) - 1
        input_ids = torch.full((self.sequence_length,), self.pad, dtype=torch.int64)
        labels = torch.full((self.sequence_length,), IGNORED, dtype=torch.int64)
        input_ids[:size] = words[:-1]
        labels[:size] = torch.where(is_answer, words, IGNORED)[1:]
        return {"input_ids": input_ids, "labels": labels}

    @property
    def tokens_covered(self) -> int:
        """How many answers all samples have together."""
        return int((self.tokens == self.mark).sum())

    def stream(self) -> npt.NDArray[Any]:
        """Those answers, one after the other, ``[tokens_covered]``."""
        return self.tokens[np.flatnonzero(self.tokens == self.mark) + 1]
