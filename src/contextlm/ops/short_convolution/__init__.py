"""A causal depthwise convolution over a few tokens, and the activation behind it.

For each channel::

    y_t = f(b + sum_j w_j x_{t-j})      j = 0 .. taps - 1, f the identity or SiLU

Backends: ``eager``, shifted inputs in plain torch, works everywhere; ``numba``, one pass over
memory for a CPU.

J is a number of taps here, or of those before the current token.
"""

from __future__ import annotations

from torch import Tensor

from contextlm.ops.backends import AUTO, pass_backend

BACKENDS = ("eager", "numba")


def short_convolution(
    inputs_BTC: Tensor,
    weight_JC: Tensor,
    bias_C: Tensor,
    before_BJC: Tensor | None = None,
    *,
    silu: bool = False,
    positions_BT: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """The outputs, ``[B, T, C]``, in the widest type of inputs and weights.

    Args:
        inputs_BTC: x.
        weight_JC: w, the current token's first.
        bias_C: b.
        before_BJC: the inputs before the first, the newest last; None: zeros.
        silu: whether f is SiLU.
        positions_BT: each token's position in its document, which sees nothing before it; None: no
            document begins behind the first token.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`).

    Raises:
        ValueError: a backend that is unknown or does not fit.
    """
    given = (inputs_BTC, weight_JC, bias_C)
    name = pass_backend("short_convolution", backend, given)
    if name == "numba":
        from contextlm.ops.short_convolution.numba import short_convolution_numba as run
    else:
        from contextlm.ops.short_convolution.naive import short_convolution_naive as run
    return run(*given, before_BJC, positions_BT, silu=silu)
