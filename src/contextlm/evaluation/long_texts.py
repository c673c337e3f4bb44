"""Perplexity by position far beyond the length that a model was trained on, and retrieval.

Windows of up to eight times that length, from different documents, are read once from their
beginning, in chunks with the model's own cache; every target's loss counts in the bucket of its
position. On a corpus of synthetic tasks right answers are counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder
from contextlm.data.samples import Answers
from contextlm.data.synthetic import MARK, Task, find_task, synthetic
from contextlm.data.token_store import build_token_store
from contextlm.evaluation.checkpoint import load_checkpoint, read_trained
from contextlm.evaluation.measure import MEASURED, SEQUENCE_LENGTH, Split, open_corpus
from contextlm.evaluation.memory import CHUNK, feed_all, measure_cache, position_limit
from contextlm.evaluation.quality import retrieval_accuracy
from contextlm.results.facts import CacheBytes, PositionLoss, RetrievalAccuracy, perplexity

WINDOWS = 16
QUESTIONS = 1000
TIMES = 8  # the training length
ROWS = 4  # windows read side by side
_LOGITS = 2**25  # numbers at once


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
    split: Split
    trained: int
    length: int
    windows: int
    positions: list[PositionLoss] = []
    retrieval: list[RetrievalAccuracy] = []
    cache: list[CacheBytes]
    remarks: list[str]


def evaluate_long(
    folder: Path,
    *,
    corpus: str,
    device: str,
    split: Split | None = None,
    sequence_length: int | None = None,
    samples: int | None = None,
) -> LongReport:
    """Measure a checkpoint on texts longer than those it was trained on.

    Args as in `evaluate_checkpoint`, but:
        corpus: one of tasks asks for answers.
        split: of a corpus of tasks always the validation split.
        sequence_length: the training length; None: what the checkpoint's note says, else
            `SEQUENCE_LENGTH`.
        samples: at most so many windows, or questions; None: `WINDOWS`, or `QUESTIONS`.

    Raises:
        InputError: the checkpoint or the corpus is not usable.
    """
    cache = cache_folder()  # one that cannot be used is told before the work
    task = find_task(corpus)
    if task is not None and split not in (None, "validation"):
        raise InputError(f"--split {split}: questions of {corpus!r} are asked from validation only")
    model, tokenizer = load_checkpoint(folder, device)
    note = read_trained(folder)
    remarks = note.remarks()
    trained = sequence_length or note.sequence_length
    if trained is None:
        trained = SEQUENCE_LENGTH
        remarks.append(f"its training length is not known, {trained} tokens stand in for it")
    if task is not None:
        found = _retrieval(model, tokenizer, task, samples or QUESTIONS, cache)
    else:
        text, split, store = open_corpus(corpus, split, tokenizer, cache)
        most = samples or WINDOWS
        long = score_positions(model, store.documents, trained, ahead=note.target_offset, most=most)
        remarks += long.remarks
        found = {
            "corpus": text.name,
            "split": split,
            "length": long.length,
            "windows": long.windows,
            "positions": long.positions,
            "cache": measure_cache(model, long.edges, next(model.parameters()).device),
        }
    return LongReport(
        checkpoint=str(folder),
        architecture=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=trained,
        remarks=remarks,
        **found,
    )


@dataclass(frozen=True)
class LongTexts:
    """Perplexity by position in `windows` texts of `length` tokens; where the buckets end."""

    length: int
    windows: int
    positions: list[PositionLoss]
    remarks: list[str]

    @property
    def edges(self) -> list[int]:
        """The ends of the buckets."""
        return [bucket.last for bucket in self.positions]


def score_positions(
    model: PreTrainedModel,
    documents: Sequence[npt.NDArray[Any]],
    trained: int,
    *,
    ahead: int = 1,
    most: int = WINDOWS,
) -> LongTexts:
    """Perplexity by position in windows of `TIMES` the training length, or as long as there are.

    Args:
        model: decodes with a cache.
        documents: token ids of each.
        trained: the training length, in tokens.
        ahead: how many tokens ahead the model predicts.
        most: windows that are read, from as many documents as possible.

    Raises:
        InputError: no document has a token to predict.
    """
    longest = max(map(len, documents), default=0) - ahead
    limit = position_limit(model)
    length, remarks = TIMES * trained, []
    if limit is not None and limit < length:
        length = limit
        remarks.append(f"measured up to the model's {limit:,} positions")
    if longest < length:
        length = longest
        remarks.append(f"the longest document has {longest + ahead:,} tokens")
    if length < 1:
        raise InputError("the documents have no text to measure")
    windows = windows_of(documents, length + ahead, most)
    total_W = losses_by_position(model, windows, ahead, next(model.parameters()).device)
    found = buckets(total_W, len(windows), bucket_edges(trained, length))
    return LongTexts(length, len(windows), found, remarks)


def _retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, most: int, cache: Path
) -> dict[str, Any]:
    """Accuracy on the answers of a task, level by level."""
    place = next(model.parameters()).device
    # Only the validation questions are read, so that one training question does.
    text = synthetic(task, (1, most))
    store = build_token_store(text, "validation", tokenizer, cache)
    mark = tokenizer.convert_tokens_to_ids(MARK)
    if mark is None or mark == tokenizer.unk_token_id:
        raise InputError(
            f"corpus {text.name!r}: the checkpoint's tokenizer does not know its words; train a "
            "model on such a corpus first (recipes recall and passkey)"
        )
    answers = Answers(
        store.tokens,
        store.document_offsets,
        None,
        mark=int(mark),
        pad=int(tokenizer.pad_token_id or 0),
        unknown=tokenizer.unk_token_id,
        name=text.name,
    )
    limit = position_limit(model)
    if limit is not None and answers.sequence_length > limit:
        raise InputError(
            f"corpus {text.name!r}: its longest question has {answers.sequence_length} tokens, "
            f"more than the model's {limit} positions"
        )
    return {
        "corpus": text.name,
        "split": "validation",
        "length": answers.sequence_length,
        "windows": len(answers),
        "retrieval": retrieval_accuracy(model, answers, task, MEASURED.batch_size, place),
        "cache": measure_cache(model, [answers.sequence_length], place),
    }


def bucket_edges(trained: int, length: int) -> list[int]:
    """Where buckets begin, and at last where they end.

    Up to the training length they grow by doubling, from an eighth of it; beyond, each is as long
    as it. The last one ends at `length`.
    """
    inside = [0, *(trained // part for part in (8, 4, 2))]
    edges = sorted({*inside, *range(trained, length, trained)})
    return [edge for edge in edges if edge < length] + [length]


def windows_of(
    documents: Sequence[npt.NDArray[Any]], tokens: int, most: int
) -> list[npt.NDArray[Any]]:
    """At most so many windows of `tokens` tokens, from as many documents as possible.

    The first window of each document comes first, then the second ones; they do not overlap.
    """
    each = [
        [document[at : at + tokens] for at in range(0, len(document) - tokens + 1, tokens)]
        for document in documents
    ]
    rounds = zip_longest(*each)
    return [window for round_ in rounds for window in round_ if window is not None][:most]


@torch.no_grad()
def losses_by_position(
    model: PreTrainedModel,
    windows: Sequence[npt.NDArray[Any]],
    ahead: int,
    device: torch.device,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over the windows of the loss at each position, ``[W]`` float64, in nats.

    Args:
        model: a causal language model that decodes with a cache.
        windows: of ``W + ahead`` tokens each.
        ahead: how many tokens ahead the model predicts.
        chunk: tokens read at once; fewer where the vocabulary is large.
    """
    length = len(windows[0]) - ahead
    total_W = torch.zeros(length, dtype=torch.float64)
    was_training = model.training
    model.eval()
    chunk = max(1, min(chunk, _LOGITS // (ROWS * model.config.vocab_size)))
    for first in range(0, len(windows), ROWS):
        rows = np.stack([np.asarray(w, dtype=np.int64) for w in windows[first : first + ROWS]])
        ids_BW = torch.from_numpy(rows).to(device)
        cache = None
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            logits_BTV, cache = feed_all(model, ids_BW[:, start:stop], cache)
            if logits_BTV.dtype != torch.float64:
                logits_BTV = logits_BTV.float()
            targets_BT = ids_BW[:, start + ahead : stop + ahead]
            losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
            total_W[start:stop] += losses_BT.cpu().double().sum(0)
    model.train(was_training)
    return total_W


def buckets(total_W: Tensor, windows: int, edges: Sequence[int]) -> list[PositionLoss]:
    """Losses summed over `windows`, as means over buckets; each token has weight 1."""
    found = []
    for first, last in pairwise(edges):
        tokens = windows * (last - first)
        loss = float(total_W[first:last].sum()) / tokens
        facts = {"first": first, "last": last, "tokens": tokens, "loss": loss}
        found.append(PositionLoss(**facts, ppl=perplexity(loss)))
    return found
