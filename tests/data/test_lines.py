"""Lines as samples, against a form that goes one line and one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import make_corpus
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from contextlm.base.errors import InputError
from contextlm.data.corpus import Corpus, line_corpus
from contextlm.data.samples import Lines
from contextlm.data.windows import IGNORED
from contextlm.evaluation.quality import evaluate_quality

PAD, BEGIN, END = 0, 2, 3


def naive(lines: list[list[int]], length: int) -> list[tuple[list[int], list[int]]]:
    """``(inputs, targets)`` of every piece, without padding."""
    found = []
    for words in lines:
        whole = [BEGIN, *words, END]
        for start in range(0, len(whole) - 1, length):
            piece = whole[start : start + length + 1]
            found.append((piece[:-1], piece[1:]))
    return found


def padded(values: list[int], length: int, fill: int) -> list[int]:
    return values + [fill] * (length - len(values))


def stored(lines: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The lines as a token store holds them."""
    tokens = [token for words in lines for token in (*words, END)]
    offsets = np.cumsum([0, *(len(words) + 1 for words in lines)])
    return np.array(tokens, dtype=np.uint16), offsets


def made(lines: list[list[int]], length: int, samples: int | None = None) -> Lines:
    return Lines(*stored(lines), length, begin=BEGIN, pad=PAD, samples=samples)


LINES = st.lists(st.lists(st.integers(4, 60_000), max_size=20), min_size=1, max_size=8)


@given(lines=LINES, length=st.integers(1, 12))
def test_lines_equal_the_naive_loop(lines: list[list[int]], length: int) -> None:
    expected = naive(lines, length)
    samples = made(lines, length)
    assert [(s["input_ids"].tolist(), s["labels"].tolist()) for s in samples] == [
        (padded(inputs, length, PAD), padded(targets, length, IGNORED))
        for inputs, targets in expected
    ]
    assert len(samples) == len(expected)
    scored = [target for _, targets in expected for target in targets]
    assert samples.stream().tolist() == scored
    assert samples.tokens_covered == len(scored)


@given(lines=LINES, length=st.integers(1, 12), data=st.data())
def test_samples_takes_the_first(lines: list[list[int]], length: int, data: st.DataObject) -> None:
    expected = naive(lines, length)
    count = data.draw(st.integers(1, len(expected)))
    samples = made(lines, length, samples=count)
    assert len(samples) == count
    scored = [target for _, targets in expected[:count] for target in targets]
    assert samples.stream().tolist() == scored
    assert samples.tokens_covered == len(scored)


def test_items_are_int64_copies_and_indexing_is_a_sequences() -> None:
    tokens, offsets = stored([[65_535, 7], [9]])
    samples = Lines(tokens, offsets, 3, begin=BEGIN, pad=PAD)
    item = samples[0]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["labels"].tolist() == [65_535, 7, END]
    item["labels"][0] = 5
    assert tokens[0] == 65_535
    assert samples[-1]["input_ids"].tolist() == samples[1]["input_ids"].tolist()
    for index in (2, -3):
        with pytest.raises(IndexError):
            samples[index]
    batch = next(iter(DataLoader(samples, batch_size=2)))
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 3)


def test_too_few_lines_and_bad_values_are_named() -> None:
    with pytest.raises(InputError, match="2 lines make 3 samples of at most 2 tokens, 4 samples"):
        made([[5, 6], [7]], 2, samples=4)
    with pytest.raises(InputError, match="sequence_length must be at least 1, got 0"):
        made([[5]], 0)
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        made([[5]], 3, samples=0)


def test_padding_counts_for_nothing() -> None:
    """The loss of padded batches is that of the lines one at a time, without padding."""
    generator = np.random.default_rng(0)
    lines = [generator.integers(4, 50, n).tolist() for n in (1, 7, 3, 0, 12, 5)]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=9, attn_pdrop=0.0)
    )
    model = model.double().eval()
    total, correct, count = 0.0, 0, 0
    for inputs, targets in naive(lines, 9):
        logits = model(torch.tensor([inputs])).logits[0]
        total += F.cross_entropy(logits.float(), torch.tensor(targets), reduction="sum").item()
        correct += int((logits.argmax(-1) == torch.tensor(targets)).sum())
        count += len(targets)
    quality = evaluate_quality(model, made(lines, 9), 4, torch.device("cpu"))
    assert quality.tokens == count
    assert quality.loss == pytest.approx(total / count, rel=1e-6)
    assert quality.accuracy == correct / count


def sides(corpus: Corpus) -> tuple[list[str], list[str]]:
    lines = line_corpus(corpus, 0.2)
    return list(lines.train), list(lines.validation)


def test_every_line_goes_to_one_side() -> None:
    train = [f"  line {i % 700}\t\n\n \nline {i}\n" for i in range(1000)]
    validation = [f"held out {i}\nline {i}" for i in range(500)]
    first, second = sides(make_corpus(train, validation))
    every = [line.strip() for text in train + validation for line in text.split("\n")]
    assert sorted(first + second) == sorted(line for line in every if line)
    assert not set(first) & set(second)
    assert 0.17 < len(set(second)) / len(set(first + second)) < 0.23
    order = {line: place for place, line in enumerate(dict.fromkeys(line for line in every))}
    assert [order[line] for line in dict.fromkeys(second)] == sorted(
        order[line] for line in set(second)
    )
    # A line's text alone decides, wherever it stands and however it is spaced or capitalised.
    again = [text.replace(" ", "  ").upper() for text in reversed(validation + train)]
    for side, other in zip((first, second), sides(make_corpus(again)), strict=True):
        squeezed = {" ".join(line.split()).lower() for line in other}
        assert {line for line in side if not line.startswith("held")} <= squeezed


def test_another_share_and_given_splits() -> None:
    corpus = make_corpus(["\n".join(f"line {n}" for n in range(20_000))], ["held\n\nout"])
    for share in (0.1, 0.005):
        held_out = len(line_corpus(corpus, share).validation)
        assert abs(held_out / 20_000 - share) < 0.3 * share
    assert line_corpus(corpus, 0.1).fingerprint == line_corpus(corpus, 0.1).fingerprint
    assert line_corpus(corpus, 0.1).fingerprint != line_corpus(corpus, 0.2).fingerprint
    given = line_corpus(corpus, None)
    assert (len(given.train), list(given.validation)) == (20_000, ["held", "out"])
