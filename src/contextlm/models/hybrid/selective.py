"""S: a selective matrix state, the state-space dual form of Mamba-2.

Source: Dao and Gu, arXiv:2405.21060. E = expand * D channels in H heads of P, N numbers of state a
channel; for each token, with x the normalised stream::

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
from contextlm.models.hybrid.convolution import CausalConvolution, Taps
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import OwnStart, RMSNorm
from contextlm.ops.selective_state import can_step, selective_state

_FASTEST = 16.0  # r starts evenly in [1, 16]
_STEPS = (1e-3, 1e-1)  # dt without a token's say starts between them


class MatrixStateLayer(Taps, ContextStateLayer):
    """Keeps a matrix a head, ``[B, H, N, P]``, and a convolution's taps.

    Args:
        dtype: of the matrix; None leaves it as it was computed, in float32 at least.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    @classmethod
    def of(cls, config: Any) -> MatrixStateLayer:
        """As the configuration wants it."""
        return cls(torch.bfloat16 if config.state_dtype == "bfloat16" else None)

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


@register_mixer("S")
class SelectiveMixer(Mixer, OwnStart):
    """S as a layer's mixer."""

    def __init__(self, config: Any):
        super().__init__(config)
        width, numbers = config.hidden_size, config.state_size
        inner, self.head_size = config.expand * width, config.state_head_dim
        heads = inner // self.head_size
        # What the convolution sees: u, B and C.
        self.parts = (inner, numbers, numbers) if config.selective else (inner,)
        self.widths = (inner, sum(self.parts), heads)
        self.inner = nn.Linear(width, sum(self.widths), bias=False)
        taps, seen = config.convolution, sum(self.parts)
        self.convolution = CausalConvolution(seen, taps, start="uniform") if taps else None
        # B and C of every token.
        self.fixed = None if config.selective else nn.Parameter(torch.empty(2, numbers))
        self.decay = Decay(heads)
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(inner, eps=config.rms_norm_eps) if config.output_norm else None
        self.output = nn.Linear(inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """s is 1."""
        init.ones_(self.skip)
        if self.fixed is not None:
            init.normal_(self.fixed)

    @classmethod
    def new_state(cls, config: Any) -> MatrixStateLayer:
        """The heads' matrices and the convolution's taps."""
        return MatrixStateLayer.of(config)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse heads that do not fill the channels."""
        config.check_state_heads()

    def forward(self, x_BTD: Tensor, state: MatrixStateLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        projected_BTX = self.inner(x_BTD)
        if state is not None and new.tokens == 1 and new.mask_BT is None:
            mixed_BE = self._step(projected_BTX[:, 0], state)
            if mixed_BE is not None:
                state.advance(new)
                return self.output(mixed_BE.unsqueeze(1))
        gate_BTE, inner, step_BTH = projected_BTX.split(self.widths, dim=-1)
        kind = torch.promote_types(inner.dtype, torch.float32)
        if self.convolution is None:
            inner = F.silu(inner.to(kind))
        else:
            inner = self.convolution(inner, state, new, silu=True).to(kind)
        input_BTE, *selected = inner.split(self.parts, dim=-1)
        if self.fixed is not None:
            selected = [each_N.to(kind).expand(*x_BTD.shape[:2], -1) for each_N in self.fixed]
        steps_BTH1, rates_H1 = self.decay(step_BTH)
        outputs_BTHP, final_BHNP = selective_state(
            input_BTE.unflatten(-1, (-1, self.head_size)),
            steps_BTH1.squeeze(-1),
            rates_H1.squeeze(-1),
            *selected,
            self.skip,
            None if state is None else state.state,
            mask_BT=new.real_first_mask,
            begins_BT=None if new.places_BT is None else new.places_BT == 0,
        )
        if state is not None:
            state.update_state(final_BHNP, new)
        mixed_BTE = outputs_BTHP.flatten(2)
        if self.norm is None:
            mixed_BTE = mixed_BTE * F.silu(gate_BTE.to(kind))
        else:
            mixed_BTE = self.norm(mixed_BTE, gate_BTE)
        return self.output(mixed_BTE.to(gate_BTE.dtype))

    def _step(self, projected_BX: Tensor, state: MatrixStateLayer) -> Tensor | None:
        """What the output is made of, ``[B, E]``, by one compiled call; None where that cannot be.

        Changes what `state` keeps, in place.
        """
        convolution, norm = self.convolution, self.norm
        if convolution is None or norm is None or self.fixed is not None:
            return None
        if state.state is None or state.taps is None:
            return None
        tensors = (projected_BX, state.taps, state.state, convolution.weight, convolution.bias)
        tensors += (self.decay.step, self.decay.rate, self.skip, norm.weight)
        if not can_step(*tensors):
            return None
        from contextlm.ops.selective_state.step import selective_step

        return selective_step(*tensors, self.config.rms_norm_eps)
