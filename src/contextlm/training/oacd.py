"""Phase 1: context training by origin-anchored centroid dispersion (OACD), DESIGN 1.6.

The contexts of all positions of one long token stream are refined together. Each iteration feeds
position i the previous iteration's context of position i-1, plus noise, through the context block;
the outputs are the new contexts. The loss pushes the contexts of a batch apart and their mean
towards zero, so that different histories become different vectors.

Its state is kept on disk, so that it resumes after its process was killed: an iteration needs the
contexts of the one before, the block's weights and the optimiser's moments.

Shape suffixes: N positions of a batch, P all positions, U distinct tokens of the stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor, nn

from contextlm.base import distribution
from contextlm.base.errors import NotFiniteError
from contextlm.models.layers import ContextBlock
from contextlm.ops.normal_noise import normal_noise, philox_key
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.checkpoints import (
    Checkpoints,
    Groups,
    Tell,
    optimizer_tensors,
    restore_optimizer,
)
from contextlm.training.host_memory import freed_memory_kept

INITIAL_STD = 0.01

# Contexts can take gigabytes: writing them takes at most this share of the time.
_SHARE = 0.05


@dataclass(frozen=True)
class Iteration:
    """One iteration: its number from 1, share of converged positions, mean loss, seconds."""

    number: int
    converged: float
    loss: float | None
    seconds: float


@dataclass
class PhaseOne:
    """The last iteration's contexts, of several processes on rank 0 only, and all iterations."""

    contexts_PC: Tensor
    iterations: list[Iteration]

    @property
    def converged(self) -> float:
        """Share of converged positions at the end, 0..1."""
        return self.iterations[-1].converged


class PhaseOneState:
    """The states of one phase 1.

    Args:
        folder: theirs alone; made when the first is written.
        tell: takes one line for each damaged state.
    """

    def __init__(self, folder: Path, tell: Tell):
        self.checkpoints = Checkpoints(folder, "iteration", tell)
        self._due = 0.0

    @torch.no_grad()
    def restore(
        self, block: nn.Module, optimizer: torch.optim.Optimizer, contexts_PC: Tensor
    ) -> list[Iteration]:
        """Put the newest whole state into the arguments; the iterations that it stands for."""
        for number in self.checkpoints.whole()[:1]:
            contexts_PC.copy_(self.checkpoints.tensors(number, "contexts")["all"])
            weights = self.checkpoints.tensors(number, "block")
            for name, parameter in block.named_parameters():
                parameter.copy_(weights[name])
            restore_optimizer(optimizer, self.checkpoints.tensors(number, "optimizer"))
            return [Iteration(**entry) for entry in self.checkpoints.record(number)]
        return []

    def save(
        self,
        block: nn.Module,
        optimizer: torch.optim.Optimizer,
        contexts_PC: Tensor,
        iterations: Sequence[Iteration],
        *,
        last: bool,
    ) -> None:
        """Write what the next iteration needs; not if that was done recently and is not `last`."""
        started = time.monotonic()
        if started < self._due and not last:
            return
        groups: Groups = {
            "contexts": {"all": contexts_PC},
            "block": dict(block.named_parameters()),
            "optimizer": optimizer_tensors(optimizer),
        }
        record = [asdict(iteration) for iteration in iterations]
        self.checkpoints.write(iterations[-1].number, groups, record)
        ended = time.monotonic()
        self._due = ended + (ended - started) / _SHARE


def oacd_loss(contexts_NC: Tensor, mean_weight: float = 0.1) -> Tensor:
    """``-||c - mean||_F / n + mean_weight ||mean||^2``, the mean over the batch's n positions.

    The second term anchors the mean at the origin.
    """
    mean_C = contexts_NC.mean(0)
    dispersion = torch.linalg.vector_norm(contexts_NC - mean_C) / contexts_NC.shape[0]
    return mean_weight * mean_C.square().sum() - dispersion


def oacd_loss_with_gradient(contexts_NC: Tensor, mean_weight: float) -> tuple[Tensor, Tensor]:
    """`oacd_loss` and its gradient ``2 w mean / n - (c - mean) / (n ||c - mean||_F)``, ``[N, C]``.

    Takes half of autograd's passes. Where all contexts are equal, the dispersion's gradient is 0.
    """
    positions, mean_C = len(contexts_NC), contexts_NC.mean(0)
    centred_NC = contexts_NC - mean_C
    norm = torch.linalg.vector_norm(centred_NC)
    loss = mean_weight * mean_C.square().sum() - norm / positions
    inverse = torch.where(norm > 0, -1 / (positions * norm), 0)
    return loss, centred_NC.mul_(inverse).add_(mean_C, alpha=2 * mean_weight / positions)


def batch_noise(like_NC: Tensor, seed: int, iteration: int, batch: int) -> Tensor:
    """Numbers of N(0, 1) for one batch: they depend on its shape and these numbers alone.

    An accelerator draws others than the CPU, by torch's own generator.
    """
    key = philox_key(seed, iteration, batch)
    if like_NC.device.type == "cpu":
        rows, columns = like_NC.shape
        return normal_noise(rows, columns, key).to(like_NC.dtype)
    generator = torch.Generator(like_NC.device).manual_seed(key[0] << 31 | key[1] >> 1)
    return torch.empty_like(like_NC).normal_(generator=generator)


def initial_contexts(positions: int, width: int, seed: int, device: torch.device) -> Tensor:
    """The random contexts that the first iteration consists of, ``[P, C]``."""
    contexts_PC = torch.empty(positions, width, device=device)
    return batch_noise(contexts_PC, seed, 1, 0).mul_(INITIAL_STD)


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
        seed: of the random start and the noise.
        on_iteration: called after every iteration, and first for those that `state` brings back; on
            rank 0 only.
        state: keeps on disk where training is, and brings that back.

    Raises:
        NotFiniteError: the loss is not finite; the message names the iteration, a note the last
            good state.
    """
    outcome = PhaseOne(torch.empty(0, block.context_dim, device=device), [])

    def train() -> list[Iteration]:
        distinct_U, entries_P = np.unique(np.asarray(tokens_P), return_inverse=True)
        entries = torch.from_numpy(entries_P.astype(np.int64)).to(device)
        with torch.no_grad():
            embedded_UD = embed(torch.from_numpy(distinct_U.astype(np.int64)).to(device))
        projection = _VocabularyProjection(block, embedded_UD)
        outcome.contexts_PC = initial_contexts(len(entries), block.context_dim, seed, device)
        with freed_memory_kept():
            _iterate(outcome, entries, projection, settings, seed, on_iteration, state)
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
    outcome: PhaseOne,
    entries_P: Tensor,
    projection: _VocabularyProjection,
    settings: PhaseOneSettings,
    seed: int,
    on_iteration: Callable[[Iteration], None],
    state: PhaseOneState | None,
) -> None:
    block, contexts_PC, iterations = projection.block, outcome.contexts_PC, outcome.iterations
    optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
    if state is not None:
        iterations += state.restore(block, optimizer, contexts_PC)
        projection.refresh()
    for iteration in iterations:
        on_iteration(iteration)
    while not (iterations and _ended(iterations[-1], settings)):
        started = time.perf_counter()
        number, loss, converged = len(iterations) + 1, None, 0.0
        if number > 1:  # the first is the random start
            loss, converged = refine(contexts_PC, entries_P, projection, settings, seed, number)
            if not np.isfinite(loss):
                error = NotFiniteError(f"phase 1: the loss of iteration {number} is {loss}")
                if state is not None:
                    error.add_note(state.checkpoints.last())
                raise error
            torch.nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
            optimizer.step()
            projection.refresh()
        iterations.append(Iteration(number, converged, loss, time.perf_counter() - started))
        on_iteration(iterations[-1])
        if state is not None:
            last = _ended(iterations[-1], settings)
            state.save(block, optimizer, contexts_PC, iterations, last=last)


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
        previous_NC = contexts_PC[rows]
        fed_NC = torch.cat([before_1C, previous_NC[:-1]])
        fed_NC.add_(batch_noise(fed_NC, seed, number, batch), alpha=settings.noise)
        projected_NC = projection.rows(entries_P[rows])
        learning_NC = block.step(fed_NC, projected_NC)
        new_NC = learning_NC.detach()
        loss, gradient_NC = oacd_loss_with_gradient(new_NC, settings.mean_weight)
        learning_NC.backward(gradient_NC.div_(batches))
        projection.collect(entries_P[rows], projected_NC)
        moved_N = F.mse_loss(new_NC, previous_NC, reduction="none").mean(1)
        before_1C = previous_NC[-1:].clone()
        contexts_PC[rows] = new_NC
        converged += (moved_N < settings.threshold).sum()
        loss_sum += loss
    projection.backward()
    return float(loss_sum) / batches, int(converged) / len(contexts_PC)
