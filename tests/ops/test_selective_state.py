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
from contextlm.ops.selective_state import numba as compiled_form
from contextlm.ops.selective_state import selective_state, selective_state_backend

# B, T, H, N, P
SIZES = [(2, 1, 1, 1, 1), (1, 63, 3, 4, 5), (2, 100, 2, 3, 7), (1, 1000, 1, 2, 3)]
NAMES = ("outputs", "final", "inputs", "steps", "rates", "write", "read", "skip", "initial")


@pytest.fixture(params=["eager", "numba", "chunked"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def naive(u, dt, r, write, read, skip, initial, mask=None, begins=None) -> tuple[Tensor, Tensor]:
    def step(state: Tensor, b: int, t: int, h: int) -> Tensor:
        added = dt[b, t, h] * torch.outer(write[b, t], u[b, t, h])
        return torch.exp(-dt[b, t, h] * r[h]) * state + added

    def output(state: Tensor, b: int, t: int, h: int) -> Tensor:
        return state.T @ read[b, t] + skip[h] * u[b, t, h]

    return head_by_head(step, output, initial, u.shape[1], mask, begins)


def make(batch: int, tokens: int, heads: int, numbers: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = [
        normal(batch, tokens, heads, width),
        torch.nn.functional.softplus(normal(batch, tokens, heads)),
        3 * torch.rand(heads, generator=g, dtype=torch.float64),
        normal(batch, tokens, numbers),
        normal(batch, tokens, numbers),
        normal(heads),
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
    agree(NAMES, selective_state(*tensors, backend=backend), tensors, slow)


def test_padding_passes_the_state_and_texts_begin_anew(backend: str) -> None:
    tensors = make(3, 150, 2, 3, 4)
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(3, 150, generator=g) < 0.6
    mask[0, :5], mask[1, 70:] = False, False
    begins = torch.rand(3, 150, generator=g) < 0.03
    begins[0, 0], begins[1, 64], begins[2, 149] = True, True, True  # also where chunks begin
    slow = differentiated(naive(*tensors, mask, begins), tensors)
    fast = selective_state(*tensors, mask_BT=mask, begins_BT=begins, backend=backend)
    agree(NAMES, fast, tensors, slow)


def test_pieces_of_any_size_equal_the_whole(backend: str) -> None:
    tensors = [tensor.detach() for tensor in make(2, 130, 2, 3, 4)]
    pieces_equal_the_whole(selective_state, tensors, backend)


def test_no_decay_and_a_decay_that_leaves_nothing(backend: str) -> None:
    tensors = [tensor.detach() for tensor in make(1, 70, 2, 2, 3)]
    tensors[2] = torch.tensor([0.0, 1e4], dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    slow = differentiated(naive(*tensors), tensors)
    agree(NAMES, selective_state(*tensors, backend=backend), tensors, slow)


def test_a_state_survives_a_hundred_thousand_tokens_in_float32(backend: str) -> None:
    """With decays from those that last the whole text to those of one token."""
    g = torch.Generator().manual_seed(0)
    tokens, heads = 100_000, 3
    u, write, read = (torch.randn(1, tokens, n, generator=g) for n in (heads * 2, 2, 2))
    steps = torch.full((1, tokens, heads), 0.05)
    rates = torch.tensor([1e-2, 1.0, 300.0])
    given = [u.view(1, tokens, heads, 2), steps, rates, write, read, torch.ones(heads)]
    float32_lasts(selective_state, given, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_is_computed_in_float32_at_least(backend: str, dtype: torch.dtype) -> None:
    tensors = [tensor.detach().to(dtype) for tensor in make(1, 70, 2, 3, 4)]
    computes_in_float32(selective_state, naive, tensors, backend)


def test_without_gradients_no_state_is_kept_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, sizes = [tensor.detach() for tensor in make(1, 100, 2, 3, 7)], []
    tensors[5].requires_grad_()  # as the parameter that it is
    run = compiled_form.over_rows

    def over_rows(loop, along, *shared) -> None:
        sizes.append(along[-1].numel())
        run(loop, along, *shared)

    monkeypatch.setattr(compiled_form, "over_rows", over_rows)
    with torch.no_grad():
        selective_state(*tensors, backend="numba")
    assert sizes == [0]


def test_gradients_of_gradients() -> None:
    tensors = make(1, 5, 1, 2, 2)
    for name in ("eager", "chunked"):
        assert torch.autograd.gradgradcheck(
            lambda *given, name=name: selective_state(*given, backend=name)[0], tensors
        )


def test_traced_whole_by_torch_compile() -> None:
    tensors = make(2, 70, 2, 3, 4)
    compiled = torch.compile(selective_state, fullgraph=True, backend="eager", dynamic=False)
    outputs, final = compiled(*tensors)
    expected = naive(*tensors)
    torch.testing.assert_close(outputs, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, expected[1], rtol=1e-10, atol=1e-10)


def test_published_kernels_are_called_with_what_they_expect(monkeypatch) -> None:
    """Stand-ins with their signatures, written from the equations in their documentation."""
    tensors = [tensor.detach().float() for tensor in make(2, 70, 2, 3, 4)]
    monkeypatch.setattr(backends, "obstacle_to", lambda *_: "")

    def scan(x, dt, A, B, C, chunk_size, D, initial_states, seq_idx, return_final_states):
        begins = None if seq_idx is None else seq_idx.diff(dim=1, prepend=seq_idx[:, :1] * 0) > 0
        given = (x, dt, -A, B[:, :, 0], C[:, :, 0], D, initial_states.mT)
        assert return_final_states
        assert all(tensor.is_contiguous() for tensor in (x, dt, B, C))
        outputs, final = naive(*given, begins=begins)
        return outputs, final.mT

    def gla(q, k, v, g, scale, initial_state, output_final_state):
        assert output_final_state
        assert scale == 1.0
        state, rows = initial_state, []
        for t in range(q.shape[1]):
            state = g[:, t].exp()[..., None, None] * state
            state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            rows.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
        return torch.stack(rows, dim=1), state

    for path, name, function in (
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", scan),
        ("fla.ops.simple_gla", "chunk_simple_gla", gla),
    ):
        module = ModuleType(path)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, path, module)
        for parent in [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    expected = naive(*tensors)
    for name in ("mamba_ssm", "fla"):
        for ours, theirs in zip(selective_state(*tensors, backend=name), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    begins = torch.zeros(2, 70, dtype=torch.bool)
    begins[0, 0], begins[1, 33] = True, True
    ours = selective_state(*tensors, begins_BT=begins, backend="mamba_ssm")[0]
    torch.testing.assert_close(ours, naive(*tensors, begins=begins)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'fla' does not fit the call"):
        selective_state(*tensors, begins_BT=begins, backend="fla")


def test_the_choice_is_visible_and_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = torch.ones(2, 9, 3, 1), torch.ones(2, 1, 3, 1)
    meta = long.to("meta")
    assert selective_state_backend(long) == "numba"
    assert selective_state_backend(short) == "eager"
    assert selective_state_backend(meta) == "chunked"
    monkeypatch.setenv("CONTEXTLM_BACKEND", "selective_state=chunked")
    assert selective_state_backend(long) == "chunked"
    assert selective_state_backend(long, backend="eager") == "eager"
    monkeypatch.delenv("CONTEXTLM_BACKEND")
    for name, tensor, message in (
        ("numba", meta, "is for CPU only"),
        ("fla", long, "is for CUDA only"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_state_backend(tensor, backend=name)


def test_the_choice_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for tensors, since there may be no such device."""

    class Elsewhere:
        shape, device = torch.Size([2, 9, 3, 1]), torch.device("cuda")

    installed: set[str] = set()
    monkeypatch.setattr(backends, "is_installed", lambda package: package in installed)
    monkeypatch.setattr(backends, "_PLAIN", (Elsewhere,))
    assert selective_state_backend(Elsewhere()) == "chunked"
    installed.add("fla")
    assert selective_state_backend(Elsewhere()) == "fla"
    assert selective_state_backend(Elsewhere(), packed=True) == "chunked"
    installed.add("mamba_ssm")
    assert selective_state_backend(Elsewhere(), packed=True) == "mamba_ssm"


def test_bad_arguments_are_refused() -> None:
    good = [tensor.detach() for tensor in make(2, 5, 3, 2, 4)]
    for message, place, wrong in (
        ("T >= 1", 0, good[0][:, :0]),
        (r"steps as \(2, 5, 3\), got \(2, 4, 3\)", 1, good[1][:, :4]),
        (r"rates as \(3,\)", 2, good[2][:1]),
        (r"read as \(2, 5, 2\)", 4, good[4][..., :1]),
        (r"initial state as \(2, 3, 2, 4\)", 6, good[6].mT),
    ):
        with pytest.raises(ValueError, match=message):
            selective_state(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(ValueError, match="unknown selective_state backend 'fast'"):
        selective_state(*good, backend="fast")
    with pytest.raises(ValueError, match=r"mask as \(2, 5\)"):
        selective_state(*good, mask_BT=torch.ones(5, 2, dtype=torch.bool))
