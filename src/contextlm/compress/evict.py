"""`evict`: a budget of tokens a layer; those go that the newest queries attend to least.

The score of a token is the attention that it got, as SnapKV counts it (Li et al.,
arXiv:2404.14469): summed over the queries of a group of heads, averaged over neighbours. Where
SnapKV looks at a prompt's last queries once, here each query counts half as much as one
`HALF_LIFE` later, so that the choice goes on while decoding. Of one pass the last 2 x `HALF_LIFE`
queries count, which have three quarters of all weight: attention of earlier ones is not computed
anew. After each forward pass at most `budget` tokens are left in each layer, each head having
chosen its own; the newest `RECENT` are safe. A pass still attends to all of its own tokens: a
prompt that is read at once is only then cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from contextlm.compress.adaptors import Attention, rotated
from contextlm.compress.base import Costs, Policy, register_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.kept import (
    EVERYTHING,
    NOTHING,
    Group,
    KeyValueLayer,
    attention_mask,
    open_of,
    real_tokens,
)
from contextlm.compress.reading import Forward, Reader

RECENT = 16
HALF_LIFE = 32
NEIGHBOURS = 7  # tokens over which attention is averaged, an odd number


class ScoredLayer(KeyValueLayer):
    """Keeps keys and values, and each head's choice of tokens.

    Attributes:
        tokens: ``[B, G, K]`` int32, the index of each entry's token, or `NOTHING`.
        scores: ``[B, G, K]`` float32, the attention that it got.
    """

    beside: ClassVar[tuple[str, ...]] = ("tokens", "scores")
    tokens: Tensor | None
    scores: Tensor | None


class ScoredReader(Reader):
    """Attends to what is left, counts attention, and drops what got least."""

    def __init__(self, attention: Attention, group: Group, budget: int):
        super().__init__(attention, group)
        self.budget = budget

    def new_layer(self, key: int) -> ScoredLayer:
        return ScoredLayer(key, croppable=False)

    def attend(self, layer: ScoredLayer, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        rows, new = hidden_BTD.shape[:2]
        given = kwargs.get("attention_mask")
        real_BT = real_tokens(given, rows, new)
        if layer.counts is None:
            layer.counts = torch.zeros(rows, dtype=torch.long, device=hidden_BTD.device)
        if real_BT is None:
            real_BT = torch.ones(rows, new, dtype=torch.bool, device=hidden_BTD.device)
        steps_BT = real_BT.cumsum(1)
        query_BT = layer.counts[:, None] + steps_BT - 1
        query_BT = query_BT.masked_fill(~real_BT, NOTHING).to(torch.int32)
        new_BGT = query_BT[:, None].expand(-1, self.attention.groups, -1)
        old_BGK = new_BGT[..., :0] if layer.tokens is None else layer.tokens
        layer.tokens = torch.cat([old_BGK, new_BGT], dim=-1)
        layer.counts = layer.counts + steps_BT[:, -1]
        seen_BGTS = self.group.visible(query_BT[:, None, :, None], layer.tokens[:, :, None])
        if given is not None:
            seen_BGTS[..., -new:] &= open_of(given)[:, None]
        seen_BGTS[..., -new:] |= torch.eye(new, dtype=torch.bool, device=hidden_BTD.device)
        seen_BHTS = seen_BGTS.repeat_interleave(self.attention.heads // self.attention.groups, 1)
        mask = given
        if layer.held:
            mask = attention_mask(seen_BHTS, self.attention.implementation, hidden_BTD.dtype)
            if new == 1 and bool(seen_BGTS.all()):
                mask = None
        result = forward(hidden_BTD, **self.through(layer.append, mask, kwargs))
        self.count(layer, hidden_BTD, seen_BHTS, real_BT, kwargs.get("position_embeddings"))
        layer.settle(None, new)
        if layer.held > self.budget:
            self.evict(layer)
        return result

    @torch.no_grad()
    def count(
        self, layer: ScoredLayer, hidden_BTD: Tensor, seen_BHTS: Tensor, real_BT: Tensor, turns: Any
    ) -> None:
        """Add the attention that the last new tokens give."""
        attention, new = self.attention, hidden_BTD.shape[1]
        last = min(new, 2 * HALF_LIFE)
        query_BHTE = attention.queries(hidden_BTD[:, -last:])
        if attention.has_rotary:
            query_BHTE = rotated(query_BHTE, (turns[0][:, -last:], turns[1][:, -last:]))
        query_BGJTE = query_BHTE.unflatten(1, (attention.groups, -1))
        weights_BGJTS = attention.weights(
            query_BGJTE @ layer.keys[:, :, None].mT,
            seen_BHTS[:, :, -last:].unflatten(1, (attention.groups, -1)),
        )
        age_T = torch.arange(last - 1, -1, -1, device=hidden_BTD.device)
        counts_BT = real_BT[:, -last:] * torch.exp2(-age_T / HALF_LIFE)
        got_BGS = torch.einsum("bgjts,bt->bgs", weights_BGJTS.float(), counts_BT)
        assert layer.tokens is not None
        real_BGS = (layer.tokens != NOTHING).to(got_BGS)
        got_BGS = _pooled(got_BGS * real_BGS) / _pooled(real_BGS).clamp(min=1 / NEIGHBOURS)
        if layer.scores is not None:
            got_BGS[..., : layer.scores.shape[-1]] += layer.scores * 0.5 ** (new / HALF_LIFE)
        layer.scores = got_BGS

    def evict(self, layer: ScoredLayer) -> None:
        """Keep `budget` entries of each head, in order."""
        assert layer.scores is not None
        assert layer.tokens is not None
        assert layer.counts is not None
        now_B11 = layer.counts[:, None, None].to(torch.int32)
        useless_BGS = ~self.group.visible(now_B11, layer.tokens)
        worth_BGS = layer.scores.masked_fill(now_B11 - layer.tokens <= RECENT, float("inf"))
        worth_BGS = worth_BGS.masked_fill(useless_BGS, -1.0)
        keep_BGK = worth_BGS.topk(self.budget, dim=-1, sorted=False).indices.sort(dim=-1).values
        layer.tokens = layer.tokens.masked_fill(useless_BGS, NOTHING).gather(2, keep_BGK)
        layer.scores = layer.scores.gather(2, keep_BGK)
        keep_BGKE = keep_BGK[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = (
            layer.keys.gather(2, keep_BGKE),
            layer.values.gather(2, keep_BGKE),
        )


def _pooled(counts_BGS: Tensor) -> Tensor:
    """Means over neighbours; beyond the ends there is nothing."""
    return F.avg_pool1d(counts_BGS, NEIGHBOURS, 1, NEIGHBOURS // 2)


@register_policy("evict")
class Evict(Policy):
    """At most `budget` tokens a layer, those that each head's newest queries attend to."""

    can_train: ClassVar[bool] = False
    budget: int = Field(gt=RECENT)

    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        return [
            ScoredReader(
                attention,
                Group(EVERYTHING, attention),
                min(self.budget, (attention.window or self.budget + 1) - 1),
            )
            for attention in attentions
        ]

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Evict | None:
        budget = round(share * costs.tokens)
        return cls(budget=budget) if budget > RECENT else None
