"""Freed memory that is kept costs no page faults when it is taken again."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from contextlm.training.host_memory import freed_memory_kept

MEGABYTES = 64


def faults_of_a_block() -> int:
    """Page faults of taking, writing and freeing a large block."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(MEGABYTES * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_block_that_is_taken_again_faults_no_more():
    with freed_memory_kept():
        # The heap settles with the second block or the third.
        first, *_, again = [faults_of_a_block() for _ in range(4)]
    after = [faults_of_a_block() for _ in range(2)]
    assert first > 1000
    assert again < 0.05 * first
    assert min(after) > 0.5 * first  # as before: the system's pages come and go
