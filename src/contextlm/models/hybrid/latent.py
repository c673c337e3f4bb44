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

R is the rotary width here, E the width of a head's content, C that of the latent, X that of what is
compared: E + R or C + R.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.attention import attend, attends_plainly, rotate
from contextlm.models.cache import CroppableLayer, EntriesLayer
from contextlm.models.convolution import CausalConvolution, Taps
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm, linear_weight
from contextlm.models.stepping import StepWeights, product

# Entries that memory is made longer by, so that not every token copies what is kept.
_ROOM = 32


class LatentLayer(Taps, CroppableLayer, EntriesLayer):
    """Keeps one entry a token, and a convolution's taps where there is one.

    While tokens come one at a time, `entries` are columns of longer memory.

    Args:
        is_croppable: nothing that is kept, here or by the model's other layers, forgets.
        limit: the most entries, the newest; None: all.
    """

    kept: ClassVar[tuple[str, ...]] = ("counts", "entries", "taps")

    def __init__(self, is_croppable: bool = True, limit: int | None = None) -> None:
        super().__init__()
        self.is_croppable, self.limit = is_croppable, limit

    def take_back(self, tokens: int) -> None:
        """Their entries too."""
        assert self.entries is not None
        self.entries = self.entries[:, : self.entries.shape[1] - tokens].clone()
        super().take_back(tokens)

    @property
    def memory(self) -> Tensor | None:
        """The entries and the room around them, ``[B, at least S, E]``; None before the first."""
        if self.entries is None:
            return None
        batch, _, width = self.entries.shape
        length, *strides = self.entries.stride()
        held, size = self.entries.untyped_storage().nbytes(), self.entries.element_size()
        if strides != [width, 1] or batch * length * size != held:
            return self.entries  # somebody else's, without room
        return self.entries.as_strided((batch, length // width, width), (length, width, 1), 0)

    def make_room(self) -> tuple[Tensor, int]:
        """`memory` with a column behind the entries so far, which is theirs from now on.

        Returns:
            The memory and the number of that column.
        """
        memory, entries = self.memory, self.entries
        assert memory is not None
        assert entries is not None
        kept = entries.shape[1]
        column = kept if memory is entries else entries.storage_offset() // entries.shape[2] + kept
        if memory.shape[1] == column:
            memory, column = F.pad(entries, (0, 0, 0, _ROOM)), kept
        first = 0 if self.limit is None else max(0, column + 1 - self.limit)
        self.entries = memory[:, first : column + 1]
        return memory, column


@register_mixer("L")
class LatentAttention(Mixer):
    """L as a layer's mixer."""

    step_names = (
        *("convolution.weight", "convolution.bias", "norm.weight"),
        *("key.weight", "value.weight"),
    )
    step_kept = ("taps", "memory")

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.hidden_size
        self.heads, self.content = config.num_attention_heads, config.head_size
        self.latent, self.rotary = config.latent_dim, config.rope_dim
        self.query = nn.Linear(width, self.heads * (self.content + self.rotary), bias=False)
        self.compress = nn.Linear(width, self.latent + self.rotary, bias=False)
        taps, inner = config.attention_convolution, self.query.out_features
        inner += self.compress.out_features
        self.convolution = CausalConvolution(inner, taps) if taps else None
        self.norm = RMSNorm(self.latent, eps=config.rms_norm_eps)
        self.key = nn.Linear(self.latent, self.heads * self.content, bias=False)
        self.value = nn.Linear(self.latent, self.heads * self.content, bias=False)
        self.output = nn.Linear(self.heads * self.content, width, bias=False)
        self.step_weights = StepWeights(self)

    @classmethod
    def new_state(cls, config: Any) -> LatentLayer:
        """One entry a token. Recurrences, windows and taps forget what a shorter text needs."""
        forgets = set(config.pattern.upper()) != {"L"} or config.attention_convolution > 0
        return LatentLayer(is_croppable=not forgets)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a rotary key whose channels cannot be turned in pairs."""
        if (config.rope_dim or 0) % 2:
            raise ValueError(f"2 must divide rope_dim ({config.rope_dim})")

    def forward(self, x_BTD: Tensor, state: LatentLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        query, latent = (
            product(layer, x_BTD, step=new.is_step) for layer in (self.query, self.compress)
        )
        mixed_B1X = self.step(new, state, query, latent) if attends_plainly(self) else None
        if mixed_B1X is not None:
            return product(self.output, mixed_B1X, step=True)
        positions_BT, theta = new.real_first_positions(), self.config.rope_theta
        if self.convolution is not None:
            inner = self.convolution(torch.cat([query, latent], dim=-1), state, new)
            query, latent = inner.to(query.dtype).split((query.shape[-1], latent.shape[-1]), dim=-1)
        query_BHTX = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        plain_BHTE, turned_BHTR = query_BHTX.split((self.content, self.rotary), dim=-1)
        turned_BHTR = rotate(turned_BHTR, positions_BT, theta)
        latent_BTC, key_BTR = latent.split((self.latent, self.rotary), dim=-1)
        key_BTR = rotate(key_BTR.unsqueeze(1), positions_BT, theta).squeeze(1)
        entries_BSX = torch.cat([self.norm(latent_BTC).to(key_BTR.dtype), key_BTR], dim=-1)
        if state is not None:
            entries_BSX = state.append(entries_BSX, new)
        if entries_BSX.shape[1] == new.tokens:
            return self.output(self._rebuilt(plain_BHTE, turned_BHTR, entries_BSX, new))
        return self.output(self._absorbed(plain_BHTE, turned_BHTR, entries_BSX, new))

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.attention.latent import latent_step

        memory, kept = state.make_room()
        given: list[Any] = [*projected_B1X, state.taps, memory, state.counts, *weights]
        theta, eps = self.config.rope_theta, self.config.rms_norm_eps
        return latent_step(*given, theta=theta, eps=eps, kept=kept, heads=self.heads)

    def _rebuilt(
        self, plain_BHTE: Tensor, turned_BHTR: Tensor, entries_BSX: Tensor, new: NewTokens
    ) -> Tensor:
        """Causal attention with the keys and values of all heads, ``[B, T, H E]``."""
        latent_BSC, shared_BSR = entries_BSX.split((self.latent, self.rotary), dim=-1)
        key_BHSE, value_BHSE = (
            layer(latent_BSC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        shared_BHSR = shared_BSR.unsqueeze(1).expand(-1, self.heads, -1, -1)
        key_BHSX = torch.cat([key_BHSE, shared_BHSR.to(key_BHSE.dtype)], dim=-1)
        # As wide as the keys, which fast attention asks for.
        value_BHSX = F.pad(value_BHSE, (0, self.rotary))
        query_BHTX = torch.cat([plain_BHTE, turned_BHTR.to(plain_BHTE.dtype)], dim=-1)
        mask = None if new.packed_BT is None else new.visible(0)
        mixed, _ = attend(self, query_BHTX, key_BHSX, value_BHSX, mask)
        return mixed.unflatten(-1, (self.heads, -1))[..., : self.content].flatten(2)

    def _absorbed(
        self, plain_BHTE: Tensor, turned_BHTR: Tensor, entries_BSX: Tensor, new: NewTokens
    ) -> Tensor:
        """The same with what is kept as the one key and value, ``[B, T, H E]``."""
        key_HEC, value_HEC = (
            linear_weight(layer, plain_BHTE).unflatten(0, (self.heads, -1))
            for layer in (self.key, self.value)
        )
        query_BHTC = torch.einsum("bhte,hec->bhtc", plain_BHTE, key_HEC)
        query_BHTX = torch.cat([query_BHTC, turned_BHTR.to(query_BHTC.dtype)], dim=-1)
        kept = entries_BSX.shape[1] - new.tokens
        entries_B1SX = entries_BSX.unsqueeze(1).to(query_BHTX.dtype)
        scaling = (self.content + self.rotary) ** -0.5
        mixed, _ = attend(
            self, query_BHTX, entries_B1SX, entries_B1SX, new.visible(kept), scaling=scaling
        )
        mixed_BTHC = mixed.unflatten(-1, (self.heads, -1))[..., : self.latent]
        return torch.einsum("bthc,hec->bthe", mixed_BTHC, value_HEC).flatten(2)
