"""Attention of every position to M memory entries of its past (DESIGN 1.3).

Position i of a stream reads its own entry and M - 1 earlier ones, s positions apart:

    anchor "position":  i, i - s, i - 2s, ...
    anchor "grid":      i, and the M - 1 largest multiples of s strictly below i

Entries before the stream's start (position < 0) are missing: either pads stand in for them, or the
softmax leaves them out. `gather_attention` fetches what each query reads and serves for decoding;
`dilated_attention` computes the same for a whole window without fetching an entry once per query.

Shape suffixes: B batch, H heads, T queries, S memory entries, M entries read by a query, E width of
a head, L grid entries, G groups of queries.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Anchor = Literal["position", "grid"]

_GATHERED_QUERIES = 256  # fetched at once: bounds the memory that T * M entries would take


def gather_attention(
    query_BHTE: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    columns_BTM: Tensor,
    real_BTM: Tensor,
    *,
    pad_key_HE: Tensor | None = None,
    pad_value_HE: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each query to an explicit list of memory columns.

    Args:
        query_BHTE: queries, not scaled.
        key_BHSE: keys of the memory.
        value_BHSE: values of the memory.
        columns_BTM: which entries each query reads; what stands at missing ones does not matter.
        real_BTM: False at missing entries. Without pads, each query needs at least one real entry.
        pad_key_HE: key of a missing entry; None leaves missing entries out of the softmax.
        pad_value_HE: value of a missing entry; given together with `pad_key_HE`.
        dropout: share of the attention weights to drop.

    Returns:
        ``[B, H, T, E]``.

    Raises:
        ValueError: only one of the two pads is given.
    """
    _check_pads(pad_key_HE, pad_value_HE)
    parts = []
    for start in range(0, query_BHTE.shape[2], _GATHERED_QUERIES):
        chunk = slice(start, start + _GATHERED_QUERIES)
        real, columns = real_BTM[:, chunk], columns_BTM[:, chunk]
        key_BHTME = _gathered(key_BHSE, pad_key_HE, columns, real)
        scores_BHTM = (key_BHTME @ _scaled(query_BHTE[:, :, chunk]).unsqueeze(-1)).squeeze(-1)
        if pad_key_HE is None:
            scores_BHTM = scores_BHTM.masked_fill(~real.unsqueeze(1), float("-inf"))
        weights_BHTM = F.dropout(scores_BHTM.softmax(-1), dropout, training=dropout > 0)
        value_BHTME = _gathered(value_BHSE, pad_value_HE, columns, real)
        parts.append((weights_BHTM.unsqueeze(-2) @ value_BHTME).squeeze(-2))
    return torch.cat(parts, dim=2)


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
    """Attention of T consecutive positions to their memory; linear in T.

    The memory ends with the T entries of the queries' own positions; the S - T entries before them
    are those of the positions just before, so that a window can be cut out of a long stream.

    Args:
        query_BHTE: queries, not scaled.
        key_BHSE: keys of the memory.
        value_BHSE: values of the memory.
        interval: s.
        size: M.
        anchor: where the earlier entries lie.
        pad_key_HE: key of a missing entry; None leaves missing entries out of the softmax.
        pad_value_HE: value of a missing entry; given together with `pad_key_HE`.
        start_B: position of each row's first query; None: all rows start at 0. The memory must
            reach back over ``min(start, s (M - 1))`` positions.
        dropout: share of the attention weights to drop.

    Returns:
        ``[B, H, T, E]``.

    Raises:
        ValueError: an unknown anchor, an interval or size below 1, only one pad, fewer entries than
            queries, or entries before the queries without `start_B`.
    """
    _check_pads(pad_key_HE, pad_value_HE)
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
    memory = (key_BHSE, value_BHSE, interval, size, pad_key_HE, pad_value_HE, start_B)
    if anchor == "grid" and size > 1:  # with one entry to read there is no grid
        return _on_grid(query_BHTE, *memory, dropout)
    if tokens == 1 and dropout == 0:  # missing entries taken together are not dropped one by one
        return _one_query(query_BHTE, *memory)
    return _in_phases(query_BHTE, *memory, dropout)


def multiples_below(positions: Tensor, interval: int) -> Tensor:
    """How many of 0, s, 2s, ... are strictly below each position: ceil(position / s)."""
    return (positions + interval - 1).div(interval, rounding_mode="floor")


def _one_query(
    query_BH1E: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    interval: int,
    size: int,
    pad_key_HE: Tensor | None,
    pad_value_HE: Tensor | None,
    start_B: Tensor,
) -> Tensor:
    """Anchor "position" for a single query: it reads every s-th entry from the end, a view.

    The n missing entries of a row are one whose weight counts n times: exp(score + log n). Further
    suffix: R entries of the view.
    """
    last = (key_BHSE.shape[2] - 1) % interval
    key_BHRE = key_BHSE[:, :, last::interval][:, :, -size:]
    value_BHRE = value_BHSE[:, :, last::interval][:, :, -size:]
    back_R = interval * torch.arange(key_BHRE.shape[2] - 1, -1, -1, device=start_B.device)
    missing_BR = start_B.unsqueeze(1) < back_R
    query_BH1E = _scaled(query_BH1E)
    scores_BH1R = query_BH1E @ key_BHRE.transpose(-1, -2)
    scores_BH1R = scores_BH1R.masked_fill(missing_BR[:, None, None], float("-inf"))
    if pad_key_HE is None or pad_value_HE is None:
        return scores_BH1R.softmax(-1) @ value_BHRE
    pads_B = (size - 1 - start_B.div(interval, rounding_mode="floor")).clamp(min=0)
    # In bfloat16 the logarithm would misjudge n by some percent.
    log_B = pads_B.to(torch.promote_types(scores_BH1R.dtype, torch.float32)).log()
    pad_BH11 = query_BH1E @ pad_key_HE.to(query_BH1E.dtype).unsqueeze(-1)
    pad_BH11 = pad_BH11 + log_B.view(-1, 1, 1, 1)
    weights = torch.cat([pad_BH11, scores_BH1R], dim=-1).softmax(-1).to(value_BHRE.dtype)
    pad_value_H1E = pad_value_HE.to(value_BHRE.dtype).unsqueeze(1)
    return weights[..., 1:] @ value_BHRE + weights[..., :1] * pad_value_H1E


def _in_phases(
    query_BHTE: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    interval: int,
    size: int,
    pad_key_HE: Tensor | None,
    pad_value_HE: Tensor | None,
    start_B: Tensor,
    dropout: float,
) -> Tensor:
    """Anchor "position": positions of one phase (mod s) form a short sequence with a plain window.

    Each short sequence is cut into blocks of queries, which read the block's own keys and the M - 1
    before it. Further suffixes: P phases (= s), N blocks, Q queries of a block, K keys of a block.
    """
    tokens, device = query_BHTE.shape[2], query_BHTE.device
    per_phase = -(-tokens // interval)
    block = min(size, per_phase)
    blocks = -(-per_phase // block)
    padded = blocks * block * interval
    width = block + size - 1
    history = interval * (size - 1)  # a multiple of s: a column's phase is its position's
    past = torch.arange(-history, 0, device=device)
    real_BS = F.pad(start_B.unsqueeze(1) + past >= 0, (0, padded), value=True)

    def windows(memory_BHSE: Tensor, pad_HE: Tensor | None) -> Tensor:
        """``[B, H, P, N, E, K]``"""
        whole = _with_history(memory_BHSE, tokens, real_BS[:, :history], pad_HE)
        whole = F.pad(whole, (0, 0, 0, padded - tokens))
        return _phases(whole, interval).unfold(3, width, block)

    query_BHPNQE = _phases(F.pad(_scaled(query_BHTE), (0, 0, 0, padded - tokens)), interval)
    query_BHPNQE = query_BHPNQE.unflatten(3, (blocks, block))
    scores_BHPNQK = query_BHPNQE @ windows(key_BHSE, pad_key_HE)
    ahead_QK = torch.arange(width, device=device) - torch.arange(block, device=device)[:, None]
    readable = (ahead_QK >= 0) & (ahead_QK < size)
    if pad_key_HE is None:
        real_BHPSE = _phases(real_BS[:, None, :, None], interval)
        readable = readable & real_BHPSE.unfold(3, width, block)
    scores_BHPNQK = scores_BHPNQK.masked_fill(~readable, float("-inf"))
    weights_BHPNQK = F.dropout(scores_BHPNQK.softmax(-1), dropout, training=dropout > 0)
    mixed_BHPNQE = weights_BHPNQK @ windows(value_BHSE, pad_value_HE).transpose(-1, -2)
    return mixed_BHPNQE.flatten(3, 4).transpose(2, 3).flatten(2, 3)[:, :, :tokens]


def _on_grid(
    query_BHTE: Tensor,
    key_BHSE: Tensor,
    value_BHSE: Tensor,
    interval: int,
    size: int,
    pad_key_HE: Tensor | None,
    pad_value_HE: Tensor | None,
    start_B: Tensor,
    dropout: float,
) -> Tensor:
    """Anchor "grid": the positions with the same ceil(i / s), at most s of them, form a group.

    A group shares its M - 1 grid entries; each query adds its own. Where a row's first query stands
    in its group depends on the row's start, so queries are moved into groups row by row.
    """
    (batch, _, tokens, _), entries = query_BHTE.shape, key_BHSE.shape[2]
    device = query_BHTE.device
    groups = (tokens + interval - 2) // interval + 1
    below_B1 = multiples_below(start_B, interval).unsqueeze(1)
    offset_B1 = start_B.unsqueeze(1) - interval * (below_B1 - 1) - 1  # its place in its group
    slots_BT = (torch.arange(tokens, device=device) + offset_B1).expand(batch, -1)
    filled_BS = (torch.arange(groups * interval, device=device) - offset_B1).expand(batch, -1)
    filled_BS = filled_BS.clamp(0, tokens - 1)

    multiples_BL = below_B1 - size + 1 + torch.arange(groups + size - 2, device=device)
    columns_BL = entries - tokens + interval * multiples_BL - start_B.unsqueeze(1)
    real_BL = (multiples_BL >= 0).expand(batch, -1)
    columns_BL = columns_BL.clamp(0, entries - 1).expand(batch, -1)

    def windows(memory_BHSE: Tensor, pad_HE: Tensor | None) -> Tensor:
        """Grid entries of each group, ``[B, H, G, E, M - 1]``."""
        grid_BHLE = _padded(_take(memory_BHSE, columns_BL), real_BL, pad_HE)
        return grid_BHLE.unfold(2, size - 1, 1)

    def grouped(own_BHTE: Tensor) -> Tensor:
        """``[B, H, G, s, E]``"""
        return _take(own_BHTE, filled_BS).unflatten(2, (groups, interval))

    query_BHGQE = grouped(_scaled(query_BHTE))
    own_BHGQ1 = (query_BHGQE * grouped(key_BHSE[:, :, -tokens:])).sum(-1, keepdim=True)
    scores_BHGQM = query_BHGQE @ windows(key_BHSE, pad_key_HE)
    if pad_key_HE is None:
        real_BHGQM = real_BL.unfold(1, size - 1, 1)[:, None, :, None]
        scores_BHGQM = scores_BHGQM.masked_fill(~real_BHGQM, float("-inf"))
    weights = torch.cat([own_BHGQ1, scores_BHGQM], dim=-1).softmax(-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    mixed_BHGQE = weights[..., 1:] @ windows(value_BHSE, pad_value_HE).transpose(-1, -2)
    mixed_BHGQE = mixed_BHGQE + weights[..., :1] * grouped(value_BHSE[:, :, -tokens:])
    return _take(mixed_BHGQE.flatten(2, 3), slots_BT)


def _check_pads(pad_key_HE: Tensor | None, pad_value_HE: Tensor | None) -> None:
    if (pad_key_HE is None) != (pad_value_HE is None):
        raise ValueError("give both of pad_key and pad_value, or neither")


def _scaled(query_BHTE: Tensor) -> Tensor:
    return query_BHTE * query_BHTE.shape[-1] ** -0.5


def _take(memory_BHSE: Tensor, columns_BL: Tensor) -> Tensor:
    """The entries in these columns, the same for all heads, ``[B, H, L, E]``."""
    _, heads, _, width = memory_BHSE.shape
    return memory_BHSE.gather(2, columns_BL[:, None, :, None].expand(-1, heads, -1, width))


def _padded(memory_BHSE: Tensor, real_BS: Tensor, pad_HE: Tensor | None) -> Tensor:
    """The pad where an entry is missing; without one, the entries as they are."""
    if pad_HE is None:
        return memory_BHSE
    pad_HE = pad_HE.to(memory_BHSE.dtype)
    return torch.where(real_BS[:, None, :, None], memory_BHSE, pad_HE.unsqueeze(1))


def _gathered(
    memory_BHSE: Tensor, pad_HE: Tensor | None, columns_BTM: Tensor, real_BTM: Tensor
) -> Tensor:
    """What each query reads, ``[B, H, T, M, E]``."""
    columns = columns_BTM.where(real_BTM, 0).flatten(1)
    taken = _padded(_take(memory_BHSE, columns), real_BTM.flatten(1), pad_HE)
    return taken.unflatten(2, columns_BTM.shape[1:])


def _with_history(
    memory_BHSE: Tensor, tokens: int, real_BP: Tensor, pad_HE: Tensor | None
) -> Tensor:
    """The memory with exactly P entries before the queries' own, ``[B, H, P + T, E]``."""
    before, history = memory_BHSE.shape[2] - tokens, real_BP.shape[1]
    if before > history:
        memory_BHSE, before = memory_BHSE[:, :, before - history :], history
    past = F.pad(memory_BHSE[:, :, :before], (0, 0, history - before, 0))
    return torch.cat([_padded(past, real_BP, pad_HE), memory_BHSE[:, :, before:]], dim=2)


def _phases(memory_BHSE: Tensor, interval: int) -> Tensor:
    """Each phase's short sequence, ``[B, H, P, S / s, E]``."""
    return memory_BHSE.unflatten(2, (-1, interval)).transpose(2, 3)
