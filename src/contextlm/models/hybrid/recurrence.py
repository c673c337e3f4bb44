"""R: the gated recurrent context, a real-gated linear recurrence behind a short convolution.

Source: the recurrent block and RG-LRU of Griffin (De et al., arXiv:2402.19427). For each token,
with D the width, ``*`` channel by channel::

    u_t = W_u x_t,  v_t = sum_j w_j * u_{t-j} + b        j = 0 .. taps - 1, started as v = u
    r_t = sigmoid(G_r v_t + b_r),  i_t = sigmoid(G_i v_t + b_i)
    a_t = exp(-8 softplus(lambda) r_t)                   started so that 0.9 <= a <= 0.999 at r = 1
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * v_t    the root is 1 for a text's first token
    y_t = W_y (GELU(W_g x_t) * h_t)

G are dense or block-diagonal. Decoding keeps h and the last ``taps - 1`` inputs u: 4 D numbers for
4 taps, whatever the length.

Shape suffixes: B batch, T tokens, D stream width, C channels of the recurrence, G blocks of a gate,
E width of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from contextlm.models.hybrid.cache import RecurrenceLayer
from contextlm.models.hybrid.convolution import CausalConvolution
from contextlm.models.layers import OwnStart
from contextlm.models.steps import Steps
from contextlm.ops.linear_scan import linear_scan

_SHARPNESS = 8.0  # the 8 in a_t
_SLOWEST, _FASTEST = 0.999, 0.9  # a at r = 1, at the start
# Largest derivative of the root: at a = 1 it would be infinite.
_STEEPEST = 1000.0


class BlockLinear(OwnStart):
    """A linear layer whose weight is block-diagonal; one block is a dense layer.

    Args:
        width: C, in and out.
        blocks: G, which must divide it.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width // blocks, width // blocks))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a linear layer of a block's width does (LeCun's normal), without bias."""
        init.normal_(self.weight, mean=0.0, std=self.weight.shape[1] ** -0.5)
        init.zeros_(self.bias)

    def forward(self, inputs_BTC: Tensor) -> Tensor:
        """``[B, T, C]``."""
        blocks_BTGE = inputs_BTC.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("btge,gef->btgf", blocks_BTGE, self.weight).flatten(-2) + self.bias


class _BoundedRoot(torch.autograd.Function):
    """A square root whose derivative stays below `_STEEPEST`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / (2 * root).clamp(min=1 / _STEEPEST)


class GatedRecurrence(OwnStart):
    """The RG-LRU: gates and recurrence, without the projections around it.

    Args:
        width: C.
        blocks: of the gates' weights; 1 is dense, 0 leaves the gates out (r = i = 1).
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.width = width
        self.decay = nn.Parameter(torch.empty(width))  # lambda
        self.decay_gate = BlockLinear(width, blocks) if blocks else None
        self.input_gate = BlockLinear(width, blocks) if blocks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays spread evenly in a^2 from 0.9^2 to 0.999^2."""
        a_C = torch.rand(self.width, device=self.decay.device)
        a_C = (a_C * (_SLOWEST**2 - _FASTEST**2) + _FASTEST**2).sqrt()
        init.copy_(self.decay, (torch.expm1(-a_C.log() / _SHARPNESS)).log())

    def terms(self, inputs_BTC: Tensor, first_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """a_t and what is added to ``a_t h_{t-1}``, in float32 at least, ``[B, T, C]`` each.

        Args:
            inputs_BTC: v.
            first_BT: True at the first token of a text; None: none is.
        """
        kind = torch.promote_types(inputs_BTC.dtype, torch.float32)
        rate_C = -_SHARPNESS * F.softplus(self.decay.to(kind))
        if self.decay_gate is None or self.input_gate is None:
            log_BTC, gated_BTC = rate_C.expand(inputs_BTC.shape), inputs_BTC.to(kind)
        else:
            log_BTC = rate_C * torch.sigmoid(self.decay_gate(inputs_BTC).to(kind))
            gated_BTC = torch.sigmoid(self.input_gate(inputs_BTC).to(kind)) * inputs_BTC
        # 1 - a^2 without cancellation where a is near 1.
        scale_BTC: Tensor = _BoundedRoot.apply(-torch.expm1(2 * log_BTC))
        if first_BT is not None:
            scale_BTC = scale_BTC.masked_fill(first_BT.unsqueeze(-1), 1.0)
        return log_BTC.exp(), scale_BTC * gated_BTC

    def forward(self, inputs_BTC: Tensor, state: RecurrenceLayer | None, steps: Steps) -> Tensor:
        """h of every new token, ``[B, T, C]``, in float32 at least; moves the state on."""
        batch, tokens, width = inputs_BTC.shape
        gates_BTC, added_BTC = self.terms(inputs_BTC, steps.first(tokens, inputs_BTC.device))
        start_BC = added_BTC.new_zeros(batch, width)
        if state is not None:
            start_BC = state.continue_from(start_BC)
        states_BTC = linear_scan(gates_BTC, added_BTC, start_BC, mask_BT=steps.real_BT)
        if state is not None:
            state.update_state(states_BTC[:, -1], steps.mask_BT, tokens)
        return states_BTC


class RecurrentMixer(nn.Module):
    """R as a layer's mixer: two projections in, one of them through the recurrence, one out.

    Args:
        width: D, of the stream and of the recurrence.
        blocks: see `GatedRecurrence`.
        taps: of the convolution; 0 leaves it out.
    """

    def __init__(self, width: int, blocks: int, taps: int):
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, width, bias=False)
        self.convolution = CausalConvolution(width, taps) if taps else None
        self.recurrence = GatedRecurrence(width, blocks)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, state: RecurrenceLayer | None, steps: Steps) -> Tensor:
        """What the mixer adds, ``[B, T, D]``.

        Args:
            x_BTD: the normalised stream, real tokens first.
            state: what decoding keeps; moved on. None to keep nothing.
            steps: the new tokens.
        """
        inner_BTD = self.inner(x_BTD)
        if self.convolution is not None:
            inner_BTD = self.convolution(inner_BTD, state, steps)
        states_BTD = self.recurrence(inner_BTD, state, steps).to(x_BTD.dtype)
        return self.output(F.gelu(self.gate(x_BTD)) * states_BTD)
