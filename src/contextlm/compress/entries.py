"""Attention over one vector a token from which keys and values are made.

With z_j the entry of token j, keys before norm and rotary positions are k_j = A_k z_j + b_k, and
values v_j = A_v z_j + b_v, so entries are all that has to be kept. Reading is done in two ways:

- rebuilding: make all keys and values again and let the module's own `forward` go on from there;
- absorbing: move the projections off the kept tokens. Without norm and rotary, q . k_j =
  (A_k^T q) . z_j + q . b_k, and sum_j a_j v_j = A_v (sum_j a_j z_j) + (sum_j a_j) b_v. A norm needs
  the whole key, and the rotary part of a key turns with its own position: these are rebuilt.

Both are exact; `absorbing_pays` picks the one with fewer multiplications. The biases are kept where
mathematics would drop or simplify them (softmax ignores q . b_k, the a_j add up to one), because
only so are the numbers those of the module in low precision too.

Further letters: R, the part of E with rotary positions; Z, the width of an entry; J, the queries of
heads that share keys and values.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from contextlm.compress.adaptors import KEY, QUERY, VALUE, Projection, Turns, rotated
from contextlm.compress.kept import KeptLayer, Plan
from contextlm.compress.reading import Forward, Reader


def absorbing_pays(
    new: int, past: int, entry: int, width: int, heads: int, groups: int, rebuilt: int
) -> bool:
    """Whether absorbing the projections takes fewer multiplications than rebuilding, in one row.

    Rebuilding makes keys and values of every earlier token, but then compares them head by head as
    they are; absorbing compares whole entries, once for every new token and head. So few new tokens
    absorb and many rebuild.

    Args:
        new, past: tokens.
        entry: Z.
        width: E.
        heads, groups: H and G.
        rebuilt: how much of E has to be rebuilt in either way.
    """
    total = new + past
    rebuilding = 2 * total * groups * width * entry + 2 * new * total * heads * width
    on_keys = rebuilt if rebuilt == width else rebuilt + entry
    absorbing = (
        2 * new * heads * width * entry
        + total * rebuilt * groups * entry
        + new * total * heads * (on_keys + entry)
    )
    return absorbing < rebuilding


class EntryLayer(KeptLayer):
    """Keeps the entry of every token that is not hidden, ``[B, K, Z]``."""

    along: ClassVar[dict[str, int]] = {"entries": 1}


class EntryReader(Reader):
    """Reads entries; subclasses say what these are.

    Attributes:
        exact: whether keys and values are those of the module itself, which may then go on with its
            own for the new tokens.
    """

    exact: ClassVar[bool]

    def new_layer(self, key: int) -> EntryLayer:
        return EntryLayer(key, croppable=self.group.croppable)

    @abstractmethod
    def entries(self, inputs_BTD: Tensor) -> Tensor:
        """What is kept of the module's inputs, ``[B, T, Z]``."""

    @abstractmethod
    def projection(self, part: int) -> Projection:
        """What makes keys, before norm and rotary, or values of entries."""

    def attend(self, layer: EntryLayer, forward: Forward, hidden_BTD: Tensor, kwargs: Any) -> Any:
        past, new = layer.held, hidden_BTD.shape[1]
        plan = self.plan(layer, hidden_BTD, kwargs)
        (entries_BSZ,) = layer.append(self.entries(hidden_BTD))
        if self.exact and past == 0:
            kwargs = {**kwargs, "attention_mask": plan.mask, self.attention.names.cache: None}
            result = forward(hidden_BTD, **kwargs)
        elif self.can_absorb(new, past, hidden_BTD.shape[-1], plan):
            result = self.absorbed(hidden_BTD, entries_BSZ, plan)
        else:
            result = forward(hidden_BTD, **self.rebuilt(entries_BSZ, past, plan, kwargs))
        layer.settle(plan.keep_BK, new)
        return result

    def can_absorb(self, new: int, past: int, entry: int, plan: Plan) -> bool:
        """Whether `absorbed` knows all that the module's own `forward` would do, and pays."""
        attention = self.attention
        if attention.implementation not in ("eager", "sdpa") or attention.module.training:
            return False
        if not self.exact and not attention.is_readable(QUERY):
            return False  # an adapter is in training; the module itself heeds it
        if getattr(attention.module.config, "reorder_and_upcast_attn", False):
            return False
        if plan.mask is None and new > 1:
            return False
        return absorbing_pays(
            new,
            past,
            entry,
            attention.head_width,
            attention.heads,
            attention.groups,
            self.part_rebuilt(plan.turns),
        )

    def part_rebuilt(self, turns: Turns | None) -> int:
        """How much of a key has to be rebuilt to be compared: all with a norm, else R."""
        if self.attention.names.norms is not None:
            return self.attention.head_width
        return 0 if turns is None else int(turns[0].shape[-1])

    def keys(self, entries_BSZ: Tensor, turns: Turns | None) -> Tensor:
        """Keys as they are attended to, ``[B, G, S, E]``."""
        made_BGSE = self.projection(KEY).heads(entries_BSZ)
        return rotated(self.attention.normed(KEY, made_BGSE), turns)

    def rebuilt(self, entries_BSZ: Tensor, past: int, plan: Plan, kwargs: Any) -> dict[str, Any]:
        """What to call the module's own `forward` with, for it to attend to rebuilt keys."""
        turns = plan.turns
        if self.exact:
            entries_BSZ = entries_BSZ[:, :past]
            turns = None if turns is None else (turns[0][:, :past], turns[1][:, :past])

        def update(keys_BGTE: Tensor, values_BGTE: Tensor) -> tuple[Tensor, Tensor]:
            made = self.keys(entries_BSZ, turns), self.projection(VALUE).heads(entries_BSZ)
            if not self.exact:
                return made
            return torch.cat([made[0], keys_BGTE], dim=2), torch.cat([made[1], values_BGTE], dim=2)

        return self.through(update, plan.mask, kwargs)

    def absorbed(
        self, hidden_BTD: Tensor, entries_BSZ: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None]:
        """The module's output for the new tokens, and the attention weights where it gives them."""
        attention, turns = self.attention, plan.turns
        new, start = hidden_BTD.shape[1], self.part_rebuilt(turns)
        query_BHTE = attention.queries(hidden_BTD)
        if turns is not None:
            query_BHTE = rotated(query_BHTE, (turns[0][:, -new:], turns[1][:, -new:]))
        query_BGJTE = query_BHTE.unflatten(1, (attention.groups, -1))
        weight_GEZ, bias_GE = self.projection(KEY)
        scores_BGJTS = query_BHTE.new_zeros(())
        if start < attention.head_width:
            still_BGJTE = query_BGJTE[..., start:]
            on_entries_BGJTZ = torch.einsum("bgjte,gez->bgjtz", still_BGJTE, weight_GEZ[:, start:])
            scores_BGJTS = torch.einsum("bgjtz,bsz->bgjts", on_entries_BGJTZ, entries_BSZ)
            by_bias_BGJT = torch.einsum("bgjte,ge->bgjt", still_BGJTE, bias_GE[:, start:])
            scores_BGJTS = scores_BGJTS + by_bias_BGJT[..., None]
        if start > 0:
            made_BGSE = self.projection(KEY).heads(entries_BSZ, slice(start))
            keys_BGSE = rotated(attention.normed(KEY, made_BGSE), turns)
            scores_BGJTS = scores_BGJTS + query_BGJTE[..., :start] @ keys_BGSE[:, :, None].mT
        weights_BHTS = attention.weights(scores_BGJTS.flatten(1, 2), plan.mask)
        weights_BGJTS = weights_BHTS.unflatten(1, (attention.groups, -1))
        weight_GEZ, bias_GE = self.projection(VALUE)
        mixed_BGJTZ = torch.einsum("bgjts,bsz->bgjtz", weights_BGJTS, entries_BSZ)
        mixed_BTGJE = torch.einsum("bgjtz,gez->btgje", mixed_BGJTZ, weight_GEZ)
        mixed_BTGJE = mixed_BTGJE + torch.einsum("bgjts,ge->btgje", weights_BGJTS, bias_GE)
        eager = attention.implementation == "eager"
        return attention.output(mixed_BTGJE.flatten(2)), weights_BHTS if eager else None
