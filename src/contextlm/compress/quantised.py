"""`int8` and `int4`: keys and values in fewer bits, by hqq (an extra: contextlm[quantised]).

As in KIVI (Liu et al., arXiv:2402.02750) a scale and a zero serve `GROUP` tokens of one channel of
keys, whose channels differ most, and `GROUP` channels of one token's values; the newest tokens
stay as they are until there are `GROUP` of them. Unlike transformers' `QuantizedCache`, which has
the same library behind it, a block is quantised once and not anew with every later one, tokens can
be dropped (so that it stacks with `window`) or cropped, and hqq's solver is left out: it takes 30
times as long as the rest and lowers the error by 4%. Without it, quantising again what was
quantised changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import Attention
from contextlm.compress.base import Costs, Form, register_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.kept import EVERYTHING, Group, KeyValueLayer, Rule, columns, taken
from contextlm.compress.reading import KeyValueReader, Reader, groups_of

GROUP = 64


class Packed(NamedTuple):
    """Quantised numbers, several to a byte; `meta` is hqq's, with scales and zeros."""

    numbers: Tensor
    meta: dict[str, Any]

    @classmethod
    def of(cls, tensor: Tensor, bits: int) -> Packed:
        """Quantise in groups along the last dimension."""
        from hqq.core.quantize import Quantizer

        numbers, meta = Quantizer.quantize(
            tensor.contiguous(),
            nbits=bits,
            axis=1,
            group_size=math.gcd(tensor.shape[-1], GROUP),
            optimize=False,
        )
        meta["compute_dtype"] = tensor.dtype
        return cls(*Quantizer.to_inplace(numbers, meta, tensor.device))

    def unpacked(self) -> Tensor:
        """The numbers again."""
        from hqq.core.quantize import Quantizer

        return Quantizer.dequantize(self.numbers, self.meta)


class Block(NamedTuple):
    """Keys, ``[B, G, E, T]``, and values, ``[B, G, T, E]``, of some tokens."""

    keys: Packed
    values: Packed
    tokens: int


class QuantisedLayer(KeyValueLayer):
    """Keeps blocks of quantised tokens, and behind them the newest tokens as they are."""

    def __init__(self, key: int, *, croppable: bool, bits: int) -> None:
        super().__init__(key, croppable=croppable)
        self.bits = bits
        self.blocks: list[Block] = []

    @property
    def held(self) -> int:
        return super().held + sum(block.tokens for block in self.blocks)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        plain = super().append(*new)
        if not self.blocks:
            return plain
        keys = [block.keys.unpacked().mT for block in self.blocks]
        values = [block.values.unpacked() for block in self.blocks]
        return torch.cat([*keys, plain[0]], dim=2), torch.cat([*values, plain[1]], dim=2)

    def thin_out(self, live: list[bool], keep_BK: Tensor, both: tuple[Tensor, ...]) -> None:
        """Keep these blocks as they are, and of all other entries those in the last columns."""
        self.blocks = [block for block, lives in zip(self.blocks, live, strict=True) if lives]
        keep_BK = keep_BK[:, sum(block.tokens for block in self.blocks) :]
        self.keys, self.values = (taken(tensor, keep_BK, 2) for tensor in both)

    def settle(self, keep_BK: Tensor | None, new: int) -> None:
        """Count the new tokens; quantise what fills groups."""
        super().settle(None, new)
        full = self.keys.shape[2] // GROUP * GROUP
        if full:
            keys, values = self.keys[:, :, :full], self.values[:, :, :full]
            packed = Packed.of(keys.mT, self.bits), Packed.of(values, self.bits)
            self.blocks.append(Block(*packed, full))
            self.keys, self.values = (
                self.keys[:, :, full:].clone(),
                self.values[:, :, full:].clone(),
            )

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change(change)
        self.blocks = [
            Block(
                Packed.of(change(block.keys.unpacked()), self.bits),
                Packed.of(change(block.values.unpacked()), self.bits),
                block.tokens,
            )
            for block in self.blocks
        ]

    def crop(self, tokens_to_remove: int) -> None:
        if self.is_croppable and self.blocks and tokens_to_remove < 0:
            self.keys, self.values = self.append(self.keys[:, :, :0], self.values[:, :, :0])
            self.blocks = []
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.blocks = []


class QuantisedGroup(Group):
    """Drops whole blocks, and unpacks one when less than half of it is left.

    Attributes:
        live: which blocks stay as they are in the pass under way; None: all.
    """

    live: list[bool] | None = None

    def columns(self, keep_BS: Tensor, layer: QuantisedLayer) -> Tensor | None:
        self.live = None
        if bool(keep_BS.any(0).all()):
            return None
        stays_S, start = torch.zeros_like(keep_BS[0]), 0
        live = []
        for block in layer.blocks:
            own = keep_BS[:, start : start + block.tokens]
            live.append(bool(own.sum(1).max() * 2 >= block.tokens))
            stays_S[start : start + block.tokens] = live[-1]
            start += block.tokens
        wanted_BS = keep_BS & ~stays_S
        loose_BK = columns(wanted_BS)
        if loose_BK is None or (all(live) and loose_BK.shape[1] == keep_BS.shape[1] - start):
            return None
        self.live = live
        block_K = stays_S.nonzero().flatten().expand(len(keep_BS), -1)
        return torch.cat([block_K, loose_BK], dim=1)


class QuantisedReader(KeyValueReader):
    """Attends to keys and values as they come back from being quantised."""

    group: QuantisedGroup

    def __init__(self, attention: Attention, group: Group, bits: int):
        super().__init__(attention, group)
        self.bits = bits

    def new_layer(self, key: int) -> QuantisedLayer:
        return QuantisedLayer(key, croppable=self.group.croppable, bits=self.bits)

    def attend(self, layer: QuantisedLayer, forward: Any, hidden_BTD: Tensor, kwargs: Any) -> Any:
        plan = self.plan(layer, hidden_BTD, kwargs)
        both: tuple[Tensor, ...] = ()

        def update(keys_BGTE: Tensor, values_BGTE: Tensor) -> tuple[Tensor, ...]:
            nonlocal both
            both = layer.append(keys_BGTE, values_BGTE)
            return both

        result = forward(hidden_BTD, **self.through(update, plan.mask, kwargs))
        if plan.keep_BK is not None and self.group.live is not None:
            layer.thin_out(self.group.live, plan.keep_BK, both)
        layer.settle(None, hidden_BTD.shape[1])
        return result


class Quantised(Form):
    """Keys and values in fewer bits."""

    can_train: ClassVar[bool] = False
    bits: ClassVar[int]

    def check(self, attentions: Sequence[Attention]) -> None:
        if find_spec("hqq") is None:
            raise InputError(
                f"policy {self.name} needs hqq, which is not installed: pip install 'hqq>=0.2.8'"
            )

    def readers(
        self,
        attentions: Sequence[Attention],
        calibration: Calibration | Sizes | None,
        rule: Rule = EVERYTHING,
    ) -> list[Reader]:
        groups = groups_of(attentions, rule, QuantisedGroup)
        return [QuantisedReader(*pair, self.bits) for pair in zip(attentions, groups, strict=True)]

    @classmethod
    def share(cls, costs: Costs) -> float:
        """Of the model's own cache, in the long run."""
        return cls.bits / costs.bits + 2 / GROUP

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Quantised | None:
        """Whatever the share, where it is smaller at all."""
        return cls() if cls.share(costs) < 1 else None


@register_policy("int8")
class Int8(Quantised):
    """Keys and values in 8 bits, with a scale and a zero for each 64."""

    bits: ClassVar[int] = 8


@register_policy("int4")
class Int4(Quantised):
    """Keys and values in 4 bits, with a scale and a zero for each 64."""

    bits: ClassVar[int] = 4
