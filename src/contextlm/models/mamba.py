"""transformers' Mamba and Mamba-2 on a CPU, their scans in compiled loops.

transformers has kernels for CUDA. For all else its own form of Mamba's scan takes several calls a
token, and that of Mamba-2 copies for every head: many times slower to train than what they are
compared with. The models stay transformers'; only the two functions behind them are exchanged, for
what computes the same (`ops.selective_scan`, `ops.selective_state`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from contextlm.ops import selective_scan as mamba_op
from contextlm.ops import selective_state as mamba2_op
from contextlm.ops.backends import AUTO, is_observed, requested_backend


def use_compiled_scans() -> None:
    """Exchange the functions, in this process.

    Theirs still run on other devices, when traced, where the op's backend is to be ``eager``, and
    for arguments that ours do not have.
    """
    for module, name, ours, op in (
        (modeling_mamba, "mamba_selective_scan", _mamba_scan, mamba_op),
        (modeling_mamba2, "mamba2_chunk_scan", _mamba2_scan, mamba2_op),
    ):
        theirs = getattr(module, name)
        if not hasattr(theirs, "theirs"):
            setattr(module, name, _either(theirs, ours, op))


def _either(theirs: Callable[..., Any], ours: Callable[..., Any], op: Any) -> Callable[..., Any]:
    known = inspect.signature(ours).parameters
    name = op.__name__.rpartition(".")[2]

    @functools.wraps(theirs)
    def scan(hidden_states: Tensor, *given: Any, **options: Any) -> Any:
        fits = (
            hidden_states.device.type == "cpu"
            and known.keys() >= options.keys()
            and not is_observed((hidden_states,))
            and requested_backend(name, AUTO, op.BACKENDS) != "eager"
        )
        if fits and (found := ours(hidden_states, *given, **options)) is not None:
            return found
        return theirs(hidden_states, *given, **options)

    scan.theirs = theirs  # type: ignore[attr-defined]
    return scan


def _mamba_scan(
    hidden_BDT: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Any:
    """transformers' arguments, ``[B, D, T]`` or ``[B, N, T]``; the last two choose forms of theirs.

    The state is read in float32, where theirs rounds it to the inputs' type first.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    out, state = mamba_op.selective_scan(hidden_BDT.mT, dt.mT, A, B.mT, C.mT)
    out = out.mT
    if D is not None:
        out = out + hidden_BDT * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    return (out, state) if return_last_state else out


def _mamba2_scan(
    hidden_BTHP: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
) -> Any:
    """Likewise; None where heads have not all the same B and C, or there is a gate."""
    if B.shape[2] != 1 or z is not None:
        return None
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    skip = torch.zeros_like(A) if D is None else D
    before = None if initial_states is None else initial_states.mT
    with torch.autocast("cpu", enabled=False):
        out, state = mamba2_op.selective_state(
            hidden_BTHP, dt, -A, B[:, :, 0], C[:, :, 0], skip, before
        )
    return (out, state.mT) if return_final_states else out
