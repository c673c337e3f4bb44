"""`representatives`: the last tokens, and one mean key and value for each span before them.

Document 000's idea (DESIGN 1.5), without its training. With a window of W tokens and spans of w =
W / 2, span s leaves the window of token i once s < e(i) = max(0, ceil((i + 1 - W) / w)), and is
one entry from then on. That entry stands for w tokens, so log w is added to its score: if all keys
of a span were alike, attention would be what it was. Tokens that are kept as sinks count for no
span.

Further letters: R, spans; X, spans and entries of single tokens; S, the latter alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from contextlm.compress.adaptors import Attention
from contextlm.compress.base import Costs, Policy, register_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.kept import (
    NOTHING,
    Group,
    KeyValueLayer,
    Plan,
    Rule,
    check_takes_masks,
)
from contextlm.compress.reading import Forward, Reader, groups_of
from contextlm.compress.window import SINKS


class Spans(Rule):
    """Hides a span of `width` tokens from all tokens for whose window of two such it is too old."""

    def __init__(self, width: int, sinks: int):
        self.width, self.sinks = width, sinks

    def left(self, query: Tensor) -> Tensor:
        """e: how many spans have left the window of a token of this index."""
        return -(-(query + 1 - 2 * self.width) // self.width).clamp(max=0)

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        return (token >= self.width * self.left(query)) | (token < self.sinks)

    def spares(self, tokens: int) -> bool:
        return tokens < 2 * self.width

    def sizes(self, spans: int) -> list[int]:
        """How many tokens stand behind the representative of each of so many spans."""
        return [self.width - self.sinks, *[self.width] * spans][:spans]


class SpanGroup(Group):
    """Plans with the representatives in front of the entries of single tokens."""

    rule: Spans

    def mask(
        self, seen_BTS: Tensor, query_BT: Tensor, after_B: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        spans = int(self.rule.left(after_B).max())
        if spans == 0:
            return super().mask(seen_BTS, query_BT, after_B, dtype)
        check_takes_masks(self.leader.implementation)
        number_R = torch.arange(spans, device=seen_BTS.device)
        seen_BTR = number_R < self.rule.left(query_BT)[..., None]
        bias_R = torch.tensor([math.log(size) for size in self.rule.sizes(spans)], dtype=dtype)
        bias_R = bias_R.to(seen_BTS.device)
        bias_BTX = torch.cat(
            [bias_R.expand_as(seen_BTR), bias_R.new_zeros(()).expand_as(seen_BTS)], dim=-1
        )
        hidden_BTX = ~torch.cat([seen_BTR, seen_BTS], dim=-1)
        return bias_BTX.masked_fill(hidden_BTX, torch.finfo(dtype).min)[:, None]


class SpanLayer(KeyValueLayer):
    """Keeps keys and values of single tokens, and means of them, ``[B, G, R, E]``.

    A row's representative of span s is in place s; places that it has not reached hold nothing.
    """

    beside: ClassVar[tuple[str, ...]] = ("mean_keys", "mean_values")

    def summarise(self, rule: Spans, plan: Plan) -> None:
        """Add representatives of the spans that no later token sees."""
        assert plan.index_BS is not None
        assert plan.before_B is not None
        assert plan.after_B is not None
        had_B, spans = rule.left(plan.before_B), int(rule.left(plan.after_B).max())
        first = int(had_B.min())  # the spans before it have theirs in every row
        number_R = torch.arange(first, spans, device=had_B.device)
        token_BS = plan.index_BS
        own_BRS = (token_BS[:, None] // rule.width == number_R[:, None]) & (
            (token_BS >= rule.sinks) & (token_BS != NOTHING)
        )[:, None]
        sizes_R = torch.tensor(rule.sizes(spans)[first:], device=had_B.device)
        made_before_BR = number_R < had_B[:, None]
        for name in ("keys", "values"):
            tokens_BGSE, old = getattr(self, name), getattr(self, f"mean_{name}")
            total_BGRE = torch.einsum("brs,bgse->bgre", own_BRS.to(tokens_BGSE), tokens_BGSE)
            new_BGRE = total_BGRE / sizes_R[:, None].to(total_BGRE)
            if old is not None:
                old = old[:, :, :spans]  # there are more where rows that were longer are gone
                missing = spans - old.shape[2]
                old = torch.cat([old, new_BGRE[:, :, new_BGRE.shape[2] - missing :]], dim=2)
                kept_BGRE = old[:, :, first:]
                new_BGRE = torch.where(made_before_BR[:, None, :, None], kept_BGRE, new_BGRE)
                new_BGRE = torch.cat([old[:, :, :first], new_BGRE], dim=2)
            setattr(self, f"mean_{name}", new_BGRE)


class SpanReader(Reader):
    """Attends to representatives and to the tokens of the window."""

    group: SpanGroup

    def new_layer(self, key: int) -> SpanLayer:
        return SpanLayer(key, croppable=False)

    def attend(self, layer: SpanLayer, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        plan = self.plan(layer, hidden_BTD, kwargs)

        def update(new_keys_BGTE: Tensor, new_values_BGTE: Tensor) -> tuple[Tensor, ...]:
            both = layer.append(new_keys_BGTE, new_values_BGTE)
            if plan.after_B is not None and int(self.group.rule.left(plan.after_B).max()):
                layer.summarise(self.group.rule, plan)
                means = layer.mean_keys, layer.mean_values
                return tuple(torch.cat(pair, dim=2) for pair in zip(means, both, strict=True))
            return both

        result = forward(hidden_BTD, **self.through(update, plan.mask, kwargs))
        layer.settle(plan.keep_BK, hidden_BTD.shape[1])
        return result


@register_policy("representatives")
class Representatives(Policy):
    """The last `window` tokens, and one mean key and value for each half window before them."""

    window: PositiveInt
    sinks: NonNegativeInt = 0

    @model_validator(mode="after")
    def _halves(self) -> Representatives:
        if self.window % 2 or self.sinks >= self.window // 2:
            raise ValueError("expected an even window, and fewer sinks than half of it")
        return self

    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        rule = Spans(self.window // 2, self.sinks)
        groups = groups_of(attentions, rule, SpanGroup)
        return [SpanReader(*pair) for pair in zip(attentions, groups, strict=True)]

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Representatives | None:
        """The widest window W with W + 2 n / W entries and the sinks in the budget at n tokens."""
        budget = share * costs.tokens - SINKS
        square = budget**2 - 8 * costs.tokens
        if square < 0:
            return None
        return cls(window=int(budget + math.sqrt(square)) // 4 * 2, sinks=SINKS)
