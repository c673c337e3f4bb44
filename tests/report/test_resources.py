"""Context stores and memory by stage: over seeds, as tables, beside the document's figures."""

from __future__ import annotations

from pathlib import Path

import pytest

import contextlm
from contextlm.report import resource_tables, resources
from contextlm.report.document import document_figures
from contextlm.report.numbers import ABSENT, Stat
from contextlm.report.summary import summarise
from contextlm.report.terms import terms
from contextlm.results.facts import StoreFacts
from contextlm.results.result import StageMemory

# The document's text of 587,970 tokens and its contexts of 256 numbers in float32.
TRAIN_BYTES = 587_970 * 256 * 4
VALIDATION_BYTES = 22_723 * 256 * 4
GB = 1024**3
WRITERS = "contender", "contexts"  # the modules that note memory


def store(**changes):
    facts = {
        "fill": "sequential",
        "dtype": "float32",
        "train_bytes": TRAIN_BYTES,
        "validation_bytes": VALIDATION_BYTES,
        "drift_train": 0.02,
        "drift_validation": 0.5,
    }
    return StoreFacts(**facts | changes)


def stages(*sizes):
    """Stages with their host and accelerator memory in GB."""
    return [
        StageMemory(
            stage=name,
            host_bytes=int(host * GB),
            accelerator_bytes=None if device is None else int(device * GB),
        )
        for name, host, device in sizes
    ]


def labels(table):
    return [column.label for column in table.columns]


def test_stores_over_the_seeds(made):
    rows = summarise(
        [
            made(baseline=True),
            made("kv", store=store(), store_seconds=2.0),
            made("kv", store=store(drift_train=0.04), store_seconds=4.0, seed=1),
            made("half", store=store(fill="parallel", dtype="bfloat16", train_bytes=1024)),
        ]
    )
    assert rows[0].store is None
    assert rows[1].store.total_bytes == TRAIN_BYTES + VALIDATION_BYTES
    assert rows[1].store.drift_train == Stat.of([0.02, 0.04])
    table = resource_tables.store_table(rows)
    kv, half = table.rows
    assert kv == (
        "kv",
        "sequential",
        "float32",
        "574.2 MB",
        "22.2 MB",
        "596.4 MB",
        "0.0300 ± 0.0141",
        "0.500 ± 0.000",
        "3.00 ± 1.41 s",
    )
    assert half[1:5] == ("parallel", "bfloat16", "1.0 KB", "22.2 MB")
    assert half[-1] == ABSENT, "its results do not tell"
    kinds = [column.kind for column in table.columns]
    assert kinds == ["text"] * 3 + ["measured"] * 6
    assert resource_tables.store_table(rows[:1]) is None


def test_the_documents_stores_beside_the_measured_ones(made):
    reported = {
        "store_mb": 2386,
        "store_train_contexts_mb": 574,
        "store_train_embeddings_mb": 1723,
        "store_validation_contexts_mb": 22,
        "store_val_embeddings_mb": 67,
    }
    rows = summarise(
        [
            made(baseline=True, reported=reported),
            made("kv", store=store(), reported=reported),
        ]
    )
    figures = {(f.name, f.key): (f.reported, f.measured) for f in document_figures(rows)}
    assert figures["kv", "store_mb"] == ("2,386 MB", "596.4 MB")
    assert figures["kv", "store_train_contexts_mb"] == ("574 MB", "574.2 MB")
    assert figures["kv", "store_train_embeddings_mb"] == ("1,723 MB", "0.0 MB")
    assert figures["kv", "store_validation_contexts_mb"] == ("22 MB", "22.2 MB")
    assert figures["kv", "store_val_embeddings_mb"] == ("67 MB", "0.0 MB")
    assert all(figures["mha", key][1] is None for key in reported), "it reads no store"
    texts = {f.key: f.label for f in document_figures(rows)}
    assert texts["store_train_embeddings_mb"].endswith("(here looked up by token)")
    assert all(f.measured_change is None for f in document_figures(rows))


def test_stages_are_medians_over_the_seeds(made):
    def seed(number, *sizes):
        return made("kv", seed=number, stages=stages(*sizes))

    rows = summarise(
        [
            made(baseline=True, stages=stages(("data loaded", 0.5, None), ("trained", 2.0, None))),
            seed(0, ("data loaded", 1.0, 0.0), ("after phase 1", 5.0, 0.2), ("trained", 9.0, 1.0)),
            seed(1, ("data loaded", 9.0, 0.0), ("after phase 1", 6.0, 0.4), ("trained", 9.0, 1.0)),
            seed(2, ("data loaded", 2.0, 0.1), ("after phase 1", 7.0, 0.3), ("trained", 9.0, 1.0)),
            made("older"),
        ]
    )
    table = resource_tables.stage_table(rows)
    assert labels(table) == [
        "stage",
        "mha, host",
        "mha, accelerator",
        "kv, host",
        "kv, accelerator",
    ]
    assert table.rows == (
        ("data loaded", "0.50 GB", ABSENT, "2.00 GB", "0.00 GB"),
        ("after phase 1", ABSENT, ABSENT, "6.00 GB", "0.30 GB"),
        ("trained", "2.00 GB", ABSENT, "9.00 GB", "1.00 GB"),
    )
    assert resource_tables.stage_table(rows[2:]) is None


def test_stages_keep_the_order_of_a_run():
    unordered = ["trained", "later", "phase 2 prepared", "data loaded", "later", "trained"]
    assert resources.in_order(unordered) == ["data loaded", "phase 2 prepared", "trained", "later"]


@pytest.mark.parametrize(
    ("key", "reported", "measured"),
    [
        ("host_gb_data", "1.2 GB", "1.00 GB"),
        ("host_gb_model", "1.2 GB", "2.00 GB"),
        ("host_gb_phase1", "1.2 GB", "3.00 GB"),
        ("host_gb_phase2", "1.2 GB", "4.00 GB"),
        ("accelerator_gb_data", "1.2 GB", "0.00 GB"),
        ("accelerator_gb_model", "1.2 GB", None),
        ("accelerator_gb_phase1", "1.2 GB", "0.25 GB"),
        ("accelerator_gb_phase2", "1.2 GB", "0.50 GB"),
    ],
)
def test_the_documents_memory_beside_the_measured(made, key, reported, measured):
    sizes = stages(
        ("data loaded", 1, 0),
        ("model initialised", 2, None),
        ("after phase 1", 3, 0.25),
        ("phase 2 prepared", 4, 0.5),
        ("trained", 5, 1),
    )
    both = [made(stages=sizes, reported={key: 1.2}), made("older", reported={key: 1.2})]
    found, older = document_figures(summarise(both))
    assert (found.reported, found.measured) == (reported, measured)
    assert older.measured is None


def test_the_names_of_the_stages_are_those_that_a_run_writes():
    package = Path(contextlm.__file__).parent
    written = "".join((package / f"{name}.py").read_text("utf-8") for name in WRITERS)
    for name in resources.STAGES:
        assert f'stage_memory("{name}", ' in written


def test_terms_of_stores_and_stages_only_where_there_are_any(made):
    plain, stored, staged = summarise(
        [
            made(baseline=True),
            made("kv", store=store()),
            made("big", stages=stages(("trained", 1, None))),
        ]
    )
    known = terms([plain]).keys()
    assert terms([stored]).keys() - known == {"context store", "fill", "drift", "seconds to fill"}
    assert terms([staged]).keys() - known == {"stage"}
