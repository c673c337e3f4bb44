"""Working checkpoints: numbered folders, each with one file of tensors and the sum that seals it.

A process can be killed while it writes one, and a disk can spoil one later. So a folder appears
whole or not at all, and what does not match its sum is left aside. The tensors and the record
beside them are a safetensors file: nothing is pickled, and reading one runs no code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from contextlm.base.files import atomic_folder, sha256_of

TENSORS, SUM = "state.safetensors", "sha256"
KEPT = 2  # so that there is one to fall back on

Tell = Callable[[str], None]
Groups = Mapping[str, Mapping[str, Tensor]]


class Checkpoints:
    """The checkpoints of one training, named by what is counted in it.

    Args:
        folder: where they are; made when the first is written.
        unit: what the number in a name counts, such as ``step``.
        tell: takes one line for each damaged checkpoint.
    """

    def __init__(self, folder: Path, unit: str, tell: Tell):
        self.folder = folder.absolute()
        self.unit = unit
        self.tell = tell

    def place(self, number: int) -> Path:
        """The folder of one checkpoint."""
        return self.folder / f"{self.unit}-{number}"

    def write(self, number: int, groups: Groups, record: Any, keep: Collection[int] = ()) -> None:
        """Write one, then remove all but the newest and those whose numbers are in `keep`.

        Args:
            number: of the checkpoint.
            groups: tensors by group and name; no group's name has a dot in it.
            record: anything that JSON can hold.
            keep: numbers of older checkpoints that are to stay.

        Raises:
            RunError: the disk is full or failing; nothing of it remains.
        """
        stored = {
            f"{group}.{name}": tensor.detach().cpu().contiguous()
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        }
        with atomic_folder(self.place(number)) as partial:
            file = partial / TENSORS
            safetensors.torch.save_file(stored, file, {"record": json.dumps(record)})
            (partial / SUM).write_text(sha256_of(file), "utf-8")
        for old in self._numbers()[KEPT:]:
            if old not in keep:
                self.remove(old)

    def whole(self) -> list[int]:
        """The numbers of whole checkpoints, newest first. Damaged ones are told and removed."""
        found = []
        for number in self._numbers():
            problem = _damage(self.place(number))
            if problem is None:
                found.append(number)
            else:
                self.tell(f"damaged checkpoint: {problem}; the one before it is used, if any")
                self.remove(number)
        return found

    def remove(self, number: int) -> None:
        """Remove one."""
        shutil.rmtree(self.place(number))

    def record(self, number: int) -> Any:
        """The record of a whole checkpoint."""
        with safetensors.safe_open(self.place(number) / TENSORS, framework="pt") as stored:
            return json.loads(stored.metadata()["record"])

    def tensors(self, number: int, group: str) -> dict[str, Tensor]:
        """One group of a whole checkpoint's tensors, by name."""
        prefix = f"{group}."
        with safetensors.safe_open(self.place(number) / TENSORS, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith(prefix)]  # noqa: SIM118
            # Copied into memory of torch's own: the file's may be aligned otherwise, and sums
            # depend on that on some processors.
            return {name.removeprefix(prefix): stored.get_tensor(name).clone() for name in names}

    def last(self) -> str:
        """Where the newest whole checkpoint is, in words."""
        numbers = self.whole()
        if numbers:
            return f"the last good checkpoint is {self.place(numbers[0])}"
        return "no checkpoint had been written"

    def _numbers(self) -> list[int]:
        """Of all checkpoints, newest first."""
        suffixes = (place.name.split("-")[1] for place in self.folder.glob(f"{self.unit}-*"))
        return sorted((int(s) for s in suffixes if s.isdecimal()), reverse=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments and counts, named ``PARAMETER.KEY``."""
    return {
        f"{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _damage(place: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    file = place / TENSORS
    try:
        if sha256_of(file) == (place / SUM).read_text("utf-8"):
            return None
    except (OSError, ValueError) as error:
        return f"{getattr(error, 'filename', None) or place / SUM} cannot be read"
    return f"{file} does not match its sum"
