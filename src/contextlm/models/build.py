"""From a recipe's `model` entry to a configuration and a model, ours or transformers' own."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.visible import shortened, shown
from contextlm.models.base import registry

# transformers' own architectures that the documentation and the tests speak of; any other causal
# language model of transformers can be named too.
_BASELINES = {
    "gpt_neox": "GPT-NeoX (Pythia): multi-head attention, rotary positions, parallel residual",
    "gpt2": "GPT-2: multi-head attention, learned positions",
    "llama": "Llama: grouped-query attention (num_key_value_heads), rotary positions, gated FFN",
    "mistral": "Mistral: grouped-query attention with an optional sliding window",
    "mamba": "Mamba: selective state space, no attention",
}

# What constructors and forward passes raise when a configuration's values do not fit together.
_MISFITS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
)

_FIELD = re.compile(r"^Field '(\w+)' expected")
_SEVERAL = re.compile(r"^Field '(\w+)' with value (.*?) doesn't match any type in (\([^)]*\))")
_PARTS = ("layer", "expert")  # of which each is a module, or several
_AT_LEAST_ONE = ("head", "embd", "hidden_size", "vocab_size", "context_dim", "positions")
_MOST_PARTS = 10_000
_LARGEST_SIZE = 2**31 - 1

# Spellings that configurations accept beside their fields and turn into `rope_parameters`.
_ROTARY_KEYS = ("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base")


def baseline_types() -> dict[str, str]:
    """transformers' architectures that recipes commonly name, each with one line of description."""
    return dict(_BASELINES)


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a model type, ours or transformers'.

    Raises:
        InputError: no causal language model of that type is known.
    """
    ours = registry()
    if model_type in ours:
        return ours[model_type].config
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CONFIG_MAPPING[model_type]
    raise unknown_name("model type", model_type, [*ours, *_BASELINES])


@dataclass(frozen=True)
class ConfigField:
    """A field of a model type's configuration; `meaning` is empty where its author says nothing."""

    name: str
    type: str
    default: str
    meaning: str


def config_fields(model_type: str) -> list[ConfigField]:
    """What a recipe's `model` entry of that type may name, but for what all configurations have.

    Raises:
        InputError: no causal language model of that type is known.
    """
    kind = config_class(model_type)
    meanings: dict[str, str] = {}
    own: set[str] = set()
    for base in reversed(kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]):
        meanings |= _meanings(inspect.getdoc(base) or "")
        own |= vars(base).get("__annotations__", {}).keys()
    return [
        ConfigField(
            f.name,
            _in_words(f.type),
            json.dumps(f.default, default=str),
            meanings.get(f.name, ""),
        )
        for f in dataclass_fields(kind)
        if f.name in own and f.default is not MISSING
    ]


_TOLD = re.compile(r"^ +(\w+)(?: \(.*?\))?: *(.*(?:\n(?! +\w+(?: \(.*?\))?:(?: |$)).+)*)", re.M)


def _meanings(docstring: str) -> dict[str, str]:
    """What the section on arguments says of each, ours or transformers' way of writing it."""
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in _TOLD.findall(section)}


def _in_words(annotation: Any) -> str:
    words = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return words.replace("typing.", "").replace("transformers.modeling_rope_utils.", "")


def build_config(model: Mapping[str, Any], vocab_size: int, **token_ids: int) -> PreTrainedConfig:
    """The configuration that a recipe's `model` entry describes.

    Args:
        model: `type`, and fields of that architecture's configuration.
        vocab_size: of the model, unless `model` names its own.
        **token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        InputError: an unknown type or field, or values that do not fit together.
    """
    given = dict(model)
    model_type = given.pop("type")
    kind = config_class(model_type)
    known = {field.name for field in dataclass_fields(kind)} | set(kind.attribute_map)
    # What follows from other fields may be given too, where it can be set (and so be checked).
    known |= {name for name, it in vars(kind).items() if isinstance(it, property) and it.fset}
    for key in given:
        if key not in known and key not in _ROTARY_KEYS:
            raise unknown_name(f"field of model type {model_type!r}:", key, sorted(known))
    values: dict[str, Any] = {"vocab_size": vocab_size, **token_ids, **given}
    check_values(values)
    try:
        return kind(**values)
    except (StrictDataclassError, *_MISFITS) as error:
        raise InputError(f"model type {model_type!r}: {reason(error)}") from None


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse what would take minutes or all memory to turn out wrong, or turn out wrong unclearly.

    Args:
        values: fields of a configuration.

    Raises:
        InputError: it names the field.
    """
    for key, value in values.items():
        parts = any(part in key for part in _PARTS)
        if isinstance(value, int) and abs(value) > (_MOST_PARTS if parts else _LARGEST_SIZE):
            most = _MOST_PARTS if parts else _LARGEST_SIZE
            raise InputError(f"{key} {value} is beyond all use: at most {most:,}")
        least = 0 if parts else 1 if any(part in key for part in _AT_LEAST_ONE) else -_LARGEST_SIZE
        if isinstance(value, int) and value < least:
            raise InputError(f"{key} {value}: expected at least {least}")
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            kind = getattr(torch, value.removeprefix("torch."), None)
            if value != "auto" and not isinstance(kind, torch.dtype):
                raise InputError(f"{key}: no type of torch is called {shown(value)}")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: to count them, or to see whether all fits.

    Raises:
        InputError: the configuration's values do not fit together.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except _MISFITS as error:
        raise _misfit(config, error) from None


def check_forward(model: PreTrainedModel) -> None:
    """Run a model once, and check that a type that nobody vouches for is causal.

    Some values fit together only until tensors meet: a tied head of another width, key heads that
    do not divide the query heads. And some of transformers' types count as causal language models
    although they attend to the future unless told otherwise (BERT and its kin).

    Args:
        model: as `meta_model` gives it.

    Raises:
        InputError: the forward pass fails, or a later token changes an earlier logit.
    """
    config = model.config
    vouched_for = config.model_type in registry() or config.model_type in _BASELINES
    try:
        if vouched_for:
            # With a cache: without one transformers reads the values of positions.
            with torch.no_grad():
                model(torch.zeros(2, 3, dtype=torch.long, device="meta"), use_cache=True)
        else:  # a type may read values anywhere, and meta has none
            _check_causal(AutoModelForCausalLM.from_config(config).eval())
    except _MISFITS as error:
        raise _misfit(config, error) from None


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    tokens = torch.arange(8).unsqueeze(0) % model.config.vocab_size
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.vocab_size
    before, after = (model(ids, use_cache=False).logits[:, :-1] for ids in (tokens, changed))
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise InputError(
            f"model type {model.config.model_type!r}: not causal as configured: a later token "
            "changes an earlier prediction"
        )


def create_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A freshly initialised model in float32; `seed` governs its weights and all that follows."""
    take_compiled_scans(config)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def take_compiled_scans(config: PreTrainedConfig) -> None:
    """Let a Mamba of transformers compute with our scans on a CPU (`models.mamba`)."""
    if config.model_type in ("mamba", "mamba2"):
        from contextlm.models.mamba import use_compiled_scans  # loads both families

        use_compiled_scans()


def _misfit(config: PreTrainedConfig, error: BaseException) -> InputError:
    said = reason(error)
    asked = error.args[0] if isinstance(error, KeyError) and error.args else None
    fields = [key for key, value in config.to_dict().items() if value == asked is not None]
    if fields:  # a name that was looked up in a table, as those of activation functions are
        said = f"{fields[0]}: no such thing as {shown(asked)}"
    elif not isinstance(error, ValueError):  # not a word of a check's own, but where it all broke
        said = f"its values do not fit together: {said}"
    return InputError(f"model type {config.model_type!r}: {said}")


def reason(error: BaseException) -> str:
    """What an error of transformers says, on one line and without the name of a validator."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        said = " ".join(str(error.__cause__).split())
        several = _SEVERAL.match(said)
        if several:
            kinds = re.sub(r"<class '(\w+)'>", r"\1", several[3])
            said = f"{several[1]}: expected one of {kinds}, got {several[2]}"
        return shortened(_FIELD.sub(r"\1: expected", said), 300)
    return shortened(" ".join(str(error).split()) or type(error).__name__, 300)
