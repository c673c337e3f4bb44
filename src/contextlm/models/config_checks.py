"""Checks that the configurations of all architectures share. None counts as left open."""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig


def check_counts(config: PreTrainedConfig, *names: str) -> None:
    """Refuse sizes and counts below 1.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_positive(config: PreTrainedConfig, *names: str) -> None:
    """Refuse numbers that are not above 0.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_dropout(config: PreTrainedConfig, *names: str) -> None:
    """Refuse shares to drop outside of [0, 1).

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
