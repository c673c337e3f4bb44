"""Phase 2: the documents' protocols on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contextlm.base.errors import InputError, NotFiniteError, RunError
from contextlm.data.windows import Windows
from contextlm.models.build import build_config, create_model
from contextlm.recipe.settings import ParameterGroup, TrainingSettings
from contextlm.training import phase_two_state
from contextlm.training.checkpoints import damage
from contextlm.training.epochs import Epoch
from contextlm.training.next_token import train_next_token
from contextlm.training.optimisation import build_optimizer, build_schedule
from contextlm.training.trainer import next_token_loss

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
        self.steps, self.epochs, self.best = 0, [], []

    def on_epoch_begin(self, number: int, steps: int) -> None:
        self.expected_steps = steps

    def on_step(self) -> None:
        self.steps += 1

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


def train(tmp_path, evaluate, settings=None, fields=NEOX, precision="float32", seed=0):
    model = create_model(build_config(fields, VOCABULARY), seed)
    watcher = Watcher()
    outcome = train_next_token(
        model,
        make_windows(),
        settings or TrainingSettings(batch_size=4, epochs=5, learning_rate=1e-2),
        evaluate,
        seed=seed,
        device=CPU,
        precision=precision,
        folder=tmp_path,
        watcher=watcher,
    )
    return model, outcome, watcher


@pytest.mark.parametrize("fields", [NEOX, CONTEXT], ids=["gpt_neox", "context_pythia"])
def test_it_stops_at_the_first_worse_epoch_and_restores_the_best(tmp_path, fields):
    evaluate, heads = scripted([3.0, 2.0, 2.5, 1.0, 1.0])
    model, outcome, watcher = train(tmp_path, evaluate, fields=fields)
    assert [e.validation_loss for e in outcome.epochs] == [3.0, 2.0, 2.5]
    assert outcome.best_epoch == 2
    assert watcher.best == [True, True, False]
    assert watcher.steps == 9
    assert watcher.expected_steps == 3
    assert torch.equal(model.get_output_embeddings().weight, heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_patience_counts_epochs_without_improvement(tmp_path):
    evaluate, heads = scripted([3.0, 3.1, 2.0, 2.2, 2.1, 1.0])
    settings = TrainingSettings(batch_size=4, epochs=6, patience=2)
    model, outcome, _ = train(tmp_path, evaluate, settings)
    assert len(outcome.epochs) == 5
    assert outcome.best_epoch == 3
    assert torch.equal(model.get_output_embeddings().weight, heads[2])


def test_without_patience_every_epoch_is_trained(tmp_path):
    evaluate, _ = scripted([1.0, 2.0, 3.0])
    settings = TrainingSettings(batch_size=4, epochs=3, patience=None)
    _, outcome, _ = train(tmp_path, evaluate, settings)
    assert len(outcome.epochs) == 3
    assert outcome.best_epoch == 1


def plain_loop(settings: TrainingSettings, order, epochs: int):
    """The same training written out: what the Trainer must amount to."""
    model = create_model(build_config(NEOX, VOCABULARY), 0)
    windows = make_windows()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.decay_rate()
    )
    losses = []
    for _ in range(epochs):
        total = []
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
            total.append(loss.item())
        losses.append(sum(total) / len(total))
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_plain_loop(tmp_path, clip, accumulation):
    settings = TrainingSettings(
        batch_size=4, epochs=2, learning_rate=1e-2, shuffle=False, clip=clip, patience=None,
        accumulation=accumulation,
    )  # fmt: skip
    evaluate, _ = scripted([2.0, 1.0])
    model, outcome, _ = train(tmp_path, evaluate, settings)
    expected, losses = plain_loop(settings, range(12), 2)
    # Functions are compared, not weights: the biases of keys have no effect on attention, so their
    # gradients are rounding noise, which Adam blows up to full steps.
    ids = torch.stack([item["input_ids"] for item in make_windows()])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert [e.train_loss for e in outcome.epochs] == pytest.approx(losses, abs=1e-4)


def test_every_position_has_a_target_and_ignored_ones_do_not_count():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [4, -100, 0]])
    outputs = type("Outputs", (), {"logits": logits})
    rows = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4), (1, 2, 0)]
    expected = -sum(logits[b, t].log_softmax(0)[y] for b, t, y in rows)
    torch.testing.assert_close(next_token_loss(outputs, labels), expected / 5)
    torch.testing.assert_close(next_token_loss(outputs, labels, 10), expected / 10)


def test_frozen_parameters_stay_and_others_move(tmp_path):
    before = create_model(build_config(CONTEXT, VOCABULARY), 0)
    evaluate, _ = scripted([1.0, 0.9])
    settings = TrainingSettings(batch_size=4, epochs=2, learning_rate=1e-2)
    model, _, _ = train(tmp_path, evaluate, settings, fields=CONTEXT)
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == ("context_block" in name), name


def test_one_seed_gives_one_outcome(tmp_path):
    def weights(folder: str, seed: int):
        evaluate, _ = scripted([2.0, 1.0])
        settings = TrainingSettings(batch_size=4, epochs=2)
        model, _, _ = train(tmp_path / folder, evaluate, settings, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights("a", 1), weights("b", 1))
    assert not torch.equal(weights("c", 1), weights("d", 2))


def test_a_trained_model_still_decodes_with_a_cache(tmp_path):
    evaluate, _ = scripted([1.0])
    model, _, _ = train(tmp_path, evaluate, TrainingSettings(batch_size=4, epochs=1))
    assert model.config.use_cache is True


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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    evaluate, _ = scripted([1.0] * 5)
    settings = TrainingSettings(batch_size=4, epochs=5, learning_rate=1e30)
    with pytest.raises(RunError, match=r"training loss is (nan|inf) at step \d+"):
        train(tmp_path, evaluate, settings)


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    evaluate, _ = scripted([math.nan])
    with pytest.raises(RunError, match="validation loss is nan"):
        train(tmp_path, evaluate)


def rates(settings: TrainingSettings, steps_per_epoch: int, steps: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), settings)
    schedule = build_schedule(optimizer, settings, steps_per_epoch)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_per_epoch_equals_torchs_annealing():
    settings = TrainingSettings(
        learning_rate=0.5, schedule="cosine", schedule_unit="epoch", epochs=4
    )
    reference_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(reference_optimizer, T_max=4)
    expected = []
    for _ in range(4):
        expected += [reference_optimizer.param_groups[0]["lr"]] * 3
        reference_optimizer.step()
        reference.step()
    assert rates(settings, 3, 12) == pytest.approx(expected, abs=1e-12)


def test_constant_and_per_step_schedules():
    constant = TrainingSettings(learning_rate=0.5)
    assert rates(constant, 3, 5) == [0.5] * 5
    warm = TrainingSettings(learning_rate=0.5, warmup=2)
    assert rates(warm, 3, 4) == pytest.approx([0.0, 0.25, 0.5, 0.5])
    linear = TrainingSettings(learning_rate=0.4, schedule="linear", epochs=2)
    assert rates(linear, 2, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    floor = TrainingSettings(learning_rate=0.4, schedule="cosine", minimum_ratio=0.1, epochs=2)
    assert rates(floor, 50, 101)[-1] == pytest.approx(0.04)


def test_parameter_groups_and_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    settings = TrainingSettings(
        learning_rate=0.1,
        weight_decay=0.5,
        decay="matrices",
        parameter_groups=[ParameterGroup(match="2.*", learning_rate=0.7)],
    )
    optimizer = build_optimizer(model, settings)
    assert optimizer.param_groups[0]["lr"] == 0.1  # the rate that a history shows
    groups = {
        (g["lr"], g["weight_decay"]): sum(p.numel() for p in g["params"])
        for g in optimizer.param_groups
    }
    assert groups == {(0.1, 0.5): 12, (0.1, 0.0): 4 + 8, (0.7, 0.5): 8, (0.7, 0.0): 2}
    everything = build_optimizer(model, TrainingSettings(weight_decay=0.5)).param_groups
    assert [g["weight_decay"] for g in everything] == [0.5]
    plain = build_optimizer(model, TrainingSettings(optimizer="adam"))
    assert [g["weight_decay"] for g in plain.param_groups] == [0.0]


def test_a_group_that_matches_nothing_is_an_error():
    settings = TrainingSettings(parameter_groups=[ParameterGroup(match="nowhere.*")])
    with pytest.raises(InputError, match=r"'nowhere\.\*' matches no trainable parameter"):
        build_optimizer(nn.Linear(2, 2), settings)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


class KillingWatcher(Watcher):
    """Calls a function at one step."""

    def __init__(self, step: int, what):
        super().__init__()
        self.step, self.what = step, what

    def on_step(self) -> None:
        super().on_step()
        if self.steps == self.step:
            self.what()


DROPPING = {**NEOX, "attention_dropout": 0.1, "hidden_dropout": 0.1}
RESUMED = TrainingSettings(
    batch_size=4, accumulation=2, epochs=4, learning_rate=1e-2, patience=2, schedule="cosine"
)


def kill() -> None:
    raise Killed


def resumable(folder, watcher=None, settings=RESUMED):
    """12 windows make 3 steps an epoch. The second of four epochs is the best, the last is left."""
    model = create_model(build_config(DROPPING, VOCABULARY), 0)
    script = {3: 3.0, 6: 2.0, 9: 2.5, 12: 2.6}
    told: list[str] = []

    def evaluate(model: nn.Module):
        # By a count of steps, which a resumed run has not made itself.
        return {"loss": script[3 * (len(watcher.epochs) + 1)], "accuracy": 0.5}

    watcher = watcher or Watcher()
    outcome = train_next_token(
        model, make_windows(), settings, evaluate, seed=0, device=CPU, precision="float32",
        folder=folder, watcher=watcher, tell=told.append,
    )  # fmt: skip
    epochs = [dataclasses.replace(epoch, seconds=0) for epoch in outcome.epochs]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (epochs, outcome.best_epoch, weights), told


def same(one, other) -> bool:
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return resumable(tmp_path_factory.mktemp("whole"))[0]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("step", [1, 3, 5, 7, 12])
def test_a_killed_training_ends_bitwise_as_it_would_have(
    tmp_path, monkeypatch, whole, step, inside
):
    """Weights, epochs, stopping rule; inside epochs too, whose running loss is carried over."""
    monkeypatch.setattr(phase_two_state, "SAVE_SECONDS", 0.0 if inside else 600.0)
    with pytest.raises(Killed):
        resumable(tmp_path, KillingWatcher(step, kill))
    resumed, told = resumable(tmp_path)
    assert same(resumed, whole)
    saved = step - 1 if inside else (step - 1) // 3 * 3
    assert told == ([f"going on from {tmp_path / f'checkpoint-{saved}'}"] if saved else [])


def test_a_finished_training_is_not_trained_again(tmp_path, whole):
    resumable(tmp_path)
    watcher = Watcher()
    again, _ = resumable(tmp_path, watcher)
    assert same(again, whole)
    assert watcher.steps == 0
    assert watcher.best == [True, True, False, False]


def test_checkpoints_of_another_training_are_not_used(tmp_path, whole):
    resumable(tmp_path, settings=RESUMED.model_copy(update={"learning_rate": 1e-3}))
    again, told = resumable(tmp_path)
    assert same(again, whole)
    assert told == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole):
    with pytest.raises(Killed):
        resumable(tmp_path, KillingWatcher(8, kill))
    file = tmp_path / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    resumed, told = resumable(tmp_path)
    assert same(resumed, whole)
    assert str(file) in told[0]
    assert told[1] == f"going on from {tmp_path / 'checkpoint-3'}"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_writes_a_checkpoint_first(tmp_path, whole, number):
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, KillingWatcher(4, lambda: os.kill(os.getpid(), number)))
    resumed, told = resumable(tmp_path)
    assert same(resumed, whole)
    assert told[-1] == f"going on from {tmp_path / 'checkpoint-4'}"


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(math.nan)

    losses = iter([1.0])

    def evaluate(model: nn.Module):
        return {"loss": next(losses), "accuracy": 0.5}

    model = create_model(build_config(NEOX, VOCABULARY), 0)
    with pytest.raises(NotFiniteError, match="training loss is nan at step 6") as caught:
        train_next_token(
            model, make_windows(), RESUMED, evaluate, seed=0, device=CPU, precision="float32",
            folder=tmp_path, watcher=KillingWatcher(5, lambda: spoil(model)),
        )  # fmt: skip
    assert caught.value.__notes__ == [f"the last good checkpoint is {tmp_path / 'checkpoint-3'}"]
    assert damage(tmp_path / "checkpoint-3") is None


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_of_itself(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("torch.save", refuse)
    with pytest.raises(RunError, match=r"checkpoint-3: the checkpoint could not be written") as e:
        resumable(tmp_path)
    assert "\n" not in str(e.value)
    assert list(tmp_path.glob("checkpoint-*")) == []
