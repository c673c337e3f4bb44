"""The slow forms that benchmarks compare with compute the same as ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contextlm.benchmarks.context_kv import GatherAttention
from contextlm.benchmarks.phase1 import naive_phase_one
from contextlm.models.context_kv.layer import ContextAttention, Memory
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.oacd import train_context_block


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("start", [0, 4, 100])
def test_fetching_each_context_is_attention_in_dilated_windows(float64, start):
    torch.manual_seed(start)
    options = {"interval": 3, "size": 4, "anchor": "position", "padding": "zeros", "dropout": 0.0}
    own = ContextAttention(10, 7, 2, **options)
    history, tokens = 9, 11
    entries = torch.randn(2, history + tokens, 7, requires_grad=True)
    stream = torch.randn(2, tokens, 10, requires_grad=True)
    memory = Memory(entries, torch.tensor([start, start + 2]))
    leaves = [entries, stream, *own.parameters()]
    results = []
    for form in (own, GatherAttention(own)):
        out = form(stream, *memory)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_one_product_a_token_is_phase_one(float64):
    table = torch.randn(13, 6)
    tokens = np.random.default_rng(0).integers(0, 13, size=83)
    settings = PhaseOneSettings(stop_at=1.0, max_iterations=5, batch_size=19)
    blocks = []
    for _ in range(2):
        torch.manual_seed(0)
        blocks.append(ContextBlock(5, 6))
    ours = train_context_block(
        blocks[0], table.__getitem__, tokens, settings, seed=0, device=torch.device("cpu")
    )
    naive, seconds = naive_phase_one(blocks[1], table, tokens, settings)
    assert len(seconds) == 4
    torch.testing.assert_close(ours.contexts_PC, naive, rtol=1e-10, atol=1e-10)
    for one, other in zip(blocks[0].parameters(), blocks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
