"""What every architecture shares: the registry, the base class, the language-model head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from contextlm.models.layers import ContextBlock, OwnStart


@dataclass(frozen=True)
class Architecture:
    """One registered architecture. `tiny` are config fields small enough for the contract tests."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    description: str
    tiny: tuple[dict[str, Any], ...]


_REGISTRY: dict[str, Architecture] = {}
M = TypeVar("M", bound=type[PreTrainedModel])


def register_architecture(
    config: type[PreTrainedConfig],
    *,
    decoder: type[PreTrainedModel],
    tiny: tuple[dict[str, Any], ...],
) -> Callable[[M], M]:
    """Class decorator: makes a causal language model known to recipes, tests and Auto classes.

    Args:
        config: its configuration class; `model_type` is the name used in recipes.
        decoder: the model without its head, for `AutoModel`.
        tiny: one or more sets of config fields, each a variant that the contract tests try.

    Raises:
        ValueError: the `model_type` is taken.
    """

    def register(model: M) -> M:
        name = config.model_type
        if name in _REGISTRY:
            raise ValueError(f"an architecture named {name!r} is registered already")
        AutoConfig.register(name, config)
        AutoModel.register(config, decoder)
        AutoModelForCausalLM.register(config, model)
        description = (model.__doc__ or "").strip().partition("\n")[0]
        _REGISTRY[name] = Architecture(config, model, description, tiny)
        return model

    return register


def registry() -> dict[str, Architecture]:
    """Our architectures by `model_type`, sorted by name."""
    return dict(sorted(_REGISTRY.items()))


def architectures() -> dict[str, str]:
    """Our model types, each with one line of description."""
    return {name: entry.description for name, entry in registry().items()}


@runtime_checkable
class HasContextBlock(Protocol):
    """A model whose context block can be trained by phase 1."""

    context_block: ContextBlock

    def embed_normalised(self, input_ids: Tensor) -> Tensor:
        """Token embeddings as the context block reads them, ``[..., D]``."""
        ...


@runtime_checkable
class ReadsStoredContexts(HasContextBlock, Protocol):
    """A model whose forward pass takes ``contexts`` of a context store, ``[B, history + T, C]``.

    They replace the recurrence where the context block is frozen (DESIGN 1.6).
    """

    history: int
    """How many positions before a window it reads."""


def mark_frozen(frozen: bool, *modules: nn.Module) -> None:
    """Note on modules whether `ContextPreTrainedModel.freeze_parts` is to freeze them."""
    for module in modules:
        object.__setattr__(module, "frozen", frozen)


class ContextPreTrainedModel(PreTrainedModel):
    """Base of our architectures: weights, flags, and a cache of their own making."""

    config_class: type[PreTrainedConfig]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # Whether a decoder's `forward` takes `last`, the number of positions whose logits are wanted
    # (0 for all), and may return hidden states of these only.
    reads_only_last = False

    @property
    def _is_stateful(self) -> bool:
        """A recurrence cannot be rewound, so `generate` must not try (assisted decoding)."""
        return not self.new_cache().is_croppable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> Cache:
        """An empty cache of this decoder's own kind; every decoder has one.

        Raises:
            AttributeError: this decoder does not define it.
        """
        raise AttributeError(f"{type(self).__name__} does not define new_cache")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; parts that the configuration freezes come back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_parts()
        return loaded

    def freeze_parts(self) -> None:
        """Next-token training leaves alone every module that is marked ``frozen``."""
        for module in self.modules():
            if getattr(module, "frozen", False):
                module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnStart):
            module.reset_parameters()


class ContextForCausalLM(ContextPreTrainedModel, GenerationMixin):
    """A decoder in `self.model` with a linear head. Subclasses build both and call `post_init`."""

    model: ContextPreTrainedModel
    lm_head: nn.Module

    def new_cache(self) -> Cache:
        """An empty cache of this model's own kind."""
        return self.model.new_cache()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give `generate` our cache from the start; chunked prefill asks for one beforehand."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r}: "
                f"{type(self).__name__} has a cache of its own kind only"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss when labels are given.

        Args:
            input_ids: ``[B, T]`` tokens; or give `inputs_embeds`.
            attention_mask: ``[B, past + T]``, 0 at padding (on the left).
            position_ids: ``[B, T]``; by default counted over each row's real tokens.
            past_key_values: the cache that an earlier call returned.
            inputs_embeds: ``[B, T, D]`` embeddings instead of tokens.
            labels: ``[B, T]``, shifted inside as everywhere in transformers; -100 is ignored.
            use_cache: return a cache.
            logits_to_keep: compute logits for the last so many tokens only; 0 for all.
            **kwargs: passed to the decoder and to the loss (`num_items_in_batch`).

        Returns:
            `CausalLMOutputWithPast` with logits ``[B, T, V]``.
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        shorter = isinstance(logits_to_keep, int) and self.model.reads_only_last
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **({"last": logits_to_keep} if shorter else {}),
            **kwargs,
        )
        # The last n of what is n long already are all of it.
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
