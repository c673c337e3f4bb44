"""`contextlm eval` and `contextlm generate`: what a checkpoint is worth, and what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from contextlm.base.errors import InputError
from contextlm.base.files import is_folder
from contextlm.base.live_line import LiveLine
from contextlm.base.visible import shown
from contextlm.cli.comparisons import AsJson, Device
from contextlm.cli.output import print_facts, print_json
from contextlm.cli.prompt import read_prompt

if TYPE_CHECKING:
    from contextlm.evaluation.checkpoint import CheckpointReport
    from contextlm.evaluation.input_cache import InputCacheReport

COLDEST_TO_HOTTEST = (0.001, 1000.0)  # temperatures; logits divided by less overflow

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="A saved model with its tokenizer, e.g. runs/demo-001/NAME/seed-0/checkpoint.",
    ),
]


def evaluate(
    checkpoint: Checkpoint,
    corpus: Annotated[
        str, typer.Option(metavar="NAME", help="What to measure on (`contextlm list corpora`).")
    ] = "pydocs",
    sequence_length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            max=10**9,
            show_default=False,
            help="Tokens a window; by default 128 or what the model has.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=10**9,
            show_default=False,
            help="Use only the first N validation windows.",
        ),
    ] = None,
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
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: quality on a validation split, bytes of cache, speed.

    Examples:

    ```
    contextlm eval runs/demo-001/context-pythia/seed-0/checkpoint
    contextlm eval CHECKPOINT --corpus text:my-notes/ --cache-lengths 128,4096 --json
    contextlm eval runs/demo-001/pythia/seed-0/checkpoint --cache input
    contextlm eval CHECKPOINT --long --corpus text:books/
    contextlm eval CHECKPOINT --long --corpus recall:16
    ```
    """
    lengths = None if cache_lengths is None else read_lengths(cache_lengths)
    folder = _existing(checkpoint)
    if long:
        if lengths is not None or cache == "input":
            raise InputError("--long takes neither --cache-lengths nor --cache input")
        from contextlm.cli.long_context import show_long

        show_long(folder, corpus, device, sequence_length, samples, as_json)
        return

    from contextlm.evaluation.checkpoint import evaluate_checkpoint

    report = evaluate_checkpoint(
        folder,
        corpus=corpus,
        device=device,
        sequence_length=sequence_length,
        samples=samples,
        cache_lengths=lengths,
        input_cache=cache == "input",
    )
    left_out = sorted(set(lengths or []) - {held.tokens for held in report.cache})
    if left_out:
        shown = ", ".join(f"{length:,}" for length in left_out)
        print(f"--cache-lengths: left out, beyond the model's positions: {shown}", file=sys.stderr)
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
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Read the prompt, of any length, from a file; - for stdin.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=10**9, help="Stop after so many tokens.")
    ] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0,
            max=COLDEST_TO_HOTTEST[1],
            show_default=False,
            help="Sample, the wilder the higher; 0 always takes the likeliest token, which is "
            "also what happens without any of the sampling options.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            max=10**9,
            show_default=False,
            help="Sample among the K likeliest tokens.",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            show_default=False,
            help="Sample among the likeliest tokens that make up this probability.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, max=2**32 - 1, show_default=False, help="Makes sampling repeatable."
        ),
    ] = None,
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

    from contextlm.cli.generation import Sampling, continue_text

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    with LiveLine(sys.stderr) as live:
        made = continue_text(folder, blocks, sampling, device=device, stream=not as_json, live=live)
    if as_json:
        print_json(made)
    else:
        print(made.summary(), file=sys.stderr)


def _in_words(report: CheckpointReport) -> dict[str, Any]:
    """The figures with the words and the decimals of a run's report."""
    from contextlm.report import numbers

    windows = f"{report.windows:,} of {report.windows_available:,}"
    facts = {
        "architecture": report.architecture,
        "parameters": numbers.count(report.parameters),
        "corpus": report.corpus,
        "windows": f"{windows}, {report.sequence_length:,} tokens each",
        "tokens predicted": numbers.count(report.tokens),
        "validation PPL": numbers.perplexity(report.ppl),
        "validation loss": numbers.decimal(report.loss, 4),
        "bits per byte": numbers.ABSENT
        if report.bits_per_byte is None
        else numbers.decimal(report.bits_per_byte, 3),
        "accuracy": numbers.percent(report.accuracy),
    }
    for held in report.cache:
        size = numbers.human_bytes(held.logical)
        resident = numbers.human_bytes(held.resident)
        facts[f"cache at {held.tokens:,} tokens"] = f"{size} ({resident} resident)"
    timed = f"tokens/s, {report.speed_tokens:,} tokens"
    return {
        **facts,
        "cache type": report.cache_dtype,
        f"prefill {timed}": numbers.rate(report.prefill_tokens_per_second),
        f"decode {timed}": numbers.rate(report.decode_tokens_per_second),
        **_input_cache_in_words(report.input_cache, timed),
        **({"note": "; ".join(report.remarks)} if report.remarks else {}),
    }


def _input_cache_in_words(report: InputCacheReport | None, timed: str) -> dict[str, str]:
    from contextlm.report import numbers

    if report is None:
        return {}
    facts = {}
    for held, change in zip(report.cache, report.cache_change_percent, strict=True):
        size = numbers.human_bytes(held.logical)
        resident = numbers.human_bytes(held.resident)
        saved = numbers.signed_percent(change)
        facts[f"input cache at {held.tokens:,} tokens"] = f"{size}, {saved} ({resident} resident)"
    prefill = numbers.rate(report.prefill_tokens_per_second)
    decode = numbers.rate(report.decode_tokens_per_second)
    return {
        **facts,
        f"input cache: prefill {timed}": (
            f"{prefill}, {numbers.signed_percent(report.prefill_change_percent)}"
        ),
        f"input cache: decode {timed}": (
            f"{decode}, {numbers.signed_percent(report.decode_change_percent)}"
        ),
    }


def read_lengths(text: str) -> list[int]:
    """Comma-separated token counts, ascending and each once.

    Raises:
        InputError: one of them is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:12]) < 10**9 for part in parts):
        raise InputError(f"--cache-lengths {shown(text)}: expected token counts such as 128,512")
    return sorted({int(part) for part in parts})


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Refuse what the options' own bounds let through: NaN, and what logits overflow with.

    Raises:
        InputError: it names the option.
    """
    low, high = COLDEST_TO_HOTTEST
    if temperature and not low <= temperature <= high:
        raise InputError(f"--temperature {temperature}: expected 0, or {low} to {high}")
    if top_p is not None and not 0 <= top_p <= 1:
        raise InputError(f"--top-p {top_p}: expected 0 to 1")


def _existing(checkpoint: Path) -> Path:
    if not is_folder(checkpoint):
        raise InputError(f"checkpoint {shown(str(checkpoint), 300)}: no such folder")
    from contextlm.evaluation.checkpoint_files import check_parts

    check_parts(checkpoint)  # here already: loading torch takes seconds
    return checkpoint
