"""Freed memory that is kept costs no page faults when it is taken again."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from contextlm.training import host_memory
from contextlm.training.host_memory import freed_memory_kept

MEGABYTES = 64


def faults_of_a_block() -> int:
    """Page faults of taking, writing and freeing a large block."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MEGABYTES * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is asked for on Linux only")
def test_a_block_that_is_taken_again_faults_no_more():
    with freed_memory_kept() as kept:
        if not kept:
            pytest.skip("this Linux has another C library than glibc")
        # The heap settles with the second block or the third.
        first, *_, again = [faults_of_a_block() for _ in range(4)]
    after = [faults_of_a_block() for _ in range(2)]
    assert first > 1000
    assert again < 0.05 * first
    assert min(after) > 0.5 * first  # as before: the system's pages come and go


def test_a_fault_inside_restores_the_allocator(monkeypatch):
    told = []

    class Library:
        def mallopt(self, name, value):
            told.append((name, value))

        def malloc_trim(self, pad):
            told.append("trim")

    monkeypatch.setattr(host_memory, "_glibc", Library)
    with pytest.raises(KeyError), freed_memory_kept():
        raise KeyError
    assert dict(told[:3]) == host_memory._KEEP
    assert dict(told[3:6]) == host_memory._DEFAULTS
    assert told[6] == "trim"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    with freed_memory_kept() as kept:
        assert kept is False
