"""Tokenizers by name, from a folder, or trained on the corpus.

Each comes as a transformers `PreTrainedTokenizerFast` with an end-of-text token, which also pads
where there is no padding token.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.files import is_file, is_folder, with_home, write_text
from contextlm.base.visible import shown
from contextlm.data.corpus import Corpus
from contextlm.data.hub import from_hub
from contextlm.data.named import data_folder
from contextlm.data.tokenizer_training import END_OF_TEXT, KINDS, all_roles, parallel_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LARGEST = 1_000_000  # the BPE trainer reserves memory for all at once, and aborts
_ENDS = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "<|im_end|>")
_NAMED = {
    "gpt2": ("openai-community/gpt2", 50257),
    "pythia": ("EleutherAI/pythia-70m", 50277),
}
_KNOWN = (*_NAMED, *(f"{kind}:SIZE" for kind in KINDS), "a folder with tokenizer.json")


def load_tokenizer(spec: str, corpus: Corpus, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `spec` names.

    Args:
        spec: ``gpt2`` or ``pythia`` (from ``CONTEXTLM_DATA/tokenizers/`` if there, else from the
            hub); ``bpe:SIZE``, a lossless byte-level BPE trained on the corpus; ``word:SIZE``, the
            corpus' most frequent words; or a folder that holds ``tokenizer.json`` or a saved
            tokenizer.
        corpus: its train documents are what ``bpe`` and ``word`` learn from; else unused.
        cache: folder for trained tokenizers, made when written to.

    Raises:
        InputError: a bad `spec`, or a folder without a usable fast tokenizer.
        RunError: the hub could not be reached.
    """
    trained = _kind_and_size(spec)
    if trained is not None:
        return _wrap(_trained(*trained, corpus, cache), KINDS[trained[0]].roles)
    if spec in _NAMED:
        folder = _local_copy(spec)
        return _from_folder(folder) if folder else _from_file(_download(spec), spec)
    return _from_folder(_folder(spec))


def known_vocab_size(spec: str) -> int | None:
    """Entries of the tokenizer that `spec` names, found without loading or training it.

    For ``bpe:SIZE`` and ``word:SIZE`` it is SIZE; on a very small corpus fewer entries come into
    being. None for a folder whose tokenizer is not saved as ``tokenizer.json``.

    Raises:
        InputError: a bad `spec` or an unreadable folder.
    """
    trained = _kind_and_size(spec)
    if trained is not None:
        return trained[1]
    if spec in _NAMED:
        return _NAMED[spec][1]
    file = _folder(spec) / "tokenizer.json"
    return _entries(_backend(file)) if file.is_file() else None


def vocab_entries(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the tokenizer's largest id, so that every id is below it."""
    return _entries(tokenizer.backend_tokenizer)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hexadecimal) of all that decides a text's tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # set anew by every call
        state.pop(passing, None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def keeps_text(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], ids: Sequence[Sequence[int]]
) -> bool:
    """Whether `ids` of `texts` decode to these very texts.

    Where they do not (a lower-casing tokenizer, one with an unknown token, one that drops
    characters), the loss is no code length of the text, and bits per byte mean nothing.
    """
    with parallel_tokenizers():
        decoded = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return list(texts) == decoded


def start_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that begins a text: the end-of-text token's where the tokenizer has none for it."""
    begin = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if begin is None else begin)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and without length limits.

    A text that holds the spelling of one (``<|endoftext|>``, ``</s>`` in HTML) is encoded as the
    characters that it is made of.
    """
    with parallel_tokenizers():
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # else it warns of texts longer than some model's positions
        )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _kind_and_size(spec: str) -> tuple[str, int] | None:
    """KIND and SIZE of a tokenizer that is trained on the corpus, or None for another one."""
    kind, colon, text = spec.partition(":")
    if kind not in KINDS:
        return None
    entry = KINDS[kind]
    if not colon or not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise InputError(
            f"tokenizer {shown(spec)}: expected {kind}:SIZE with a whole number, "
            f"e.g. {entry.example}"
        )
    size = int(text)
    if not entry.smallest <= size <= _LARGEST:
        raise InputError(
            f"tokenizer {spec!r}: the size must be at least {entry.smallest} "
            f"({entry.needed}) and at most {_LARGEST:,}"
        )
    return kind, size


def _folder(spec: str) -> Path:
    path = with_home(spec, f"tokenizer {spec!r}")
    if spec and is_folder(path):
        return path
    if spec and (os.sep in spec or is_file(path)):
        raise InputError(f"tokenizer {shown(spec)}: no such folder")
    kind, colon, size = spec.partition(":")
    near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    slip = colon and size.isdigit() and near
    raise unknown_name("tokenizer", spec, [f"{near[0]}:{size}"] if slip else _KNOWN)


def _local_copy(name: str) -> Path | None:
    data = data_folder()
    folder = data / "tokenizers" / name if data is not None else None
    return folder if folder is not None and folder.is_dir() else None


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository = _NAMED[name][0]

    def load(online: bool) -> Path:
        return Path(hf_hub_download(repository, "tokenizer.json", local_files_only=not online))

    instead = (
        f"use bpe:SIZE or a folder, or CONTEXTLM_DATA=FOLDER with FOLDER/tokenizers/{name}, instead"
    )
    return from_hub(f"tokenizer {name!r}", instead, load)


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer_config.json").is_file():
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"tokenizer {str(folder)!r}: the folder holds no tokenizer.json")
        return _from_file(file, str(folder))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception for what is damaged
        reason = " ".join(str(error).split())
        raise InputError(f"tokenizer {str(folder)!r}: cannot be loaded: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"tokenizer {str(folder)!r}: is not a fast tokenizer (no tokenizer.json)")
    return _with_end(tokenizer, str(folder))


def _from_file(file: Path, spec: str) -> PreTrainedTokenizerFast:
    backend = _backend(file)
    end = _end_among(backend.get_vocab(with_added_tokens=True), spec)
    return _wrap(backend, all_roles(end))


def _end_among(vocabulary: dict[str, int], spec: str) -> str:
    """The entry that ends a text; plain ``tokenizer.json`` files do not say which it is."""
    for token in _ENDS:
        if token in vocabulary:
            return token
    raise InputError(f"tokenizer {spec!r}: has no end-of-text entry ({' '.join(_ENDS)})")


def _with_end(tokenizer: PreTrainedTokenizerFast, spec: str) -> PreTrainedTokenizerFast:
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _end_among(tokenizer.get_vocab(), spec)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _wrap(backend: Any, roles: Mapping[str, str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **roles,
        clean_up_tokenization_spaces=False,  # else decoding drops spaces before punctuation
    )


def _backend(file: Path) -> Any:
    """The `tokenizers.Tokenizer` in `file`; an `InputError` naming it if it is no such thing."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever does not fit
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a tokenizer: {reason}") from None


def _entries(backend: Any) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _trained(kind: str, size: int, corpus: Corpus, cache: Path) -> Any:
    """From the cache if an earlier training left it there whole, else trained now and kept."""
    entry = KINDS[kind]
    key = f"{kind} {entry.version} {size} {corpus.fingerprint}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    file = cache / "tokenizers" / f"{kind}-{size}-{name}.json"
    if file.is_file():
        try:
            return _backend(file)
        except InputError:
            pass  # damaged since: train again
    backend = entry.train(corpus.train, size)
    write_text(file, backend.to_str(pretty=False))
    return backend
