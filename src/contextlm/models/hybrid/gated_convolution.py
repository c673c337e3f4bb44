"""C: a short convolution between two gates, for what stands a few tokens back.

Source: LFM2 (Liquid AI, arXiv:2511.23404)::

    b, c, u = split(W_in x);    out = W_out (c * convolution(b * u))

Decoding keeps the convolution's last inputs, and no state.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from contextlm.models.cache import RowStateLayer
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens


class TapsLayer(Taps, RowStateLayer):
    """Keeps a convolution's taps."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "taps")


@register_mixer("C")
class GatedConvolution(Mixer):
    """C as a layer's mixer."""

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.hidden_size
        self.inner = nn.Linear(width, 3 * width, bias=False)
        self.convolution = CausalConvolution(width, config.convolution, start="uniform")
        self.output = nn.Linear(width, width, bias=False)

    @classmethod
    def new_state(cls, config: Any) -> TapsLayer:
        """The convolution's taps."""
        return TapsLayer()

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse to be without a convolution."""
        config.check_counts("convolution")

    def forward(self, x_BTD: Tensor, state: TapsLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        before_BTD, behind_BTD, inner_BTD = self.inner(x_BTD).chunk(3, dim=-1)
        mixed_BTD = self.convolution(before_BTD * inner_BTD, state, new)
        if state is not None:
            state.advance(new)
        return self.output((behind_BTD * mixed_BTD).to(x_BTD.dtype))
