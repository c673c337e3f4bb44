"""Models that keep a policy: they train as they decode, and open again as what was saved."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, build, in_pieces, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from contextlm import CompressedCache, compressed_model
from contextlm.base.errors import InputError
from contextlm.compress.base import parse_policy
from contextlm.compress.checkpoint import TYPE, CompressedConfig, plain_config
from contextlm.evaluation.memory import cache_bytes
from contextlm.models.stub import NAME

LENGTH = 61
# Of every kind of policy that can be trained under: what it keeps, what it rebuilds, and both.
TRAINED = ("latent:9", "window:8,sinks:2", "interval:8,5", "representatives:8", "window:8+latent:9")


def calibration() -> torch.Tensor:
    return tokens(6, 64)


def kept(name: str, spec: str, dtype: torch.dtype = torch.float64) -> Any:
    return compressed_model(build(name, dtype=dtype), spec, calibration=calibration())


@pytest.mark.parametrize("spec", TRAINED)
@pytest.mark.parametrize("name", ["smollm", "qwen3", "gpt_neox"])
def test_training_sees_what_decoding_sees(name: str, spec: str) -> None:
    model, ids = kept(name, spec), tokens(2, LENGTH)
    decoded, cache = in_pieces(model, ids, [30, 1, 17, 1])
    model.train()
    model.zero_grad()
    trained = model(ids, use_cache=False).logits
    torch.testing.assert_close(trained, decoded, rtol=1e-9, atol=1e-9)
    with CompressedCache(build(name, dtype=torch.float64), spec, calibration=calibration()) as held:
        own = held.new_cache()
        in_pieces(held.readers[0].attention.base, ids, [30, 1, 17, 1], own)
    assert cache_bytes(cache) == cache_bytes(own)  # it is the policy's cache, not the plain one
    # No token sees a later one, and all that the policy has of its own learns.
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
    torch.testing.assert_close(model(changed, use_cache=False).logits[:, :-1], trained[:, :-1])
    trained.square().sum().backward()
    own_weights = [p for n, p in model.named_parameters() if "cache_weights" in n]
    assert bool(own_weights) == ("latent" in spec)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own_weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_a_policy_opens_as_it_was_saved(name: str, tmp_path: Path) -> None:
    spec = "window:8,sinks:2+latent:9"
    plain, ids = build(name), tokens(2, 40)
    model = compressed_model(plain, spec, calibration=calibration())
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(model)
    assert isinstance(opened, type(plain))
    assert opened.config.model_type == TYPE
    assert opened.config.plain_type == plain.config.model_type
    opened.generation_config.eos_token_id = None
    made = {}
    with CompressedCache(plain, spec, calibration=calibration()):
        expected = plain.generate(ids, max_new_tokens=4, do_sample=False)
        logits = plain(ids).logits.detach()
    for which, each in {"opened": opened, "copied": copy.deepcopy(model)}.items():
        made[which] = each.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(made[which], expected), which
        torch.testing.assert_close(each(ids).logits, logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(decoder(ids)[0], model.base_model(ids)[0])


def test_exact_limits_are_the_plain_model_before_any_training() -> None:
    plain, ids = build("qwen3"), tokens(2, 40)
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
    for spec in ("latent:100%", "window:100"):
        model = compressed_model(plain, spec, calibration=calibration())
        assert {p.data_ptr() for p in model.parameters()}.isdisjoint(
            p.data_ptr() for p in plain.parameters()
        )
        torch.testing.assert_close(
            in_pieces(model, ids, [13, 1])[0], expected, rtol=1e-4, atol=1e-4
        )


def test_ranks_that_were_spread_are_kept(tmp_path: Path) -> None:
    model = kept("llama", "latent:25%,spread", torch.float32)
    ranks = model.config.cache_ranks
    assert sum(ranks) == 2 * 8
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).cache_ranks == ranks
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name


def test_the_module_beside_the_weights_opens_it(tmp_path: Path) -> None:
    kept("llama", "window:8", torch.float32).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert named == {"AutoConfig": f"{NAME}.CompressedConfig"}
    assert runpy.run_path(str(tmp_path / f"{NAME}.py"))["CompressedConfig"] is CompressedConfig


@pytest.mark.parametrize(
    "given",
    [{"plain_type": "gpt5"}, {"plain_type": "llama"}, {"plain_type": "llama", "cache_policy": 1}],
)
def test_a_configuration_that_names_no_model_or_policy_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plain_type"):
        CompressedConfig.from_dict({"model_type": TYPE, **given})


def test_a_second_policy_is_refused() -> None:
    model = kept("llama", "window:8", torch.float32)
    for put in (CompressedCache, compressed_model):
        with pytest.raises(InputError, match="keeps a policy of its own, window:8, and decodes by"):
            put(model, "latent:9", calibration=calibration())


def test_a_configuration_without_its_policy_is_the_plain_one() -> None:
    plain = build("llama").config
    compressed = kept("llama", "latent:9", torch.float32).config
    assert plain_config(compressed).to_dict() == plain.to_dict()
    assert plain_config(plain) is plain


@pytest.mark.parametrize("spec", ["evict:20", "int8", "window:8+int4"])
def test_a_policy_that_training_could_not_see_is_refused(spec: str) -> None:
    policy = parse_policy(spec)
    with pytest.raises(InputError, match=r"cannot be healed.*full, input, interval, latent, .*can"):
        policy.check_training()
    assert kept("llama", spec, torch.float32).config.cache_policy == spec  # it can be kept


def test_latents_read_no_adapter() -> None:
    """Absorbing would read the queries' projection past its adapter."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'peft>=0.19'")
    model, ids = kept("gpt_neox", "window:20+latent:4", torch.float32), tokens(1, 30)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        pieces = in_pieces(model, ids, [10, 1])[0]
        merged = adapted.merge_and_unload()(ids, use_cache=False).logits
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-3)
