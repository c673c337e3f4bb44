"""transformers' Mamba and Mamba-2 compute the same with our scans as with their own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from contextlm.models.build import build_config, create_model

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
MODELS = {
    "mamba": (modeling_mamba, "mamba_selective_scan", SIZES),
    "mamba2": (
        modeling_mamba2,
        "mamba2_chunk_scan",
        {**SIZES, "num_heads": 3, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_gradients_and_states_are_theirs(kind, monkeypatch):
    module, function, sizes = MODELS[kind]
    model = create_model(build_config({"type": kind, **sizes}, 50), 0)
    ours = getattr(module, function)
    ids = torch.randint(50, (2, 71), generator=torch.Generator().manual_seed(1))
    found = []
    for scan in (ours, ours.contextlm):
        monkeypatch.setattr(module, function, scan)
        model.train().zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            first = model.eval()(input_ids=ids, use_cache=True)
            then = model(input_ids=ids[:, :1], cache_params=first.cache_params)
        found.append([loss.detach(), first.logits, then.logits, *gradients])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_heads_with_their_own_b_and_c_are_left_to_transformers(monkeypatch):
    sizes = {**MODELS["mamba2"][2], "num_heads": 4, "head_dim": 12, "n_groups": 2}
    model = create_model(build_config({"type": "mamba2", **sizes}, 50), 0)
    ids = torch.arange(20)[None]
    ours = modeling_mamba2.mamba2_chunk_scan
    logits = model(input_ids=ids).logits
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", ours.contextlm)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_what_is_traced_sees_torchs_own_operations():
    model = create_model(build_config({"type": "mamba", **SIZES}, 50), 0).eval()
    ids = torch.arange(8)[None]
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    expected = model(input_ids=ids, use_cache=False).logits
    found = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
