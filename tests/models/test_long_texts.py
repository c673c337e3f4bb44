"""Every registered architecture on a text of 5,000 tokens, or of as many as it has positions for.

In float64, so that a text may be asked to be the same to the last token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from contextlm.evaluation.memory import feed, position_limit
from contextlm.models.base import registry

VARIANTS = [(name, index) for name, entry in registry().items() for index in range(len(entry.tiny))]
LENGTH, NEW = 5000, 8


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}")
def model(request) -> PreTrainedModel:
    name, index = request.param
    entry = registry()[name]
    torch.manual_seed(0)
    return entry.model(entry.config(**entry.tiny[index])).double().eval()


@torch.no_grad()
def continued(model: PreTrainedModel, ids_1T: Tensor, size: int) -> list[int]:
    """Greedy tokens after a text that is fed in chunks."""
    cache, tokens = None, []
    for chunk_1T in ids_1T.split(size, dim=1):
        logits_1V, cache = feed(model, chunk_1T, cache)
    for _ in range(NEW):
        tokens.append(int(logits_1V.argmax()))
        logits_1V, cache = feed(model, torch.tensor([tokens[-1:]]), cache)
    return tokens


def test_chunks_of_any_size_are_continued_by_the_same_text(model):
    limit = position_limit(model)
    length = LENGTH if limit is None else min(LENGTH, limit - NEW)
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(1, model.config.vocab_size, (1, length), generator=generator)
    whole = continued(model, ids_1T, length)
    for size in (640, 7, 1):
        assert continued(model, ids_1T, size) == whole, f"chunks of {size}"
