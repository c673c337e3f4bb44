"""What projecting each vocabulary entry once gains in phase 1 (DESIGN 1.6)."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.benchmarks.harness import Answer, Options, Target, Timing
from contextlm.models.layers import ContextBlock, ContextLayer
from contextlm.recipe.settings import PhaseOneSettings
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.oacd import (
    batch_noise,
    initial_contexts,
    oacd_loss,
    train_context_block,
)

TOKENS, VOCABULARY, WIDTH, EMBEDDING, ITERATIONS = 587_970, 50_257, 256, 768, 18
CPU = torch.device("cpu")


def measure(options: Options) -> Answer:
    """Seconds an iteration on Zipf-distributed tokens, ours and one product a token in turns."""
    tokens, vocabulary = (3000, 200) if options.smoke else (TOKENS, VOCABULARY)
    width, embedding = (8, 12) if options.smoke else (WIDTH, EMBEDDING)
    rounds = options.repeats or 2
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, vocabulary + 1)
    tokens_P = random.choice(vocabulary, size=tokens, p=chances / chances.sum())
    table_VD = torch.randn(vocabulary, embedding, generator=torch.Generator().manual_seed(0))
    # Three iterations that learn; the first of a run only draws the random start.
    settings = PhaseOneSettings(stop_at=1.0, max_iterations=4)
    seconds: dict[str, list[float]] = {"vocabulary once": [], "token by token": []}
    for _ in range(rounds):
        block = _block(width, embedding)
        ours = train_context_block(
            block, table_VD.__getitem__, tokens_P, settings, seed=0, device=CPU
        )
        seconds["vocabulary once"] += [each.seconds for each in ours.iterations[1:]]
        block = _block(width, embedding)
        with freed_memory_kept():  # as ours does
            seconds["token by token"] += naive_phase_one(block, table_VD, tokens_P, settings)[1]
    times = {name: Timing.of(values) for name, values in seconds.items()}
    answer = Answer(settings={"tokens": tokens, "C": width, "D": embedding, "entries": vocabulary})
    for name, each in times.items():
        total = (ITERATIONS - 1) * each.median
        row = {"form": name, f"s in {ITERATIONS} iterations (from the median)": total}
        answer.rows.append({**row, **each.milliseconds()})
    ratio = times["token by token"].median / times["vocabulary once"].median
    answer.compare("phase1_vs_naive", ratio, Target(2.5))
    return answer


def _block(width: int, embedding: int) -> ContextBlock:
    torch.manual_seed(0)
    return ContextBlock(width, embedding)


def naive_phase_one(
    block: ContextBlock, table_VD: Tensor, tokens_P: np.ndarray, settings: PhaseOneSettings
) -> tuple[Tensor, list[float]]:
    """Phase 1 with seed 0 of a block of one layer, its whole product computed for each token.

    Returns:
        The last contexts, ``[P, C]``, and the seconds of each iteration that learns.
    """
    (layer,) = block.layers
    assert isinstance(layer, ContextLayer)
    ids_P = torch.from_numpy(tokens_P)
    contexts_PC = initial_contexts(len(ids_P), block.context_dim, 0, CPU).to(table_VD.dtype)
    optimizer = torch.optim.Adam(block.parameters(), lr=settings.learning_rate)
    size, seconds = settings.batch_size, []
    batches = -(-len(ids_P) // size)
    for number in range(2, settings.max_iterations + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        before_PC = F.pad(contexts_PC[:-1], (0, 0, 1, 0))
        moved = 0
        for batch in range(batches):
            part = slice(batch * size, (batch + 1) * size)
            fed_NC = before_PC[part]
            fed_NC = fed_NC + settings.noise * batch_noise(fed_NC, 0, number, batch)
            both_NX = torch.cat([fed_NC, table_VD[ids_P[part]]], dim=-1)
            update_NC = F.gelu(layer.update(both_NX))
            new_NC = layer.norm(fed_NC + update_NC)
            (oacd_loss(new_NC) / batches).backward()
            moved += int(((new_NC.detach() - contexts_PC[part]).square().mean(-1) < 0.03).sum())
            contexts_PC[part] = new_NC.detach()
        torch.nn.utils.clip_grad_norm_(block.parameters(), settings.clip)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return contexts_PC, seconds
