"""Context block and token block: a recurrent context, and a stack of layers that read it.

Source: the report 004_c8f9b3c1474d6e53 (DESIGN 1.2)::

    e_t = LN(E[token_t])
    context layer i:  c' = LN(c + GELU(W [c ; e_t] + b))     from c_{t-1}; the last one gives c_t
    token layer i:    x' = LN(x + GELU(W [c ; x] + b))       from x = e_t
    logits = x E^T                                           tied to the embedding, no bias

With ``context_mode="layerwise"`` token layer i reads context layer i's output, with
``"final_only"`` every token layer reads c_t. There is no attention, so decoding keeps one vector.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from contextlm.models.base import (
    ContextDecoder,
    ContextForCausalLM,
    mark_frozen,
    register_architecture,
)
from contextlm.models.cache import ContextStateLayer
from contextlm.models.config import ContextConfig
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import ContextBlock, ContextLayer


@strict
class ContextTokenConfig(ContextConfig):
    """Configuration of the context and token blocks; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding and of the token block.
        context_dim: C, the width of the context.
        num_hidden_layers: L, the layers of each of the two blocks.
        context_mode: which context a token layer reads.
        freeze_context: the context block learns in phase 1 only.
        freeze_embedding: embedding (and with it the head) and its norm never learn.
        layer_norm_eps: of every layer norm.
    """

    model_type = "context_token"

    vocab_size: int = 50257
    hidden_size: int = 768
    context_dim: int = 500
    num_hidden_layers: int = 2
    context_mode: Literal["layerwise", "final_only"] = "layerwise"
    freeze_context: bool = True
    freeze_embedding: bool = True
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Called by transformers on construction; raises `ValueError`."""
        self.check_counts("vocab_size", "hidden_size", "context_dim", "num_hidden_layers")
        self.check_positive("initializer_range", "layer_norm_eps")


class TokenLayer(GradientCheckpointingLayer, ContextLayer):
    """``x' = LN(x + GELU(W [x ; c] + b))``: a context layer with the roles exchanged.

    The stream that is updated is the token's, ``[N, D]``; what is projected into it is the context,
    ``[..., C]``. It starts from N(0, 0.1) and N(0, 0.01) like the context layers.
    """

    def forward(self, stream_BTD: Tensor, context_BTC: Tensor) -> Tensor:
        """The next layer's stream, ``[B, T, D]``."""
        stream_ND = super().forward(stream_BTD.flatten(0, 1), context_BTC.flatten(0, 1))
        return stream_ND.view(stream_BTD.shape)


class ContextTokenModel(ContextDecoder):
    """Embedding, context block and token block, without the head."""

    config_class = ContextTokenConfig
    _no_split_modules = ["ContextBlock", "TokenLayer"]
    _can_record_outputs = {"hidden_states": TokenLayer}
    history = 1  # the token before a window, whose context goes into its first one

    def __init__(self, config: ContextTokenConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.context_block = ContextBlock(
            config.context_dim,
            config.hidden_size,
            config.num_hidden_layers,
            config.layer_norm_eps,
            frozen=config.freeze_context,
        )
        self.layers = nn.ModuleList(
            TokenLayer(config.hidden_size, config.context_dim, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        mark_frozen(config.freeze_embedding, self.embed_tokens, self.embed_norm)
        self.freeze_parts()
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: the context after the last token."""
        return Cache(layers=[ContextStateLayer()])

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``; the recurrence knows no positions."""
        embedded_BTD = self.embed_norm(embeds_BTD)
        if new.contexts is None:
            (state,) = new.states(1)
            contexts_LBTC = self.context_block.run(embedded_BTD, new, state)
        else:
            contexts_LBTC = self.context_block.parallel(embedded_BTD, new.contexts[:, :-1])
        stream_BTD = embedded_BTD
        for index, layer in enumerate(self.layers):
            read = index if self.config.context_mode == "layerwise" else -1
            stream_BTD = layer(stream_BTD, contexts_LBTC[read])
        return stream_BTD


# A wide spread: with 0.02 a frozen head could say little.
_TINY = {"vocab_size": 97, "hidden_size": 24, "context_dim": 16, "initializer_range": 0.5}


@register_architecture(
    tiny=(
        _TINY,
        {**_TINY, "context_mode": "final_only", "num_hidden_layers": 3},
        {**_TINY, "num_hidden_layers": 1, "freeze_context": False, "freeze_embedding": False},
    ),
)
class ContextTokenForCausalLM(ContextForCausalLM):
    """Context-Token: a recurrent context block and a token block that reads it, no attention."""

    decoder_class = ContextTokenModel
