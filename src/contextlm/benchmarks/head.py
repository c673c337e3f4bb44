"""What computing a head's loss block by block gains: time and memory beside all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from contextlm.benchmarks.harness import Answer, Options, Target, interleaved
from contextlm.evaluation.memory import PeakMemory, memory_now
from contextlm.ops.linear_cross_entropy import linear_cross_entropy
from contextlm.training.host_memory import freed_memory_kept

TOKENS, WIDTH, VOCABULARY = 8192, 768, 50_257
CPU = torch.device("cpu")
FORMS = {"blocks": "blocks", "plain": "eager"}
TARGETS = {"time": Target(1.5), "memory": Target(10.0)}


def measure(options: Options) -> Answer:
    """Loss and gradients of a frozen head (its input's) and of one that learns (its weight's too).

    In bfloat16 and in float32; the targets are for a frozen head in bfloat16. Memory is the growth
    of the process's resident set to its peak, which Linux alone can tell for one part of a process.
    """
    tokens, width, vocabulary = (60, 8, 50) if options.smoke else (TOKENS, WIDTH, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight_VD = 0.02 * torch.randn(vocabulary, width, generator=generator)
    targets_N = torch.randint(vocabulary, (tokens,), generator=generator)
    answer = Answer(settings={"N": tokens, "D": width, "V": vocabulary})
    for dtype in (torch.bfloat16, torch.float32):
        precision = str(dtype).removeprefix("torch.")
        for head in ("frozen", "trained"):
            weight_VD.grad = None
            weight_VD.requires_grad_(head == "trained")
            cases = {
                form: partial(_step, hidden_ND, weight_VD, targets_N, dtype, backend)
                for form, backend in FORMS.items()
            }
            memory = {form: _growth(case) for form, case in cases.items()}
            with freed_memory_kept():  # as training does
                times = interleaved(cases, options.repeats or 3)
            for form in FORMS:
                row = {"precision": precision, "head": head, "form": form}
                answer.rows.append({**row, "MB": memory[form] / 1e6, **times[form].milliseconds()})
            ratios = {
                "time": times["plain"].median / times["blocks"].median,
                "memory": memory["plain"] / max(memory["blocks"], 1),
            }
            aimed = head == "frozen" and dtype == torch.bfloat16
            for what, ratio in ratios.items():
                name = f"head_{head}_{precision}_{what}_vs_plain"
                answer.compare(name, ratio, TARGETS[what] if aimed else None)
    return answer


def _step(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, backend: str
) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss = linear_cross_entropy(hidden_ND, weight_VD, None, targets_N, backend=backend)
    (loss / len(targets_N)).backward()
    hidden_ND.grad = weight_VD.grad = None


def _growth(case: Callable[[], None]) -> int:
    """Bytes by which the resident set grows while the case runs."""
    case()  # what is loaded once
    before, peak = memory_now(CPU)[0], PeakMemory(CPU)
    case()
    return peak.host_bytes() - before
