"""Thirty bad inputs through the real console script, each in a process of its own.

All of these end before torch is imported; `make fuzz` adds some that end later, seconds each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import TIMES, attempt_for_real
from test_fuzz_recipes import RECIPE
from test_fuzz_run_folders import made

LONG = "x" * 5000


@pytest.fixture(scope="module")
def stage(place: Path) -> Iterator[Path]:
    """A folder with good and bad things to name."""
    folder = place / "stage"
    folder.mkdir()
    (folder / "good.yaml").write_text(RECIPE)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "cut.yaml").write_text(RECIPE[:-40])
    (folder / "deep.yaml").write_text("a: " + "[" * 5000)
    (folder / "twice.yaml").write_text(RECIPE + "name: again\n")
    (folder / "pwn.yaml").write_text("a: !!python/object/apply:os.system ['touch PWNED']\n")
    bomb = ["a0: &a0 [x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)
    ]
    (folder / "bomb.yaml").write_text("\n".join(bomb))
    (folder / "notes.txt").write_bytes("grün".encode("utf-16"))
    (folder / "wrong.jsonl").write_text('{"text": "fine"}\n{"txet": "slip"}\n')
    (folder / "folder.yaml").mkdir()
    made(folder / "run")
    result = folder / "run" / "ours" / "seed-0" / "result.json"
    result.write_text(result.read_text()[:100])
    made(folder / "old")
    result = folder / "old" / "ours" / "seed-0" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "version": 0}))
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).write_text("{}")
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    shutil.copytree(checkpoint, folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    recipe = made(folder / "evil") / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: ours", "name: ../../ours"))
    yield folder
    shutil.rmtree(folder)


BAD: list[tuple[list[str], str]] = [
    (["run", "no-such"], "no-such"),
    (["run", "binary.yaml"], "binary.yaml"),
    (["run", "cut.yaml"], "cut.yaml"),
    (["run", "deep.yaml"], "deep.yaml"),
    (["run", "twice.yaml"], "twice.yaml"),
    (["run", "pwn.yaml"], "pwn.yaml"),
    (["run", "bomb.yaml"], "bomb.yaml"),
    (["run", "folder.yaml"], "folder.yaml"),
    (["run", LONG], "xxx"),
    (["run", "caf\udce9.yaml"], "caf"),
    (["run", "/dev/zero"], "/dev/zero"),
    (["run", "good.yaml", "--set", "training.epochs=many"], "training.epochs"),
    (["run", "good.yaml", "--set", "seeds=0x" + "f" * 6000], "seeds"),
    (["run", "good.yaml", "--set", "name=../../evil"], "name"),
    (["run", "good.yaml", "--set", "learning_rate=1"], "training.learning_rate"),
    (["run", "good.yaml", "--scale", "smok"], "smoke"),
    (["run", "good.yaml", "--seeds", "9" * 40], "--seeds"),
    (["run", "good.yaml", "--out", "good.yaml/runs"], "--out"),
    (["params", "good.yaml", "--no-such"], "--no-such"),
    (["list", "recipies"], "recipes"),
    (["eval", "no-such-folder"], "no-such-folder"),
    (["generate", "checkpoint", "x", "--top-p", "7"], "--top-p"),
    (["generate", "checkpoint", "\udcff"], "PROMPT"),
    (["bench", "scann"], "scan"),
    (["report", "run"], "result.json"),
    (["report", "old"], "version 0"),
    (["eval", "checkpoint", "--device", "cpu"], "pytorch_model.bin"),
    (["generate", "adapter", "x"], "adapter_config.json"),
    (["generate", "checkpoint", "--prompt-file", "notes.txt"], "notes.txt"),
    (["report", "evil"], "contenders.1.name"),
    (["report", "run", "run"], "twice"),
]
LATER: list[tuple[list[str], str]] = [
    (["run", "good.yaml", "--dry-run"], "notes.txt: UTF-16"),
    (["run", "good.yaml", "--dry-run", "--set", "corpus=jsonl:wrong.jsonl"], "wrong.jsonl: line 2"),
    (["params", "good.yaml", "--set", "contenders.base.model.n_layer=1000000000"], "n_layer"),
]


def test_there_are_thirty() -> None:
    assert len(BAD) >= 30


TRIED = BAD if TIMES == 1 else [*BAD, *LATER]


@pytest.mark.parametrize(("arguments", "culprit"), TRIED, ids=range(len(TRIED)))
def test_bad_input_is_refused_for_real(stage: Path, arguments: list[str], culprit: str) -> None:
    done = attempt_for_real(*map(os.fsencode, arguments), place=stage)
    assert culprit in done.message
