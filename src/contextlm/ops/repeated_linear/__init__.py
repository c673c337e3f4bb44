"""One linear layer for token after token, ``y_t = W x_t + b``, where x_t may depend on y_{t-1}.

In a recurrence the outputs must be computed one by one, and so must the gradients of the inputs.
The weights' gradient need not be, ``dW = sum over t of dy_t x_t^T``: autograd computes T small
products and adds T matrices as large as W, here it is one product of ``T N`` rows after all others.
The sum over the tokens stays in the product's float32 where autograd, under autocast, rounds it T
times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.ops.backends import AUTO, is_observed, requested_backend

_BACKENDS = ("eager", "deferred")


class RepeatedLinear:
    """The layer for at most T calls, with one product for the gradient of its weights.

    Inputs must not be changed in place, and stay in memory as long as the graph does.

    Args:
        weight: W, ``[O, I]``.
        bias: b, ``[O]``, or None.
        calls: T.
        backend: ``eager``, torch's layer at each call; ``deferred``, the one product, which has no
            second gradients; ``auto`` (see `ops.backends`) takes it where the weights learn.

    Raises:
        ValueError: the backend is unknown.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, calls: int, *, backend: str = AUTO):
        self.weight, self.bias, self.calls = weight, bias, calls
        learns = torch.is_grad_enabled() and weight.requires_grad
        name = "eager" if torch.compiler.is_compiling() else _chosen(backend, weight)
        self.deferred = learns and calls > 1 and name != "eager"
        self.inputs: list[Tensor] = []
        self.added: tuple[Tensor, ...] = ()

    def __call__(self, x_NI: Tensor) -> Tensor:
        """``[N, O]``, in autocast's type if there is one; N must be the same at each call.

        The backward pass raises `RuntimeError` where a graph of it is asked for.
        """
        if not self.deferred:
            return F.linear(x_NI, self.weight, self.bias)
        dtype = _autocast_dtype(self.weight)
        if dtype is not None:
            x_NI = x_NI.to(dtype)
        if not self.inputs:
            self._begin(len(x_NI), dtype or self.weight.dtype)
        # Detached, or the gradient's node would hold what holds it.
        self.inputs.append(x_NI.detach())
        out_NO = torch.addmm(self.added[len(self.inputs) - 1], x_NI, self.fixed_IO)
        out_NO.register_hook(_refuse_second_gradients)
        return out_NO

    def _begin(self, rows: int, dtype: torch.dtype) -> None:
        """The weights without a gradient, and what each call adds."""
        self.fixed_IO = self.weight.detach().to(dtype).T
        bias = self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias
        added_TNO = bias.to(dtype).expand(self.calls, rows, -1)
        self.added = _WithWeight.apply(added_TNO, self.weight, self.inputs).unbind(0)


def _chosen(backend: str, weight: Tensor) -> str:
    name = requested_backend("repeated_linear", backend, _BACKENDS)
    return "eager" if name == AUTO and is_observed([weight]) else name


def _autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The type that autocast wants; it leaves float64 alone."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _refuse_second_gradients(_: Tensor) -> None:
    """As products with weights that have no gradient would give wrong ones."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "repeated_linear has no second gradients; CONTEXTLM_BACKEND=repeated_linear=eager "
            "takes torch's layers, which have"
        )


class _WithWeight(torch.autograd.Function):
    """What is added at each call, given as it is; its gradient is that of the outputs."""

    @staticmethod
    def forward(ctx: Any, added_TNO: Tensor, weight_OI: Tensor, inputs: list[Tensor]) -> Tensor:
        """`inputs` will hold what each call was given by the time of the backward pass."""
        ctx.inputs, ctx.dtype = inputs, weight_OI.dtype
        return added_TNO.view_as(added_TNO)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TNO: Tensor) -> tuple[Tensor, Tensor, None]:
        """The sums over calls and rows."""
        calls = len(ctx.inputs)
        inputs_MI = torch.cat(ctx.inputs)
        weight_OI = grad_TNO[:calls].flatten(0, 1).T @ inputs_MI
        return grad_TNO, weight_OI.to(ctx.dtype), None
