"""What the tests of recurrences with a matrix state share: the loop, and comparisons with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

Op = Callable[..., tuple[Tensor, Tensor]]


def head_by_head(
    step: Callable[[Tensor, int, int, int], Tensor],
    read: Callable[[Tensor, int, int, int], Tensor],
    initial_BHNP: Tensor,
    tokens: int,
    mask: Tensor | None = None,
    begins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row, head by head, token by token: the states by `step`, and what `read` gives.

    Both take a state and the numbers of the row, the token and the head.
    """
    batch, heads = initial_BHNP.shape[:2]
    outputs, finals = [], []
    for b in range(batch):
        for h in range(heads):
            state, rows = initial_BHNP[b, h], []
            for t in range(tokens):
                if begins is not None and begins[b, t]:
                    state = torch.zeros_like(state)
                if mask is None or mask[b, t]:
                    state = step(state, b, t, h)
                rows.append(read(state, b, t, h))
            outputs.append(torch.stack(rows))
            finals.append(state)
    stacked = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return stacked, torch.stack(finals).unflatten(0, (batch, heads))


def differentiated(results: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, final state and every gradient."""
    g = torch.Generator().manual_seed(99)
    grads = [torch.randn(each.shape, generator=g, dtype=torch.float64) for each in results]
    return [*results, *torch.autograd.grad(results, tensors, grads)]


def agree(
    names: Sequence[str], results: tuple[Tensor, ...], tensors: list[Tensor], slow: list[Tensor]
) -> None:
    """All that `differentiated` gives is the naive loop's; `names` for the message."""
    for name, ours, theirs in zip(names, differentiated(results, tensors), slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)


def pieces_equal_the_whole(op: Op, tensors: list[Tensor], backend: str) -> None:
    """The last tensor is the initial state; what has more than one dimension goes by tokens."""
    whole, final = op(*tensors, backend=backend)
    pieces, state, start = [], tensors[-1], 0
    for size in (1, 64, 2, 63):
        along = [x[:, start : start + size] if x.dim() > 1 else x for x in tensors[:-1]]
        piece, state = op(*along, state, backend=backend)
        pieces.append(piece)
        start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def float32_lasts(op: Op, tensors: list[Tensor], backend: str) -> None:
    """Outputs, state and gradients of a long text are those of float64, within 5e-4 of each one's
    largest number."""
    if backend == "eager":
        pytest.skip("the loop takes minutes, and is the same at every token")
    given = [tensor.float().requires_grad_() for tensor in tensors]
    outcomes = []
    for kind, name in ((torch.float32, backend), (torch.float64, "auto")):
        outputs, final = op(*(x.to(kind) for x in given), backend=name)
        grads = torch.autograd.grad(outputs.square().mean(), given)
        outcomes.append([outputs, final, *grads])
    for single, exact in zip(*outcomes, strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(single.double(), exact.double(), rtol=0, atol=5e-4 * scale)


def computes_in_float32(op: Op, naive: Op, tensors: list[Any], backend: str) -> None:
    """Of a half type, whose numbers the naive loop reads exactly."""
    outputs, final = op(*tensors, backend=backend)
    assert outputs.dtype == final.dtype == torch.float32
    exact, _ = naive(*(tensor.double() for tensor in tensors))
    torch.testing.assert_close(outputs.double(), exact, rtol=1e-4, atol=1e-4)
