"""Run folders given to `report` that somebody else made, or damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import attempt, tries
from hypothesis import given
from hypothesis import strategies as st

from contextlm.results.facts import CacheBytes, CorpusFacts, PhaseOneFacts
from contextlm.results.result import PhaseOneRow, PhaseTwoRow, Result, Timings

# Reading is checked and nothing is drawn: the summary cannot be put into a missing document.
NOTHING_WRITTEN = ("--into", "no-such.md")
FILES = ["recipe.yaml", "environment.json"]
FILES += [f"ours/seed-0/{name}" for name in ("result.json", "timings.json", "history.jsonl")]


def record(contender: str) -> tuple[Result, Timings, list[Any]]:
    corpus = CorpusFacts(
        name="text:notes.txt",
        tokenizer="bpe:300",
        vocab_size=300,
        train_tokens=1000,
        validation_tokens=100,
        train_windows=30,
        validation_windows=3,
        sequence_length=32,
        unigram_ppl=200.0,
    )
    phase1 = PhaseOneFacts(
        iterations=3,
        converged=0.8,
        context_dim=8,
        effective_rank_train=6.0,
        effective_rank_validation=5.0,
    )
    result = Result(
        recipe="toy",
        scale="full",
        contender=contender,
        architecture="gpt2",
        baseline=contender == "base",
        seed=0,
        target_offset=1,
        precision="float32",
        corpus=corpus,
        parameters_total=1000,
        parameters_trainable=900,
        validation_loss=math.log(100),
        validation_ppl=100.0,
        bits_per_byte=1.5,
        accuracy=0.2,
        train_ppl_running=90.0,
        train_ppl=80.0,
        best_epoch=1,
        epochs=1,
        phase1=phase1,
        cache=[CacheBytes(tokens=128, logical=1024, resident=2048)],
        cache_dtype="float32",
        reported={"val_ppl": 90.0},
    )
    timings = Timings(
        phase1_seconds=1.0,
        epoch_seconds=[2.0],
        evaluation_seconds=1.0,
        total_seconds=4.0,
        training_tokens_per_second=500.0,
        prefill_tokens_per_second=900.0,
        decode_tokens_per_second=50.0,
        speed_tokens=64,
        peak_host_bytes=10**9,
        peak_accelerator_bytes=None,
    )
    epoch = PhaseTwoRow(
        epoch=1,
        train_loss=4.5,
        train_ppl=90.0,
        validation_loss=math.log(100),
        validation_ppl=100.0,
        accuracy=0.2,
        learning_rate=1e-3,
    )
    return result, timings, [PhaseOneRow(iteration=1, converged=0.8, loss=None), epoch]


def made(folder: Path) -> Path:
    """A run folder of two contenders, as a run leaves it."""
    contenders = [
        {"name": "base", "baseline": True, "model": {"type": "gpt2"}},
        {"name": "ours", "model": {"type": "gpt2"}, "phase1": {"stop_at": 0.9}},
    ]
    recipe = {"name": "toy", "question": "Why?", "seeds": [0], "contenders": contenders}
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2"}}))
    for name in ("base", "ours"):
        result, timings, history = record(name)
        place = folder / name / "seed-0"
        place.mkdir(parents=True)
        (place / "result.json").write_text(result.model_dump_json())
        (place / "timings.json").write_text(timings.model_dump_json())
        (place / "history.jsonl").write_text(
            "".join(line.model_dump_json() + "\n" for line in history)
        )
    return folder


@pytest.fixture
def run(place: Path) -> Iterator[Path]:
    folder = made(place / "run-001")
    yield folder
    shutil.rmtree(folder)


NUMBER = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**62, 10**30, 1e300, -1e300, 5e-324, 10**400]),
)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(max_size=6) | st.sampled_from(["../..", "\udcff"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)


def spots(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a nest of mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in inner:
        found.append((*above, key))
        if isinstance(value, (dict, list)):
            found += spots(value, (*above, key))
    return found


def changed(text: str, name: str, pick: int, value: Any) -> str:
    """One value of a JSON or YAML text replaced."""
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    number = pick % len(lines)
    load = yaml.safe_load if name.endswith(".yaml") else json.loads
    tree = load(lines[number])
    *above, last = spots(tree)[pick % len(spots(tree))]
    outer = tree
    for key in above:
        outer = outer[key]
    outer[last] = value
    lines[number] = (yaml.safe_dump if name.endswith(".yaml") else json.dumps)(tree)
    return "\n".join(lines)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[Path], None]:
    """Something that is done to one file of a run folder."""
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["value"] * 6 + ["cut", "bytes", "gone", "folder"]))
    pick, value = draw(st.integers(0, 500)), draw(VALUE)
    data = draw(
        st.binary(max_size=30) | st.sampled_from([b"[" * 5000, b"{}", b"[]", b"\xff", b"3"])
    )

    def damage(folder: Path) -> None:
        file = folder / name
        whole = file.read_bytes()
        if kind == "value":
            file.write_text(changed(whole.decode(), name, pick, value), "utf-8", "surrogatepass")
        elif kind == "cut":
            file.write_bytes(whole[: pick % len(whole)])
        elif kind == "bytes":
            file.write_bytes(data)
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()

    return damage


@tries("run folder")
@given(damage=damages())
def test_any_damage_is_refused_by_name(place: Path, damage: Callable[[Path], None]) -> None:
    run = made(place / "run-001")
    try:
        damage(run)
        done = attempt("report", run, *NOTHING_WRITTEN, place=place, fine=False)
        assert "run-001" in done.message or "no-such.md" in done.message
    finally:
        shutil.rmtree(run)


@tries("reported run")
@given(
    name=st.sampled_from(FILES),
    picks=st.lists(st.integers(0, 500), min_size=1, max_size=3),
    value=NUMBER | st.text(max_size=6),
)
def test_what_is_not_refused_is_drawn(place: Path, name: str, picks: list[int], value: Any) -> None:
    run = made(place / "run-001")
    try:
        for pick in picks:
            text = changed((run / name).read_text(), name, pick, value)
            (run / name).write_text(text, "utf-8", "surrogatepass")
        attempt("report", run, place=place)
    finally:
        shutil.rmtree(run)


@pytest.mark.parametrize("name", ["base", "base/seed-0", "ours/seed-0/result.json", "recipe.yaml"])
def test_links_do_not_lead_out_of_the_folder(place: Path, run: Path, name: str) -> None:
    elsewhere = place / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    (run / name).rename(elsewhere) if (run / name).is_dir() else shutil.move(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    done = attempt("report", run, place=place, fine=False)
    assert "leads out of the run folder" in done.message
    if elsewhere.is_dir():
        shutil.rmtree(elsewhere)


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc", "a/b", "", "<script>", ".hidden"])
def test_names_do_not_lead_out_of_the_folder(place: Path, run: Path, name: str) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["contenders"][1]["name"] = name
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = attempt("report", run, place=place, fine=False)
    assert "recipe.yaml: contenders.1.name" in done.message


def test_a_link_in_the_way_of_the_report_is_replaced_not_followed(place: Path, run: Path) -> None:
    victim = place / "victim.txt"
    victim.write_text("untouched")
    for name in ("report.md", "report.html", "curves.png", "frontier.png"):
        (run / name).symlink_to(victim)
    assert attempt("report", run, place=place).code == 0
    assert victim.read_text() == "untouched"
    assert not (run / "report.html").is_symlink()


def test_pipes_and_giants_are_refused(place: Path, run: Path) -> None:
    file = run / "ours" / "seed-0" / "history.jsonl"
    file.unlink()
    os.mkfifo(file)
    assert "not a file" in attempt("report", run, place=place, fine=False).message
    file.unlink()
    with file.open("wb") as stream:
        stream.truncate(2**33)
    listed = [path for path in run.rglob("*") if path.is_file() and path.stat().st_size < 2**20]
    before = {path: path.read_bytes() for path in listed}
    from contextlm.cli import app
    from contextlm.cli.shell import execute

    assert execute(app, ["report", str(run)]) == 2
    assert {path: path.read_bytes() for path in listed} == before


def test_a_later_version_is_told(place: Path, run: Path) -> None:
    file = run / "ours" / "seed-0" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    done = attempt("report", run, place=place, fine=False)
    assert "result.json: version 2 is not one that this contextlm reads" in done.message


def test_a_folder_in_the_place_of_the_report(place: Path, run: Path) -> None:
    (run / "frontier.png").mkdir()
    assert "frontier.png: is a folder" in attempt("report", run, place=place, fine=False).message


def test_only_the_block_changes_in_a_document_with_windows_line_ends(
    place: Path, run: Path
) -> None:
    document = place / "notes.md"
    before = b"\xef\xbb\xbfa\r\n<!-- results:begin -->\r\nold\r\n<!-- results:end -->\r\nb\r\n\r\n"
    document.write_bytes(before)
    assert attempt("report", run, "--into", document, place=place).code == 0
    after = document.read_bytes()
    assert after.startswith(before[: before.index(b"old")])
    assert after.endswith(before[before.index(b"<!-- results:end") :])
    assert b"\n" not in after.replace(b"\r\n", b"")
    document.unlink()
