"""`latent`: a few numbers a token, from which its keys and values are rebuilt.

Let x be an attention module's input, with mean m and covariance C = L L^T over a calibration text,
W = [W_k; W_v] its projections and b their biases. What is kept is z = V^T L^-1 (x - m), what is
rebuilt from it T^-1 U S z + W m + b, with U S V^T the r largest singular values, and their
vectors, of T W L: of all maps of rank r this has the least mean square of T times its error. T
weighs errors by what they do to the module's output: an error d of a value counts |W_o d|^2, one
of a key (q . d)^2 |W_o v|^2, both on average, q being queries as they are turned at random
distances. Norms and rotary positions follow after rebuilding. What is lost is the sum of the other
squared singular values, by which a total can be spread over layers.

Whitening as in SVD-LLM (Wang et al., arXiv:2403.07378); keys and values together as in MHA2MLA (Ji
et al., arXiv:2502.14837); a cache of latents as in Palu (Chang et al., arXiv:2407.21118).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor, nn

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import KEY, VALUE, Attention, Projection
from contextlm.compress.base import Costs, Form, register_policy
from contextlm.compress.calibration import Calibration, Moments, Sizes
from contextlm.compress.entries import EntryReader
from contextlm.compress.inputs import check_readable
from contextlm.compress.kept import EVERYTHING, Group, Rule
from contextlm.compress.reading import Reader, Weights, groups_of

# Shares of the largest variance or weight: directions that the text does not show are not free.
_FLOOR = 1e-8
_LEAST_WEIGHT = 1e-4
# Errors of keys are less alike from token to token than those of values, and even out (measured).
_KEYS = 0.3


class Factors(NamedTuple):
    """The best maps of every rank, float64: the first r rows of down, the first r columns of up.

    `energy_Z` are the squared singular values, what each rank more is worth.
    """

    down_ZD: Tensor
    up_FZ: Tensor
    energy_Z: Tensor
    mean_D: Tensor
    bias_F: Tensor


@torch.no_grad()
def factors(attention: Attention, moments: Moments) -> Factors:
    """The best maps of every rank for one module."""
    keys, values = (attention.projection(part) for part in (KEY, VALUE))
    both = (keys, values)
    weight_FD = torch.cat([part.weight_XED.flatten(0, 1) for part in both]).to(moments.mean_D)
    bias_F = torch.cat([part.bias_XE.flatten() for part in both]).to(moments.mean_D)
    root_FF = torch.block_diag(*map(_root, error_weights(attention, moments)))
    variance_D, vectors_DD = torch.linalg.eigh(moments.covariance_DD)
    deviation_D = variance_D.clamp(min=_FLOOR * float(variance_D[-1])).sqrt()
    left_FZ, singular_Z, right_ZD = torch.linalg.svd(
        root_FF @ weight_FD @ (vectors_DD * deviation_D), full_matrices=False
    )
    return Factors(
        down_ZD=(right_ZD / deviation_D) @ vectors_DD.T,
        up_FZ=torch.linalg.solve(root_FF, left_FZ * singular_Z),
        energy_Z=singular_Z**2,
        mean_D=moments.mean_D,
        bias_F=bias_F + weight_FD @ moments.mean_D,
    )


def error_weights(attention: Attention, moments: Moments) -> list[Tensor]:
    """How much errors of each group's keys, then of each group's values, count: each ``[E, E]``."""
    second_DD = moments.covariance_DD + torch.outer(moments.mean_D, moments.mean_D)
    output_HED = attention.output_weight().to(second_DD)
    output_GJED = output_HED.unflatten(0, (attention.groups, -1))
    on_values_GEE = torch.einsum("gjed,gjfd->gef", output_GJED, output_GJED)

    def seconds(part: int) -> Tensor:
        weight_GED = attention.projection(part).weight_XED.to(second_DD)
        return torch.einsum("ged,dc,gfc->gef", weight_GED, second_DD, weight_GED)

    output_G = torch.einsum("gef,gfe->g", on_values_GEE, seconds(VALUE)) / output_GJED.shape[1]
    on_keys_GEE = _KEYS * moments.queries_GEE * output_G[:, None, None]
    if attention.names.norms is not None:  # errors shrink with what the norm divides by
        on_keys_GEE = on_keys_GEE / seconds(KEY).diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return [*on_keys_GEE, *on_values_GEE]


def _root(weight_EE: Tensor) -> Tensor:
    """The symmetric square root, without directions that count for nothing."""
    value_E, vectors_EE = torch.linalg.eigh(weight_EE)
    value_E = value_E.clamp(min=_LEAST_WEIGHT * float(value_E.mean().clamp(min=1e-30)))
    return (vectors_EE * value_E.sqrt()) @ vectors_EE.T


def spread(found: Sequence[Factors], moments: Sequence[Moments], total: int) -> list[int]:
    """Ranks that sum to `total`, with the least sum of losses, each as a share of its stream.

    Each layer gets at least half of the mean: losses of a layer are not all that it does to others.
    """
    least = total // len(found) // 2
    gains = [f.energy_Z[least:] / m.stream for f, m in zip(found, moments, strict=True)]
    layer = torch.cat([torch.full((len(gain),), number) for number, gain in enumerate(gains)])
    best = torch.cat(gains).cpu().topk(total - least * len(found)).indices
    return (torch.bincount(layer[best], minlength=len(found)) + least).tolist()


class Latents(Weights):
    """The weights of one attention module's latents.

    Attributes:
        rank: r.
        down: from inputs to the r numbers that are kept.
        up, bias: from these to keys, then values, of all groups; no module, whose adapters nobody
            would read.
    """

    def __init__(self, attention: Attention, rank: int):
        super().__init__()
        self.rank = rank
        like = next(attention.module.parameters())
        made = 2 * attention.groups * attention.head_width
        self.down = nn.Linear(attention.width, rank, dtype=like.dtype, device=like.device)
        self.up = nn.Parameter(like.new_zeros(made, rank))
        self.bias = nn.Parameter(like.new_zeros(made))

    @classmethod
    @torch.no_grad()
    def of(cls, attention: Attention, found: Factors, rank: int) -> Latents:
        """The first `rank` of the best maps, which nothing trains."""
        made = cls(attention, rank)
        down_ZD = found.down_ZD[:rank]
        made.down.weight.copy_(down_ZD)
        made.down.bias.copy_(-(down_ZD @ found.mean_D))
        made.up.copy_(found.up_FZ[:, :rank])
        made.bias.copy_(found.bias_F)
        return made.requires_grad_(False)


class LatentReader(EntryReader):
    """Keeps latents; all keys and values are rebuilt from them, the newest too."""

    exact: ClassVar[bool] = False
    weights: Latents

    def __init__(self, attention: Attention, group: Group, weights: Latents):
        super().__init__(attention, group)
        self.weights = weights

    def entries(self, inputs_BTD: Tensor) -> Tensor:
        return self.weights.down(inputs_BTD)

    def projection(self, part: int) -> Projection:
        shape = (2, self.attention.groups, self.attention.head_width)
        both = self.weights.up.unflatten(0, shape), self.weights.bias.unflatten(0, shape)
        return Projection(*(made[part - KEY] for made in both))


@register_policy("latent")
class Latent(Form):
    """A few numbers a token from which keys and values are rebuilt, fitted on a text."""

    needs_calibration: ClassVar[bool] = True
    rank: int | str
    spread: bool = False

    @field_validator("rank")
    @classmethod
    def _number_or_share(cls, rank: int | str) -> int | str:
        text = str(rank)
        number = text.removesuffix("%")
        try:
            if 0 < float(number) < math.inf and (text.endswith("%") or number.isdigit()):
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

    def check(self, attentions: Sequence[Attention]) -> None:
        self.mean_rank(attentions)
        for attention in attentions:
            check_readable(attention)

    def sizes(self, attentions: Sequence[Attention]) -> Sizes:
        return Sizes([self.mean_rank(attentions)] * len(attentions))

    def readers(
        self,
        attentions: Sequence[Attention],
        calibration: Calibration | Sizes | None,
        rule: Rule = EVERYTHING,
    ) -> list[Reader]:
        assert calibration is not None
        groups = groups_of(attentions, rule, Group, turns=True)
        if isinstance(calibration, Sizes):
            assert calibration.ranks is not None
            made = [Latents(*pair) for pair in zip(attentions, calibration.ranks, strict=True)]
        else:
            made = self._fitted(attentions, calibration)
        return [LatentReader(*each) for each in zip(attentions, groups, made, strict=True)]

    def _fitted(self, attentions: Sequence[Attention], calibration: Calibration) -> list[Latents]:
        rank = self.mean_rank(attentions)
        moments = calibration.moments(attentions)
        found = [factors(*pair) for pair in zip(attentions, moments, strict=True)]
        ranks = [rank] * len(found)
        if self.spread:
            ranks = spread(found, moments, rank * len(found))
        return [Latents.of(*each) for each in zip(attentions, found, ranks, strict=True)]

    @classmethod
    def proposed(cls, share: float, costs: Costs) -> Latent | None:
        return cls(rank=f"{100 * share:g}%")
