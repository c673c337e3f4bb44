"""FSDP2 for phase 2: each rank keeps a share of weights, gradients and optimiser state.

Sharding changes a model for good: its parameters become distributed tensors, and every forward
pass needs all ranks. A copy is therefore trained, and its weights go back into the model when it
is done, which is then measured and saved like any other.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

# The block's recurrence is small, and models also call it otherwise than by its forward, which is
# where sharding gathers the weights.
_WHOLE = {"ContextBlock", "GatedContextBlock"}


def sharding_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """What the Trainer is told so that FSDP2 shards the model's layers.

    Layers are those that the model says must not be split; what is left is sharded as one.
    """
    named = set(getattr(model, "_no_split_modules", None) or ()) - _WHOLE
    layers = sorted(named & {type(module).__name__ for module in model.modules()})
    by_layer = {"transformer_layer_cls_to_wrap": layers}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            # Working checkpoints in shares: the whole model need never be in one place.
            "state_dict_type": "SHARDED_STATE_DICT",
            **(by_layer if layers else {"auto_wrap_policy": "NO_WRAP"}),
        },
    }


def copy_to_shard(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in the host's memory; the model goes there too, so that it takes no accelerator's."""
    model.to("cpu")
    return copy.deepcopy(model)


@torch.no_grad()
def take_weights(model: PreTrainedModel, sharded: torch.nn.Module, device: torch.device) -> None:
    """Copy the sharded copy's weights into the model, one after the other, and put it on `device`.

    All ranks call this.
    """
    own = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        own[name].copy_(whole)
    model.to(device)
