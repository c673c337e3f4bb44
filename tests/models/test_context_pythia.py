"""Context-Pythia against an independent form written from DESIGN 1.2 and 1.4, in fp64."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from naive_parts import attended, gelu, linear, norm, turned
from torch import Tensor
from transformers import DynamicCache

from contextlm.evaluation.memory import measure_cache
from contextlm.models.build import build_config, create_model
from contextlm.models.context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM


def naive_layer(layer, inputs: list[Tensor], heads: int, config) -> list[Tensor]:
    """One GPT-NeoX layer with parallel residual, token by token."""
    size = len(inputs[0]) // heads
    rotated = int(size * config.rotary_pct)

    def at(position: int, parts: Tensor) -> Tensor:
        """The first part of each head turned by its position."""
        first = [turned(part[:rotated], position, config.rope_theta) for part in parts]
        return torch.cat([torch.cat([f, p[rotated:]]) for f, p in zip(first, parts, strict=True)])

    keys, values, outputs = [], [], []
    for position, x in enumerate(inputs):
        qkv = linear(layer.attention.query_key_value, norm(x, layer.input_layernorm))
        query, key, value = qkv.view(heads, 3 * size).split(size, dim=1)
        keys.append(at(position, key))
        values.append(value.flatten())
        mixed = attended(at(position, query), keys, values, heads)
        inner = norm(x, layer.post_attention_layernorm)
        inner = linear(layer.mlp.dense_4h_to_h, gelu(linear(layer.mlp.dense_h_to_4h, inner)))
        outputs.append(x + linear(layer.attention.dense, mixed) + inner)
    return outputs


def naive_logits(model: ContextPythiaForCausalLM, ids: list[int]) -> Tensor:
    config, decoder = model.config, model.model
    context = torch.zeros(config.context_dim, dtype=torch.float64)
    stream = []
    for token in ids:
        embedded = norm(decoder.embed_tokens.weight[token], decoder.embed_norm)
        for layer in decoder.context_block.layers:
            update = gelu(layer.update.weight @ torch.cat([context, embedded]) + layer.update.bias)
            context = norm(context + update, layer.norm)
        if config.stream == "projected":
            stream.append(decoder.projection.weight @ context + decoder.projection.bias)
        else:
            stream.append(context)
    for layer in decoder.layers:
        stream = naive_layer(layer, stream, config.num_attention_heads, config)
    return torch.stack([model.lm_head.weight @ norm(x, decoder.final_layer_norm) for x in stream])


@pytest.mark.parametrize("stream", ["compressed", "projected"])
@pytest.mark.parametrize("layers", [1, 2])
def test_logits_equal_the_naive_form(stream, layers):
    torch.manual_seed(3)
    config = ContextPythiaConfig(
        vocab_size=31,
        hidden_size=24,
        context_dim=16,
        context_layers=layers,
        stream=stream,
        num_hidden_layers=2,
        num_attention_heads=2,
        rotary_pct=0.5,
    )
    model = ContextPythiaForCausalLM(config).double().eval()
    for parameter in model.parameters():  # biases and norms must matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(31, (1, 13))
    expected = naive_logits(model, ids[0].tolist())
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("stream", "total", "trainable"),
    [("projected", 70_756_608, 70_559_232), ("compressed", 43_570_944, 43_373_568)],
)
def test_parameter_counts_of_the_document(stream, total, trainable):
    with torch.device("meta"):
        model = ContextPythiaForCausalLM(ContextPythiaConfig(stream=stream))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize(
    ("stream", "keys_and_values"), [("projected", 3_145_728), ("compressed", 1_572_864)]
)
def test_cache_of_the_document_at_128_tokens(stream, keys_and_values):
    """Full widths and depth; the vocabulary does not matter for the cache and is kept small."""
    model = ContextPythiaForCausalLM(ContextPythiaConfig(vocab_size=64, stream=stream))
    (entry,) = measure_cache(model, [128], torch.device("cpu"))
    state = 256 * 4 + 8  # the context in float32, and the row's count of tokens
    assert entry.logical == entry.resident == keys_and_values + state


def test_the_baselines_cache_at_128_tokens():
    fields = {"type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 6}
    fields |= {"num_attention_heads": 8, "intermediate_size": 2048}
    model = create_model(build_config(fields, 64), seed=0)
    (entry,) = measure_cache(model, [128], torch.device("cpu"))
    assert entry.logical == entry.resident == 3_145_728


def test_foreign_caches_and_cropping_are_refused():
    model = ContextPythiaForCausalLM(
        ContextPythiaConfig(vocab_size=31, hidden_size=16, context_dim=8, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="needs its own cache"):
        model(torch.tensor([[1, 2]]), past_key_values=DynamicCache(), use_cache=True)
    cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_autocast_leaves_the_recurrence_in_float32():
    torch.manual_seed(0)
    model = ContextPythiaForCausalLM(
        ContextPythiaConfig(vocab_size=31, hidden_size=16, context_dim=8, num_attention_heads=2)
    ).eval()
    ids = torch.randint(31, (2, 9))
    plain = model(ids, use_cache=True).past_key_values.layers[-1].state
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, use_cache=True).past_key_values.layers[-1].state
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tie_word_embeddings": True}, "256 is not 512"),
        ({"rotary_pct": 2.0}, "rotary_pct"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"context_dim": 300}, r"num_attention_heads \(8\) must divide context_dim \(300\)"),
    ],
)
def test_values_that_make_no_model_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ContextPythiaConfig(**fields)
