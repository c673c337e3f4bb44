"""Windows over a token stream: inputs and the targets that belong to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from contextlm.base.errors import InputError

IGNORED = -100  # a target that no loss and no score counts


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of T tokens, one every `stride`, with targets that are already shifted.

    Item i starts at token s = i * stride; its ``input_ids`` are ``tokens[s : s + T]`` and
    ``labels[j] = tokens[s + j + target_offset]``, both int64 ``[T]``. Every position has a target
    (labels shifted inside a model would leave the last without one). An incomplete last window is
    dropped, or filled up with token 0 and targets that are ignored.

    With `history` H, ``input_ids`` are ``tokens[s - H : s + T]``, ``[H + T]``, and an
    ``attention_mask`` of that length is 0 before the beginning of the stream.

    Args:
        tokens: ids, ``[N]``, of any integer type; read only where looked at.
        sequence_length: T.
        stride: between the starts of windows; by default T.
        target_offset: how many tokens ahead a target lies; 1 is the next token.
        samples: take exactly the first so many windows; by default all.
        history: H, tokens before each window that a model reads without being scored on them.
        fill: keep an incomplete last window.
        name: of the corpus and split, for messages.

    Raises:
        InputError: a value below 1, or too few tokens for one window or for `samples`.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        sequence_length: int,
        stride: int | None = None,
        target_offset: int = 1,
        samples: int | None = None,
        *,
        history: int = 0,
        fill: bool = False,
        name: str = "the corpus",
    ) -> None:
        stride = sequence_length if stride is None else stride
        given = {
            "sequence_length": sequence_length,
            "stride": stride,
            "target_offset": target_offset,
            "samples": 1 if samples is None else samples,
        }
        for key, value in given.items():
            if value < 1:
                raise InputError(f"{key} must be at least 1, got {value}")
        needed = target_offset + (1 if fill else sequence_length)
        available = (len(tokens) - needed) // stride + 1 if len(tokens) >= needed else 0
        if available == 0:
            raise InputError(
                f"{name} is too small: {len(tokens)} tokens, and one window needs {needed}"
            )
        if samples is not None and available < samples:
            raise InputError(
                f"{name} is too small: {len(tokens)} tokens make {available} windows, "
                f"{samples} samples were asked for"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.stride = stride
        self.target_offset = target_offset
        self.history = history
        self._count = available if samples is None else samples

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self._count <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        start = self.start(index % self._count)
        item = {
            "input_ids": self._slice(start - self.history, start + self.sequence_length, fill=0),
            "labels": self._slice(
                start + self.target_offset,
                start + self.target_offset + self.sequence_length,
                fill=IGNORED,
            ),
        }
        if self.history:
            positions = torch.arange(start - self.history, start + self.sequence_length)
            item["attention_mask"] = (positions >= 0).long()
        return item

    def first(self, count: int) -> Windows:
        """The first `count` windows.

        Raises:
            InputError: there are fewer.
        """
        return Windows(
            self.tokens,
            self.sequence_length,
            self.stride,
            self.target_offset,
            count,
            history=self.history,
        )

    def start(self, index: int) -> int:
        """Where window `index` begins in the stream."""
        return index * self.stride

    @property
    def tokens_covered(self) -> int:
        """Length of the shortest prefix of `tokens` with all inputs and all next tokens.

        ``(windows - 1) * stride + T + 1``, counted as if `target_offset` were 1, so that contenders
        that differ in it have read the same text.
        """
        whole = (self._count - 1) * self.stride + self.sequence_length + 1
        return min(whole, len(self.tokens))

    def stream(self) -> npt.NDArray[Any]:
        """That prefix: a view of `tokens`, ``[tokens_covered]``."""
        return self.tokens[: self.tokens_covered]

    def _slice(self, start: int, stop: int, *, fill: int) -> torch.Tensor:
        """Tokens ``[start, stop)``, `fill` where the stream has none."""
        out = torch.full((stop - start,), fill, dtype=torch.int64)
        part = np.array(self.tokens[max(start, 0) : max(stop, 0)], dtype=np.int64)
        first = max(-start, 0)
        out[first : first + len(part)] = torch.from_numpy(part)
        return out


def model_inputs(batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
    """A batch of windows as a model's arguments and the targets of its last positions.

    A window with history asks for no logits on it.

    Returns:
        Keyword arguments for the forward pass, and labels ``[B, T]``.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    labels_BT = batch["labels"]
    if inputs["input_ids"].shape[1] > labels_BT.shape[1]:
        inputs["logits_to_keep"] = labels_BT.shape[1]
    return inputs, labels_BT
