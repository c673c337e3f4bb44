"""Every backend against a loop written straight from the definition, in fp64, at odd lengths."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType

import pytest
import torch
from recurrences import (
    agree,
    computes_in_float32,
    differentiated,
    float32_lasts,
    head_by_head,
    pieces_equal_the_whole,
)
from torch import Tensor

from contextlm.ops import backends
from contextlm.ops.delta_rule import LEAST, delta_rule, delta_rule_backend

# B, T, H, N, P, X
SIZES = [(2, 1, 1, 1, 1, 1), (1, 63, 3, 4, 5, 4), (2, 100, 2, 3, 7, 1), (1, 1000, 1, 2, 3, 2)]
NAMES = ("outputs", "final", "queries", "keys", "values", "logs", "rates", "initial")


@pytest.fixture(params=["eager", "numba", "chunked"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def naive(q, k, v, logs, rates, initial, mask=None, begins=None) -> tuple[Tensor, Tensor]:
    def step(state: Tensor, b: int, t: int, h: int) -> Tensor:
        state = torch.exp(logs[b, t, h]).unsqueeze(1) * state
        error = v[b, t, h] - state.T @ k[b, t, h]
        return state + rates[b, t, h] * torch.outer(k[b, t, h], error)

    def output(state: Tensor, b: int, t: int, h: int) -> Tensor:
        return state.T @ q[b, t, h]

    return head_by_head(step, output, initial, v.shape[1], mask, begins)


def make(
    batch: int, tokens: int, heads: int, numbers: int, width: int, channels: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    keys = normal(batch, tokens, heads, numbers)
    tensors = [
        normal(batch, tokens, heads, numbers),
        keys / keys.norm(dim=-1, keepdim=True),
        normal(batch, tokens, heads, width),
        -torch.rand(batch, tokens, heads, channels, generator=g, dtype=torch.float64),
        torch.rand(batch, tokens, heads, generator=g, dtype=torch.float64),
        normal(batch, heads, numbers, width),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


@lru_cache
def made(*size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments, and what the naive loop makes of them: once for all backends."""
    tensors = make(*size)
    return tensors, differentiated(naive(*tensors), tensors)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_states_and_gradients_equal_the_naive_loop(backend: str, size) -> None:
    tensors, slow = made(*size)
    agree(NAMES, delta_rule(*tensors, backend=backend), tensors, slow)


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_passes_the_state_and_texts_begin_anew(backend: str, channels: int) -> None:
    tensors = make(3, 80, 2, 3, 4, channels)
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 80, generator=g) < 0.6
    mask[0, :5], mask[1, 40:] = False, False
    begins = torch.rand(3, 80, generator=g) < 0.05
    begins[0, 0], begins[1, 32], begins[2, 79] = True, True, True  # also where chunks begin
    slow = differentiated(naive(*tensors, mask, begins), tensors)
    fast = delta_rule(*tensors, mask_BT=mask, begins_BT=begins, backend=backend)
    agree(NAMES, fast, tensors, slow)


def test_pieces_of_any_size_equal_the_whole(backend: str) -> None:
    tensors = [tensor.detach() for tensor in make(2, 130, 2, 3, 4, 3)]
    pieces_equal_the_whole(delta_rule, tensors, backend)


@pytest.mark.parametrize("channels", [1, 4])
def test_the_fastest_decays_that_are_promised_in_float32(backend: str, channels: int) -> None:
    tensors = [tensor.detach() for tensor in make(1, 200, 2, 4, 3, channels)]
    tensors[3] = torch.full_like(tensors[3], LEAST)
    tensors[3][..., 0] = 0
    exact = delta_rule(*tensors, backend="eager")
    single = [tensor.float().requires_grad_() for tensor in tensors]
    outcome = delta_rule(*single, backend=backend)
    for ours, theirs in zip(outcome, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(outcome[0].square().sum(), single)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_a_state_survives_thousands_of_tokens_in_float32(backend: str) -> None:
    along = [tensor.detach() for tensor in make(1, 10_000, 1, 3, 2, 3)[:5]]
    along[3] = along[3] * torch.tensor([1e-3, 1e-2, 1.0])  # of very different length
    float32_lasts(delta_rule, along, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_is_computed_in_float32_at_least(backend: str, dtype: torch.dtype) -> None:
    tensors = [tensor.detach().to(dtype) for tensor in make(1, 70, 2, 3, 4, 3)]
    computes_in_float32(delta_rule, naive, tensors, backend)


@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_of_gradients(channels: int) -> None:
    tensors = make(1, 4, 1, 2, 2, channels)
    for name in ("eager", "chunked"):
        assert torch.autograd.gradgradcheck(
            lambda *given, name=name: delta_rule(*given, backend=name)[0], tensors
        )


def test_traced_whole_by_torch_compile() -> None:
    tensors = make(2, 70, 2, 3, 4, 3)
    compiled = torch.compile(delta_rule, fullgraph=True, backend="eager", dynamic=False)
    outputs, final = compiled(*tensors)
    expected = naive(*tensors)
    torch.testing.assert_close(outputs, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [1, 3])
def test_published_kernels_are_called_with_what_they_expect(monkeypatch, channels: int) -> None:
    """Stand-ins with their signatures."""
    tensors = [tensor.detach().float() for tensor in make(2, 70, 2, 3, 4, channels)]
    monkeypatch.setattr(backends, "obstacle_to", lambda *_: "")

    def rule(q, k, v, g, beta, scale, initial_state, output_final_state):
        assert output_final_state
        assert scale == 1.0
        assert g.shape == (k.shape[:3] if channels == 1 else k.shape)
        return naive(q, k, v, g.unsqueeze(-1) if channels == 1 else g, beta, initial_state)

    for path, name in (
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        ("fla.ops.kda", "chunk_kda"),
    ):
        module = ModuleType(path)
        setattr(module, name, rule)
        monkeypatch.setitem(sys.modules, path, module)
        for parent in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for ours, theirs in zip(delta_rule(*tensors, backend="fla"), naive(*tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_choice_is_visible_and_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = torch.ones(2, 9, 3, 1), torch.ones(2, 1, 3, 1)
    assert delta_rule_backend(long) == "numba"
    assert delta_rule_backend(short) == "eager"
    assert delta_rule_backend(long.to("meta")) == "chunked"
    assert delta_rule_backend(long, backend="chunked") == "chunked"

    class Elsewhere:
        shape, device = torch.Size([2, 9, 3, 1]), torch.device("cuda")

    monkeypatch.setattr(backends, "_PLAIN", (Elsewhere,))
    monkeypatch.setattr(backends, "is_installed", lambda package: package == "fla")
    assert delta_rule_backend(Elsewhere()) == "fla"
    assert delta_rule_backend(Elsewhere(), packed=True) == "chunked"


def test_bad_arguments_are_refused() -> None:
    good = [tensor.detach() for tensor in make(2, 5, 3, 2, 4, 2)]
    for message, place, wrong in (
        ("T >= 1", 1, good[1][:, :0]),
        (r"queries as \(2, 5, 3, 2\)", 0, good[0][..., :1]),
        (r"decays as \(2, 5, 3, 2\)", 3, good[3].repeat(1, 1, 1, 2)),
        (r"initial state as \(2, 3, 2, 4\)", 5, good[5].mT),
    ):
        with pytest.raises(ValueError, match=message):
            delta_rule(*good[:place], wrong, *good[place + 1 :])
