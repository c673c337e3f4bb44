"""W: attention to the newest tokens only, with few heads of keys and values.

Sources: multi-query attention (Shazeer, arXiv:1911.02150), windows as in Longformer (Beltagy et
al., arXiv:2004.05150), norms on queries and keys (Henry et al., arXiv:2010.04245), the short
convolution of queries, keys and values as in Primer (So et al., arXiv:2109.08668).

Token t attends to the tokens t - W + 1 .. t. Keys are kept unturned: only distances matter, so
rotary positions are counted anew within what is at hand, and no angle grows with the text.

J is a number of blocks of W queries here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.attention import attend, attends_plainly, rotate_columns, turns_of_columns
from contextlm.models.cache import EntriesLayer
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm
from contextlm.models.stepping import StepWeights, product


class WindowLayer(Taps, EntriesLayer):
    """Keeps keys and values of the newest tokens, and a convolution's taps where there is one."""

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps")


@register_mixer("W")
class WindowedAttention(Mixer):
    """W as a layer's mixer."""

    step_names = (
        *("convolution.weight", "convolution.bias"),
        *("query_norm.weight", "key_norm.weight"),
    )
    step_kept = ("taps", "entries")

    def __init__(self, config: Any):
        super().__init__(config)
        width, self.head_dim = config.hidden_size, config.head_size
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.window = config.window
        inner = (self.heads + 2 * self.shared) * self.head_dim
        self.inner = nn.Linear(width, inner, bias=False)
        taps = config.attention_convolution
        self.convolution = CausalConvolution(inner, taps) if taps else None
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.query_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.key_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.output = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.step_weights = StepWeights(self)

    @classmethod
    def new_state(cls, config: Any) -> WindowLayer:
        """The tokens before the one that reads its window."""
        return WindowLayer(config.window - 1)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a head whose channels cannot be turned in pairs."""
        if config.head_size % 2:
            raise ValueError(f"2 must divide the width of a head ({config.head_size})")

    def forward(self, x_BTD: Tensor, state: WindowLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        inner = product(self.inner, x_BTD, step=new.is_step)
        mixed_B1X = self.step(new, state, inner) if attends_plainly(self) else None
        if mixed_B1X is not None:
            return product(self.output, mixed_B1X, step=True)
        if self.convolution is not None:
            inner = self.convolution(inner, state, new).to(inner.dtype)
        inner = inner.unflatten(-1, (-1, self.head_dim))
        query, key, value = inner.split((self.heads, self.shared, self.shared), dim=2)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if state is not None:
            both = state.append(torch.cat([key, value], dim=2).flatten(2), new)
            key, value = both.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        kept, theta = key.shape[1] - new.tokens, self.config.rope_theta
        query_BHTE = rotate_columns(query.transpose(1, 2), kept, theta)
        key_BGSE = rotate_columns(key.transpose(1, 2), 0, theta)
        return self.output(self._read(query_BHTE, key_BGSE, value.transpose(1, 2), new))

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.attention.step import attention_step

        kept = state.entries.shape[1]
        if kept < state.limit:
            state.entries = F.pad(state.entries, (0, 0, 0, 1))
        like, theta = state.entries, self.config.rope_theta
        turns = turns_of_columns(self.window, self.head_dim, theta, like.dtype, like.device)
        given: list[Any] = [*projected_B1X, state.taps, state.entries, state.counts, *weights]
        return attention_step(
            *given,
            turns=turns,
            eps=self.config.rms_norm_eps,
            kept=kept,
            heads=self.heads,
            groups=self.shared,
            width=self.head_dim,
        )

    def _read(
        self, query_BHTE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, new: NewTokens
    ) -> Tensor:
        """What each query reads of its window, ``[B, T, H E]``; keys and values: kept and new."""
        tokens, total = query_BHTE.shape[2], key_BGSE.shape[2]
        # An exported graph has one way for all lengths, and blocks are right for any.
        many = torch.compiler.is_exporting() or (tokens > self.window and total > 2 * self.window)
        if many:
            return self._in_blocks(query_BHTE, key_BGSE, value_BGSE, new)
        mask = None
        if new.seen_B is not None or new.packed_BT is not None or total > self.window:
            mask = new.visible(total - tokens, self.window)
        return attend(self, query_BHTE, key_BGSE, value_BGSE, mask)[0]

    def _in_blocks(
        self, query_BHTE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, new: NewTokens
    ) -> Tensor:
        """As `_read`, W queries at a time with the 2 W keys that they can see.

        The cost grows with the length, not with its square.
        """
        batch, _, tokens, _ = query_BHTE.shape
        window, device = self.window, query_BHTE.device
        ahead = window - (key_BGSE.shape[2] - tokens)  # columns to fill up to W before the first
        blocks = (tokens + window - 1) // window
        if torch.compiler.is_exporting():  # a length of one is another case to a graph
            blocks = blocks + 1
        behind = blocks * window - tokens
        query = F.pad(query_BHTE, (0, 0, 0, behind)).unflatten(2, (-1, window))
        key, value = (
            F.pad(x, (0, 0, ahead, behind)).unfold(2, 2 * window, window).transpose(-1, -2)
            for x in (key_BGSE, value_BGSE)
        )
        column_S = torch.arange(2 * window, device=device)
        own_W1 = column_S[window:].unsqueeze(1)
        reach_BT = new.real_first_positions().clamp(max=window - 1)
        reach_BJW1 = F.pad(reach_BT, (0, behind)).unflatten(1, (-1, window)).unsqueeze(-1)
        mask = (column_S <= own_W1) & (column_S >= own_W1 - reach_BJW1)
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        mixed, _ = attend(self, query, key, value, mask)
        return mixed.unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]
