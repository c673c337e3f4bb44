"""What every registered architecture must do. A new architecture is tested by being registered.

These are tests for pytest: the test suite runs them on our own architectures, and `contextlm check`
on anybody's. The models run in float64, so that equality can be asked for to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from contextlm.evaluation.memory import cache_bytes, feed, measure_cache, position_limit
from contextlm.models.base import ReadsStoredContexts, registry
from contextlm.models.cache import CACHE, NAMES

CPU = torch.device("cpu")


def build(name: str, index: int) -> PreTrainedModel:
    entry = registry()[name]
    torch.manual_seed(0)
    return entry.model(entry.config(**entry.tiny[index])).double().eval()


def pytest_generate_tests(metafunc) -> None:
    """Each test for each variant that is registered by now."""
    every = [
        (name, index) for name, entry in registry().items() for index in range(len(entry.tiny))
    ]
    if "variant" in metafunc.fixturenames:
        # Compiling takes seconds: the first of each architecture, and all kinds of mixers.
        every = [
            variant for variant in every if variant[1] == 0 or variant == ("context_hybrid", 1)
        ]
        metafunc.parametrize("variant", every)
    else:
        ids = [f"{name}-{index}" for name, index in every]
        metafunc.parametrize("built", every, indirect=True, scope="module", ids=ids)


@pytest.fixture(scope="module")
def built(request) -> PreTrainedModel:
    return build(*request.param)


@pytest.fixture
def model(built) -> Iterator[PreTrainedModel]:
    """The same for many tests, which leave it as it is."""
    with torch.no_grad():
        yield built


@pytest.fixture
def own(built) -> PreTrainedModel:
    """A copy that a test may train and change."""
    return copy.deepcopy(built)


def make_tokens(model: PreTrainedModel, batch: int = 2, length: int = 23) -> Tensor:
    """Random tokens, never 0, which the tests use for padding."""
    length = min(length, position_limit(model) or length)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def pad_first_row(ids: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """`ids` with the first row cut at its end and padded on its left, and the attention mask."""
    rows, mask = ids.clone(), torch.ones_like(ids)
    rows[0] = torch.cat([torch.zeros(pad, dtype=torch.long), ids[0, : ids.shape[1] - pad]])
    mask[0, :pad] = 0
    return rows, mask


def in_pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int], **kwargs) -> Tensor:
    """Logits of `ids` fed in pieces of the given sizes (the last size repeats)."""
    cache, logits, start = None, [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        piece = ids[:, start : start + size]
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, : start + piece.shape[1]]
        outputs = model(piece, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, start = outputs.past_key_values, start + piece.shape[1]
        logits.append(outputs.logits)
        assert cache.get_seq_length() == start
    return torch.cat(logits, dim=1)


def test_the_future_does_not_leak_into_the_past(model):
    ids = make_tokens(model, batch=1)
    reference, tokens = model(ids).logits[0], ids.shape[1]
    changed = ids.repeat(tokens, 1)  # row j has another token j
    changed.diagonal().copy_(ids[0] % (model.config.vocab_size - 1) + 1)
    for j, logits in enumerate(model(changed).logits):
        assert_close(logits[:j], reference[:j])
        assert not torch.allclose(logits[j], reference[j], rtol=1e-7, atol=1e-7)


def test_pieces_of_any_size_equal_the_whole(model):
    ids = make_tokens(model)
    whole = model(ids).logits
    for sizes in ([1], [7], [5, 1, 2, 11], [22, 1]):
        assert_close(in_pieces(model, ids, sizes), whole)


def test_left_padding_changes_nothing(model):
    ids = make_tokens(model)
    length, pad = ids.shape[1], min(9, ids.shape[1] // 2)
    rows, mask = pad_first_row(ids, pad)
    alone = [model(ids[:1, : length - pad]).logits[0], model(ids[1:]).logits[0]]
    for logits in (
        model(rows, attention_mask=mask).logits,
        in_pieces(model, rows, [1], attention_mask=mask),
        in_pieces(model, rows, [3, 8, 5], attention_mask=mask),
    ):
        assert_close(logits[0, pad:], alone[0])
        assert_close(logits[1], alone[1])


def test_a_long_text_in_chunks_of_any_size_is_continued_by_the_same_text(model):
    """2,000 tokens, or as many as there are positions for; small chunks at the end of it."""
    length = min(2000, (position_limit(model) or 2008) - 8)
    ids = make_tokens(model, batch=1, length=length)
    whole = continued(model, ids, length, length)
    for first, size in ((0, 640), (length - 70, 7), (length - 20, 1)):
        assert continued(model, ids, max(0, first), size) == whole, f"chunks of {size}"


def continued(model: PreTrainedModel, ids_1T: Tensor, first: int, size: int) -> list[int]:
    """Eight greedy tokens after a text of which so many are fed at once, then chunks of a size."""
    cache, tokens = None, []
    for chunk_1T in (ids_1T[:, :first], *ids_1T[:, first:].split(size, dim=1)):
        if chunk_1T.shape[1]:
            logits_1V, cache = feed(model, chunk_1T, cache)
    for _ in range(8):
        tokens.append(int(logits_1V.argmax()))
        logits_1V, cache = feed(model, torch.tensor([tokens[-1:]]), cache)
    return tokens


def greedy(model: PreTrainedModel, ids: Tensor, new: int) -> Tensor:
    """Greedy decoding without any cache: the truth that `generate` must agree with."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    """`generate` that never stops early."""
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **options)


def test_generate_is_greedy_decoding(model):
    """Also in chunks, and from a cache of one's own."""
    ids = make_tokens(model, length=11)
    expected = greedy(model, ids, 8)
    begun = model(ids[:, :6], past_key_values=model.new_cache(), use_cache=True).past_key_values
    chunked = [{"prefill_chunk_size": size} for size in (1, 3, 100)]
    for options in ({}, {CACHE: begun}, *chunked):
        assert torch.equal(generate(model, ids, max_new_tokens=8, **options), expected), options


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_pads_on_the_left(model, beams):
    ids = make_tokens(model, length=11)
    rows, mask = pad_first_row(ids, 4)
    options = {"max_new_tokens": 5, "num_beams": beams}
    both = generate(model, rows, attention_mask=mask, **options)
    assert torch.equal(both[0, 11:], generate(model, ids[:1, :7], **options)[0, 7:])
    assert torch.equal(both[1], generate(model, ids[1:], **options)[0])


def test_beams_with_a_cache_equal_beams_without(model):
    ids = make_tokens(model, length=9)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    with_cache = generate(model, ids, use_cache=True, **options)
    assert torch.equal(with_cache, generate(model, ids, use_cache=False, **options))
    assert with_cache.shape == (4, 15)


def test_sampling_returns_several_sequences(model):
    ids = make_tokens(model, length=5)
    torch.manual_seed(0)
    out = generate(model, ids, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 9)
    assert torch.equal(out[0, :5], ids[0])


def test_save_and_load_give_identical_logits(own, tmp_path):
    model = own
    # Weights that no start would give, so that one that is started anew shows.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert type(AutoModel.from_config(model.config)) is type(model.model)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    # Where memory from a file is not aligned, some processors' float64 products round otherwise.
    aligned = type(model)(model.config).double().eval()
    aligned.load_state_dict(loaded.state_dict())
    ids = make_tokens(model)
    torch.testing.assert_close(aligned(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert_close(loaded(ids).logits, model(ids).logits)


def test_embeddings_may_replace_tokens(model):
    ids = make_tokens(model)
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_logits_to_keep(model):
    ids = make_tokens(model)
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    assert_close(model(ids, logits_to_keep=5).logits, logits[:, -5:])


def test_the_plain_form_of_attention_gives_the_same(own):
    # transformers' own takes its softmax in float32, whatever the type, and overflows in float64.
    own.float()
    rows, mask = pad_first_row(make_tokens(own), 4)
    expected = own(rows, attention_mask=mask).logits[mask.bool()]
    own.set_attn_implementation("eager")
    assert own.config._attn_implementation == "eager"
    actual = own(rows, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def plain_flash(module, query, key, value, mask, *, scaling, **kwargs):
    """What flash attention computes: causal, ending together, without the keys that are padding."""
    scores = query @ key.mT * scaling
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + key.shape[2] - query.shape[2])
    if mask is not None:
        hidden = hidden | ~mask[:, None, None, :].bool()
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def test_flex_and_flash_attention_give_the_same_or_are_refused(variant):
    """Without compiling flex attention, which takes a minute; with a stand-in for flash."""
    own, names = build(*variant), ("flex_attention", "flash_attention_2")
    assert own._supports_flex_attn == own._supports_flash_attn
    if not own._supports_flex_attn:
        for name in names:
            with pytest.raises(ValueError, match="does not support"):
                own.set_attn_implementation(name)
        return
    rows, mask = pad_first_row(make_tokens(own, length=11), 4)
    row = torch.cat([make_tokens(own, batch=1, length=length) for length in PACKED], dim=1)
    padded = own(rows, attention_mask=mask).logits[mask.bool()]
    tokens = generate(own, rows, attention_mask=mask, max_new_tokens=2)
    packed = own(row, **packed_forms(PACKED)[0]).logits
    uncompiled = masking_utils.create_block_mask
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flex, "WrappedFlexAttention", lambda training: lambda: flex.flex_attention)
        patch.setattr(
            masking_utils,
            "create_block_mask",
            lambda *args, _compile, **kwargs: uncompiled(*args, **kwargs),
        )
        functions = ALL_ATTENTION_FUNCTIONS._global_mapping
        patch.setitem(functions, "flash_attention_2", plain_flash)
        for name in names:
            own.config._attn_implementation = name  # its setter looks for flash itself
            assert_close(own(rows, attention_mask=mask).logits[mask.bool()], padded)
            assert_close(own(row, **packed_forms(PACKED)[0]).logits, packed)
            assert torch.equal(generate(own, rows, attention_mask=mask, max_new_tokens=2), tokens)


def test_gradients_reach_every_trainable_parameter(own):
    own.train()
    ids = make_tokens(own)
    loss = own(ids, labels=ids).loss
    loss.backward()
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_gradient_checkpointing_changes_no_gradient(own):
    if not own.supports_gradient_checkpointing:
        pytest.skip("the architecture does not claim gradient checkpointing")
    ids = make_tokens(own)
    cache = own(ids[:, :5], use_cache=True).past_key_values
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            own.gradient_checkpointing_enable()
        own.train()
        own.zero_grad()
        torch.manual_seed(0)  # of the dropout, which recomputing must repeat
        own(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in own.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)
    with pytest.raises(ValueError, match=f"train without {CACHE}"):
        own(ids[:, 5:], past_key_values=cache)  # it would be moved on twice


def test_the_loss_falls_on_one_batch(own):
    own.train()
    ids = make_tokens(own, batch=4)
    optimizer = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        loss = own(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_the_shifted_cross_entropy(model):
    ids = make_tokens(model)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_cache_bytes_equal_the_storage_kept(model):
    """And however the tokens came, as much is kept of them; only the room for more may differ."""
    limit = position_limit(model) or 1000
    lengths = [length for length in (1, 17, 100, 1000) if length <= limit]
    for entry in measure_cache(model, lengths, CPU):
        ids, cache = make_tokens(model, batch=1, length=entry.tokens), None
        whole = model(ids, use_cache=True).past_key_values
        for piece in ids.split([entry.tokens - 1, 1], dim=1):  # as decoding does
            if piece.shape[1]:
                cache = feed(model, piece, cache)[1]
        kept, at_once = (
            [
                tensor
                for layer in each.layers
                for tensor in vars(layer).values()
                if isinstance(tensor, Tensor)
            ]
            for each in (cache, whole)
        )
        assert entry.resident == sum(t.untyped_storage().nbytes() for t in kept)
        assert entry.logical == sum(t.numel() * t.element_size() for t in at_once)
        assert entry.logical == cache_bytes(cache).logical


def test_reset_makes_a_cache_new(model):
    ids = make_tokens(model)
    first = model(ids, use_cache=True)
    first.past_key_values.reset()
    assert first.past_key_values.get_seq_length() == 0
    again = model(ids, past_key_values=first.past_key_values, use_cache=True)
    assert_close(again.logits, first.logits)


def test_rows_of_a_cache_can_be_chosen_and_repeated(model):
    ids = make_tokens(model)
    following = make_tokens(model, batch=4, length=3)
    cache = model(ids, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    logits = model(following[:2], past_key_values=cache, use_cache=True).logits
    whole = torch.cat([ids[[1, 0]], following[:2]], dim=1)
    assert_close(logits, model(whole).logits[:, -3:])


@pytest.mark.parametrize("name", NAMES)
def test_both_of_transformers_names_for_the_cache_are_read(model, name):
    ids = make_tokens(model)
    cache = model(ids[:, :5], use_cache=True, **{name: model.new_cache()})[CACHE]
    assert cache.get_seq_length() == 5
    whole = model(ids).logits
    assert_close(model(ids[:, 5:], use_cache=True, **{name: cache}).logits, whole[:, 5:])
    with pytest.raises(ValueError, match="give the cache once"):
        model(ids, **dict.fromkeys(NAMES, cache))


def test_other_kinds_of_cache_are_refused(model):
    with pytest.raises(ValueError, match="cache of its own kind"):
        generate(model, make_tokens(model), max_new_tokens=1, cache_implementation="static")
    cache = model(make_tokens(model), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows"):
        model(make_tokens(model, batch=1), past_key_values=cache, use_cache=True)


def test_a_mask_must_cover_the_past_and_have_the_rows_of_the_tokens(model):
    ids = make_tokens(model)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="5 past"):
        model(ids[:, 5:7], attention_mask=torch.ones(2, 2), past_key_values=cache, use_cache=True)
    for rows in (1, 4):
        mask = torch.ones(rows, ids.shape[1])
        mask[:, 0] = 0
        with pytest.raises(ValueError, match="2 rows"):
            model(ids, attention_mask=mask)


PACKED = (5, 1, 13, 3, 11)  # documents of a row, longer and shorter than the tiny windows


def packed_forms(lengths: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """How transformers' and TRL's collators say where the documents of one row begin."""
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    both = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 13, "max_length_k": 13}
    return [
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": torch.ones_like(positions)},
        {"seq_idx": seq_idx.int()},
        both,
        {"position_ids": positions, "seq_idx": seq_idx.int(), **both},
    ]


def test_packed_documents_are_as_alone(own):
    documents = [make_tokens(own, batch=1, length=length) for length in PACKED]
    row = torch.cat(documents, dim=1)
    weights = torch.linspace(-1, 1, own.config.vocab_size, dtype=torch.float64)
    alone = torch.cat([own(document).logits for document in documents], dim=1)
    (alone * weights).sum().backward()
    expected = {name: p.grad for name, p in own.named_parameters()}
    for form in packed_forms(PACKED):
        own.zero_grad()
        outputs = own(row, **form)
        assert outputs.past_key_values is None
        assert_close(outputs.logits, alone)
        (outputs.logits * weights).sum().backward()
        for name, parameter in own.named_parameters():
            if expected[name] is None:
                assert parameter.grad is None, name
            else:
                assert_close(parameter.grad, expected[name])


def test_packed_documents_may_be_padded(model):
    """In several rows, and with padding on the left, between documents and within one."""
    numbers = torch.tensor([[9, 9, 9, 0, 0, 0, 9, 1, 9, 1, 1, 2], [0] * 7 + [1] * 5])
    mask = (numbers != 9).long()
    ids = make_tokens(model, length=12) * mask
    positions = torch.stack(
        [(number == numbers).long().cumsum(1) - 1 for number in range(3)]
    ).clamp(min=0)
    positions = positions.gather(0, numbers.clamp(max=2).unsqueeze(0)).squeeze(0) * mask
    for form in ({"position_ids": positions}, {"seq_idx": numbers}):
        logits = model(ids, attention_mask=mask, **form).logits
        for row in range(2):
            for number in range(3):
                here = numbers[row] == number
                if here.any():
                    assert_close(logits[row, here], model(ids[row : row + 1, here]).logits[0])


def test_borders_of_documents_must_fit(model):
    ids = make_tokens(model, length=9)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="packed documents go together neither with a cache"):
        model(ids, position_ids=packed, past_key_values=model.new_cache())
    with pytest.raises(ValueError, match="for one row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="ends at 8 of 9 tokens"):
        model(ids[:1], cu_seq_lens_k=torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match=r"\[2, 9\]"):
        model(ids, seq_idx=torch.zeros(2, 8))


def test_positions_of_padding_say_nothing(model):
    ids = make_tokens(model, length=9)
    rows, mask = pad_first_row(ids, 4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_close(
        model(rows, attention_mask=mask, position_ids=positions).logits[mask.bool()],
        model(rows, attention_mask=mask).logits[mask.bool()],
    )


def test_arguments_that_would_change_the_answer_are_refused(model):
    ids = make_tokens(model, length=3)
    for name in ("cache_params", "encoder_hidden_states", "cu_seqlens", "num_logits_to_keep"):
        with pytest.raises(ValueError, match=f"does not take {name}"):
            model(ids, **{name: torch.zeros(1)})
        model(ids, labels=ids, num_items_in_batch=torch.tensor(4), **{name: None})
    with pytest.raises(ValueError, match="does not take layer_past"):
        model(ids, layer_past=model.new_cache())
    if not isinstance(model.model, ReadsStoredContexts):
        with pytest.raises(ValueError, match="reads no contexts"):
            model(ids, contexts=torch.zeros(2, 3, 5))


def test_hidden_states_are_given(model):
    """Of every layer, with the embeddings in front; also where few logits are wanted."""
    ids = make_tokens(model, length=5)
    for keep in (0, 2):
        states = model(ids, output_hidden_states=True, logits_to_keep=keep).hidden_states
        appended = getattr(model.model, "appended", None) is not None  # behind the base's layers
        assert len(states) == model.config.num_hidden_layers + 1 + appended
        assert all(state.shape[:2] == ids.shape for state in states)
        assert_close(states[-1], model.model(ids).last_hidden_state)


def test_attention_weights_are_given_or_refused(own):
    own.set_attn_implementation("eager")
    ids = make_tokens(own, length=5)
    if "attentions" not in (own.model._can_record_outputs or {}):
        with pytest.raises(ValueError, match="does not record attentions"):
            own(ids, output_attentions=True)
        return
    for weights in own(ids, output_attentions=True).attentions:
        assert weights.shape == (2, own.config.num_attention_heads, 5, 5)
        # GPT-NeoX's own take their softmax in float32.
        torch.testing.assert_close(
            weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0
        )


def test_outputs_may_be_tuples(model):
    ids = make_tokens(model, length=5)
    logits, cache = model(ids, return_dict=False)
    hidden, _ = model.model(ids, return_dict=False)
    assert_close(logits, model.lm_head(hidden))
    assert cache.get_seq_length() == 5


class Adapter(nn.Module):
    """What adapters, quantised and offloaded layers have in common: it must be called."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.down = nn.Parameter(torch.randn(2, layer.in_features, dtype=torch.float64))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def test_every_linear_layer_can_be_adapted(own):
    """The function is the adapted one, as after merging, and what is adapted learns."""
    ids = make_tokens(own)
    expected = own(ids).logits
    merged, adapters = copy.deepcopy(own), {}
    for name, module in list(own.named_modules()):
        if type(module) is nn.Linear and module is not own.lm_head:
            adapters[name] = Adapter(module)
            own.set_submodule(name, adapters[name])
    assert adapters
    assert_close(own(ids).logits, expected)
    own.train()
    own(ids, labels=ids).loss.backward()
    for name, adapter in adapters.items():
        assert adapter.up.grad.abs().sum() > 0, name
    own.eval()
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.up.normal_(std=0.05)
            merged.get_submodule(name).weight.add_(adapter.up @ adapter.down)
        assert_close(own(ids).logits, merged(ids).logits)
        assert_close(in_pieces(own, ids, [7, 1]), merged(ids).logits)


class Wrapper(nn.Module):
    """What torch.compile and sharding put in a module's place."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        return self.layer(*args)


def test_wrapped_context_layers_are_called(own):
    block = getattr(own.model, "context_block", None)
    layers = getattr(block, "layers", [])
    if not layers:
        pytest.skip("the architecture has no context layers")
    ids = make_tokens(own, batch=1)
    expected, calls = own(ids).logits, []
    for layer in layers:
        layer.register_forward_hook(lambda *call: calls.append(call[-1]))
    assert_close(own(ids).logits, expected)
    assert len(calls) == ids.shape[1] * len(layers)
    for number, layer in enumerate(layers):
        layers[number] = Wrapper(layer)
    assert_close(own(ids).logits, expected)


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloaded_weights_are_fetched(own, to_disk, tmp_path):
    ids = make_tokens(own, length=9)
    expected = own(ids).logits
    tokens = generate(own, ids, max_new_tokens=3)
    if to_disk:
        disk_offload(own, tmp_path, CPU)
    else:
        cpu_offload(own, CPU)
    assert {parameter.device.type for parameter in own.parameters()} == {"meta"}
    with torch.no_grad():
        assert_close(own(ids).logits, expected)
        assert torch.equal(generate(own, ids, max_new_tokens=3), tokens)


def test_tokens_are_taken_back_or_drafts_refused(model):
    """Assisted decoding writes several tokens on trial and takes back those that do not fit."""
    ids = make_tokens(model, length=9)[:1]
    options = {"max_new_tokens": 6, "prompt_lookup_num_tokens": 3}
    if model.new_cache().is_croppable:
        assert torch.equal(generate(model, ids, **options), greedy(model, ids, 6))
    else:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, ids, **options)


def test_clients_find_sizes_and_are_refused_in_one_line(model):
    """As prompt tuning, prefix tuning and continuous batching ask for them."""
    ids = make_tokens(model, length=5)
    assert model.config.num_hidden_layers >= 1
    assert model.config.num_attention_heads >= 1
    with pytest.raises(ValueError, match="needs its own cache"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"continuous batching does not know: use generate\(\)"):
        model.generate_batch([ids[0].tolist()])


def test_bfloat16_weights_decode_as_they_prefill(own):
    own.bfloat16()
    ids = make_tokens(own)
    whole = own(ids).logits
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(in_pieces(own, ids, [1]), whole, rtol=0.05, atol=0.05)


def test_the_vocabulary_can_grow(own):
    ids = make_tokens(own)
    before = own(ids).logits
    size = own.config.vocab_size
    own.resize_token_embeddings(size + 7)
    after = own(ids).logits
    assert after.shape[-1] == size + 7
    assert_close(after[..., :size], before)


def test_compiles_into_one_graph(variant):
    model = build(*variant)
    if not model._can_compile_fullgraph:
        pytest.skip("the architecture does not claim torch.compile(fullgraph=True)")
    ids = make_tokens(model, length=3)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :1] = 0
    assert_close(
        compiled(ids, attention_mask=mask, use_cache=False).logits[0, 1:],
        model(ids, attention_mask=mask).logits[0, 1:],
    )
    packed = {"position_ids": torch.tensor([[0, 1, 0]])}
    if variant[0] in ("context_kv", "context_pythia", "dual_context"):
        return  # packed documents are theirs as they are context_vector's
    if model.model.reads_packed:
        assert_close(compiled(ids, use_cache=False, **packed).logits, model(ids, **packed).logits)
    else:
        with pytest.raises(RuntimeError, match="for one document a row"):
            compiled(ids, use_cache=False, **packed)
