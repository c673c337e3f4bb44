"""The input cache: half the bytes, the same logits, and nothing left behind.

The reference is always the same model with its plain cache, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import in_pieces, positions_of
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicCache

from contextlm import InputCache
from contextlm.base.errors import InputError
from contextlm.compress import entries
from contextlm.compress.entries import absorbing_pays
from contextlm.compress.kept import SLACK
from contextlm.evaluation.memory import cache_bytes
from contextlm.models.cache import CACHE

LAYERS, WIDTH, LENGTH, PAD = 2, 24, 29, 6


def neox(**fields: Any) -> GPTNeoXConfig:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 32}
    shared = {"vocab_size": 61, "num_attention_heads": 3, "max_position_embeddings": 1100}
    return GPTNeoXConfig(**{**sizes, **shared, **fields})


def gpt2(**fields: Any) -> GPT2Config:
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 3, "n_inner": 32}
    return GPT2Config(**{**sizes, "vocab_size": 61, "n_positions": 1100, **fields})


def build(config: Any, implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A model whose every parameter, biases too, is far from its start."""
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    kind = GPTNeoXForCausalLM if isinstance(config, GPTNeoXConfig) else GPT2LMHeadModel
    torch.manual_seed(0)
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


BOTH = {"gpt_neox": neox(), "gpt2": gpt2()}
VARIANTS = {
    **BOTH,
    "all-rotary": neox(rotary_pct=1.0),
    "odd-rotary": neox(rotary_pct=0.25, num_attention_heads=2),
    "no-bias": neox(attention_bias=False, use_parallel_residual=False),
    "scaled-rotary": neox(
        rope_parameters={
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 10000,
            "partial_rotary_factor": 0.5,
        }
    ),
    "scaled-by-layer": gpt2(scale_attn_by_inverse_layer_idx=True),
}


@pytest.fixture(params=BOTH)
def model(request: pytest.FixtureRequest) -> Any:
    return build(BOTH[request.param])


@pytest.fixture(params=["absorbed", "rebuilt"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading, for any size of pieces; `generate` chooses between them."""
    always = request.param == "absorbed"
    monkeypatch.setattr(entries, "absorbing_pays", lambda *_: always)
    return str(request.param)


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(1, 61, (rows, length), generator=generator)


def padded() -> tuple[Tensor, Tensor]:
    """Tokens whose first row has padding on its left, and the mask."""
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    ids[0, :PAD], mask[0, :PAD] = 0, 0
    return ids, mask


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- the same logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_pieces_give_the_logits_of_the_plain_cache(
    reading: str, name: str, implementation: str
) -> None:
    model = build(VARIANTS[name], implementation)
    for sizes in ([1], [5, 1, 2, 11, 1]):
        plain, _ = in_pieces(model, tokens(), sizes)
        with InputCache(model):
            ours, cache = in_pieces(model, tokens(), sizes)
        assert cache.get_seq_length() == LENGTH
        assert plain.abs().max() > 0.1
        assert_close(ours, plain)


# GPT-NeoX's eager attention normalises in float32, where float64's mask of a padding token that
# sees nothing is minus infinity: NaN with or without us.
@pytest.mark.parametrize(
    ("name", "implementation", "dtype", "tolerance"),
    [
        ("gpt_neox", "sdpa", torch.float64, 1e-10),
        ("gpt_neox", "eager", torch.float32, 1e-4),
        ("gpt2", "sdpa", torch.float64, 1e-10),
        ("gpt2", "eager", torch.float64, 1e-10),
    ],
)
def test_left_padding(
    reading: str, name: str, implementation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(BOTH[name], implementation, dtype)
    ids, mask = padded()
    with torch.no_grad():
        alone = [model(ids[:1, PAD:]).logits[0], model(ids[1:]).logits[0]]
    with InputCache(model):
        ours, _ = in_pieces(model, ids, [4, 3, 1, 9, 1], mask=mask)
    assert_close(ours[0, PAD:], alone[0], tolerance)
    assert_close(ours[1], alone[1], tolerance)


def test_upcast_attention_is_left_to_the_module() -> None:
    model = build(gpt2(reorder_and_upcast_attn=True), "eager", torch.float32)
    plain, _ = in_pieces(model, tokens(), [3, 1])
    with InputCache(model):
        ours, _ = in_pieces(model, tokens(), [3, 1])
    assert_close(ours, plain, 1e-4)


def test_attention_weights_are_given_where_the_module_gives_them(reading: str, model: Any) -> None:
    model.set_attn_implementation("eager")

    def weights() -> tuple[Tensor, ...]:
        _, cache = in_pieces(model, tokens()[:, :-1], [20])
        last = tokens()[:, -1:]
        with torch.no_grad():
            return model(last, **{CACHE: cache}, output_attentions=True).attentions

    plain = weights()
    with InputCache(model):
        ours = weights()
    assert len(ours) == len(plain) == LAYERS
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected)


def test_bfloat16_is_as_close_as_the_plain_cache(model: Any, reading: str) -> None:
    exact = model(tokens()).logits.detach()
    model.bfloat16()
    plain, _ = in_pieces(model, tokens(), [7, 1])
    with InputCache(model):
        ours, _ = in_pieces(model, tokens(), [7, 1])
    off_plain, off_ours = ((x.double() - exact).square().mean().sqrt() for x in (plain, ours))
    assert off_ours < 2 * off_plain
    assert off_ours < 0.05 * exact.std()


def test_few_new_tokens_absorb_and_many_rebuild() -> None:
    pythia = {"entry": 512, "width": 64, "heads": 8, "groups": 8, "rebuilt": 16}
    gpt2_small = {"entry": 768, "width": 64, "heads": 12, "groups": 12, "rebuilt": 0}
    grouped_latent = {"entry": 96, "width": 64, "heads": 9, "groups": 3, "rebuilt": 64}
    for sizes in (pythia, gpt2_small, grouped_latent):
        for past in (100, 1000, 10000):
            choices = [absorbing_pays(new, past, **sizes) for new in range(1, 200)]
            assert choices[0]
            assert not choices[-1]
            assert choices == sorted(choices, reverse=True)
    assert sum(absorbing_pays(new, 10**6, **pythia) for new in range(1, 200)) in range(50, 64)


# --- generate ------------------------------------------------------------------------------------


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
    """`generate` that never stops early, always from the same seed."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 25}
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **{**options, **given})


@pytest.mark.parametrize("mode", GENERATE)
def test_generate_gives_the_same_tokens(model: Any, mode: str) -> None:
    ids, mask = padded()
    if mode == "prompt lookup":  # for one row only
        ids, mask = ids[:1], mask[:1]
    plain = generate(model, ids, mask, **GENERATE[mode])
    with InputCache(model):
        ours = generate(model, ids, mask, **GENERATE[mode])
    assert ours.shape[1] == LENGTH + 25
    assert torch.equal(ours, plain)


def test_a_conversation_goes_on_with_its_cache(model: Any) -> None:
    plain = generate(model, generate(model, tokens()))
    with InputCache(model) as installed:
        cache = installed.new_cache()
        first = generate(model, tokens(), past_key_values=cache)
        assert torch.equal(generate(model, first, past_key_values=cache), plain)
        made = generate(model, tokens(), return_dict_in_generate=True).past_key_values
    assert [tuple(layer.entries.shape) for layer in made.layers] == [(2, 53, WIDTH)] * LAYERS
    assert all(layer.keys is None for layer in (*made.layers, *cache.layers))


# --- half the bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_the_bytes_and_the_positions(model: Any, length: int, dtype: torch.dtype) -> None:
    model.to(dtype)
    ids = tokens(2, length)
    plain = cache_bytes(in_pieces(model, ids, [64])[1]).logical
    with InputCache(model):
        ours = cache_bytes(in_pieces(model, ids, [64])[1]).logical
    positions = 4 * 2 * length if model.config.model_type == "gpt_neox" else 0
    assert plain == 2 * 2 * length * LAYERS * WIDTH * dtype.itemsize
    assert ours == plain // 2 + positions


def test_memory_behind_the_cache_grows_by_a_share(model: Any) -> None:
    cache, buffers = None, set()
    with InputCache(model):
        for length in range(1, 200):
            cache = in_pieces(model, tokens(2, 1), [1], cache)[1]
            held = cache_bytes(cache)
            assert held.logical <= held.resident <= (1 + 1 / SLACK) * held.logical
            buffers.add(cache.layers[0].entries.untyped_storage().data_ptr())
            assert cache.get_seq_length() == length
    assert len(buffers) < 60


# --- a cache like transformers' own --------------------------------------------------------------


def rows_taken(cache: Cache, take: str) -> list[int]:
    """Change the rows of a cache of two, and say which rows these now are."""
    if take == "reorder":
        cache.reorder_cache(torch.tensor([1, 1]))
        return [1, 1]
    if take == "repeat":
        cache.batch_repeat_interleave(3)
        return [0, 0, 0, 1, 1, 1]
    chosen = torch.tensor([1]) if take == "select" else torch.tensor([False, True])
    cache.batch_select_indices(chosen)
    return [1]


@pytest.mark.parametrize("take", ["reorder", "repeat", "select", "select by mask"])
def test_rows_are_taken_with_their_positions(reading: str, model: Any, take: str) -> None:
    ids, mask = padded()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    with InputCache(model):
        _, cache = in_pieces(model, ids[:, :20], [20], mask=mask[:, :20])
        rows = rows_taken(cache, take)
        outputs = model(
            ids[rows, 20:],
            attention_mask=mask[rows],
            position_ids=positions_of(mask)[rows, 20:],
            **{CACHE: cache},
        )
    assert_close(outputs.logits.detach(), whole[rows, 20:])


def test_crop_takes_tokens_back(reading: str, model: Any) -> None:
    plain, _ = in_pieces(model, tokens(), [LENGTH])
    with InputCache(model):
        _, cache = in_pieces(model, tokens(2, 40), [13, 1])
        cache.crop(0)
        assert cache.get_seq_length() == 40
        cache.crop(-40)
        assert cache.get_seq_length() == 0
        in_pieces(model, tokens()[:, :20], [5, 1], cache)
        cache.crop(-8)
        assert cache.get_seq_length() == 12
        ours, _ = in_pieces(model, tokens()[:, 12:], [1], cache)
        with pytest.raises(ValueError, match=r"crop\(3\)"):
            cache.crop(3)
    assert_close(ours, plain[:, 12:])
    assert cache.is_croppable


def test_reset_begins_anew(model: Any) -> None:
    with InputCache(model):
        _, cache = in_pieces(model, tokens(), [9, 1])
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache_bytes(cache) == (0, 0)
        ours, _ = in_pieces(model, tokens(3), [9, 1], cache)
    assert_close(ours, in_pieces(model, tokens(3), [9, 1])[0])


def test_a_cache_made_by_hand_or_given_empty(model: Any) -> None:
    plain, _ = in_pieces(model, tokens(), [9, 1])
    with InputCache(model) as installed:
        caches = installed.new_cache(), DynamicCache(), DynamicCache(config=model.config)
        for given in caches:
            ours, cache = in_pieces(model, tokens(), [9, 1], given)
            assert cache is given
            assert cache_bytes(cache).logical < 0.6 * 2 * 2 * LENGTH * LAYERS * WIDTH * 8
            assert_close(ours, plain)


def test_a_cache_may_begin_in_inference_mode(model: Any) -> None:
    plain, _ = in_pieces(model, tokens(), [9, 1])
    with InputCache(model):
        with torch.inference_mode():
            _, cache = in_pieces(model, tokens()[:, :20], [9, 1])
        ours, _ = in_pieces(model, tokens()[:, 20:], [1], cache)
    assert_close(ours, plain[:, 20:])


# --- nothing is left behind, nothing else is changed ---------------------------------------------


def everything_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of all attributes of all modules."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_without_a_cache_nothing_changes(model: Any) -> None:
    plain = model(tokens()).logits
    first = in_pieces(model, tokens(), [LENGTH])[0]
    with InputCache(model):
        assert torch.equal(model(tokens(), use_cache=False).logits, plain)
        assert torch.equal(in_pieces(model, tokens(), [LENGTH])[0], first)


def test_removing_restores_the_model(model: Any) -> None:
    model(tokens())  # transformers adds its own hooks at the first call
    before, names, plain = everything_of(model), list(model.state_dict()), model(tokens()).logits
    installed = InputCache(model)
    assert everything_of(model) != before
    assert list(model.state_dict()) == names
    generate(model, tokens())
    installed.remove()
    installed.remove()
    assert everything_of(model) == before
    assert torch.equal(model(tokens()).logits, plain)
    _, cache = in_pieces(model, tokens(), [5])
    assert cache.layers[0].keys is not None
    with InputCache(model):  # and again
        assert in_pieces(model, tokens(), [5])[1].layers[0].keys is None
    with pytest.raises(KeyError), InputCache(model):
        raise KeyError
    assert everything_of(model) == before


def test_what_stood_in_for_forward_before_stands_there_again(model: Any) -> None:
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    own, calls = attention.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    attention.forward = counted
    with InputCache(model):
        in_pieces(model, tokens(), [LENGTH])
    assert attention.forward is counted
    assert len(calls) == 1


def test_a_copy_of_an_installed_model_is_its_own(model: Any) -> None:
    with InputCache(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ours, cache = in_pieces(twin.base_model, tokens(), [9, 1])
    assert cache.layers[0].entries is not None
    assert_close(ours, twin.base_model(tokens(), use_cache=False)[0].detach())
    assert ours.abs().max() > 0.1


@pytest.mark.parametrize("training", [False, True])
def test_gradients_flow_as_before(reading: str, model: Any, training: bool) -> None:
    for name in ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(training)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        cache, loss = None, torch.zeros((), dtype=torch.float64)
        for piece in tokens().split([9, 1, 5, 14], dim=1):
            outputs = model(piece, **{CACHE: cache}, use_cache=True)
            cache, loss = outputs.past_key_values, loss + outputs.logits.logsumexp(-1).sum()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with InputCache(model):
        ours = gradients()
    for actual, expected in zip(ours, plain, strict=True):
        assert_close(actual, expected, 1e-9)


# --- errors --------------------------------------------------------------------------------------


def with_other_projection(model: Any) -> Any:
    class Adapter(nn.Linear):
        pass

    model.base_model.layers[1].attention.query_key_value = Adapter(WIDTH, 3 * WIDTH)
    return model


def changing_rotary() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000}
    return build(neox(rope_parameters={**rope, "partial_rotary_factor": 1.0}))


def grouped_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **heads, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (grouped_llama, r"would keep 16 numbers .* own cache 16 \(2 heads .* share 1 .*latent:4"),
        (lambda: nn.Linear(2, 2), "no adaptor for the attention of 'Linear', only for llama"),
        (lambda: build(gpt2(add_cross_attention=True)), "cross-attention"),
        (changing_rotary, "rope_type 'dynamic'"),
        (
            lambda: with_other_projection(build(neox())),
            "an? Adapter cannot be read, only a plain Linear",
        ),
    ],
    ids=["llama", "linear", "cross-attention", "rotary", "adapter"],
)
def test_what_cannot_have_an_input_cache(make: Callable[[], Any], message: str) -> None:
    model = make()
    before = everything_of(model)
    with pytest.raises(InputError, match=message):
        InputCache(model)
    assert everything_of(model) == before


def test_an_adapter_added_later_is_refused() -> None:
    model = build(neox())
    with InputCache(model):
        _, cache = in_pieces(model, tokens(), [5])
        with_other_projection(model)
        with pytest.raises(InputError, match="merge adapters first"):
            model(tokens(2, 1), **{CACHE: cache})


def test_caches_of_keys_and_values_are_refused(model: Any) -> None:
    _, full = in_pieces(model, tokens(), [5])
    static = StaticCache(config=model.config, max_cache_len=40)
    with InputCache(model):
        for cache in (full, static):
            with pytest.raises(InputError, match=f"a {type(cache).__name__} of keys and values"):
                model(tokens(), **{CACHE: cache})
        with pytest.raises(InputError, match="no cache_implementation"):
            generate(model, tokens(), cache_implementation="static")


def test_a_cache_of_inputs_is_for_its_own_rows_and_for_an_installed_input_cache(model: Any) -> None:
    with InputCache(model) as installed:
        _, cache = in_pieces(model, tokens(), [20, 1])
        with torch.no_grad(), pytest.raises(ValueError, match="holds 2 rows, the new tokens 1"):
            model(tokens(1, 1), **{CACHE: cache})
    with pytest.raises(TypeError, match="EntryLayer keeps no keys and values"):
        model(tokens(), **{CACHE: cache})
    with pytest.raises(InputError, match="has been removed"):
        installed.new_cache()
