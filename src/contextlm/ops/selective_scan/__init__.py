"""Mamba's selective scan (Gu and Dao, arXiv:2312.00752, section 3), one public op::

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = C_t h_t

Each of D channels has N numbers of state, each with a decay of its own; Mamba-2's, with one decay a
head, is `ops.selective_state`. Backends: ``eager``, the loop over tokens in `naive`, works
everywhere; ``numba``, one compiled loop for a CPU.
"""

from __future__ import annotations

from torch import Tensor

from contextlm.ops.arguments import check_shapes, computing_type
from contextlm.ops.backends import AUTO, recurrence_backend

BACKENDS = ("eager", "numba")


def selective_scan(
    inputs_BTD: Tensor,
    delta_BTD: Tensor,
    a_DN: Tensor,
    b_BTN: Tensor,
    c_BTN: Tensor,
    initial_BDN: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens; differentiable in all tensors.

    Everything is computed in float32 at least, and comes back so.

    Args:
        inputs_BTD: u.
        delta_BTD: the step sizes, 0 or more.
        a_DN: A, negative.
        b_BTN: B, what a token writes.
        c_BTN: C, what a token reads.
        initial_BDN: the state before the first token; None: zero.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`).

    Returns:
        y, ``[B, T, D]``, and the state after the last token, ``[B, D, N]``.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a backend that is unknown or does not fit.
    """
    if inputs_BTD.dim() != 3 or inputs_BTD.shape[1] == 0:
        raise ValueError(
            f"selective_scan needs inputs [B, T, D] with T >= 1, got {tuple(inputs_BTD.shape)}"
        )
    (batch, tokens, channels), size = inputs_BTD.shape, a_DN.shape[-1]
    check_shapes(
        "selective_scan",
        {
            "delta": (delta_BTD, inputs_BTD.shape),
            "A": (a_DN, (channels, size)),
            "B": (b_BTN, (batch, tokens, size)),
            "C": (c_BTN, (batch, tokens, size)),
            "initial state": (initial_BDN, (batch, channels, size)),
        },
    )
    if initial_BDN is None:
        initial_BDN = inputs_BTD.new_zeros(batch, channels, size)
    given: tuple[Tensor, ...] = (inputs_BTD, delta_BTD, a_DN, b_BTN, c_BTN, initial_BDN)
    kind = computing_type(*given)
    given = tuple(tensor.to(kind) for tensor in given)
    name = recurrence_backend("selective_scan", backend, BACKENDS, given, ())
    if name == "numba":
        from contextlm.ops.selective_scan.numba import selective_scan_numba as run
    else:
        from contextlm.ops.selective_scan.naive import selective_scan_naive as run
    return run(*given)
