"""Attention by whichever function the configuration names, and the rotary positions before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import packed_sequence_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from contextlm.models.inputs import NewTokens


def attend(
    module: Any,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What each query reads, ``[B, T, H E]``, and the weights where the function gives them.

    Args:
        module: whose attention it is; its `config` names the function (`attn_implementation`).
        query_BHTE: queries.
        key_BGSE: keys; each of the G heads serves H / G heads of queries.
        value_BGSE: values, as wide as the keys.
        mask: ``[B or 1, 1, T, S]`` bool, False where a query may not look, or as
            `create_causal_mask` makes it; None: causal, T = S.
        scaling: of the scores; None is ``E ** -0.5``.
        dropout: share of the weights to drop in training.
        **kwargs: for the function.
    """
    name = module.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, plain_attention)
    out_BTHE, weights = function(
        _Heads(module, query_BHTE.shape[1] // key_BGSE.shape[1]),
        query_BHTE,
        key_BGSE,
        value_BGSE,
        mask,
        dropout=dropout if module.training else 0.0,
        scaling=query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling,
        **kwargs,
    )
    return out_BTHE.flatten(2), weights


def attends_plainly(module: Any) -> bool:
    """Whether torch's own function is configured, in whose place a compiled step may come."""
    return bool(module.config._attn_implementation == "sdpa")


def same_document(new: NewTokens) -> Callable[..., Any] | None:
    """What `create_causal_mask` asks besides, so that packed documents do not see each other."""
    if new.packed_BT is None:
        return None
    return packed_sequence_mask_function((new.positions() == 0).cumsum(1))


class _Heads:
    """What attention functions read of a module; one module may attend with several groupings."""

    def __init__(self, module: Any, groups: int):
        self.num_key_value_groups = groups
        self.is_causal = True
        self.config, self.training = module.config, module.training
        self.modules = module.modules


def plain_attention(
    module: Any,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The naive form (``eager``), which also gives its weights; the softmax in float32 at least."""
    groups, tokens = query_BHTE.shape[1] // key_BGSE.shape[1], query_BHTE.shape[2]
    key, value = repeat_kv(key_BGSE, groups), repeat_kv(value_BGSE, groups)
    scores_BHTS = query_BHTE @ key.mT * scaling
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTE.device).tril()
    if mask.dtype == torch.bool:
        # Not infinity: a row that may look nowhere is padding, and stays finite.
        scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
    else:
        scores_BHTS = scores_BHTS + mask
    kind = torch.promote_types(query_BHTE.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=kind).to(value.dtype)
    weights_BHTS = F.dropout(weights_BHTS, dropout)
    return (weights_BHTS @ value).transpose(1, 2).contiguous(), weights_BHTS


def rotate(x_BHTE: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Turn each pair of channels ``(e, e + E/2)`` by its position times ``theta^(-2e/E)``.

    Rotary positions (Su et al., RoFormer, arXiv:2104.09864), in the precision of what they turn:
    transformers' own computes angles in float32 whatever the model's type, and a window whose
    columns are counted anew in every chunk needs the same relative turn to full precision.

    Args:
        x_BHTE: queries or keys; E is even.
        positions_BT: ``[B, T]`` or ``[1, T]``.
        theta: base of the frequencies.

    Returns:
        The same shape and type.
    """
    kind = torch.promote_types(x_BHTE.dtype, torch.float32)
    cos, sin = _turns(positions_BT.to(kind), x_BHTE.shape[-1], theta)
    return _turned(x_BHTE, cos.to(x_BHTE.dtype), sin.to(x_BHTE.dtype))


def rotate_columns(x_BHTE: Tensor, first: int, theta: float) -> Tensor:
    """As `rotate`, the positions being ``first, first + 1 ...``, whose turns are remembered."""
    kind, last = torch.promote_types(x_BHTE.dtype, torch.float32), first + x_BHTE.shape[2]
    if torch.compiler.is_compiling():
        columns_1S = torch.arange(last, dtype=kind, device=x_BHTE.device).unsqueeze(0)
        cos, sin = _turns(columns_1S, x_BHTE.shape[-1], theta)
    else:
        cos, sin = turns_of_columns(last, x_BHTE.shape[-1], theta, kind, x_BHTE.device)
    cos, sin = (each[..., first:last, :].to(x_BHTE.dtype) for each in (cos, sin))
    return _turned(x_BHTE, cos, sin)


def _turns(positions_BT: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, ``[B, 1, T, E / 2]``."""
    steps = torch.arange(0, width, 2, device=positions_BT.device, dtype=positions_BT.dtype) / width
    angles_B1TE = (positions_BT.unsqueeze(-1) * theta**-steps).unsqueeze(1)
    return angles_B1TE.cos(), angles_B1TE.sin()


@lru_cache(maxsize=8)
def turns_of_columns(
    columns: int, width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle at columns 0, 1 ..., ``[1, 1, S, E / 2]``."""
    with torch.inference_mode(False):  # they may be part of a graph later
        positions_1S = torch.arange(columns, dtype=dtype, device=device).unsqueeze(0)
        return _turns(positions_1S, width, theta)


def _turned(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x_BHTE.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
