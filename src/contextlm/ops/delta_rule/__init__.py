"""The gated delta rule, one op with several backends.

Sources: gated DeltaNet (Yang et al., arXiv:2412.06464); a decay a channel of the key as in Kimi
Delta Attention (arXiv:2510.26692). For each head, whose state S is an N x P matrix::

    S_t' = Diag(exp(g_t)) S_{t-1}
    S_t = S_t' + beta_t k_t (v_t - S_t'^T k_t)^T
    o_t = S_t^T q_t

The state is a memory of values by keys, and what is written is the difference to what it gives for
the key already.

Backends: ``eager``, the loop over tokens in `naive`, works everywhere; ``numba``, one compiled loop
for a CPU; ``chunked``, matrix products in plain torch, for all else and under torch.compile;
``fla``, flash-linear-attention's kernels for CUDA. The first and the third are differentiable more
than once.

N is the width of a head's keys here, P that of its values, X is N, or 1 for a decay a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlm.ops.arguments import check_shapes, computing_type
from contextlm.ops.backends import AUTO, recurrence_backend
from contextlm.ops.delta_rule.chunked import LEAST as LEAST

BACKENDS = ("eager", "numba", "chunked", "fla")


def delta_rule(
    queries_BTHN: Tensor,
    keys_BTHN: Tensor,
    values_BTHP: Tensor,
    logs_BTHX: Tensor,
    rates_BTH: Tensor,
    initial_BHNP: Tensor | None = None,
    *,
    mask_BT: Tensor | None = None,
    begins_BT: Tensor | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Run the rule over T tokens; differentiable in all tensors but the masks.

    Everything is computed in float32 at least, whatever the inputs' types.

    Args:
        queries_BTHN: q.
        keys_BTHN: k, usually of length 1.
        values_BTHP: v.
        logs_BTHX: g, at most 0; where it differs by channel at least -5, else what ``chunked``
            multiplies may leave the range of float32.
        rates_BTH: beta, from 0 to 1.
        initial_BHNP: the state before the first token; None: zero.
        mask_BT: False where a token is padding: the state passes it unchanged.
        begins_BT: True where a text begins, which sees nothing of what is before it.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`), which takes the fastest that
            fits the tensors.

    Returns:
        o, ``[B, T, H, P]``, and the state after the last token, both in float32 at least.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a backend that is unknown or does not fit.
    """
    if keys_BTHN.dim() != 4 or keys_BTHN.shape[1] == 0:
        found = tuple(keys_BTHN.shape)
        raise ValueError(f"delta_rule needs keys [B, T, H, N] with T >= 1, got {found}")
    batch, tokens, heads, numbers = keys_BTHN.shape
    width, channels = values_BTHP.shape[-1], 1 if logs_BTHX.shape[-1] == 1 else numbers
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "queries": (queries_BTHN, (batch, tokens, heads, numbers)),
        "values": (values_BTHP, (batch, tokens, heads, width)),
        "logarithms of decays": (logs_BTHX, (batch, tokens, heads, channels)),
        "rates": (rates_BTH, (batch, tokens, heads)),
        "initial state": (initial_BHNP, (batch, heads, numbers, width)),
        "mask": (mask_BT, (batch, tokens)),
        "begins": (begins_BT, (batch, tokens)),
    }
    check_shapes("delta_rule", wanted)
    given: tuple[Tensor, ...] = (queries_BTHN, keys_BTHN, values_BTHP, logs_BTHX, rates_BTH)
    kind = computing_type(*given)
    given = tuple(tensor.to(kind) for tensor in given)
    if initial_BHNP is None:
        initial_BHNP = given[0].new_zeros(batch, heads, numbers, width)
    if mask_BT is not None:
        logs_BTHX = torch.where(mask_BT[..., None, None], given[3], 0)
        given = (*given[:3], logs_BTHX, torch.where(mask_BT.unsqueeze(-1), given[4], 0))
    name = delta_rule_backend(*given, packed=begins_BT is not None, backend=backend)
    # Imported when chosen: compilers and kernels take a while to load.
    if name == "numba":
        from contextlm.ops.delta_rule.numba import delta_rule_numba as run
    elif name == "chunked":
        from contextlm.ops.delta_rule.chunked import delta_rule_chunked as run
    elif name == "fla":
        from contextlm.ops.delta_rule.kernels import delta_rule_fla as run
    else:
        from contextlm.ops.delta_rule.naive import delta_rule_naive as run
    arguments: list[Any] = [*given, initial_BHNP.to(kind), begins_BT]
    return run(*arguments)


def delta_rule_backend(*tensors: Tensor, packed: bool = False, backend: str = AUTO) -> str:
    """The backend that `delta_rule` takes for these tensors, the queries first.

    Args:
        *tensors: all but initial state and masks.
        packed: whether texts begin within rows.
        backend: as for `delta_rule`.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    kernels = () if packed else ("fla",)
    return recurrence_backend("delta_rule", backend, BACKENDS, tensors, kernels)
