"""G: attention to far tokens through one latent each, key and value at once, or one for several.

Sources: multi-query attention (Shazeer, arXiv:1911.02150) whose one head's key is its value too, as
the absorbed form of multi-head latent attention has it (DeepSeek-V2, arXiv:2405.04434); without
rotary positions, which the recurrences beside it make needless (Kimi Linear, arXiv:2510.26692);
pooled latents behind a window of raw ones as in DeepSeek-V4. With H heads of queries::

    c_s = RMSNorm(W_c x_s);    q_th = RMSNorm(W_h x_t)                 C wide each
    out = W_o concat_h sum_s softmax_s(q_th . c_s / sqrt(C)) c_s

With ``pool`` m > 1 the block of tokens ``[j m, (j + 1) m)`` becomes, once it has left the newest
`window` tokens, one latent ``RMSNorm(sum_s a_s W_c x_s)``, a the softmax over the block of
``w . x_s + b_place``. Token t sees raw the tokens from m e(t) on, at most `window`, and pooled the
e(t) blocks before them: ``e(t) = max(0, ceil((t + 1 - window) / m))``.

All of this within the newest `global_window` tokens, if there is such a limit: latents of older
tokens are not seen, and of the blocks only the newest ``(global_window - window) // m``.

Decoding keeps C numbers a token, or C / m and the window's, up to that limit.

J is a number of blocks here, I that of a call's new ones, C the width of a latent.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contextlm.models.attention import attend, attends_plainly
from contextlm.models.cache import EntriesLayer, newest
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.hybrid.latent import LatentLayer
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens, take
from contextlm.models.layers import RMSNorm
from contextlm.models.stepping import StepWeights, product

_QUERIES = 1024  # that are computed at once behind a window: masks grow with their square


class PooledLayer(Taps, EntriesLayer):
    """Keeps the newest tokens' latents, and one for each block before them.

    Attributes:
        pooled: ``[B, J, C]``, each row's newest block in the last column; columns before its first
            one hold anything.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps", "pooled")

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.pooled: Tensor | None = None


@register_mixer("G")
class GlobalLatents(Mixer):
    """G as a layer's mixer."""

    step_names = (
        *("convolution.weight", "convolution.bias"),
        *("query_norm.weight", "latent_norm.weight"),
    )
    step_kept = ("taps", "memory")

    def __init__(self, config: Any):
        super().__init__(config)
        width, latent = config.hidden_size, config.latent_dim
        self.heads, self.latent = config.num_attention_heads, latent
        self.window, self.pool = config.window, config.pool
        self.global_window = config.global_window
        self.inner = nn.Linear(width, (self.heads + 1) * latent, bias=False)
        taps = config.attention_convolution
        self.convolution = CausalConvolution(self.inner.out_features, taps) if taps else None
        self.query_norm = RMSNorm(latent, eps=config.rms_norm_eps)
        self.latent_norm = RMSNorm(latent, eps=config.rms_norm_eps)
        self.output = nn.Linear(self.heads * latent, width, bias=False)
        if self.pool > 1:
            self.score = nn.Linear(width, 1, bias=False)
            self.place = nn.Parameter(torch.zeros(self.pool))
        else:
            self.step_weights = StepWeights(self)

    @classmethod
    def new_state(cls, config: Any) -> LatentLayer | PooledLayer:
        """A latent a token, or the window's and one for each block."""
        if config.pool > 1:
            return PooledLayer(config.window)
        limit = config.global_window
        return LatentLayer(is_croppable=False, limit=None if limit is None else limit - 1)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse blocks that would leave the window unfinished."""
        config.check_counts("pool", "global_window")
        limit = config.global_window
        if config.pool > 1 and limit is not None and limit < config.window:
            raise ValueError(
                f"global_window ({limit}) must be at least window ({config.window}), which a "
                "pooled G sees as it is; null is no limit"
            )
        if config.pool > config.window:
            raise ValueError(
                f"pool ({config.pool}) must be at most window ({config.window}): a block is pooled "
                "when it leaves the window"
            )

    def forward(
        self, x_BTD: Tensor, state: LatentLayer | PooledLayer | None, new: NewTokens
    ) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        if self.pool > 1 and new.packed_BT is not None:  # blocks are counted from a text's start
            apart = new.apart()
            rows = self(apart.rows(new.as_given(x_BTD)), None, apart.new)
            return new.real_first(apart.packed(rows))
        inner = product(self.inner, x_BTD, step=new.is_step)
        mixed_B1X = self.step(new, state, inner) if attends_plainly(self) else None
        if mixed_B1X is not None:
            return product(self.output, mixed_B1X, step=True)
        if self.convolution is not None:
            inner = self.convolution(inner, state, new).to(inner.dtype)
        query, latent_BTC = inner.split((self.heads * self.latent, self.latent), dim=-1)
        query_BHTC = self.query_norm(query.unflatten(-1, (self.heads, -1))).transpose(1, 2)
        query_BHTC = query_BHTC.to(inner.dtype)
        if self.pool > 1:
            mixed = self._pooled(query_BHTC, latent_BTC, self.score(x_BTD), state, new)
            return self.output(mixed)
        entries_BSC = self.latent_norm(latent_BTC).to(inner.dtype)
        if state is not None:
            entries_BSC = state.append(entries_BSC, new)
        return self.output(self._within_window(query_BHTC, entries_BSC, new))

    def _within_window(self, query_BHTC: Tensor, entries_BSC: Tensor, new: NewTokens) -> Tensor:
        """What each query reads of the entries kept and the new ones, ``[B, T, H C]``."""
        tokens, window = new.tokens, self.global_window
        kept = entries_BSC.shape[1] - tokens
        if torch.compiler.is_exporting() and window is not None:  # one way for all lengths
            return self._read(query_BHTC, entries_BSC, new.visible(kept, window))
        if window is None or tokens <= window:
            masked = kept or new.packed_BT is not None
            mask = new.visible(kept, window) if masked else None
            return self._read(query_BHTC, entries_BSC, mask)
        # Some queries at a time, with those entries that any of them sees.
        mixed = []
        for start in range(0, tokens, _QUERIES):
            piece = slice(start, min(start + _QUERIES, tokens))
            first, stop = max(0, kept + start + 1 - window), kept + piece.stop
            mask = new.visible(kept, window, piece)[..., first:stop]
            mixed.append(self._read(query_BHTC[:, :, piece], entries_BSC[:, first:stop], mask))
        return torch.cat(mixed, dim=1)

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.attention.step import attention_step

        (memory, column), counts = state.make_room(), state.counts
        if self.global_window is not None and column >= self.global_window:
            # The step looks at no more columns than a row has seen tokens.
            counts = counts.clamp(max=self.global_window - 1)
        given: list[Any] = [*projected_B1X, state.taps, memory, counts, *weights]
        return attention_step(
            *given,
            turns=None,
            eps=self.config.rms_norm_eps,
            kept=column,
            heads=self.heads,
            groups=1,
            width=self.latent,
        )

    def _read(self, query_BHTC: Tensor, entries_BSC: Tensor, mask: Tensor | None) -> Tensor:
        entries_B1SC = entries_BSC.unsqueeze(1)
        return attend(self, query_BHTC, entries_B1SC, entries_B1SC, mask)[0]

    def _blocks(self, last: Tensor) -> Tensor:
        """e(t): blocks that the token at a position sees pooled; 0 before the first token."""
        return (last + self.pool - self.window).div(self.pool, rounding_mode="floor").clamp(min=0)

    def _pooled(
        self,
        query_BHTC: Tensor,
        latent_BTC: Tensor,
        score_BT1: Tensor,
        state: PooledLayer | None,
        new: NewTokens,
    ) -> Tensor:
        """What each query reads of blocks and of its window, ``[B, T, H C]``."""
        raw_BSX = torch.cat([latent_BTC, score_BT1.to(latent_BTC.dtype)], dim=-1)
        old_BJC = None
        if state is not None:
            old_BJC = state.pooled
            raw_BSX = state.append(raw_BSX, new)
        tokens, kept = new.tokens, raw_BSX.shape[1] - new.tokens
        pooled_BJC, block_BJ = self._with_new_blocks(old_BJC, raw_BSX, kept, new)
        seen = pooled_BJC.shape[1]
        if self.global_window is not None:
            seen = (self.global_window - self.window) // self.pool
        if state is not None:
            state.pooled = newest(pooled_BJC, None, seen)
        raw_BSC = self.latent_norm(raw_BSX[..., : self.latent]).to(latent_BTC.dtype)
        column_BS = new.columns(kept)
        block_B1J = block_BJ.unsqueeze(1)
        mixed = []
        for start in range(0, tokens, _QUERIES):
            stop = min(start + _QUERIES, tokens)
            first = max(0, kept + start + 1 - self.window)
            key_B1S = column_BS[:, first : kept + stop].unsqueeze(1)
            query_BT1 = column_BS[:, kept + start : kept + stop].unsqueeze(2)
            done_BT1 = self._blocks(query_BT1)
            near_BTS = (key_B1S <= query_BT1) & (key_B1S >= self.pool * done_BT1)
            oldest_BT1 = (done_BT1 - seen).clamp(min=0)
            far_BTJ = (block_B1J < done_BT1) & (block_B1J >= oldest_BT1)
            rows = max(len(far_BTJ), len(near_BTS))
            far_BTJ, near_BTS = (x.expand(rows, -1, -1) for x in (far_BTJ, near_BTS))
            mask_BTX = torch.cat([far_BTJ, near_BTS], dim=-1)
            raw = raw_BSC[:, first : kept + stop]
            entries = torch.cat([pooled_BJC, raw], dim=1)
            mixed.append(self._read(query_BHTC[:, :, start:stop], entries, mask_BTX.unsqueeze(1)))
        return torch.cat(mixed, dim=1)

    def _with_new_blocks(
        self, old_BJC: Tensor | None, raw_BSX: Tensor, kept: int, new: NewTokens
    ) -> tuple[Tensor, Tensor]:
        """The blocks pooled so far and those that leave the window now, and their numbers.

        ``[B, J, C]`` and ``[B or 1, J]``; a row's newest block is the last, and numbers below 0 are
        no blocks.
        """
        batch, old = len(raw_BSX), 0 if old_BJC is None else old_BJC.shape[1]
        start_B1 = new.starts  # one row where none can differ
        done_B1 = self._blocks(start_B1 - 1)
        counts_B1 = new.tokens if new.mask_BT is None else new.counts.unsqueeze(1)
        end_B1 = self._blocks(start_B1 + counts_B1 - 1)
        # Enough for every row.
        most = int(self._blocks(torch.tensor(new.past + new.tokens - 1)))
        fresh = -(-new.tokens // self.pool) + 1
        total = min(most, old + fresh)
        block_BJ = end_B1 - total + torch.arange(total, device=new.device)
        if total == 0:
            return raw_BSX.new_zeros(batch, 0, self.latent), block_BJ
        position_BP = self.pool * done_B1 + torch.arange(self.pool * fresh, device=new.device)
        columns_BP = (position_BP - start_B1 + kept).clamp(0, raw_BSX.shape[1] - 1)
        parts_BIPX = take(raw_BSX, columns_BP.expand(batch, -1)).unflatten(1, (-1, self.pool))
        latent, score = parts_BIPX.split((self.latent, 1), dim=-1)
        kind = torch.promote_types(score.dtype, torch.float32)
        weight = (score.to(kind) + self.place.unsqueeze(-1)).softmax(2)
        both_BJC = self.latent_norm((weight * latent).sum(2)).to(raw_BSX.dtype)
        if old_BJC is not None:
            both_BJC = torch.cat([old_BJC, both_BJC], dim=1)
        source_BJ = (block_BJ - done_B1 + old).clamp(0, old + fresh - 1)
        return take(both_BJC, source_BJ.expand(batch, -1)), block_BJ
