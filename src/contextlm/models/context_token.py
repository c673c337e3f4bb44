"""Context block and token block: a recurrent context, and a stack of layers that read it.

Source: the report 004_c8f9b3c1474d6e53 (DESIGN 1.2)::

    e_t = LN(E[token_t])
    context layer i:  c' = LN(c + GELU(W [c ; e_t] + b))     from c_{t-1}; the last one gives c_t
    token layer i:    x' = LN(x + GELU(W [c ; x] + b))       from x = e_t
    logits = x E^T                                           tied to the embedding, no bias

With ``context_mode="layerwise"`` token layer i reads context layer i's output, with
``"final_only"`` every token layer reads c_t. There is no attention, so decoding keeps one vector.

Shape suffixes: B batch, T tokens, D embedding width, C context width, L layers, V vocabulary.
"""

# No `from __future__ import annotations` here: transformers checks configuration values against the
# annotations, which must then be types and not strings.
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from contextlm.models.base import (
    ContextForCausalLM,
    ContextPreTrainedModel,
    mark_frozen,
    register_architecture,
)
from contextlm.models.cache import ContextStateLayer
from contextlm.models.config_checks import check_counts, check_positive
from contextlm.models.inputs import read_inputs
from contextlm.models.layers import ContextBlock, ContextLayer


@strict
class ContextTokenConfig(PreTrainedConfig):
    """Configuration of the context and token blocks; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding and of the token block.
        context_dim: C, the width of the context.
        num_hidden_layers: L, the layers of each of the two blocks.
        context_mode: which context a token layer reads.
        freeze_context: the context block learns in phase 1 only.
        freeze_embedding: embedding (and with it the head) and its norm never learn.
        initializer_range: standard deviation of the embedding.
        layer_norm_eps: of every layer norm.
        use_cache: return a cache by default.
    """

    model_type = "context_token"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 768
    context_dim: int = 500
    num_hidden_layers: int = 2
    context_mode: Literal["layerwise", "final_only"] = "layerwise"
    freeze_context: bool = True
    freeze_embedding: bool = True
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: a size is not positive.
        """
        check_counts(self, "vocab_size", "hidden_size", "context_dim", "num_hidden_layers")
        check_positive(self, "initializer_range", "layer_norm_eps")


class TokenLayer(ContextLayer):
    """``x' = LN(x + GELU(W [x ; c] + b))``: a context layer with the roles exchanged.

    The stream that is updated is the token's, ``[N, D]``; what is projected into it is the context,
    ``[..., C]``. It starts from N(0, 0.1) and N(0, 0.01) like the context layers.
    """

    def forward(self, stream_BTD: Tensor, context_BTC: Tensor) -> Tensor:
        """The next layer's stream, ``[B, T, D]``."""
        projected_ND = self.project(context_BTC).flatten(0, 1)
        return self.step(stream_BTD.flatten(0, 1), projected_ND).view(stream_BTD.shape)


class ContextTokenModel(ContextPreTrainedModel):
    """Embedding, context block and token block, without the head."""

    config_class = ContextTokenConfig
    supports_gradient_checkpointing = False  # the token layers are a matrix product each
    history = 1

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
        mark_frozen(config.freeze_embedding, self.embed_tokens, self.embed_norm)
        self.freeze_parts()
        self.post_init()

    def embed_normalised(self, input_ids: Tensor) -> Tensor:
        """Token embeddings as the context block reads them, ``[..., D]``."""
        return self.embed_norm(self.embed_tokens(input_ids))

    def new_cache(self) -> Cache:
        """An empty cache: the context after the last token."""
        return Cache(layers=[ContextStateLayer()])

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        contexts: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]``; see `ContextForCausalLM.forward`.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]``, or None.
            position_ids: not used: the recurrence knows no positions.
            past_key_values: the cache.
            inputs_embeds: ``[B, T, D]`` instead of tokens.
            use_cache: return a cache.
            contexts: ``[B, 1 + T, C]`` of a context store, those of the token before the window
                (zeros at the beginning) and of the window's own; the recurrence is not run then.
            **kwargs: ignored.

        Raises:
            ValueError: `contexts` together with a cache or of another length, or see `read_inputs`.
        """
        if contexts is not None:
            use_cache = False
        inputs = read_inputs(
            self,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache,
        )
        embedded_BTD = self.embed_norm(inputs.embeds_BTD)
        if contexts is None:
            state = None if inputs.cache is None else inputs.cache.layers[-1]
            contexts_LBTC = self.context_block.run(embedded_BTD, inputs.mask_BT, state)
        elif inputs.cache is not None or contexts.shape[1] != embedded_BTD.shape[1] + self.history:
            raise ValueError("contexts must cover the token before the window and the window, only")
        else:
            contexts_LBTC = self.context_block.parallel(embedded_BTD, contexts[:, :-1])
        stream_BTD = embedded_BTD
        for index, layer in enumerate(self.layers):
            read = index if self.config.context_mode == "layerwise" else -1
            stream_BTD = layer(stream_BTD, contexts_LBTC[read])
        return BaseModelOutputWithPast(last_hidden_state=stream_BTD, past_key_values=inputs.cache)


# A wide spread: with 0.02 a frozen head could say little.
_TINY = {"vocab_size": 97, "hidden_size": 24, "context_dim": 16, "initializer_range": 0.5}


@register_architecture(
    ContextTokenConfig,
    decoder=ContextTokenModel,
    tiny=(
        _TINY,
        {**_TINY, "context_mode": "final_only", "num_hidden_layers": 3},
        {**_TINY, "num_hidden_layers": 1, "freeze_context": False, "freeze_embedding": False},
    ),
)
class ContextTokenForCausalLM(ContextForCausalLM):
    """Context-Token: a recurrent context block and a token block that reads it, no attention."""

    config_class = ContextTokenConfig
    supports_gradient_checkpointing = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ContextTokenConfig):
        super().__init__(config)
        self.model = ContextTokenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze_parts()
