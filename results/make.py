"""Makes the tables, figures and plots here, and the README's figures, again from data files.

    python results/make.py                         make them again
    python results/make.py add QUESTION RUN...     take in the rows of finished run folders first

`runs.csv` has a row for each contender, seed and budget (`contextlm.report.frame`), and in
`question` the words that tables ask for; a run that serves two questions is one row with two.
A run with budgets serves one for each, such as `curves-0.5`.
`epochs.csv` has a row for each of their epochs, and for those that a document tells, which have no
seed. `benchmarks.csv` has the ratios that ``contextlm bench`` printed, ``compress-*.json`` what
``contextlm compress`` found (its `result.json`). In a page, what stands
between ``<!-- make KIND ARGUMENTS -->`` and ``<!-- made -->`` is made by the function `KIND` below.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from contextlm.report import charts, compression, numbers, tables
from contextlm.report.contenders import CACHE, Contender, cache_length
from contextlm.report.frame import csv_frame, seed_frame
from contextlm.report.language import ENGLISH, speaking
from contextlm.report.sheet import Column, make_table, markdown_table
from contextlm.report.statistics import corrected, difference
from contextlm.results.compression import Compression
from contextlm.results.result import PhaseTwoRow, Run, read_run

NOT_FIGURES = ["run", "question", "scale"]
MARKS = re.compile(r"<!-- make (\w+) ?(.*?) -->\n?(.*?)\n?<!-- made -->", re.DOTALL)
# Of a document's figures: label, the column of the measured one, and how both are written.
REPORTED = {
    "val_ppl": ("validation PPL", "validation_ppl", numbers.perplexity),
    "accuracy": ("accuracy", "accuracy", numbers.percent),
    "val_loss": ("validation loss", "validation_loss", lambda v: numbers.decimal(v, 4)),
    "train_ppl_best_weights": ("train PPL, best weights", "train_ppl", numbers.perplexity),
    "cache_kb_at_128": ("cache at 128 tokens, KB", "cache_kb", lambda v: numbers.decimal(v, 1)),
    "best_epoch": ("best epoch", "best_epoch", tables.whole),
    "train_val_gap": ("validation / train PPL", "gap", lambda v: numbers.decimal(v, 2)),
    "phase1_iterations": ("phase-1 iterations", "phase1_iterations", tables.whole),
    "phase1_converged": ("phase-1 convergence", "phase1_converged", numbers.percent),
    "effective_rank_train": ("rank, training", "rank_share_train", numbers.percent),
    "effective_rank_val": ("rank, validation", "rank_share_validation", numbers.percent),
    "parameters": ("parameters", "parameters", numbers.count),
}


class Results:
    """The rows of these files, and what pages say of them."""

    def __init__(self, folder: Path):
        self.runs = (
            pd.read_csv(folder / "runs.csv")
            .copy()
            .assign(
                gap=lambda rows: rows.validation_ppl / rows.train_ppl_running,
                cache_kb=lambda rows: rows.cache_bytes_128 / 1024,
                rank_share_train=lambda rows: rows.rank_train / rows.context_dim,
                rank_share_validation=lambda rows: rows.rank_validation / rows.context_dim,
            )
        )
        self.epochs = pd.read_csv(folder / "epochs.csv")
        self.benchmarks = pd.read_csv(folder / "benchmarks.csv", dtype=str).fillna("")
        self.compressions = {
            file.stem: Compression.model_validate_json(file.read_text("utf-8"))
            for file in sorted(folder.glob("compress-*.json"))
        }
        self.courses: dict[str, tuple[str, ...]] = {}
        self.rows = cache(self._rows)

    def _rows(self, question: str, baseline: str = "") -> list[Contender]:
        """The contenders that answer a question, each beside its baseline, or a given one."""
        seeds = self.runs[[question in words.split() for words in self.runs.question]]
        if seeds.empty:
            raise LookupError(question)
        plain = [Contender(str(n), rows, ()) for n, rows in seeds.groupby("contender", sort=False)]
        rows: list[Contender] = []
        for row in plain:
            alike = [
                one for one in plain if one.value("target_offset") == row.value("target_offset")
            ]
            named = [
                one
                for one in alike
                if (one.name == baseline if baseline else one.value("baseline"))
            ]
            if baseline and not named:
                raise LookupError(f"{question}: no {baseline}")
            base = (named or alike)[0]  # a pair with another target has no marked baseline
            column = "accuracy" if row.task else "validation_loss"
            pair = (one.seeds.set_index("seed")[column] for one in (row, base))
            if row is not base:
                seeds = row.seeds.assign(baseline=False)  # whatever it was in its own run
                row = replace(row, seeds=seeds, reference=base, difference=difference(*pair))
            rows.append(row)
        told = iter(corrected([row.difference for row in rows if row.difference]))
        return [replace(row, difference=next(told)) if row.difference else row for row in rows]

    def row(self, question: str, contender: str) -> Contender:
        """One contender of a question."""
        return {row.name: row for row in self.rows(question)}[contender]

    def value(self, figure: str, question: str, contender: str) -> str:
        """One figure: ppl, change, interval, answers, or the share of the baseline's cache."""
        row = self.row(question, contender)
        if figure == "cache":
            change = row.change(f"{CACHE}{row.value('sequence_length')}")
            return numbers.ABSENT if change is None else numbers.percent(1 + change / 100)
        if figure == "answers":
            return numbers.with_deviation(row.stat("accuracy"), numbers.percent)
        show = {
            "ppl": tables.ppl_text,
            "change": tables.difference_text,
            "interval": tables.interval_text,
        }
        return show[figure](row)

    def comparison(self, question: str, unigram: str = "") -> str:
        """All contenders of a question against their baseline; if wanted also the unigram's PPL."""
        rows = self.rows(question)
        length = cache_length(rows)
        if length is None:
            raise SystemExit(f"results/runs.csv has no cache of {question} at its windows' length")
        size = f"{CACHE}{length}"
        columns = [
            tables.CONTENDER,
            *([tables.mean("right answers", "accuracy", numbers.percent)] if rows[0].task else []),
            Column("validation PPL", tables.ppl_text),
            *([Column("of the unigram's", _share_of_unigram)] if unigram else []),
            Column("vs baseline", tables.difference_text),
            Column("95% interval", tables.interval_text),
            Column("verdict", tables.verdict_text, "text"),
            tables.shared(f"cache at {numbers.count(length)} tokens", size, numbers.human_bytes),
            tables.change("cache vs baseline", size),
            tables.shared("parameters", "parameters", numbers.count),
            tables.shared("rate", "learning_rate", "{:g}".format),
            Column[Contender]("seeds", lambda row: str(len(row.seeds))),
        ]
        return markdown_table(make_table("", columns, rows))

    def answers(self, question: str) -> str:
        """Right answers by level."""
        table = tables.retrieval_table(self.rows(question))
        return "" if table is None else markdown_table(table)

    def reported(self, question: str) -> str:
        """A document's figures beside the measured ones."""
        cells = [
            (row, key) for row in self.rows(question) for key in REPORTED
            if row.value(f"reported_{key}") is not None
        ]  # fmt: skip
        columns: list[Column[tuple[Contender, str]]] = [
            Column("contender", lambda pair: pair[0].name, "text"),
            Column("figure", lambda pair: REPORTED[pair[1]][0], "text"),
            Column("document", lambda pair: _given(pair[0].value(f"reported_{pair[1]}"), pair[1])),
            Column("this run", lambda pair: _found(pair[0], *REPORTED[pair[1]][1:])),
        ]
        return markdown_table(make_table("", columns, cells))

    def course(self, question: str, *contenders: str) -> str:
        """The chart of a question's epochs, of all contenders or some."""
        self.rows(question)
        self.courses[question] = contenders
        return f"![Validation perplexity by epoch](plots/course-{question}.svg)"

    def budgets(self, *questions: str) -> str:
        """Perplexity of attention and the hybrid, a row a question."""
        pairs = [
            (self.row(question, "mha"), self.row(question, "hybrid")) for question in questions
        ]
        columns: list[Column[tuple[Contender, Contender]]] = [
            Column("training tokens", lambda pair: numbers.count(pair[0].value("train_tokens"))),
            Column("mha, at rate", lambda pair: f"{pair[0].value('learning_rate'):g}"),
            Column("mha", lambda pair: tables.ppl_text(pair[0])),
            Column("hybrid, at rate", lambda pair: f"{pair[1].value('learning_rate'):g}"),
            Column("hybrid", lambda pair: tables.ppl_text(pair[1])),
            Column("difference", lambda pair: tables.difference_text(pair[1])),
            Column("95% interval", lambda pair: tables.interval_text(pair[1])),
            Column("seeds", lambda pair: str(len(pair[1].seeds))),
        ]
        return markdown_table(make_table("", columns, pairs))

    def curves(self, question: str, baseline: str = "") -> str:
        """Perplexity by budget and its difference from the baseline, or from a given contender."""
        budgets = {rows[0].budget: rows for rows in self.by_budget(question, baseline)}
        every = (row for rows in budgets.values() for row in rows)
        against = next(row.name for row in every if row.reference is None)
        by_name = {tokens: {row.name: row for row in rows} for tokens, rows in budgets.items()}
        columns = [Column[str]("contender", str, "text")]
        for tokens, known in by_name.items():
            columns += [
                Column(
                    f"{tokens / 1e6:.3g} M tokens",
                    lambda name, known=known: (
                        tables.ppl_text(known[name]) if name in known else numbers.ABSENT
                    ),
                ),
                Column(f"vs {against}", lambda name, known=known: _compared(known.get(name))),
            ]
        names = dict.fromkeys(name for known in by_name.values() for name in known)
        columns.append(
            Column(
                "seeds",
                lambda name: ", ".join(
                    str(len(known[name].seeds)) for known in by_name.values() if name in known
                ),
            )
        )
        return markdown_table(make_table("", columns, names))

    def by_budget(self, question: str, baseline: str = "") -> list[list[Contender]]:
        """The rows of each budget of a question, smallest first."""
        words = {word for asked in self.runs.question for word in asked.split()}
        found = []
        for word in words:
            if re.fullmatch(rf"{question}-[\d.]+", word):
                with suppress(LookupError):  # the baseline was not run at this budget
                    found.append(self.rows(word, baseline))
        if not found:
            raise LookupError(question)
        return sorted(found, key=lambda rows: rows[0].budget)

    def ratios(self, question: str) -> str:
        """What one benchmark printed, beside its targets; one that was missed says so."""
        lines = self.benchmarks[self.benchmarks.question == question]
        cells = {(line.model, line.baseline, line.figure): line for line in lines.itertuples()}
        columns: list[Column[tuple[str, str]]] = [
            Column("model", lambda pair: pair[0], "text"),
            Column("baseline", lambda pair: pair[1] or numbers.ABSENT, "text"),
            *(
                Column(figure, lambda pair, figure=figure: _ratio(cells.get((*pair, figure))))
                for figure in lines.figure.unique()
            ),
        ]
        pairs = dict.fromkeys((model, baseline) for model, baseline, _ in cells)
        return markdown_table(make_table("", columns, pairs))

    def compression(self, name: str) -> str:
        """Of one compressed model what costs least at each budget, and every table."""
        found = self._compression(name)
        said = "".join(f"- {answer}\n" for answer in compression.answers(found))
        parts = [f"### {t.caption}\n\n{markdown_table(t)}" for t in compression.tables(found)]
        return "\n".join([said, *parts])

    def compressed(self, what: str, name: str, spec: str) -> str:
        """One figure of a policy: share, change (of perplexity), kl, same or passkey."""
        full, *others = self._compression(name).policies
        one = next(policy for policy in others if policy.spec == spec)
        return {
            "share": lambda: numbers.percent(one.share),
            "change": lambda: numbers.signed_percent(compression.change(one, full)),
            "kl": lambda: numbers.significant(one.kl),
            "same": lambda: numbers.percent(one.same_tokens),
            "passkey": lambda: numbers.percent(compression.digits_found(one)),
        }[what]()

    def _compression(self, name: str) -> Compression:
        if name not in self.compressions:
            raise LookupError(name)
        return self.compressions[name]


def _share_of_unigram(row: Contender) -> str:
    """Perplexity as a share of what the words' frequencies alone reach, on the same text."""
    ppl, unigram = row.stat("validation_ppl"), row.value("unigram_ppl")
    return numbers.ABSENT if ppl is None or unigram is None else numbers.percent(ppl.mean / unigram)


def _compared(row: Contender | None) -> str:
    """The difference, and its interval where there is one; ``(Holm)`` where that decides."""
    if row is None or row.difference is None:
        return numbers.ABSENT
    interval, verdict = tables.interval_text(row), tables.verdict_text(row)
    undecided = " (Holm)" if "Holm" in verdict else ""
    told = "" if interval == numbers.ABSENT else f": {interval}{undecided}"
    return f"{tables.difference_text(row)}{told}"


def _given(value: float, key: str) -> str:
    return numbers.percent(value) if REPORTED[key][2] is numbers.percent else numbers.plain(value)


def _found(row: Contender, column: str, show: tables.Show) -> str:
    text = numbers.with_deviation(row.stat(column), show)
    return text.removesuffix(" ± 0")


def _ratio(line: Any) -> str:
    if line is None:
        return numbers.ABSENT
    measured, target = float(line.measured), line.target
    shown = numbers.count(measured) if measured >= 1000 else f"{measured:.3g}"
    if not target:
        return shown
    sign, limit = target.split()
    met = measured >= float(limit) if sign == ">=" else measured <= float(limit)
    return (
        f"{shown} ({'' if met else 'missed: '}{'at least' if sign == '>=' else 'at most'} {limit})"
    )


def plots(results: Results, folder: Path) -> None:
    """Perplexity against bytes and tokens, right answers against bytes and by difficulty."""
    folder.mkdir(exist_ok=True)
    drawn = charts.figure("frontier", charts.frontier(results.rows("frontier")))
    for task, others in (("recall", ["recall-default"]), ("needles", [])):
        drawn += charts.figure(task, charts.retrieval(results.rows(task)))
        rows = [row for question in [*others, task] for row in results.rows(question)]
        once = {row.name: row for row in reversed(rows)}  # the first of a name stays
        drawn += charts.figure(f"{task}-bytes", charts.frontier(list(once.values())))
    tuned, same = ("half", "frontier", "double"), ("one-rate", "double-one-rate")
    points = [
        {
            **charts.point(row, f"{name}, {rates}", row.stat("validation_ppl")),
            "x": row.budget,
            "baseline": name == "mha",
        }
        for questions, rates in ((tuned, "tuned"), (same, "rate 0.004"))
        for name in ("hybrid", "mha")
        for row in (results.row(question, name) for question in questions)
    ]
    drawn += charts.figure("budgets", charts.budget_chart(charts.points_of(points)))
    curves: list[list[Contender]] = []
    with suppress(LookupError):  # not run yet
        curves = results.by_budget("curves")
    if curves:
        drawn += charts.figure("curves", charts.budgets([row for rows in curves for row in rows]))
        drawn += charts.figure("curves-bytes", charts.frontier(results.rows("curves-0.5")))
    for name, found in results.compressions.items():
        drawn += charts.figure(name, compression.frontier(found))
    for question, names in results.courses.items():
        epochs = results.epochs[results.epochs.question == question]
        shown = epochs[epochs.contender.isin(names)] if names else epochs
        drawn += charts.figure(f"course-{question}", course_chart(shown))
    for figure in drawn:
        (folder / f"{figure.name}.svg").write_text(figure.svg, "utf-8")


def course_chart(epochs: pd.DataFrame) -> Any:
    """Validation perplexity by epoch; over its lowest where the document's stands beside it.

    Levels of two corpora cannot be compared, shapes can.
    """
    points, shapes = [], bool(epochs.seed.isna().any())
    for (name, told), own in epochs.groupby(["contender", epochs.seed.isna()], sort=False):
        ppl = own.groupby("epoch").validation_ppl.mean().dropna()
        label = f"{name}, document" if told else str(name)
        points += [
            {"label": label, "x": epoch, "y": value, "shown": numbers.decimal(value, 3)}
            for epoch, value in (ppl / ppl.min() if shapes else ppl).items()
        ]
    return charts.course(charts.points_of(points), shapes=shapes)


def make(folder: Path) -> None:
    """Make every page and plot of a folder again."""
    results = Results(folder)

    def made(mark: re.Match[str]) -> str:
        kind, words = mark.groups()[:2]
        try:
            text = getattr(results, kind)(*words.split())
        except LookupError:
            text = "not run yet"
        around = "\n" if text.endswith("\n") else ""
        return f"<!-- make {kind} {words} -->{around}{text}<!-- made -->"

    for page in [*sorted(folder.glob("*.md")), *sorted(folder.parent.glob("README*.md"))]:
        with speaking("ja" if page.name.endswith(".ja.md") else ENGLISH):
            page.write_text(MARKS.sub(made, page.read_text("utf-8")), "utf-8")
    plots(results, folder / "plots")


def taken_in(old: pd.DataFrame, new: pd.DataFrame, question: str) -> pd.DataFrame:
    """The rows of both; one that is there already gets `question` as one more word."""
    asked: Any = question
    if "share" in new:
        asked = [question if pd.isna(s) else f"{question}-{s:g}" for s in new.share]
    new = new.assign(question=asked, budget=new.train_tokens * new.epoch_limit)
    both = pd.concat([old, new], ignore_index=True)
    figures = [name for name in both if name not in NOT_FIGURES]
    words = both.groupby(figures, dropna=False, sort=False).question.transform(
        lambda asked: " ".join(dict.fromkeys(" ".join(asked).split()))
    )
    return both.assign(question=words).drop_duplicates(figures)


def epoch_frame(question: str, runs: list[Run]) -> pd.DataFrame:
    """The epochs of every contender and seed, and of its document, which has no seed."""
    rows = []
    for outcome in (outcome for run in runs for outcome in run.outcomes):
        result = outcome.result
        if result.budget is not None:
            continue  # each has one epoch
        own = [each for each in outcome.history if isinstance(each, PhaseTwoRow)]
        told = result.reported_epochs
        told_ppl = zip(told.get("train_ppl", []), told.get("val_ppl", []), strict=True)
        rows += [
            (question, result.contender, result.seed, e.epoch, e.train_ppl, e.validation_ppl)
            for e in own
        ]
        rows += [
            (question, result.contender, None, number, *ppl)
            for number, ppl in enumerate(told_ppl, start=1)
        ]
    columns = ["question", "contender", "seed", "epoch", "train_ppl", "validation_ppl"]
    return pd.DataFrame(rows, columns=columns)


def add(folder: Path, question: str, runs: list[Path]) -> None:
    """Take the seeds of finished run folders into `runs.csv`, as rows that answer `question`."""
    file, found = folder / "runs.csv", [read_run(run) for run in runs]
    old = pd.read_csv(file, dtype_backend="numpy_nullable")
    frame = taken_in(old, csv_frame(seed_frame(found)), question)
    frame.to_csv(file, index=False, lineterminator="\n")
    file = folder / "epochs.csv"
    both = pd.concat([pd.read_csv(file), epoch_frame(question, found)], ignore_index=True)
    known = both.drop_duplicates(["question", "contender", "seed", "epoch"], keep="last")
    known.to_csv(file, index=False, lineterminator="\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    if sys.argv[1:2] == ["add"]:
        add(here, sys.argv[2], [Path(name) for name in sys.argv[3:]])
    make(here)
