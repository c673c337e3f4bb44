"""Schedules against those of others, parameter groups, and which type `auto` stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from contextlm.base.errors import InputError
from contextlm.recipe.settings import ParameterGroup, TrainingSettings
from contextlm.training.optimisation import build_optimizer, build_schedule, resolve_precision


def rates(settings: TrainingSettings, steps_per_epoch: int, steps: int) -> list[float]:
    share = build_schedule(settings, steps_per_epoch)
    return [settings.learning_rate * share(step) for step in range(steps)]


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        ({"schedule": "constant"}, "constant_with_warmup", None),
        ({"schedule": "linear"}, "linear", None),
        ({"schedule": "cosine"}, "cosine", None),
        ({"schedule": "cosine", "minimum_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (
            {"schedule": "wsd", "cooldown": 0.25},
            "warmup_stable_decay",
            {"num_decay_steps": 3, "decay_type": "1-sqrt"},
        ),
    ],
)
def test_schedules_equal_those_of_transformers(ours, name, options, warmup):
    settings = TrainingSettings(learning_rate=0.5, epochs=2, warmup=warmup, **ours)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = get_scheduler(name, optimizer, warmup, 12, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    # Theirs rises from 0, so that the first step is lost; ours is one step ahead until the peak.
    expected[:warmup] = expected[1 : warmup + 1]
    assert rates(settings, 6, 12) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert min(rates(settings, 6, 1)) > 0


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


def test_a_longer_wsd_begins_as_a_shorter_one_until_that_ones_rate_falls():
    settings = TrainingSettings(schedule="wsd", warmup=2, cooldown=0.4, epochs=1)
    assert settings.stable_until(10) == 6
    assert rates(settings, 20, 12)[:6] == rates(settings, 10, 6)
    assert rates(settings, 20, 12)[6:] == [settings.learning_rate] * 6
    assert TrainingSettings(schedule="wsd").stable_until(10) == 8
    assert TrainingSettings(schedule="wsd").stable_until(2) == 1


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


@pytest.mark.parametrize(
    ("wanted", "device", "capabilities", "expected"),
    [
        ("float32", "cpu", {"amx_bf16": True}, "float32"),
        ("bfloat16", "cpu", {}, "bfloat16"),
        ("auto", "cpu", {"amx_bf16": True}, "bfloat16"),
        ("auto", "cpu", {"avx512_bf16": True}, "bfloat16"),
        ("auto", "cpu", {}, "float32"),
        ("auto", "mps", {"amx_bf16": True}, "float32"),
    ],
)
def test_auto_is_the_type_that_the_hardware_multiplies(
    monkeypatch, wanted, device, capabilities, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision(wanted, torch.device(device)) == expected
