"""What a question found, drawn: latency and memory against length, or bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from contextlm.benchmarks.harness import Outcome

_COLOURS = 10  # of matplotlib's cycle


def draw(question: str, outcome: Outcome, path: Path) -> None:
    """Write a PNG.

    Args:
        question: for the title.
        outcome: with curves over the number of tokens, or else only ratios.
        path: of the file, replaced if it exists.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(f"contextlm bench {question}")
    if outcome.curves:
        latency, memory = figure.subplots(1, 2)
        for number, curve in enumerate(outcome.curves):
            style = "-" if number < _COLOURS else "--"
            marks: dict[str, Any] = {"marker": "o", "label": curve.label, "linestyle": style}
            latency.plot(curve.tokens, [1e3 * s for s in curve.seconds], **marks)
            memory.plot(curve.tokens, [b / 1e6 for b in curve.cache_bytes], **marks)
        for axes, what in ((latency, "ms a token"), (memory, "cache, MB")):
            axes.set(xscale="log", yscale="log", xlabel="tokens before", ylabel=what)
            axes.grid(alpha=0.3)
        memory.legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
    else:
        axes = figure.subplots()
        axes.barh(list(outcome.ratios), list(outcome.ratios.values()))
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlabel("ratio")
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
