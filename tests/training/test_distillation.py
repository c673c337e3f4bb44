"""Healing's loss against the same written out, and that it does what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contextlm.data.windows import IGNORED
from contextlm.models.build import build_config, create_model
from contextlm.training import distillation
from contextlm.training.distillation import DistillationLoss

VOCABULARY = 53
NEOX = {"type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {
    "type": "gemma2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
}


def model(fields: dict[str, Any], seed: int) -> Any:
    made = create_model(build_config({**fields, "initializer_range": 0.5}, VOCABULARY), seed)
    return made.eval()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(VOCABULARY, (3, 14), generator=generator)
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[0, :5] = IGNORED
    return ids_BT[:, :-1], labels_BT


@pytest.mark.parametrize("fields", [NEOX, GEMMA], ids=["split head", "capped logits"])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_the_loss_and_its_gradients_are_those_written_out(
    fields: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_BLOCK", rows * VOCABULARY)
    ours, teacher = model(fields, 0), model(fields, 1)
    theirs = copy.deepcopy(ours)
    ids_BT, labels_BT = data()
    loss, told = DistillationLoss(ours, teacher, loss=0.7, kl=1.9)(labels_BT, 40, input_ids=ids_BT)
    loss.backward()

    real = labels_BT != IGNORED
    log_NV = theirs(ids_BT).logits[real].log_softmax(-1)
    taught_NV = teacher(ids_BT).logits[real].log_softmax(-1).detach()
    next_token = F.nll_loss(log_NV, labels_BT[real], reduction="sum")
    divergence = (taught_NV.exp() * (taught_NV - log_NV)).sum()
    expected = (0.7 * next_token + 1.9 * divergence) / 40
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(told, next_token / 40)
    assert not told.requires_grad
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_is_no_part_of_what_is_trained() -> None:
    ours, teacher = model(NEOX, 0), model(NEOX, 1)
    loss = DistillationLoss(ours, teacher, loss=0, kl=1)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in ours.parameters()}
    assert set(loss.state_dict()) == {f"model.{name}" for name in ours.state_dict()}


def test_a_batch_without_targets_has_no_loss_but_gradients() -> None:
    """A process that gets nothing of a batch takes part in it all the same."""
    ours = model(NEOX, 0)
    ids_BT, labels_BT = data()
    labels_BT[:] = IGNORED
    loss, told = DistillationLoss(ours, model(NEOX, 1), loss=1, kl=1)(
        labels_BT, 5, input_ids=ids_BT
    )
    loss.backward()
    assert float(loss) == float(told) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in ours.parameters() if p.grad is not None)


def test_the_divergence_falls() -> None:
    ours, teacher = model(NEOX, 0), model(NEOX, 1)
    loss = DistillationLoss(ours, teacher, loss=0, kl=1)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
    ids_BT, labels_BT = data()
    found = []
    for _ in range(30):
        value, _ = loss(labels_BT, float(labels_BT.numel()), input_ids=ids_BT)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(value))
    assert found[-1] < 0.2 * found[0]
