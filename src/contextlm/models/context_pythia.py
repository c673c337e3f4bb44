"""Context-Pythia: GPT-NeoX layers that see recurrent contexts instead of token embeddings.

Source: the report 003_718e20eaf3f23208 (DESIGN 1.4). A normalised embedding and a context block
stand in front of ordinary GPT-NeoX layers. With ``stream="compressed"`` the layers, and so the keys
and values that decoding keeps, have the width of the context; with ``stream="projected"`` a linear
map restores the full width first, and nothing is saved.

X is the width of the layers' stream here.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXLayer,
    GPTNeoXRotaryEmbedding,
)

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import CACHE, ContextStateLayer, KeyValueLayer
from contextlm.models.config import ContextConfig
from contextlm.models.gated_recurrence import GatedContextBlock
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import ContextBlock
from contextlm.models.selective_state import MatrixStateLayer, SelectiveState


@strict
class ContextPythiaConfig(ContextConfig):
    """Configuration of Context-Pythia; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding, and of the layers when projected.
        context_dim: C, the width of the context, and of the layers when compressed.
        context: what updates the context: the document's block, or a gated recurrence
            (`models.gated_recurrence`), which has one layer, or a selective matrix state
            (`models.selective_state`), whose output it is and which phase 1 cannot train.
        context_layers: layers of the document's context block.
        state_size: N, numbers of state a channel of a selective state, which has twice as many
            channels as the context.
        state_head_dim: P, channels of each of its heads.
        freeze_context: the block learns in phase 1 only, as in the document.
        stream: what the layers see.
        num_hidden_layers: GPT-NeoX layers.
        num_attention_heads: heads of each, which must divide the stream's width.
        intermediate_size: width of the feed-forward part; None is four times the stream's width.
        hidden_act: its activation.
        max_position_embeddings: positions that the rotary embedding is meant for.
        rotary_pct: share of each head that is rotated.
        rope_theta: base of the rotary frequencies.
        attention_dropout: on the attention weights.
        hidden_dropout: on the embedding and after each sublayer.
        layer_norm_eps: of every layer norm.
    """

    model_type = "context_pythia"

    vocab_size: int = 50304
    hidden_size: int = 512
    context_dim: int = 256
    context: Literal["block", "gated_recurrence", "selective_state"] = "block"
    state_size: int = 16
    state_head_dim: int = 64
    context_layers: int = 1
    freeze_context: bool = True
    stream: Literal["projected", "compressed"] = "compressed"
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    rope_theta: float | int = 10000.0
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    @property
    def stream_size(self) -> int:
        """X, the width of the layers and of the head's input."""
        return self.context_dim if self.stream == "compressed" else self.hidden_size

    def layer_config(self) -> GPTNeoXConfig:
        """The configuration of the GPT-NeoX layers behind the context block."""
        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.stream_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size or 4 * self.stream_size,
            hidden_act=self.hidden_act,
            max_position_embeddings=self.max_position_embeddings,
            rotary_pct=self.rotary_pct,
            rotary_emb_base=self.rope_theta,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            layer_norm_eps=self.layer_norm_eps,
        )

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: the heads do not divide the stream's width, or a size is not positive.
        """
        self.check_counts("vocab_size", "hidden_size", "context_dim", "context_layers")
        self.check_counts("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        self.check_counts("intermediate_size")
        self.check_positive("rope_theta", "initializer_range", "layer_norm_eps")
        self.check_dropout("attention_dropout", "hidden_dropout")
        self.check_counts("state_size", "state_head_dim")
        if self.context != "block" and self.context_layers > 1:
            raise ValueError(
                f"context_layers must be 1 with context {self.context!r}, got {self.context_layers}"
            )
        if self.context == "selective_state":
            self.check_state_heads(2 * self.context_dim)
            if self.freeze_context:
                raise ValueError(
                    "freeze_context must be false with context 'selective_state': phase 1 cannot "
                    "train it"
                )
        if not 0 <= self.rotary_pct <= 1:
            raise ValueError(f"rotary_pct must lie in [0, 1], got {self.rotary_pct}")
        if self.tie_word_embeddings and self.stream_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings needs a stream as wide as the embedding: "
                f"{self.stream_size} is not {self.hidden_size}"
            )
        if self.stream_size % self.num_attention_heads:
            width = "context_dim" if self.stream == "compressed" else "hidden_size"
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"{width} ({self.stream_size}), the width of the {self.stream} stream"
            )


def _context_block(config: ContextPythiaConfig) -> ContextBlock:
    widths = config.context_dim, config.hidden_size
    if config.context == "gated_recurrence":
        return GatedContextBlock(*widths, frozen=config.freeze_context)
    layers, eps = config.context_layers, config.layer_norm_eps
    return ContextBlock(*widths, layers, eps, frozen=config.freeze_context)


class ContextPythiaModel(ContextDecoder):
    """Embedding, context block and GPT-NeoX layers, without the head."""

    config_class = ContextPythiaConfig
    _no_split_modules = ["GPTNeoXLayer", "ContextBlock", "GatedContextBlock", "SelectiveState"]
    _can_compile_fullgraph = True
    _supports_flash_attn = _supports_flex_attn = True
    _can_record_outputs = {
        "hidden_states": GPTNeoXLayer,
        "attentions": GPTNeoXAttention,
    }

    def __init__(self, config: ContextPythiaConfig):
        super().__init__(config)
        layer_config = config.layer_config()
        layer_config._attn_implementation = config._attn_implementation
        self.layer_config = layer_config
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.context == "selective_state":
            self.selective_context = SelectiveState(
                config.hidden_size,
                2 * config.context_dim,
                config.context_dim,
                config.state_head_dim,
                config.state_size,
                eps=config.layer_norm_eps,
            )
        else:
            self.context_block = _context_block(config)
        self.projection = (
            nn.Linear(config.context_dim, config.hidden_size)
            if config.stream == "projected"
            else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.rotary_emb = GPTNeoXRotaryEmbedding(layer_config)
        self.layers = nn.ModuleList(
            GPTNeoXLayer(layer_config, index) for index in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.stream_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.freeze_parts()
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: keys and values per layer, and the context after the last token."""
        attention = [KeyValueLayer() for _ in self.layers]
        selective = self.config.context == "selective_state"
        return Cache(layers=[*attention, MatrixStateLayer() if selective else ContextStateLayer()])

    @property
    def width(self) -> int:
        """X."""
        return self.config.stream_size

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, X]``; moves keys and values and the context on."""
        state = new.states(len(self.layers) + 1)[-1]
        embeds_BTD = self.embed_norm(embeds_BTD)
        if self.config.context == "selective_state":
            contexts_BTC = self.selective_context(new.real_first(embeds_BTD), state, new)
            contexts_BTC = new.as_given(contexts_BTC)
        else:
            contexts_BTC = self.context_block.run(embeds_BTD, new, state)[-1]
        contexts_BTC = contexts_BTC.to(self.final_layer_norm.weight.dtype)
        stream_BTX = self.dropout(self.projection(contexts_BTC))
        position_ids = new.positions() if new.position_ids is None else new.position_ids
        self.layer_config._attn_implementation = self.config._attn_implementation
        causal_mask = create_causal_mask(
            config=self.layer_config,
            inputs_embeds=stream_BTX,
            attention_mask=new.attention_mask,
            **{CACHE: new.cache},
        )
        rotary = self.rotary_emb(stream_BTX, position_ids=position_ids)
        for layer in self.layers:
            stream_BTX = layer(
                stream_BTX,
                attention_mask=causal_mask,
                position_ids=position_ids,
                layer_past=new.cache,
                position_embeddings=rotary,
                **kwargs,
            )
        return self.final_layer_norm(stream_BTX)


_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "context_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@register_architecture(
    tiny=(
        {**_TINY, "stream": "compressed"},
        {**_TINY, "stream": "projected"},
        {**_TINY, "stream": "compressed", "context_layers": 2, "freeze_context": False},
        {**_TINY, "context": "gated_recurrence", "freeze_context": False},
        {**_TINY, "context": "selective_state", "freeze_context": False, "state_head_dim": 8},
    ),
)
class ContextPythiaForCausalLM(ContextForCausalLM):
    """Context-Pythia: GPT-NeoX layers over recurrent contexts, full width or compressed."""

    decoder_class = ContextPythiaModel
