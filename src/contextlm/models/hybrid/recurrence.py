"""R: the gated recurrent context, a gated linear recurrence behind a short convolution.

Source: the recurrent block of Griffin (De et al., arXiv:2402.19427). For each token, with ``*``
channel by channel::

    u_t = W_u x_t,  v_t = sum_j w_j * u_{t-j} + b        j = 0 .. taps - 1, started as v = u
    h_t = gated recurrence over v                        `models.gated_recurrence`
    y_t = W_y (GELU(W_g x_t) * h_t)

Decoding keeps h and the last ``taps - 1`` inputs u: 4 D numbers for 4 taps, whatever the length.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.cache import ContextStateLayer
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.gated_recurrence import SHARPNESS, GatedRecurrence, gated_states
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.stepping import StepWeights, product


class RecurrenceLayer(Taps, ContextStateLayer):
    """Keeps a recurrence's state and its convolution's taps: ``(1 + J) C`` numbers a row."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "state", "taps")


@register_mixer("R")
class RecurrentMixer(Mixer):
    """R as a layer's mixer: two projections in, one of them through the recurrence, one out."""

    step_names = (
        *("convolution.weight", "convolution.bias", "recurrence.decay"),
        *("recurrence.decay_gate.weight", "recurrence.decay_gate.bias"),
        *("recurrence.input_gate.weight", "recurrence.input_gate.bias"),
    )
    step_kept = ("taps", "state")

    def __init__(self, config: Any):
        super().__init__(config)
        width, taps = config.hidden_size, config.convolution
        # 1 is dense, 0 leaves the gates out.
        blocks = {"block_diagonal": config.num_attention_heads, "dense": 1, "none": 0}[config.gates]
        self.gate = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, width, bias=False)
        self.convolution = CausalConvolution(width, taps) if taps else None
        self.recurrence = GatedRecurrence(width, blocks)
        self.output = nn.Linear(width, width, bias=False)
        self.step_weights = StepWeights(self)

    @classmethod
    def new_state(cls, config: Any) -> RecurrenceLayer:
        """The recurrence's vector and the convolution's taps."""
        return RecurrenceLayer()

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse blocks of gates that do not fill the width."""
        config.check_divides("num_attention_heads", "hidden_size")

    def forward(self, x_BTD: Tensor, state: RecurrenceLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        inner_BTD, gate_BTD = (
            product(layer, x_BTD, step=new.is_step) for layer in (self.inner, self.gate)
        )
        mixed_B1D = self.step(new, state, inner_BTD, gate_BTD)
        if mixed_B1D is not None:
            return product(self.output, mixed_B1D, step=True)
        if self.convolution is not None:
            inner_BTD = self.convolution(inner_BTD, state, new)
        states_BTD = gated_states(self.recurrence, inner_BTD, state, new).to(x_BTD.dtype)
        return self.output(F.gelu(gate_BTD) * states_BTD)

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.linear_scan.step import gated_step

        kept = (state.taps, state.state, state.counts)
        given: list[Any] = [*projected_B1X, *kept, *weights]
        return gated_step(*given, sharpness=SHARPNESS)
