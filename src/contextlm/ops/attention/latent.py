"""All that L does for one token between its projections (see `ops.step`), keys and values absorbed.

R is the rotary width here, E that of a head's content, C that of a latent, X is C + R: an entry.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from contextlm.ops.attention.step import attend, turn
from contextlm.ops.backends import compiled
from contextlm.ops.step import array, convolve, normalise, take_step

# Compiled functions have no annotations, hence the silenced checks: Numba finds their types when
# they are called, and one function serves several.


@compiled("contract", "reassoc")
def _step(  # type: ignore[no-untyped-def]
    first_row, last_row, eps, queries, compressed, taps, entries, counts, out,
    weight, bias, norm, keys, values, theta, seen, heads, content, rotary, latent, kept, room,
):  # fmt: skip
    entry, each = latent + rotary, content + rotary
    asked = heads * each
    inner = asked + entry
    query_BX = array(queries, (last_row, asked), eps)
    compressed_BX = array(compressed, (last_row, entry), eps)
    taps_BJX = array(taps, (last_row, max(0, seen - 1), inner), eps)
    entry_BSX = array(entries, (last_row, room, entry), eps)
    count_B = array(counts, last_row, 0)
    out_BHE = array(out, (last_row, heads, content), eps)
    weight_JX, bias_X = array(weight, (seen, inner), eps), array(bias, inner, eps)
    norm_C = array(norm, latent, eps)
    key_HEC = array(keys, (heads, content, latent), eps)
    value_HEC = array(values, (heads, content, latent), eps)
    kind = out_BHE.dtype.type
    scale, zero = kind(1 / math.sqrt(each)), kind(0)
    given_X, mixed_X = np.empty(inner, out_BHE.dtype), np.empty(inner, out_BHE.dtype)
    query_HX = np.empty((heads, entry), out_BHE.dtype)
    read_HC = np.empty((heads, latent), out_BHE.dtype)
    cos_P, sin_P = np.empty(rotary // 2, out_BHE.dtype), np.empty(rotary // 2, out_BHE.dtype)
    none_SP = np.empty((0, 0), out_BHE.dtype)
    for b in range(first_row, last_row):
        given_X[:asked] = query_BX[b]
        given_X[asked:] = compressed_BX[b]
        convolve(given_X, taps_BJX[b], weight_JX, bias_X, mixed_X)
        for p in range(rotary // 2):
            angle = kind(count_B[b] * kind(theta ** (-2 * p / rotary)))
            cos_P[p], sin_P[p] = math.cos(angle), math.sin(angle)
        newest_X, entry_SX = mixed_X[asked:], entry_BSX[b]
        normalise(newest_X[:latent], norm_C, eps)
        turn(newest_X[latent:], cos_P, sin_P, newest_X[latent:])
        for h in range(heads):
            q_E, query_C = mixed_X[h * each : h * each + content], query_HX[h, :latent]
            for c in range(latent):
                query_C[c] = 0
            for e in range(content):
                q, key_C = q_E[e], key_HEC[h, e]
                for c in range(latent):
                    query_C[c] += q * key_C[c]
            turn(mixed_X[h * each + content : (h + 1) * each], cos_P, sin_P, query_HX[h, latent:])
        first = max(0, kept - count_B[b])
        attend(query_HX, entry_SX, newest_X, first, kept, 1, 0, none_SP, none_SP, scale, read_HC)
        for h in range(heads):
            read_C, out_E = read_HC[h], out_BHE[b, h]
            for e in range(content):
                total, value_C = zero, value_HEC[h, e]
                for c in range(latent):
                    total += read_C[c] * value_C[c]
                out_E[e] = total
        entry_SX[kept] = newest_X


def latent_step(
    query_B1X: Tensor,
    compressed_B1X: Tensor,
    taps_BJX: Tensor | None,
    entry_BSX: Tensor,
    count_B: Tensor,
    weight_JX: Tensor | None,
    bias_X: Tensor | None,
    norm_C: Tensor,
    key_XC: Tensor,
    value_XC: Tensor,
    *,
    theta: float,
    eps: float,
    kept: int,
    heads: int,
) -> Tensor:
    """What the last projection is given, ``[B, 1, H E]``; changes `taps` and `entry`.

    Args:
        query_B1X: queries, of each head the content and what is to be turned; contiguous as all
            others, of one type.
        compressed_B1X: the token's latent and rotary key.
        taps_BJX: the last inputs of the convolution over both, the newest last; None where it has
            one tap or none.
        entry_BSX: memory for entries, the new one's behind those that are kept.
        count_B: int64, tokens that each row has seen: the new one's position.
        weight_JX: of the convolution, the current token's first; None: no convolution.
        bias_X: of the convolution.
        norm_C: weights of the latent's norm.
        key_XC: ``[H E, C]``, what makes keys of a latent.
        value_XC: the same of values.
        theta: base of the rotary frequencies.
        eps: of the norm.
        kept: entries so far.
        heads: H.
    """
    batch, room, entry = entry_BSX.shape
    hidden, latent = value_XC.shape
    rotary = entry - latent
    out_B1X = query_B1X.new_empty(batch, 1, hidden)
    tensors = (query_B1X, compressed_B1X, taps_BJX, entry_BSX, count_B, out_B1X)
    weights = (weight_JX, bias_X, norm_C, key_XC, value_XC)
    seen = 0 if weight_JX is None else len(weight_JX)
    sizes = (seen, heads, hidden // heads, rotary, latent, kept, room)
    numbers = 2 * heads * entry * (kept + 1 + hidden // heads)
    take_step(_step, batch, numbers, eps, (*tensors, *weights), float(theta), *sizes)
    return out_B1X
