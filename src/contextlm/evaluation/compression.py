"""What a smaller cache costs: a policy beside the model's own cache, on one text.

The text is read once in pieces of `PIECE` tokens with the policy's cache, as decoding would see it:
a policy that drops or rounds tokens only after a piece does so after each of these. Next-token
distributions are compared with those of the full cache, which stand in a file meanwhile.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contextlm.compress.base import Policy, Stack
from contextlm.compress.calibration import Calibration
from contextlm.compress.installed import CompressedCache
from contextlm.evaluation.memory import cache_bytes, feed, feed_all, measure_cache, position_limit
from contextlm.evaluation.speed import now
from contextlm.results.compression import Bucket, PolicyFigures
from contextlm.results.facts import CacheBytes

PIECE = 64
DEPTHS = (0.1, 0.35, 0.6, 0.85)
DECODED = 24
DIGITS = 5

_KEY = " The pass key is {digits}. Remember it. {digits} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """A prompt that hides digits at some depth of a text, and the digits' tokens."""

    depth: float
    prompt_1T: Tensor
    answer_T: Tensor


def passkeys(
    tokenizer: PreTrainedTokenizerFast, text_T: Tensor, tokens: int, depths: Sequence[float]
) -> list[Passkey]:
    """One prompt of `tokens` tokens for each depth, with noise from the text around the digits.

    What is longer without any noise is cut at its beginning, digits or not.
    """
    made = []
    for number, depth in enumerate(depths):
        digits = str(np.random.default_rng(number).integers(10 ** (DIGITS - 1), 10**DIGITS))
        key_T, question_T, answer_T = (
            torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (_KEY.format(digits=digits), _QUESTION, f" {digits}")
        )
        noise = max(0, tokens - len(key_T) - len(question_T) - len(answer_T))
        before = round(depth * noise)
        prompt_T = torch.cat(
            [text_T[:before], key_T, text_T[before : before + max(0, noise - before)], question_T]
        )
        prompt_T = prompt_T[-max(1, tokens - len(answer_T)) :]
        made.append(Passkey(depth, prompt_T[None], answer_T))
    return made


class Measuring:
    """One model and text; `policy` measures a policy.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        text_T: the text; its first ``tokens + 1`` tokens are read.
        tokens: how many, ascending, after which bytes are counted; the last is the text's length.
        reference: a file that holds the full cache's distributions.
        calibration: for policies that are fitted.
        beyond: more tokens than the text has, after which bytes alone are counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        text_T: Tensor,
        tokens: Sequence[int],
        reference: Path,
        calibration: Calibration,
        beyond: Sequence[int] = (),
    ):
        self.model, self.calibration = model, calibration
        self.tokens, self.beyond = list(tokens), list(beyond)
        self.text_1T = text_T[None, : self.tokens[-1] + 1].to(model.device)
        # As many tokens as the text, unless no positions are left then to decode in.
        room = min(self.tokens[-1], (position_limit(model) or math.inf) - DECODED)
        self.prompts = passkeys(tokenizer, text_T, int(room), DEPTHS)
        shape = (self.tokens[-1], model.config.vocab_size)
        self._reference = np.lib.format.open_memmap(
            reference, mode="w+", dtype=np.float32, shape=shape
        )
        self._full: list[CacheBytes] | None = None

    def policy(self, policy: Policy, told: Callable[[str], object]) -> PolicyFigures:
        """Measure one policy on the model; the first must be `full`.

        Args:
            told: what is being done.
        """
        started = time.perf_counter()
        told("fitting" if policy.needs_calibration else "reading the text")
        with CompressedCache(self.model, policy, calibration=self.calibration):
            return self._figures(self.model, policy, told, started)

    def other(
        self, model: PreTrainedModel, policy: Policy, told: Callable[[str], object]
    ) -> PolicyFigures:
        """Measure a model that keeps a policy of its own, against the first model's full cache."""
        return self._figures(model, policy, told, time.perf_counter())

    @torch.no_grad()
    def _figures(
        self,
        model: PreTrainedModel,
        policy: Policy,
        told: Callable[[str], object],
        started: float,
    ) -> PolicyFigures:
        losses_T, kl, same, held = self._read(model, told)
        told("passkeys")
        found, prefill, decode = self._retrieve(model)
        self._full = self._full or held
        told("counting bytes at longer texts")
        longer = measure_cache(model, self.beyond, model.device)
        return PolicyFigures(
            spec=policy.spec,
            name=name_of(policy),
            share=held[-1].logical / self._full[-1].logical,
            cache=[*held, *longer],
            positions=[
                Bucket(first=first, last=last, loss=float(losses_T[first:last].mean()))
                for first, last in pairwise(_edges(self.tokens[-1]))
            ],
            loss=float(losses_T.mean()),
            kl=kl,
            same_tokens=same,
            passkey=found,
            prefill_tokens_per_second=prefill,
            decode_tokens_per_second=decode,
            seconds=time.perf_counter() - started,
        )

    def _read(
        self, model: PreTrainedModel, told: Callable[[str], object]
    ) -> tuple[Tensor, float, float, list[CacheBytes]]:
        """Loss of each token, divergence, share of equal tokens, and bytes held."""
        first = self._full is None
        length = self.tokens[-1]
        losses, held = [], []
        divergence, equal = 0.0, 0
        cache = None
        ends = sorted({*range(PIECE, length, PIECE), *self.tokens})
        for start, stop in pairwise([0, *ends]):
            logits_BTV, cache = feed_all(model, self.text_1T[:, start:stop], cache)
            log_TV = logits_BTV[0].float().log_softmax(-1)
            losses.append(
                F.nll_loss(log_TV, self.text_1T[0, start + 1 : stop + 1], reduction="none")
            )
            if first:
                self._reference[start:stop] = log_TV.cpu().numpy()
            full_TV = torch.from_numpy(self._reference[start:stop]).to(log_TV.device)
            divergence += float(F.kl_div(log_TV, full_TV, reduction="sum", log_target=True))
            equal += int((log_TV.argmax(-1) == full_TV.argmax(-1)).sum())
            if stop in self.tokens:
                held.append(CacheBytes(tokens=stop, **cache_bytes(cache)._asdict()))
            told(f"reading the text: {stop:,} of {length:,} tokens")
        return torch.cat(losses).cpu(), divergence / length, equal / length, held

    def _retrieve(self, model: PreTrainedModel) -> tuple[dict[str, float], float, float]:
        """Shares of digits found by depth, and tokens a second of prefill and of decoding."""
        found, reading, writing = {}, [], []
        place = model.device
        for prompt in self.prompts:
            begun = now(place)
            logits_BV, cache = feed(model, prompt.prompt_1T.to(place), None)
            read = now(place)
            reading.append(prompt.prompt_1T.shape[1] / (read - begun))
            right = 0
            for token in prompt.answer_T.tolist():
                right += int(logits_BV[0].argmax()) == token
                logits_BV, cache = feed(model, torch.tensor([[token]], device=place), cache)
            found[f"{prompt.depth:g}"] = right / len(prompt.answer_T)
            if prompt is self.prompts[-1]:
                for _ in range(DECODED):
                    begun = now(place)
                    logits_BV, cache = feed(model, logits_BV.argmax(-1)[:, None], cache)
                    writing.append(now(place) - begun)
        return found, statistics.median(reading), 1 / statistics.median(writing)


@contextmanager
def reference_file() -> Iterator[Path]:
    """A place for the full cache's distributions, for the time of the block."""
    with TemporaryDirectory(prefix="contextlm-") as folder:
        yield Path(folder) / "reference.npy"


def name_of(policy: Policy) -> str:
    """The policy's name without its settings."""
    if isinstance(policy, Stack):
        return f"{policy.selection.name}+{policy.form.name}"
    return policy.name


def _edges(tokens: int) -> list[int]:
    """Buckets of positions that grow by doubling."""
    edges = [0]
    while (edge := max(128, 2 * edges[-1])) < tokens:
        edges.append(edge)
    return [*edges, tokens]
