"""Rotary positions (Su et al., RoFormer, arXiv:2104.09864), in the precision of what they turn.

transformers' own computes angles in float32 whatever the model's type; a window whose columns are
counted anew in every chunk needs the same relative turn to full precision.

Shape suffixes: B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BHTE: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Turn each pair of channels ``(e, e + E/2)`` by its position times ``theta^(-2e/E)``.

    Args:
        x_BHTE: queries or keys; E is even.
        positions_BT: ``[B, T]`` or ``[1, T]``.
        theta: base of the frequencies.

    Returns:
        The same shape and type.
    """
    width = x_BHTE.shape[-1]
    kind = torch.promote_types(x_BHTE.dtype, torch.float32)
    steps = torch.arange(0, width, 2, device=x_BHTE.device, dtype=kind) / width
    angles_BTE = positions_BT.to(kind).unsqueeze(-1) * theta**-steps
    cos = angles_BTE.cos().to(x_BHTE.dtype).unsqueeze(1)
    sin = angles_BTE.sin().to(x_BHTE.dtype).unsqueeze(1)
    one, two = x_BHTE.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
