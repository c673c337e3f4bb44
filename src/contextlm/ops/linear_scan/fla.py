"""The gated linear recurrence by flash-linear-attention's kernels, where that package is installed.

Written from its sources (fla.ops.hgrn, versions of 2025 and 2026: tensors ``[B, T, C]``), tested
against a stand-in for the package, and not run on a GPU so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What stands for a gate of 0, whose logarithm does not exist: far below float32's resolution.
_LEAST = 1e-20


def linear_scan_fla(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan`, for float32 tensors on a GPU and gates that are not negative.

    The initial state goes into the first input, since the kernel passes no gradient to it.
    """
    # Imported here, since it may not be installed; mypy then does not find it.
    from fla.ops.hgrn import chunk_hgrn  # type: ignore[import-not-found,unused-ignore]

    first_B1C = torch.addcmul(inputs_BTC[:, :1], gates_BTC[:, :1], initial_BC.unsqueeze(1))
    inputs_BTC = torch.cat([first_B1C, inputs_BTC[:, 1:]], dim=1)
    # A gate of 0 is given _LEAST's gradient: what exp and log each put into it cancels.
    raised_BTC = gates_BTC + (gates_BTC.clamp(min=_LEAST) - gates_BTC).detach()
    states_BTC, _ = chunk_hgrn(x=inputs_BTC, g=raised_BTC.log())
    return states_BTC
