"""The embedded corpus: the documentation that comes with the running Python.

Docstrings are read with `ast` from source files and `pydoc_data.topics` is read as a literal, so
nothing of the standard library is imported or executed, and nothing is downloaded.

Left out, for size and worth: test packages (`test`, `tests`, `idle_test`), the applications
`idlelib` and `turtledemo`, whatever is not in `sys.stdlib_module_names` (site-packages, build
variables), modules without a docstring, and files that do not parse.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from contextlm.base.errors import RunError
from contextlm.data.corpus import VALIDATION_SHARE, Corpus, split_documents

_VERSION = "pydocs 2"
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "idlelib", "turtledemo", "__pycache__"})
_TOPICS = "pydoc_data.topics"


@functools.cache
def pydocs(share: float = VALIDATION_SHARE) -> Corpus:
    """The corpus ``pydocs`` of the running Python: about 2 million characters.

    One document per module, class and function docstrings under their qualified names, and one per
    help topic; sorted by name, `share` of the text held out. Read once in a process.

    Raises:
        RunError: this Python comes without its library's source files.
    """
    return read_pydocs(Path(sysconfig.get_paths()["stdlib"]), share=share)


def read_pydocs(
    stdlib: Path,
    modules: Collection[str] = sys.stdlib_module_names,
    share: float = VALIDATION_SHARE,
) -> Corpus:
    """`pydocs` from the folder `stdlib`; only top-level names in `modules` are read."""
    sources = dict(sorted(_sources(stdlib, modules)))
    if not sources:
        raise RunError(
            f"corpus 'pydocs': no Python source files in {stdlib}; use text:PATH instead"
        )
    digest = hashlib.sha256(f"{_VERSION} {share}".encode())
    for name, path in sources.items():
        digest.update(f"\0{name}\0".encode() + hashlib.sha256(_read(path)).digest())

    def read() -> tuple[list[str], list[str]]:
        texts = [text for _, text in sorted(_documents(sources))]
        return split_documents(texts, f"corpus 'pydocs' from {stdlib}", share)

    return Corpus(
        name=f"pydocs (Python {platform.python_version()})",
        read=read,
        append_end_of_text=True,
        fingerprint=digest.hexdigest(),
    )


def _sources(stdlib: Path, modules: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Dotted names of the modules, each with its source file."""
    for folder, folders, files in os.walk(stdlib):
        parts = Path(folder).relative_to(stdlib).parts
        folders[:] = [
            name
            for name in folders
            if name not in _LEFT_OUT and name.isidentifier() and (parts or name in modules)
        ]
        for file in files:
            stem = file.removesuffix(".py")
            if stem == file or not stem.isidentifier():
                continue
            dotted = (*parts, stem) if stem != "__init__" else parts
            if dotted and dotted[0] in modules and dotted[0] not in _LEFT_OUT:
                yield ".".join(dotted), Path(folder, file)


def _documents(sources: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """``(name, text)`` of every module with docstrings, and of every help topic."""
    for module, path in sources.items():
        tree = _parse(path)
        if tree is None:
            continue
        if module == _TOPICS:
            yield from _topics(tree)
        entries = list(_docstrings(tree, module))
        if not entries:
            continue
        if entries[0][0] != module:
            entries.insert(0, (module, ""))
        text = "\n\n".join(f"{name}\n\n{docstring}".rstrip() for name, docstring in entries)
        yield f"module {module}", text + "\n"


def _read(path: Path) -> bytes:
    """The file's bytes; none if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None if it does not parse or decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's source
        try:
            return ast.parse(_read(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """``(qualified name, docstring)`` of `node` and of all that it defines, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            yield name, _clean(docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _docstrings(child, name)  # definitions under `if`, `try`, `with` ...


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """``(name, text)`` of every help topic in the dict literal ``topics``."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if not any(isinstance(target, ast.Name) and target.id == "topics" for target in targets):
            continue
        assert isinstance(statement, ast.Assign)
        try:
            topics = ast.literal_eval(statement.value)
        except ValueError:
            continue  # not a literal: some other Python's own arrangement
        for topic, text in topics.items():
            if isinstance(topic, str) and isinstance(text, str):
                yield f"topic {topic}", f"{topic}\n\n{_clean(text)}\n"


def _clean(text: str) -> str:
    """Indentation and outer blank lines removed; a lone surrogate, not in UTF-8, becomes ``?``."""
    return inspect.cleandoc(text).rstrip().encode("utf-8", "replace").decode("utf-8")
