"""Attention by whichever function the configuration names (``attn_implementation``).

Shape suffixes: B batch, T new tokens, S tokens kept and new, H query heads, M heads of keys and
values, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward


def attend(
    module: Any, query_BHTE: Tensor, key_BMSE: Tensor, value_BMSE: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention by the function that the configuration names, ``[B, T, H E]``.

    Args:
        module: has `config`, `num_key_value_groups`, `scaling` and `is_causal`.
        query_BHTE: queries.
        key_BMSE: keys; each of the M heads serves H / M query heads.
        value_BMSE: values, as wide as the keys.
        mask: ``[B, 1, T, S]`` bool, False where a query may not look; None: causal, T = S.
    """
    name = module.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    if name == "eager":  # it adds its mask to the scores
        if mask is None:
            tokens = query_BHTE.shape[2]
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query_BHTE.device)
            mask = mask.tril()[None, None]
        lowest = torch.finfo(query_BHTE.dtype).min
        mask = torch.zeros_like(mask, dtype=query_BHTE.dtype).masked_fill(~mask, lowest)
    out_BTHE, _ = function(
        module, query_BHTE, key_BMSE, value_BMSE, mask, dropout=0.0, scaling=module.scaling
    )
    return out_BTHE.flatten(2)
