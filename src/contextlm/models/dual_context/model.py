"""DCA-LLM: GPT-2 with dual-context attention, of unlimited length and constant memory.

Source: the report 000_39ffc4a62d9fc6b5 (DESIGN 1.5). With ``placement="appended"`` GPT-2's layers
see only the segment of W tokens that a token is in, and one more layer behind them carries
information further. With ``placement="integrated"`` dual-context attention replaces the attention
of every layer.
"""

import math
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.pytorch_utils import Conv1D

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import EntriesLayer
from contextlm.models.config import ContextConfig
from contextlm.models.dual_context.attention import (
    DualContextAttention,
    DualContextLayer,
    Past,
    Recent,
    SegmentAttention,
    Views,
)
from contextlm.models.inputs import NewTokens


@strict
class DualContextConfig(ContextConfig):
    """Configuration of DCA-LLM; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D.
        base_layers: GPT-2 layers.
        num_attention_heads: heads of each, and of dual-context attention.
        window: W, even: the most tokens in L0, and the length of a segment.
        max_representatives: the most spans in L1; the oldest are dropped.
        placement: one layer behind the base's, or in place of the base's attention.
        num_positions: rows of the position table, of which the first W are used, at any length;
            the document has 512.
        dropout: of the attention weights, the embedding and each sublayer, as in GPT-2, and
            inside the representatives' network.
        layer_norm_epsilon: of every layer norm.
        initializer_range: standard deviation of embeddings and linear layers; GPT-2's own
            projections into the residual stream start smaller, as in GPT-2.
    """

    model_type = "dual_context"
    attribute_map = {"num_hidden_layers": "base_layers"}

    vocab_size: int = 50257
    hidden_size: int = 256
    base_layers: int = 4
    num_attention_heads: int = 4
    window: int = 128
    max_representatives: int = 64
    placement: Literal["appended", "integrated"] = "appended"
    num_positions: int = 512
    dropout: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def base_config(self) -> GPT2Config:
        """The configuration of the GPT-2 layers."""
        return GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.num_positions,
            n_embd=self.hidden_size,
            n_layer=self.base_layers,
            n_head=self.num_attention_heads,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            layer_norm_epsilon=self.layer_norm_epsilon,
            initializer_range=self.initializer_range,
            bos_token_id=None,
            eos_token_id=None,
        )

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: a value is out of range, or the heads do not divide the width.
        """
        sizes = ("vocab_size", "hidden_size", "base_layers", "num_attention_heads")
        self.check_counts(*sizes, "max_representatives")
        if self.window < 2 or self.window % 2:
            raise ValueError(f"window must be even and at least 2, got {self.window}")
        if self.num_positions < self.window:
            raise ValueError(
                f"num_positions ({self.num_positions}) must be at least window ({self.window})"
            )
        self.check_positive("layer_norm_epsilon", "initializer_range")
        self.check_dropout("dropout")
        self.check_divides("num_attention_heads", "hidden_size")


class BaseBlock(GPT2Block):
    """A GPT-2 block: attention within segments, or dual-context attention in its place."""

    def __init__(self, config: GPT2Config, layer_idx: int, integrated: bool):
        super().__init__(config, layer_idx)
        attention = DualContextAttention if integrated else SegmentAttention
        self.attn = attention(config)

    def forward(self, hidden_BTD: Tensor, state: EntriesLayer | None, views: Views) -> Tensor:
        """The stream behind the block, ``[B, T, D]``."""
        hidden_BTD = hidden_BTD + self.attn(self.ln_1(hidden_BTD), state, views)
        return hidden_BTD + self.mlp(self.ln_2(hidden_BTD))


class AppendedBlock(GradientCheckpointingLayer):
    """The layer behind GPT-2's last norm: dual-context attention and a feed-forward part."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.attn = DualContextAttention(config)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, eps=eps),
            nn.LayerNorm(width, eps=eps),  # two in a row, as the document's total has it
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.resid_pdrop),
        )

    def forward(self, hidden_BTD: Tensor, state: DualContextLayer | None, views: Views) -> Tensor:
        """The stream behind the layer, ``[B, T, D]``."""
        hidden_BTD = hidden_BTD + self.attn(hidden_BTD, state, views)
        return hidden_BTD + self.feed_forward(hidden_BTD)


class DualContextModel(ContextDecoder):
    """Embeddings, GPT-2 layers and dual-context attention, without the head."""

    config_class = DualContextConfig
    _no_split_modules = ["BaseBlock", "AppendedBlock"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": [BaseBlock, AppendedBlock]}

    def __init__(self, config: DualContextConfig):
        super().__init__(config)
        base = config.base_config()
        base._attn_implementation = config._attn_implementation
        self.base_config = base
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.num_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        integrated = config.placement == "integrated"
        self.layers = nn.ModuleList(
            BaseBlock(base, index, integrated) for index in range(config.base_layers)
        )
        for module in self.layers.modules():
            # transformers hands `_init_weights` no module that has no weights of its own, so the
            # projections themselves must say what they are.
            if isinstance(module, (SegmentAttention, GPT2MLP)):
                module.c_proj.adds_to_stream = True
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.appended = None if integrated else AppendedBlock(base)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: one layer for each that attends; none grows beyond the window."""
        window, layers = self.config.window, self.config.base_layers
        if self.config.placement == "integrated":
            return Cache(layers=[DualContextLayer(window) for _ in range(layers)])
        segments = [EntriesLayer(window - 1) for _ in range(layers)]
        return Cache(layers=[*segments, DualContextLayer(window)])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initial weights for GPT-2's parts; a gate that begins in the middle."""
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            std = self.config.initializer_range
            if getattr(module, "adds_to_stream", False):
                std /= math.sqrt(2 * self.config.base_layers)  # two such sublayers in each block
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, DualContextAttention):
            init.zeros_(module.gate)

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``; positions start anew with each window of a row's text."""
        self.base_config._attn_implementation = self.config._attn_implementation
        positions_BTD = self.embed_positions(new.positions() % self.config.window)
        stream_BTD = self.dropout(embeds_BTD + positions_BTD)
        views = self._views(new)
        states = new.states(len(self.layers) + (self.appended is not None))
        for layer, state in zip(self.layers, states, strict=False):
            stream_BTD = layer(stream_BTD, state, views)
        stream_BTD = self.final_layer_norm(stream_BTD)
        if self.appended is not None:
            stream_BTD = self.appended(stream_BTD, states[-1], views)
        return stream_BTD

    def _views(self, new: NewTokens) -> Views:
        """Who sees what, for every layer."""
        window, half = self.config.window, self.config.window // 2
        segment = None
        if self.appended is not None:
            segment = Recent.of(new, block=window, before=0, limit=window - 1)
        local = Recent.of(new, block=half, before=1, limit=window)
        past = Past.of(new, half=half, most=self.config.max_representatives)
        return Views(new, segment, local, past)


_TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "base_layers": 2,
    "num_attention_heads": 2,
    "window": 6,
    "num_positions": 8,
    "dropout": 0.0,
}


@register_architecture(
    tiny=(
        _TINY,
        {**_TINY, "window": 4, "max_representatives": 2},
        {**_TINY, "window": 4, "placement": "integrated"},
        {**_TINY, "placement": "integrated", "max_representatives": 2},
    ),
)
class DualContextForCausalLM(ContextForCausalLM):
    """DCA-LLM: GPT-2 with dual-context attention to recent tokens and summaries of older spans."""

    decoder_class = DualContextModel
