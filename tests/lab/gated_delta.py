"""A researcher's file, as it might lie anywhere: a gated delta rule between norms, a layer a mixer.

Yang et al., "Gated Delta Networks" (arXiv:2412.06464), without its convolutions, as a loop.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import ContextStateLayer
from contextlm.models.config import ContextConfig
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm


@strict
class GatedDeltaConfig(ContextConfig):
    """Configuration of the gated delta rule.

    Args:
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: of a mixer and a feed-forward part each.
        num_attention_heads: H, each with a state of D/H x D/H numbers.
        intermediate_size: width of the feed-forward part.
    """

    model_type = "gated_delta"

    vocab_size: int = 1000
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 128
    tie_word_embeddings: bool = False


class GatedDeltaLayer(nn.Module):
    def __init__(self, config: GatedDeltaConfig):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.mixer_norm, self.mlp_norm = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gates = nn.Linear(width, 2 * self.heads)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x_BTD: Tensor, state: ContextStateLayer | None, new: NewTokens) -> Tensor:
        batch, tokens, width = x_BTD.shape
        normed_BTD = self.mixer_norm(x_BTD)
        qkv = self.qkv(normed_BTD).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(2)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        keep, write = torch.sigmoid(self.gates(normed_BTD)).unsqueeze(-1).chunk(2, dim=2)
        kept = key.new_zeros(batch, self.heads, width // self.heads, width // self.heads)
        if state is not None:
            kept = state.continue_from(kept)
        read = []
        for t in range(tokens):
            faded = keep[:, t, :, None] * kept
            error = value[:, t] - (key[:, t, :, None] @ faded).squeeze(2)
            changed = faded + (write[:, t] * key[:, t]).unsqueeze(-1) * error.unsqueeze(2)
            if new.mask_BT is not None:  # padding leaves the state as it is
                changed = torch.where(new.mask_BT[:, t, None, None, None], changed, kept)
            kept = changed
            read.append((query[:, t, :, None] @ kept).flatten(1))
        if state is not None:
            state.update_state(kept, new)
        x_BTD = x_BTD + self.out(torch.stack(read, dim=1))
        return x_BTD + self.down(F.silu(self.up(self.mlp_norm(x_BTD))))


class GatedDeltaModel(ContextDecoder):
    config_class = GatedDeltaConfig
    supports_gradient_checkpointing = False
    _can_record_outputs = {"hidden_states": GatedDeltaLayer}

    def __init__(self, config: GatedDeltaConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GatedDeltaLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=1e-6)
        self.post_init()

    def new_cache(self) -> Cache:
        return Cache(layers=[ContextStateLayer() for _ in self.layers])

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        x_BTD = embeds_BTD
        for layer, state in zip(self.layers, new.states(len(self.layers)), strict=True):
            x_BTD = layer(x_BTD, state, new)
        return self.norm(x_BTD)


@register_architecture(
    tiny=(
        {
            "vocab_size": 97,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "initializer_range": 0.2,
        },
    )
)
class GatedDeltaForCausalLM(ContextForCausalLM):
    """Gated delta rule: a matrix a head that forgets, and corrects what it has stored."""

    decoder_class = GatedDeltaModel
