"""A causal language model in two parts, so that a loss can do without its logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Parts(NamedTuple):
    """A model's decoder, and the head that makes logits of its last hidden states."""

    decoder: nn.Module
    head: nn.Linear

    def hidden(self, *, logits_to_keep: int = 0, **arguments: Any) -> Tensor:
        """What the head would read, ``[B, T, D]``; arguments are those of the whole model."""
        if getattr(self.decoder, "reads_only_last", False):
            arguments["last"] = logits_to_keep
        hidden_BTD: Tensor = self.decoder(**arguments, use_cache=False).last_hidden_state
        return hidden_BTD[:, -logits_to_keep:]  # the last n of what is n long already are all of it


@torch.no_grad()
def split_head(model: PreTrainedModel) -> Parts | None:
    """The parts of a model whose logits are the decoder's last hidden states through the head.

    None for all others: those that scale or cap their logits, or whose head is no plain linear
    layer. Two tokens are tried to find out, different ones: padding's embedding may be zero.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    if type(head) is not nn.Linear or decoder is model:
        return None
    parts, was_training = Parts(decoder, head), model.training
    model.eval()
    ids_12 = torch.arange(2, device=head.weight.device).unsqueeze(0)
    logits_12V = model(input_ids=ids_12, use_cache=False).logits
    same = torch.equal(head(parts.hidden(input_ids=ids_12)), logits_12V)
    model.train(was_training)
    return parts if same else None
