"""What one process and several do alike; torchrun runs this file on two, the test on one.

Each part leaves its outcome in a file of `OUT`, written by rank 0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import contextlm
from contextlm.base import distribution
from contextlm.cli import app
from contextlm.cli.shell import execute, leave
from contextlm.data.windows import Windows
from contextlm.evaluation.quality import evaluate_quality, evaluator
from contextlm.models.build import build_config, create_model
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import PhaseOneSettings, TrainingSettings
from contextlm.training import next_token
from contextlm.training.next_token import train_next_token
from contextlm.training.oacd import train_context_block

CPU = torch.device("cpu")
VOCABULARY = 30

RECIPE = """
name: tiny
question: Is one process like two?
corpus: pydocs
tokenizer: bpe:300
sequence_length: 16
documents: {train: 4, validation: 2}
tokens: {train: 900, validation: 300}
context_store: {fill: sequential}
embedding: {source: learned, layers: 1, sequence_length: 16, batch_size: 4}
training:
  {learning_rate: 1.0e-2, batch_size: 6, accumulation: 3, epochs: 2, clip: 0.5, precision: float32}
evaluation: {batch_size: 5, cache_lengths: [16], speed_tokens: 8}
contenders:
  - name: tokens
    baseline: true
    model: &model
      {type: context_kv, memory: tokens, hidden_size: 16, context_dim: 8, num_attention_heads: 2,
       interval: 4, max_contexts: 3, attention_dropout: 0.0}
  - name: contexts
    model: {<<: *model, memory: contexts}
    phase1: {max_iterations: 4, batch_size: 130}
"""

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# In the last the representatives are never read, so some parameters get no gradient at all.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "context_pythia": {"type": "context_pythia", "stream": "compressed", **SMALL, "context_dim": 8},
    "context_token": {
        "type": "context_token",
        "hidden_size": 16,
        "context_dim": 8,
        "num_hidden_layers": 2,
    },
    "dual_context": {"type": "dual_context", **SMALL, "window": 64, "dropout": 0.0},
}
# The last batch is incomplete, and too small for each micro-batch, or for each rank, to get a part.
SETTINGS = {
    "shuffled": TrainingSettings(
        learning_rate=1e-2, batch_size=4, epochs=2, clip=0.5, precision="float32"
    ),
    "in order": TrainingSettings(
        learning_rate=1e-2,
        batch_size=8,
        accumulation=2,
        epochs=2,
        shuffle=False,
        schedule="cosine",
        precision="float32",
        optimizer="adam",
    ),
}
# Positions of the stream (four batches, one) and layers of the block.
STREAMS = {"parts": (61, 17, 2), "one batch": (40, 50, 1)}


class _Nobody:
    def on_epoch_begin(self, number: int, steps: int) -> None: ...
    def on_step(self) -> None: ...
    def on_epoch_end(self, epoch: object, best: bool) -> None: ...


def train(model: str, settings: TrainingSettings, folder: Path) -> dict[str, Any]:
    """Phase 2 on 13 windows, which no batch size above divides."""
    text = np.random.default_rng(3).integers(0, VOCABULARY, 13 * 12 + 1)
    built = create_model(build_config(MODELS[model], VOCABULARY), 5)
    outcome = train_next_token(
        built,
        Windows(text, 12),
        settings,
        evaluator(Windows(text[::-1].copy(), 12), 3, CPU),
        seed=7,
        device=CPU,
        precision="float32",
        folder=folder / "work",
        watcher=_Nobody(),
    )
    epochs = [(e.train_loss, e.validation_loss, e.accuracy) for e in outcome.epochs]
    weights = {name: value.detach().clone() for name, value in built.state_dict().items()}
    return {"epochs": torch.tensor(epochs, dtype=torch.float64), "weights": weights}


def score() -> tuple[float, float, int]:
    """Five windows in batches of two: three batches, which two ranks cannot share equally."""
    text = np.random.default_rng(4).integers(0, VOCABULARY, 5 * 12 + 1)
    model = create_model(build_config(GPT2, VOCABULARY), 5).double()
    quality = evaluate_quality(model, Windows(text, 12), 2, CPU)
    return quality.loss, quality.accuracy, quality.tokens


def phase_one(stream: str, dtype: torch.dtype) -> dict[str, Any]:
    """Phase 1 on a random stream."""
    positions, size, layers = STREAMS[stream]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        block = ContextBlock(5, 7, layers)
        table = F.layer_norm(torch.randn(11, 7), (7,))
        tokens = np.random.default_rng(0).integers(0, 11, positions).astype(np.uint16)
        settings = PhaseOneSettings(batch_size=size, max_iterations=6, threshold=0.3, stop_at=1.0)
        outcome = train_context_block(
            block, lambda ids: table[ids], tokens, settings, seed=4, device=CPU
        )
    finally:
        torch.set_default_dtype(torch.float32)
    rows = [(i.converged, i.loss or 0.0) for i in outcome.iterations]
    return {
        "contexts": outcome.contexts_PC,
        "rows": torch.tensor(rows, dtype=torch.float64),
        "weights": {name: value.detach() for name, value in block.state_dict().items()},
    }


def everything(out: Path) -> dict[str, Any]:
    """All parts but the command, by name."""
    done: dict[str, Any] = {"score": score()}
    for stream in STREAMS:
        for dtype in (torch.float32, torch.float64):
            done[f"phase 1, {stream}, {dtype}"] = phase_one(stream, dtype)
    for model in MODELS:
        done[f"phase 2, {model}"] = train(model, SETTINGS["shuffled"], out)
    done["phase 2, in order"] = train("gpt2", SETTINGS["in order"], out)
    return done


def sharded(out: Path) -> dict[str, Any]:
    """Phase 2 with FSDP2, on processors: accelerate is told that they are accelerators."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # Sharding frees gathered weights by emptying their storage, which numpy's views of it prevent.
    os.environ["CONTEXTLM_BACKEND"] = "eager"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    next_token.check_processes = lambda *_: None
    settings = SETTINGS["shuffled"].model_copy(update={"distributed": "fsdp2"})
    return {f"phase 2, {model}": train(model, settings, out) for model in MODELS}


def main() -> None:
    out = Path(sys.argv[1])
    assert contextlm.__version__
    with distribution.joined(CPU):
        arguments = ["run", str(out / "tiny.yaml"), "--out", str(out / "runs"), "--device", "cpu"]
        assert execute(app, arguments) == 0
        done, in_shares = everything(out), sharded(out)
        if distribution.is_main():
            torch.save({"done": done, "sharded": in_shares}, out / "done.pt")
    leave(0)


if __name__ == "__main__":
    main()
