"""Contenders as large as the baseline: the width that a recipe's `match` asks for.

Models are built on the meta device, so that nothing is allocated. Parameters grow with a width, so
the two values around the baseline's count are found by interpolation, and the nearer one taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedModel

from contextlm.base.errors import InputError
from contextlm.lab.pretrained import config_of
from contextlm.models.build import build_config, meta_model
from contextlm.recipe.schema import Contender, Recipe


@dataclass(frozen=True)
class Match:
    """What was chosen for a contender: the field's value, and the parameters that it gives."""

    contender: Contender
    field: str
    value: int
    parameters: int
    of_baseline: int

    @property
    def sentence(self) -> str:
        """For people."""
        over = 100 * (self.parameters / self.of_baseline - 1)
        return (
            f"{self.contender.name}: {self.field} {self.value:,} gives {self.parameters:,} "
            f"parameters, {over:+.2f}% of the baseline's {self.of_baseline:,}"
        )


def parameters(model: PreTrainedModel) -> int:
    """How many a model has, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def matched(recipe: Recipe, vocab_size: int) -> tuple[list[Contender], dict[str, Match]]:
    """The recipe's contenders with the fields that `match` names set, and what was chosen.

    Raises:
        InputError: a field has no such effect, a value does not fit the rest of its model, or none
            comes near enough; the message names contender and field.
    """
    found: dict[str, Match] = {}
    if any(contender.match for contender in recipe.contenders):
        wanted = _of_baseline(recipe, vocab_size)
        for contender in recipe.contenders:
            if contender.match is not None:
                try:
                    found[contender.name] = _match(contender, vocab_size, wanted)
                except InputError as error:
                    raise InputError(f"contenders.{contender.name}: match: {error}") from None
    made = {name: match.contender for name, match in found.items()}
    return [made.get(contender.name, contender) for contender in recipe.contenders], found


def _of_baseline(recipe: Recipe, vocab_size: int) -> int:
    try:
        return parameters(meta_model(config_of(recipe.baseline, vocab_size)))
    except InputError as error:
        raise InputError(f"contenders.{recipe.baseline.name}: {error}") from None


def _match(contender: Contender, vocab_size: int, wanted: int) -> Match:
    settings = contender.match
    assert settings is not None
    field, unit = settings.field, settings.multiple_of
    if field == "vocab_size":
        raise InputError(f"{field}: is the tokenizer's")
    start = getattr(build_config(contender.model, vocab_size), field, None)
    if not isinstance(start, int) or isinstance(start, bool):
        raise InputError(f"{field}: no whole number of model type {contender.model['type']!r}")

    @cache
    def count(units: int) -> int:
        model = {**contender.model, field: units * unit}
        try:
            return parameters(meta_model(build_config(model, vocab_size)))
        except InputError as error:
            hint = f" (`multiple_of` makes {field} a multiple of a number)"
            raise InputError(f"{field} {units * unit:,}: {error}{hint}") from None

    def other(units: int, further: int) -> int:
        if count(further) == count(units):
            raise InputError(f"{field}: does not change the number of parameters")
        return further

    low = high = max(1, start // unit)
    while count(low) > wanted and low > 1:
        low = other(low, low // 2)
    while count(high) < wanted:
        high = other(high, 2 * high)
    while high - low > 1:
        # Halving in turns with interpolation, which alone would creep along a curve.
        share = (wanted - count(low)) / max(1, count(high) - count(low))
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        for units in (guess, (low + high) // 2):
            if low < units < high:
                low, high = (units, high) if count(units) <= wanted else (low, units)
    nearest = min((low, high), key=lambda units: abs(count(units) - wanted))
    made = contender.model_copy(update={"model": {**contender.model, field: nearest * unit}})
    match = Match(made, field, nearest * unit, count(nearest), wanted)
    if abs(match.parameters / wanted - 1) > settings.within:
        raise InputError(f"not within {100 * settings.within:g}%: {match.sentence}, the nearest")
    return match
