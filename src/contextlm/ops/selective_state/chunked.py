"""The selective state in chunks of tokens, as matrix products, in plain torch: for any device.

Source: the state-space dual form of Mamba-2 (Dao and Gu, arXiv:2405.21060). With s the running sum
of the logarithms of the decays within a chunk and H the state before it::

    Y = (L o C B^T) (dt u) + exp(s) C H        L_ij = exp(s_i - s_j) for i >= j, else 0
    H <- exp(s_c) H + sum_j exp(s_c - s_j) B_j (dt_j u_j)^T

What each chunk adds is computed for all chunks at once; from chunk to chunk the state is a linear
scan. J is a number of chunks here, I and K are tokens within one, X is N P.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.ops.linear_scan import linear_scan

# L costs CHUNK numbers a token and head, the states between chunks N P / CHUNK.
CHUNK = 64


def selective_state_chunked(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `selective_state`, for tensors of one type; differentiable as often as wanted."""
    tokens = inputs_BTHP.shape[1]
    size = min(CHUNK, tokens)

    def chunks(x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[B, J, I, ...]``; what fills up the last takes no step."""
        filled = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -tokens % size))
        return filled.unflatten(1, (-1, size))

    step_BJHI = chunks(steps_BTH).transpose(2, 3)
    written_BJHIP = step_BJHI.unsqueeze(-1) * chunks(inputs_BTHP).transpose(2, 3)
    write_BJIN, read_BJIN = chunks(write_BTN), chunks(read_BTN)
    sum_BJHI = torch.cumsum(-step_BJHI * rates_H[:, None], dim=-1)
    device = inputs_BTHP.device
    seen_IK = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    start_BJHI, end_BJHI = sum_BJHI, sum_BJHI[..., -1:] - sum_BJHI
    total_BJH = sum_BJHI[..., -1]
    if begins_BT is not None:  # nothing is read or kept of a document that ended before
        text_BJ1I = chunks(begins_BT.long()).cumsum(2).unsqueeze(2)
        seen_IK = seen_IK & (text_BJ1I.unsqueeze(-1) == text_BJ1I.unsqueeze(-2))
        start_BJHI = start_BJHI.masked_fill(text_BJ1I > 0, -torch.inf)
        end_BJHI = end_BJHI.masked_fill(text_BJ1I < text_BJ1I[..., -1:], -torch.inf)
        total_BJH = total_BJH.masked_fill(text_BJ1I[..., -1] > 0, -torch.inf)
    # Masked before the exponential, which overflows where i < j.
    apart_BJHIK = sum_BJHI.unsqueeze(-1) - sum_BJHI.unsqueeze(-2)
    decay_BJHIK = apart_BJHIK.masked_fill(~seen_IK, -torch.inf).exp()
    score_BJ1IK = (read_BJIN @ write_BJIN.mT).unsqueeze(2)
    output_BJHIP = (decay_BJHIK * score_BJ1IK) @ written_BJHIP
    added_BJHNP = write_BJIN.mT.unsqueeze(2) @ (end_BJHI.exp().unsqueeze(-1) * written_BJHIP)
    shape = added_BJHNP.shape
    states_BJHNP = linear_scan(
        total_BJH.exp()[..., None, None].expand(shape).flatten(2),
        added_BJHNP.flatten(2),
        initial_BHNP.flatten(1),
    ).view(shape)
    before_BJHNP = torch.cat([initial_BHNP.unsqueeze(1), states_BJHNP[:, :-1]], dim=1)
    read_BJHIP = read_BJIN.unsqueeze(2) @ before_BJHNP
    output_BJHIP = torch.addcmul(output_BJHIP, start_BJHI.exp().unsqueeze(-1), read_BJHIP)
    outputs_BTHP = output_BJHIP.transpose(2, 3).flatten(1, 2)[:, :tokens]
    return torch.addcmul(outputs_BTHP, skip_H.unsqueeze(-1), inputs_BTHP), states_BJHNP[
        :, -1
    ].clone()
