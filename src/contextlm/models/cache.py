"""Cache layers for states that are not keys and values.

Each is an ordinary member of a transformers `Cache`, so that `generate` can reorder it for beams,
repeat it for several returned sequences and ask how many tokens it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from contextlm.models.inputs import NewTokens, take

NAMES = ("cache", "past_key_values")
"""What transformers calls a cache, as an argument and in outputs: since 5.24, and before."""

CACHE = next(name for name in NAMES if name in {it.name for it in fields(BaseModelOutputWithPast)})
"""What the transformers that is installed calls it."""


def given_cache(*named: Cache | None) -> Cache | None:
    """The cache that was given under one of its names.

    Raises:
        ValueError: it was given under both.
    """
    given = [cache for cache in named if cache is not None]
    if len(given) > 1:
        raise ValueError(f"give the cache once: {' and '.join(NAMES)} are two names of it")
    return given[0] if given else None


class RowStateLayer(CacheLayerMixin):
    """Counts the tokens of each row, and chooses and repeats rows of all that a subclass keeps.

    Attributes:
        kept: names of the attributes that hold one entry per row, along dimension 0.
        counts: real (not padding) tokens seen by each row, ``[B]`` int64, or None at the beginning.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts",)
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None
        self._seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first tokens bring the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not for this layer: it keeps no keys and values.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} keeps no keys and values to update")

    def advance(self, new: NewTokens) -> None:
        """Count the new tokens."""
        if self.counts is None:
            self.counts = new.counts
        else:
            self.counts = self.counts + (new.tokens if new.mask_BT is None else new.counts)
        self._seen += new.tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; `generate` slices its input with this."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover, as if all tokens were kept."""
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        for name in self.kept:
            setattr(self, name, None)
        self._seen = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Stay on the device: the state is small."""

    def prefetch(self) -> None:
        """Stay on the device: the state is small."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put something else in the place of each tensor kept."""
        for name in self.kept:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows named by `beam_idx`, ``[B]``, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`, numbers or a mask."""
        self._change(lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._change(lambda value: value.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrence or a bounded window cannot be rewound.

        Raises:
            ValueError: when any token is to be removed.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"{type(self).__name__} cannot be cropped: what it kept of earlier tokens is gone; "
                "start again from an empty cache"
            )


class KeyValueLayer(DynamicLayer):
    """transformers' keys and values of all tokens; `reset` of 5.17 leaves as many, all zero."""

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False


class CroppableLayer(RowStateLayer):
    """Can forget the newest tokens, as far as none is padding.

    By itself it only counts, beside transformers' own layers of keys and values.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self._real_tail = 0  # newest tokens that were real in every row

    def advance(self, new: NewTokens) -> None:
        """Count the new tokens, and how far back none is padding."""
        self._real_tail = _real_tail(self._real_tail, new.mask_BT, new.tokens)
        super().advance(new)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._real_tail = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row.

        Args:
            tokens_to_remove: how many, as a negative number, as transformers' own layers take it.

        Raises:
            ValueError: it is positive, the cache cannot be cropped, or one of the tokens was
                padding.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected 0 or a negative number of tokens")
        if not self.is_croppable:
            super().crop(tokens_to_remove)
        if self.counts is None or tokens_to_remove == 0:
            return
        if -tokens_to_remove >= self._seen:
            return self.reset()
        if -tokens_to_remove > self._real_tail:
            raise ValueError(
                f"crop({tokens_to_remove}): some of these tokens are padding in some rows; only "
                f"the newest {self._real_tail} can be taken back"
            )
        self.take_back(-tokens_to_remove)

    def take_back(self, tokens: int) -> None:
        """Forget so many tokens, all real and fewer than were seen."""
        assert self.counts is not None
        self.counts = self.counts - tokens
        self._seen -= tokens
        self._real_tail -= tokens


class ContextStateLayer(RowStateLayer):
    """Keeps one context vector per sequence: constant memory, whatever the length.

    Attributes:
        state: the context after the last token, ``[B, C]``, or None before the first one.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "state")

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def update_state(self, state_BC: Tensor, new: NewTokens) -> None:
        """Count the new tokens and keep the context after them.

        It is copied, because it may be a slice that would keep a whole chunk of contexts in memory.
        """
        self.state = state_BC.clone()
        self.advance(new)

    def continue_from(self, start_BC: Tensor) -> Tensor:
        """The state to go on from: the cached one, or `start_BC` before the first token."""
        return start_BC if self.state is None else self.state


class EntriesLayer(RowStateLayer):
    """Keeps an entry of every token, or of the newest, whatever an entry is.

    Entries end at the right: the last column is each row's newest, so that an entry's position
    follows from the row's count. Columns before a row's first token hold nothing of use.

    Args:
        limit: the most entries of a row, its newest; None: all.

    Attributes:
        entries: ``[B, K, E]``, or None before the first token.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries")

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.entries: Tensor | None = None

    def append(self, new_BTE: Tensor, new: NewTokens) -> Tensor:
        """Take in the entries of the new tokens, each row's real ones first.

        Returns:
            Old and new entries, ``[B, K + T, E]``, which stand at the positions `new.columns(K)`
            where one of every token is kept.
        """
        old_BKE = new_BTE[:, :0] if self.entries is None else self.entries
        both_BSE = torch.cat([old_BKE, new_BTE], dim=1)
        self.entries = self.remaining(both_BSE, old_BKE.shape[1], new)
        self.advance(new)
        return both_BSE

    def remaining(self, both_BSE: Tensor, kept: int, new: NewTokens) -> Tensor:
        """What to keep of so many old entries and the new ones behind them."""
        most = both_BSE.shape[1] if self.limit is None else self.limit
        return newest(both_BSE, new.ends(kept), most)


def _real_tail(before: int, mask_BT: Tensor | None, tokens: int) -> int:
    """How many of the newest tokens are real in every row, after T more."""
    if mask_BT is None:
        return before + tokens
    if torch.compiler.is_compiling() or mask_BT.device.type == "meta":
        return 0  # values cannot be looked at here
    return int(mask_BT.flip(1).long().cumprod(1).sum(1).min())


def newest(entries_BSE: Tensor, end_B: Tensor | None, limit: int) -> Tensor:
    """The newest entries of each row, the last in the last column: ``[B, min(limit, S), E]``.

    Args:
        entries_BSE: old ones and new ones behind them.
        end_B: the column behind each row's newest entry; None: S.
        limit: the most entries to keep.

    Returns:
        The entries themselves where all are kept, else a copy: a view would hold all of them.
    """
    total = entries_BSE.shape[1]
    keep = min(limit, total)
    if end_B is None:
        return entries_BSE if keep == total else entries_BSE[:, total - keep :].clone()
    columns_BK = end_B.unsqueeze(1) - keep + torch.arange(keep, device=end_B.device)
    return take(entries_BSE, columns_BK.clamp(min=0))
