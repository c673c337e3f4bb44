"""Several processes that work on one run: which one is this, and how do they agree.

Processes are started by `torchrun` or `accelerate launch`, which name each in its environment, and
joined by accelerate. A rank is a process's number; rank 0 is the main one, which alone writes files
and speaks. With one process, as usual, everything here does nothing.

accelerate and torch are imported when processes join, never before: `contextlm --help` is to answer
at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from contextlm.base.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# How long a rank waits for the others: rank 0 alone prepares data, trains the context block and
# fills stores meanwhile. A rank that ends does not wait for this: the launcher ends the others.
TIMEOUT = timedelta(hours=24)

_state: Any = None  # accelerate's `PartialState` while processes are joined


class ToldByMainError(RunError):
    """Rank 0 has failed and says why; the other ranks end without a word."""


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that a launcher has started, for the time of a `with` block.

    Does nothing where there is no launcher, or where the processes are joined already.

    Args:
        device: ``cpu``, or ``cuda`` for the accelerators of this machine, one a process.

    Yields:
        This process's own device.

    Raises:
        InputError: the machine has fewer accelerators than processes, or the device is of a kind
            that several processes cannot share work on.
    """
    global _state
    if "LOCAL_RANK" not in os.environ or _state is not None:
        yield device if _state is None else _state.device
        return
    from accelerate import PartialState

    _check_device(device, int(os.environ["LOCAL_RANK"]))
    _state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    # Not in a `finally`: after a failure the others are at work on something else, and leaving
    # the group in good order would wait for them.
    yield _state.device
    _state.wait_for_everyone()
    _state.destroy_process_group()
    _state = None


def _check_device(device: torch.device, local_rank: int) -> None:
    import torch

    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device.type!r}: several processes can use cpu or cuda")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes were started on a "
            f"machine with {torch.cuda.device_count()} CUDA devices: start one a device"
        )


def rank() -> int:
    """This process's number among those that are joined; 0 where there is one."""
    return 0 if _state is None else int(_state.process_index)


def world() -> int:
    """How many processes are joined; 1 where there is one."""
    return 1 if _state is None else int(_state.num_processes)


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def launched_rank() -> int:
    """The rank that the launcher gave, also before the processes join and after they part."""
    number = os.environ.get("RANK", "") if "LOCAL_RANK" in os.environ else ""
    return int(number) if number.isdecimal() else 0


def from_main(value: T) -> T:
    """Rank 0's `value`, on every rank; what the others pass does not matter."""
    if world() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    carried: list[T] = broadcast_object_list([value])
    return carried[0]


def everyones(value: T) -> list[T]:
    """What each rank passes, by rank."""
    if world() == 1:
        return [value]
    from accelerate.utils import gather_object

    collected: list[T] = gather_object([value])
    return collected


def totals(values: Sequence[float]) -> list[float]:
    """Each value summed over the ranks in float64; the same on all of them to the bit."""
    if world() == 1:
        return [float(value) for value in values]
    import torch
    from accelerate.utils import reduce

    own = torch.tensor(list(values), dtype=torch.float64, device=_state.device)
    return [float(value) for value in reduce(own, reduction="sum")]


def by_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone; all ranks get its result.

    Raises:
        ToldByMainError: on the other ranks, where rank 0 has failed; there its own error is raised.
    """
    result: Any = None
    failure: Exception | None = None
    if is_main():
        try:
            result = work()
        except Exception as error:  # raised below, once the others know
            failure = error
    if from_main(failure is not None):
        raise failure or ToldByMainError("rank 0 has failed")
    return from_main(result)


def main_first(work: Callable[[], T]) -> T:
    """Do `work` on rank 0, then on one rank of each other machine, then on the rest.

    So what `work` keeps in a folder is made once where machines share the folder, and once a
    machine where they do not.

    Raises:
        ToldByMainError: on the other ranks, where rank 0 has failed; there its own error is raised.
    """
    done: list[T] = []
    by_main(lambda: done.append(work()))
    if world() == 1:
        return done[0]
    with _state.local_main_process_first():
        return done[0] if done else work()
