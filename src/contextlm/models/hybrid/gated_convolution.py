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
from contextlm.models.stepping import StepWeights, product


class TapsLayer(Taps, RowStateLayer):
    """Keeps a convolution's taps."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "taps")


@register_mixer("C")
class GatedConvolution(Mixer):
    """C as a layer's mixer."""

    step_names = ("convolution.weight", "convolution.bias")
    step_kept = ("taps",)

    def __init__(self, config: Any):
        super().__init__(config)
        width, taps = config.hidden_size, config.convolution
        self.inner = nn.Linear(width, 3 * width, bias=False)
        self.convolution = CausalConvolution(width, taps, start="uniform")
        self.output = nn.Linear(width, width, bias=False)
        self.step_weights = StepWeights(self)

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
        projected_BTX = product(self.inner, x_BTD, step=new.is_step)
        mixed_BTD = self.step(new, state, projected_BTX)
        if mixed_BTD is None:
            before_BTD, behind_BTD, inner_BTD = projected_BTX.chunk(3, dim=-1)
            mixed_BTD = behind_BTD * self.convolution(before_BTD * inner_BTD, state, new)
            if state is not None:
                state.advance(new)
        return product(self.output, mixed_BTD.to(x_BTD.dtype), step=new.is_step)

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.short_convolution.step import gated_convolution_step

        given: list[Any] = [*projected_B1X, state.taps, *weights]
        return gated_convolution_step(*given)
