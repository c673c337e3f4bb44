"""The walk of a researcher: a mixer in a file outside the package, from its check to the paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from contextlm.cli import app
from contextlm.cli.shell import execute

TEXT = "\n".join(f"Line {n} of a text has {n * n % 97} words and {n % 7} ends." for n in range(900))
RECIPE = """
name: delta
question: Does a gated delta rule need keys and values?
corpus: text:notes.txt
tokenizer: bpe:300
sequence_length: 16
samples: {train: 24, validation: 6}
training: {batch_size: 8, epochs: 1, precision: float32}
evaluation: {cache_lengths: [16], speed_tokens: 8}
contenders:
  - name: attention
    baseline: true
    model: {type: llama, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
            num_key_value_heads: 2, intermediate_size: 48}
  - name: delta
    model: {type: gated_delta, hidden_size: 16, num_attention_heads: 2}
    match: {field: intermediate_size, within: 0.02}
"""


@pytest.fixture
def command(forget_outside, tmp_path, monkeypatch, capsys):
    """Run a command line in a folder with the researcher's file, recipe and text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    shutil.copy(Path(__file__).parent / "lab" / "gated_delta.py", tmp_path)
    Path("notes.txt").write_text(TEXT, "utf-8")
    Path("delta.yaml").write_text(RECIPE, "utf-8")

    def run(*arguments: str, code: int = 0) -> str:
        found = execute(app, arguments)
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.err if code else captured.out

    return run


def test_a_mixer_of_ones_own_goes_from_its_check_to_a_table_for_a_paper(command, forget_outside):
    mine = ["--import", "gated_delta.py"]
    some = "future or pieces or padding or hidden_states or save or gradients"
    assert " failed" not in command("check", "gated_delta.py", "--only", some)
    forget_outside()  # each command is a process of its own
    assert "unknown model type 'gated_delta'" in command("params", "delta.yaml", code=2)
    counts = json.loads(command("params", "delta.yaml", *mine, "--json"))["contenders"]
    assert abs(counts[1]["versus_baseline_percent"]) <= 2
    width = counts[1]["matched"]["intermediate_size"]
    assert f"intermediate_size {width}" in command("params", "delta.yaml", *mine)

    forget_outside()
    done = json.loads(command("run", "delta.yaml", *mine, "--device", "cpu", "--json"))
    run = Path(done["run"])
    environment = json.loads((run / "environment.json").read_text())
    source = environment["architectures"]["gated_delta"]
    job = json.loads((run / "delta" / "seed-0" / "job.json").read_text())["decides"]
    assert source.endswith(f"gated_delta.py (sha256 {job['code']['gated_delta']})")
    assert job["model"]["intermediate_size"] == width
    assert "code" not in json.loads((run / "attention/seed-0/job.json").read_text())["decides"]

    forget_outside()
    more = ["run", "delta.yaml", "--seeds", "2", "--into", str(run), "--device", "cpu"]
    assert "it was begun with gated_delta: give --import" in command(*more, code=2)
    command(*more, *mine)
    assert (run / "delta" / "seed-1" / "result.json").is_file()
    checkpoint = str(run / "delta" / "seed-1" / "checkpoint")
    forget_outside()
    assert "unknown model type" in command("eval", checkpoint, code=2)
    assert "gated_delta" in command(
        "eval", checkpoint, *mine, "--corpus", "text:notes.txt", "--samples", "2",
        "--sequence-length", "16", "--cache-lengths", "16", "--device", "cpu",
    )  # fmt: skip
    assert command("generate", checkpoint, "Line", *mine, "--max-new-tokens", "3")

    forget_outside()
    Path("gated_delta.py").write_text(Path("gated_delta.py").read_text() + "\n# changed\n")
    changed = command(*more, *mine, code=2)
    assert "delta, seed 0: not the one that the run holds: code.gated_delta differs" in changed

    forget_outside()  # a report reads results and needs no code
    command("report", str(run), "--format", "csv,latex")
    assert "delta" in (run / "report.csv").read_text()
    assert "delta" in (run / "report.tex").read_text()
