"""Where phase 1 is, kept on disk, so that it resumes after its process was killed.

An iteration needs the contexts of the one before, the block's weights and the optimiser's moments.

Shape suffixes: P positions of the stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from contextlm.training.checkpoints import (
    Checkpoints,
    Groups,
    Tell,
    optimizer_tensors,
    restore_optimizer,
    silent,
)

# Contexts can take gigabytes: writing them takes at most this share of the time.
_SHARE = 0.05


@dataclass(frozen=True)
class Iteration:
    """One iteration: its number from 1, share of converged positions, mean loss, seconds."""

    number: int
    converged: float
    loss: float | None
    seconds: float


class PhaseOneState:
    """The states of one phase 1.

    Args:
        folder: theirs alone; made when the first is written.
        tell: takes one line for each damaged state.
    """

    def __init__(self, folder: Path, tell: Tell = silent):
        self.checkpoints = Checkpoints(folder, "iteration", tell)
        self._due = 0.0

    @torch.no_grad()
    def restore(
        self, block: nn.Module, optimizer: torch.optim.Optimizer, contexts_PC: Tensor
    ) -> list[Iteration]:
        """Put the newest whole state into the arguments.

        Returns:
            The iterations that it stands for; none if there is no state, and nothing was changed.
        """
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
        """Write the state after the last of `iterations`, unless one was written too recently.

        Args:
            block: with the weights that the next iteration uses.
            optimizer: of the block's parameters.
            contexts_PC: what the next iteration is fed.
            iterations: all so far.
            last: phase 1 has ended: write in any case.
        """
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
