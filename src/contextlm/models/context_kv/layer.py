"""The attention layer of Context-KV: token embeddings read a memory of contexts (DESIGN 1.3).

`ContextAttention` reads contexts, `TokenAttention` (the baseline) the last tokens themselves.

C is the width of an entry of the memory here.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from contextlm.models.cache import EntriesLayer
from contextlm.models.context_kv.cache import Reading
from contextlm.models.inputs import NewTokens, take
from contextlm.ops.dilated_attention import Anchor, dilated_attention, gather_attention


class Memory(NamedTuple):
    """The contexts that T tokens are to read.

    Attributes:
        entries: ``[B, S, C]``. Without `reading` they are the tokens' own and, in front, those of
            the positions just before.
        start_B: position of each row's first token; None: all rows start at 0.
        reading: which entries each token reads, where they do not lie one position apart.
    """

    entries: Tensor
    start_B: Tensor | None = None
    reading: Reading | None = None

    def of_last(self, queries: int, tokens: int, history: int) -> Memory:
        """The same for the last so many of the T tokens, which read so far back at most."""
        if self.reading is not None:
            reading = Reading(*(columns[:, -queries:] for columns in self.reading))
            return Memory(self.entries, reading=reading)
        start_B = torch.zeros(1, dtype=torch.long, device=self.entries.device)
        start_B = start_B if self.start_B is None else self.start_B
        return Memory(self.entries[:, -(history + queries) :], start_B + tokens - queries)


class TokenWindow(NamedTuple):
    """The tokens that the last of them are to read, in the order of the input.

    Attributes:
        entries: ``[B, T, D]``, embeddings of the new tokens.
        new: these tokens.
        state: keys and values of earlier tokens, moved on by reading; None: there are none, and no
            later ones will come.
    """

    entries: Tensor
    new: NewTokens
    state: EntriesLayer | None


class MemoryAttention(nn.Module):
    """Attention of each token's embedding to M entries of a memory; what both kinds share.

    `entry_dim` is C, `size` M; `interval`, `anchor` and `padding` are as in the configuration.
    """

    def __init__(
        self,
        hidden_size: int,
        entry_dim: int,
        heads: int,
        *,
        interval: int,
        size: int,
        anchor: Anchor,
        padding: Literal["zeros", "mask"],
        dropout: float,
    ):
        super().__init__()
        self.heads = heads
        self.interval = interval
        self.size = size
        self.anchor = anchor
        self.padding = padding
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(entry_dim, hidden_size)
        self.value = nn.Linear(entry_dim, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def _attend(
        self,
        stream_BTD: Tensor,
        key_BSD: Tensor,
        value_BSD: Tensor,
        start_B: Tensor | None = None,
        reading: Reading | None = None,
    ) -> Tensor:
        """What each token reads, ``[B, T, D]``; for the last two see `Memory`."""
        query_BHTE = self._heads(self.query(stream_BTD))
        memory = (self._heads(key_BSD), self._heads(value_BSD))
        dropout = self.dropout if self.training else 0.0
        pads: dict[str, Tensor] = {}
        if self.padding == "zeros":
            zero_1C = stream_BTD.new_zeros(1, self.key.in_features)
            pads["pad_key_HE"] = self.key(zero_1C).view(self.heads, -1)
            pads["pad_value_HE"] = self.value(zero_1C).view(self.heads, -1)
        if reading is not None:
            mixed_BHTE = gather_attention(query_BHTE, *memory, *reading, dropout=dropout, **pads)
        else:
            mixed_BHTE = dilated_attention(
                query_BHTE,
                *memory,
                interval=self.interval,
                size=self.size,
                anchor=self.anchor,
                start_B=start_B,
                dropout=dropout,
                **pads,
            )
        return self.output(mixed_BHTE.transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ContextAttention(MemoryAttention):
    """Reads contexts. Decoding keeps these, narrower than keys and values, and projects a few."""

    def forward(self, stream_BTD: Tensor, *of_memory: Any) -> Tensor:
        """What each token reads of a `Memory`, ``[B, T, D]``."""
        memory = Memory(*of_memory)
        if memory.reading is not None and stream_BTD.shape[1] == 1:
            memory = _only_read(memory.entries, memory.reading)
        entries_BSC, start_B, reading = memory
        keys_BSD, values_BSD = self.key(entries_BSC), self.value(entries_BSC)
        return self._attend(stream_BTD, keys_BSD, values_BSD, start_B, reading)


class TokenAttention(MemoryAttention):
    """Reads the last M tokens, side by side, as any attention with a sliding window does.

    Decoding keeps keys and values, ``[B, <= M - 1, 2 D]``.
    """

    def forward(self, stream_BTD: Tensor, *of_window: Any) -> Tensor:
        """What the last T tokens of a `TokenWindow` read, ``[B, T, D]``; the others serve them."""
        window = TokenWindow(*of_window)
        entries_BSD = torch.cat([self.key(window.entries), self.value(window.entries)], dim=-1)
        state = EntriesLayer(self.size - 1) if window.state is None else window.state
        new, before = window.new, entries_BSD.shape[1] - stream_BTD.shape[1]
        if before:
            earlier, new = new.split(before)
            state.append(earlier.real_first(entries_BSD[:, :before]), earlier)
        both_BSD = state.append(new.real_first(entries_BSD[:, before:]), new)
        keys_BSD, values_BSD = both_BSD.chunk(2, dim=-1)
        stream_BTD = new.real_first(stream_BTD)
        return new.as_given(self._attend(stream_BTD, keys_BSD, values_BSD, new.seen_B))


class ContextKVLayer(GradientCheckpointingLayer):
    """``h = LN(e + attention)``, then ``h + LN(W_2 GELU(W_1 h))``; dropout on both parts."""

    def __init__(
        self, attention: MemoryAttention, intermediate_size: int, dropout: float, eps: float
    ):
        super().__init__()
        width = attention.output.out_features
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream_BTD: Tensor, *memory: Any) -> Tensor:
        """``[B, T, D]``. The memory is of the attention's own kind, taken apart.

        Gradient checkpointing sees only the tensors among the arguments themselves.
        """
        read_BTD = self.dropout(self.attention(stream_BTD, *memory))
        hidden_BTD = self.attention_norm(stream_BTD + read_BTD)
        branch_BTD = self.feed_forward_norm(self.down(F.gelu(self.up(hidden_BTD))))
        return hidden_BTD + self.dropout(branch_BTD)


def _only_read(entries_BSC: Tensor, reading: Reading) -> Memory:
    """The entries that a single token reads, so that no other is projected in vain."""
    columns_BM = reading.columns[:, 0]
    in_order_M = torch.arange(columns_BM.shape[1], device=columns_BM.device)
    columns_BTM = in_order_M.expand_as(reading.columns)
    return Memory(take(entries_BSC, columns_BM), reading=Reading(columns_BTM, reading.real))
