"""The compiled scan with few and more rows, and who gets the eager loop."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contextlm.ops.context_scan import context_scan, context_scan_backend

TOKENS = 19


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    monkeypatch.delenv("CONTEXTLM_BACKEND", raising=False)


def inputs(layers: int = 1, rows: int = 1, width: int = 5):
    generator = torch.Generator().manual_seed(width)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        [rand(rows, TOKENS, width) for _ in range(layers)],
        [0.2 * rand(width, width + 2)[:, 1:-1] for _ in range(layers)],
        [rand(width) for _ in range(layers)],
        [rand(width) for _ in range(layers)],
        rand(rows, width),
    )


def flat(parts):
    return [*(t for part in parts[:-1] for t in part), parts[-1]]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("width", [3, 33])
def test_numba_equals_the_eager_loop_however_many_rows(rows, width):
    parts = inputs(2, rows, width)
    actual = context_scan(*parts, eps=1e-5, backend="numba")
    expected = context_scan(*parts, eps=1e-5, backend="eager")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_numba_leaves_its_inputs_as_they_are():
    parts = inputs()
    before = [tensor.clone() for tensor in flat(parts)]
    context_scan(*parts, backend="numba")
    for tensor, same in zip(flat(parts), before, strict=True):
        torch.testing.assert_close(tensor, same, rtol=0, atol=0)


def test_who_watches_torch_gets_the_eager_loop():
    parts = inputs()
    assert context_scan_backend(flat(parts), 1, TOKENS) == "numba"
    with FlopCounterMode(display=False) as counter:
        context_scan(*parts)
    assert counter.get_total_flops() >= 2 * TOKENS * 5 * 5

    def of_initial(initial):
        return context_scan(*parts[:-1], initial)

    _, tangent = torch.func.jvp(of_initial, (parts[-1],), (torch.ones_like(parts[-1]),))
    assert tangent.abs().sum() > 0
    many = torch.vmap(of_initial)(torch.stack([parts[-1], 2 * parts[-1]]))
    torch.testing.assert_close(many[0], of_initial(parts[-1]), rtol=1e-12, atol=1e-12)


def test_a_graph_of_the_whole_is_possible():
    parts = inputs()
    compiled = torch.compile(context_scan, fullgraph=True, backend="eager")
    expected = context_scan(*parts, backend="eager")
    torch.testing.assert_close(compiled(*parts), expected, rtol=1e-12, atol=1e-12)


def test_triton_is_for_cuda():
    with pytest.raises(ValueError, match="'triton' is for CUDA only"):
        context_scan(*inputs(), backend="triton")
