"""The words of the tables that a newcomer may not know, one plain sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report.summary import SummaryRow

_TERMS = {
    "bits per byte": "The validation loss in bits for each UTF-8 byte of the text, which can be "
    "compared between tokenizers.",
    "running": "The train figure averaged over an epoch's batches while the weights still "
    "changed, so it lags behind the epoch's final weights.",
    "train/validation PPL": "Perplexity on the train windows divided by that on the validation "
    "windows, both with the best weights; far below 1 means that the model learned its text by "
    "heart.",
    "tokens ahead": "How far after its last input token the token lies that a model predicts; "
    "1 is the next token.",
    "logical / resident": "Logical bytes count the elements that a cache keeps, resident bytes "
    "the memory that holds them.",
}
_PHASE1_TERMS = {
    "converged": "The share of positions whose context hardly changed any more from one "
    "iteration of phase 1 to the next.",
    "effective rank": "How many dimensions the contexts really use, at most their width; "
    "a low rank means that many contexts are alike.",
}


def terms(rows: Sequence[SummaryRow]) -> dict[str, str]:
    """Each term with its sentence; those of phase 1 only where a contender has one."""
    return {**_TERMS, **(_PHASE1_TERMS if any(row.phase1 for row in rows) else {})}
