"""Two processes under torchrun (gloo, no accelerator) give what one gives, up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import several_processes
import torch
from several_processes import MODELS, RECIPE

from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.recipe.settings import TrainingSettings
from contextlm.results.result import read_run
from contextlm.training.next_token import check_processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*command: str | Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    # Should a process be ended by a signal, its stack is in the message.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [*LAUNCH, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# One worker runs them all: what they share takes a minute to make.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    (out / "tiny.yaml").write_text(RECIPE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTEXTLM_CACHE", str(out / "cache"))
        patch.delenv("CONTEXTLM_DATA", raising=False)
        yield out


@pytest.fixture(scope="module")
def two(folder):
    """What two processes left: all parts, those in shares, and what the command printed."""
    done = launch(several_processes.__file__, folder)
    assert done.returncode == 0, done.stderr
    return {**torch.load(folder / "done.pt"), "out": done.stdout, "err": done.stderr}


@pytest.fixture(scope="module")
def one(folder):
    return several_processes.everything(folder / "one")


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            assert_same(value, theirs[name], **tolerance)
        else:
            torch.testing.assert_close(
                theirs[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


def test_phase_1_on_rank_0_gives_every_rank_the_block_of_one_process(one, two):
    assert_same(one["phase 1"], two["done"]["phase 1"], rtol=0, atol=0)


@pytest.mark.parametrize("part", [*MODELS, "in order"])
def test_phase_2_gives_the_loss_curve_and_weights_of_one_process(one, two, part):
    name = f"phase 2, {part}"
    assert len(one[name]["epochs"]) >= 2
    torch.testing.assert_close(
        two["done"][name]["epochs"], one[name]["epochs"], rtol=2e-5, atol=2e-5
    )
    torch.testing.assert_close(
        two["done"][name]["losses"], one[name]["losses"], rtol=2e-5, atol=2e-5
    )
    assert_same(one[name]["weights"], two["done"][name]["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_fsdp2_gives_what_ddp_gives(two, model):
    """The code that shards, on processors that are said to be accelerators."""
    ddp, fsdp2 = two["done"][f"phase 2, {model}"], two["sharded"][f"phase 2, {model}"]
    torch.testing.assert_close(fsdp2["epochs"], ddp["epochs"], rtol=2e-5, atol=2e-5)
    assert_same(ddp["weights"], fsdp2["weights"], rtol=1e-3, atol=1e-4)


def test_scoring_is_split_and_exact(one, two):
    assert two["done"]["score"] == pytest.approx(one["score"], rel=1e-12)
    assert one["score"][2] == 60


def test_a_run_by_two_processes_is_one_run(folder, two):
    """One folder with everything in it, one table, and the figures of one process."""
    arguments = ["run", folder / "tiny.yaml", "--out", folder / "one", "--device", "cpu"]
    assert execute(app, [str(argument) for argument in arguments]) == 0
    (ours,) = [read_run(path) for path in (folder / "one").glob("tiny-*")]
    (theirs,) = [read_run(path) for path in (folder / "runs").iterdir()]
    assert two["out"].count("validation PPL") == 1
    assert (theirs.folder / "report.html").is_file()
    assert (theirs.environment["processes"], ours.environment["processes"]) == (2, 1)
    assert [path.name for path in theirs.folder.rglob("*.part")] == []
    for a, b in zip(ours.outcomes, theirs.outcomes, strict=True):
        place = theirs.folder / b.result.contender / "seed-0"
        names = {path.name for path in place.iterdir()}
        assert names == {"job.json", "history.jsonl", "result.json", "timings.json", "checkpoint"}
        assert b.result.contender == a.result.contender
        assert b.result.validation_loss == pytest.approx(a.result.validation_loss, rel=2e-5)
        assert b.result.train_ppl == pytest.approx(a.result.train_ppl, rel=1e-4)
        assert b.result.cache == a.result.cache
        for row, other in zip(a.history, b.history, strict=True):
            expected = row.model_dump(exclude_none=True)
            assert other.model_dump(exclude_none=True) == pytest.approx(
                expected, rel=1e-4, abs=1e-6
            )
    assert theirs.outcomes[1].result.phase1.iterations == 4


def test_a_rank_that_fails_ends_the_others_at_once(tmp_path):
    """The other waits for it, which alone would take hours to give up."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import contextlm_script\n"  # so that no models are imported
        "import torch\n"
        "from contextlm.base import distribution\n"
        "with distribution.joined(torch.device('cpu')):\n"
        "    if distribution.rank() == 1:\n"
        "        raise SystemExit('rank 1 has had enough')\n"
        "    distribution.everyones(None)\n"
        "    print('went on')\n"
    )
    done = launch(script, timeout=60)
    assert done.returncode == 1
    assert "rank 1 has had enough" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5}, "batch_size 5 cannot be shared equally by 2 processes"),
        ({"batch_size": 6, "accumulation": 2}, "batch_size 6 in 2 micro-batches cannot"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, settings, message):
    monkeypatch.setattr("contextlm.base.distribution.world", lambda: 2)
    with pytest.raises(InputError, match=message):
        check_processes(TrainingSettings(**settings))
