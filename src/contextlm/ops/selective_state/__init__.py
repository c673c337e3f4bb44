"""The selective state of Mamba-2 (Dao and Gu, arXiv:2405.21060), one op with several backends.

For each head, whose state h is an N x P matrix::

    h_t = exp(-dt_t r) h_{t-1} + dt_t B_t u_t^T
    y_t = h_t^T C_t + s u_t

What is written (B), what is read (C) and how fast is forgotten (dt) come from the token: the state
selects. B and C are the same for all heads.

Backends: ``eager``, the loop over tokens in `naive`, works everywhere; ``numba``, one compiled loop
for a CPU; ``chunked``, matrix products in plain torch, for all else and under torch.compile;
``mamba_ssm`` and ``fla``, the kernels of these packages for CUDA. The first and the third are
differentiable more than once.

N is numbers of state a channel here, P channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlm.ops.arguments import check_shapes, computing_type
from contextlm.ops.backends import AUTO, recurrence_backend

BACKENDS = ("eager", "numba", "chunked", "mamba_ssm", "fla")


def selective_state(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor | None = None,
    *,
    mask_BT: Tensor | None = None,
    begins_BT: Tensor | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens; differentiable in all tensors but the masks.

    Everything is computed in float32 at least, whatever the inputs' types.

    Args:
        inputs_BTHP: u.
        steps_BTH: dt, at least 0.
        rates_H: r, at least 0.
        write_BTN: B.
        read_BTN: C.
        skip_H: s.
        initial_BHNP: the state before the first token; None: zero.
        mask_BT: False where a token is padding: the state passes it unchanged.
        begins_BT: True where a text begins, which sees nothing of what is before it.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`), which takes the fastest that
            fits the tensors.

    Returns:
        y, ``[B, T, H, P]``, and the state after the last token, both in float32 at least.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a backend that is unknown or does not fit.
    """
    batch, tokens, heads, width = _shape(inputs_BTHP)
    numbers = write_BTN.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "steps": (steps_BTH, (batch, tokens, heads)),
        "rates": (rates_H, (heads,)),
        "write": (write_BTN, (batch, tokens, numbers)),
        "read": (read_BTN, (batch, tokens, numbers)),
        "skip": (skip_H, (heads,)),
        "initial state": (initial_BHNP, (batch, heads, numbers, width)),
        "mask": (mask_BT, (batch, tokens)),
        "begins": (begins_BT, (batch, tokens)),
    }
    check_shapes("selective_state", wanted)
    given: tuple[Tensor, ...] = (inputs_BTHP, steps_BTH, rates_H, write_BTN, read_BTN, skip_H)
    kind = computing_type(*given)
    given = tuple(tensor.to(kind) for tensor in given)
    if initial_BHNP is None:
        initial_BHNP = given[0].new_zeros(batch, heads, numbers, width)
    if mask_BT is not None:
        given = (given[0], torch.where(mask_BT.unsqueeze(-1), given[1], 0), *given[2:])
    name = selective_state_backend(*given, packed=begins_BT is not None, backend=backend)
    # Imported when chosen: compilers and kernels take a while to load.
    if name == "numba":
        from contextlm.ops.selective_state.numba import selective_state_numba as run
    elif name == "chunked":
        from contextlm.ops.selective_state.chunked import selective_state_chunked as run
    elif name == "mamba_ssm":
        from contextlm.ops.selective_state.kernels import selective_state_mamba_ssm as run
    elif name == "fla":
        from contextlm.ops.selective_state.kernels import selective_state_fla as run
    else:
        from contextlm.ops.selective_state.naive import selective_state_naive as run
    arguments: list[Any] = [*given, initial_BHNP.to(kind), begins_BT]
    return run(*arguments)


def selective_state_backend(*tensors: Tensor, packed: bool = False, backend: str = AUTO) -> str:
    """The backend that `selective_state` takes for these tensors, the inputs first.

    Args:
        *tensors: all but initial state and masks.
        packed: whether texts begin within rows.
        backend: as for `selective_state`.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    kernels = ("mamba_ssm",) if packed else ("mamba_ssm", "fla")
    return recurrence_backend("selective_state", backend, BACKENDS, tensors, kernels)


def _shape(inputs_BTHP: Tensor) -> torch.Size:
    if inputs_BTHP.dim() != 4 or inputs_BTHP.shape[1] == 0:
        found = tuple(inputs_BTHP.shape)
        raise ValueError(f"selective_state needs inputs [B, T, H, P] with T >= 1, got {found}")
    return inputs_BTHP.shape
