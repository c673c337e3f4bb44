"""The blocks against the plain form, and both against the definition, in fp64 at odd sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.ops.linear_cross_entropy import BACKENDS, blocks, linear_cross_entropy

SIZES = [(1, 1, 1), (7, 3, 5), (23, 17, 31), (40, 6, 101)]
IGNORED = -100


def make(tokens: int, width: int, entries: int, dtype=torch.float64, ignored: int = 0):
    """Hidden states, weight and bias, which require gradients, and targets."""
    g = torch.Generator().manual_seed(tokens + width + entries)
    shapes = (tokens, width), (entries, width), (entries,)
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    targets = torch.randint(entries, (tokens,), generator=g)
    targets[torch.randperm(tokens, generator=g)[:ignored]] = IGNORED
    return [each.requires_grad_() for each in tensors], targets


def definition(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Token by token."""
    total = hidden.new_zeros(())
    for h, target in zip(hidden, targets.tolist(), strict=True):
        if target != IGNORED:
            scores = weight @ h + (0 if bias is None else bias)
            total = total + scores.exp().sum().log() - scores[target]
    return total


@pytest.fixture(params=[1, 50, 2**24])
def block(request, monkeypatch) -> int:
    """Logits of a block: a token at a time, several blocks with an incomplete last one, one."""
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    return request.param


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients_equal_the_definition(backend, biased, size):
    (hidden, weight, bias), targets = make(*size, ignored=size[0] // 3)
    leaves = [hidden, weight, bias] if biased else [hidden, weight]
    given = [*leaves, *([] if biased else [None]), targets]
    fast, slow = linear_cross_entropy(*given, backend=backend), definition(*given)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    # Of a loss that is scaled before it is added to others, as accumulation does.
    actual = torch.autograd.grad(fast / 7, leaves)
    for a, e in zip(actual, torch.autograd.grad(slow / 7, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("learns", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_what_is_frozen_gets_no_gradient(learns):
    tensors, targets = make(23, 5, 31)
    for tensor, yes in zip(tensors, learns, strict=True):
        tensor.requires_grad_(bool(yes))
    fast = linear_cross_entropy(*tensors, targets, backend="blocks")
    slow = linear_cross_entropy(*tensors, targets, backend="eager")
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    assert fast.requires_grad == any(learns)
    if any(learns):
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        expected = torch.autograd.grad(slow, leaves)
        for a, e in zip(torch.autograd.grad(fast, leaves), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_gradients_equal_finite_differences(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 20)
    tensors, targets = make(7, 3, 5)
    assert torch.autograd.gradcheck(
        lambda *given: linear_cross_entropy(*given, targets, backend="blocks"), tensors
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_targets_the_loss_and_its_gradients_are_zero(backend):
    tensors, targets = make(5, 3, 7, ignored=5)
    loss = linear_cross_entropy(*tensors, targets, backend=backend)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, tensors))


def test_large_logits_neither_overflow_nor_vanish():
    tensors, targets = make(9, 4, 11, torch.float32)
    with torch.no_grad():
        tensors[1] *= 1e3
    results = []
    for backend in BACKENDS:
        loss = linear_cross_entropy(*tensors, targets, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, tensors)])
    for fast, slow in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-3)


def test_under_autocast_products_round_and_sums_do_not(monkeypatch):
    """The loss is float32's of the rounded logits; gradients come in the parameters' own type."""
    monkeypatch.setattr(blocks, "BLOCK", 600)
    tensors, targets = make(200, 16, 60, torch.float32)
    results = []
    for backend in BACKENDS:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*tensors, targets, backend=backend)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, tensors)
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append((loss, gradients))
    (slow, expected), (fast, actual) = results
    rounded = [tensor.detach().bfloat16() for tensor in tensors]
    exact = F.cross_entropy(F.linear(*rounded).float(), targets, reduction="sum")
    torch.testing.assert_close(fast, exact, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-4)
    truth, _ = make(200, 16, 60, torch.float32)
    loss = linear_cross_entropy(*truth, targets, backend="eager")
    for a, e, t in zip(actual, expected, torch.autograd.grad(loss, truth), strict=True):
        # As near to float32's gradient as the plain form comes.
        assert (a - t).norm() <= 1.2 * (e - t).norm() <= 0.02 * t.norm()


def test_many_logits_are_taken_in_blocks(monkeypatch):
    seen = []
    monkeypatch.setattr("contextlm.ops.linear_cross_entropy._FEWEST_LOGITS", 23 * 31)
    run = blocks.linear_cross_entropy_blocks
    monkeypatch.setattr(
        blocks, "linear_cross_entropy_blocks", lambda *a, **k: seen.append(1) or run(*a, **k)
    )
    for tokens in (22, 23):
        tensors, targets = make(tokens, 5, 31)
        linear_cross_entropy(*tensors, targets)
    assert len(seen) == 1
    monkeypatch.setenv("CONTEXTLM_BACKEND", "linear_cross_entropy=eager")
    linear_cross_entropy(*tensors, targets)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="unknown linear_cross_entropy backend 'fast'"):
        linear_cross_entropy(*tensors, targets, backend="fast")


@pytest.mark.parametrize("target", [-1, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_no_entry_is_refused(backend, target):
    """Compiled code would read and write beside the row."""
    tensors, targets = make(5, 3, 7)
    targets[2] = target
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        linear_cross_entropy(*tensors, targets, backend=backend)


def test_without_gradients_none_is_computed(monkeypatch):
    tensors, targets = make(5, 3, 7)
    asked = []
    apply = blocks._Blocks.apply
    monkeypatch.setattr(
        blocks._Blocks,
        "apply",
        lambda *given: asked.extend(t.requires_grad for t in given[:3]) or apply(*given),
    )
    with torch.no_grad():
        linear_cross_entropy(*tensors, targets, backend="blocks")
    assert asked == [False, False, False]
