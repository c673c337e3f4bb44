"""The gated delta rule in chunks of tokens, as matrix products, in plain torch: for any device.

Source: the WY form of Yang et al. (arXiv:2406.06484, 2412.06464) with Kimi Delta Attention's decays
a channel (arXiv:2510.26692). With G the running sum of the decays' logarithms within a chunk, S the
state before it and ``o`` number by number::

    M = I + tril(beta (K o e^G) (K o e^-G)^T, -1)
    [U | W] = M^-1 beta [V | K o e^G];    D = U - W S
    O = (Q o e^G) S + tril((Q o e^G) (K o e^-G)^T) D
    S <- Diag(e^G_c) S + (K o e^(G_c - G))^T D

In the products of two exponentials G is counted from the middle of the chunk, so that decays down
to `LEAST` a token stay within float32. A decay a head needs no such bound: its e^(G_i - G_j) is one
matrix, masked before the exponential.

J is a number of chunks here, I and K are tokens within one, X is N, or 1 for a decay a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
LEAST = -160.0 / CHUNK  # e^80 is within float32, and half a chunk is on either side


def delta_rule_chunked(
    queries_BTHN: Tensor,
    keys_BTHN: Tensor,
    values_BTHP: Tensor,
    logs_BTHX: Tensor,
    rates_BTH: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for tensors of one type; differentiable as often as wanted."""
    tokens = keys_BTHN.shape[1]
    size = min(CHUNK, tokens)

    def chunks(x_BTHE: Tensor) -> Tensor:
        """``[B, T, H, E]`` to ``[B, H, J, I, E]``; what fills up the last changes nothing."""
        filled = F.pad(x_BTHE, (0, 0, 0, 0, 0, -tokens % size))
        return filled.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)

    query, key, value = chunks(queries_BTHN), chunks(keys_BTHN), chunks(values_BTHP)
    rate_BHJI1 = chunks(rates_BTH.unsqueeze(-1))
    sum_BHJIX = chunks(logs_BTHX).cumsum(-2)
    seen_IK = torch.ones(size, size, dtype=torch.bool, device=key.device).tril()
    from_start_BHJIX = sum_BHJIX
    to_end_BHJIX = sum_BHJIX[..., -1:, :] - sum_BHJIX
    total_BHJX = sum_BHJIX[..., -1, :]
    if begins_BT is not None:  # nothing is read or kept of a text that ended before
        text_BHJI1 = chunks(begins_BT[..., None, None].long()).cumsum(-2)
        seen_IK = seen_IK & (text_BHJI1 == text_BHJI1.mT)
        from_start_BHJIX = from_start_BHJIX.masked_fill(text_BHJI1 > 0, -torch.inf)
        ended_BHJI1 = text_BHJI1 < text_BHJI1[..., -1:, :]
        to_end_BHJIX = to_end_BHJIX.masked_fill(ended_BHJI1, -torch.inf)
        total_BHJX = total_BHJX.masked_fill(text_BHJI1[..., -1, :] > 0, -torch.inf)
    if sum_BHJIX.shape[-1] == 1:
        apart_BHJIK = (sum_BHJIX - sum_BHJIX.mT).masked_fill(~seen_IK, -torch.inf).exp()
        among, read = (key @ key.mT) * apart_BHJIK, (query @ key.mT) * apart_BHJIK
    else:
        middle = sum_BHJIX[..., size // 2, None, :]
        later, earlier = (sum_BHJIX - middle).exp(), (middle - sum_BHJIX).exp()
        among, read = (
            torch.where(seen_IK, (x * later) @ (key * earlier).mT, 0) for x in (key, query)
        )
    decayed_BHJIN = key * from_start_BHJIX.exp()
    matrix_BHJIK = (rate_BHJI1 * among).tril(-1)
    solved = torch.linalg.solve_triangular(
        matrix_BHJIK + torch.eye(size, dtype=key.dtype, device=key.device),
        rate_BHJI1 * torch.cat([value, decayed_BHJIN], dim=-1),
        upper=False,
        unitriangular=True,
    )
    own, past = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    query_BHJIN, kept_BHJIN = query * from_start_BHJIX.exp(), key * to_end_BHJIX.exp()
    state_BHNP, outputs, decay_BHJX1 = initial_BHNP, [], total_BHJX.exp().unsqueeze(-1)
    for j in range(key.shape[2]):
        change_BHIP = own[:, :, j] - past[:, :, j] @ state_BHNP
        outputs.append(query_BHJIN[:, :, j] @ state_BHNP + read[:, :, j] @ change_BHIP)
        state_BHNP = decay_BHJX1[:, :, j] * state_BHNP + kept_BHJIN[:, :, j].mT @ change_BHIP
    outputs_BHTP = torch.cat(outputs, dim=2)[:, :, :tokens]
    return outputs_BHTP.transpose(1, 2), state_BHNP
