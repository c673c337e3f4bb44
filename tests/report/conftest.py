"""Made-up outcomes, runs and run folders. The figures are invented, round, and checked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contextlm.report.contenders import Contender, contenders
from contextlm.results.facts import CacheBytes, CorpusFacts, PhaseOneFacts
from contextlm.results.result import (
    Outcome,
    PhaseOneRow,
    PhaseTwoRow,
    Result,
    Run,
    Timings,
    seed_folder,
)

ENVIRONMENT = {
    "commit": "0123abc",
    "versions": {"torch": "2.9.0", "transformers": "5.23.0"},
    "hardware": {"cpu": "Some CPU", "cores": 2, "accelerator": None},
}

CORPUS = CorpusFacts(
    name="pydocs (Python 3.11.7)",
    tokenizer="bpe:4096",
    vocab_size=4096,
    train_tokens=512_000,
    validation_tokens=51_200,
    train_windows=4000,
    validation_windows=400,
    sequence_length=128,
)


def outcome(
    contender: str = "mha",
    *,
    ppl: float = 100.0,
    seed: int = 0,
    baseline: bool = False,
    cache: dict[int, int] | None = None,
    epochs: int = 4,
    phase1: bool = False,
    reported: dict[str, float] | None = None,
    **changes: Any,
) -> Outcome:
    """One contender and seed. `cache` maps tokens to logical bytes.

    `changes` go to the timings that have such a name, else to the result.
    """
    sizes = {128: 131_072, 512: 524_288, 2048: 2_097_152} if cache is None else cache
    best = max(1, epochs - 1)
    timings = {
        "phase1_seconds": 12.5 if phase1 else None,
        "store_seconds": None,
        "stages": [],
        "epoch_seconds": [10.0 + seed] * epochs,
        "training_tokens_per_second": 2000.0,
        "prefill_tokens_per_second": 8000.0,
        "decode_tokens_per_second": 50.0,
        "peak_host_bytes": 3 * 1024**3,
    }
    timings |= {key: changes.pop(key) for key in list(changes) if key in timings}
    result = {
        "recipe": "made-up",
        "scale": "small",
        "contender": contender,
        "architecture": "gpt_neox" if baseline else "context_hybrid",
        "baseline": baseline,
        "seed": seed,
        "target_offset": 1,
        "precision": "float32",
        "corpus": CORPUS,
        "parameters_total": 2_566_272,
        "parameters_trainable": 2_000_000,
        "validation_loss": math.log(ppl),
        "validation_ppl": ppl,
        "bits_per_byte": 1.5,
        "accuracy": 0.25,
        "train_ppl_running": 0.9 * ppl,
        "train_ppl": 0.8 * ppl,
        "best_epoch": best,
        "epochs": epochs,
        "phase1": _phase_one_facts() if phase1 else None,
        "cache": [CacheBytes(tokens=t, logical=b, resident=2 * b) for t, b in sizes.items()],
        "cache_dtype": "float32",
        "reported": reported or {},
    } | changes
    return Outcome(
        result=Result(**result),
        timings=Timings(
            evaluation_seconds=3.0,
            total_seconds=60.0,
            speed_tokens=512,
            peak_accelerator_bytes=None,
            **timings,
        ),
        history=[*(_iterations() if phase1 else []), *_epochs(epochs, best, ppl)],
    )


def _phase_one_facts() -> PhaseOneFacts:
    return PhaseOneFacts(
        iterations=14,
        converged=0.93,
        context_dim=500,
        effective_rank_train=407.5,
        effective_rank_validation=398.5,
    )


def _iterations() -> list[PhaseOneRow]:
    first = PhaseOneRow(iteration=1, converged=0.0, loss=None)
    return [first, PhaseOneRow(iteration=2, converged=0.93, loss=-1.25)]


def _epochs(epochs: int, best: int, ppl: float) -> list[PhaseTwoRow]:
    rows = []
    for epoch in range(1, epochs + 1):
        value = ppl * (1 + 0.5 * (best - epoch) if epoch <= best else 1.02)
        rows.append(
            PhaseTwoRow(
                epoch=epoch,
                train_loss=math.log(0.9 * value),
                train_ppl=0.9 * value,
                validation_loss=math.log(value),
                validation_ppl=value,
                accuracy=0.25,
                learning_rate=1e-3,
            )
        )
    return rows


def make_run(outcomes: list[Outcome], folder: Path, **recipe: Any) -> Run:
    """A run of these outcomes with a resolved recipe that fits them."""
    names = list(dict.fromkeys(o.result.contender for o in outcomes))
    contenders = [
        {"name": name, "baseline": number == 0, "model": {"type": "made_up", "hidden_size": 192}}
        for number, name in enumerate(names)
    ]
    resolved: dict[str, Any] = {
        "name": "made-up",
        "question": "Does a smaller cache cost perplexity?",
        "document": "made-up-document.txt",
        "seeds": sorted({o.result.seed for o in outcomes}),
        "training": {"learning_rate": 0.001, "betas": [0.9, 0.999], "patience": None},
        "contenders": contenders,
    } | recipe
    return Run(folder=folder, recipe=resolved, environment=ENVIRONMENT, outcomes=outcomes)


def save(run: Run) -> None:
    """Write a run folder as an experiment would."""
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe, sort_keys=False))
    (run.folder / "environment.json").write_text(json.dumps(run.environment))
    for one in run.outcomes:
        place = seed_folder(run.folder, one.result.contender, one.result.seed)
        place.mkdir(parents=True)
        (place / "result.json").write_text(one.result.model_dump_json())
        (place / "timings.json").write_text(one.timings.model_dump_json())
        lines = "".join(line.model_dump_json() + "\n" for line in one.history)
        (place / "history.jsonl").write_text(lines)


@pytest.fixture(scope="session")
def three_seeds() -> list[Outcome]:
    """A baseline, a winner with an eighth of its cache and a loser with half, three seeds each."""
    found = []
    for seed, shift in enumerate((-1.0, 0.0, 1.0)):
        found += [
            outcome(
                ppl=100 + shift,
                seed=seed,
                baseline=True,
                reported={"val_ppl": 471.3, "best_epoch": 5, "cache_kb_at_128": 3072.0},
            ),
            outcome(
                "hybrid",
                ppl=90 + shift,
                seed=seed,
                cache={128: 65_536, 512: 131_072, 2048: 262_144},
                phase1=True,
                decode_tokens_per_second=40.0,
            ),
            outcome(
                "compressed",
                ppl=110 + shift,
                seed=seed,
                cache={128: 65_536, 512: 262_144, 2048: 1_048_576},
                phase1=True,
                reported={"val_ppl": 554.2, "accuracy": 24.9, "cache_kb_at_128": 1536.0},
            ),
        ]
    return found


@pytest.fixture
def run(three_seeds: list[Outcome], tmp_path: Path) -> Run:
    """The three contenders as a run, in memory."""
    return make_run(three_seeds, tmp_path / "run-1")


@pytest.fixture(scope="session")
def made() -> Callable[..., Outcome]:
    """`outcome`, for tests that need their own."""
    return outcome


@pytest.fixture(scope="session")
def run_of() -> Callable[..., Run]:
    """`make_run`, for tests that need their own."""
    return make_run


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., list[Contender]]:
    """The rows of one run of these outcomes."""
    return lambda *outcomes: contenders([make_run(list(outcomes), tmp_path / "run")])


@pytest.fixture
def on_disk() -> Callable[[Run], None]:
    """`save`: the run as a folder."""
    return save
