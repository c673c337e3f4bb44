"""Recipes: a comparison as strict YAML, its scales and its `--set` overrides.

A recipe's top level is the scale ``full``; an entry of ``scales`` is merged over it, then each
``--set key=value``. In a scale and in ``--set`` the contenders are addressed by name, as if
``contenders`` were a mapping; ``null`` in place of a contender leaves it out. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PositiveInt, ValidationError, model_validator

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.files import nearest_file
from contextlm.base.paths import is_file, is_folder
from contextlm.base.strict_yaml import dump, parse
from contextlm.recipe.merging import (
    FULL,
    departures,
    mapping,
    merge,
    own_setting,
    resolve,
    scales_of,
    sets,
)
from contextlm.recipe.parts import EvaluationSettings, Split
from contextlm.recipe.problems import first_problem
from contextlm.recipe.settings import (
    ContextStoreSettings,
    EmbeddingSettings,
    PhaseOneSettings,
    Settings,
    TrainingSettings,
    TuningSettings,
)

_SUFFIXES = {".yaml", ".yml"}

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator accepts


class Contender(Settings):
    """One model in a comparison."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)
    baseline: bool = False
    model: dict[str, JsonValue] = Field(
        description="`type`, and fields of that architecture's config"
    )
    phase1: PhaseOneSettings | None = None
    training: dict[str, JsonValue] = Field({}, description="overrides the recipe's training")
    use_store: bool = Field(
        True, description="false: run the context block inside, each window from zero"
    )
    target_offset: PositiveInt | None = Field(None, description="overrides the recipe's")
    reported: dict[str, float] = Field({}, description="the source document's own figures")
    reported_epochs: dict[Literal["train_ppl", "val_ppl"], list[float | None]] = Field(
        {}, description="its figures epoch by epoch; null where it names none"
    )

    @model_validator(mode="after")
    def _model_has_a_type(self) -> Self:
        if not isinstance(self.model.get("type"), str):
            raise ValueError("model needs a 'type'")
        return self


class Recipe(Settings):
    """A comparison, resolved: a baseline, other contenders, the same data and training for all."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)
    question: str
    document: str | None = Field(None, description="the report that the setting comes from")
    scale: str = FULL
    departs_from_full: list[str] | None = []  # see merging.departures
    corpus: str = "pydocs"
    tokenizer: str = Field(description="gpt2, pythia, bpe:SIZE, word:SIZE or a folder")
    vocab_size: PositiveInt | None = Field(
        None, description="the models' vocabulary where it is larger than the tokenizer's"
    )
    unit: Literal["windows", "lines", "answers"] = Field("windows", description="what a sample is")
    sequence_length: PositiveInt = 128
    stride: PositiveInt | None = Field(None, description="between windows; null: sequence_length")
    target_offset: PositiveInt = 1
    documents: Split | None = Field(None, description="use only the first documents of each split")
    tokens: Split | None = Field(None, description="use only the first tokens of each split")
    samples: Split | None = Field(None, description="use only the first samples of each split")
    seeds: list[Seed] = Field([0], min_length=1)
    embedding: EmbeddingSettings = EmbeddingSettings()
    context_store: ContextStoreSettings | None = Field(
        None, description="the text is one stream, whose contexts are kept for phase 2"
    )
    training: TrainingSettings = TrainingSettings()
    tuning: TuningSettings | None = Field(
        None, description="choose each contender's training.learning_rate on a grid first"
    )
    evaluation: EvaluationSettings = EvaluationSettings()
    contenders: list[Contender] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_baseline_and_distinct_names(self) -> Self:
        names = [contender.name for contender in self.contenders]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"contenders: {sorted(twice)[0]!r} is named twice")
        if sum(contender.baseline for contender in self.contenders) != 1:
            raise ValueError("contenders: exactly one must have 'baseline: true'")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: a seed is named twice")
        for contender in self.contenders:
            self.training_of(contender)
        return self

    @model_validator(mode="after")
    def _lines_are_no_stream(self) -> Self:
        names = ("stride", "tokens", "context_store", "tuning")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        given["target_offset"] = self.target_offset > 1
        for contender in self.contenders:
            key = f"contenders.{contender.name}"
            given[f"{key}.phase1"] = contender.phase1
            given[f"{key}.target_offset"] = (contender.target_offset or 1) > 1
        for key in [key for key, value in given.items() if value and self.unit != "windows"]:
            raise ValueError(
                f"{key}: needs a stream of text, which unit {self.unit!r} does not have"
            )
        return self

    @model_validator(mode="after")
    def _tuning_takes_windows(self) -> Self:
        if self.tuning is not None and self.context_store is not None:
            raise ValueError("tuning: takes a share of the windows, which a context_store forbids")
        for contender in self.contenders if self.tuning is not None else ():
            key = f"contenders.{contender.name}.training"
            if "learning_rate" in contender.training:
                raise ValueError(_tuned_away(f"{key}.learning_rate"))
            groups = self.training_of(contender).parameter_groups
            if any(group.learning_rate is not None for group in groups):
                raise ValueError(_tuned_away(f"{key}.parameter_groups: learning_rate"))
        return self

    @property
    def baseline(self) -> Contender:
        """The contender that others are compared with."""
        return next(contender for contender in self.contenders if contender.baseline)

    def contender(self, name: str) -> Contender:
        """The contender of that name, which must be one of them."""
        return next(contender for contender in self.contenders if contender.name == name)

    def training_of(self, contender: Contender) -> TrainingSettings:
        """The recipe's training with the contender's own overrides applied."""
        merged = merge(self.training.model_dump(exclude_unset=True), contender.training)
        try:
            return TrainingSettings.model_validate(merged)
        except ValidationError as error:
            above = ["contenders", contender.name, "training"]
            raise ValueError(first_problem(error, TrainingSettings, above)) from None

    def target_offset_of(self, contender: Contender) -> int:
        """How many tokens ahead the contender predicts."""
        return contender.target_offset or self.target_offset


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("contextlm") / "recipes"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def recipe_scales(name_or_path: str) -> list[str]:
    """The scales of a recipe in its own order, ``full`` last.

    Raises:
        InputError: unknown name, malformed YAML, or `scales` is not a mapping.
    """
    raw, where = _read(name_or_path)
    return [*scales_of(raw, where), FULL]


def load_recipe(
    name_or_path: str,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    seeds: list[int] | None = None,
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name_or_path: a built-in name, or the path of a YAML file.
        scale: ``full`` (the default) or one of the recipe's scales.
        overrides: ``dotted.key=value`` strings; the value is YAML.
        seeds: replace the recipe's seeds.

    Raises:
        InputError: unknown name, scale or key, malformed YAML, or a value that does not fit.
    """
    raw, where = _read(name_or_path)
    origin = raw.pop("resolved_from", FULL)
    departed = raw.pop("departs_from_full", [] if origin == FULL else None)
    scale = FULL if scale in (None, origin) else scale
    try:
        full = resolve(dict(raw), where, own_setting(raw, where, scale), ())
        raw = resolve(raw, where, scale, overrides)
    except RecursionError:  # YAML aliases can make a value contain itself
        raise InputError(f"{where}: nested too deeply") from None
    if raw["scale"] == FULL:
        raw["scale"] = origin
    if seeds is not None:
        raw["seeds"] = seeds
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        names = [str(contender["name"]) for contender in raw["contenders"]]
        raise InputError(f"{where}: {first_problem(error, Recipe, names=names)}") from None
    if recipe.tuning is not None and sets("training.learning_rate", overrides):
        raise InputError(f"{where}: {_tuned_away('training.learning_rate')}")
    return recipe.model_copy(update={"departs_from_full": departures(full, raw, departed, where)})


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML. Loading it gives the same recipe.

    Its values are its top level; ``resolved_from`` and ``departs_from_full`` keep what it was made
    from, so that a report of a second run does not pass another setting off as the document's.
    """
    data = recipe.model_dump(mode="json", exclude={"scale"})
    return dump({"resolved_from": recipe.scale, **data})


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    path = Path(name_or_path)
    if name_or_path in builtin_recipes():
        file = resources.files("contextlm") / "recipes" / f"{name_or_path}.yaml"
        text = file.read_text("utf-8")
        where = f"recipe {name_or_path!r}"
    elif path.suffix in _SUFFIXES or is_file(path) or is_folder(path):
        where = str(path)
        try:
            text = path.read_text("utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"{where}: no such file{nearest_file(path, _SUFFIXES)}") from None
        except IsADirectoryError:
            raise InputError(f"{where}: is a folder, not a recipe") from None
        except OSError as error:
            raise InputError(f"{where}: cannot read the recipe: {error.strerror}") from None
        except ValueError:  # also a name that no file can have
            raise InputError(f"{where}: the recipe is not UTF-8 text") from None
    else:
        raise unknown_name("recipe", name_or_path, builtin_recipes())
    raw = dict(mapping(parse(text, where), where))
    if "scale" in raw:
        raise InputError(f"{where}: 'scale' cannot be set: choose one with --scale")
    return raw, where


def _tuned_away(key: str) -> str:
    return f"{key}: tuning chooses the learning rate; tuning=null leaves it to you"
