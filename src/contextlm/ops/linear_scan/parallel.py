"""The gated linear recurrence, parallel in time, in plain torch: for any device and torch.compile.

Two neighbouring steps are one step of the same kind::

    h_{t+1} = a_{t+1} h_t + b_{t+1},  h_t = a_t h_{t-1} + b_t
    h_{t+1} = (a_{t+1} a_t) h_{t-1} + (a_{t+1} b_t + b_{t+1})

so that T steps become T / 2, whose states are every second state of the whole; the others take one
more step each (the odd-even scan of Brent and Kung). About three multiplications per step, in
2 log2 T rounds, and no division: gates may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear_scan_parallel(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan`, for tensors of one type; differentiable as often as wanted.

    Products of gates that exceed the type's largest number are cut off there: a long row of gates
    above 1 keeps a state of 0 at 0, as the loop does.
    """
    return _LinearScan.apply(gates_BTC, inputs_BTC, initial_BC)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
        states_BTC = _odd_even(gates_BTC, inputs_BTC, initial_BC)
        ctx.save_for_backward(gates_BTC, initial_BC, states_BTC)
        return states_BTC

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``g_t = grad_t + a_{t+1} g_{t+1}`` is the same recurrence, backwards in time."""
        gates_BTC, initial_BC, states_BTC = ctx.saved_tensors
        return gradients(linear_scan_parallel, gates_BTC, initial_BC, states_BTC, grad_BTC)


def gradients(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
    gates_BTC: Tensor,
    initial_BC: Tensor,
    states_BTC: Tensor,
    grad_BTC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of gates, inputs and initial state, by a scan that runs backwards in time."""
    # The gate that comes round to the front meets a state of zero.
    later_BTC = gates_BTC.roll(-1, dims=1).flip(1)
    g_BTC = scan(later_BTC, grad_BTC.flip(1), torch.zeros_like(initial_BC)).flip(1)
    before_BTC = torch.cat([initial_BC.unsqueeze(1), states_BTC[:, :-1]], dim=1)
    return g_BTC * before_BTC, g_BTC, g_BTC[:, 0] * gates_BTC[:, 0]


def _odd_even(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    tokens = gates_BTC.shape[1]
    if tokens == 1:
        return torch.addcmul(inputs_BTC, gates_BTC, initial_BC.unsqueeze(1))
    gate_0, input_0 = gates_BTC[:, ::2], inputs_BTC[:, ::2]
    gate_1, input_1 = gates_BTC[:, 1::2], inputs_BTC[:, 1::2]
    pairs = tokens // 2
    largest = torch.finfo(gates_BTC.dtype).max
    state_1 = _odd_even(
        (gate_1 * gate_0[:, :pairs]).clamp(-largest, largest),
        torch.addcmul(input_1, gate_1, input_0[:, :pairs]),
        initial_BC,
    )
    before_0 = torch.cat([initial_BC.unsqueeze(1), state_1], dim=1)[:, : tokens - pairs]
    states_BTC = torch.empty_like(gates_BTC)
    states_BTC[:, ::2] = torch.addcmul(input_0, gate_0, before_0)
    states_BTC[:, 1::2] = state_1
    return states_BTC
