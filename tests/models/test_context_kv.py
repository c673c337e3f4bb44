"""Context-KV against an independent form written from DESIGN 1.2 and 1.3, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from naive_parts import attended, gelu, linear, norm
from torch import Tensor

from contextlm.evaluation.memory import measure_cache
from contextlm.models.base import HasContextBlock
from contextlm.models.context_kv import ContextKVConfig, ContextKVForCausalLM
from contextlm.models.context_kv.cache import GridLayer, read_positions
from contextlm.models.inputs import NewTokens
from contextlm.ops.dilated_attention import dilated_attention

RULES = [
    {"anchor": anchor, "padding": padding}
    for anchor in ("position", "grid")
    for padding in ("zeros", "mask")
]
TOKENS = [{"memory": "tokens", "padding": padding} for padding in ("zeros", "mask")]


def make(**fields) -> ContextKVForCausalLM:
    """A small model in float64 whose biases and norms matter."""
    torch.manual_seed(3)
    small = {"vocab_size": 31, "hidden_size": 12, "context_dim": 10, "num_attention_heads": 3}
    config = ContextKVConfig(**{**small, "interval": 3, "max_contexts": 4, **fields})
    model = ContextKVForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def memory_of(i: int, config) -> list[int]:
    """The positions that position i reads; negative ones are missing."""
    if config.memory == "tokens":
        return [i - j for j in range(config.interval * config.max_contexts)]
    if config.anchor == "position":
        return [i - config.interval * j for j in range(config.max_contexts)]
    first = math.ceil(i / config.interval) - 1  # the largest multiple strictly below i
    return [i] + [config.interval * (first - j) for j in range(config.max_contexts - 1)]


def attend(attention, query: Tensor, memory: list[Tensor]) -> Tensor:
    keys = [linear(attention.key, entry) for entry in memory]
    values = [linear(attention.value, entry) for entry in memory]
    return linear(attention.output, attended(query, keys, values, attention.heads))


def naive_logits(model: ContextKVForCausalLM, ids: list[int]) -> Tensor:
    config, decoder, layer = model.config, model.model, model.model.layer
    table = decoder.embed_tokens.weight
    embedded = [norm(table[token], decoder.embed_norm) for token in ids]
    entries = embedded
    if config.memory == "contexts":
        entries, context = [], torch.zeros(config.context_dim, dtype=torch.float64)
        for e in embedded:
            for block in decoder.context_block.layers:
                update = gelu(block.update.weight @ torch.cat([context, e]) + block.update.bias)
                context = norm(context + update, block.norm)
            entries.append(context)
    logits = []
    for i, e in enumerate(embedded):
        memory = []
        for position in memory_of(i, config):
            if position >= 0:
                memory.append(entries[position])
            elif config.padding == "zeros":
                memory.append(torch.zeros_like(entries[0]))
        read = attend(layer.attention, linear(layer.attention.query, e), memory)
        h = norm(e + read, layer.attention_norm)
        inner = linear(layer.down, gelu(linear(layer.up, h)))
        logits.append(table @ (h + norm(inner, layer.feed_forward_norm)))
    return torch.stack(logits)


@pytest.mark.parametrize("fields", [*RULES, *TOKENS], ids=str)
@pytest.mark.parametrize(
    "shape",
    [{"context_layers": 2, "intermediate_size": 7}, {"interval": 1}, {"max_contexts": 1}],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_the_naive_form(fields, shape):
    model = make(**fields, **shape)
    ids = torch.randint(31, (1, 29))  # beyond the reach of 12
    expected = naive_logits(model, ids[0].tolist())
    torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-9, atol=1e-9)


def test_parameter_counts_of_the_document():
    with torch.device("meta"):
        model = ContextKVForCausalLM(ContextKVConfig())
    assert sum(p.numel() for p in model.parameters()) == 45_163_264
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_301_440
    frozen = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_tokens", "embed_norm", "context_block"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.history == 20 * 31


def counts(anchor: str, tokens: int, oldest: int) -> list[int]:
    """How many of the entries 0..oldest each position reads, at the document's s and M.

    Equal keys give every entry the weight 1/32; values are 1 up to `oldest`, and 0 at pads.
    """
    key = torch.zeros(1, 1, tokens, 1, dtype=torch.float64)
    value = (torch.arange(tokens) <= oldest).double().view(1, 1, -1, 1)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    rule = {"interval": 20, "size": 32, "anchor": anchor}
    read = dilated_attention(key, key, value, pad_key_HE=zero, pad_value_HE=zero, **rule)
    return (32 * read).round().long().flatten().tolist()


def test_the_documents_examples_of_the_rule():
    real = counts("position", 3501, oldest=3500)
    assert [real[i] for i in (0, 19, 20, 50, 350, 3500)] == [1, 1, 2, 3, 18, 32]
    assert counts("position", 3501, oldest=2880)[3500] == 1
    assert counts("position", 3501, oldest=2879)[3500] == 0
    for i in (0, 50, 350, 3500):  # what decoding reads
        reading = read_positions(one_token_at(i), 620, 20, 32)
        assert int(reading.real.sum()) == real[i]
        assert reading.columns[0, 0, 0] == 620


def test_the_grids_counts():
    real = counts("grid", 801, oldest=800)
    assert real == [min(32, 1 + math.ceil(i / 20)) for i in range(801)]
    assert counts("grid", 801, oldest=180)[800] == 1  # 800 itself and 780 back to 180
    assert counts("grid", 801, oldest=179)[800] == 0
    for i in (0, 1, 20, 21, 50, 800):  # what decoding reads
        assert int(GridLayer(20, 31).read(one_token_at(i), 31).real.sum()) == real[i]


def one_token_at(position: int) -> NewTokens:
    return NewTokens.of(torch.zeros(1, 1, 1), past=position, seen_B=torch.tensor([position]))


def store(model: ContextKVForCausalLM, ids: Tensor) -> Tensor:
    """Contexts of a whole stream, with zeros before its start, ``[B, history + T, C]``."""
    decoder = model.model
    embedded = decoder.embed_normalised(ids)
    contexts = decoder.context_block.run(embedded, NewTokens.of(embedded), None)[-1]
    return torch.nn.functional.pad(contexts, (0, 0, decoder.history, 0))


@pytest.mark.parametrize("fields", RULES, ids=str)
@pytest.mark.parametrize("length", [1, 25])
def test_stored_contexts_give_the_logits_of_the_recurrence(fields, length):
    model = make(**fields)
    history = model.model.history
    ids = torch.randint(31, (1, 61))
    contexts, whole = store(model, ids), model(ids).logits
    starts = list(range(0, 61 - length + 1, length))
    # All windows as the rows of one batch, in another order than in the stream.
    starts = starts[::2] + starts[1::2]
    at = torch.tensor(starts).unsqueeze(1) + torch.arange(length)
    windows = torch.stack([contexts[0, p : p + history + length] for p in starts])
    logits = model(ids[0, at], contexts=windows, position_ids=at).logits
    torch.testing.assert_close(logits, whole[0, at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", RULES, ids=str)
def test_stored_contexts_give_the_gradients_of_the_recurrence(fields):
    model = make(**fields, freeze_embedding=False)
    ids = torch.randint(31, (2, 20))
    trained = list(model.model.layer.parameters())
    contexts = store(model, ids).detach()
    positions = torch.arange(20).expand(2, -1)
    cotangent = torch.randn(2, 20, 31, dtype=torch.float64)
    from_store = model(ids, contexts=contexts, position_ids=positions).logits
    actual = torch.autograd.grad((from_store * cotangent).sum(), trained)
    expected = torch.autograd.grad((model(ids).logits * cotangent).sum(), trained)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", TOKENS, ids=str)
def test_windows_of_tokens_need_the_tokens_in_front(fields):
    model = make(**fields)
    history, length = model.model.history_tokens, 7
    assert (history, model.model.history) == (11, 0)
    assert not isinstance(model.model, HasContextBlock)
    ids = torch.randint(1, 31, (1, 61))
    whole = model(ids).logits
    padded = torch.nn.functional.pad(ids, (history, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (history, 0))
    starts = [0, 5, 11, 30, 54]
    rows = torch.cat([padded[:, p : p + history + length] for p in starts])
    masks = torch.cat([mask[:, p : p + history + length] for p in starts])
    logits = model(rows, attention_mask=masks, logits_to_keep=length).logits
    at = torch.tensor(starts).unsqueeze(1) + torch.arange(length)
    torch.testing.assert_close(logits, whole[0, at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "entries"),
    [
        ({"anchor": "position"}, {1: 1, 20: 20, 620: 620, 621: 620, 1500: 620}),
        ({"anchor": "grid"}, {1: 1, 20: 1, 21: 2, 600: 30, 621: 31, 1500: 31}),
    ],
)
def test_cache_bytes_at_the_documents_sizes(fields, entries):
    model = ContextKVForCausalLM(ContextKVConfig(vocab_size=64, **fields))
    state = 256 * 4 + 2 * 8  # the context after the last token, and two counts of tokens
    for entry in measure_cache(model, entries, torch.device("cpu")):
        assert entry.logical == entry.resident == entries[entry.tokens] * 256 * 4 + state


def test_cache_bytes_of_token_memory():
    model = ContextKVForCausalLM(ContextKVConfig(vocab_size=64, memory="tokens"))
    short, long = measure_cache(model, [128, 1500], torch.device("cpu"))
    assert short.logical == short.resident == 2 * 128 * 768 * 4 + 8
    assert long.logical == long.resident == 2 * 639 * 768 * 4 + 8  # keys and values


def widths(model: ContextKVForCausalLM, *names: str) -> list[list[int]]:
    """How many positions each of these linear layers is given, in calls from now on.

    The zero vector whose key stands in for missing entries is no position.
    """
    calls: list[list[int]] = [[] for _ in names]
    for name, seen in zip(names, calls, strict=True):
        module = model.model.layer.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.extend(args[0].shape[1:-1])
        )
    return calls


def test_decoding_over_tokens_projects_each_token_once():
    model = make(memory="tokens")
    ids = torch.randint(31, (1, 30))
    keys, values, queries = widths(model, "attention.key", "attention.value", "attention.query")
    cache = model(ids[:, :20], use_cache=True, logits_to_keep=1).past_key_values
    for i in range(20, 30):
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    assert keys == values == [20] + 10 * [1]
    assert queries == 11 * [1]


# Where the real tokens among 33 begin and end, row by row; the last three are real in any case.
MASKS: dict[str, list[tuple[int, int]]] = {
    "none": [],
    "left": [(7, 33), (13, 33), (0, 33)],
    "far left": [(16, 33), (28, 33), (1, 33)],
    "gaps": [(3, 11), (5, 22), (30, 33)],
}


@pytest.mark.parametrize("fields", TOKENS, ids=str)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("last", [1, 20, 50])
def test_the_last_positions_of_token_memory_equal_those_of_the_whole(fields, rows, last):
    model = make(**fields, freeze_embedding=False)
    ids = torch.randint(1, 31, (3, 33))
    mask = torch.ones(3, 33)
    for row, (first, end) in enumerate(rows):
        mask[row, :first] = 0
        mask[row, end:30] = 0
    real = mask[:, -last:].bool()
    cotangent = torch.randn(3, min(last, 33), 31, dtype=torch.float64) * real.unsqueeze(-1)
    whole = model(ids, attention_mask=mask).logits[:, -last:]
    queries, inner = widths(model, "attention.query", "up")
    with_cache = model(ids, attention_mask=mask, logits_to_keep=last, use_cache=True)
    short = model(ids, attention_mask=mask, logits_to_keep=last, use_cache=False).logits
    assert queries == inner == 2 * [min(last, 33)]
    torch.testing.assert_close(short[real], whole[real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(with_cache.logits[real], whole[real], rtol=1e-9, atol=1e-9)
    trained = list(model.parameters())
    actual = torch.autograd.grad((short * cotangent).sum(), trained)
    expected = torch.autograd.grad((whole * cotangent).sum(), trained)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    # The cache has taken in all tokens.
    after = torch.cat([mask, torch.ones(3, 1)], dim=1)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    following = [
        model(ids[:, :1], attention_mask=after, past_key_values=kept, use_cache=True).logits
        for kept in (with_cache.past_key_values, cache)
    ]
    torch.testing.assert_close(*following, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("before", [3, 9, 23])
def test_a_single_query_reads_what_its_window_would(before, padding):
    """The form for one query, with a shorter and a longer history, against the one for many."""
    g = torch.Generator().manual_seed(before)
    key, value = torch.randn(2, 3, 2, before + 1, 5, generator=g, dtype=torch.float64)
    query, pads = key.flip(2)[:, :, -1:], torch.randn(2, 2, 5, generator=g, dtype=torch.float64)
    given = dict(zip(("pad_key_HE", "pad_value_HE"), pads, strict=True))
    rule = {"interval": 3, "size": 4, **(given if padding == "zeros" else {})}
    start = torch.tensor([0, 2, 3] if before == 3 else [0, 4, 1000])
    many = [torch.cat([x, x[:, :, :1]], dim=2) for x in (query, key, value)]
    one = dilated_attention(query, key, value, start_B=start, **rule)
    two = dilated_attention(*many, start_B=start, **rule)
    torch.testing.assert_close(one, two[:, :, :1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", [*RULES, *TOKENS], ids=str)
def test_long_decoding_with_padding_equals_the_whole(fields):
    """Far beyond the memory's reach, in pieces, with padding in front and in the middle."""
    model = make(**fields)
    ids = torch.randint(1, 31, (3, 64))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, 20:27] = 0
    mask[2, :1] = 0
    cache, pieces, start = None, [], 0
    for size in (5, 16, 1, 1, 19, 2, 1, 13, 1, 1, 1, 3):
        piece = slice(start, start + size)
        out = model(
            ids[:, piece],
            attention_mask=mask[:, : start + size],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, start + size
        pieces.append(out.logits)
    logits = torch.cat(pieces, dim=1)
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", RULES, ids=str)
def test_autocast_trains_and_stays_close(fields):
    model = make(**fields).float()
    ids = torch.randint(31, (2, 21))
    plain = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.logits.float(), plain, rtol=0.1, atol=0.3)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_stored_contexts_that_do_not_fit_are_refused():
    model = make()
    ids = torch.randint(31, (1, 5))
    good = {"contexts": store(model, ids), "position_ids": torch.arange(5).unsqueeze(0)}
    assert model(ids, **good).past_key_values is None
    for message, changed in (
        ("together with a cache", {"past_key_values": model.new_cache()}),
        ("together with padding", {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}),
        ("need position_ids", {"position_ids": None}),
        ("14 in all, got 13", {"contexts": good["contexts"][:, 1:]}),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **{**good, **changed})
    with pytest.raises(ValueError, match="reads no contexts"):
        make(memory="tokens")(ids, **good)
