"""Which device to compute on; torch is imported when a device is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contextlm.base.errors import InputError, unknown_name

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device that `name` stands for, once it is known to be there.

    Args:
        name: ``auto`` (CUDA, else MPS, else the CPU), ``cpu``, or an accelerator as torch spells
            it: ``cuda``, ``cuda:1``, ``mps``, ``xpu`` ...

    Returns:
        The device; for an accelerator without a number the current one of its kind.

    Raises:
        InputError: no such kind of device, or this machine has none.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("device", name, ["auto", "cpu", "cuda", "mps"]) from None
    if device.type == "cpu":
        if device.index:
            raise InputError(f"device {name!r}: all cores are one device: cpu")
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        raise InputError(f"device {name!r}: this machine has no {device.type} device that works")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise InputError(f"device {name!r}: this machine has {count}, counted from 0")
    return device
