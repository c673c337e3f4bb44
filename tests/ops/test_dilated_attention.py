"""Both forms against a loop written straight from the definition, in fp64, at odd sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from contextlm.ops.dilated_attention import dilated_attention, gather_attention, naive

HEADS, WIDTH = 2, 3


def positions_read(i: int, interval: int, size: int, anchor: str) -> list[int]:
    """What position i reads, from DESIGN 1.3; negative numbers are missing entries."""
    if anchor == "position":
        return [i - interval * j for j in range(size)]
    below = [p for p in range(-interval * size, i) if p % interval == 0]
    return [i, *below[len(below) - size + 1 :]]


def make(tokens: int, before: int = 0, batch: int = 2) -> list[Tensor]:
    """Query, key, value, pad key, pad value."""
    g = torch.Generator().manual_seed(tokens)
    shapes = [(batch, HEADS, tokens, WIDTH)] + 2 * [(batch, HEADS, before + tokens, WIDTH)]
    shapes += 2 * [(HEADS, WIDTH)]
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def from_the_definition(
    query, key, value, pad_key, pad_value, starts, interval, size, anchor, padding
):
    """Row by row, head by head, query by query."""
    out = torch.zeros_like(query)
    tokens = query.shape[2]
    before = key.shape[2] - tokens
    for b, h, t in itertools.product(range(len(query)), range(HEADS), range(tokens)):
        keys, values = [], []
        for position in positions_read(starts[b] + t, interval, size, anchor):
            column = before + position - starts[b]
            if position >= 0:
                keys.append(key[b, h, column])
                values.append(value[b, h, column])
            elif padding == "zeros":
                keys.append(pad_key[h])
                values.append(pad_value[h])
        scores = torch.stack([query[b, h, t] @ k for k in keys]) / math.sqrt(WIDTH)
        weights = torch.exp(scores) / torch.exp(scores).sum()
        out[b, h, t] = sum(w * v for w, v in zip(weights, values, strict=True))
    return out


def gathered(query, key, value, pad_key, pad_value, starts, interval, size, anchor, padding):
    tokens = query.shape[2]
    read = torch.tensor(
        [[positions_read(p + t, interval, size, anchor) for t in range(tokens)] for p in starts]
    )
    columns = read - torch.tensor(starts)[:, None, None] + key.shape[2] - tokens
    pads = pads_of(pad_key, pad_value, padding)
    return gather_attention(query, key, value, columns, read >= 0, **pads)


def dilated(query, key, value, pad_key, pad_value, starts, interval, size, anchor, padding):
    pads = pads_of(pad_key, pad_value, padding)
    start_B = torch.tensor(starts) if any(starts) else None
    return dilated_attention(
        query, key, value, interval=interval, size=size, anchor=anchor, start_B=start_B, **pads
    )


def pads_of(pad_key: Tensor, pad_value: Tensor, padding: str) -> dict[str, Tensor]:
    return {} if padding == "mask" else {"pad_key_HE": pad_key, "pad_value_HE": pad_value}


def assert_same(first, second, tensors: list[Tensor], padding: str) -> None:
    """Values and all gradients agree."""
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(
        first.shape, dtype=first.dtype, generator=torch.Generator().manual_seed(1)
    )
    leaves = tensors[:3] if padding == "mask" else tensors
    options = {"materialize_grads": True, "retain_graph": True}  # a pad may never have been read
    actual = torch.autograd.grad((first * cotangent).sum(), leaves, **options)
    expected = torch.autograd.grad((second * cotangent).sum(), leaves, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


SHAPES = [(1, 1), (1, 4), (3, 1), (3, 3), (5, 7), (20, 2)]
RULES = list(itertools.product(["position", "grid"], ["zeros", "mask"]))


@pytest.mark.parametrize(("anchor", "padding"), RULES)
@pytest.mark.parametrize(("interval", "size"), [*SHAPES, (20, 32)])
@pytest.mark.parametrize("tokens", [1, 331])
def test_the_dilated_form_equals_the_gathered_one(tokens, interval, size, anchor, padding):
    tensors = make(tokens)
    rule = ([0, 0], interval, size, anchor, padding)
    assert_same(dilated(*tensors, *rule), gathered(*tensors, *rule), tensors, padding)


@pytest.mark.parametrize(("anchor", "padding"), RULES)
@pytest.mark.parametrize(("interval", "size"), SHAPES)
@pytest.mark.parametrize(("tokens", "history"), [(19, False), (1, True), (13, True)])
def test_values_and_gradients_equal_the_naive_loop(
    tokens, history, interval, size, anchor, padding
):
    """Starts before, within and beyond the reach of the memory, on the grid and off it."""
    starts, before = [0, 0], 0
    if history:
        starts = [0, 1, interval, interval * size + 2, 1000]
        before = interval * (size - 1)
    tensors = make(tokens, before, batch=len(starts))
    rule = (starts, interval, size, anchor, padding)
    expected = from_the_definition(*tensors, *rule)
    assert_same(dilated(*tensors, *rule), expected, tensors, padding)
    assert_same(gathered(*tensors, *rule), expected, tensors, padding)


@pytest.mark.parametrize(("anchor", "padding"), RULES)
def test_a_shorter_or_longer_history_will_do(anchor, padding):
    for starts, before in (([2, 4], 4), ([30, 41], 23)):
        tensors = make(13, before=before)
        rule = (starts, 5, 4, anchor, padding)
        assert_same(
            dilated(*tensors, *rule), from_the_definition(*tensors, *rule), tensors, padding
        )


def test_long_chunks_are_gathered_piece_by_piece(monkeypatch):
    tensors = make(19)
    rule = ([0, 0], 3, 3, "grid", "zeros")
    whole = gathered(*tensors, *rule)
    monkeypatch.setattr(naive, "_GATHERED_QUERIES", 4)
    torch.testing.assert_close(gathered(*tensors, *rule), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("anchor", ["position", "grid"])
def test_dropout_keeps_the_mean(anchor):
    torch.manual_seed(0)
    query, key, value, *_ = make(7, batch=1)
    many = [t.detach().expand(20_000, -1, -1, -1) for t in (query, key, value)]
    rule = {"interval": 2, "size": 3, "anchor": anchor}
    dropped = dilated_attention(*many, dropout=0.1, **rule)
    plain = dilated_attention(query, key, value, **rule)
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain[0].detach(), rtol=0.02, atol=0.02)


def test_bad_arguments_are_refused():
    query, key, _, pad, _ = make(4)
    more = torch.cat([key, key], dim=2)
    for match, keys, options in (
        ("unknown anchor 'end'", key, {"anchor": "end"}),
        ("at least 1, got 0 and 2", key, {"interval": 0}),
        ("at least 1, got 2 and -1", key, {"size": -1}),
        ("both of pad_key and pad_value", key, {"pad_key_HE": pad}),
        ("3 memory entries cannot cover 4 queries", key[:, :, 1:], {}),
        ("4 entries before the queries need start_B", more, {}),
    ):
        with pytest.raises(ValueError, match=match):
            dilated_attention(query, keys, keys, **{"interval": 2, "size": 2, **options})
