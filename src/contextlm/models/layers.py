"""Norms, starting weights and the context block, which architectures share.

N is a number of independent contexts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

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


def start_update(layer: nn.Linear) -> None:
    """Start from N(0, 0.1) and N(0, 0.01): with Xavier, phase 1 does not converge."""
    init.normal_(layer.weight, mean=0.0, std=0.1)
    init.normal_(layer.bias, mean=0.0, std=0.01)


class ContextLayer(nn.Module):
    """One layer of the context block: ``c' = LN(c + GELU(W [c ; e] + b))`` (DESIGN 1.2).

    The two products of `update`, whose first C columns act on the context and whose last D act on
    the token, are computed apart, because the token's part can be had for all tokens (or for all
    vocabulary entries) at once. That reads the weights without calling the module that they belong
    to, so it is done where that makes no difference (`is_bare`).
    """

    def __init__(self, context_dim: int, embedding_dim: int, eps: float = 1e-5):
        super().__init__()
        self.context_dim = context_dim
        with init.no_init_weights():  # what is drawn in vain would change all that comes later
            self.update = nn.Linear(context_dim + embedding_dim, context_dim)
        # Told to the linear layer itself: transformers starts no module without weights of its own.
        object.__setattr__(self.update, "is_update", True)
        start_update(self.update)
        self.norm = nn.LayerNorm(context_dim, eps=eps)

    @property
    def is_bare(self) -> bool:
        """Whether its parts need not be called."""
        return is_bare(self.update, nn.Linear) and is_bare(self.norm, nn.LayerNorm)

    def forward(self, context_NC: Tensor, embedded_ND: Tensor) -> Tensor:
        """The next contexts of N tokens, ``[N, C]``, each from a context of its own."""
        if self.is_bare:
            return self.step(context_NC, self.project(embedded_ND))
        update_NC = self.update(torch.cat([context_NC, embedded_ND], dim=-1))
        return self.norm(context_NC + F.gelu(update_NC))

    @property
    def context_weight(self) -> Tensor:
        """The recurrent part of the weight, ``[C, C]``."""
        return self.update.weight[:, : self.context_dim]

    def project(self, embedded: Tensor) -> Tensor:
        """The tokens' part ``W_e e + b``: ``[..., D]`` to ``[..., C]``."""
        return F.linear(embedded, self.update.weight[:, self.context_dim :], self.update.bias)

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


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than `kind` does with weights that are at hand.

    Not so for adapters, quantised or compiled layers, hooks, and weights that are offloaded or
    sharded: these come when the module is called.
    """
    return (
        type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not any(is_traceable_wrapper_subclass(p) for p in module.parameters(recurse=False))
    )


def linear_weight(layer: nn.Linear, like: Tensor) -> Tensor:
    """What a linear layer without bias multiplies with, ``[out, in]``.

    Whatever has taken its place (see `is_bare`) is linear still: its answers to unit vectors are
    the columns.
    """
    if is_bare(layer, nn.Linear):
        return layer.weight
    answers: Tensor = layer(torch.eye(layer.in_features, dtype=like.dtype, device=like.device))
    return answers.T


class ContextStep(Protocol):
    """What phase 1 and a context block need of a layer."""

    def project(self, embedded: Tensor) -> Tensor:
        """All that the tokens bring, ``[..., D]`` to a width of the layer's own."""
        ...

    def step(self, context_NC: Tensor, projected_NC: Tensor) -> Tensor:
        """Apply the layer once to N independent contexts, ``[N, C]``."""
        ...


class ContextBlock(GradientCheckpointingLayer):
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

    def stack(self) -> Sequence[Any]:
        """The layers, in order, each a `ContextStep` or in the place of one."""
        return list(self.layers)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the weights: of the last, a norm's or a gate's, which no client quantises."""
        return list(self.parameters())[-1].dtype

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
        layers = [layer for layer in self.layers if isinstance(layer, ContextLayer)]
        layers = [layer for layer in layers if is_bare(layer, ContextLayer) and layer.is_bare]
        if len(layers) < len(self.layers):
            return self._one_by_one(embedded_BTD, initial_BC.to(self._dtype), mask_BT)
        return context_scan(
            [layer.project(embedded_BTD) for layer in layers],
            [layer.context_weight for layer in layers],
            [layer.norm.weight for layer in layers],
            [layer.norm.bias for layer in layers],
            initial_BC.to(self._dtype),
            mask_BT=mask_BT,
            eps=layers[0].norm.eps,
        )

    def _one_by_one(
        self, embedded_BTD: Tensor, context_BC: Tensor, mask_BT: Tensor | None
    ) -> Tensor:
        """The same by calling the layers token by token, whatever stands in their place."""
        outputs = []
        for t, embedded_BD in enumerate(embedded_BTD.unbind(1)):
            before_BC, of_layers = context_BC, []
            for layer in self.layers:
                context_BC = layer(context_BC, embedded_BD)
                if mask_BT is not None:
                    context_BC = torch.where(mask_BT[:, t, None], context_BC, before_BC)
                of_layers.append(context_BC)
            outputs.append(torch.stack(of_layers))
        return torch.stack(outputs, dim=2)

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
                context_NC = layer(context_NC, embedded_ND)
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
