"""Phase 1: context training by origin-anchored centroid dispersion (OACD), DESIGN 1.6.

The contexts of all positions of one long token stream are refined together. Each iteration feeds
position i the previous iteration's context of position i-1, plus noise, through the context block;
the outputs are the new contexts. The loss pushes the contexts of a batch apart and their mean
towards zero, so that different histories become different vectors.

Shape suffixes: N positions of a batch, P all positions, C context width, D embedding width,
U distinct tokens of the stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor

from contextlm.base import distribution
from contextlm.base.errors import NotFiniteError
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.phase_one_state import Iteration, PhaseOneState

INITIAL_STD = 0.01


@dataclass
class PhaseOne:
    """Outcome of phase 1. `contexts_PC` are the last iteration's, on the training device.

    With several processes rank 0 has all of them and the others none.
    """

    contexts_PC: Tensor
    iterations: list[Iteration] = field(default_factory=list)

    @property
    def converged(self) -> float:
        """Share of converged positions at the end, 0..1."""
        return self.iterations[-1].converged


def oacd_loss(contexts_NC: Tensor, mean_weight: float = 0.1) -> Tensor:
    """``-||c - mean||_F / n + mean_weight ||mean||^2``, the mean over the batch's n positions.

    Args:
        contexts_NC: one batch of new contexts.
        mean_weight: weight of the term that anchors the mean at the origin.

    Returns:
        A scalar.
    """
    mean_C = contexts_NC.mean(0)
    dispersion = torch.linalg.vector_norm(contexts_NC - mean_C) / contexts_NC.shape[0]
    return mean_weight * mean_C.square().sum() - dispersion


def batch_generator(seed: int, iteration: int, batch: int, device: torch.device) -> torch.Generator:
    """The noise source of one batch: it depends on nothing but these numbers."""
    mixed = np.random.SeedSequence([seed, iteration, batch]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0] >> np.uint64(1)))


def initial_contexts(positions: int, width: int, seed: int, device: torch.device) -> Tensor:
    """The random contexts that the first iteration consists of, ``[P, C]``."""
    contexts_PC = torch.empty(positions, width, device=device)
    return contexts_PC.normal_(0.0, INITIAL_STD, generator=batch_generator(seed, 1, 0, device))


class _VocabularyProjection:
    """The tokens' part ``W_e e + b`` of every layer, computed once per distinct token.

    A stream repeats its tokens many times over, so one product per vocabulary entry replaces one
    per position; gradients are summed per entry before the one product that they need.
    """

    def __init__(self, block: ContextBlock, embedded_UD: Tensor):
        self.block = block
        self.embedded_UD = embedded_UD
        self.refresh()

    def refresh(self) -> None:
        """Project with the current weights and forget the gradients."""
        self.tables_UC = [layer.project(self.embedded_UD) for layer in self.block.stack()]
        self.gradients_UC = [torch.zeros_like(table_UC) for table_UC in self.tables_UC]

    def rows(self, entries_N: Tensor) -> list[Tensor]:
        """Per layer, the rows of `entries_N` as leaves that collect gradients, ``[N, C]``."""
        return [table_UC.detach()[entries_N].requires_grad_() for table_UC in self.tables_UC]

    def collect(self, entries_N: Tensor, rows_NC: list[Tensor]) -> None:
        """Sum the rows' gradients per entry."""
        for gradient_UC, row_NC in zip(self.gradients_UC, rows_NC, strict=True):
            assert row_NC.grad is not None
            gradient_UC.index_add_(0, entries_N, row_NC.grad)

    def backward(self) -> None:
        """Carry the summed gradients on to the weights behind the tables."""
        for table_UC, gradient_UC in zip(self.tables_UC, self.gradients_UC, strict=True):
            table_UC.backward(gradient_UC)


def train_context_block(
    block: ContextBlock,
    embed: Callable[[Tensor], Tensor],
    tokens_P: np.ndarray,
    settings: PhaseOneSettings,
    *,
    seed: int,
    device: torch.device,
    on_iteration: Callable[[Iteration], None] = lambda iteration: None,
    state: PhaseOneState | None = None,
) -> PhaseOne:
    """Train `block` in place on one token stream; nothing else learns.

    With several processes all call this; rank 0 trains, and the others get the block.

    Args:
        block: the context block, on `device`.
        embed: maps token ids to normalised embeddings, ``[..., D]``; it stays as it is.
        tokens_P: the stream.
        settings: learning rate, noise, batch size, when to stop.
        seed: of the random start and the noise.
        device: of the block.
        on_iteration: called after every iteration, and first for those that `state` brings back; on
            rank 0 only.
        state: keeps on disk where training is, and brings that back; None: nothing is kept.

    Returns:
        The last contexts and a record of every iteration.

    Raises:
        ValueError: the stream is empty.
        NotFiniteError: the loss is not finite; the message names the iteration, a note the last
            good state.
    """
    if len(tokens_P) == 0:
        raise ValueError("phase 1 needs at least one token")
    outcome = PhaseOne(torch.empty(0, block.context_dim, device=device))

    def train() -> list[Iteration]:
        nonlocal outcome
        distinct_U, entries_P = np.unique(np.asarray(tokens_P), return_inverse=True)
        entries = torch.from_numpy(entries_P.astype(np.int64)).to(device)
        with torch.no_grad():
            embedded_UD = embed(torch.from_numpy(distinct_U.astype(np.int64)).to(device))
        with freed_memory_kept():
            outcome = _iterate(
                block, embedded_UD, entries, settings, seed, device, on_iteration, state
            )
        return outcome.iterations

    frozen = {p: p.requires_grad for p in block.parameters()}
    block.requires_grad_(True)
    try:
        outcome.iterations = distribution.by_main(train)
    finally:
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
    if distribution.world() > 1:
        for parameter in block.parameters():
            broadcast(parameter.data)
    return outcome


def _iterate(
    block: ContextBlock,
    embedded_UD: Tensor,
    entries_P: Tensor,
    settings: PhaseOneSettings,
    seed: int,
    device: torch.device,
    on_iteration: Callable[[Iteration], None],
    state: PhaseOneState | None,
) -> PhaseOne:
    started = time.perf_counter()
    contexts_PC = initial_contexts(len(entries_P), block.context_dim, seed, device)
    optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
    known = [] if state is None else state.restore(block, optimizer, contexts_PC)
    outcome = PhaseOne(contexts_PC, known)
    for iteration in known:
        on_iteration(iteration)
    projection = _VocabularyProjection(block, embedded_UD)

    def record(loss: float | None, converged: float) -> None:
        nonlocal started
        now = time.perf_counter()
        iteration = Iteration(len(outcome.iterations) + 1, converged, loss, now - started)
        started = now
        outcome.iterations.append(iteration)
        on_iteration(iteration)
        if state is not None:
            last = _ended(iteration, settings)
            state.save(block, optimizer, contexts_PC, outcome.iterations, last=last)

    if not known:
        record(None, 0.0)
    while not _ended(outcome.iterations[-1], settings):
        number = outcome.iterations[-1].number + 1
        loss, converged = refine(contexts_PC, entries_P, projection, settings, seed, number)
        if not np.isfinite(loss):
            error = NotFiniteError(f"phase 1: the loss of iteration {number} is {loss}")
            if state is not None:
                error.add_note(state.checkpoints.last())
            raise error
        torch.nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
        optimizer.step()
        projection.refresh()
        record(loss, converged)
    return outcome


def _ended(iteration: Iteration, settings: PhaseOneSettings) -> bool:
    return iteration.converged >= settings.stop_at or iteration.number == settings.max_iterations


def refine(
    contexts_PC: Tensor,
    entries_P: Tensor,
    projection: _VocabularyProjection,
    settings: PhaseOneSettings,
    seed: int,
    number: int,
) -> tuple[float, float]:
    """One pass over all positions: new contexts in place, gradients left in the block.

    Args:
        contexts_PC: the previous iteration's contexts, overwritten batch by batch.
        entries_P: row of each position's token in the projection's tables.
        projection: the tokens' part, up to date with the block.
        settings: of phase 1.
        seed: of the noise.
        number: of this iteration.

    Returns:
        The mean loss over batches, and the share of positions that moved less than the threshold.
    """
    block = projection.block
    block.zero_grad(set_to_none=True)
    device = contexts_PC.device
    batches = -(-len(contexts_PC) // settings.batch_size)
    loss_sum = torch.zeros((), device=device)
    converged = torch.zeros((), dtype=torch.int64, device=device)
    before_1C = torch.zeros_like(contexts_PC[:1])
    for batch in range(batches):
        rows = slice(batch * settings.batch_size, (batch + 1) * settings.batch_size)
        previous_NC = contexts_PC[rows].clone()
        generator = batch_generator(seed, number, batch, device)
        noise_NC = torch.empty_like(previous_NC).normal_(generator=generator)
        fed_NC = torch.cat([before_1C, previous_NC[:-1]]) + settings.noise * noise_NC
        projected_NC = projection.rows(entries_P[rows])
        new_NC = block.step(fed_NC, projected_NC)
        loss = oacd_loss(new_NC, settings.mean_weight)
        (loss / batches).backward()
        projection.collect(entries_P[rows], projected_NC)
        new_NC = new_NC.detach()
        contexts_PC[rows] = new_NC
        before_1C = previous_NC[-1:]
        moved_N = F.mse_loss(new_NC, previous_NC, reduction="none").mean(1)
        converged += (moved_N < settings.threshold).sum()
        loss_sum += loss.detach()
    projection.backward()
    return float(loss_sum) / batches, int(converged) / len(contexts_PC)
