"""`CompressedCache`: a model decodes with a smaller cache while a policy is installed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from contextlm.base.errors import InputError
from contextlm.compress.adaptors import Attention, attentions_of
from contextlm.compress.base import Policy, parse_policy
from contextlm.compress.calibration import Calibration, Sizes

_keys = itertools.count()
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


class CompressedCache(AbstractContextManager["CompressedCache"]):
    """Gives a trained model a cache by some policy, until removed.

    ``with CompressedCache(model, "window:256,sinks:4"): model.generate(...)``. No weight changes;
    `state_dict` and `save_pretrained` give the same as before. Within the block `generate`, in all
    its modes, and `forward` make the right cache by themselves, and a forward without a cache
    computes what decoding would.

    Several policies may be held on one model: outside of a ``with`` block, a policy serves the
    caches that its `new_cache` made and nothing else, and the model with a cache of its own, or
    with none, is the plain model. Of nested blocks the innermost counts.

    Args:
        model: a decoder of transformers with an adaptor, with or without a head, in any data type.
        policy: or its spec, as `parse_policy` takes it.
        calibration: a text to fit to, for policies that are fitted (`latent`): ``[N, T]`` token
            ids, or a `Calibration` that several policies share; `Sizes` where the policy's own
            weights are to be loaded.

    Raises:
        InputError: the policy is unknown or cannot serve the model; the message says why, and what
            would help.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | str,
        *,
        calibration: Calibration | Sizes | Tensor | None = None,
    ):
        self.policy = parse_policy(policy) if isinstance(policy, str) else policy
        if not isinstance(calibration, Sizes):
            check_keeps_none(getattr(model, "config", None))
        if self.policy.needs_calibration and calibration is None:
            raise InputError(
                f"policy {self.policy.spec} is fitted to a text: pass its token ids as calibration="
            )
        if isinstance(calibration, Tensor):
            calibration = Calibration(calibration)
        attentions = attentions_of(model)
        self.policy.check(attentions)
        with _left(attentions):
            self.readers = self.policy.readers(attentions, calibration)
        self.key = next(_keys)
        self._switches = [Switch.of(attention) for attention in attentions]
        for switch in self._switches:
            switch.held[self.key] = self

    def new_cache(self) -> Cache:
        """An empty cache by this policy, to be given as ``past_key_values``.

        Raises:
            InputError: the policy has been removed.
        """
        if not self._switches:
            raise InputError(f"policy {self.policy.spec} has been removed from its model")
        return Cache(layers=[reader.new_layer(self.key) for reader in self.readers])

    def enter(self) -> None:
        """Make this the policy of all that gives no cache, as a ``with`` block does."""
        for switch in self._switches:
            switch.entered.append(self.key)

    def remove(self) -> None:
        """Take the policy off the model; once removed, this does nothing."""
        while self._switches:
            self._switches.pop().let_go(self.key)

    def __enter__(self) -> CompressedCache:
        self.enter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def check_keeps_none(config: Any) -> None:
    """Refuse a second policy for a model that keeps one.

    Raises:
        InputError: it names the first.
    """
    kept = getattr(config, "cache_policy", None)
    if kept is not None:
        raise InputError(
            f"this model keeps a policy of its own, {kept}, and decodes by it without further "
            "words: put another onto the model that it was made of"
        )


class Switch:
    """Stands in for the `forward` of one attention module, and chooses by whose policy it attends.

    Attributes:
        attention: the module.
        held: all policies held on the model, by key.
        entered: keys of those whose ``with`` block is entered, the innermost last.
        previous: what stood in for `forward` before (as other tools do), or None.
    """

    def __init__(self, attention: Attention):
        self.attention = attention
        self.held: dict[int, CompressedCache] = {}
        self.entered: list[int] = []
        self.previous = vars(attention.module).get("forward")
        attention.module.forward = self.forward

    @classmethod
    def of(cls, attention: Attention) -> Switch:
        """The one that stands there already, or a new one."""
        return cls.found(attention) or cls(attention)

    @classmethod
    def found(cls, attention: Attention) -> Switch | None:
        """The one that stands there already, if any."""
        owner = getattr(vars(attention.module).get("forward"), "__self__", None)
        return owner if isinstance(owner, Switch) else None

    def let_go(self, key: int) -> None:
        """Forget one policy; with the last of them, leave the module as it was."""
        del self.held[key]
        self.entered = [entered for entered in self.entered if entered != key]
        if self.held:
            return
        if self.previous is None:
            del self.attention.module.forward
        else:
            self.attention.module.forward = self.previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `forward`."""
        module = self.attention.module
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As the module's own, by the policy that made the cache.

        Raises:
            InputError: the cache cannot be used.
        """
        cache = kwargs.get(self.attention.names.cache)
        policy = self._policy_of(cache)
        if policy is None:
            return self.original(hidden_states, **kwargs)
        base = self.attention.base
        if base.training and getattr(base, "is_gradient_checkpointing", False):
            raise InputError(
                "gradient checkpointing runs layers again out of order, which a compressed cache "
                "cannot follow: train without it"
            )
        number = self.attention.module.layer_idx
        reader = policy.readers[number]
        layer = reader.new_layer(policy.key) if cache is None else cache.layers[number]
        return reader.attend(layer, self.original, hidden_states, kwargs)

    def _policy_of(self, cache: Any) -> CompressedCache | None:
        """The policy that reads a cache; None: it is the module's own affair.

        An empty `DynamicCache`, which `generate` and the model make without asking, becomes one by
        the policy entered last.
        """
        innermost = self.held[self.entered[-1]] if self.entered else None
        if cache is None:
            return innermost
        layers = getattr(cache, "layers", [])
        key = getattr(layers[0], "key", None) if layers else None
        if key is not None:
            if key not in self.held:
                raise InputError("this cache was made by a policy that has been removed")
            return self.held[key]
        if innermost is None:
            return None
        empty = cache.get_seq_length() == 0 and all(type(layer) in _PLAIN for layer in layers)
        if not isinstance(cache, DynamicCache) or cache.offloading or not empty:
            raise InputError(
                f"policy {innermost.policy.spec} is installed, so a {type(cache).__name__} of keys "
                "and values cannot be used: pass no cache, or one from new_cache(), and no "
                "cache_implementation"
            )
        cache.layer_class_to_replicate = None
        cache.layers = innermost.new_cache().layers
        return innermost


@contextmanager
def _left(attentions: Sequence[Attention]) -> Iterator[None]:
    """Outside of all ``with`` blocks meanwhile: what is fitted is fitted to the plain model."""
    switches = [each for each in map(Switch.found, attentions) if each is not None]
    entered = [switch.entered for switch in switches]
    for switch in switches:
        switch.entered = []
    try:
        yield
    finally:
        for switch, keys in zip(switches, entered, strict=True):
            switch.entered = keys
