"""Cache layers for states that are not keys and values.

Each is an ordinary member of a transformers `Cache`, so that `generate` can reorder it for beams,
repeat it for several returned sequences and ask how many tokens it has seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class ContextStateLayer(CacheLayerMixin):
    """Keeps one context vector per sequence: constant memory, whatever the length.

    Attributes:
        state: the context after the last token, ``[B, C]``, or None before the first one.
        counts: real (not padding) tokens seen by each row, ``[B]`` int64.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.counts: Tensor | None = None
        self._seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first `update_state` brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not for this layer: it keeps no keys and values.

        Raises:
            TypeError: always.
        """
        raise TypeError("ContextStateLayer keeps a context, not keys and values: use update_state")

    def update_state(self, state_BC: Tensor, mask_BT: Tensor | None, tokens: int) -> None:
        """Replace the state.

        Args:
            state_BC: the context after the newest token; copied, because it may be a slice that
                would keep a whole chunk of contexts in memory.
            mask_BT: False where a token of this chunk is padding, or None.
            tokens: T, the length of this chunk, padding included.
        """
        if mask_BT is None:
            new_B = torch.full((state_BC.shape[0],), tokens, device=state_BC.device)
        else:
            new_B = mask_BT.sum(1)
        self.state = state_BC.clone()
        self.counts = new_B if self.counts is None else self.counts + new_B
        self._seen += tokens
        self.is_initialized = True

    def continue_from(self, start_BC: Tensor) -> Tensor:
        """The state to go on from: the cached one, or `start_BC` before the first token.

        Raises:
            ValueError: the cache holds another number of rows than the new tokens have.
        """
        if self.state is None:
            return start_BC
        if self.state.shape[0] != start_BC.shape[0]:
            raise ValueError(
                f"the cache holds {self.state.shape[0]} rows, the new tokens {start_BC.shape[0]}"
            )
        return self.state

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
        self.state = self.counts = None
        self._seen = 0
        self.is_initialized = False

    def offload(self) -> None:
        """Stay on the device: the state is one vector per row."""

    def prefetch(self) -> None:
        """Stay on the device: the state is one vector per row."""

    def _select(self, index_B: Tensor) -> None:
        if self.state is not None and self.counts is not None:
            self.state = self.state.index_select(0, index_B.to(self.state.device))
            self.counts = self.counts.index_select(0, index_B.to(self.counts.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows named by `beam_idx`, ``[B]``, for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self._select(indices if indices.dtype != torch.bool else indices.nonzero().flatten())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(self.state.shape[0], device=self.state.device)
            self._select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrence cannot be rewound.

        Raises:
            ValueError: when any token is to be removed.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "a context state cannot be cropped: the recurrence does not run backwards; "
                "start again from an empty cache"
            )


def state_layer(cache: Cache | None, layers: int, owner: str) -> ContextStateLayer | None:
    """The context state of a model's cache, which is its last layer.

    Args:
        cache: what the caller of the model passed, or None.
        layers: how many layers the model's own caches have.
        owner: the model's type, for the message.

    Returns:
        The layer, or None without a cache.

    Raises:
        ValueError: the cache is not of the model's making.
    """
    if cache is None:
        return None
    last = cache.layers[-1] if len(cache.layers) == layers else None
    if not isinstance(last, ContextStateLayer):
        raise ValueError(
            f"{owner} needs its own cache: leave past_key_values out, pass what an earlier call "
            "returned, or make one with new_cache()"
        )
    return last
