"""The context store: contexts of a whole stream, computed once and read by phase 2 (DESIGN 1.6).

The context block is frozen in phase 2, so the context of every position of the training text is
always the same. A store keeps them in one file, memory-mapped, as float32 or bfloat16. It is filled
in one of two ways: `sequential` runs the exact recurrence over the stream, which is what decoding
sees; `parallel` feeds every position its predecessor's context of an earlier pass, which is the
documents' way and differs. The mean-square difference between both, the drift, is always measured.

Shape suffixes: P positions of the stream, N positions of a chunk, H positions before a window.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from contextlm.base import distribution
from contextlm.base.errors import RunError
from contextlm.base.files import atomic_open, write_json
from contextlm.data.windows import Windows
from contextlm.models.layers import ContextBlock
from contextlm.recipe.settings import ContextStoreSettings

CHUNK = 4096
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Embed = Callable[[Tensor], Tensor]


class ContextStore:
    """Contexts of every position of a stream, on disk.

    Args:
        path: the file of P x C numbers.
        shape: P and C.
        dtype: ``float32`` or ``bfloat16``.
        drift: mean-square difference between the two ways of filling, per number.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: str, drift: float):
        self.path = path
        self.positions, self.width = shape
        self.drift = drift
        mapped = torch.from_file(str(path), size=math.prod(shape), dtype=_DTYPES[dtype])
        self._contexts_PC = mapped.view(shape)
        self.nbytes = self._contexts_PC.nbytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Contexts of positions ``[start, stop)`` in float32, ``[stop - start, C]``.

        Zeros before the stream and behind it: before the first token the context is zero.
        """
        out_NC = torch.zeros(stop - start, self.width)
        first, last = max(start, 0), min(max(stop, 0), self.positions)
        if first < last:
            out_NC[first - start : last - start] = self._contexts_PC[first:last]
        return out_NC


class StoredWindows(Dataset[dict[str, Tensor]]):
    """Windows of a stream, each with its contexts from a store.

    Items have ``contexts``, ``[H + T, C]``: those of the H positions before the window and of the
    window itself; and ``position_ids``, ``[T]``: places in the stream.

    The store was filled from the windows' stream; `history` is H.
    """

    def __init__(self, windows: Windows, store: ContextStore, history: int):
        self.windows = windows
        self.store = store
        self.history = history

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]  # counts negative ones from the end, as the windows do
        item = self.windows[index]
        start = self.windows.start(index)
        stop = start + self.windows.sequence_length
        item["contexts"] = self.store.rows(start - self.history, stop)
        item["position_ids"] = torch.arange(start, stop)
        return item


def fill_context_store(
    block: ContextBlock,
    embed: Embed,
    tokens_P: npt.NDArray[np.integer],
    start_PC: Tensor,
    passes: int,
    settings: ContextStoreSettings,
    folder: Path,
) -> ContextStore:
    """The store of a stream: an earlier one of the same block and stream, or a new one.

    With several processes all call this; rank 0 fills it, and all read the file.

    Args:
        embed: maps token ids to normalised embeddings, ``[..., D]``.
        tokens_P: the stream.
        start_PC: contexts that the parallel passes start from; read on rank 0 only.
        passes: how many parallel passes there are.
        folder: where stores are kept; made if needed.

    Raises:
        RunError: rank 0 has filled it, and the file cannot be read here.
    """

    def find_or_fill() -> tuple[Path, float]:
        key = _key(block, embed, tokens_P, start_PC, passes)
        path = folder / f"{key}-{settings.fill}-{settings.dtype}.bin"
        sidecar = path.with_suffix(".json")  # written last
        if sidecar.exists():
            return path, json.loads(sidecar.read_text("utf-8"))["drift"]
        drift = _fill(block, embed, tokens_P, start_PC, passes, settings, path)
        write_json(sidecar, {"drift": drift})
        return path, drift

    path, drift = distribution.by_main(find_or_fill)
    try:
        return ContextStore(path, (len(tokens_P), block.context_dim), settings.dtype, drift)
    except (OSError, RuntimeError):
        raise RunError(f"{path}: rank 0 filled this store, and it cannot be read here") from None


@torch.no_grad()
def parallel_contexts(
    block: ContextBlock,
    embed: Embed,
    tokens_P: npt.NDArray[np.integer],
    start_PC: Tensor,
    passes: int,
) -> Tensor:
    """Contexts after some shifted passes without noise, ``[P, C]``.

    In each, position i is fed the pass before's context of position i - 1, position 0 zeros.
    """
    contexts_PC = start_PC.clone()
    for _ in range(passes):
        before_1C = torch.zeros_like(contexts_PC[:1])
        for rows, embedded_1ND in _chunks(block, embed, tokens_P):
            previous_NC = contexts_PC[rows].clone()
            fed_NC = torch.cat([before_1C, previous_NC[:-1]])
            contexts_PC[rows] = block.parallel(embedded_1ND, fed_NC.unsqueeze(0))[-1, 0]
            before_1C = previous_NC[-1:]
    return contexts_PC


@torch.no_grad()
def _fill(
    block: ContextBlock,
    embed: Embed,
    tokens_P: npt.NDArray[np.integer],
    start_PC: Tensor,
    passes: int,
    settings: ContextStoreSettings,
    path: Path,
) -> float:
    """Write the contexts to `path`; the drift."""
    parallel_PC = parallel_contexts(block, embed, tokens_P, start_PC, passes)
    state_1C = torch.zeros_like(start_PC[:1])
    squares = 0.0
    with atomic_open(path, "wb") as stream:
        for rows, embedded_1ND in _chunks(block, embed, tokens_P):
            exact_NC = block(embedded_1ND, state_1C)[-1, 0]
            state_1C = exact_NC[-1:]
            squares += F.mse_loss(exact_NC, parallel_PC[rows], reduction="sum").item()
            chosen_NC = exact_NC if settings.fill == "sequential" else parallel_PC[rows]
            stored_NC = chosen_NC.to("cpu", _DTYPES[settings.dtype]).contiguous()
            stream.write(stored_NC.view(torch.uint8).numpy().tobytes())
    return squares / parallel_PC.numel()


def _chunks(
    block: ContextBlock, embed: Embed, tokens_P: npt.NDArray[np.integer]
) -> Iterator[tuple[slice, Tensor]]:
    """The stream piece by piece: its rows, and their embeddings ``[1, N, D]``."""
    device = next(block.parameters()).device
    for start in range(0, len(tokens_P), CHUNK):
        rows = slice(start, min(start + CHUNK, len(tokens_P)))
        ids_N = torch.from_numpy(np.asarray(tokens_P[rows], dtype=np.int64)).to(device)
        yield rows, embed(ids_N).unsqueeze(0)


@torch.no_grad()
def _key(
    block: ContextBlock,
    embed: Embed,
    tokens_P: npt.NDArray[np.integer],
    start_PC: Tensor,
    passes: int,
) -> str:
    """A hash of everything that the contexts depend on."""
    digest = hashlib.sha256(f"{passes}".encode())
    device = next(block.parameters()).device
    distinct_U = np.unique(np.asarray(tokens_P)).astype(np.int64)
    tensors = [*block.state_dict().values(), embed(torch.from_numpy(distinct_U).to(device))]
    # The start piece by piece: a second copy of all contexts would take gigabytes.
    for tensor in [*tensors, *start_PC.split(CHUNK)]:
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy())
    digest.update(np.asarray(tokens_P, dtype="<i8").tobytes())
    return digest.hexdigest()[:32]
