"""Attention of every position to M memory entries of its past (DESIGN 1.3).

Position i of a stream reads its own entry and M - 1 earlier ones, s positions apart:

    anchor "position":  i, i - s, i - 2s, ...
    anchor "grid":      i, and the M - 1 largest multiples of s strictly below i

Entries before the stream's start (position < 0) are missing: either pads stand in for them, or the
softmax leaves them out. `gather_attention` fetches what each query reads; `dilated_attention`
computes the same for a whole window without fetching an entry once per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlm.ops.dilated_attention.naive import Anchor as Anchor
from contextlm.ops.dilated_attention.naive import check_pads
from contextlm.ops.dilated_attention.naive import gather_attention as gather_attention
from contextlm.ops.dilated_attention.naive import multiples_below as multiples_below
from contextlm.ops.dilated_attention.windows import Memory, in_phases, on_grid, one_query


def dilated_attention(
    query_BHTE: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    *,
    interval: int,
    size: int,
    anchor: Anchor = "position",
    pad_key_HE: Tensor | None = None,
    pad_value_HE: Tensor | None = None,
    start_B: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of T consecutive positions to their memory, ``[B, H, T, E]``; linear in T.

    The memory ends with the T entries of the queries' own positions; the S - T entries before them
    are those of the positions just before, so that a window can be cut out of a long stream.

    Args:
        query_BHTE: not scaled.
        interval: s.
        size: M.
        anchor: where the earlier entries lie.
        pad_key_HE: key of a missing entry; None leaves missing entries out of the softmax.
        pad_value_HE: value of a missing entry; given together with `pad_key_HE`.
        start_B: position of each row's first query; None: all rows start at 0. The memory must
            reach back over ``min(start, s (M - 1))`` positions.
        dropout: share of the attention weights to drop.

    Raises:
        ValueError: an unknown anchor, an interval or size below 1, only one pad, fewer entries than
            queries, or entries before the queries without `start_B`.
    """
    check_pads(pad_key_HE, pad_value_HE)
    if anchor not in ("position", "grid"):
        raise ValueError(f"unknown anchor {anchor!r} (known: position, grid)")
    if interval < 1 or size < 1:
        raise ValueError(f"interval and size must be at least 1, got {interval} and {size}")
    tokens, entries = query_BHTE.shape[2], key_BHSE.shape[2]
    if entries < tokens:
        raise ValueError(f"{entries} memory entries cannot cover {tokens} queries")
    if entries > tokens and start_B is None:
        raise ValueError(f"{entries - tokens} entries before the queries need start_B")
    if start_B is None:
        start_B = torch.zeros(1, dtype=torch.long, device=query_BHTE.device)
    memory = Memory(key_BHSE, value_BHSE, interval, size, pad_key_HE, pad_value_HE, start_B)
    if anchor == "grid" and size > 1:  # with one entry to read there is no grid
        return on_grid(query_BHTE, memory, dropout)
    if tokens == 1 and dropout == 0:  # missing entries taken together are not dropped one by one
        return one_query(query_BHTE, memory)
    return in_phases(query_BHTE, memory, dropout)
