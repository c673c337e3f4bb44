"""`contextlm compress`: policies for one model, measured side by side in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder, write_json
from contextlm.base.progress import Progress, duration
from contextlm.compress.adaptors import Attention, attentions_of
from contextlm.compress.base import Costs, Policy, parse_policy, policies
from contextlm.compress.calibration import Calibration
from contextlm.data.corpora import load_corpus
from contextlm.data.token_store import build_token_store
from contextlm.evaluation.checkpoint import WEIGHTS, load_checkpoint
from contextlm.evaluation.compression import Measuring, reference_file
from contextlm.evaluation.memory import position_limit
from contextlm.lab.environment import describe_environment
from contextlm.lab.pretrained import rows_to_calibrate, text_to_read
from contextlm.lab.run_folder import new_folder
from contextlm.report.compression import write_compression
from contextlm.report.numbers import human_bytes, percent
from contextlm.results.compression import Compression, PolicyFigures

LENGTHS = (512, 2048)
BUDGETS = (0.25,)


@dataclass(frozen=True)
class CompressSettings:
    """What to measure.

    Attributes:
        policies: specs; None: what is proposed for each budget.
        text: a corpus; its validation split is read, its training split calibrates.
        lengths: tokens after which bytes are counted. None: `LENGTHS`, as far as the model has
            positions.
        read: tokens of the text that are read; None: the last of `lengths`.
        budgets: shares of the model's own cache at the text's end.
    """

    policies: Sequence[str] | None
    text: str
    lengths: Sequence[int] | None
    read: int | None
    budgets: Sequence[float]
    device: str


def compress(
    folder: Path,
    named: str,
    settings: CompressSettings,
    out: Path,
    command: str,
    progress: Progress,
) -> tuple[Compression, Path, dict[str, Path]]:
    """Measure policies on the model in `folder`.

    Args:
        folder: a checkpoint of transformers with its tokenizer.
        named: as the user called it.
        out: where the run folder goes.
        command: what repeats this.

    Returns:
        What was found, the run folder, and the report's files by name.

    Raises:
        InputError: the model, the text or a policy is not usable; told before anything is measured.
    """
    given = None if settings.policies is None else [parse_policy(s) for s in settings.policies]
    progress.line(memory_text(folder))
    model, tokenizer = load_checkpoint(folder, settings.device)
    attentions = attentions_of(model)
    limit = position_limit(model)
    lengths = _within(settings.lengths, limit)
    read = settings.read or lengths[-1]
    if read > lengths[-1]:
        raise InputError(f"--read {read}: more than the longest of --lengths, {lengths[-1]:,}")
    within = sorted({*(length for length in lengths if length < read), read})
    text_T, other_NT, corpus = texts(settings.text, tokenizer, read, limit)
    if len(text_T) < read + 1:
        raise InputError(
            f"corpus {corpus!r} has {len(text_T):,} tokens to read, --lengths or --read asks for "
            f"{read:,} and one more"
        )
    refused: dict[str, str] = {}
    if given is None:
        chosen = proposed(attentions, settings.budgets, read, refused)
    else:
        chosen = [parse_policy("full"), *(policy for policy in given if policy.spec != "full")]
        for policy in chosen:
            policy.check(attentions)
    progress.line(
        f"{len(chosen)} policies on {read:,} tokens of {corpus}; the full cache's "
        f"distributions take {human_bytes(4 * read * model.config.vocab_size)} of disk"
    )
    found: list[PolicyFigures] = []
    with reference_file() as reference:
        beyond = [length for length in lengths if length > read]
        calibration = Calibration(other_NT)
        measuring = Measuring(model, tokenizer, text_T, within, reference, calibration, beyond)
        for number, policy in enumerate(chosen, start=1):
            name = f"{number}/{len(chosen)} {policy.spec}"
            one = measuring.policy(policy, partial(_tell, progress, name))
            found.append(one)
            progress.line(
                f"{name}: {percent(one.share)} of the cache, KL {one.kl:.4f}, "
                f"{one.decode_tokens_per_second:,.1f} tokens/s, {duration(one.seconds)}"
            )
    result = Compression(
        model=named,
        model_type=model.config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        corpus=corpus,
        tokens=read,
        calibration_tokens=other_NT.numel(),
        budgets=list(settings.budgets),
        command=command,
        policies=found,
        refused=refused,
    )
    paths: dict[str, Path] = {}

    def fill(partial: Path) -> None:
        write_json(partial / "result.json", result.model_dump())
        write_json(partial / "environment.json", describe_environment(model.device))
        paths.update(write_compression(result, partial))

    run = new_folder(out, f"compress-{folder.resolve().name}", fill)
    return result, run, {name: run / path.name for name, path in paths.items()}


def _tell(progress: Progress, name: str, doing: str) -> None:
    progress.update(f"{name}: {doing}")


def proposed(
    attentions: Sequence[Attention],
    budgets: Sequence[float],
    tokens: int,
    refused: dict[str, str],
) -> list[Policy]:
    """The full cache, and each policy with settings for each budget; notes why some cannot be."""
    costs = Costs.of(attentions[0], tokens)
    kinds = policies()
    found: dict[str, Policy] = {"full": parse_policy("full")}
    for kind in (kinds[name] for name in kinds if name != "full"):
        for budget in budgets:
            policy = kind.proposed(budget, costs)
            if policy is not None:
                found[policy.spec] = policy
    for budget in budgets:
        form = kinds["int8"]
        share = form.share(costs)  # type: ignore[attr-defined]
        selection = kinds["window"].proposed(min(1.0, budget / share), costs)
        if selection is not None and share < 1:
            stack = parse_policy(f"{selection.spec}+int8")
            found[stack.spec] = stack
    for spec, policy in list(found.items()):
        try:
            policy.check(attentions)
        except InputError as error:
            refused[spec] = str(error)
            del found[spec]
    return list(found.values())


def texts(
    name: str, tokenizer: PreTrainedTokenizerFast, tokens: int, positions: int | None
) -> tuple[Tensor, Tensor, str]:
    """A text of at least ``tokens + 1`` tokens where there is one, others to calibrate, the name.

    The first document of the validation split that is long enough is read, else the whole split.
    Rows to calibrate, of at most as many `positions`, are taken from all over the training split.
    """
    cache = cache_folder()
    corpus = load_corpus(name)
    held_out = build_token_store(corpus, "validation", tokenizer, cache)
    text_T = text_to_read(held_out.documents, tokens)
    other = build_token_store(corpus, "train", tokenizer, cache).tokens
    return text_T, rows_to_calibrate(other, positions), corpus.name


def memory_text(folder: Path) -> str:
    """What loading the model takes and what there is, before anything is loaded."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    return (
        f"{folder / WEIGHTS}: {human_bytes(weights)} of weights to load; "
        f"{human_bytes(free)} of memory is free"
    )


def _within(wanted: Sequence[int] | None, limit: int | None) -> list[int]:
    """The lengths within the model's positions."""
    lengths = sorted(set(wanted or LENGTHS))
    fitting = [length for length in lengths if limit is None or length <= limit]
    if wanted is not None and len(fitting) < len(lengths):
        raise InputError(f"--lengths {lengths[-1]}: more than the model's {limit} positions")
    return fitting or [limit or lengths[0]]
