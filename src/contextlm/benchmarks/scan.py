"""How fast the recurrences are on each backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contextlm.benchmarks.harness import Answer, Options, Target, interleaved
from contextlm.ops.context_scan import context_scan, context_scan_backend
from contextlm.ops.linear_scan import linear_scan, linear_scan_backend

WIDTH = 256


def measure(options: Options) -> Answer:
    """Time `context_scan` without gradients at several batch sizes, and `linear_scan` with them."""
    answer = Answer(settings={"C": WIDTH, "dtype": "float32"})
    rounds = options.repeats or 9
    for batch, tokens in ((1, 2048), (8, 512), (32, 128)):
        tokens = 16 if options.smoke else tokens
        _context_scan(answer, batch, tokens, rounds)
    _linear_scan(answer, 16, 16 if options.smoke else 256, rounds)
    answer.targets["scan_b1_c256_vs_eager"] = Target(4.0)
    return answer


def _context_scan(answer: Answer, batch: int, tokens: int, rounds: int) -> None:
    inputs = _recurrence(batch, tokens)
    flat = [*(tensor for kind in inputs[:-1] for tensor in kind), inputs[-1]]
    chosen = context_scan_backend(flat, batch, tokens)
    answer.settings[f"context_scan auto, B={batch}"] = chosen
    names = ["eager", *sorted({"numba", chosen} - {"eager"})]
    cases = {name: partial(_forward, inputs, name) for name in names}
    times = interleaved(cases, rounds)
    for name, time in times.items():
        answer.rows.append(
            {"op": "context_scan", "B": batch, "T": tokens, "backend": name, **time.milliseconds()}
        )
    ratio = times["eager"].median / times[chosen].median
    answer.compare(f"scan_b{batch}_c{WIDTH}_vs_eager", ratio)


def _recurrence(batch: int, tokens: int) -> tuple[Any, ...]:
    """Random inputs of one context layer, as `context_scan` takes them."""
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.randn, generator=generator)
    norm_C = torch.ones(WIDTH)
    weight_CC = 0.1 * rand(WIDTH, WIDTH)
    start_BC = torch.zeros(batch, WIDTH)
    return [rand(batch, tokens, WIDTH)], [weight_CC], [norm_C], [0 * norm_C], start_BC


@torch.no_grad()
def _forward(inputs: tuple[Any, ...], backend: str) -> Tensor:
    return context_scan(*inputs, backend=backend)


def _linear_scan(answer: Answer, batch: int, tokens: int, rounds: int) -> None:
    """Forward and backward pass, beside an elementwise pass over the same memory."""
    generator = torch.Generator().manual_seed(0)
    gates_BTC = torch.rand(batch, tokens, WIDTH, generator=generator).requires_grad_()
    inputs_BTC = torch.randn(batch, tokens, WIDTH, generator=generator).requires_grad_()
    chosen = linear_scan_backend(gates_BTC, inputs_BTC)
    answer.settings["linear_scan auto"] = chosen
    names = dict.fromkeys(["eager", "parallel", chosen])
    cases: dict[str, Callable[[], object]] = {
        name: partial(_both_ways, partial(linear_scan, backend=name), gates_BTC, inputs_BTC)
        for name in names
    }
    cases["plain pass"] = partial(_both_ways, torch.addcmul, inputs_BTC, gates_BTC, inputs_BTC)
    times = interleaved(cases, rounds)
    for name, time in times.items():
        row = {"op": "linear_scan", "B": batch, "T": tokens, "backend": name}
        answer.rows.append({**row, **time.milliseconds()})
    answer.compare("linear_scan_vs_eager", times["eager"].median / times[chosen].median)
    answer.compare("linear_scan_vs_plain_pass", times["plain pass"].median / times[chosen].median)


def _both_ways(op: Callable[..., Tensor], *tensors: Tensor) -> object:
    return torch.autograd.grad(op(*tensors).sum(), list(dict.fromkeys(tensors)))
