"""Context-Token against an independent form written from DESIGN 1.2, token by token in fp64."""

from __future__ import annotations

import pytest
import torch
from naive_parts import gelu, norm
from torch import Tensor

from contextlm.models.base import ReadsStoredContexts
from contextlm.models.context_token import ContextTokenConfig, ContextTokenForCausalLM

MODES = ["layerwise", "final_only"]
V, D, C = 31, 11, 7


def make(mode: str = "layerwise", layers: int = 2, **fields) -> ContextTokenForCausalLM:
    """A small model in float64 whose biases and norms matter."""
    torch.manual_seed(5)
    config = ContextTokenConfig(
        vocab_size=V,
        hidden_size=D,
        context_dim=C,
        context_mode=mode,
        num_hidden_layers=layers,
        **fields,
    )
    model = ContextTokenForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def layer_step(layer, stream: Tensor, other: Tensor) -> Tensor:
    """``LN(s + GELU(W [s ; o] + b))``; the columns of the updated stream come first."""
    update = gelu(layer.update.weight @ torch.cat([stream, other]) + layer.update.bias)
    return norm(stream + update, layer.norm)


def naive(model: ContextTokenForCausalLM, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits ``[T, V]`` and contexts ``[T, C]`` of one sequence."""
    decoder = model.model
    table = decoder.embed_tokens.weight
    state = torch.zeros(C, dtype=torch.float64)
    logits, states = [], []
    for token in ids:
        embedded = norm(table[token], decoder.embed_norm)
        outputs, context = [], state
        for layer in decoder.context_block.layers:
            context = layer_step(layer, context, embedded)
            outputs.append(context)
        state = context
        states.append(state)
        x = embedded
        for index, layer in enumerate(decoder.layers):
            read = outputs[index] if model.config.context_mode == "layerwise" else state
            x = layer_step(layer, x, read)
        logits.append(table @ x)
    return torch.stack(logits), torch.stack(states)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 19])
def test_logits_equal_the_naive_form(mode, layers, length):
    model = make(mode, layers)
    ids = torch.randint(V, (3, length))
    logits = model(ids).logits
    for row in range(3):
        expected, _ = naive(model, ids[row].tolist())
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("length", [1, 7])
def test_stored_contexts_give_the_logits_of_the_recurrence(mode, layers, length):
    """Window by window over a stream whose contexts are never reset."""
    model = make(mode, layers)
    ids = torch.randint(V, (1, 23))
    expected, states = naive(model, ids[0].tolist())
    store = torch.cat([torch.zeros(1, C, dtype=torch.float64), states])  # row i: before token i
    # All windows as the rows of one batch, in another order than in the stream.
    starts = list(range(0, 23 - length + 1, length))
    starts = starts[::2] + starts[1::2]
    windows = torch.stack([ids[0, start : start + length] for start in starts])
    contexts = torch.stack([store[start : start + length + 1] for start in starts])
    outputs = model(windows, contexts=contexts, use_cache=True)
    assert outputs.past_key_values is None
    wanted = torch.stack([expected[start : start + length] for start in starts])
    torch.testing.assert_close(outputs.logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_stored_contexts_give_the_token_layers_gradients(mode):
    model = make(mode, 3)
    ids = torch.randint(V, (1, 13))
    cotangent = torch.randn(1, 13, V, dtype=torch.float64)
    _, states = naive(model, ids[0].tolist())
    contexts = torch.cat([torch.zeros(1, C, dtype=torch.float64), states]).detach().unsqueeze(0)
    trained = list(model.model.layers.parameters())
    forms = [model(ids, contexts=contexts).logits, naive(model, ids[0].tolist())[0].unsqueeze(0)]
    actual, expected = (torch.autograd.grad((f * cotangent).sum(), trained) for f in forms)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layers", "total"), [(2, 41_822_168), (1, 40_210_540)])
def test_parameter_counts_of_the_document(mode, layers, total):
    with torch.device("meta"):
        config = ContextTokenConfig(context_mode=mode, num_hidden_layers=layers)
        model = ContextTokenForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == total
    token_layer = (500 + 768) * 768 + 768 + 2 * 768
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == layers * token_layer
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("freeze_embedding", [False, True])
@pytest.mark.parametrize("freeze_context", [False, True])
def test_what_learns(freeze_embedding, freeze_context, tmp_path):
    model = make(freeze_embedding=freeze_embedding, freeze_context=freeze_context)
    expected = {"layers"}
    if not freeze_embedding:
        expected |= {"embed_tokens", "embed_norm"}
    if not freeze_context:
        expected |= {"context_block"}
    model.save_pretrained(tmp_path)
    for each in (model, ContextTokenForCausalLM.from_pretrained(tmp_path)):
        parts: dict[str, set[bool]] = {}
        for name, parameter in each.model.named_parameters():
            parts.setdefault(name.split(".")[0], set()).add(parameter.requires_grad)
        assert {name for name, learns in parts.items() if learns == {True}} == expected
        assert all(len(learns) == 1 for learns in parts.values())


def test_a_frozen_block_passes_gradients_on_to_what_learns():
    model = make(freeze_embedding=False)
    model(torch.randint(V, (2, 9))).logits.square().sum().backward()
    assert all(p.grad is None for p in model.model.context_block.parameters())
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.embed_norm.weight.grad.abs().sum() > 0


def test_both_blocks_start_from_the_documents_spreads():
    torch.manual_seed(0)
    config = ContextTokenConfig(vocab_size=2000, hidden_size=300, context_dim=200)
    decoder = ContextTokenForCausalLM(config).model
    layers = [*decoder.context_block.layers, *decoder.layers]
    assert [tuple(layer.update.weight.shape) for layer in layers] == [(200, 500)] * 2 + [
        (300, 500)
    ] * 2
    for layer in layers:
        assert layer.update.weight.mean().item() == pytest.approx(0.0, abs=0.002)
        assert layer.update.weight.std().item() == pytest.approx(0.1, rel=0.02)
        # Both parts of the matrix, whichever stream they read.
        for part in (layer.update.weight[:, :200], layer.update.weight[:, -200:]):
            assert part.std().item() == pytest.approx(0.1, rel=0.02)
        assert layer.update.bias.mean().item() == pytest.approx(0.0, abs=0.003)
        assert layer.update.bias.std().item() == pytest.approx(0.01, rel=0.2)
        assert (layer.norm.weight == 1).all()
        assert (layer.norm.bias == 0).all()
    assert decoder.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_contexts_with_a_cache_or_of_a_wrong_length_are_refused():
    model = make()
    assert isinstance(model.model, ReadsStoredContexts)
    ids = torch.randint(V, (2, 5))
    contexts = torch.zeros(2, 6, C, dtype=torch.float64)
    with pytest.raises(ValueError, match="together with a cache"):
        model(ids, contexts=contexts, past_key_values=model.new_cache())
    for wrong in (contexts[:, 1:], contexts[:, :1], torch.cat([contexts, contexts], dim=1)):
        with pytest.raises(ValueError, match=f"6 in all, got {wrong.shape[1]}"):
            model(ids, contexts=wrong)
    assert model(ids, contexts=contexts).logits.shape == (2, 5, V)
