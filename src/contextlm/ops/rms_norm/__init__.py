"""The norm by the root of the mean square, with or without a gate before it.

For each vector of C channels (Zhang and Sennrich, arXiv:1910.07467; the gate as in Mamba-2)::

    y = w x' / sqrt(mean(x'^2) + eps)      x' = x, or x * silu(z)

Backends: ``eager``, plain torch, works everywhere; ``numba``, one pass over memory for a CPU.
"""

from __future__ import annotations

from torch import Tensor

from contextlm.ops.backends import AUTO, pass_backend

BACKENDS = ("eager", "numba")


def rms_norm(
    inputs: Tensor,
    weight_C: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = AUTO,
) -> Tensor:
    """The normalised vectors, in the type of the gate, or else of the inputs.

    Everything is computed in float32 at least.

    Args:
        inputs: x, ``[..., C]``.
        weight_C: w.
        gate: z, ``[..., C]``; None: no gate.
        eps: added to the mean square.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`).

    Raises:
        ValueError: a backend that is unknown or does not fit.
    """
    given = [each for each in (inputs, weight_C, gate) if each is not None]
    if pass_backend("rms_norm", backend, given) == "numba":
        from contextlm.ops.rms_norm.numba import rms_norm_numba as run
    else:
        from contextlm.ops.rms_norm.naive import rms_norm_naive as run
    return run(inputs, weight_C, gate, eps)
