"""Where phase 1 is, kept on disk, so that it can go on after its process was killed.

An iteration needs the contexts of the one before, the block's weights and the optimiser's moments.
All are tensors, in one safetensors file in a sealed folder; the record of iterations lies beside
them as JSON. Nothing is pickled.

Shape suffixes: P positions of the stream, C context width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from contextlm.base.files import atomic_folder
from contextlm.training.checkpoints import Tell, prune, seal, sealed, silent

_PREFIX = "iteration"
_TENSORS, _RECORD = "state.safetensors", "iterations.json"
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
        self.folder = folder
        self.tell = tell
        self._due = 0.0

    @torch.no_grad()
    def restore(
        self, block: nn.Module, optimizer: torch.optim.Optimizer, contexts_PC: Tensor
    ) -> list[Iteration]:
        """Put the newest whole state into the arguments.

        Returns:
            The iterations that it stands for; none if there is no state, and nothing was changed.
        """
        for place in sealed(self.folder, _PREFIX, self.tell):
            record = json.loads((place / _RECORD).read_text("utf-8"))
            with safetensors.safe_open(place / _TENSORS, framework="pt") as stored:
                # Copied into memory of torch's own: the file's may be aligned otherwise, and sums
                # depend on that on some processors.
                contexts_PC.copy_(stored.get_tensor("contexts"))
                names = set(stored.keys())
                for index, parameter in enumerate(block.parameters()):
                    parameter.copy_(stored.get_tensor(f"block.{index}"))
                    prefix = f"optimizer.{index}."
                    for name in names:
                        if name.startswith(prefix):
                            key = name.removeprefix(prefix)
                            # Adam counts its steps on the CPU.
                            device = "cpu" if key == "step" else parameter.device
                            moment = stored.get_tensor(name).to(device, copy=True)
                            optimizer.state[parameter][key] = moment.clone()
            return [Iteration(**entry) for entry in record]
        return []

    @torch.no_grad()
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
            optimizer: of the block's parameters, in their order.
            contexts_PC: what the next iteration is fed.
            iterations: all so far.
            last: phase 1 has ended: write in any case.
        """
        started = time.monotonic()
        if started < self._due and not last:
            return
        tensors = {"contexts": contexts_PC}
        for index, parameter in enumerate(block.parameters()):
            tensors[f"block.{index}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        place = self.folder / f"{_PREFIX}-{iterations[-1].number}"
        with atomic_folder(place) as partial:
            stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            safetensors.torch.save_file(stored, partial / _TENSORS)
            record = json.dumps([asdict(iteration) for iteration in iterations])
            (partial / _RECORD).write_text(record, "utf-8")
            seal(partial)
        prune(self.folder, _PREFIX)
        ended = time.monotonic()
        self._due = ended + (ended - started) / _SHARE

    def last(self) -> str:
        """Where the newest state is, in words."""
        places = sealed(self.folder, _PREFIX, self.tell)
        return f"the last good state is in {places[0]}" if places else "no state was written before"
