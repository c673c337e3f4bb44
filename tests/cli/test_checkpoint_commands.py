"""`contextlm eval` and `contextlm generate`: what they print, and where a prompt comes from."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, GPTNeoXConfig

from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.checkpoints import read_lengths
from contextlm.cli.prompt import read_prompt
from contextlm.cli.shell import execute
from contextlm.models.context_pythia import ContextPythiaConfig

WIDTH, LAYERS, POSITIONS = 16, 2, 32
SHARED = {
    "vocab_size": 257,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": POSITIONS,
}
CONFIGS = {
    "gpt_neox": GPTNeoXConfig(**SHARED, intermediate_size=32, eos_token_id=256, bos_token_id=256),
    "gpt2": GPT2Config(
        vocab_size=257,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_positions=POSITIONS,
        eos_token_id=256,
        bos_token_id=256,
    ),
    "context_pythia": ContextPythiaConfig(**SHARED, context_dim=8),
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of a command line."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = execute(app, [str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def checkpoint(tmp_path: Path, saved: Callable[..., Path]) -> Path:
    return saved(tmp_path / "checkpoint", CONFIGS["gpt2"])


# --- generate ------------------------------------------------------------------------------------


def test_the_text_is_streamed_and_summed_up_on_stderr(command: Command, checkpoint: Path) -> None:
    made = json.loads(command("generate", checkpoint, "abc", "--max-new-tokens", 5, "--json")[1])
    assert (made["prompt_tokens"], made["tokens"]) == (3, 5)
    # 7 tokens have gone through the layers: the last one that was made has not.
    assert made["cache_logical"] == LAYERS * 2 * 7 * WIDTH * 4
    code, out, err = command("generate", checkpoint, "abc", "--max-new-tokens", 5)
    assert (code, out) == (0, made["text"] + "\n")
    assert err.startswith("5 tokens, ")
    assert "cache 1.8 KB" in err
    assert err.count("\n") == 1


def test_sampling_is_repeatable_with_a_seed(command: Command, checkpoint: Path) -> None:
    def text(*options: object) -> str:
        given = ("generate", checkpoint, "abc", "--max-new-tokens", 20, "--json", *options)
        return str(json.loads(command(*given)[1])["text"])

    greedy = text()
    assert text("--temperature", 0) == text("--top-k", 1) == greedy
    first = text("--temperature", 1.5, "--seed", 1)
    assert text("--temperature", 1.5, "--seed", 1) == first
    assert text("--temperature", 1.5, "--seed", 2) != first
    assert text("--top-p", 0.9, "--seed", 1) != greedy


def test_prompt_and_new_tokens_stay_within_the_positions(
    command: Command, tmp_path: Path, saved: Callable[..., Path]
) -> None:
    folder = saved(tmp_path / "rotary", CONFIGS["gpt_neox"])
    code, out, err = command("generate", folder, "abc", "--max-new-tokens", 30)
    assert (code, out) == (2, "")
    assert "33 tokens, more than the model's 32 positions" in err
    assert command("generate", folder, "abc", "--max-new-tokens", 29)[0] == 0


def test_a_prompt_from_a_file_or_stdin(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("grün\r\n".encode())
    stdin = SimpleNamespace(buffer=io.BytesIO("grün\n".encode()), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    for arguments in (["grün"], ["--prompt-file", file], ["--prompt-file", "-"], []):
        stdin.buffer.seek(0)
        given = ("generate", checkpoint, *arguments, "--max-new-tokens", 2, "--json")
        made = json.loads(command(*given)[1])
        assert (made["prompt"], made["prompt_tokens"]) == ("grün", 5)


def test_bad_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for given, message in (
        (("a", "b"), "not both"),
        ((None, str(tmp_path / "missing")), "missing"),
        ((None, str(tmp_path / "latin")), "not UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompt(*given)
    for stdin in (None, SimpleNamespace(isatty=lambda: True)):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(InputError, match="no prompt"):
            read_prompt(None, None)


def from_stdin(data: bytes, block: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("contextlm.cli.prompt._BLOCK", block)
    return iter(read_prompt(None, None))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(
    "text", ["", "\n", "a", "grün ☕ 😀 end", "ends\r\n", "two\n\n", "\r\n\n", "x\r", "\n\n\n\n"]
)
def test_characters_are_whole_across_blocks(
    text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = "".join(from_stdin(text.encode(), block, monkeypatch))
    assert read == text.removesuffix("\n").removesuffix("\r")


@pytest.mark.parametrize("data", [b"ab\xff", b"gr\xc3", b"\xe2\x98" + b"a" * 9])
@pytest.mark.parametrize("block", [1, 4])
def test_bad_utf8_is_refused(data: bytes, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="prompt in stdin is not UTF-8"):
        list(from_stdin(data, block, monkeypatch))


# --- eval ----------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint(command: Command, tmp_path: Path) -> None:
    for arguments in (["eval"], ["generate"]):
        code, out, err = command(*arguments, tmp_path, *(["x"] if "generate" in arguments else []))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path) in err


@pytest.mark.parametrize("text", ["0", "1,", "x", "9" * 30, "²"])
def test_bad_cache_lengths(text: str) -> None:
    with pytest.raises(InputError, match="--cache-lengths"):
        read_lengths(text)
    assert read_lengths("512, 128,512") == [128, 512]


def test_eval_shows_what_was_measured(
    command: Command, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    from contextlm.evaluation.measure import CheckpointReport
    from contextlm.results.facts import CacheBytes

    seen: dict[str, Any] = {}

    def evaluate_checkpoint(folder: Path, **options: Any) -> CheckpointReport:
        seen.update(options)
        return CheckpointReport(
            checkpoint=str(folder),
            architecture="gpt2",
            parameters=12345,
            corpus="notes",
            split="all",
            sequence_length=64,
            windows=8,
            windows_available=577,
            tokens=512,
            loss=4.81589,
            ppl=123.456,
            bits_per_byte=2.34567,
            accuracy=0.0176,
            cache=[CacheBytes(tokens=128, logical=2048, resident=4096)],
            cache_dtype="float32",
            speed_tokens=512,
            prefill_tokens_per_second=1234.5,
            decode_tokens_per_second=67.89,
        )

    monkeypatch.setattr("contextlm.evaluation.measure.evaluate_checkpoint", evaluate_checkpoint)
    options = ("--corpus", "text:x", "--samples", 3, "--cache-lengths", "128,4096,9999")
    _, out, err = command("eval", checkpoint, *options, "--device", "cpu", "--split", "train")
    assert seen == {
        "corpus": "text:x",
        "device": "cpu",
        "split": "train",
        "sequence_length": None,
        "samples": 3,
        "cache_lengths": [128, 4096, 9999],
        "input_cache": False,
    }
    lines = {
        "architecture": "gpt2",
        "parameters": "12,345",
        "corpus": "notes, all of it",
        "windows": "8 of 577, 64 tokens each",
        "PPL": "123.5",
        "loss": "4.8159",
        "bits per byte": "2.346",
        "accuracy": "1.8%",
        "cache at 128 tokens": "2.0 KB (4.0 KB resident)",
        "decode tokens/s, 512 tokens": "67.9",
    }
    for name, value in lines.items():
        assert re.search(rf"^ *{re.escape(name)} +{re.escape(value)} *$", out, re.MULTILINE)
    assert err == "--cache-lengths: left out, beyond the model's positions: 4,096, 9,999\n"
    _, out, err = command("eval", checkpoint, "--json")
    assert err == ""
    assert json.loads(out)["cache"] == [{"tokens": 128, "logical": 2048, "resident": 4096}]


@pytest.fixture
def evaluate(
    command: Command, tmp_path: Path, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run `contextlm eval` on an untrained model of one of `CONFIGS`."""
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("some words of a text, " * 200)
    corpus = ("--corpus", f"text:{tmp_path / 'notes.txt'}", "--samples", "2")

    def run(name: str, *options: str) -> tuple[int, str, str]:
        folder = saved(tmp_path / name, CONFIGS[name])
        return command("eval", folder, "--device", "cpu", *corpus, *options)

    return run


@pytest.mark.parametrize(("name", "position_bytes"), [("gpt_neox", 4), ("gpt2", 0)])
def test_both_caches_are_measured(evaluate: Command, name: str, position_bytes: int) -> None:
    code, out, _ = evaluate(name, "--cache", "input", "--cache-lengths", "8,32", "--json")
    assert code == 0
    report = json.loads(out)
    ours = report["input_cache"]
    assert [entry["tokens"] for entry in ours["cache"]] == [8, 32]
    for entry, plain, percent in zip(
        ours["cache"], report["cache"], ours["cache_change_percent"], strict=True
    ):
        tokens = entry["tokens"]
        assert plain["logical"] == 2 * tokens * LAYERS * WIDTH * 4
        assert entry["logical"] == plain["logical"] // 2 + tokens * position_bytes
        assert entry["logical"] <= entry["resident"] <= 1.125 * entry["logical"]
        assert percent == pytest.approx(100 * (entry["logical"] / plain["logical"] - 1))
    for rate in ("prefill", "decode"):
        mine, plain = ours[f"{rate}_tokens_per_second"], report[f"{rate}_tokens_per_second"]
        assert ours[f"{rate}_change_percent"] == pytest.approx(100 * (mine / plain - 1))


def test_the_table_shows_both_caches(evaluate: Command) -> None:
    code, out, _ = evaluate("gpt2", "--cache", "input", "--cache-lengths", "8")
    assert code == 0
    lines = {line.strip().rpartition("  ")[0].strip(): line for line in out.splitlines()}
    assert "2.0 KB (2.0 KB resident)" in lines["cache at 8 tokens"]
    assert "1.0 KB, -50.0" in lines["input cache at 8 tokens"]
    assert out.count("input cache: ") == 2


def test_other_models_and_caches_are_refused_in_one_line(evaluate: Command) -> None:
    assert evaluate("context_pythia", "--cache", "input") == (
        2,
        "",
        "contextlm: error: --cache input: context_pythia has a cache of its own, which keeps "
        "little already\n",
    )
    code, out, said = evaluate("gpt2", "--cache", "output")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "--cache" in said


def test_a_name_of_the_hub_is_told_how_to_become_a_folder(command: Command) -> None:
    code, out, err = command("eval", "EleutherAI/pythia-70m")
    assert (code, out) == (2, "")
    assert "checkpoint 'EleutherAI/pythia-70m': no such folder" in err
    assert "hf download EleutherAI/pythia-70m --local-dir FOLDER" in err
    assert "hf download" not in command("eval", "nowhere")[2]
