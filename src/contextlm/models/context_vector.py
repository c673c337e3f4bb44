"""Context vector: an attention-free model whose only memory is a vector that its MLP updates.

Source: the report 002_8f966a5df4c05745 (DESIGN 1.1, where it is called New-LLM). For each token t::

    x_t = E[token_t] + P[t]
    h_t = MLP([x_t ; c_{t-1}])              L x (Linear -> ReLU -> Dropout), c_0 = 0
    logits_t = W_o h_t + b_o
    c_t = c_{t-1} + W_c h_t + b_c           update="additive", the document's

The document names gates and several context vectors as what might help. ``update="gated"`` is::

    f = sigmoid(W_f h_t + b_f)    i = sigmoid(W_i h_t + b_i)
    c_t = f c_{t-1} + i tanh(W_c h_t + b_c)

What is written is squashed, as in an LSTM: without, training was seen to jump (docs/log.md). With
several context vectors b_f starts at 1, 3, 5 ... from one to the next, so that they begin as
memories of different length: 73 %, 95 %, 99.3 % ... of a vector outlive each token. Where nothing
sets the vectors apart (one, or the additive update) n of them are one of n times the width.

The context before a token decides the context after it through the whole MLP, so the tokens are
taken one after the other; only the tokens' part of the first layer is computed for all at once.

With ``context="gated_recurrence"`` the context is a gated recurrence over the normalised embeddings
(`models.gated_recurrence`) instead, which the MLP reads but does not write, so that tokens need not
wait for each other. Phase 1 can train it, as it trains Context-Pythia's. With
``context="selective_state"`` it is what a selective state (`models.selective_state`) gives at the
current token; only next-token training trains that.

H is the width of the MLP here, C that of all context vectors together.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from contextlm.models.base import ContextDecoder, ContextForCausalLM, register_architecture
from contextlm.models.cache import ContextStateLayer
from contextlm.models.config import ContextConfig
from contextlm.models.gated_recurrence import GatedContextBlock
from contextlm.models.inputs import NewTokens
from contextlm.models.layers import is_bare
from contextlm.models.selective_state import MatrixStateLayer, SelectiveState
from contextlm.ops.repeated_linear import RepeatedLinear

_DEFAULT_POSITIONS = 32
_RECOMPUTED = 32  # tokens at a time, of whose steps gradient checkpointing keeps nothing


@strict
class ContextVectorConfig(ContextConfig):
    """Configuration of the context-vector model; the defaults are the document's.

    Args:
        vocab_size: V.
        hidden_size: D, the width of the embedding.
        context_dim: width of each context vector.
        num_contexts: context vectors, concatenated. Each has its own update; since every channel of
            an update is computed from h_t for itself, n vectors of width C are one of width n C.
        mlp_size: H, the width of the MLP.
        mlp_layers: L, its linear layers.
        dropout: after each of them.
        context: what updates the context: the document's MLP, a gated recurrence, or a selective
            state.
        freeze_context: the recurrence learns in phase 1 only; False by default.
        state_size: N, numbers of state a channel of a selective state, which has twice as many
            channels as the context.
        state_head_dim: P, channels of each of its heads.
        update: how the MLP changes the context.
        positions: learned, or none, which leaves the length unbounded.
        max_position_embeddings: positions that can be learned, 32 by default; None without them.
    """

    model_type = "context_vector"

    vocab_size: int = 1000
    hidden_size: int = 256
    context_dim: int = 256
    num_contexts: int = 1
    mlp_size: int = 512
    mlp_layers: int = 8
    dropout: float | int = 0.1
    context: Literal["mlp", "gated_recurrence", "selective_state"] = "mlp"
    state_size: int = 16
    state_head_dim: int = 64
    freeze_context: bool = False
    update: Literal["additive", "gated"] = "additive"
    positions: Literal["learned", "none"] = "learned"
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.positions == "learned" and self.max_position_embeddings is None:
            self.max_position_embeddings = _DEFAULT_POSITIONS
        super().__post_init__(**kwargs)

    @property
    def total_context_dim(self) -> int:
        """C, the width of all context vectors together."""
        return self.num_contexts * self.context_dim

    def validate_architecture(self) -> None:
        """Called by transformers on construction.

        Raises:
            ValueError: a size is not positive, a limit of positions without positions, a tied head
                that is not as wide as the embedding, or a setting of the other kind of context.
        """
        sizes = ("vocab_size", "hidden_size", "context_dim", "num_contexts")
        self.check_counts(*sizes, "mlp_size", "mlp_layers")
        self.check_positive("initializer_range")
        self.check_dropout("dropout")
        self.check_counts("state_size", "state_head_dim")
        if self.context != "gated_recurrence" and self.freeze_context:
            raise ValueError(
                f"freeze_context is for context 'gated_recurrence', not {self.context!r}"
            )
        if self.context == "selective_state":
            self.check_state_heads(2 * self.context_dim)
        if self.context != "mlp" and self.update == "gated":
            raise ValueError(f"update must be left out with context {self.context!r}, got 'gated'")
        if self.context != "mlp" and self.num_contexts > 1:
            raise ValueError(
                f"num_contexts must be 1 with context {self.context!r}, got {self.num_contexts}: "
                "its channels are independent, a wider context is the same"
            )
        limit = self.max_position_embeddings
        if self.positions == "none" and limit is not None:
            raise ValueError(
                f"max_position_embeddings must be left out with positions 'none', got {limit}"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, got {limit}")
        if self.tie_word_embeddings and self.mlp_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings needs an MLP as wide as the embedding: "
                f"mlp_size {self.mlp_size} is not hidden_size {self.hidden_size}"
            )


Apply = Callable[[nn.Module, Tensor], Tensor]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    """How a layer is applied to one token, or to all at once."""
    answer: Tensor = layer(x)
    return answer


class RepeatedLayers:
    """How layers are applied to so many tokens in turn, each layer once a token."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.repeated: dict[nn.Module, Callable[[Tensor], Tensor]] = {}

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the layer makes of the token's input, ``[B, ...]``."""
        if layer not in self.repeated:
            self.repeated[layer] = (
                RepeatedLinear(layer.weight, layer.bias, self.tokens)
                if isinstance(layer, nn.Linear) and is_bare(layer, nn.Linear)
                else layer
            )
        return self.repeated[layer](x)


class ForgetGate(nn.Linear):
    """A linear layer whose bias starts high: a model that has learnt nothing remembers.

    The parts of the output, one for each context, start at 1, 3, 5 ...
    """

    def __init__(self, mlp_size: int, context_dim: int, num_contexts: int):
        super().__init__(mlp_size, context_dim)
        self.num_contexts = num_contexts

    def reset_bias(self) -> None:
        """The starting biases."""
        starts = 1.0 + 2.0 * torch.arange(self.num_contexts, device=self.bias.device)
        width = self.bias.shape[0] // self.num_contexts
        init.copy_(self.bias, starts.repeat_interleave(width))


class ContextUpdate(nn.Module):
    """How a token changes the context; `gated` scales what is kept and what is written.

    One layer for all context vectors, C wide together, is the same as one layer for each.
    """

    def __init__(self, mlp_size: int, context_dim: int, num_contexts: int, *, gated: bool):
        super().__init__()
        self.written = nn.Linear(mlp_size, context_dim)
        self.forget_gate = ForgetGate(mlp_size, context_dim, num_contexts) if gated else None
        self.input_gate = nn.Linear(mlp_size, context_dim) if gated else None

    def forward(self, hidden_BH: Tensor, context_BC: Tensor, apply: Apply) -> Tensor:
        """The context after a token, ``[B, C]``, in the type of the context before it."""
        written_BC = apply(self.written, hidden_BH)
        if self.forget_gate is None or self.input_gate is None:
            return context_BC + written_BC
        kept_BC = torch.sigmoid(apply(self.forget_gate, hidden_BH)) * context_BC
        return kept_BC + torch.sigmoid(apply(self.input_gate, hidden_BH)) * torch.tanh(written_BC)


class ContextVectorModel(ContextDecoder):
    """Embedding, MLP and context update, without the head."""

    config_class = ContextVectorConfig
    _no_split_modules = ["GatedContextBlock", "SelectiveState", "ContextUpdate"]
    _can_compile_fullgraph = True

    def __init__(self, config: ContextVectorConfig):
        super().__init__(config)
        width, mlp_size = config.total_context_dim, config.mlp_size
        limit = config.max_position_embeddings
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None if limit is None else nn.Embedding(limit, config.hidden_size)
        # The MLP's first layer in two parts, whose sum is one layer that reads [x ; c].
        self.token_input = nn.Linear(config.hidden_size, mlp_size)
        self.context_input = nn.Linear(width, mlp_size, bias=False)
        self.mlp = nn.ModuleList(
            nn.Linear(mlp_size, mlp_size) for _ in range(config.mlp_layers - 1)
        )
        self.dropout = nn.Dropout(config.dropout)
        if config.context == "gated_recurrence":
            self.embed_norm = nn.LayerNorm(config.hidden_size)
            self.context_block = GatedContextBlock(
                width, config.hidden_size, frozen=config.freeze_context
            )
        elif config.context == "selective_state":
            self.embed_norm = nn.LayerNorm(config.hidden_size)
            self.selective_context = SelectiveState(
                config.hidden_size, 2 * width, width, config.state_head_dim, config.state_size
            )
        else:
            gated = config.update == "gated"
            self.update = ContextUpdate(mlp_size, width, config.num_contexts, gated=gated)
        self.gradient_checkpointing = False
        self.freeze_parts()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ForgetGate):
            module.reset_bias()

    def new_cache(self) -> Cache:
        """An empty cache: the context after the last token."""
        selective = self.config.context == "selective_state"
        return Cache(layers=[MatrixStateLayer() if selective else ContextStateLayer()])

    @property
    def width(self) -> int:
        """H."""
        return self.config.mlp_size

    def decode(self, embeds_BTD: Tensor, new: NewTokens, **kwargs: Any) -> Tensor:
        """Hidden states ``[B, T, H]``; a `ValueError` for more tokens than learned positions."""
        tokens_BTD = embeds_BTD
        if self.embed_positions is not None:
            positions_BT = new.table_positions(self.embed_positions.num_embeddings)
            tokens_BTD = tokens_BTD + self.embed_positions(positions_BT)
        (state,) = new.states(1)
        if self.config.context == "selective_state":
            embeds_BTD = new.real_first(self.embed_norm(embeds_BTD))
            contexts_BTC = new.as_given(self.selective_context(embeds_BTD, state, new))
            return self._recomputed(self._hidden, self.token_input(tokens_BTD), contexts_BTC)
        start_BC = embeds_BTD.new_zeros(new.batch, self.config.total_context_dim)
        if state is not None:
            start_BC = state.continue_from(start_BC)
        if self.config.context == "mlp":
            return self._in_turn(tokens_BTD, start_BC, new, state)
        # Over a gated recurrence, at once.
        (contexts_BTC,) = self.context_block.run(self.embed_norm(embeds_BTD), new, state)
        before_BTC = torch.cat([start_BC.unsqueeze(1), contexts_BTC[:, :-1]], dim=1)
        return self._recomputed(
            self._hidden, self.token_input(tokens_BTD), before_BTC.to(tokens_BTD.dtype)
        )

    def _recomputed(self, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """What a function makes of tensors; gradient checkpointing computes it again."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(function, *tensors)
        return function(*tensors)

    def _hidden(self, token: Tensor, context: Tensor, apply: Apply = _call) -> Tensor:
        """The MLP's output, ``[..., H]``, for the tokens' part and the contexts before them."""
        hidden = self.dropout(F.relu(token + apply(self.context_input, context)))
        for layer in self.mlp:
            hidden = self.dropout(F.relu(apply(layer, hidden)))
        return hidden

    def _in_turn(
        self,
        tokens_BTD: Tensor,
        context_BC: Tensor,
        new: NewTokens,
        state: ContextStateLayer | None,
    ) -> Tensor:
        """The MLP's outputs, which change the context, ``[B, T, H]``; moves the state on."""
        token_BTH = self.token_input(tokens_BTD)
        size = _RECOMPUTED if self.gradient_checkpointing and self.training else new.tokens
        outputs = []
        for start in range(0, new.tokens, size):
            piece = slice(start, start + size)
            mask = None if new.mask_BT is None else new.mask_BT[:, piece]
            hidden_BTH, context_BC = self._recomputed(
                self._loop, token_BTH[:, piece], context_BC, mask
            )
            outputs.append(hidden_BTH)
        if state is not None:
            state.update_state(context_BC, new)
        return torch.cat(outputs, dim=1)

    def _loop(
        self, token_BTH: Tensor, context_BC: Tensor, mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The MLP's outputs and the context after them."""
        # Not where checkpointing is to keep nothing of these steps.
        keep_nothing = self.gradient_checkpointing and self.training
        apply = _call if keep_nothing else RepeatedLayers(token_BTH.shape[1])
        outputs = []
        for t, token_BH in enumerate(token_BTH.unbind(1)):
            hidden_BH = self._hidden(token_BH, context_BC, apply)
            outputs.append(hidden_BH)
            new_BC = self.update(hidden_BH, context_BC, apply)
            if mask_BT is not None:  # padding leaves the context as it is
                new_BC = torch.where(mask_BT[:, t, None], new_BC, context_BC)
            context_BC = new_BC
        return torch.stack(outputs, dim=1), context_BC


# At these widths the document's 0.02 starts so near zero that one batch takes long to learn.
_TINY = {
    "vocab_size": 97,
    "hidden_size": 24,
    "context_dim": 16,
    "mlp_size": 32,
    "mlp_layers": 2,
    "initializer_range": 0.2,
}


@register_architecture(
    tiny=(
        _TINY,
        {**_TINY, "update": "gated", "num_contexts": 2, "positions": "none"},
        {**_TINY, "context": "gated_recurrence", "positions": "none"},
        {**_TINY, "context": "selective_state", "positions": "none", "state_head_dim": 8},
    ),
)
class ContextVectorForCausalLM(ContextForCausalLM):
    """Context vector (New-LLM): no attention, a vector updated each token by an MLP or gates."""

    decoder_class = ContextVectorModel
    head_bias = True
