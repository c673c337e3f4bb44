"""Attention to dilated windows without fetching an entry once per query: linear in T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.ops.dilated_attention.naive import multiples_below, padded, scaled, take


@dataclass(frozen=True)
class Memory:
    """What T queries read from; fields as in `dilated_attention`."""

    key_BHSE: Tensor
    value_BHSE: Tensor
    interval: int
    size: int
    pad_key_HE: Tensor | None
    pad_value_HE: Tensor | None
    start_B: Tensor


def one_query(query_BH1E: Tensor, memory: Memory) -> Tensor:
    """Anchor "position" for a single query: it reads every s-th entry from the end, a view.

    The n missing entries of a row are one whose weight counts n times: exp(score + log n). Further
    letter: R entries of the view.
    """
    interval, size, start_B = memory.interval, memory.size, memory.start_B
    last = (memory.key_BHSE.shape[2] - 1) % interval
    key_BHRE = memory.key_BHSE[:, :, last::interval][:, :, -size:]
    value_BHRE = memory.value_BHSE[:, :, last::interval][:, :, -size:]
    back_R = interval * torch.arange(key_BHRE.shape[2] - 1, -1, -1, device=start_B.device)
    missing_BR = start_B.unsqueeze(1) < back_R
    query_BH1E = scaled(query_BH1E)
    scores_BH1R = query_BH1E @ key_BHRE.transpose(-1, -2)
    scores_BH1R = scores_BH1R.masked_fill(missing_BR[:, None, None], float("-inf"))
    if memory.pad_key_HE is None or memory.pad_value_HE is None:
        return scores_BH1R.softmax(-1) @ value_BHRE
    pads_B = (size - 1 - start_B.div(interval, rounding_mode="floor")).clamp(min=0)
    # In bfloat16 the logarithm would misjudge n by some percent.
    log_B = pads_B.to(torch.promote_types(scores_BH1R.dtype, torch.float32)).log()
    pad_BH11 = query_BH1E @ memory.pad_key_HE.to(query_BH1E.dtype).unsqueeze(-1)
    pad_BH11 = pad_BH11 + log_B.view(-1, 1, 1, 1)
    weights = torch.cat([pad_BH11, scores_BH1R], dim=-1).softmax(-1).to(value_BHRE.dtype)
    pad_value_H1E = memory.pad_value_HE.to(value_BHRE.dtype).unsqueeze(1)
    return weights[..., 1:] @ value_BHRE + weights[..., :1] * pad_value_H1E


def in_phases(query_BHTE: Tensor, memory: Memory, dropout: float) -> Tensor:
    """Anchor "position": positions of one phase (mod s) form a short sequence with a plain window.

    Each short sequence is cut into blocks of queries, which read the block's own keys and the M - 1
    before it. Other letters: P phases (= s), N blocks, Q queries of a block, K keys of a block.
    """
    interval, size, start_B = memory.interval, memory.size, memory.start_B
    tokens, device = query_BHTE.shape[2], query_BHTE.device
    per_phase = -(-tokens // interval)
    block = min(size, per_phase)
    blocks = -(-per_phase // block)
    whole = blocks * block * interval
    width = block + size - 1
    history = interval * (size - 1)  # a multiple of s: a column's phase is its position's
    past = torch.arange(-history, 0, device=device)
    real_BS = F.pad(start_B.unsqueeze(1) + past >= 0, (0, whole), value=True)

    def windows(entries_BHSE: Tensor, pad_HE: Tensor | None) -> Tensor:
        """``[B, H, P, N, E, K]``"""
        entries_BHSE = _with_history(entries_BHSE, tokens, real_BS[:, :history], pad_HE)
        entries_BHSE = F.pad(entries_BHSE, (0, 0, 0, whole - tokens))
        return _phases(entries_BHSE, interval).unfold(3, width, block)

    query_BHPNQE = _phases(F.pad(scaled(query_BHTE), (0, 0, 0, whole - tokens)), interval)
    query_BHPNQE = query_BHPNQE.unflatten(3, (blocks, block))
    scores_BHPNQK = query_BHPNQE @ windows(memory.key_BHSE, memory.pad_key_HE)
    ahead_QK = torch.arange(width, device=device) - torch.arange(block, device=device)[:, None]
    readable = (ahead_QK >= 0) & (ahead_QK < size)
    if memory.pad_key_HE is None:
        real_BHPSE = _phases(real_BS[:, None, :, None], interval)
        readable = readable & real_BHPSE.unfold(3, width, block)
    scores_BHPNQK = scores_BHPNQK.masked_fill(~readable, float("-inf"))
    weights_BHPNQK = F.dropout(scores_BHPNQK.softmax(-1), dropout, training=dropout > 0)
    value_BHPNKE = windows(memory.value_BHSE, memory.pad_value_HE).transpose(-1, -2)
    mixed_BHPNQE = weights_BHPNQK @ value_BHPNKE
    return mixed_BHPNQE.flatten(3, 4).transpose(2, 3).flatten(2, 3)[:, :, :tokens]


def on_grid(query_BHTE: Tensor, memory: Memory, dropout: float) -> Tensor:
    """Anchor "grid": the positions with the same ceil(i / s), at most s of them, form a group.

    A group shares its M - 1 grid entries; each query adds its own. Where a row's first query stands
    in its group depends on the row's start, so queries are moved into groups row by row. Other
    letters: G groups, Q (= s) queries of a group, L grid entries.
    """
    interval, size, start_B = memory.interval, memory.size, memory.start_B
    (batch, _, tokens, _), entries = query_BHTE.shape, memory.key_BHSE.shape[2]
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

    def windows(entries_BHSE: Tensor, pad_HE: Tensor | None) -> Tensor:
        """Grid entries of each group, ``[B, H, G, E, M - 1]``."""
        grid_BHLE = padded(take(entries_BHSE, columns_BL), real_BL, pad_HE)
        return grid_BHLE.unfold(2, size - 1, 1)

    def grouped(own_BHTE: Tensor) -> Tensor:
        """``[B, H, G, Q, E]``"""
        return take(own_BHTE, filled_BS).unflatten(2, (groups, interval))

    query_BHGQE = grouped(scaled(query_BHTE))
    own_BHGQ1 = (query_BHGQE * grouped(memory.key_BHSE[:, :, -tokens:])).sum(-1, keepdim=True)
    scores_BHGQM = query_BHGQE @ windows(memory.key_BHSE, memory.pad_key_HE)
    if memory.pad_key_HE is None:
        real_BHGQM = real_BL.unfold(1, size - 1, 1)[:, None, :, None]
        scores_BHGQM = scores_BHGQM.masked_fill(~real_BHGQM, float("-inf"))
    weights = torch.cat([own_BHGQ1, scores_BHGQM], dim=-1).softmax(-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    value_BHGME = windows(memory.value_BHSE, memory.pad_value_HE).transpose(-1, -2)
    mixed_BHGQE = weights[..., 1:] @ value_BHGME
    mixed_BHGQE = mixed_BHGQE + weights[..., :1] * grouped(memory.value_BHSE[:, :, -tokens:])
    return take(mixed_BHGQE.flatten(2, 3), slots_BT)


def _with_history(
    entries_BHSE: Tensor, tokens: int, real_BP: Tensor, pad_HE: Tensor | None
) -> Tensor:
    """The memory with exactly P entries before the queries' own, ``[B, H, P + T, E]``."""
    before, history = entries_BHSE.shape[2] - tokens, real_BP.shape[1]
    if before > history:
        entries_BHSE, before = entries_BHSE[:, :, before - history :], history
    past = F.pad(entries_BHSE[:, :, :before], (0, 0, history - before, 0))
    return torch.cat([padded(past, real_BP, pad_HE), entries_BHSE[:, :, before:]], dim=2)


def _phases(entries_BHSE: Tensor, interval: int) -> Tensor:
    """Each phase's short sequence, ``[B, H, P, S / s, E]``."""
    return entries_BHSE.unflatten(2, (-1, interval)).transpose(2, 3)
