"""Norms, starting weights and the context block, which architectures share.

N is a number of independent contexts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from contextlm.models.cache import ContextStateLayer
from contextlm.models.inputs import NewTokens
from contextlm.ops.context_scan import context_scan, context_step
from contextlm.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm in the weights' own type, whatever autocast wants, and perhaps gated."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The input over the root of its mean square, times the weights; any shape ``[..., D]``.

        With a gate z, ``[..., D]``, the input is first multiplied by ``silu(z)``, and the result is
        in the gate's type.
        """
        x = x.to(self.weight.dtype)
        if gate is None and x.shape[-2] == 1:  # a token: choosing would take longer
            return super().forward(x)
        return rms_norm(x, self.weight, gate, eps=self.eps or torch.finfo(x.dtype).eps)


class OwnStart(nn.Module):
    """A module whose weights do not start as transformers would start them."""

    def reset_parameters(self) -> None:
        """Start the module's own parameters anew, by `transformers.initialization`."""
        raise NotImplementedError


class ContextLayer(OwnStart):
    """One layer of the context block: ``c' = LN(c + GELU(W [c ; e] + b))`` (DESIGN 1.2).

    `weight` is one ``[C, C + D]`` matrix whose first C columns act on the context and whose last D
    act on the token. The two products are computed apart, because the token's part can be had
    for all tokens (or for all vocabulary entries) at once.
    """

    def __init__(self, context_dim: int, embedding_dim: int, eps: float = 1e-5):
        super().__init__()
        self.context_dim = context_dim
        self.weight = nn.Parameter(torch.empty(context_dim, context_dim + embedding_dim))
        self.bias = nn.Parameter(torch.empty(context_dim))
        self.norm = nn.LayerNorm(context_dim, eps=eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from N(0, 0.1) and N(0, 0.01): with Xavier, phase 1 does not converge."""
        init.normal_(self.weight, mean=0.0, std=0.1)
        init.normal_(self.bias, mean=0.0, std=0.01)

    @property
    def context_weight(self) -> Tensor:
        """The recurrent part of the weight, ``[C, C]``."""
        return self.weight[:, : self.context_dim]

    def project(self, embedded: Tensor) -> Tensor:
        """The tokens' part ``W_e e + b``: ``[..., D]`` to ``[..., C]``."""
        return F.linear(embedded, self.weight[:, self.context_dim :], self.bias)

    def step(self, context_NC: Tensor, projected_NC: Tensor) -> Tensor:
        """Apply the layer once to N independent contexts, ``[N, C]`` each."""
        return context_step(
            context_NC,
            projected_NC,
            self.context_weight,
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )


class ContextStep(Protocol):
    """What phase 1 and a context block need of a layer."""

    def project(self, embedded: Tensor) -> Tensor:
        """All that the tokens bring, ``[..., D]`` to a width of the layer's own."""
        ...

    def step(self, context_NC: Tensor, projected_NC: Tensor) -> Tensor:
        """Apply the layer once to N independent contexts, ``[N, C]``."""
        ...


class ContextBlock(nn.Module):
    """A stack of context layers, each fed the token's embedding again (DESIGN 1.2).

    The last layer's output is the recurrent context; before the first token it is zero.

    `embedding_dim` is D, the width of the normalised token embeddings; a block that is `frozen` is
    trained by phase 1 only.
    """

    def __init__(
        self,
        context_dim: int,
        embedding_dim: int,
        num_layers: int = 1,
        eps: float = 1e-5,
        *,
        frozen: bool = False,
    ):
        super().__init__()
        self.frozen = frozen
        self.context_dim = context_dim
        self.layers = nn.ModuleList(
            ContextLayer(context_dim, embedding_dim, eps) for _ in range(num_layers)
        )

    def stack(self) -> Sequence[ContextStep]:
        """The layers, in order."""
        return self._own_layers()

    def _own_layers(self) -> list[ContextLayer]:
        """The same under their own type."""
        return [layer for layer in self.layers if isinstance(layer, ContextLayer)]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self, embedded_BTD: Tensor, initial_BC: Tensor, mask_BT: Tensor | None = None
    ) -> Tensor:
        """The exact recurrence over the tokens.

        It runs in the weights' own type even under autocast: a recurrence would multiply rounding
        errors.

        Args:
            embedded_BTD: normalised token embeddings.
            initial_BC: the context before the first token.
            mask_BT: False where a token is padding, which the context passes unchanged.

        Returns:
            Every layer's output at every token, ``[L, B, T, C]``.
        """
        with _without_autocast(embedded_BTD.device.type):
            return self._scan(embedded_BTD.to(self._dtype), initial_BC, mask_BT)

    def _scan(self, embedded_BTD: Tensor, initial_BC: Tensor, mask_BT: Tensor | None) -> Tensor:
        layers = self._own_layers()
        return context_scan(
            [layer.project(embedded_BTD) for layer in layers],
            [layer.context_weight for layer in layers],
            [layer.norm.weight for layer in layers],
            [layer.norm.bias for layer in layers],
            initial_BC.to(self._dtype),
            mask_BT=mask_BT,
            eps=layers[0].norm.eps,
        )

    def run(self, embedded_BTD: Tensor, new: NewTokens, state: ContextStateLayer | None) -> Tensor:
        """As `forward`, from where the cache left it; moves the cached state on.

        Without a `state` it starts from zero and keeps nothing.
        """
        initial_BC = embedded_BTD.new_zeros(embedded_BTD.shape[0], self.context_dim)
        if state is not None:
            initial_BC = state.continue_from(initial_BC)
        contexts_LBTC = self(embedded_BTD, initial_BC, new.mask_BT)
        if state is not None:
            state.update_state(contexts_LBTC[-1, :, -1], new)
        return contexts_LBTC

    def parallel(self, embedded_BTD: Tensor, previous_BTC: Tensor) -> Tensor:
        """As `forward`, where the context before each token is known, as from a store."""
        with _without_autocast(embedded_BTD.device.type):
            embedded_ND = embedded_BTD.to(self._dtype).flatten(0, 1)
            context_NC = previous_BTC.to(self._dtype).flatten(0, 1)
            outputs = []
            for layer in self.stack():
                context_NC = layer.step(context_NC, layer.project(embedded_ND))
                outputs.append(context_NC.view(previous_BTC.shape))
        return torch.stack(outputs)

    def step(self, context_NC: Tensor, projected_NC: list[Tensor]) -> Tensor:
        """The last layer's output, ``[N, C]``, for N independent contexts.

        `projected_NC` is, per layer, the tokens' part (`ContextLayer.project`).
        """
        for layer, projected_layer_NC in zip(self.stack(), projected_NC, strict=True):
            context_NC = layer.step(context_NC, projected_layer_NC)
        return context_NC


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off; nothing to do on devices without it (meta)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
