"""The selective state: a matrix a head, what is written to it and read of it chosen by the token.

Source: the state-space dual form of Mamba-2 (Dao and Gu, arXiv:2405.21060). There are E channels in
H heads of P, and N numbers of state a channel; for each token x::

    z, u, B, C, d = split(W_in x)                         E, E, N, N, H wide
    [u; B; C] = silu(convolution([u; B; C]))              causal, depthwise
    dt = softplus(d + b);  a = exp(-dt r)                 of each head
    h = a h + dt B u^T;  y = h^T C + s u                  `ops.selective_state`
    out = W_out RMSNorm(y * silu(z))

Decoding keeps N E numbers of state in float32 (or bfloat16), and the convolution's last inputs.
Without `selective` B and C are the same for all tokens: dt alone chooses.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from contextlm.models.cache import ContextStateLayer
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import OwnStart, RMSNorm
from contextlm.models.stepping import Stepping, StepWeights, product
from contextlm.ops.selective_state import selective_state

_FASTEST = 16.0  # r starts evenly in [1, 16]
_STEPS = (1e-3, 1e-1)  # dt without a token's say starts between them


class MatrixStateLayer(Taps, ContextStateLayer):
    """Keeps a matrix a head, ``[B, H, N, P]``, and a convolution's taps.

    Args:
        dtype: of the matrix; None leaves it as it was computed, in float32 at least.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def update_state(self, state_BC: Tensor, new: NewTokens) -> None:
        """Count the new tokens and keep the state after them."""
        self.state = state_BC.to(self.dtype or state_BC.dtype)
        self.advance(new)


class Decay(OwnStart):
    """How fast each head forgets, as in Mamba-2: steps dt that follow the token, and rates r.

    Args:
        heads: H.
        channels: X, steps of a head.
    """

    def __init__(self, heads: int, channels: int = 1):
        super().__init__()
        self.shape = (heads, channels)
        self.rate = nn.Parameter(torch.empty(heads))  # log r
        self.step = nn.Parameter(torch.empty(heads * channels))  # b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """r starts evenly in [1, 16], dt without a token's say evenly in its logarithm."""
        init.copy_(self.rate, torch.empty_like(self.rate).uniform_(1, _FASTEST).log())
        least, most = (math.log(step) for step in _STEPS)
        steps = torch.empty_like(self.step).uniform_(least, most).exp()
        init.copy_(self.step, steps + torch.log(-torch.expm1(-steps)))  # softplus gives it back

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """dt, ``[B, T, H, X]``, and r, ``[H, 1]``, in float32 at least; of d, ``[B, T, H X]``."""
        kind = torch.promote_types(given.dtype, torch.float32)
        steps = F.softplus(given.to(kind) + self.step)
        return steps.unflatten(-1, self.shape), self.rate.to(kind).exp().unsqueeze(-1)


class SelectiveState(Stepping, OwnStart):
    """All of it, from projection to projection.

    Args:
        width: of the tokens.
        inner: E.
        output: width of what comes out.
        head: P, which must divide E.
        numbers: N.
        taps: of the convolution, the current token included; 0 leaves it out.
        eps: of the norm.
        selective: B and C come from the token; if not, they are learned and the same for all.
        normed: whether a norm stands before the output.
    """

    step_names = (
        *("convolution.weight", "convolution.bias", "decay.step", "decay.rate"),
        *("skip", "norm.weight"),
    )
    step_kept = ("taps", "state")

    def __init__(
        self,
        width: int,
        inner: int,
        output: int,
        head: int,
        numbers: int,
        *,
        taps: int = 4,
        eps: float = 1e-6,
        selective: bool = True,
        normed: bool = True,
    ):
        super().__init__()
        self.head_size, self.eps = head, eps
        # What the convolution sees: u, B and C.
        self.parts = (inner, numbers, numbers) if selective else (inner,)
        self.widths = (inner, sum(self.parts), inner // head)
        self.inner = nn.Linear(width, sum(self.widths), bias=False)
        seen = sum(self.parts)
        self.convolution = CausalConvolution(seen, taps, start="uniform") if taps else None
        # B and C of every token.
        self.fixed = None if selective else nn.Parameter(torch.empty(2, numbers))
        self.decay = Decay(inner // head)
        self.skip = nn.Parameter(torch.empty(inner // head))
        self.norm = RMSNorm(inner, eps=eps) if normed else None
        self.output = nn.Linear(inner, output, bias=False)
        if taps and selective and normed:  # as by default
            self.step_weights = StepWeights(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """s is 1."""
        init.ones_(self.skip)
        if self.fixed is not None:
            init.normal_(self.fixed)

    def forward(self, x_BTD: Tensor, state: MatrixStateLayer | None, new: NewTokens) -> Tensor:
        """``[B, T, width of the output]``.

        Args:
            x_BTD: the tokens, each row's real ones first.
            state: what decoding keeps; moved on. None to keep nothing.
            new: the tokens.
        """
        projected_BTX = product(self.inner, x_BTD, step=new.is_step)
        mixed_B1E = self.step(new, state, projected_BTX)
        if mixed_B1E is not None:
            return product(self.output, mixed_B1E, step=True)
        gate_BTE, inner, step_BTH = projected_BTX.split(self.widths, dim=-1)
        kind = torch.promote_types(inner.dtype, torch.float32)
        if self.convolution is None:
            inner = F.silu(inner.to(kind))
        else:
            inner = self.convolution(inner, state, new, silu=True).to(kind)
        input_BTE, *selected = inner.split(self.parts, dim=-1)
        if self.fixed is not None:
            selected = [each_N.to(kind).expand(*x_BTD.shape[:2], -1) for each_N in self.fixed]
        write_BTN, read_BTN = selected
        steps_BTH1, rates_H1 = self.decay(step_BTH)
        outputs_BTHP, final_BHNP = selective_state(
            input_BTE.unflatten(-1, (-1, self.head_size)),
            steps_BTH1.squeeze(-1),
            rates_H1.squeeze(-1),
            write_BTN,
            read_BTN,
            self.skip,
            None if state is None else state.state,
            mask_BT=new.real_first_mask,
            begins_BT=None if new.packed_BT is None else new.packed_BT == 0,
        )
        if state is not None:
            state.update_state(final_BHNP, new)
        mixed_BTE = outputs_BTHP.flatten(2)
        if self.norm is None:
            mixed_BTE = mixed_BTE * F.silu(gate_BTE.to(kind))
        else:
            mixed_BTE = self.norm(mixed_BTE, gate_BTE)
        return self.output(mixed_BTE.to(gate_BTE.dtype))

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.selective_state.step import selective_step

        given: list[Any] = [*projected_B1X, state.taps, state.state, *weights]
        return selective_step(*given, eps=self.eps)
