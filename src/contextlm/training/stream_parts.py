"""Phase 1 over several processes: who has which part of the stream, and what they exchange.

Each rank keeps a run of whole batches. A batch needs the context before its first position, which
the rank before has, and all ranks need the gradient of all batches; nothing else is exchanged until
the end. Batches, and with them the noise, are those of one process.

Shape suffixes: P positions of the stream, N positions of this part, C context width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contextlm.base import distribution


@dataclass(frozen=True)
class Part:
    """A rank's part of a stream.

    Batches ``[first, last)`` of `batches`, which are positions ``[start, stop)`` of `positions`.
    """

    first: int
    last: int
    batches: int
    start: int
    stop: int
    positions: int

    @property
    def rows(self) -> slice:
        """The part's positions in the stream."""
        return slice(self.start, self.stop)


def part_of(positions: int, size: int, rank: int, world: int) -> Part:
    """The part of one rank; parts differ by at most a batch, and only the last ranks may have none.

    Args:
        positions: of the stream.
        size: positions of a batch; the last one may have fewer.
        rank: whose part.
        world: how many ranks there are.
    """
    batches = -(-positions // size)
    each, more = divmod(batches, world)
    first = rank * each + min(rank, more)
    last = first + each + (rank < more)
    return Part(
        first, last, batches, min(first * size, positions), min(last * size, positions), positions
    )


def own_part(positions: int, size: int) -> Part:
    """The part of this process."""
    return part_of(positions, size, distribution.rank(), distribution.world())


def context_before(contexts_NC: Tensor, part: Part) -> Tensor:
    """The context before a part: zeros at the stream's beginning, else the last of the rank before.

    All ranks call this with their parts' contexts of one iteration; each sends C numbers.

    Args:
        contexts_NC: this part's.
        part: where it lies.

    Returns:
        ``[1, C]``.
    """
    before_1C = contexts_NC.new_zeros(1, contexts_NC.shape[1])
    rank, exchanges = distribution.rank(), []
    if part.last < part.batches:
        exchanges.append(dist.P2POp(dist.isend, contexts_NC[-1:].contiguous(), rank + 1))
    if 0 < part.first < part.last:
        exchanges.append(dist.P2POp(dist.irecv, before_1C, rank - 1))
    for exchange in dist.batch_isend_irecv(exchanges) if exchanges else []:
        exchange.wait()
    return before_1C


def sum_gradients(block: nn.Module) -> None:
    """Give every rank the sum of the ranks' gradients, in one message of the block's size."""
    if distribution.world() == 1:
        return
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def gathered(contexts_NC: Tensor, size: int, positions: int) -> Tensor:
    """All parts' contexts on rank 0, ``[P, C]``, and none on the others, ``[0, C]``.

    Args:
        contexts_NC: this part's.
        size: positions of a batch.
        positions: of the stream.
    """
    world = distribution.world()
    if world == 1:
        return contexts_NC
    if not distribution.is_main():
        if len(contexts_NC):
            dist.send(contexts_NC, 0)
        return contexts_NC[:0]
    all_PC = contexts_NC.new_empty(positions, contexts_NC.shape[1])
    all_PC[: len(contexts_NC)] = contexts_NC
    for rank in range(1, world):
        part = part_of(positions, size, rank, world)
        if part.start < part.stop:
            dist.recv(all_PC[part.rows], rank)
    return all_PC


def zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters without a gradient one of zeros, as a rank without batches needs it."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
