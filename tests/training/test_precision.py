"""`auto` follows the hardware, everything else is taken as it is."""

from __future__ import annotations

import pytest
import torch

from contextlm.training.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_an_explicit_type_is_kept(wanted):
    assert resolve_precision(wanted, CPU) == wanted


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({}, "float32")],
)
def test_auto_on_a_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected


def test_auto_elsewhere_is_float32():
    assert resolve_precision("auto", torch.device("mps")) == "float32"
