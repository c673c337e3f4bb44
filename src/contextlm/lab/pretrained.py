"""Contenders that start from a trained model (`from`), and what healing under a policy needs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.configuration_utils import PreTrainedConfig

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder, is_folder, sha256_of
from contextlm.compress.adaptors import KEY, VALUE, attentions_of
from contextlm.compress.base import parse_policy
from contextlm.compress.calibration import Calibration
from contextlm.compress.checkpoint import compressed_config, compressed_model
from contextlm.compress.reading import Weights
from contextlm.data.corpora import Corpus
from contextlm.data.tokenizers import load_tokenizer, tokenizer_hash
from contextlm.evaluation.checkpoint import check_files, fetched, load_checkpoint, read_config
from contextlm.evaluation.compression import Measuring, reference_file
from contextlm.evaluation.memory import position_limit
from contextlm.models.build import build_config, meta_model
from contextlm.recipe.schema import Contender
from contextlm.recipe.settings import HealingSettings
from contextlm.results.compression import PolicyFigures
from contextlm.results.facts import Fidelity, HealingFacts
from contextlm.training.distillation import DistillationLoss
from contextlm.training.next_token import MakeLoss

CALIBRATION = 8192  # tokens
CALIBRATION_ROW = 1024
MEASURED = 2048  # tokens that are read to tell how near the original a healed model is


def config_of(contender: Contender, vocab_size: int, **token_ids: int) -> PreTrainedConfig:
    """The configuration of a contender's model, whether it is new or trained already.

    Args:
        contender: of a recipe.
        vocab_size, token_ids: of a new model, as for `build_config`.

    Raises:
        InputError: it cannot be built, there is no such model, or its policy cannot serve it or
            cannot be trained under.
    """
    if contender.from_ is None:
        return build_config(contender.model, vocab_size, **token_ids)
    config = read_config(folder_of(contender.from_))
    if contender.policy is not None:
        policy = parse_policy(contender.policy)
        policy.check_training()
        attentions = attentions_of(meta_model(config))
        policy.check(attentions)
        config = compressed_config(config, policy, policy.sizes(attentions))
    train = healing_of(contender).train
    if train == "policy" and getattr(config, "cache_ranks", None) is None:
        kept = getattr(config, "cache_policy", "a model without a policy")
        raise InputError(
            f"healing.train policy: {kept} has nothing of its own to train; all or lora"
        )
    if train == "lora" and find_spec("peft") is None:
        raise InputError("healing.train lora needs PEFT: pip install 'peft>=0.19'")
    return config


def healing_of(contender: Contender) -> HealingSettings:
    """The contender's settings, or the defaults."""
    return contender.healing or HealingSettings()


def folder_of(name: str) -> Path:
    """The folder of a trained model, from the hub where it is none here.

    Raises:
        InputError: there is none of this name.
        RunError: the hub could not be reached.
    """
    return Path(name) if name and is_folder(Path(name)) else fetched(name)


def trained_hash(
    contender: Contender, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> str | None:
    """SHA-256 (hexadecimal) of the files that a contender starts from; None if it is new.

    Raises:
        InputError: a file is missing or damaged, or the tokenizer is not the recipe's.
    """
    if contender.from_ is None:
        return None
    folder = folder_of(contender.from_)
    own = load_tokenizer(str(folder), corpus, cache_folder())
    if tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise InputError(
            f"contenders.{contender.name}.from: its tokenizer is another than the recipe's: set "
            f"tokenizer: {folder}"
        )
    check_files(folder)
    total = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        total.update(f"{file.name} {sha256_of(file)}\n".encode())
    return total.hexdigest()


def rows_to_calibrate(tokens: np.ndarray, positions: int | None) -> Tensor:
    """Rows from all over a text, ``[N, T]``, none longer than a model's positions, if limited."""
    row = min(CALIBRATION_ROW, len(tokens), positions or CALIBRATION_ROW)
    rows = min(CALIBRATION, len(tokens)) // row
    starts = np.linspace(0, len(tokens) - row, rows, dtype=int)
    return torch.from_numpy(np.stack([tokens[a : a + row] for a in starts]).astype(np.int64))


def text_to_read(documents: Sequence[np.ndarray], tokens: int) -> Tensor:
    """The first document of more than `tokens` tokens, else all in a row; twice as many at most."""
    long = next((document for document in documents if len(document) > tokens), None)
    text = np.concatenate(documents) if long is None else long
    return torch.from_numpy(np.asarray(text[: 2 * tokens + 1], dtype=np.int64))


def as_trained(contender: Contender, meta: PreTrainedModel) -> PreTrainedModel:
    """A contender's model on the meta device, in which what training updates asks for gradients."""
    healing = healing_of(contender)
    if healing.train != "all":
        meta = copy.deepcopy(meta)
        _leave_to_train(meta, healing, seed=0)
    return meta


def _leave_to_train(model: PreTrainedModel, healing: HealingSettings, seed: int) -> Any:
    """Leave to train what `healing.train` says; PEFT's model around it, where there are adapters.

    Args:
        seed: of the adapters' weights.
    """
    if healing.train == "all":
        return None
    model.requires_grad_(False)
    own, adapted = [part for part in model.modules() if isinstance(part, Weights)], None
    if healing.train == "lora":
        from peft import LoraConfig, get_peft_model

        # What is not read any more, or is trained itself, needs no adapter.
        unused = {inner for part in own for inner in part.modules()}
        for attention in attentions_of(model) if own else ():
            names = attention.names.projections
            if len(names) > 1:
                unused |= {getattr(attention.module, names[part]) for part in (KEY, VALUE)}
        set_seed(seed)
        settings = LoraConfig(
            r=healing.rank,
            lora_alpha=2 * healing.rank,
            target_modules="all-linear",
            exclude_modules=[name for name, module in model.named_modules() if module in unused],
        )
        adapted = get_peft_model(model, settings)
    for part in own:
        part.requires_grad_(True)
    return adapted


@dataclass
class Start:
    """A trained model that is to be trained further, and the original that it is not to leave.

    Attributes:
        model: a copy in float32 that keeps the contender's policy, if it has one.
        original: as it was saved, with its full cache.
        calibration: what the policy was fitted to.
    """

    contender: Contender
    model: PreTrainedModel
    original: PreTrainedModel
    calibration: Calibration
    _adapted: Any = None

    @classmethod
    def of(cls, contender: Contender, stream: np.ndarray, device: torch.device, seed: int) -> Start:
        """Load the contender's model and put its policy onto a copy.

        Args:
            contender: with `from`.
            stream: the training text, which the policy is fitted to.
            device: where both are.
            seed: of adapters.
        """
        assert contender.from_ is not None
        original, _ = load_checkpoint(folder_of(contender.from_), str(device))
        calibration = Calibration(rows_to_calibrate(stream, position_limit(original)))
        if contender.policy is None:
            model = copy.deepcopy(original)  # what its configuration freezes stays frozen
        else:
            model = compressed_model(original, contender.policy, calibration=calibration)
        original.requires_grad_(False)
        model = model.float()
        adapted = _leave_to_train(model, healing_of(contender), seed)
        return cls(contender, model, original, calibration, adapted)

    @property
    def make_loss(self) -> MakeLoss | None:
        """What healing minimises; None where there is nothing to be healed."""
        if not self.contender.is_healed:
            return None
        healing = healing_of(self.contender)
        return partial(DistillationLoss, teacher=self.original, loss=healing.loss, kl=healing.kl)

    def finish(self) -> PreTrainedModel:
        """The trained model, adapters merged, in the types in which it will be opened again.

        Weights get the original's, and each buffer its own: rotary frequencies, which no file
        holds, stay in float32 in a model of bfloat16.
        """
        if self._adapted is not None:
            self.model = self._adapted.merge_and_unload()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.original.dtype)
        kept = dict(self.original.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.data = buffer.data.to(kept[name].dtype)
        return self.model.eval()

    def facts(
        self, tokenizer: PreTrainedTokenizerFast, text_T: Tensor, told: Any
    ) -> HealingFacts | None:
        """How near the original the policy was before training, and how near it is now.

        Args:
            text_T: held out; at most `MEASURED` tokens of it are read.
            told: is told what is being done.
        """
        if self.contender.policy is None:
            return None
        policy = parse_policy(self.contender.policy)
        tokens = min(MEASURED, len(text_T) - 1, position_limit(self.original) or MEASURED)
        with reference_file() as reference:
            measuring = Measuring(
                self.original, tokenizer, text_T, [tokens], reference, self.calibration
            )
            found = [measuring.policy(parse_policy("full"), told)]
            found.append(measuring.policy(policy, told))
            found.append(measuring.other(self.model, policy, told))
        full, before, after = map(_fidelity, found)
        healing = healing_of(self.contender)
        return HealingFacts(
            policy=policy.spec,
            train=healing.train,
            loss_weight=healing.loss,
            kl_weight=healing.kl,
            tokens=tokens,
            share=found[-1].share,
            full=full,
            before=before,
            after=after,
        )


def _fidelity(found: PolicyFigures) -> Fidelity:
    return Fidelity(
        loss=found.loss, kl=found.kl, same_tokens=found.same_tokens, passkey=found.passkey
    )
