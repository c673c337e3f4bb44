"""What several processes must have in common before they work on one run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from contextlm.base import distribution
from contextlm.base.errors import InputError
from contextlm.lab.preparation import Prepared
from contextlm.recipe.schema import Recipe
from contextlm.training.next_token import check_processes


def check_recipe(recipe: Recipe) -> None:
    """Check that the processes at hand can train every contender, and the embedding.

    Raises:
        InputError: a batch cannot be shared equally.
    """
    for contender in recipe.contenders:
        try:
            check_processes(recipe.training_of(contender))
        except InputError as error:
            raise InputError(f"contenders.{contender.name}: {error}") from None
    size, world = recipe.embedding.batch_size, distribution.world()
    if recipe.embedding.source == "learned" and size % world:
        raise InputError(
            f"embedding.batch_size {size} cannot be shared equally by {world} processes"
        )


def check_same_data(prepared: Prepared) -> None:
    """Check that all ranks read the same text, which machines with data of their own may not.

    Raises:
        InputError: a rank has other tokens than rank 0.
    """
    if distribution.world() == 1:
        return
    streams = (prepared.stream, prepared.validation_stream)
    sums = [zlib.crc32(np.ascontiguousarray(stream, dtype="<i8").tobytes()) for stream in streams]
    facts = distribution.everyones((prepared.facts.model_dump(), sums))
    for rank, theirs in enumerate(facts):
        if theirs != facts[0]:
            raise InputError(
                f"corpus {prepared.facts.name!r}: rank {rank} has other tokens than rank 0: its "
                "machine has another Python, corpus or cache"
            )


def shared_folder(make: Callable[[], Path]) -> Path:
    """The folder that `make` makes on rank 0, on every rank.

    Raises:
        InputError: a rank does not see it.
    """
    if distribution.world() == 1:
        return make()
    folder = distribution.by_main(make).absolute()
    for rank, seen in enumerate(distribution.everyones(folder.is_dir())):
        if not seen:
            raise InputError(
                f"--out: rank {rank} does not see {folder}: run folders must lie where all "
                "machines see them"
            )
    return folder
