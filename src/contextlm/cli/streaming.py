"""What is generated, while it is generated: text character by character, and a count of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from contextlm.base.visible import visible


class TextStream(BaseStreamer):
    """Writes each character as soon as its last token is there, in time linear in the text.

    transformers' own streamer waits for a space, and decodes the whole line again at every token.

    Args:
        tokenizer: a fast tokenizer of transformers.
        stream: where the text goes.
    """

    def __init__(self, tokenizer: Any, stream: TextIO) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stream = stream
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take new ids, a tensor of one sequence; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self._ids.append(token)
            self._write(self._decoder.step(self._backend, token) or "")

    def end(self) -> None:
        """Write what is left, such as half a character, and end the line."""
        whole = self._backend.decode(self._ids, skip_special_tokens=True)
        written = "".join(self._pieces)
        if whole.startswith(written):
            self._write(whole[len(written) :])
        self._write("\n")

    def _write(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            # A terminal must not obey what a model writes; a file gets the text as it is.
            self._stream.write(visible(piece) if self._stream.isatty() else piece)
            self._stream.flush()


class TokenCount(BaseStreamer):
    """Counts the tokens that are generated, and passes them on.

    Args:
        inner: also given what comes, or None.
        told: called with the tokens so far, after each one.
    """

    def __init__(self, inner: BaseStreamer | None, told: Callable[[int], None]) -> None:
        self._inner = inner
        self._told = told
        self._tokens = -1  # the first call brings the prompt

    def put(self, value: Any) -> None:
        """Take new ids; the first call brings the prompt."""
        if self._inner is not None:
            self._inner.put(value)
        self._tokens += 1
        self._told(self._tokens)

    def end(self) -> None:
        """All is there."""
        if self._inner is not None:
            self._inner.end()
