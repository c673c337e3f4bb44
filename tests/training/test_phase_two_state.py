"""Phase 2 resumes to the bit, whenever its process was killed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal

import pytest
import torch
from test_next_token import CPU, NEOX, VOCABULARY, Watcher, make_windows
from torch import nn

from contextlm.base.errors import NotFiniteError
from contextlm.base.interrupts import Deferred
from contextlm.models.build import build_config, create_model
from contextlm.recipe.settings import TrainingSettings
from contextlm.training import phase_two_state
from contextlm.training.checkpoints import Checkpoints
from contextlm.training.next_token import train_next_token
from contextlm.training.phase_two_state import Epoch, PhaseTwo, PhaseTwoState


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


class KillingWatcher(Watcher):
    """Calls a function at one step."""

    def __init__(self, step: int, what):
        super().__init__()
        self.step, self.what = step, what

    def on_step(self, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        super().on_step(step, loss, learning_rate, tokens)
        if step == self.step:
            self.what()


DROPPING = {**NEOX, "attention_dropout": 0.1, "hidden_dropout": 0.1}
RESUMED = TrainingSettings(
    batch_size=4, accumulation=2, epochs=4, learning_rate=1e-2, patience=2, schedule="cosine"
)


def kill() -> None:
    raise Killed


def resumable(folder, watcher=None):
    """12 windows make 3 steps an epoch. The second of four epochs is the best, the last is left."""
    model = create_model(build_config(DROPPING, VOCABULARY), 0)
    script = {3: 3.0, 6: 2.0, 9: 2.5, 12: 2.6}
    told: list[str] = []

    def evaluate(model: nn.Module):
        # By a count of steps, which a resumed run has not made itself.
        return {"loss": script[3 * (len(watcher.epochs) + 1)], "accuracy": 0.5}

    watcher = watcher or Watcher()
    outcome = train_next_token(
        model, make_windows(), RESUMED, evaluate, seed=0, device=CPU, precision="float32",
        folder=folder, watcher=watcher, tell=told.append,
    )  # fmt: skip
    epochs = [dataclasses.replace(epoch, seconds=0) for epoch in outcome.epochs]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert watcher.losses == outcome.losses  # all are told, those before a kill too
    assert [epoch.tokens for epoch in epochs] == [96 * epoch.number for epoch in epochs]
    return (epochs, outcome.best_epoch, outcome.losses, weights), told


def same(one, other) -> bool:
    return one[:3] == other[:3] and torch.equal(one[3], other[3])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return resumable(tmp_path_factory.mktemp("whole"))[0]


def test_the_checkpoint_to_fall_back_on_keeps_its_best_weights(tmp_path):
    """Epoch 2 is worse than 1 and 3 better; with 3 damaged, 2 still needs the weights of 1."""
    model = create_model(build_config(NEOX, VOCABULARY), 0)
    optimizer = torch.optim.Adam(model.parameters())
    state = PhaseTwoState(tmp_path, CPU, Deferred(), lambda text: None)
    done = PhaseTwo()
    for number, loss in enumerate((1.0, 2.0, 0.5), 1):
        done.losses.append(loss)
        done.tokens.append(number)
        done.epochs.append(Epoch(number, number, number, loss, loss, 0.0, 1e-3, 0.1))
        state.save(model, optimizer, done)
    (tmp_path / "step-3" / "state.safetensors").write_bytes(b"damaged")
    back = state.restore(model, optimizer)
    assert [epoch.number for epoch in back.epochs] == [1, 2]
    assert back.best_epoch == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize(
    ("step", "inside"), [(1, False), (3, True), (5, True), (7, False), (7, True), (12, False)]
)
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
    assert told == ([f"resuming from {tmp_path / f'step-{saved}'}"] if saved else [])


def test_a_finished_training_is_told_again_and_not_trained_again(tmp_path, monkeypatch, whole):
    resumable(tmp_path)
    monkeypatch.setattr("contextlm.training.next_token._Stepper.take", None)
    watcher = Watcher()
    again, _ = resumable(tmp_path, watcher)
    assert same(again, whole)
    assert watcher.best == [True, True, False, False]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole):
    with pytest.raises(Killed):
        resumable(tmp_path, KillingWatcher(8, kill))
    file = tmp_path / "step-6" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    resumed, told = resumable(tmp_path)
    assert same(resumed, whole)
    assert str(file) in told[0]
    assert told[1] == f"resuming from {tmp_path / 'step-3'}"


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)])
def test_told_to_stop_it_writes_a_checkpoint_first(tmp_path, whole, number):
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, KillingWatcher(4, lambda: os.kill(os.getpid(), number)))
    resumed, told = resumable(tmp_path)
    assert same(resumed, whole)
    assert told[-1] == f"resuming from {tmp_path / 'step-4'}"


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
            folder=tmp_path, watcher=KillingWatcher(5, lambda: spoil(model)), tell=print,
        )  # fmt: skip
    assert caught.value.__notes__ == [f"the last good checkpoint is {tmp_path / 'step-3'}"]
    assert Checkpoints(tmp_path, "step", print).whole() == [3]
