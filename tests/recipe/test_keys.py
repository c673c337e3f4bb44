"""`contextlm list keys`: all that a recipe may say is listed, and docs/keys.md is just that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contextlm.cli import app
from contextlm.cli.listing import keys_page
from contextlm.cli.shell import execute
from contextlm.models.base import registry
from contextlm.models.build import config_fields
from contextlm.recipe.keys import recipe_keys
from contextlm.recipe.loading import builtin_recipes, load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
FREE = ("model.", "training.", "reported.", "reported_epochs.")  # of a contender: any keys


def test_the_page_is_what_the_command_prints() -> None:
    written = PAGE.read_text("utf-8")
    assert written == keys_page(), "contextlm list keys --markdown > docs/keys.md"


def keys_of(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = above + key
        yield name
        if isinstance(value, dict) and not f"{name}.".startswith(
            tuple(f"contenders.NAME.{free}" for free in FREE)
        ):
            yield from keys_of(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            place = "NAME" if key == "contenders" else "N"
            for entry in value:
                yield from keys_of(entry, f"{name}.{place}.")


def test_every_key_of_every_recipe_is_listed_with_a_type_and_a_meaning() -> None:
    keys = {key.name: key for key in recipe_keys()}
    used = set()
    for name in builtin_recipes():
        used |= set(keys_of(load_recipe(name).model_dump(mode="json")))
    assert used - keys.keys() == {"scale", "departs_from_full", "written"}
    assert len(used) > 80
    assert [key.name for key in keys.values() if not (key.type and key.meaning)] == []
    assert keys["training.schedule"].type == "constant | linear | cosine | wsd"
    assert keys["training.betas"].type == "list of 2 numbers >= 0 < 1"
    assert keys["samples.train"].type == "whole number > 0"
    assert (keys["tuning.share"].default, keys["tokenizer"].default) == ("0.25", "required")


def test_every_field_of_our_models_has_a_meaning() -> None:
    fields = [(name, field) for name in registry() for field in config_fields(name)]
    assert [(name, field.name) for name, field in fields if not field.meaning] == []
    (layers,) = [f for f in config_fields("llama") if f.name == "num_hidden_layers"]
    assert (layers.type, layers.default) == ("int", "32")
    assert "layers" in layers.meaning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "trainin.epochs"], "did you mean 'training.epochs'?"),
        (["keys", "model.lama"], "did you mean 'llama'?"),
        (["keys", "training", "--markdown"], "--markdown: prints all keys"),
        (["models", "llama"], "'llama': goes with `contextlm list keys` only"),
    ],
)
def test_what_is_not_there_is_one_line(capsys, arguments, message) -> None:
    assert execute(app, ["list", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_prefix_is_a_part(capsys) -> None:
    assert execute(app, ["list", "keys", "tuning", "--json"]) == 0
    names = [key["name"] for key in json.loads(capsys.readouterr().out)["keys"]]
    assert names[0] == "tuning"
    assert all(name.startswith("tuning.") for name in names[1:])
    assert execute(app, ["list", "keys", "model.context_hybrid"]) == 0
    assert "pattern" in capsys.readouterr().out
