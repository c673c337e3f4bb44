"""`input`: the attention's input, of which keys and values are projections (DESIGN 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import KEY, VALUE, Attention, Projection
from contextlm.compress.base import Costs, Form, register_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.entries import EntryReader
from contextlm.compress.installed import CompressedCache
from contextlm.compress.kept import EVERYTHING, Group, Rule
from contextlm.compress.reading import Reader, groups_of


class InputReader(EntryReader):
    """Makes keys and values of inputs with the module's own weights."""

    exact: ClassVar[bool] = True

    def entries(self, inputs_BTD: Tensor) -> Tensor:
        return inputs_BTD

    def projection(self, part: int) -> Projection:
        return self.attention.projection(part)


@register_policy("input")
class Input(Form):
    """The attention's input instead of keys and values: exact, half where heads are not grouped."""

    def check(self, attentions: Sequence[Attention]) -> None:
        for attention in attentions:
            check_readable(attention)
            kept = 2 * attention.groups * attention.head_width
            if attention.width >= kept:
                raise InputError(
                    f"policy input would keep {attention.width:,} numbers a token and layer, the "
                    f"model's own cache {kept:,} ({attention.heads} heads of queries share "
                    f"{attention.groups} of keys and values): latent:{kept // 4} or int8 keep less"
                )

    def readers(
        self,
        attentions: Sequence[Attention],
        calibration: Calibration | Sizes | None,
        rule: Rule = EVERYTHING,
    ) -> list[Reader]:
        groups = groups_of(attentions, rule, Group, turns=True)
        return [InputReader(*pair) for pair in zip(attentions, groups, strict=True)]

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Input | None:
        """Whatever the share, where it is smaller at all."""
        return cls() if costs.width < costs.numbers else None


def check_readable(attention: Attention) -> None:
    """Refuse a module whose keys and values could not be made again from something kept.

    Raises:
        InputError: it says why.
    """
    if attention.changing_rotary is not None:
        raise InputError(
            f"rope_type {attention.changing_rotary!r} is not supported here: its frequencies "
            "change with the length, so that earlier keys cannot be made again; window, evict and "
            "int8 keep keys as they are"
        )
    for part in (KEY, VALUE):
        attention.projection(part)


class InputCache(CompressedCache):
    """`CompressedCache` by policy ``input``, installed at once: exact, nothing is trained.

    ``with InputCache(model): model.generate(...)``, or `remove` it by hand. A forward without a
    cache, and the first piece of a sequence, compute exactly what the plain model does; later
    pieces agree to rounding. A token takes D numbers per layer instead of 2 D, and with rotary
    positions 4 bytes for its position. Decoding pays with time: see `docs/method.md`.

    Args:
        model: a decoder of transformers with an adaptor whose heads are not grouped.

    Raises:
        InputError: the model cannot have one; the message says why, and what would help.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, Input())
        self.enter()
