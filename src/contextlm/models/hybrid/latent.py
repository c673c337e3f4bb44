"""L: attention to all tokens through one shared latent each.

Source: multi-head latent attention of DeepSeek-V2 (arXiv:2405.04434), without query compression.
Of each token s one latent and one rotary key are made, for all heads together::

    c_s = RMSNorm(W_c x_s)          k_s = turn(W_r x_s, s)
    q_t = W_q x_t, whose last channels are turned by t
    score_ts = (q_t . W_k c_s + q_t' . k_s) / sqrt(E + R)       v_s = W_v c_s

Keys and values exist only while a text's first piece is read. Later tokens *absorb* the two
projections: W_k goes into the query and W_v behind the weighted sum, so that what is kept, c and k,
is attended to as it is, like the one key and value head of multi-query attention.

With `attention_convolution` W_c x, W_r x and W_q x first pass a short causal convolution each: it
shows a key what stood before it.

Shape suffixes: B batch, T new tokens, S tokens kept and new, D stream width, H heads, E width of a
head's content, R rotary width, C width of the latent, K = C + R.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.attention_function import attend
from contextlm.models.hybrid.cache import LatentLayer
from contextlm.models.hybrid.convolution import CausalConvolution
from contextlm.models.layers import RMSNorm
from contextlm.models.rotary import rotate
from contextlm.models.steps import Steps


class LatentAttention(nn.Module):
    """L as a layer's mixer.

    Args:
        config: of the model: widths, heads, and the attention function.
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.heads, self.content = config.num_attention_heads, config.head_size
        self.latent, self.rotary = config.latent_dim, config.rope_dim
        self.scaling = (self.content + self.rotary) ** -0.5
        self.is_causal = True
        self.query = nn.Linear(width, self.heads * (self.content + self.rotary), bias=False)
        self.compress = nn.Linear(width, self.latent + self.rotary, bias=False)
        taps, inner = config.attention_convolution, self.query.out_features
        inner += self.compress.out_features
        self.convolution = CausalConvolution(inner, taps) if taps else None
        self.norm = RMSNorm(self.latent, eps=config.rms_norm_eps)
        self.key = nn.Linear(self.latent, self.heads * self.content, bias=False)
        self.value = nn.Linear(self.latent, self.heads * self.content, bias=False)
        self.output = nn.Linear(self.heads * self.content, width, bias=False)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads for each head of keys, of which there is one where they are absorbed."""
        return self.heads

    def forward(self, x_BTD: Tensor, state: LatentLayer | None, steps: Steps) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `RecurrentMixer.forward`."""
        tokens = x_BTD.shape[1]
        positions_BT = steps.positions(tokens, x_BTD.device)
        theta = self.config.rope_theta
        query, latent = self.query(x_BTD), self.compress(x_BTD)
        if self.convolution is not None:
            inner = self.convolution(torch.cat([query, latent], dim=-1), state, steps)
            query, latent = inner.to(query.dtype).split((query.shape[-1], latent.shape[-1]), dim=-1)
        query_BHTE = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain_BHTE, turned_BHTR = query_BHTE.split((self.content, self.rotary), dim=-1)
        turned_BHTR = rotate(turned_BHTR, positions_BT, theta)
        latent_BTC, key_BTR = latent.split((self.latent, self.rotary), dim=-1)
        key_BTR = rotate(key_BTR.unsqueeze(1), positions_BT, theta).squeeze(1)
        entries_BSK = torch.cat([self.norm(latent_BTC).to(key_BTR.dtype), key_BTR], dim=-1)
        if state is not None:
            entries_BSK = state.append(entries_BSK, steps)
        kept = entries_BSK.shape[1] - tokens
        if kept == 0:
            return self.output(self._rebuilt(plain_BHTE, turned_BHTR, entries_BSK))
        oldest_B = steps.oldest(kept)
        return self.output(self._absorbed(plain_BHTE, turned_BHTR, entries_BSK, oldest_B))

    def _rebuilt(self, plain_BHTE: Tensor, turned_BHTR: Tensor, entries_BSK: Tensor) -> Tensor:
        """Causal attention with the keys and values of all heads, ``[B, T, H E]``."""
        latent_BSC, shared_BSR = entries_BSK.split((self.latent, self.rotary), dim=-1)
        key_BHSE, value_BHSE = (
            layer(latent_BSC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        shared_BHSR = shared_BSR.unsqueeze(1).expand(-1, self.heads, -1, -1)
        key_BHSK = torch.cat([key_BHSE, shared_BHSR.to(key_BHSE.dtype)], dim=-1)
        # As wide as the keys, which fast attention asks for.
        value_BHSK = F.pad(value_BHSE, (0, self.rotary))
        query_BHTK = torch.cat([plain_BHTE, turned_BHTR.to(plain_BHTE.dtype)], dim=-1)
        mixed = attend(_OwnHeads(self), query_BHTK, key_BHSK, value_BHSK, None)
        return mixed.unflatten(-1, (self.heads, -1))[..., : self.content].flatten(2)

    def _absorbed(
        self, plain_BHTE: Tensor, turned_BHTR: Tensor, entries_BSK: Tensor, oldest_B: Tensor | None
    ) -> Tensor:
        """The same with what is kept as the one key and value, ``[B, T, H E]``."""
        tokens, total = plain_BHTE.shape[2], entries_BSK.shape[1]
        key_HEC, value_HEC = (
            _weight(layer, plain_BHTE).unflatten(0, (self.heads, -1))
            for layer in (self.key, self.value)
        )
        query_BHTC = torch.einsum("bhte,hec->bhtc", plain_BHTE, key_HEC)
        query_BHTK = torch.cat([query_BHTC, turned_BHTR.to(query_BHTC.dtype)], dim=-1)
        key_S = torch.arange(total, device=entries_BSK.device)
        seen_BTS = (key_S <= key_S[total - tokens :].unsqueeze(1)).unsqueeze(0)
        if oldest_B is not None:
            seen_BTS = seen_BTS & (key_S >= oldest_B.view(-1, 1, 1))
        entries_B1SK = entries_BSK.unsqueeze(1).to(query_BHTK.dtype)
        mixed = attend(self, query_BHTK, entries_B1SK, entries_B1SK, seen_BTS.unsqueeze(1))
        mixed_BTHC = mixed.unflatten(-1, (self.heads, -1))[..., : self.latent]
        return torch.einsum("bthc,hec->bthe", mixed_BTHC, value_HEC).flatten(2)


def _weight(layer: nn.Linear, like: Tensor) -> Tensor:
    """What a projection multiplies with, ``[H E, C]``.

    An adapter or a quantised layer may have taken its place, or an offloaded layer's weight may be
    elsewhere until it is called. It is linear still: its answers to unit vectors are the columns.
    """
    if type(layer) is nn.Linear and layer.weight.device == like.device:
        return layer.weight
    answers: Tensor = layer(torch.eye(layer.in_features, dtype=like.dtype, device=like.device))
    return answers.T


class _OwnHeads:
    """What `attend` reads of a module, with keys and values for each head."""

    num_key_value_groups = 1

    def __init__(self, module: LatentAttention):
        self.config, self.scaling = module.config, module.scaling
        self.is_causal, self.training = module.is_causal, module.training
