"""`--resume`: which run it takes, what it refuses, and that the end is the undisturbed one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contextlm.base.errors import InputError, RunError
from contextlm.base.locks import locked
from contextlm.base.progress import SilentProgress
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.lab import running, work
from contextlm.lab.run_folder import is_unfinished, newest_unfinished, unfinished_run_of
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import read_run

QUICK = [
    "corpus=text:corpus",
    "contenders.context-pythia-projected=null",
    "training.epochs=1",
    "contenders.context-pythia.phase1.max_iterations=2",
    "evaluation.cache_lengths=[32]",
    "samples={train: 16, validation: 8}",
    "documents=null",
]
TEXT = "\n".join(
    f"The {n}th line of a text with {n * n} words, or {n % 7} letters." for n in range(900)
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONTEXTLM_DATA", raising=False)
    Path("corpus").mkdir()
    for number in range(40):
        Path(f"corpus/{number}.txt").write_text(f"{number}\n{TEXT[number * 900 :][:900]}", "utf-8")
    return tmp_path


def recipe(*overrides: str):
    return load_recipe("demo", scale="smoke", overrides=[*QUICK, *overrides])


def begin(monkeypatch, error: BaseException, *overrides: str) -> Path:
    """A run that ends with `error` while its second contender is measured."""
    calls = []

    def fail(*arguments: object):
        calls.append(arguments)
        if len(calls) > 1:
            raise error
        return measure(*arguments)

    measure = work.measure_cache
    with monkeypatch.context() as patch:
        patch.setattr(work, "measure_cache", fail)
        with pytest.raises(type(error)):
            running.run(recipe(*overrides), Path("runs"), device="cpu", progress=SilentProgress())
    return newest_unfinished(Path("runs"))


def resume(folder: Path) -> Path:
    return running.resume(folder, device="cpu", progress=SilentProgress())


def contents(run: Path) -> dict[str, bytes]:
    """What must be equal: weights, history and result of every contender, and no other file."""
    compared = ("model.safetensors", "history.jsonl", "result.json")
    return {
        str(path.relative_to(run)): path.read_bytes() if path.name in compared else b""
        for path in run.rglob("*")
        if path.is_file()
    }


def test_a_run_that_a_fault_ended_is_resumed_and_ends_like_another(monkeypatch):
    folder = begin(monkeypatch, RunError("broken"))
    first = (folder / "pythia/seed-0/result.json").stat().st_mtime_ns
    whole = running.run(recipe(), Path("whole"), device="cpu", progress=SilentProgress())
    assert resume(folder) == folder
    assert contents(folder) == contents(whole)
    assert (folder / "pythia/seed-0/result.json").stat().st_mtime_ns == first  # not made again
    assert not is_unfinished(folder)
    assert not (folder / "_working").exists()
    assert "resumed_under" not in read_run(folder).environment


def test_a_damaged_result_is_made_again(monkeypatch):
    folder = begin(monkeypatch, KeyboardInterrupt())
    result = folder / "pythia/seed-0/result.json"
    whole = result.read_bytes()
    result.write_bytes(whole[:-20])
    resume(folder)
    assert result.read_bytes() == whole


def refused(folder: Path) -> str:
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        resume(folder)
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_differs_from_the_beginning_is_refused(monkeypatch):
    folder = begin(monkeypatch, KeyboardInterrupt())
    with locked(folder / "_working/lock", "x"):
        assert "is at work on it" in refused(folder)
    file = folder / "recipe.yaml"
    known = file.read_text("utf-8")
    file.write_text(known.replace("epochs: 1", "epochs: 2"), "utf-8")
    assert "pythia, seed 0: not the one that the run holds: training.epochs diff" in refused(folder)
    file.write_text(known, "utf-8")
    job = folder / "context-pythia/seed-0/job.json"
    kept = job.read_text("utf-8")
    job.write_text(kept.replace('"device": "cpu"', '"device": "cuda"'), "utf-8")
    assert "context-pythia, seed 0: not the one that the run holds: device diff" in refused(folder)
    job.write_text("{", "utf-8")
    assert refused(folder).startswith(f"{job}: is damaged")
    job.write_text(kept, "utf-8")
    Path("corpus/7.txt").write_text("other\n" + TEXT[:900], "utf-8")
    message = refused(folder)
    assert message.startswith(f"{folder}: pythia, seed 0: not the one that the run holds: data.")


def test_other_versions_are_told_and_kept(monkeypatch):
    folder = begin(monkeypatch, KeyboardInterrupt())
    file = folder / "environment.json"
    begun = json.loads(file.read_text("utf-8"))
    begun["packages"]["torch"] = "0.1"
    file.write_text(json.dumps(begun), "utf-8")
    lines = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "line", lines.append)
    running.resume(folder, device="cpu", progress=progress)
    assert any("torch 0.1 -> " in line for line in lines)
    assert list(read_run(folder).environment["resumed_under"]) == ["torch"]


def test_the_newest_unfinished_run_of_the_recipe_is_taken(monkeypatch):
    out = Path("runs")
    assert unfinished_run_of([recipe()], out, "demo") is None
    folder = begin(monkeypatch, KeyboardInterrupt())
    for number, name in ((2, "demo"), (3, "demo"), (4, "other")):
        shutil.copytree(folder, out / f"{name}-00{number}", copy_function=shutil.copyfile)
    (out / "demo-003/_working/run.json").unlink()  # has finished
    assert unfinished_run_of([recipe()], out, "demo") == out / "demo-002"
    assert newest_unfinished(out) == out / "other-004"
    with pytest.raises(InputError) as caught:
        unfinished_run_of([recipe("contenders.pythia.model.hidden_size=64")], out, "demo")
    assert "-002: contenders.pythia.model.hidden_size differs (" in str(caught.value)
    with pytest.raises(InputError, match=r"-002: training\.batch_size differs \("):
        unfinished_run_of([recipe("training.batch_size=4")], out, "demo")
    assert f"unfinished {out / 'demo-002'}" in str(caught.value)


def test_the_command_resumes_a_folder_and_says_when_there_is_nothing_to_do(monkeypatch, capsys):
    folder = begin(monkeypatch, KeyboardInterrupt())
    capsys.readouterr()  # what beginning it has said

    def command(*arguments: str) -> tuple[int, str, str]:
        code = execute(app, ["run", "--device", "cpu", *arguments])
        return code, *capsys.readouterr()

    code, _, err = command(str(folder), "--resume", "--seeds", "3")
    assert (code, err) == (
        2,
        "contextlm: error: --seeds: a run is resumed with the recipe that it began with\n",
    )
    assert command("--resume", "--dry-run")[0] == 2
    assert command()[2] == "contextlm: error: missing argument 'RECIPE'\n"
    code, out, err = command("--resume", str(folder), "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == str(folder)
    assert f"resuming {folder}" in err
    code, out, err = command("--resume", str(folder))
    assert (code, err) == (0, f"{folder} has finished: nothing to resume\n")
    assert "report.html" in out
    assert command("--resume")[2] == (
        "contextlm: error: --resume: there is no unfinished run below runs\n"
    )


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from contextlm.cli import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits for files")
def test_a_full_disk_is_one_line_and_the_run_is_resumed_later():
    """The system itself refuses what is larger: here the first checkpoint."""
    overrides = [argument for override in QUICK for argument in ("--set", override)]
    arguments = ["run", "demo", "--scale", "smoke", "--device", "cpu", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "200000", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1, last
    assert last.startswith("contextlm: error: ")
    assert "could not be written" in last
    assert last.endswith("; to resume: contextlm run --resume runs/demo-001")
    folder = Path("runs/demo-001")
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    resume(folder)
    assert not is_unfinished(folder)
