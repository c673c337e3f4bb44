"""`full`: the model's own cache, which others are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from contextlm.compress.adaptors import Attention
from contextlm.compress.base import Policy, register_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.kept import EVERYTHING, Group
from contextlm.compress.reading import Forward, Reader, groups_of


class PlainReader(Reader):
    """Leaves all to the module, with the layer that transformers would give it."""

    def new_layer(self, key: int) -> CacheLayerMixin:
        config = self.attention.module.config
        layer: Any = DynamicCache(config=config).layers[self.attention.module.layer_idx]
        layer.key = key
        return layer

    def attend(self, layer: Any, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        return forward(hidden_BTD, **kwargs)


@register_policy("full")
class Full(Policy):
    """The model's own cache."""

    def readers(
        self, attentions: Sequence[Attention], calibration: Calibration | Sizes | None
    ) -> list[Reader]:
        return [
            PlainReader(attention, group)
            for attention, group in zip(
                attentions, groups_of(attentions, EVERYTHING, Group), strict=True
            )
        ]
