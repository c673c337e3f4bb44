"""Context hybrid: layers whose mixers are recurrences, windows of attention, or latents.

The reports' own list of what might help a recurrent context (gates, a short-term memory beside the
long-term one, several contexts, sparse attention), built from published parts (DESIGN 2). A string
names each layer's mixer, for example ``sssWsss``:

- **S**, selective state (`hybrid.selective`; Mamba-2): a matrix a head;
- **R**, gated recurrent context (`hybrid.recurrence`; Griffin's RG-LRU): 4 D numbers at 4 taps;
- **K**, gated delta rule (`hybrid.delta`; Kimi Delta Attention): a matrix a head, written by keys;
- **C**, gated convolution (`hybrid.gated_convolution`; LFM2): a few tokens back;
- **W**, windowed attention (`hybrid.window`; multi-query): short-term and precise;
- **L**, latent attention (`hybrid.latent`; MLA): all tokens, one latent each;
- **G**, global latents (`hybrid.global_latents`): far tokens, of fewer bytes, perhaps pooled.

Letters of one's own: `hybrid.mixer`. Around each mixer, as in Llama and Griffin::

    x = x + mixer(RMSNorm(x))
    x = x + W_2 (SiLU(W_1 x') * W_3 x'),  x' = RMSNorm(x)       behind a capital letter only
    logits = W_o RMSNorm(x)

Memory is constant whatever the length of the text, but for L, and for G without `global_window`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import RowStateLayer
from contextlm.models.hybrid.config import ContextHybridConfig
from contextlm.models.hybrid.mixer import Mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm, is_bare
from contextlm.models.stepping import normed, product


class HybridLayer(GradientCheckpointingLayer):
    """A mixer, and perhaps a feed-forward part, each behind a norm and beside a residual."""

    def __init__(self, config: ContextHybridConfig, mixer: type[Mixer], *, feed_forward: bool):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_norm = RMSNorm(width, eps=eps)
        self.mixer = mixer(config)
        self.feed_forward_norm = RMSNorm(width, eps=eps) if feed_forward else None
        self.feed_forward = LlamaMLP(config) if feed_forward else None

    def forward(self, x_BTD: Tensor, state: RowStateLayer | None, new: NewTokens) -> Tensor:
        """The stream behind the layer, ``[B, T, D]``; see `Mixer.forward`."""
        new = new.to(x_BTD.device)
        normed_BTD = normed(self.mixer_norm, x_BTD, step=new.is_step)
        mixed_BTD = self.mixer(new.real_first(normed_BTD), state, new)
        x_BTD = x_BTD + new.as_given(mixed_BTD)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x_BTD
        normed_BTD = normed(self.feed_forward_norm, x_BTD, step=new.is_step)
        return x_BTD + self._fed_forward(self.feed_forward, normed_BTD, new)

    def _fed_forward(self, part: LlamaMLP, x_BTD: Tensor, new: NewTokens) -> Tensor:
        if not new.is_step or not is_bare(part, LlamaMLP):
            fed_BTD: Tensor = part(x_BTD)
            return fed_BTD
        gate, up = (product(each, x_BTD, step=True) for each in (part.gate_proj, part.up_proj))
        return product(part.down_proj, part.act_fn(gate) * up, step=True)


class ContextHybridModel(ContextDecoder):
    """Embedding and hybrid layers, without the head."""

    config_class = ContextHybridConfig
    _no_split_modules = ["HybridLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HybridLayer}
    reads_packed = True

    def __init__(self, config: ContextHybridConfig):
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HybridLayer(config, mixer, feed_forward=letter.isupper())
            for letter, mixer in zip(config.pattern, config.layer_mixers, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: what each layer's mixer keeps."""
        return Cache(layers=[each.new_state(self.config) for each in self.config.layer_mixers])

    @property
    def traces_borders(self) -> bool:
        """Not with a pooled G, which counts blocks from a document's beginning."""
        pools = self.config.pool > 1 and "G" in self.config.pattern.upper()
        return self.sees_borders and not pools

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``. Positions are counted; those given are only checked."""
        x_BTD = embeds_BTD
        for layer, state in zip(self.layers, new.states(len(self.layers)), strict=True):
            x_BTD = layer(x_BTD, state, new)
        return normed(self.norm, x_BTD, step=new.is_step)


_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "window": 5,
    "attention_convolution": 0,
    "intermediate_size": 32,
    "state_head_dim": 12,
    "state_size": 5,
    "initializer_range": 0.1,
}


@register_architecture(
    tiny=(
        {**_TINY, "pattern": "RW"},
        {**_TINY, "pattern": "RWL", "gates": "dense", "tie_word_embeddings": True},
        {**_TINY, "pattern": "WL", "num_key_value_heads": 2, "attention_convolution": 3},
        {**_TINY, "pattern": "RR", "gates": "none", "convolution": 0},
        {**_TINY, "pattern": "W", "window": 5000, "qk_norm": False},
        {**_TINY, "pattern": "sWs"},
        {**_TINY, "pattern": "KcG", "delta_decay": "head"},
        {**_TINY, "pattern": "gGk", "pool": 3, "attention_convolution": 2},
        {**_TINY, "pattern": "gG", "pool": 3, "global_window": 11, "attention_convolution": 2},
        {**_TINY, "pattern": "Gsg", "global_window": 6},
    ),
)
class ContextHybridForCausalLM(ContextForCausalLM):
    """Context hybrid: selective states, recurrent contexts, windows, latents, in any order."""

    decoder_class = ContextHybridModel
