"""What every architecture shares: the registry, the decoder's forward pass, the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

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
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from contextlm.models.cache import CACHE, NAMES, RowStateLayer, given_cache
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import ContextBlock, OwnStart, start_update
from contextlm.models.stepping import product
from contextlm.models.stub import auto_map
from contextlm.ops.backends import takes_steps


@dataclass(frozen=True)
class Architecture:
    """One registered architecture. `tiny` are config fields small enough for the contract tests."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    description: str
    tiny: tuple[dict[str, Any], ...]


_REGISTRY: dict[str, Architecture] = {}
M = TypeVar("M", bound="type[ContextForCausalLM]")


def register_architecture(*, tiny: tuple[dict[str, Any], ...]) -> Callable[[M], M]:
    """Class decorator: makes a causal language model known to recipes, tests and Auto classes.

    It is named in recipes by its configuration's `model_type`, and described by the first line of
    its docstring.

    Args:
        tiny: one or more sets of config fields, each a variant that the contract tests try.

    A class that is defined again under its own name, as in a notebook, takes its earlier place.

    Raises:
        ValueError: the `model_type` is another class's.
    """

    def register(model: M) -> M:
        decoder = model.decoder_class
        config = decoder.config_class
        name = config.model_type
        again = name in _REGISTRY
        if again and _qualified(_REGISTRY[name].model) != _qualified(model):
            raise ValueError(f"an architecture named {name!r} is registered already")
        config.auto_map = auto_map(AutoConfig=config, AutoModel=decoder, AutoModelForCausalLM=model)
        AutoConfig.register(name, config, exist_ok=again)
        AutoModel.register(config, decoder, exist_ok=again)
        AutoModelForCausalLM.register(config, model, exist_ok=again)
        description = (model.__doc__ or "").strip().partition("\n")[0]
        _REGISTRY[name] = Architecture(config, model, description, tiny)
        return model

    return register


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


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


# Version 0.1 kept the matrix of a context or token layer in the layer itself. What was loaded is
# saved under the names that it came with, which is transformers' way.
_OLD_NAMES = {rf"layers\.(\d+)\.{name}": rf"layers.\1.update.{name}" for name in ("weight", "bias")}


class ContextPreTrainedModel(PreTrainedModel):
    """Base of our architectures: weights, flags, and a cache of their own making."""

    config_class: type[PreTrainedConfig]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [*NAMES]
    _supports_sdpa = True

    def new_cache(self) -> Cache:
        """An empty cache of this model's own kind; each subclass defines it."""
        raise NotImplementedError

    @property
    def _is_stateful(self) -> bool:
        """A recurrence cannot be rewound, so `generate` must not try (assisted decoding)."""
        return not self.new_cache().is_croppable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Attention is in a file of its own; transformers looks for it in the model's."""
        return True

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: what is saved always brings a module for clients (`models.stub`)."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; parts that the configuration freezes come back frozen."""
        kwargs["key_mapping"] = _OLD_NAMES | (kwargs.get("key_mapping") or {})
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
        if isinstance(module, OwnStart):
            module.reset_parameters()
        elif getattr(module, "is_update", False):
            start_update(module)  # type: ignore[arg-type]
        else:
            super()._init_weights(module)


# Arguments of other models that would change the answer.
_NOT_READ = (
    *("cache_params", "past_key_value", "encoder_hidden_states", "head_mask"),
    *("cu_seqlens", "num_logits_to_keep"),  # elsewhere cu_seq_lens_q and logits_to_keep
)


class ContextDecoder(ContextPreTrainedModel):
    """A model without its head. Subclasses give `new_cache`, `decode` and an embedding.

    Attributes:
        embed_tokens: the embedding of tokens.
        embed_norm: the norm behind it, where a context block reads the embeddings.
        reads_only_last: whether `decode` heeds `NewTokens.last` and may return the hidden states
            of the last tokens only.
        reads_packed: whether `decode` heeds `NewTokens.packed_BT`; otherwise it is given documents
            of a packed row with a row each, as many columns wide as the longest.
    """

    embed_tokens: nn.Module
    embed_norm: nn.Module
    reads_only_last: ClassVar[bool] = False
    reads_packed: ClassVar[bool] = False

    @property
    def sees_borders(self) -> bool:
        """Whether `decode` is given packed rows: they need a mask, which flash attention lacks."""
        return self.reads_packed and "flash" not in self.config._attn_implementation

    @property
    def traces_borders(self) -> bool:
        """Whether a graph of it is right for packed rows too."""
        return self.sees_borders

    @property
    def width(self) -> int:
        """Width of the hidden states, which the head reads."""
        return self.config.hidden_size

    def embed_normalised(self, input_ids: Tensor) -> Tensor:
        """Token embeddings as a context block reads them, ``[..., D]``."""
        return self.embed_norm(self.embed_tokens(input_ids))

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states of the new tokens, ``[B, T, width]``; moves `new.cache` on.

        Each subclass defines it; `kwargs` are for attention functions.
        """
        raise NotImplementedError

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        contexts: Tensor | None = None,
        last: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states.

        A row may hold several documents, packed without padding as transformers' and TRL's
        collators do it; none sees another, and no cache is made.

        Args:
            input_ids: ``[B, T]`` tokens; or give `inputs_embeds`.
            attention_mask: ``[B, past + T]``, 0 at padding.
            position_ids: ``[B, T]``; only learned and rotary positions over all tokens follow them,
                by default positions are counted over each document's real tokens. Where they do not
                increase a new document begins.
            past_key_values: the cache that an earlier call returned, or `new_cache()`; `cache` is
                what transformers calls it since 5.24.
            inputs_embeds: ``[B, T, D]`` embeddings instead of tokens.
            use_cache: return a cache.
            cu_seq_lens_q: ``[documents + 1]``, where the documents of one row begin, and its end.
            cu_seq_lens_k: the same.
            seq_idx: ``[B, T]``, the number of each token's document.
            contexts: ``[B, history + T, C]`` of a context store, those of the positions before the
                window (zeros before the stream's start) and of the window's own; the recurrence is
                not run then, and nothing cached.
            last: how many hidden states are wanted, 0 for all; where `reads_only_last`, no others
                may be given.
            **kwargs: `output_hidden_states`, where there are no layers to record of the embeddings
                and the last ones; `output_attentions`, where they are recorded; and arguments of
                attention functions.

        Raises:
            ValueError: neither or both of tokens and embeddings are given, the cache is not of this
                model's making, has other rows or would be moved on twice by gradient checkpointing,
                the mask or the borders of documents do not fit, documents are packed together with
                a cache, stored contexts do not fit, or an argument is given that would change the
                answer and is not read.
        """
        self._refuse_unread(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        given = given_cache(cache, past_key_values)
        cache, past, seen_B = given, 0, None
        if cache is None and use_cache and contexts is None:
            cache = self.new_cache()
        if cache is not None:
            counter = self._counter(cache, inputs_embeds.shape[0])
            past, seen_B = counter.get_seq_length(), counter.counts
        wants_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        new = NewTokens.of(
            inputs_embeds,
            attention_mask,
            past=past,
            seen_B=seen_B,
            cache=cache,
            position_ids=position_ids,
            contexts=contexts,
            last=0 if wants_states else last,
        )
        new = new.with_documents(
            [ends for ends in (cu_seq_lens_q, cu_seq_lens_k) if ends is not None],
            seq_idx,
            in_graph=self.traces_borders,
        )
        if new.packed_BT is not None:
            if given is not None or contexts is not None:
                raise ValueError(
                    "packed documents go together neither with a cache nor with stored contexts"
                )
            cache, new = None, replace(new, cache=None)
        if contexts is not None:
            self._check_contexts(contexts, new)
        if new.packed_BT is None or self.sees_borders:
            hidden_BTD = self.decode(inputs_embeds, new, **kwargs)
        else:
            self._refuse_recording_apart(kwargs)
            apart = new.apart()
            hidden_BTD = apart.packed(self.decode(apart.rows(inputs_embeds), apart.new, **kwargs))
        outputs = BaseModelOutputWithPast(last_hidden_state=hidden_BTD, **{CACHE: cache})
        if wants_states and "hidden_states" not in self._recorded:
            outputs.hidden_states = (inputs_embeds, hidden_BTD)
        return outputs

    @cached_property
    def _cache_kinds(self) -> list[type]:
        return [type(layer) for layer in self.new_cache().layers]

    def _counter(self, cache: Cache, batch: int) -> RowStateLayer:
        """The layer of our own kind of cache that counts each row's tokens: there must be one."""
        own = [layer for layer in cache.layers if isinstance(layer, RowStateLayer)]
        if not own or [type(layer) for layer in cache.layers] != self._cache_kinds:
            raise ValueError(
                f"{self.config.model_type} needs its own cache: leave {CACHE} out, pass what an "
                "earlier call returned, or make one with new_cache()"
            )
        counts_B = own[0].counts
        if counts_B is not None and len(counts_B) != batch:
            raise ValueError(f"the cache holds {len(counts_B)} rows, the new tokens {batch}")
        if self.training and getattr(self, "gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing runs every layer twice, which would move the cache on "
                f"twice: train without {CACHE}, and call eval() before generating"
            )
        return own[0]

    def _check_contexts(self, contexts: Tensor, new: NewTokens) -> None:
        if not isinstance(self, ReadsStoredContexts):
            raise ValueError(f"this {self.config.model_type} reads no contexts of a store")
        if new.cache is not None:
            raise ValueError("contexts of a store do not go together with a cache")
        expected = self.history + new.tokens
        if contexts.shape[1] != expected:
            raise ValueError(
                f"contexts must cover {self.history} positions before the window and the window, "
                f"{expected} in all, got {contexts.shape[1]}"
            )

    def _refuse_unread(self, kwargs: dict[str, Any]) -> None:
        """An argument that would change the answer is never swallowed."""
        for name, value in kwargs.items():
            if isinstance(value, Cache) or (name in _NOT_READ and value is not None):
                raise ValueError(f"{self.config.model_type} does not take {name}")
        if kwargs.get("is_causal") is False:
            raise ValueError(f"{self.config.model_type} is causal")
        if kwargs.get("output_attentions") and "attentions" not in self._recorded:
            raise ValueError(f"{self.config.model_type} does not record attentions")

    def _refuse_recording_apart(self, kwargs: dict[str, Any]) -> None:
        for name in self._recorded:
            if kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False)):
                raise ValueError(
                    f"{self.config.model_type} does not record {name} of packed documents"
                )

    @property
    def _recorded(self) -> dict[str, Any]:
        """What is recorded of modules, by its name."""
        return self._can_record_outputs or {}


class ContextForCausalLM(ContextPreTrainedModel, GenerationMixin):
    """A decoder in `self.model` with a linear head. Subclasses name the decoder's class.

    Attributes:
        decoder_class: of the decoder, whose configuration and flags the model shares.
        head_bias: whether the head has a bias.
    """

    decoder_class: ClassVar[type[ContextDecoder]]
    head_bias: ClassVar[bool] = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in (
            "config_class",
            "supports_gradient_checkpointing",
            "_no_split_modules",
            "_can_compile_fullgraph",
            "_supports_flash_attn",
            "_supports_flex_attn",
        ):
            setattr(cls, name, getattr(cls.decoder_class, name))
        super().__init_subclass__(**kwargs)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.lm_head: nn.Module = nn.Linear(
            self.model.width, config.vocab_size, bias=self.head_bias
        )
        self.post_init()
        self.freeze_parts()

    def new_cache(self) -> Cache:
        """An empty cache of this model's own kind."""
        return self.model.new_cache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not for these models, whose cache has no pages of keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.config.model_type} has a cache of its own kind, which continuous batching does "
            "not know: use generate()"
        )

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
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = self.new_cache()

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``, and the loss when labels are given.

        What is not named here is as in `ContextDecoder.forward`.

        Args:
            labels: ``[B, T]``, shifted inside as everywhere in transformers; -100 is ignored.
            logits_to_keep: compute logits for the last so many tokens only, 0 for all; or for the
                positions that a tensor names.
            **kwargs: passed to the decoder and to the loss (`num_items_in_batch`).
        """
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        shorter = self.model.reads_only_last and isinstance(logits_to_keep, int)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last=logits_to_keep if shorter else 0,
            **kwargs,
        )
        # The last n of what is n long already are all of it.
        hidden_BTD = outputs.last_hidden_state[:, keep, :]
        step = hidden_BTD.shape[1] == 1 and takes_steps(hidden_BTD.device)
        logits_BTV = product(self.lm_head, hidden_BTD, step=step)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
