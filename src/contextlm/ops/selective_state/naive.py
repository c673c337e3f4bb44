"""The selective state as a plain loop over tokens: the truth for the faster forms."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_state_naive(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `selective_state`, for tensors of one type; differentiable as often as wanted."""
    state_BHNP, outputs = initial_BHNP, []
    for t in range(inputs_BTHP.shape[1]):
        decay_BH = torch.exp(-steps_BTH[:, t] * rates_H)
        if begins_BT is not None:
            decay_BH = decay_BH.masked_fill(begins_BT[:, t, None], 0)
        written_BHP = steps_BTH[:, t, :, None] * inputs_BTHP[:, t]
        state_BHNP = torch.addcmul(
            decay_BH[..., None, None] * state_BHNP,
            write_BTN[:, t, None, :, None],
            written_BHP.unsqueeze(2),
        )
        read_BHP = (read_BTN[:, t, None, None, :] @ state_BHNP).squeeze(2)
        outputs.append(torch.addcmul(read_BHP, skip_H.unsqueeze(-1), inputs_BTHP[:, t]))
    return torch.stack(outputs, dim=1), state_BHNP
