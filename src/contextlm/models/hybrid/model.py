"""Context hybrid: layers whose mixers are recurrent contexts, windows of attention, or latents.

The reports' own list of what might help a recurrent context (gates, a short-term memory beside the
long-term one, several contexts, sparse attention), built from published parts (DESIGN 2). A string
names each layer's mixer, for example ``RWRW``:

- **R**, gated recurrent context (`hybrid.recurrence`; Griffin's RG-LRU): long-term, 4 D numbers at
  4 taps;
- **W**, windowed attention (`hybrid.window`; multi-query): short-term and precise;
- **L**, latent attention (`hybrid.latent`; MLA): all tokens, one latent each.

Around each mixer, as in Llama and Griffin::

    x = x + mixer(RMSNorm(x))
    x = x + W_2 (SiLU(W_1 x') * W_3 x'),  x' = RMSNorm(x)       once per layer, both lines
    logits = W_o RMSNorm(x)

Without an L, memory is constant whatever the length of the text.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import RowStateLayer
from contextlm.models.config import ContextConfig
from contextlm.models.hybrid.latent import LatentAttention, LatentLayer
from contextlm.models.hybrid.recurrence import RecurrenceLayer, RecurrentMixer
from contextlm.models.hybrid.window import WindowedAttention, WindowLayer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm

_MIXERS = "RWL"


@strict
class ContextHybridConfig(ContextConfig):
    """Configuration of the context hybrid.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the stream and of the recurrences.
        pattern: one letter a layer: R, W or L.
        num_attention_heads: query heads of W and L, and blocks of R's gates.
        num_key_value_heads: heads of keys and values of W; 1 is multi-query attention.
        head_dim: width of a head; None is `hidden_size` over the heads.
        window: tokens that W sees, the current one included.
        convolution: taps of R's convolution, the current token included; 0 leaves it out.
        attention_convolution: the same for queries, keys and values of W, and for queries, latents
            and rotary keys of L.
        gates: weights of R's gates; none leaves the gates out.
        qk_norm: RMSNorm on W's queries and keys.
        latent_dim: width of L's latent; None is four heads.
        rope_dim: width of L's rotary key, even; None is half a head, rounded up to an even number.
        rope_theta: base of the rotary frequencies.
        intermediate_size: width of the feed-forward part.
        hidden_act: its activation.
        rms_norm_eps: of every norm.
    """

    model_type = "context_hybrid"

    vocab_size: int = 50304
    hidden_size: int = 512
    pattern: str = "RWRWRW"
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int | None = None
    window: int = 64
    convolution: int = 4
    attention_convolution: int = 0
    gates: Literal["block_diagonal", "dense", "none"] = "block_diagonal"
    qk_norm: bool = True
    latent_dim: int | None = None
    rope_dim: int | None = None
    rope_theta: float | int = 10000.0
    intermediate_size: int = 1408
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    mlp_bias = False  # read by transformers' feed-forward part

    def __post_init__(self, **kwargs: Any) -> None:
        if self.latent_dim is None:
            self.latent_dim = 4 * self.head_size
        if self.rope_dim is None:
            self.rope_dim = 2 * -(-self.head_size // 4)
        super().__post_init__(**kwargs)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // max(1, self.num_attention_heads)

    @property
    def num_hidden_layers(self) -> int:
        """One for each letter of the pattern."""
        return len(self.pattern)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int | None) -> None:
        if value not in (None, len(self.pattern)):
            raise ValueError(
                f"num_hidden_layers {value}: pattern {self.pattern!r} has a letter for each "
                f"layer, {len(self.pattern)} in all; change the pattern"
            )

    @property
    def gate_blocks(self) -> int:
        """Blocks of the gates' weights: 1 is dense, 0 none."""
        return {"block_diagonal": self.num_attention_heads, "dense": 1, "none": 0}[self.gates]

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: an unknown mixer, a size that is not positive, or sizes that do not fit.
        """
        unknown = sorted(set(self.pattern) - set(_MIXERS))
        if unknown or not self.pattern:
            found = f"found {unknown[0]!r}" if unknown else "it is empty"
            raise ValueError(f"pattern {self.pattern!r}: one of {_MIXERS} a layer, {found}")
        self.check_counts("vocab_size", "hidden_size", "num_attention_heads", "head_dim")
        self.check_counts("num_key_value_heads", "window", "latent_dim", "rope_dim")
        self.check_counts("intermediate_size")
        self.check_positive("rope_theta", "initializer_range", "rms_norm_eps")
        for name in ("convolution", "attention_convolution"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.head_dim is None or "R" in self.pattern:
            self.check_divides("num_attention_heads", "hidden_size")
        self.check_divides("num_key_value_heads", "num_attention_heads")
        if "W" in self.pattern and self.head_size % 2:
            raise ValueError(f"2 must divide the width of a head ({self.head_size})")
        if "L" in self.pattern and (self.rope_dim or 0) % 2:
            raise ValueError(f"2 must divide rope_dim ({self.rope_dim})")


def _mixer(config: ContextHybridConfig, kind: str) -> nn.Module:
    if kind == "R":
        return RecurrentMixer(config.hidden_size, config.gate_blocks, config.convolution)
    return WindowedAttention(config) if kind == "W" else LatentAttention(config)


def _state(config: ContextHybridConfig, kind: str) -> RowStateLayer:
    """What a mixer keeps, empty."""
    if kind == "R":
        return RecurrenceLayer()
    if kind == "W":
        # The token that reads its window is not kept beforehand.
        return WindowLayer(config.window - 1)
    # Recurrences, windows and taps forget what a shorter text would need.
    forgets = set(config.pattern) != {"L"} or config.attention_convolution > 0
    return LatentLayer(is_croppable=not forgets)


class HybridLayer(GradientCheckpointingLayer):
    """A mixer, R, W or L, and a feed-forward part, each behind a norm and beside a residual."""

    def __init__(self, config: ContextHybridConfig, kind: str):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_norm = RMSNorm(width, eps=eps)
        self.mixer = _mixer(config, kind)
        self.feed_forward_norm = RMSNorm(width, eps=eps)
        self.feed_forward = LlamaMLP(config)

    def forward(self, x_BTD: Tensor, state: RowStateLayer | None, new: NewTokens) -> Tensor:
        """The stream behind the layer, ``[B, T, D]``; see `RecurrentMixer.forward`."""
        new = new.to(x_BTD.device)
        mixed_BTD = self.mixer(new.real_first(self.mixer_norm(x_BTD)), state, new)
        x_BTD = x_BTD + new.as_given(mixed_BTD)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


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
        self.layers = nn.ModuleList(HybridLayer(config, kind) for kind in config.pattern)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache: what each layer's mixer keeps."""
        return Cache(layers=[_state(self.config, kind) for kind in self.config.pattern])

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, D]``. Positions are counted; those given are only checked."""
        x_BTD = embeds_BTD
        for layer, state in zip(self.layers, new.states(len(self.layers)), strict=True):
            x_BTD = layer(x_BTD, state, new)
        return self.norm(x_BTD)


_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "window": 5,
    "intermediate_size": 32,
    "initializer_range": 0.1,
}


@register_architecture(
    tiny=(
        {**_TINY, "pattern": "RW"},
        {**_TINY, "pattern": "RWL", "gates": "dense", "tie_word_embeddings": True},
        {**_TINY, "pattern": "WL", "num_key_value_heads": 2, "attention_convolution": 3},
        {**_TINY, "pattern": "RR", "gates": "none", "convolution": 0},
        {**_TINY, "pattern": "W", "window": 5000, "qk_norm": False},
    ),
)
class ContextHybridForCausalLM(ContextForCausalLM):
    """Context hybrid: gated recurrent contexts, windows of attention, latents, in any order."""

    decoder_class = ContextHybridModel
