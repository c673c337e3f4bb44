"""What a text shows of each attention module: the moments that `latent` is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import Attention, rotated

_ROWS = 4  # of the text at once


class Moments(NamedTuple):
    """Second moments of one module, float64.

    Attributes:
        mean_D: of its inputs; `covariance_DD` likewise.
        queries_GEE: of its queries, summed over the heads that share keys; each turned as it is
            seen from a key at some distance within a row of the text, and scaled as scores are.
        stream: the mean square of what the layer adds its output to, without a row's first token,
            which is often huge.
    """

    mean_D: Tensor
    covariance_DD: Tensor
    queries_GEE: Tensor
    stream: float


class Sizes(NamedTuple):
    """In the place of a calibration: weights of these sizes are made, to be loaded or replaced.

    Attributes:
        ranks: numbers a token that each module keeps; None: the policy has no weights.
    """

    ranks: Sequence[int] | None


class Calibration:
    """A text, and the moments of a model on it, computed when they are first asked for.

    Args:
        text_NT: token ids.
    """

    def __init__(self, text_NT: Tensor):
        self.text_NT = text_NT
        self._moments: list[Moments] | None = None
        self._module: nn.Module | None = None

    def moments(self, attentions: Sequence[Attention]) -> list[Moments]:
        """Those of each module.

        Raises:
            InputError: the first call was for another model.
        """
        if self._moments is None:
            self._moments = _measured(attentions, self.text_NT)
            self._module = attentions[0].module
        elif self._module is not attentions[0].module:
            raise InputError("this calibration is another model's: make one for each model")
        return self._moments


@torch.no_grad()
def _measured(attentions: Sequence[Attention], text_NT: Tensor) -> list[Moments]:
    sums: list[list[Tensor]] = [[] for _ in attentions]
    streams = [0.0 for _ in attentions]
    generator = torch.Generator().manual_seed(0)

    def note(number: int, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        attention = attentions[number]
        inputs_BTD = given[0] if given else named["hidden_states"]
        query_BHTE = attention.queries(inputs_BTD) * attention.scaling
        if attention.has_rotary:
            rows, length = inputs_BTD.shape[:2]
            distance_BT = torch.randint(length, (rows, length), generator=generator)
            turns = attention.turns(inputs_BTD, distance_BT.to(inputs_BTD.device))
            query_BHTE = rotated(query_BHTE, turns)
        query_BGJTE = _wide(query_BHTE).unflatten(1, (attention.groups, -1))
        inputs_ND = _wide(inputs_BTD.flatten(0, 1))
        new = [
            inputs_ND.sum(0),
            inputs_ND.T @ inputs_ND,
            torch.einsum("bgjte,bgjtf->gef", query_BGJTE, query_BGJTE),
        ]
        before = sums[number] or [torch.zeros_like(total) for total in new]
        sums[number] = [old + more for old, more in zip(before, new, strict=True)]

    def note_stream(number: int, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        stream_BTD = given[0] if given else named["hidden_states"]
        streams[number] += float(_wide(stream_BTD[:, 1:]).square().mean(-1).sum())

    hooks = []
    for number, attention in enumerate(attentions):
        for module, noted in ((attention.module, note), (attention.block, note_stream)):
            hook = partial(_called, noted, number)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
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
        Moments(
            total_D / tokens,
            square_DD / tokens - torch.outer(total_D, total_D) / tokens**2,
            queries_GEE / tokens,
            stream / max(1, tokens - len(text_NT)),
        )
        for (total_D, square_DD, queries_GEE), stream in zip(sums, streams, strict=True)
    ]


def _called(noted: Any, number: int, module: Any, given: Any, named: Any) -> None:
    """As torch calls a hook."""
    noted(number, given, named)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
