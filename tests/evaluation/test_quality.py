"""Quality against sums written out, and effective rank against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from contextlm.data.synthetic import find_task
from contextlm.data.windows import Windows
from contextlm.evaluation.quality import (
    effective_rank,
    evaluate_quality,
    retrieval_accuracy,
    sample_rows,
    window_contexts,
)
from contextlm.models.layers import ContextBlock

CPU = torch.device("cpu")


class Bigram(nn.Module):
    """Logits that depend on the current token only; counts how it is called."""

    def __init__(self, size: int):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(size, size))
        self.batches: list[int] = []

    def forward(self, input_ids, use_cache=None):
        self.batches.append(len(input_ids))
        assert not self.training
        return type("Outputs", (), {"logits": self.table[input_ids]})


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_target_weighs_the_same_whatever_the_batches(batch_size):
    tokens = np.random.default_rng(0).integers(0, 7, 50)
    windows = Windows(tokens, 9)
    model = Bigram(7).train()
    quality = evaluate_quality(model, windows, batch_size, CPU)
    assert model.training
    table = model.table.detach().double()
    losses, hits = [], []
    for i in range(len(windows) * 9):
        logits = table[tokens[i]]
        losses.append((logits.exp().sum().log() - logits[tokens[i + 1]]).item())
        hits.append(int(logits.argmax()) == tokens[i + 1])
    assert quality.tokens == 45
    assert quality.loss == pytest.approx(sum(losses) / 45, abs=1e-6)
    assert quality.accuracy == sum(hits) / 45
    assert quality.ppl == pytest.approx(math.exp(sum(losses) / 45), rel=1e-6)


def test_ignored_targets_do_not_count():
    items = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 3])}]
    model = Bigram(5)
    quality = evaluate_quality(model, items, 1, CPU)
    assert quality.tokens == 1
    assert quality.loss == pytest.approx(-model.table[2].log_softmax(0)[3].item(), abs=1e-6)


def test_right_answers_are_counted_level_by_level():
    """Sample i has level i modulo the levels; one of two answers of the harder ones is right."""
    model = Bigram(5)
    right = int(model.table[1].argmax())
    wrong = (right + 1) % 5
    easy = {"input_ids": torch.tensor([1, 1]), "labels": torch.tensor([-100, right])}
    hard = {"input_ids": torch.tensor([1, 1]), "labels": torch.tensor([right, wrong])}
    samples = [easy, hard, easy, hard, easy]
    found = retrieval_accuracy(model, samples, find_task("recall:4"), 2, CPU)
    counted = [(each.level, each.accuracy, each.answers) for each in found]
    assert counted == [("2 pairs", 1.0, 3), ("4 pairs", 0.5, 4)]
    assert retrieval_accuracy(model, samples, None, 2, CPU) == []


def test_autocast_does_not_reach_the_evaluation():
    windows = Windows(np.arange(30) % 5, 4)
    model = nn.Sequential()
    model.linear = nn.Linear(8, 5)
    seen = []

    def forward(input_ids, use_cache=None):
        logits = model.linear(nn.functional.one_hot(input_ids, 8).float())
        seen.append(logits.dtype)
        return type("Outputs", (), {"logits": logits})

    model.forward = forward
    with torch.autocast("cpu", torch.bfloat16):
        evaluate_quality(model, windows, 8, CPU)
    assert set(seen) == {torch.float32}


def test_effective_rank_equals_the_definition():
    matrix = torch.randn(40, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    shares = [v.item() / values.sum().item() for v in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(matrix) == pytest.approx(expected, rel=1e-12)


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1.0, abs=1e-5)
    assert effective_rank(torch.zeros(9, 4)) == 0.0


def test_sampled_rows_are_distinct_rows_of_the_matrix():
    matrix = torch.arange(100.0).view(50, 2)
    rows = sample_rows(matrix, seed=1, limit=20)
    assert rows.shape == (20, 2)
    assert len({tuple(row.tolist()) for row in rows}) == 20
    assert torch.equal(rows, sample_rows(matrix, seed=1, limit=20))
    assert sample_rows(matrix, seed=1, limit=60) is matrix


def test_window_contexts_are_the_exact_recurrence_from_zero():
    torch.manual_seed(0)
    block, table = ContextBlock(4, 3), torch.randn(5, 3)
    windows = Windows(np.arange(41) % 5, 8)
    contexts = window_contexts(block, lambda ids: table[ids], windows, 2, CPU)
    assert contexts.shape == (40, 4)
    state = torch.zeros(1, 4)
    for t in range(8):
        layer = block.layers[0]
        state = layer.step(state, layer.project(table[t % 5]).unsqueeze(0))
        torch.testing.assert_close(contexts[t], state[0])
    assert len(window_contexts(block, lambda ids: table[ids], windows, 2, CPU, limit=10)) == 16
