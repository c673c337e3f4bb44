"""The gated delta rule as a plain loop over tokens: the truth for the faster forms."""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_naive(
    queries_BTHN: Tensor,
    keys_BTHN: Tensor,
    values_BTHP: Tensor,
    logs_BTHX: Tensor,
    rates_BTH: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for tensors of one type; differentiable as often as wanted."""
    state_BHNP, outputs = initial_BHNP, []
    for t in range(keys_BTHN.shape[1]):
        decay_BHX = logs_BTHX[:, t].exp()
        if begins_BT is not None:
            decay_BHX = decay_BHX.masked_fill(begins_BT[:, t, None, None], 0)
        state_BHNP = decay_BHX.unsqueeze(-1) * state_BHNP
        key_BHN1 = keys_BTHN[:, t].unsqueeze(-1)
        error_BH1P = values_BTHP[:, t].unsqueeze(-2) - key_BHN1.mT @ state_BHNP
        state_BHNP = state_BHNP + rates_BTH[:, t, :, None, None] * key_BHN1 * error_BH1P
        outputs.append((queries_BTHN[:, t].unsqueeze(-2) @ state_BHNP).squeeze(-2))
    return torch.stack(outputs, dim=1), state_BHNP
