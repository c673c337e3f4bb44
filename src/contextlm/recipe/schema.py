"""What a recipe may say: a comparison of contenders, resolved. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from contextlm.recipe.problems import first_problem
from contextlm.recipe.settings import (
    SEQUENCE_LENGTH,
    ContextStoreSettings,
    EmbeddingSettings,
    EvaluationSettings,
    HealingSettings,
    MatchSettings,
    PhaseOneSettings,
    Settings,
    TrainingSettings,
    TuningSettings,
)

FULL = "full"

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator accepts


class Split(Settings):
    """Two counts, one for each split."""

    train: PositiveInt = Field(description="of the training split")
    validation: PositiveInt = Field(description="of the validation split")


class Contender(Settings):
    """One model in a comparison."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        max_length=64,
        description="letters, digits, - and _; in a scale and in --set it stands for NAME",
    )
    baseline: bool = Field(False, description="the one that others are compared with")
    model: dict[str, JsonValue] = Field(
        {}, description="`type`, and fields of that type: contextlm list keys model.TYPE"
    )
    from_: str | None = Field(
        None,
        alias="from",
        min_length=1,
        description="instead of `model`, a trained one: its folder, or its name on the hub; the "
        "recipe's tokenizer must be its own",
    )
    policy: str | None = Field(
        None,
        description="the policy by which a model `from` somewhere is to decode (contextlm list "
        "policies); it is trained under it, and keeps it",
    )
    healing: HealingSettings | None = Field(
        None,
        description="how it is trained then; null: as the defaults say, where there is a policy",
    )
    match: MatchSettings | None = Field(
        None, description="find the width at which it has as many parameters as the baseline"
    )
    phase1: PhaseOneSettings | None = Field(
        None, description="train the context block by itself first; null: not"
    )
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
        if self.from_ is None and not isinstance(self.model.get("type"), str):
            raise ValueError("model needs a 'type'")
        return self

    @model_validator(mode="after")
    def _a_trained_model_is_what_it_is(self) -> Self:
        for name in ("model", "match", "phase1", "target_offset"):
            if self.from_ is not None and getattr(self, name):
                raise ValueError(
                    f"{name}: does not go with `from`, a model that is trained already"
                )
        for name in ("policy", "healing"):
            if self.from_ is None and getattr(self, name):
                raise ValueError(f"{name}: is for a model that is trained already, named by `from`")
        return self

    @property
    def is_healed(self) -> bool:
        """Whether an original teaches it."""
        return self.policy is not None or self.healing is not None


class Recipe(Settings):
    """A comparison, resolved: a baseline, other contenders, the same data and training for all."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, description="of run folders too"
    )
    question: str = Field(description="what the comparison is to answer")
    document: str | None = Field(None, description="the report that the setting comes from")
    scale: str = FULL
    departs_from_full: list[str] | None = []  # see loading.departures
    written: dict[str, str] = Field({}, description="paths as written, before made absolute")
    corpus: str = Field("pydocs", description="contextlm list corpora")
    validation: float | str | None = Field(
        None,
        description="the share of the text to hold out, or text:PATH or jsonl:PATH; null: 0.05, or "
        "the corpus's own split (0.2 of lines)",
    )
    tokenizer: str = Field(description="gpt2, pythia, bpe:SIZE, word:SIZE or a folder")
    vocab_size: PositiveInt | None = Field(
        None, description="the models' vocabulary where it is larger than the tokenizer's"
    )
    unit: Literal["windows", "lines", "answers"] = Field("windows", description="what a sample is")
    sequence_length: PositiveInt = Field(SEQUENCE_LENGTH, description="tokens of a sample")
    stride: PositiveInt | None = Field(None, description="between windows; null: sequence_length")
    target_offset: PositiveInt = Field(1, description="how many tokens ahead the target lies")
    documents: Split | None = Field(None, description="use only the first documents of each split")
    tokens: Split | None = Field(None, description="use only the first tokens of each split")
    samples: Split | None = Field(None, description="use only the first samples of each split")
    budgets: list[PositiveFloat] | None = Field(
        None,
        min_length=1,
        description="train each contender once a budget, on this share of the training samples; "
        "more than 1 goes on with the samples that follow them in the text",
    )
    repeat_text: bool = Field(
        False,
        description="budgets beyond the last whole block of samples.train begin again with the "
        "first, in a new order; the rest of the text is not read",
    )
    seeds: list[Seed] = Field(
        [0], min_length=1, description="of weights, noise, order and dropout: a training for each"
    )
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

    @field_validator("validation", mode="before")
    @classmethod
    def _a_share_or_own_text(cls, value: Any) -> Any:
        if isinstance(value, float) and 0 < value < 1:
            return value
        if value is None or (isinstance(value, str) and value.startswith(("text:", "jsonl:"))):
            return value
        raise ValueError("expected a share between 0 and 1, text:PATH or jsonl:PATH")

    @model_validator(mode="after")
    def _one_baseline_and_distinct_names(self) -> Self:
        names = [contender.name for contender in self.contenders]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"contenders: {sorted(twice)[0]!r} is named twice")
        if sum(contender.baseline for contender in self.contenders) != 1:
            raise ValueError("contenders: exactly one must have 'baseline: true'")
        if self.baseline.match is not None:
            raise ValueError(
                f"contenders.{self.baseline.name}.match: the baseline is what others match"
            )
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
        given["evaluation.long"] = self.evaluation.long
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
    def _budgets_are_within_one_epoch(self) -> Self:
        if self.budgets is None:
            if self.repeat_text:
                raise ValueError("repeat_text: is for budgets; without any, see training.epochs")
            return self
        if any(b <= a for a, b in pairwise(self.budgets)):
            raise ValueError("budgets must ascend")
        if self.context_store is not None:
            raise ValueError("budgets: take a part of the text, which a context_store forbids")
        for contender in self.contenders:
            if self.training_of(contender).epochs > 1:
                own = "epochs" in contender.training
                key = f"contenders.{contender.name}.training" if own else "training"
                raise ValueError(
                    f"budgets: a budget is one pass over samples, which needs {key}.epochs=1"
                )
        return self

    @model_validator(mode="after")
    def _tasks_ask_for_the_next_token(self) -> Self:
        if not self.evaluation.tasks:
            return self
        if self.unit == "answers":
            raise ValueError("evaluation.tasks: a synthetic task's tokens spell no text")
        for contender in self.contenders:
            if self.target_offset_of(contender) > 1:
                raise ValueError(
                    f"evaluation.tasks: they ask for the next token, which {contender.name} does "
                    "not predict: its target_offset is more than 1"
                )
        return self

    @model_validator(mode="after")
    def _originals_teach_the_next_token(self) -> Self:
        for contender in self.contenders:
            if contender.is_healed and self.target_offset > 1:
                raise ValueError(
                    f"target_offset: contenders.{contender.name} is healed, to predict the next "
                    "token as its original does"
                )
        return self

    @model_validator(mode="after")
    def _tuning_takes_windows(self) -> Self:
        if self.tuning is not None and self.context_store is not None:
            raise ValueError("tuning: takes a share of the windows, which a context_store forbids")
        for contender in self.contenders if self.tuning is not None else ():
            key = f"contenders.{contender.name}.training"
            if "learning_rate" in contender.training:
                raise ValueError(tuned_away(f"{key}.learning_rate"))
            groups = self.training_of(contender).parameter_groups
            if any(group.learning_rate is not None for group in groups):
                raise ValueError(tuned_away(f"{key}.parameter_groups: learning_rate"))
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


def tuned_away(key: str) -> str:
    """Why `key` may not stand in a recipe that tunes learning rates."""
    return f"{key}: tuning chooses the learning rate; tuning=null leaves it to you"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge deeply, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
