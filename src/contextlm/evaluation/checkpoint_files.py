"""A checkpoint folder's files, looked at as what a stranger may have made, before any is loaded.

Weights are read from safetensors files alone: other formats are pickles, which run code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from contextlm.base.errors import InputError
from contextlm.base.files import is_file
from contextlm.base.visible import shown

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Settings by which transformers loads code from the hub, or weights from another file.
_NAMES_CODE = ("attn_implementation", "experts_implementation")
_NAMES_FILES = "transformers_weights"


def check_parts(folder: Path) -> None:
    """An `InputError` that names what is missing, unless all parts of a checkpoint are there.

    An adapter is none: transformers would fetch the model that it names.
    """
    if is_file(folder / "adapter_config.json"):
        raise InputError(
            f"{folder}: adapter_config.json makes it an adapter, not a whole model: merge it into "
            "its model first"
        )
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        if is_file(folder / name) or (name == WEIGHTS and is_file(folder / INDEX)):
            continue
        if name == WEIGHTS:
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
            if pickles:
                raise InputError(
                    f"{folder}: {pickles[0]} may be a pickle, which can run code when it is read, "
                    f"and is never loaded: save the weights as {WEIGHTS}"
                )
        raise InputError(f"{folder}: not a checkpoint folder: {name} is missing")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; an `InputError` that names it if it holds anything else."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value


def check_names_no_code(config: dict[str, Any], file: Path) -> None:
    """Refuse a configuration that names code on the hub, or weights outside the usual files.

    Raises:
        InputError: it does, at whatever depth; the message names `file` and the key.
    """
    for key, value in _entries(config):
        if key.endswith(_NAMES_CODE) and "/" in json.dumps(value):
            raise InputError(f"{file}: {key} names code to load ({shown(value)}): remove it")
        if key == _NAMES_FILES:
            raise InputError(f"{file}: {key} names other weights ({shown(value)}): remove it")


def _entries(value: Any) -> list[tuple[str, Any]]:
    """Keys and values of all mappings inside `value`."""
    found, todo = [], [value]
    while todo:
        outer = todo.pop()
        if isinstance(outer, dict):
            found += list(outer.items())
            todo += outer.values()
        elif isinstance(outer, list):
            todo += outer
    return found


def check_weights(folder: Path) -> int:
    """How many numbers the files of weights hold, once each is known to be there and whole.

    Raises:
        InputError: one is missing, damaged, or outside the folder; the message names it.
    """
    names = {WEIGHTS}
    if not is_file(folder / WEIGHTS):
        shards = read_object(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise InputError(f"{folder / INDEX}: it has no weight_map")
        names = set(shards.values())
    total = 0
    for name in sorted(names):
        if PurePath(name).name != name:
            raise InputError(f"{folder / INDEX}: weight_map leads out of the folder: {shown(name)}")
        try:
            # What is opened is no mapping: it has keys() and cannot be iterated.
            with safe_open(folder / name, framework="pt") as stored:
                shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder / name}: damaged or missing: {error}") from None
        total += sum(map(math.prod, shapes))
    return total
