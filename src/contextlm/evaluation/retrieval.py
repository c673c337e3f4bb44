"""How often a model gives back what it has read, by how hard the question is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from contextlm.data.synthetic import Task
from contextlm.evaluation.quality import evaluate_quality
from contextlm.results.facts import RetrievalAccuracy


def retrieval_accuracy(
    model: nn.Module,
    samples: Dataset[dict[str, Tensor]],
    task: Task | None,
    batch_size: int,
    device: torch.device,
) -> list[RetrievalAccuracy]:
    """Accuracy on the answers at each level of a task, easiest first; empty without a task.

    Args:
        model: gives logits ``[B, T, V]``.
        samples: of the task's corpus, in its order.
        task: says which level a sample has.
        batch_size: samples per forward pass.
        device: where the model is.
    """
    found = []
    for place, level in enumerate(task.level_names() if task is not None else []):
        # torch's Dataset declares no length (ours have one), and without a task there is no level.
        chosen = range(place, len(samples), len(task.levels))  # type: ignore[arg-type, union-attr]
        if chosen:
            quality = evaluate_quality(model, Subset(samples, chosen), batch_size, device)
            found.append(
                RetrievalAccuracy(level=level, accuracy=quality.accuracy, answers=quality.tokens)
            )
    return found
