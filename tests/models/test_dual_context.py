"""Dual-context attention against a buffer that is filled token by token (DESIGN 1.5), in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from naive_parts import attended, gelu, linear, norm
from torch import Tensor

from contextlm.evaluation.memory import measure_cache
from contextlm.models.build import build_config, meta_model
from contextlm.models.dual_context import DualContextConfig, DualContextForCausalLM

SMALL = {
    "vocab_size": 31,
    "hidden_size": 12,
    "base_layers": 2,
    "num_attention_heads": 3,
    "window": 6,
    "num_positions": 9,
    "dropout": 0.0,
}


def make_model(**fields) -> DualContextForCausalLM:
    """A small model whose biases, norms and gates matter."""
    torch.manual_seed(0)
    model = DualContextForCausalLM(DualContextConfig(**{**SMALL, **fields})).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def conv1d(x: Tensor, module) -> Tensor:
    return x @ module.weight + module.bias


class NaiveDualContext:
    """A literal buffer: what overflows W is taken out, half a window at a time."""

    def __init__(self, module, config) -> None:
        self.module, self.config = module, config
        self.buffer: list[Tensor] = []
        self.representatives: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        module, config, heads = self.module, self.config, self.config.num_attention_heads
        self.buffer.append(hidden)
        if len(self.buffer) > config.window:
            half = config.window // 2
            span, self.buffer = self.buffer[:half], self.buffer[half:]
            first, _, _, second, last_norm = module.representative
            mean = sum(span) / half
            self.representatives.append(norm(linear(second, gelu(linear(first, mean))), last_norm))
            if len(self.representatives) > config.max_representatives:
                self.representatives.pop(0)
        query = linear(module.query, hidden)
        keys = [linear(module.local_key, h) for h in self.buffer]
        mixed = attended(query, keys, [linear(module.local_value, h) for h in self.buffer], heads)
        if self.representatives:
            keys = [linear(module.past_key, r) for r in self.representatives]
            past = attended(query, keys, self.representatives, heads)
            gate = 1 / (1 + math.exp(-float(module.gate)))
            mixed = gate * mixed + (1 - gate) * past
        return linear(module.out, mixed)


class NaiveSegment:
    """GPT-2's attention that starts anew every W tokens."""

    def __init__(self, module, config) -> None:
        self.module, self.config = module, config
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        if len(self.keys) == self.config.window:
            self.keys, self.values = [], []
        query, key, value = conv1d(hidden, self.module.c_attn).chunk(3)
        self.keys.append(key)
        self.values.append(value)
        mixed = attended(query, self.keys, self.values, self.config.num_attention_heads)
        return conv1d(mixed, self.module.c_proj)


@torch.no_grad()
def naive_logits(model: DualContextForCausalLM, ids: list[int]) -> Tensor:
    """Token after token."""
    config, body = model.config, model.model
    integrated = config.placement == "integrated"
    kind = NaiveDualContext if integrated else NaiveSegment
    attentions = [kind(layer.attn, config) for layer in body.layers]
    appended = None if integrated else NaiveDualContext(body.appended.attn, config)
    logits = []
    for index, token in enumerate(ids):
        place = body.embed_positions.weight[index % config.window]
        h = body.embed_tokens.weight[token] + place
        for layer, attention in zip(body.layers, attentions, strict=True):
            h = h + attention(norm(h, layer.ln_1))
            inner = gelu_tanh(conv1d(norm(h, layer.ln_2), layer.mlp.c_fc))
            h = h + conv1d(inner, layer.mlp.c_proj)
        h = norm(h, body.final_layer_norm)
        if appended is not None:
            h = h + appended(h)
            norm_a, norm_b, up, _, down, _ = body.appended.feed_forward
            h = h + linear(down, gelu(linear(up, norm(norm(h, norm_a), norm_b))))
        logits.append(body.embed_tokens.weight @ h)
    return torch.stack(logits)


@pytest.mark.parametrize("window", [2, 6])
@pytest.mark.parametrize("most", [2, 64])
@pytest.mark.parametrize("placement", ["appended", "integrated"])
@torch.no_grad()
def test_a_buffer_filled_token_by_token_agrees(placement, most, window):
    model = make_model(placement=placement, max_representatives=most, window=window)
    for length in (1, window, window + 1, 5 * window + 3):
        ids = torch.randint(31, (1, length))
        expected = naive_logits(model, ids[0].tolist())
        for use_cache in (False, True):  # block by block, and with one mask
            logits = model(ids, use_cache=use_cache).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["appended", "integrated"])
def test_long_decoding_after_unequal_padding_agrees(placement):
    """Rows whose windows overflow at different steps, one of them padding only at first."""
    model = make_model(placement=placement, max_representatives=3)
    ids = torch.randint(1, 31, (3, 40))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 11)):
        mask[row, :pad] = 0
    cache, logits = None, []
    for start, end in [(0, 9), (9, 23), *((t, t + 1) for t in range(23, 40))]:
        outputs = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    decoded = torch.cat(logits, dim=1)
    assert bool(decoded.isfinite().all())
    for row, pad in enumerate((0, 5, 11)):
        expected = naive_logits(model, ids[row, pad:].tolist())
        torch.testing.assert_close(decoded[row, pad:], expected, rtol=1e-9, atol=1e-9)


def test_parameter_counts_of_the_document():
    fields = {"type": "dual_context", "hidden_size": 256, "base_layers": 4}
    model = meta_model(build_config({**fields, "num_attention_heads": 4}, 50257))
    assert sum(p.numel() for p in model.parameters()) == 17_144_065
    base = {"type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 512}
    baseline = meta_model(build_config(base, 50257))
    assert sum(p.numel() for p in baseline.parameters()) == 16_156_416


@pytest.mark.parametrize("placement", ["appended", "integrated"])
def test_l1_learns_as_soon_as_a_span_has_left(placement):
    model = make_model(placement=placement)
    window = model.config.window

    def past_gradients(length: int) -> dict[str, Tensor | None]:
        model.zero_grad()
        ids = torch.randint(31, (2, length))
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        return {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if any(part in name for part in ("representative", "gate", "past_key"))
        }

    assert all(gradient is None for gradient in past_gradients(window).values())
    # With one representative the softmax is 1 whatever the key, so past_key needs a second.
    one, two = past_gradients(window + 2), past_gradients(2 * window)
    for name, gradient in two.items():
        assert gradient is not None, name
        if name.endswith("past_key.bias"):  # adds the same to every score of a query
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)
            continue
        assert gradient.abs().sum() > 1e-6, name
        assert "past_key" in name or one[name].abs().sum() > 1e-6, name


@pytest.mark.parametrize("placement", ["appended", "integrated"])
def test_gradients_block_by_block_equal_those_with_one_mask(placement):
    model = make_model(placement=placement)
    ids = torch.randint(31, (3, 23))
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for apart, together in zip(*gradients, strict=True):
        torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-9)


def test_a_token_far_back_is_seen_through_l1_only():
    """Appended, a window of 6: token 0 reaches token 20 as part of span 0, unless it is dropped."""
    ids = torch.randint(1, 31, (1, 21))
    changed = ids.clone()
    changed[0, 0] = changed[0, 0] % 30 + 1

    def differences(most: int) -> Tensor:
        model = make_model(max_representatives=most)
        return (model(ids).logits - model(changed).logits)[0].abs().amax(-1)

    everything, newest = differences(64), differences(2)
    assert bool((everything > 1e-12).all())
    # From position 15 on, e = 4 spans have left, and of these only the spans 2 and 3 are kept.
    assert bool((newest[15:] == 0).all())


@pytest.mark.parametrize("placement", ["appended", "integrated"])
def test_memory_is_constant_once_l1_is_full(placement):
    model = make_model(placement=placement, max_representatives=5).float()
    window, width, layers = model.config.window, model.config.hidden_size, model.config.base_layers
    lengths = [4 * window, 4 * window + 1, 9 * window + 2, 200]
    sizes = measure_cache(model, lengths, torch.device("cpu"))
    dual = (window + 5) * width * 4 + 8  # hidden states and representatives; the row's count
    segment = (window - 1) * 2 * width * 4 + 8
    expected = layers * dual if placement == "integrated" else layers * segment + dual
    assert [(s.logical, s.resident) for s in sizes] == [(expected, expected)] * len(lengths)


def test_initial_weights():
    torch.manual_seed(0)
    body = DualContextForCausalLM(DualContextConfig(vocab_size=64)).model
    block, attention = body.layers[0], body.appended.attn
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for scaled in (block.attn.c_proj, block.mlp.c_proj):
        assert scaled.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
    assert attention.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert attention.query.bias.abs().max() == 0
    assert attention.gate.tolist() == [0.0]
    assert body.embed_positions.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_dropout_is_everywhere_or_nowhere():
    ids = torch.randint(31, (2, 20))
    for dropout, same in ((0.0, True), (0.5, False)):
        model = make_model(dropout=dropout).train()
        assert torch.equal(model(ids).logits, model(ids).logits) is same


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 7}, "window must be even and at least 2, got 7"),
        ({"window": 514}, r"num_positions \(512\) must be at least window \(514\)"),
        ({"max_representatives": 0}, "max_representatives"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ({"num_attention_heads": 3}, r"num_attention_heads \(3\) must divide hidden_size \(256\)"),
    ],
)
def test_values_that_make_no_model_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        DualContextConfig(**fields)
