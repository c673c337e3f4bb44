"""K: a matrix state that is written by the gated delta rule.

Sources: gated DeltaNet (Yang et al., arXiv:2412.06464) and Kimi Delta Attention (arXiv:2510.26692),
whose decays differ by channel. E = expand * D channels of values in H heads of P, keys and queries
of N a head; for each token, with x the normalised stream::

    z, [q; k; v], d, b = split(W_in x)
    [q; k; v] = silu(convolution([q; k; v]))              causal, depthwise; q and k to length 1
    g = -r softplus(d + c),  beta = sigmoid(b)            g of each channel of a key, or each head
    S = Diag(exp(g)) S;  S = S + beta k (v - S^T k)^T     `ops.delta_rule`
    out = W_out (RMSNorm(S^T q) * silu(z))                the norm of each head

Decays of a channel end at `LEAST`, which keeps the chunked form within float32: g is then
``LEAST tanh(g / LEAST)``, the same for all slow ones. Decoding keeps N E numbers and the
convolution's last inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contextlm.models.convolution import CausalConvolution
from contextlm.models.hybrid.mixer import Mixer, register_mixer
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import RMSNorm
from contextlm.models.selective_state import Decay, MatrixStateLayer
from contextlm.models.stepping import StepWeights, product
from contextlm.ops.delta_rule import LEAST, delta_rule


@register_mixer("K")
class DeltaMixer(Mixer):
    """K as a layer's mixer."""

    step_names = (
        *("convolution.weight", "convolution.bias", "decay.step", "decay.rate"),
        "norm.weight",
    )
    step_kept = ("taps", "state")

    def __init__(self, config: Any):
        super().__init__(config)
        width, self.key_size = config.hidden_size, config.state_size
        self.inner_size = config.expand * width
        self.heads = self.inner_size // config.state_head_dim
        keys = self.heads * self.key_size
        decays = keys if config.delta_decay == "channel" else self.heads
        self.widths = (self.inner_size, 2 * keys + self.inner_size, decays, self.heads)
        self.inner = nn.Linear(width, sum(self.widths), bias=False)
        taps = config.convolution
        convolved = self.widths[1]
        self.convolution = CausalConvolution(convolved, taps, start="uniform") if taps else None
        self.decay = Decay(self.heads, decays // self.heads)
        self.norm = RMSNorm(config.state_head_dim, eps=config.rms_norm_eps)
        self.output = nn.Linear(self.inner_size, width, bias=False)
        self.step_weights = StepWeights(self)

    @classmethod
    def new_state(cls, config: Any) -> MatrixStateLayer:
        """The heads' matrices and the convolution's taps."""
        return MatrixStateLayer(torch.bfloat16 if config.state_dtype == "bfloat16" else None)

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse heads that do not fill the channels."""
        config.check_state_heads(config.expand * config.hidden_size)

    def forward(self, x_BTD: Tensor, state: MatrixStateLayer | None, new: NewTokens) -> Tensor:
        """What the mixer adds, ``[B, T, D]``; see `Mixer.forward`."""
        projected_BTX = product(self.inner, x_BTD, step=new.is_step)
        mixed_B1E = self.step(new, state, projected_BTX)
        if mixed_B1E is not None:
            return product(self.output, mixed_B1E, step=True)
        gate, inner, decay, rate_BTH = projected_BTX.split(self.widths, dim=-1)
        kind = torch.promote_types(inner.dtype, torch.float32)
        if self.convolution is None:
            inner = F.silu(inner.to(kind))
        else:
            inner = self.convolution(inner, state, new, silu=True).to(kind)
        keys = self.heads * self.key_size
        query, key, value = (
            each.unflatten(-1, (self.heads, -1))
            for each in inner.split((keys, keys, self.inner_size), dim=-1)
        )
        steps, rates = self.decay(decay)
        logs_BTHX = -rates * steps
        if logs_BTHX.shape[-1] > 1:
            logs_BTHX = LEAST * torch.tanh(logs_BTHX / LEAST)
        outputs_BTHP, final_BHNP = delta_rule(
            F.normalize(query, dim=-1),
            F.normalize(key, dim=-1),
            value,
            logs_BTHX,
            torch.sigmoid(rate_BTH.to(kind)),
            None if state is None else state.state,
            mask_BT=new.real_first_mask,
            begins_BT=None if new.packed_BT is None else new.packed_BT == 0,
        )
        if state is not None:
            state.update_state(final_BHNP, new)
        mixed_BTE = self.norm(outputs_BTHP).flatten(2) * F.silu(gate.to(kind))
        return self.output(mixed_BTE.to(x_BTD.dtype))

    def compiled_step(self, state: Any, weights: Any, *projected_B1X: Any) -> Tensor:
        """As in `Stepping`."""
        from contextlm.ops.delta_rule.step import delta_step

        given: list[Any] = [*projected_B1X, state.taps, state.state, *weights]
        return delta_step(*given, eps=self.config.rms_norm_eps)
