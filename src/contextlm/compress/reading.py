"""What stands between an attention module and its cache while a policy is installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from contextlm.compress.adaptors import Attention
from contextlm.compress.kept import Group, KeptLayer, KeyValueLayer, Plan, Rule

Forward = Callable[..., Any]
G = TypeVar("G", bound=Group)
Update = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Weights(nn.Module):
    """What a policy itself has for one attention module, fitted or trained.

    Attributes:
        rank: numbers a token that it keeps.
    """

    rank: int


class Reader(ABC):
    """Lets one attention module read, and move on, what one policy keeps for it.

    Attributes:
        attention: the module.
        group: which modules plan together with it.
        weights: those of the policy itself, if it has any.
    """

    weights: Weights | None = None

    def __init__(self, attention: Attention, group: Group):
        self.attention, self.group = attention, group

    @abstractmethod
    def new_layer(self, key: int) -> CacheLayerMixin:
        """An empty layer of the policy's cache, which carries `key`."""

    @abstractmethod
    def attend(self, layer: Any, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        """The module's output for T new tokens, and what else it returns.

        Args:
            layer: from `new_layer`; it is moved on.
            forward: the module's own.
            hidden_BTD: the module's input.
            kwargs: what else the module is called with.
        """

    def plan(self, layer: KeptLayer, hidden_BTD: Tensor, kwargs: Any) -> Plan:
        """What the forward pass under way does with the tokens."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return self.group.plan(self.attention, layer, hidden_BTD, mask, positions)

    def through(self, update: Update, mask: Tensor | None, kwargs: Any) -> dict[str, Any]:
        """`kwargs` by which the module attends to the keys and values that `update` returns.

        `update` is given the new tokens' own, the keys turned already.
        """
        return {**kwargs, self.attention.names.cache: Joined(update), "attention_mask": mask}


class Joined:
    """In the place of the cache that a module's own `forward` updates."""

    def __init__(self, update: Update):
        self._update = update

    def update(self, keys_BGTE: Tensor, values_BGTE: Tensor, *_: Any, **__: Any) -> Any:
        """Keys and values to attend to."""
        return self._update(keys_BGTE, values_BGTE)


class KeyValueReader(Reader):
    """Attends to the keys and values of the tokens that a rule leaves visible."""

    def new_layer(self, key: int) -> KeptLayer:
        return KeyValueLayer(key, croppable=self.group.croppable)

    def attend(self, layer: KeptLayer, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        plan = self.plan(layer, hidden_BTD, kwargs)
        result = forward(hidden_BTD, **self.through(layer.append, plan.mask, kwargs))
        layer.settle(plan.keep_BK, hidden_BTD.shape[1])
        return result


def groups_of(
    attentions: Sequence[Attention],
    rule: Rule,
    kind: type[G],
    **given: Any,
) -> list[G]:
    """The group of each attention module, of some kind of `Group` that takes `given`."""
    groups: dict[int | None, G] = {}
    for attention in attentions:
        if attention.window not in groups:
            groups[attention.window] = kind(rule, attention, **given)
    croppable = all(group.keeps_all for group in groups.values())
    for group in groups.values():
        group.croppable = croppable
    return [groups[attention.window] for attention in attentions]
