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
from torch import Tensor

from contextlm.base import distribution
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.phase_one_state import Iteration, PhaseOneState
from contextlm.training.stream_parts import (
    Part,
    context_before,
    gathered,
    own_part,
    sum_gradients,
    zero_gradients,
)

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

    Args:
        block: the context block, on `device`.
        embed: maps token ids to normalised embeddings, ``[..., D]``; it stays as it is.
        tokens_P: the stream.
        settings: learning rate, noise, batch size, when to stop.
        seed: of the random start and the noise.
        device: where to compute.
        on_iteration: called after every iteration, and first for those that `state` brings back.
        state: keeps on disk where training is, and brings that back; None: nothing is kept.

    Returns:
        The last contexts and a record of every iteration.

    Raises:
        ValueError: the stream is empty.
        FloatingPointError: the loss is not finite; the message names the iteration.
    """
    if len(tokens_P) == 0:
        raise ValueError("phase 1 needs at least one token")
    distinct_U, entries_P = np.unique(np.asarray(tokens_P), return_inverse=True)
    entries = torch.from_numpy(entries_P.astype(np.int64)).to(device)
    with torch.no_grad():
        embedded_UD = embed(torch.from_numpy(distinct_U.astype(np.int64)).to(device))
    frozen = {p: p.requires_grad for p in block.parameters()}
    block.requires_grad_(True)
    try:
        with freed_memory_kept():
            return _iterate(
                block, embedded_UD, entries, settings, seed, device, on_iteration, state
            )
    finally:
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


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
    part = own_part(len(entries_P), settings.batch_size)
    contexts_PC = initial_contexts(len(entries_P), block.context_dim, seed, device)
    if distribution.world() > 1:
        contexts_PC = contexts_PC[part.rows].clone()  # the others' are not kept
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
        loss, converged = refine(contexts_PC, entries_P, projection, settings, seed, number, part)
        if not np.isfinite(loss):
            raise FloatingPointError(f"phase 1: the loss of iteration {number} is {loss}")
        torch.nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
        optimizer.step()
        projection.refresh()
        record(loss, converged)
    outcome.contexts_PC = gathered(contexts_PC, settings.batch_size, len(entries_P))
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
    part: Part,
) -> tuple[float, float]:
    """One pass over all positions: new contexts in place, gradients left in the block.

    With several processes each passes over its part; the gradients and what is returned are those
    of all.

    Args:
        contexts_PC: the previous iteration's contexts of this part, overwritten batch by batch.
        entries_P: row of each position's token in the projection's tables.
        projection: the tokens' part, up to date with the block.
        settings: of phase 1.
        seed: of the noise.
        number: of this iteration.
        part: of the stream, that is passed over here.

    Returns:
        The mean loss over batches, and the share of positions that moved less than the threshold.
    """
    block, size = projection.block, settings.batch_size
    block.zero_grad(set_to_none=True)
    device = contexts_PC.device
    loss_sum = torch.zeros((), device=device)
    converged = torch.zeros((), dtype=torch.int64, device=device)
    before_1C = context_before(contexts_PC, part)
    for batch in range(part.first, part.last):
        in_stream = slice(batch * size, min((batch + 1) * size, part.positions))
        rows = slice(in_stream.start - part.start, in_stream.stop - part.start)
        previous_NC = contexts_PC[rows].clone()
        generator = batch_generator(seed, number, batch, device)
        noise_NC = torch.empty_like(previous_NC).normal_(generator=generator)
        fed_NC = torch.cat([before_1C, previous_NC[:-1]]) + settings.noise * noise_NC
        projected_NC = projection.rows(entries_P[in_stream])
        new_NC = block.step(fed_NC, projected_NC)
        loss = oacd_loss(new_NC, settings.mean_weight)
        (loss / part.batches).backward()
        projection.collect(entries_P[in_stream], projected_NC)
        new_NC = new_NC.detach()
        contexts_PC[rows] = new_NC
        before_1C = previous_NC[-1:]
        moved_N = F.mse_loss(new_NC, previous_NC, reduction="none").mean(1)
        converged += (moved_N < settings.threshold).sum()
        loss_sum += loss.detach()
    zero_gradients(block.parameters())  # of a rank without batches
    projection.backward()
    sum_gradients(block)
    all_loss, all_converged = distribution.totals([float(loss_sum), int(converged)])
    return all_loss / part.batches, all_converged / part.positions
