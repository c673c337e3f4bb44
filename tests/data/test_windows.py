from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from contextlm.base.errors import InputError
from contextlm.data.windows import IGNORED, Windows, model_inputs


def naive(tokens: list[int], length: int, stride: int, offset: int) -> list[tuple[list[int], ...]]:
    """Every window that has all its inputs and targets, one token at a time."""
    found = []
    start = 0
    while start + length - 1 + offset < len(tokens):
        inputs = [tokens[start + j] for j in range(length)]
        labels = [tokens[start + j + offset] for j in range(length)]
        found.append((inputs, labels))
        start += stride
    return found


@pytest.mark.parametrize("count", [2, 63, 129, 130, 1000])
@pytest.mark.parametrize("length", [1, 7, 128])
@pytest.mark.parametrize("stride", [1, 5, None, 129])
@pytest.mark.parametrize("offset", [1, 2])
def test_windows_equal_the_naive_loop(
    count: int, length: int, stride: int | None, offset: int
) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, count).astype(np.uint16)
    expected = naive(tokens.tolist(), length, stride or length, offset)
    if not expected:
        with pytest.raises(InputError, match=f"{count} tokens, and one window needs"):
            Windows(tokens, length, stride, offset)
        return
    windows = Windows(tokens, length, stride, offset)
    assert [(w["input_ids"].tolist(), w["labels"].tolist()) for w in windows] == expected
    assert len(windows) == len(expected)
    assert windows.tokens_covered == (len(expected) - 1) * (stride or length) + length + 1
    assert windows.stream().tolist() == tokens[: windows.tokens_covered].tolist()


def test_samples_limits_the_windows_and_what_they_cover() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one, two = (Windows(tokens, 16, target_offset=k, samples=10) for k in (1, 2))
    assert len(one) == len(two) == 10
    assert one.tokens_covered == two.tokens_covered == 161
    assert int(two[9]["labels"][-1]) == 161


def test_too_few_tokens_are_named() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    with pytest.raises(InputError, match="pydocs is too small: 100 tokens make 6 windows, 7 "):
        Windows(tokens, 16, samples=7, name="pydocs")
    with pytest.raises(InputError, match="100 tokens, and one window needs 102"):
        Windows(tokens, 100, target_offset=2)


@pytest.mark.parametrize("key", ["sequence_length", "stride", "target_offset", "samples"])
def test_values_below_one_are_named(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} must be at least 1, got 0"):
        Windows(np.arange(9), **{"sequence_length": 4, key: 0})


def test_indexing_is_a_sequences() -> None:
    windows = Windows(np.arange(10), 3)
    assert windows[-1]["input_ids"].tolist() == windows[2]["input_ids"].tolist() == [6, 7, 8]
    for index in (3, -4):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize("count", [5, 63, 131])
@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize("stride", [5, None])
@pytest.mark.parametrize("offset", [1, 2])
def test_filled_windows_keep_every_start_with_a_target(
    count: int, length: int, stride: int | None, offset: int
) -> None:
    tokens = np.random.default_rng(0).integers(1, 60_000, count).astype(np.uint16)
    expected = []
    for start in range(0, count - offset, stride or length):
        at = range(start, start + length)
        inputs = [int(tokens[i]) if i < count else 0 for i in at]
        labels = [int(tokens[i + offset]) if i + offset < count else IGNORED for i in at]
        expected.append((inputs, labels))
    windows = Windows(tokens, length, stride, offset, fill=True)
    assert [(w["input_ids"].tolist(), w["labels"].tolist()) for w in windows] == expected
    assert [windows.start(i) for i in range(len(windows))] == list(
        range(0, count - offset, stride or length)
    )
    whole = (len(expected) - 1) * (stride or length) + length + 1
    assert windows.tokens_covered == min(whole, count) == len(windows.stream())


def test_a_filled_window_needs_one_target() -> None:
    assert len(Windows(np.arange(2), 8, fill=True)) == 1
    with pytest.raises(InputError, match="1 tokens, and one window needs 2"):
        Windows(np.arange(1), 8, fill=True)
    with pytest.raises(InputError, match="9 tokens make 2 windows, 3 samples"):
        Windows(np.arange(9), 4, fill=True, samples=3)


@pytest.mark.parametrize("history", [1, 4, 5, 11])
@pytest.mark.parametrize("fill", [False, True])
def test_history_is_the_tokens_before_and_is_masked_before_the_stream(
    history: int, fill: bool
) -> None:
    tokens = np.arange(100, 123, dtype=np.uint16)
    plain = Windows(tokens, 5, fill=fill)
    windows = Windows(tokens, 5, history=history, fill=fill)
    assert len(windows) == len(plain)
    for index, (window, same) in enumerate(zip(windows, plain, strict=True)):
        at = [5 * index + j for j in range(-history, 5)]
        expected = [100 + i if 0 <= i < 23 else 0 for i in at]
        assert window["input_ids"].tolist() == expected
        assert window["attention_mask"].tolist() == [int(i >= 0) for i in at]
        assert window["labels"].tolist() == same["labels"].tolist()
    assert windows[-1]["input_ids"].tolist() == windows[len(windows) - 1]["input_ids"].tolist()
    assert windows.tokens_covered == plain.tokens_covered
    assert "attention_mask" not in plain[0]


def test_a_model_scores_the_window_and_not_its_history() -> None:
    windows = Windows(np.arange(1, 40), 6, history=4)
    batch = next(iter(DataLoader(windows, batch_size=3)))
    inputs, labels = model_inputs(batch)
    assert set(inputs) == {"input_ids", "attention_mask", "logits_to_keep"}
    assert inputs["logits_to_keep"] == 6
    assert inputs["input_ids"].shape == (3, 10)
    assert torch.equal(labels, batch["labels"])
    # The last so many inputs are those that the labels belong to.
    assert torch.equal(inputs["input_ids"][:, -6:] + 1, labels)
    assert "labels" in batch
