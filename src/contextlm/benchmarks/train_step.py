"""How fast compressed models train beside attention: one whole optimiser step of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from contextlm.benchmarks.harness import Outcome, Setting, Target, interleaved, milliseconds
from contextlm.models.build import build_config, create_model
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.schema import Recipe
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.optimisation import build_optimizer
from contextlm.training.trainer import next_token_loss


@dataclass(frozen=True)
class Comparison:
    """A recipe whose contenders train beside its baseline.

    Attributes:
        recipe: its name.
        scale: None for full.
        vocabulary: of the models.
        contenders: the name in the table, by the recipe's name.
        precisions: of autocast; the first is the recipe's.
        targets: of ratios in the recipe's precision, by the name in the table.
    """

    recipe: str
    scale: str | None
    vocabulary: int
    contenders: dict[str, str]
    precisions: tuple[str, ...]
    targets: dict[str, Target] = field(default_factory=dict)


COMPARISONS = (
    # The document trained in float32.
    Comparison(
        "context-pythia",
        None,
        50304,
        {"context-pythia": "compressed", "context-pythia-projected": "projected"},
        ("float32", "bfloat16"),
        {"compressed": Target(2.0), "projected": Target(0.95)},
    ),
    Comparison(
        "frontier",
        "small",
        4096,
        {"hybrid": "hybrid", "mha-conv-norm": "mha-conv-norm", "latent": "latent"},
        ("bfloat16",),
        {"hybrid": Target(1.0)},
    ),
)


def measure(setting: Setting) -> Outcome:
    """Both comparisons, each in turns with its own baseline."""
    outcome = Outcome()
    for comparison in COMPARISONS:
        recipe = load_recipe(
            comparison.recipe, scale="smoke" if setting.smoke else comparison.scale
        )
        vocabulary = 512 if setting.smoke else comparison.vocabulary
        rows, tokens = recipe.training.batch_size, recipe.sequence_length
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(vocabulary, (rows, tokens + 1), generator=generator)
        models = _models(recipe, comparison, vocabulary)
        outcome.settings[comparison.recipe] = {"B": rows, "T": tokens, "vocabulary": vocabulary}
        for precision in comparison.precisions:
            _compare(outcome, comparison, models, recipe.training, ids_BT, precision, setting)
    return outcome


def _models(recipe: Recipe, comparison: Comparison, vocabulary: int) -> dict[str, PreTrainedModel]:
    names = {recipe.baseline.name: recipe.baseline.name, **comparison.contenders}
    return {
        names[contender.name]: create_model(build_config(contender.model, vocabulary), 0).train()
        for contender in recipe.contenders
        if contender.name in names
    }


def _compare(
    outcome: Outcome,
    comparison: Comparison,
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
        row = {"recipe": comparison.recipe, "model": name, "precision": precision}
        speed = {"parameters": parameters, "tokens/s": tokens / time.median}
        outcome.rows.append({**row, **speed, **milliseconds(time)})
    baseline = next(iter(models))
    for name in comparison.contenders.values():
        ratio = times[baseline].median / times[name].median
        if precision == comparison.precisions[0]:
            target = comparison.targets.get(name)
            outcome.compare(f"train_step_{name}_vs_baseline", ratio, target)
        else:
            outcome.compare(f"train_step_{name}_vs_baseline_{precision}", ratio)


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
