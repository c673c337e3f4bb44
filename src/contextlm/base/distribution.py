"""Several processes that work on one run: which one is this, and how do they agree.

Processes are started by `torchrun` or `accelerate launch`, which name each in its environment
(RANK, LOCAL_RANK, WORLD_SIZE). A rank is a process's number; rank 0 is the main one, which alone
writes files and speaks. With one process, as usual, everything here does nothing.

A leaf module: every room may import it, it imports nothing of ours, and torch only when asked to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from contextlm.base.errors import InputError, RunError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# How long a rank waits for the others: rank 0 alone prepares data and fills stores meanwhile. A
# rank that ends does not wait for this: the launcher ends the others at once.
TIMEOUT = timedelta(hours=2)


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
    import torch.distributed as dist

    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    device, backend = _own_device(device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=TIMEOUT)
    # Not in a `finally`: after a failure the others are at work on something else, and leaving
    # the group in good order would wait for them.
    yield device
    barrier()
    dist.destroy_process_group()


def _own_device(device: torch.device, local_rank: int) -> tuple[torch.device, str]:
    import torch

    if device.type == "cpu":
        return device, "gloo"
    if device.type != "cuda":
        raise InputError(f"device {device.type!r}: several processes can use cpu or cuda")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes were started on a "
            f"machine with {torch.cuda.device_count()} CUDA devices: start one a device"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, "cpu:gloo,cuda:nccl"


def _group() -> Any:
    """torch.distributed where processes are joined, else None."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None


def rank() -> int:
    """This process's number among those that are joined; 0 where there is one."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def world() -> int:
    """How many processes are joined; 1 where there is one."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def is_main() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def launched_rank() -> int:
    """The rank that the launcher gave, also before the processes join and after they part."""
    number = os.environ.get("RANK", "") if "LOCAL_RANK" in os.environ else ""
    return int(number) if number.isdecimal() else 0


def barrier() -> None:
    """Wait until all ranks are here."""
    from_main(None)
    totals([0.0])  # rank 0 would not wait for those who only listen


def from_main(value: T) -> T:
    """Rank 0's `value`, on every rank; what the others pass does not matter."""
    group = _group()
    if group is None or group.get_world_size() == 1:
        return value
    import torch

    carried = [value]
    group.broadcast_object_list(carried, src=0, device=torch.device("cpu"))
    return carried[0]


def totals(values: Sequence[float]) -> list[float]:
    """Each value summed over the ranks in float64; the same on all of them to the bit."""
    group = _group()
    if group is None or group.get_world_size() == 1:
        return [float(value) for value in values]
    import torch

    summed = torch.tensor(list(values), dtype=torch.float64)
    group.all_reduce(summed)
    return [float(value) for value in summed]


def everyones(value: T) -> list[T]:
    """What each rank passes, by rank."""
    group = _group()
    if group is None or group.get_world_size() == 1:
        return [value]
    collected: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(collected, value)
    return collected


def main_first(work: Callable[[], T]) -> T:
    """Do `work` on rank 0, then on one rank of each other machine, then on the rest.

    So what `work` keeps in a folder is made once where machines share the folder, and once a
    machine where they do not.

    Raises:
        ToldByMainError: on the other ranks, where rank 0 has failed; there its own error is raised.
    """
    if world() == 1:
        return work()
    result: list[T] = []
    failure: Exception | None = None
    if is_main():
        try:
            result.append(work())
        except Exception as error:  # raised below, once the others know
            failure = error
    if from_main(failure is not None):
        raise failure or ToldByMainError("rank 0 has failed")
    leads = os.environ.get("LOCAL_RANK") == "0"
    for turn in (leads, not leads):
        if turn and not result:
            result.append(work())
        barrier()
    return result[0]


def by_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone; all ranks get its result.

    Raises:
        ToldByMainError: on the other ranks, where rank 0 has failed; there its own error is raised.
    """
    if world() == 1:
        return work()
    failure: Exception | None = None
    result: Any = None
    if is_main():
        try:
            result = work()
        except Exception as error:  # raised below, once the others know
            failure = error
    if from_main(failure is not None):
        raise failure or ToldByMainError("rank 0 has failed")
    return from_main(result)
