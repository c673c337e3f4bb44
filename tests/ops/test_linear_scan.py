"""Every backend against a loop written straight from the definition, in fp64, at odd sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from contextlm.ops import backends
from contextlm.ops.linear_scan import linear_scan, linear_scan_backend

SIZES = [(1, 1, 1), (2, 7, 3), (3, 17, 5), (2, 64, 1), (5, 33, 19)]


@pytest.fixture(params=["eager", "numba", "parallel"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def naive_scan(gates: Tensor, inputs: Tensor, initial: Tensor | None, mask=None) -> Tensor:
    """Number by number."""
    batch, tokens, channels = inputs.shape
    rows = []
    for b in range(batch):
        for c in range(channels):
            h = torch.zeros((), dtype=inputs.dtype) if initial is None else initial[b, c]
            for t in range(tokens):
                if mask is None or mask[b, t]:
                    h = gates[b, t, c] * h + inputs[b, t, c]
                rows.append(h)
    return torch.stack(rows).view(batch, channels, tokens).transpose(1, 2)


def make(batch: int, tokens: int, channels: int, dtype=torch.float64, most=1.0):
    g = torch.Generator().manual_seed(batch + tokens + channels)
    gates = most * torch.rand(batch, tokens, channels, generator=g, dtype=torch.float64)
    inputs = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    initial = torch.randn(batch, channels, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (gates, inputs, initial)]


def cotangent(like: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(99)
    return torch.randn(like.shape, generator=g, dtype=torch.float64).to(like.dtype)


def agree(tensors, backend: str, mask=None, tolerance: float = 1e-11) -> None:
    """Values and all gradients of `backend` are those of the naive loop."""
    fast = linear_scan(*tensors, mask_BT=mask, backend=backend)
    slow = naive_scan(*tensors, mask)
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    actual = torch.autograd.grad(fast, tensors, cotangent(fast))
    expected = torch.autograd.grad(slow, tensors, cotangent(slow))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_equal_the_naive_loop(backend: str, size) -> None:
    agree(make(*size), backend)
    agree(make(*size, most=1.5), backend, tolerance=1e-9)


def test_gradients_equal_finite_differences(backend: str) -> None:
    def scan(gates: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
        return linear_scan(gates, inputs, initial, backend=backend)

    assert torch.autograd.gradcheck(scan, make(2, 7, 3))
    if backend != "numba":
        assert torch.autograd.gradgradcheck(scan, make(2, 5, 2))


def test_padding_passes_the_state_and_no_gradient(backend: str) -> None:
    tensors = make(3, 11, 4)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, :5], mask[1] = False, False
    agree(tensors, backend, mask)
    states = linear_scan(*tensors, mask_BT=mask, backend=backend)
    torch.testing.assert_close(states[0, 4], tensors[2][0], rtol=0, atol=0)
    gates, inputs, initial = tensors
    nan = torch.where(mask.unsqueeze(-1), inputs, torch.nan).detach().requires_grad_()
    again = linear_scan(gates, nan, initial, mask_BT=mask, backend=backend)
    torch.testing.assert_close(again, states, rtol=0, atol=0)
    gradients = torch.autograd.grad(again.square().sum(), (gates, nan))
    assert all((gradient[~mask] == 0).all() for gradient in gradients)


def test_without_an_initial_state_it_starts_from_zero(backend: str) -> None:
    gates, inputs, _ = make(2, 9, 3)
    fast = linear_scan(gates, inputs, backend=backend)
    torch.testing.assert_close(fast, naive_scan(gates, inputs, None), rtol=1e-12, atol=1e-12)


def test_gates_of_zero_one_and_above(backend: str) -> None:
    gates, inputs, initial = (t.detach().clone() for t in make(2, 21, 6))
    gates[..., 0], gates[..., 1], gates[..., 2] = 0, 1, 2.5
    gates[:, ::3, 3], gates[:, 4::5, 4] = 0, 1e-300
    gates[:, 3, 5], gates[:, 4, 5] = 1e200, 1e-200
    agree([t.requires_grad_() for t in (gates, inputs, initial)], backend)


def test_products_of_gates_may_leave_the_range_of_numbers(backend: str) -> None:
    """Gates of 4 over 300 steps make 4^300, but a state of zero stays zero; so does 0.5^300."""
    inputs = torch.zeros(1, 300, 2)
    inputs[:, -2:] = 1
    gates = torch.tensor([4.0, 0.5]).expand(1, 300, 2).contiguous().requires_grad_()
    states = linear_scan(gates, inputs, torch.tensor([[0.0, 3.0]]), backend=backend)
    torch.testing.assert_close(states[0, -2:], torch.tensor([[1.0, 1.0], [5.0, 1.5]]))
    (gradient,) = torch.autograd.grad(states[:, -1].sum(), gates)
    torch.testing.assert_close(gradient[0, -1], torch.tensor([1.0, 1.0]))


def test_a_state_survives_thousands_of_steps(backend: str) -> None:
    """In float32 at T = 4096, with gates near 1 and near 0, against float64."""
    gates, inputs, initial = (t.detach() for t in make(1, 4096, 6))
    gates[..., :2], gates[..., 2:4] = 1 - 1e-3 * gates[..., :2], 1e-6 * gates[..., 2:4]
    exact = linear_scan(gates, inputs, initial, backend="eager")
    rough = linear_scan(gates.float(), inputs.float(), initial.float(), backend=backend)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", range(3))
def test_one_tensor_alone_may_require_a_gradient(backend: str, which: int) -> None:
    tensors = [t.detach().requires_grad_(i == which) for i, t in enumerate(make(2, 9, 3))]
    fast, slow = linear_scan(*tensors, backend=backend), naive_scan(*tensors)
    actual = torch.autograd.grad(fast.square().sum(), tensors[which])[0]
    expected = torch.autograd.grad(slow.square().sum(), tensors[which])[0]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_inputs_and_gradients_need_not_be_contiguous(backend: str) -> None:
    gates, inputs, initial = (t.detach() for t in make(2, 9, 3))
    gates = gates.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = torch.stack([inputs, inputs], dim=-1)[..., 1]
    initial = initial.t().contiguous().t()
    tensors = [t.requires_grad_() for t in (gates, inputs, initial)]
    assert not any(t.is_contiguous() for t in tensors)
    agree(tensors, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_kept_in_float32_at_least(backend: str, dtype: torch.dtype) -> None:
    """The result is the exact one, rounded once; in bfloat16 the sum would stop at 256."""
    ones = torch.ones(1, 300, 3, dtype=dtype, requires_grad=True)
    states = linear_scan(ones, ones, backend=backend)
    assert states.dtype == dtype
    expected = torch.arange(1, 301).to(dtype)
    torch.testing.assert_close(states[0, :, 1], expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(states.float().sum(), ones)
    assert gradient.dtype == dtype


def test_mixed_types_compute_in_the_widest(backend: str) -> None:
    gates, inputs, _ = make(2, 9, 3)
    states = linear_scan(gates, inputs.bfloat16(), backend=backend)
    expected = naive_scan(gates, inputs.bfloat16().double(), None).bfloat16()
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


def test_rows_shared_out_over_threads_give_the_same() -> None:
    """Also from two threads at once, forward and backward."""
    tensors = make(5, 700, 131)
    expected = linear_scan(*tensors, backend="parallel")
    gradients = torch.autograd.grad(expected, tensors, cotangent(expected))

    def check(_: int) -> None:
        states = linear_scan(*tensors, backend="numba")
        torch.testing.assert_close(states, expected, rtol=1e-11, atol=1e-11)
        actual = torch.autograd.grad(states, tensors, cotangent(states))
        for a, e in zip(actual, gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(check, range(4)))
    finally:
        torch.set_num_threads(threads)


def test_traced_whole_by_torch_compile() -> None:
    tensors = make(2, 13, 3)
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager", dynamic=False)
    states = compiled(*tensors)
    torch.testing.assert_close(states, naive_scan(*tensors), rtol=1e-12, atol=1e-12)
    actual = torch.autograd.grad(states, tensors, cotangent(states))
    slow = naive_scan(*tensors)
    for a, e in zip(actual, torch.autograd.grad(slow, tensors, cotangent(slow)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_one_graph_serves_all_lengths() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_scan, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (13, 7, 30, 64):
        tensors = make(2, tokens, 3)
        states, slow = compiled(*tensors), naive_scan(*tensors)
        torch.testing.assert_close(states, slow, rtol=1e-12, atol=1e-12)
        actual = torch.autograd.grad(states, tensors, cotangent(states))
        expected = torch.autograd.grad(slow, tensors, cotangent(slow))
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert counter.frame_count == 1


def test_the_choice_is_visible_and_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = torch.ones(2, 9, 3), torch.ones(2, 1, 3)
    meta = long.to("meta")
    assert linear_scan_backend(long, long) == "numba"
    assert linear_scan_backend(short, short) == "eager"
    assert linear_scan_backend(meta, meta) == "parallel"
    monkeypatch.setenv("CONTEXTLM_BACKEND", "linear_scan=parallel")
    assert linear_scan_backend(long, long) == "parallel"
    assert linear_scan_backend(long, long, backend="eager") == "eager"


def test_the_choice_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for tensors, since there may be no such device."""

    class Elsewhere:
        shape, dtype, device = torch.Size([2, 9, 3]), torch.float32, torch.device("cuda")

    monkeypatch.setattr(backends, "_PLAIN", (Elsewhere,))
    assert linear_scan_backend(Elsewhere(), Elsewhere()) == "parallel"


def test_function_transforms_see_torchs_own_operations() -> None:
    gates, inputs, _ = make(2, 9, 3)

    def total(inputs: Tensor) -> Tensor:
        return linear_scan(gates.detach(), inputs).sum()

    expected = torch.autograd.grad(total(inputs), inputs)[0]
    torch.testing.assert_close(torch.func.grad(total)(inputs.detach()), expected)


def test_bad_arguments_are_refused() -> None:
    ones = torch.ones(2, 5, 3)
    meta = ones.to("meta")
    for message, gates, inputs, options in (
        ("unknown linear_scan backend 'fast'", ones, ones, {"backend": "fast"}),
        ("'numba' is for CPU only", meta, meta, {"backend": "numba"}),
        ("T >= 1", ones[:, :0], ones[:, :0], {}),
        (r"gates as \(2, 5, 3\), got \(2, 4, 3\)", ones[:, :4], ones, {}),
        (r"initial state as \(2, 3\)", ones, ones, {"initial_BC": ones[0]}),
        (r"mask as \(2, 5\)", ones, ones, {"mask_BT": torch.ones(5, 2, dtype=torch.bool)}),
    ):
        with pytest.raises(ValueError, match=message):
            linear_scan(gates, inputs, **options)
