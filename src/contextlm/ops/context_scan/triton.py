"""The context recurrence as one GPU kernel that keeps the recurrent weights on chip; no gradient.

In the eager loop every token costs some launches per layer, which take longer than the arithmetic.
Here one program runs a row through all its tokens. It loads the weights once, into registers: what
has to fit there is W_c of every layer, 256 KiB in float32, which is one layer up to C = 256 or four
up to C = 128.

Compiled for GPUs and checked in Triton's interpreter by the tests; not run on a GPU so far.

Shape suffixes: B batch, T tokens, L context layers, C context width (I in, O out).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from contextlm.ops.backends import is_installed

_ON_CHIP_BYTES = 2**18  # the registers of one multiprocessor
_THREADS_PER_WARP, _VALUES_PER_THREAD = 32, 128
_FEWEST_WARPS, _MOST_WARPS = 4, 16


def is_available() -> bool:
    """Whether Triton is installed and has a GPU to run on, or TRITON_INTERPRET=1 is set."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return is_installed("triton") and (interpreted or torch.cuda.is_available())


def is_supported(layers: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the weights of all layers fit on chip.

    Args:
        layers: L.
        width: C.
        dtype: the widest type among the tensors; the kernel computes in float32 at least.
    """
    size = torch.promote_types(dtype, torch.float32).itemsize
    return layers * padded_width(width) ** 2 * size <= _ON_CHIP_BYTES


def padded_width(width: int) -> int:
    """The width of the kernel's tensors, a power of two."""
    return 1 << (width - 1).bit_length()


def warps(layers: int, width: int) -> int:
    """How many groups of 32 threads share the weights of a program."""
    values = layers * padded_width(width) ** 2
    wanted = values // (_THREADS_PER_WARP * _VALUES_PER_THREAD)
    return max(_FEWEST_WARPS, min(wanted, _MOST_WARPS))


def context_scan_triton(
    projected_BTC: Sequence[Tensor],
    weights_CC: Sequence[Tensor],
    norm_weights_C: Sequence[Tensor],
    norm_biases_C: Sequence[Tensor],
    initial_BC: Tensor,
    *,
    mask_BT: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `context_scan`, without a gradient; the state is kept in float32 at least.

    Returns:
        Every layer's output at every token, ``[L, B, T, C]``, in the type of `projected_BTC`.

    Raises:
        ValueError: a gradient is wanted, or the weights do not fit on chip.
    """
    tensors = (*projected_BTC, *weights_CC, *norm_weights_C, *norm_biases_C, initial_BC)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("context_scan_triton has no gradients: call it under torch.no_grad()")
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    layers, (batch, tokens, width) = len(weights_CC), projected_BTC[0].shape
    if not is_supported(layers, width, torch.float64 if double else torch.float32):
        raise ValueError(
            f"context_scan_triton: {layers} layers of width {width} do not fit on chip"
        )
    # Imported here, since Triton may not be installed; mypy then does not find it.
    import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    from contextlm.ops.context_scan.triton_kernel import scan_kernel

    projected_LBTC = torch.stack(list(projected_BTC))
    states_LBTC = torch.empty_like(projected_LBTC)
    with torch.cuda.device_of(states_LBTC):
        scan_kernel[(batch,)](
            projected_LBTC,
            torch.stack([weight_CC.t() for weight_CC in weights_CC]),
            torch.stack(list(norm_weights_C)),
            torch.stack(list(norm_biases_C)),
            initial_BC.contiguous(),
            initial_BC if mask_BT is None else mask_BT.contiguous(),  # not read without a mask
            states_LBTC,
            batch,
            tokens,
            EPS=eps,
            WIDTH=width,
            PADDED=padded_width(width),
            LAYERS=layers,
            MASKED=mask_BT is not None,
            STATE=tl.float64 if double else tl.float32,
            num_warps=warps(layers, width),
        )
    return states_LBTC
