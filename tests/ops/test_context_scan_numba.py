"""The compiled scan against the eager one, which is tested against the definition."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from contextlm.ops.backends import VARIABLE, use_backend
from contextlm.ops.compiled import compiled
from contextlm.ops.context_scan import context_scan, context_scan_backend
from contextlm.ops.context_scan.numba import erf


def make(layers: int, batch: int, tokens: int, width: int, dtype=torch.float64, spread=0.1):
    """Inputs of `context_scan`; the weights are slices, as those of a context layer are."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        [rand(batch, tokens, width) for _ in range(layers)],
        [spread * rand(width, width + 3)[:, :width] for _ in range(layers)],
        [1 + 0.1 * rand(width) for _ in range(layers)],
        [0.1 * rand(width) for _ in range(layers)],
        rand(batch, width),
    )


@pytest.mark.parametrize(
    ("layers", "batch", "tokens", "width"),
    [(1, 1, 1, 1), (1, 1, 9, 4), (1, 3, 17, 37), (2, 2, 31, 21), (3, 1, 8, 66)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_eager_loop(layers, batch, tokens, width, masked):
    inputs = make(layers, batch, tokens, width, spread=1.0)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, tokens, generator=generator) > 0.4 if masked else None
    expected = context_scan(*inputs, mask_BT=mask, backend="eager")
    actual = context_scan(*inputs, mask_BT=mask, backend="numba")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_float32_is_as_good_as_the_eager_loop_in_float32():
    # Weights so small that the recurrence forgets; otherwise rounding errors would grow.
    inputs = make(1, 1, 2000, 48, spread=0.02)
    truth = context_scan(*inputs, backend="eager")
    single = [
        [t.float() for t in part] if isinstance(part, list) else part.float() for part in inputs
    ]
    eager, compiled = (
        (context_scan(*single, backend=name).double() - truth).abs().max().item()
        for name in ("eager", "numba")
    )
    assert eager < 1e-5
    assert compiled < 3 * eager


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
    inputs = make(1, 1, 9, 5, dtype)
    inputs[0][0][0, 4, 2] = value
    contexts = context_scan(*inputs, backend="numba")[0, 0]
    assert torch.isfinite(contexts[:4]).all()
    assert torch.isnan(contexts[4:]).any(dim=1).all()


def test_what_auto_takes(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    long = make(1, 1, 64, 8, torch.float32)
    flat = [*long[0], *long[1], *long[2], *long[3], long[4]]

    def auto(tensors=flat, rows=1, tokens=64):
        return context_scan_backend(tensors, rows, tokens)

    assert auto() == "numba"
    assert auto(rows=32) == "eager"
    assert auto(tokens=1) == "eager"
    assert auto([t.bfloat16() for t in flat]) == "eager"
    assert auto([flat[0].double(), *flat[1:]]) == "eager"
    assert auto([t.to("meta") for t in flat]) == "eager"
    learning = [flat[0].clone().requires_grad_(), *flat[1:]]
    assert auto(learning) == "eager"
    with torch.no_grad():
        assert auto(learning) == "numba"
    with use_backend("context_scan", "eager"):
        assert auto() == "eager"
    monkeypatch.setattr("contextlm.ops.context_scan.is_installed", lambda package: False)
    assert auto() == "eager"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clone().requires_grad_(), "no gradients"),
        (lambda t: t.bfloat16(), "float32 or float64"),
        (lambda t: t.to("meta"), "CPU only"),
    ],
)
def test_asked_for_where_it_does_not_fit_it_says_why(change, message):
    projected, *rest = make(1, 1, 9, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        context_scan([change(projected[0])], *rest, backend="numba")


def test_without_a_folder_for_the_code_it_is_compiled_all_the_same(monkeypatch):
    import contextlm.ops.compiled as module

    real = module.njit

    def njit(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(module, "njit", njit)

    @compiled()
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
