"""How the attention modules of transformers' decoders name their parts: one row an architecture.

`Attention` reads a module by its row: queries, keys and values before rotary positions, what turns
them, and what comes behind. A further letter: X, heads of queries or of keys and values.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from contextlm.base.errors import InputError
from contextlm.models.base import architectures
from contextlm.models.cache import CACHE

QUERY, KEY, VALUE = range(3)


@dataclass(frozen=True)
class Names:
    """What one architecture calls the parts of its attention.

    Attributes:
        layers: the path from the base model to its layers.
        attention: a layer's attention module.
        cache: the module's argument for the cache.
        projections: the modules of queries, keys and values, or the one of all three.
        by_head: where one module has all three, whether its rows go head by head.
        norms: the norms of queries and of keys, over a head's width, before rotary.
        output: the module behind attention; `dropout` the one behind that.
        rotary: the base model's module of rotary positions; None: positions are learned.
        typed_rotary: whether that module wants to know the layer's type.
        softcap: where the module has the bound of its scores.
        upcasts: whether eager attention normalises in float32.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    cache: str = CACHE
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    by_head: bool = False
    norms: tuple[str, str] | None = None
    output: str = "o_proj"
    dropout: str | None = None
    rotary: str | None = "rotary_emb"
    typed_rotary: bool = False
    softcap: str | None = None
    upcasts: bool = True


_NORMS = ("q_norm", "k_norm")

ARCHITECTURES: dict[str, Names] = {
    "llama": Names(),
    "mistral": Names(),
    "qwen2": Names(),
    "qwen3": Names(norms=_NORMS),
    "gemma2": Names(softcap="attn_logit_softcapping"),
    "gemma3_text": Names(norms=_NORMS, typed_rotary=True),
    "phi3": Names(projections=("qkv_proj",)),
    "gpt_neox": Names(
        attention="attention",
        cache="layer_past",
        projections=("query_key_value",),
        by_head=True,
        output="dense",
    ),
    "gpt2": Names(
        layers="h",
        attention="attn",
        projections=("c_attn",),
        output="c_proj",
        dropout="resid_dropout",
        rotary=None,
        upcasts=False,
    ),
    "opt": Names(layers="decoder.layers", output="out_proj", rotary=None),
}

# Their frequencies change with the length, so that earlier keys could not be rebuilt as they were.
_CHANGING_ROTARY = ("dynamic", "longrope")

Turns = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each ``[B, S, R]``; R is what of E is turned."""


class Projection(NamedTuple):
    """Weight and bias that make heads of something D wide."""

    weight_XED: Tensor
    bias_XE: Tensor

    def heads(self, inputs_BTD: Tensor, dims: slice = slice(None)) -> Tensor:
        """All heads, ``[B, X, T, E]``, or some dimensions of E."""
        weight_XED, bias_XE = self.weight_XED[:, dims], self.bias_XE[:, dims]
        made_BTF = F.linear(inputs_BTD, weight_XED.flatten(0, 1), bias_XE.flatten())
        return made_BTF.unflatten(-1, bias_XE.shape).transpose(1, 2)


class Attention:
    """One attention module, read by the names of its architecture.

    Attributes:
        module: the module itself; `block` the layer around it, `base` the model without its head.
        heads, groups: H and G, of queries and of keys and values.
        head_width: E.
        width: D, of the module's input.
        window: the sliding window's tokens, or None.
        scaling: the factor of scores.
        softcap: what bounds them, or None.
    """

    def __init__(self, block: Any, names: Names, base: Any):
        self.module: Any = getattr(block, names.attention)
        self.block, self.names, self.base = block, names, base
        module, config = self.module, self.module.config
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.width = config.hidden_size
        self.head_width = getattr(config, "head_dim", None) or self.width // self.heads
        # Where modules do not say, the configuration speaks for all of them.
        from_config = getattr(config, "sliding_window", None)
        self.window: int | None = getattr(module, "sliding_window", from_config)
        self.scaling = float(module.scaling)
        self.softcap = None if names.softcap is None else getattr(module, names.softcap)
        self._rotary = None if names.rotary is None else getattr(base, names.rotary)

    @property
    def has_rotary(self) -> bool:
        """Whether keys and queries are turned by their positions."""
        return self._rotary is not None

    @property
    def changing_rotary(self) -> str | None:
        """The kind of rotary positions whose frequencies change with the length, if it is one."""
        parameters = getattr(self.module.config, "rope_parameters", None) or {}
        kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
        types = [kind.get("rope_type") for kind in kinds]
        return next((kind for kind in types if kind in _CHANGING_ROTARY), None)

    @property
    def implementation(self) -> str:
        """The attention function in use."""
        return self.module.config._attn_implementation

    def is_readable(self, part: int) -> bool:
        """Whether `projection` can read it: not while it has an adapter, say."""
        module, kind = self._projecting(part)
        return type(module) is kind

    def projection(self, part: int) -> Projection:
        """The projection of inputs to `QUERY`, `KEY` or `VALUE`, as views of the weights.

        Raises:
            InputError: it is not the architecture's plain module.
        """
        names = self.names.projections
        module, kind = self._projecting(part)
        if type(module) is not kind:
            raise InputError(
                f"a projection that is a {type(module).__name__} cannot be read, only a plain "
                f"{kind.__name__}: merge adapters first, and do not quantise"
            )
        weight_FD = module.weight.T if kind is Conv1D else module.weight
        bias_F = module.bias if module.bias is not None else weight_FD.new_zeros(len(weight_FD))
        shape = (self.groups if part else self.heads, self.head_width)
        if len(names) > 1:
            return Projection(weight_FD.unflatten(0, shape), bias_F.unflatten(0, shape))
        if self.names.by_head:
            by_head = (self.heads, 3, self.head_width)
            both = (weight_FD.unflatten(0, by_head), bias_F.unflatten(0, by_head))
            return Projection(both[0][:, part], both[1][:, part])
        sizes = [self.heads * self.head_width, *2 * [self.groups * self.head_width]]
        weight_FD, bias_F = weight_FD.split(sizes)[part], bias_F.split(sizes)[part]
        return Projection(weight_FD.unflatten(0, shape), bias_F.unflatten(0, shape))

    def _projecting(self, part: int) -> tuple[Any, Any]:
        """The module that makes queries, keys or values, and of what type it has to be."""
        names = self.names.projections
        module = getattr(self.module, names[part if len(names) > 1 else 0])
        return module, Conv1D if names == ("c_attn",) else nn.Linear

    def normed(self, part: int, heads_BXTE: Tensor) -> Tensor:
        """Queries or keys behind their norm, where the architecture has one."""
        if self.names.norms is None:
            return heads_BXTE
        return getattr(self.module, self.names.norms[part])(heads_BXTE)

    def turns(self, like: Tensor, positions_BS: Tensor) -> Turns:
        """What turns queries and keys at these positions."""
        assert self._rotary is not None
        kind = (self.module.layer_type,) if self.names.typed_rotary else ()
        cos_BSR, sin_BSR = self._rotary(like, positions_BS, *kind)
        return cos_BSR, sin_BSR

    def queries(self, inputs_BTD: Tensor) -> Tensor:
        """Queries before rotary positions, ``[B, H, T, E]``."""
        return self.normed(QUERY, self.projection(QUERY).heads(inputs_BTD))

    def weights(self, products: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights of queries' products with keys, normalised at least in float32 inside.

        Args:
            products: ``[..., T, S]``.
            mask: of booleans or of addends; a row that sees nothing stays finite.
        """
        scores = products * self.scaling
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        precision = torch.promote_types(scores.dtype, torch.float32)
        # Eager attention normalises in float32 even in a float64 model; so do we.
        if self.implementation == "eager" and self.names.upcasts:
            precision = torch.float32
        return scores.softmax(-1, dtype=precision).to(scores.dtype)

    def output_weight(self) -> Tensor:
        """Of the module behind attention, by head: ``[H, E, D]``."""
        module = getattr(self.module, self.names.output)
        weight_FD = module.weight if isinstance(module, Conv1D) else module.weight.T
        return weight_FD.unflatten(0, (self.heads, self.head_width))

    def output(self, mixed_BTF: Tensor) -> Tensor:
        """What the module does behind attention, ``[B, T, D]``."""
        made_BTD = getattr(self.module, self.names.output)(mixed_BTF)
        if self.names.dropout is None:
            return made_BTD
        return getattr(self.module, self.names.dropout)(made_BTD)


def rotated(heads_BXSE: Tensor, turns: Turns | None) -> Tensor:
    """Rotary positions on the first R dimensions."""
    if turns is None:
        return heads_BXSE
    no_query = heads_BXSE[:, :0]  # the function turns queries and keys together
    return apply_rotary_pos_emb(no_query, heads_BXSE, *turns)[1]


def attentions_of(model: PreTrainedModel) -> list[Attention]:
    """The attention modules of a decoder, in order.

    Raises:
        InputError: there is no adaptor for its architecture, or it is not a causal decoder.
    """
    base: Any = getattr(model, "base_model", model)
    config: Any = getattr(base, "config", None)
    # A model that keeps a policy says what it would be without.
    kind = getattr(config, "plain_type", None) or getattr(
        config, "model_type", type(model).__name__
    )
    if kind in architectures():
        raise InputError(f"{kind} has a cache of its own, which keeps little already")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"no adaptor for the attention of {kind!r}, only for {', '.join(ARCHITECTURES)}; "
            'any model of transformers takes generate(cache_implementation="quantized")'
        )
    if getattr(config, "add_cross_attention", False):
        raise InputError(
            "a model with cross-attention (add_cross_attention: true) is not supported"
        )
    names = ARCHITECTURES[kind]
    layers = operator.attrgetter(names.layers)(base)
    found = [Attention(block, names, base) for block in layers]
    if not all(attention.module.is_causal for attention in found):
        raise InputError(f"this {kind} attends to later tokens too: it has no cache to compress")
    return found
