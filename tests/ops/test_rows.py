"""Compiled loops in threads."""

from __future__ import annotations

import multiprocessing
import time
import warnings

import pytest
import torch

from contextlm.ops.rows import in_threads


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize("most", [None, 0, 2])
def test_each_row_is_in_one_part(monkeypatch: pytest.MonkeyPatch, rows: int, most: int | None):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    done: list[int] = []
    in_threads(lambda part: done.extend(range(part.start, part.stop)), rows, most)
    assert sorted(done) == list(range(rows))


@pytest.mark.parametrize("bad", [0, 1])
def test_what_a_part_raises_is_raised_when_all_are_done(monkeypatch, bad: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    done = []

    def work(part: slice) -> None:
        if part.start == bad:
            raise ZeroDivisionError
        time.sleep(0.05)
        done.append(part.start)

    with pytest.raises(ZeroDivisionError):
        in_threads(work, 2)
    assert done == [1 - bad]


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its parent are not there, and would be waited for in vain."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(part: slice) -> None:
        time.sleep(0.05)  # so that one thread does not do it all

    in_threads(work, 2)
    time.sleep(0.05)
    child = multiprocessing.get_context("fork").Process(target=in_threads, args=(work, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        child.start()
    child.join(20)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
