"""Does phase 1 converge at the documents' sizes, on real text, and in how many iterations?

    python -m contextlm.benchmarks.phase1_convergence wikitext-2 --tokens 60000

Trains the context blocks of DESIGN 1.2, 1.3 and 1.4 alone, each with its document's settings, from
random embeddings of the documents' widths. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import pandas
import torch

from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, RunError
from contextlm.base.files import cache_folder
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store
from contextlm.data.tokenizers import load_tokenizer, vocab_entries
from contextlm.evaluation.quality import effective_rank, sample_rows
from contextlm.models.base import HasContextBlock
from contextlm.models.build import build_config, create_model
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.oacd import train_context_block

# Model type, phase-1 settings, and the document's own iterations.
CASES = (
    ("context_token", PhaseOneSettings(), 14),
    ("context_kv", PhaseOneSettings(), 18),
    ("context_pythia", PhaseOneSettings(learning_rate=0.003, noise=0.05, max_iterations=100), None),
)


def measure(
    corpus: str, tokenizer: str, tokens: int, seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each case: iterations, convergence, effective rank (share of C)."""
    text = load_corpus(corpus, None)
    words = load_tokenizer(tokenizer, text, cache_folder())
    stream = build_token_store(text, "train", words, cache_folder()).tokens
    if len(stream) < tokens:
        raise InputError(f"--tokens: {tokens} asked for, corpus {corpus!r} has {len(stream)}")
    rows = []
    for model_type, settings, reported in CASES:
        config = build_config({"type": model_type}, vocab_entries(words))
        decoder = create_model(config, seed).to(device).base_model
        assert isinstance(decoder, HasContextBlock)  # all cases have one
        block = decoder.context_block
        outcome = train_context_block(
            block, decoder.embed_normalised, stream[:tokens], settings, seed=seed, device=device
        )
        rows.append(
            {
                "model": model_type,
                "context_dim": block.context_dim,
                "iterations": len(outcome.iterations),
                "iterations_reported": reported,
                "converged": round(outcome.converged, 4),
                "effective_rank": round(
                    effective_rank(sample_rows(outcome.contexts_PC, seed)) / block.context_dim, 4
                ),
            }
        )
    return rows


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", help="as in recipes")
    parser.add_argument("--tokenizer", default="gpt2", help="as in recipes")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    try:
        device = resolve_device(given.device)
        rows = measure(given.corpus, given.tokenizer, given.tokens, given.seed, device)
    except (InputError, RunError) as error:
        parser.exit(2 if isinstance(error, InputError) else 1, f"{parser.prog}: {error}\n")
    print(pandas.DataFrame(rows).to_string(index=False))
    print(json.dumps({"corpus": given.corpus, "tokens": given.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
