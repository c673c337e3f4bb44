"""`latent`: a few numbers a token, from which its keys and values are rebuilt.

Let x be an attention module's input, with mean m and covariance C = L L^T over a calibration text, and
W = [W_k; W_v] its projections, b their biases. Among all maps of rank r the one that comes nearest to
W x + b in the mean square keeps z = V^T L^-1 (x - m) and rebuilds U S z + W m + b, where U S V^T are the
r largest singular values of W L and their vectors (whitening as in SVD-LLM, Wang et al.,
arXiv:2403.07378; keys and values together as in MHA2MLA, Ji et al., arXiv:2502.14837; a cache of latents
as in Palu, Chang et al., arXiv:2407.21118). Norms and rotary positions follow after rebuilding. What is
lost is the sum of the other squared singular values, by which a total can be spread over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import KEY, VALUE, Attention, Projection
from contextlm.compress.base import Costs, Form, register_policy
from contextlm.compress.entries import EntryReader
from contextlm.compress.inputs import check_readable
from contextlm.compress.kept import Group, Rule
from contextlm.compress.reading import Reader, groups_of

_FLOOR = 1e-8  # of the largest variance: directions that the text does not show are not free
_ROWS = 4  # of the calibration text at once


class Moments(NamedTuple):
    """Mean, ``[D]``, and covariance, ``[D, D]``, of a module's inputs, float64."""

    mean_D: Tensor
    covariance_DD: Tensor


class Factors(NamedTuple):
    """The best maps of every rank, float64: the first r rows of `down`, the first r columns of `up`.

    `energy` are the squared singular values, what each rank more is worth.
    """

    down_ZD: Tensor
    up_FZ: Tensor
    energy_Z: Tensor
    mean_D: Tensor
    bias_F: Tensor


@torch.no_grad()
def input_moments(attentions: Sequence[Attention], text_NT: Tensor) -> list[Moments]:
    """Moments of each module's inputs over a text."""
    sums: list[list[Tensor]] = [[] for _ in attentions]

    def note(number: int, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs_ND = (given[0] if given else named["hidden_states"]).flatten(0, 1)
        wide_ND = inputs_ND.double() if inputs_ND.device.type != "mps" else inputs_ND.float()
        new = [wide_ND.sum(0), wide_ND.T @ wide_ND]
        before = sums[number] or [0, 0]
        sums[number] = [old + more for old, more in zip(before, new, strict=True)]

    hooks = [
        attention.module.register_forward_pre_hook(
            lambda _, given, named, number=number: note(number, given, named), with_kwargs=True
        )
        for number, attention in enumerate(attentions)
    ]
    base = attentions[0].base
    was_training = base.training
    base.eval()
    try:
        for rows_BT in text_NT.split(_ROWS):
            base(rows_BT.to(base.device), use_cache=False)
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    tokens = text_NT.numel()
    return [
        Moments(total / tokens, (square / tokens) - torch.outer(total, total) / tokens**2)
        for total, square in sums
    ]


@torch.no_grad()
def factors(attention: Attention, moments: Moments) -> Factors:
    """The best maps of every rank for one module."""
    both = [attention.projection(part) for part in (KEY, VALUE)]
    weight_FD = torch.cat([part.weight_XED.flatten(0, 1) for part in both]).double()
    bias_F = torch.cat([part.bias_XE.flatten() for part in both]).double()
    variance_D, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
    deviation_D = variance_D.clamp(min=_FLOOR * float(variance_D[-1])).sqrt()
    left_FZ, singular_Z, right_ZD = torch.linalg.svd(
        weight_FD @ (vectors_DD * deviation_D), full_matrices=False
    )
    return Factors(
        down_ZD=(right_ZD / deviation_D) @ vectors_DD.T,
        up_FZ=left_FZ * singular_Z,
        energy_Z=singular_Z**2,
        mean_D=moments.mean_D,
        bias_F=bias_F + weight_FD @ moments.mean_D,
    )


def spread(energies: Sequence[Tensor], total: int) -> list[int]:
    """Ranks that sum to `total`, each at least 1, with the least sum of the layers' relative losses."""
    gains = torch.cat([energy_Z / energy_Z.sum() for energy_Z in energies])
    layer = torch.cat([torch.full((len(e),), n) for n, e in enumerate(energies)])
    first = torch.cat([torch.arange(len(e)) == 0 for e in energies]).to(gains.device)
    best = gains.masked_fill(first, float("inf")).topk(total).indices
    return torch.bincount(layer.to(best.device)[best], minlength=len(energies)).tolist()


class LatentReader(EntryReader):
    """Keeps latents; all keys and values are rebuilt from them, the newest too.

    Attributes:
        down: from inputs to latents, ``[Z, D]`` and ``[Z]``.
        up: from latents to keys and to values.
    """

    exact: ClassVar[bool] = False

    def __init__(self, attention: Attention, group: Group, found: Factors, rank: int):
        super().__init__(attention, group)
        weight = attention.projection(KEY).weight_XED
        down_ZD = found.down_ZD[:rank]
        self.down = down_ZD.to(weight), -(down_ZD @ found.mean_D).to(weight)
        shape = (2, attention.groups, attention.head_width)
        self.up = [
            Projection(*pair)
            for pair in zip(
                found.up_FZ[:, :rank].to(weight).unflatten(0, shape),
                found.bias_F.to(weight).unflatten(0, shape),
                strict=True,
            )
        ]

    def entries(self, inputs_BTD: Tensor) -> Tensor:
        return torch.nn.functional.linear(inputs_BTD, *self.down)

    def projection(self, part: int) -> Projection:
        return self.up[part - KEY]


@register_policy("latent")
class Latent(Form):
    """A few numbers a token from which keys and values are rebuilt: the best of that rank on a text."""

    needs_text: ClassVar[bool] = True
    rank: int | str
    spread: bool = False

    @field_validator("rank")
    @classmethod
    def _number_or_share(cls, rank: int | str) -> int | str:
        text = str(rank)
        number = text.removesuffix("%")
        try:
            if float(number) > 0 and (text.endswith("%") or number.isdigit()):
                return text if text.endswith("%") else int(number)
        except ValueError:
            pass
        raise ValueError("expected a number such as 64 or a share such as 25%")

    def mean_rank(self, attentions: Sequence[Attention]) -> int:
        """Numbers a token and layer, before they are spread.

        Raises:
            InputError: they are none, or more than keys and values have.
        """
        most = min(min(2 * a.groups * a.head_width, a.width) for a in attentions)
        numbers = 2 * attentions[0].groups * attentions[0].head_width
        rank = self.rank
        if isinstance(rank, str):
            rank = min(most, round(numbers * float(rank.removesuffix("%")) / 100))
        if not 0 < rank <= most:
            raise InputError(
                f"policy {self.spec}: {rank} numbers a token and layer, where the model's keys and "
                f"values have {numbers} and rank {most} at most"
            )
        return rank

    def readers(
        self, attentions: Sequence[Attention], text: Tensor | None, rule: Rule = Rule()
    ) -> list[Reader]:
        rank = self.mean_rank(attentions)
        for attention in attentions:
            check_readable(attention)
        assert text is not None
        found = [
            factors(attention, moments)
            for attention, moments in zip(attentions, input_moments(attentions, text), strict=True)
        ]
        ranks = [rank] * len(found)
        if self.spread:
            ranks = spread([layer.energy_Z for layer in found], rank * len(found))
        groups = groups_of(attentions, rule, turns=True)
        return [
            LatentReader(*each) for each in zip(attentions, groups, found, ranks, strict=True)
        ]

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Latent | None:
        return cls(rank=f"{100 * share:g}%")
