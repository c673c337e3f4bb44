"""What a decoder is given, read the same way by every architecture.

Shape suffixes: B batch, T new tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from contextlm.models.cache import RowStateLayer


class Decoder(Protocol):
    """What `read_inputs` needs of a decoder."""

    config: PreTrainedConfig
    embed_tokens: nn.Module
    training: bool

    def new_cache(self) -> Cache:
        """An empty cache of the decoder's own kind."""
        ...


@dataclass(frozen=True)
class DecoderInputs:
    """The new tokens of a forward pass.

    Attributes:
        embeds_BTD: their embeddings.
        mask_BT: False at padding; None when every new token is real.
        seen_B: real tokens that each row has seen before; None at the beginning.
        cache: to be moved on, or None.
        past: tokens that the cache has seen, padding included.
    """

    embeds_BTD: Tensor
    mask_BT: Tensor | None
    seen_B: Tensor | None
    cache: Cache | None
    past: int

    def positions(self) -> Tensor:
        """Position of each new token among the real tokens of its own row, ``[B, T]`` int64."""
        batch, tokens = self.embeds_BTD.shape[:2]
        return real_positions(self.mask_BT, self.seen_B, batch, tokens, self.embeds_BTD.device)


def read_inputs(
    decoder: Decoder,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> DecoderInputs:
    """Check and read the arguments of a decoder's forward pass.

    Every `RowStateLayer` of a cache counts each row's tokens, so there must be one.

    Args:
        decoder: whose forward pass it is.
        input_ids: ``[B, T]``, or None.
        inputs_embeds: ``[B, T, D]``, or None.
        attention_mask: ``[B, past + T]``, 0 at padding, or None.
        position_ids: ``[B, T]``, only checked for packed documents.
        past_key_values: a cache that `new_cache` made, or None.
        use_cache: make one if there is none.

    Raises:
        ValueError: neither or both of tokens and embeddings are given, the cache is not of the
            decoder's making, has other rows or would be moved on twice by gradient checkpointing,
            the mask does not fit, or documents are packed.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = decoder.embed_tokens(input_ids)
    if past_key_values is None and use_cache:
        past_key_values = decoder.new_cache()
    past, seen_B = 0, None
    if past_key_values is not None:
        counter = _counter(decoder, past_key_values)
        counter.check_rows(inputs_embeds.shape[0])
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs every layer twice, which would move the cache on "
                "twice: train without past_key_values, and call eval() before generating"
            )
        past, seen_B = counter.get_seq_length(), counter.counts
        # The layer that counts may be on another device than the embeddings.
        seen_B = None if seen_B is None else seen_B.to(inputs_embeds.device)
    batch, tokens = inputs_embeds.shape[:2]
    mask_BT = token_mask(attention_mask, batch, tokens, past)
    if position_ids is not None:
        refuse_packed(position_ids, mask_BT)
    return DecoderInputs(inputs_embeds, mask_BT, seen_B, past_key_values, past)


def _counter(decoder: Decoder, cache: Cache) -> RowStateLayer:
    kinds = [type(layer) for layer in decoder.new_cache().layers]
    if [type(layer) for layer in cache.layers] == kinds:
        for layer in cache.layers:
            if isinstance(layer, RowStateLayer):
                return layer
    raise ValueError(
        f"{decoder.config.model_type} needs its own cache: leave past_key_values out, pass "
        "what an earlier call returned, or make one with new_cache()"
    )


def token_mask(
    attention_mask: Tensor | None, batch: int, tokens: int, seen: int = 0
) -> Tensor | None:
    """Which of the newest tokens are real.

    Args:
        attention_mask: ``[B, past + T]``, 0 at padding, or None.
        batch: B.
        tokens: T.
        seen: past, the tokens that the cache has seen.

    Returns:
        ``[B, T]`` bool, or None when every token is real.

    Raises:
        ValueError: the mask is not two-dimensional, too short, or of other rows.
    """
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or attention_mask.shape[1] < seen + tokens:
        raise ValueError(
            f"attention_mask must be [{batch} rows, {seen} past + {tokens} new tokens], "
            f"got {list(attention_mask.shape)}"
        )
    mask_BT = attention_mask[:, seen : seen + tokens].bool()
    if not torch.compiler.is_compiling() and bool(mask_BT.all()):
        return None
    return mask_BT


def real_positions(
    mask_BT: Tensor | None, seen_B: Tensor | None, batch: int, tokens: int, device: torch.device
) -> Tensor:
    """Position of each token among the real tokens of its own row, so that padding changes nothing.

    Args:
        mask_BT: False at padding, or None.
        seen_B: real tokens that each row has seen before, or None for none.
        batch: B.
        tokens: T.
        device: where to make the result.

    Returns:
        ``[B, T]`` int64; 0 at leading padding.
    """
    if mask_BT is None:
        positions_BT = torch.arange(tokens, device=device).expand(batch, tokens)
    else:
        positions_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    return positions_BT if seen_B is None else positions_BT + seen_B.unsqueeze(1)


def refuse_packed(position_ids: Tensor, mask_BT: Tensor | None) -> None:
    """Documents packed into one row, with positions that start anew, are not for recurrences.

    Args:
        position_ids: ``[B, T]`` or ``[1, T]``.
        mask_BT: False at padding, whose positions say nothing; None without padding.

    Raises:
        ValueError: the positions of a row's real tokens do not increase.
    """
    if torch.compiler.is_compiling() or position_ids.device.type == "meta":
        return  # values cannot be looked at here
    real = position_ids if mask_BT is None else position_ids.masked_fill(~mask_BT, -1)
    # Padding stands at -1, before every position, and begins nothing itself.
    begins = (real[:, 1:] <= real.cummax(1).values[:, :-1]) & (real[:, 1:] >= 0)
    if bool(begins.any()):
        raise ValueError(
            "position_ids must increase: packed documents are not supported, because the context "
            "would run on from one to the next; put each document into a row of its own"
        )
