"""`contextlm heal`: a trained model learns to decode by a policy."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from contextlm.base.errors import InputError
from contextlm.base.visible import visible
from contextlm.cli.options import AsJson, Device, TrainedModel, count
from contextlm.cli.output import REPORT_FILES, print_json, print_table, writable_folder


def heal(
    model: TrainedModel,
    policy: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            show_default=False,
            help="The policy, such as latent:64 or window:256,sinks:4 (`contextlm list policies`).",
        ),
    ],
    tokens: Annotated[int, count("Train on so many tokens, from all over the text.")] = 200_000,
    text: Annotated[
        str, typer.Option(metavar="NAME", help="What to train on (`contextlm list corpora`).")
    ] = "pydocs",
    kl: Annotated[
        float,
        typer.Option(
            metavar="WEIGHT", min=0, help="Of the KL divergence from the model's full cache."
        ),
    ] = 1.0,
    loss: Annotated[
        float, typer.Option(metavar="WEIGHT", min=0, help="Of the next-token loss.")
    ] = 1.0,
    train: Annotated[
        Literal["all", "lora", "policy"],
        typer.Option(
            help="all parameters; lora: adapters (PEFT, merged at the end) and what the policy has "
            "of its own; policy: that alone."
        ),
    ] = "all",
    rank: Annotated[int, count("Of the adapters.")] = 16,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", help="At the peak, then a cosine.")
    ] = 1e-4,
    sequence_length: Annotated[int, count("Tokens a window.", metavar="TOKENS")] = 512,
    batch_size: Annotated[int, count("Windows an optimiser step.")] = 2,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of training; auto: bfloat16 where the machine is faster with it."),
    ] = "auto",
    seed: Annotated[int, count("Of the windows' order.", least=0, most=2**32 - 1)] = 0,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the run folder goes.")] = "runs",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model to decode by a policy as it did with its full cache.

    Minimises the next-token loss and the divergence from the original, and says what that bought on
    text that was held out. The checkpoint keeps its policy: it opens with the Auto classes, and
    generates, with nothing more to be said. The run folder is one like any other, and
    `contextlm run --resume` finishes it.

    Examples:

    ```
    contextlm heal my-model/ --policy latent:64 --text text:my-notes/
    contextlm heal my-model/ --policy window:256,sinks:4 --tokens 1000000 --train lora
    contextlm run --resume runs/heal-my-model-001
    ```
    """
    if not 0 < learning_rate < float("inf"):
        raise InputError(f"--learning-rate {learning_rate}: expected a number above 0")
    for option, weight in {"--kl": kl, "--loss": loss}.items():
        if weight == float("inf"):
            raise InputError(f"{option} {weight}: expected a finite number")
    if not kl and not loss:
        raise InputError("--kl 0 --loss 0: nothing would be minimised")
    place = writable_folder(out, "--out")

    from contextlm.base.interrupts import termination_raises
    from contextlm.base.progress import RichProgress, SilentProgress
    from contextlm.lab.healing import NAME, HealSettings
    from contextlm.lab.healing import heal as healed
    from contextlm.recipe.settings import HealingSettings
    from contextlm.report.tables import healing_table
    from contextlm.results.result import read_run, seed_folder

    settings = HealSettings(
        policy=policy,
        text=text,
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        healing=HealingSettings(loss=loss, kl=kl, train=train, rank=rank),
        precision=precision,
        seed=seed,
    )
    with SilentProgress() if as_json else RichProgress() as progress, termination_raises():
        folder = healed(model, settings, place, device, progress)
    checkpoint = seed_folder(folder, NAME, seed) / "checkpoint"
    found = read_run(folder)
    report = {name: folder / name for name in REPORT_FILES}
    if as_json:
        result = json.loads(found.outcomes[0].result.model_dump_json())
        print_json({"run": folder, "checkpoint": checkpoint, "report": report, "result": result})
        return
    healing = found.outcomes[0].result.healing
    assert healing is not None  # a contender with a policy was measured
    table = healing_table(healing)
    print_table(table.headings, table.rows, caption=table.caption)
    for name, path in {"checkpoint": checkpoint, **report}.items():
        print(f"{name}: {visible(str(path))}")
