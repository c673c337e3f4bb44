"""A context block whose update is the gated recurrence R instead of the documents' layer.

Of R (`models.gated_recurrence`) it takes the gates and the recurrence. For a token's normalised
embedding e::

    v = W e + b
    c' = a(v) * c + sqrt(1 - a(v)^2) * i(v) * v          a and i as in R

All that depends on the token depends on nothing else: no convolution, and no exception for a text's
first token. So phase 1 computes it once per vocabulary entry, as it does for the documents' layer.

Shape suffixes: B batch, T tokens, C context width, D embedding width, N independent contexts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contextlm.models.hybrid.recurrence import GatedRecurrence
from contextlm.models.layers import ContextBlock, ContextStep
from contextlm.ops.linear_scan import linear_scan


class GatedContextLayer(nn.Module):
    """The one layer of a `GatedContextBlock`; its gates' weights are dense.

    Args:
        context_dim: C.
        embedding_dim: D.
    """

    def __init__(self, context_dim: int, embedding_dim: int):
        super().__init__()
        self.inner = nn.Linear(embedding_dim, context_dim)
        self.recurrence = GatedRecurrence(context_dim, blocks=1)

    def project(self, embedded: Tensor) -> Tensor:
        """What the token brings, a and what is added: ``[..., D]`` to ``[..., 2 C]``."""
        inner_1NC = self.inner(embedded).reshape(1, -1, self.inner.out_features)
        terms = torch.cat(self.recurrence.terms(inner_1NC, None), dim=-1)
        return terms.view(*embedded.shape[:-1], -1)

    def step(self, context_NC: Tensor, projected_NX: Tensor) -> Tensor:
        """Apply the layer once to N independent contexts; X is 2 C."""
        gate_NC, added_NC = projected_NX.chunk(2, dim=-1)
        return torch.addcmul(added_NC, gate_NC, context_NC)


class GatedContextBlock(ContextBlock):
    """A gated recurrent context with the interface of the documents' context block.

    Args:
        context_dim: C.
        embedding_dim: D, the width of the normalised token embeddings.
        frozen: only phase 1 trains the block.
    """

    def __init__(self, context_dim: int, embedding_dim: int, *, frozen: bool = False):
        super().__init__(context_dim, embedding_dim, num_layers=0, frozen=frozen)
        self.layer = GatedContextLayer(context_dim, embedding_dim)

    def stack(self) -> list[ContextStep]:
        """The one layer."""
        return [self.layer]

    # In float32 at least, whatever the weights are: the state goes on from call to call.
    def _scan(self, embedded_BTD: Tensor, initial_BC: Tensor, mask_BT: Tensor | None) -> Tensor:
        gates_BTC, added_BTC = self.layer.project(embedded_BTD).chunk(2, dim=-1)
        states_BTC = linear_scan(gates_BTC, added_BTC, initial_BC, mask_BT=mask_BT)
        return states_BTC.unsqueeze(0)
