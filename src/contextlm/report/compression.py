"""The page of `contextlm compress`: what a smaller cache of one model costs, and one chart."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from markupsafe import Markup

from contextlm.base.files import write_text
from contextlm.base.visible import visible
from contextlm.report import numbers
from contextlm.report.charts import Figure, figure, pareto
from contextlm.report.page import FIGURES, markdown_page, static_page
from contextlm.report.sheet import Column, Table, make_table
from contextlm.results.compression import Compression, PolicyFigures

_LEAST = 1e-6  # nats: what is below is drawn there
_NEAR = 1.1  # shares within a tenth of a budget count as within it


def write_compression(found: Compression, folder: Path) -> dict[str, Path]:
    """Write ``report.md``, ``report.html`` and the chart's files; their paths by name."""
    drawn = figure("frontier", frontier(found))
    facts: dict[str, Any] = {
        "found": found,
        "title": f"{found.model}: what a smaller cache costs",
        "answers": answers(found),
        "tables": tables(found),
        "caption": drawn[0].caption if drawn else "",
        "picture": _data_uri(drawn[0]) if drawn else "",
        "image": f"{FIGURES}/frontier.png" if drawn else "",
    }
    paths = {name: folder / name for name in ("report.md", "report.html")}
    write_text(
        paths["report.md"],
        markdown_page(
            # In a block of code nothing is escaped.
            "compression.md.j2",
            {**facts, "command": Markup(visible(found.command))},
        ),
    )
    write_text(
        paths["report.html"],
        static_page("compression.html.j2", {**facts, "command": found.command}),
    )
    for one in drawn:
        one.save(folder / FIGURES)
    return {**paths, FIGURES: folder / FIGURES}


def answers(found: Compression) -> list[str]:
    """For each budget a sentence: what costs least within it, and what finds most."""
    full, *others = found.policies
    said = []
    for budget in sorted(found.budgets, reverse=True):
        within = [one for one in others if one.share <= _NEAR * budget]
        if not within:
            said.append(
                f"At {_share(budget)} of the cache there is nothing: no policy is as small."
            )
            continue
        best = min(within, key=lambda one: one.kl)
        keeper = max(within, key=lambda one: (digits_found(one), -one.kl))
        sentence = (
            f"At {_share(budget)} of the cache, {best.spec} costs "
            f"{numbers.signed_percent(change(best, full))} of perplexity "
            f"(KL {numbers.significant(best.kl)} nats, {numbers.percent(best.same_tokens)} of the "
            f"likeliest tokens the same, {numbers.percent(digits_found(best))} of passkey digits "
            f"found where the full cache finds {numbers.percent(digits_found(full))})"
        )
        if keeper is not best and digits_found(keeper) > digits_found(best):
            sentence += f"; {keeper.spec} finds most: {numbers.percent(digits_found(keeper))}"
        said.append(f"{sentence}.")
    return said


def tables(found: Compression) -> list[Table]:
    """Cost and size, speed and retrieval, and perplexity by position."""
    full = found.policies[0]
    policy = Column[PolicyFigures]("policy", lambda one: one.spec, "text")
    lengths = [held.tokens for held in full.cache]
    sizes = [_bytes_at(tokens) for tokens in lengths]
    depths = [_passkey_at(depth) for depth in full.passkey]
    buckets = [_ppl_at(number, full) for number in range(len(full.positions))]
    tokens = numbers.count(found.tokens)
    return [
        make_table(
            f"Cost and size on {tokens} tokens of {found.corpus}",
            [
                policy,
                *sizes,
                Column("of the full cache", lambda one: numbers.percent(one.share)),
                Column("KL, nats", lambda one: numbers.significant(one.kl)),
                Column("same likeliest token", lambda one: numbers.percent(one.same_tokens)),
                Column("PPL", lambda one: numbers.perplexity(math.exp(one.loss))),
                Column("PPL vs full", lambda one: numbers.signed_percent(change(one, full))),
            ],
            found.policies,
        ),
        make_table(
            f"Passkey digits found by depth in {tokens} tokens, and tokens a second",
            [
                policy,
                *depths,
                Column("prefill", lambda one: numbers.rate(one.prefill_tokens_per_second)),
                Column("decode", lambda one: numbers.rate(one.decode_tokens_per_second)),
            ],
            found.policies,
        ),
        make_table("Perplexity by position", [policy, *buckets], found.policies),
    ]


def frontier(found: Compression) -> tuple[str, alt.LayerChart] | None:
    """KL against bytes at the text's end, and the policies that no other beats in both."""
    points = pd.DataFrame(
        {
            "x": _logical(one, found.tokens),
            "y": max(one.kl, _LEAST),
            "cost": one.kl,
            "spec": one.spec,
            "method": one.name,
            "shown": f"{numbers.human_bytes(_logical(one, found.tokens))}, KL "
            f"{numbers.significant(one.kl)}",
        }
        for one in found.policies[1:]
    )
    if points.empty:
        return None
    x = alt.X("x:Q").title(f"cache at {numbers.count(found.tokens)} tokens, MB")
    points["x"] /= 2**20
    x = x.scale(type="log", nice=False, padding=20)
    y = alt.Y("y:Q").title("KL from the full cache, nats a token").scale(type="log")
    step = alt.Chart(alt.Data(values=pareto(points)[["x", "y"]].to_dict("records")))
    step = step.mark_line(interpolate="step-after", color="#999999").encode(x, y)
    base = alt.Chart(alt.Data(values=points.to_dict("records"))).encode(x, y)
    tips = [alt.Tooltip("spec:N"), alt.Tooltip("shown:N")]
    dots = base.mark_point(filled=True, size=90).encode(color="method:N", tooltip=tips)
    names = base.mark_text(align="left", dx=7, fontSize=9).encode(text="spec:N")
    caption = "No policy beats one on the line in both. Less is better in both."
    return caption, alt.LayerChart(layer=[step, dots, names]).properties(width=640, height=360)


def change(one: PolicyFigures, full: PolicyFigures) -> float:
    """Perplexity's change in percent."""
    return 100 * math.expm1(min(one.loss - full.loss, 200.0))


def digits_found(one: PolicyFigures) -> float:
    """Share of passkey digits, over all depths."""
    return sum(one.passkey.values()) / len(one.passkey)


def _share(budget: float) -> str:
    return "a quarter" if budget == 0.25 else f"{100 * budget:g}%"


def _logical(one: PolicyFigures, tokens: int) -> int:
    """Bytes held after so many tokens."""
    return next(held.logical for held in one.cache if held.tokens == tokens)


def _bytes_at(tokens: int) -> Column[PolicyFigures]:
    def cell(one: PolicyFigures) -> str:
        return numbers.human_bytes(_logical(one, tokens))

    return Column(f"cache at {numbers.count(tokens)}", cell)


def _passkey_at(depth: str) -> Column[PolicyFigures]:
    return Column(f"at {100 * float(depth):g}%", lambda one: numbers.percent(one.passkey[depth]))


def _ppl_at(number: int, full: PolicyFigures) -> Column[PolicyFigures]:
    bucket = full.positions[number]
    heading = f"{numbers.count(bucket.first)} to {numbers.count(bucket.last - 1)}"
    return Column(heading, lambda one: numbers.perplexity(math.exp(one.positions[number].loss)))


def _data_uri(drawn: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.svg.encode()).decode()
