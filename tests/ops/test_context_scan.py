"""The scan against a loop straight from the definition, and the compiled scan against the naive."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contextlm.ops import backends
from contextlm.ops.backends import VARIABLE, compiled
from contextlm.ops.context_scan import context_scan, context_scan_backend
from contextlm.ops.context_scan.numba import erf


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def from_the_definition(projected, weights, scales, shifts, initial, mask=None, eps=1e-5):
    """Row by row, token by token, layer by layer."""
    (batch, tokens, width), layers = projected[0].shape, len(weights)
    out = torch.zeros(layers, batch, tokens, width, dtype=initial.dtype)
    for b in range(batch):
        state = initial[b]
        for t in range(tokens):
            context = state
            for layer in range(layers):
                if mask is None or mask[b, t]:
                    u = weights[layer] @ context + projected[layer][b, t]
                    x = context + 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
                    variance = ((x - x.mean()) ** 2).mean()
                    context = (x - x.mean()) / torch.sqrt(variance + eps)
                    context = context * scales[layer] + shifts[layer]
                out[layer, b, t] = context
            state = context
    return out


def make(layers=1, batch=1, tokens=9, width=4, dtype=torch.float64, spread=0.5):
    """Inputs of `context_scan`; the weights are slices, as those of a context layer are."""
    generator = torch.Generator().manual_seed(layers + batch + tokens + width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        [rand(batch, tokens, width) for _ in range(layers)],
        [spread * rand(width, width + 3)[:, 1:-2] for _ in range(layers)],
        [1 + 0.1 * rand(width) for _ in range(layers)],
        [0.1 * rand(width) for _ in range(layers)],
        rand(batch, width),
    )


def flat(inputs) -> list[Tensor]:
    return [*(tensor for part in inputs[:-1] for tensor in part), inputs[-1]]


def some_padding(batch: int, tokens: int) -> Tensor:
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, : tokens // 2] = False
    return mask


SIZES = [(1, 1, 1, 1), (1, 3, 17, 5), (3, 2, 7, 4), (2, 2, 31, 21), (1, 7, 8, 66)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_definition(size, masked):
    inputs = make(*size)
    before = [tensor.clone() for tensor in flat(inputs)]
    mask = some_padding(*size[1:3]) if masked else None
    compiled_loop = context_scan(*inputs, mask_BT=mask, backend="numba")
    assert all(map(torch.equal, flat(inputs), before))
    leaves = [tensor.requires_grad_() for tensor in flat(inputs)]
    ours = context_scan(*inputs, mask_BT=mask)
    expected = from_the_definition(*inputs, mask)
    torch.testing.assert_close(compiled_loop, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn_like(expected)
    actual = torch.autograd.grad(ours, leaves, cotangent, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, cotangent, materialize_grads=True)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-9)


def test_float32_is_as_good_in_numba_as_in_the_naive_loop():
    # Weights so small that the recurrence forgets; otherwise rounding errors would grow.
    inputs = make(1, 1, 2000, 48, spread=0.02)
    truth = context_scan(*inputs, backend="eager")
    single = [[t.float() for t in part] for part in inputs[:-1]]
    eager, ours = (
        (context_scan(*single, inputs[-1].float(), backend=name).double() - truth).abs().max()
        for name in ("eager", "numba")
    )
    assert eager < 1e-5
    assert ours < 3 * eager


def test_the_error_function_in_float32():
    @compiled()
    def apply(values):
        out = np.empty_like(values)
        for i in range(len(values)):
            out[i] = erf(values[i])
        return out

    values = np.linspace(-6, 6, 40_001).astype(np.float32)
    expected = np.array([math.erf(float(v)) for v in values])
    assert np.max(np.abs(apply(values) - expected)) < 1e-6
    nan, *rest = apply(np.array([np.nan, np.inf, -np.inf, 0.0], dtype=np.float32))
    assert np.isnan(nan)
    assert rest == pytest.approx([1, -1, 0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(dtype, value):
    inputs = make(dtype=dtype)
    inputs[0][0][0, 4, 2] = value
    contexts = context_scan(*inputs, backend="numba")[0, 0]
    assert torch.isfinite(contexts[:4]).all()
    assert torch.isnan(contexts[4:]).any(dim=1).all()


# --- the choice ------------------------------------------------------------------------------


def test_what_auto_takes():
    tensors = flat(make(dtype=torch.float32, tokens=64))

    def auto(tensors=tensors, rows=1, tokens=64):
        return context_scan_backend(tensors, rows, tokens)

    assert auto() == "numba"
    assert auto(rows=32) == "eager"
    assert auto(tokens=1) == "eager"
    assert auto([t.bfloat16() for t in tensors]) == "eager"
    assert auto([tensors[0].double(), *tensors[1:]]) == "eager"
    assert auto([t.to("meta") for t in tensors]) == "eager"
    learning = [tensors[0].clone().requires_grad_(), *tensors[1:]]
    assert auto(learning) == "eager"
    with torch.no_grad():
        assert auto(learning) == "numba"


def test_who_watches_torch_gets_the_naive_loop():
    *weights, initial = make(width=5)
    with FlopCounterMode(display=False) as counter:
        context_scan(*weights, initial)
    assert counter.get_total_flops() >= 2 * 9 * 5 * 5

    def of_initial(initial):
        return context_scan(*weights, initial)

    _, tangent = torch.func.jvp(of_initial, (initial,), (torch.ones_like(initial),))
    assert tangent.abs().sum() > 0
    many = torch.vmap(of_initial)(torch.stack([initial, 2 * initial]))
    torch.testing.assert_close(many[0], of_initial(initial), rtol=1e-12, atol=1e-12)


def test_a_graph_of_the_whole_is_possible():
    inputs = make()
    graph = torch.compile(context_scan, fullgraph=True, backend="eager")
    expected = context_scan(*inputs, backend="eager")
    torch.testing.assert_close(graph(*inputs), expected, rtol=1e-12, atol=1e-12)


def test_bad_arguments_are_refused():
    projected, *rest = make(dtype=torch.float32)
    for change, message in (
        (lambda t: t.clone().requires_grad_(), "'numba' has no gradients"),
        (lambda t: t.bfloat16(), "float32 or float64"),
        (lambda t: t.to("meta"), "'numba' is for CPU only"),
    ):
        with pytest.raises(ValueError, match=message):
            context_scan([change(projected[0])], *rest, backend="numba")
    with pytest.raises(ValueError, match="'triton' is for CUDA only"):
        context_scan(projected, *rest, backend="triton")
    with pytest.raises(ValueError, match="backend 'fast'"):
        context_scan(projected, *rest, backend="fast")
    with pytest.raises(ValueError, match="at least one layer"):
        context_scan([], [], [], [], rest[-1])
    with pytest.raises(ValueError, match="one token"):
        context_scan([projected[0][:, :0]], *rest)


# --- compiled code on disk -------------------------------------------------------------------


def test_without_a_folder_for_the_code_it_is_compiled_all_the_same(monkeypatch):
    import numba

    real = numba.njit

    def njit(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)

    @backends.compiled()
    def double(x):
        return 2 * x

    assert double(3) == 6


def test_code_loaded_from_disk_rounds_like_code_just_compiled(tmp_path):
    """In processes of their own: in one process the names are resolved once."""
    script = (
        "import torch; from contextlm.ops.context_scan import context_scan; "
        "torch.manual_seed(0); rand = torch.randn; C = 16; "
        "out = context_scan([rand(1, 300, C)], [0.3 * rand(C, C)], [rand(C)], [rand(C)], "
        "rand(1, C), backend='numba'); "
        "print(hash(out.numpy().tobytes()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))
    assert outputs[0] == outputs[1]
