"""The gated linear recurrence as a plain loop over tokens: the truth for the faster forms."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_naive(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan`, for tensors of one type; differentiable as often as wanted."""
    states_BC = [initial_BC]
    for gate_BC, input_BC in zip(gates_BTC.unbind(1), inputs_BTC.unbind(1), strict=True):
        states_BC.append(torch.addcmul(input_BC, gate_BC, states_BC[-1]))
    return torch.stack(states_BC[1:], dim=1)
