"""Storage of the tokens that a policy keeps, and the plan of which these are.

Entries need not stand in order, nor be the same tokens in each row: the *index* of an entry says
which of the row's real tokens it is of, and masks are made from indices alone. Layers that keep the
same tokens form a `Group`: the first of them has the index, and plans each forward pass for all.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import Attention, Turns
from contextlm.models.cache import RowStateLayer

NOTHING = -1  # the index of an entry that is of no token: padding, or filling up shorter rows
SLACK = 8  # a full buffer grows by a share of 1 / SLACK of its length


class Rule:
    """Which earlier tokens a query may still see; this one hides none."""

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        """Whether the token of one index may be seen from another, which is not before it.

        Indices count a row's real tokens from 0; the two tensors broadcast. What is hidden stays
        hidden from all later queries, so that it need not be kept.
        """
        return (token <= query).expand_as(query + token)

    def spares(self, tokens: int) -> bool:
        """Whether the first so many tokens are all visible, also from the token after them."""
        return True


EVERYTHING = Rule()


class KeptLayer(RowStateLayer):
    """Keeps something for each of some tokens. Subclasses name it in `along`.

    Attributes:
        along: names of the tensors kept, each with the dimension along which its entries stand.
        beside: names of other tensors kept, with a row of the batch along dimension 0.
        key: of the `CompressedCache` that reads the layer.
        index: ``[B, K]`` int32, which of its row's real tokens each entry is of, or `NOTHING`; None
            where each row's entries are its tokens in order, and in layers that are not the first
            of their group.
        positions: ``[B, K]`` int32, entries' positions, in the first layer of a group where they
            are needed to turn keys; else None.
    """

    along: ClassVar[dict[str, int]] = {}
    beside: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ("counts", "index", "positions")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kept = (*KeptLayer.kept, *cls.along, *cls.beside)

    def __init__(self, key: int, *, croppable: bool) -> None:
        super().__init__()
        self.key = key
        self.is_croppable = croppable
        self.index: Tensor | None = None
        self.positions: Tensor | None = None
        for name in (*self.along, *self.beside):
            setattr(self, name, None)

    @property
    def held(self) -> int:
        """K, entries kept."""
        name, dim = next(iter(self.along.items()))
        kept = getattr(self, name)
        return 0 if kept is None else int(kept.shape[dim])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the new tokens alone: what is kept gets a mask from its index."""
        return query_length, self._seen

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Take in what is kept of T new tokens, in the order of `along`; all entries, old and new.

        Raises:
            ValueError: the new tokens are for another number of rows.
        """
        for (name, dim), tensor in zip(self.along.items(), new, strict=True):
            setattr(self, name, extended(getattr(self, name), tensor, dim))
        self.is_initialized = True
        return tuple(getattr(self, name) for name in self.along)

    def settle(self, keep_BK: Tensor | None, new: int) -> None:
        """Count so many new tokens and drop all entries but these columns; None: keep all."""
        self._seen += new
        if keep_BK is not None:
            for name, dim in self.along.items():
                setattr(self, name, taken(getattr(self, name), keep_BK, dim))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, whose number is negative, as transformers' own layers take it.

        Raises:
            ValueError: it is positive, or earlier tokens are gone that would be needed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): expected 0 or a negative number of tokens")
        if not self.is_croppable or self.held < self._seen:
            return super().crop(tokens_to_remove)
        self._seen = max(0, self._seen + tokens_to_remove)
        for name, dim in [*self.along.items(), ("index", 1), ("positions", 1)]:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.narrow(dim, 0, self._seen))
        if self.index is not None:
            self.counts = (self.index != NOTHING).sum(1)
        return None


class KeyValueLayer(KeptLayer):
    """Keeps keys, turned by their positions, and values, both ``[B, G, K, E]``."""

    along: ClassVar[dict[str, int]] = {"keys": 2, "values": 2}


class Plan(NamedTuple):
    """What a forward pass does with the tokens, the same for all layers of a group.

    Attributes:
        mask: as attention functions take it, over old and new entries; None: nothing is hidden.
        keep_BK: the columns of old and new entries that are kept; None: all.
        index_BS: indices of old and new entries; None: they are in order, and all visible.
        before_B, after_B: each row's real tokens before and after it; None likewise.
        turns: of old and new entries, where there are rotary positions.
    """

    mask: Tensor | None
    keep_BK: Tensor | None
    turns: Turns | None
    index_BS: Tensor | None = None
    before_B: Tensor | None = None
    after_B: Tensor | None = None


class Group:
    """The attention modules that keep the same tokens: those with the same sliding window.

    Args:
        rule: which tokens are kept.
        leader: the first of the modules.
        turns: whether kept entries have to be turned.

    Attributes:
        croppable: whether a cache can be cropped, which needs all tokens in all of its layers.
    """

    croppable = False

    def __init__(self, rule: Rule, leader: Attention, *, turns: bool = False):
        self.rule, self.leader = rule, leader
        self.needs_turns = turns and leader.has_rotary
        self._plan: Plan | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever dropped."""
        return self.leader.window is None and self.rule is EVERYTHING

    def plan(
        self,
        attention: Attention,
        layer: KeptLayer,
        hidden_BTD: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> Plan:
        """The plan of the forward pass under way: made for the leader's layer, used by all."""
        if attention is self.leader:
            self._plan = self._made(layer, hidden_BTD, mask, positions)
        assert self._plan is not None
        return self._plan

    def visible(self, query: Tensor, token: Tensor) -> Tensor:
        """Whether a token may be seen from a query, by rule and by sliding window."""
        seen = self.rule.visible(query, token) & (token != NOTHING) & (token <= query)
        if self.leader.window is not None:
            seen = seen & (query - token < self.leader.window)
        return seen

    def _spares(self, tokens: int) -> bool:
        window = self.leader.window
        return (window is None or tokens < window) and self.rule.spares(tokens)

    def _made(
        self, layer: KeptLayer, hidden_BTD: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Plan:
        rows, new = hidden_BTD.shape[:2]
        past, device = layer.held, hidden_BTD.device
        turns = self._turns(layer, hidden_BTD, positions)
        real_BT = real_tokens(mask, rows, new)
        if real_BT is None and layer.index is None and self._spares(past + new):
            return Plan(self._in_order(mask, past, hidden_BTD), None, turns)
        start_B = layer.counts
        if start_B is None:
            start_B = torch.full((rows,), layer.get_seq_length(), device=device)
        if real_BT is None:
            real_BT = torch.ones(rows, new, dtype=torch.bool, device=device)
        old_BK = layer.index
        if old_BK is None:
            old_BK = torch.arange(past, device=device, dtype=torch.int32).expand(rows, past)
        steps_BT = real_BT.cumsum(1)
        query_BT = (start_B[:, None] + steps_BT - 1).to(torch.int32).masked_fill(~real_BT, NOTHING)
        index_BS = torch.cat([old_BK, query_BT], dim=1)
        seen_BTS = self.visible(query_BT[:, :, None], index_BS[:, None, :])
        after_B = start_B + steps_BT[:, -1]
        keep_BS = self.visible(after_B[:, None].to(torch.int32), index_BS)
        keep_BK = None if self.keeps_all else self.columns(keep_BS, layer)
        layer.counts, layer.index = after_B, index_BS
        if keep_BK is not None:
            layer.index = index_BS.masked_fill(~keep_BS, NOTHING).gather(1, keep_BK)
            if layer.positions is not None:
                layer.positions = layer.positions.gather(1, keep_BK)
        if mask is not None:
            seen_BTS[..., past:] &= open_of(mask)
        # A token of padding sees itself, so that its row of weights stays finite.
        seen_BTS[..., past:] |= torch.eye(new, dtype=torch.bool, device=device)
        made = self.mask(seen_BTS, query_BT, after_B, hidden_BTD.dtype)
        return Plan(made, keep_BK, turns, index_BS, start_B, after_B)

    def mask(
        self, seen_BTS: Tensor, query_BT: Tensor, after_B: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """The mask of what the queries see.

        Args:
            seen_BTS: whether they see an entry.
            query_BT: their indices.
            after_B: real tokens of each row after this pass.
            dtype: of the model.
        """
        if seen_BTS.shape[1] == 1 and bool(seen_BTS.all()):
            return None
        return attention_mask(seen_BTS[:, None], self.leader.implementation, dtype)

    def columns(self, keep_BS: Tensor, layer: Any) -> Tensor | None:
        """The columns of entries that stay, ``[B, K]``, at least those marked; None: all."""
        return columns(keep_BS)

    def _in_order(self, given: Tensor | None, past: int, like: Tensor) -> Tensor | None:
        """The mask where every token is there and none is hidden but later ones."""
        new = like.shape[1]
        if past == 0:
            return given
        if new == 1:
            return None
        seen_TS = torch.ones(new, past + new, dtype=torch.bool, device=like.device).tril(past)
        if given is not None:
            seen_TS = seen_TS.expand(given.shape[0], -1, -1).clone()
            seen_TS[..., past:] &= open_of(given)
            return attention_mask(seen_TS[:, None], self.leader.implementation, like.dtype)
        return attention_mask(seen_TS[None, None], self.leader.implementation, like.dtype)

    def _turns(self, layer: KeptLayer, hidden_BTD: Tensor, new_BT: Tensor | None) -> Turns | None:
        """Notes the new tokens' positions; what turns all entries."""
        if not self.needs_turns:
            return None
        assert new_BT is not None
        new_BT = new_BT.to(torch.int32).expand(hidden_BTD.shape[0], -1)
        layer.positions = extended(layer.positions, new_BT, 1)
        return self.leader.turns(hidden_BTD, layer.positions)


def real_tokens(mask: Tensor | None, rows: int, new: int) -> Tensor | None:
    """Which new tokens are no padding, ``[B, T]``, read off the model's mask; None: all.

    Real tokens attend to themselves, padding does not.

    Raises:
        InputError: it is no mask over the new tokens.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[-2:] != (new, new):
        raise InputError(
            f"a mask of shape {list(mask.shape)} cannot be used with a compressed cache: give "
            "attention_mask as [rows, tokens], and use attention sdpa or eager"
        )
    real_BT = open_of(mask).diagonal(dim1=1, dim2=2)
    return None if bool(real_BT.all()) else real_BT.expand(rows, -1)


def open_of(mask: Tensor) -> Tensor:
    """What a mask of booleans or of addends lets through, ``[B, T, T]``."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def attention_mask(seen_BHTS: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """As attention functions take it: booleans for sdpa, addends for eager.

    Raises:
        InputError: another attention function is in use.
    """
    check_takes_masks(implementation)
    if implementation == "sdpa":
        return seen_BHTS
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(seen_BHTS, dtype=dtype).masked_fill_(~seen_BHTS, lowest)


def check_takes_masks(implementation: str) -> None:
    """Refuse an attention function that takes no mask.

    Raises:
        InputError: it is neither sdpa nor eager.
    """
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"attention {implementation!r} cannot read a compressed cache: "
            'load the model with attn_implementation="sdpa" or "eager"'
        )


def columns(keep_BS: Tensor) -> Tensor | None:
    """The columns to keep, ``[B, K]``, in order; shorter rows are filled up. None: all."""
    most = int(keep_BS.sum(1).max())
    if most == keep_BS.shape[1]:
        return None
    return keep_BS.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]


def taken(entries: Tensor, columns_BK: Tensor, dim: int) -> Tensor:
    """The entries at some columns of each row, along dimension `dim`."""
    if columns_BK.shape[0] == 1:
        return entries.index_select(dim, columns_BK[0])
    shape = [1] * entries.dim()
    shape[0], shape[dim] = columns_BK.shape
    size = list(entries.shape)
    size[dim] = columns_BK.shape[1]
    return entries.gather(dim, columns_BK.view(shape).expand(size))


def extended(kept: Tensor | None, new: Tensor, dim: int) -> Tensor:
    """`kept` with `new` behind it, in spare room of its storage where there is.

    Entries of width D, ``[B, K, D]``, and positions, ``[B, K]``, grow by a share of their length,
    which makes the copying of all tokens linear in their number. Where gradients may flow, the two
    are concatenated: nothing that autograd has saved is written to.

    Raises:
        ValueError: the new tokens are for another number of rows.
    """
    if kept is None:
        return new.contiguous()
    if kept.shape[0] != new.shape[0]:
        raise ValueError(f"the cache holds {kept.shape[0]} rows, the new tokens {new.shape[0]}")
    if dim != 1 or torch.is_grad_enabled():
        return torch.cat([kept, new], dim=dim)
    old, total = kept.shape[1], kept.shape[1] + new.shape[1]
    if total > _room(kept):
        roomy = kept.new_empty(kept.shape[0], total + total // SLACK, *kept.shape[2:])
        roomy[:, :old] = kept
        kept = roomy
    else:
        kept = kept.as_strided((kept.shape[0], total, *kept.shape[2:]), kept.stride())
    kept[:, old:total] = new
    return kept[:, :total]


def _room(kept: Tensor) -> int:
    """How many tokens a row's part of the storage can hold; 0 if it may not be written to."""
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        return 0
    per_token = kept.shape[2] if kept.dim() == 3 else 1
    room = kept.untyped_storage().nbytes() // (kept.element_size() * kept.shape[0] * per_token)
    strides = (room * per_token, per_token, 1)[: kept.dim()]
    return room if kept.stride() == strides and kept.storage_offset() == 0 else 0
