"""Healing: a model whose cache was compressed learns to say again what the original says.

What is minimised is a weighted sum of the next-token loss and of the Kullback-Leibler divergence
KL(original || model) of the next token, both in nats a target: knowledge distillation (Hinton et
al., arXiv:1503.02531) with the uncompressed model as the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from contextlm.data.windows import IGNORED
from contextlm.models.head import Parts, split_head

_BLOCK = 2**24  # logits that are held at once, of each model


class DistillationLoss(nn.Module):
    """The weighted sum for a model and its teacher, whose logits are made block by block.

    Args:
        model: what is trained.
        teacher: of the same vocabulary; it is not changed, and no part of this module.
        loss, kl: the weights.
        whole: ask the model for all logits, as `training.next_token.NextTokenLoss` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        loss: float,
        kl: float,
        whole: bool = False,
    ):
        super().__init__()
        self.model = model
        self._weights = loss, kl
        self._own = None if whole else split_head(model)
        self._teacher = (teacher, split_head(teacher))  # in a tuple, where nn.Module looks for none

    def forward(self, labels_BT: Tensor, targets: float, **arguments: Any) -> tuple[Tensor, Tensor]:
        """What is minimised, and the next-token loss, as in `NextTokenLoss`."""
        with torch.no_grad():
            taught_BTD, teach = _read(*self._teacher, arguments)
        made_BTD, head = _read(self.model, self._own, arguments)
        real_BT = labels_BT != IGNORED
        made_ND, taught_ND, labels_N = made_BTD[real_BT], taught_BTD[real_BT], labels_BT[real_BT]

        def sums(made_RD: Tensor, taught_RD: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                taught_RV = teach(taught_RD).float().log_softmax(-1)
            log_RV = head(made_RD).float().log_softmax(-1)
            next_token = F.nll_loss(log_RV, labels_R, reduction="sum")
            return next_token, F.kl_div(log_RV, taught_RV, reduction="sum", log_target=True)

        rows = max(1, _BLOCK // self.model.config.vocab_size)
        next_token = divergence = made_ND.new_zeros((), dtype=torch.float32)
        for block in zip(*(t.split(rows) for t in (made_ND, taught_ND, labels_N)), strict=True):
            # Logits are not kept for the backward pass but made again, a block at a time.
            parts = checkpoint(sums, *block, use_reentrant=False, preserve_rng_state=False)
            next_token, divergence = next_token + parts[0], divergence + parts[1]
        loss, kl = self._weights
        return (loss * next_token + kl * divergence) / targets, next_token.detach() / targets


def _read(
    model: PreTrainedModel, parts: Parts | None, arguments: dict[str, Any]
) -> tuple[Tensor, nn.Module]:
    """What a model's head reads, and the head; its logits, and none, where it has no parts."""
    if parts is None:
        return model(**arguments, use_cache=False).logits, nn.Identity()
    return parts.hidden(**arguments), parts.head
