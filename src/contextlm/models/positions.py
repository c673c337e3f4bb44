"""Learned positions: which row of their table each token reads.

Shape suffixes: B batch, T new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlm.models.inputs import DecoderInputs


def table_positions(inputs: DecoderInputs, position_ids: Tensor | None, limit: int) -> Tensor:
    """Where each new token looks up its learned position.

    Args:
        inputs: the new tokens.
        position_ids: ``[B, T]`` or ``[1, T]``; None: counted over each row's real tokens.
        limit: `max_position_embeddings`, the length of the table.

    Returns:
        ``[B, T]`` int64; 0 at padding, which may stand anywhere.

    Raises:
        ValueError: a row has more tokens than the table has positions.
    """
    tokens = inputs.embeds_BTD.shape[1]
    certain = position_ids is None and inputs.past + tokens <= limit
    positions_BT = inputs.positions() if position_ids is None else position_ids
    if inputs.mask_BT is not None:
        positions_BT = torch.where(inputs.mask_BT, positions_BT, 0)
    # Looking at values makes an accelerator wait, and is not possible everywhere.
    if not (certain or torch.compiler.is_compiling() or positions_BT.device.type == "meta"):
        needed = int(positions_BT.max()) + 1
        if needed > limit:
            raise ValueError(
                f"max_position_embeddings is {limit}: the model has no position for token {needed} "
                "of a row"
            )
    return positions_BT
