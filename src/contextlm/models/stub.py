"""A module beside saved weights, so that clients which never import contextlm can open them.

``from_pretrained(folder, trust_remote_code=True)`` of transformers' Auto classes finds in a
configuration's `auto_map` a module of the folder, and imports it. Ours holds no model: it takes the
classes from the package that is installed. So lm-eval's or TRL's own command line opens a
checkpoint, and what such a client saves can be opened in the same way again.
"""

from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig

NAME = "modeling_contextlm"

_TEXT = '''\
"""Opens this {model_type} in any client of transformers: the classes are those of {package}."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

try:
    import {package}  # noqa: F401  registers its architectures

    {AutoConfig} = CONFIG_MAPPING["{model_type}"]
except (ImportError, KeyError) as error:
    raise ImportError(
        "this model is a {model_type}, an architecture of {package}, which is not installed here "
        "or too old: install it from its source folder, pip install FOLDER"
    ) from error
'''
_MODELS = {
    "AutoModel": "{AutoModel} = MODEL_MAPPING[{AutoConfig}]\n",
    "AutoModelForCausalLM": "{AutoModelForCausalLM} = MODEL_FOR_CAUSAL_LM_MAPPING[{AutoConfig}]\n",
}


def auto_map(**classes: type) -> dict[str, str]:
    """For each Auto class, by its name, the class of the stub that it takes."""
    return {auto: f"{NAME}.{kind.__name__}" for auto, kind in classes.items()}


def write_stub(folder: Path, config: type[PreTrainedConfig], names: dict[str, str]) -> None:
    """Put the module that `names`, an `auto_map`, speaks of into a folder."""
    package = config.__module__.partition(".")[0]
    classes = {auto: name.rpartition(".")[2] for auto, name in names.items()}
    template = "".join([_TEXT, *(line for auto, line in _MODELS.items() if auto in names)])
    text = template.format(package=package, model_type=config.model_type, **classes)
    (folder / f"{NAME}.py").write_text(text, "utf-8")
