"""What tests of several folders need."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# They stand in the package, where pytest does not look for assertions to explain.
pytest.register_assert_rewrite("contextlm.contract.architecture")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal gives it: a shell starts what runs in its background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def saved() -> Iterator[Callable[[Path, Any], Path]]:
    """Save a model of a vocabulary of 257 with a tokenizer of bytes; ``<end>`` is number 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    letters = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**letters, "<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<end>", "bos_token": "<end>", "pad_token": "<end>"}

    def save(folder: Path, config: Any) -> Path:
        set_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(folder)
        return folder

    logging.disable_progress_bar()  # a command of its own process has these off from the start
    yield save
    logging.enable_progress_bar()


@pytest.fixture
def forget_outside() -> Iterator[Callable[[], None]]:
    """Makes architectures and mixers from outside unknown again that came since; at last itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from contextlm.models import base, outside
    from contextlm.models.hybrid import mixer

    registries = (base._REGISTRY, mixer._MIXERS, CONFIG_MAPPING._extra_content)
    known, modules = [set(names) for names in registries], set(outside._OUTSIDE)

    def forget() -> None:
        for names, before in zip(registries, known, strict=True):
            for name in names.keys() - before:
                del names[name]
        for top in outside._OUTSIDE.keys() - modules:
            del outside._OUTSIDE[top]
            for name in [name for name in sys.modules if name.partition(".")[0] == top]:
                del sys.modules[name]

    yield forget
    forget()


# What takes longest begins first, so that no worker is left with it at the end.
_LONGEST = (
    "test_readme",
    "test_survive",
    "test_workers",
    "test_several_processes",
    "test_security",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in _LONGEST)
