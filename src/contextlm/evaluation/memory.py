"""What decoding keeps, read off the tensors of a real cache, and peak memory of a stage."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from contextlm.base.errors import RunError
from contextlm.models.cache import CACHE
from contextlm.results.facts import CacheBytes

CHUNK = 1024


class Held(NamedTuple):
    """Bytes held by a cache: `logical` by its elements, `resident` by the memory behind them."""

    logical: int
    resident: int


def cache_bytes(cache: Cache) -> Held:
    """Count every tensor that the cache holds, whatever its layers call it.

    Two views of one storage count their elements each in `logical`, the storage once in `resident`.
    """
    tensors = list({id(tensor): tensor for tensor in _tensors(cache, set())}.values())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    logical = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Held(logical, sum(storages.values()))


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    """Every tensor reachable through attributes, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in visited or isinstance(value, (str, bytes, int, float, type, torch.device)):
        return
    visited.add(id(value))
    if isinstance(value, dict):
        children: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set)):
        children = value
    else:
        children = getattr(value, "__dict__", {}).values()
    for child in children:
        yield from _tensors(child, visited)


def position_limit(model: PreTrainedModel) -> int | None:
    """The most positions that the model has, or None when it has no limit."""
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(model.config, name, None)
        if limit is not None:
            return int(limit)
    return None


@torch.no_grad()
def measure_cache(
    model: PreTrainedModel, lengths: Iterable[int], device: torch.device
) -> list[CacheBytes]:
    """Feed one sequence as decoding would and count the cache at each length.

    The text does not matter for the count; a fixed token is fed, in chunks, the last token of each
    length alone, as `generate` does. Lengths beyond the model's positions are left out.

    Returns:
        One entry per length, ascending.
    """
    limit = position_limit(model)
    wanted = sorted(length for length in set(lengths) if limit is None or length <= limit)
    was_training = model.training
    model.eval()
    measured: list[CacheBytes] = []
    cache: Cache | None = None
    seen = 0
    for length in wanted:
        while seen < length:
            # The last token of each length goes in alone: that is a decoding step.
            size = min(CHUNK, length - 1 - seen) or 1
            ids_1T = torch.ones(1, size, dtype=torch.long, device=device)
            cache = _call(model, ids_1T, cache, keep=1)[1]
            seen += size
        assert cache is not None
        measured.append(CacheBytes(tokens=length, **cache_bytes(cache)._asdict()))
    model.train(was_training)
    return measured


def cache_argument(model: PreTrainedModel) -> str:
    """What the model calls its cache.

    Before 5.24 state-space models of transformers had a name of their own for it.
    """
    return _cache_argument(type(model))  # type: ignore[arg-type]


@lru_cache
def _cache_argument(kind: type[PreTrainedModel]) -> str:
    known = inspect.signature(kind.forward).parameters
    return "cache_params" if "cache_params" in known else CACHE


def feed(model: PreTrainedModel, ids_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """Feed new tokens to a model that decodes: the last one's logits, ``[B, V]``, and the cache.

    `cache` is what the previous call returned, or None at the start.

    Raises:
        RunError: the model keeps no cache.
    """
    for piece_BT in _continuable(ids_BT, cache):
        logits_BTV, cache = _call(model, piece_BT, cache, keep=1)
    assert cache is not None
    return logits_BTV[:, -1], cache


def feed_all(model: PreTrainedModel, ids_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """As `feed`, with the logits of every new token, ``[B, T, V]``."""
    found = []
    for piece_BT in _continuable(ids_BT, cache):
        logits_BTV, cache = _call(model, piece_BT, cache, keep=0)
        found.append(logits_BTV)
    assert cache is not None
    return torch.cat(found, dim=1) if len(found) > 1 else found[0], cache


def _continuable(ids_BT: Tensor, cache: Cache | None) -> tuple[Tensor, ...]:
    """The tokens in pieces with which the model can go on from its cache.

    transformers' Mamba, which has no layer of ordinary attention, takes up its state for a single
    token only: to several it gives the convolution's state, but begins the scan from zeros.
    """
    if cache is not None and not any(isinstance(it, CacheLayerMixin) for it in cache.layers):
        return ids_BT.split(1, dim=1)
    return (ids_BT,)


def _call(
    model: PreTrainedModel, ids_BT: Tensor, cache: Cache | None, keep: int
) -> tuple[Tensor, Cache]:
    name = cache_argument(model)
    outputs = model(ids_BT, use_cache=True, logits_to_keep=keep, **{name: cache})
    cache = getattr(outputs, name, None)
    if cache is None:
        raise RunError(f"model type {model.config.model_type!r} returns no cache to decode with")
    return outputs.logits, cache


def memory_now(device: torch.device) -> tuple[int, int | None]:
    """Bytes in use: this process's resident set, and what the accelerator's allocator has given."""
    accelerator = int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None
    return int(psutil.Process().memory_info().rss), accelerator


class PeakMemory:
    """Peak memory of this process, and of the accelerator, since construction.

    On Linux the kernel's high-water mark is reset; elsewhere the host figure covers the process's
    whole life.
    """

    def __init__(self, device: torch.device):
        self.device = device
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def host_bytes(self) -> int:
        """Largest resident set so far."""
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))
        held = psutil.Process().memory_info()
        if hasattr(held, "peak_wset"):  # Windows
            return int(held.peak_wset)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def accelerator_bytes(self) -> int | None:
        """Most memory allocated on the accelerator, or None on a CPU."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated(self.device))
