"""How well a model predicts: loss, bits per byte, accuracy, retrieval; effective rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from contextlm.base import distribution
from contextlm.data.synthetic import Task
from contextlm.data.windows import IGNORED, model_inputs
from contextlm.models.layers import ContextBlock
from contextlm.results.facts import RetrievalAccuracy, perplexity

RANK_SAMPLE = 10_000


@dataclass(frozen=True)
class Quality:
    """`loss` is the mean over `tokens` targets in nats; `accuracy` in 0..1."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def ppl(self) -> float:
        """Perplexity."""
        return perplexity(self.loss)


@torch.no_grad()
def evaluate_quality(
    model: nn.Module, windows: Dataset[dict[str, Tensor]], batch_size: int, device: torch.device
) -> Quality:
    """Score every target of every window, each window on its own, in the weights' own type.

    Sums are kept in float64 and divided once, so that batches of unequal size weigh by their
    tokens. The model's training mode is restored.

    With several processes all call this; each scores some of the batches, all get the whole result.

    Args:
        model: gives logits ``[B, T, V]``.
        windows: items ``{"input_ids": [T], "labels": [T]}``, labels shifted already; whatever else
            they hold is passed to the model.
    """
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = tokens = 0
    # torch's Dataset declares no length; ours have one.
    batches, counted = _own_batches(len(windows), batch_size)  # type: ignore[arg-type]
    with torch.autocast(device.type, enabled=False):
        for number, batch in enumerate(DataLoader(windows, batch_sampler=batches)):
            inputs, labels_BT = model_inputs({k: v.to(device) for k, v in batch.items()})
            labels_N = labels_BT.flatten()
            logits_NV = model(**inputs, use_cache=False).logits.flatten(0, 1).float()
            if number >= counted:
                continue
            losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="none")
            loss += losses_N.cpu().double().sum()  # not every accelerator has float64
            real_N = labels_N != IGNORED
            correct += int(((logits_NV.argmax(-1) == labels_N) & real_N).sum())
            tokens += int(real_N.sum())
    model.train(was_training)
    all_loss, all_correct, all_tokens = distribution.totals([loss.item(), correct, tokens])
    return Quality(all_loss / all_tokens, all_correct / all_tokens, int(all_tokens))


def _own_batches(samples: int, batch_size: int) -> tuple[list[list[int]], int]:
    """The batches that this process scores, and how many of them count.

    All ranks get as many, for a sharded model needs all of them in every forward pass; what fills
    up a rank's does not count.
    """
    starts = range(0, samples, batch_size)
    batches = [list(range(start, min(start + batch_size, samples))) for start in starts]
    own = batches[distribution.rank() :: distribution.world()]
    rounds = -(-len(batches) // distribution.world())
    return own + batches[:1] * (rounds - len(own)), len(own)


def evaluator(
    windows: Dataset[dict[str, Tensor]], batch_size: int, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """What next-token training calls after each epoch: a model's ``loss`` and ``accuracy``."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        quality = evaluate_quality(model, windows, batch_size, device)
        return {"loss": quality.loss, "accuracy": quality.accuracy}

    return evaluate


@torch.no_grad()
def retrieval_accuracy(
    model: nn.Module,
    samples: Dataset[dict[str, Tensor]],
    task: Task | None,
    batch_size: int,
    device: torch.device,
) -> list[RetrievalAccuracy]:
    """Accuracy on the answers at each level of a task, easiest first; empty without a task.

    Args as in `evaluate_quality`; `samples` are of the task's corpus, in its order.
    """
    if task is None:
        return []
    found = []
    for place, level in enumerate(task.level_names()):
        # torch's Dataset declares no length; ours have one.
        chosen = range(place, len(samples), len(task.levels))  # type: ignore[arg-type]
        if chosen:
            quality = evaluate_quality(model, Subset(samples, chosen), batch_size, device)
            found.append(
                RetrievalAccuracy(level=level, accuracy=quality.accuracy, answers=quality.tokens)
            )
    return found


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """Loss per byte of text, comparable across tokenizers.

    `loss` is in nats per token; the text has so many tokens and so many UTF-8 bytes.
    """
    return loss / math.log(2) * tokens / num_bytes


def unigram_perplexity(
    train: npt.NDArray[np.integer], validation: npt.NDArray[np.integer], vocab_size: int
) -> float:
    """Validation perplexity of the training tokens' frequencies, each entry counted once more."""
    counts_V = np.bincount(train, minlength=vocab_size) + 1.0
    losses_V = np.log(counts_V.sum()) - np.log(counts_V)
    return perplexity(float(losses_V[np.asarray(validation, dtype=np.int64)].mean()))


def effective_rank(contexts_NC: Tensor) -> float:
    """``exp(entropy)`` of the singular values normalised to sum 1 (DESIGN 1.6), between 1 and C.

    Contexts that are all zero have rank 0.
    """
    values = torch.linalg.svdvals(contexts_NC.cpu().double())
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def sample_rows(contexts_PC: Tensor, seed: int, limit: int = RANK_SAMPLE) -> Tensor:
    """At most `limit` rows, drawn without replacement by `seed`, ``[<=limit, C]``."""
    total = contexts_PC.shape[0]
    if total <= limit:
        return contexts_PC
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(total, generator=generator)[:limit].sort().values
    return contexts_PC[rows.to(contexts_PC.device)]


@torch.no_grad()
def window_contexts(
    block: ContextBlock,
    embed: Callable[[Tensor], Tensor],
    windows: Dataset[dict[str, Tensor]],
    batch_size: int,
    device: torch.device,
    limit: int = RANK_SAMPLE,
) -> Tensor:
    """Contexts of the first windows by the exact recurrence, each window from zero, ``[N, C]``.

    Args:
        embed: maps token ids to normalised embeddings.
        windows: items with ``"input_ids"`` and ``"labels"``; what fills up a window has no target,
            and its context does not count.
        limit: stop after at least so many positions.
    """
    collected: list[Tensor] = []
    for batch in DataLoader(windows, batch_size=batch_size):
        ids_BT = batch["input_ids"].to(device)
        initial_BC = torch.zeros(ids_BT.shape[0], block.context_dim, device=device)
        contexts_BTC = block(embed(ids_BT), initial_BC)[-1]
        collected.append(contexts_BTC[batch["labels"].to(device) != IGNORED])
        if sum(len(contexts) for contexts in collected) >= limit:
            break
    return torch.cat(collected)
