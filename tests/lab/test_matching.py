"""Widths found so that a contender is as large as the baseline."""

from __future__ import annotations

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.lab.estimate import count_parameters
from contextlm.lab.jobs import Planner
from contextlm.lab.matching import matched, parameters
from contextlm.lab.preparation import prepare
from contextlm.models.build import build_config, meta_model
from contextlm.recipe.loading import load_recipe

CONTENDER = {
    "llama": "{type: llama, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: %d}",
    # Its parameters grow with the square of its width.
    "mamba": "{type: mamba, num_hidden_layers: 1, hidden_size: %d}",
}


def wanted(quick, kind: str, match: str, start: int = 8):
    changed = f"contenders.ours={{model: {CONTENDER[kind] % start}, phase1: null, match: {match}}}"
    base = "contenders.base.model={n_embd: 32, n_layer: 3}"
    null = ["contenders.ours.model=null"]  # the recipe's own is of another type
    return load_recipe(quick, overrides=[base, *null, changed])


@pytest.mark.parametrize("kind", CONTENDER)
@pytest.mark.parametrize("start", [1, 8, 4000])
def test_the_nearest_width_of_all_is_chosen(quick, kind, start):
    field = "intermediate_size" if kind == "llama" else "hidden_size"
    recipe = wanted(quick, kind, f"{{field: {field}, within: 0.2, multiple_of: 3}}", start)
    target = parameters(meta_model(build_config(recipe.baseline.model, 300)))

    def distance(value: int) -> int:
        model = {**recipe.contender("ours").model, field: value}
        return abs(parameters(meta_model(build_config(model, 300))) - target)

    contenders, found = matched(recipe, 300)
    chosen = found["ours"].value
    assert contenders[1].model[field] == chosen
    assert chosen % 3 == 0
    assert distance(chosen) <= min(distance(chosen - 3), distance(chosen + 3))
    assert abs(found["ours"].parameters - target) == distance(chosen)


def test_what_was_chosen_is_said_and_decides_the_job(quick):
    recipe = wanted(quick, "llama", "{field: intermediate_size}")
    prepared = prepare(recipe, torch.device("cpu"))
    (match,) = prepared.matches.values()
    job = Planner(prepared).jobs[1]
    assert job.decides["model"]["intermediate_size"] == match.value
    assert match.sentence.startswith(f"ours: intermediate_size {match.value:,} gives ")
    counts = count_parameters(recipe)
    assert counts[1].matched == {"intermediate_size": match.value}
    assert counts[0].versus_baseline_percent == 0
    percent = counts[1].versus_baseline_percent
    assert percent == pytest.approx(100 * (counts[1].total / counts[0].total - 1))
    assert abs(percent) <= 2
    assert prepared.recipe.contender("ours").match is not None  # the recipe stays as written


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("{field: intermediat_size}", "match: intermediat_size: no whole number of model type"),
        ("{field: vocab_size}", "match: vocab_size: is the tokenizer's"),
        ("{field: rms_norm_eps}", "match: rms_norm_eps: no whole number"),
        ("{field: eos_token_id}", "match: eos_token_id: does not change the number of parameters"),
        (
            "{field: intermediate_size, within: 0.0001, multiple_of: 64}",
            r"contenders\.ours: match: not within 0\.01%: ours: intermediate_size \d+ gives",
        ),
        ("{field: num_attention_heads}", "match: .*num_attention_heads"),
        ("{field: hidden_size}", r"match: hidden_size \d+: .*\(`multiple_of` makes hidden_size a"),
        ("{field: intermediate_size, width: 3}", "unknown key 'contenders.ours.match.width'"),
    ],
)
def test_what_cannot_be_matched_names_contender_and_field(quick, match, message):
    with pytest.raises(InputError, match=message):
        matched(wanted(quick, "llama", match), 300)


def test_a_field_without_effect_is_no_width_of_a_model_that_is_too_large_either(quick):
    recipe = wanted(quick, "llama", "{field: max_position_embeddings, within: 0.9}", 4000)
    with pytest.raises(InputError, match="max_position_embeddings: does not change the number"):
        matched(recipe, 300)


def test_the_baseline_matches_nobody(quick):
    with pytest.raises(InputError, match=r"contenders\.base\.match: the baseline is what others"):
        load_recipe(quick, overrides=["contenders.base.match={field: n_inner}"])
