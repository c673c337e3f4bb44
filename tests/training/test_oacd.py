"""Phase 1 against naive forms written from DESIGN 1.6."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contextlm.models.layers import ContextBlock
from contextlm.training.oacd import batch_generator, oacd_loss, train_context_block
from contextlm.training.settings import PhaseOneSettings

CPU = torch.device("cpu")
VOCABULARY, WIDTH, CONTEXT = 11, 7, 5


def make(layers: int = 1, seed: int = 0):
    torch.manual_seed(seed)
    block = ContextBlock(CONTEXT, WIDTH, layers)
    table = F.layer_norm(torch.randn(VOCABULARY, WIDTH), (WIDTH,))
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, 53).astype(np.uint16)
    return block, table, tokens


def test_loss_equals_the_definition():
    contexts = torch.randn(13, 4, dtype=torch.float64)
    mean = [sum(contexts[i, j].item() for i in range(13)) / 13 for j in range(4)]
    spread = math.sqrt(
        sum((contexts[i, j].item() - mean[j]) ** 2 for i in range(13) for j in range(4))
    )
    expected = -spread / 13 + 0.1 * sum(m * m for m in mean)
    assert oacd_loss(contexts).item() == pytest.approx(expected, abs=1e-12)


def naive_iterations(block, table, tokens, settings, seed, count):
    """The same protocol with one product per token and autograd through everything."""
    total = len(tokens)
    contexts = torch.empty(total, CONTEXT).normal_(
        0.0, 0.01, generator=batch_generator(seed, 1, 0, CPU)
    )
    optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
    rows = [(0.0, None)]
    for number in range(2, count + 1):
        new, losses = contexts.clone(), []
        starts = list(range(0, total, settings.batch_size))
        for batch, start in enumerate(starts):
            end = min(start + settings.batch_size, total)
            noise = torch.empty(end - start, CONTEXT).normal_(
                generator=batch_generator(seed, number, batch, CPU)
            )
            outputs = []
            for i in range(start, end):
                fed = contexts[i - 1] if i else torch.zeros(CONTEXT)
                context = fed + settings.noise * noise[i - start]
                for layer in block.layers:
                    joined = torch.cat([context, table[tokens[i].item()]])
                    update = F.gelu(F.linear(joined, layer.weight, layer.bias))
                    context = layer.norm(context + update)
                outputs.append(context)
            outputs = torch.stack(outputs)
            losses.append(oacd_loss(outputs, settings.mean_weight))
            new[start:end] = outputs.detach()
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
        optimizer.step()
        moved = ((new - contexts) ** 2).mean(1)
        rows.append(
            ((moved < settings.threshold).float().mean().item(), torch.stack(losses).mean().item())
        )
        contexts = new
    return contexts, rows


@pytest.mark.parametrize("layers", [1, 3])
def test_iterations_equal_the_naive_form(layers):
    settings = PhaseOneSettings(batch_size=17, max_iterations=5, threshold=0.3, stop_at=1.0)
    block, table, tokens = make(layers)
    fast = train_context_block(block, lambda ids: table[ids], tokens, settings, seed=4, device=CPU)
    naive_block, _, _ = make(layers)
    contexts, rows = naive_iterations(naive_block, table, tokens, settings, 4, 5)
    torch.testing.assert_close(fast.contexts_PC, contexts, rtol=1e-4, atol=1e-5)
    for a, b in zip(block.parameters(), naive_block.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [i.number for i in fast.iterations] == [1, 2, 3, 4, 5]
    for iteration, (converged, loss) in zip(fast.iterations, rows, strict=True):
        assert iteration.converged == pytest.approx(converged, abs=1e-6)
        if loss is not None:
            assert iteration.loss == pytest.approx(loss, abs=1e-5)
    assert fast.iterations[0].loss is None


def test_it_stops_when_enough_positions_have_converged():
    block, table, tokens = make()
    easy = PhaseOneSettings(batch_size=20, threshold=1e9)
    outcome = train_context_block(block, lambda ids: table[ids], tokens, easy, seed=0, device=CPU)
    assert len(outcome.iterations) == 2
    assert outcome.converged == 1.0
    never = PhaseOneSettings(batch_size=20, threshold=1e-12, max_iterations=4)
    outcome = train_context_block(block, lambda ids: table[ids], tokens, never, seed=0, device=CPU)
    assert len(outcome.iterations) == 4


def test_only_the_block_learns_and_it_comes_back_frozen():
    torch.manual_seed(0)
    block = ContextBlock(CONTEXT, WIDTH, frozen=True).requires_grad_(False)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    before = [p.clone() for p in block.parameters()]
    settings = PhaseOneSettings(batch_size=20, max_iterations=3)
    tokens = np.arange(40) % VOCABULARY
    train_context_block(block, embedding, tokens, settings, seed=0, device=CPU)
    assert embedding.weight.grad is None
    assert all(not p.requires_grad and p.grad is None for p in block.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True))


def test_one_seed_gives_one_outcome_and_another_seed_another():
    def contexts(seed: int) -> torch.Tensor:
        block, table, tokens = make()
        settings = PhaseOneSettings(batch_size=20, max_iterations=3)
        return train_context_block(
            block, lambda ids: table[ids], tokens, settings, seed=seed, device=CPU
        ).contexts_PC

    assert torch.equal(contexts(1), contexts(1))
    assert not torch.equal(contexts(1), contexts(2))


def test_the_last_batch_may_hold_a_single_position():
    block, table, _ = make()
    settings = PhaseOneSettings(batch_size=20, max_iterations=3)
    outcome = train_context_block(
        block, lambda ids: table[ids], np.arange(41) % VOCABULARY, settings, seed=0, device=CPU
    )
    assert torch.isfinite(outcome.contexts_PC).all()
    assert all(torch.isfinite(p).all() for p in block.parameters())


def test_an_empty_stream_is_refused():
    block, table, _ = make()
    with pytest.raises(ValueError, match="at least one token"):
        train_context_block(
            block, lambda ids: table[ids], np.array([]), PhaseOneSettings(), seed=0, device=CPU
        )
