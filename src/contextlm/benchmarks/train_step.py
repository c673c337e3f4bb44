"""How fast Context-Pythia trains beside Pythia-70M: one whole optimiser step at full size."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contextlm.benchmarks.harness import Outcome, Setting, Target, interleaved, milliseconds
from contextlm.models.build import build_config, create_model
from contextlm.recipe import load_recipe
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.next_token import next_token_loss
from contextlm.training.optimisation import build_optimizer
from contextlm.training.settings import TrainingSettings

TARGETS = {"compressed": Target(2.0), "projected": Target(0.95)}
VOCABULARY = 50304


def measure(setting: Setting) -> Outcome:
    """The document's setting in float32, which it trained in, and the same in bfloat16."""
    recipe = load_recipe("context-pythia", scale="smoke" if setting.smoke else None)
    rows, tokens = (2, 16) if setting.smoke else (recipe.training.batch_size, 128)
    vocabulary = recipe.vocab_size or (512 if setting.smoke else VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (rows, tokens + 1), generator=generator)
    models: dict[str, PreTrainedModel] = {}
    for contender in recipe.contenders:
        name = str(contender.model.get("stream", "baseline"))
        if name in models:
            continue
        models[name] = create_model(build_config(contender.model, vocabulary), seed=0).train()
    outcome = Outcome(settings={"B": rows, "T": tokens, "vocabulary": vocabulary})
    for precision in ("float32", "bfloat16"):
        _compare(outcome, models, recipe.training, ids_BT, precision, setting)
    return outcome


def _compare(
    outcome: Outcome,
    models: dict[str, PreTrainedModel],
    training: TrainingSettings,
    ids_BT: Tensor,
    precision: str,
    setting: Setting,
) -> None:
    steps = {
        name: partial(_step, model, build_optimizer(model, training), training, ids_BT, precision)
        for name, model in models.items()
    }
    with freed_memory_kept():  # as training does
        times = interleaved(steps, setting.repeats or 5)
    tokens = ids_BT.shape[0] * (ids_BT.shape[1] - 1)
    for name, time in times.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        row = {"model": name, "precision": precision, "parameters": parameters}
        outcome.rows.append({**row, "tokens/s": tokens / time.median, **milliseconds(time)})
    for name, target in TARGETS.items():
        ratio = times["baseline"].median / times[name].median
        if precision == "float32":
            outcome.compare(f"train_step_{name}_vs_baseline", ratio, target)
        else:
            outcome.compare(f"train_step_{name}_vs_baseline_{precision}", ratio, target)


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    training: TrainingSettings,
    ids_BT: Tensor,
    precision: str,
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = model(ids_BT[:, :-1], use_cache=False)
        loss = next_token_loss(outputs, ids_BT[:, 1:])
    loss.backward()
    if training.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimizer.step()
    optimizer.zero_grad()
