"""The attention layer of Context-KV: token embeddings read a memory of contexts (DESIGN 1.3).

Shape suffixes: B batch, T tokens, S memory entries, M entries read by a token, D embedding width,
C an entry's width, N heads, E width of a head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.context_kv_cache import Reading
from contextlm.ops.dilated_attention import Anchor, dilated_attention, gather_attention


class Memory(NamedTuple):
    """What T tokens are to read.

    Attributes:
        entries: ``[B, S, C]``. Without `reading` they are the tokens' own and, in front, those of
            the positions just before.
        start_B: position of each row's first token; None: all rows start at 0.
        reading: which entries each token reads, where they do not lie one position apart.
    """

    entries: Tensor
    start_B: Tensor | None = None
    reading: Reading | None = None


class MemoryAttention(nn.Module):
    """Attention of each token's embedding to M entries of a memory.

    Args:
        hidden_size: D.
        entry_dim: C.
        heads: N.
        interval: positions from one entry that is read to the next.
        size: M.
        anchor: where the earlier entries lie (`dilated_attention`).
        padding: whether missing entries take part as zero vectors or are left out.
        dropout: on the attention weights in training.
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

    def forward(self, stream_BTD: Tensor, memory: Memory) -> Tensor:
        """What each token reads, ``[B, T, D]``."""
        if memory.reading is not None and stream_BTD.shape[1] == 1:
            memory = _only_read(memory.entries, memory.reading)
        query_BNTE = self._heads(self.query(stream_BTD))
        key_BNSE = self._heads(self.key(memory.entries))
        value_BNSE = self._heads(self.value(memory.entries))
        dropout = self.dropout if self.training else 0.0
        pads: dict[str, Tensor] = {}
        if self.padding == "zeros":  # the key and the value of a zero vector are the biases
            pads["pad_key_HE"] = self.key.bias.view(self.heads, -1)
            pads["pad_value_HE"] = self.value.bias.view(self.heads, -1)
        if memory.reading is not None:
            mixed_BNTE = gather_attention(
                query_BNTE, key_BNSE, value_BNSE, *memory.reading, dropout=dropout, **pads
            )
        else:
            mixed_BNTE = dilated_attention(
                query_BNTE,
                key_BNSE,
                value_BNSE,
                interval=self.interval,
                size=self.size,
                anchor=self.anchor,
                start_B=memory.start_B,
                dropout=dropout,
                **pads,
            )
        return self.output(mixed_BNTE.transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ContextKVLayer(nn.Module):
    """``h = LN(e + attention)``, then ``h + LN(W_2 GELU(W_1 h))``.

    Args:
        attention: reads the memory.
        intermediate_size: width of the feed-forward part.
        dropout: on the outputs of attention and feed-forward part.
        eps: of the layer norms.
    """

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

    def forward(self, stream_BTD: Tensor, memory: Memory) -> Tensor:
        """``[B, T, D]``."""
        read_BTD = self.dropout(self.attention(stream_BTD, memory))
        hidden_BTD = self.attention_norm(stream_BTD + read_BTD)
        branch_BTD = self.feed_forward_norm(self.down(F.gelu(self.up(hidden_BTD))))
        return hidden_BTD + self.dropout(branch_BTD)


def _only_read(entries_BSC: Tensor, reading: Reading) -> Memory:
    """The entries that a single token reads, so that no other is projected in vain."""
    columns_BM = reading.columns[:, 0]
    read_BMC = entries_BSC.gather(1, columns_BM.unsqueeze(-1).expand(-1, -1, entries_BSC.shape[-1]))
    in_order_M = torch.arange(columns_BM.shape[1], device=columns_BM.device)
    columns_BTM = in_order_M.expand_as(reading.columns)
    return Memory(read_BMC, reading=Reading(columns_BTM, reading.real))
