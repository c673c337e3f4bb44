"""R: the gated recurrent context, a gated linear recurrence behind a short convolution.

Source: the recurrent block of Griffin (De et al., arXiv:2402.19427). For each token, with ``*``
channel by channel::

    u_t = W_u x_t,  v_t = sum_j w_j * u_{t-j} + b        j = 0 .. taps - 1, started as v = u
    h_t = gated recurrence over v                        `models.gated_recurrence`
    y_t = W_y (GELU(W_g x_t) * h_t)

Decoding keeps h and the last ``taps - 1`` inputs u: 4 D numbers for 4 taps, whatever the length.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.cache import ContextStateLayer
from contextlm.models.gated_recurrence import GatedRecurrence, gated_states
from contextlm.models.hybrid.convolution import CausalConvolution, Taps
from contextlm.models.inputs import NewTokens


class RecurrenceLayer(Taps, ContextStateLayer):
    """Keeps a recurrence's state and its convolution's taps: ``(1 + J) C`` numbers a row."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")


class RecurrentMixer(nn.Module):
    """R as a layer's mixer: two projections in, one of them through the recurrence, one out.

    `blocks` are those of `GatedRecurrence`; 0 `taps` leave the convolution out.
    """

    def __init__(self, width: int, blocks: int, taps: int):
        super().__init__()
        self.gate = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, width, bias=False)
        self.convolution = CausalConvolution(width, taps) if taps else None
        self.recurrence = GatedRecurrence(width, blocks)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, state: RecurrenceLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``.

        Args:
            x_BTD: the normalised stream, real tokens first.
            state: what decoding keeps; moved on. None to keep nothing.
            new: the tokens.
        """
        inner_BTD = self.inner(x_BTD)
        if self.convolution is not None:
            inner_BTD = self.convolution(inner_BTD, state, new)
        states_BTD = gated_states(self.recurrence, inner_BTD, state, new).to(x_BTD.dtype)
        return self.output(F.gelu(self.gate(x_BTD)) * states_BTD)
