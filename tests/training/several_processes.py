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
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import contextlm
from contextlm.base import distribution
from contextlm.cli import app
from contextlm.cli.shell import execute, leave
from contextlm.data.windows import Windows
from contextlm.evaluation.quality import evaluate_quality, evaluator
from contextlm.models.build import build_config, create_model
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import PhaseOneSettings, TrainingSettings
from contextlm.training.next_token import train_next_token
from contextlm.training.oacd import PhaseOneState, train_context_block

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


class _Nobody:
    def on_epoch_begin(self, number: int, epochs: int, steps: int) -> None: ...
    def on_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None: ...
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
        folder=folder,
        watcher=_Nobody(),
        tell=print,
    )
    epochs = [(e.train_loss, e.validation_loss, e.accuracy) for e in outcome.epochs]
    epochs_E3 = torch.tensor(epochs, dtype=torch.float64)
    losses = torch.tensor(outcome.losses, dtype=torch.float64)
    return {"epochs": epochs_E3, "losses": losses, "weights": _weights_of_last_rank(built)}


def score() -> tuple[float, float, int]:
    """Five windows in batches of two: three batches, which two ranks cannot share equally."""
    text = np.random.default_rng(4).integers(0, VOCABULARY, 5 * 12 + 1)
    model = create_model(build_config(GPT2, VOCABULARY), 5).double()
    quality = evaluate_quality(model, Windows(text, 12), 2, CPU)
    return quality.loss, quality.accuracy, quality.tokens


def phase_one(folder: Path) -> dict[str, Any]:
    """Phase 1 on a random stream, cut short after three iterations and resumed.

    Returns:
        What it gives on rank 0, and the block of the last rank.
    """
    table = F.layer_norm(torch.arange(77.0).sin().view(11, 7), (7,))
    tokens = np.random.default_rng(0).integers(0, 11, 61).astype(np.uint16)
    for iterations in (3, 6):
        torch.manual_seed(distribution.rank())
        block = ContextBlock(5, 7, 2)
        outcome = train_context_block(
            block,
            lambda ids: table[ids],
            tokens,
            PhaseOneSettings(batch_size=17, max_iterations=iterations, threshold=0.3, stop_at=1.0),
            seed=4,
            device=CPU,
            state=PhaseOneState(folder / "phase 1", print),
        )
    losses = torch.tensor([iteration.loss or 0.0 for iteration in outcome.iterations])
    weights = _weights_of_last_rank(block)
    return {"contexts": outcome.contexts_PC, "losses": losses, "weights": weights}


def _weights_of_last_rank(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return distribution.everyones(weights)[-1]


def everything(out: Path) -> dict[str, Any]:
    """All parts but the command, by name."""
    done: dict[str, Any] = {"score": score(), "phase 1": phase_one(out)}
    for model in MODELS:
        done[f"phase 2, {model}"] = train(model, SETTINGS["shuffled"], out / model)
    done["phase 2, in order"] = train("gpt2", SETTINGS["in order"], out / "in order")
    return done


def sharded(out: Path) -> dict[str, Any]:
    """Phase 2 as `accelerate launch` configures FSDP2, on processors said to be accelerators."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
        # Sharding frees gathered weights by emptying their storage, which numpy's views prevent.
        CONTEXTLM_BACKEND="eager",
    )
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {f"phase 2, {model}": train(model, SETTINGS["shuffled"], out) for model in MODELS}


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
