"""Where phase 2 is, kept on disk, so that it resumes to the bit after its process was killed.

A checkpoint is written after every epoch, and inside one when much time has passed or the process
is told to stop. It holds the weights that train, the optimiser's state, torch's random states, the
loss of every step and the finished epochs; order of windows and rates follow from the step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from contextlm.base.errors import NotFiniteError
from contextlm.base.interrupts import Deferred
from contextlm.training.checkpoints import (
    Checkpoints,
    Tell,
    optimizer_tensors,
    restore_optimizer,
)

SAVE_SECONDS = 600.0  # of work that a kill inside an epoch may cost


@dataclass(frozen=True)
class Epoch:
    """One finished epoch, with the step that ended it.

    Losses are in nats per token, `seconds` without the evaluation.
    """

    number: int
    step: int
    train_loss: float
    validation_loss: float
    accuracy: float
    learning_rate: float
    seconds: float


@dataclass
class PhaseTwo:
    """What phase 2 has done: the loss of every optimiser step, and the finished epochs.

    `seconds` are those of an unfinished epoch, from before its process was killed.
    """

    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best_epoch(self) -> int:
        """Number of the best epoch so far."""
        return best_of(self.epochs).number


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The first epoch with the lowest validation loss."""
    return min(epochs, key=lambda epoch: epoch.validation_loss)


class PhaseTwoState:
    """The checkpoints of one phase 2, alone in their folder."""

    def __init__(self, folder: Path, device: torch.device, asked: Deferred, tell: Tell):
        self.checkpoints = Checkpoints(folder, "step", tell)
        self.device = device
        self.asked = asked
        self.tell = tell
        self._saved = time.monotonic()

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> PhaseTwo:
        """Put the newest whole checkpoint back whose best epoch's weights are whole too, if any."""
        whole = self.checkpoints.whole()
        for step in whole:
            record = self.checkpoints.record(step)
            epochs = [Epoch(**entry) for entry in record["epochs"]]
            if not epochs or best_of(epochs).step in whole:
                self.tell(f"resuming from {self.checkpoints.place(step)}")
                load_weights(model, self.checkpoints.tensors(step, "weights"))
                restore_optimizer(optimizer, self.checkpoints.tensors(step, "optimizer"))
                states = self.checkpoints.tensors(step, "random")
                torch.set_rng_state(states["cpu"])
                if self.device.type != "cpu":
                    torch.get_device_module(self.device).set_rng_state(states["device"])
                losses = self.checkpoints.tensors(step, "losses")["all"].tolist()
                return PhaseTwo(losses, epochs, record["seconds"])
            self.checkpoints.remove(step)
        return PhaseTwo()

    def due(self) -> bool:
        """Whether a checkpoint is to be written inside an epoch."""
        if self.asked:
            self.tell("told to stop: writing a checkpoint first (once more stops at once)")
        return bool(self.asked) or time.monotonic() - self._saved >= SAVE_SECONDS

    def save(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, done: PhaseTwo
    ) -> None:
        """Write a checkpoint; then stop, if the process was told to.

        Raises:
            NotFiniteError: a weight is not finite, so that this would be no good checkpoint.
        """
        step = len(done.losses)
        weights = trained_weights(model)
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise NotFiniteError(f"{name} is not finite after step {step}")
        states = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            states["device"] = torch.get_device_module(self.device).get_rng_state()
        record = {"epochs": [asdict(epoch) for epoch in done.epochs], "seconds": done.seconds}
        groups = {
            "weights": weights,
            "optimizer": optimizer_tensors(optimizer),
            "losses": {"all": torch.tensor(done.losses, dtype=torch.float64)},
            "random": states,
        }
        # The checkpoint before this one, which is to serve if this is damaged, may need another.
        before = [epochs for epochs in (done.epochs, done.epochs[:-1]) if epochs]
        bests = {best_of(epochs).step for epochs in before}
        self.checkpoints.write(step, groups, record, keep=bests)
        self._saved = time.monotonic()
        self.asked.raise_now()


def trained_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name; of a sharded model gathered, which all ranks call."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of these names."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
