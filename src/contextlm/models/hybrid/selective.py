"""S: a selective matrix state (`models.selective_state`; Mamba-2), E = expand * D channels of it.

Decoding keeps N E numbers, in float32 or bfloat16, and the convolution's last inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.selective_state import MatrixStateLayer, SelectiveState


@register_mixer("S")
class SelectiveMixer(Mixer):
    """S as a layer's mixer."""

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.hidden_size
        self.recurrence = SelectiveState(
            width,
            config.expand * width,
            width,
            config.state_head_dim,
            config.state_size,
            taps=config.convolution,
            eps=config.rms_norm_eps,
            selective=config.selective,
            normed=config.output_norm,
        )

    @classmethod
    def new_state(cls, config: Any) -> MatrixStateLayer:
        """The heads' matrices and the convolution's taps."""
        return MatrixStateLayer(torch.bfloat16 if config.state_dtype == "bfloat16" else None)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse heads that do not fill the channels."""
        config.check_state_heads(config.expand * config.hidden_size)

    def forward(self, x_BTD: Tensor, state: MatrixStateLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        mixed_BTD: Tensor = self.recurrence(x_BTD, state, new)
        return mixed_BTD
