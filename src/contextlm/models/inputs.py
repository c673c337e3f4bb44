"""The new tokens of a forward pass: which are real, where they stand, what came before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from contextlm.ops.backends import takes_steps


@dataclass(frozen=True)
class NewTokens:
    """Where the T new tokens of each row stand in its text; every architecture and mixer reads it.

    A phase, a grid, a segment or a position is counted over a row's real tokens, so that padding
    changes nothing. `real_first` puts these in front: then column t is the row's t-th new token,
    and what is behind them is later than all of them and, in a causal model, without effect.

    A row may hold several documents, packed one behind the other. A mixer must not let one see
    another: `real_first_positions` are 0 where a document begins. It may also take the documents
    `apart`, a row each.

    Attributes:
        batch: B.
        tokens: T, padding included.
        device: of the tensors here.
        past: tokens that the cache has seen, padding included.
        seen_B: real tokens that each row has seen; None at the beginning of a text.
        mask_BT: False at padding, in the order of the input; None when all are real.
        order_BT: the columns of the input with each row's real tokens first; None when all are.
        packed_BT: each token's position in its document, real tokens first; None when no row holds
            more than one document. Packed ones go without a cache.
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
    packed_BT: Tensor | None = None
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
            order_BT, packed_BT, ids = _real_first(mask_BT), None, self.position_ids
            if self.packed_BT is not None:
                packed_BT = self.positions()[:, start:end]
                packed_BT = packed_BT if order_BT is None else packed_BT.gather(1, order_BT)
            return replace(
                self,
                tokens=end - start,
                past=self.past + start,
                seen_B=seen_B,
                mask_BT=mask_BT,
                order_BT=order_BT,
                packed_BT=packed_BT,
                position_ids=None if ids is None else ids[:, start:end],
            )

        before = part(0, first, self.seen_B)
        return before, part(first, self.tokens, before.starts.squeeze(1) + before.counts)

    def states(self, count: int) -> list[Any]:
        """What each of so many layers of the cache keeps; None where nothing is kept."""
        return [None] * count if self.cache is None else self.cache.layers

    @property
    def is_step(self) -> bool:
        """Whether this is one more real token of each row, which compiled steps may do."""
        return not torch.compiler.is_compiling() and self._is_step

    @cached_property  # looked at often, and unknown to torch.compile
    def _is_step(self) -> bool:
        return (
            self.tokens == 1
            and self.seen_B is not None
            and self.mask_BT is None
            and takes_steps(self.device)
        )

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
        """Position of each token among the real ones of its document, in the order of the input.

        ``[B, T]`` int64, or ``[1, T]`` where no row can differ; 0 at a text's leading padding.
        """
        if self.packed_BT is not None:
            return self.as_given(self.packed_BT.unsqueeze(-1)).squeeze(-1)
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
        if not certain and _values_can_be_read(self.device):
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

    def real_first_positions(self) -> Tensor:
        """Position of each token in its document, real tokens first, ``[B, T]`` or ``[1, T]``."""
        return self.columns(0) if self.packed_BT is None else self.packed_BT

    def visible(self, kept: int, window: int | None = None, tokens: slice = slice(None)) -> Tensor:
        """Which of K entries kept and the new ones each token may see, ``[B or 1, 1, T, S]``.

        Those of its document up to its own; with a window no more than so many, its own included.
        Of the new tokens all are asked about, or some.
        """
        column_S = torch.arange(kept + self.tokens, device=self.device)
        query_T1 = column_S[kept:][tokens].unsqueeze(1)
        reach_BT1 = self.real_first_positions()[:, tokens].unsqueeze(2)
        if window is not None:
            reach_BT1 = reach_BT1.clamp(max=window - 1)
        return ((column_S <= query_T1) & (column_S >= query_T1 - reach_BT1)).unsqueeze(1)

    def with_documents(
        self, cu_seq_lens: Sequence[Tensor], seq_idx: Tensor | None, *, in_graph: bool
    ) -> NewTokens:
        """The same with `packed_BT`, if a row holds several documents by any of the three forms.

        One of these are `position_ids` that begin anew. A border is one whichever form names it.

        Args:
            cu_seq_lens: of queries and of keys, as far as given: the columns of the only row at
                which documents begin, and the end of the last, ``[documents + 1]``.
            seq_idx: the number of each token's document, ``[B, T]``.
            in_graph: while torch.compile or torch.export traces, which cannot look for borders:
                reckon with them where there is no cache. Otherwise running such a graph fails
                where there are any.

        Raises:
            ValueError: the borders do not fit the tokens.
        """
        numbers = [self._numbers(ends) for ends in cu_seq_lens]
        numbers += [] if seq_idx is None else [seq_idx]
        positions = [] if self.position_ids is None else [self.position_ids]
        for values_BT in (*numbers, *positions):
            if values_BT.shape[-1] != self.tokens or values_BT.dim() != 2:
                raise ValueError(
                    f"positions and numbers of documents must be [{self.batch}, {self.tokens}] as "
                    f"the tokens, got {list(values_BT.shape)}"
                )
        if self.tokens == 1:
            return self
        steps = [self._steps(values_BT) != 0 for values_BT in numbers]
        steps += [self._steps(values_BT) <= 0 for values_BT in positions]
        if not steps:
            return self
        begins_BT = F.pad(torch.stack(steps).any(0), (1, 0), value=True)
        real_BT = self.real_first_mask
        if real_BT is not None:  # what stands at padding says nothing
            begins_BT = begins_BT & real_BT
        packed = begins_BT[:, 1:].any()
        if _values_can_be_read(self.device):
            if not bool(packed):
                return self
        elif self.cache is not None or not in_graph:
            if self.device.type != "meta":
                torch._assert_async(~packed, "this graph is for one document a row")
            return self
        column_T = torch.arange(self.tokens, device=self.device)
        first_BT = torch.where(begins_BT, column_T, 0).cummax(1).values
        return replace(self, packed_BT=column_T - first_BT)

    def _numbers(self, cu_seq_lens: Tensor) -> Tensor:
        """The number of each token's document, ``[1, T]``."""
        ends = cu_seq_lens.to(self.device)
        if self.batch > 1 or ends.dim() != 1:
            raise ValueError(
                f"cu_seq_lens_q [documents + 1] is for one row of tokens, got "
                f"{list(cu_seq_lens.shape)} for {self.batch} rows"
            )
        if _values_can_be_read(self.device) and int(ends[-1]) != self.tokens:
            raise ValueError(f"cu_seq_lens_q ends at {int(ends[-1])} of {self.tokens} tokens")
        column_T = torch.arange(self.tokens, device=self.device)
        return torch.searchsorted(ends.to(column_T.dtype), column_T, right=True).unsqueeze(0)

    def _steps(self, values_BT: Tensor) -> Tensor:
        """By how much each value differs from that of the real token before, ``[B, T - 1]``."""
        values_BT = values_BT.to(self.device).expand(self.batch, -1)
        return self.real_first(values_BT.unsqueeze(-1)).squeeze(-1).diff(dim=1)

    def apart(self) -> Apart:
        """Packed documents with a row each.

        Raises:
            ValueError: while torch.compile or torch.export traces, because how many rows that makes
                depends on values.
        """
        if not _values_can_be_read(self.device):
            raise ValueError("this model cannot be traced with packed documents")
        begins_BT = self.positions() == 0
        if self.mask_BT is None:
            columns = torch.arange(begins_BT.numel(), device=self.device)
        else:
            begins_BT = begins_BT & self.mask_BT
            columns = self.mask_BT.flatten().nonzero().squeeze(1)
        # In the order of the input too, a row's documents follow one another.
        number = begins_BT.flatten()[columns].cumsum(0) - 1
        lengths = torch.bincount(number).tolist()
        columns_NS = pad_sequence(list(columns.split(lengths)), batch_first=True, padding_value=-1)
        mask_NS = None if min(lengths) == max(lengths) else columns_NS >= 0
        columns_NS = columns_NS.clamp(min=0)
        ids = self.position_ids
        documents, longest = columns_NS.shape
        new = NewTokens(
            documents,
            longest,
            self.device,
            mask_BT=mask_NS,
            attention_mask=mask_NS,
            position_ids=None if ids is None else ids.expand(self.batch, -1).flatten()[columns_NS],
        )
        return Apart(new, columns_NS, self.batch, self.tokens)


@dataclass(frozen=True)
class Apart:
    """Packed documents with a row each, for what runs through a row from its beginning to its end.

    There are N documents; S is the length of the longest here.

    Attributes:
        new: these rows, each with its real tokens first.
        columns_NS: where each token stands among all tokens of the packed rows; 0 at padding.
        batch: B.
        tokens: T.
    """

    new: NewTokens
    columns_NS: Tensor
    batch: int
    tokens: int

    def rows(self, packed_BTE: Tensor) -> Tensor:
        """``[N, S, E]``; something at padding."""
        return packed_BTE.flatten(0, 1)[self.columns_NS]

    def packed(self, rows_NSE: Tensor) -> Tensor:
        """Back to the packed rows, ``[B, T, E]``; 0 at their padding."""
        columns, values = self.columns_NS.flatten(), rows_NSE.flatten(0, 1)
        if self.new.mask_BT is not None:
            real = self.new.mask_BT.flatten()
            columns, values = columns[real], values[real]
        packed = values.new_zeros(self.batch * self.tokens, values.shape[-1])
        return packed.index_copy(0, columns, values).unflatten(0, (self.batch, self.tokens))


def take(values_BTE: Tensor, columns_BK: Tensor) -> Tensor:
    """The named columns of each row, ``[B, K, E]``."""
    return values_BTE.gather(1, columns_BK.unsqueeze(-1).expand(-1, -1, values_BTE.shape[-1]))


def _values_can_be_read(device: torch.device) -> bool:
    return not torch.compiler.is_compiling() and device.type != "meta"


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
