"""transformers' Mamba and Mamba-2 compute the same with our scans as with their own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from contextlm.models.build import build_config, create_model
from contextlm.ops.backends import VARIABLE

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
    mask = torch.ones_like(ids).index_fill(1, torch.arange(9), 0)  # padding on the left
    found = []
    for scan in (ours, ours.theirs):
        monkeypatch.setattr(module, function, scan)
        model.train().zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            first = model.eval()(input_ids=ids, use_cache=True)
            then = model(input_ids=ids[:, :1], cache_params=first.cache_params)
            padded = model(input_ids=ids, attention_mask=mask).logits[:, 9:]
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(input_ids=ids).logits.float()
        found.append([loss.detach(), first.logits, then.logits, padded, *gradients, rough])
    for own, other in zip(*(tensors[:-1] for tensors in found), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    own, other = (tensors[-1] for tensors in found)
    size = other.abs().max().item()
    torch.testing.assert_close(own, other, rtol=0, atol=0.02 * size)


def test_heads_with_their_own_b_and_c_are_left_to_transformers(monkeypatch):
    sizes = {**MODELS["mamba2"][2], "num_heads": 4, "head_dim": 12, "n_groups": 2}
    model = create_model(build_config({"type": "mamba2", **sizes}, 50), 0)
    ids = torch.arange(20)[None]
    ours = modeling_mamba2.mamba2_chunk_scan
    logits = model(input_ids=ids).logits
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", ours.theirs)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_what_is_traced_sees_torchs_own_operations():
    model = create_model(build_config({"type": "mamba", **SIZES}, 50), 0).eval()
    ids = torch.arange(8)[None]
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    expected = model(input_ids=ids, use_cache=False).logits
    found = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_argument_that_ours_do_not_have_is_not_lost():
    create_model(build_config({"type": "mamba2", **MODELS["mamba2"][2]}, 50), 0)
    given = torch.randn(1, 4, 3, 2), torch.rand(1, 4, 3), -torch.rand(3)
    both = torch.randn(2, 1, 4, 1, 5).unbind()
    with pytest.raises(Exception, match="packed sequences"):
        modeling_mamba2.mamba2_chunk_scan(*given, *both, 2, seq_idx=torch.zeros(1, 4))


def test_the_environment_variable_brings_theirs_back(monkeypatch):
    model = create_model(build_config({"type": "mamba", **SIZES}, 50), 0)
    called = []
    monkeypatch.setattr("contextlm.ops.selective_scan.selective_scan", called.append)
    monkeypatch.setenv(VARIABLE, "selective_scan=eager")
    model(input_ids=torch.arange(8)[None])
    assert not called
