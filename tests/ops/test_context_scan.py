"""The scan against a loop written straight from the definition, in fp64, at odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contextlm.ops.context_scan import context_scan


def naive_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def naive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(variance + eps) * scale + shift


def naive_scan(projected, weights, scales, shifts, initial, eps):
    """Row by row, token by token, layer by layer."""
    layers, batch = len(weights), initial.shape[0]
    tokens = projected[0].shape[1]
    out = torch.zeros(layers, batch, tokens, initial.shape[1], dtype=initial.dtype)
    for b in range(batch):
        c = initial[b]
        for t in range(tokens):
            for layer in range(layers):
                update = naive_gelu(weights[layer] @ c + projected[layer][b, t])
                c = naive_norm(c + update, scales[layer], shifts[layer], eps)
                out[layer, b, t] = c
    return out


def make(layers: int, batch: int, tokens: int, width: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    projected = [rand(batch, tokens, width) for _ in range(layers)]
    weights = [rand(width, width) for _ in range(layers)]
    scales = [rand(width) for _ in range(layers)]
    shifts = [rand(width) for _ in range(layers)]
    return projected, weights, scales, shifts, rand(batch, width)


@pytest.mark.parametrize(
    ("layers", "batch", "tokens", "width"), [(1, 1, 1, 3), (1, 3, 17, 5), (3, 2, 7, 4)]
)
def test_values_and_gradients_equal_the_naive_loop(layers, batch, tokens, width):
    inputs = make(layers, batch, tokens, width)
    leaves = [t for part in inputs for t in (part if isinstance(part, list) else [part])]
    fast = context_scan(*inputs, eps=1e-5)
    slow = naive_scan(*inputs, 1e-5)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(
        fast.shape, dtype=fast.dtype, generator=torch.Generator().manual_seed(1)
    )
    expected = torch.autograd.grad((slow * cotangent).sum(), leaves)
    actual = torch.autograd.grad((fast * cotangent).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_padding_leaves_the_state_as_it_is():
    projected, weights, scales, shifts, initial = make(2, 2, 9, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    padded = context_scan(projected, weights, scales, shifts, initial, mask_BT=mask)
    short = [p[:1, 4:] for p in projected]
    alone = context_scan(short, weights, scales, shifts, initial[:1])
    torch.testing.assert_close(padded[:, :1, 4:], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded[-1, 0, 3], initial[0], rtol=0, atol=0)
    whole = context_scan(projected, weights, scales, shifts, initial)
    torch.testing.assert_close(padded[:, 1], whole[:, 1], rtol=0, atol=0)


def test_pieces_of_any_size_give_the_same_contexts():
    projected, weights, scales, shifts, initial = make(2, 2, 13, 4)
    whole = context_scan(projected, weights, scales, shifts, initial)
    state, pieces, start = initial, [], 0
    for size in (1, 5, 7):
        part = [p[:, start : start + size] for p in projected]
        pieces.append(context_scan(part, weights, scales, shifts, state))
        state, start = pieces[-1][-1][:, -1], start + size
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=0)


def test_bad_arguments_are_refused():
    projected, weights, scales, shifts, initial = make(1, 1, 2, 3)
    with pytest.raises(ValueError, match="backend 'fast'"):
        context_scan(projected, weights, scales, shifts, initial, backend="fast")
    with pytest.raises(ValueError, match="at least one layer"):
        context_scan([], [], [], [], initial)
    with pytest.raises(ValueError, match="one token"):
        context_scan([projected[0][:, :0]], weights, scales, shifts, initial)
