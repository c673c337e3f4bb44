"""What the configurations of all architectures share.

No `from __future__ import annotations` here and in the architectures' files: transformers checks
configuration values against the annotations, which must then be types and not strings.
"""

from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from contextlm.models.cache import NAMES
from contextlm.models.stub import write_stub


@strict
class ContextConfig(PreTrainedConfig):
    """Fields and checks of every architecture; ``validate_architecture`` is where they are checked.

    A check raises a `ValueError` that names the field and its value; None counts as left open.

    Args:
        initializer_range: standard deviation of the linear layers and the embeddings.
        use_cache: return a cache by default.
        bos_token_id: begins a text.
        eos_token_id: ends it.
        pad_token_id: fills rows up.
        tie_word_embeddings: the head's weight is the embedding's.

    Attributes:
        auto_map: what makes any client open what is saved (`models.stub`); of the class, once it is
            registered.
    """

    auto_map: ClassVar[dict[str, str]] = {}

    keys_to_ignore_at_inference = [*NAMES]
    # Clients ask every configuration for these, also where there is nothing to count.
    num_hidden_layers = num_attention_heads = 1

    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # of a file: the class has its own
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: what is saved always brings `auto_map` and its module."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with what clients look for: `auto_map`, and the number of heads."""
        asked = {name: getattr(self, name, None) for name in ("auto_map", "num_attention_heads")}
        return {**super().to_dict(), **{name: value for name, value in asked.items() if value}}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the module that `auto_map` names."""
        if self.auto_map:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_stub(Path(save_directory), type(self), self.auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)

    def check_counts(self, *names: str) -> None:
        """Refuse sizes and counts below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_positive(self, *names: str) -> None:
        """Refuse numbers that are not above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def check_dropout(self, *names: str) -> None:
        """Refuse shares to drop outside of [0, 1)."""
        for name in names:
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")

    def check_divides(self, name: str, whole: str) -> None:
        """Refuse a count that does not divide a width."""
        part, width = getattr(self, name), getattr(self, whole)
        if width % part:
            raise ValueError(f"{name} ({part}) must divide {whole} ({width})")

    def check_state_heads(self, inner: int) -> None:
        """Refuse heads of a matrix state, `state_head_dim` wide, that do not fill its channels."""
        head = getattr(self, "state_head_dim")  # noqa: B009 - not every architecture has it
        if inner % head:
            raise ValueError(
                f"state_head_dim ({head}) must divide the {inner} channels of the selective state"
            )
