"""Where phase 2 is, kept on disk, so that it resumes to the bit after its process was killed.

A checkpoint is written after every epoch, and inside one when much time has passed or the process
is told to stop; trainings that share a trunk leave one there, too. It holds the weights that train,
the optimiser's state, torch's random states, the loss of every step and the finished epochs; order
of windows and rates follow from the step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
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
    """One finished epoch, with the step that ended it and the targets trained on up to there.

    Losses are in nats per token, `seconds` without the evaluation.
    """

    number: int
    step: int
    tokens: int
    train_loss: float
    validation_loss: float
    accuracy: float
    learning_rate: float
    seconds: float


@dataclass
class PhaseTwo:
    """What phase 2 has done: every optimiser step, and the finished epochs.

    Of each step `losses` has its loss, `tokens` the targets trained on up to there. `seconds` are
    those of an unfinished epoch, from before its process was killed.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def trained_tokens(self) -> int:
        """Targets trained on so far, repeats counted."""
        return self.tokens[-1] if self.tokens else 0

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

    def restore(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        trunk: Path | None = None,
        branch: int = 0,
    ) -> PhaseTwo:
        """Put the newest whole checkpoint back whose best epoch's weights are whole too, if any.

        Where there is none, the newest of a `trunk` that lies no further than step `branch`.
        """
        whole = self.checkpoints.whole()
        for step in whole:
            epochs = self._epochs(self.checkpoints, step)
            if not epochs or best_of(epochs).step in whole:
                self.tell(f"resuming from {self.checkpoints.place(step)}")
                return self._load(self.checkpoints, step, model, optimizer)
            self.checkpoints.remove(step)
        if trunk is not None:
            shared = Checkpoints(trunk, "step", self.tell)
            for step in shared.whole():
                if step <= branch:
                    self.tell(f"going on from step {step:,} of a shorter training")
                    return self._load(shared, step, model, optimizer)
        return PhaseTwo()

    def _load(
        self,
        checkpoints: Checkpoints,
        step: int,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
    ) -> PhaseTwo:
        load_weights(model, checkpoints.tensors(step, "weights"))
        restore_optimizer(optimizer, checkpoints.tensors(step, "optimizer"))
        states = checkpoints.tensors(step, "random")
        torch.set_rng_state(states["cpu"])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states["device"])
        steps = {name: value.tolist() for name, value in checkpoints.tensors(step, "steps").items()}
        seconds = checkpoints.record(step)["seconds"]
        epochs = self._epochs(checkpoints, step)
        return PhaseTwo(steps["losses"], steps["tokens"], epochs, seconds)

    def _epochs(self, checkpoints: Checkpoints, step: int) -> list[Epoch]:
        return [Epoch(**entry) for entry in checkpoints.record(step)["epochs"]]

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
        # The checkpoint before this one, which is to serve if this is damaged, may need another.
        before = [epochs for epochs in (done.epochs, done.epochs[:-1]) if epochs]
        bests = {best_of(epochs).step for epochs in before}
        self._write(self.checkpoints, model, optimizer, done, bests)
        self._saved = time.monotonic()
        self.asked.raise_now()

    def leave(
        self,
        trunk: Path,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        done: PhaseTwo,
    ) -> None:
        """Write a checkpoint into a `trunk`, for longer trainings to go on from."""
        self._write(Checkpoints(trunk, "step", self.tell), model, optimizer, done)

    def _write(
        self,
        checkpoints: Checkpoints,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        done: PhaseTwo,
        keep: Collection[int] = (),
    ) -> None:
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
            "steps": {
                "losses": torch.tensor(done.losses, dtype=torch.float64),
                "tokens": torch.tensor(done.tokens),
            },
            "random": states,
        }
        checkpoints.write(step, groups, record, keep)


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
