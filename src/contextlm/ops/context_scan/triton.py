"""The context recurrence as one GPU kernel that keeps the recurrent weights on chip.

In the eager loop every token costs some launches per layer, which take longer than the arithmetic.
Here one program runs a row through all its tokens. It loads the weights once, into registers: what
has to fit there is W_c of every layer, 256 KiB in float32, which is one layer up to C = 256 or four
up to C = 128. Importing this file needs Triton.

Compiled for GPUs and checked in Triton's interpreter by the tests; not run on a GPU so far. I and O
are the dimensions of a C x C weight: in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_ON_CHIP_BYTES = 2**18  # the registers of one multiprocessor
_THREADS_PER_WARP, _VALUES_PER_THREAD = 32, 128
_FEWEST_WARPS, _MOST_WARPS = 4, 16


def is_supported(layers: int, width: int, dtype: torch.dtype) -> bool:
    """Whether the weights of L layers of width C fit on chip.

    `dtype` is the widest type among the tensors; the kernel computes in float32 at least.
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
    mask_BT: Tensor | None,
    eps: float,
) -> Tensor:
    """As `context_scan`, in the type of `projected_BTC`; the state is in float32 at least."""
    kinds = (projected_BTC, weights_CC, norm_weights_C, norm_biases_C, (initial_BC,))
    double = any(tensor.dtype == torch.float64 for kind in kinds for tensor in kind)
    layers, (batch, tokens, width) = len(weights_CC), projected_BTC[0].shape
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


@triton.jit
@no_type_check
def scan_kernel(
    projected_LBTC,
    weights_LIO,
    scales_LC,
    shifts_LC,
    initial_BC,
    mask_BT,
    states_LBTC,
    batch,
    tokens,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LAYERS: tl.constexpr,
    MASKED: tl.constexpr,
    STATE: tl.constexpr,
):
    """One program runs one row through all tokens, in the type STATE. Tensors are contiguous.

    Outputs lie side by side in a weight, so that a thread holds many inputs of few outputs and sums
    most of the product by itself. PADDED is the width, rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    real = at < WIDTH
    square = at[:, None] * WIDTH + at[None, :]
    inside = real[:, None] & real[None, :]
    weights = ()
    scales = ()
    shifts = ()
    for layer in tl.static_range(LAYERS):  # Triton's language knows no (*weights, weight)
        weight = tl.load(weights_LIO + layer * WIDTH * WIDTH + square, mask=inside, other=0.0)
        scale = tl.load(scales_LC + layer * WIDTH + at, mask=real, other=0.0)
        shift = tl.load(shifts_LC + layer * WIDTH + at, mask=real, other=0.0)
        weights = weights + (weight,)  # noqa: RUF005
        scales = scales + (scale.to(STATE),)  # noqa: RUF005
        shifts = shifts + (shift.to(STATE),)  # noqa: RUF005
    state = tl.load(initial_BC + row * WIDTH + at, mask=real, other=0.0).to(STATE)
    for t in range(tokens):
        context = state
        keep = True
        if MASKED:
            keep = tl.load(mask_BT + row * tokens + t) != 0
        for layer in tl.static_range(LAYERS):
            here = ((layer * batch + row) * tokens + t) * WIDTH + at
            update = tl.load(projected_LBTC + here, mask=real, other=0.0).to(STATE)
            update += tl.sum(weights[layer].to(STATE) * context[:, None], axis=0)
            total = context + 0.5 * update * (1.0 + tl.erf(update * 0.7071067811865476))
            mean = tl.sum(total, axis=0) / WIDTH
            centred = tl.where(real, total - mean, 0.0)
            deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
            context = centred / deviation * scales[layer] + shifts[layer]
            if MASKED:
                context = tl.where(keep, context, state)
            tl.store(states_LBTC + here, context.to(states_LBTC.dtype.element_ty), mask=real)
        state = context
