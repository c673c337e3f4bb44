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
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache

from contextlm.models.base import (
    ContextDecoder,
    ContextForCausalLM,
    mark_frozen,
    register_architecture,
)
from contextlm.models.cache import ContextStateLayer, EntriesLayer
from contextlm.models.config import ContextConfig
from contextlm.models.context_kv.cache import GridLayer, read_positions
from contextlm.models.context_kv.layer import (
    ContextAttention,
    ContextKVLayer,
    Memory,
    TokenAttention,
    TokenWindow,
)
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import ContextBlock


@strict
class ContextKVConfig(ContextConfig):
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
        layer_norm_eps: of every layer norm.
    """

    model_type = "context_kv"

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
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: the heads do not divide the width, or a value is out of its range.
        """
        self.check_counts("vocab_size", "hidden_size", "context_dim", "context_layers")
        self.check_counts("num_attention_heads", "interval", "max_contexts", "intermediate_size")
        self.check_positive("initializer_range", "layer_norm_eps")
        self.check_dropout("attention_dropout", "hidden_dropout")
        self.check_divides("num_attention_heads", "hidden_size")


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


class ContextKVModel(ContextDecoder):
    """Embedding, context block and attention layer, without the head.

    Attributes:
        history: contexts before a window that `forward` needs beside the window's own when
            contexts come from a store; 0 where the memory is tokens.
        history_tokens: tokens before a window that its logits depend on and that must therefore
            stand in front of it; 0 where the memory is contexts.
    """

    config_class = ContextKVConfig
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
        self.gradient_checkpointing = False
        mark_frozen(config.freeze_embedding, self.embed_tokens, self.embed_norm)
        self.freeze_parts()
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: the memory that later tokens can still read, and the context."""
        if self.config.memory == "tokens":
            return Cache(layers=[EntriesLayer(self.history_tokens)])
        if self.config.anchor == "grid":
            memory = GridLayer(self.config.interval, self.config.max_contexts - 1)
            return Cache(layers=[memory, ContextStateLayer()])
        return Cache(layers=[EntriesLayer(self.history), ContextStateLayer()])

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``, or without padding of the last tokens wanted only.

        The tokens before these only bring what they read. Positions matter with stored contexts
        only: the first column of `position_ids` is each window's position in its stream.

        Raises:
            ValueError: stored contexts together with padding or without `position_ids`.
        """
        embedded_BTD = self.embed_norm(embeds_BTD)
        if self.config.memory == "tokens":
            (state,) = new.states(1)
            window = TokenWindow(embedded_BTD, new, state)
            return self.layer(embedded_BTD[:, -new.last :], *window)
        if new.contexts is not None:
            if new.mask_BT is not None:
                raise ValueError("contexts of a store do not go together with padding")
            if new.position_ids is None:
                raise ValueError("contexts of a store need position_ids: where do windows start?")
            memory = Memory(new.contexts.to(embedded_BTD.dtype), new.position_ids[:, 0])
            return self.layer(embedded_BTD, *memory)
        memory = self._memory(embedded_BTD, new)
        # With padding, a row's last token may stand anywhere once real ones are in front.
        if 0 < new.last < new.tokens and new.mask_BT is None:
            memory = memory.of_last(new.last, new.tokens, self.history)
            embedded_BTD = embedded_BTD[:, -new.last :]
        return new.as_given(self.layer(new.real_first(embedded_BTD), *memory))

    def _memory(self, embedded_BTD: Tensor, new: NewTokens) -> Memory:
        """The contexts that the attention is to read, real tokens first; moves the cache on."""
        layer, state = new.states(2)
        contexts_BTC = self.context_block.run(embedded_BTD, new, state)[-1]
        entries_BTC = new.real_first(contexts_BTC)
        if layer is None:
            return Memory(entries_BTC)
        both_BSC = layer.append(entries_BTC, new)
        if new.seen_B is None:
            return Memory(entries_BTC)
        kept = both_BSC.shape[1] - new.tokens
        if isinstance(layer, GridLayer):
            return Memory(both_BSC, reading=layer.read(new, kept))
        if new.tokens > 1:
            return Memory(both_BSC, new.seen_B)
        attention = self.layer.attention
        reading = read_positions(new, kept, attention.interval, attention.size)
        return Memory(both_BSC, reading=reading)


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

    decoder_class = ContextKVModel
