"""`contextlm eval` and `contextlm generate`: what a checkpoint is worth, and what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from contextlm.cli.comparisons import AsJson, Device
from contextlm.cli.output import print_facts, print_json
from contextlm.errors import InputError

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
            show_default=False,
            help="Tokens a window; by default 128 or what the model has.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, show_default=False, help="Use only the first N validation windows."
        ),
    ] = None,
    cache_lengths: Annotated[
        str,
        typer.Option(metavar="LIST", help="Tokens after which the cache is measured."),
    ] = "128,512,2048,8192",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint: quality on a validation split, bytes of cache, speed.

    Examples:

    ```
    contextlm eval runs/demo-001/context-hybrid/seed-0/checkpoint
    contextlm eval CHECKPOINT --corpus text:my-notes/ --cache-lengths 128,4096 --json
    ```
    """
    lengths = read_lengths(cache_lengths)
    folder = _existing(checkpoint)

    from contextlm.evaluation.checkpoint import evaluate_checkpoint

    report = evaluate_checkpoint(
        folder,
        corpus=corpus,
        device=device,
        sequence_length=sequence_length,
        samples=samples,
        cache_lengths=lengths,
    )
    if as_json:
        print_json(report)
    else:
        from contextlm.report.numbers import human_bytes

        facts = report.model_dump(exclude={"checkpoint", "cache"})
        for held in report.cache:
            size = f"{human_bytes(held.logical)} ({human_bytes(held.resident)} resident)"
            facts[f"cache at {held.tokens:,} tokens"] = size
        print_facts(facts, caption=report.checkpoint)


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
            metavar="FILE", show_default=False, help="Read the prompt from a file, - for stdin."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")
    ] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=False,
            help="Sample, the wilder the higher; 0 always takes the likeliest token, which is "
            "also what happens without any of the sampling options.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, show_default=False, help="Sample among the K likeliest tokens."
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
        typer.Option(metavar="N", min=0, show_default=False, help="Makes sampling repeatable."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint, as it is generated.

    The continuation goes to stdout, tokens a second and the bytes of the cache to stderr. One
    line break at the end of a prompt from a file or from stdin is left off.

    Examples:

    ```
    contextlm generate CHECKPOINT "Return the" --max-new-tokens 50
    contextlm generate CHECKPOINT "Once" --temperature 0.8 --top-p 0.95 --seed 1
    echo "Return the" | contextlm generate CHECKPOINT --json
    ```
    """
    text = read_prompt(prompt, prompt_file)
    folder = _existing(checkpoint)

    from contextlm.cli.generation import Sampling, continue_text

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    made = continue_text(folder, text, sampling, device=device, stream=not as_json)
    if as_json:
        print_json(made)
    else:
        print(made.summary(), file=sys.stderr)


def read_lengths(text: str) -> list[int]:
    """Comma-separated token counts, ascending and each once.

    Raises:
        InputError: one of them is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:12]) < 10**9 for part in parts):
        raise InputError(f"--cache-lengths {text!r}: expected token counts such as 128,512")
    return sorted({int(part) for part in parts})


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt from where the command line says: the argument, a file, or stdin.

    Raises:
        InputError: it is given twice or not at all, or cannot be read as UTF-8.
    """
    if prompt is not None and file is not None:
        raise InputError("give either PROMPT or --prompt-file, not both")
    if prompt is not None:
        return prompt
    from_stdin = file in (None, "-")
    if from_stdin and (sys.stdin is None or (file is None and sys.stdin.isatty())):
        raise InputError("no prompt: give PROMPT, --prompt-file, or text on stdin")
    try:
        data = sys.stdin.buffer.read() if from_stdin else Path(str(file)).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the prompt in {'stdin' if from_stdin else file} is not UTF-8") from None
    except OSError as error:
        raise InputError(f"--prompt-file {file}: {error.strerror}") from None
    return text.removesuffix("\n").removesuffix("\r")


def _existing(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise InputError(f"checkpoint {str(checkpoint)!r}: no such folder")
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"checkpoint {str(checkpoint)!r}: it holds no config.json")
    return checkpoint
