"""The gated linear recurrence within a graph of torch.compile or torch.export.

The form that is parallel in time has as many rounds as the length has bits, so a graph of it is for
one length. Where the length is left open the graph holds one op instead, `contextlm::linear_scan`,
which chooses its form when it runs; who loads such a graph from a file imports contextlm first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlm.ops.linear_scan.parallel import gradients, linear_scan_parallel


@torch.library.custom_op("contextlm::linear_scan", mutates_args=())
def _any_length(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    from contextlm.ops.linear_scan import linear_scan

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
def linear_scan_traced(gates_BTC: Tensor, inputs_BTC: Tensor, initial_BC: Tensor) -> Tensor:
    """As `linear_scan_parallel`; one graph serves all lengths if the length is left open."""
    if isinstance(gates_BTC.shape[1], torch.SymInt):
        result: Tensor = _any_length(gates_BTC, inputs_BTC, initial_BC)
        return result
    return linear_scan_parallel(gates_BTC, inputs_BTC, initial_BC)
