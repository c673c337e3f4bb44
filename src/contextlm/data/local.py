"""A user's own text: ``text:PATH`` and ``jsonl:PATH``.

A byte order mark is dropped and CRLF line ends become LF; all else is kept as it is.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.files import is_file, is_folder, with_home
from contextlm.base.visible import visible
from contextlm.data.corpus import Corpus, split_documents, text_fingerprint

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")


def text_corpus(location: str, share: float) -> Corpus:
    """``text:PATH``: one document per file.

    Args:
        location: a UTF-8 file of any name, or a folder, searched recursively for files with one of
            `TEXT_SUFFIXES`, in the order of their relative paths. Linked folders are searched too,
            each folder once; hidden ones and files without text are passed over.
        share: of the text, held out.

    Raises:
        InputError: nothing at that path, no text there, or text that is not UTF-8; it names the
            file.
    """
    path = _existing("text", location)
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in _text_files(path)}
        if not files:
            suffixes = " ".join(TEXT_SUFFIXES)
            raise InputError(f"{path}: the folder holds no text files ({suffixes})")
    else:
        files = {path.name: path}
    texts = [_decode(_read(file), str(file)) for _, file in sorted(files.items())]
    return _corpus("text", path, texts, share)


def jsonl_corpus(location: str, share: float) -> Corpus:
    """``jsonl:PATH``: one document per line, a JSON object.

    The object has ``text``, or ``messages``: a list of objects whose ``content`` strings are joined
    by newlines. Blank lines, and objects whose text is blank, are passed over. `share` of the text
    is held out.

    Raises:
        InputError: no such file, not UTF-8, or a line of another form; it names file and line.
    """
    path = _existing("jsonl", location)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, jsonl: needs a file")
    texts = []
    # Split at line feeds only: other separators that Unicode knows may stand inside a JSON string.
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            texts.append(_checked(_json_text(line, where), where))
    return _corpus("jsonl", path, texts, share)


def _corpus(kind: str, path: Path, texts: list[str], share: float) -> Corpus:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    splits = split_documents(texts, str(path), share)
    return Corpus(
        name=f"{kind}:{visible(path.resolve().name)}",
        read=lambda: splits,
        append_end_of_text=True,
        fingerprint=text_fingerprint(f"{kind} 2", *splits),
    )


def _existing(kind: str, location: str) -> Path:
    if not location:
        raise InputError(f"corpus '{kind}:' needs a path, as in {kind}:PATH")
    path = with_home(location, f"corpus '{kind}:{location}'")
    if not (is_file(path) or is_folder(path)):
        raise InputError(f"{location}: no such file{' or folder' if kind == 'text' else ''}")
    return path


def _text_files(folder: Path) -> Iterator[Path]:
    seen = set()  # each real folder once: links may lead in a circle, or to what is here anyway
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = Path(parent).stat()
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            file = Path(parent, name)
            if name.startswith(".") or file.suffix.lower() not in TEXT_SUFFIXES:
                continue
            # Reading a pipe or a device would not end; a link to nowhere is told when it is read.
            if is_file(file) or not file.exists():
                yield file


def _read(path: Path) -> bytes:
    """The file's bytes without a byte order mark."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{where}: UTF-16 text; save it as UTF-8") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}: line {line}: not UTF-8 text") from None
    return _checked(text.replace("\r\n", "\n"), where)


def _json_text(line: bytes, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None
    if not isinstance(value, dict) or not ("text" in value or "messages" in value):
        raise InputError(f"{where}: expected an object with 'text' or 'messages'")
    if "text" not in value:
        return _joined_messages(value["messages"], where)
    if not isinstance(value["text"], str):
        raise InputError(f"{where}: 'text' is not a string")
    return value["text"].replace("\r\n", "\n")


def _joined_messages(messages: Any, where: str) -> str:
    if not isinstance(messages, list):
        raise InputError(f"{where}: 'messages' is not a list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: messages[{index}] has no 'content' string")
    return "\n".join(message["content"] for message in messages).replace("\r\n", "\n")


def _checked(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8 and is not binary data."""
    if "\0" in text:
        raise InputError(f"{where}: holds a NUL character, so it is not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(f"{where}: holds a lone surrogate (\\u{code:04x}), not text") from None
    return text
