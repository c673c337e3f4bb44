"""The models that decode, prefill and stream are asked about, each beside its attention baseline.

Sizes are the documents' (DESIGN 1); weights are random, which speed does not depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from contextlm.models.build import build_config, create_model
from contextlm.recipe.loading import load_recipe

# Positions of those that have a limit.
POSITIONS = 32_768 + 1024

_VECTOR = {"type": "context_vector", "positions": "none"}
_POST_LN = {
    "type": "post_ln_transformer",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": POSITIONS,
}
_GPT2 = {"type": "gpt2", "n_positions": POSITIONS}
_NEOX = {
    "type": "gpt_neox",
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": POSITIONS,
}
# The recipe frontier's.
_LLAMA = {**_NEOX, "type": "llama", "intermediate_size": 1376}
_HYBRID = {
    "type": "context_hybrid",
    "hidden_size": 512,
    "pattern": "RWRWRW",
    "num_attention_heads": 8,
    "attention_convolution": 0,
    "intermediate_size": 1584,
}
_SELECTIVE = {
    "type": "context_hybrid",
    "hidden_size": 512,
    "pattern": "ssssssssssss",
    "num_attention_heads": 8,
    "attention_convolution": 4,
}
_WINDOW = {**_SELECTIVE, "pattern": "sssssswsssss"}
_GLOBAL = {**_SELECTIVE, "pattern": "ssssssgsssss", "latent_dim": 128}
_DELTA = {**_SELECTIVE, "pattern": "sskssksskss"}
_PYTHIA = {"type": "context_pythia", "max_position_embeddings": POSITIONS}
_KV = {"type": "context_kv"}
_DUAL = {"type": "dual_context", "num_positions": 512}


@dataclass(frozen=True)
class Subject:
    """A model, the baseline it is compared with, and whether its memory is constant."""

    name: str
    model: dict[str, Any]
    vocabulary: int
    baseline: str | None = None
    constant: bool = False


SUBJECTS = (
    Subject("post-ln-transformer", _POST_LN, 1000),
    Subject("context-vector", _VECTOR, 1000, "post-ln-transformer", constant=True),
    Subject("gpt2-768x2", {**_GPT2, "n_embd": 768, "n_layer": 2, "n_head": 8}, 50_257),
    Subject("context-token", {"type": "context_token"}, 50_257, "gpt2-768x2", constant=True),
    Subject("attention-640", {**_KV, "memory": "tokens"}, 50_257, constant=True),
    Subject("context-kv", _KV, 50_257, "attention-640", constant=True),
    Subject("context-kv-grid", {**_KV, "anchor": "grid"}, 50_257, "attention-640", constant=True),
    Subject("gpt2-256x4", {**_GPT2, "n_embd": 256, "n_layer": 4, "n_head": 4}, 50_257),
    Subject("dca", {**_DUAL, "placement": "appended"}, 50_257, "gpt2-256x4", constant=True),
    Subject(
        "dca-integrated", {**_DUAL, "placement": "integrated"}, 50_257, "gpt2-256x4", constant=True
    ),
    Subject("pythia-70m", _NEOX, 50_304),
    Subject("context-pythia", {**_PYTHIA, "stream": "compressed"}, 50_304, "pythia-70m"),
    Subject("context-pythia-projected", {**_PYTHIA, "stream": "projected"}, 50_304, "pythia-70m"),
    Subject("llama-70m", _LLAMA, 50_304),
    Subject("hybrid", _HYBRID, 50_304, "llama-70m", constant=True),
    Subject("selective", _SELECTIVE, 50_304, "llama-70m", constant=True),
    Subject("selective-window", _WINDOW, 50_304, "llama-70m", constant=True),
    Subject("selective-global", _GLOBAL, 50_304, "llama-70m", constant=True),
    Subject("delta", _DELTA, 50_304, "llama-70m", constant=True),
)


def _small() -> tuple[Subject, ...]:
    recipe = load_recipe("frontier", scale="small")
    baseline = f"{recipe.baseline.name}-small"
    found = [Subject(baseline, recipe.baseline.model, 4096)]
    for each in recipe.contenders:
        if each.model["type"] == "context_hybrid" and each.name != "mha-conv-norm":
            constant = "L" not in str(each.model["pattern"]).upper()
            found.append(Subject(f"{each.name}-small", each.model, 4096, baseline, constant))
    return tuple(found)


SMALL = _small()
"""The hybrids of the recipe frontier at its small scale, where little of a token is arithmetic."""

# Widths for `stream`, where only memory is asked about, and for a smoke test.
_NARROW: dict[str, dict[str, Any]] = {
    "post_ln_transformer": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16},
    "context_vector": {"hidden_size": 32, "context_dim": 32, "mlp_size": 32, "mlp_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "context_token": {"hidden_size": 64, "context_dim": 32},
    "context_kv": {"hidden_size": 64, "context_dim": 32},
    "dual_context": {"hidden_size": 64, "base_layers": 1},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
    "llama": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32},
    "context_hybrid": {"hidden_size": 32, "intermediate_size": 32, "state_head_dim": 16},
    "context_pythia": {"hidden_size": 32, "context_dim": 16, "num_hidden_layers": 1},
}


def build(subject: Subject, *, narrow: bool = False) -> PreTrainedModel:
    """The model with random weights, in float32, ready to decode; `narrow` makes it tiny."""
    changes = _NARROW[subject.model["type"]] if narrow else {}
    vocabulary = 256 if narrow else subject.vocabulary
    return create_model(build_config({**subject.model, **changes}, vocabulary), seed=0).eval()
