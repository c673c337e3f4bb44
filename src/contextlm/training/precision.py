"""Which number type training computes in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Turn ``auto`` into a type that suits the machine.

    The decision rests on what the hardware has, never on a timing, so that two runs on one machine
    agree: bfloat16 where matrix units for it exist (AMX or AVX512-BF16 on a CPU, Ampere or later on
    CUDA), float32 elsewhere.

    Args:
        wanted: ``auto``, ``float32`` or ``bfloat16``.
        device: where training runs.

    Returns:
        ``float32`` or ``bfloat16``.
    """
    if wanted == "float32":
        return "float32"
    if wanted == "bfloat16":
        return "bfloat16"
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        # Older torch cannot tell.
        has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bfloat16" if has.get("amx_bf16") or has.get("avx512_bf16") else "float32"
    return "float32"
