"""`InputCache`: GPT-NeoX and GPT-2 decode with half the cache and the same logits (DESIGN 6).

Keys and values are both projections of one vector, the input of the attention module. While an
`InputCache` is installed, that vector is kept instead of the two. How it is read is in `attention`,
how it is stored in `layer`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import GPT2Model, GPTNeoXModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from contextlm.base.errors import InputError
from contextlm.compress.input_cache.attention import GPT2Reader, GPTNeoXReader, Reader
from contextlm.compress.input_cache.layer import input_layers

SUPPORTED = ("gpt_neox", "gpt2")
# Their frequencies change with the length, so that earlier keys could not be rebuilt as they were.
_CHANGING_ROTARY = ("dynamic", "longrope")


class InputCache(AbstractContextManager["InputCache"]):
    """Makes a model keep attention inputs instead of keys and values, until removed.

    ``with InputCache(model): model.generate(...)``, or `remove` it by hand. Nothing is trained and
    no weight changes; `state_dict` and `save_pretrained` give the same as before. `generate`, in
    all its modes, and ``forward(use_cache=True)`` make the right cache by themselves: any empty
    `DynamicCache` that reaches the model becomes one of inputs. A forward without a cache, and the
    first piece of a sequence, compute exactly what the plain model does; later pieces agree to
    rounding. Attention dropout and gradients work as before.

    A token takes D numbers per layer instead of 2 D, and with rotary positions 4 bytes for its
    position. Decoding pays with time: see `docs/method.md`.

    Args:
        model: a transformers GPT-NeoX or GPT-2, with or without a head, in any data type.

    Raises:
        InputError: another architecture, one of these with cross-attention or with rotary
            frequencies that change with the length, projections that are not plain ones (adapters,
            quantisation), or a model with an `InputCache` already.
    """

    def __init__(self, model: PreTrainedModel):
        self._readers = _readers(model)
        for reader in self._readers:
            reader.install()

    def new_cache(self) -> Cache:
        """An empty cache of inputs, to be given as ``past_key_values``.

        Raises:
            InputError: this `InputCache` has been removed.
        """
        if not self._readers:
            raise InputError("this InputCache has been removed from its model")
        cache = DynamicCache()
        input_layers(cache, len(self._readers))
        return cache

    def remove(self) -> None:
        """Give the model its own attention back; once removed, this does nothing."""
        while self._readers:
            self._readers.pop().remove()

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _readers(model: PreTrainedModel) -> list[Reader]:
    """One reader for each attention module, none of them installed yet."""
    base: Any = getattr(model, "base_model", model)
    rotary: nn.Module | None = None
    kind: type[Reader]
    if isinstance(base, GPTNeoXModel):
        kind, rotary = GPTNeoXReader, base.rotary_emb
        attentions = [block.attention for block in base.layers]
    elif isinstance(base, GPT2Model):
        kind, attentions = GPT2Reader, [block.attn for block in base.h]
    else:
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(f"InputCache supports {' and '.join(SUPPORTED)}, not {name!r}")
    config: Any = base.config
    if getattr(config, "add_cross_attention", False):
        raise InputError("InputCache does not support cross-attention (add_cross_attention: true)")
    if rotary is not None and rotary.rope_type in _CHANGING_ROTARY:
        raise InputError(
            f"InputCache does not support rope_type {rotary.rope_type!r}: its frequencies change "
            "with the length"
        )
    if any(isinstance(_owner(attention), Reader) for attention in attentions):
        raise InputError("an InputCache is installed in this model already: remove it first")
    heads = config.num_attention_heads
    return [kind(attention, len(attentions), heads, rotary) for attention in attentions]


def _owner(attention: nn.Module) -> object:
    """Whose method stands in for the module's `forward`, if anyone's."""
    return getattr(vars(attention).get("forward"), "__self__", None)
