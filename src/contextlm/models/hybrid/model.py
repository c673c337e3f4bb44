"""Context hybrid: layers whose mixers are recurrent contexts, windows of attention, or latents.

The reports' own list of what might help a recurrent context (gates, a short-term memory beside the
long-term one, several contexts, sparse attention), built from published parts (DESIGN 2). A string
names each layer's mixer, for example ``RWRW``:

- **R**, gated recurrent context (`models.gated_recurrence`; Griffin's RG-LRU): long-term, 4 D
  numbers at 4 taps;
- **W**, windowed attention (`models.windowed_attention`; multi-query): short-term and precise;
- **L**, latent attention (`models.latent_attention`; MLA): all tokens, one latent each.

Around each mixer, as in Llama and Griffin::

    x = x + mixer(RMSNorm(x))
    x = x + W_2 (SiLU(W_1 x') * W_3 x'),  x' = RMSNorm(x)       once per layer, both lines
    logits = W_o RMSNorm(x)

Without an L, memory is constant whatever the length of the text.

Shape suffixes: B batch, T new tokens, D width, V vocabulary.
"""

# No `from __future__ import annotations` here: transformers checks configuration values against the
# annotations, which must then be types and not strings.
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from contextlm.models.base import (
    ContextForCausalLM,
    ContextPreTrainedModel,
    register_architecture,
)
from contextlm.models.cache import RowStateLayer
from contextlm.models.config_checks import check_counts, check_positive
from contextlm.models.hybrid.cache import LatentLayer, RecurrenceLayer, WindowLayer
from contextlm.models.hybrid.latent import LatentAttention
from contextlm.models.hybrid.recurrence import RecurrentMixer
from contextlm.models.hybrid.window import WindowedAttention
from contextlm.models.inputs import read_inputs
from contextlm.models.layers import RMSNorm
from contextlm.models.steps import Steps

_MIXERS = "RWL"


@strict
class ContextHybridConfig(PreTrainedConfig):
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
        initializer_range: standard deviation of the linear layers and the embedding.
        rms_norm_eps: of every norm.
        use_cache: return a cache by default.
    """

    model_type = "context_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

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
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
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
        check_counts(self, "vocab_size", "hidden_size", "num_attention_heads", "head_dim")
        check_counts(self, "num_key_value_heads", "window", "latent_dim", "rope_dim")
        check_counts(self, "intermediate_size")
        check_positive(self, "rope_theta", "initializer_range", "rms_norm_eps")
        for name in ("convolution", "attention_convolution"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        heads = self.num_attention_heads
        if self.head_dim is None or "R" in self.pattern:
            self._must_divide("num_attention_heads", heads, "hidden_size", self.hidden_size)
        shared = self.num_key_value_heads
        self._must_divide("num_key_value_heads", shared, "num_attention_heads", heads)
        if "W" in self.pattern:
            self._must_divide("2", 2, "the width of a head", self.head_size)
        if "L" in self.pattern:
            self._must_divide("2", 2, "rope_dim", self.rope_dim or 0)

    def _must_divide(self, name: str, value: int, other: str, whole: int) -> None:
        if whole % value:
            shown = name if name == str(value) else f"{name} ({value})"
            raise ValueError(f"{shown} must divide {other} ({whole})")


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
    """A mixer and a feed-forward part, each behind a norm and beside a residual.

    Args:
        config: of the model.
        kind: R, W or L.
    """

    def __init__(self, config: ContextHybridConfig, kind: str):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_norm = RMSNorm(width, eps=eps)
        self.mixer = _mixer(config, kind)
        self.feed_forward_norm = RMSNorm(width, eps=eps)
        self.feed_forward = LlamaMLP(config)

    def forward(self, x_BTD: Tensor, state: RowStateLayer | None, steps: Steps) -> Tensor:
        """The stream behind the layer, ``[B, T, D]``; see `RecurrentMixer.forward`."""
        steps = steps.to(x_BTD.device)
        mixed_BTD = self.mixer(steps.align.apply(self.mixer_norm(x_BTD)), state, steps)
        x_BTD = x_BTD + steps.align.undo(mixed_BTD)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class ContextHybridModel(ContextPreTrainedModel):
    """Embedding and hybrid layers, without the head."""

    config_class = ContextHybridConfig
    _no_split_modules = ["HybridLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HybridLayer}

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

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]``; the arguments are those of `ContextForCausalLM.forward`.

        Positions are counted over each row's real tokens; `position_ids` are only checked.

        Raises:
            ValueError: neither or both of tokens and embeddings are given, the cache is foreign, or
                documents are packed.
        """
        inputs = read_inputs(
            self,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache,
        )
        steps = Steps.of(inputs)
        x_BTD = inputs.embeds_BTD
        states = [None] * len(self.layers) if inputs.cache is None else inputs.cache.layers
        for layer, state in zip(self.layers, states, strict=True):
            x_BTD = layer(x_BTD, state, steps)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=inputs.cache
        )


_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "window": 5,
    "intermediate_size": 32,
    "initializer_range": 0.1,
}


@register_architecture(
    ContextHybridConfig,
    decoder=ContextHybridModel,
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

    config_class = ContextHybridConfig
    _no_split_modules = ["HybridLayer"]
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ContextHybridConfig):
        super().__init__(config)
        self.model = ContextHybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
