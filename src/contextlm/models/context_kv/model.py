"""Context-KV attention: one attention layer over a few recurrent contexts instead of all tokens.

Source: the report 001_f3bf7a45855b552b (DESIGN 1.3)::

    e_i = LN(E[token_i]);  c_i = context block
    K, V from c_i, c_{i-s}, c_{i-2s}, ...                    M = max_contexts of them
    h_i = LN(e_i + W_out attention(W_q e_i, K, V))           dropout on the attention weights
    y_i = h_i + LN(W_2 GELU(W_1 h_i))                        the norm inside the residual branch
    logits_i = y_i E^T                                       tied to the embedding, no bias

Contexts before the first token are zero vectors that take part (``padding="zeros"``) or are left
out (``"mask"``). ``anchor="grid"`` reads the multiples of s instead, so that decoding keeps one
context in s. ``memory="tokens"`` is the attention baseline: the layer reads the last s*M token
embeddings, and there is no context block; decoding keeps their keys and values.

Shape suffixes: B batch, T tokens, S memory entries, D embedding width, C an entry's width (that of
the context, or D), V vocabulary.
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

from contextlm.models.alignment import RealFirst
from contextlm.models.base import (
    ContextForCausalLM,
    ContextPreTrainedModel,
    mark_frozen,
    register_architecture,
)
from contextlm.models.cache import ContextStateLayer, RecentLayer
from contextlm.models.config_checks import check_counts, check_dropout, check_positive
from contextlm.models.context_kv.cache import GridLayer, read_positions
from contextlm.models.context_kv.layer import (
    ContextAttention,
    ContextKVLayer,
    Memory,
    TokenAttention,
    TokenWindow,
)
from contextlm.models.inputs import DecoderInputs, read_inputs
from contextlm.models.layers import ContextBlock


@strict
class ContextKVConfig(PreTrainedConfig):
    """Configuration of Context-KV attention; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding and of the attention layer.
        context_dim: C, the width of the context.
        context_layers: layers of the context block.
        freeze_context: the block learns in phase 1 only.
        freeze_embedding: embedding (and with it the tied head) and its norm never learn.
        num_attention_heads: heads, which must divide `hidden_size`.
        intermediate_size: width of the feed-forward part; None is four times D.
        interval: s, positions from one context that is read to the next.
        max_contexts: M, contexts read by a position, its own included.
        padding: whether missing contexts take part as zero vectors or are left out.
        anchor: where the earlier contexts lie: i - s, i - 2s, ... or at multiples of s.
        memory: whether contexts are read, or the last s*M token embeddings.
        attention_dropout: on the attention weights.
        hidden_dropout: on the outputs of attention and feed-forward part.
        initializer_range: standard deviation of the linear layers and the embedding.
        layer_norm_eps: of every layer norm.
        use_cache: return a cache by default.
    """

    model_type = "context_kv"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 768
    context_dim: int = 256
    context_layers: int = 1
    freeze_context: bool = True
    freeze_embedding: bool = True
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    interval: int = 20
    max_contexts: int = 32
    padding: Literal["zeros", "mask"] = "zeros"
    anchor: Literal["position", "grid"] = "position"
    memory: Literal["contexts", "tokens"] = "contexts"
    attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.0
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
            ValueError: the heads do not divide the width, or a value is out of its range.
        """
        check_counts(self, "vocab_size", "hidden_size", "context_dim", "context_layers")
        check_counts(self, "num_attention_heads", "interval", "max_contexts", "intermediate_size")
        check_positive(self, "initializer_range", "layer_norm_eps")
        check_dropout(self, "attention_dropout", "hidden_dropout")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"hidden_size ({self.hidden_size})"
            )


def _attention(config: ContextKVConfig) -> ContextAttention | TokenAttention:
    """The attention to contexts; to tokens, with the same reach but an interval of 1."""
    tokens = config.memory == "tokens"
    kind = TokenAttention if tokens else ContextAttention
    return kind(
        config.hidden_size,
        config.hidden_size if tokens else config.context_dim,
        config.num_attention_heads,
        interval=1 if tokens else config.interval,
        size=config.interval * config.max_contexts if tokens else config.max_contexts,
        anchor="position" if tokens else config.anchor,
        padding=config.padding,
        dropout=config.attention_dropout,
    )


class ContextKVModel(ContextPreTrainedModel):
    """Embedding, context block and attention layer, without the head.

    Attributes:
        history: contexts before a window that `forward` needs beside the window's own when
            contexts come from a store; 0 where the memory is tokens.
        history_tokens: tokens before a window that its logits depend on and that must therefore
            stand in front of it; 0 where the memory is contexts.
    """

    config_class = ContextKVConfig
    supports_gradient_checkpointing = False  # one layer, small beside the logits
    _no_split_modules = ["ContextBlock", "ContextKVLayer"]
    _can_compile_fullgraph = True
    reads_only_last = True

    def __init__(self, config: ContextKVConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.history = self.history_tokens = 0
        if config.memory == "tokens":
            self.history_tokens = config.interval * config.max_contexts - 1
        else:
            self.history = config.interval * (config.max_contexts - 1)
            self.context_block = ContextBlock(
                config.context_dim,
                config.hidden_size,
                config.context_layers,
                config.layer_norm_eps,
                frozen=config.freeze_context,
            )
        self.layer = ContextKVLayer(
            _attention(config),
            config.intermediate_size or 4 * config.hidden_size,
            config.hidden_dropout,
            config.layer_norm_eps,
        )
        mark_frozen(config.freeze_embedding, self.embed_tokens, self.embed_norm)
        self.freeze_parts()
        self.post_init()

    def embed_normalised(self, input_ids: Tensor) -> Tensor:
        """Token embeddings as the context block reads them, ``[..., D]``."""
        return self.embed_norm(self.embed_tokens(input_ids))

    def new_cache(self) -> Cache:
        """An empty cache: the memory that later tokens can still read, and the context."""
        if self.config.memory == "tokens":
            return Cache(layers=[RecentLayer(self.history_tokens)])
        if self.config.anchor == "grid":
            memory = GridLayer(self.config.interval, self.config.max_contexts - 1)
            return Cache(layers=[memory, ContextStateLayer()])
        return Cache(layers=[RecentLayer(self.history), ContextStateLayer()])

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
        last: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]``; see `ContextForCausalLM.forward`.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]``, or None.
            position_ids: ``[B, T]``; used with `contexts` only: its first column is the position of
                each row's window in its stream.
            past_key_values: the cache.
            inputs_embeds: ``[B, T, D]`` instead of tokens.
            use_cache: return a cache.
            contexts: ``[B, history + T, C]`` of a context store, those of the positions before the
                window (zeros before the stream's start) and of the window's own; the recurrence is
                not run then.
            last: how many hidden states are wanted, 0 for all. Without padding only the last so
                many are given; the tokens before them only bring what these read.
            **kwargs: ignored.

        Raises:
            ValueError: `contexts` together with a cache or padding, without `position_ids`, of
                another length or for token memory; or see `read_inputs`.
        """
        cached = use_cache if contexts is None else False
        inputs = read_inputs(
            self, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, cached
        )
        embedded_BTD = self.embed_norm(inputs.embeds_BTD)
        if contexts is not None:
            start_B = self._check_store(contexts, position_ids, inputs)
            memory = Memory(contexts.to(embedded_BTD.dtype), start_B)
            return BaseModelOutputWithPast(last_hidden_state=self.layer(embedded_BTD, memory))
        if self.config.memory == "tokens":
            state = None if inputs.cache is None else inputs.cache.layers[0]
            window = TokenWindow(embedded_BTD, inputs.mask_BT, state)
            hidden_BTD = self.layer(embedded_BTD[:, -last:], window)
        else:
            order = RealFirst.of(inputs.mask_BT)
            memory = self._memory(embedded_BTD, inputs, order)
            tokens = embedded_BTD.shape[1]
            # With padding, a row's last token may stand anywhere once real ones are in front.
            if 0 < last < tokens and inputs.mask_BT is None:
                memory = memory.of_last(last, tokens, self.history)
                embedded_BTD = embedded_BTD[:, -last:]
            hidden_BTD = order.undo(self.layer(order.apply(embedded_BTD), memory))
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=inputs.cache)

    def _memory(self, embedded_BTD: Tensor, inputs: DecoderInputs, order: RealFirst) -> Memory:
        """The contexts that the attention is to read, real tokens first; moves the cache on."""
        cache, seen_B = inputs.cache, inputs.seen_B
        state = None if cache is None else cache.layers[-1]
        contexts_BTC = self.context_block.run(embedded_BTD, inputs.mask_BT, state)[-1]
        entries_BTC = order.apply(contexts_BTC)
        if cache is None:
            return Memory(entries_BTC)
        layer, tokens = cache.layers[0], entries_BTC.shape[1]
        both_BSC = layer.append(entries_BTC, inputs.mask_BT)
        if seen_B is None:
            return Memory(entries_BTC)
        kept = both_BSC.shape[1] - tokens
        if isinstance(layer, GridLayer):
            return Memory(both_BSC, reading=layer.read(seen_B, kept, tokens))
        if tokens > 1:
            return Memory(both_BSC, seen_B)
        attention = self.layer.attention
        reading = read_positions(seen_B, kept, tokens, attention.interval, attention.size)
        return Memory(both_BSC, reading=reading)

    def _check_store(
        self, contexts: Tensor, position_ids: Tensor | None, inputs: DecoderInputs
    ) -> Tensor:
        """The windows' starts, ``[B]``, once contexts of a store are found to fit them."""
        expected = self.history + inputs.embeds_BTD.shape[1]
        if self.config.memory == "tokens":
            raise ValueError("memory 'tokens' reads no contexts")
        if inputs.cache is not None or inputs.mask_BT is not None:
            raise ValueError("contexts of a store go together with neither a cache nor padding")
        if position_ids is None:
            raise ValueError("contexts of a store need position_ids, which say where windows start")
        if contexts.shape[1] != expected:
            raise ValueError(
                f"contexts must cover {self.history} positions before the window and the window, "
                f"{expected} in all, got {contexts.shape[1]}"
            )
        return position_ids[:, 0]


# A wide spread: with 0.02 a frozen head could say little.
_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "context_dim": 16,
    "num_attention_heads": 2,
    "interval": 3,
    "max_contexts": 3,
    "initializer_range": 0.3,
}


@register_architecture(
    ContextKVConfig,
    decoder=ContextKVModel,
    tiny=(
        _TINY,
        {**_TINY, "padding": "mask", "freeze_embedding": False},
        {**_TINY, "anchor": "grid", "context_layers": 2, "freeze_context": False},
        {**_TINY, "anchor": "grid", "padding": "mask"},
        {**_TINY, "memory": "tokens"},
    ),
)
class ContextKVForCausalLM(ContextForCausalLM):
    """Context-KV: one attention layer over a few recurrent contexts instead of all tokens."""

    config_class = ContextKVConfig
    supports_gradient_checkpointing = False
    _no_split_modules = ["ContextBlock", "ContextKVLayer"]
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ContextKVConfig):
        super().__init__(config)
        self.model = ContextKVModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze_parts()
