"""What attention in dilated windows gains over fetching each context for each query."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from contextlm.benchmarks.harness import Answer, Options, Target, interleaved
from contextlm.models.build import build_config, create_model
from contextlm.models.context_kv.layer import ContextAttention, Memory
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.next_token import NextTokenLoss
from contextlm.training.optimisation import build_optimizer

VOCABULARY = 50257


def measure(options: Options) -> Answer:
    """The document's layer on one window, alone and in a whole training step."""
    recipe = load_recipe("context-kv", scale="smoke" if options.smoke else None)
    contender = next(c for c in recipe.contenders if c.name == "context-kv")
    vocabulary = 512 if options.smoke else VOCABULARY
    model = create_model(build_config(contender.model, vocabulary), seed=0).train()
    layer = model.model.layer
    own: ContextAttention = layer.attention
    naive = GatherAttention(own)
    tokens, rounds = recipe.sequence_length, options.repeats or 7
    width, history = model.config.context_dim, model.model.history
    generator = torch.Generator().manual_seed(0)
    stream_BTD = torch.randn(1, tokens, model.config.hidden_size, generator=generator)
    entries_BSC = torch.randn(1, history + tokens, width, generator=generator)
    memory = Memory(entries_BSC, torch.tensor([history]))
    forms: dict[str, torch.nn.Module] = {"dilated windows": own, "gather": naive}
    answer = Answer(settings={"B": 1, "T": tokens, "vocabulary": vocabulary})
    alone = {name: partial(_sublayer, form, stream_BTD, memory) for name, form in forms.items()}
    ids_BT = torch.randint(vocabulary, (1, tokens + 1), generator=generator)
    optimizer = build_optimizer(model, recipe.training)
    loss_of = NextTokenLoss(model)
    whole = {
        name: partial(_step, loss_of, form, optimizer, recipe.training, ids_BT, entries_BSC)
        for name, form in forms.items()
    }
    for part, cases in (("sublayer", alone), ("step", whole)):
        times = interleaved(cases, rounds)
        for name, time in times.items():
            answer.rows.append({"part": part, "form": name, **time.milliseconds()})
        ratio = times["gather"].median / times["dilated windows"].median
        answer.compare(f"context_kv_{part}_vs_gather", ratio)
    answer.targets["context_kv_sublayer_vs_gather"] = Target(5.0)
    return answer


class GatherAttention(torch.nn.Module):
    """The same attention, literally: M contexts are fetched and projected for each token.

    The anchor of `attention`, whose weights are used, must be "position", its padding "zeros".
    """

    def __init__(self, attention: ContextAttention):
        super().__init__()
        self.own = attention

    def forward(self, stream_BTD: Tensor, *of_memory: Any) -> Tensor:
        """What each token reads of a `Memory`, ``[B, T, D]``."""
        memory = Memory(*of_memory)
        own, entries_BSC, start_B = self.own, memory.entries, memory.start_B
        tokens = stream_BTD.shape[1]
        before = entries_BSC.shape[1] - tokens
        back_M = own.interval * torch.arange(own.size)
        new_TM = torch.arange(tokens).unsqueeze(1) - back_M
        real_BTM = (start_B.view(-1, 1, 1) if start_B is not None else 0) + new_TM >= 0
        read_BTMC = entries_BSC[:, (before + new_TM).clamp(min=0)] * real_BTM.unsqueeze(-1)
        query_BTHE = own.query(stream_BTD).unflatten(-1, (own.heads, -1))
        key_BTMHE = own.key(read_BTMC).unflatten(-1, (own.heads, -1))
        value_BTMHE = own.value(read_BTMC).unflatten(-1, (own.heads, -1))
        scores_BTHM = torch.einsum("bthe,btmhe->bthm", query_BTHE, key_BTMHE)
        weights_BTHM = (scores_BTHM * query_BTHE.shape[-1] ** -0.5).softmax(-1)
        dropout = own.dropout if own.training else 0.0
        weights_BTHM = torch.nn.functional.dropout(weights_BTHM, dropout, training=dropout > 0)
        mixed_BTHE = torch.einsum("bthm,btmhe->bthe", weights_BTHM, value_BTMHE)
        return own.output(mixed_BTHE.flatten(2))


def _sublayer(attention: torch.nn.Module, stream_BTD: Tensor, memory: Memory) -> None:
    attention(stream_BTD, *memory).sum().backward()
    attention.zero_grad()


def _step(
    loss_of: NextTokenLoss,
    attention: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    training: TrainingSettings,
    ids_BT: Tensor,
    entries_BSC: Tensor,
) -> None:
    """A training step from stored contexts, with the frozen tied head."""
    model, labels_BT = loss_of.model, ids_BT[:, 1:]
    tokens, history = labels_BT.shape[1], model.model.history
    positions_BT = torch.arange(history, history + tokens).unsqueeze(0)
    own = model.model.layer.attention
    model.model.layer.attention = attention
    try:
        given = {"position_ids": positions_BT, "contexts": entries_BSC}
        loss, _ = loss_of(labels_BT, labels_BT.numel(), input_ids=ids_BT[:, :-1], **given)
    finally:
        model.model.layer.attention = own
    loss.backward()
    if training.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimizer.step()
    optimizer.zero_grad()
