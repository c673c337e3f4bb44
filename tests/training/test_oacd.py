"""Phase 1 against naive forms written from DESIGN 1.6."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contextlm.base.errors import NotFiniteError
from contextlm.models.layers import ContextBlock
from contextlm.ops.normal_noise import normal_noise, philox_key
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.checkpoints import Checkpoints
from contextlm.training.oacd import (
    PhaseOneState,
    oacd_loss,
    oacd_loss_with_gradient,
    train_context_block,
)

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


def test_the_gradient_in_closed_form_is_autograds():
    contexts = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    expected = oacd_loss(contexts, 0.7)
    expected.backward()
    loss, gradient = oacd_loss_with_gradient(contexts.detach(), 0.7)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient, contexts.grad, rtol=1e-13, atol=1e-13)
    alike = torch.full((3, 2), 0.25)  # no dispersion
    assert torch.equal(oacd_loss_with_gradient(alike, 0.5)[1], torch.full((3, 2), 0.25 / 3))


@pytest.fixture
def doubles():
    """Contexts and noise in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def block_form(block: ContextBlock, context: torch.Tensor, embedded: torch.Tensor):
    """``c' = LN(c + GELU(W [c ; e] + b))`` for every layer, of one position."""
    for layer in block.layers:
        moved = F.gelu(layer.update.weight @ torch.cat([context, embedded]) + layer.update.bias)
        norm = layer.norm
        context = F.layer_norm(context + moved, (CONTEXT,), norm.weight, norm.bias)
    return context


def iteration_form(block, table, tokens, settings, seed, number, contexts):
    """New contexts, loss and share of converged positions of one iteration, position by position.

    The block's gradients are left in it.
    """
    new, losses = [], []
    for batch, start in enumerate(range(0, len(tokens), settings.batch_size)):
        part = range(start, min(start + settings.batch_size, len(tokens)))
        noise = normal_noise(len(part), CONTEXT, philox_key(seed, number, batch))
        outputs = []
        for i in part:
            before = contexts[i - 1] if i else torch.zeros(CONTEXT)
            fed = before + settings.noise * noise[i - start]
            outputs.append(block_form(block, fed, table[int(tokens[i])]))
        mean = sum(outputs) / len(outputs)
        spread = torch.sqrt(sum((output - mean).square().sum() for output in outputs))
        losses.append(-spread / len(outputs) + settings.mean_weight * mean.square().sum())
        new += outputs
    loss = sum(losses) / len(losses)
    block.zero_grad()
    loss.backward()
    new = torch.stack(new).detach()
    near = [
        (a - b).square().mean() < settings.threshold for a, b in zip(new, contexts, strict=True)
    ]
    return new, loss.item(), sum(near).item() / len(near)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_iterations_equal_a_loop_over_positions(layers, clip, doubles):
    """Contexts, losses and the block after clipped steps, in float64; a last batch of 4 of 9."""
    settings = PhaseOneSettings(
        batch_size=9, max_iterations=3, threshold=0.5, stop_at=1.0, clip=clip, mean_weight=0.7
    )
    fast, table, tokens = make(layers)
    tokens = tokens[:31]
    outcome = train_context_block(
        fast, lambda ids: table[ids], tokens, settings, seed=4, device=CPU
    )
    block, _, _ = make(layers)
    optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
    contexts = 0.01 * normal_noise(31, CONTEXT, philox_key(4, 1, 0)).double()
    exact = {"rtol": 1e-9, "atol": 1e-9}
    for number in (2, 3):
        contexts, loss, converged = iteration_form(
            block, table, tokens, settings, 4, number, contexts
        )
        norm = torch.nn.utils.clip_grad_norm_(block.parameters(), clip)
        assert (norm > clip) == (clip < 1)
        optimizer.step()
        iteration = outcome.iterations[number - 1]
        assert iteration.number == number
        assert iteration.loss == pytest.approx(loss, rel=1e-9, abs=1e-9)
        assert iteration.converged == converged
    assert 0 < outcome.converged < 1
    torch.testing.assert_close(outcome.contexts_PC, contexts, **exact)
    for actual, expected in zip(fast.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, **exact)


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


def test_the_last_batch_may_hold_a_single_position():
    block, table, _ = make()
    settings = PhaseOneSettings(batch_size=20, max_iterations=3)
    outcome = train_context_block(
        block, lambda ids: table[ids], np.arange(41) % VOCABULARY, settings, seed=0, device=CPU
    )
    assert torch.isfinite(outcome.contexts_PC).all()
    assert all(torch.isfinite(p).all() for p in block.parameters())


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


def resumable(folder, kill_after=None, tell=print):
    """Twelve iterations, their states kept in `folder`; killed after one of them or not."""
    block, table, tokens = make(layers=2)
    seen = []

    def on_iteration(iteration):
        seen.append((iteration.number, iteration.converged, iteration.loss))
        if iteration.number - 1 == kill_after:
            raise Killed

    settings = PhaseOneSettings(batch_size=10, max_iterations=12, stop_at=1.0, threshold=1e-9)
    outcome = train_context_block(
        block, lambda ids: table[ids], tokens, settings, seed=3, device=CPU,
        on_iteration=on_iteration, state=PhaseOneState(folder, tell),
    )  # fmt: skip
    return seen, outcome.contexts_PC, [p.detach() for p in block.parameters()]


def assert_same(one, other):
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@pytest.fixture
def every_state_is_written(monkeypatch):
    monkeypatch.setattr("contextlm.training.oacd._SHARE", math.inf)


@pytest.mark.parametrize("kill_after", [1, 7, 11])
def test_a_killed_phase_one_ends_bitwise_as_it_would_have(
    tmp_path, every_state_is_written, kill_after
):
    whole = resumable(tmp_path / "whole")
    with pytest.raises(Killed):
        resumable(tmp_path / "killed", kill_after)
    assert Checkpoints(tmp_path / "killed", "iteration", print).whole()[0] == kill_after
    assert_same(resumable(tmp_path / "killed"), whole)
    assert_same(resumable(tmp_path / "killed"), whole)  # its end is kept too


def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, every_state_is_written):
    whole = resumable(tmp_path / "whole")
    with pytest.raises(Killed):
        resumable(tmp_path / "killed", 7)
    file = tmp_path / "killed" / "iteration-7" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    told = []
    assert_same(resumable(tmp_path / "killed", tell=told.append), whole)
    assert len(told) == 1
    assert str(file) in told[0]


def test_states_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """Time here goes on by one second a reading: a state takes 1, and 20 pass before the next."""
    now = iter(range(10_000))
    clock = types.SimpleNamespace(monotonic=lambda: float(next(now)), perf_counter=lambda: 0.0)
    monkeypatch.setattr("contextlm.training.oacd.time", clock)
    monkeypatch.setattr("contextlm.training.checkpoints.KEPT", 100)
    resumable(tmp_path)
    # The first, and in any case the last.
    assert Checkpoints(tmp_path, "iteration", print).whole() == [12, 1]


def test_a_loss_that_is_not_finite_is_named_with_the_last_good_state(
    tmp_path, every_state_is_written, monkeypatch
):
    losses = iter([0.5, 0.4, math.nan])
    monkeypatch.setattr("contextlm.training.oacd.refine", lambda *_: (next(losses), 0.0))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(NotFiniteError, match="loss of iteration 4 is nan") as caught:
        resumable(tmp_path)
    place = tmp_path / "iteration-3"
    assert caught.value.__notes__ == [f"the last good checkpoint is {place}"]
