"""Cache bytes against storage that the tests know, and what counts as a view."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from contextlm.evaluation.memory import (
    PeakMemory,
    cache_bytes,
    feed,
    measure_cache,
    position_limit,
)
from contextlm.evaluation.speed import measure_speed
from contextlm.models.build import build_config, create_model

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def filled(keys: torch.Tensor, values: torch.Tensor) -> Cache:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return Cache(layers=[layer])


def test_views_count_their_elements_and_their_storage():
    storage = torch.zeros(1, 2, 100, 4)
    held = cache_bytes(filled(storage[:, :, :10], storage[:, :, 10:25]))
    assert held.logical == (10 + 15) * 2 * 4 * 4
    assert held.resident == 2 * 100 * 4 * 4
    twice = torch.zeros(1, 2, 5, 4, dtype=torch.bfloat16)
    assert cache_bytes(filled(twice, twice)) == (80, 80)
    assert cache_bytes(DynamicCache()) == (0, 0)


@pytest.mark.parametrize("length", [1, 1025])
def test_keys_and_values_of_a_real_decode(length):
    model = create_model(build_config({"type": "gpt_neox", **SMALL}, 20), 0)
    (entry,) = measure_cache(model, [length], CPU)
    assert entry.tokens == length
    assert entry.logical == entry.resident == 3 * 2 * length * 16 * 4


def test_lengths_beyond_the_positions_are_left_out():
    fields = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = create_model(build_config(fields, 20), 0)
    assert position_limit(model) == 32
    assert [entry.tokens for entry in measure_cache(model, [64, 8, 32, 8], CPU)] == [8, 32]


@pytest.mark.parametrize(("positions", "prompt"), [(2, 1), (3, 2), (48, 24), (200, 168)])
def test_speed_fits_into_the_positions(positions, prompt):
    fields = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    model = create_model(build_config(fields, 20), 0).train()
    speed = measure_speed(model, 512, CPU)
    assert model.training
    assert speed.tokens == prompt
    assert speed.prefill_tokens_per_second > 0
    assert speed.decode_tokens_per_second > 0


MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "gpt_neox", **SMALL},
        {"type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
        {"type": "llama", **SMALL, "num_key_value_heads": 1},
        {"type": "mistral", **SMALL, "num_key_value_heads": 1, "sliding_window": 4},
        {"type": "mamba", **MAMBA},
    ],
    ids=lambda fields: fields["type"],
)
def test_every_listed_baseline_really_decodes_with_its_cache(fields):
    model = create_model(build_config(fields, 20), 0).eval()
    ids = torch.randint(20, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = None
    with torch.no_grad():
        for t in range(9):
            logits, cache = feed(model, ids[:, t : t + 1], cache)
        expected = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_peak_memory_sees_an_allocation():
    peak = PeakMemory(CPU)
    before = peak.host_bytes()
    block = torch.ones(64 * 2**20 // 4)
    assert peak.host_bytes() >= before
    assert peak.host_bytes() > block.numel() * 4
    assert peak.accelerator_bytes() is None
