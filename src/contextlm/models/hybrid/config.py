"""Configuration of the hybrid. No `from __future__ import annotations`: see `models.config`."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from contextlm.models.config import ContextConfig
from contextlm.models.hybrid.mixer import Mixer, mixers


@strict
class ContextHybridConfig(ContextConfig):
    """Configuration of the context hybrid.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the stream and of R.
        pattern: one letter a layer, the mixer's. Behind a capital letter stands a feed-forward
            part; a small one is the same mixer alone. The default had the lowest perplexity of
            those that find things far back (results/frontier.md).
        num_attention_heads: query heads of W, L and G, and blocks of R's gates.
        num_key_value_heads: heads of keys and values of W; 1 is multi-query attention.
        head_dim: width of a head of attention; None is `hidden_size` over the heads.
        window: tokens that W sees, the current one included, and that a pooled G sees unpooled.
        convolution: taps of the convolutions of R, S, K and C, the current token included; 0 leaves
            it out.
        attention_convolution: the same for queries, keys and values of W, queries, latents and
            rotary keys of L, and queries and latents of G.
        gates: weights of R's gates; none leaves the gates out.
        qk_norm: RMSNorm on W's queries and keys.
        state_size: N, numbers of state a channel of S and K.
        expand: channels of S and K, in widths of the stream.
        state_head_dim: P, channels of each of their heads.
        selective: S's B and C come from the token; if not, they are learned and the same for all.
        output_norm: RMSNorm before S's output.
        delta_decay: whether each channel of K's keys decays on its own.
        state_dtype: of the states of S and K that decoding keeps; they are computed in float32.
        latent_dim: width of the latents of L and G; None is four heads.
        global_window: tokens that G sees, the current one included; None: all, without a limit to
            what is kept.
        pool: tokens whose latents G keeps as one, once they have left the newest `window`.
        rope_dim: width of L's rotary key, even; None is half a head, rounded up to an even number.
        rope_theta: base of the rotary frequencies.
        intermediate_size: width of the feed-forward parts.
        hidden_act: their activation.
        rms_norm_eps: of every norm.
        mixer_settings: whatever mixers from outside read.
    """

    model_type = "context_hybrid"

    vocab_size: int = 50304
    hidden_size: int = 512
    pattern: str = "sssgsss"
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int | None = None
    window: int = 64
    convolution: int = 4
    attention_convolution: int = 4
    gates: Literal["block_diagonal", "dense", "none"] = "block_diagonal"
    qk_norm: bool = True
    state_size: int = 16
    expand: int = 2
    state_head_dim: int = 64
    selective: bool = True
    output_norm: bool = True
    delta_decay: Literal["channel", "head"] = "channel"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    latent_dim: int | None = None
    global_window: int | None = 8192
    pool: int = 1
    rope_dim: int | None = None
    rope_theta: float | int = 10000.0
    intermediate_size: int = 1408
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    mixer_settings: dict[str, Any] | None = None
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
    def layer_mixers(self) -> list[type[Mixer]]:
        """The mixer of each layer."""
        known = mixers()
        return [known[letter] for letter in self.pattern.upper()]

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: an unknown mixer, a size that is not positive, or sizes that do not fit.
        """
        unknown = sorted(set(self.pattern.upper()) - set(mixers()))
        if unknown or not self.pattern:
            found = f"found {unknown[0]!r}" if unknown else "it is empty"
            letters = "".join(mixers())
            raise ValueError(f"pattern {self.pattern!r}: one of {letters} a layer, {found}")
        self.check_counts("vocab_size", "hidden_size", "num_attention_heads", "head_dim")
        self.check_counts("num_key_value_heads", "window", "latent_dim", "rope_dim")
        self.check_counts("state_size", "expand", "state_head_dim", "intermediate_size")
        self.check_positive("rope_theta", "initializer_range", "rms_norm_eps")
        for name in ("convolution", "attention_convolution"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.head_dim is None:
            self.check_divides("num_attention_heads", "hidden_size")
        self.check_divides("num_key_value_heads", "num_attention_heads")
        for mixer in set(self.layer_mixers):
            mixer.check(self)
