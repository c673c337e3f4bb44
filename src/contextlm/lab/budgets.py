"""Token budgets: how much of the text a training sees, in an order that is the same for all.

The training samples are taken in blocks of as many as the recipe names. Each block is shuffled by
itself, as an epoch is, and a budget ends somewhere in that order: so a longer training begins as a
shorter one, and the budget 1 is the recipe's own epoch. Where the text holds fewer blocks than the
longest budget needs, and the recipe says so, its first block follows its last, shuffled anew.
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
        text_blocks: after how many blocks the text begins again.
        text: hash of the text behind the blocks that it reaches.
        tokens: of the text, as far as there is a token for each of the `samples`; those of text
            that comes again count again.
    """

    share: float
    samples: int
    block: int
    text_blocks: int
    text: str
    tokens: int

    @property
    def text_passes(self) -> float | None:
        """How often it reads the text, where that is more than once."""
        passes = self.samples / (self.text_blocks * self.block)
        return passes if passes > 1 else None

    def order(self, seed: int, *, shuffle: bool) -> list[int]:
        """Its samples' indices, in the order in which they are trained on."""
        order: list[int] = []
        for number in range(blocks_of(self.share)):
            within = torch.arange(self.block)
            if shuffle:
                generator = torch.Generator().manual_seed(seed + number)
                within = torch.randperm(self.block, generator=generator)
            order += (number % self.text_blocks * self.block + within).tolist()
        return order[: self.samples]


def blocks_of(share: float) -> int:
    """How many blocks a share of the training samples reaches; the last may end in its middle."""
    return max(1, -int(-share // 1))
