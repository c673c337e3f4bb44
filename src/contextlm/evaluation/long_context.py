"""Perplexity by position, far beyond the length that a model was trained on.

Windows of up to eight times that length, from different documents, are read once from their
beginning, in chunks with the model's own cache; every target's loss counts in the bucket of its
position.

Shape suffixes: B windows read side by side, T tokens of a chunk, P positions of a window, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from contextlm.evaluation.memory import CHUNK, feed_all
from contextlm.evaluation.quality import perplexity

TIMES = 8  # the training length
ROWS = 4  # windows read side by side
_LOGITS = 2**25  # numbers at once


class Bucket(BaseModel):
    """The targets at positions ``first`` to ``last - 1``; `loss` is their mean in nats."""

    first: int
    last: int
    tokens: int
    loss: float
    ppl: float


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
    """At most so many windows, from as many documents as possible.

    The first window of each document comes first, then the second ones; they do not overlap.

    Args:
        documents: token ids of each.
        tokens: of a window.
        most: how many windows.
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
    """Sum over the windows of the loss at each position, ``[P]`` float64, in nats.

    Args:
        model: a causal language model that decodes with a cache.
        windows: of ``P + ahead`` tokens each.
        ahead: how many tokens ahead the model predicts.
        device: where the model is.
        chunk: tokens read at once; fewer where the vocabulary is large.
    """
    length = len(windows[0]) - ahead
    total_P = torch.zeros(length, dtype=torch.float64)
    was_training = model.training
    model.eval()
    chunk = max(1, min(chunk, _LOGITS // (ROWS * model.config.vocab_size)))
    for first in range(0, len(windows), ROWS):
        rows = np.stack([np.asarray(w, dtype=np.int64) for w in windows[first : first + ROWS]])
        ids_BN = torch.from_numpy(rows).to(device)
        cache = None
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            logits_BTV, cache = feed_all(model, ids_BN[:, start:stop], cache)
            losses_BT = F.cross_entropy(
                _at_least_float32(logits_BTV).transpose(1, 2),
                ids_BN[:, start + ahead : stop + ahead],
                reduction="none",
            )
            total_P[start:stop] += losses_BT.cpu().double().sum(0)
    model.train(was_training)
    return total_P


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def buckets(total_P: Tensor, windows: int, edges: Sequence[int]) -> list[Bucket]:
    """Losses summed over `windows`, as means over buckets; each token has weight 1."""
    found = []
    for first, last in pairwise(edges):
        tokens = windows * (last - first)
        loss = float(total_P[first:last].sum()) / tokens
        found.append(Bucket(first=first, last=last, tokens=tokens, loss=loss, ppl=perplexity(loss)))
    return found
