"""Which implementation of an op runs, and how loops are compiled.

An op with several backends takes ``backend="auto"`` or a name. What a call leaves open the
environment variable ``CONTEXTLM_BACKEND`` decides, which holds a name for all ops or a list such as
``context_scan=eager,linear_scan=numba``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

VARIABLE = "CONTEXTLM_BACKEND"
AUTO = "auto"


def requested_backend(op: str, given: str, known: Sequence[str]) -> str:
    """The backend among `known` that was asked for, or ``auto``; `given` is what the call says.

    Raises:
        ValueError: none of them has that name.
    """
    name = given if given != AUTO else _from_environment(op)
    if name != AUTO and name not in known:
        raise ValueError(f"unknown {op} backend {name!r} (known: {', '.join((AUTO, *known))})")
    return name


@lru_cache
def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported for this."""
    return find_spec(package) is not None


_PLAIN = (Tensor, nn.Parameter)  # not the stand-ins of tracing
# Chosen while torch.compile traces, which cannot trace the choosing.
traceable_request = torch.compiler.assume_constant_result(requested_backend)
# Below, a handful of torch's calls costs less than any set-up.
FEWEST_TOKENS = 4
_FEWEST_NUMBERS = 2**12


def recurrence_backend(
    op: str, given: str, known: Sequence[str], tensors: Sequence[Tensor], kernels: Sequence[str]
) -> str:
    """The backend for a recurrence over T tokens; its plain forms are eager, perhaps also chunked.

    Left open it is ``eager`` for a few tokens, else ``numba`` on a CPU, one of the kernels on CUDA,
    and ``chunked``, or ``eager``, for all else.

    Args:
        op: its name.
        given: what the call says.
        known: all that the op has.
        tensors: ``[B, T, ...]`` the first.
        kernels: packages for CUDA whose kernels fit the call.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    name = traceable_request(op, given, known)
    if name in ("eager", "chunked"):
        return name
    obstacles = {
        name: obstacle_to(name, tensors) if name in ("numba", *kernels) else "does not fit the call"
        for name in known
        if name not in ("eager", "chunked")
    }
    if name != AUTO:
        if obstacles[name]:
            raise ValueError(f"{op} backend {name!r} {obstacles[name]}")
        return name
    if tensors[0].shape[1] < FEWEST_TOKENS:
        return "eager"
    plain = "chunked" if "chunked" in known else "eager"
    return next((name for name, obstacle in obstacles.items() if not obstacle), plain)


def pass_backend(op: str, given: str, tensors: Sequence[Tensor]) -> str:
    """The backend for an op that is one pass over memory in ``numba`` and several in ``eager``.

    Args:
        op: its name.
        given: what the call says.
        tensors: the first ``[..., C]``; there must be many numbers in it to make a pass count.

    Raises:
        ValueError: the backend is unknown, or does not fit the tensors.
    """
    name = traceable_request(op, given, ("eager", "numba"))
    if name == "eager" or (name == AUTO and tensors[0].numel() < _FEWEST_NUMBERS):
        return "eager"
    obstacle = obstacle_to("numba", tensors)
    if name == "numba" and obstacle:
        raise ValueError(f"{op} backend 'numba' {obstacle}")
    return "eager" if obstacle else "numba"


def takes_steps(device: torch.device) -> bool:
    """Whether a token may be done in compiled calls (`ops.step`), which have no gradient.

    Not where the environment variable chooses anything but ``numba`` for any op.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not is_observed(())
        and not _has_any_global_hook()
        and _names_only_numba(os.environ.get(VARIABLE, ""))
    )


@lru_cache
def _names_only_numba(said: str) -> bool:
    names = {part.rpartition("=")[2].strip() for part in said.split(",")}
    return names <= {"", AUTO, "numba"}


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.compile or torch.export is at work, or stand-ins take the tensors' places."""
    return torch.compiler.is_compiling() or any(type(tensor) not in _PLAIN for tensor in tensors)


def is_observed(tensors: Sequence[Tensor]) -> bool:
    """Whether something wants to see torch's own operations, which only the eager loop consists of.

    That is: tracing, function transforms, forward gradients, and modes such as a counter of FLOPs.
    """
    return (
        is_traced(tensors)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def obstacle_to(package: str, tensors: Sequence[Tensor]) -> str:
    """Why what runs outside of torch cannot take these tensors; empty if it can."""
    if is_observed(tensors):
        return "cannot be traced"
    device = "cpu" if package == "numba" else "cuda"
    if any(tensor.device.type != device for tensor in tensors):
        return f"is for {device.upper()} only"
    if package == "numba":
        unknown = any(tensor.dtype == torch.float16 for tensor in tensors)
        return "knows no float16" if unknown else ""
    return "" if is_installed(package) else f"needs the package {package}"


def _from_environment(op: str) -> str:
    chosen, said = AUTO, os.environ.get(VARIABLE, "")
    if not said:
        return chosen
    for part in said.split(","):
        name, equals, value = (text.strip() for text in part.partition("="))
        if not equals and name:
            chosen = name
        elif name == op and value:
            return value
    return chosen


def compiled(*flags: str, inlined: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile with Numba at the first call, and keep the code on disk where possible.

    Args:
        *flags: what floating-point arithmetic may do, in LLVM's names. "reassoc" lets sums be
            vectorised; "fast" would also hide a NaN.
        inlined: for a function that another compiled one calls. Without it a process that compiles
            runs the callee's own code, one that loads from disk the copy within the caller's, and
            the two were optimised apart: sums differ in their last bits.
    """
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(flags)}
    options["forceinline"] = inlined

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            made = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep it in can be written
            return njit(**options)(function)
        # Numba compiles anew if the function's own file has changed, whatever has become of the
        # functions that were compiled into it.
        with suppress(AttributeError):  # without a compiler, or where Numba keeps it elsewhere
            kept = made._cache._cache_file
            kept._source_stamp = (kept._source_stamp, _sources())
        return made

    return compile_function


@lru_cache
def _sources() -> str:
    """Stands for all files of `ops`."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
