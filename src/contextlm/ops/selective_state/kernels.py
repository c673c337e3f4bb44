"""The selective state by published Triton kernels, where their packages are installed.

Sources: mamba_ssm (`mamba_chunk_scan_combined`, Dao and Gu) and flash-linear-attention
(`chunk_simple_gla`, Yang et al.), which calls B keys, C queries and a head's decays gates.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

_CHUNK = 64


def selective_state_mamba_ssm(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `selective_state`, on CUDA, for tensors of one type."""
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    outputs_BTHP, final_BHPN = scan(
        inputs_BTHP.contiguous(),
        steps_BTH.contiguous(),
        -rates_H,
        write_BTN.unsqueeze(2).contiguous(),
        read_BTN.unsqueeze(2).contiguous(),
        _CHUNK,
        D=skip_H,
        initial_states=initial_BHNP.mT.contiguous(),
        # The state before the first token belongs to text 0.
        seq_idx=None if begins_BT is None else begins_BT.cumsum(1).to(torch.int32),
        return_final_states=True,
    )
    return outputs_BTHP, final_BHPN.mT


def selective_state_fla(
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    rates_H: Tensor,
    write_BTN: Tensor,
    read_BTN: Tensor,
    skip_H: Tensor,
    initial_BHNP: Tensor,
    begins_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `selective_state`, on CUDA, for tensors of one type and one text a row."""
    assert begins_BT is None, "its varying lengths are for one row only"
    shape = (-1, -1, inputs_BTHP.shape[2], -1)
    outputs_BTHP, final_BHNP = import_module("fla.ops.simple_gla").chunk_simple_gla(
        read_BTN.unsqueeze(2).expand(shape).contiguous(),
        write_BTN.unsqueeze(2).expand(shape).contiguous(),
        steps_BTH.unsqueeze(-1) * inputs_BTHP,
        -steps_BTH * rates_H,
        scale=1.0,
        initial_state=initial_BHNP,
        output_final_state=True,
    )
    return torch.addcmul(outputs_BTHP, skip_H.unsqueeze(-1), inputs_BTHP), final_BHNP
