"""`interval`: the last tokens, and every s-th before them, as document 001 reads its contexts."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor

from contextlm.compress.base import Costs, Selection, register_policy


@register_policy("interval")
class Interval(Selection):
    """The last `window` tokens, and before them every `every`-th, counted from the text's start."""

    window: PositiveInt
    every: PositiveInt = 20

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        return (query - token < self.window) | (token % self.every == 0)

    def spares(self, tokens: int) -> bool:
        return tokens < self.window or self.every == 1

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Interval | None:
        """Half of the budget for the window, half for what is before it."""
        window = round(share * costs.tokens / 2)
        if not 0 < window < costs.tokens:
            return None
        return cls(window=window, every=-(-(costs.tokens - window) // window))
