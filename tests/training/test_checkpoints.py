"""Sealed checkpoints: whole, damaged, refused by the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from contextlm.base.errors import RunError
from contextlm.training.checkpoints import (
    SUM,
    TENSORS,
    Checkpoints,
    optimizer_tensors,
    restore_optimizer,
)


def make(folder: Path, *numbers: int, told: list[str] | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, "step", [].append if told is None else told.append)
    for number in numbers:
        groups = {"a": {"x.y": torch.arange(300.0)}, "ab": {"z": torch.tensor(number)}}
        checkpoints.write(number, groups, {"number": number}, keep={1})
    return checkpoints


def test_what_was_written_comes_back_by_group(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 9, 10)
    assert checkpoints.whole() == [10, 9]  # by number, not by name
    assert checkpoints.record(9) == {"number": 9}
    assert checkpoints.tensors(9, "a").keys() == {"x.y"}
    assert torch.equal(checkpoints.tensors(9, "a")["x.y"], torch.arange(300.0))
    assert checkpoints.tensors(10, "ab")["z"].item() == 10
    assert {path.name for path in checkpoints.place(9).iterdir()} == {TENSORS, SUM}  # no pickle
    assert make(tmp_path / "nowhere").whole() == []


def spoil_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [(spoil_a_bit, TENSORS), (Path.unlink, TENSORS), (Path.unlink, SUM)],
    ids=["a bit", "gone", "sum gone"],
)
def test_a_damaged_one_is_named_and_left_aside(tmp_path: Path, spoil, name) -> None:
    told: list[str] = []
    checkpoints = make(tmp_path, 1, 2, told=told)
    file = checkpoints.place(2) / name
    spoil(file)
    assert checkpoints.whole() == [1]
    assert len(told) == 1
    assert str(file) in told[0]
    assert not checkpoints.place(2).exists()


def test_two_and_the_named_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-x").mkdir()  # not ours
    assert make(tmp_path, 1, 2, 3, 4).whole() == [4, 3, 1]


def test_a_full_disk_is_named_with_the_checkpoint_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    def refuse(*args: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(RunError, match=r"step-3: could not be written: No space left on device"):
        make(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_an_optimiser_takes_the_step_that_it_would_have_taken() -> None:
    def steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ours, theirs = (torch.optim.Adam(model.parameters(), fused=True) for model in (one, other))
    steps(ours, one, 3)
    other.load_state_dict(one.state_dict())
    restore_optimizer(theirs, {k: v.clone() for k, v in optimizer_tensors(ours).items()})
    steps(ours, one, 2)
    steps(theirs, other, 2)
    assert torch.equal(one.weight, other.weight)
