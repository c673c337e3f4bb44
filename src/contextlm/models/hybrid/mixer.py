"""What a letter of the hybrid's pattern stands for, and how to add a letter of one's own::

    @register_mixer("X")
    class Mine(Mixer):
        ...

A mixer gets the normalised stream and gives what is added to it: embedding, norms, residuals,
feed-forward parts and head are the model's (`hybrid.model`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from contextlm.models.cache import RowStateLayer
from contextlm.models.inputs import NewTokens
from contextlm.models.stepping import Stepping


class Mixer(Stepping):
    """How tokens learn of earlier ones. Subclasses are registered under a capital letter.

    `config` is the hybrid's; what a mixer from outside wants to know besides it finds in
    `config.mixer_settings`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @classmethod
    def new_state(cls, config: Any) -> RowStateLayer:
        """What decoding keeps, empty; the model asks for one a layer."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a configuration that does not fit, by a `ValueError` that names the field."""

    def forward(self, x_BTD: Tensor, state: Any, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``.

        Args:
            x_BTD: the normalised stream, each row's real tokens first.
            state: what decoding keeps, as `new_state` made it; moved on. None to keep nothing.
            new: the tokens. Padding comes last (`NewTokens.real_first_mask`): no state may see it.
        """
        raise NotImplementedError


_MIXERS: dict[str, type[Mixer]] = {}
M = TypeVar("M", bound=type[Mixer])


def register_mixer(letter: str) -> Callable[[M], M]:
    """Class decorator: makes a mixer known to patterns under a capital letter.

    Raises:
        ValueError: it is no capital letter, or taken.
    """

    def register(mixer: M) -> M:
        if len(letter) != 1 or not letter.isalpha() or not letter.isupper():
            raise ValueError(f"a mixer needs one capital letter, got {letter!r}")
        if letter in _MIXERS:
            raise ValueError(f"a mixer named {letter!r} is registered already")
        _MIXERS[letter] = mixer
        return mixer

    return register


def mixers() -> dict[str, type[Mixer]]:
    """The mixers by their letters."""
    return dict(sorted(_MIXERS.items()))
