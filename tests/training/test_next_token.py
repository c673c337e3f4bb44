"""Phase 2: the loop against plain forms of it, and the documents' protocols."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import nn

from contextlm.base.errors import NotFiniteError
from contextlm.data.windows import Windows
from contextlm.models.build import build_config, create_model
from contextlm.recipe.settings import TrainingSettings
from contextlm.training.next_token import next_token_loss, train_next_token
from contextlm.training.phase_two_state import Epoch

CPU = torch.device("cpu")
NEOX = {
    "type": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CONTEXT = {
    "type": "context_pythia",
    "hidden_size": 16,
    "context_dim": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VOCABULARY = 19


class Watcher:
    def __init__(self):
        self.losses, self.rates, self.epochs, self.best = [], [], [], []
        self.tokens = 0

    def on_epoch_begin(self, number: int, epochs: int, steps: int) -> None:
        assert number == len(self.epochs) + 1 <= epochs
        assert steps * (number - 1) == len(self.losses)

    def on_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        self.losses.append(loss)
        self.rates.append(learning_rate)
        assert step == len(self.losses)
        assert tokens > self.tokens
        self.tokens = tokens

    def on_epoch_end(self, epoch: Epoch, best: bool) -> None:
        self.epochs.append(epoch)
        self.best.append(best)


def make_windows(count: int = 12, length: int = 8) -> Windows:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, count * length + 1).astype(np.uint16)
    return Windows(tokens, length)


def scripted(losses):
    """An evaluation that returns these losses in turn, and remembers the head at each."""
    seen = []

    def evaluate(model: nn.Module):
        seen.append(model.get_output_embeddings().weight.detach().clone())
        return {"loss": losses[len(seen) - 1], "accuracy": 0.5}

    return evaluate, seen


def train(
    tmp_path,
    evaluate,
    settings=None,
    fields=NEOX,
    precision="float32",
    seed=0,
    windows=None,
    make_loss=None,
):
    model = create_model(build_config(fields, VOCABULARY), seed)
    watcher = Watcher()
    outcome = train_next_token(
        model,
        make_windows() if windows is None else windows,
        settings or TrainingSettings(batch_size=4, epochs=5, learning_rate=1e-2),
        evaluate,
        seed=seed,
        device=CPU,
        precision=precision,
        folder=tmp_path,
        watcher=watcher,
        tell=print,
        make_loss=make_loss,
    )
    return model, outcome, watcher


@pytest.mark.parametrize("fields", [NEOX, CONTEXT], ids=["gpt_neox", "context_pythia"])
@pytest.mark.parametrize(
    ("losses", "patience", "trained", "best"),
    [
        ([3.0, 2.0, 2.5, 1.0, 1.0], 1, 3, 2),
        ([3.0, 3.1, 2.0, 2.2, 2.1], 2, 5, 3),
        ([1.0, 2.0, 3.0, 3.0, 3.0], None, 5, 1),
    ],
)
def test_patience_stops_it_and_the_best_epoch_is_restored(
    tmp_path, fields, losses, patience, trained, best
):
    evaluate, heads = scripted(losses)
    settings = TrainingSettings(batch_size=4, epochs=5, learning_rate=1e-2, patience=patience)
    model, outcome, watcher = train(tmp_path, evaluate, settings, fields=fields)
    assert [e.validation_loss for e in outcome.epochs] == losses[:trained]
    assert outcome.best_epoch == best
    assert watcher.best == [loss == min(losses[: i + 1]) for i, loss in enumerate(losses[:trained])]
    assert len(watcher.losses) == 3 * trained
    assert torch.equal(model.get_output_embeddings().weight, heads[best - 1])
    assert not torch.equal(heads[best - 1], heads[best])


def plain_loop(settings: TrainingSettings, order, epochs: int):
    """The same training written out."""
    model = create_model(build_config(NEOX, VOCABULARY), 0)
    windows = make_windows()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.decay_rate()
    )
    losses = []
    for _ in range(epochs):
        for start in range(0, len(order), settings.batch_size):
            items = [windows[i] for i in order[start : start + settings.batch_size]]
            ids = torch.stack([item["input_ids"] for item in items])
            labels = torch.stack([item["labels"] for item in items])
            loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            if settings.clip:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_plain_loop(tmp_path, clip, accumulation):
    settings = TrainingSettings(
        batch_size=4, epochs=2, learning_rate=1e-2, shuffle=False, clip=clip, patience=None,
        accumulation=accumulation,
    )  # fmt: skip
    evaluate, _ = scripted([2.0, 1.0])
    model, outcome, watcher = train(tmp_path, evaluate, settings)
    expected, losses = plain_loop(settings, range(12), 2)
    # Functions are compared, not weights: the biases of keys have no effect on attention, so their
    # gradients are rounding noise, which Adam blows up to full steps.
    ids = torch.stack([item["input_ids"] for item in make_windows()])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert watcher.losses == outcome.losses == pytest.approx(losses, abs=1e-4)
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [e.train_loss for e in outcome.epochs] == pytest.approx(means, abs=1e-4)


def test_every_epoch_has_its_own_order_of_all_windows(tmp_path):
    """That of accelerate's sampler, by which figures of all versions compare."""
    sampler = SeedableRandomSampler(range(12), data_seed=5)
    seen = []

    class Recording(Windows):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    windows = make_windows()
    windows.__class__ = Recording
    evaluate, _ = scripted([2.0, 1.0])
    settings = TrainingSettings(batch_size=5, accumulation=1, epochs=2)
    train(tmp_path, evaluate, settings, seed=5, windows=windows)
    assert seen == [*sampler, *sampler]
    assert seen[:12] != seen[12:]


def test_the_rate_follows_the_schedule_step_by_step(tmp_path):
    evaluate, _ = scripted([2.0, 1.0])
    settings = TrainingSettings(
        batch_size=5, epochs=2, learning_rate=0.6, schedule="linear", drop_last=True
    )
    _, outcome, watcher = train(tmp_path, evaluate, settings)
    assert watcher.rates == pytest.approx([0.6, 0.45, 0.3, 0.15])  # 12 windows: two whole batches
    assert [e.learning_rate for e in outcome.epochs] == pytest.approx([0.45, 0.15])


def test_every_position_has_a_target_and_ignored_ones_do_not_count():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [4, -100, 0]])
    rows = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4), (1, 2, 0)]
    expected = -sum(logits[b, t].log_softmax(0)[y] for b, t, y in rows)
    torch.testing.assert_close(next_token_loss(logits, labels, 5), expected / 5)
    torch.testing.assert_close(next_token_loss(logits, labels, 10), expected / 10)


def test_frozen_parameters_stay_and_others_move(tmp_path):
    before = create_model(build_config(CONTEXT, VOCABULARY), 0)
    evaluate, _ = scripted([1.0, 0.9])
    settings = TrainingSettings(batch_size=4, epochs=2, learning_rate=1e-2)
    model, _, _ = train(tmp_path, evaluate, settings, fields=CONTEXT)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == ("context_block" in name), name


def test_bfloat16_is_for_training_only(tmp_path):
    types = []

    def evaluate(model: nn.Module):
        with torch.no_grad():
            types.append(model(torch.tensor([[1, 2]])).logits.dtype)
        return {"loss": 1.0, "accuracy": 0.0}

    settings = TrainingSettings(batch_size=4, epochs=1)
    model, _, _ = train(tmp_path, evaluate, settings, precision="bfloat16")
    types.append(model(torch.tensor([[1, 2]])).logits.dtype)
    assert types == [torch.float32, torch.float32]
    assert model.dtype == torch.float32


def test_what_is_minimised_must_be_finite_whatever_is_told(tmp_path):
    class Loss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, labels_BT, targets, **arguments):
            logits_BTV = self.model(**arguments, use_cache=False).logits
            return logits_BTV.sum() * math.nan, torch.tensor(1.0)

    evaluate, _ = scripted([1.0])
    settings = TrainingSettings(batch_size=4, epochs=1)
    with pytest.raises(NotFiniteError, match="training loss is nan at step 1"):
        train(tmp_path, evaluate, settings, make_loss=Loss)


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    evaluate, _ = scripted([math.nan])
    with pytest.raises(NotFiniteError, match="validation loss is nan"):
        train(tmp_path, evaluate)
