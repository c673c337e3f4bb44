"""What a policy is: a way to keep less than all keys and values, named by a spec.

A spec such as ``window:256,sinks:4`` names a policy and its settings; ``window:256+int8`` stacks
two: which tokens are kept, and in what form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.visible import shown
from contextlm.compress.adaptors import Attention
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.kept import EVERYTHING, Group, Rule
from contextlm.compress.reading import KeyValueReader, Reader, groups_of


@dataclass(frozen=True)
class Costs:
    """What a token costs in one model's own cache, to propose settings for a share of it.

    Attributes:
        tokens: the length that shares are meant at.
        numbers: of keys and values of a token in one layer.
        width: D, of the attention's input.
        bits: of a number.
    """

    tokens: int
    numbers: int
    width: int
    bits: int

    @classmethod
    def of(cls, attention: Attention, tokens: int) -> Costs:
        """Of a model with this attention module."""
        numbers = 2 * attention.groups * attention.head_width
        bits = 8 * next(attention.module.parameters()).element_size()
        return cls(tokens, numbers, attention.width, bits)


class Policy(BaseModel, ABC):
    """One method and its settings; subclasses are registered by `register_policy`.

    Attributes:
        name: what specs call it.
        needs_calibration: whether it must be calibrated.
        can_train: whether a pass without a cache computes what decoding would, with gradients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    can_train: ClassVar[bool] = True

    @property
    def spec(self) -> str:
        """The text that `parse_policy` makes this policy of."""
        parts = []
        for number, (field, value) in enumerate(self):
            if value == type(self).model_fields[field].default:
                continue
            bare = field if value is True else f"{field}:{value}"
            parts.append(f"{value}" if number == 0 else bare)
        return f"{self.name}:{','.join(parts)}" if parts else self.name

    def check(self, attentions: Sequence[Attention]) -> None:
        """Refuse a model that the policy cannot serve, or whose cache would not get smaller.

        Raises:
            InputError: it gives the figures, and names what would help.
        """

    def check_training(self) -> None:
        """Refuse to train a model under a policy that training could not see.

        Raises:
            InputError: it names policies that can be trained under.
        """
        if not self.can_train:
            others = ", ".join(name for name, policy in policies().items() if policy.can_train)
            raise InputError(
                f"policy {self.spec} cannot be healed: it drops or rounds tokens only behind a "
                f"pass, in which training would still see them; {others} can"
            )

    def sizes(self, attentions: Sequence[Attention]) -> Sizes:
        """How large the policy's own weights are, as far as can be told before they are fitted."""
        return Sizes(None)

    @abstractmethod
    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        """What reads each attention module's cache, one for each, once `check` has passed.

        Args:
            attentions: the model's, in order.
            calibration: the text to fit to, where `needs_calibration`, or the sizes of weights
                that are to come from elsewhere.
        """

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Policy | None:
        """The policy that keeps this share of the model's cache, or None where it cannot."""
        return None


class Form(Policy):
    """A policy that says in what form tokens are kept, and can keep those of a `Selection` only."""

    @abstractmethod
    def readers(
        self,
        attentions: Sequence[Attention],
        calibration: Calibration | Sizes | None,
        rule: Rule = EVERYTHING,
    ) -> list[Reader]:
        """As in `Policy`, of the tokens that `rule` does not hide."""


class Selection(Policy, Rule):
    """A policy that says which tokens are kept."""

    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        groups = groups_of(attentions, self, Group)
        return [KeyValueReader(*pair) for pair in zip(attentions, groups, strict=True)]


class Stack(Policy):
    """Some tokens, in another form than keys and values."""

    name: ClassVar[str] = "stack"
    selection: Selection
    form: Form

    @property
    def spec(self) -> str:
        return f"{self.selection.spec}+{self.form.spec}"

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # here it is its part's
        return self.form.needs_calibration

    @property
    def can_train(self) -> bool:  # type: ignore[override]
        return self.form.can_train

    def check(self, attentions: Sequence[Attention]) -> None:
        self.form.check(attentions)

    def sizes(self, attentions: Sequence[Attention]) -> Sizes:
        return self.form.sizes(attentions)

    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        return self.form.readers(attentions, calibration, self.selection)


_REGISTRY: dict[str, type[Policy]] = {}
P = TypeVar("P", bound="type[Policy]")


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: makes a policy known to specs and to the contract tests.

    The first line of its docstring describes it.

    Raises:
        ValueError: the name is taken.
    """

    def register(policy: P) -> P:
        if name in _REGISTRY:
            raise ValueError(f"a policy named {name!r} is registered already")
        policy.name = name
        _REGISTRY[name] = policy
        return policy

    return register


def policies() -> dict[str, type[Policy]]:
    """All policies, sorted by name."""
    return dict(sorted(_REGISTRY.items()))


def parse_policy(spec: str) -> Policy:
    """The policy that a spec names.

    Values come in the order of the policy's settings or behind their names:
    ``window:256,sinks:4``, ``interval:256,20``, ``latent:25%``; ``+`` stacks a form on a selection.

    Raises:
        InputError: there is no such policy or setting, or a value is not usable.
    """
    first, *more = [_one(part.strip(), spec) for part in spec.split("+")]
    if not more:
        return first
    if len(more) > 1 or not isinstance(first, Selection) or not isinstance(more[0], Form):
        raise InputError(
            f"policy {shown(spec)}: only a form ({_names(Form)}) stacks on a selection of tokens "
            f"({_names(Selection)}), as in window:256+int8"
        )
    return Stack(selection=first, form=more[0])


def _names(kind: type[Selection] | type[Form]) -> str:
    return ", ".join(name for name, policy in _REGISTRY.items() if issubclass(policy, kind))


def _one(text: str, spec: str) -> Policy:
    name, _, settings = text.partition(":")
    if name not in _REGISTRY:
        raise unknown_name("policy", name, _REGISTRY)
    policy = _REGISTRY[name]
    fields = list(policy.model_fields)
    given: dict[str, Any] = {}
    for number, setting in enumerate(settings.split(",") if settings else []):
        key, colon, value = (part.strip() for part in setting.partition(":"))
        if not colon and key in fields and policy.model_fields[key].annotation is bool:
            value = "true"
        elif not colon:
            if number >= len(fields):
                raise InputError(f"policy {shown(spec)}: {name} takes {_taken(fields)}")
            key, value = fields[number], key
        if key not in fields:
            raise unknown_name(f"setting of policy {name}", key, fields)
        if key in given:
            raise InputError(f"policy {shown(spec)}: {key} is given twice")
        given[key] = value
    try:
        return policy(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or name
        said = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"policy {shown(spec)}: {where}: {said[:1].lower()}{said[1:]}") from None


def _taken(fields: Sequence[str]) -> str:
    return ", ".join(fields) if fields else "no settings"
