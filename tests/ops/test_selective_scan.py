"""Mamba's scan against a loop over single numbers, and the compiled loop against the naive one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contextlm.ops.backends import VARIABLE
from contextlm.ops.selective_scan import BACKENDS, selective_scan


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def make(batch: int, tokens: int, channels: int, size: int, dtype=torch.float64) -> list[Tensor]:
    """Inputs, steps, A, B, C and the state before."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = [
        rand(batch, tokens, channels),
        rand(batch, tokens, channels).abs(),
        -rand(channels, size).abs(),
        rand(batch, tokens, size),
        rand(batch, tokens, size),
        rand(batch, channels, size),
    ]
    return [each.to(dtype).requires_grad_() for each in given]


def results(name: str, given: list[Tensor]) -> list[Tensor]:
    """Output, last state, and the gradients of a weighted sum of both."""
    out, state = selective_scan(*given, backend=name)
    weight = torch.arange(out.numel()).view(out.shape).sin()
    gradients = torch.autograd.grad((out * weight).sum() + state.square().sum(), given)
    return [out.detach(), state.detach(), *gradients]


def test_the_definition_number_by_number():
    given = make(2, 5, 3, 2)
    u, delta, a, b, c, before = (each.tolist() for each in given)
    for name in BACKENDS:
        out, state = (each.tolist() for each in selective_scan(*given, backend=name))
        for row in range(2):
            for d in range(3):
                h = list(before[row][d])
                for t in range(5):
                    step = delta[row][t][d]
                    h = [
                        math.exp(step * a[d][n]) * h[n] + step * u[row][t][d] * b[row][t][n]
                        for n in range(2)
                    ]
                    expected = sum(c[row][t][n] * h[n] for n in range(2))
                    assert out[row][t][d] == pytest.approx(expected, abs=1e-12)
                assert state[row][d] == pytest.approx(h, abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 100])
def test_values_and_gradients_of_the_compiled_loop(tokens):
    given = make(3, tokens, 7, 5)
    for ours, naive in zip(*(results(name, given) for name in ("numba", "eager")), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_float32_a_thousand_tokens_and_a_state_that_goes_on():
    given = make(1, 1000, 40, 16, torch.float32)
    exact = results("eager", [each.detach().double().requires_grad_() for each in given])
    for ours, expected in zip(results("numba", given), exact, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5 * size)
    u, delta, a, b, c, before = given
    first, state = selective_scan(u[:, :333], delta[:, :333], a, b[:, :333], c[:, :333], before)
    second, last = selective_scan(u[:, 333:], delta[:, 333:], a, b[:, 333:], c[:, 333:], state)
    whole, end = selective_scan(*given)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    given = [each.detach().bfloat16() for each in make(2, 50, 70, 4)]
    out, _ = selective_scan(*given)
    assert out.dtype == torch.float32
    expected, _ = selective_scan(*(each.float() for each in given), backend="eager")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    u, delta, a, b, c, before = make(2, 4, 3, 2)
    with pytest.raises(ValueError, match="T >= 1"):
        selective_scan(u[:, :0], delta, a, b, c)
    with pytest.raises(ValueError, match=r"needs the initial state as \(2, 3, 2\)"):
        selective_scan(u, delta, a, b, c, before.mT)
    with pytest.raises(ValueError, match="unknown selective_scan backend 'fast'"):
        selective_scan(u, delta, a, b, c, backend="fast")
