"""The storage behind `InputCache`: a tensor of attention inputs per layer, growing by the token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from contextlm.base.errors import InputError
from contextlm.models.cache import RowStateLayer

SLACK = 8  # a full buffer grows by a share of 1 / SLACK of its length


class InputLayer(RowStateLayer):
    """Keeps what went into one attention module, for every token.

    Attributes:
        inputs: ``[B, S, D]``, or None before the first token.
        positions: each token's position id, ``[B, S]`` int32: only in the first layer of a model
            with rotary positions, else None.
    """

    kept: ClassVar[tuple[str, ...]] = ("inputs", "positions")
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Tensor | None = None
        self.positions: Tensor | None = None

    def append(self, new_BTD: Tensor) -> Tensor:
        """Take in the inputs of T new tokens and return all of them, ``[B, S + T, D]``.

        Raises:
            ValueError: the new tokens are for another number of rows.
        """
        self.inputs = _extended(self.inputs, new_BTD)
        self._seen += new_BTD.shape[1]
        self.is_initialized = True
        return self.inputs

    def append_positions(self, new_BT: Tensor) -> Tensor:
        """Take in T new positions (B may be 1 for all rows) and return all, ``[B, S + T]``.

        To be called after `append`, which says how many rows there are.
        """
        assert self.inputs is not None
        new_BT = new_BT.to(torch.int32).expand(self.inputs.shape[0], -1)
        self.positions = _extended(self.positions, new_BT)
        return self.positions

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, whose number is negative, as transformers' own layers take it.

        Raises:
            ValueError: it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected 0 or a negative number of tokens")
        self._seen = max(0, self._seen + tokens_to_remove)
        self._change(lambda value: value[:, : self._seen])


def input_layers(cache: Cache, layers: int) -> list[InputLayer]:
    """The layers of a cache of inputs; an empty `DynamicCache` becomes one of so many layers.

    The latter is what makes `generate` work without its knowing: the cache that it, or the model,
    has just made for keys and values gets layers for inputs before anything is in it.

    Raises:
        InputError: it is another kind of cache, or holds keys and values already.
    """
    kept = cache.layers
    if kept and isinstance(kept[0], InputLayer):
        return kept
    empty = cache.get_seq_length() == 0 and all(type(layer) is DynamicLayer for layer in kept)
    if not isinstance(cache, DynamicCache) or cache.offloading or not empty:
        raise InputError(
            f"InputCache is installed, so a {type(cache).__name__} of keys and values cannot be "
            "used: pass no cache, or one from new_cache(), and no cache_implementation"
        )
    cache.layer_class_to_replicate = None
    cache.layers = [InputLayer() for _ in range(layers)]
    return cache.layers


def _extended(kept: Tensor | None, new: Tensor) -> Tensor:
    """`kept` with `new` behind it along dimension 1, in spare room of its storage where there is.

    Growing by a share makes the copying of all tokens linear in their number. Where gradients may
    flow, the two are concatenated: nothing that autograd has saved is written to.
    """
    if kept is None:
        return new.contiguous()
    if kept.shape[0] != new.shape[0]:
        raise ValueError(f"the cache holds {kept.shape[0]} rows, the new tokens {new.shape[0]}")
    if torch.is_grad_enabled():
        return torch.cat([kept, new], dim=1)
    old, total = kept.shape[1], kept.shape[1] + new.shape[1]
    if total > _room(kept):
        roomy = kept.new_empty(kept.shape[0], total + total // SLACK, *kept.shape[2:])
        roomy[:, :old] = kept
        kept = roomy
    else:
        kept = kept.as_strided((kept.shape[0], total, *kept.shape[2:]), kept.stride())
    kept[:, old:total] = new
    return kept[:, :total]


def _room(kept: Tensor) -> int:
    """How many tokens a row's part of the storage can hold; 0 if it may not be written to."""
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        return 0
    per_token = kept.shape[2] if kept.dim() == 3 else 1
    room = kept.untyped_storage().nbytes() // (kept.element_size() * kept.shape[0] * per_token)
    strides = (room * per_token, per_token, 1)[: kept.dim()]
    return room if kept.stride() == strides and kept.storage_offset() == 0 else 0
