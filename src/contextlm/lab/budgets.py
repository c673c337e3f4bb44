"""Token budgets: how much of the text a training sees, in an order that is the same for all.

The training samples are taken in blocks of as many as the recipe names. Each block is shuffled by
itself, as an epoch is, and a budget ends somewhere in that order: so a longer training begins as a
shorter one, and the budget 1 is the recipe's own epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """One budget.

    Attributes:
        share: of the recipe's training samples.
        samples: how many that is.
        block: how many the recipe names.
        text: hash of the text behind the blocks that it reaches.
        tokens: of that text, as far as there is a token for each of the `samples`.
    """

    share: float
    samples: int
    block: int
    text: str
    tokens: int

    @property
    def blocks(self) -> int:
        """How many blocks it reaches; the last may be left in the middle."""
        return blocks_of(self.share)

    def order(self, seed: int, *, shuffle: bool) -> list[int]:
        """Its samples' indices, in the order in which they are trained on."""
        order: list[int] = []
        for number in range(self.blocks):
            within = torch.arange(self.block)
            if shuffle:
                generator = torch.Generator().manual_seed(seed + number)
                within = torch.randperm(self.block, generator=generator)
            order += (number * self.block + within).tolist()
        return order[: self.samples]


def blocks_of(share: float) -> int:
    """How many blocks a share of the training samples reaches."""
    return max(1, -int(-share // 1))
