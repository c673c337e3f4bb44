"""Synthetic tasks: texts that ask for what they said before, which is what a cache must keep.

Each document is one question of retrieval in words of its own: a text, a ``?``, and answers, each
behind a ``*`` that says that the next word is to be scored (`samples.Answers` takes the marks out):

    recall    associative recall: keys and values, then each key again in another order
              k3 v7 k12 v1 ? k12 * v1 k3 * v7
    mqar      the same as in Zoology: keys are asked for among fillers, more often near than far;
              16 words a pair, of a vocabulary of 8,192
              k3 v7 k12 v1 w0 w0 k12 * v1 w0 w0 w0 w0 k3 * v7 w0 w0
    passkey   four digits somewhere in noise
              w4 w9 key d4 d8 d1 d5 w2 ... ? * d4 * d8 * d1 * d5
    needles   several named numbers of two digits in noise, then each name again
              w4 needle n2 d4 d8 w9 needle n7 d1 d1 ... ? n7 * d1 * d1 n2 * d4 * d8

Associative recall after Arora et al., "Zoology" (2023), with the queries after all pairs, or as in
its figure 2 (multi-query associative recall: 4, 8 and 16 pairs in 64, 128 and 256 words; there a
query's answer is not read, here it stands where a filler would); passkeys after Mohtashami and
Jaggi, "Landmark Attention" (2023).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from contextlm.base.errors import InputError
from contextlm.data.corpus import Corpus, checked_counts, is_held_out

QUESTION, MARK = "?", "*"
DOCUMENTS = (20_000, 1_000)
NEEDLE_TEXT = 256  # words before the question
_VERSION = 2
_MQAR_ENTRIES = 4096  # keys, and as many values
_MQAR_LARGEST = 256
_MQAR_SPREAD, _MQAR_POWER = 16, 0.01  # words a pair; distances have weights d^(power - 1)
_HELD_OUT = 0.2  # of all possible documents
_DIGITS = [f"d{n}" for n in range(10)]
_NOISE = [f"w{n}" for n in range(32)]
_NAMES = [f"n{n}" for n in range(32)]
_LARGEST = 4096


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        kind: its name.
        size: the largest level.
        levels: how hard its documents are; document i has level ``levels[i % len(levels)]``.
        unit: what levels count.
        write: one document, of a level.
        words: in all of its documents.
    """

    kind: str
    size: int
    levels: tuple[int, ...]
    unit: str
    write: Callable[[random.Random, int], list[str]]
    words: int

    def level_names(self) -> list[str]:
        """The levels, as a report names them."""
        return [f"{level:,} {self.unit}" for level in self.levels]


def _recall(draw: random.Random, pairs: int, entries: int) -> list[str]:
    keys = [f"k{n}" for n in draw.sample(range(entries), pairs)]
    value_of = {key: f"v{draw.randrange(entries)}" for key in keys}
    text = [word for key in keys for word in (key, value_of[key])]
    draw.shuffle(keys)
    return [*text, QUESTION, *(word for key in keys for word in (key, MARK, value_of[key]))]


def _mqar(draw: random.Random, pairs: int) -> list[str]:
    keys, values = (draw.sample(range(_MQAR_ENTRIES), pairs) for _ in range(2))
    text = [word for k, v in zip(keys, values, strict=True) for word in (f"k{k}", f"v{v}")]
    places = _MQAR_SPREAD * pairs // 2 - pairs  # of two words each
    free = {place: (place + 1) ** (_MQAR_POWER - 1) for place in range(places)}
    asked = {}
    for pair in range(pairs):
        (at,) = draw.choices(list(free), list(free.values()))
        del free[at]
        asked[at] = [f"k{keys[pair]}", MARK, f"v{values[pair]}"]
    return text + [word for place in range(places) for word in asked.get(place, ["w0", "w0"])]


def _passkey(draw: random.Random, length: int) -> list[str]:
    digits = draw.choices(_DIGITS, k=4)
    text = draw.choices(_NOISE, k=length - 5)
    at = draw.randint(0, len(text))
    text[at:at] = ["key", *digits]
    return [*text, QUESTION, *(word for digit in digits for word in (MARK, digit))]


def _needles(draw: random.Random, needles: int) -> list[str]:
    names = draw.sample(_NAMES, needles)
    digits = {name: draw.choices(_DIGITS, k=2) for name in names}
    text = draw.choices(_NOISE, k=NEEDLE_TEXT - 4 * needles)
    places = sorted((draw.randint(0, len(text)) for _ in names), reverse=True)
    for at, name in zip(places, names, strict=True):
        text[at:at] = ["needle", name, *digits[name]]
    draw.shuffle(names)
    asked = [
        word for name in names for word in (name, MARK, digits[name][0], MARK, digits[name][1])
    ]
    return [*text, QUESTION, *asked]


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first ... below last, and last."""
    levels = []
    while first < last:
        levels.append(first)
        first *= 2
    return (*levels, last)


def _recall_task(pairs: int) -> Task:
    entries = max(64, 2 * pairs)
    write = partial(_recall, entries=entries)
    return Task("recall", pairs, _doubling(2, pairs), "pairs", write, 2 * entries + 2)


def _mqar_task(pairs: int) -> Task:
    levels = _doubling(min(4, pairs), pairs)
    return Task("mqar", pairs, levels, "pairs", _mqar, 2 * _MQAR_ENTRIES + 2)


def _passkey_task(length: int) -> Task:
    levels = _doubling(max(8, length // 8), length)
    return Task("passkey", length, levels, "words", _passkey, len(_NOISE) + len(_DIGITS) + 3)


def _needles_task(needles: int) -> Task:
    words = len(_NOISE) + len(_NAMES) + len(_DIGITS) + 3
    return Task("needles", needles, _doubling(1, needles), "needles", _needles, words)


# Kind, what its size is called, the smallest and largest size.
_KINDS: dict[str, tuple[Callable[[int], Task], str, int, int]] = {
    "recall": (_recall_task, "PAIRS", 1, _LARGEST),
    "mqar": (_mqar_task, "PAIRS", 1, _MQAR_LARGEST),
    "passkey": (_passkey_task, "LENGTH", 8, 2**20),
    "needles": (_needles_task, "NEEDLES", 1, len(_NAMES)),
}


def find_task(name: str) -> Task | None:
    """The task of a corpus called ``KIND:SIZE``; None if it is no kind of this module.

    Raises:
        InputError: the size is missing or out of bounds.
    """
    kind, _, size = name.partition(":")
    if kind not in _KINDS:
        return None
    make, called, smallest, largest = _KINDS[kind]
    if not (size.isascii() and size.isdigit() and smallest <= int(size[:12]) <= largest):
        raise InputError(
            f"corpus {name!r}: expected {kind}:{called}, a number from {smallest} to {largest}"
        )
    return make(int(size))


def synthetic(task: Task, documents: tuple[int, int] | None) -> Corpus:
    """A corpus of a task's documents.

    The same documents come each time, whatever their number. The hash of a document's text says
    which split it may be in, so that none is in both.

    Args:
        task: from `find_task`.
        documents: how many in ``(train, validation)``; by default `DOCUMENTS`.

    Raises:
        InputError: a count below 1.
    """
    train, validation = checked_counts(documents or DOCUMENTS)
    name = f"{task.kind}:{task.size}"
    known = f"{name} {_VERSION} {train} {validation}"
    return Corpus(
        name=name,
        read=lambda: (
            [_document(task, "train", index) for index in range(train)],
            [_document(task, "validation", index) for index in range(validation)],
        ),
        append_end_of_text=False,
        fingerprint=hashlib.sha256(known.encode()).hexdigest(),
    )


def _document(task: Task, split: str, index: int) -> str:
    draw = random.Random(f"{task.kind} {task.size} {split} {index}")
    while True:
        text = " ".join(task.write(draw, task.levels[index % len(task.levels)]))
        if is_held_out(text, _HELD_OUT) == (split == "validation"):
            return text
