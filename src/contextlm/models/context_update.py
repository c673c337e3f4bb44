"""How a token changes the context of `models.context_vector`, whose docstring has the equations.

Shape suffixes: B batch, C width of all context vectors together, H width of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init


class ForgetGate(nn.Linear):
    """A linear layer whose bias starts high: a model that has learnt nothing remembers.

    Args:
        mlp_size: H.
        context_dim: C.
        num_contexts: parts of the output whose biases start at 1, 3, 5 ...
    """

    def __init__(self, mlp_size: int, context_dim: int, num_contexts: int):
        super().__init__(mlp_size, context_dim)
        self.num_contexts = num_contexts

    def reset_bias(self) -> None:
        """The starting biases."""
        starts = 1.0 + 2.0 * torch.arange(self.num_contexts, device=self.bias.device)
        width = self.bias.shape[0] // self.num_contexts
        init.copy_(self.bias, starts.repeat_interleave(width))


class ContextUpdate(nn.Module):
    """How a token changes the context; `gated` adds a forget gate and an input gate.

    Args:
        mlp_size: H.
        context_dim: C. One layer for all context vectors is the same as one layer for each.
        num_contexts: how many vectors these are.
        gated: scale what is kept and what is written, channel by channel.
    """

    def __init__(self, mlp_size: int, context_dim: int, num_contexts: int, *, gated: bool):
        super().__init__()
        self.written = nn.Linear(mlp_size, context_dim)
        self.forget_gate = ForgetGate(mlp_size, context_dim, num_contexts) if gated else None
        self.input_gate = nn.Linear(mlp_size, context_dim) if gated else None

    def forward(self, hidden_BH: Tensor, context_BC: Tensor) -> Tensor:
        """The context after a token, ``[B, C]``, in the type of the context before it."""
        written_BC = self.written(hidden_BH)
        if self.forget_gate is None or self.input_gate is None:
            return context_BC + written_BC
        kept_BC = torch.sigmoid(self.forget_gate(hidden_BH)) * context_BC
        return kept_BC + torch.sigmoid(self.input_gate(hidden_BH)) * torch.tanh(written_BC)
