"""How many cores the `tokenizers` library may use, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_variables_set_here: set[str] = set()  # environment variables that the user had left unset


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Within the block `tokenizers` uses all cores, unless the user's environment forbids it.

    Afterwards, where the user had not set ``TOKENIZERS_PARALLELISM``, it is off: a process that
    forks after a parallel use (a data loader's workers) would warn at each fork, or hang if it went
    on in parallel.
    """
    variable = "TOKENIZERS_PARALLELISM"
    if variable not in os.environ:
        _variables_set_here.add(variable)
    if variable in _variables_set_here:
        os.environ[variable] = "true"
    try:
        yield
    finally:
        if variable in _variables_set_here:
            os.environ[variable] = "false"
