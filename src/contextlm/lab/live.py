"""What a user sees while a contender trains, and the `history.jsonl` that keeps it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from contextlm.base import distribution
from contextlm.base.files import write_text
from contextlm.base.progress import Bar, Progress
from contextlm.evaluation.quality import perplexity
from contextlm.results.result import PhaseOneRow, PhaseTwoRow
from contextlm.training.epochs import Epoch
from contextlm.training.phase_one_state import Iteration


class History:
    """`history.jsonl`, rewritten whole at every row so that it can be followed while it grows."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []

    def add(self, row: PhaseOneRow | PhaseTwoRow) -> None:
        self.lines.append(row.model_dump_json())
        if distribution.is_main():
            write_text(self.path, "\n".join(self.lines) + "\n")


class EpochWatcher:
    """Shows the steps of an epoch as a bar and each finished epoch as a line."""

    def __init__(self, progress: Progress, history: History):
        self.progress = progress
        self.history = history
        self.stack = ExitStack()
        self.bar: Bar | None = None

    def on_epoch_begin(self, number: int, steps: int) -> None:
        self.bar = self.stack.enter_context(self.progress.bar(steps, f"epoch {number}"))

    def on_step(self) -> None:
        if self.bar is not None:
            self.bar.advance()

    def on_epoch_end(self, epoch: Epoch, best: bool) -> None:
        self.stack.close()
        row = PhaseTwoRow(
            epoch=epoch.number,
            train_loss=epoch.train_loss,
            train_ppl=perplexity(epoch.train_loss),
            validation_loss=epoch.validation_loss,
            validation_ppl=perplexity(epoch.validation_loss),
            accuracy=epoch.accuracy,
            learning_rate=epoch.learning_rate,
        )
        self.history.add(row)
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
            )
        )
        loss = "random start" if iteration.loss is None else f"loss {iteration.loss:.4f}"
        self.progress.line(
            f"iteration {iteration.number:2d}  converged {100 * iteration.converged:.1f} %  "
            f"{loss}  {iteration.seconds:.1f} s"
        )
