"""The gated delta rule by flash-linear-attention's Triton kernels (Yang et al.), if installed."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor


def delta_rule_fla(
    queries_BTHN: Tensor,
    keys_BTHN: Tensor,
    values_BTHP: Tensor,
    logs_BTHX: Tensor,
    rates_BTH: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, on CUDA, for tensors of one type and one text a row."""
    assert begins_BT is None, "its varying lengths are for one row only"
    if logs_BTHX.shape[-1] == 1:
        run = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        logs_BTHX = logs_BTHX.squeeze(-1)
    else:
        run = import_module("fla.ops.kda").chunk_kda
    outputs_BTHP, final_BHNP = run(
        *(each.contiguous() for each in (queries_BTHN, keys_BTHN, values_BTHP, logs_BTHX)),
        rates_BTH.contiguous(),
        scale=1.0,
        initial_state=initial_BHNP,
        output_final_state=True,
    )
    return outputs_BTHP, final_BHNP
