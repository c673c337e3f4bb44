"""From a recipe's model entry to a configuration: what is accepted, and how mistakes are named."""

from __future__ import annotations

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.models.base import registry
from contextlm.models.build import (
    baseline_types,
    build_config,
    check_forward,
    create_model,
    meta_model,
)

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_one_seed_gives_one_model():
    config = build_config({"type": "gpt_neox", **SMALL, "rotary_pct": 0.5}, 50)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    first, again, other = (create_model(config, seed) for seed in (1, 1, 2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "gpt_neo_x"}, "unknown model type 'gpt_neo_x' (did you mean 'gpt_neox'?)"),
        ({"type": "clip"}, "unknown model type 'clip'"),
        ({"type": "gpt_neox", "hiden_size": 4}, "'hiden_size' (did you mean 'hidden_size'?)"),
        ({"type": "context_pythia", "contextdim": 4}, "(did you mean 'context_dim'?)"),
        ({"type": "context_pythia", "context_dim": "wide"}, "context_dim"),
        ({"type": "context_pythia", "num_attention_heads": 7}, "must divide"),
        ({"type": "gpt_neox", "hidden_size": 30, "num_attention_heads": 4}, "divisible"),
        ({"type": "gpt2", "n_embd": 30, "n_head": 4, "n_layer": 1}, "divi"),
    ],
)
def test_mistakes_are_named_in_one_line(fields, message):
    with pytest.raises(InputError) as caught:
        meta_model(build_config(fields, 50))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_listed_types_exist():
    for name in [*baseline_types(), *registry()]:
        assert build_config({"type": name}, 50).model_type == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "gpt_neox", **SMALL, "hidden_act": "gleu"}, "gleu"),
        ({"type": "context_pythia", "hidden_act": "gleu"}, "gleu"),
        ({"type": "llama", **SMALL, "num_attention_heads": 4, "num_key_value_heads": 3}, "llama"),
        ({"type": "bert", **SMALL}, "not causal"),
        ({"type": "roberta", **SMALL, "pad_token_id": 1}, "not causal"),
    ],
)
def test_what_only_a_forward_pass_shows(fields, message):
    with pytest.raises(InputError) as caught:
        check_forward(meta_model(build_config(fields, 50)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"type": "gpt_neox", **SMALL}, {"type": "opt"}])
def test_causal_types_pass(fields):
    small = {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 1}
    fields = {**fields, **small} if fields["type"] == "opt" else fields
    check_forward(meta_model(build_config(fields, 50)))


@pytest.mark.parametrize("name", baseline_types())
def test_transformers_own_baselines(name):
    """GPT-2 by the common names of its sizes; none freezes an embedding."""
    fields = {**SMALL, "num_key_value_heads": 1}
    if name == "gpt2":
        fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    elif name == "gpt_neox":
        fields = SMALL
    elif name == "mamba":
        fields = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    config = build_config({"type": name, **fields}, 50, bos_token_id=0, eos_token_id=0)
    model = create_model(config, 0)
    assert model.dtype == torch.float32
    logits = model(torch.tensor([[0, 3, 0]])).logits
    assert logits.shape == (1, 3, 50)
    logits.sum().backward()
    embedding = model.get_input_embeddings()
    assert embedding.weight[0].abs().sum() > 0
    assert embedding.weight.grad[0].abs().sum() > 0


def test_a_number_of_layers_that_follows_from_the_pattern_may_be_given():
    model = {"type": "context_hybrid", "pattern": "RWR", "num_hidden_layers": 3}
    config = build_config(model, 100)
    assert config.num_hidden_layers == 3
    assert config.from_dict(config.to_dict(), num_hidden_layers=3).pattern == "RWR"
    with pytest.raises(InputError, match="num_hidden_layers 4: pattern 'RWR'"):
        build_config({**model, "num_hidden_layers": 4}, 100)
