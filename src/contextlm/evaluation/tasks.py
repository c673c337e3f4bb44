"""Scores of lm-eval's tasks, of a model that is loaded already (extra `lm-eval`).

A folder that CONTEXTLM_TASKS names adds the user's own task files. They are code (lm-eval imports
the functions that they name), so neither a recipe nor a checkpoint can bring any.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contextlm.base.errors import InputError, RunError
from contextlm.base.files import is_folder, sha256_of
from contextlm.base.visible import shown
from contextlm.data.hub import from_hub
from contextlm.evaluation.checkpoint import load_checkpoint, read_trained
from contextlm.models.build import reason
from contextlm.recipe.settings import EvaluationSettings
from contextlm.results.facts import TaskScore

OWN = "CONTEXTLM_TASKS"
_SEED = 1234  # of the examples before a question


class TaskReport(BaseModel):
    """A checkpoint's scores. `remarks` say what to know of how it was trained."""

    checkpoint: str
    architecture: str
    parameters: int
    scores: list[TaskScore]
    remarks: list[str] = []


def evaluate_tasks(
    folder: Path, names: Sequence[str], *, device: str, samples: int | None = None
) -> TaskReport:
    """Score a checkpoint; see `task_scores`.

    Raises:
        InputError: the checkpoint is not usable, or predicts further ahead than the next token.
    """
    note = read_trained(folder)
    if note.target_offset > 1:
        raise InputError(
            f"{folder}: it predicts the token {note.target_offset} ahead, tasks ask for the next"
        )
    tasks = load_tasks(names)
    model, tokenizer = load_checkpoint(folder, device)
    return TaskReport(
        checkpoint=str(folder),
        architecture=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        scores=task_scores(model, tokenizer, tasks, EvaluationSettings().batch_size, samples),
        remarks=note.remarks(),
    )


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks of these names, with their data.

    Args:
        names: of tasks, groups or tags, as ``lm_eval ls tasks`` lists them, or in a task file of
            the folder that CONTEXTLM_TASKS names.

    Raises:
        InputError: lm-eval is not installed, a name is unknown, or a task file is not usable.
        RunError: a task's data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise InputError("tasks: lm-eval is not installed: pip install 'lm-eval>=0.4.13'")
    from lm_eval.tasks import TaskManager

    folder = _own_folder()
    manager = TaskManager(include_path=folder, include_defaults=False)
    own = set(names) <= set(manager.all_tasks)
    if not own:  # lm-eval's take long to list
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "lm_eval ls tasks lists all"
            raise InputError(f"unknown task of lm-eval: {shown(name)} ({hint})")
    listed = ", ".join(names)
    if not own:
        instead = f"name tasks whose data is on this machine, or write your own ({OWN})"
        return from_hub(f"tasks {listed}", instead, lambda online: manager.load(list(names)))
    try:
        return manager.load(list(names))
    except Exception as error:  # task files may hold anything, and call anything
        raise InputError(f"tasks {listed}: {reason(error)}") from error


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: dict[str, Any],
    batch_size: int,
    samples: int | None = None,
) -> list[TaskScore]:
    """All figures of each task, those of groups behind those of their tasks.

    Args:
        model: in its own type and on its own device.
        tasks: as `load_tasks` gives them.
        samples: use only the first questions of each task; None: all.

    Raises:
        RunError: a task cannot be scored.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    client = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    for task in tasks["tasks"].values():  # as lm-eval's own command line does
        task.set_fewshot_seed(_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    try:
        found = evaluate(client, tasks, limit=samples, log_samples=False)
    except (ValueError, LookupError, TypeError, ImportError) as error:  # of a task's own making
        raise RunError(f"tasks {', '.join(tasks['tasks'])}: {reason(error)}") from error
    counts = found["n-samples"]
    return [
        score
        for name, figures in {**found["results"], **found.get("groups", {})}.items()
        for score in _scores(name, figures, counts.get(name, {}).get("effective"))
    ]


def own_files_hash() -> str | None:
    """SHA-256 of names and contents in the folder that CONTEXTLM_TASKS names; None without it.

    Raises:
        InputError: there is no such folder.
    """
    folder = _own_folder()
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(folder)}\n{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _own_folder() -> Path | None:
    given = os.environ.get(OWN)
    if not given:
        return None
    if not is_folder(Path(given)):
        raise InputError(f"{OWN} {shown(given)}: no such folder")
    return Path(given)


def _scores(task: str, figures: Mapping[str, Any], samples: int | None) -> list[TaskScore]:
    """lm-eval's keys are ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``."""
    scores = []
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = figures.get(f"{metric}_stderr,{chosen}")
        scores.append(
            TaskScore(
                task=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=value,
                stderr=error if isinstance(error, (int, float)) else None,
                samples=samples,
            )
        )
    return scores
