"""The hybrid's mixers against loops over tokens, written from their equations, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from naive_parts import turned
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from contextlm.evaluation.memory import cache_bytes, feed
from contextlm.models.cache import CACHE
from contextlm.models.convolution import CausalConvolution
from contextlm.models.gated_recurrence import GatedRecurrence, gated_states
from contextlm.models.hybrid import ContextHybridConfig, ContextHybridForCausalLM
from contextlm.models.hybrid import mixer as mixer_module
from contextlm.models.hybrid.delta import DeltaMixer
from contextlm.models.hybrid.gated_convolution import GatedConvolution, TapsLayer
from contextlm.models.hybrid.global_latents import GlobalLatents
from contextlm.models.hybrid.latent import LatentAttention, LatentLayer
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.hybrid.recurrence import RecurrenceLayer, RecurrentMixer
from contextlm.models.hybrid.selective import SelectiveMixer
from contextlm.models.hybrid.window import WindowedAttention, WindowLayer
from contextlm.models.inputs import NewTokens
from contextlm.models.selective_state import Decay
from contextlm.models.stepping import Stepping


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def randomise(module: torch.nn.Module) -> None:
    """Every parameter away from its starting value: identities and zeros hide mistakes."""
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


def config(**fields) -> ContextHybridConfig:
    given = {"vocab_size": 53, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
    given |= {"head_dim": 4, "pattern": "W", "attention_convolution": 0}
    made = ContextHybridConfig(**{**given, **fields})
    made._attn_implementation = "sdpa"
    return made


def convolved(conv: CausalConvolution | None, inputs: list[Tensor]) -> list[Tensor]:
    if conv is None:
        return inputs
    return [
        conv.bias + sum(conv.weight[j] * inputs[t - j] for j in range(conv.taps) if t - j >= 0)
        for t in range(len(inputs))
    ]


# R -------------------------------------------------------------------------------------------


def recurrent(**fields) -> RecurrentMixer:
    return RecurrentMixer(config(pattern="R", **fields))


def naive_recurrence(mixer: RecurrentMixer, x_TD: Tensor) -> Tensor:
    """DESIGN 2 and Griffin, one token and one channel block at a time."""
    width = x_TD.shape[1]
    recurrence, conv = mixer.recurrence, mixer.convolution
    inner = convolved(conv, [mixer.inner.weight @ x for x in x_TD])
    h, outputs = torch.zeros(width), []
    for t, x in enumerate(x_TD):
        v = inner[t]
        gates = []
        for gate in (recurrence.decay_gate, recurrence.input_gate):
            if gate is None:
                gates.append(torch.ones(width))
                continue
            blocks, size, _ = gate.weight.shape
            out = torch.empty(width)
            for g in range(blocks):
                part = slice(g * size, (g + 1) * size)
                out[part] = v[part] @ gate.weight[g]
            gates.append(1 / (1 + torch.exp(-(out + gate.bias))))
        r, i = gates
        softplus = torch.log(1 + torch.exp(recurrence.decay))
        a = torch.exp(-8 * softplus * r)
        multiplier = torch.sqrt(1 - a**2) if t else torch.ones(width)
        h = a * h + multiplier * i * v
        g = mixer.gate.weight @ x
        gelu = g * 0.5 * (1 + torch.erf(g / math.sqrt(2)))
        outputs.append(mixer.output.weight @ (gelu * h))
    return torch.stack(outputs)


@pytest.mark.parametrize("gates", ["none", "dense", "block_diagonal"])
@pytest.mark.parametrize("taps", [0, 4])
def test_r_is_its_equations(gates, taps):
    mixer = recurrent(convolution=taps, gates=gates)
    randomise(mixer)
    x = torch.randn(1, 37, 12)
    assert_close(mixer(x, None, NewTokens.of(x))[0], naive_recurrence(mixer, x[0]))


def test_r_starts_with_slow_decays_and_an_identity_convolution():
    a = torch.exp(-8 * F.softplus(GatedRecurrence(4096, 0).decay))
    assert 0.9 <= a.min() < 0.905
    assert 0.998 < a.max() <= 0.999
    x = torch.randn(1, 5, 12)
    convolution = recurrent().convolution
    torch.testing.assert_close(convolution(x, None, NewTokens.of(x)), x)


@pytest.mark.parametrize("backend", ["eager", "numba", "parallel"])
def test_the_parallel_scan_is_the_step_recurrence_with_its_gradients(backend, monkeypatch):
    monkeypatch.setenv("CONTEXTLM_BACKEND", f"linear_scan={backend}")
    mixer = recurrent(hidden_size=6, num_attention_heads=2)
    randomise(mixer)
    x = torch.randn(2, 63, 6, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    results = []
    whole = mixer(x, None, NewTokens.of(x))
    results.append([whole, *torch.autograd.grad(whole.square().sum(), leaves)])
    naive = torch.stack([naive_recurrence(mixer, row) for row in x])
    results.append([naive, *torch.autograd.grad(naive.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("extreme", [1e-6, 1 - 1e-9, 1 - 1e-6])
def test_decays_near_0_and_near_1_over_4096_tokens_in_float32(extreme):
    """The state and every gradient stay finite and close to float64's."""
    gates = GatedRecurrence(8, 0)
    # At r = 1, a = exp(-8 softplus(lambda)) is the extreme itself.
    with torch.no_grad():
        gates.decay.fill_(math.log(math.expm1(-math.log(extreme) / 8)))
    x = torch.randn(1, 4096, 8)
    outcomes = []
    for kind in (torch.float64, torch.float32):
        module = gates.to(kind)
        inputs = x.to(kind).requires_grad_()
        states = gated_states(module, inputs, None, NewTokens.of(inputs))
        grads = torch.autograd.grad(states.square().mean(), [inputs, module.decay])
        outcomes.append([states.double(), *(g.double() for g in grads)])
    for exact, single in zip(*outcomes, strict=True):
        assert torch.isfinite(single).all()
        torch.testing.assert_close(
            single, exact, rtol=2e-2, atol=1e-3 * exact.detach().abs().max().item()
        )


def test_the_root_has_a_bounded_gradient():
    gates = GatedRecurrence(3, 0)
    with torch.no_grad():
        gates.decay.fill_(-1000.0)  # a is 1 exactly: the root's derivative would be infinite
    a, added = gates(torch.ones(1, 2, 3))
    assert (a == 1).all()
    (gradient,) = torch.autograd.grad(added.sum(), gates.decay)
    assert torch.isfinite(gradient).all()


# W -------------------------------------------------------------------------------------------


def rms_norm(norm: torch.nn.Module, x_E: Tensor) -> Tensor:
    if isinstance(norm, torch.nn.Identity):
        return x_E
    return norm.weight * x_E / torch.sqrt((x_E**2).mean() + norm.eps)


def naive_window(mixer: WindowedAttention, x_TD: Tensor) -> Tensor:
    heads, shared, size = mixer.heads, mixer.shared, mixer.head_dim
    inner = convolved(mixer.convolution, [mixer.inner.weight @ x for x in x_TD])
    outputs = []
    for t in range(len(x_TD)):
        mixed = []
        for head in range(heads):
            query = inner[t][head * size : (head + 1) * size]
            query = turned(rms_norm(mixer.query_norm, query), t)
            group = heads + head // (heads // shared)
            scores, values = [], []
            for s in range(max(0, t - mixer.window + 1), t + 1):
                key = inner[s][group * size : (group + 1) * size]
                scores.append(query @ turned(rms_norm(mixer.key_norm, key), s) / math.sqrt(size))
                values.append(inner[s][(group + shared) * size : (group + shared + 1) * size])
            mixed.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(mixer.output.weight @ torch.cat(mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 1},
        {"window": 5},
        {"window": 5, "num_key_value_heads": 3, "attention_convolution": 3},
        {"window": 7, "qk_norm": False},
        {"window": 100},
    ],
    ids=str,
)
def test_w_is_its_equations(fields):
    mixer = WindowedAttention(config(**fields))
    randomise(mixer)
    for tokens in (1, 4, 17):
        x = torch.randn(1, tokens, 12)
        naive = naive_window(mixer, x[0])
        assert_close(mixer(x, None, NewTokens.of(x))[0], naive)
        mixer.config._attn_implementation = "eager"
        assert_close(mixer(x, None, NewTokens.of(x))[0], naive)
        mixer.config._attn_implementation = "sdpa"


def test_w_keeps_its_window_only():
    mixer = WindowedAttention(config(window=5))
    state = WindowLayer(4)
    seen = 0
    for size in (3, 1, 20, 1):
        x = torch.randn(1, size, 12)
        mixer(x, state, after(seen, x))
        seen += size
        assert state.entries.shape == (1, min(4, seen), 2 * 4)


def after(seen: int, x: Tensor) -> NewTokens:
    return NewTokens.of(x, past=seen, seen_B=torch.tensor([seen]) if seen else None)


# L -------------------------------------------------------------------------------------------


def naive_latent(mixer: LatentAttention, x_TD: Tensor) -> Tensor:
    heads, content, rotary = mixer.heads, mixer.content, mixer.rotary
    weight = torch.cat([mixer.query.weight, mixer.compress.weight])
    inner = convolved(mixer.convolution, [weight @ x for x in x_TD])
    queries = [q[: len(mixer.query.weight)] for q in inner]
    both = [c[len(mixer.query.weight) :] for c in inner]
    latents = [rms_norm(mixer.norm, c[: mixer.latent]) for c in both]
    shared = [turned(c[mixer.latent :], s) for s, c in enumerate(both)]
    outputs = []
    for t in range(len(x_TD)):
        mixed = []
        for head in range(heads):
            size = content + rotary
            query = queries[t][head * size : (head + 1) * size]
            rows = slice(head * content, (head + 1) * content)
            scores, values = [], []
            for s in range(t + 1):
                score = query[:content] @ (mixer.key.weight[rows] @ latents[s])
                score = score + turned(query[content:], t) @ shared[s]
                scores.append(score / math.sqrt(size))
                values.append(mixer.value.weight[rows] @ latents[s])
            mixed.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(mixer.output.weight @ torch.cat(mixed))
    return torch.stack(outputs)


def latent_mixer(taps: int) -> LatentAttention:
    return LatentAttention(
        config(pattern="L", latent_dim=7, rope_dim=6, attention_convolution=taps)
    )


@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("tokens", [1, 23])
def test_l_is_its_equations(tokens, taps):
    mixer = latent_mixer(taps)
    randomise(mixer)
    x = torch.randn(1, tokens, 12)
    assert_close(mixer(x, None, NewTokens.of(x))[0], naive_latent(mixer, x[0]))


@pytest.mark.parametrize("taps", [0, 3])
def test_l_keeps_one_latent_and_one_rotary_key_and_absorbs_the_rest(monkeypatch, taps):
    mixer = latent_mixer(taps)
    randomise(mixer)
    x = torch.randn(1, 23, 12)
    state, pieces, seen = LatentLayer(), [], 0
    for size in (5, 1, 11, 6):
        if seen:  # no key and no value is made again
            monkeypatch.setattr(mixer, "_rebuilt", None)
        piece = x[:, seen : seen + size]
        pieces.append(mixer(piece, state, after(seen, piece)))
        seen += size
    assert_close(torch.cat(pieces, dim=1)[0], naive_latent(mixer, x[0]))
    assert state.entries.shape == (1, 23, 7 + 6)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter beside it, as PEFT puts them into a model."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.in_features, self.out_features = layer, layer.in_features, 0
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_l_decodes_with_adapters_in_the_place_of_its_projections():
    model = ContextHybridForCausalLM(config(pattern="LL", latent_dim=7, rope_dim=6)).eval()
    plain = model(torch.arange(19).unsqueeze(0)).logits
    for layer in model.model.layers:
        for name in ("key", "value"):
            setattr(layer.mixer, name, Adapted(getattr(layer.mixer, name)))
    randomise(model)
    ids = torch.arange(19).unsqueeze(0)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    decoded = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert_close(decoded, model(ids).logits[:, 6:])
    assert not torch.allclose(model(ids).logits, plain)


def test_latent_attention_decodes_with_guesses_that_are_taken_back():
    model = ContextHybridForCausalLM(config(pattern="LL", latent_dim=7, rope_dim=6)).eval()
    ids = torch.randint(0, 53, (1, 4)).repeat(1, 5)  # repeated: so that there are guesses
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), plain)


def test_a_latent_cache_takes_back_real_tokens_only():
    model = ContextHybridForCausalLM(config(pattern="LL", latent_dim=7, rope_dim=6)).eval()
    ids, mask = torch.randint(0, 53, (2, 19)), torch.ones(2, 19)
    mask[0, -6:] = 0
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="only the newest 0 can"):
        cache.crop(-6)
    left = mask.flip(1)
    cache = model(ids, attention_mask=left, use_cache=True).past_key_values
    cache.crop(-6)
    again = model(ids[:, 13:], attention_mask=left, past_key_values=cache, use_cache=True).logits
    assert_close(again, model(ids, attention_mask=left).logits[:, 13:])
    with pytest.raises(ValueError, match="only the newest 13 can"):
        cache.crop(-14)
    with pytest.raises(ValueError, match="expected 0 or a negative number"):
        cache.crop(3)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    assert_close(model(ids, past_key_values=cache, use_cache=True).logits, model(ids).logits)


def test_latent_attention_decodes_from_offloaded_weights():
    model = ContextHybridForCausalLM(config(pattern="LL", latent_dim=7, rope_dim=6)).eval()
    ids = torch.randint(0, 53, (1, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].mixer.key.weight.device.type == "meta"
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize(
    "fields", [{"pattern": "LR"}, {"pattern": "LL", "attention_convolution": 3}]
)
def test_a_cache_of_which_a_part_forgets_is_not_cropped_at_all(fields):
    model = ContextHybridForCausalLM(config(latent_dim=7, rope_dim=6, **fields)).eval()
    ids = torch.randint(0, 53, (2, 19))
    cache = model(ids[:, :15], use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-7)
    decoded = model(ids[:, 15:], past_key_values=cache, use_cache=True).logits
    assert_close(decoded, model(ids).logits[:, 15:])


# S -------------------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def naive_selective(mixer: SelectiveMixer, x_TD: Tensor) -> Tensor:
    """DESIGN 2, one token and one head at a time."""
    core = mixer.recurrence
    inner, size = core.output.in_features, core.head_size
    projected = [core.inner.weight @ x for x in x_TD]
    seen = sum(core.parts)
    given = [p[inner : inner + seen] for p in projected]
    mixed = [silu(c) for c in convolved(core.convolution, given)]
    states = [torch.zeros(5, size) for _ in range(inner // size)]
    outputs = []
    for p, m in zip(projected, mixed, strict=True):
        write, read = core.fixed if core.fixed is not None else m[inner:].chunk(2)
        heads = []
        for h in range(len(states)):
            u = m[h * size : (h + 1) * size]
            dt = torch.log(1 + torch.exp(p[inner + seen + h] + core.decay.step[h]))
            decay = torch.exp(-dt * torch.exp(core.decay.rate[h]))
            states[h] = decay * states[h] + dt * torch.outer(write, u)
            heads.append(states[h].T @ read + core.skip[h] * u)
        gated = torch.cat(heads) * silu(p[:inner])
        normed = gated if core.norm is None else rms_norm(core.norm, gated)
        outputs.append(core.output.weight @ normed)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "fields",
    [{}, {"convolution": 0}, {"selective": False}, {"output_norm": False, "expand": 1}],
    ids=str,
)
def test_s_is_its_equations(fields):
    mixer = SelectiveMixer(config(pattern="S", state_head_dim=6, state_size=5, **fields))
    randomise(mixer)
    for tokens in (1, 37):
        x = torch.randn(1, tokens, 12)
        assert_close(mixer(x, None, NewTokens.of(x))[0], naive_selective(mixer, x[0]))


def test_s_starts_as_mamba_2_does():
    decay = Decay(6000)
    rates, steps = torch.exp(decay.rate), F.softplus(decay.step)
    assert 1 <= rates.min() < 1.1
    assert 15.9 < rates.max() <= 16
    assert 1e-3 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1
    torch.testing.assert_close(steps.log().mean().exp().item(), 1e-2, rtol=0.1, atol=0)
    core = SelectiveMixer(config(pattern="S", state_head_dim=6)).recurrence
    assert 0.4 < core.convolution.weight.abs().max() <= 0.5
    assert (core.skip == 1).all()


def test_states_may_be_kept_in_bfloat16():
    model = ContextHybridForCausalLM(
        config(pattern="sk", state_head_dim=6, state_size=5, state_dtype="bfloat16")
    ).eval()
    ids = torch.randint(0, 53, (1, 30))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    assert [layer.state.dtype for layer in cache.layers] == [torch.bfloat16] * 2
    last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, 0]
    exact = model(ids).logits[:, -1]
    assert 0 < (last - exact).abs().max() < 0.05 * exact.abs().max()


# K -------------------------------------------------------------------------------------------


def naive_delta(mixer: DeltaMixer, x_TD: Tensor) -> Tensor:
    heads, numbers, inner = mixer.heads, mixer.key_size, mixer.inner_size
    size, keys = inner // heads, heads * numbers
    projected = [(mixer.inner.weight @ x).split(mixer.widths) for x in x_TD]
    mixed = [silu(c) for c in convolved(mixer.convolution, [p[1] for p in projected])]
    states = [torch.zeros(numbers, size) for _ in range(heads)]
    outputs = []
    for (gate, _, decay, rate), m in zip(projected, mixed, strict=True):
        read = []
        for h in range(heads):
            q, k = (part.unflatten(0, (heads, -1))[h] for part in (m[:keys], m[keys : 2 * keys]))
            q, k = q / q.norm(), k / k.norm()
            v = m[2 * keys + h * size : 2 * keys + (h + 1) * size]
            channels = len(decay) // heads
            d = (decay + mixer.decay.step)[h * channels : (h + 1) * channels]
            g = -torch.exp(mixer.decay.rate[h]) * torch.log(1 + torch.exp(d))
            g = g if channels == 1 else -5 * torch.tanh(-g / 5)
            state = torch.exp(g).unsqueeze(1) * states[h]
            beta = 1 / (1 + torch.exp(-rate[h]))
            states[h] = state + beta * torch.outer(k, v - state.T @ k)
            read.append(rms_norm(mixer.norm, states[h].T @ q))
        outputs.append(mixer.output.weight @ (torch.cat(read) * silu(gate)))
    return torch.stack(outputs)


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("taps", [0, 4])
def test_k_is_its_equations(decay, taps):
    fields = {"state_head_dim": 6, "state_size": 5, "convolution": taps, "delta_decay": decay}
    mixer = DeltaMixer(config(pattern="K", **fields))
    randomise(mixer)
    for tokens in (1, 37):
        x = torch.randn(1, tokens, 12)
        assert_close(mixer(x, None, NewTokens.of(x))[0], naive_delta(mixer, x[0]))


# C -------------------------------------------------------------------------------------------


def naive_gated_convolution(mixer: GatedConvolution, x_TD: Tensor) -> Tensor:
    parts = [(mixer.inner.weight @ token).chunk(3) for token in x_TD]
    inner = convolved(mixer.convolution, [before * u for before, _, u in parts])
    return torch.stack(
        [mixer.output.weight @ (p[1] * c) for p, c in zip(parts, inner, strict=True)]
    )


def test_c_is_its_equations():
    mixer = GatedConvolution(config(pattern="C", convolution=3))
    randomise(mixer)
    x = torch.randn(1, 11, 12)
    assert_close(mixer(x, None, NewTokens.of(x))[0], naive_gated_convolution(mixer, x[0]))


# G -------------------------------------------------------------------------------------------


def naive_global(mixer: GlobalLatents, x_TD: Tensor) -> Tensor:
    heads, size = mixer.heads, mixer.latent
    inner = convolved(mixer.convolution, [mixer.inner.weight @ x for x in x_TD])
    raw = [c[heads * size :] for c in inner]
    outputs, reach = [], mixer.config.global_window or len(x_TD) + mixer.window
    for t in range(len(x_TD)):
        blocks, first = 0, max(0, t + 1 - reach)
        if mixer.pool > 1:
            blocks = max(0, -(-(t + 1 - mixer.window) // mixer.pool))
            first = blocks * mixer.pool
        seen = []
        for j in range(max(0, blocks - (reach - mixer.window) // mixer.pool), blocks):
            block = range(j * mixer.pool, (j + 1) * mixer.pool)
            scores = torch.stack([mixer.score.weight[0] @ x_TD[s] for s in block]) + mixer.place
            seen.append(sum(a * raw[s] for a, s in zip(scores.softmax(0), block, strict=True)))
        seen += raw[first : t + 1]
        entries = torch.stack([rms_norm(mixer.latent_norm, c) for c in seen])
        mixed = []
        for h in range(heads):
            query = rms_norm(mixer.query_norm, inner[t][h * size : (h + 1) * size])
            mixed.append((entries @ query / math.sqrt(size)).softmax(0) @ entries)
        outputs.append(mixer.output.weight @ torch.cat(mixed))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "fields",
    [
        *({}, {"attention_convolution": 3}, {"pool": 3, "window": 5}, {"pool": 4, "window": 4}),
        *({"global_window": 6}, {"global_window": 1}, {"global_window": None}),
        *({"pool": 3, "window": 5, "global_window": reach} for reach in (None, 13, 11, 7, 5)),
    ],
    ids=str,
)
def test_g_is_its_equations(fields, monkeypatch):
    mixer = GlobalLatents(config(pattern="G", latent_dim=7, **fields))
    randomise(mixer)
    monkeypatch.setattr("contextlm.models.hybrid.global_latents._QUERIES", 7)
    for tokens in (1, 4, 23):
        x = torch.randn(1, tokens, 12)
        assert_close(mixer(x, None, NewTokens.of(x))[0], naive_global(mixer, x[0]))


def check_pieces(x, keeps, **fields) -> None:
    """G is its equations in uneven pieces; `keeps` looks at the state after so many tokens."""
    mixer = GlobalLatents(config(pattern="G", latent_dim=7, **fields))
    randomise(mixer)
    state, pieces, seen = mixer.new_state(mixer.config), [], 0
    for size in (3, 1, 20, 1, 15):
        piece = x[:, seen : seen + size]
        pieces.append(mixer(piece, state, after(seen, piece)))
        seen += size
        keeps(state, seen)
    assert_close(torch.cat(pieces, dim=1), torch.stack([naive_global(mixer, row) for row in x]))


@pytest.mark.parametrize("reach", [None, 5, 7, 11, 14])
def test_a_pooled_g_keeps_its_window_and_one_latent_a_block(reach, monkeypatch):
    """Also where queries are computed a few at a time; blocks up to a limit, if there is one."""
    monkeypatch.setattr("contextlm.models.hybrid.global_latents._QUERIES", 4)

    def keeps(state, seen):
        blocks = max(0, -(-(seen - 5) // 3))
        most = blocks if reach is None else (reach - 5) // 3
        assert state.entries.shape == (1, min(5, seen), 7 + 1)
        assert state.pooled.shape == (1, min(blocks, most), 7)

    check_pieces(torch.randn(1, 40, 12), keeps, pool=3, window=5, global_window=reach)


@pytest.mark.parametrize("reach", [1, 2, 6, 7])
def test_g_within_a_window_keeps_no_more(reach):
    def keeps(state, seen):
        assert state.entries.shape == (2, min(reach - 1, seen), 7)
        assert state.entries.untyped_storage().nbytes() <= 8 * 2 * reach * 7

    check_pieces(torch.randn(2, 40, 12), keeps, global_window=reach)


# One token ------------------------------------------------------------------------------------

STEPS = [
    ("S", naive_selective, {}),
    ("S", naive_selective, {"convolution": 1}),
    ("R", naive_recurrence, {}),
    ("R", naive_recurrence, {"convolution": 1, "gates": "dense"}),
    ("R", naive_recurrence, {"convolution": 0, "gates": "none"}),
    ("K", naive_delta, {}),
    ("K", naive_delta, {"convolution": 0, "delta_decay": "head"}),
    ("C", naive_gated_convolution, {"convolution": 3}),
    ("C", naive_gated_convolution, {"convolution": 1}),
    ("W", naive_window, {"window": 5}),
    ("W", naive_window, {"window": 1, "qk_norm": False}),
    ("W", naive_window, {"window": 8, "num_key_value_heads": 3, "attention_convolution": 3}),
    ("G", naive_global, {}),
    ("G", naive_global, {"attention_convolution": 3}),
    ("G", naive_global, {"global_window": 5}),
    ("G", naive_global, {"global_window": 1}),
    ("L", naive_latent, {}),
    ("L", naive_latent, {"attention_convolution": 3}),
]
"""Letters that have a compiled form of a token, their equations, and settings."""


def stepping(letter: str, **fields) -> tuple[Mixer, Stepping]:
    """A mixer, and the part of it that has the compiled form."""
    made = config(
        pattern=letter, state_head_dim=6, state_size=5, latent_dim=7, rope_dim=6, **fields
    )
    mixer = made.layer_mixers[0](made)
    randomise(mixer)
    return mixer, mixer.recurrence if isinstance(mixer, SelectiveMixer) else mixer


def counted(part: Stepping, monkeypatch) -> list[int]:
    """Grows with every token that the compiled form does."""
    calls, run = [], part.compiled_step
    monkeypatch.setattr(part, "compiled_step", lambda *given: calls.append(1) or run(*given))
    return calls


@pytest.mark.parametrize(
    ("letter", "naive", "fields"), STEPS, ids=[f"{letter}-{fields}" for letter, _, fields in STEPS]
)
def test_a_token_in_one_compiled_call(letter, naive, fields, monkeypatch):
    """Between chunks and tokens of the plain form; in threads; rows are chosen anew in between."""
    monkeypatch.setattr("contextlm.ops.step.NUMBERS_PER_THREAD", 1)
    monkeypatch.setattr("contextlm.models.hybrid.latent._ROOM", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mixer, part = stepping(letter, **fields)
    calls = counted(part, monkeypatch)
    before, order = torch.randn(3, 7, 12), torch.tensor([2, 0, 0])
    x = torch.cat([before[order], torch.randn(3, 11, 12)], dim=1)
    state, pieces, seen = mixer.new_state(mixer.config), [], 0
    for size in (2, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1):
        if seen == 7:
            state.reorder_cache(order)
        piece = (before if seen < 7 else x)[:, seen : seen + size].contiguous()
        with torch.set_grad_enabled(seen == 12):
            pieces.append(mixer(piece, state, NewTokens.of(piece, past=seen, seen_B=state.counts)))
        seen += size
    # One has gradients, and the one behind it where the state has them.
    assert len(calls) == (11 if part.step_weights._kept else 12)
    assert state.counts.tolist() == [18] * 3
    outputs = torch.cat(pieces, dim=1)
    assert_close(outputs[:, 7:], torch.stack([naive(mixer, row) for row in x])[:, 7:])
    assert_close(outputs[:, :7], torch.stack([naive(mixer, row) for row in before]))


@pytest.mark.parametrize("reach", [1, 2, 6])
def test_a_window_that_slides_stays_within_its_memory(reach, monkeypatch):
    monkeypatch.setattr("contextlm.models.hybrid.latent._ROOM", 4)
    mixer, _ = stepping("G", global_window=reach)
    calls, x = counted(mixer, monkeypatch), torch.randn(2, 40, 12)
    state, pieces = mixer.new_state(mixer.config), []
    with torch.no_grad():
        for seen in range(40):
            piece = x[:, seen : seen + 1].contiguous()
            pieces.append(mixer(piece, state, NewTokens.of(piece, past=seen, seen_B=state.counts)))
            assert state.entries.shape[1] == min(reach - 1, seen + 1)
            assert state.memory.shape[1] <= reach - 1 + 4
    assert len(calls) == 39
    naive = torch.stack([naive_global(mixer, row) for row in x])
    assert_close(torch.cat(pieces, dim=1), naive)


PARTS = {
    "S": ("convolution", "decay", "norm"),
    "R": ("convolution", "recurrence", "recurrence.decay_gate"),
    "K": ("convolution", "decay", "norm"),
    "C": ("convolution",),
    "W": ("query_norm", "key_norm"),
    "G": ("query_norm", "latent_norm"),
    "L": ("norm", "key", "value"),
}


@pytest.mark.parametrize("letter", PARTS)
def test_what_the_compiled_form_of_a_token_does_not_know(letter, monkeypatch):
    """Hooks, choices, functions of attention; weights that are moved or replaced it sees."""
    mixer, part = stepping(letter, attention_convolution=2)
    calls, state = counted(part, monkeypatch), mixer.new_state(mixer.config)

    def token(*, compiled: bool, tolerance: float = 1e-9) -> None:
        x = torch.randn(2, 1, 12, dtype=next(mixer.parameters()).dtype)
        fields = {"past": state.get_seq_length(), "seen_B": state.counts}
        plain = mixer(x, copy.deepcopy(state), NewTokens.of(x, **fields))
        before = len(calls)
        with torch.no_grad():
            out = mixer(x, state, NewTokens.of(x, **fields))
        assert len(calls) == before + compiled
        torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)

    token(compiled=False)  # there is no state yet
    token(compiled=True)
    for name in PARTS[letter]:
        hook = part.get_submodule(name).register_forward_hook(lambda *_: None)
        token(compiled=False)
        hook.remove()
        token(compiled=True)
    for name in part.step_names:
        path, _, last = name.rpartition(".")
        owner = part.get_submodule(path)
        setattr(owner, last, torch.nn.Parameter(getattr(owner, last) + 0.1))
        token(compiled=True)
        getattr(owner, last).data = getattr(owner, last).data - 0.2
        token(compiled=True)
    monkeypatch.setenv("CONTEXTLM_BACKEND", "context_scan=eager")
    token(compiled=False)
    monkeypatch.setenv("CONTEXTLM_BACKEND", "context_scan=numba")
    token(compiled=True)
    if letter in "WGL":
        mixer.config._attn_implementation = "eager"
        token(compiled=False)
        mixer.config._attn_implementation = "sdpa"
    mixer.float()
    state.reset()
    token(compiled=False, tolerance=1e-5)
    for _ in range(3):
        token(compiled=True, tolerance=1e-5)
    mixer.bfloat16()
    state.reset()
    token(compiled=False)
    token(compiled=False)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_module_is_called_at_every_token_where_somebody_listens(qk_norm):
    """And nothing else changes by it: compiled forms read weights only of modules without hooks."""
    sizes = {"state_head_dim": 6, "state_size": 5, "latent_dim": 7, "rope_dim": 6}
    fields = {"attention_convolution": 2, "qk_norm": qk_norm, "tie_word_embeddings": False}
    model = ContextHybridForCausalLM(config(pattern="SrkcwGL", **sizes, **fields)).eval()
    randomise(model)
    ids, cache = torch.randint(0, 53, (2, 6)), model.new_cache()
    expected = model(ids).logits[:, 5:]
    with torch.no_grad():
        for piece in ids[:, :5].split([4, 1], dim=1):
            model(piece, use_cache=True, **{CACHE: cache})
        for name, module in model.named_modules():
            heard = []
            hook = module.register_forward_hook(lambda *_, heard=heard: heard.append(1))
            again = {CACHE: copy.deepcopy(cache)}
            assert_close(model(ids[:, 5:], use_cache=True, **again).logits, expected)
            assert heard or isinstance(module, torch.nn.ModuleList), name
            hook.remove()
        silent = {it for it in model.modules() if not isinstance(it, torch.nn.ModuleList)}
        hook = register_module_forward_hook(lambda module, *_: silent.discard(module))
        model(ids[:, 5:], use_cache=True, **{CACHE: cache})
        hook.remove()
        assert silent == set()


def test_tokens_taken_back_leave_room_for_others():
    model = ContextHybridForCausalLM(config(pattern="LL", latent_dim=7, rope_dim=6)).eval()
    ids, cache = torch.randint(0, 53, (2, 30)), model.new_cache()
    with torch.no_grad():
        for start, stop, back in ((0, 20, 0), (20, 21, 0), (21, 22, -5), (17, 18, 0), (18, 29, -2)):
            piece = ids[:, start:stop]
            logits = model(piece, use_cache=True, **{CACHE: cache}).logits
            assert_close(logits, model(ids[:, :stop]).logits[:, start:])
            cache.crop(back)
        logits = model(ids[:, 27:28], use_cache=True, **{CACHE: cache}).logits
        assert_close(logits, model(ids[:, :28]).logits[:, 27:])
    assert cache.layers[0].entries.shape[1] == cache.get_seq_length() == 28


# Letters -------------------------------------------------------------------------------------


def test_small_letters_go_without_a_feed_forward_part():
    model = ContextHybridForCausalLM(config(pattern="sSw", state_head_dim=6))
    parts = [layer.feed_forward is not None for layer in model.model.layers]
    assert parts == [False, True, False]
    assert [type(layer.mixer) for layer in model.model.layers] == model.config.layer_mixers
    assert model.config.num_hidden_layers == 3


def test_a_letter_of_ones_own(monkeypatch):
    """A mixer from outside in a pattern beside ours, with settings of its own."""
    monkeypatch.setattr(mixer_module, "_MIXERS", dict(mixer_module._MIXERS))

    @register_mixer("X")
    class Shift(Mixer):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.tensor(config.mixer_settings["scale"]))

        @classmethod
        def new_state(cls, config):
            return TapsLayer()

        def forward(self, x_BTD, state, new):
            return self.scale * x_BTD

    made = config(pattern="xRX", mixer_settings={"scale": 2.0})
    model = ContextHybridForCausalLM(made).eval()
    assert model.model.layers[0].mixer.scale == 2
    with pytest.raises(ValueError, match="'X' is registered already"):
        register_mixer("X")(Shift)
    for wrong in ("x", "XY", "1"):
        with pytest.raises(ValueError, match="one capital letter"):
            register_mixer(wrong)(Shift)


# The whole -----------------------------------------------------------------------------------


def test_the_model_is_its_layers_written_out():
    model = ContextHybridForCausalLM(config(pattern="RWL", window=5, latent_dim=7, rope_dim=6))
    model.eval()
    randomise(model)
    ids = torch.randint(0, 53, (21,))
    stream = model.model.embed_tokens.weight[ids]
    naive = {"R": naive_recurrence, "W": naive_window, "L": naive_latent}
    for kind, layer in zip("RWL", model.model.layers, strict=True):
        normed = torch.stack([rms_norm(layer.mixer_norm, x) for x in stream])
        stream = stream + naive[kind](layer.mixer, normed)
        normed = torch.stack([rms_norm(layer.feed_forward_norm, x) for x in stream])
        part = layer.feed_forward
        gate, up = normed @ part.gate_proj.weight.T, normed @ part.up_proj.weight.T
        stream = stream + (gate / (1 + torch.exp(-gate)) * up) @ part.down_proj.weight.T
    stream = torch.stack([rms_norm(model.model.norm, x) for x in stream])
    assert_close(model(ids.unsqueeze(0)).logits[0], stream @ model.lm_head.weight.T)


def test_an_exported_graph_serves_all_lengths():
    model = ContextHybridForCausalLM(config(pattern="RWL", window=5, latent_dim=7, rope_dim=6))
    model.eval()
    ids = torch.randint(0, 53, (1, 23))
    length = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    graph = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=length)
    for tokens in (2, 5, 6, 23, 40):
        ids = torch.randint(0, 53, (1, tokens))
        assert_close(graph.module()(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize("pattern", ["RW", "LR"])
def test_layers_may_lie_on_several_devices(pattern):
    """The meta device stands for a second one: it refuses tensors of another."""
    model = ContextHybridForCausalLM(config(pattern=pattern, latent_dim=7, rope_dim=6)).eval()
    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        add_hook_to_module(part.to("meta"), AlignDevicesHook(torch.device("meta")))
    ids, mask = torch.randint(0, 53, (2, 9)), torch.ones(2, 11)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask[:, :9], use_cache=True).past_key_values
    for tokens in (10, 11):
        outputs = model(
            ids[:, :1], attention_mask=mask[:, :tokens], past_key_values=cache, use_cache=True
        )
    assert outputs.logits.shape == (2, 1, 53)


def test_without_an_l_memory_is_constant_and_counted():
    model = ContextHybridForCausalLM(config(pattern="RWRW", window=6)).eval()
    cache, sizes = None, []
    for size in (40, 1, 500, 1):
        cache = feed(model, torch.ones(1, size, dtype=torch.long), cache)[1]
        sizes.append(cache_bytes(cache))
    assert len(set(sizes)) == 1
    # Two R: 4 D each; two W: five tokens of one key and one value of 4; four counters.
    assert sizes[0].logical == sizes[0].resident == 8 * (2 * 4 * 12 + 2 * 5 * 2 * 4 + 4)


def test_r_keeps_its_state_in_float32_under_bfloat16_weights():
    mixer = recurrent().bfloat16()
    state = RecurrenceLayer()
    x = torch.randn(1, 9, 12).bfloat16()
    mixer(x, state, NewTokens.of(x))
    assert state.state.dtype == torch.float32
    assert state.taps.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"pattern": ""}, "pattern"),
        ({"pattern": "RXW"}, "'X'"),
        ({"pattern": "W", "head_dim": 3}, "width of a head"),
        ({"pattern": "L", "rope_dim": 5}, "rope_dim"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"convolution": -1}, "convolution"),
        ({"pattern": "R", "hidden_size": 13}, "num_attention_heads"),
        ({"pattern": "S", "state_head_dim": 7}, "state_head_dim"),
        ({"pattern": "C", "convolution": 0}, "convolution"),
        ({"pattern": "G", "pool": 65}, "pool"),
        ({"pattern": "G", "global_window": 0}, "global_window"),
        ({"pattern": "G", "pool": 2, "global_window": 63}, "global_window"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named(fields, culprit):
    with pytest.raises(Exception, match=culprit):
        config(**fields)


def test_a_graph_of_pooled_latents_is_for_one_document_a_row():
    """Clients give positions also where they only count up."""
    model = ContextHybridForCausalLM(config(pattern="g", latent_dim=7, pool=3, window=5)).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, positions = torch.randint(0, 53, (2, 11)), torch.arange(11).unsqueeze(0)
    logits = compiled(ids, position_ids=positions, use_cache=False).logits
    assert_close(logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="for one document a row"):
        compiled(ids, position_ids=positions % 6, use_cache=False)


def test_autocast_is_heeded_at_a_token_too():
    model = ContextHybridForCausalLM(config(pattern="SwG", state_head_dim=6)).float().eval()
    ids, cache = torch.randint(0, 53, (1, 6)), model.new_cache()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for piece in ids.split([5, 1], dim=1):
            logits = model(piece, use_cache=True, **{CACHE: cache}).logits
            assert logits.dtype == torch.bfloat16
