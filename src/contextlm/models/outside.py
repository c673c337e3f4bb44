"""Architectures and mixers from outside the package: files, modules, and packages that offer some.

Importing one registers what it defines, as importing our own does. An installed package is found by
its entry points in the group ``contextlm.architectures``, whose values are modules; a file or any
other module is named by the user. Nothing else, no recipe and no checkpoint, makes code run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel

from contextlm.base.errors import InputError
from contextlm.base.files import is_file
from contextlm.base.visible import shown

GROUP = "contextlm.architectures"


@dataclass(frozen=True)
class Outside:
    """What was imported.

    Attributes:
        given: what imports it again, in another process: an absolute path or a module's name.
        place: its file, or the folder of its package.
        sha256: of its source, for a package of all of its Python files.
        on_request: the user named it; else an installed package offered it.
    """

    given: str
    place: Path
    sha256: str
    on_request: bool


_OUTSIDE: dict[str, Outside] = {}  # by the name of the module, of a package its top


def outside() -> dict[str, Outside]:
    """All that was imported, by module or package."""
    return dict(_OUTSIDE)


def import_outside(names: Sequence[str]) -> None:
    """Import files and modules, each once.

    Args:
        names: paths of Python files, or names of modules that Python finds.

    Raises:
        InputError: one does not exist, or cannot be imported; the message names it and the line.
    """
    for name in names:
        if name.endswith(".py") or is_file(Path(name)):
            _import_file(Path(name))
        else:
            _import_module(name)


def import_offered() -> None:
    """Import what installed packages offer.

    Raises:
        InputError: one cannot be imported; the message names the package.
    """
    for point in metadata.entry_points(group=GROUP):
        package = f"package {point.dist.name}: " if point.dist is not None else ""
        _guarded(point.load, f"{package}entry point {point.name}", "")
        _note(sys.modules[point.module], point.module, on_request=False)


def sources(model: PreTrainedModel) -> dict[str, str]:
    """Hashes of the source of all that a model has from outside the package, by module or package.

    Found by the classes of the configuration, of the modules, and of what these are made from.
    """
    kinds = {type(module) for module in model.modules()} | {type(model.config)}
    tops = {base.__module__.partition(".")[0] for kind in kinds for base in kind.__mro__}
    return {top: _OUTSIDE[top].sha256 for top in sorted(tops & _OUTSIDE.keys())}


def _import_file(path: Path) -> None:
    name, where = path.stem, f"--import {path}"
    if not is_file(path):
        raise InputError(f"{where}: no such file")
    if path.suffix != ".py":
        raise InputError(f"{where}: expected a Python file, its name ending in .py")
    known = _OUTSIDE.get(name)
    if known is not None and known.place == path.resolve():
        return
    if name in sys.modules or not name.isidentifier():
        why = "a module of that name is loaded already" if name.isidentifier() else "no identifier"
        raise InputError(f"{where}: {why}: rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a file that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _guarded(partial(spec.loader.exec_module, module), where, str(spec.origin))
    except InputError:
        del sys.modules[name]
        raise
    _note(module, str(path.resolve()), on_request=True)


def _import_module(name: str) -> None:
    where = f"--import {shown(name)}"
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{where}: no such file")
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise InputError(f"{where}: no such file, and no module that Python finds")
    _guarded(partial(importlib.import_module, name), where, "")
    _note(sys.modules[name], name, on_request=True)


def _guarded(act: Callable[[], object], where: str, file: str) -> None:
    """Run what imports somebody's code; whatever that raises is told in one line."""
    try:
        act()
    except Exception as error:  # it is somebody's code, which may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        at = f"line {line}: " if line else ""
        said = " ".join(str(error).split())
        raise InputError(f"{where}: {at}{type(error).__name__}: {said}") from error


def _note(module: ModuleType, given: str, *, on_request: bool) -> None:
    top = sys.modules[module.__name__.partition(".")[0]]
    file = Path(str(top.__file__)).resolve()
    place = file.parent if hasattr(top, "__path__") else file
    _OUTSIDE[top.__name__] = Outside(given, place, _sha256(place), on_request)


def _sha256(place: Path) -> str:
    """Of a file, or of all Python files of a folder with their names."""
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    total = hashlib.sha256()
    for file in sorted(place.rglob("*.py")):
        total.update(f"{file.relative_to(place).as_posix()}\0".encode() + file.read_bytes())
    return total.hexdigest()
