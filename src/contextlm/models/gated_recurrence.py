"""The gated recurrence, and a context block whose update it is instead of the documents' layer.

Source: the RG-LRU of Griffin (De et al., arXiv:2402.19427). For each token's v, with ``*`` channel
by channel::

    r_t = sigmoid(G_r v_t + b_r),  i_t = sigmoid(G_i v_t + b_i)
    a_t = exp(-8 softplus(lambda) r_t)                   started so that 0.9 <= a <= 0.999 at r = 1
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * v_t    the root is 1 for a text's first token

G are dense or block-diagonal. In the hybrid's R (`models.hybrid.recurrence`) v comes out of a
convolution. The context block takes ``v = W e + b`` of a token's normalised embedding, and makes no
exception for a text's first token: all that depends on the token depends on nothing else, so phase
1 computes it once per vocabulary entry, as it does for the documents' layer.

J is a number of blocks of a gate here, N of independent contexts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from contextlm.models.cache import ContextStateLayer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import ContextBlock, ContextStep, OwnStart
from contextlm.ops.linear_scan import linear_scan

SHARPNESS = 8.0  # the 8 in a_t
_SLOWEST, _FASTEST = 0.999, 0.9  # a at r = 1, at the start
# Largest derivative of the root: at a = 1 it would be infinite.
_STEEPEST = 1000.0


class BlockLinear(OwnStart):
    """A linear layer whose weight is block-diagonal; one block is a dense layer.

    Args:
        width: C, in and out.
        blocks: J, which must divide it.
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
        blocks_BTJE = inputs_BTC.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("btje,jef->btjf", blocks_BTJE, self.weight).flatten(-2) + self.bias


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
    """The RG-LRU's a_t and what is added, without the projections around it and the scan behind it.

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
        init.copy_(self.decay, (torch.expm1(-a_C.log() / SHARPNESS)).log())

    def forward(self, inputs_BTC: Tensor, first_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a_t and what is added to ``a_t h_{t-1}``, in float32 at least, ``[B, T, C]`` each.

        Args:
            inputs_BTC: v.
            first_BT: True at the first token of a text; None: none is.
        """
        kind = torch.promote_types(inputs_BTC.dtype, torch.float32)
        rate_C = -SHARPNESS * F.softplus(self.decay.to(kind))
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


def gated_states(
    recurrence: GatedRecurrence,
    inputs_BTC: Tensor,
    state: ContextStateLayer | None,
    new: NewTokens,
) -> Tensor:
    """h of every new token, ``[B, T, C]``, in float32 at least; moves the state on."""
    begins_BT = new.real_first_positions() == 0
    gates_BTC, added_BTC = recurrence(inputs_BTC, begins_BT)
    if new.packed_BT is not None:  # what another document left is forgotten
        gates_BTC = gates_BTC.masked_fill(begins_BT.unsqueeze(-1), 0)
    start_BC = torch.zeros_like(added_BTC[:, 0])
    if state is not None:
        start_BC = state.continue_from(start_BC)
    states_BTC = linear_scan(gates_BTC, added_BTC, start_BC, mask_BT=new.real_first_mask)
    if state is not None:
        state.update_state(states_BTC[:, -1], new)
    return states_BTC


class GatedContextLayer(nn.Module):
    """The one layer of a `GatedContextBlock`; its gates' weights are dense."""

    def __init__(self, context_dim: int, embedding_dim: int):
        super().__init__()
        self.inner = nn.Linear(embedding_dim, context_dim)
        self.recurrence = GatedRecurrence(context_dim, blocks=1)

    def forward(self, context_NC: Tensor, embedded_ND: Tensor) -> Tensor:
        """The next contexts of N tokens, ``[N, C]``, each from a context of its own."""
        return self.step(context_NC, self.project(embedded_ND))

    def project(self, embedded: Tensor) -> Tensor:
        """What the token brings, a and what is added: ``[..., D]`` to ``[..., 2 C]``."""
        inner_1NC = self.inner(embedded).reshape(1, -1, self.inner.out_features)
        terms = torch.cat(self.recurrence(inner_1NC), dim=-1)
        return terms.view(*embedded.shape[:-1], -1)

    def step(self, context_NC: Tensor, projected_NX: Tensor) -> Tensor:
        """Apply the layer once to N independent contexts; X is 2 C."""
        gate_NC, added_NC = projected_NX.chunk(2, dim=-1)
        return torch.addcmul(added_NC, gate_NC, context_NC)


class GatedContextBlock(ContextBlock):
    """A gated recurrent context with the interface of the documents' context block."""

    def __init__(self, context_dim: int, embedding_dim: int, *, frozen: bool = False):
        super().__init__(context_dim, embedding_dim, num_layers=0, frozen=frozen)
        self.layer = GatedContextLayer(context_dim, embedding_dim)

    def stack(self) -> list[ContextStep]:
        """The one layer."""
        return [self.layer]

    # In float32 at least, whatever the weights are: the state goes on from call to call.
    def _scan(self, embedded_BTD: Tensor, initial_BC: Tensor, mask_BT: Tensor | None) -> Tensor:
        gates_BTC, added_BTC = self.layer.project(embedded_BTD).chunk(2, dim=-1)
        states_BTC = linear_scan(gates_BTC, added_BTC, initial_BC, mask_BT=mask_BT)
        return states_BTC.unsqueeze(0)
