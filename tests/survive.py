"""Kill a run with SIGKILL at random moments, resume it, and compare it with an undisturbed one.

`make survive` runs this file. Every stage of a run is hit: the tokenizer, the token store, learned
embeddings, a contender without and one with contexts (phase 1, context store, phase 2, evaluation),
and the report. The runs are told from outside where they are, by the files that they leave; they
themselves know of nothing.

Processes are forked from one that has imported everything, which saves seconds for each; the
undisturbed run is a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

STAGES = (
    "tokenizer",
    "token store",
    "embedding",
    "baseline",
    "phase 1",
    "context store",
    "phase 2",
    "evaluation",
    "report",
)
DONE = "done"
RUN = "context-kv-001"
SETTINGS = (
    *("context-kv", "--scale", "smoke", "--device", "cpu", "--json"),
    *("--set", "contenders.context-kv-grid=null"),
    *("--set", "tokens={train: 8000, validation: 700}"),
    *("--set", "documents={train: 40, validation: 6}"),
    *("--set", "training.epochs=3"),
    *("--set", "embedding={epochs: 2, tokens: 3000}"),
    *("--set", "contenders.context-kv.phase1={max_iterations: 60, stop_at: 1.0}"),
)
COMPARED = ("checkpoint/model.safetensors", "history.jsonl", "result.json")
PRELOADED = [
    "contextlm.lab.work",
    "contextlm.data.pydocs",
    "contextlm.cli",
    "accelerate",
    "transformers.models.gpt2.modeling_gpt2",
    "contextlm.report.page",
]
LONGEST = 300.0  # seconds that a run may take before it counts as stuck


@dataclass
class Trial:
    """One run that was killed: in which stages, after how many seconds, and what came of it."""

    stages: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


class Subject:
    """One run, in a folder of its own that also holds its cache; `settings` follow `SETTINGS`."""

    def __init__(
        self,
        root: Path,
        context: multiprocessing.context.BaseContext,
        settings: tuple[str, ...] = (),
    ):
        self.root = root
        self.settings = settings
        self.run = root / "runs" / RUN
        self.context = context
        root.mkdir()

    def start(self, *, fresh: bool = False) -> BaseProcess:
        """Begin or resume the run."""
        context = multiprocessing.get_context("spawn") if fresh else self.context
        process = context.Process(target=work, args=(str(self.root), self.settings))
        process.start()
        return process

    def stage(self) -> str:
        """What the run is doing, from the files that are there."""
        cache, run = self.root / "cache", self.run
        if not run.exists():
            return "token store" if any(cache.glob("tokenizers/*.json")) else "tokenizer"
        places = [run / name / "seed-0" for name in ("attention", "context-kv")]
        if not (run / "_working" / "run.json").exists():
            return DONE
        if all((place / "result.json").exists() for place in places):
            return "report"
        if not any(cache.glob("embeddings/*.safetensors")):
            return "embedding"
        working = run / "_working" / "context-kv" / "seed-0"
        for sign, stage in (
            (places[1] / "checkpoint", "evaluation"),
            (working / "phase2", "phase 2"),
            (run / "_contexts", "context store"),
            (working / "phase1", "phase 1"),
        ):
            if sign.exists():
                return stage
        return "baseline"

    def differences(self, other: Subject) -> list[str]:
        """Files that are not those of the other run, and leavings."""
        found = []
        for name, file in itertools.product(("attention", "context-kv"), COMPARED):
            mine, theirs = (s.run / name / "seed-0" / file for s in (self, other))
            if not mine.exists() or mine.read_bytes() != theirs.read_bytes():
                found.append(f"{name}/seed-0/{file}")
        names = {p.relative_to(self.run) for p in self.run.rglob("*")}
        return found + sorted(
            map(str, names ^ {p.relative_to(other.run) for p in other.run.rglob("*")})
        )


def work(root: str, settings: tuple[str, ...]) -> None:
    """In a process of its own: the command, its output into a file beside the run."""
    os.environ["CONTEXTLM_CACHE"] = str(Path(root, "cache"))
    os.environ.pop("CONTEXTLM_DATA", None)
    log = os.open(Path(root, "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from contextlm.cli import main

    main(["run", *SETTINGS, *settings, "--out", str(Path(root, "runs")), "--resume"])


def watch(subject: Subject, process: BaseProcess) -> Iterator[str]:
    """The stage again and again, until the process has ended."""
    deadline = time.monotonic() + LONGEST
    while process.is_alive():
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"{subject.root}: stuck in {subject.stage()}")
        yield subject.stage()
        time.sleep(0.002)
    process.join()


def undisturbed(subject: Subject, *, fresh: bool) -> dict[str, float]:
    """Run to the end; the seconds that each stage took."""
    process = subject.start(fresh=fresh)
    took = dict.fromkeys(STAGES, 0.0)
    before = time.monotonic()
    for stage in watch(subject, process):
        now = time.monotonic()
        took[stage] = took.get(stage, 0.0) + now - before
        before = now
    check_ended(subject, process)
    return took


def check_ended(subject: Subject, process: BaseProcess) -> None:
    """Stop everything if a run that nobody killed did not end well."""
    if process.exitcode != 0:
        log = (subject.root / "log.txt").read_text("utf-8")
        raise RuntimeError(f"{subject.root}: exit code {process.exitcode}\n{log}")


def kill_in(subject: Subject, wanted: str, delay: float, trial: Trial) -> bool:
    """Start or resume the run, kill it `delay` seconds into a stage; whether it died there."""
    process = subject.start()
    began, entered = time.monotonic(), None
    for stage in watch(subject, process):
        now = time.monotonic()
        if stage == wanted and entered is None:
            entered = now
        if entered is not None and now >= entered + delay:
            process.kill()
            process.join()
            break
    if process.exitcode == 0:
        return False
    trial.stages.append(subject.stage())
    trial.seconds.append(time.monotonic() - began)
    return trial.stages[-1] == wanted


def survive(
    folder: Path,
    wanted: list[tuple[str, ...]],
    seed: int,
    *,
    fresh: bool = True,
    settings: tuple[str, ...] = (),
) -> Iterator[Trial]:
    """Kill one run for each entry of `wanted`, in these stages one after the other.

    Args:
        folder: for all runs.
        wanted: stages in which to kill each run.
        seed: of the moments.
        fresh: whether the undisturbed run is a process that has imported nothing before.
        settings: more of the command line.

    Yields:
        What came of each run.
    """
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    reference = Subject(folder / "undisturbed", context, settings)
    took = undisturbed(reference, fresh=fresh)
    for number, stages in enumerate(wanted, start=1):
        share = chance.random()
        for attempt in itertools.count():
            subject = Subject(folder / f"killed-{number}-{attempt}", context, settings)
            trial = Trial()
            # A stage may take less time than before: then nearer to its beginning.
            hit = [kill_in(subject, s, took[s] * share / 2**attempt, trial) for s in stages]
            if all(hit):
                break
            shutil.rmtree(subject.root)
        process = subject.start()
        for _ in watch(subject, process):
            pass
        check_ended(subject, process)
        trial.differing = subject.differences(reference)
        yield trial
        if not trial.differing:
            shutil.rmtree(subject.root)


def plan(kills: int, seed: int) -> list[tuple[str, ...]]:
    """For each run the stages in which it is killed: every stage in turn, every fifth run twice."""
    chance = random.Random(seed)
    runs = []
    for number in range(kills):
        first = number % len(STAGES)
        later = range(first + 1, len(STAGES))
        twice = number % 5 == 4 and len(later) > 0
        runs.append((STAGES[first], *([STAGES[chance.choice(later)]] if twice else [])))
    return runs


def main() -> None:
    """The command: a table, and exit code 1 if a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="survive-"))
    equal = 0
    print(f"{'run':>3}  {'killed in':30}  {'after':>14}  outcome", flush=True)
    trials = survive(folder, plan(options.kills, options.seed), options.seed)
    for number, trial in enumerate(trials, start=1):
        equal += not trial.differing
        outcome = f"differs: {', '.join(trial.differing)}" if trial.differing else "bitwise equal"
        after = ", ".join(f"{seconds:.2f} s" for seconds in trial.seconds)
        print(f"{number:3}  {', '.join(trial.stages):30}  {after:>14}  {outcome}", flush=True)
    print(f"{equal} of {options.kills} bitwise equal to the undisturbed run")
    if equal == options.kills:
        shutil.rmtree(folder)
        return
    print(f"the runs that differ, and the undisturbed one, are in {folder}")
    sys.exit(1)


if __name__ == "__main__":
    main()
