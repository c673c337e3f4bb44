"""The gated linear recurrence as one compiled loop over time, for a CPU, with its gradient.

The loops do one multiplication and addition per number read, so memory is what limits them: all
channels of a token lie side by side and are processed together, and everything else is fused into
the one pass. Rows are shared out over torch's number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contextlm.ops.backends import compiled
from contextlm.ops.rows import over_rows

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract")
def _forward(gates_BTC, inputs_BTC, initial_BC, states_BTC):  # type: ignore[no-untyped-def]
    batch, tokens, channels = gates_BTC.shape
    state_C = np.empty(channels, gates_BTC.dtype)
    for b in range(batch):
        state_C[:] = initial_BC[b]
        for t in range(tokens):
            gate_C, input_C, out_C = gates_BTC[b, t], inputs_BTC[b, t], states_BTC[b, t]
            for c in range(channels):
                state = gate_C[c] * state_C[c] + input_C[c]
                state_C[c] = state
                out_C[c] = state


@compiled("contract")
def _backward(gates_BTC, states_BTC, initial_BC, grad_BTC, dgates_BTC, dinputs_BTC, dinitial_BC):  # type: ignore[no-untyped-def]
    """``g_t = grad_t + a_{t+1} g_{t+1}``; its parts for a_t, b_t and h_{-1}."""
    batch, tokens, channels = gates_BTC.shape
    carry_C = np.empty(channels, gates_BTC.dtype)
    for b in range(batch):
        carry_C[:] = 0
        for t in range(tokens - 1, -1, -1):
            before_C = states_BTC[b, t - 1] if t > 0 else initial_BC[b]
            gate_C, grad_C = gates_BTC[b, t], grad_BTC[b, t]
            dgate_C, dinput_C = dgates_BTC[b, t], dinputs_BTC[b, t]
            # Channels too run backwards: memory is fetched ahead only along one direction.
            for c in range(channels - 1, -1, -1):
                g = grad_C[c] + carry_C[c]
                dinput_C[c] = g
                dgate_C[c] = g * before_C[c]
                carry_C[c] = gate_C[c] * g
        dinitial_BC[b] = carry_C


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
        gates_BTC, initial_BC = gates_BTC.contiguous(), initial_BC.contiguous()
        states_BTC = torch.empty_like(gates_BTC)
        over_rows(_forward, (gates_BTC, inputs_BTC.contiguous(), initial_BC, states_BTC))
        ctx.save_for_backward(gates_BTC, states_BTC, initial_BC)
        return states_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates_BTC, states_BTC, initial_BC = ctx.saved_tensors
        dgates, dinputs = torch.empty_like(gates_BTC), torch.empty_like(gates_BTC)
        gradients = (dgates, dinputs, torch.empty_like(initial_BC))
        given = (gates_BTC, states_BTC, initial_BC, grad_BTC.contiguous())
        over_rows(_backward, (*given, *gradients))
        return gradients


def linear_scan_numba(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan`, on a CPU, for tensors of float32 or float64; once differentiable."""
    return _LinearScan.apply(gates_BTC, inputs_BTC, initial_BC)
