"""What the context stores and the stages of one contender's runs took, over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from contextlm.report.numbers import Stat
from contextlm.results.result import Outcome, Timings

DATA_LOADED = "data loaded"
MODEL_INITIALISED = "model initialised"
AFTER_PHASE_1 = "after phase 1"
PHASE_2_PREPARED = "phase 2 prepared"
TRAINED = "trained"
STAGES = DATA_LOADED, MODEL_INITIALISED, AFTER_PHASE_1, PHASE_2_PREPARED, TRAINED


@dataclass(frozen=True)
class StoreSummary:
    """The context stores of both splits. Sizes in bytes, the same for every seed.

    Drifts are mean squares per number, `seconds` those of filling both stores.
    """

    fill: Literal["sequential", "parallel"]
    dtype: Literal["float32", "bfloat16"]
    train_bytes: int
    validation_bytes: int
    drift_train: Stat
    drift_validation: Stat
    seconds: Stat | None

    @property
    def total_bytes(self) -> int:
        """Both splits together."""
        return self.train_bytes + self.validation_bytes


@dataclass(frozen=True)
class StageSummary:
    """Memory in use when a stage ended: medians over the seeds, in bytes."""

    stage: str
    host_bytes: float
    accelerator_bytes: float | None


def store_summary(outcomes: Sequence[Outcome]) -> StoreSummary | None:
    """The stores that one contender's seeds read; None if they read none."""
    facts = [o.result.store for o in outcomes if o.result.store is not None]
    if not facts:
        return None
    return StoreSummary(
        fill=facts[0].fill,
        dtype=facts[0].dtype,
        train_bytes=facts[0].train_bytes,
        validation_bytes=facts[0].validation_bytes,
        drift_train=Stat.of(f.drift_train for f in facts),
        drift_validation=Stat.of(f.drift_validation for f in facts),
        seconds=Stat.of_known(o.timings.store_seconds for o in outcomes),
    )


def stage_summaries(timings: Sequence[Timings]) -> tuple[StageSummary, ...]:
    """Every stage that a seed of one contender came to, in order."""
    seeds = [stage for one in timings for stage in one.stages]
    summaries = []
    for name in in_order([stage.stage for stage in seeds]):
        same = [stage for stage in seeds if stage.stage == name]
        device = [s.accelerator_bytes for s in same if s.accelerator_bytes is not None]
        summaries.append(
            StageSummary(
                stage=name,
                host_bytes=median(s.host_bytes for s in same),
                accelerator_bytes=median(device) if device else None,
            )
        )
    return tuple(summaries)


def in_order(names: Sequence[str]) -> list[str]:
    """Each stage once: those of `STAGES` as a run comes to them, then any other."""
    known = [name for name in STAGES if name in names]
    return known + [name for name in dict.fromkeys(names) if name not in STAGES]
