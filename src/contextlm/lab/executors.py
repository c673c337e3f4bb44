"""Who does the jobs: this process, one after the other, or several workers of Ray at once."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from contextlm.base import distribution
from contextlm.base.errors import ContextLMError, InputError, RunError
from contextlm.base.progress import Progress, SilentProgress, duration
from contextlm.lab.jobs import Job, Planner
from contextlm.lab.tracking import check_trackers

EXTRA = "--workers needs Ray: pip install 'ray>=2.50'"

Runs = Sequence[tuple[Path, Planner]]


class Executor(AbstractContextManager["Executor"], Protocol):
    """Does jobs that are ready."""

    failed: dict[str, str]
    """What went wrong with jobs that could not be done, by their titles."""

    def advance(self, runs: Runs) -> bool:
        """Do some of what is ready in the runs; False when nothing is left to do."""


def new_executor(workers: int | None, progress: Progress, track: Sequence[str]) -> Executor:
    """This process, or so many workers of Ray; `track` are names of trackers.

    Raises:
        InputError: Ray is not installed, or a launcher started several processes.
        RunError: nothing answers at RAY_ADDRESS.
    """
    check_trackers(track)
    return Here(progress, track) if workers is None else RayWorkers(workers, progress, track)


def carry_out(runs: Runs, executor: Executor) -> None:
    """Do all jobs of some runs.

    Raises:
        RunError: a job failed in this process, or some did in workers, after all others were done.
    """
    while executor.advance(runs):
        pass
    left = [job.title for run, planner in runs for job in planner.left(run)]
    if left and not executor.failed:
        raise RunError(
            f"{left[0]}: cannot be done: what it needs was made where this machine does not see it "
            "(CONTEXTLM_CACHE and the run folder must be shared)"
        )
    if executor.failed:
        first, reason = next(iter(executor.failed.items()))
        count = len(executor.failed)
        jobs = f"{count} jobs failed, the first" if count > 1 else "a job failed"
        raise RunError(f"{jobs}: {first}: {reason}; --resume does again what failed")


class Here(Executor):
    """This process, or the several that a launcher started, which share each job.

    Args:
        progress: gets a heading for each job, with its number and a time to go, and what the job
            tells.
        track: names of trackers.
    """

    def __init__(self, progress: Progress, track: Sequence[str] = ()):
        self.progress = progress
        self.track = track
        self.failed: dict[str, str] = {}
        self._clock = _Clock()

    def __exit__(self, *exception: object) -> None:
        return None

    def advance(self, runs: Runs) -> bool:
        """Do the first job that is ready."""
        for run, planner in runs:
            ready = distribution.by_main(partial(planner.ready, run))
            if ready:
                job = ready[0]
                self.progress.stage(self._clock.heading(job, runs))
                from contextlm.lab.work import execute

                started = time.monotonic()
                execute(job, planner, run, self.progress, self.track)
                if job.kind == "contender":
                    self._clock.took(job, time.monotonic() - started)
                return True
        return False


class _Clock:
    """How many jobs are left, and how long they will take: as those before them did."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def took(self, job: Job, seconds: float) -> None:
        self._seconds[job.contender] = seconds

    def heading(self, job: Job, runs: Runs) -> str:
        """The job's title; of a contender's also which one it is, and the time to go if known."""
        if job.kind != "contender":
            return job.title
        total = sum(len(planner.jobs) for _, planner in runs)
        left = [other for run, planner in runs for other in planner.left(run)]
        said = f"{job.title} ({total - len(left) + 1} of {total}"
        if self._seconds:
            mean = sum(self._seconds.values()) / len(self._seconds)
            togo = sum(self._seconds.get(other.contender, mean) for other in left)
            said += f", about {duration(togo)} to go"
        return f"{said})"


class RayWorkers(Executor):
    """Workers of Ray: N on this machine, or those of the cluster that RAY_ADDRESS names.

    On this machine each worker gets an equal share of the cores. On a cluster a job takes one core,
    N jobs run at once, and the run folder and corpora must lie where all machines see them. A job
    takes a GPU where there are any.

    Args:
        workers: N.
        progress: gets a line for each job that ends.
        track: names of trackers.

    Raises:
        InputError, RunError: as for `new_executor`.
    """

    def __init__(self, workers: int, progress: Progress, track: Sequence[str] = ()):
        if importlib.util.find_spec("ray") is None:
            raise InputError(EXTRA)
        if "LOCAL_RANK" in os.environ:
            raise InputError("--workers: either workers do the jobs, or a launcher's processes")
        _check_cluster(os.environ.get("RAY_ADDRESS", ""))
        self.workers = workers
        self.track = track
        self.progress = progress
        self.failed: dict[str, str] = {}
        self._running: dict[Any, tuple[Path, Job]] = {}
        self._begun: set[tuple[Path, Job]] = set()
        self._started = False

    def __enter__(self) -> RayWorkers:
        import ray

        self._started = not ray.is_initialized()
        cores = 1
        if self._started:
            cores = _start_ray(self.workers)
        gpus = ray.cluster_resources().get("GPU", 0)
        options = {"num_cpus": cores, "num_gpus": min(1.0, gpus / self.workers) if gpus else 0}
        self._work = ray.remote(_work).options(**options, max_retries=0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            import ray

            ray.shutdown()  # also ends jobs that still run, after an interrupt

    def advance(self, runs: Runs) -> bool:
        """Hand out what is ready, as far as workers are free, and wait until a job ends."""
        import ray

        from contextlm.models.outside import outside

        imports = [found.given for found in outside().values() if found.on_request]
        for run, planner in runs:
            for job in planner.ready(run):
                if len(self._running) < self.workers and (run, job) not in self._begun:
                    recipe, device = planner.prepared.recipe, planner.prepared.device.type
                    reference = self._work.remote(
                        job, recipe, device, run.absolute(), imports, self.track
                    )
                    self._running[reference] = run, job
                    self._begun.add((run, job))
        if not self._running:
            return False
        (reference,), _ = ray.wait(list(self._running), num_returns=1)
        run, job = self._running.pop(reference)
        title = job.title if len(runs) == 1 else f"{run.name}: {job.title}"
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self.failed[title] = _reason(error)
            self.progress.line(f"failed: {title}: {self.failed[title]}")
            return True
        left = sum(len(planner.left(run)) for run, planner in runs)
        total = sum(len(planner.jobs) for _, planner in runs)
        self.progress.line(f"{title} ({total - left} of {total} done)")
        return True


def _work(
    job: Job,
    recipe: Any,
    device: str,
    run: Path,
    imports: Sequence[str],
    track: Sequence[str],
) -> None:
    """Do one job, wherever Ray puts it."""
    from contextlm.lab.work import execute
    from contextlm.models.outside import import_outside

    import_outside(imports)
    planner = _planner(recipe.model_dump_json(), device)
    described = {mine.described for mine in planner.jobs} | {
        mine.described for mine in planner.ready(run)
    }
    if job.described not in described:
        raise RunError(f"{job.title}: a worker's machine has other data than the one that began")
    execute(job, planner, run, SilentProgress(), track)


@lru_cache(maxsize=2)
def _planner(recipe: str, device: str) -> Planner:
    """A worker prepares a recipe once."""
    import torch

    from contextlm.lab.preparation import prepare
    from contextlm.recipe.schema import Recipe

    return Planner(prepare(Recipe.model_validate_json(recipe), torch.device(device)))


def _check_cluster(address: str) -> None:
    """Ray itself would try for minutes, and say so in many lines."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise RunError(f"RAY_ADDRESS {address}: Ray cannot be reached: {error}") from None


def _start_ray(workers: int) -> int:
    """Start Ray, or join the cluster of RAY_ADDRESS; the cores that a job gets."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **quiet)
            return 1
        cores = max(1, (os.cpu_count() or 1) // workers)
        ray.init(include_dashboard=False, num_cpus=workers * cores, **quiet)
        return cores
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"Ray cannot be started or reached: {reason}") from None


def _reason(error: Exception) -> str:
    """One line: our own error's words, else kind and first words of what went wrong."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ContextLMError):
        return str(cause)
    first = next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {first.strip()}"
