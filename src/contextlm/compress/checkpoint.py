"""Models that keep a policy: what they save opens with the Auto classes, and decodes by it.

Such a model is its own architecture's in everything else: for each plain type a subclass of its
classes is made when it is first asked for. Of all of them there is one `model_type`, so that a
transformers that knows nothing of policies refuses the files instead of decoding without.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from contextlm.compress.adaptors import ARCHITECTURES, attentions_of
from contextlm.compress.base import Policy, parse_policy
from contextlm.compress.calibration import Calibration, Sizes
from contextlm.compress.installed import CompressedCache, check_keeps_none
from contextlm.models.stub import auto_map, write_stub

TYPE = "compressed"


class CompressedConfig(PreTrainedConfig):
    """Reads the configuration of a model that keeps a policy: that of its plain type, and

    Attributes:
        plain_type: the `model_type` that it would be without.
        cache_policy: the policy's spec.
        cache_ranks: numbers a token that each layer keeps, where the policy is fitted; or None.
    """

    model_type = TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the plain type's own class.

        Raises:
            ValueError: there is no such type, or it names no policy.
        """
        plain = config_dict.get("plain_type")
        if plain not in ARCHITECTURES or not isinstance(config_dict.get("cache_policy"), str):
            raise ValueError(f"plain_type {plain!r}, cache_policy: expected a model's and a spec")
        return _config_class(plain).from_dict(config_dict, **kwargs)


# The next two stand in front of a class of transformers that is chosen at run time, so mypy knows
# nothing of what `super()` reaches: hence the silenced checks.


class _KeepsPolicy:
    """What configurations of all plain types have beside those of transformers."""

    auto_map: ClassVar[dict[str, str]] = {}
    plain_type: str
    cache_policy: str
    cache_ranks: Sequence[int] | None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("auto_map", "model_type"):  # of a file: the class has its own
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with `auto_map`."""
        return {**super().to_dict(), "auto_map": self.auto_map}  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the module that `auto_map` names."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_stub(Path(save_directory), CompressedConfig, self.auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class _DecodesByPolicy:
    """What models of all plain types have beside those of transformers: their policy, installed.

    The policy's own weights are the attention modules' ``cache_weights``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        sizes = Sizes(config.cache_ranks)
        self._policy = CompressedCache(model, config.cache_policy, calibration=sizes)
        for reader in self._policy.readers:
            if reader.weights is not None:
                reader.attention.module.cache_weights = reader.weights
        self._policy.enter()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Attention is in the plain type's file; transformers looks for it in the class's own."""
        return True


@cache
def _config_class(plain_type: str) -> Any:
    """The configurations of one plain type; the first call makes its models known."""
    plain = CONFIG_MAPPING[plain_type]
    name = f"Compressed{plain.__name__}"
    made: Any = type(name, (_KeepsPolicy, plain), {"__module__": __name__, "model_type": TYPE})
    made.auto_map = auto_map(AutoConfig=CompressedConfig)
    for auto, known in (
        (AutoModel, MODEL_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        kind = known[plain]
        own = {"__module__": __name__, "config_class": made}
        auto.register(made, type(f"Compressed{kind.__name__}", (_DecodesByPolicy, kind), own))
    return made


def compressed_config(plain: PreTrainedConfig, policy: Policy, sizes: Sizes) -> PreTrainedConfig:
    """The configuration of a model that keeps a policy.

    Raises:
        InputError: it keeps one already.
    """
    check_keeps_none(plain)
    ranks = None if sizes.ranks is None else list(sizes.ranks)
    kept = {"plain_type": plain.model_type, "cache_policy": policy.spec, "cache_ranks": ranks}
    made = _config_class(plain.model_type).from_dict({**plain.to_dict(), **kept})
    made._attn_implementation = plain._attn_implementation
    return made


def plain_config(config: Any) -> PreTrainedConfig:
    """The configuration of a model as it would be without the policy that it may keep."""
    if not isinstance(config, _KeepsPolicy):
        return config
    values = config.to_dict()
    for name in ("model_type", "auto_map", "plain_type", "cache_policy", "cache_ranks"):
        values.pop(name)
    plain: PreTrainedConfig = CONFIG_MAPPING[config.plain_type].from_dict(values)
    return plain


def compressed_model(
    model: PreTrainedModel,
    policy: Policy | str,
    *,
    calibration: Calibration | Tensor | None = None,
) -> Any:
    """A copy of a trained model that keeps a policy, its fitted weights too, wherever it goes.

    It decodes by the policy without further words, trains under it, and what `save_pretrained`
    writes opens with the Auto classes where contextlm is imported, or with
    ``trust_remote_code=True`` where it is installed.

    Args:
        model, policy, calibration: as for `CompressedCache`.

    Raises:
        InputError: as there.
    """
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    with CompressedCache(model, policy, calibration=calibration) as fitted:
        weights = [reader.weights for reader in fitted.readers]
    ranks = [part.rank for part in weights if part is not None]
    config = compressed_config(model.config, policy, Sizes(ranks or None))
    auto = AutoModel if model.base_model is model else AutoModelForCausalLM
    made = auto.from_config(config, dtype=model.dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    for attention, part in zip(attentions_of(made), weights, strict=True):
        if part is not None:
            attention.module.cache_weights.load_state_dict(part.state_dict())
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


AutoConfig.register(TYPE, CompressedConfig)
