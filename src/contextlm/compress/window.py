"""`window`: the last tokens, and the first few that attention leans on.

The first tokens draw attention whatever they say, so that a window without them fails (attention
sinks, Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453).
Positions stay those of the text.
"""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from contextlm.compress.base import Costs, Selection, register_policy

SINKS = 4


@register_policy("window")
class Window(Selection):
    """The last `window` tokens, and the first `sinks`."""

    window: PositiveInt
    sinks: NonNegativeInt = 0

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        return (query - token < self.window) | (token < self.sinks)

    def spares(self, tokens: int) -> bool:
        return tokens < self.window

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Window | None:
        window = round(share * costs.tokens) - SINKS
        return cls(window=window, sinks=SINKS) if window > 0 else None
