"""What a run ran on: versions, commit, hardware. For `environment.json`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import contextlm
from contextlm.base import distribution
from contextlm.base.errors import InputError
from contextlm.base.files import write_json
from contextlm.base.progress import Progress
from contextlm.models.outside import outside

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "numba",
    "huggingface_hub",
    "pydantic",
    "pyyaml",
    "altair",
    "vl-convert-python",
    "jinja2",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit, code from outside the package, and hardware as plain JSON values."""
    return {
        "contextlm": contextlm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "architectures": {
            name: f"{found.place} (sha256 {found.sha256})" for name, found in outside().items()
        },
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "processes": distribution.world(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def note_changes(file: Path, now: dict[str, Any], progress: Progress) -> None:
    """Add what differs now to an ``environment.json``, and tell it.

    Args:
        file: of a run that is resumed.
        now: as `describe_environment` gives it.
        progress: takes a line.

    Raises:
        InputError: the file cannot be read.
    """
    begun = _read(file)
    before, after = _flat(begun), _flat(now)
    changes = {key: value for key, value in after.items() if before.get(key) != value}
    if not changes:
        return
    told = ", ".join(f"{key} {before.get(key)} -> {value}" for key, value in changes.items())
    progress.line(
        f"not as when the run began: {told}; figures may differ from an undisturbed run's"
    )
    write_json(file, {**begun, "resumed_under": {**begun.get("resumed_under", {}), **changes}})


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    nested = {**environment.get("packages", {}), **environment.get("architectures", {})}
    apart = ("packages", "architectures", "resumed_under")
    return {**{k: v for k, v in environment.items() if k not in apart}, **nested}


def check_imported(run: Path) -> None:
    """See to it that the code from outside the package that a run began with is at hand.

    Raises:
        InputError: some is not, or the file that names it cannot be read.
    """
    begun = _read(run / "environment.json").get("architectures", {})
    for name in sorted(begun.keys() - outside().keys()):
        place = str(begun[name]).partition(" (sha256")[0]
        given = place if place.endswith(".py") else name  # a package goes by its name
        raise InputError(f"{run}: it was begun with {name}: give --import {given} again")


def _read(file: Path) -> dict[str, Any]:
    try:
        environment = dict(json.loads(file.read_text("utf-8")))
        _flat(environment)
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{file}: cannot be read") from None
    return environment


def _commit() -> str | None:
    """Commit of the source tree that runs, marked when it has changes; None when installed."""
    root = Path(contextlm.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} (with uncommitted changes)" if changes else commit


def _processor() -> str:
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(known.get("cpu_name") or platform.processor() or platform.machine())
