"""What a job leaves that is no full result: a learning rate tried, a training that diverged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from contextlm.results.facts import Count, Figure, Record


class TrialResult(Record):
    """One learning rate tried by the job of that identity.

    The loss is the best epoch's in nats a token, None where training diverged.
    """

    version: Literal[1] = 1
    job: str
    learning_rate: Figure
    validation_loss: Figure | None


class Divergence(Record):
    """A contender and seed whose training did not stay finite; `diverged` says what happened."""

    version: Literal[1] = 1
    recipe: str
    scale: str
    contender: str
    architecture: str
    baseline: bool
    seed: Count
    job: str
    setting: str
    diverged: str


def read_trial(folder: Path) -> TrialResult | None:
    """The trial whose folder it is; None where there is none, or a damaged one."""
    try:
        return TrialResult.model_validate_json((folder / "result.json").read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def read_divergence(folder: Path) -> Divergence | None:
    """That of a contender and seed's folder; None where training ended well or has not ended."""
    try:
        return Divergence.model_validate_json((folder / "result.json").read_text("utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
