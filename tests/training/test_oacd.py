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
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.checkpoints import Checkpoints
from contextlm.training.oacd import batch_generator, oacd_loss, train_context_block
from contextlm.training.phase_one_state import PhaseOneState

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


@pytest.fixture
def doubles():
    """Contexts and noise in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class RecordingAdam(torch.optim.Adam):
    """Keeps the gradients that each step takes."""

    steps: list[list[torch.Tensor]]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        RecordingAdam.steps = []

    def step(self, closure=None):
        RecordingAdam.steps.append(
            [p.grad.clone() for group in self.param_groups for p in group["params"]]
        )
        return super().step(closure)


def norm_loop(x: list, weight: list, bias: list) -> list:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scale = 1 / torch.sqrt(variance + 1e-5)
    return [(v - mean) * scale * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def block_loop(block, context: list, embedded: list) -> list:
    """``c' = LN(c + GELU(W [c ; e] + b))`` for every layer, number by number."""
    for layer in block.layers:
        joined = [*context, *embedded]
        moved = []
        for row in range(CONTEXT):
            inner = layer.bias[row]
            for column, value in enumerate(joined):
                inner = inner + layer.weight[row, column] * value
            half = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            moved.append(context[row] + half)
        context = norm_loop(moved, layer.norm.weight, layer.norm.bias)
    return context


def loss_loop(contexts: list[list], mean_weight: float):
    n = len(contexts)
    mean = [sum(context[j] for context in contexts) / n for j in range(CONTEXT)]
    squares = sum((context[j] - mean[j]) ** 2 for context in contexts for j in range(CONTEXT))
    return -torch.sqrt(squares) / n + mean_weight * sum(m * m for m in mean)


def iteration_loop(block, table, tokens, settings, seed, number, contexts):
    """New contexts, loss, share of converged positions and gradients of one iteration."""
    total, new, losses = len(tokens), [], []
    for batch, start in enumerate(range(0, total, settings.batch_size)):
        end = min(start + settings.batch_size, total)
        noise = torch.empty(end - start, CONTEXT)
        noise.normal_(generator=batch_generator(seed, number, batch, CPU))
        outputs = []
        for i in range(start, end):
            before = contexts[i - 1] if i else torch.zeros(CONTEXT)
            fed = [before[j] + settings.noise * noise[i - start, j] for j in range(CONTEXT)]
            outputs.append(block_loop(block, fed, list(table[int(tokens[i])])))
        losses.append(loss_loop(outputs, settings.mean_weight))
        new += [torch.stack(output).detach() for output in outputs]
    loss = sum(losses) / len(losses)
    gradients = torch.autograd.grad(loss, list(block.parameters()))
    near = 0
    for i in range(total):
        change = sum((new[i][j] - contexts[i][j]).item() ** 2 for j in range(CONTEXT)) / CONTEXT
        near += change < settings.threshold
    return torch.stack(new), loss.item(), near / total, list(gradients)


def clip_loop(gradients, largest: float):
    norm = math.sqrt(sum(value**2 for g in gradients for value in g.flatten().tolist()))
    # The 1e-6 is torch's own guard against a norm of zero.
    return [g * min(1.0, largest / (norm + 1e-6)) for g in gradients], norm


def adam_loop(parameters, gradients, moments, step: int, rate: float) -> None:
    for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
        first.mul_(0.9).add_(0.1 * g)
        second.mul_(0.999).add_(0.001 * g * g)
        mean, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
        p.data -= rate * mean / (torch.sqrt(spread) + 1e-8)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_iterations_equal_loops_over_numbers(layers, clip, doubles, monkeypatch):
    """Contexts, loss, clipped gradients and the step, in float64, with a last batch of 4 of 9."""
    settings = PhaseOneSettings(
        batch_size=9, max_iterations=3, threshold=0.5, stop_at=1.0, clip=clip, mean_weight=0.7
    )
    monkeypatch.setattr(torch.optim, "Adam", RecordingAdam)
    block, table, tokens = make(layers)
    tokens = tokens[:31]
    outcomes = {}
    for last in (2, 3):
        fast, _, _ = make(layers)
        few = settings.model_copy(update={"max_iterations": last})
        outcomes[last] = train_context_block(
            fast, lambda ids: table[ids], tokens, few, seed=4, device=CPU
        )
    taken = RecordingAdam.steps
    contexts = torch.empty(31, CONTEXT)
    contexts.normal_(0.0, 0.01, generator=batch_generator(4, 1, 0, CPU))
    parameters = list(block.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    exact = {"rtol": 1e-9, "atol": 1e-9}
    rates = []
    for number in (2, 3):
        contexts, loss, converged, gradients = iteration_loop(
            block, table, tokens, settings, 4, number, contexts
        )
        clipped, norm = clip_loop(gradients, clip)
        assert (norm > clip) == (clip < 1)
        adam_loop(parameters, clipped, moments, number - 1, settings.learning_rate)
        torch.testing.assert_close(outcomes[number].contexts_PC, contexts, **exact)
        iteration = outcomes[3].iterations[number - 1]
        assert iteration.number == number
        assert iteration.loss == pytest.approx(loss, rel=1e-9, abs=1e-9)
        assert iteration.converged == converged
        rates.append(converged)
        for actual, expected in zip(taken[number - 2], clipped, strict=True):
            torch.testing.assert_close(actual, expected, **exact)
    for actual, expected in zip(fast.parameters(), parameters, strict=True):
        torch.testing.assert_close(actual, expected, **exact)
    assert outcomes[3].converged == rates[-1]
    assert any(0 < rate < 1 for rate in rates)


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
    monkeypatch.setattr("contextlm.training.phase_one_state._SHARE", math.inf)


@pytest.mark.parametrize("kill_after", [1, 2, 7, 11])
def test_a_killed_phase_one_ends_bitwise_as_it_would_have(
    tmp_path, every_state_is_written, kill_after
):
    whole = resumable(tmp_path / "whole")
    with pytest.raises(Killed):
        resumable(tmp_path / "killed", kill_after)
    assert Checkpoints(tmp_path / "killed", "iteration").whole()[0] == kill_after
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
    clock = types.SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("contextlm.training.phase_one_state.time", clock)
    monkeypatch.setattr("contextlm.training.checkpoints.KEPT", 100)
    resumable(tmp_path)
    # The first, and in any case the last.
    assert Checkpoints(tmp_path, "iteration").whole() == [12, 1]


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
