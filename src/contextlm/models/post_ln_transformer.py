"""Post-LN transformer: the attention baseline that the context-vector model is compared with.

Source: the report 002_8f966a5df4c05745 and its author's code (DESIGN 1.1). Layer norms stand behind
the residual sums, as in the first transformers::

    x = drop(E[token] + P)
    x = LN(x + drop(attention(x)))              dropout on the attention weights too
    x = LN(x + drop(W_2 drop(GELU(W_1 x))))     once per layer, both lines
    logits = W_o LN(x) + b_o                    not tied
"""

from typing import Any

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from contextlm.models.attention import attend, same_document
from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import CACHE, CroppableLayer, KeyValueLayer
from contextlm.models.config import ContextConfig
from contextlm.models.inputs import NewTokens


@strict
class PostLNTransformerConfig(ContextConfig):
    """Configuration of the post-LN transformer; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding and of the layers.
        num_hidden_layers: layers.
        num_attention_heads: heads of each, which must divide the width.
        intermediate_size: width of the feed-forward part.
        dropout: on the embedding, on the attention weights, inside the feed-forward part and on
            what both sublayers add.
        max_position_embeddings: learned positions.
        layer_norm_eps: of every layer norm.
    """

    model_type = "post_ln_transformer"

    vocab_size: int = 1000
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    dropout: float | int = 0.1
    max_position_embeddings: int = 32
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: the heads do not divide the width, or a size is not positive.
        """
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        self.check_counts(*sizes, "intermediate_size", "max_position_embeddings")
        self.check_positive("initializer_range", "layer_norm_eps")
        self.check_dropout("dropout")
        self.check_divides("num_attention_heads", "hidden_size")


class PostLNAttention(nn.Module):
    """Multi-head self-attention, causal; `layer_idx` is its place in the cache."""

    def __init__(self, config: PostLNTransformerConfig, layer_idx: int):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, x_BTD: Tensor, mask: Any, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds, ``[B, T, D]``, and its weights where the backend has them.

        The mask is as `create_causal_mask` makes it; a cache is extended and attended to.
        """
        query_BHTE = self._split(self.query(x_BTD))
        key_BHSE, value_BHSE = self._split(self.key(x_BTD)), self._split(self.value(x_BTD))
        if past_key_values is not None:
            key_BHSE, value_BHSE = past_key_values.update(key_BHSE, value_BHSE, self.layer_idx)
        dropout = self.config.dropout
        mixed, weights = attend(
            self, query_BHTE, key_BHSE, value_BHSE, mask, dropout=dropout, **kwargs
        )
        return self.output(mixed), weights

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class PostLNLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward part, each followed by residual sum and layer norm."""

    def __init__(self, config: PostLNTransformerConfig, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = PostLNAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.dense_in = nn.Linear(width, config.intermediate_size)
        self.dense_out = nn.Linear(config.intermediate_size, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Tensor, mask: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        """The stream behind the layer, ``[B, T, D]``; arguments as in `PostLNAttention`."""
        added_BTD, _ = self.attention(x_BTD, mask, past_key_values, **kwargs)
        x_BTD = self.attention_norm(x_BTD + self.dropout(added_BTD))
        added_BTD = self.dense_out(self.dropout(F.gelu(self.dense_in(x_BTD))))
        return self.feed_forward_norm(x_BTD + self.dropout(added_BTD))


class PostLNTransformerModel(ContextDecoder):
    """Embedding and post-LN layers, without the head."""

    config_class = PostLNTransformerConfig
    _no_split_modules = ["PostLNLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PostLNLayer, "attentions": PostLNAttention}
    _supports_flash_attn = _supports_flex_attn = True
    reads_packed = True

    def __init__(self, config: PostLNTransformerConfig):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            PostLNLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: keys and values per layer, and each row's count of tokens."""
        return Cache(layers=[*(KeyValueLayer() for _ in self.layers), CroppableLayer()])

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``; a `ValueError` for more tokens than learned positions."""
        positions_BT = new.table_positions(self.embed_positions.num_embeddings)
        x_BTD = self.dropout(embeds_BTD + self.embed_positions(positions_BT))
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=new.attention_mask,
            and_mask_function=same_document(new),
            **{CACHE: new.cache},
        )
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask, past_key_values=new.cache, **kwargs)
        if new.cache is not None:
            new.cache.layers[-1].advance(new)
        return self.final_layer_norm(x_BTD)


@register_architecture(
    tiny=(
        {
            "vocab_size": 97,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "dropout": 0.0,
        },
    ),
)
class PostLNTransformerForCausalLM(ContextForCausalLM):
    """Post-LN transformer: multi-head attention, layer norms behind the sums, learned positions."""

    decoder_class = PostLNTransformerModel
    head_bias = True
