"""Dual-context attention: recent tokens, and one representative of each older span.

Source: the report 000_39ffc4a62d9fc6b5 (DESIGN 1.5). L0 holds the newest tokens, at most a window
W of them. Whenever it overflows, its oldest half window, a span, leaves and lives on as one vector
in L1. Two softmaxes, one over each, are mixed by a learned gate.

A buffer that is filled token by token and this parallel form agree, because the number of spans
that have left follows from a token's position alone: with half windows as blocks, L0 is a token's
own block, as far as the token, and the block before.

R is a number of representatives or of spans here, J of blocks; W the tokens of a block and S those
that it attends to; B is 1 where no row can differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from contextlm.models.attention import attend
from contextlm.models.cache import EntriesLayer, newest
from contextlm.models.inputs import NewTokens


class DualContextLayer(EntriesLayer):
    """The newest W hidden states of a layer, and the representatives of older spans (DESIGN 1.5).

    Hidden states rather than keys and values are kept, because both the keys and values of L0 and
    the mean of a span that leaves follow from them.

    Attributes:
        representatives: ``[B, <=max_representatives, D]``, each row's newest in the last column;
            None before the first span has left.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "representatives")

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.representatives: Tensor | None = None

    def remember(self, new_BRD: Tensor, new_B: Tensor, keep: int) -> Tensor:
        """Take in the representatives of the spans that leave.

        Args:
            new_BRD: of at most R spans, each row's real ones first.
            new_B: how many of them each row really has.
            keep: how many columns to keep, at most those of old and new together.

        Returns:
            Old and new ones, ``[B, K + R, D]``.
        """
        old_BKD = new_BRD[:, :0] if self.representatives is None else self.representatives
        both_BSD = torch.cat([old_BKD, new_BRD], dim=1)
        self.representatives = newest(both_BSD, old_BKD.shape[1] + new_B, keep)
        return both_BSD


@dataclass(frozen=True)
class Recent:
    """Attention to a token's own block, as far as the token, and to so many blocks before it.

    At the beginning of a text, and where no row is padded, each block is attended from on its own,
    so that the cost grows with the length and not with its square.

    Attributes:
        mask: ``[B, 1, T, S]``, or of the blocks, ``[J, 1, W, S]``; False where not to look.
        block: W where blocks are apart, 0 where they are not.
        before: blocks before a token's own.
    """

    mask: Tensor
    block: int
    before: int

    @classmethod
    def of(cls, new: NewTokens, *, block: int, before: int, limit: int) -> Recent:
        """For blocks of so many tokens, where at most `limit` old tokens are kept."""
        if new.mask_BT is None and new.past == 0 and new.tokens > (1 + before) * block:
            first_J11 = torch.arange(0, new.tokens, block, device=new.device).view(-1, 1, 1)
            key_S = torch.arange(-before * block, block, device=new.device)
            causal_WS = key_S <= torch.arange(block, device=new.device).unsqueeze(1)
            mask = (causal_WS & (first_J11 + key_S >= 0)).unsqueeze(1)
            return cls(mask, block, before)
        # Queries are in the order of the input, keys have real tokens first: padding is then later
        # than all of them, and causality hides it.
        key_B1S = new.columns(min(limit, new.past)).unsqueeze(1)
        query_BT1 = new.positions().unsqueeze(2)
        oldest_BT1 = (query_BT1 // block - before).clamp(min=0) * block
        mask = ((key_B1S <= query_BT1) & (key_B1S >= oldest_BT1)).unsqueeze(1)
        return cls(mask, 0, before)

    def attend(
        self, module: Attention, query_BTD: Tensor, key_BSD: Tensor, value_BSD: Tensor
    ) -> Tensor:
        """Multi-head attention, ``[B, T, D]``."""
        if not self.block:
            return multi_head(module, query_BTD, key_BSD, value_BSD, self.mask)
        batch, tokens = query_BTD.shape[:2]
        query, key, value = (
            F.pad(x, (0, 0, 0, -tokens % self.block)).unflatten(1, (-1, self.block))
            for x in (query_BTD, key_BSD, value_BSD)
        )
        out = multi_head(
            module,
            query.flatten(0, 1),
            self._neighbours(key),
            self._neighbours(value),
            self.mask.repeat(batch, 1, 1, 1),
        )
        return out.unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens].contiguous()

    def _neighbours(self, x_BJWD: Tensor) -> Tensor:
        """Each block behind those before it, ``[B J, S, D]``."""
        blocks = x_BJWD.shape[1]
        padded = F.pad(x_BJWD, (0, 0, 0, 0, self.before, 0))
        shifted = [padded[:, shift : shift + blocks] for shift in range(self.before + 1)]
        return torch.cat(shifted, dim=2).flatten(0, 1)


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
        spans_BRS: which tokens belong to the spans that may leave now.
        half: tokens of a span.
        new_B: how many of these spans really leave in each row.
        keep: columns of L1 to keep.
    """

    mask: Tensor
    filled_BT1: Tensor
    spans_BRS: Tensor
    half: int
    new_B: Tensor
    keep: int

    @classmethod
    def of(cls, new: NewTokens, *, half: int, most: int) -> Past:
        """For half windows of so many tokens, and at most so many representatives."""

        def most_spans(tokens: int) -> int:
            """Of any row; a row with padding may have fewer."""
            return max(0, (tokens - 1) // half - 1)

        seen = new.past + new.tokens
        real_B1 = new.tokens if new.mask_BT is None else new.counts.unsqueeze(1)
        before_B1 = spans_left(new.starts - 1, half)
        after_B1 = spans_left(new.starts + real_B1 - 1, half)
        fresh = min(-(-new.tokens // half), most_spans(seen))
        leaving_BR = before_B1 + torch.arange(fresh, device=new.device)

        old = min(most, most_spans(new.past))
        columns_R = torch.arange(old + fresh, device=new.device)
        span_B1R = (before_B1 - old + columns_R).unsqueeze(1)
        done_BT1 = spans_left(new.positions(), half).unsqueeze(2)
        filled_BT1 = done_BT1 > 0
        visible_BTR = (span_B1R < done_BT1) & (span_B1R >= (done_BT1 - most).clamp(min=0))
        of_span_B1S = new.columns(min(2 * half, new.past)).unsqueeze(1) // half
        return cls(
            mask=(visible_BTR | ~filled_BT1).unsqueeze(1),
            filled_BT1=filled_BT1,
            spans_BRS=leaving_BR.unsqueeze(2) == of_span_B1S,
            half=half,
            new_B=(after_B1 - before_B1).squeeze(1),
            keep=min(most, most_spans(seen)),
        )


@dataclass(frozen=True)
class Views:
    """Who sees what in one forward pass: the same for every layer of a kind."""

    new: NewTokens
    segment: Recent | None
    local: Recent
    past: Past

    def keep(self, new_BTE: Tensor, state: EntriesLayer | None) -> Tensor:
        """Entries kept and new, ``[B, S, E]``, real tokens first; moves the state on."""
        new_BTE = self.new.real_first(new_BTE)
        return new_BTE if state is None else state.append(new_BTE, self.new)


def multi_head(
    module: Attention, query_BTD: Tensor, key_BSD: Tensor, value_BSD: Tensor, mask: Tensor
) -> Tensor:
    """Attention with the heads and the dropout of a module, ``[B, T, D]``."""
    query, key, value = (
        x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x in (query_BTD, key_BSD, value_BSD)
    )
    return attend(module, query, key, value, mask, dropout=module.attn_dropout.p)[0]


class SegmentAttention(GPT2Attention):
    """GPT-2's attention within the W-aligned segment that a token is in."""

    def forward(self, hidden_BTD: Tensor, state: EntriesLayer | None, views: Views) -> Tensor:
        """What each token reads, ``[B, T, D]``; see `DualContextAttention.forward`."""
        assert views.segment is not None
        width = hidden_BTD.shape[-1]
        query_BTD, both = self.c_attn(hidden_BTD).split((width, 2 * width), dim=-1)
        key_BSD, value_BSD = views.keep(both, state).chunk(2, dim=-1)
        mixed_BTD = views.segment.attend(self, query_BTD, key_BSD, value_BSD)
        return self.resid_dropout(self.c_proj(mixed_BTD))


class DualContextAttention(nn.Module):
    """Attention over recent tokens (L0) and over representatives of older spans (L1)."""

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

    def forward(self, hidden_BTD: Tensor, state: DualContextLayer | None, views: Views) -> Tensor:
        """What each token reads from L0 and L1, ``[B, T, D]``; moves the state on."""
        local_BSD = views.keep(hidden_BTD, state)
        past_BRD = self._representatives(local_BSD, state, views.past)
        query_BTD = self.query(hidden_BTD)
        mixed_BTD = views.local.attend(
            self, query_BTD, self.local_key(local_BSD), self.local_value(local_BSD)
        )
        if past_BRD.shape[1]:  # otherwise no row can have any
            from_past_BTD = multi_head(
                self, query_BTD, self.past_key(past_BRD), past_BRD, views.past.mask
            )
            gate = torch.sigmoid(self.gate).to(mixed_BTD.dtype)
            both_BTD = gate * mixed_BTD + (1 - gate) * from_past_BTD
            mixed_BTD = torch.where(views.past.filled_BT1, both_BTD, mixed_BTD)
        return self.resid_dropout(self.out(mixed_BTD))

    def _representatives(
        self, local_BSD: Tensor, state: DualContextLayer | None, past: Past
    ) -> Tensor:
        """Those kept, and those of the spans that leave now, ``[B, R, D]``."""
        if past.spans_BRS.shape[1] == 0:
            return local_BSD[:, :0]
        mean_BRD = past.spans_BRS.to(local_BSD.dtype) @ local_BSD / past.half
        new_BRD = self.representative(mean_BRD)
        if state is None:
            return new_BRD
        return state.remember(new_BRD, past.new_B.expand(new_BRD.shape[0]), past.keep)


Attention = SegmentAttention | DualContextAttention
