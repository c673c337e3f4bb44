"""What holds of every policy on every architecture that there is an adaptor for.

Nothing here knows a policy but `SPECS` and `BOUNDS`: a new one is tested by an entry there.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, LAYERS, WIDTH, build, in_pieces, tokens
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.cache_utils import DynamicCache

from contextlm import CompressedCache
from contextlm.base.errors import InputError
from contextlm.compress.adaptors import ARCHITECTURES
from contextlm.compress.base import parse_policy, policies
from contextlm.evaluation.memory import cache_bytes
from contextlm.models.cache import CACHE

LENGTH, PAD = 100, 7
SIZES = [40, 1, 35, 1, 23]

# Lossy settings, small enough that a text of LENGTH tokens loses something.
SPECS = {
    "full": "full",
    "input": "input",
    "window": "window:8,sinks:2",
    "representatives": "representatives:8,sinks:2",
    "interval": "interval:8,5",
    "latent": "latent:9",
    "int8": "int8",
    "int4": "int4",
    "evict": "evict:20",
}
STACKS = ("window:30+int4", "interval:30,5+int8", "window:8,sinks:2+latent:9")
# Settings at which a policy is exact.
EXACT = ("full", "input", "window:100", "representatives:200", "interval:100", "interval:3,1",
         "latent:100%", "evict:100", "window:100+latent:100%")  # fmt: skip
# Where a piece attends to all of its own tokens before any is dropped or rounded.
QUANTISED = ("int8", "int4", "window:30+int4", "interval:30,5+int8")
PIECEWISE = ("evict:20", *QUANTISED)
# The most entries that a layer may hold after so many tokens.
BOUNDS: dict[str, int] = {
    "window:8,sinks:2": 10,
    "representatives:8,sinks:2": 10,
    "interval:8,5": 8 + LENGTH // 5,
    "evict:20": 20,
    "window:30+int4": 2 * 64,
    "window:8,sinks:2+latent:9": 10,
}
# The most bytes at 400 tokens, of the plain cache's.
SHARES: dict[str, float] = {
    "input": 0.55,
    "window:8,sinks:2": 0.03,
    "representatives:8,sinks:2": 0.3,
    "interval:8,5": 0.25,
    "latent:9": 0.18,
    "int8": 0.45,
    "int4": 0.32,
    "evict:20": 0.06,
    "window:8,sinks:2+latent:9": 0.01,
}


def installed(model: Any, spec: str) -> CompressedCache:
    """The policy, held on the model; tests of what it cannot serve are others."""
    return CompressedCache(model, spec, calibration=calibration())


def calibration() -> Tensor:
    return tokens(6, 64)


def serves(name: str, spec: str) -> bool:
    """Grouped heads keep less than the attention's input, except where heads are wide."""
    grouped = name in ("llama", "smollm", "mistral", "qwen2", "phi3")
    return not ("input" in spec and grouped)


PAIRS = [(name, spec) for name in CONFIGS for spec in SPECS.values() if serves(name, spec)]
# Stacks are no code of an architecture's own: one with a sliding window and two without.
PAIRS += [(name, spec) for name in ("smollm", "gemma3", "gpt_neox") for spec in STACKS]


def models() -> dict[str, Any]:
    """Models of each architecture for all tests, which leave them as they were."""
    if not _models:
        for name in CONFIGS:
            _models[name] = build(name)
            _models[f"{name} eager"] = build(name, "eager")
            _models[f"{name} bfloat16"] = copy.deepcopy(_models[name]).bfloat16()
    return _models


_models: dict[str, Any] = {}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<unk>": 1, "<end>": 2, "a": 3, "b": 4, "c": 5}
    backend = Tokenizer(tokenizer_models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def padded() -> tuple[Tensor, Tensor]:
    """Tokens whose first row has padding on its left, and the mask."""
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    ids[0, :PAD], mask[0, :PAD] = 0, 0
    return ids, mask


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def everything_of(model: PreTrainedModel) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


# --- every policy is here ------------------------------------------------------------------------


def test_every_policy_and_every_architecture_is_tested() -> None:
    assert set(SPECS) == set(policies())
    types = {config.model_type for config in CONFIGS.values()}
    assert types == set(ARCHITECTURES)


@pytest.mark.parametrize("spec", [*SPECS.values(), *STACKS, *EXACT, "latent:25%,spread"])
def test_a_policy_names_itself(spec: str) -> None:
    assert parse_policy(parse_policy(spec).spec) == parse_policy(spec)


# --- exact limits --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), [(n, s) for n in CONFIGS for s in EXACT if serves(n, s)])
def test_exact_limits_are_the_plain_model(name: str, spec: str) -> None:
    model, ids = models()[name], tokens(2, 60)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    with installed(model, spec):
        ours, _ = in_pieces(model, ids, [33, 1, 25, 1])
    assert plain.abs().max() > 1
    assert_close(ours, plain)


# --- the same whatever the pieces ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_pieces_padding_and_bounds(name: str, spec: str) -> None:
    """A text in pieces and beside a longer one gives what it gives alone, from bounded storage."""
    model = models()[name]
    ids, mask = padded()
    with installed(model, spec) as policy:
        both, cache = in_pieces(model, ids, SIZES, policy.new_cache(), mask)
        first, _ = in_pieces(model, ids[:1, PAD:], [SIZES[0] - PAD, *SIZES[1:]], policy.new_cache())
        second, _ = in_pieces(model, ids[1:], SIZES, policy.new_cache())
        with torch.no_grad():
            whole = model(ids[1:], use_cache=False).logits
    rounded = spec in QUANTISED
    assert_close(both[1:], second, 0.05 if rounded else 1e-4)
    if not rounded:  # else groups of tokens begin elsewhere in a padded row
        assert_close(both[:1, PAD:], first)
    if spec not in PIECEWISE:
        assert_close(second, whole)
    assert cache.get_seq_length() == LENGTH
    assert max(getattr(layer, "held", 0) for layer in cache.layers) <= BOUNDS.get(spec, LENGTH)


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_eager_and_sdpa_agree_and_bfloat16_is_near(name: str, spec: str) -> None:
    model, ids = models()[name], tokens(2, 80)
    with installed(model, spec):
        plain, _ = in_pieces(model, ids, [78, 1])
    eager = models()[f"{name} eager"]
    with installed(eager, spec):
        # Rounded numbers differ by a whole step where they differ at all.
        tolerance = 0.05 if spec in QUANTISED else 1e-4
        assert_close(in_pieces(eager, ids, [78, 1])[0], plain, tolerance)
    half = models()[f"{name} bfloat16"]
    # Latents fitted in another precision lose other things.
    kept = spec.replace("latent:9", "latent:100%")
    with installed(model, kept):
        plain, _ = in_pieces(model, ids, [78, 1])
    with installed(half, kept):
        coarse, cache = in_pieces(half, ids, [78, 1])
    off = (coarse.float() - plain).abs().mean() / plain.std()
    assert off < 0.2
    assert cache.layers[0].get_seq_length() == 80


# --- generate ------------------------------------------------------------------------------------


def generated(model: Any, ids: Tensor, **given: Any) -> Any:
    """Three more tokens, always from the same seed."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 3, "output_logits": True}
    torch.manual_seed(0)
    return model.generate(
        ids, return_dict_in_generate=True, attention_mask=torch.ones_like(ids), **options | given
    )


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_generate_sees_what_the_same_pieces_give(name: str, spec: str) -> None:
    """Greedy, sampling, chunks, and a conversation that goes on with its cache."""
    model, ids = models()[name], tokens(2, 33)
    with installed(model, spec) as policy:

        def expected(sequences: Tensor, *sizes: int) -> Tensor:
            logits, _ = in_pieces(model, sequences[:, :-1], [*sizes, 1], policy.new_cache())
            return logits[:, -3:]

        sampled = generated(
            model, ids, do_sample=True, num_return_sequences=2, prefill_chunk_size=20
        )
        assert_close(torch.stack(sampled.logits, 1), expected(sampled.sequences, 20, 13))
        cache = policy.new_cache()
        greedy = generated(model, ids, past_key_values=cache)
        assert_close(torch.stack(greedy.logits, 1), expected(greedy.sequences, 33))
        turn = torch.cat([greedy.sequences, tokens(2, 30)], dim=1)
        reply = generated(model, turn, past_key_values=cache)
        assert_close(torch.stack(reply.logits, 1), expected(reply.sequences, 33, 1, 1, 31))


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_beams_score_their_own_tokens(name: str, spec: str) -> None:
    model, ids = models()[name], tokens(2, 33)
    with installed(model, spec) as policy:
        given = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
        made = generated(model, ids, output_scores=True, **given)
        logits, _ = in_pieces(model, made.sequences[:, :-1], [33, 1], policy.new_cache())
    new = made.sequences[:, 33:, None]
    scores = logits[:, -3:].log_softmax(-1).gather(2, new).sum((1, 2))
    assert_close(made.sequences_scores, scores, 1e-3)


@pytest.mark.parametrize("spec", [*SPECS.values(), *STACKS])
def test_a_pipeline_generates(spec: str, tokenizer: Any) -> None:
    name = "gpt_neox"
    model = models()[name]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    with installed(model, spec):
        told = write(" ".join(["a b c"] * 10), **options)
        ids = torch.tensor([told[0]["generated_token_ids"]])
        logits, _ = in_pieces(model, ids, [ids.shape[1] - 5, 1])
    assert torch.equal(logits[0, -6:-1].argmax(-1), ids[0, -5:])


# --- a cache like transformers' own --------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_rows_crop_and_reset(name: str, spec: str) -> None:
    model, ids = models()[name], tokens(2, 88)
    with installed(model, spec) as policy:
        expected, _ = in_pieces(model, ids, [85, 1], policy.new_cache())
        _, cache = in_pieces(model, ids[:, :86], [85, 1], policy.new_cache())
        if spec == "full":  # transformers' own layers have their own answer for sliding windows
            pass
        elif cache.is_croppable:
            cache.crop(-1)
            in_pieces(model, ids[:, 85:86], [1], cache)
        else:
            with pytest.raises(ValueError, match=r"cannot be cropped.*from an empty cache"):
                cache.crop(-1)
        rows = torch.tensor([1, 0, 1])
        if spec != "full":  # transformers' own layers take numbers of rows only
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([True, False, True, False]))
        cache.reorder_cache(rows)
        ours, _ = in_pieces(model, ids[rows, 86:], [1], cache)
        assert_close(ours, expected[rows, 86:], 1e-3)
        if spec != "full":
            cache.reset()
            assert cache_bytes(cache) == (0, 0)
            again, _ = in_pieces(model, ids, [85, 1], cache)
            assert_close(again, expected)


@pytest.mark.parametrize("spec", [*SPECS.values(), *STACKS])
def test_bytes_are_those_of_what_is_kept(spec: str) -> None:
    """The bound in entries is one in bytes: nothing larger hides behind a view."""
    model = models()["gpt_neox"]
    with installed(model, spec):
        _, cache = in_pieces(model, tokens(2, 400), [128, 128, 128, 1])
    full = 2 * 2 * LAYERS * WIDTH * 4 * 400
    held = cache_bytes(cache)
    assert held.logical <= held.resident <= 1.2 * held.logical
    assert held.logical / full <= SHARES.get(spec, 1.0)


# --- nothing is left behind, nothing else is changed ---------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_policies_held_at_once_do_not_meet(name: str) -> None:
    """Caches of several policies take turns on one model, beside its own; then all is as before."""
    model, ids = models()[name], tokens(1, 40)
    with torch.no_grad():
        plain = model(ids).logits
    before, names = everything_of(model), list(model.state_dict())
    specs = [spec for spec in (*SPECS.values(), *STACKS) if serves(name, spec)]
    alone = {}
    for spec in specs:
        with installed(model, spec) as policy:
            alone[spec] = in_pieces(model, ids, [20, 18, 1])[0]
    held = [installed(model, spec) for spec in specs]
    assert everything_of(model) != before
    assert list(model.state_dict()) == names
    caches: list[Any] = [policy.new_cache() for policy in held]
    own: Any = DynamicCache(config=model.config)
    parts: list[list[Tensor]] = [[] for _ in held]
    own_parts = []
    for piece in ids.split([20, 18, 1, 1], dim=1):
        with torch.no_grad():
            for number, cache in enumerate(caches):
                parts[number].append(model(piece, **{CACHE: cache}).logits)
            own_parts.append(model(piece, **{CACHE: own}).logits)
    for spec, found in zip(specs, parts, strict=True):
        assert_close(torch.cat(found, dim=1), alone[spec])
    assert_close(torch.cat(own_parts, dim=1), plain)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    for policy in held:
        policy.remove()
        policy.remove()
    assert everything_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


def test_the_innermost_block_counts() -> None:
    model, ids = models()["llama"], tokens(1, 40)
    with torch.no_grad(), CompressedCache(model, "window:5"):
        outer = model(ids).logits
        with CompressedCache(model, "interval:5,7") as inner:
            assert not torch.equal(model(ids).logits, outer)
            cache = inner.new_cache()
        assert torch.equal(model(ids).logits, outer)
        with pytest.raises(InputError, match="made by a policy that has been removed"):
            model(ids, **{CACHE: cache})
        with CompressedCache(model, "full") as full:
            plain = model(ids, **{CACHE: full.new_cache()}).logits
    with pytest.raises(InputError, match="policy interval:5,every:7 has been removed"):
        inner.new_cache()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


def test_a_copy_of_a_model_has_policies_of_its_own() -> None:
    model, ids = build("llama"), tokens(1, 40)
    with CompressedCache(model, "window:5"), torch.no_grad():
        ours = model(ids).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert_close(twin(ids).logits, ours)
        assert_close(in_pieces(twin, ids, [7, 1])[0], ours)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("windw:8", r"unknown policy 'windw' \(did you mean 'window'"),
        ("window", "window: field required"),
        ("window:0", "window: input should be greater than 0"),
        ("window:8,sink:2", r"unknown setting of policy window 'sink' \(did you mean 'sinks'"),
        ("window:8,2,3", "window takes window, sinks"),
        ("full:3", "full takes no settings"),
        ("representatives:9", "expected an even window"),
        ("latent:much", "expected a number such as 64 or a share such as 25%"),
        ("int8+window:8", "only a form .*stacks on a selection of tokens"),
        ("evict:20+int8", "only a form .*stacks on a selection of tokens"),
        ("latent:9000", "9000 numbers a token and layer, .* have 32 and rank 32 at most"),
        ("input", "would keep 32 numbers .* own cache 32 .*: latent:8 or int8 keep less"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, message: str) -> None:
    model = models()["llama"]
    before = everything_of(model)
    with pytest.raises(InputError, match=message):
        installed(model, spec)
    assert everything_of(model) == before


def test_a_policy_without_its_text_or_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="latent:9 is fitted to a text"):
        CompressedCache(models()["llama"], "latent:9")
    monkeypatch.setattr("contextlm.compress.quantised.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"int8 needs hqq.*pip install 'hqq"):
        installed(models()["llama"], "int8")


def test_gradients_flow_and_checkpointing_is_refused() -> None:
    model, ids = build("llama"), tokens(1, 40)
    model.train()
    with CompressedCache(model, "representatives:8,sinks:2"):
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.gradient_checkpointing_enable()
        with pytest.raises(InputError, match="gradient checkpointing"):
            model(ids, labels=ids)


def test_masks_and_attention_functions_that_cannot_be_read_are_refused() -> None:
    model, ids = models()["llama"], tokens(1, 40)
    with CompressedCache(model, "window:5"), torch.no_grad():
        with pytest.raises(InputError, match=r"mask of shape \[1, 1, 40, 50\] cannot be used"):
            model(ids, attention_mask=torch.ones(1, 1, 40, 50, dtype=torch.bool))
        model.config._attn_implementation = "flex_attention"
        try:
            with pytest.raises(InputError, match="attention 'flex_attention' cannot read"):
                model(ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool))
        finally:
            model.config._attn_implementation = "sdpa"
    with CompressedCache(model, "representatives:8"), torch.no_grad():
        model.config._attn_implementation = "flash_attention_2"  # it would take biases for lengths
        try:
            with pytest.raises(InputError, match="attention 'flash_attention_2' cannot"):
                model(ids)
        finally:
            model.config._attn_implementation = "sdpa"
