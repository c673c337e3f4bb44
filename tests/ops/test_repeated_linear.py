"""One linear layer for token after token against torch's own at each, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contextlm.ops.repeated_linear import RepeatedLinear


def recurrence(apply, start_NC, calls):
    """Outputs that decide the next inputs, all of them."""
    x_NC, outputs = start_NC, []
    for _ in range(calls):
        x_NC = torch.tanh(apply(x_NC)) + 0.5 * x_NC
        outputs.append(x_NC)
    return torch.stack(outputs)


def weights(width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((width, width), (width,), (3, width))
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("calls", [1, 2, 7, 33])
def test_gradients_are_those_of_the_layer_at_each_call(calls, with_bias):
    weight, bias, start = weights()
    given = [weight, bias, start] if with_bias else [weight, start]
    for_each = recurrence(lambda x: F.linear(x, weight, bias if with_bias else None), start, calls)
    layer = RepeatedLinear(weight, bias if with_bias else None, calls, backend="deferred")
    at_once = recurrence(layer, start, calls)
    torch.testing.assert_close(at_once, for_each, rtol=0, atol=1e-14)
    by = torch.randn(for_each.shape, dtype=for_each.dtype)
    expected = torch.autograd.grad(for_each, given, by)
    torch.testing.assert_close(
        torch.autograd.grad(at_once, given, by), expected, rtol=0, atol=1e-12
    )


def test_calls_that_are_not_made_and_outputs_that_are_not_read():
    weight, bias, start = weights()
    layer = RepeatedLinear(weight, bias, 9, backend="deferred")
    at_once = recurrence(layer, start, 4)[1]
    for_each = recurrence(lambda x: F.linear(x, weight, bias), start, 4)[1]
    given = [weight, bias, start]
    found = torch.autograd.grad(at_once.sum(), given)
    torch.testing.assert_close(
        found, torch.autograd.grad(for_each.sum(), given), rtol=0, atol=1e-13
    )


def test_a_second_backward_pass_gives_the_same_again():
    weight, bias, start = weights()
    loss = recurrence(RepeatedLinear(weight, bias, 5, backend="deferred"), start, 5).sum()
    first = torch.autograd.grad(loss, [weight, bias], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [weight, bias]), first, rtol=0, atol=0)


def test_second_gradients_are_refused():
    weight, bias, start = weights()
    start.requires_grad_()
    loss = recurrence(RepeatedLinear(weight, bias, 5, backend="deferred"), start, 5).sum()
    with pytest.raises(RuntimeError, match="repeated_linear=eager"):
        torch.autograd.grad(loss, start, create_graph=True)


def test_autocast_leaves_float64_alone():
    weight, bias, start = weights()
    layer = RepeatedLinear(weight, bias, 2, backend="deferred")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(start).dtype == F.linear(start, weight, bias).dtype == torch.float64
    with pytest.raises(RuntimeError):  # as torch's layer
        RepeatedLinear(weight, bias, 2, backend="deferred")(start.float())


def test_under_autocast_the_sum_is_rounded_once():
    weight, bias, start = weights(width=16, dtype=torch.float32)
    weight.data *= 0.1  # so that roundings do not grow from token to token
    given = [weight, bias]

    def gradient(layer):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = recurrence(layer, start, 64)
        assert outputs.dtype == torch.float32
        return torch.autograd.grad(outputs.sum(), given)

    exact = torch.autograd.grad(
        recurrence(lambda x: F.linear(x, weight, bias), start, 64).sum(), given
    )
    at_once = gradient(RepeatedLinear(weight, bias, 64, backend="deferred"))
    for_each = gradient(lambda x: F.linear(x, weight, bias))
    assert all(g.dtype == torch.float32 for g in at_once)

    def error(found):
        return sum(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))

    assert error(at_once) < 0.05
    assert error(at_once) <= error(for_each)


@pytest.mark.parametrize("why", ["frozen", "no gradient", "one call", "eager"])
def test_it_is_torchs_layer_where_nothing_is_gained(why):
    weight, bias, _ = weights()
    weight.requires_grad_(why != "frozen")
    with torch.set_grad_enabled(why != "no gradient"):
        backend = "eager" if why == "eager" else "auto"
        layer = RepeatedLinear(weight, bias, 1 if why == "one call" else 5, backend=backend)
    assert not layer.deferred


def test_an_unknown_backend_is_refused():
    weight, bias, _ = weights()
    with pytest.raises(ValueError, match="repeated_linear"):
        RepeatedLinear(weight, bias, 5, backend="chunked")
