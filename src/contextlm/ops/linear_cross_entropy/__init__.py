"""The cross-entropy of a linear head, one public op with two backends::

    sum over n of  log(sum over v of exp(l_nv)) - l_n,target(n),      l = hidden W^T + b

``eager`` is the plain form in `naive`: it holds all N x V logits, and several times. ``blocks``
computes them for a block of tokens at a time and never holds all; it is differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contextlm.ops.backends import AUTO, requested_backend

BACKENDS = ("eager", "blocks")
# Measured: from here on blocks are faster, with less memory.
_FEWEST_LOGITS = 2**23


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = AUTO,
) -> Tensor:
    """The summed loss of all targets in nats, a scalar; 0 where there is none.

    Under autocast products run in its type; sums are kept in float32 at least.

    Args:
        hidden_ND: what the head reads.
        weight_VD: of the head.
        bias_V: of the head; None where it has none.
        targets_N: entries of the vocabulary, or `ignore_index` where a token has no target.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`), which takes blocks where there
            are many logits.

    Raises:
        ValueError: the backend is unknown.
        IndexError: on a CPU, a target is no entry of the vocabulary.
    """
    name = requested_backend("linear_cross_entropy", backend, BACKENDS)
    if name == AUTO:
        many = len(hidden_ND) * len(weight_VD) >= _FEWEST_LOGITS
        name = "blocks" if many and not torch.compiler.is_compiling() else "eager"
    # Imported when chosen, as other ops' backends are.
    if name == "eager":
        from contextlm.ops.linear_cross_entropy.naive import linear_cross_entropy_naive

        return linear_cross_entropy_naive(
            hidden_ND, weight_VD, bias_V, targets_N, ignore_index=ignore_index
        )
    from contextlm.ops.linear_cross_entropy.blocks import linear_cross_entropy_blocks

    device = hidden_ND.device.type
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    real_N = targets_N != ignore_index
    if not real_N.all():
        hidden_ND, targets_N = hidden_ND[real_N], targets_N[real_N]
    return linear_cross_entropy_blocks(hidden_ND, weight_VD, bias_V, targets_N, dtype=dtype)
