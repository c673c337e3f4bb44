"""The context store against naive forms written from DESIGN 1.2 and 1.6."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contextlm.data.windows import IGNORED, Windows
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import ContextStoreSettings
from contextlm.training import context_store
from contextlm.training.context_store import (
    ContextStore,
    StoredWindows,
    fill_context_store,
    parallel_contexts,
)

V, D, C, P = 13, 6, 5, 23
FLOAT32 = {"rtol": 2e-7, "atol": 1e-9}  # half a unit in the last place on disk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last of them incomplete."""
    monkeypatch.setattr(context_store, "CHUNK", 7)


class Made:
    """A block in float64 with lively norms, a table of embeddings, and a stream."""

    def __init__(self, layers: int = 2, seed: int = 0):
        torch.manual_seed(seed)
        self.block = ContextBlock(C, D, layers).double()
        for parameter in self.block.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        self.table = torch.randn(V, D, dtype=torch.float64)
        self.tokens = np.random.default_rng(seed).integers(0, V, P).astype(np.uint16)
        self.start = torch.randn(P, C, dtype=torch.float64)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def fill(self, folder: Path, passes: int = 2, **settings) -> ContextStore:
        return fill_context_store(
            self.block,
            self.embed,
            self.tokens,
            self.start,
            passes,
            ContextStoreSettings(**settings),
            folder,
        )

    def context(self, previous: Tensor, position: int) -> Tensor:
        """The context of one position from the one that it is fed."""
        embedded = self.table[int(self.tokens[position])]
        context = previous
        for layer in self.block.layers:
            inner = (
                layer.update.weight.detach() @ torch.cat([context, embedded])
                + layer.update.bias.detach()
            )
            moved = context + 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            centred = moved - moved.sum() / C
            spread = torch.sqrt((centred**2).sum() / C + 1e-5)
            context = centred / spread * layer.norm.weight.detach() + layer.norm.bias.detach()
        return context

    def sequential(self) -> Tensor:
        state, found = torch.zeros(C, dtype=torch.float64), []
        for position in range(P):
            state = self.context(state, position)
            found.append(state)
        return torch.stack(found)

    def parallel(self, passes: int) -> Tensor:
        contexts = list(self.start)
        for _ in range(passes):
            fed = [torch.zeros(C, dtype=torch.float64), *contexts[:-1]]
            contexts = [self.context(fed[position], position) for position in range(P)]
        return torch.stack(contexts)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_sequential_store_is_the_recurrence(tmp_path, layers):
    made = Made(layers)
    store = made.fill(tmp_path)
    torch.testing.assert_close(store.rows(0, P).double(), made.sequential(), **FLOAT32)
    on_disk = np.fromfile(store.path, dtype=np.float32).reshape(P, C)
    assert np.array_equal(on_disk, store.rows(0, P).numpy())


@pytest.mark.parametrize(("layers", "passes"), [(1, 1), (2, 2), (2, 5)])
def test_parallel_filling_is_a_literal_loop(tmp_path, layers, passes):
    made = Made(layers)
    start = made.start.clone()
    exact = parallel_contexts(made.block, made.embed, made.tokens, made.start, passes)
    torch.testing.assert_close(exact, made.parallel(passes), rtol=1e-9, atol=1e-9)
    store = made.fill(tmp_path, passes, fill="parallel")
    torch.testing.assert_close(store.rows(0, P).double(), made.parallel(passes), **FLOAT32)
    assert torch.equal(made.start, start)


def test_as_many_passes_as_positions_are_the_recurrence():
    made = Made()
    contexts = parallel_contexts(made.block, made.embed, made.tokens, made.start, P)
    torch.testing.assert_close(contexts, made.sequential(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("fill", "passes"), [("sequential", 1), ("parallel", 3)])
def test_drift_is_the_mean_square_between_the_two(tmp_path, fill, passes):
    made = Made()
    drift = made.fill(tmp_path, passes, fill=fill, dtype="bfloat16").drift
    pairs = zip(made.sequential().flatten(), made.parallel(passes).flatten(), strict=True)
    expected = sum((a.item() - b.item()) ** 2 for a, b in pairs) / (P * C)
    assert drift == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert expected > 0.01


def test_bfloat16_rounds_and_takes_half_the_room(tmp_path):
    made = Made()
    whole, half = (made.fill(tmp_path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    rounded = made.sequential().to(torch.bfloat16).float()
    assert torch.equal(half.rows(0, P), rounded)
    assert not torch.equal(half.rows(0, P), whole.rows(0, P))
    assert whole.nbytes == whole.path.stat().st_size == P * C * 4
    assert half.nbytes == half.path.stat().st_size == P * C * 2
    assert whole.path != half.path


@pytest.mark.parametrize(
    ("start", "stop"),
    [(3, 9), (-4, 5), (-9, -2), (P - 2, P + 3), (P, P + 4), (-2, P + 2)],
)
def test_rows_are_zero_outside_the_stream(tmp_path, start, stop):
    store = Made().fill(tmp_path)
    whole, rows = store.rows(0, P), store.rows(start, stop)
    assert rows.shape == (stop - start, C)
    for row, position in zip(rows, range(start, stop), strict=True):
        expected = whole[position] if 0 <= position < P else torch.zeros(C)
        assert torch.equal(row, expected)


def test_a_second_call_reads_what_the_first_one_wrote(tmp_path, monkeypatch):
    made = Made()
    first = made.fill(tmp_path)
    monkeypatch.setattr(context_store, "parallel_contexts", None)  # calling it would fail
    second = made.fill(tmp_path)
    assert (second.path, second.drift) == (first.path, first.drift)
    assert torch.equal(second.rows(0, P), first.rows(0, P))


def test_whatever_the_contexts_depend_on_gives_another_file(tmp_path):
    def changed(change: str) -> Made:
        made = Made()
        if change == "weight":
            made.block.layers[1].update.weight.data[0, 0] += 1e-3
        if change == "norm":
            made.block.layers[0].norm.bias.data[2] += 1e-3
        if change == "stream":
            made.tokens[-1] = (made.tokens[-1] + 1) % V
        if change == "order":
            made.tokens = made.tokens[::-1].copy()
        if change == "embedding":
            made.table[int(made.tokens[4]), 0] += 1e-3
        if change == "start":
            made.start[0, 0] += 1e-3
        return made

    changes = ["nothing", "weight", "norm", "stream", "order", "embedding", "start"]
    paths = [changed(change).fill(tmp_path).path for change in changes]
    paths += [
        Made().fill(tmp_path, passes=3).path,
        Made().fill(tmp_path, fill="parallel").path,
        Made().fill(tmp_path, dtype="bfloat16").path,
    ]
    assert len(set(paths)) == len(paths)
    assert changed("nothing").fill(tmp_path).path == paths[0]


def test_embeddings_of_tokens_that_do_not_occur_make_no_other_store(tmp_path):
    made, other = Made(), Made()
    absent = sorted(set(range(V)) - set(made.tokens.tolist()))
    assert absent
    other.table[absent] += 1
    assert other.fill(tmp_path).path == made.fill(tmp_path).path


def test_a_filling_that_was_cut_short_is_done_again(tmp_path):
    made = Made()
    store = made.fill(tmp_path)
    good = store.rows(0, P)
    store.path.with_suffix(".json").unlink()  # written last
    store.path.write_bytes(b"")
    assert torch.equal(made.fill(tmp_path).rows(0, P), good)


@pytest.mark.parametrize("history", [0, 1, 12])
def test_items_hold_the_contexts_before_and_in_the_window(tmp_path, history):
    made = Made()
    store = made.fill(tmp_path)
    whole = store.rows(0, P)
    windows = Windows(made.tokens, 5, fill=True)
    stored = StoredWindows(windows, store, history)
    assert len(stored) == len(windows) == 5  # 0, 5, 10, 15, and 20 with 3 of 5 tokens
    for index, item in enumerate(stored):
        start = 5 * index
        assert set(item) == {"input_ids", "labels", "contexts", "position_ids"}
        assert item["input_ids"].tolist() == windows[index]["input_ids"].tolist()
        assert item["labels"].tolist() == windows[index]["labels"].tolist()
        assert item["position_ids"].tolist() == list(range(start, start + 5))
        assert item["position_ids"].dtype == torch.int64
        assert item["contexts"].shape == (history + 5, C)
        for row, position in zip(item["contexts"], range(start - history, start + 5), strict=True):
            expected = whole[position] if 0 <= position < P else torch.zeros(C)
            assert torch.equal(row, expected)
    for key, value in stored[-1].items():
        assert torch.equal(value, stored[4][key])
    with pytest.raises(IndexError):
        stored[5]
    last = stored[4]
    assert last["labels"].tolist()[2:] == [IGNORED] * 3
    assert (last["contexts"][-2:] == 0).all()
    assert (last["contexts"][-3] != 0).any()


def test_overlapping_windows_find_their_places(tmp_path):
    made = Made()
    store = made.fill(tmp_path)
    stored = StoredWindows(Windows(made.tokens, 6, stride=4), store, 1)
    assert [item["position_ids"][0].item() for item in stored] == [0, 4, 8, 12, 16]
    assert torch.equal(stored[2]["contexts"], store.rows(7, 14))
