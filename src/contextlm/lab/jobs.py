"""Jobs: what a comparison needs done, and what of it can be done now (DESIGN 4).

A job is a value. It carries everything that decides its figures, and its identity is the hash of
that. Doing it leaves one folder with a whole `result.json` and `job.json`, which says what the job
was; an embedding is kept in the cache instead, for all runs. Resuming a run, extending one and
spreading it over workers all follow from this: the planner is asked again and again what is not
done yet, and looks into the run folder to answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from contextlm.base.errors import InputError, NotFiniteError
from contextlm.base.files import write_json
from contextlm.evaluation.tasks import own_files_hash
from contextlm.lab.embeddings import is_learned
from contextlm.lab.preparation import Entry, Prepared
from contextlm.lab.pretrained import MEASURED, healing_of, text_to_read
from contextlm.models.outside import sources
from contextlm.recipe.settings import EmbeddingSettings, TuningSettings
from contextlm.results.facts import TuningFacts, TuningTrial
from contextlm.results.result import read_outcome, read_trial, seed_folder

JOB_FILE = "job.json"
WORKING = "_working"  # in a run folder; no contender can be named so
_TUNING = "tuning"  # beside the seeds of a contender


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind: learn the recipe's embedding, try a learning rate, or train and measure a contender.
        contender: its name; empty for the embedding.
        seed: of its weights, noise, order and dropout.
        described: JSON of everything that decides its figures, keys sorted.
        rate: the learning rate that a trial tries.
        budget: the share of the training samples, where the recipe names such.
    """

    kind: Literal["embedding", "trial", "contender"]
    contender: str
    seed: int
    described: str
    rate: float | None = None
    budget: float | None = None

    @cached_property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the figures, as JSON values."""
        return dict(json.loads(self.described))

    @property
    def identity(self) -> str:
        """Hash of everything that decides the figures."""
        return _hash(self.described)

    @property
    def setting(self) -> str:
        """The identity that all seeds of one contender share."""
        return _hash(_canonical({**self.decides, "seed": None}))

    @property
    def folder(self) -> Path:
        """Its place below the run folder."""
        if self.kind == "embedding":
            return Path(WORKING, "embedding")
        if self.rate is not None:
            return Path(self.contender, _TUNING, repr(self.rate))
        return seed_folder(Path(), self.contender, self.seed, self.budget)

    @property
    def working(self) -> Path:
        """Where, below the run folder, it keeps what a killed process resumes from."""
        return self.folder if self.kind == "embedding" else Path(WORKING, self.folder)

    @property
    def shared(self) -> Path:
        """The same for what it shares with the contender's other budgets of this seed."""
        if self.budget is None:
            return self.working
        return Path(WORKING, seed_folder(Path(), self.contender, self.seed))

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "embedding":
            return "learning embeddings"
        if self.kind == "trial":
            return f"{self.contender}, trying learning rate {self.rate:g}"
        budget = "" if self.budget is None else f", budget {self.budget:g}"
        return f"{self.contender}, seed {self.seed}{budget}"


class Planner:
    """The jobs of one recipe, and which of them are ready.

    Args:
        prepared: the recipe with its data.

    Attributes:
        jobs: a job for each contender, seed and budget, seed by seed.
    """

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.jobs = [
            _contender_job(prepared, entry.at(budget), seed)
            for seed in prepared.recipe.seeds
            for entry in prepared.entries.values()
            for budget in prepared.budgets
        ]
        self._done: set[Job] = set()
        self._learned = False

    def ready(self, run: Path) -> list[Job]:
        """The jobs that are not done and wait for no other, in order; none when all are done.

        A budget waits for the smaller ones, from which it goes on.
        """
        if not self._embedding_is_learned():
            return [self._embedding_job()]
        ready: list[Job] = []
        begun: set[Path] = set()
        for job in self.jobs:
            if not self.is_done(run, job) and job.shared not in begun:
                begun.add(job.shared)
                waiting = self._missing_trials(run, self.prepared.entries[job.contender])
                ready += [trial for trial in waiting or [job] if trial not in ready]
        return ready

    def is_done(self, run: Path, job: Job) -> bool:
        """Whether a contender's job has its whole result; a damaged one is done again."""
        if job not in self._done:
            if not (run / job.folder / "result.json").exists():
                return False
            try:
                read_outcome(run, job.contender, job.seed, job.budget)
            except InputError:
                return False
            self._done.add(job)
        return True

    def left(self, run: Path, seed: int | None = None) -> list[Job]:
        """The contenders' jobs that are not done, of one seed or of all."""
        jobs = [job for job in self.jobs if seed in (None, job.seed)]
        return [job for job in jobs if not self.is_done(run, job)]

    def tuning(self, run: Path, entry: Entry) -> TuningFacts | None:
        """The trials of a contender's learning rate; None if the recipe wants none.

        Raises:
            NotFiniteError: training diverged at every rate.
        """
        settings = self.prepared.recipe.tuning
        if settings is None:
            return None
        known, _ = self._trials(run, entry, settings)
        if all(trial.validation_loss is None for trial in known.values()):
            raise NotFiniteError("training diverged at every learning rate of tuning")
        trials = [known[rate] for rate in sorted(known)]
        return TuningFacts(share=settings.share, seed=settings.seed, trials=trials)

    def _missing_trials(self, run: Path, entry: Entry) -> list[Job]:
        """The trials that the contender's jobs wait for, as far as they are known by now."""
        settings = self.prepared.recipe.tuning
        if settings is None:
            return []
        return self._trials(run, entry, settings)[1]

    def _trials(
        self, run: Path, entry: Entry, settings: TuningSettings
    ) -> tuple[dict[float, TuningTrial], list[Job]]:
        """The finished trials by rate, and those to do next.

        One rule for all contenders: each rate of the grid is tried; while the lowest loss is at an
        end, a rate twice or half as high is tried too, `extensions` of them at most.
        """
        most = len(settings.learning_rates) + settings.extensions
        known: dict[float, TuningTrial] = {}
        wanted = list(settings.learning_rates)
        while wanted:
            missing = []
            for rate in wanted:
                job = _trial_job(self.prepared, entry, rate)
                trial = read_trial(run / job.folder)
                if trial is None or trial.job != job.identity:
                    missing.append(job)
                else:
                    loss = trial.validation_loss
                    known[rate] = TuningTrial(learning_rate=rate, validation_loss=loss)
            if missing:
                return known, missing
            further = _beyond(known) if len(known) < most else None
            wanted = [] if further is None else [further]
        return known, []

    def _embedding_is_learned(self) -> bool:
        if not self._learned:
            text, device = self.prepared.learning_text, self.prepared.device
            settings = self.prepared.recipe.embedding
            self._learned = text is None or is_learned(settings, text, device)
        return self._learned

    def _embedding_job(self) -> Job:
        settings = self.prepared.recipe.embedding
        text = self.prepared.fingerprint["embedding_text"]
        described = _canonical({**_embedding_decides(settings), "text": text})
        return Job("embedding", "", settings.seed, described)


def _contender_job(prepared: Prepared, entry: Entry, seed: int) -> Job:
    recipe = prepared.recipe
    decides = _decides(prepared, entry, seed)
    # A result holds no speeds; a job that asks for no long texts or tasks is what it was before
    # there were any.
    asks = recipe.evaluation
    left_out = {"speed_tokens", *(name for name in ("long", "tasks") if not getattr(asks, name))}
    decides["evaluation"] = recipe.evaluation.model_dump(mode="json", exclude=left_out)
    if asks.tasks:
        decides["evaluation"]["task_files"] = own_files_hash()
    if recipe.tuning is not None:
        del decides["training"]["learning_rate"]
        decides["tuning"] = recipe.tuning.model_dump(mode="json")
    share = None if entry.budget is None else entry.budget.share
    return Job("contender", entry.contender.name, seed, _canonical(decides), budget=share)


def _trial_job(prepared: Prepared, entry: Entry, rate: float) -> Job:
    settings = prepared.recipe.tuning
    assert settings is not None
    decides = _decides(prepared, entry.at(None), settings.seed)  # one rate for all budgets
    decides["training"]["learning_rate"] = rate
    decides["share"] = settings.share
    return Job("trial", entry.contender.name, settings.seed, _canonical(decides), rate)


def _decides(prepared: Prepared, entry: Entry, seed: int) -> dict[str, Any]:
    """What decides the figures of every training of a contender."""
    recipe, contender, budget = prepared.recipe, entry.contender, entry.budget
    store = recipe.context_store if entry.reads_store else None
    decides: dict[str, Any] = {}
    if budget is not None:
        decides["budget"] = {"block": budget.block, "text": budget.text}
    if code := sources(entry.meta):
        decides["code"] = code
    if entry.trained is not None:
        healing = healing_of(contender).model_dump(mode="json") if contender.is_healed else None
        decides["trained"] = {
            "files": entry.trained,
            "policy": contender.policy,
            "healing": healing,
        }
        if contender.policy is not None:
            held_out_T = text_to_read(prepared.validation_documents, MEASURED)
            decides["trained"]["held_out"] = _hash_of(held_out_T)
    return {
        **decides,
        "seed": seed,
        "device": prepared.device.type,
        "data": dict(prepared.fingerprint),
        "unit": recipe.unit,
        "sequence_length": recipe.sequence_length,
        "stride": recipe.stride or recipe.sequence_length,
        "target_offset": recipe.target_offset_of(contender),
        "train_samples": entry.samples,
        "validation_samples": len(entry.validation),
        "vocab_size": prepared.facts.vocab_size,
        "model": dict(contender.model),
        "phase1": contender.phase1 and contender.phase1.model_dump(mode="json"),
        "context_store": store and store.model_dump(mode="json", exclude={"keep"}),
        "embedding": _embedding_decides(recipe.embedding),
        "training": {
            **entry.training.model_dump(mode="json"),
            "precision": entry.precision,
            "weight_decay": entry.training.decay_rate(),
        },
    }


def _embedding_decides(settings: EmbeddingSettings) -> dict[str, Any]:
    """The settings that matter to its source; what a pretrained one is, its hash says."""
    if settings.source == "learned":
        return settings.model_dump(mode="json", exclude={"path"})
    return {"source": settings.source}


def _beyond(trials: Mapping[float, TuningTrial]) -> float | None:
    """The rate to try next: twice or half the end that was best; None if no end was."""
    losses = {
        rate: trial.validation_loss
        for rate, trial in trials.items()
        if trial.validation_loss is not None
    }
    if not losses:
        return None
    best = min(losses, key=lambda rate: losses[rate])
    if best == max(trials):  # where the next one broke down, there is no use in going further
        return 2 * best
    return best / 2 if best == min(trials) else None


def write_job(run: Path, job: Job) -> None:
    """Put `job.json` into the job's folder."""
    write_json(run / job.folder / JOB_FILE, {"identity": job.identity, "decides": job.decides})


def check_job(run: Path, job: Job) -> None:
    """Compare a job with that of the same name which the run folder holds, if it holds one.

    Raises:
        InputError: it is another one; the message names the keys that differ.
    """
    place = run / job.folder
    file = place / JOB_FILE
    if not file.exists():
        if (place / "result.json").exists():
            raise InputError(f"{place}: an earlier contextlm made it, and left no {JOB_FILE}")
        return
    try:
        known = json.loads(file.read_text("utf-8"))["decides"]
    except (OSError, ValueError, LookupError, TypeError):
        raise InputError(f"{file}: is damaged") from None
    if keys := differing_keys(known, job.decides):
        raise InputError(
            f"{run}: {job.title}: not the one that the run holds: {', '.join(keys)} "
            f"{'differs' if len(keys) == 1 else 'differ'}"
        )


def differing_keys(one: Any, other: Any, above: str = "") -> list[str]:
    """The dotted keys at which two JSON values differ; entries of a list go by their ``name``."""
    if isinstance(one, list) and isinstance(other, list):
        named = [_by_name(value) for value in (one, other)]
        if named[0] is None or named[1] is None:
            return [] if one == other else [above]
        one, other = named
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [above]
    return [
        found
        for key in dict.fromkeys([*one, *other])
        for found in differing_keys(
            one.get(key), other.get(key), f"{above}.{key}" if above else str(key)
        )
    ]


def _by_name(values: list[Any]) -> dict[str, Any] | None:
    if all(isinstance(value, Mapping) and "name" in value for value in values):
        return {str(value["name"]): value for value in values}
    return None


def _hash_of(tokens_T: Tensor) -> str:
    return hashlib.sha256(tokens_T.numpy().tobytes()).hexdigest()


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
