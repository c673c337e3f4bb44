"""W: attention to the newest tokens only, with few heads of keys and values.

Sources: multi-query attention (Shazeer, arXiv:1911.02150), windows as in Longformer (Beltagy et
al., arXiv:2004.05150), norms on queries and keys (Henry et al., arXiv:2010.04245), the short
convolution of queries, keys and values as in Primer (So et al., arXiv:2109.08668).

Token t attends to the tokens t - W + 1 .. t. Keys are kept unturned: only distances matter, so
rotary positions are counted anew within what is at hand, and no angle grows with the text.

Shape suffixes: B batch, T new tokens, S tokens kept and new, D stream width, H query heads, M heads
of keys and values, E head width, W window, G blocks of W queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.attention_function import attend
from contextlm.models.hybrid.cache import WindowLayer
from contextlm.models.hybrid.convolution import CausalConvolution
from contextlm.models.layers import RMSNorm
from contextlm.models.rotary import rotate
from contextlm.models.steps import Steps


class WindowedAttention(nn.Module):
    """W as a layer's mixer.

    Args:
        config: of the model: widths, heads, window, convolution, norms and attention function.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_size
        self.config = config
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.shared
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.window = config.window
        inner = (self.heads + 2 * self.shared) * self.head_dim
        self.inner = nn.Linear(width, inner, bias=False)
        taps = config.attention_convolution
        self.convolution = CausalConvolution(inner, taps) if taps else None
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.query_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.key_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.output = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def forward(self, x_BTD: Tensor, state: WindowLayer | None, steps: Steps) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `RecurrentMixer.forward`."""
        inner = self.inner(x_BTD)
        if self.convolution is not None:
            inner = self.convolution(inner, state, steps).to(inner.dtype)
        inner = inner.unflatten(-1, (-1, self.head_dim))
        query, key, value = inner.split((self.heads, self.shared, self.shared), dim=2)
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        kept = 0
        if state is not None:
            both = state.append(torch.cat([key, value], dim=2).flatten(2), steps.mask_BT)
            kept = both.shape[1] - x_BTD.shape[1]
            key, value = both.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        columns_1S = torch.arange(key.shape[1], device=x_BTD.device).unsqueeze(0)
        theta = self.config.rope_theta
        query_BHTE = rotate(query.transpose(1, 2), columns_1S[:, kept:], theta)
        key_BMSE = rotate(key.transpose(1, 2), columns_1S, theta)
        mixed = self._read(query_BHTE, key_BMSE, value.transpose(1, 2), steps.oldest(kept))
        return self.output(mixed)

    def _read(
        self, query_BHTE: Tensor, key_BMSE: Tensor, value_BMSE: Tensor, oldest_B: Tensor | None
    ) -> Tensor:
        """What each query reads of its window, ``[B, T, H E]``.

        Args:
            query_BHTE: of the new tokens, which are the last columns of the keys.
            key_BMSE: kept and new.
            value_BMSE: likewise.
            oldest_B: the first column that each row has filled, or None: all are filled.
        """
        tokens, total = query_BHTE.shape[2], key_BMSE.shape[2]
        if total <= 2 * self.window or tokens <= self.window:
            if oldest_B is None and tokens == total <= self.window:
                return attend(self, query_BHTE, key_BMSE, value_BMSE, None)
            key_S = torch.arange(total, device=query_BHTE.device)
            query_T1 = key_S[total - tokens :].unsqueeze(1)
            seen_BTS = ((key_S <= query_T1) & (key_S > query_T1 - self.window)).unsqueeze(0)
            if oldest_B is not None:
                seen_BTS = seen_BTS & (key_S >= oldest_B.view(-1, 1, 1))
            return attend(self, query_BHTE, key_BMSE, value_BMSE, seen_BTS.unsqueeze(1))
        return self._in_blocks(query_BHTE, key_BMSE, value_BMSE, oldest_B)

    def _in_blocks(
        self, query_BHTE: Tensor, key_BMSE: Tensor, value_BMSE: Tensor, oldest_B: Tensor | None
    ) -> Tensor:
        """As `_read`, W queries at a time with the 2 W keys that they can see.

        The cost grows with the length, not with its square.
        """
        batch, _, tokens, _ = query_BHTE.shape
        window, device = self.window, query_BHTE.device
        ahead = window - (key_BMSE.shape[2] - tokens)  # columns to fill up to W before the first
        behind = -tokens % window
        blocks = (tokens + behind) // window
        query = F.pad(query_BHTE, (0, 0, 0, behind)).unflatten(2, (blocks, window))
        key, value = (
            F.pad(x, (0, 0, ahead, behind)).unfold(2, 2 * window, window).transpose(-1, -2)
            for x in (key_BMSE, value_BMSE)
        )
        column_W = torch.arange(2 * window, device=device)
        query_W1 = column_W[:window].unsqueeze(1)
        near_WW = (column_W > query_W1) & (column_W <= query_W1 + window)
        oldest_B1 = torch.zeros(1, 1, device=device) if oldest_B is None else oldest_B.unsqueeze(1)
        first_BG = ahead + oldest_B1 - window * torch.arange(blocks, device=device)
        mask = near_WW & (column_W >= first_BG[..., None, None])
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        mixed = attend(self, query, key, value, mask)
        return mixed.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :tokens]
