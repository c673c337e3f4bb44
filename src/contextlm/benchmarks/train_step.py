"""How fast compressed models train beside attention: one whole optimiser step of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from contextlm.benchmarks.harness import Answer, Options, Target, interleaved
from contextlm.models.build import build_config, create_model
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.host_memory import freed_memory_kept
from contextlm.training.next_token import NextTokenLoss
from contextlm.training.optimisation import build_optimizer


@dataclass(frozen=True)
class Case:
    """A recipe whose contenders train beside its baseline.

    Attributes:
        recipe: its name.
        scale: None for full.
        vocabulary: of the models.
        contenders: the name in the table, by the recipe's name.
        precisions: of autocast; the first is the recipe's.
        targets: of ratios in the recipe's precision, by the name in the table.
        tokens: rows of a batch and tokens of each; None: the recipe's.
    """

    recipe: str
    scale: str | None
    vocabulary: int
    contenders: dict[str, str]
    precisions: tuple[str, ...]
    targets: dict[str, Target] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None


CASES = (
    # The document trained in float32.
    Case(
        "context-pythia",
        None,
        50304,
        {"context-pythia": "compressed", "context-pythia-projected": "projected"},
        ("float32", "bfloat16"),
        {"compressed": Target(2.0), "projected": Target(0.95)},
    ),
    Case(
        "frontier",
        "small",
        4096,
        {
            "hybrid": "hybrid",
            "mha-conv-norm": "mha-conv-norm",
            "latent": "latent",
            "selective": "selective",
            "selective-window": "selective-window",
            "selective-global": "selective-global",
            "delta": "delta",
        },
        ("bfloat16",),
        {
            "hybrid": Target(1.0),
            "selective": Target(1.0),
            "selective-window": Target(1.0),
            "selective-global": Target(1.0),
        },
    ),
    Case(
        "frontier",
        "small",
        4096,
        {
            "selective": "selective-long",
            "selective-window": "selective-window-long",
            "selective-global": "selective-global-long",
        },
        ("bfloat16",),
        {
            "selective-long": Target(1.5),
            "selective-window-long": Target(1.5),
            "selective-global-long": Target(1.5),
        },
        tokens=(2, 2048),
    ),
)


def measure(options: Options) -> Answer:
    """Each case in turns with its own baseline."""
    answer = Answer()
    for case in CASES:
        recipe = load_recipe(case.recipe, scale="smoke" if options.smoke else case.scale)
        vocabulary = 512 if options.smoke else case.vocabulary
        rows, tokens = case.tokens or (recipe.training.batch_size, recipe.sequence_length)
        rows, tokens = (2, 16) if options.smoke and case.tokens else (rows, tokens)
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(vocabulary, (rows, tokens + 1), generator=generator)
        names = {recipe.baseline.name: recipe.baseline.name, **case.contenders}
        models = {
            names[each.name]: create_model(build_config(each.model, vocabulary), 0).train()
            for each in recipe.contenders
            if each.name in names
        }
        about = {"B": rows, "T": tokens, "vocabulary": vocabulary}
        answer.settings[f"{case.recipe}, {tokens} tokens"] = about
        for precision in case.precisions:
            steps = {
                name: partial(
                    _step,
                    NextTokenLoss(model),
                    build_optimizer(model, recipe.training),
                    recipe.training,
                    ids_BT,
                    precision,
                )
                for name, model in models.items()
            }
            with freed_memory_kept():  # as training does
                times = interleaved(steps, options.repeats or 5)
            for name, time in times.items():
                parameters = sum(p.numel() for p in models[name].parameters())
                answer.rows.append(
                    {
                        "recipe": case.recipe,
                        "model": name,
                        "precision": precision,
                        "parameters": parameters,
                        "tokens/s": rows * tokens / time.median,
                        **time.milliseconds(),
                    }
                )
            for name in case.contenders.values():
                ratio = times[recipe.baseline.name].median / times[name].median
                if precision == case.precisions[0]:
                    answer.compare(f"train_step_{name}_vs_baseline", ratio, case.targets.get(name))
                else:
                    answer.compare(f"train_step_{name}_vs_baseline_{precision}", ratio)
    return answer


def _step(
    loss_of: NextTokenLoss,
    optimizer: torch.optim.Optimizer,
    training: TrainingSettings,
    ids_BT: Tensor,
    precision: str,
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss, _ = loss_of(ids_BT[:, 1:], ids_BT[:, 1:].numel(), input_ids=ids_BT[:, :-1])
    loss.backward()
    if training.clip:
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), training.clip)
    optimizer.step()
    optimizer.zero_grad()
