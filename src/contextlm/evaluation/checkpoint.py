"""Opening a saved checkpoint, whose files may be a stranger's, and the note on how it was trained.

Only a local folder is read; no network is touched and no code from the folder runs. Weights are
read from safetensors files alone: other formats are pickles, which run code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from contextlm import models as models  # registers our architectures with the Auto classes
from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, is_out_of_memory
from contextlm.base.files import is_file, write_json
from contextlm.base.visible import shown
from contextlm.compress.checkpoint import TYPE as COMPRESSED  # registers what keeps a policy
from contextlm.data.hub import from_hub
from contextlm.data.tokenizers import vocab_entries
from contextlm.models.build import (
    check_values,
    config_class,
    meta_model,
    reason,
    take_compiled_scans,
)
from contextlm.results.run_files import first_problem

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOTE = "contextlm.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Settings by which transformers loads code from the hub, or weights from another file.
_NAMES_CODE = ("attn_implementation", "experts_implementation")
_NAMES_FILES = "transformers_weights"
# Quantised weights are stored packed, several to a number.
_MOST_PACKED = 16


def load_checkpoint(folder: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, ready to evaluate, and its tokenizer.

    Raises:
        InputError: it is not a checkpoint folder, or a part is missing or damaged or does not fit
            the others; the message names the file.
    """
    place = resolve_device(device)
    # Asked before anything is loaded: weights that a file lacks would be drawn at random, however
    # large config.json says that they are.
    stored = check_files(folder)
    config = read_config(folder)
    tokenizer = _read_tokenizer(folder)
    weights = WEIGHTS if is_file(folder / WEIGHTS) else INDEX
    wanted = sum(parameter.numel() for parameter in meta_model(config).parameters())
    if wanted > _MOST_PACKED * stored:
        raise InputError(f"{folder}: {weights} does not fit config.json")
    take_compiled_scans(config)
    with _named(f"{folder}: cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the misfits are told by name
            output_loading_info=True,
        )
    if info["mismatched_keys"] or info["missing_keys"]:
        raise InputError(f"{folder}: {weights} does not fit config.json")
    entries = model.get_input_embeddings().weight.shape[0]
    if vocab_entries(tokenizer) > entries:
        raise InputError(
            f"{folder}: tokenizer.json has {vocab_entries(tokenizer)} entries, the model {entries}"
        )
    model.generation_config = _plain_generation(folder, model, entries)
    return model.to(place).eval(), tokenizer


def fetched(name: str) -> Path:
    """The folder of a model of the hub: its configuration, tokenizer and safetensors, no code.

    Raises:
        InputError: it is neither a folder here nor a model's name.
        RunError: the hub could not be reached, or did not deliver.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError(f"model {shown(name, 300)}: no such folder")

    def load(online: bool) -> Path:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not online))

    return from_hub(f"model {shown(name)}, no folder here", "give a folder", load)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into an `InputError` that begins so."""
    try:
        yield
    except Exception as error:  # transformers and tokenizers raise anything, plain Exception too
        if is_out_of_memory(error):
            raise
        raise InputError(f"{what}: {reason(error)}") from None


def _plain_generation(folder: Path, model: PreTrainedModel, entries: int) -> GenerationConfig:
    """Only the special tokens of the checkpoint's generation settings.

    The rest, such as beams, penalties, or another model as an assistant, is asked for on the
    command line or not at all.
    """
    given = model.generation_config or GenerationConfig()
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(given, name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in listed):
            file = folder / "generation_config.json"
            raise InputError(f"{file}: {name}: expected an entry's number, got {shown(value)}")
        known = [token for token in listed if 0 <= token < entries]
        tokens[name] = known[0] if len(known) == 1 else known or None
    return GenerationConfig(**tokens)


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint, of a model that can be built.

    Raises:
        InputError: there is none that can be used; the message names the file.
    """
    file = folder / "config.json"
    given = _read_object(file)
    model_type = given.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{file}: it names no model_type")
    _check_names_no_code(given, file)
    with _named(str(file)):
        if model_type != COMPRESSED:
            config_class(model_type)
        check_values(given)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        meta_model(config)
    return config


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    _read_object(file)
    if is_file(settings):
        _read_object(settings)
    with _named(f"{file}: not a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{settings}: it asks for no fast tokenizer")
    with _named(f"{settings}: damaged, the tokenizer cannot be used"):
        tokenizer.decode(tokenizer("a")["input_ids"])  # some settings are read only with text
    return tokenizer


def _check_parts(folder: Path) -> None:
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


def _read_object(file: Path) -> dict[str, Any]:
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


def check_files(folder: Path) -> int:
    """How many numbers a checkpoint's files of weights hold, once all its parts are there.

    Raises:
        InputError: a part is missing, or a file of weights damaged; the message names it.
    """
    _check_parts(folder)
    return _check_weights(folder)


def _check_names_no_code(config: dict[str, Any], file: Path) -> None:
    """Refuse a configuration that names code on the hub, or other weights, at whatever depth."""
    todo: list[Any] = [config]
    while todo:
        outer = todo.pop()
        todo += outer.values() if isinstance(outer, dict) else outer
        for key, value in outer.items() if isinstance(outer, dict) else ():
            if key.endswith(_NAMES_CODE) and "/" in json.dumps(value):
                raise InputError(f"{file}: {key} names code to load ({shown(value)}): remove it")
            if key == _NAMES_FILES:
                raise InputError(f"{file}: {key} names other weights ({shown(value)}): remove it")
        todo = [inner for inner in todo if isinstance(inner, (dict, list))]


def _check_weights(folder: Path) -> int:
    """How many numbers the files of weights hold, once each is known to be there and whole."""
    names = {WEIGHTS}
    if not is_file(folder / WEIGHTS):
        shards = _read_object(folder / INDEX).get("weight_map")
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


class TrainingNote(BaseModel):
    """What a checkpoint remembers of its training: its weights mean nothing without it.

    Attributes:
        target_offset: how many tokens ahead it predicts.
        unit: whether a sample was a window of a stream, a line of text, or a question.
        stream: whether its contexts ran on from window to window.
        sequence_length: tokens of a sample; None where the note is older than this.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    target_offset: PositiveInt = 1
    unit: Literal["windows", "lines", "answers"] = "windows"
    stream: bool = False
    sequence_length: PositiveInt | None = None

    def remarks(self) -> list[str]:
        """What makes figures on windows, each from its beginning, others than the run's."""
        said = []
        if self.target_offset > 1:
            said.append(f"it predicts the token {self.target_offset} ahead, and is scored on that")
        if self.unit == "lines":
            said.append("it was trained on lines, each from its beginning; here it reads windows")
        if self.unit == "answers":
            said.append("it was trained to answer questions of synthetic tasks, nothing else")
        if self.stream:
            said.append("its contexts ran on through the text; here each window starts anew")
        return said


def write_trained(folder: Path, note: TrainingNote) -> None:
    """Put the note into a checkpoint's folder."""
    write_json(folder / NOTE, note.model_dump())


def read_trained(folder: Path) -> TrainingNote:
    """The note in a checkpoint's folder; the defaults where another program made the checkpoint.

    Raises:
        InputError: the note is damaged; the message names the file.
    """
    file = folder / NOTE
    if not file.is_file():
        return TrainingNote()
    try:
        return TrainingNote.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None
