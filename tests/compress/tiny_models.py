"""Tiny models of every architecture that `compress` has an adaptor for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from contextlm.models.cache import CACHE

VOCABULARY, LAYERS, WIDTH, POSITIONS = 61, 2, 32, 512

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 24}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_GROUPED),
    # SmolLM is a Llama with an odd number of heads, and its head is its embedding.
    "smollm": LlamaConfig(
        **{**_GROUPED, "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1},
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=24),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=10),
    "gemma2": Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**_GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**_GROUPED, partial_rotary_factor=0.5, sliding_window=None),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_inner=48,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=WIDTH,
    ),
}


def build(
    name_or_config: Any, implementation: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A model whose every parameter, biases too, is far from its start."""
    config = CONFIGS[name_or_config] if isinstance(name_or_config, str) else name_or_config
    config = copy.deepcopy(config)
    # Gemma 2 bounds its scores, which sdpa cannot.
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    config._attn_implementation = "eager" if softcapped else implementation or "sdpa"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype)  # now: other types draw other numbers
    model.generation_config.eos_token_id = None
    return model


def tokens(rows: int = 2, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel,
    ids: Tensor,
    sizes: list[int],
    cache: Cache | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """Logits (of a base model hidden states) in pieces (the last size repeats), and the cache."""
    logits, start, sizes = [], 0, list(sizes)
    while start < ids.shape[1]:
        end = start + (sizes.pop(0) if len(sizes) > 1 else sizes[0])
        seen = {}
        if mask is not None:
            seen["attention_mask"] = mask[:, :end]
            seen["position_ids"] = positions_of(mask)[:, start:end]
        outputs = model(ids[:, start:end], **{CACHE: cache}, use_cache=True, **seen)
        cache, start = outputs.past_key_values, end
        logits.append(outputs[0])
    assert cache is not None
    return torch.cat(logits, dim=1), cache
