"""The nonlinear context recurrence, one public op with several backends.

For every token t and every context layer l (DESIGN 1.2)::

    c'  = LN_l(c + GELU(W_l c + p_l[t]))        p_l[t] = W_e,l e_t + b_l, projected beforehand
    c_t = the last layer's c';  layer 0 starts from c_{t-1}, layer l from layer l-1 at the same t

Backends: ``eager``, the loop over tokens in `naive`, works everywhere; ``numba``, one compiled loop
for few rows on a CPU, and ``triton``, one kernel for a GPU, have no gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from contextlm.ops.backends import AUTO, is_installed, is_observed, requested_backend
from contextlm.ops.context_scan.naive import context_step as context_step

BACKENDS = ("eager", "numba", "triton")
# Measured (docs/log.md): with more rows eager's matrix products catch up; shorter sequences do not
# repay preparing the weights.
_MOST_ROWS, _FEWEST_TOKENS = 8, 8


def context_scan(
    projected_BTC: Sequence[Tensor],
    weights_CC: Sequence[Tensor],
    norm_weights_C: Sequence[Tensor],
    norm_biases_C: Sequence[Tensor],
    initial_BC: Tensor,
    *,
    mask_BT: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = AUTO,
) -> Tensor:
    """Run the recurrence over T tokens; differentiable in every tensor.

    Args:
        projected_BTC: per layer, the tokens' part ``W_e e_t + b``.
        weights_CC: per layer, the recurrent weight.
        norm_weights_C: per layer, scale of the layer norm.
        norm_biases_C: per layer, shift of the layer norm.
        initial_BC: the context before the first token.
        mask_BT: False where a token is padding: the context passes it unchanged.
        eps: of the layer norms.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`), which takes the fastest that
            fits the tensors.

    Returns:
        Every layer's output at every token, ``[L, B, T, C]``; the recurrent context is the last
        layer's.

    Raises:
        ValueError: no layers, no tokens, or a backend that is unknown or does not fit.
    """
    if not projected_BTC or projected_BTC[0].shape[1] == 0:
        raise ValueError("context_scan needs at least one layer and one token")
    per_layer = (projected_BTC, weights_CC, norm_weights_C, norm_biases_C)
    tensors = [*(tensor for kind in per_layer for tensor in kind), initial_BC]
    batch, tokens, _ = projected_BTC[0].shape
    name = context_scan_backend(tensors, batch, tokens, backend=backend)
    # Imported when chosen: compilers and kernels take a while to load.
    if name == "numba":
        from contextlm.ops.context_scan.numba import context_scan_numba as run
    elif name == "triton":
        from contextlm.ops.context_scan.triton import context_scan_triton as run
    else:
        from contextlm.ops.context_scan.naive import context_scan_naive as run
    return run(*per_layer, initial_BC, mask_BT=mask_BT, eps=eps)


def context_scan_backend(
    tensors: Sequence[Tensor], rows: int, tokens: int, *, backend: str = AUTO
) -> str:
    """The backend that `context_scan` takes for these tensors (all but the mask), B and T.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    if backend == AUTO and torch.compiler.is_compiling():
        return "eager"  # a graph cannot hold what follows
    name = requested_backend("context_scan", backend, BACKENDS)
    if name == AUTO and is_observed(tensors):
        return "eager"
    if name == AUTO:
        small = rows <= _MOST_ROWS and tokens >= _FEWEST_TOKENS
        wanted = ["triton", *(["numba"] if small else [])]
        return next((name for name in wanted if not _obstacle(name, tensors)), "eager")
    obstacle = _obstacle(name, tensors)
    if obstacle:
        raise ValueError(f"context_scan backend {name!r} {obstacle}")
    return name


def _obstacle(name: str, tensors: Sequence[Tensor]) -> str:
    """Why a backend cannot take these tensors; empty if it can."""
    if name == "eager":
        return ""
    types, devices = {t.dtype for t in tensors}, {t.device.type for t in tensors}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "has no gradients"
    device = "cpu" if name == "numba" else "cuda"
    if devices != {device}:
        return f"is for {device.upper()} only"
    if name == "numba":
        fits = len(types) == 1 and types <= {torch.float32, torch.float64}
        return "" if fits else "takes float32 or float64, all tensors alike"
    if not is_installed(name):
        return f"needs the package {name}"
    from contextlm.ops.context_scan.triton import is_supported

    layers, width = (len(tensors) - 1) // 4, tensors[-1].shape[-1]
    fits = is_supported(layers, width, functools.reduce(torch.promote_types, types))
    return "" if fits else "cannot hold these weights on chip"
