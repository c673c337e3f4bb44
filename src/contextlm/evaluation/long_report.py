"""What `contextlm eval CHECKPOINT --long` measures: perplexity by position, or retrieval."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.data.corpora import load_corpus
from contextlm.data.samples import Answers
from contextlm.data.synthetic import MARK, Task, find_task, synthetic
from contextlm.data.token_store import TokenStore, build_token_store, cache_folder
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.long_context import (
    TIMES,
    Bucket,
    bucket_edges,
    buckets,
    losses_by_position,
    windows_of,
)
from contextlm.evaluation.memory import measure_cache, position_limit
from contextlm.evaluation.retrieval import retrieval_accuracy
from contextlm.evaluation.trained import Trained, read_trained
from contextlm.results.facts import CacheBytes, RetrievalAccuracy

WINDOWS = 16
QUESTIONS = 1000


class LongReport(BaseModel):
    """One checkpoint on long texts.

    `positions` holds perplexities by position, `retrieval` the right answers of a corpus of tasks;
    one of them is empty. `length` is that of the longest text read, `trained` what the model was
    trained on, both in tokens; `cache` is what it keeps at the end of each bucket, or after the
    longest question. `remarks` say what stood in the way of more.
    """

    checkpoint: str
    architecture: str
    parameters: int
    corpus: str
    trained: int
    length: int
    windows: int
    positions: list[Bucket]
    retrieval: list[RetrievalAccuracy]
    cache: list[CacheBytes]
    remarks: list[str]


def evaluate_long(
    folder: Path,
    *,
    corpus: str,
    device: str,
    sequence_length: int | None = None,
    samples: int | None = None,
) -> LongReport:
    """Measure a checkpoint on texts longer than those it was trained on.

    Args:
        folder: the checkpoint.
        corpus: as in a recipe; its validation split is read. A corpus of tasks asks for answers.
        device: ``auto``, ``cpu``, ``cuda`` ...
        sequence_length: the training length; None: what the checkpoint's note says, else 128.
        samples: at most so many windows, or questions; None: `WINDOWS`, or `QUESTIONS`.

    Raises:
        InputError: the checkpoint or the corpus is not usable.
    """
    place = cache_folder()  # one that cannot be used is told before the work
    task = find_task(corpus)
    model, tokenizer = load_checkpoint(folder, device)
    trained = read_trained(folder)
    length = sequence_length or trained.sequence_length
    remarks = trained.remarks()
    if length is None:
        length = 128
        remarks.append("its training length is not known, 128 tokens stand in for it")
    common: dict[str, Any] = {
        "checkpoint": str(folder),
        "architecture": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": length,
    }
    if task is not None:
        return _retrieval(model, tokenizer, task, samples or QUESTIONS, place, common, remarks)
    text = load_corpus(corpus)
    store = build_token_store(text, "validation", tokenizer, place)
    return _positions(
        model, store, length, trained, samples or WINDOWS, {**common, "corpus": text.name}, remarks
    )


def _positions(
    model: PreTrainedModel,
    store: TokenStore,
    trained_length: int,
    trained: Trained,
    most: int,
    common: dict[str, Any],
    remarks: list[str],
) -> LongReport:
    """Perplexity by position."""
    where = next(model.parameters()).device
    ahead = trained.target_offset
    offsets = store.document_offsets
    documents = [store.tokens[a:b] for a, b in pairwise(offsets)]
    longest = int(np.diff(offsets).max()) - ahead
    limit = position_limit(model)
    length = TIMES * trained_length
    if limit is not None and limit < length:
        length = limit
        remarks.append(f"measured up to the model's {limit:,} positions")
    if longest < length:
        length = longest
        remarks.append(f"the longest document has {longest + ahead:,} tokens")
    if length < 1:
        raise InputError(f"corpus {store.name!r}: its validation documents have no text to measure")
    windows = windows_of(documents, length + ahead, most)
    edges = bucket_edges(trained_length, length)
    total_P = losses_by_position(model, windows, ahead, where)
    return LongReport(
        **common,
        length=length,
        windows=len(windows),
        positions=buckets(total_P, len(windows), edges),
        retrieval=[],
        cache=measure_cache(model, edges[1:], where),
        remarks=remarks,
    )


def _retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    most: int,
    place: Path,
    common: dict[str, Any],
    remarks: list[str],
) -> LongReport:
    """Accuracy on the answers of a task, level by level."""
    where = next(model.parameters()).device
    # Only the validation questions are read, so that one training question does.
    text = synthetic(task, (1, most))
    store = build_token_store(text, "validation", tokenizer, place)
    mark = tokenizer.convert_tokens_to_ids(MARK)
    if mark is None or mark == tokenizer.unk_token_id:
        raise InputError(
            f"corpus {text.name!r}: the checkpoint's tokenizer does not know its words; train a "
            "model on such a corpus first (recipes recall and passkey)"
        )
    made = {"mark": int(mark), "pad": int(tokenizer.pad_token_id or 0)}
    unknown = tokenizer.unk_token_id
    answers = Answers(
        store.tokens, store.document_offsets, None, **made, unknown=unknown, name=text.name
    )
    limit = position_limit(model)
    if limit is not None and answers.sequence_length > limit:
        raise InputError(
            f"corpus {text.name!r}: its longest question has {answers.sequence_length} tokens, "
            f"more than the model's {limit} positions"
        )
    with torch.no_grad():
        found = retrieval_accuracy(model, answers, task, 32, where)
    return LongReport(
        **common,
        corpus=text.name,
        length=answers.sequence_length,
        windows=len(answers),
        positions=[],
        retrieval=found,
        cache=measure_cache(model, [answers.sequence_length], where),
        remarks=remarks,
    )
