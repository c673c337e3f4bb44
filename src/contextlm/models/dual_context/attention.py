"""Dual-context attention: recent tokens, and one representative of each older span.

Source: the report 000_39ffc4a62d9fc6b5 (DESIGN 1.5). L0 holds the newest tokens, at most a window
W of them. Whenever it overflows, its oldest half window, a span, leaves and lives on as one vector
in L1. Two softmaxes, one over each, are mixed by a learned gate.

A buffer that is filled token by token and this parallel form agree, because the number of spans
that have left follows from a token's position alone: with half windows as blocks, L0 is a token's
own block, as far as the token, and the block before.

Shape suffixes: B batch (1 where no row can differ), T new tokens, S tokens kept and new, N new
spans, R representatives kept and new, D model width, H heads, E head width, G blocks, P tokens of
a block, J tokens that a block attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward

from contextlm.models.cache import RecentLayer
from contextlm.models.dual_context.cache import DualContextLayer, Timeline


class Attention(Protocol):
    """What `attend` reads of an attention module: the names are GPT-2's."""

    config: GPT2Config
    num_heads: int
    attn_dropout: nn.Dropout
    training: bool


@dataclass(frozen=True)
class MaskStyle:
    """How the attention function wants its masks: eager attention adds them to the scores."""

    implementation: str
    dtype: torch.dtype

    def __call__(self, visible_BTS: Tensor) -> Tensor:
        """``[B, T, S]`` bool to ``[B, 1, T, S]``."""
        visible_B1TS = visible_BTS.unsqueeze(1)
        if self.implementation != "eager":
            return visible_B1TS
        zeros = torch.zeros(visible_B1TS.shape, dtype=self.dtype, device=visible_BTS.device)
        return zeros.masked_fill(~visible_B1TS, torch.finfo(self.dtype).min)


@dataclass(frozen=True)
class Recent:
    """Attention to a token's own block, as far as the token, and to so many blocks before it.

    At the beginning of a text, and where no row is padded, each block is attended from on its own,
    so that the cost grows with the length and not with its square.

    Attributes:
        mask: ``[B, 1, T, S]``, or of the blocks, ``[G, 1, P, J]``.
        block: P where blocks are apart, 0 where they are not.
        before: blocks before a token's own.
    """

    mask: Tensor
    block: int
    before: int

    @classmethod
    def of(
        cls, timeline: Timeline, style: MaskStyle, *, block: int, before: int, limit: int
    ) -> Recent:
        """For blocks of so many tokens, where at most `limit` old tokens are kept."""
        if timeline.plain and timeline.tokens > (1 + before) * block:
            device = timeline.query_BT.device
            first_G11 = torch.arange(0, timeline.tokens, block, device=device).view(-1, 1, 1)
            key_J = torch.arange(-before * block, block, device=device)
            causal_PJ = key_J <= torch.arange(block, device=device).unsqueeze(1)
            return cls(style(causal_PJ & (first_G11 + key_J >= 0)), block, before)
        key_B1S = timeline.keys(limit).unsqueeze(1)
        query_BT1 = timeline.query_BT.unsqueeze(2)
        oldest_BT1 = (query_BT1 // block - before).clamp(min=0) * block
        return cls(style((key_B1S <= query_BT1) & (key_B1S >= oldest_BT1)), 0, before)

    def attend(self, module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multi-head attention, ``[B, T, D]``."""
        if not self.block:
            return attend(module, query, key, value, self.mask)
        batch, tokens = query.shape[:2]
        query, key, value = (
            F.pad(x, (0, 0, 0, -tokens % self.block)).unflatten(1, (-1, self.block))
            for x in (query, key, value)
        )
        out = attend(
            module,
            query.flatten(0, 1),
            self._neighbours(key),
            self._neighbours(value),
            self.mask.repeat(batch, 1, 1, 1),
        )
        return out.unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens].contiguous()

    def _neighbours(self, x_BGPD: Tensor) -> Tensor:
        """Each block behind those before it, ``[B G, J, D]``."""
        blocks = x_BGPD.shape[1]
        padded = F.pad(x_BGPD, (0, 0, 0, 0, self.before, 0))
        shifted = [padded[:, shift : shift + blocks] for shift in range(self.before + 1)]
        return torch.cat(shifted, dim=2).flatten(0, 1)


def attend(module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Multi-head attention by the function that is configured; all ``[B, tokens, D]``."""
    function = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    query, key, value = (
        x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    dropout = module.attn_dropout.p if module.training else 0.0
    scaling = query.shape[-1] ** -0.5
    out_BTHE, _ = function(module, query, key, value, mask, dropout=dropout, scaling=scaling)
    return out_BTHE.flatten(2)


def spans_left(last: Tensor, half: int) -> Tensor:
    """How many spans of `half` tokens have left L0 once the token at position `last` has come.

    This is ``max(0, ceil((last + 1 - 2 half) / half))``; 0 for positions before the first token.
    """
    return (last // half - 1).clamp(min=0)


@dataclass(frozen=True)
class Past:
    """Which spans leave L0 now, and who sees which of those that have left.

    Attributes:
        mask: for L1, ``[B, 1, T, R]``. A query whose L1 is empty sees all of it, which keeps the
            softmax finite; `filled_BT1` says that the outcome does not count.
        filled_BT1: False where L1 is empty.
        spans_BNS: which tokens belong to the spans that may leave now.
        half: tokens of a span.
        new_B: how many of these spans really leave in each row.
        keep: columns of L1 to keep.
    """

    mask: Tensor
    filled_BT1: Tensor
    spans_BNS: Tensor
    half: int
    new_B: Tensor
    keep: int

    @classmethod
    def of(cls, timeline: Timeline, style: MaskStyle, *, half: int, most: int) -> Past:
        """For half windows of so many tokens, and at most so many representatives."""

        def most_spans(tokens: int) -> int:
            """Of any row; a row with padding may have fewer."""
            return max(0, (tokens - 1) // half - 1)

        device = timeline.query_BT.device
        seen = timeline.past + timeline.tokens
        before_B1 = spans_left(timeline.start_B1 - 1, half)
        after_B1 = spans_left(timeline.end_B1 - 1, half)
        fresh = min(-(-timeline.tokens // half), most_spans(seen))
        new_BN1 = (before_B1 + torch.arange(fresh, device=device)).unsqueeze(2)

        old = min(most, most_spans(timeline.past))
        span_B1R = (before_B1 - old + torch.arange(old + fresh, device=device)).unsqueeze(1)
        done_BT1 = spans_left(timeline.query_BT, half).unsqueeze(2)
        filled_BT1 = done_BT1 > 0
        visible_BTR = (span_B1R < done_BT1) & (span_B1R >= (done_BT1 - most).clamp(min=0))
        return cls(
            mask=style(visible_BTR | ~filled_BT1),
            filled_BT1=filled_BT1,
            spans_BNS=new_BN1 == timeline.keys(2 * half).unsqueeze(1) // half,
            half=half,
            new_B=(after_B1 - before_B1).squeeze(1),
            keep=min(most, most_spans(seen)),
        )


@dataclass(frozen=True)
class Plan:
    """Who sees what in one forward pass: the same for every layer of a kind."""

    timeline: Timeline
    segment: Recent | None
    local: Recent
    past: Past


class SegmentAttention(GPT2Attention):
    """GPT-2's attention within the W-aligned segment that a token is in."""

    def forward(self, hidden_BTD: Tensor, state: RecentLayer | None, plan: Plan) -> Tensor:
        """What each token reads, ``[B, T, D]``; see `DualContextAttention.forward`."""
        assert plan.segment is not None
        width = hidden_BTD.shape[-1]
        query_BTD, both = self.c_attn(hidden_BTD).split((width, 2 * width), dim=-1)
        key_BSD, value_BSD = plan.timeline.keep(both, state).chunk(2, dim=-1)
        mixed_BTD = plan.segment.attend(self, query_BTD, key_BSD, value_BSD)
        return self.resid_dropout(self.c_proj(mixed_BTD))


class DualContextAttention(nn.Module):
    """Attention over recent tokens (L0) and over representatives of older spans (L1).

    Args:
        config: the base's, for width, heads, dropout, and the attention function.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.local_key = nn.Linear(width, width)
        self.local_value = nn.Linear(width, width)
        self.past_key = nn.Linear(width, width)
        self.representative = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(config.resid_pdrop),
            nn.Linear(width, width),
            nn.LayerNorm(width, eps=config.layer_norm_epsilon),
        )
        self.gate = nn.Parameter(torch.zeros(1))
        self.out = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_BTD: Tensor, state: DualContextLayer | None, plan: Plan) -> Tensor:
        """What each token reads from L0 and L1, ``[B, T, D]``.

        Args:
            hidden_BTD: of the new tokens.
            state: what decoding keeps; moved on. None to keep nothing.
            plan: who sees what.
        """
        local_BSD = plan.timeline.keep(hidden_BTD, state)
        past_BRD = self._representatives(local_BSD, state, plan.past)
        query_BTD = self.query(hidden_BTD)
        mixed_BTD = plan.local.attend(
            self, query_BTD, self.local_key(local_BSD), self.local_value(local_BSD)
        )
        if past_BRD.shape[1]:  # otherwise no row can have any
            from_past_BTD = attend(
                self, query_BTD, self.past_key(past_BRD), past_BRD, plan.past.mask
            )
            gate = torch.sigmoid(self.gate).to(mixed_BTD.dtype)
            both_BTD = gate * mixed_BTD + (1 - gate) * from_past_BTD
            mixed_BTD = torch.where(plan.past.filled_BT1, both_BTD, mixed_BTD)
        return self.resid_dropout(self.out(mixed_BTD))

    def _representatives(
        self, local_BSD: Tensor, state: DualContextLayer | None, past: Past
    ) -> Tensor:
        """Those kept, and those of the spans that leave now, ``[B, R, D]``."""
        if past.spans_BNS.shape[1] == 0:
            return local_BSD[:, :0]
        mean_BND = past.spans_BNS.to(local_BSD.dtype) @ local_BSD / past.half
        new_BND = self.representative(mean_BND)
        if state is None:
            return new_BND
        return state.remember(new_BND, past.new_B.expand(new_BND.shape[0]), past.keep)
