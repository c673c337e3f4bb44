"""All that W and G do for one token between their two projections (see `ops.step`).

Both keep one entry a token, of which some columns are keys and some are values; G's are the same.

X is the width of an entry here, S what the token sees, P the pairs of channels that turn.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.backends import compiled
from contextlm.ops.scalars import exp
from contextlm.ops.step import array, convolve, normalise, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.

_BLOCK = 32  # entries that are read at a time


@compiled("contract", inlined=True)
def turn(x_E, cos_P, sin_P, out_E):  # type: ignore[no-untyped-def]
    """Turn each pair of channels ``(e, e + E/2)``; `x` may be `out` itself."""
    half = cos_P.shape[0]
    for p in range(half):
        one, two = x_E[p], x_E[half + p]
        out_E[p] = one * cos_P[p] - two * sin_P[p]
        out_E[half + p] = two * cos_P[p] + one * sin_P[p]


@compiled("contract", "reassoc", inlined=True)
def _score(query_HE, entry_X, groups, cos_SP, sin_SP, s, scale, turned_E, score_HS, column):  # type: ignore[no-untyped-def]
    """Each head's score of one entry."""
    heads, width = query_HE.shape
    shared = heads // groups
    for g in range(groups):
        key_E = entry_X[g * width : (g + 1) * width]
        if cos_SP.shape[0] > 0:
            turn(key_E, cos_SP[s], sin_SP[s], turned_E)
            key_E = turned_E
        for h in range(g * shared, (g + 1) * shared):
            query_E, score = query_HE[h], scale - scale
            for e in range(width):
                score += query_E[e] * key_E[e]
            score_HS[h, column] = scale * score


@compiled("contract", "reassoc", inlined=True)
def attend(  # type: ignore[no-untyped-def]
    query_HE, entry_SX, newest_X, first, kept, groups, values, cos_SP, sin_SP, scale, out_HE
):
    """What the heads read of the entries from `first` to `kept` and of the newest.

    Some entries at a time, which all heads read for both products while they are at hand; what was
    read before is scaled down where a score is larger than all before (Dao et al.,
    arXiv:2205.14135).

    Args:
        query_HE: the queries, turned already.
        entry_SX: each with the keys of the groups in front; values begin at column `values`.
        newest_X: the token's own entry, in column `kept`.
        first, kept: entries that are seen.
        groups: of heads that share a key and a value.
        values: the first column of the values.
        cos_SP, sin_SP: by which keys are turned; without rows: not at all.
        scale: of the scores.
        out_HE: to be filled; its width is that of the values.
    """
    heads, width = query_HE.shape
    kind, channels, shared = out_HE.dtype.type, out_HE.shape[1], heads // groups
    score_HS, turned_E = np.empty((heads, _BLOCK), out_HE.dtype), np.empty(width, out_HE.dtype)
    largest_H, total_H = np.empty(heads, out_HE.dtype), np.ones(heads, out_HE.dtype)
    _score(query_HE, newest_X, groups, cos_SP, sin_SP, kept, scale, turned_E, score_HS, 0)
    for h in range(heads):
        largest_H[h], out_E = score_HS[h, 0], out_HE[h]
        start = values + h // shared * channels
        newest_E = newest_X[start : start + channels]
        for e in range(channels):
            out_E[e] = newest_E[e]
    for low in range(first, kept, _BLOCK):
        many = min(_BLOCK, kept - low)
        for s in range(many):
            entry_X = entry_SX[low + s]
            _score(query_HE, entry_X, groups, cos_SP, sin_SP, low + s, scale, turned_E, score_HS, s)
        for h in range(heads):
            score_S, out_E, before, total = score_HS[h], out_HE[h], largest_H[h], kind(0)
            largest = before
            for s in range(many):
                largest = max(largest, score_S[s])
            for s in range(many):
                score_S[s] = exp(score_S[s] - largest)
                total += score_S[s]
            if largest > before:
                less = exp(before - largest)
                largest_H[h] = largest
                total_H[h] *= less
                for e in range(channels):
                    out_E[e] *= less
            total_H[h] += total
        # Four at a time, since each time all of the output is read and written.
        for s in range(0, many, 4):
            for h in range(heads):
                start = values + h // shared * channels
                out_E, stop = out_HE[h], start + channels
                a_E, a = entry_SX[low + s, start:stop], score_HS[h, s]
                if s + 4 <= many:
                    b_E, b = entry_SX[low + s + 1, start:stop], score_HS[h, s + 1]
                    c_E, c = entry_SX[low + s + 2, start:stop], score_HS[h, s + 2]
                    d_E, d = entry_SX[low + s + 3, start:stop], score_HS[h, s + 3]
                    for e in range(channels):
                        out_E[e] += a * a_E[e] + b * b_E[e] + c * c_E[e] + d * d_E[e]
                else:
                    for other in range(s, many):
                        a_E, a = entry_SX[low + other, start:stop], score_HS[h, other]
                        for e in range(channels):
                            out_E[e] += a * a_E[e]
    for h in range(heads):
        out_E, over = out_HE[h], kind(1) / total_H[h]
        for e in range(channels):
            out_E[e] *= over


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, eps, projected, taps, entries, counts, out,
    weight, bias, query_norm, key_norm, cosines, sines,
    seen, heads, groups, width, values, entry, kept, room, columns,
):  # fmt: skip
    queries = heads * width
    inner = queries + entry
    projected_BX = array(projected, (last_row, inner), eps)
    taps_BJX = array(taps, (last_row, max(0, seen - 1), inner), eps)
    entry_BSX = array(entries, (last_row, room, entry), eps)
    count_B = array(counts, last_row, 0)
    out_BHE = array(out, (last_row, heads, width), eps)
    weight_JX, bias_X = array(weight, (seen, inner), eps), array(bias, inner, eps)
    query_norm_E, key_norm_E = array(query_norm, width, eps), array(key_norm, width, eps)
    cos_SP = array(cosines, (columns, width // 2), eps)
    sin_SP = array(sines, (columns, width // 2), eps)
    kind = out_BHE.dtype.type
    scale = kind(1 / math.sqrt(width))
    mixed_X = np.empty(inner, out_BHE.dtype)
    for b in range(first_row, last_row):
        convolve(projected_BX[b], taps_BJX[b], weight_JX, bias_X, mixed_X)
        query_HE = mixed_X[:queries].reshape(heads, width)
        newest_X, entry_SX = mixed_X[queries:], entry_BSX[b]
        if query_norm != 0:
            for h in range(heads):
                normalise(query_HE[h], query_norm_E, eps)
            for g in range(groups):
                normalise(newest_X[g * width : (g + 1) * width], key_norm_E, eps)
        if columns > 0:
            for h in range(heads):
                turn(query_HE[h], cos_SP[kept], sin_SP[kept], query_HE[h])
        # Columns before a row's first token hold nothing.
        first = max(0, kept - count_B[b])
        attend(
            query_HE, entry_SX, newest_X, first, kept, groups, values, cos_SP, sin_SP, scale,
            out_BHE[b],
        )  # fmt: skip
        if kept < room:
            entry_SX[kept] = newest_X
        elif room > 0:
            for s in range(room - 1):
                earlier_X, later_X = entry_SX[s], entry_SX[s + 1]
                for x in range(entry):
                    earlier_X[x] = later_X[x]
            entry_SX[room - 1] = newest_X


def attention_step(
    projected_B1X: Tensor,
    taps_BJX: Tensor | None,
    entry_BSX: Tensor,
    count_B: Tensor,
    weight_JX: Tensor | None,
    bias_X: Tensor | None,
    query_norm_E: Tensor | None,
    key_norm_E: Tensor | None,
    *,
    turns: tuple[Tensor, Tensor] | None,
    eps: float,
    kept: int,
    heads: int,
    groups: int,
    width: int,
) -> Tensor:
    """What the second projection is given, ``[B, 1, H E]``; changes `taps` and `entry`.

    Args:
        projected_B1X: what the first one gave: queries of H heads, then the token's entry, the keys
            of G heads and, unless one is both, their values. Contiguous as all others, of one type.
        taps_BJX: the last inputs of the convolution, the newest last; None where it has one tap or
            none.
        entry_BSX: memory for entries, the oldest first. The new one is put behind those that are
            kept, or, where there is no room, all move and the oldest goes.
        count_B: int64, of how many tokens before the new one each row sees the entries.
        weight_JX: of the convolution, the current token's first; None: no convolution.
        bias_X: of the convolution.
        query_norm_E: weights of the queries' norm; None: no norms.
        key_norm_E: the same of the keys'.
        turns: cosines and sines of each column's rotary angles, ``[..., S, E / 2]``;
            None: no rotary positions.
        eps: of the norms.
        kept: columns before the new entry's.
        heads: H.
        groups: G.
        width: E.
    """
    batch, room, entry = entry_BSX.shape
    out_B1X = projected_B1X.new_empty(batch, 1, heads * width)
    cosines, sines = turns or (None, None)
    tensors = (projected_B1X, taps_BJX, entry_BSX, count_B, out_B1X)
    weights = (weight_JX, bias_X, query_norm_E, key_norm_E, cosines, sines)
    seen = 0 if weight_JX is None else len(weight_JX)
    values = entry - groups * width
    columns = 0 if cosines is None else cosines.shape[-2]
    sizes = (seen, heads, groups, width, values, entry, kept, room, columns)
    numbers = 2 * (kept + 1) * heads * width
    take_step(_step, batch, numbers, eps, (*tensors, *weights), *sizes)
    return out_B1X
