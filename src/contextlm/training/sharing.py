"""Phase 2 over several processes: each batch of the recipe is shared out among the ranks.

The batches are those of one process, in the same order, so that the loss curve is the same up to
rounding. accelerate's own way would fill up a last incomplete batch with windows from the
beginning, which one process does not train on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from contextlm.base import distribution
from contextlm.base.errors import InputError
from contextlm.data.windows import IGNORED
from contextlm.recipe.settings import TrainingSettings


class SizedDataset(Protocol):
    """Items by number, as the windows are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def check_processes(
    settings: TrainingSettings, device: torch.device, name: str = "training"
) -> None:
    """Check that the processes at hand can train as the settings say.

    Args:
        settings: of phase 2.
        device: where to compute.
        name: of the settings, for messages.

    Raises:
        InputError: a batch cannot be shared equally, or FSDP2 is asked for where it cannot be.
    """
    world = distribution.world()
    if settings.distributed == "fsdp2":
        if device.type in ("cpu", "mps"):
            raise InputError(
                f"{name}.distributed fsdp2: it shards weights over several accelerators, and this "
                f"run is on {device.type}: use ddp"
            )
        if world == 1:
            raise InputError(
                f"{name}.distributed fsdp2: it shards weights over several processes, and there is "
                "one: start them with torchrun --nproc-per-node N -m contextlm run ..., or use ddp"
            )
    if (settings.batch_size // settings.accumulation) % world:
        parts = f" in {settings.accumulation} micro-batches" if settings.accumulation > 1 else ""
        raise InputError(
            f"{name}.batch_size {settings.batch_size}{parts} cannot be shared equally by {world} "
            "processes"
        )


class RankBatches(Sampler[list[int]]):
    """This rank's share of every batch: a run of its indices.

    A last incomplete batch is shared as equally as can be. A rank that gets none of it takes its
    first window without targets (index ``~i`` stands for window i so treated), because all ranks
    must take part in every step.

    Args:
        batches: of one process.
        rank: whose share.
        world: how many ranks there are; divides a whole batch.
    """

    def __init__(self, batches: BatchSampler, rank: int, world: int):
        self.batches = batches
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            each, more = divmod(len(batch), self.world)
            start = self.rank * each + min(self.rank, more)
            yield batch[start : start + each + (self.rank < more)] or [~batch[0]]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        if isinstance(self.batches.sampler, SeedableRandomSampler):
            self.batches.sampler.set_epoch(epoch)


class _WithoutTargets(Dataset[dict[str, Tensor]]):
    """Windows, and under negative indices the same without targets."""

    def __init__(self, windows: SizedDataset):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= 0:
            return self.windows[index]
        item = self.windows[~index]
        return {**item, "labels": torch.full_like(item["labels"], IGNORED)}


class SharedLoader(DataLoader[dict[str, Tensor]]):
    """This rank's share of the batches that one process would train on.

    Args:
        windows: of the training split.
        settings: batch size, micro-batches, shuffling.
        seed: of the order.
        options: of torch's `DataLoader`.
    """

    def __init__(
        self, windows: SizedDataset, settings: TrainingSettings, seed: int, **options: Any
    ):
        order: Sampler[int] = (
            # The sampler that accelerate puts in place of the Trainer's in one process.
            SeedableRandomSampler(windows, data_seed=seed)
            if settings.shuffle
            else SequentialSampler(windows)
        )
        whole = BatchSampler(
            order, settings.batch_size // settings.accumulation, settings.drop_last
        )
        shares = RankBatches(whole, distribution.rank(), distribution.world())
        super().__init__(_WithoutTargets(windows), batch_sampler=shares, **options)
        self.shares = shares

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.shares.set_epoch(epoch)
