"""The words of the tables that a newcomer may not know, one plain sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from contextlm.report.summary import SummaryRow

_TERMS = {
    "bits per byte": "The validation loss in bits for each UTF-8 byte of the text, which can be "
    "compared between lossless tokenizers; a dash where a loss measures no code of the text: "
    "targets further ahead than the next token, lines apart from each other, unknown words.",
    "running": "The train figure averaged over an epoch's batches while the weights still "
    "changed, so it lags behind the epoch's final weights.",
    "train/validation PPL": "Perplexity on the train windows divided by that on the validation "
    "windows, both with the best weights; far below 1 means that the model learned its text by "
    "heart.",
    "gap": "Validation perplexity divided by the running train perplexity of the best epoch, as "
    "the documents give it; the larger, the less of what was learned holds for new text.",
    "share of unigram PPL": "Validation perplexity as a share of that of a model that only knows "
    "the training tokens' frequencies; at 100 % nothing else was learned, above it not even that.",
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
_STORE_TERMS = {
    "context store": "The contexts of every position of the text, computed before phase 2, which "
    "reads them instead of running the context block. Embeddings are not stored: they are looked "
    "up by token.",
    "fill": "Sequential contexts come from the exact recurrence, as in decoding; parallel ones "
    "from a last pass that feeds every position its predecessor's context of the pass before.",
    "drift": "The mean-square difference, per number, between the parallel contexts and the exact "
    "ones. Contexts leave a layer norm with a mean square near 1, so that unrelated ones are about "
    "2 apart.",
    "seconds to fill": "For the stores of both splits; both ways are computed for the drift, and "
    "a store that an earlier contender with the same contexts left is used again.",
}
_STAGE_TERMS = {
    "stage": "Memory that the process holds and that tensors take on the accelerator when a stage "
    "ends, medians over the seeds; one process runs all contenders of a run, so later ones start "
    "with what earlier ones left.",
}


def terms(rows: Sequence[SummaryRow]) -> dict[str, str]:
    """Each term with its sentence; those of phase 1, stores and stages only where there are any."""
    return {
        **_TERMS,
        **(_PHASE1_TERMS if any(row.phase1 for row in rows) else {}),
        **(_STORE_TERMS if any(row.store for row in rows) else {}),
        **(_STAGE_TERMS if any(row.stages for row in rows) else {}),
    }
