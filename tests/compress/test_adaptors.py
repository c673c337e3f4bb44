"""Each architecture's attention, put together from the parts that its adaptor names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, build, tokens
from torch import Tensor

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import KEY, VALUE, Attention, attentions_of, rotated


def calls_of(model: Any, ids: Tensor) -> list[tuple[Attention, Tensor, dict[str, Any], Tensor]]:
    """What each attention module was called with in a forward pass, and what it gave."""
    found: list[Any] = []
    hooks = []
    for attention in attentions_of(model):

        def note(_: Any, given: Any, named: Any, output: Any, attention: Any = attention) -> None:
            inputs = given[0] if given else named["hidden_states"]
            found.append((attention, inputs, named, output[0]))

        hooks.append(attention.module.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_make_the_module(name: str) -> None:
    """Projections, norms, rotary positions, grouped heads, scaling, softcap, window and output."""
    model = build(name, dtype=torch.float32)
    length = 41
    for attention, inputs_BTD, named, expected_BTD in calls_of(model, tokens(2, length)):
        query, (key, value) = (
            attention.queries(inputs_BTD),
            (attention.projection(part).heads(inputs_BTD) for part in (KEY, VALUE)),
        )
        key = attention.normed(KEY, key)
        if attention.has_rotary:
            turns = attention.turns(inputs_BTD, torch.arange(length)[None])
            for ours, theirs in zip(turns, named["position_embeddings"], strict=True):
                torch.testing.assert_close(ours, theirs.expand_as(ours))
            query, key = rotated(query, turns), rotated(key, turns)
        shared = attention.heads // attention.groups
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (attention.window or length))
        products = query @ key.repeat_interleave(shared, 1).mT
        weights = attention.weights(products, seen)
        mixed = weights @ value.repeat_interleave(shared, 1)
        made_BTD = attention.output(mixed.transpose(1, 2).flatten(2))
        assert expected_BTD.abs().max() > 0.01
        torch.testing.assert_close(made_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
        by_head_BTD = torch.einsum("bhte,hed->btd", mixed, attention.output_weight())
        without_bias = attention.output(torch.zeros_like(mixed.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(by_head_BTD + without_bias, made_BTD, rtol=1e-5, atol=1e-5)


def test_a_model_without_an_adaptor_is_refused_with_what_would_help() -> None:
    from transformers import BloomConfig

    model = build(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2), "eager")
    with pytest.raises(InputError, match=r"attention of 'bloom', only for llama, .*quantized"):
        attentions_of(model)
