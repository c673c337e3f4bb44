"""Where the new tokens of a forward pass stand in their rows' texts.

Shape suffixes: B batch, T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from contextlm.models.alignment import RealFirst
from contextlm.models.inputs import DecoderInputs


@dataclass(frozen=True)
class Steps:
    """The new tokens of a forward pass, each row's real ones first.

    Attributes:
        align: the order that puts them first.
        mask_BT: False at padding in the order of the input, or None.
        real_BT: False at padding in the new order, or None.
        new_B: real tokens of each row, or None: all T.
        seen_B: real tokens that each row had before, or None: none.
    """

    align: RealFirst
    mask_BT: Tensor | None
    real_BT: Tensor | None
    new_B: Tensor | None
    seen_B: Tensor | None

    @classmethod
    def of(cls, inputs: DecoderInputs) -> Steps:
        """Of a decoder's inputs."""
        align, mask_BT = RealFirst.of(inputs.mask_BT), inputs.mask_BT
        if mask_BT is None:
            return cls(align, None, None, None, inputs.seen_B)
        new_B = mask_BT.sum(1)
        real_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) < new_B.unsqueeze(1)
        return cls(align, mask_BT, real_BT, new_B, inputs.seen_B)

    def to(self, device: torch.device) -> Steps:
        """The same on another device: layers may be spread over several."""
        align, *rest = (getattr(self, field.name) for field in fields(self))
        moved = (None if tensor is None else tensor.to(device) for tensor in rest)
        return Steps(align.to(device), *moved)

    def first(self, tokens: int, device: torch.device) -> Tensor:
        """Which of the T tokens begins its row's text, ``[B, T]`` or ``[1, T]``."""
        begins_T = torch.arange(tokens, device=device) == 0
        if self.seen_B is None:
            return begins_T.unsqueeze(0)
        return begins_T & (self.seen_B == 0).unsqueeze(1)

    def oldest(self, kept: int) -> Tensor | None:
        """The first of the columns, `kept` old ones before the new, that a row has filled.

        ``[B]`` int64, or None: all rows have filled all.
        """
        return None if self.seen_B is None else (kept - self.seen_B).clamp(min=0)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the T tokens in their rows' texts, ``[B, T]`` or ``[1, T]``."""
        positions_1T = torch.arange(tokens, device=device).unsqueeze(0)
        return positions_1T if self.seen_B is None else positions_1T + self.seen_B.unsqueeze(1)
