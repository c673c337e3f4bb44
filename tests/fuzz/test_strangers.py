"""Checkpoints, run folders, corpora and recipes as a stranger might make them, one by one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import RECIPE, WORDS, Attempt, attempt

WEIGHTS = "model.safetensors"

# --- checkpoints ----------------------------------------------------------------------------------


def generated(folder: Path, place: Path, fine: bool = True) -> Attempt:
    arguments = ("generate", folder, "abc", "--max-new-tokens", "2", "--device", "cpu")
    return attempt(*arguments, place=place, fine=fine)


def setting(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


class Bomb:
    """Makes the file PWNED in the current folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("PWNED"),)


def pickled(*names: str, without: str | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb()))
        if without is not None:
            (folder / without).unlink()

    return change


def sharded_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled(WEIGHTS), "model.safetensors: damaged"),
        (pickled("pytorch_model.bin", without=WEIGHTS), "pytorch_model.bin may be a pickle"),
        (pickled("tokenizer.json"), "tokenizer.json: not valid JSON"),
        (setting("config.json", attn_implementation="org/kernel"), "names code to load"),
        (setting("config.json", transformers_weights="adapter_model.bin"), "names other weights"),
        (setting("config.json", model_type="no-such"), "unknown model type 'no-such'"),
        (setting("config.json", n_layer=10**9), "n_layer 1000000000 is beyond all use"),
        (setting("config.json", n_embd=10**6), "does not fit config.json"),
        (setting("config.json", vocab_size=100), "does not fit config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
        (sharded_outside, "weight_map leads out of the folder"),
    ],
)
def test_a_strangers_checkpoint(
    place: Path, checkpoint: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    assert message in generated(checkpoint, place, fine=False).message
    assert not (place / "PWNED").exists()
    (place / "outside.safetensors").unlink(missing_ok=True)


def test_code_pickles_and_settings_beside_the_weights_change_nothing(
    place: Path, checkpoint: Path
) -> None:
    plain = generated(checkpoint, place).out
    code = "from pathlib import Path\nPath('PWNED').touch()\nclass M: pass\n"
    (checkpoint / "evil.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    setting("config.json", auto_map=dict.fromkeys(names, "evil.M"))(checkpoint)
    pickled("pytorch_model.bin", "training_args.bin", "optimizer.pt")(checkpoint)
    setting("generation_config.json", num_beams=4, do_sample=True, temperature=50.0)(checkpoint)
    setting("generation_config.json", min_new_tokens=9, bad_words_ids=[[1]])(checkpoint)
    assert generated(checkpoint, place).out == plain
    assert not (place / "PWNED").exists()


# --- run folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "ours/seed-0/result.json", "recipe.yaml"])
def test_links_do_not_lead_out_of_the_folder(
    place: Path, run: Path, name: str, tmp_path: Path
) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    done = attempt("report", run, place=place, fine=False)
    assert "leads out of the run folder" in done.message


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
    names = ("report.md", "report.html")
    for name in names:
        (run / name).symlink_to(victim)
    assert attempt("report", run, place=place).code == 0
    assert victim.read_text() == "untouched"
    assert not any((run / name).is_symlink() for name in names)


def test_pipes_giants_and_later_versions_are_refused(place: Path, run: Path) -> None:
    result = run / "ours" / "seed-0" / "result.json"
    whole = result.read_text()
    result.write_text(json.dumps({**json.loads(whole), "version": 99}))
    done = attempt("report", run, place=place, fine=False)
    assert "result.json: version 99 is not one that this contextlm reads" in done.message
    result.write_text(whole)
    history = run / "ours" / "seed-0" / "history.jsonl"
    history.unlink()
    os.mkfifo(history)
    assert "not a file" in attempt("report", run, place=place, fine=False).message
    history.unlink()
    with history.open("wb") as stream:
        stream.truncate(2**33)
    assert "history.jsonl" in attempt("report", run, place=place, fine=False).message


# --- corpora and recipes --------------------------------------------------------------------------


def planned(place: Path, *options: str, fine: bool = True) -> Attempt:
    (place / "recipe.yaml").write_text(RECIPE)
    arguments = [f"--set={option}" for option in (*options, "contenders.ours=null")]
    return attempt("run", "recipe.yaml", *arguments, "--dry-run", place=place, fine=fine)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + WORDS.encode() * 8,
        WORDS.replace(" ", "").replace("\n", "").encode() * 40,
        ("🐍" * 7 + " " + "🐢" * 5).encode() * 300,
        b"\x1b[31m \x07<|endoftext|>" * 400,
    ],
    ids=["BOM", "endless word", "emoji", "controls"],
)
def test_text_that_is_merely_unusual_works(place: Path, data: bytes) -> None:
    (place / "odd.txt").write_bytes(data)
    assert planned(place, "corpus=text:odd.txt").code == 0


def test_a_pipe_in_a_folder_is_passed_over_and_names_may_be_bytes(place: Path) -> None:
    folder = place / "mixed"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    for number in range(5):
        (folder / f"{number}.txt").write_text(WORDS + str(number))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text(WORDS)
    assert planned(place, f"corpus=text:{folder}").code == 0
