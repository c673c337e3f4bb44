"""Attention over kept inputs instead of kept keys and values, for GPT-NeoX and GPT-2.

With x_j the input of the attention module at token j, keys and values are k_j = W_k x_j + b_k and
v_j = W_v x_j + b_v, so inputs are all that has to be kept. Reading them is done in two ways:

- rebuilding: project all earlier inputs again and let the module's own `forward` go on from there;
- absorbing: move the projections off the kept tokens. Without rotary, q . k_j = (W_k^T q) . x_j +
  q . b_k, and sum_j a_j v_j = W_v (sum_j a_j x_j) + (sum_j a_j) b_v. The rotary part of a key
  turns with its own position, so that part (a quarter, in Pythia) is rebuilt.

Both are exact; `absorbing_pays` picks the one with fewer multiplications. The biases are kept where
mathematics would drop or simplify them (softmax ignores q . b_k, the a_j add up to one), because
only so are the numbers those of the module in low precision too.

A further letter: R, the part of E with rotary positions; S counts all tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from contextlm.base.errors import InputError
from contextlm.compress.input_cache.layer import input_layers
from contextlm.models.cache import CACHE


def absorbing_pays(new: int, past: int, width: int, heads: int, rotary: int) -> bool:
    """Whether absorbing the projections takes fewer multiplications than rebuilding, in one row.

    Rebuilding projects every earlier token, but then compares short keys; absorbing compares
    whole inputs, once for every new token and head. So few new tokens absorb and many rebuild,
    with the turning point a little below E new tokens. `rotary` is R.
    """
    total = new + past
    rebuilding = 2 * (past + new) * width**2 + 2 * new * total * width
    absorbing = (
        2 * new * width**2 + total * rotary * heads * width + 2 * new * total * width * heads
    )
    return absorbing < rebuilding


class Projection(NamedTuple):
    """Weight and bias of queries, keys and values, in this order, as views of the module's own."""

    weight_3HED: Tensor
    bias_3HE: Tensor

    def heads(self, part: int, inputs_BTD: Tensor, dims: slice = slice(None)) -> Tensor:
        """Queries (part 0), keys (1) or values (2), ``[B, H, T, E]``, or some dimensions of E."""
        weight_HED, bias_HE = self.weight_3HED[part, :, dims], self.bias_3HE[part, :, dims]
        made_BTX = F.linear(inputs_BTD, weight_HED.flatten(0, 1), bias_HE.flatten())
        return made_BTX.unflatten(-1, bias_HE.shape).transpose(1, 2)


class Rebuilt:
    """Earlier keys and values, in the place of the cache that a module's own `forward` updates."""

    def __init__(self, keys_BHSE: Tensor, values_BHSE: Tensor):
        self.keys_BHSE, self.values_BHSE = keys_BHSE, values_BHSE

    def update(
        self, keys_BHTE: Tensor, values_BHTE: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Those of all tokens."""
        keys = torch.cat([self.keys_BHSE, keys_BHTE], dim=2)
        return keys, torch.cat([self.values_BHSE, values_BHTE], dim=2)


class Reader(ABC):
    """Stands in for the `forward` of one attention module; made by `InputCache`.

    Attributes:
        attention: the module.
        layers: attention modules in the model.
        previous: what stood in for its `forward` before (as other tools do), or None.
    """

    cache_argument: ClassVar[str]

    def __init__(self, attention: nn.Module, layers: int, heads: int, rotary: nn.Module | None):
        self.attention: Any = attention
        self.layers, self.heads, self.rotary = layers, heads, rotary
        self.previous = vars(attention).get("forward")
        self.projection()  # refuses what cannot be read

    @abstractmethod
    def projection(self) -> Projection:
        """The module's projection of inputs to queries, keys and values.

        Raises:
            InputError: it is not the architecture's plain one.
        """

    @abstractmethod
    def output(self, mixed_BTD: Tensor) -> Tensor:
        """What the module does after attention, ``[B, T, D]``."""

    def install(self) -> None:
        """Take the place of the module's `forward`."""
        self.attention.forward = self.forward

    def remove(self) -> None:
        """Leave the module as it was."""
        if self.previous is None:
            del self.attention.forward
        else:
            self.attention.forward = self.previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `forward`."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.attention).forward(self.attention, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the module's own, with a cache of inputs or without a cache.

        Raises:
            InputError: the cache is one of keys and values.
        """
        kwargs["attention_mask"] = attention_mask
        cache = kwargs.get(self.cache_argument)
        if cache is None:
            return self.original(hidden_states, **kwargs)
        layers = input_layers(cache, self.layers)
        layer = layers[self.attention.layer_idx]
        past = layer.get_seq_length()
        inputs_BSD = layer.append(hidden_states)
        if layer is layers[0] and self.rotary is not None:
            layer.append_positions(kwargs["position_ids"])
        if past == 0:
            return self.original(hidden_states, **{**kwargs, self.cache_argument: None})
        turns = self.turns(layers[0].positions, hidden_states)
        if self.can_absorb(hidden_states, past, attention_mask, turns):
            return self.absorbed(hidden_states, inputs_BSD, attention_mask, turns)
        kwargs[self.cache_argument] = self.rebuilt(inputs_BSD[:, :past], turns)
        return self.original(hidden_states, **kwargs)

    def turns(
        self, positions_BS: Tensor | None, hidden_BTD: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of all tokens' positions, ``[B, S, R]``; None without rotary.

        They are made anew in each layer: beside the projections that costs nothing, and nothing
        has to be handed from layer to layer.
        """
        if self.rotary is None or positions_BS is None:
            return None
        cos_BSR, sin_BSR = self.rotary(hidden_BTD, position_ids=positions_BS.to(hidden_BTD.device))
        return cos_BSR, sin_BSR

    def can_absorb(
        self,
        hidden_BTD: Tensor,
        past: int,
        mask: Tensor | None,
        turns: tuple[Tensor, Tensor] | None,
    ) -> bool:
        """Whether `absorbed` knows all that the module's own `forward` would do, and pays."""
        config: Any = self.attention.config
        if config._attn_implementation not in ("eager", "sdpa") or self.attention.training:
            return False
        if getattr(config, "reorder_and_upcast_attn", False):
            return False
        new, width = hidden_BTD.shape[1:]
        if (mask is None and new > 1) or (mask is not None and mask.dim() != 4):
            return False
        rotary = 0 if turns is None else int(turns[0].shape[-1])
        return absorbing_pays(new, past, width, self.heads, rotary)

    def rebuilt(self, past_BSD: Tensor, turns: tuple[Tensor, Tensor] | None) -> Rebuilt:
        """Keys, with rotary, and values of the earlier tokens."""
        projection, past = self.projection(), past_BSD.shape[1]
        keys_BHSE = projection.heads(1, past_BSD)
        if turns is not None:
            keys_BHSE = rotated(keys_BHSE, *(turn_BSR[:, :past] for turn_BSR in turns))
        return Rebuilt(keys_BHSE, projection.heads(2, past_BSD))

    def absorbed(
        self,
        hidden_BTD: Tensor,
        inputs_BSD: Tensor,
        mask: Tensor | None,
        turns: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The module's output for the new tokens, and the attention weights where it gives them."""
        projection = self.projection()
        query_BHTE = projection.heads(0, hidden_BTD)
        weight_3HED, bias_3HE = projection
        start = 0
        if turns is not None:
            new, start = hidden_BTD.shape[1], turns[0].shape[-1]
            query_BHTE = rotated(query_BHTE, *(turn_BSR[:, -new:] for turn_BSR in turns))
        still_BHTE = query_BHTE[..., start:]
        on_inputs_BHTD = torch.einsum("bhte,hed->bhtd", still_BHTE, weight_3HED[1, :, start:])
        scores_BHTS = torch.einsum("bhtd,bsd->bhts", on_inputs_BHTD, inputs_BSD)
        scores_BHTS += torch.einsum("bhte,he->bht", still_BHTE, bias_3HE[1, :, start:])[..., None]
        if turns is not None:
            keys_BHSR = rotated(projection.heads(1, inputs_BSD, slice(start)), *turns)
            scores_BHTS += query_BHTE[..., :start] @ keys_BHSR.mT
        weights_BHTS = self.softmax(scores_BHTS * float(self.attention.scaling), mask)
        mixed_BHTD = torch.einsum("bhts,bsd->bhtd", weights_BHTS, inputs_BSD)
        mixed_BTHE = torch.einsum("bhtd,hed->bthe", mixed_BHTD, weight_3HED[2])
        mixed_BTHE += torch.einsum("bhts,he->bthe", weights_BHTS, bias_3HE[2])
        eager = self.attention.config._attn_implementation == "eager"
        return self.output(mixed_BTHE.flatten(2)), weights_BHTS if eager else None

    def softmax(self, scores_BHTS: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights, at least in float32 inside; a row that sees nothing stays finite."""
        if mask is not None and mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
        elif mask is not None:
            scores_BHTS = scores_BHTS + mask
        return scores_BHTS.softmax(-1, dtype=self.precision(scores_BHTS)).to(scores_BHTS.dtype)

    def precision(self, scores_BHTS: Tensor) -> torch.dtype:
        """The type in which weights are normalised."""
        return torch.promote_types(scores_BHTS.dtype, torch.float32)


class GPTNeoXReader(Reader):
    """Reads for `GPTNeoXAttention`, whose rows of weights are grouped by head."""

    cache_argument = "layer_past"

    def projection(self) -> Projection:
        module: Any = self.attention.query_key_value
        _check_plain(module, nn.Linear)
        shape = (self.heads, 3, -1)
        weight_3HED = module.weight.unflatten(0, shape).transpose(0, 1)
        if module.bias is None:
            return Projection(weight_3HED, weight_3HED.new_zeros(weight_3HED.shape[:3]))
        return Projection(weight_3HED, module.bias.unflatten(0, shape).transpose(0, 1))

    def output(self, mixed_BTD: Tensor) -> Tensor:
        return self.attention.dense(mixed_BTD)

    def precision(self, scores_BHTS: Tensor) -> torch.dtype:
        """Eager attention normalises in float32 even in a float64 model; so do we."""
        eager = self.attention.config._attn_implementation == "eager"
        return torch.float32 if eager else super().precision(scores_BHTS)


class GPT2Reader(Reader):
    """Reads for `GPT2Attention`, whose weight is ``[D, 3 D]``: queries, keys, values."""

    cache_argument = CACHE

    def projection(self) -> Projection:
        module: Any = self.attention.c_attn
        _check_plain(module, Conv1D)
        weight_3HED = module.weight.unflatten(1, (3, self.heads, -1)).permute(1, 2, 3, 0)
        return Projection(weight_3HED, module.bias.unflatten(0, (3, self.heads, -1)))

    def output(self, mixed_BTD: Tensor) -> Tensor:
        return self.attention.resid_dropout(self.attention.c_proj(mixed_BTD))


def rotated(heads_BHSE: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> Tensor:
    """Rotary positions on the first R dimensions."""
    no_query = heads_BHSE[:, :0]  # the function turns queries and keys together
    return apply_rotary_pos_emb(no_query, heads_BHSE, cos_BSR, sin_BSR)[1]


def _check_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise InputError(
            f"InputCache cannot read a projection that is a {type(module).__name__}, only a plain "
            f"{kind.__name__}: merge adapters first, and do not quantise"
        )
