"""The short convolution as a sum of shifted inputs, in plain torch: the truth for the fast form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_naive(
    inputs_BTC: Tensor,
    weight_JC: Tensor,
    bias_C: Tensor,
    before_BJC: Tensor | None,
    positions_BT: Tensor | None,
    *,
    silu: bool,
) -> Tensor:
    """As `short_convolution`; differentiable as often as wanted."""
    taps, tokens = len(weight_JC), inputs_BTC.shape[1]
    before, kind = taps - 1, torch.promote_types(inputs_BTC.dtype, weight_JC.dtype)
    inputs_BTC = inputs_BTC.to(kind)
    if before_BJC is None:
        all_BSC = F.pad(inputs_BTC, (0, 0, before, 0))
    else:
        all_BSC = torch.cat([before_BJC.to(kind), inputs_BTC], dim=1)
    out_BTC = torch.addcmul(bias_C, inputs_BTC, weight_JC[0])
    for back in range(1, taps):
        earlier_BTC = all_BSC[:, before - back : before - back + tokens]
        if positions_BT is not None:
            earlier_BTC = earlier_BTC.masked_fill((positions_BT < back).unsqueeze(-1), 0)
        out_BTC = torch.addcmul(out_BTC, earlier_BTC, weight_JC[back])
    return F.silu(out_BTC) if silu else out_BTC
