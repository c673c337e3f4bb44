"""The GPU kernel of `context_scan_triton`; importing this file needs Triton.

Shape suffixes: B batch, T tokens, L context layers, C context width (I in, O out).
"""

# Triton's language only looks like Python, and its types are its own.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
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
