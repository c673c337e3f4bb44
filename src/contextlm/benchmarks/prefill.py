"""How fast a long prompt is read."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedModel

from contextlm.benchmarks.harness import Answer, Options, Target, interleaved
from contextlm.benchmarks.subjects import SUBJECTS, build
from contextlm.evaluation.memory import feed

TOKENS = 8192


def measure(options: Options) -> Answer:
    """One prompt at once, each model in turns with its own baseline."""
    tokens = 48 if options.smoke else TOKENS
    answer = Answer(settings={"B": 1, "T": tokens, "dtype": "float32"})
    for baseline in [each for each in SUBJECTS if any(s.baseline == each.name for s in SUBJECTS)]:
        family = [baseline, *(each for each in SUBJECTS if each.baseline == baseline.name)]
        cases = {
            each.name: partial(_read, build(each, narrow=options.smoke), tokens) for each in family
        }
        times = interleaved(cases, options.repeats or 3)
        for each in family:
            row = {"model": each.name, "tokens/s": tokens / times[each.name].median}
            answer.rows.append({**row, **times[each.name].milliseconds()})
            if each.baseline is not None:
                ratio = times[each.baseline].median / times[each.name].median
                name = f"prefill_{each.name}_vs_{each.baseline}_at_{tokens}"
                answer.compare(name, ratio, Target(1.0))
    return answer


@torch.no_grad()
def _read(model: PreTrainedModel, tokens: int) -> None:
    feed(model, torch.ones(1, tokens, dtype=torch.long), None)
