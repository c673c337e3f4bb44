"""Attention of each query to a list of memory entries, fetched one by one: the truth for windows.

It serves where each row reads other columns, as in decoding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Anchor = Literal["position", "grid"]

_GATHERED_QUERIES = 256  # fetched at once: bounds the memory that T * M entries would take


def multiples_below(positions: Tensor, interval: int) -> Tensor:
    """How many of 0, s, 2s, ... are strictly below each position: ceil(position / s)."""
    return (positions + interval - 1).div(interval, rounding_mode="floor")


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
    """Attention of each query to an explicit list of memory columns, ``[B, H, T, E]``.

    Args as in `dilated_attention`, and:
        columns_BTM: which entries each query reads; what stands at missing ones does not matter.
        real_BTM: False at missing entries. Without pads, each query needs at least one real entry.

    Raises:
        ValueError: only one of the two pads is given.
    """
    check_pads(pad_key_HE, pad_value_HE)
    parts = []
    for start in range(0, query_BHTE.shape[2], _GATHERED_QUERIES):
        chunk = slice(start, start + _GATHERED_QUERIES)
        real, columns = real_BTM[:, chunk], columns_BTM[:, chunk]
        key_BHTME = _gathered(key_BHSE, pad_key_HE, columns, real)
        scores_BHTM = (key_BHTME @ scaled(query_BHTE[:, :, chunk]).unsqueeze(-1)).squeeze(-1)
        if pad_key_HE is None:
            scores_BHTM = scores_BHTM.masked_fill(~real.unsqueeze(1), float("-inf"))
        weights_BHTM = F.dropout(scores_BHTM.softmax(-1), dropout, training=dropout > 0)
        value_BHTME = _gathered(value_BHSE, pad_value_HE, columns, real)
        parts.append((weights_BHTM.unsqueeze(-2) @ value_BHTME).squeeze(-2))
    return torch.cat(parts, dim=2)


def check_pads(pad_key_HE: Tensor | None, pad_value_HE: Tensor | None) -> None:
    """Raise a ValueError if only one of the two is given."""
    if (pad_key_HE is None) != (pad_value_HE is None):
        raise ValueError("give both of pad_key and pad_value, or neither")


def scaled(query_BHTE: Tensor) -> Tensor:
    """Queries whose products with keys are scores."""
    return query_BHTE * query_BHTE.shape[-1] ** -0.5


def take(memory_BHSE: Tensor, columns_BN: Tensor) -> Tensor:
    """The entries in these columns, the same for all heads, ``[B, H, N, E]``."""
    _, heads, _, width = memory_BHSE.shape
    return memory_BHSE.gather(2, columns_BN[:, None, :, None].expand(-1, heads, -1, width))


def padded(memory_BHSE: Tensor, real_BS: Tensor, pad_HE: Tensor | None) -> Tensor:
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
    taken = padded(take(memory_BHSE, columns), real_BTM.flatten(1), pad_HE)
    return taken.unflatten(2, columns_BTM.shape[1:])
