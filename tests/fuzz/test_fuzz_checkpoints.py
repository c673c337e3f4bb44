"""Checkpoints that somebody else made, or damaged: nothing in them runs, and the fault is named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, tries
from hypothesis import given
from hypothesis import strategies as st

WEIGHTS = "model.safetensors"
JSONS = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
FILES = [WEIGHTS, *JSONS, "contextlm.json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, untrained, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    from contextlm.evaluation.checkpoint import TrainingNote, write_trained

    logging.disable_progress_bar()  # as they are in a command's own process
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    letters = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", bos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=8, n_layer=1, n_head=1, n_positions=16, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    write_trained(folder, TrainingNote())
    yield folder
    logging.enable_progress_bar()


def generated(folder: Path, place: Path, fine: bool = True) -> Any:
    """What `generate` makes of a damaged copy."""
    return attempt(
        *("generate", folder, "abc", "--max-new-tokens", "2", "--device", "cpu"),
        place=place,
        fine=fine,
    )


NUMBER = st.integers() | st.floats() | st.sampled_from([0, -1, 10**9, 10**30, 1e300])
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@tries("checkpoint")
@given(
    name=st.sampled_from(FILES),
    kind=st.sampled_from(["value"] * 5 + ["cut", "bytes", "gone", "flip"]),
    pick=st.integers(0, 10**6),
    value=VALUE,
)
def test_any_damage_is_refused_or_harmless(
    place: Path, checkpoint: Path, name: str, kind: str, pick: int, value: Any
) -> None:
    folder = place / "damaged"
    shutil.copytree(checkpoint, folder)
    file = folder / name
    whole = file.read_bytes()
    if kind == "cut":
        file.write_bytes(whole[: pick % len(whole)])
    elif kind == "gone":
        file.unlink()
    elif kind == "bytes" or name == WEIGHTS:
        file.write_bytes(whole[:8] + b"\xff\x00{" + whole[pick % len(whole) :])
    elif kind == "flip":
        place_of_byte = pick % len(whole)
        file.write_bytes(
            whole[:place_of_byte]
            + bytes([whole[place_of_byte] ^ 0x11])
            + whole[place_of_byte + 1 :]
        )
    else:
        tree = json.loads(whole)
        keys = sorted(tree)
        tree[keys[pick % len(keys)]] = value
        file.write_text(json.dumps(tree))
    try:
        done = generated(folder, place)
        assert done.code == 0 or "damaged" in done.message
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def copy(place: Path, checkpoint: Path) -> Any:
    folder = place / "copy"
    shutil.copytree(checkpoint, folder)
    yield folder
    shutil.rmtree(folder)


def setting(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


class Bomb:
    """Makes the file PWNED in the current folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("PWNED"),)


def pickled(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb()))

    return change


def without_weights(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        pickled(*names)(folder)

    return change


def with_code(folder: Path) -> None:
    """Code beside the model, which `auto_map` asks to be run."""
    code = "from pathlib import Path\nPath('PWNED').touch()\nclass M: pass\n"
    (folder / "evil.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        setting(name, auto_map=dict.fromkeys(names, "evil.M"), tokenizer_class=None)(folder)


def sharded_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled(WEIGHTS), "model.safetensors: damaged"),
        (
            setting("tokenizer_config.json", model_max_length=[]),
            "tokenizer_config.json: damaged, the tokenizer cannot be used",
        ),
        (without_weights("pytorch_model.bin"), "pytorch_model.bin may be a pickle"),
        (without_weights("model.pt"), "model.pt may be a pickle"),
        (pickled("tokenizer.json"), "tokenizer.json: not valid JSON"),
        (setting("config.json", attn_implementation="org/kernel"), "names code to load"),
        (setting("config.json", experts_implementation={"": "org/x"}), "names code to load"),
        (setting("config.json", transformers_weights="adapter_model.bin"), "names other weights"),
        (setting("config.json", model_type="no-such"), "unknown model type 'no-such'"),
        (setting("config.json", n_layer=10**9), "n_layer 1000000000 is beyond all use"),
        (setting("config.json", n_embd=10**6), "does not fit config.json"),
        (setting("config.json", dtype="load"), "no type of torch is called 'load'"),
        (setting("config.json", vocab_size=100), "does not fit config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter"),
        (sharded_outside, "weight_map leads out of the folder"),
    ],
)
def test_what_a_stranger_might_try(
    place: Path, copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy)
    assert message in generated(copy, place, fine=False).message
    assert not (place / "PWNED").exists()
    (place / "outside.safetensors").unlink(missing_ok=True)


def test_code_and_pickles_beside_the_weights_are_not_run(place: Path, copy: Path) -> None:
    with_code(copy)
    pickled("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt")(copy)
    generated(copy, place)
    assert not (place / "PWNED").exists()


def test_generation_settings_of_a_stranger_change_nothing(place: Path, copy: Path) -> None:
    plain = generated(copy, place).out
    setting(
        "generation_config.json",
        num_beams=4,
        do_sample=True,
        temperature=50.0,
        max_length=3,
        min_new_tokens=9,
        repetition_penalty=3.0,
        cache_implementation="offloaded",
        bad_words_ids=[[1]],
    )(copy)
    assert generated(copy, place).out == plain
