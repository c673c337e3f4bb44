"""The new tokens of a forward pass: which are real, where they stand, what came before them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class NewTokens:
    """Where the T new tokens of each row stand in its text; every architecture and mixer reads it.

    A phase, a grid, a segment or a position is counted over a row's real tokens, so that padding
    changes nothing. `real_first` puts these in front: then column t is the row's t-th new token,
    and what is behind them is later than all of them and, in a causal model, without effect.

    Attributes:
        batch: B.
        tokens: T, padding included.
        device: of the tensors here.
        past: tokens that the cache has seen, padding included.
        seen_B: real tokens that each row has seen; None at the beginning of a text.
        mask_BT: False at padding, in the order of the input; None when all are real.
        order_BT: the columns of the input with each row's real tokens first; None when all are.
        cache: to be moved on, or None.
        attention_mask: as it was given, ``[B, past + T]``, or None.
        position_ids: as they were given, ``[B, T]`` or ``[1, T]``, or None.
        contexts: of a context store, ``[B, history + T, C]``, in place of the recurrence; or None.
        last: how many of the tokens' hidden states are wanted; 0 for all.
    """

    batch: int
    tokens: int
    device: torch.device
    past: int = 0
    seen_B: Tensor | None = None
    mask_BT: Tensor | None = None
    order_BT: Tensor | None = None
    cache: Cache | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    contexts: Tensor | None = None
    last: int = 0

    @classmethod
    def of(
        cls,
        embeds_BTD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        past: int = 0,
        seen_B: Tensor | None = None,
        **more: Any,
    ) -> NewTokens:
        """From the tokens' embeddings and the mask of these and all earlier tokens.

        The other attributes are taken by their names.

        Raises:
            ValueError: the mask is not two-dimensional, too short, or of other rows.
        """
        batch, tokens = embeds_BTD.shape[:2]
        mask_BT = _newest_columns(attention_mask, batch, past, tokens)
        return cls(
            batch,
            tokens,
            embeds_BTD.device,
            past=past,
            seen_B=None if seen_B is None else seen_B.to(embeds_BTD.device),
            mask_BT=mask_BT,
            order_BT=_real_first(mask_BT),
            attention_mask=attention_mask,
            **more,
        )

    def to(self, device: torch.device) -> NewTokens:
        """The same on another device: layers may be spread over several."""
        if device == self.device:
            return self
        moved: dict[str, Any] = {"device": device}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
        return replace(self, **moved)

    def split(self, first: int) -> tuple[NewTokens, NewTokens]:
        """The first so many columns, and the others as if they came in a later pass."""

        def part(start: int, end: int, seen_B: Tensor | None) -> NewTokens:
            mask_BT = None if self.mask_BT is None else self.mask_BT[:, start:end]
            return replace(
                self,
                tokens=end - start,
                past=self.past + start,
                seen_B=seen_B,
                mask_BT=mask_BT,
                order_BT=_real_first(mask_BT),
            )

        before = part(0, first, self.seen_B)
        return before, part(first, self.tokens, before.starts.squeeze(1) + before.counts)

    def states(self, count: int) -> list[Any]:
        """What each of so many layers of the cache keeps; None where nothing is kept."""
        return [None] * count if self.cache is None else self.cache.layers

    @property
    def counts(self) -> Tensor:
        """How many of the new tokens are real in each row, ``[B]``."""
        if self.mask_BT is None:
            return torch.full((self.batch,), self.tokens, device=self.device)
        return self.mask_BT.sum(1)

    @property
    def real_first_mask(self) -> Tensor | None:
        """False at padding once real tokens stand first, ``[B, T]``; None when all are real."""
        if self.mask_BT is None:
            return None
        return torch.arange(self.tokens, device=self.device) < self.counts.unsqueeze(1)

    def ends(self, kept: int) -> Tensor | None:
        """The column behind each row's newest token, ``[B]``, after K entries kept; None: S."""
        return None if self.mask_BT is None else kept + self.counts

    @property
    def starts(self) -> Tensor:
        """Position of each row's first new token, ``[B, 1]``; ``[1, 1]`` if no row can differ."""
        if self.seen_B is None:
            return torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return self.seen_B.unsqueeze(1)

    def positions(self) -> Tensor:
        """Position of each token among the real ones of its row, in the order of the input.

        ``[B, T]`` int64, or ``[1, T]`` where no row can differ; 0 at a text's leading padding.
        """
        if self.mask_BT is None:
            return self.starts + torch.arange(self.tokens, device=self.device)
        return self.starts + (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)

    def table_positions(self, limit: int) -> Tensor:
        """Where each token looks up its learned position, of which there are `limit`.

        The positions that were given, else those counted: ``[B, T]`` or ``[1, T]`` int64; 0 at
        padding, which may stand anywhere.

        Raises:
            ValueError: a row has more tokens than the table has positions.
        """
        certain = self.position_ids is None and self.past + self.tokens <= limit
        positions_BT = self.positions() if self.position_ids is None else self.position_ids
        if self.mask_BT is not None:
            positions_BT = torch.where(self.mask_BT, positions_BT, 0)
        # Looking at values makes an accelerator wait, and is not possible everywhere.
        if not certain and _values_can_be_read(positions_BT):
            needed = int(positions_BT.max()) + 1
            if needed > limit:
                raise ValueError(
                    f"max_position_embeddings is {limit}: the model has no position for token "
                    f"{needed} of a row"
                )
        return positions_BT

    def columns(self, kept: int) -> Tensor:
        """Positions of K entries kept and the new tokens behind them, real ones first, ``[B, S]``.

        B is 1 where no row can differ. Negative where a row has filled no column yet.
        """
        return self.starts - kept + torch.arange(kept + self.tokens, device=self.device)

    def real_first(self, values_BTE: Tensor) -> Tensor:
        """Each row's real tokens in front, in their own order."""
        return values_BTE if self.order_BT is None else take(values_BTE, self.order_BT)

    def as_given(self, values_BTE: Tensor) -> Tensor:
        """Back from `real_first` to the order of the input."""
        if self.order_BT is None:
            return values_BTE
        return take(values_BTE, torch.argsort(self.order_BT, dim=1))

    def refuse_packed(self) -> None:
        """Documents packed into one row, with positions that start anew, are not for recurrences.

        Raises:
            ValueError: the positions of a row's real tokens do not increase.
        """
        if self.position_ids is None or not _values_can_be_read(self.position_ids):
            return
        real = self.position_ids
        if self.mask_BT is not None:  # padding's positions say nothing
            real = real.masked_fill(~self.mask_BT, -1)
        # Padding stands at -1, before every position, and begins nothing itself.
        begins = (real[:, 1:] <= real.cummax(1).values[:, :-1]) & (real[:, 1:] >= 0)
        if bool(begins.any()):
            raise ValueError(
                "position_ids must increase: packed documents are not supported, because the "
                "context would run on from one to the next; put each document into a row of its own"
            )


def take(values_BTE: Tensor, columns_BK: Tensor) -> Tensor:
    """The named columns of each row, ``[B, K, E]``."""
    return values_BTE.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, values_BTE.shape[-1]))


def _values_can_be_read(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.device.type != "meta"


def _real_first(mask_BT: Tensor | None) -> Tensor | None:
    if mask_BT is None:
        return None
    return torch.argsort(mask_BT.int(), dim=1, descending=True, stable=True)


def _newest_columns(
    attention_mask: Tensor | None, batch: int, past: int, tokens: int
) -> Tensor | None:
    """Which of the new tokens are real, ``[B, T]``; None when all are."""
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or attention_mask.shape[1] < past + tokens:
        raise ValueError(
            f"attention_mask must be [{batch} rows, {past} past + {tokens} new tokens], "
            f"got {list(attention_mask.shape)}"
        )
    mask_BT = attention_mask[:, past : past + tokens].bool()
    if not torch.compiler.is_compiling() and bool(mask_BT.all()):
        return None
    return mask_BT
