"""A user's walk: saved models are compressed, reported, and generate with what was chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from contextlm import CompressedCache
from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.compressing import read_budgets
from contextlm.cli.shell import execute
from contextlm.evaluation.compression import passkeys
from contextlm.evaluation.memory import cache_bytes
from contextlm.report.compression import answers, frontier, tables
from contextlm.results.compression import Bucket, Compression, PolicyFigures
from contextlm.results.facts import CacheBytes

SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # far from a uniform guess
    "eos_token_id": 256,
    "bos_token_id": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "neox": GPTNeoXConfig(**SIZES),
}
# What the walk heals: by which policy, and which parameters.
HEALED = {
    "llama": ("latent:25%", "all"),
    "qwen3": ("window:20,sinks:2", "lora"),
    "neox": ("window:40+latent:25%", "policy"),
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
def text(tmp_path: Path) -> str:
    (tmp_path / "notes").mkdir()
    for number in range(40):
        words = [f"{number * step % 97} of {step}" for step in range(1, 60)]
        (tmp_path / "notes" / f"{number}.txt").write_text(". ".join(words))
    return f"text:{tmp_path / 'notes'}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_users_walk(
    name: str, tmp_path: Path, saved: Callable[..., Path], text: str, command: Command
) -> None:
    model = saved(tmp_path / name, CONFIGS[name])
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    out = tmp_path / "runs"
    options = ["--text", text, "--lengths", "64,200", "--budget", "0.5,0.25", "--out", out]
    code, stdout, stderr = command("compress", model, *options, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    run = Path(found["run"])
    assert run == out / f"compress-{name}-001"
    policies = {one["spec"]: one for one in found["policies"]}
    assert set(policies) >= {"full", "int8", "int4", "latent:50%", "latent:25%", "evict:50"}
    assert ("input" in policies) == (name == "neox")
    for spec, one in policies.items():
        full = policies["full"]
        for held, own in zip(one["cache"], full["cache"], strict=True):
            # Heads are so narrow here that an index or a score weighs beside a key.
            assert held["logical"] <= 1.3 * own["logical"], spec
        assert math.isfinite(one["loss"])
        assert one["kl"] >= -1e-6
    assert policies["full"]["kl"] == pytest.approx(0, abs=1e-9)
    assert policies["full"]["same_tokens"] == 1
    assert policies["int8"]["kl"] < 1e-3
    stored = Compression.model_validate_json((run / "result.json").read_bytes())
    assert [one.spec for one in stored.policies] == list(policies)
    page, plain = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "At a quarter of the cache, " in page
    assert "At 50% of the cache, " in plain
    assert found["command"] in plain
    assert "<script" not in page
    assert (run / "figures" / "frontier.png").stat().st_size > 1000
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before

    # What was chosen is used; the command measured what the model now holds.
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("7 of 1. " * 25, return_tensors="pt").input_ids
    chosen = next(spec for spec in policies if spec.startswith("window") and "+" not in spec)
    with CompressedCache(loaded, chosen) as policy:
        cache = policy.new_cache()
        made = loaded.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > ids.shape[1]
    assert cache_bytes(cache).logical == policies[chosen]["cache"][-1]["logical"]

    # It is healed, and what comes of it decodes by its policy wherever it is opened.
    policy, train = HEALED[name]
    options = ["--tokens", 2000, "--sequence-length", 64, "--batch-size", 4, "--out", out]
    options += ["--learning-rate", 3e-4, "--loss", 0, "--train", train, "--text", text]
    code, stdout, stderr = command("heal", model, "--policy", policy, *options, "--json")
    assert (code, stderr) == (0, "")
    done = json.loads(stdout)
    result, checkpoint = done["result"], done["checkpoint"]
    healing = result["healing"]
    assert (healing["policy"], healing["train"]) == (policy, train)
    assert healing["full"]["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < healing["after"]["kl"] < healing["before"]["kl"]
    assert healing["share"] < 0.6
    assert (result["parameters_trainable"] < result["parameters_total"]) == (train != "all")
    assert "KL after" in Path(done["report"]["report.md"]).read_text()
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    opened = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert (opened.config.cache_policy, opened.dtype) == (policy, loaded.dtype)
    assert not any("lora" in key for key in opened.state_dict())
    made = opened.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    held = cache_bytes(made.past_key_values).logical
    plain = loaded.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert held < 0.6 * cache_bytes(plain.past_key_values).logical
    prompt = "7 of 1. " * 5
    code, stdout, _ = command("generate", checkpoint, prompt, "--max-new-tokens", 4, "--json")
    assert (code, json.loads(stdout)["tokens"]) == (0, 4)
    told = ["--corpus", text, "--samples", 2, "--cache-lengths", "64", "--json"]
    code, stdout, _ = command("eval", checkpoint, *told)
    assert code == 0
    assert json.loads(stdout)["architecture"] == "compressed"
    code, _, stderr = command("compress", checkpoint, "--text", text)
    assert code == 2
    assert f"keeps a policy of its own, {policy}" in stderr.splitlines()[-1]


def test_asked_for_policies_are_measured_and_printed(
    tmp_path: Path, saved: Callable[..., Path], text: str, command: Command
) -> None:
    model = saved(tmp_path / "llama", CONFIGS["llama"])
    specs = ["--policies", "window:20,sinks:2 latent:25%", "--policies", "window:20+int8"]
    options = ["--text", text, "--lengths", "60,240", "--read", "100", "--out", tmp_path / "runs"]
    code, stdout, stderr = command("compress", model, *specs, *options)
    assert code == 0
    for spec in ("full", "window:20,sinks:2", "latent:25%", "window:20+int8"):
        assert spec in stdout
    assert "of weights to load" in stderr.splitlines()[0]
    assert "4/4 window:20+int8: " in stderr
    run = tmp_path / "runs" / "compress-llama-001"
    assert "--lengths 60,240 --read 100" in (run / "report.md").read_text()
    found = Compression.model_validate_json((run / "result.json").read_text())
    full, window, *_ = found.policies
    assert [held.tokens for held in full.cache] == [60, 100, 240]
    assert found.tokens == full.positions[-1].last == 100
    assert window.share == window.cache[1].logical / full.cache[1].logical
    assert full.cache[2].logical == 2.4 * full.cache[1].logical
    assert window.cache[2].logical == window.cache[1].logical


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compress", "--policies", "windw:3"], "unknown policy 'windw'"),
        (["compress", "--policies", "input"], "would keep 32 numbers"),
        (["compress", "--lengths", "9000"], "--lengths 9000: more than the model's 256 positions"),
        (["compress", "--lengths", "few"], "--lengths 'few': expected token counts"),
        (
            ["compress", "--lengths", "99", "--read", "100"],
            "--read 100: more than the longest of --lengths",
        ),
        (["compress", "--budget", "2"], "--budget '2': expected shares between 0 and 1"),
        (["compress", "--text", "nothing"], "unknown corpus 'nothing'"),
        (
            ["heal", "--policy", "evict:20"],
            "policy evict:20 cannot be healed: it drops or rounds tokens",
        ),
        (["heal", "--policy", "latent:9999"], "policy latent:9999: 9999 numbers a token"),
        (
            ["heal", "--policy", "window:9", "--train", "policy"],
            "window:9 has nothing of its own to train",
        ),
        (["heal", "--policy", "window:9", "--tokens", "9000000"], "tokens to train on, fewer than"),
        (
            ["heal", "--policy", "window:9", "--sequence-length", "999", "--tokens", "2000"],
            "more than the model's 256 positions",
        ),
        (
            ["heal", "--policy", "window:9", "--kl", "0", "--loss", "0"],
            "nothing would be minimised",
        ),
        (["heal", "--policy", "window:9", "--kl", "inf"], "--kl inf: expected a finite number"),
        (["heal", "--policy", "window:9", "--learning-rate", "0"], "--learning-rate 0.0: expected"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(
    options: list[str],
    message: str,
    tmp_path: Path,
    saved: Callable[..., Path],
    text: str,
    command: Command,
) -> None:
    name, *given = options
    model, out = saved(tmp_path / "llama", CONFIGS["llama"]), tmp_path / "runs"
    code, _, stderr = command(name, model, "--text", text, "--out", out, *given)
    assert code == 2
    assert message in stderr.splitlines()[-1]
    assert not out.exists()


def test_weights_that_are_missing_are_told_before_a_run_begins(
    tmp_path: Path, saved: Callable[..., Path], text: str, command: Command
) -> None:
    model, out = saved(tmp_path / "llama", CONFIGS["llama"]), tmp_path / "runs"
    (model / "model.safetensors").unlink()
    options = ["--policy", "window:9", "--tokens", 900, "--sequence-length", 64, "--out", out]
    code, _, stderr = command("heal", model, *options, "--text", text)
    assert code == 2
    assert "model.safetensors is missing" in stderr.splitlines()[-1]
    assert list(out.glob("*")) == []


def test_positions_that_are_learned_suffice_to_calibrate_and_to_decode_in(
    tmp_path: Path, saved: Callable[..., Path], text: str, command: Command
) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 100}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = saved(tmp_path / "gpt2", GPT2Config(vocab_size=257, **sizes, **ends))
    options = ["--text", text, "--lengths", "100", "--out", tmp_path / "runs"]
    code, _, stderr = command("compress", model, "--policies", "latent:25%", *options)
    assert code == 0, stderr


def test_a_model_that_is_nowhere_is_a_clear_error(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: False)
    code, _, stderr = command("compress", "somebody/no-such-model-here")
    assert code == 1
    assert "no folder here: the hub" in stderr
    code, _, stderr = command("heal", "", "--policy", "window:9")
    assert (code, stderr) == (2, "contextlm: error: model '': no such folder\n")
    code, _, stderr = command("compress", "no/such/folder")
    assert code == 2
    assert "no such folder" in stderr


def test_budgets_are_shares() -> None:
    assert read_budgets("0.25,0.5,0.25") == [0.5, 0.25]
    for text in ("", "1", "0", "-0.5", "nan", "a quarter"):
        with pytest.raises(InputError, match="expected shares between 0 and 1"):
            read_budgets(text)


def test_policies_are_listed(command: Command) -> None:
    code, stdout, _ = command("list", "policies", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(stdout)["policies"]}
    assert listed["window"]["settings"] == ["window", "sinks"]
    assert all(entry["description"].endswith(".") for entry in listed.values())


# --- what is said of figures ------------------------------------------------------------


def figures(spec: str, share: float, kl: float, loss: float, found: float) -> PolicyFigures:
    held = round(2**20 * share)
    return PolicyFigures(
        spec=spec,
        name=spec.partition(":")[0],
        share=share,
        cache=[CacheBytes(tokens=100, logical=held, resident=held)],
        positions=[Bucket(first=0, last=100, loss=loss)],
        loss=loss,
        kl=kl,
        same_tokens=0.9,
        passkey={"0.1": found, "0.9": found},
        prefill_tokens_per_second=100,
        decode_tokens_per_second=10,
        seconds=1,
    )


def compression(*policies: PolicyFigures, budgets: tuple[float, ...] = (0.25,)) -> Compression:
    return Compression(
        model="m",
        model_type="llama",
        parameters=1,
        dtype="float32",
        corpus="notes",
        tokens=100,
        calibration_tokens=10,
        budgets=list(budgets),
        command="contextlm compress m",
        policies=[figures("full", 1, 0, 2, 1), *policies],
    )


def test_the_answer_names_what_costs_least_and_what_finds_most() -> None:
    found = compression(
        figures("window:20", 0.24, 0.05, 2 + math.log(1.1), 0.5),
        figures("evict:25", 0.26, 0.2, 2 + math.log(1.3), 1),
        figures("int8", 0.5, 0.01, 2, 1),
        budgets=(0.5, 0.25, 0.01),
    )
    half, quarter, hundredth = answers(found)
    assert "At 50% of the cache, int8 costs 0.0% of perplexity" in half
    assert "At a quarter of the cache, window:20 costs +10.0% of perplexity (KL 0.05" in quarter
    assert quarter.endswith("; evict:25 finds most: 100.0%.")
    assert hundredth == "At 1% of the cache there is nothing: no policy is as small."
    assert [table.rows[1][0] for table in tables(found)] == ["window:20"] * 3
    drawn = frontier(found)
    assert drawn is not None
    step = drawn[1].to_dict(validate=False)["layer"][0]["data"]["values"]
    assert [point["x"] for point in step] == pytest.approx([0.24, 0.5], rel=1e-3)


def test_a_passkey_stands_where_it_is_said_and_the_prompt_has_its_length(
    tmp_path: Path, saved: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path / "m", CONFIGS["llama"]))
    text_T = torch.arange(2000) % 20 + 65
    for made in passkeys(tokenizer, text_T, 300, [0.1, 0.9]):
        prompt: Any = tokenizer.decode(made.prompt_1T[0])
        digits = tokenizer.decode(made.answer_T).strip()
        assert len(digits) == 5
        assert prompt.count(digits) == 2
        assert prompt.endswith("The pass key is")
        assert made.prompt_1T.shape[1] + len(made.answer_T) == 300
        noise = 300 - len(prompt[prompt.index(" The pass key is") :]) - len(made.answer_T)
        assert abs(prompt.index(" The pass key is") / (300 - 120) - made.depth) < 0.2
        assert noise >= 0
