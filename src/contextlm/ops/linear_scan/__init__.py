"""The gated linear recurrence of every channel, one public op with several backends::

    h_t = a_t h_{t-1} + b_t

Backends: ``eager``, the loop over tokens in `naive`, works everywhere; ``numba``, one compiled loop
for a CPU; ``parallel``, parallel in time, in plain torch, for all else and under torch.compile and
torch.export. All are differentiable, ``eager`` and ``parallel`` more than once.

The form that is parallel in time has as many rounds as the length has bits, so a graph of it is for
one length. Where the length is left open the graph holds one op instead, `contextlm::linear_scan`,
which chooses its form when it runs; who loads such a graph from a file imports contextlm first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlm.ops.arguments import check_shapes, computing_type
from contextlm.ops.backends import (
    AUTO,
    FEWEST_TOKENS,
    is_observed,
    is_traced,
    obstacle_to,
    traceable_request,
)
from contextlm.ops.linear_scan.parallel import gradients, linear_scan_parallel

BACKENDS = ("eager", "numba", "parallel")


def linear_scan(
    gates_BTC: Tensor,
    inputs_BTC: Tensor,
    initial_BC: Tensor | None = None,
    *,
    mask_BT: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Run the recurrence over T tokens; differentiable in gates, inputs and initial state.

    The state is kept in float32 at least, the result rounded to the inputs' type: who carries a
    state from call to call passes float32 inputs.

    Args:
        gates_BTC: a, usually from 0 to 1.
        inputs_BTC: b.
        initial_BC: the state before the first token; None: zero.
        mask_BT: False where a token is padding: the state passes it unchanged.
        backend: one of `BACKENDS`, or ``auto`` (see `ops.backends`), which takes the fastest that
            fits the tensors.

    Returns:
        The state after every token, ``[B, T, C]``, in the inputs' type.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a backend that is unknown or does not fit.
    """
    shape = inputs_BTC.shape
    if len(shape) != 3 or shape[1] == 0:
        raise ValueError(f"linear_scan needs inputs [B, T, C] with T >= 1, got {tuple(shape)}")
    check_shapes(
        "linear_scan",
        {
            "gates": (gates_BTC, shape),
            "initial state": (initial_BC, (shape[0], shape[2])),
            "mask": (mask_BT, shape[:2]),
        },
    )
    result_type = inputs_BTC.dtype
    state_type = computing_type(gates_BTC, inputs_BTC)
    gates_BTC, inputs_BTC = gates_BTC.to(state_type), inputs_BTC.to(state_type)
    name = linear_scan_backend(gates_BTC, inputs_BTC, backend=backend)
    if initial_BC is None:
        initial_BC = torch.zeros_like(inputs_BTC[:, 0])
    if mask_BT is not None:
        keep_BT1 = mask_BT.unsqueeze(-1)
        gates_BTC = torch.where(keep_BT1, gates_BTC, 1)
        inputs_BTC = torch.where(keep_BT1, inputs_BTC, 0)
    # Imported when chosen: compilers and kernels take a while to load.
    if name == "numba":
        from contextlm.ops.linear_scan.numba import linear_scan_numba as run
    elif name == "parallel":
        run = _linear_scan_traced
    else:
        from contextlm.ops.linear_scan.naive import linear_scan_naive as run
    return run(gates_BTC, inputs_BTC, initial_BC.to(state_type)).to(result_type)


def linear_scan_backend(gates_BTC: Tensor, inputs_BTC: Tensor, *, backend: str = AUTO) -> str:
    """The backend that `linear_scan` takes for these arguments.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    tensors = (gates_BTC, inputs_BTC)
    name = traceable_request("linear_scan", backend, BACKENDS)
    traced = is_traced(tensors)
    if name == AUTO and not traced and gates_BTC.shape[1] < FEWEST_TOKENS:
        return "eager"
    obstacle = obstacle_to("numba", tensors)
    if name == "numba" and obstacle:
        raise ValueError(f"linear_scan backend 'numba' {obstacle}")
    if name != AUTO:
        return name
    if not obstacle:
        return "numba"
    # A trace of the loop is as long as the text; else a CPU gains nothing from more, but parallel,
    # work, and function transforms need torch's own operations.
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return "eager" if not traced and (on_cpu or is_observed(tensors)) else "parallel"


@torch.library.custom_op("contextlm::linear_scan", mutates_args=())
def _any_length(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    return linear_scan(gates_BTC, inputs_BTC, initial_BC).clone()


@_any_length.register_fake
def _(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    return torch.empty_like(inputs_BTC)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    gates_BTC, _, initial_BC = inputs
    ctx.save_for_backward(gates_BTC, initial_BC, output)


def _backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates_BTC, initial_BC, states_BTC = ctx.saved_tensors
    return gradients(_any_length, gates_BTC, initial_BC, states_BTC, grad_BTC)


_any_length.register_autograd(_backward, setup_context=_keep)


# Dynamo would not say whether a length is open; what it leaves whole is told by the next stage.
@torch.compiler.allow_in_graph
def _linear_scan_traced(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan_parallel`; one graph serves all lengths if the length is left open."""
    if isinstance(gates_BTC.shape[1], torch.SymInt):
        result: Tensor = _any_length(gates_BTC, inputs_BTC, initial_BC)
        return result
    return linear_scan_parallel(gates_BTC, inputs_BTC, initial_BC)
