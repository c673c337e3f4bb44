"""A linear layer's product with few vectors, ``y = W x``, which reads each weight once.

For many vectors it is torch's matrix product. For one that takes several times as long as reading
the weights does, on processors that its library was not made for.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Vectors that are few.
_FEW = 4
# Weights that one thread reads as fast as torch's threads do, times the number of these.
_MOST_WEIGHTS = 2**22


def is_small(inputs: Tensor, weight_OI: Tensor) -> bool:
    """Whether `linear_step` is the fast form of this product."""
    few = inputs.numel() <= _FEW * weight_OI.shape[1]
    return few and weight_OI.numel() * torch.get_num_threads() <= _MOST_WEIGHTS
