"""The post-LN transformer against an independent form written from DESIGN 1.1, in fp64."""

from __future__ import annotations

import pytest
import torch
from naive_parts import attended, gelu, linear, norm
from torch import Tensor

from contextlm.evaluation.memory import measure_cache
from contextlm.models.post_ln_transformer import (
    PostLNTransformerConfig,
    PostLNTransformerForCausalLM,
)

SMALL = {
    "vocab_size": 31,
    "hidden_size": 15,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 13,
}


def small(**fields) -> PostLNTransformerForCausalLM:
    """A model of odd sizes whose every parameter matters."""
    torch.manual_seed(3)
    config = PostLNTransformerConfig(**{**SMALL, **fields})
    model = PostLNTransformerForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def naive_layer(layer, inputs: list[Tensor], heads: int) -> list[Tensor]:
    """One post-LN layer, token by token."""
    attention = layer.attention
    keys = [linear(attention.key, x) for x in inputs]
    values = [linear(attention.value, x) for x in inputs]
    outputs = []
    for i, x in enumerate(inputs):
        query = linear(attention.query, x)
        read = attended(query, keys[: i + 1], values[: i + 1], heads)
        x = norm(x + linear(attention.output, read), layer.attention_norm)
        fed = linear(layer.dense_out, gelu(linear(layer.dense_in, x)))
        outputs.append(norm(x + fed, layer.feed_forward_norm))
    return outputs


def naive_logits(model: PostLNTransformerForCausalLM, tokens: list[int]) -> Tensor:
    decoder = model.model
    stream = [
        decoder.embed_tokens.weight[token] + decoder.embed_positions.weight[t]
        for t, token in enumerate(tokens)
    ]
    for layer in decoder.layers:
        stream = naive_layer(layer, stream, model.config.num_attention_heads)
    return torch.stack([linear(model.lm_head, norm(x, decoder.final_layer_norm)) for x in stream])


@torch.no_grad()
def test_logits_equal_the_naive_form():
    model = small()
    ids = torch.randint(31, (2, 13))
    expected = torch.stack([naive_logits(model, row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_parameter_count_of_the_document():
    with torch.device("meta"):
        model = PostLNTransformerForCausalLM(PostLNTransformerConfig())
    assert sum(p.numel() for p in model.parameters()) == 5_260_264


def test_initial_weights():
    torch.manual_seed(0)
    model = PostLNTransformerForCausalLM(PostLNTransformerConfig())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_also_acts_on_the_attention_weights(implementation):
    model = small(dropout=0.5)
    model.set_attn_implementation(implementation)
    ids = torch.randint(31, (2, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)
    attention = model.model.layers[0].attention.train()  # no other dropout is in training
    first, second = (attention(torch.ones(1, 9, 15).double(), None, None)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_acts_on_the_embedding_and_three_times_in_a_layer():
    model = small().train()
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.1
            module.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(torch.randint(31, (4, 20)))
    assert [out.shape[-1] for out in seen] == [15, 15, 13, 15, 15, 13, 15]
    assert all(0.02 < (out == 0).double().mean() < 0.3 for out in seen)


def test_eager_attention_gives_its_weights():
    model = small()
    model.set_attn_implementation("eager")
    ids = torch.randint(31, (2, 7))
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 3, 7, 7)] * 2
    assert len(outputs.hidden_states) == 3
    for weights in outputs.attentions:
        assert torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7).double())


def test_cache_of_the_document_at_32_tokens():
    model = PostLNTransformerForCausalLM(PostLNTransformerConfig())
    (entry,) = measure_cache(model, [32, 128], torch.device("cpu"))
    keys_and_values = 2 * 6 * 32 * 256 * 4
    assert entry.tokens == 32
    assert entry.logical == entry.resident == keys_and_values + 8  # and the row's count of tokens
