"""`contextlm eval` and `contextlm generate`: what a checkpoint is worth, and what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from contextlm.base.errors import InputError
from contextlm.base.files import is_folder
from contextlm.base.live_line import LiveLine
from contextlm.base.visible import shown
from contextlm.cli.options import AsJson, Checkpoint, Device, Imports, count, optional
from contextlm.cli.output import print_facts, print_json, print_table
from contextlm.cli.prompt import read_prompt

if TYPE_CHECKING:
    from contextlm.evaluation.generation import Continuation
    from contextlm.evaluation.long_texts import LongReport
    from contextlm.evaluation.measure import CheckpointReport
    from contextlm.results.facts import CacheBytes

COLDEST_TO_HOTTEST = (0.001, 1000.0)  # temperatures; logits divided by less overflow


def evaluate(
    checkpoint: Checkpoint,
    corpus: Annotated[
        str, typer.Option(metavar="NAME", help="What to measure on (`contextlm list corpora`).")
    ] = "pydocs",
    split: Annotated[
        Literal["train", "validation", "all"] | None,
        typer.Option(
            show_default="all of your own files, else validation",
            help="The part of the corpus to measure on.",
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        count("Tokens a window; by default 128 or what the model has.", metavar="TOKENS"),
    ] = None,
    samples: Annotated[int | None, count("Use only the first N windows.")] = None,
    cache_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default="128,512,2048,8192, or the model's positions",
            help="Tokens after which the cache is measured.",
        ),
    ] = None,
    cache: Annotated[
        Literal["plain", "input"],
        typer.Option(
            help="input: also measure GPT-NeoX or GPT-2 with attention inputs kept instead of "
            "keys and values, and what that saves and costs."
        ),
    ] = "plain",
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Instead: perplexity by position up to 8 times the training length "
            "(--sequence-length overrides it), or right answers by difficulty where the corpus is "
            "one of tasks.",
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default=False,
            help="Instead: scores of these tasks of lm-eval (pip install lm-eval; CONTEXTLM_TASKS "
            "names a folder of your own task files). --samples: only the first N questions.",
        ),
    ] = None,
    imports: Imports = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: quality on a corpus, bytes of cache, speed.

    A corpus of your own files (text:, jsonl:) is measured whole; if the model was trained on it,
    ask for --split validation. Of the others the validation split is measured.

    Examples:

    ```
    contextlm eval runs/demo-001/context-pythia/seed-0/checkpoint
    contextlm eval CHECKPOINT --corpus text:my-notes/ --cache-lengths 128,4096 --json
    contextlm eval runs/demo-001/pythia/seed-0/checkpoint --cache input
    contextlm eval CHECKPOINT --long --corpus text:books/
    contextlm eval CHECKPOINT --long --corpus recall:16
    contextlm eval CHECKPOINT --tasks arc_easy,hellaswag --samples 200
    ```
    """
    lengths = None if cache_lengths is None else read_lengths(cache_lengths)
    folder = _existing(checkpoint)
    if tasks is not None:
        others: dict[str, object] = {"--long": long, "--cache input": cache == "input"}
        others |= {"--cache-lengths": lengths, "--corpus": corpus != "pydocs", "--split": split}
        for option, value in {**others, "--sequence-length": sequence_length}.items():
            if value:
                raise InputError(f"--tasks does not take {option}")
        _print_tasks(folder, tasks, device, samples, as_json)
        return
    given: dict[str, Any] = {
        "corpus": corpus,
        "device": device,
        "split": split,
        "sequence_length": sequence_length,
        "samples": samples,
    }
    if long:
        if lengths is not None or cache == "input":
            raise InputError("--long takes neither --cache-lengths nor --cache input")
        from contextlm.evaluation.long_texts import evaluate_long

        long_report = evaluate_long(folder, **given)
        if as_json:
            print_json(long_report)
        else:
            _print_long(long_report)
        return

    from contextlm.evaluation.measure import evaluate_checkpoint

    report = evaluate_checkpoint(
        folder, **given, cache_lengths=lengths, input_cache=cache == "input"
    )
    left_out = sorted(set(lengths or []) - {held.tokens for held in report.cache})
    if left_out:
        listed = ", ".join(f"{length:,}" for length in left_out)
        print(f"--cache-lengths: left out, beyond the model's positions: {listed}", file=sys.stderr)
    if as_json:
        print_json(report)
    else:
        print_facts(_in_words(report), caption=report.checkpoint)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", show_default=False, help="The text to continue; or use stdin."
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, optional("FILE", "Read the prompt, of any length, from a file; - for stdin.")
    ] = None,
    max_new_tokens: Annotated[int, count("Stop after so many tokens.")] = 100,
    temperature: Annotated[
        float | None,
        optional(
            "T",
            "Sample, the wilder the higher; 0 always takes the likeliest token, which is also what "
            "happens without any of the sampling options.",
        ),
    ] = None,
    top_k: Annotated[int | None, count("Sample among the K likeliest tokens.", metavar="K")] = None,
    top_p: Annotated[
        float | None,
        optional("P", "Sample among the likeliest tokens that make up this probability, 0 to 1."),
    ] = None,
    seed: Annotated[
        int | None, count("Makes sampling repeatable.", least=0, most=2**32 - 1)
    ] = None,
    imports: Imports = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint, as it is generated.

    The continuation goes to stdout, tokens a second and the bytes of the cache to stderr, on a
    terminal while the text is written, too. A prompt from a file or from stdin may have any length
    that the model has positions for: it is read piece by piece, and a model of constant memory
    reads millions of tokens in constant memory. One line break at its end is left off.

    Examples:

    ```
    contextlm generate CHECKPOINT "Return the" --max-new-tokens 50
    contextlm generate CHECKPOINT "Once" --temperature 0.8 --top-p 0.95 --seed 1
    echo "Return the" | contextlm generate CHECKPOINT --json
    contextlm generate CHECKPOINT --prompt-file book.txt
    ```
    """
    check_sampling(temperature, top_p)
    blocks = read_prompt(prompt, prompt_file)
    folder = _existing(checkpoint)

    from contextlm.evaluation.generation import Sampling, continue_text
    from contextlm.evaluation.memory import cache_bytes
    from contextlm.report.numbers import human_bytes

    def words(tokens: int, seconds: float, cache: Any) -> str:
        kept = human_bytes(cache_bytes(cache).logical)
        return f"{tokens:,} tokens, {tokens / seconds:,.1f} tokens/s, cache {kept}"

    with LiveLine(sys.stderr, None if as_json else sys.stdout) as live:
        made = continue_text(
            folder,
            blocks,
            Sampling(max_new_tokens, temperature, top_k, top_p, seed),
            device=device,
            write=None if as_json else live.write,
            on_prompt=lambda tokens: live.show(lambda: f"reading the prompt: {tokens:,} tokens"),
            on_token=lambda *state: live.show(lambda: words(*state)),
        )
    if as_json:
        print_json(made)
    else:
        print(flush=True)
        print(summary(made), file=sys.stderr)


def _print_tasks(
    folder: Path, listed: str, device: str, samples: int | None, as_json: bool
) -> None:
    names = [name.strip() for name in listed.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"--tasks {shown(listed)}: expected names such as arc_easy,hellaswag")

    from contextlm.evaluation.tasks import evaluate_tasks
    from contextlm.report import numbers

    report = evaluate_tasks(folder, names, device=device, samples=samples)
    if as_json:
        print_json(report)
        return
    columns = ["task", "metric", "score", "standard error", "questions"]
    absent, significant = numbers.ABSENT, numbers.significant
    lines = [
        [
            score.task,
            score.metric,
            significant(score.value),
            absent if score.stderr is None else significant(score.stderr),
            absent if score.samples is None else numbers.count(score.samples),
        ]
        for score in report.scores
    ]
    caption = f"{folder}: {report.architecture}, {numbers.count(report.parameters)} parameters"
    print_table(columns, lines, caption=caption, text=2)
    if report.remarks:
        print(f"note: {'; '.join(report.remarks)}")


def summary(made: Continuation) -> str:
    """What generating a text took, on one line."""
    from contextlm.report.numbers import human_bytes

    said = (
        f"{made.tokens} tokens, {made.tokens_per_second:,.1f} tokens/s, "
        f"cache {human_bytes(made.cache_logical)} ({human_bytes(made.cache_resident)} resident) "
        f"after {made.prompt_tokens + made.tokens - 1:,} tokens"
    )
    if not made.prompt_seconds:
        return said
    return f"{said}, prompt of {made.prompt_tokens:,} tokens read in {made.prompt_seconds:,.1f} s"


def _in_words(report: CheckpointReport) -> dict[str, Any]:
    """The figures with the words and the decimals of a run's report."""
    from contextlm.report import numbers

    windows = f"{report.windows:,} of {report.windows_available:,}"
    bits = report.bits_per_byte
    timed = f"tokens/s, {report.speed_tokens:,} tokens"
    facts = {
        "architecture": report.architecture,
        "parameters": numbers.count(report.parameters),
        "corpus": _of_corpus(report),
        "windows": f"{windows}, {report.sequence_length:,} tokens each",
        "tokens predicted": numbers.count(report.tokens),
        "PPL": numbers.perplexity(report.ppl),
        "loss": numbers.decimal(report.loss, 4),
        "bits per byte": numbers.ABSENT if bits is None else numbers.decimal(bits, 3),
        "accuracy": numbers.percent(report.accuracy),
        **{f"cache at {held.tokens:,} tokens": _held(held) for held in report.cache},
        "cache type": report.cache_dtype,
        f"prefill {timed}": numbers.rate(report.prefill_tokens_per_second),
        f"decode {timed}": numbers.rate(report.decode_tokens_per_second),
    }
    if report.input_cache is not None:
        ours = report.input_cache
        for held, change in zip(ours.cache, ours.cache_change_percent, strict=True):
            facts[f"input cache at {held.tokens:,} tokens"] = _held(held, change)
        for name in ("prefill", "decode"):
            rate = numbers.rate(getattr(ours, f"{name}_tokens_per_second"))
            saved = numbers.signed_percent(getattr(ours, f"{name}_change_percent"))
            facts[f"input cache: {name} {timed}"] = f"{rate}, {saved}"
    if report.remarks:
        facts["note"] = "; ".join(report.remarks)
    return facts


def _held(held: CacheBytes, change: float | None = None) -> str:
    from contextlm.report import numbers

    saved = "" if change is None else f", {numbers.signed_percent(change)}"
    resident = numbers.human_bytes(held.resident)
    return f"{numbers.human_bytes(held.logical)}{saved} ({resident} resident)"


def _of_corpus(report: CheckpointReport | LongReport) -> str:
    part = "all of it" if report.split == "all" else f"{report.split} split"
    return f"{report.corpus}, {part}"


def _print_long(report: LongReport) -> None:
    from contextlm.report import numbers

    kind = "texts" if report.positions else "questions"
    caption = (
        f"{report.checkpoint}: {report.architecture}, {numbers.count(report.parameters)} "
        f"parameters, {_of_corpus(report)}, {numbers.count(report.windows)} {kind}, "
        f"trained on {report.trained:,} tokens"
    )
    if report.positions:
        held_at = {held.tokens: held for held in report.cache}
        columns = ["positions", "end, x trained", "tokens", "loss", "PPL", "cache at the end"]
        lines = [
            [
                f"{bucket.first:,} to {bucket.last - 1:,}",
                numbers.decimal(bucket.last / report.trained, 2),
                numbers.count(bucket.tokens),
                numbers.decimal(bucket.loss, 4),
                numbers.perplexity(bucket.ppl),
                numbers.human_bytes(held_at[bucket.last].logical),
            ]
            for bucket in report.positions
        ]
        print_table(columns, lines, caption=caption)
    else:
        lines = [
            [entry.level, numbers.count(entry.answers), numbers.percent(entry.accuracy)]
            for entry in report.retrieval
        ]
        print_table(["level", "answers", "right answers"], lines, caption=caption)
        for held in report.cache:
            print(f"cache after {held.tokens:,} tokens: {numbers.human_bytes(held.logical)}")
    if report.remarks:
        print(f"note: {'; '.join(report.remarks)}")


def read_lengths(text: str, option: str = "--cache-lengths") -> list[int]:
    """Comma-separated token counts, ascending and each once.

    Raises:
        InputError: one of them is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:12]) < 10**9 for part in parts):
        raise InputError(f"{option} {shown(text)}: expected token counts such as 128,512")
    return sorted({int(part) for part in parts})


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Refuse NaN, shares beyond 1, and temperatures that logits overflow with.

    Raises:
        InputError: it names the option.
    """
    low, high = COLDEST_TO_HOTTEST
    if temperature and not low <= temperature <= high:
        raise InputError(f"--temperature {temperature}: expected 0, or {low} to {high}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise InputError(f"--top-p {top_p}: expected 0 to 1")


def _existing(checkpoint: Path) -> Path:
    if is_folder(checkpoint):
        return checkpoint
    how = ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint)):  # as the hub names models
        how = f"; of a model of the hub, make one: hf download {checkpoint} --local-dir FOLDER"
    raise InputError(f"checkpoint {shown(str(checkpoint), 300)}: no such folder{how}")
