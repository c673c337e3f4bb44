"""The Trainer's working checkpoints: sealed, kept, found again, and written when told to stop.

The Trainer writes a checkpoint file by file: a killed process leaves a part of one. Here each gets
what the Trainer does not keep (the epochs so far, the running loss), then a manifest of checksums.
One is written after every epoch, and inside an epoch when much time has passed or the process is
told to stop. Of optimiser and random states the Trainer unpickles tensors and numbers only. For one
process: several keep nothing to go on from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from contextlm.base.errors import NotFiniteError, RunError, is_out_of_memory
from contextlm.base.files import write_json
from contextlm.base.interrupts import Deferred
from contextlm.training.checkpoints import Tell, number, prune, seal, sealed
from contextlm.training.epochs import Epoch, EpochRecorder

SAVE_SECONDS = 600.0  # of work that a kill inside an epoch may cost
_PREFIX = "checkpoint"  # the Trainer's
_RECORD = "contextlm.json"


class CheckpointKeeper(TrainerCallback):
    """Seals the Trainer's checkpoints, and brings the newest whole one back.

    Args:
        folder: where the Trainer writes them.
        training: what is trained and how; checkpoints of another training are not used.
        recorder: of epochs, whose record is kept and restored.
        asked: whether the process is to stop.
        tell: takes one line for each damaged checkpoint, and when training goes on or stops.
    """

    def __init__(
        self, folder: Path, training: Any, recorder: EpochRecorder, asked: Deferred, tell: Tell
    ):
        self.folder = folder.absolute()
        self.training = hashlib.sha256(json.dumps(training).encode()).hexdigest()
        self.recorder = recorder
        self.asked = asked
        self.tell = tell
        self.trainer: Any = None
        self._record: dict[str, Any] = {}
        self._saved = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Watch this Trainer."""
        self.trainer = trainer
        trainer.add_callback(self)

    def latest(self) -> Path | None:
        """The newest whole checkpoint whose best epoch's weights are whole too, if there is one.

        The recorder is brought to where it was then.
        """
        whole = sealed(self.folder, _PREFIX, self.tell)
        numbers = {number(place) for place in whole}
        for place in whole:
            record = json.loads((place / _RECORD).read_text("utf-8"))
            best = _state(place)["best_global_step"]
            if record["training"] == self.training and (best is None or best in numbers):
                self._record = record
                epochs = [Epoch(**entry) for entry in record["epochs"]]
                self.tell(f"going on from {place}")
                self.recorder.restore(epochs, record["seconds"])
                return place
            shutil.rmtree(place)
        return None

    def ended(self, checkpoint: Path) -> bool:
        """Whether training had ended with this checkpoint."""
        control = _state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]
        return bool(control["should_training_stop"])

    def load_best(self, checkpoint: Path, model: PreTrainedModel) -> None:
        """Put the weights of the best epoch so far into `model`."""
        best = checkpoint.with_name(f"{_PREFIX}-{_state(checkpoint)['best_global_step']}")
        safetensors.torch.load_model(model, best / SAFE_WEIGHTS_NAME)

    def last(self) -> str:
        """Where the newest whole checkpoint is, in words."""
        places = sealed(self.folder, _PREFIX, self.tell)
        if places:
            return f"the last good checkpoint is {places[0]}"
        return "no checkpoint had been written"

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around the Trainer's own writing of a checkpoint: then complete and seal it.

        Raises:
            RunError: it could not be written; nothing of it remains.
        """
        place = self.folder / f"{_PREFIX}-{step}"
        try:
            yield
            self._complete(place)
        # safetensors and torch have faults of their own for what the disk refuses.
        except (OSError, RuntimeError, SafetensorError, RunError) as error:
            shutil.rmtree(place, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise RunError(
                f"{place}: the checkpoint could not be written, nothing of it remains: {reason}"
            ) from error

    def _complete(self, place: Path) -> None:
        state, trainer = self.trainer.state, self.trainer
        inside = _inside_an_epoch(trainer.args, state)
        record = {
            "training": self.training,
            "epochs": [asdict(epoch) for epoch in self.recorder.epochs],
            "seconds": self.recorder.seconds_in_epoch() if inside else 0.0,
            # float32, so that the way through JSON keeps it to the bit
            "loss_sum": trainer._tr_loss.item(),
            "logged_step": trainer._globalstep_last_logged,
        }
        write_json(place / _RECORD, record)
        seal(place)
        prune(self.folder, _PREFIX, {state.best_global_step})
        self._saved = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = time.monotonic()
        if self._record:
            # The Trainer would count the running loss of an epoch from where it goes on.
            self.trainer._tr_loss += self._record["loss_sum"]
            self.trainer._globalstep_last_logged = self._record["logged_step"]
        if state.best_global_step is not None:
            # The folder may have moved since; the Trainer would go on without the best weights.
            best = self.folder / f"{_PREFIX}-{state.best_global_step}"
            state.best_model_checkpoint = str(best)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not _inside_an_epoch(args, state):
            return  # the epoch's own checkpoint comes next
        if self.asked or time.monotonic() - self._saved >= SAVE_SECONDS:
            if self.asked:
                self.tell("told to stop: writing a checkpoint first (once more stops at once)")
            _check_finite(kwargs["model"], state.global_step)
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.asked.raise_now()


def _inside_an_epoch(args: TrainingArguments, state: TrainerState) -> bool:
    steps = max(1, state.max_steps // int(args.num_train_epochs))
    return state.global_step % steps != 0


def _check_finite(model: torch.nn.Module, step: int) -> None:
    """A checkpoint must be a good one, and no validation has looked at these weights."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NotFiniteError(f"{name} is not finite after step {step}")


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    return state
