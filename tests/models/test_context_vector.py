"""The context-vector model against an independent form written from DESIGN 1.1, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig

from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.models.base import HasContextBlock
from contextlm.models.build import build_config
from contextlm.models.context_vector import ContextVectorConfig, ContextVectorForCausalLM
from contextlm.models.inputs import NewTokens
from contextlm.ops.repeated_linear import RepeatedLinear
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.oacd import train_context_block

SMALL = {"vocab_size": 31, "hidden_size": 7, "context_dim": 5, "mlp_size": 11, "mlp_layers": 3}


def small(**fields) -> ContextVectorForCausalLM:
    """A model of odd sizes whose every parameter matters."""
    torch.manual_seed(3)
    model = ContextVectorForCausalLM(ContextVectorConfig(**{**SMALL, **fields})).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gated_recurrence(decoder, embedding: Tensor, context: Tensor) -> Tensor:
    """The equations of `models.gated_recurrence`."""
    norm, layer = decoder.embed_norm, decoder.context_block.layer
    centred = embedding - embedding.mean()
    e = centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    v = layer.inner.weight @ e + layer.inner.bias
    gates = layer.recurrence
    r, i = (
        sigmoid(v @ gate.weight[0] + gate.bias) for gate in (gates.decay_gate, gates.input_gate)
    )
    a = torch.exp(-8 * torch.log(1 + torch.exp(gates.decay)) * r)
    return a * context + (1 - a**2).sqrt() * i * v


def naive_logits(model: ContextVectorForCausalLM, tokens: list[int]) -> Tensor:
    """The equations of DESIGN 1.1, one token and one context vector at a time."""
    config, decoder = model.config, model.model
    width, vectors = config.context_dim, config.num_contexts
    first = torch.cat([decoder.token_input.weight, decoder.context_input.weight], dim=1)
    contexts = [torch.zeros(width, dtype=torch.float64) for _ in range(vectors)]
    logits = []
    for t, token in enumerate(tokens):
        x = decoder.embed_tokens.weight[token]
        if config.positions == "learned":
            x = x + decoder.embed_positions.weight[t]
        h = first @ torch.cat([x, *contexts]) + decoder.token_input.bias
        h = h * (h > 0)
        for layer in decoder.mlp:
            h = layer.weight @ h + layer.bias
            h = h * (h > 0)
        logits.append(model.lm_head.weight @ h + model.lm_head.bias)

        if config.context == "gated_recurrence":
            contexts = [gated_recurrence(decoder, decoder.embed_tokens.weight[token], contexts[0])]
            continue

        def own(layer, n, h=h):
            """What a layer has for context vector n."""
            rows = slice(n * width, (n + 1) * width)
            return layer.weight[rows] @ h + layer.bias[rows]

        update = decoder.update
        for n, context in enumerate(contexts):
            if config.update == "additive":
                contexts[n] = context + own(update.written, n)
            else:
                forget, take = (own(gate, n) for gate in (update.forget_gate, update.input_gate))
                contexts[n] = (
                    sigmoid(forget) * context + sigmoid(take) * own(update.written, n).tanh()
                )
    return torch.stack(logits)


@pytest.mark.parametrize("positions", ["learned", "none"])
@pytest.mark.parametrize(
    "fields",
    [
        {"update": "additive", "mlp_layers": 1},
        {"update": "additive", "num_contexts": 3},
        {"update": "gated"},
        {"update": "gated", "num_contexts": 3},
        {"context": "gated_recurrence"},
    ],
    ids=str,
)
def test_logits_equal_the_naive_form(fields, positions):
    model = small(**fields, positions=positions)
    ids = torch.randint(31, (2, 13))
    expected = torch.stack([naive_logits(model, row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_gated_recurrence_is_frozen_on_request_and_trained_by_phase_1():
    for frozen in (False, True):
        model = small(context="gated_recurrence", freeze_context=frozen)
        assert isinstance(model.base_model, HasContextBlock)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not frozen or "context_block" not in name)
        block = model.base_model.context_block
        before = {name: value.clone() for name, value in block.named_parameters()}
        tokens = np.random.default_rng(0).integers(0, 31, 60).astype(np.uint16)
        embed = model.base_model.embed_normalised
        settings = PhaseOneSettings(max_iterations=4, stop_at=1.0)
        train_context_block(block, embed, tokens, settings, seed=0, device=torch.device("cpu"))
        for name, parameter in block.named_parameters():
            assert not torch.equal(parameter, before[name]), name
            assert parameter.requires_grad == (not frozen)
    assert not isinstance(small().base_model, HasContextBlock)
    for fields in (
        {"context": "gated_recurrence", "num_contexts": 2},
        {"freeze_context": True},
        {"context": "gated_recurrence", "update": "gated"},
    ):
        with pytest.raises(StrictDataclassError, match="gated_recurrence"):
            ContextVectorConfig(**fields)


@pytest.mark.parametrize("update", ["additive", "gated"])
def test_several_contexts_are_one_wide_context(update):
    model = small(update=update, num_contexts=3)
    wide = small(update=update, context_dim=15)
    wide.load_state_dict(model.state_dict())
    ids = torch.randint(31, (1, 9))
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({}, 3_009_768),
        ({"context_dim": 512}, 3_272_168),
        ({"context_dim": 512, "mlp_size": 1024, "mlp_layers": 10}, 12_047_848),
    ],
)
def test_parameter_counts_of_the_document(fields, total):
    with torch.device("meta"):
        model = ContextVectorForCausalLM(ContextVectorConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == total
    assert all(p.requires_grad for p in model.parameters())


def test_initial_weights():
    torch.manual_seed(0)
    model = ContextVectorForCausalLM(ContextVectorConfig(update="gated"))
    for name, parameter in model.named_parameters():
        if name == "model.update.forget_gate.bias":
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001, name


def test_several_contexts_begin_with_memories_of_different_length():
    model = ContextVectorForCausalLM(
        ContextVectorConfig(update="gated", num_contexts=3, context_dim=2)
    )
    assert model.model.update.forget_gate.bias.tolist() == [1, 1, 3, 3, 5, 5]


def test_dropout_acts_on_every_layer_in_training_only():
    model = small(dropout=0.5)
    ids = torch.randint(31, (4, 8))
    assert torch.equal(model(ids).logits, model(ids).logits)
    hidden = model.train().model(ids).last_hidden_state
    assert (hidden == 0).double().mean() > 0.5  # half of what ReLU left is gone as well
    seen: list[Tensor] = []
    model.model.dropout.register_forward_hook(lambda *call: seen.append(call[-1]))
    model(ids)
    assert len(seen) == 8 * 3
    assert all((out == 0).any() for out in seen)


@pytest.mark.parametrize("update", ["additive", "gated"])
def test_the_cache_does_not_grow(update):
    model = ContextVectorForCausalLM(
        ContextVectorConfig(**SMALL, update=update, num_contexts=2, positions="none")
    )
    assert position_limit(model) is None
    entries = measure_cache(model, [1, 64, 200], torch.device("cpu"))
    assert {entry.logical for entry in entries} == {10 * 4 + 8}  # two contexts, and a count
    assert {entry.resident for entry in entries} == {10 * 4 + 8}
    assert len(entries) == 3


def test_one_position_too_many_is_refused():
    model = small(max_position_embeddings=6)
    assert position_limit(model) == 6
    ids = torch.randint(31, (2, 7))
    model(ids[:, :6])
    with pytest.raises(ValueError, match=r"max_position_embeddings is 6.*token 7"):
        model(ids)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"max_position_embeddings is 6.*token 7"):
        model(ids[:, 6:], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"max_position_embeddings is 6.*token 9"):
        model(ids[:, :2], position_ids=torch.tensor([[7, 8]]))


def test_padding_takes_no_position():
    model = small(max_position_embeddings=6)
    ids = torch.randint(31, (2, 6))
    rows = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids, ids[:, :2]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6 + [0] * 2] * 2)
    outputs = model(rows, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(outputs.logits[:, 3:9], model(ids).logits, rtol=1e-9, atol=1e-9)
    # A row that is full may still be given padding beside rows that go on.
    more = torch.cat([mask, torch.zeros(2, 1, dtype=torch.long)], dim=1)
    model(ids[:, :1], attention_mask=more, past_key_values=outputs.past_key_values)
    with pytest.raises(ValueError, match="token 7"):
        model(rows[:, :10], attention_mask=torch.tensor([[0] * 3 + [1] * 7] * 2))


def test_autocast_leaves_the_context_in_float32():
    model = small().float()
    ids = torch.randint(31, (2, 9))
    plain = model(ids, use_cache=True).past_key_values.layers[-1].state
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids, use_cache=True).past_key_values.layers[-1].state
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, rtol=0.05, atol=0.5)


def test_positions_say_how_many_there_are(tmp_path):
    assert ContextVectorConfig().max_position_embeddings == 32
    assert ContextVectorConfig(max_position_embeddings=64).max_position_embeddings == 64
    unbounded = ContextVectorConfig(positions="none")
    assert unbounded.max_position_embeddings is None
    unbounded.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings is None
    entry = {"type": "context_vector", "positions": "none", "max_position_embeddings": None}
    assert build_config(entry, 10).max_position_embeddings is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_contexts": 0}, "num_contexts must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
        (
            {"positions": "none", "max_position_embeddings": 32},
            "max_position_embeddings must be left out with positions 'none', got 32",
        ),
        ({"update": "lstm"}, "update"),
        ({"tie_word_embeddings": True}, "mlp_size 512 is not hidden_size 256"),
    ],
)
def test_values_that_make_no_model_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ContextVectorConfig(**fields)


def test_the_gated_blocks_parts_are_its_recurrence():
    """What phase 1 computes once per vocabulary entry, and what a store's contexts go through."""
    block = small(context="gated_recurrence").base_model.context_block
    embedded = torch.randn(2, 9, 7, dtype=torch.float64)
    contexts = block.run(embedded, NewTokens.of(embedded), None)
    before = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(9):
        before = block.step(before, [block.layer.project(embedded[:, t])])
        torch.testing.assert_close(contexts[0, :, t], before, rtol=1e-12, atol=1e-12)
    shifted = torch.cat([torch.zeros_like(contexts[0, :, :1]), contexts[0, :, :-1]], dim=1)
    torch.testing.assert_close(block.parallel(embedded, shifted), contexts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"update": "gated", "num_contexts": 2}], ids=str)
def test_the_weights_gradients_come_at_once_and_are_the_same(fields, monkeypatch):
    model = small(**fields).train()
    model.model.dropout.p = 0.0
    ids = torch.randint(0, 31, (3, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    asked, products = [], RepeatedLinear._begin
    monkeypatch.setattr(
        RepeatedLinear, "_begin", lambda self, *sizes: asked.append(1) or products(self, *sizes)
    )
    at_once = gradients()
    layers = [model.model.context_input, *model.model.mlp, *model.model.update.children()]
    assert len(asked) == len([layer for layer in layers if isinstance(layer, nn.Linear)])
    heard = []
    hook = model.model.mlp[0].register_full_backward_hook(lambda *_: heard.append(1))
    gradients()
    assert len(heard) == ids.shape[1]
    hook.remove()
    asked.clear()
    monkeypatch.setenv("CONTEXTLM_BACKEND", "repeated_linear=eager")
    torch.testing.assert_close(gradients(), at_once, rtol=0, atol=1e-12)
    assert not asked
