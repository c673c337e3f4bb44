"""A new token of each row in one compiled call (`ops.step`), where nothing speaks against it.

Tracing, gradients, other devices and types, and parts that do more than they did when they were
made take the plain form.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contextlm.models.cache import RowStateLayer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm, is_bare
from contextlm.ops.linear import is_small

_TYPES = (torch.float32, torch.float64)


def product(layer: nn.Module, x: Tensor, *, step: bool) -> Tensor:
    """``layer(x)``, for a token in a compiled loop if that is a small linear layer and no more.

    Args:
        layer: linear, or what has taken the place of a linear layer.
        x: ``[..., I]``.
        step: whether this is a token that may be done so (`NewTokens.is_step`).
    """
    weight = _weight(layer, nn.Linear, x) if step else None
    if weight is None or layer._parameters.get("bias") is not None or not is_small(x, weight):
        outputs: Tensor = layer(x)
        return outputs
    from contextlm.ops.linear.step import linear_step

    return linear_step(x, weight)


def normed(layer: Any, x: Tensor, *, step: bool) -> Tensor:
    """``layer(x)``, for a token in one compiled call if that is an `RMSNorm` and no more.

    Args:
        layer: the norm, or what has taken its place.
        x: ``[..., C]``.
        step: as for `product`.
    """
    weight = _weight(layer, RMSNorm, x) if step else None
    if weight is None:
        outputs: Tensor = layer(x)
        return outputs
    from contextlm.ops.rms_norm.step import norm_step

    return norm_step(x, weight, eps=layer.eps)


def _weight(layer: Any, kind: type[nn.Module], x: Tensor) -> Tensor | None:
    """The weight of what is a layer of a kind and no more, if a step can take it and the input."""
    weight: Tensor | None = layer._parameters.get("weight") if type(layer) is kind else None
    if (
        weight is None
        or type(weight) is not nn.Parameter
        or type(x) is not Tensor
        or weight.dtype not in _TYPES
        or weight.dtype is not x.dtype
        or weight.device.type != "cpu"
        or not (weight.is_contiguous() and x.is_contiguous())
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in layer.__dict__
    ):
        return None
    return weight


class Stepping(nn.Module):
    """A module that has a compiled form of what it does between its projections.

    Attributes:
        step_names: of the weights which that form reads, its own and its parts', ``"norm.weight"``.
        step_kept: names of what the state must keep already.
        step_weights: made at the end of the constructor; None: plain torch only.
    """

    step_names: ClassVar[tuple[str, ...]] = ()
    step_kept: ClassVar[tuple[str, ...]] = ()
    step_weights: StepWeights | None = None

    def step(self, new: NewTokens, state: Any, *projected_B1X: Tensor) -> Tensor | None:
        """What the last projection is given, ``[B, 1, E]``; None where the plain form must do it.

        Args:
            new: the tokens.
            state: what decoding keeps, moved on; or None.
            *projected_B1X: what the first projections gave.
        """
        if not new.is_step or state is None or self.step_weights is None:
            return None
        weights = self.step_weights.of(self, state, projected_B1X)
        if weights is None:
            return None
        mixed_B1E = self.compiled_step(state, weights, *projected_B1X)
        state.advance(new)
        return mixed_B1E

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """The compiled form; changes what `state` keeps, but not its counts.

        Args:
            state: has all of `step_kept`.
            weights: in the order of `step_names`; None for a part that the module was made without.
            *projected_B1X: contiguous as all others, of their type.
        """
        raise NotImplementedError


class StepWeights:
    """The weights that a module's step reads: looked up once, and watched from then on.

    A token's time counts, and looking them up takes as long as computing with them. So at a token
    it is only checked that nothing has taken the place of one, or of a part that one belongs to.

    Args:
        module: whose step it is, with all its parts.
    """

    def __init__(self, module: Stepping):
        owned = {name for name, _ in module.named_parameters()}
        self._names = [name if name in owned else None for name in module.step_names]
        parts = dict(module.named_modules())
        paths = {name.rpartition(".")[0] for name in module.step_names} & parts.keys() - {""}
        self._kinds = {path: type(parts[path]) for path in sorted(paths)}
        convolution = getattr(module, "convolution", None)
        without = {"taps"} if convolution is None or convolution.taps == 1 else set()
        self._kept = [name for name in module.step_kept if name not in without]
        self._weights: list[Tensor | None] | None = None
        self._dtype: torch.dtype | None = None
        self._looked_up = False
        self._parts: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._places: list[tuple[dict[str, Any], str, Tensor, int]] = []

    def of(
        self, module: nn.Module, state: RowStateLayer, projected_B1X: tuple[Tensor, ...]
    ) -> list[Tensor | None] | None:
        """The weights in the order of their names; None where they or other tensors do not fit."""
        if not self._are_in_place():
            self._look_up(module)
        kind = self._dtype or projected_B1X[0].dtype
        if self._weights is None or kind not in _TYPES:
            return None
        for each in (*projected_B1X, *[getattr(state, name) for name in self._kept]):
            if (
                each is None
                or type(each) is not Tensor
                or each.dtype is not kind
                or each.requires_grad  # a graph that was made with it needs it as it is
                or not each.is_contiguous()
            ):
                return None
        return self._weights

    def _are_in_place(self) -> bool:
        for parts, name, part in self._parts:
            if (
                parts.get(name) is not part
                or part._forward_hooks
                or part._forward_pre_hooks
                or "forward" in part.__dict__
            ):
                return False
        for parameters, name, weight, address in self._places:
            if parameters.get(name) is not weight or weight.data_ptr() != address:
                return False
        return self._looked_up

    def _look_up(self, module: nn.Module) -> None:
        self._weights, self._parts, self._places, self._looked_up = None, [], [], False
        for path, kind in self._kinds.items():
            above, _, name = path.rpartition(".")
            parts = module.get_submodule(above)._modules
            part = parts.get(name)
            if part is None or not is_bare(part, kind):
                return
            self._parts.append((parts, name, part))
        found: list[Tensor | None] = []
        for full in self._names:
            if full is None:
                found.append(None)
                continue
            path, _, name = full.rpartition(".")
            parameters = module.get_submodule(path)._parameters
            weight = parameters.get(name)
            if type(weight) is not nn.Parameter or weight.device.type != "cpu":
                return
            self._places.append((parameters, name, weight, weight.data_ptr()))
            found.append(weight)
        self._looked_up = True
        given = [weight for weight in found if weight is not None]
        if all(weight.is_contiguous() for weight in given):
            kinds = {weight.dtype for weight in given}
            if len(kinds) <= 1:
                self._weights, self._dtype = found, kinds.pop() if kinds else None
