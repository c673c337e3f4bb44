"""Makes the tables, figures and plots in this folder again, all from two files.

    python results/make.py                         make them again
    python results/make.py add QUESTION RUN...     take in the rows of finished run folders first

`runs.csv` has a row for each contender, seed and budget (`contextlm.report.frame`), and in
`question` the words that tables ask for; a run that serves two questions is one row with two.
`benchmarks.csv` has the ratios that ``contextlm bench`` printed. In a page, what stands between
``<!-- make KIND ARGUMENTS -->`` and ``<!-- made -->`` is made by the function `KIND` below.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from contextlm.report.frame import csv_frame, seed_frame
from contextlm.report.numbers import human_bytes, perplexity
from contextlm.report.statistics import corrected, difference
from contextlm.results.result import read_run

ABSENT = "–"  # noqa: RUF001
NOT_FIGURES = ["run", "question", "scale"]
MARKS = re.compile(r"<!-- make (\w+) ?(.*?) -->\n?(.*?)(\n?)<!-- made -->", re.DOTALL)
# Of a document's figures: label, how the measured one is had, and how both are written.
REPORTED: dict[str, tuple[str, Callable[[pd.DataFrame], pd.Series], str]] = {
    "val_ppl": ("validation PPL", lambda f: f.validation_ppl, ",.1f"),
    "accuracy": ("accuracy", lambda f: f.accuracy, ".1%"),
    "best_epoch": ("best epoch", lambda f: f.best_epoch, ",.1f"),
    "train_val_gap": ("val / train PPL", lambda f: f.validation_ppl / f.train_ppl_running, ",.2f"),
    "phase1_iterations": ("phase-1 iterations", lambda f: f.phase1_iterations, ",.1f"),
    "phase1_converged": ("phase-1 convergence", lambda f: f.phase1_converged, ".1%"),
    "effective_rank_train": ("rank, training", lambda f: f.rank_train / f.context_dim, ".1%"),
    "effective_rank_val": ("rank, validation", lambda f: f.rank_validation / f.context_dim, ".1%"),
    "parameters": ("parameters", lambda f: f.parameters, ",.0f"),
}


class Results:
    """The rows of both files, and what tables say of them."""

    def __init__(self, folder: Path):
        self.runs = pd.read_csv(folder / "runs.csv")
        self.rows, self.baseline = cache(self._rows), cache(self._baseline)
        self.cache_column = cache(self._cache_column)
        self.benchmarks = pd.read_csv(folder / "benchmarks.csv", dtype=str).fillna("")

    def _rows(self, question: str, contender: str | None = None) -> pd.DataFrame:
        """The rows that answer a question, of one contender or all."""
        found = self.runs[[question in words.split() for words in self.runs.question]]
        found = found if contender is None else found[found.contender == contender]
        if found.empty:
            raise SystemExit(f"runs.csv has no rows for {question!r} {contender or ''}")
        return found

    def _baseline(self, question: str, contender: str) -> pd.DataFrame:
        """The rows of the contender that `contender` is compared with; it may be its own."""
        offset = self.rows(question, contender).target_offset.iloc[0]
        alike = self.rows(question)[lambda rows: rows.target_offset == offset]
        # A pair with another target has no marked baseline: it is the first of the pair.
        named = alike[alike.baseline] if alike.baseline.any() else alike
        return named[named.contender == named.contender.iloc[0]]

    def _cache_column(self, question: str) -> tuple[str, int]:
        """Column and length of the longest cache up to 2,048 tokens that all have."""
        known = self.rows(question).filter(regex="^cache_bytes_").dropna(axis="columns").columns
        lengths = [int(name.rpartition("_")[2]) for name in known]
        longest = max(length for length in lengths if length <= 2048)
        return f"cache_bytes_{longest}", longest

    def value(self, figure: str, question: str, contender: str) -> str:
        """One figure: ppl, change, interval, cache, saved, answers."""
        own, base = self.rows(question, contender), self.baseline(question, contender)
        column = self.cache_column(question)[0]
        ppl, base_ppl = (rows.set_index("seed").validation_ppl for rows in (own, base))
        if figure == "ppl":
            deviation = f" ± {perplexity_like(ppl.mean(), ppl.std())}" if len(ppl) > 1 else ""
            return perplexity(ppl.mean()) + deviation
        if figure == "cache":
            return human_bytes(own[column].mean())
        if figure == "answers":
            return f"{own.accuracy.mean():.1%}"
        if own.contender.iloc[0] == base.contender.iloc[0]:
            return ABSENT
        if figure == "change":
            return signed(ppl.mean() / base_ppl.mean() - 1)
        if figure == "saved":
            return signed(own[column].mean() / base[column].mean() - 1)
        told = difference(ppl, base_ppl)
        if told.low is None or told.high is None:
            return ABSENT
        low, high = told.low / base_ppl.mean(), told.high / base_ppl.mean()
        return f"{signed(low)} to {signed(high)}"

    def tested(self, question: str) -> dict[str, str]:
        """The p of each contender's difference from its baseline, corrected for their number."""
        told = {}
        for contender, own in self.rows(question).groupby("contender", sort=False):
            base = self.baseline(question, str(contender))
            if base.contender.iloc[0] != contender:
                ppl = (rows.set_index("seed").validation_ppl for rows in (own, base))
                told[str(contender)] = difference(*ppl)
        holm = (one.holm for one in corrected(list(told.values())))
        return {
            name: ABSENT if p is None else f"{p:.2g}" for name, p in zip(told, holm, strict=True)
        }

    def comparison(self, question: str) -> str:
        """All contenders of a question against their baseline."""
        rows, (_, length) = self.rows(question), self.cache_column(question)
        table, p = [], self.tested(question)
        for contender, own in rows.groupby("contender", sort=False):
            is_base = self.baseline(question, str(contender)).contender.iloc[0] == contender
            mark = " (baseline)" if is_base else ""
            entry = {"contender": f"{contender}{mark}"}
            if rows.filter(regex="^answers_").notna().any(axis=None):
                entry["right answers"] = self.value("answers", question, contender)
            entry["PPL"] = self.value("ppl", question, contender)
            entry["vs baseline"] = self.value("change", question, contender)
            entry["95% interval"] = self.value("interval", question, contender)
            entry["p"] = p.get(str(contender), ABSENT)
            entry[f"cache at {length:,} tokens"] = self.value("cache", question, contender)
            entry["cache vs baseline"] = self.value("saved", question, contender)
            entry["parameters"] = f"{own.parameters.iloc[0]:,}"
            if rows.learning_rate.notna().all():
                entry["rate"] = f"{own.learning_rate.iloc[0]:g}"
            entry["seeds"] = str(len(own))
            table.append(entry)
        frame = pd.DataFrame(table)
        if (frame["95% interval"] == ABSENT).all():
            frame = frame.drop(columns=["95% interval", "p"])
        return markdown(frame)

    def answers(self, question: str) -> str:
        """Right answers by level."""
        rows = self.rows(question)
        levels = rows.filter(regex="^answers_").dropna(axis="columns", how="all")
        shares = levels.assign(all=rows.accuracy).groupby(rows.contender, sort=False).mean()
        shares.columns = [name.removeprefix("answers_").replace("_", " ") for name in shares]
        return markdown(shares.map("{:.1%}".format).reset_index())

    def reported(self, question: str) -> str:
        """A document's figures beside the measured ones."""
        table = []
        for contender, own in self.rows(question).groupby("contender", sort=False):
            for key, (label, measured, form) in REPORTED.items():
                given = own.get(f"reported_{key}", pd.Series(dtype=float)).dropna()
                if given.empty:
                    continue
                values = measured(own)
                spread = f" ± {values.std():{form}}" if values.nunique() > 1 else ""
                ours = f"{values.mean():{form}}".removesuffix(".0") + spread
                theirs = f"{given.iloc[0]:{'.1%' if '%' in form else ',.10g'}}"
                table.append([contender, label, theirs, ours])
        names = ["contender", "figure", "document", "this run"]
        return markdown(pd.DataFrame(table, columns=names))

    def budgets(self, *questions: str) -> str:
        """Perplexity of attention and the hybrid, a row a question."""
        table = []
        for question in questions:
            rows = self.rows(question)
            entry = {"training tokens": f"{rows.train_tokens.iloc[0]:,}"}
            for name in ("mha", "hybrid"):
                own = self.rows(question, name)
                entry[f"{name}, rate"] = f"{own.learning_rate.iloc[0]:g}"
                entry[name] = self.value("ppl", question, name)
            entry["difference"] = self.value("change", question, "hybrid")
            entry["95% interval"] = self.value("interval", question, "hybrid")
            table.append(entry | {"seeds": str(len(own))})
        return markdown(pd.DataFrame(table))

    def ratios(self, question: str) -> str:
        """What one benchmark printed; a target that was missed says so."""
        rows = self.benchmarks[self.benchmarks.question == question].copy()
        rows["cell"] = [with_target(*pair) for pair in zip(rows.measured, rows.target, strict=True)]
        table = rows.pivot(index=["model", "baseline"], columns="figure", values="cell")
        order = rows.drop_duplicates(["model", "baseline"])[["model", "baseline"]]
        table = table.loc[list(order.itertuples(index=False, name=None)), rows.figure.unique()]
        return markdown(table.fillna(ABSENT).reset_index())


def signed(share: float) -> str:
    """A share as a percentage with its sign; zero has none."""
    text = f"{share:+.1%}"
    return text[1:] if float(text[:-1]) == 0 else text


def perplexity_like(mean: float, deviation: float) -> str:
    """A deviation with its mean's decimals, and one more where it would read zero."""
    places = len(perplexity(mean).partition(".")[2])
    return f"{deviation:,.{places + (round(deviation, places) == 0)}f}"


def with_target(measured: str, target: str) -> str:
    """A ratio beside its target."""
    shown = f"{float(measured):,.0f}" if float(measured) >= 1000 else measured
    if not target:
        return shown
    sign, limit = target.split()
    met = float(measured) >= float(limit) if sign == ">=" else float(measured) <= float(limit)
    return f"{shown} ({target})" if met else f"**{shown}** (missed {target})"


def markdown(frame: pd.DataFrame) -> str:
    """A table whose first column is text and all others stand at the right."""
    lines = [list(frame.columns), [":---", *["---:"] * (len(frame.columns) - 1)]]
    lines += frame.astype(str).to_numpy().tolist()
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plots(results: Results, folder: Path) -> None:
    """Perplexity against bytes and against tokens, and right answers by difficulty."""
    folder.mkdir(exist_ok=True)

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="bytes of cache at 2,048 tokens", ylabel="validation PPL"
    )
    # Where names stand, so that none covers another.
    beside = {
        "mha-conv-norm": (4, 12),
        "latent": (-28, 6),
        "dca": (20, -4),
        "multi-query": (0, 10),
        "context-pythia": (-16, -20),
    }
    for name, rows in results.rows("frontier").groupby("contender", sort=False):
        where = rows.cache_bytes_2048.iloc[0], rows.validation_ppl.mean()
        axes.errorbar(*where, rows.validation_ppl.std(), fmt="o", capsize=3)
        offset = beside.get(str(name), (0, -20))
        axes.annotate(str(name), where, offset, textcoords="offset points", ha="center")
    axes.margins(x=0.13, y=0.1)
    figure.savefig(folder / "frontier.svg", metadata={"Date": None})

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="million training tokens", ylabel="validation PPL"
    )
    tuned, same = ("half", "frontier", "double"), ("one-rate", "double-one-rate")
    for questions, label, style in ((tuned, "tuned", "o-"), (same, "0.004 for both", "s--")):
        for name, color in (("mha", "tab:blue"), ("hybrid", "tab:orange")):
            rows = pd.concat([results.rows(question, name) for question in questions])
            ppl = rows.groupby("train_tokens").validation_ppl.mean()
            axes.plot(ppl.index / 1e6, ppl, style, color=color, label=f"{name}, {label}")
    axes.set_xticks([0.75, 1.5, 3], ["0.75", "1.5", "3"])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(folder / "budgets.svg", metadata={"Date": None})

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    names = results.rows("recall").contender.unique()
    for axes, question in zip(
        figure.subplots(1, 2, sharey=True), ("recall", "needles"), strict=True
    ):
        for number, name in enumerate(names):
            if name not in set(results.rows(question).contender):
                continue
            shares = 100 * results.rows(question, name).filter(regex="^answers_").dropna(axis=1)
            levels = [label.split("_")[1] for label in shares]
            axes.plot(levels, shares.iloc[0], "o^sDx"[number] + "-", color=f"C{number}", label=name)
        axes.set(title=question, xlabel=shares.columns[0].split("_")[2])
    figure.axes[0].set_ylabel("right answers, %")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(folder / "retrieval.svg", metadata={"Date": None})


def make(folder: Path) -> None:
    """Make every page and plot of a folder again.

    Raises:
        SystemExit: a mark asks for what the files do not hold.
    """
    results = Results(folder)

    def made(mark: re.Match[str]) -> str:
        kind, words, _, newline = mark.groups()
        text = getattr(results, kind)(*words.split())
        newline = "\n" if text.startswith("|") else ""
        return f"<!-- make {kind} {words} -->{newline}{text}{newline}<!-- made -->"

    for page in sorted(folder.glob("*.md")):
        page.write_text(MARKS.sub(made, page.read_text("utf-8")), "utf-8")
    mpl.rcParams.update({"svg.hashsalt": "contextlm", "svg.fonttype": "none"})
    plots(results, folder / "plots")


def taken_in(old: pd.DataFrame, new: pd.DataFrame, question: str) -> pd.DataFrame:
    """The rows of both; one that is there already gets `question` as one more word."""
    new = new.assign(question=question, budget=new.train_tokens * new.epoch_limit)
    both = pd.concat([old, new], ignore_index=True)
    figures = [name for name in both if name not in NOT_FIGURES]
    words = both.groupby(figures, dropna=False, sort=False).question.transform(
        lambda asked: " ".join(dict.fromkeys(" ".join(asked).split()))
    )
    return both.assign(question=words).drop_duplicates(figures)


def add(folder: Path, question: str, runs: list[Path]) -> None:
    """Take the seeds of finished run folders into `runs.csv`, as rows that answer `question`."""
    file = folder / "runs.csv"
    old = pd.read_csv(file, dtype_backend="numpy_nullable")
    frame = taken_in(old, csv_frame(seed_frame([read_run(run) for run in runs])), question)
    frame.to_csv(file, index=False, lineterminator="\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    if sys.argv[1:2] == ["add"]:
        add(here, sys.argv[2], [Path(name) for name in sys.argv[3:]])
    make(here)
