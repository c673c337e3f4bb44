"""The ops that are one pass over memory: the compiled form, plain torch, and the equation."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.ops.rms_norm import rms_norm
from contextlm.ops.rms_norm.step import norm_step
from contextlm.ops.short_convolution import short_convolution


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def differentiated(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The result and its gradients, for a cotangent that is the same for all backends."""
    weights = normal(*result.shape, dtype=result.dtype).detach()
    return [result, *torch.autograd.grad((result * weights).sum(), leaves)]


def compare(function, leaves: list[Tensor], tolerance: float) -> None:
    fast, slow = (differentiated(function(name), leaves) for name in ("numba", "eager"))
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def positions(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[n for length in row for n in range(length)] for row in rows])


@pytest.mark.parametrize("silu", [False, True])
def test_the_convolution_is_its_equation(silu: bool) -> None:
    x, weight, bias, before = normal(2, 9, 3), normal(4, 3), normal(3), normal(2, 3, 3)
    begins = positions([[9], [5, 1, 3]])
    for place_BT, first in ((None, before), (begins, None), (None, None)):
        out = short_convolution(x, weight, bias, first, silu=silu, positions_BT=place_BT)
        for b in range(2):
            for t in range(9):
                expected = bias.clone()
                for j in range(4):
                    if t - j >= 0 and (place_BT is None or place_BT[b, t] >= j):
                        expected = expected + weight[j] * x[b, t - j]
                    elif t - j < 0 and first is not None:
                        expected = expected + weight[j] * first[b, 3 + t - j]
                if silu:
                    expected = expected / (1 + torch.exp(-expected))
                torch.testing.assert_close(out[b, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_convolution_in_one_pass(taps: int, silu: bool, dtype: torch.dtype) -> None:
    """With its inputs as columns of wider rows, which are not copied."""
    rows, weight, bias = (normal(*s, dtype=dtype) for s in ((3, 37, 30), (taps, 11), (11,)))
    before = normal(3, taps - 1, 11, dtype=dtype)
    for first, place_BT in (
        (None, None),
        (before, None),
        (None, positions([[37], [20, 17], [1] * 37])),
    ):
        leaves = [rows, weight, bias, *([before] if first is not None and taps > 1 else [])]
        compare(
            lambda name, first=first, place_BT=place_BT: short_convolution(
                rows[..., 5:16], weight, bias, first, silu=silu, positions_BT=place_BT, backend=name
            ),
            leaves,
            1e-11 if dtype == torch.float64 else 3e-5,
        )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_in_one_pass(gated: bool, dtype: torch.dtype) -> None:
    x, weight, rows = (normal(*s, dtype=dtype) for s in ((2, 37, 11), (11,), (2, 37, 30)))
    compare(
        lambda name: rms_norm(x, weight, rows[..., 5:16] if gated else None, backend=name),
        [x, weight, *([rows] if gated else [])],
        1e-11 if dtype == torch.float64 else 3e-5,
    )
    out = rms_norm(x, weight, rows[..., 5:16] if gated else None, eps=0.1)
    inner = x * rows[..., 5:16] * torch.sigmoid(rows[..., 5:16]) if gated else x
    expected = weight * inner / torch.sqrt(inner.square().mean(-1, keepdim=True) + 0.1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_read_and_written_without_another_copy() -> None:
    """Rounded to the nearest as torch rounds; also weights in bfloat16."""
    kind = torch.bfloat16
    rows, weight, bias = (normal(*s, dtype=kind) for s in ((3, 37, 30), (4, 11), (11,)))
    x, norm = normal(3, 37, 11, dtype=torch.float32), normal(11, dtype=torch.float32)
    part = rows[..., 5:16]
    for function, leaves in (
        (lambda name: short_convolution(part, weight.float(), bias.float(), backend=name), [rows]),
        (lambda name: short_convolution(part, weight, bias, backend=name).float(), [rows, weight]),
        (lambda name: rms_norm(x, norm, part, backend=name), [x, rows]),
    ):
        fast, slow = (differentiated(function(name), leaves) for name in ("numba", "eager"))
        for ours, theirs in zip(fast, slow, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)
    exact = rms_norm(x, norm, part.float(), backend="numba")
    assert torch.equal(rms_norm(x, norm, part, backend="numba"), exact.to(kind))


def test_the_sigmoid_of_every_size_of_number() -> None:
    """Through the norm's gate, whose other factors are 1: from -200 to 200, and a NaN stays one."""
    gate = torch.linspace(-200, 200, 4001).view(1, -1, 1)
    ones = torch.ones_like(gate)
    # With eps this large the norm hardly changes what it divides.
    out = 1e6 * rms_norm(ones, torch.ones(1), gate, eps=1e12, backend="numba")
    torch.testing.assert_close(out, F.silu(gate), rtol=2e-6, atol=1e-12)
    assert rms_norm(ones, torch.ones(1), gate * torch.nan, backend="numba").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_of_tokens_in_one_call(dtype: torch.dtype) -> None:
    x, weight = normal(3, 1, 11, dtype=dtype).detach(), normal(11, dtype=dtype).detach()
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    out = norm_step(x, weight, eps=1e-3)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_threads_hold_the_tensors_whose_addresses_they_work_on(monkeypatch) -> None:
    """Also once the call that started them was interrupted."""
    works: list[object] = []
    monkeypatch.setattr("contextlm.ops.step.in_threads", lambda work, *_: works.append(work))
    x = torch.ones(2, 1, 3)
    held, out = weakref.ref(x), weakref.ref(norm_step(x, torch.ones(3), eps=0.1))
    del x
    assert held() is not None
    assert out() is not None


def test_the_choice() -> None:
    x, weight = torch.ones(2, 100, 64), torch.ones(64)
    with pytest.raises(ValueError, match="'numba' is for CPU only"):
        rms_norm(x.to("meta"), weight.to("meta"), backend="numba")
    with pytest.raises(ValueError, match="unknown short_convolution backend 'fast'"):
        short_convolution(x, torch.ones(2, 64), weight, backend="fast")


def test_float16_which_numba_does_not_know() -> None:
    x, weight = normal(2, 40, 64, dtype=torch.float16), normal(64, dtype=torch.float16)
    expected = F.rms_norm(x, (64,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight), expected, rtol=1e-2, atol=1e-2)
    assert short_convolution(x, normal(4, 64, dtype=torch.float16), weight).dtype == torch.float16


def test_function_transforms_see_torchs_own_operations() -> None:
    x, weight = normal(64, 96), normal(96)
    expected = torch.autograd.grad(rms_norm(x, weight).sum(), x)[0]
    given = torch.func.grad(lambda x: rms_norm(x, weight.detach()).sum())(x.detach())
    torch.testing.assert_close(given, expected)
