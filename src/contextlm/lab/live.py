"""What a user sees while a contender trains, and the `history.jsonl` that keeps it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from contextlm.base import distribution
from contextlm.base.files import disk_faults_named
from contextlm.base.progress import Bar, Progress
from contextlm.lab.tracking import Tracking
from contextlm.results.facts import perplexity
from contextlm.results.result import HistoryRow, PhaseOneRow, PhaseTwoRow, StepRow
from contextlm.training.oacd import Iteration
from contextlm.training.phase_two_state import Epoch

MOST_STEP_ROWS = 2000  # of one training
_SMOOTHED = 50  # steps over which the loss beside the bar is smoothed


class History:
    """`history.jsonl`, to which rows are appended as they come.

    It begins anew with its first row: training that resumes tells again what its checkpoint knows,
    so rows from beyond that, and a line that a killed process left torn, are gone.

    Args:
        path: the file.
        tracking: gets the rows too.
    """

    def __init__(self, path: Path, tracking: Tracking | None = None):
        self.path = path
        self.tracking = tracking or Tracking()
        self._begun = False

    def add(self, row: HistoryRow, step: int) -> None:
        """Append a row; `step` is the iteration or optimiser step at which it stands.

        Raises:
            RunError: the disk is full or failing.
        """
        if not distribution.is_main():
            return
        with disk_faults_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self._begun else "w", encoding="utf-8") as file:
                file.write(row.model_dump_json() + "\n")
                if not isinstance(row, StepRow):  # there are many of those
                    file.flush()
                    os.fsync(file.fileno())
        self._begun = True
        self.tracking.log(row, step)


class EpochWatcher:
    """Shows the steps of an epoch as a bar with the loss, and each finished epoch as a line.

    At most `MOST_STEP_ROWS` steps of a training go into the history: of more, one in every so many.
    """

    def __init__(self, progress: Progress, history: History):
        self.progress = progress
        self.history = history
        self.stack = ExitStack()
        self.bar: Bar | None = None
        self._number = self._first = 0
        self._every = 1
        self._loss = 0.0

    def on_epoch_begin(self, number: int, epochs: int, steps: int) -> None:
        """Show a bar for the epoch."""
        self.bar = self.stack.enter_context(self.progress.bar(steps, f"epoch {number}"))
        self._number, self._first = number, (number - 1) * steps
        self._every = -(-epochs * steps // MOST_STEP_ROWS)

    def on_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """Move the bar on, and record the step if it is one in so many."""
        self._loss += (loss - self._loss) / min(step - self._first, _SMOOTHED)
        if self.bar is not None:
            self.bar.advance(text=f"epoch {self._number}, loss {self._loss:.4f}")
        if (step - 1) % self._every == 0:
            self.history.add(
                StepRow(
                    step=step,
                    epoch=self._number,
                    loss=loss,
                    learning_rate=learning_rate,
                    tokens=tokens,
                ),
                step,
            )

    def on_epoch_end(self, epoch: Epoch, best: bool) -> None:
        """Take the bar away, and record and show the finished epoch."""
        self.stack.close()
        row = PhaseTwoRow(
            epoch=epoch.number,
            train_loss=epoch.train_loss,
            train_ppl=perplexity(epoch.train_loss),
            validation_loss=epoch.validation_loss,
            validation_ppl=perplexity(epoch.validation_loss),
            accuracy=epoch.accuracy,
            learning_rate=epoch.learning_rate,
            tokens=epoch.tokens,
        )
        self.history.add(row, epoch.step)
        self.progress.line(
            f"epoch {epoch.number:2d}  train loss {epoch.train_loss:.4f}  "
            f"val PPL {row.validation_ppl:.1f}  acc {100 * epoch.accuracy:.2f} %  "
            f"{epoch.seconds:.1f} s{'  *' if best else ''}"
        )


class IterationWatcher:
    """Shows each iteration of phase 1 as a line."""

    def __init__(self, progress: Progress, history: History):
        self.progress = progress
        self.history = history

    def __call__(self, iteration: Iteration) -> None:
        """Record and show one finished iteration."""
        self.history.add(
            PhaseOneRow(
                iteration=iteration.number, converged=iteration.converged, loss=iteration.loss
            ),
            iteration.number,
        )
        loss = "random start" if iteration.loss is None else f"loss {iteration.loss:.4f}"
        self.progress.line(
            f"iteration {iteration.number:2d}  converged {100 * iteration.converged:.1f} %  "
            f"{loss}  {iteration.seconds:.1f} s"
        )
