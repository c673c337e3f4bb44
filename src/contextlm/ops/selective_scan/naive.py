"""The selective scan as a plain loop over tokens: the truth for the compiled loop."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_naive(
    inputs_BTD: Tensor,
    delta_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    initial_BDN: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `selective_scan`, for tensors of one type; differentiable as often as wanted."""
    state_BDN, outputs = initial_BDN, []
    for t in range(inputs_BTD.shape[1]):
        delta_BD1 = delta_BTD[:, t, :, None]
        written_BDN = delta_BD1 * inputs_BTD[:, t, :, None] * b_BTN[:, t, None]
        state_BDN = torch.exp(delta_BD1 * a_DN) * state_BDN + written_BDN
        outputs.append((state_BDN * c_BTN[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state_BDN
