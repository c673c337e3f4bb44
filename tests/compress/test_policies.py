"""What each policy keeps and computes, against the same written out token by token, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from contextlm import CompressedCache
from contextlm.base.errors import InputError
from contextlm.compress import evict
from contextlm.compress.adaptors import KEY, VALUE, Attention, attentions_of, rotated
from contextlm.compress.base import Costs, parse_policy, policies
from contextlm.compress.calibration import Calibration
from contextlm.compress.latent import Factors, error_weights, factors, spread
from contextlm.compress.quantised import Packed
from contextlm.models.cache import CACHE

LENGTH = 37


def one_layer() -> Any:
    """A model whose only attention module is called with the embeddings' norm."""
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 61}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 99}
    return build(LlamaConfig(**sizes, **heads), dtype=torch.float64)


class Parts:
    """Queries, keys and values of one row, by head of queries, as attention compares them."""

    def __init__(self, model: Any, ids: Tensor):
        (self.attention,) = attentions_of(model)
        seen: list[Tensor] = []
        hook = self.attention.module.register_forward_pre_hook(
            lambda _, given, named: seen.append(named["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            model(ids, use_cache=False)
        hook.remove()
        self.inputs = seen[0]
        turns = self.attention.turns(self.inputs, torch.arange(ids.shape[1])[None])
        self.query = rotated(self.attention.queries(self.inputs), turns)[0]
        self.key = rotated(self.attention.projection(KEY).heads(self.inputs), turns)[0]
        self.value = self.attention.projection(VALUE).heads(self.inputs)[0]
        self.shared = self.attention.heads // self.attention.groups

    def attend(self, head: int, at: int, entries: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        """One head's mixture for the token `at` of some keys and values, with a bias each."""
        query = self.query[head, at] * self.attention.scaling
        scores = torch.stack([query @ key + bias for key, _, bias in entries])
        return scores.softmax(0) @ torch.stack([value for _, value, _ in entries])

    def output(self, mixed_THE: list[list[Tensor]]) -> Tensor:
        rows = torch.stack([torch.stack(row).flatten() for row in mixed_THE])
        return self.attention.output(rows[None])

    def token(self, head: int, at: int) -> tuple[Tensor, Tensor, float]:
        group = head // self.shared
        return self.key[group, at], self.value[group, at], 0.0


def compressed(model: Any, spec: str, ids: Tensor, sizes: list[int]) -> Tensor:
    """What the attention module gives under a policy, in pieces."""
    (attention,) = attentions_of(model)
    given: list[Tensor] = []
    hook = attention.module.register_forward_hook(lambda *call: given.append(call[-1][0]))
    with CompressedCache(model, spec) as policy, torch.no_grad():
        cache = policy.new_cache()
        for piece in ids.split(sizes, dim=1):
            model(piece, **{CACHE: cache})
    hook.remove()
    return torch.cat(given, dim=1)


PIECES = [11, 1, 2, 13, *[1] * 10]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("window:7,sinks:2", lambda i, j: i - j < 7 or j < 2),
        ("interval:5,3", lambda i, j: i - j < 5 or j % 3 == 0),
        ("window:1", lambda i, j: i == j),
    ],
)
def test_a_selection_attends_to_what_it_keeps(spec: str, kept: Any) -> None:
    model, ids = one_layer(), tokens(1, LENGTH)
    parts = Parts(model, ids)
    expected = parts.output(
        [
            [
                parts.attend(h, i, [parts.token(h, j) for j in range(i + 1) if kept(i, j)])
                for h in range(6)
            ]
            for i in range(LENGTH)
        ]
    )
    assert_close(compressed(model, spec, ids, PIECES), expected)


@pytest.mark.parametrize("sinks", [0, 2])
def test_representatives_are_means_that_count_for_their_tokens(sinks: int) -> None:
    model, ids, window = one_layer(), tokens(1, LENGTH), 10
    parts, half = Parts(model, ids), window // 2

    def entries(head: int, i: int) -> list[tuple[Tensor, Tensor, float]]:
        left = max(0, math.ceil((i + 1 - window) / half))
        found = []
        for span in range(left):
            own = [
                parts.token(head, j) for j in range(span * half, (span + 1) * half) if j >= sinks
            ]
            mean_key = torch.stack([key for key, _, _ in own]).mean(0)
            mean_value = torch.stack([value for _, value, _ in own]).mean(0)
            found.append((mean_key, mean_value, math.log(len(own))))
        single = [j for j in range(i + 1) if j >= left * half or j < sinks]
        return [*found, *(parts.token(head, j) for j in single)]

    expected = parts.output(
        [[parts.attend(h, i, entries(h, i)) for h in range(6)] for i in range(LENGTH)]
    )
    spec = f"representatives:{window},sinks:{sinks}"
    assert_close(compressed(model, spec, ids, PIECES), expected)


def test_a_shorter_row_goes_on_where_longer_ones_are_gone() -> None:
    """It has fewer representatives than the batch had."""
    model, ids = one_layer(), tokens(2, 20)
    for short in (3, 7, 20):
        mask = torch.ones_like(ids)
        mask[1, : 20 - short] = 0
        with CompressedCache(model, "representatives:4") as policy, torch.no_grad():
            cache = policy.new_cache()
            model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache})
            cache.batch_select_indices(torch.tensor([1]))
            more = torch.cat([mask[1:], torch.ones(1, 5, dtype=torch.long)], dim=1)
            given = {"attention_mask": more, "use_cache": True, CACHE: cache}
            logits = model(ids[:1, :5], **given).logits
            alone = model(torch.cat([ids[1:, 20 - short :], ids[:1, :5]], dim=1)).logits[:, -5:]
        # Angles are float32's, and a padded row's positions are others.
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_alike_keys_are_represented_without_loss() -> None:
    """Where all keys of a span are alike, attention to its representative is exact."""
    model, ids = one_layer(), torch.full((1, LENGTH), 7)
    (attention,) = attentions_of(model)
    with torch.no_grad():
        attention.module.k_proj.weight.zero_()
        plain = model(ids, use_cache=False).logits
        with CompressedCache(model, "representatives:8"):
            assert_close(model(ids, use_cache=False).logits, plain)


def test_evict_keeps_what_was_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "RECENT", 3)
    monkeypatch.setattr(evict, "HALF_LIFE", 4)
    model, ids, budget = one_layer(), tokens(1, LENGTH), 17
    parts = Parts(model, ids)
    held: list[dict[int, float]] = [{}, {}]  # scores of tokens by group
    mixed: list[list[Tensor]] = []
    start = 0
    for size in PIECES:
        new = range(start, start + size)
        for i in new:
            mixed.append([])
            for h in range(6):
                own = [*held[h // 3], *range(start, i + 1)]
                mixed[-1].append(parts.attend(h, i, [parts.token(h, j) for j in own]))
        for group, scores in enumerate(held):
            order = [*scores, *new]
            got = dict.fromkeys(order, 0.0)
            for i in new[-2 * 4 :]:
                for h in range(3 * group, 3 * group + 3):
                    seen = [j for j in order if j <= i]
                    keys = torch.stack([parts.token(h, j)[0] for j in seen])
                    weights = (keys @ parts.query[h, i] * parts.attention.scaling).softmax(0)
                    for j, weight in zip(seen, weights.tolist(), strict=True):
                        got[j] += weight * 0.5 ** ((new[-1] - i) / 4)
            near = {}
            for place, j in enumerate(order):
                around = order[max(0, place - 3) : place + 4]
                near[j] = sum(got[n] for n in around) / len(around)
            total = {j: near[j] + scores.get(j, 0.0) * 0.5 ** (size / 4) for j in order}
            if len(order) > budget:
                last = new[-1] + 1
                safe = {j: math.inf if last - j <= 3 else total[j] for j in order}
                best = sorted(order, key=lambda j: safe[j], reverse=True)[:budget]
                total = {j: total[j] for j in sorted(best)}
            held[group] = total
        start += size
    assert_close(compressed(model, f"evict:{budget}", ids, PIECES), parts.output(mixed))


# --- latent --------------------------------------------------------------------------------------


def fitted(model: Any) -> tuple[Attention, Any, Factors]:
    (attention,) = attentions_of(model)
    (moments,) = Calibration(tokens(5, 31)).moments([attention])
    return attention, moments, factors(attention, moments)


@pytest.mark.parametrize("rank", [1, 7, 15])
def test_what_a_latent_loses_is_the_rest_of_the_energy(rank: int) -> None:
    """Eckart and Young: no map of that rank loses less than the other squared singular values."""
    attention, moments, found = fitted(one_layer())
    weight_FD = torch.cat(
        [attention.projection(part).weight_XED.flatten(0, 1) for part in (KEY, VALUE)]
    )
    error_FD = weight_FD - found.up_FZ[:, :rank] @ found.down_ZD[:rank]
    counted_FF = torch.block_diag(*error_weights(attention, moments))
    loss = (error_FD.T @ counted_FF @ error_FD @ moments.covariance_DD).trace()
    torch.testing.assert_close(loss, found.energy_Z[rank:].sum(), rtol=1e-3, atol=1e-12)


def test_moments_are_those_of_the_text() -> None:
    model = one_layer()
    text = tokens(5, 31)
    parts = [Parts(model, row[None]) for row in text]
    inputs_ND = torch.cat([part.inputs[0] for part in parts])
    (moments,) = Calibration(text).moments(attentions_of(model))
    assert_close(moments.mean_D, inputs_ND.mean(0))
    assert_close(moments.covariance_DD, torch.cov(inputs_ND.T, correction=0))


def test_within_a_block_a_policy_is_fitted_to_the_plain_model() -> None:
    model, texts = build(GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=61)), []
    for outer in ("full", "window:2"):
        texts.append(Calibration(tokens(3, 20)))
        with CompressedCache(model, outer):
            CompressedCache(model, "latent:4", calibration=texts[-1]).remove()
    plain, ours = (text.moments(attentions_of(model)) for text in texts)
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a.covariance_DD, b.covariance_DD)


def test_queries_without_positions_have_their_own_moments() -> None:
    model = build(GPT2Config(vocab_size=61, n_embd=12, n_layer=1, n_head=3), dtype=torch.float64)
    (attention,) = attentions_of(model)
    seen: list[Tensor] = []
    hook = attention.module.register_forward_pre_hook(
        lambda _, given: seen.append(attention.queries(given[0]) * attention.scaling)
    )
    with torch.no_grad():
        (moments,) = Calibration(tokens(3, 17)).moments([attention])
    hook.remove()
    query_HNE = torch.cat([query.transpose(0, 1).flatten(1, 2) for query in seen], dim=1)
    assert_close(moments.queries_GEE, query_HNE.mT @ query_HNE / query_HNE.shape[1])


def test_a_total_is_spread_where_it_is_worth_most() -> None:
    _, moments, found = fitted(one_layer())
    weak = found._replace(energy_Z=found.energy_Z / 1e6)
    ranks = spread([found, weak], [moments, moments], 20)
    assert ranks == [15, 5]  # each gets half of the mean of 10 at least
    assert spread([found, found], [moments, moments._replace(stream=1e9)], 20) == [15, 5]


# --- int8, int4 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "width"), [(8, 64), (4, 64), (8, 24), (4, 10)])
def test_packed_numbers_come_back_within_half_a_step(bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 3, 5, width, generator=generator)
    back = Packed.of(given, bits).unpacked()
    group = math.gcd(width, 64)
    grouped = given.unflatten(-1, (-1, group))
    step = (grouped.amax(-1) - grouped.amin(-1)) / (2**bits - 1)
    off = (back - given).abs().unflatten(-1, (-1, group)).amax(-1)
    assert (off <= 0.501 * step + 1e-6).all()
    torch.testing.assert_close(Packed.of(back, bits).unpacked(), back)


# --- settings for a budget -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
def test_proposed_settings_keep_their_budget(share: float) -> None:
    """At the length that is meant, no more than the budget, and most of it."""
    costs = Costs(tokens=2048, numbers=384, width=576, bits=32)
    for name, entries in {
        "window": lambda policy: policy.window + policy.sinks,
        "representatives": lambda p: p.window + p.sinks + 2048 / (p.window / 2),
        "interval": lambda p: p.window + (2048 - p.window) / p.every,
        "evict": lambda policy: policy.budget,
    }.items():
        policy = policies()[name].proposed(share, costs)
        assert policy is not None
        assert 0.85 * share < entries(policy) / 2048 <= 1.01 * share, name
    latent: Any = policies()["latent"].proposed(share, costs)
    assert latent.spec == f"latent:{100 * share:g}%"
    assert parse_policy("input").proposed(share, costs) is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("window:256,window:9", "window is given twice"),
        ("window:,4", "window: input should be"),
        ("window:256,8,sinks:4", "sinks is given twice"),
        ("latent:inf%", "expected a number such as 64 or a share such as 25%"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_policy(spec)


def test_a_calibration_is_for_one_model():
    text, models = Calibration(tokens(2, 9)), (one_layer(), one_layer())
    text.moments(attentions_of(models[0]))
    with pytest.raises(InputError, match="another model's"):
        text.moments(attentions_of(models[1]))
